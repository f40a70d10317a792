"""In which integers the maps of a quantised network are stored: what their readers read, or a grid of their own.

A map that all its readers quantise alike is stored as they read it, and the activation before vanishes into the ends of
the grid. Whoever else is to run in integers (a convolution before a shortcut or a head) gets a grid of 256 levels from
the range that calibration pictures give it, which the training did not have.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import Darknet
from models.layers_conv import Convolution
from models.layers_merge import ChannelShuffle, Route, ScaleChannels, Shortcut
from models.layers_pool import MaxPool
from models.quant import ActivationGrid, QuantConv2d

TOP = 255
MOVERS = (Route, MaxPool, nn.Upsample, ChannelShuffle, nn.Identity, nn.Dropout)  # put out numbers that they read
SUMS = (Shortcut, ScaleChannels)  # have integer kernels where all that they read are integers
CLAMPS = {nn.Identity: (-math.inf, math.inf), nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0), nn.Hardtanh: (-1.0, 1.0)}
NEGATIVE_STAYS = (nn.LeakyReLU, nn.ELU)  # change negative numbers alone, and into negative ones


class Plan(NamedTuple):
    """How the outputs of a network's layers are stored.

    `read` has for every layer the grids that its readers quantise it on, None for those that want real numbers. `own`
    are the grids of layers that have one, `before` the same of convolutions that have it before their activation.
    `largest` is the greatest level of a weight, `convs` are the convolutions that compute in integers.
    """

    convs: dict[int, QuantConv2d]
    read: list[set[ActivationGrid | None]]
    own: dict[int, ActivationGrid]
    before: dict[int, ActivationGrid]
    largest: int = 127

    def target(self, index: int) -> ActivationGrid | None:
        """Give the grid on which all readers of a layer quantise it, None where there is no such."""
        grids = self.read[index]
        return next(iter(grids)) if len(grids) == 1 else None


def before_heads(model: Darknet) -> set[int]:
    """Give the layers that heads read, also those whose numbers are only moved on the way."""
    heads = {spec.layer for spec in model.heads}
    found: set[int] = set()
    for index in reversed(range(len(model.layers))):
        if index in heads or (index in found and isinstance(model.blocks[index], MOVERS)):
            found.update(model.layers[index].inputs)
    return found


def integer_convs(model: Darknet) -> dict[int, QuantConv2d]:
    """Give the quantised convolutions that integer kernels can compute, but those before heads, by their layer."""
    heads, found = before_heads(model), {}
    for index, block in enumerate(model.blocks):
        conv = block.conv if isinstance(block, Convolution) else None
        if isinstance(conv, QuantConv2d) and index not in heads and conv.activation_grid() and conv.weight_levels():
            found[index] = conv
    return found


def make_plan(model: Darknet, inputs: Iterable[Tensor], *, reduce_range: bool = False) -> Plan:
    """Plan an unfused network; `inputs` [B, channels, H, W] are what its own grids are calibrated with.

    `reduce_range` leaves weights 7 bits, for processors whose sums of 8-bit products saturate.
    """
    convs = integer_convs(model)
    plan = Plan(convs, find_readers(model, convs), {}, {}, 63 if reduce_range else 127)
    integers: set[int] = set()  # layers whose outputs are integers
    shared: dict[int, list[int]] = {}  # layers with a grid of their own, and those of one grid
    before: list[int] = []
    for index, (layer, block) in enumerate(zip(model.layers, model.blocks, strict=True)):
        target, is_read_whole = plan.target(index), integers.issuperset(layer.inputs)
        if index in convs:
            integers.add(index)
            if not isinstance(block.blur, nn.Identity) or limits(block.activation, target) is None:
                before.append(index)
            elif target is None:
                shared[index] = [index]
        elif is_read_whole and isinstance(block, MOVERS + SUMS):
            integers.add(index)
            if target is None and isinstance(block, SUMS):
                shared[index] = [index]
            elif target is None and shared.keys() >= set(layer.inputs):
                together = list({i: None for source in layer.inputs for i in shared[source]}) + [index]
                shared |= dict.fromkeys(together, together)
    if shared or before:
        ranges = observe(model.fuse(), list(shared), before, inputs)
        for index, group in shared.items():
            lows, highs = zip(*(ranges[i] for i in group), strict=True)
            plan.own[index] = _grid(min(lows), max(highs))
        plan.before.update((index, _grid(*ranges[index])) for index in before)
    return plan


def find_readers(model: Darknet, convs: Mapping[int, QuantConv2d]) -> list[set[ActivationGrid | None]]:
    """Find on which grids the output of every layer is read, through all that only moves numbers."""
    read: list[set[ActivationGrid | None]] = [set() for _ in model.layers]
    for index in [spec.layer for spec in model.heads] or [len(read) - 1]:
        read[index].add(None)
    for index in reversed(range(len(read))):
        block = model.blocks[index]
        conv = convs.get(index)
        for source in model.layers[index].inputs:
            if source >= 0:
                grids = {conv.activation_grid()} if conv else {None}
                read[source] |= read[index] if isinstance(block, MOVERS) else grids
    return read


def limits(activation: nn.Module, grid: ActivationGrid | None) -> tuple[int, int] | None:
    """Give the levels between which a grid holds what an activation puts out, if it does nothing else to levels.

    Without a grid the one that fits the activation is meant.
    """
    kind = type(activation)
    if kind in NEGATIVE_STAYS and grid and grid.zero == 0:
        return 0, grid.top
    if kind not in CLAMPS:
        return None
    return tuple(level(value, grid) for value in CLAMPS[kind]) if grid else (0, TOP)


def level(value: float, grid: ActivationGrid) -> int:
    """Give the level of a number, be it infinite."""
    return round(min(max(value / grid.step + grid.zero, 0), grid.top))


@torch.inference_mode()
def observe(
    model: Darknet, own: list[int], before: list[int], inputs: Iterable[Tensor]
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
