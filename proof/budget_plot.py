"""docs/plots/budget.svg: the cost of faults against the error budget, as one bar."""

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from bench.plots import FAINT, INK, STYLE, plotted
from proof.availability import BUDGET_SECONDS, budget_parts
from proof.timeline_plots import source

TITLE = f"The error budget: {BUDGET_SECONDS:,.0f} s in 30 days"
#: The colours of the parts, by size.
COLOURS = "#d1242f", "#e8710a", "#f2b13c", "#a371f7", "#3b82f6", "#12a18a", "#6c8ebf", "#8c6d31"
#: The least width of a part with its label inside the bar.
MIN_LABEL_SECONDS = 90


def draw(report: dict[str, Any]) -> None:
    """Draw the bar of the report."""
    with mpl.rc_context(STYLE), plotted("budget", TITLE, source(report), 2.9) as (axes,):
        _draw(axes, budget_parts(report))


def _draw(axes: Axes, known: list[tuple[str, float]]) -> None:
    left = 0.0
    for (name, seconds), colour in zip(known, COLOURS, strict=True):
        label = f"{name}: {seconds:,.0f} s" if seconds >= 10 else f"{name}: {seconds:.2f} s"
        axes.barh(0, seconds, left=left, color=colour, height=0.6, label=label)
        if seconds >= MIN_LABEL_SECONDS:
            axes.text(left + seconds / 2, 0, f"{seconds:,.0f}", ha="center", va="center", color="w")
        left += seconds
    rest = BUDGET_SECONDS - left
    axes.barh(0, rest, left=left, color=FAINT, height=0.6, label=f"not used: {rest:,.0f} s")
    axes.text(left + rest / 2, 0, f"{rest:,.0f}", ha="center", va="center", color=INK)
    axes.set_xlim(0, BUDGET_SECONDS)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("s")
    axes.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, fontsize=8.5
    )
