"""Charts of a run, a dataset and an evaluation. Colours are Okabe and Ito's, which the colour-blind tell apart."""

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from .anchors import box_sizes
from .labels import Labelled
from .scores import CONFIDENCES, RECALLS, Curves, Evaluation

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # https://jfly.uni-koeln.de/color/
GREY = "#999999"
SMALLEST = 1 / 512  # of a picture's side, where the axes of sizes begin
NAMED = len(COLOURS)  # classes that get a colour and a name of their own; more are grey together
NUMBERED = 25  # classes whose confusion matrix has room for numbers
NAME_LENGTH = 20  # letters of a class name
STRIDES = (8, 16, 32)  # pixels a cell of the usual heads
DPI = 100


def draw_curves(metrics_file: Path, path: Path) -> None:
    """Draw loss, mAP and learning rate of a run from its metrics.jsonl."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss_axes, map_axes, lr_axes = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in rows]
    for part, colour in zip(rows[0]["loss"], itertools.cycle(COLOURS), strict=False):
        loss_axes.plot(epochs, [row["loss"][part] for row in rows], label=part, color=colour, marker=_marker(epochs))
    tested = [row for row in rows if "map50" in row]
    titles = (("map50", "mAP@.5"), ("map50_95", "mAP@.5:.95"), ("f1", "F1"))
    for (key, title), colour in zip(titles, COLOURS, strict=False):
        values = [row[key] for row in tested]
        label = f"{title} (last {values[-1]:.3f})" if values else title
        map_axes.plot([row["epoch"] for row in tested], values, marker=".", label=label, color=colour)
    rates = [row["lr"] for row in rows]
    lr_axes.plot(epochs, rates, label="at the end of the epoch", color=COLOURS[0], marker=_marker(epochs))
    for axes, title in ((loss_axes, "training loss"), (map_axes, "validation"), (lr_axes, "learning rate")):
        axes.set(title=title, xlabel="epoch")
        axes.set_xlim(0, epochs[-1] + 1)
        axes.grid(alpha=0.3)
        axes.legend()
    map_axes.set_ylim(0, 1)
    save_figure(figure, path)


def draw_labels(splits: Mapping[str, Labelled], names: Sequence[str], path: Path) -> None:
    """Draw the boxes of every class in each split, and of the first split where boxes lie and how large they are."""
    panels = ["bars", "centres", "sizes", "crowd"]
    if len(names) <= NUMBERED:
        figure = Figure(figsize=(14, max(4.5, 1.5 + 0.25 * len(names))), layout="constrained")
        axes = figure.subplot_mosaic([panels])
    else:  # tall bars on the left of the others
        figure = Figure(figsize=(10, max(13, 1.5 + 0.17 * len(names))), layout="constrained")
        axes = figure.subplot_mosaic([["bars", panel] for panel in panels[1:]])
    first, labelled = next(iter(splits.items()))
    rows = np.concatenate([np.zeros((0, 5), np.float32), *labelled.labels])
    class_bars(axes["bars"], {split: count_classes(each, len(names)) for split, each in splits.items()}, names)
    centre_map(axes["centres"], rows[:, 1:3])
    size_map(axes["sizes"], rows[:, 3:5])
    counts = np.array([len(each) for each in labelled.labels])
    axes["crowd"].hist(counts, bins=_whole_bins(counts), color=COLOURS[0])
    axes["crowd"].set(title="boxes a picture", xlabel="boxes", ylabel="pictures")
    figure.suptitle(f"{first}: {len(rows):,} boxes in {len(counts):,} pictures")
    save_figure(figure, path)


def draw_overview(
    splits: Mapping[str, Labelled],
    names: Sequence[str],
    path: Path,
    *,
    side: int,
    anchors: Sequence[Sequence[int]],
    findings: Mapping[str, tuple[int, bool]],
) -> None:
    """Draw a dataset on a sheet: balance, places and sizes of boxes, at a network of `side` pixels, and findings.

    `anchors` are (width, height) in those pixels; `findings` give a title's number and whether it is a problem.
    """
    lines = [f"{'problem' if bad else 'oddity'}: {count:,} {title}" for title, (count, bad) in findings.items()]
    panels = [["bars", "centres", "sizes"], ["bars", "crowd", "shapes"], ["found"] * 3]
    charts, text = max(9.5, 1 + 0.17 * len(names)), 0.4 + 0.25 * len(lines)  # inches
    figure = Figure(figsize=(15, charts + text), layout="constrained")
    axes = figure.subplot_mosaic(panels, height_ratios=(charts / 2, charts / 2, text))
    labelled = next(iter(splits.values()))
    rows = np.concatenate([np.zeros((0, 5), np.float32), *labelled.labels])
    class_bars(axes["bars"], {split: count_classes(each, len(names)) for split, each in splits.items()}, names)
    centre_map(axes["centres"], rows[:, 1:3])
    _draw_sides(axes["sizes"], splits, side, anchors)
    bins = _whole_bins(np.array([len(rows) for each in splits.values() for rows in each.labels]))
    for (split, each), colour in zip(splits.items(), COLOURS, strict=False):
        counts = [len(rows) for rows in each.labels]
        axes["crowd"].hist(counts, bins=bins, histtype="step", linewidth=1.5, color=colour, label=split)
        axes["shapes"].scatter(each.sizes[:, 1], each.sizes[:, 0], s=12, alpha=0.4, color=colour, label=split)
    axes["crowd"].set(title="boxes a picture", xlabel="boxes", ylabel="pictures")
    axes["shapes"].set(title="sizes of pictures", xlabel="width in pixels", ylabel="height in pixels")
    axes["shapes"].set_xlim(left=0)
    axes["shapes"].set_ylim(bottom=0)
    for panel in ("crowd", "shapes"):
        axes[panel].legend()
    axes["found"].text(0, 1, "\n".join(lines) or "nothing wrong or odd", va="top", fontsize=11)
    axes["found"].axis("off")
    figure.suptitle(", ".join(f"{split}: {len(each.paths):,} pictures" for split, each in splits.items()))
    save_figure(figure, path)


def _draw_sides(axes: Axes, splits: Mapping[str, Labelled], side: int, anchors: Sequence[Sequence[int]]) -> None:
    """Draw widths against heights of boxes in pixels of the network input, with anchors and the cells of heads."""
    sides = box_sizes(next(iter(splits.values())), (side, side))
    axes.hist2d(*sides.clip(1, side).T, bins=np.geomspace(1, side, 41), cmap="cividis", norm=PowerNorm(0.4))
    for stride in STRIDES:
        axes.plot([1, stride, stride], [stride, stride, 1], color="white", linewidth=0.8, linestyle=":")
    axes.scatter(*np.array(anchors, float).reshape(-1, 2).T, marker="x", color=COLOURS[5], label="anchors")
    cells = ", ".join(map(str, STRIDES))
    axes.set(title=f"boxes at {side}; dotted: cells of {cells}", xlabel="width in pixels", ylabel="height in pixels")
    axes.set(xscale="log", yscale="log", aspect="equal", xlim=(1, side), ylim=(1, side))
    axes.legend(loc="upper left")


def _whole_bins(counts: np.ndarray) -> np.ndarray:
    """Give edges of at most 40 bins around whole numbers from 0 on."""
    top = int(counts.max(initial=0))
    step = -(-(top + 1) // 40)
    return np.arange(0, top + step + 1, step) - 0.5


def class_bars(axes: Axes, counts: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Draw the boxes of each class, a bar a split."""
    places, width = np.arange(len(names)), 0.8 / len(counts)
    for number, ((split, values), colour) in enumerate(zip(counts.items(), COLOURS, strict=False)):
        bars = axes.barh(places + (number - (len(counts) - 1) / 2) * width, values, width, label=split, color=colour)
        if len(names) <= NUMBERED:
            axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
    axes.margins(x=0.2)
    axes.set(title="boxes a class", xlabel="boxes")
    _name_axis(axes, [shown(name) for name in names])
    axes.legend(loc="lower right")


def centre_map(axes: Axes, centres: np.ndarray) -> None:
    """Draw where the centres of boxes [N, 2] (fractions of the picture) lie, as a heat map."""
    axes.hist2d(*centres.T, bins=32, range=((0, 1), (0, 1)), cmap="cividis")
    axes.set(title="centres of boxes", xlabel="x", ylabel="y", aspect="equal")
    axes.invert_yaxis()


def size_map(axes: Axes, sides: np.ndarray) -> None:
    """Draw widths against heights of boxes [N, 2] (fractions of the picture) as a heat map on logarithmic axes."""
    steps = np.geomspace(SMALLEST, 1, 41)
    axes.hist2d(*sides.clip(SMALLEST, 1).T, bins=steps, cmap="cividis", norm=PowerNorm(0.4))  # a few shall show
    axes.set(title="sizes of boxes", xlabel="width", ylabel="height", xscale="log", yscale="log", aspect="equal")


def count_classes(labelled: Labelled, classes: int) -> np.ndarray:
    """Count the boxes of each class."""
    labels = np.concatenate([np.zeros(0), *(rows[:, 0] for rows in labelled.labels)])
    return np.bincount(labels.astype(int), minlength=classes)


def draw_rates(evaluation: Evaluation, path: Path) -> None:
    """Draw precision against recall, and F1, precision and recall against confidence, of every class and their mean."""
    curves, scores = evaluation.curves, list(evaluation.per_class.items())
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(2, 2).flat
    ap = [score.ap50 for _, score in scores]
    _draw_rate(panels[0], RECALLS, curves.envelope, curves, [name for name, _ in scores], ap)
    panels[0].set(title="precision and recall", xlabel="recall", ylabel="precision")
    precision = np.where(curves.is_found, curves.precision, np.nan)  # of nothing there is none
    rates = {"F1": curves.f1, "precision": precision, "recall": curves.recall}
    for axes, (title, values) in zip(panels[1:], rates.items(), strict=True):
        _draw_rate(axes, CONFIDENCES, values, curves, [name for name, _ in scores], None)
        axes.axvline(evaluation.confidence, color="black", linestyle=":", linewidth=1)
        axes.set(title=f"{title} and confidence", xlabel="confidence", ylabel=title)
    for axes in panels:
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.suptitle(f"IoU .5; dotted: confidence {evaluation.confidence:.3f}, where the table's P, R and F1 stand")
    save_figure(figure, path)


def _draw_rate(
    axes: Axes, x: np.ndarray, values: np.ndarray, curves: Curves, names: Sequence[str], ap: Sequence[float] | None
) -> None:
    """Draw a rate [C, len(x)] of the classes that have truths, and its mean."""
    (counted,) = curves.truths.nonzero()
    if not len(counted):
        axes.text(0.5, 0.5, "no truths", ha="center", va="center")
        return
    is_named = len(counted) <= NAMED
    for place, label in enumerate(counted):
        title = shown(names[label]) + (f" {ap[label]:.3f}" if ap else "")
        style = {"color": COLOURS[place], "label": title} if is_named else {"color": GREY, "alpha": 0.4}
        axes.plot(x, values[label], linewidth=1.2 if is_named else 0.7, **style)
    title = f"mean of {len(counted)}" + (f" {np.mean([ap[label] for label in counted]):.3f}" if ap else "")
    if not is_named:
        title += "; grey: each class"
    known = ~np.isnan(values[counted])
    mean = np.where(known, values[counted], 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
    axes.plot(x, mean, color="black", linewidth=2.2, label=title)
    axes.legend(title="AP@.5" if ap else None)


def draw_ap(evaluation: Evaluation, path: Path) -> None:
    """Draw the average precision of every class as bars, the best on top."""
    scores = sorted(evaluation.per_class.items(), key=lambda item: (item[1].ap50, item[1].ap), reverse=True)
    figure = Figure(figsize=(9, 1.8 + 0.32 * len(scores)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(scores))
    for shift, key, title in ((-0.2, "ap50", "AP@.5"), (0.2, "ap", "AP@.5:.95")):
        values = [getattr(score, key) for _, score in scores]
        bars = axes.barh(places + shift, values, 0.38, label=title, color=COLOURS[int(shift > 0)])
        axes.bar_label(bars, fmt="{:.3f}", padding=2, fontsize=7)
    axes.axvline(evaluation.map50, color=COLOURS[0], linestyle=":", label=f"mean {evaluation.map50:.3f}")
    axes.axvline(evaluation.map50_95, color=COLOURS[1], linestyle=":", label=f"mean {evaluation.map50_95:.3f}")
    _name_axis(axes, [f"{shown(name)} ({score.truths:,})" for name, score in scores])
    axes.set(title="average precision of each class (truths)", xlim=(0, 1.08))
    figure.legend(loc="outside lower center", ncols=4)
    save_figure(figure, path)


def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw a confusion matrix [C+1, C+1], the background last; the colour is the share of the row."""
    labels = [shown(name) for name in (*names, "background")]
    side = min(18, 4 + 0.5 * len(labels) if len(names) <= NUMBERED else 4 + 0.16 * len(labels))
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    if len(names) <= NUMBERED:
        for row, column in np.argwhere(matrix):
            colour = "black" if share[row, column] > 0.5 else "white"
            axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    size = 9 if len(names) <= NUMBERED else 6
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set(title=title, xlabel="found", ylabel="truth")
    save_figure(figure, path)


def draw_study(rows: Sequence[tuple[int, Evaluation]], path: Path) -> None:
    """Draw mAP against the time of a picture, over the longer sides of the network input."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ms = [sum(evaluation.ms_per_image.values()) for _, evaluation in rows]
    for key, title, colour in (("map50", "mAP@.5", COLOURS[0]), ("map50_95", "mAP@.5:.95", COLOURS[1])):
        values = [getattr(evaluation, key) for _, evaluation in rows]
        axes.plot(ms, values, marker="o", color=colour, label=title)
        for (side, _), x, y in zip(rows, ms, values, strict=True):
            axes.annotate(str(side), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set(title="mAP and time over the longer side in pixels", xlabel="ms a picture", ylabel="mAP", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; a script that the font lacks is drawn as boxes."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        figure.savefig(path, dpi=DPI)


def shown(name: str) -> str:
    """Write a class name so that it fits and no letter of it means anything to matplotlib."""
    text = name[:NAME_LENGTH].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # legends leave out what starts with an underscore


def _name_axis(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a bar chart, the first on top."""
    axes.set_yticks(range(len(names)), list(names), fontsize=9 if len(names) < 30 else 7)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _marker(epochs: Sequence[int]) -> str:
    """Give the marker that makes a curve of one point visible."""
    return "." if len(epochs) == 1 else ""
