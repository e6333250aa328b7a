"""The plots in docs/plots: one idea each, to be read on light ground and on dark."""

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

from bench.peers import PEERS, ROOT
from bench.report import Figure, Results, figure, number, pick
from bench.scenarios import ORDERS

FOLDER = ROOT / "docs/plots"
SPEEDS = ({"depth": 1, "order": ORDERS[0]}, *({"depth": 32, "order": order} for order in ORDERS))
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
    """A plot with a bar for each server, the shortest on top, and a panel for each choice."""

    choices: tuple[dict[str, Any], ...] = ({},)


@dataclass(frozen=True, kw_only=True)
class Lines(Plot):
    """A plot with a line for each server, over the values of `key`."""

    key: str
    label: str


BARS = (
    Bars("speed", "CPU a command, 64 connections", "speed", "cpu_us", "µs", SPEEDS),
    Bars("connect", "CPU to take a client in, answer it and let it go", "connect", "cpu_us", "µs"),
    Bars(
        "idle",
        "Memory a client of 10,000 idle ones",
        "idle",
        "client_bytes",
        "bytes",
        ({"clients": 10000},),
    ),
)
LINES = (
    Lines(
        "connections",
        "CPU a command by connections",
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
        "CPU a command by commands in flight",
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
def _picture(name: str, title: str, height: float, panels: int = 1) -> Iterator[list[Axes]]:
    """Axes for a plot that is written when the body is done."""
    picture = Picture(figsize=(7.6, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    picture.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    yield [picture.add_subplot(1, panels, panel + 1) for panel in range(panels)]
    picture.savefig(FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None})


def _bars(results: Results, plot: Bars) -> None:
    """Draw bars with their quartiles."""
    servers = _sorted(results, plot.scenario, plot.measure, **plot.choices[0])
    height = 0.9 + 0.3 * len(servers)
    with _picture(plot.file, plot.title, height, len(plot.choices)) as panels:
        for panel, (axes, choice) in enumerate(zip(panels, plot.choices, strict=True)):
            drawn = {
                server: figure(results, plot.scenario, plot.measure, server=server, **choice)
                for server in servers
            }
            _bar_panel(axes, drawn)
            label = plot.unit
            if len(panels) > 1:
                label = f"{plot.unit}, {choice['depth']} in flight, {choice['order']}"
            axes.set_xlabel(label)
            _name_rows(axes, servers if panel == 0 else [""] * len(servers))


def _bar_panel(axes: Axes, drawn: dict[str, Figure | None]) -> None:
    """Draw the bars of one panel. A server without a figure keeps its row."""
    # A longer bar is cut here, so that the others show.
    edge = 4 * median(value.value for value in drawn.values() if value)
    for row, (server, value) in enumerate(drawn.items()):
        if not value:
            continue
        axes.barh(row, min(value.value, edge), color=_colour(server), height=0.66)
        if value.high < edge:
            axes.plot([value.low, value.high], [row, row], color=INK, linewidth=1.2)
        _write(axes, number(value.value), min(max(value.value, value.high), edge), row, 5)
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_in_full)


def _latency(results: Results) -> None:
    """Draw a ring at the median and a dot at the 99th percentile."""
    servers = _sorted(results, "speed", "p50_us", **SPEEDS[0])
    with _picture("latency", "Time to the reply, 64 connections, 1 in flight", 3.6) as (axes,):
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
        axes.set_xlabel("ms; ring: median, dot: 99th percentile")
        _name_rows(axes, servers)


def _lines(results: Results, plot: Lines) -> None:
    """Draw the lines, their quartiles about them, and the servers' names at their ends."""
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
    with _picture(plot.file, plot.title, 3.8) as (axes,):
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
    """Draw one server's line: medians over the values, with the quartiles about them."""
    colour, width = _colour(server), 2.4 if server == "gserver" else 1.6
    xs = list(line)
    middles, lows, highs, _ = zip(*line.values(), strict=True)
    axes.plot(xs, middles, color=colour, marker="o", markersize=4, linewidth=width)
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _scale_y(axes: Axes, heights: list[float]) -> None:
    """Make the vertical axis logarithmic if the values are far apart; else start it at zero."""
    if max(heights) > 8 * min(heights):
        axes.set_yscale("log")
        _tick(axes, "y", (1, 2, 5))
    else:
        axes.set_ylim(bottom=0)


def _name_ends(axes: Axes, lines: dict[str, dict[float, Figure]]) -> None:
    """Write the servers' names at the ends of their lines, apart where they would touch."""
    ends = [(*list(line.items())[-1], server) for server, line in lines.items()]
    last = -1.0
    for x, point, server in sorted(ends, key=lambda end: end[1].value):
        end = axes.transData.transform((x, point.value))
        last = max(float(axes.transAxes.inverted().transform(end)[1]), last + 0.065)
        style: dict[str, Any] = {"color": _colour(server), "va": "center", "fontweight": "bold"}
        axes.annotate(PEERS[server].title, (1.01, last), xycoords="axes fraction", **style)


def _propagation(results: Results) -> None:
    """Draw every delay, and the medians."""
    title = "Time until a new client of one server is in the WHO of another"
    with _picture("propagation", title, 3.6) as (axes,):
        seen = dict.fromkeys(sample["interval"] for sample in results["propagation"]["samples"])
        delays = {
            interval: pick(results, "propagation", "delay_ms", interval=interval)
            for interval in seen
        }
        delays = {interval: values for interval, values in delays.items() if values}
        for interval, values in delays.items():
            beside = [interval * 1.12 ** ((index % 7 - 3) / 6) for index in range(len(values))]
            axes.scatter(beside, values, s=16, color=OTHERS, alpha=0.55, linewidths=0)
        middles = [median(values) for values in delays.values()]
        axes.plot(
            [*delays],
            middles,
            color=COLOURS["gserver"],
            marker="o",
            markersize=5,
            linewidth=2.4,
            label="median",
        )
        axes.legend(frameon=False, loc="upper left")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _tick(axes, "x", (1,))
        _tick(axes, "y", (1, 2, 5))
        axes.set_xticks([*delays])
        axes.grid(axis="y")
        axes.set_xlabel("--heartbeat-interval, s")
        axes.set_ylabel("ms")


def _tick(axes: Axes, letter: str, steps: tuple[int, ...]) -> None:
    """Write the numbers of a logarithmic axis in full, at these steps of each decade."""
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
    """The servers that have a figure, the least first."""
    servers = dict.fromkeys(sample["server"] for sample in results[name]["samples"])
    found = {server: figure(results, name, measure, server=server, **where) for server in servers}
    return sorted(
        (server for server, value in found.items() if value), key=lambda server: found[server] or ()
    )
