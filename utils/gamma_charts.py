"""The chart of sparse training: how γ parts over the epochs into what stays and what may go."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .charts import COLOURS, GREY, save_figure
from .sparsity import EDGES, HARMLESS

RIDGES = 24  # epochs that a ridge plot has room for
OVERLAP = 3.0  # rows that the highest ridge reaches


def draw_gammas(metrics_file: Path, path: Path) -> None:
    """Draw the histogram of |γ| of a run's epochs, the share that may go, and s, from its metrics.jsonl."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    rows = [row["gammas"] | {"epoch": row["epoch"]} for row in rows if "gammas" in row]
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplot_mosaic([["ridges", "share"], ["ridges", "s"]], width_ratios=(1.6, 1))
    chosen = np.unique(np.linspace(0, len(rows) - 1, RIDGES).round().astype(int))
    _draw_ridges(axes["ridges"], [rows[index] for index in chosen])
    epochs, marker = [row["epoch"] for row in rows], "." if len(rows) == 1 else ""
    shares = [row["share"] for row in rows]
    label = f"|γ| under {HARMLESS:g} (last {shares[-1]:.1%})"
    axes["share"].plot(epochs, shares, color=COLOURS[0], marker=marker, label=label)
    axes["share"].plot(epochs, [row["end"] for row in rows], color=COLOURS[4], ls="--", marker=marker, label="forecast")
    axes["share"].axhline(rows[-1]["target"], color=COLOURS[5], linestyle=":", label="wanted")
    axes["share"].set(title="share of the groups", ylim=(0, 1))
    axes["s"].plot(epochs, [row["s"] for row in rows], color=COLOURS[2], marker=marker, label="s")
    axes["s"].set(title="strength of the penalty", yscale="log", xlabel="epoch")
    for name in ("share", "s"):
        axes[name].set_xlim(0, epochs[-1] + 1)
        axes[name].grid(alpha=0.3)
        axes[name].legend()
    save_figure(figure, path)


def _draw_ridges(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw a histogram a row, the first epoch on top; square roots of the counts, so that few channels show too."""
    centres = np.sqrt(EDGES[1:] * EDGES[:-1])
    heights = np.sqrt([row["counts"] for row in rows])
    heights *= OVERLAP / heights.max()
    for place, (row, height) in enumerate(zip(rows, heights, strict=True)):
        axes.fill_between(centres, place, place - height, color=COLOURS[0], alpha=0.75, linewidth=0, zorder=place)
        axes.plot(centres, place - height, color="white", linewidth=0.8, zorder=place)
        axes.plot(
            [row["q50"]], [place], marker="|", color=COLOURS[1], markersize=9, markeredgewidth=2, zorder=len(rows)
        )
    axes.axvline(HARMLESS, color=COLOURS[5], linestyle=":", zorder=len(rows))
    step = -(-len(rows) // 12)
    axes.set_yticks(range(0, len(rows), step), [row["epoch"] for row in rows[::step]])
    axes.set(xscale="log", xlim=(EDGES[0], EDGES[-1]), ylim=(len(rows) - 0.5, -OVERLAP - 0.3))
    title = f"largest |γ| of each group; dotted: {HARMLESS:g}, orange: median"
    axes.set(title=title, xlabel="|γ| (what is less stands at the left edge)", ylabel="epoch")
    axes.grid(axis="x", color=GREY, alpha=0.3)
