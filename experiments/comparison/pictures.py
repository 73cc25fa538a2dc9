"""The pictures of a comparison, as SVG texts that a page can hold."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.comparison import statistics
from experiments.comparison.plan import FINAL, SEARCH, Plan

BLUE, RED, GREY = "#2166ac", "#b2182b", "#767676"
COLUMNS = 5
ACCURACY = "eval/accuracy"


def forest(baseline: str, lines: Sequence[Any]) -> str:
    """Differences of accuracy to the baseline, with intervals; coloured where significant."""
    others = [line for line in lines if line.arm != baseline and line.difference.n > 1]
    figure = Figure(figsize=(8, 0.6 + 0.26 * len(others)), layout="constrained")
    ax = figure.subplots()
    for y, line in enumerate(others):
        d = line.difference
        colour = GREY if not line.significant else BLUE if d.value > 0 else RED
        ax.plot([100 * d.low, 100 * d.high], [y, y], color=colour, linewidth=2)
        ax.plot(100 * d.value, y, "o", color=colour, markersize=5)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(others)), [line.arm for line in others], fontsize=9)
    ax.set_xlabel(f"held-out accuracy less that of {baseline}, points (95% interval over seeds)")
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.9")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(left=False)
    return _svg(figure)


def curves(plan: Plan, rows: Sequence[dict], task: str, arms: Sequence[str]) -> str:
    """Held-out accuracy over the steps: each arm over the baseline, mean and interval."""
    num_rows = -(-len(arms) // COLUMNS)
    figure = Figure(figsize=(11, 0.3 + 1.6 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    of = {arm: _curve(rows, task, arm) for arm in arms}
    for ax, arm in zip(axes, arms, strict=False):
        for name, colour in ((plan.baseline, GREY), (arm, BLUE)):
            steps, means = of[name]
            if steps:
                ax.plot(steps, [m.value for m in means], color=colour, linewidth=1.5)
                ends = [m.low for m in means], [m.high for m in means]
                ax.fill_between(steps, *ends, color=colour, alpha=0.2, linewidth=0)
        ax.set_title(arm, fontsize=9, loc="left")
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.grid(color="0.9", linewidth=0.6)
        ax.tick_params(labelsize=8, length=2)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    return _svg(figure)


def _curve(rows: Sequence[dict], task: str, arm: str):
    runs = [
        dict(map(tuple, row["curves"][ACCURACY]))
        for row in rows
        if (row["task"], row["stage"], row["arm"]) == (task, FINAL, arm) and "curves" in row
    ]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return steps, [statistics.mean([run[step] for run in runs]) for step in steps]


def search(rows: Sequence[dict], task: str, arms: Sequence[str]) -> str | None:
    """Accuracy of the last quarter of rollouts of every arm, for every learning rate tried."""
    found = {
        (row["arm"], row["rate"]): row["metrics"]["rollout/accuracy"]
        for row in rows
        if (row["task"], row["stage"]) == (task, SEARCH) and "metrics" in row
    }
    names = [arm for arm in arms if any(name == arm for name, _ in found)]
    rates = sorted({rate for _, rate in found})
    if not names:
        return None
    grid = np.array([[found.get((arm, rate), np.nan) for rate in rates] for arm in names])
    figure = Figure(figsize=(2.6 + 0.9 * len(rates), 0.7 + 0.24 * len(names)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        best = value == np.nanmax(grid[y])
        colour = "white" if value > 0.5 else "black"
        weight = "bold" if best else "normal"
        text = "-" if np.isnan(value) else f"{value:.1%}"
        ax.text(x, y, text, ha="center", va="center", fontsize=8, color=colour, weight=weight)
    ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlabel("learning rate", fontsize=9)
    ax.tick_params(length=0)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """Without the lines that only a file of its own has."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "comparison"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
