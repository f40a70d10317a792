"""In which integers the maps of a quantised network are stored: what their readers read, or levels of their own.

A map that all its readers quantise alike is stored as they read it, and the activation before vanishes into the ends of
the grid. Whatever else comes out of integers (the map before a shortcut or a head, or before an activation that
integers do not compute) is stored on 256 levels of its own. `map_bits=8` in [net] makes them a part of the network:
training, in FP32, sees the very numbers that an exported one computes with.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer import Layer
from .layers_conv import Convolution
from .layers_merge import ChannelShuffle, Route, ScaleChannels, Shortcut
from .layers_pool import MaxPool
from .quant import ActivationGrid, QuantConv2d, affine_grid, watch
from .quantisers import FLOOR, OnGrid

TOP = 255
MOVERS = (Route, MaxPool, nn.Upsample, ChannelShuffle, nn.Identity, nn.Dropout)  # put out numbers that they read
SUMS = (Shortcut, ScaleChannels)  # have integer kernels where all that they read are integers
CLAMPS = {nn.Identity: (-math.inf, math.inf), nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0), nn.Hardtanh: (-1.0, 1.0)}
NEGATIVE_STAYS = (nn.LeakyReLU, nn.ELU)  # change negative numbers alone, and into negative ones

Readers = Sequence[set[ActivationGrid | None]]  # of every layer


class Levels(nn.Module):
    """Puts a map on 256 levels over the range seen, a moving average of its batches, as a byte would store it.

    Maps that are joined share the levels of all their ranges: `peers`, itself among them. Before training has seen a
    batch the map stays as it is.
    """

    a_limits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a_limits", torch.zeros(2))
        self.peers: tuple[Levels, ...] = (self,)

    @property
    def is_fresh(self) -> bool:
        """Tell whether neither it nor a peer has seen a batch."""
        return not any(peer.a_limits.any() for peer in self.peers)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            watch(self.a_limits, x, is_fresh=~self.a_limits.any())
        step, low, _ = self._range()
        y = OnGrid.apply(x, step, low, TOP, 0.0, False)
        return y if self.training else torch.where(step > FLOOR, y, x)  # no branch, for which a GPU would wait

    def grid(self) -> ActivationGrid:
        """Give the levels as integers store them."""
        step, low, _ = self._range()
        return ActivationGrid(float(step), -int(low), TOP, float(step))

    @torch.no_grad()
    def reset_state(self, names: Collection[str] = ()) -> None:
        """Forget what has been seen; it has nothing else, whatever the names."""
        self.a_limits.zero_()

    def _range(self) -> tuple[Tensor, Tensor, Tensor]:
        least, most = torch.stack([peer.a_limits for peer in self.peers]).unbind(1)
        return affine_grid(least.amin(), most.amax(), TOP)


class Stored(NamedTuple):
    """Which layers have levels of their own: groups that share them, and convolutions with some before the activation.

    The layers of a group are convolutions, sums, and those that only move the numbers of others in it.
    """

    groups: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]


def integer_convs(layers: Sequence[Layer]) -> dict[int, QuantConv2d]:
    """Give the quantised convolutions that integer kernels can compute, but those before heads, by their layer."""
    heads, found = before_heads(layers), {}
    for index, layer in enumerate(layers):
        conv = layer.module.conv if isinstance(layer.module, Convolution) else None
        if isinstance(conv, QuantConv2d) and index not in heads and conv.grid.is_integer:
            found[index] = conv
    return found


def before_heads(layers: Sequence[Layer]) -> set[int]:
    """Give the layers that heads read, also those whose numbers are only moved on the way."""
    found: set[int] = set()
    for index in reversed(range(len(layers))):
        if layers[index].head or (index in found and isinstance(layers[index].module, MOVERS)):
            found.update(layers[index].inputs)
    return found


def find_readers(layers: Sequence[Layer], grids: Mapping[int, ActivationGrid]) -> Readers:
    """Find on which grids the output of every layer is read, through all that only moves numbers; None: as it is.

    `grids` are those of the inputs of the convolutions that compute in integers.
    """
    read: list[set[ActivationGrid | None]] = [set() for _ in layers]
    for index in [i for i, layer in enumerate(layers) if layer.head] or [len(read) - 1]:
        read[index].add(None)
    for index in reversed(range(len(read))):
        for source in layers[index].inputs:
            if source >= 0:
                read[source] |= read[index] if isinstance(layers[index].module, MOVERS) else {grids.get(index)}
    return read


def find_stored(layers: Sequence[Layer], grids: Mapping[int, ActivationGrid], read: Readers) -> Stored:
    """Find the layers whose numbers come out of integers and need levels of their own."""
    integers: set[int] = set()  # layers whose outputs are integers
    shared: dict[int, tuple[int, ...]] = {}  # layers with levels of their own, and those that have the same
    before: list[int] = []
    for index, layer in enumerate(layers):
        block, target, is_read_whole = layer.module, only(read[index]), integers.issuperset(layer.inputs)
        if index in grids:
            integers.add(index)
            assert isinstance(block, Convolution)
            if not isinstance(block.blur, nn.Identity) or limits(block.activation, target) is None:
                before.append(index)
            elif target is None:
                shared[index] = (index,)
        elif is_read_whole and isinstance(block, MOVERS + SUMS):
            integers.add(index)
            if target is None and isinstance(block, SUMS):
                shared[index] = (index,)
            elif target is None and shared.keys() >= set(layer.inputs):
                together = (*sorted({i for source in layer.inputs for i in shared[source]}), index)
                shared |= dict.fromkeys(together, together)
    return Stored(tuple(dict.fromkeys(shared.values())), tuple(before))


def store_maps(layers: Sequence[Layer]) -> tuple[list[Layer], Stored]:
    """Give layers whose maps are put on the levels that an exported network stores them on, and which these are."""
    convs = integer_convs(layers)
    grids = {index: _stand_in(index, conv) for index, conv in convs.items()}
    stored, made = find_stored(layers, grids, find_readers(layers, grids)), list(layers)
    for index in stored.before:
        made[index] = _attach(made[index], "early_levels", Levels())
    for group in stored.groups:
        levels = {index: Levels() for index in group if not isinstance(made[index].module, MOVERS)}
        for index, each in levels.items():
            each.peers = tuple(levels.values())
            made[index] = _attach(made[index], "levels", each)
    return made, stored


def only(grids: set[ActivationGrid | None]) -> ActivationGrid | None:
    """Give the grid on which all readers quantise a map, None where there is no such."""
    return next(iter(grids)) if len(grids) == 1 else None


def limits(activation: nn.Module, grid: ActivationGrid | None) -> tuple[int, int] | None:
    """Give the levels between which a grid holds what an activation puts out, if it does nothing else to levels.

    Without a grid the one that fits the activation is meant.
    """
    kind = type(activation)
    if kind in NEGATIVE_STAYS and grid and grid.zero == 0:
        return 0, grid.top
    if kind not in CLAMPS:
        return None
    low, high = CLAMPS[kind]
    return (level(low, grid), level(high, grid)) if grid else (0, TOP)


def level(value: float, grid: ActivationGrid) -> int:
    """Give the level of a number, be it infinite."""
    return round(min(max(value / grid.step + grid.zero, 0), grid.top))


def _stand_in(index: int, conv: QuantConv2d) -> ActivationGrid:
    """Give the grid of a convolution's inputs; where it is learned, one of its kind that equals no other's."""
    grid = conv.grid
    if grid.method == "dorefa" and (fixed := conv.activation_grid()):
        return fixed
    return ActivationGrid(1.0, int(grid.method == "iao" or grid.is_symmetric), 2**grid.a_bits - 1, -1.0 - index)


def _attach(layer: Layer, place: str, levels: Levels) -> Layer:
    setattr(layer.module, place, levels)
    return replace(layer, tensors={**layer.tensors, f"{place}.a_limits": ""})
