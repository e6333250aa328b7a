"""The plots in docs/plots: one idea each, to be read on light ground and on dark."""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.peers import PEERS, ROOT
from bench.report import Results, figure, number, pick
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


def draw(results: Results) -> None:
    """Draw the plots for which there are samples."""
    FOLDER.mkdir(exist_ok=True)
    connections = ("connections", "clients", "connections, all active")
    with mpl.rc_context(STYLE):
        if "speed" in results:
            _bars(
                results, "speed", "CPU a command, 64 connections", "speed", "cpu_us", "µs", SPEEDS
            )
            _latency(results)
        if "connect" in results:
            _bars(
                results,
                "connect",
                "CPU to take a client in, answer it and let it go",
                "connect",
                "cpu_us",
                "µs",
            )
        if "idle" in results:
            title = "Memory a client of 10,000 idle ones"
            _bars(results, "idle", title, "idle", "client_bytes", "bytes", ({"clients": 10000},))
        if "connections" in results:
            _lines(
                results, "connections", "CPU a command by connections", *connections, "cpu_us", "µs"
            )
            _lines(
                results,
                "memory",
                "Memory of the server by connections",
                *connections,
                "memory_mb",
                "MB",
            )
        if "depth" in results:
            title = "CPU a command by commands in flight"
            _lines(
                results,
                "depth",
                title,
                "depth",
                "depth",
                "in flight on each connection",
                "cpu_us",
                "µs",
            )
        if "propagation" in results:
            _propagation(results)


@contextmanager
def _picture(name: str, title: str, height: float, panels: int = 1) -> Iterator[list[Axes]]:
    """Axes for a plot that is written when the body is done."""
    picture = Picture(figsize=(7.6, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    picture.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    yield [picture.add_subplot(1, panels, panel + 1) for panel in range(panels)]
    picture.savefig(FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None})


def _bars(
    results: Results,
    plot: str,
    title: str,
    name: str,
    measure: str,
    unit: str,
    choices: tuple[dict[str, Any], ...] = ({},),
) -> None:
    """Draw a bar for each server, the least on top, and its quartiles; a panel for each of these
    choices of samples.
    """
    servers = _sorted(results, name, measure, **choices[0])
    with _picture(plot, title, 0.9 + 0.3 * len(servers), len(choices)) as panels:
        for panel, (axes, choice) in enumerate(zip(panels, choices, strict=True)):
            drawn = {
                server: figure(results, name, measure, server=server, **choice)
                for server in servers
            }
            found = {server: value for server, value in drawn.items() if value}
            edge = 4 * median(
                value.value for value in found.values()
            )  # What is longer is cut, so that the others show.
            for row, server in enumerate(servers):
                if server not in found:
                    continue
                value = found[server]
                axes.barh(row, min(value.value, edge), color=_colour(server), height=0.66)
                if value.high < edge:
                    axes.plot([value.low, value.high], [row, row], color=INK, linewidth=1.2)
                _write(axes, number(value.value), min(max(value.value, value.high), edge), row, 5)
            axes.margins(x=0.25)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(_in_full)
            axes.set_xlabel(
                f"{unit}, {choice['depth']} in flight, {choice['order']}" if panels[1:] else unit
            )
            _name_rows(axes, servers if panel == 0 else [""] * len(servers))


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


def _lines(
    results: Results, plot: str, title: str, name: str, key: str, label: str, *what: str
) -> None:
    """Draw a line for each server, its quartiles about it, its name at its end; `what` is the
    measure and its unit.
    """
    measure, unit = what
    with _picture(plot, title, 3.8) as (axes,):
        ends: list[tuple[float, float, str]] = []
        all_points: list[tuple[float, float]] = []
        samples = results[name]["samples"]
        values = sorted({sample[key] for sample in samples if key in sample})
        for server in dict.fromkeys(sample["server"] for sample in samples):
            points = [
                (value, figure(results, name, measure, server=server, **{key: value}))
                for value in values
            ]
            found = [(value, *point) for value, point in points if point]
            if found:
                xs, middles, lows, highs, _ = zip(*found, strict=True)
                width = 2.4 if server == "gserver" else 1.6
                axes.plot(
                    xs, middles, color=_colour(server), marker="o", markersize=4, linewidth=width
                )
                axes.fill_between(xs, lows, highs, color=_colour(server), alpha=0.18, linewidth=0)
                all_points += zip(xs, middles, strict=True)
                ends.append((xs[-1], middles[-1], server))
        axes.set_xscale("log")
        _tick(axes, "x", (1,))
        least, most = (choose(end[1] for end in all_points) for choose in (min, max))
        if most > 8 * least:
            axes.set_yscale("log")
            _tick(axes, "y", (1, 2, 5))
        else:
            axes.set_ylim(bottom=0)
        if key == "depth":
            axes.set_xticks(values)
        axes.set_xlabel(label)
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        last = -1.0
        for x, y, server in sorted(
            ends, key=lambda end: end[1]
        ):  # Names that would touch are moved apart.
            last = max(
                float(axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]),
                last + 0.065,
            )
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
