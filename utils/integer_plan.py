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
    `largest` is the greatest level of a weight, `convs` are the convolutions that compute in integers, `is_trained`
    says that the training had the grids that layers have of their own.
    """

    convs: dict[int, QuantConv2d]
    read: Readers
    own: dict[int, ActivationGrid]
    before: dict[int, ActivationGrid]
    largest: int = 127
    is_trained: bool = False

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
    own: dict[int, ActivationGrid] = {}
    if model.stored and not any(module.is_fresh for module in model.modules() if isinstance(module, Levels)):
        for group in groups:
            first = next(index for index in group if not isinstance(model.blocks[index], MOVERS))
            own |= dict.fromkeys(group, model.blocks[first].levels.grid())
        early = {index: model.blocks[index].early_levels.grid() for index in before}
        return Plan(convs, read, own, early, largest, is_trained=True)
    shared = [*itertools.chain(*groups)]
    ranges = observe(model.fuse(), shared, before, inputs) if shared or before else {}
    for group in groups:
        lows, highs = zip(*(ranges[index] for index in group), strict=True)
        own |= dict.fromkeys(group, _grid(min(lows), max(highs)))
    return Plan(convs, read, own, {index: _grid(*ranges[index]) for index in before}, largest)


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
