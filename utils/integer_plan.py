"""In which integers the maps of a quantised network are stored (models/storage.py), with grids in numbers.

Levels that the training did not have get the range that calibration pictures give them.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models import Darknet
from models.quant import ActivationGrid, QuantConv2d
from models.storage import MOVERS, TOP, Levels, Readers, find_readers, find_stored, integer_convs, only


class Plan(NamedTuple):
    """How the outputs of a network's layers are stored.

    `read` has for every layer the grids that its readers quantise it on, None for those that want real numbers. `own`
    are the grids of layers that have one, `before` the same of convolutions that have it before their activation.
    `largest` is the greatest level of a weight, `convs` are the convolutions that compute in integers. Of the layers
    with a grid of their own `trained` are those that had it in training.
    """

    convs: dict[int, QuantConv2d]
    read: Readers
    own: dict[int, ActivationGrid]
    before: dict[int, ActivationGrid]
    largest: int = 127
    trained: frozenset[int] = frozenset()

    def target(self, index: int) -> ActivationGrid | None:
        """Give the grid on which all readers of a layer quantise it, None where there is no such."""
        return only(self.read[index])


def make_plan(model: Darknet, inputs: Iterable[Tensor], *, reduce_range: bool = False) -> Plan:
    """Plan an unfused network; `inputs` [B, channels, H, W] calibrate the grids that its training did not have.

    `reduce_range` leaves weights 7 bits, for processors whose sums of 8-bit products saturate.
    """
    convs = integer_convs(model.layers)
    grids = {index: conv.activation_grid() for index, conv in convs.items()}
    read, largest = find_readers(model.layers, grids), 63 if reduce_range else 127
    groups, before = model.stored or find_stored(model.layers, grids, read)
    trained = {index: levels.grid() for index, levels in _seen(model, groups, before).items()}
    shared = [group for group in groups if group[0] not in trained]
    early = [index for index in before if index not in trained]
    ranges = observe(model.fuse(), [*itertools.chain(*shared)], early, inputs) if shared or early else {}
    found = trained | {index: _grid(*ranges[index]) for index in early}
    for group in shared:
        lows, highs = zip(*(ranges[index] for index in group), strict=True)
        found |= dict.fromkeys(group, _grid(min(lows), max(highs)))
    own = {index: found[index] for index in itertools.chain(*groups)}
    return Plan(convs, read, own, {index: found[index] for index in before}, largest, frozenset(trained))


def _seen(model: Darknet, groups: Iterable[Sequence[int]], before: Iterable[int]) -> dict[int, Levels]:
    """Give the levels of layers on which training has seen batches."""
    found = {index: model.blocks[index].early_levels for index in before}
    for group in groups:
        first = next(index for index in group if not isinstance(model.blocks[index], MOVERS))
        found |= dict.fromkeys(group, model.blocks[first].levels)
    return {i: each for i, each in found.items() if isinstance(each, Levels) and not each.is_fresh}


@torch.inference_mode()
def observe(
    model: Darknet, own: Sequence[int], before: Sequence[int], inputs: Iterable[Tensor]
) -> dict[int, tuple[float, float]]:
    """Give the least and the greatest output of layers, of those in `before` without their activation; 0 is between."""
    sources = {index: model.layers[index].inputs[0] for index in before}
    wanted = sorted({*own, *sources.values()} - {-1})
    found = dict.fromkeys([*own, *before], (0.0, 0.0))
    for x in inputs:
        maps = {-1: x} | dict(zip(wanted, model.features(x, wanted)[1], strict=True))
        for index in found:
            y = model.blocks[index].conv(maps[sources[index]]) if index in sources else maps[index]
            low, high = found[index]
            found[index] = min(low, y.min().item()), max(high, y.max().item())
    return found


def _grid(low: float, high: float) -> ActivationGrid:
    """Make 256 levels from `low` <= 0 to `high` >= 0."""
    step = (high - low) / TOP or 1.0
    return ActivationGrid(step, round(-low / step), TOP, step)
