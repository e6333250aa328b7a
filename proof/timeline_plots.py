"""docs/plots/who-*.svg: the true WHO and each server's, readable on light and dark backgrounds.

The time of the fault is shaded, and the recovery after it more lightly.
"""

from bisect import bisect_right
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from bench.plots import COLOURS, FAINT, INK, STYLE, plotted

TITLES = {
    "failover": "WHO while the Redis primary is killed",
    "partition": "WHO while server A is cut off from Redis",
}
TRUE = "true count"
COLOUR = {TRUE: INK, **dict(zip("ABC", COLOURS.values(), strict=False))}

#: The keys that identify the run of a plot, if the report has them.
SOURCE_KEYS = "gserver", "date", "processor"
#: How strongly the times of the fault and of the recovery are shaded.
SHADE, SHADES = "#d1242f", {"fault": 0.14, "recovery": 0.06}

Steps = list[list[float]]


def draw(report: dict[str, Any]) -> None:
    """Draw each timeline of the report."""
    with mpl.rc_context(STYLE):
        for name, title in TITLES.items():
            with plotted(f"who-{name}", title, source(report), 4.1) as (axes,):
                _draw(axes, report[name])


def source(report: dict[str, Any]) -> str:
    """Name the commit, the date and the machine of a report, if it has them."""
    machine = report["machine"]
    return ", ".join(machine[key] for key in SOURCE_KEYS if key in machine)


def _draw(axes: Axes, timeline: dict[str, Any]) -> None:
    lines: dict[str, Steps] = {TRUE: timeline["truth"], **timeline["said"]}
    for name, steps in lines.items():
        moments, counts = zip(*steps, [timeline["seconds"], steps[-1][1]], strict=True)
        wide: dict[str, Any] = (
            {"linewidth": 5, "alpha": 0.4} if name == TRUE else {"linewidth": 1.6}
        )
        axes.step(moments, counts, where="post", color=COLOUR[name], **wide)
    axes.set_xlim(0, timeline["seconds"])
    axes.set_ylim(0, 1.22 * max(count for steps in lines.values() for _, count in steps))
    axes.set_xlabel("s")
    axes.set_ylabel("clients")
    times = [at for at, _ in timeline["events"]]
    # The last event but one ends the fault; with the last, all servers have reported again.
    spans = pairwise((times[0], *times[-2:]))
    for (name, shade), (start, end) in zip(SHADES.items(), spans, strict=True):
        axes.axvspan(start, end, color=SHADE, alpha=shade, linewidth=0, label=name)
    for at in times:
        axes.axvline(at, color=FAINT, linewidth=1)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    for row, (at, what) in enumerate(_together(timeline["events"], timeline["seconds"] / 100)):
        style: dict[str, Any] = {
            "xycoords": ("data", "axes fraction"),
            "textcoords": "offset points",
            "fontsize": 9,
        }
        axes.annotate(what, (at, 1 - 0.065 * row), (4, 0), va="top", **style)
    _label(axes, lines, *(timeline["events"][number][0] for number in (0, -1)))


def _together(events: list[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Merge the labels of events whose lines are too close."""
    found: list[tuple[float, str]] = []
    for at, what in events:
        if found and at - found[-1][0] < gap:
            found[-1] = found[-1][0], f"{found[-1][1]}, {what}"
        else:
            found.append((at, what))
    return found


def _label(axes: Axes, lines: dict[str, Steps], began: float, ended: float) -> None:
    """Label the lines where they are farthest apart, on the side with more room."""
    moments = [began + (ended - began) * part / 100 for part in range(101)]
    apart = [_spread([count_at(steps, moment) for steps in lines.values()]) for moment in moments]
    at = moments[max(range(6, 95), key=lambda middle: min(apart[middle - 6 : middle + 7]))]
    names = sorted(lines, key=lambda name: count_at(lines[name], at))
    ys = [count_at(lines[name], at) for name in names]
    below, above = (
        [after - before for before, after in pairwise(row)] for row in ([0, *ys], [*ys, 1e9])
    )
    for name, y, to_lower, to_upper in zip(names, ys, below, above, strict=True):
        away = 9 if to_upper > to_lower else -9
        side = "center" if to_upper < 1e6 else "right"
        style: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": side,
            "va": "center",
            "fontweight": "bold",
        }
        axes.annotate(name, (at, y), (0, away), color=COLOUR[name], **style)


def _spread(counts: list[float]) -> float:
    """The total distance between neighbouring numbers."""
    ordered = sorted(counts)
    return sum(min(after - before, 10) for before, after in pairwise(ordered))


def count_at(steps: Steps, moment: float) -> float:
    """The value at this time."""
    return steps[max(0, bisect_right([at for at, _ in steps], moment) - 1)][1]
