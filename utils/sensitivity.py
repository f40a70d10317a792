"""Which layers a network can spare: mAP@.5 when one set of layers alone loses a share of its channels.

A set is what only goes together: layers that share groups of channels, a residual stream as one
(https://arxiv.org/abs/1608.08710, section 3.2, cuts layer by layer in the same way).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models import Darknet
from models.weights import write_atomically

from . import dist
from .charts import COLOURS, GREY, save_figure
from .importance import Values
from .log import DataError
from .plan import make_plan
from .prune import Groups, mask

RATIOS = (0.25, 0.5, 0.75, 0.9)
NUMBERED = 70  # sets whose cells have room for a number


@dataclass(frozen=True)
class Row:
    """What is left of mAP@.5 when the layers of a set alone lose the least important `cut` of their free `groups`.

    `ratio` is the share that was asked for: less may go of a set, as every layer keeps a channel.
    """

    layers: tuple[int, ...]
    groups: int
    ratio: float
    cut: int
    map50: float
    drop: float


def layer_sets(model: Darknet, groups: Groups) -> list[tuple[int, ...]]:
    """Give the sets of layers with a width of their own that share free groups, in the order of the network."""
    sets: list[tuple[set[int], set[int]]] = []  # the layers and the groups of each
    for index, layer in enumerate(model.layers):
        members = groups.group[groups.lines[index]]
        own = set(members[groups.is_free[members]].tolist())
        if layer.sets_channels and own:
            joined = [each for each in sets if not each[1].isdisjoint(own)]
            sets = [each for each in sets if each not in joined]
            sets.append(({index}.union(*(layers for layers, _ in joined)), own.union(*(more for _, more in joined))))
    return sorted(tuple(sorted(layers)) for layers, _ in sets)


def measure_sensitivity(
    model: Darknet,
    groups: Groups,
    importance: Values,
    judge: Callable[[Darknet], float],
    ratios: Sequence[float] = RATIOS,
) -> Iterator[Row]:
    """Yield a row for every set of layers and every ratio; `judge` gives mAP@.5 of a network, on the CPU.

    The groups go in the order of `importance`, by masking; every layer keeps a channel. Raises DataError where no group
    may go.
    """
    plan = make_plan(model, groups, importance, cuts_residual=True)
    if not len(plan.order):
        raise DataError(f"{model.cfg.path}: no channel may go, so there is nothing to measure")
    tasks = []
    for layers in layer_sets(model, groups):
        own = np.unique(np.concatenate([groups.group[groups.lines[index]] for index in layers]))
        free = int((groups.is_free[own] & ~np.isnan(importance[own])).sum())
        order = plan.order[np.isin(plan.order, own)]
        tasks += [(layers, free, order, ratio) for ratio in ratios if len(order)]
    before = judge(model)
    found: dict[tuple[tuple[int, ...], int], float] = {}
    for layers, free, order, ratio in dist.progress(tasks, desc="sensitivity", unit="cut"):
        cut = min(round(ratio * free), len(order))
        if (layers, cut) not in found:  # of few groups several ratios are the same number
            keep = np.ones(len(groups.is_free), bool)
            keep[order[:cut]] = False
            found[layers, cut] = judge(mask(model, groups, keep)) if cut else before
        map50 = found[layers, cut]
        yield Row(layers, free, ratio, cut, map50, before - map50)


def write_sensitivity(rows: Iterable[Row], folder: Path) -> list[Row]:
    """Write sensitivity.json row by row as they come, and sensitivity.png at the end, even an early one."""
    done: list[Row] = []
    try:
        for row in rows:
            done.append(row)
            text = json.dumps([asdict(each) for each in done], indent=1) + "\n"
            write_atomically(folder / "sensitivity.json", lambda partial, text=text: partial.write_text(text))
    finally:
        if done:
            draw_sensitivity(done, folder / "sensitivity.png")
    return done


def draw_sensitivity(rows: Sequence[Row], path: Path) -> None:
    """Draw the drop of mAP@.5 as a heat map of sets and ratios, and mAP@.5 of the most sensitive sets as curves."""
    sets = list(dict.fromkeys(row.layers for row in rows))
    ratios = sorted({row.ratio for row in rows})
    drops = np.full((len(ratios), len(sets)), np.nan)
    for row in rows:
        drops[ratios.index(row.ratio), sets.index(row.layers)] = row.drop
    before = rows[0].map50 + rows[0].drop
    figure = Figure(figsize=(15, 9), layout="constrained")
    heat, curves = figure.subplots(2, 1, height_ratios=(2, 3))
    _draw_heat(heat, drops, sets, ratios, before)
    _draw_curves(curves, drops, sets, ratios, before)
    save_figure(figure, path)


def _draw_heat(
    axes: Axes, drops: NDArray[np.float64], sets: Sequence[tuple[int, ...]], ratios: Sequence[float], before: float
) -> None:
    """Draw drops [ratios, sets] in hundredths of mAP."""
    image = axes.imshow(100 * drops, cmap="cividis", vmin=0, vmax=100 * max(before, 0.01), aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="drop of mAP@.5, hundredths", pad=0.01)
    if len(sets) <= NUMBERED:
        for y, x in np.argwhere(~np.isnan(drops)):
            colour = "black" if drops[y, x] > before / 2 else "white"
            axes.text(x, y, str(round(100 * drops[y, x])), ha="center", va="center", color=colour, fontsize=7)
    axes.set_yticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
    step = -(-len(sets) // NUMBERED)
    axes.set_xticks(range(0, len(sets), step), [_name(each) for each in sets[::step]], rotation=90, fontsize=8)
    axes.set(ylabel="share cut", xlabel="set of layers: its first, and how many more go with it")
    axes.set_title(f"drop of mAP@.5 ({before:.3f}) when one set alone is cut", loc="left")


def _draw_curves(
    axes: Axes, drops: NDArray[np.float64], sets: Sequence[tuple[int, ...]], ratios: Sequence[float], before: float
) -> None:
    """Draw mAP over the share that is cut, of the most sensitive sets in colour and of the others in grey."""
    worst = np.argsort(-np.nansum(drops, axis=0), kind="stable")[: len(COLOURS)].tolist()
    for place in [*(set(range(len(sets))) - {*worst}), *worst]:
        style = {"color": GREY, "alpha": 0.4, "linewidth": 0.8}
        if place in worst:
            style = {"color": COLOURS[worst.index(place)], "label": f"layer {_name(sets[place])}", "marker": "."}
        axes.plot([0, *ratios], [before, *(before - drops[:, place])], **style)
    axes.set(
        xlabel="share of the set's free groups that is cut",
        ylabel="mAP@.5",
        xlim=(0, 1),
        ylim=(0, 1.02 * max(before - np.nanmin(drops), before, 0.01)),  # a cut may gain, too
    )
    axes.set_title("the most sensitive sets; grey: the others", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def _name(layers: Sequence[int]) -> str:
    """Name a set by its first layer and how many others it has."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} +{len(layers) - 1}"
