"""The plots in docs/plots: one idea each, readable on light and dark backgrounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.page import source
from bench.peers import PEERS
from bench.report import Figure, Results, delta_ms, figure, number, pick
from bench.scenarios import ORDERS
from lab.running import ROOT

FOLDER = ROOT / "docs/plots"
SPEEDS = ({"depth": 1, "order": ORDERS[0]}, *({"depth": 32, "order": order} for order in ORDERS))
#: An axis is logarithmic if its values differ by more than this factor.
MAX_LINEAR_RANGE = 8
INK, FAINT, OTHERS = "#7d8590", "#7d859040", "#6c8ebf"
COLOURS = {"gserver": "#e8710a", "uvloop": "#3b82f6", "go": "#12a18a", "epoll": "#a371f7"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gserver",  # The same figures give the same file.
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Plot:
    """A plot: its file in docs/plots, its title, and the measure of a scenario that it shows."""

    file: str
    title: str
    scenario: str
    measure: str
    unit: str


@dataclass(frozen=True)
class Bars(Plot):
    """A plot with a row for each server, the smallest on top, and a panel for each choice.

    A row is a bar, or a dot on a logarithmic axis, where a bar's length has no meaning.
    """

    choices: tuple[dict[str, Any], ...] = ({},)


@dataclass(frozen=True, kw_only=True)
class Lines(Plot):
    """A plot with a line for each server, over the values of `key`."""

    key: str
    label: str


BARS = (
    Bars("speed", "CPU per command, 64 connections", "speed", "cpu_us", "µs", SPEEDS),
    Bars("connect", "CPU per connection: accept, WHO, close", "connect", "cpu_us", "µs"),
    Bars(
        "idle",
        "Memory per client, 10,000 idle clients",
        "idle",
        "client_bytes",
        "bytes",
        ({"clients": 10000},),
    ),
)
LINES = (
    Lines(
        "connections",
        "CPU per command by connections",
        "connections",
        "cpu_us",
        "µs",
        key="clients",
        label="connections, all active",
    ),
    Lines(
        "memory",
        "Memory of the server by connections",
        "connections",
        "memory_mb",
        "MB",
        key="clients",
        label="connections, all active",
    ),
    Lines(
        "depth",
        "CPU per command by commands in flight, shuffled",
        "depth",
        "cpu_us",
        "µs",
        key="depth",
        label="in flight on each connection",
    ),
)


def draw(results: Results) -> None:
    """Draw the plots for which there are samples."""
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for bars in BARS:
            if bars.scenario in results:
                _bars(results, bars)
        if "speed" in results:
            _latency(results)
        for lines in LINES:
            if lines.scenario in results:
                _lines(results, lines)
        if "propagation" in results:
            _propagation(results)


@contextmanager
def plotted(
    name: str, title: str, made_of: str, height: float, panels: int = 1
) -> Iterator[list[Axes]]:
    """Axes for a plot that is written after the body.

    `made_of` is the caption: the commit, the date and the machine of its figures.
    """
    picture = Picture(figsize=(7.6, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    picture.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    picture.supxlabel(made_of, x=0.99, ha="right", fontsize=8)
    yield [picture.add_subplot(1, panels, panel + 1) for panel in range(panels)]
    picture.savefig(FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None})


def _made_of(results: Results, scenario: str) -> str:
    return source(results, [scenario])


def _bars(results: Results, plot: Bars) -> None:
    """Draw rows with their quartiles."""
    servers = _sorted(results, plot.scenario, plot.measure, **plot.choices[0])
    height = 1.1 + 0.3 * len(servers)
    drawn = [
        {
            server: figure(results, plot.scenario, plot.measure, server=server, **choice)
            for server in servers
        }
        for choice in plot.choices
    ]
    values = [value.value for row in drawn for value in row.values() if value]
    is_log = _needs_log(values)
    scale = f"{plot.unit}, logarithmic scale" if is_log else plot.unit
    title = f"{plot.title} ({scale})" if plot.choices[1:] else plot.title
    made_of = _made_of(results, plot.scenario)
    with plotted(plot.file, title, made_of, height, len(plot.choices)) as panels:
        for panel, (axes, choice) in enumerate(zip(panels, plot.choices, strict=True)):
            if is_log:
                axes.set_xscale("log")
                axes.set_xlim(min(values) / 1.6, max(values) * 5)
                _dot_panel(axes, drawn[panel])
            else:
                _bar_panel(axes, drawn[panel])
            label = f"{choice['depth']} in flight, {choice['order']}" if panels[1:] else scale
            axes.set_xlabel(label)
            _name_rows(axes, servers if panel == 0 else [""] * len(servers))


def _bar_panel(axes: Axes, drawn: dict[str, Figure | None]) -> None:
    """Draw the bars of one panel. A server without a figure keeps its row."""
    for row, (server, value) in enumerate(drawn.items()):
        if not value:
            continue
        axes.barh(row, value.value, color=_colour(server), height=0.66)
        axes.plot([value.low, value.high], [row, row], color=INK, linewidth=1.2)
        _write(axes, number(value.value), max(value.value, value.high), row, 5)
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_in_full)


def _dot_panel(axes: Axes, drawn: dict[str, Figure | None]) -> None:
    """Draw the dots of one panel with a logarithmic axis."""
    left, _ = axes.get_xlim()
    for row, (server, value) in enumerate(drawn.items()):
        if not value:
            continue
        axes.plot([left, value.value], [row, row], color=FAINT, linewidth=0.8, zorder=1)
        axes.plot([value.low, value.high], [row, row], color=INK, linewidth=1.6, zorder=2)
        axes.scatter(value.value, row, s=46, color=_colour(server), zorder=3)
        _write(axes, number(value.value), max(value.value, value.high), row, 7)
    _tick(axes, "x", (1,))


def _latency(results: Results) -> None:
    """Draw a ring at the median and a dot at the 99th percentile."""
    servers = _sorted(results, "speed", "p50_us", **SPEEDS[0])
    title = "Time to the reply, 64 connections, 1 in flight"
    with plotted("latency", title, _made_of(results, "speed"), 3.8) as (axes,):
        for row, server in enumerate(servers):
            ends = [
                figure(results, "speed", measure, server=server, **SPEEDS[0])
                for measure in ("p50_us", "p99_us")
            ]
            values = [end.value / 1000 for end in ends if end]
            axes.plot(values, [row] * len(values), color=_colour(server), linewidth=2, zorder=2)
            for value, fill, shift in zip(values, ("none", _colour(server)), (-8, 8), strict=False):
                axes.scatter(
                    value, row, s=42, facecolors=fill, edgecolors=_colour(server), zorder=3
                )
                _write(axes, number(value), value, row, shift)
        axes.set_xscale("log")
        axes.margins(x=0.16)
        _tick(axes, "x", (1, 2, 3, 5, 7))
        axes.set_xlabel("ms, logarithmic scale; ring: median, dot: 99th percentile")
        _name_rows(axes, servers)


def _lines(results: Results, plot: Lines) -> None:
    """Draw the lines, their quartiles, and the servers' names at their ends."""
    samples = results[plot.scenario]["samples"]
    values = sorted({sample[plot.key] for sample in samples if plot.key in sample})
    lines: dict[str, dict[float, Figure]] = {}
    for server in dict.fromkeys(sample["server"] for sample in samples):
        where = {"server": server}
        points = {
            value: figure(results, plot.scenario, plot.measure, **where, **{plot.key: value})
            for value in values
        }
        found = {value: point for value, point in points.items() if point}
        if found:
            lines[server] = found
    with plotted(plot.file, plot.title, _made_of(results, plot.scenario), 4.0) as (axes,):
        for server, line in lines.items():
            _line(axes, server, line)
        axes.set_xscale("log")
        _tick(axes, "x", (1,))
        _scale_y(axes, [point.value for line in lines.values() for point in line.values()])
        if plot.key == "depth":
            axes.set_xticks(values)
        axes.set_xlabel(plot.label)
        axes.set_ylabel(plot.unit)
        axes.grid(axis="y")
        _name_ends(axes, lines)


def _line(axes: Axes, server: str, line: dict[float, Figure]) -> None:
    """Draw one server's line: medians over the values, with quartiles."""
    colour, width = _colour(server), 2.4 if server == "gserver" else 1.6
    xs = list(line)
    middles, lows, highs, _ = zip(*line.values(), strict=True)
    axes.plot(xs, middles, color=colour, marker="o", markersize=4, linewidth=width)
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _scale_y(axes: Axes, heights: list[float]) -> None:
    """Make the vertical axis logarithmic if the values are far apart; otherwise start at zero."""
    if _needs_log(heights):
        axes.set_yscale("log")
        _tick(axes, "y", (1, 2, 5))
    else:
        axes.set_ylim(bottom=0)


def _needs_log(values: list[float]) -> bool:
    return max(values) > MAX_LINEAR_RANGE * min(values)


def _name_ends(axes: Axes, lines: dict[str, dict[float, Figure]]) -> None:
    """Write the servers' names at the ends of their lines, spread where they would overlap."""
    ends = [(*list(line.items())[-1], server) for server, line in lines.items()]
    last = -1.0
    for x, point, server in sorted(ends, key=lambda end: end[1].value):
        end = axes.transData.transform((x, point.value))
        last = max(float(axes.transAxes.inverted().transform(end)[1]), last + 0.065)
        style: dict[str, Any] = {"color": _colour(server), "va": "center", "fontweight": "bold"}
        axes.annotate(PEERS[server].title, (1.01, last), xycoords="axes fraction", **style)


def _propagation(results: Results) -> None:
    """Draw every delay, the medians, and the limit."""
    title = "Time until a new client of one server is in the WHO of another"
    with plotted("propagation", title, _made_of(results, "propagation"), 3.9) as (axes,):
        seen = dict.fromkeys(sample["interval"] for sample in results["propagation"]["samples"])
        delays = {
            interval: pick(results, "propagation", "delay_ms", interval=interval)
            for interval in seen
        }
        delays = {interval: values for interval, values in delays.items() if values}
        for interval, values in delays.items():
            beside = [interval * 1.12 ** ((index % 7 - 3) / 6) for index in range(len(values))]
            axes.scatter(beside, values, s=16, color=OTHERS, alpha=0.55, linewidths=0)
        limits = [delta_ms(interval) for interval in delays]
        axes.plot(
            [*delays],
            limits,
            color=INK,
            linestyle="--",
            linewidth=1.6,
            label="limit Δ = 0.95 H + 0.125 s",
        )
        for interval, limit in zip(delays, limits, strict=True):
            axes.annotate(
                f"{limit:,.0f}", (interval, limit), (0, 5), textcoords="offset points", ha="center"
            )
        axes.plot(
            [*delays],
            [median(values) for values in delays.values()],
            color=COLOURS["gserver"],
            marker="o",
            markersize=5,
            linewidth=2.4,
            label="median",
        )
        axes.legend(frameon=False, loc="lower right")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(y=0.12)
        _tick(axes, "x", (1,))
        _tick(axes, "y", (1, 2, 5))
        axes.set_xticks([*delays])
        axes.grid(axis="y")
        axes.set_xlabel("H: --heartbeat-interval, s")
        axes.set_ylabel("ms")


def _tick(axes: Axes, letter: str, steps: tuple[int, ...]) -> None:
    """Write full numbers on a logarithmic axis, at these steps of each decade."""
    axis = axes.xaxis if letter == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(_in_full)
    axis.set_minor_locator(NullLocator())


_in_full = FuncFormatter(lambda value, _: f"{value:,g}")


def _name_rows(axes: Axes, servers: list[str]) -> None:
    """Put the servers' names beside their rows, the first on top."""
    axes.set_yticks(
        range(len(servers)), [PEERS[server].title if server else "" for server in servers]
    )
    axes.invert_yaxis()
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)


def _write(axes: Axes, text: str, x: float, y: float, shift: int) -> None:
    """Write beside a point, to its left when `shift` is negative."""
    side = "right" if shift < 0 else "left"
    axes.annotate(text, (x, y), (shift, 0), textcoords="offset points", va="center", ha=side)


def _colour(server: str) -> str:
    return COLOURS.get(server, OTHERS)


def _sorted(results: Results, name: str, measure: str, **where: Any) -> list[str]:
    """The servers that have a figure, the smallest first."""
    servers = dict.fromkeys(sample["server"] for sample in results[name]["samples"])
    found = {server: figure(results, name, measure, server=server, **where) for server in servers}
    return sorted(
        (server for server, value in found.items() if value), key=lambda server: found[server] or ()
    )
