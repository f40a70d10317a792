"""Cut channels out of a network: which may go, the network with them masked, and the compact one that equals it."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import Cfg, Darknet, dump
from models.cfg import parse
from models.channels import Line
from models.layer import Layer

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Groups:
    """Which channels of a network live and die together.

    `lines` are the ids of every layer's output, `image` those of the picture; of every id `group` is the number of its
    group, and of every group `is_free` says whether it may go at all and `is_residual` whether a shortcut sums it.
    """

    lines: list[Line]
    image: Line
    group: Line
    is_free: Mask
    is_residual: Mask

    def line(self, index: int) -> Line:
        """Give the ids of a layer's output; -1 is the image."""
        return self.lines[index] if index >= 0 else self.image


def find_groups(model: Darknet, *, is_approximate: bool = False) -> Groups:
    """Find the groups of a network's channels; see Darknet.trace for `is_approximate`."""
    channels, lines = model.trace(is_approximate=is_approximate)
    _, group = np.unique(channels.groups(), return_inverse=True)
    is_free, is_residual = np.ones(group.max() + 1, bool), np.zeros(group.max() + 1, bool)
    is_free[group[channels.fixed()]] = False
    is_residual[group[channels.residual()]] = True
    return Groups(lines, np.arange(model.channels), group, is_free, is_residual)


class Masked(nn.Module):
    """A layer some of whose channels put out zero."""

    def __init__(self, block: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("keep", keep[:, None, None])  # [C, 1, 1]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.block(*inputs) * self.keep


def mask(model: Darknet, groups: Groups, keep: Mask) -> Darknet:
    """Return a copy in evaluation mode whose channels put out zero where `keep` [groups] is false.

    Their weights are zero too, so that what is shared by a whole layer (the range of a quantiser) is not theirs.
    """
    masked = copy.deepcopy(model).eval()
    with torch.no_grad():
        for index, layer in enumerate(masked.layers):
            for name, axes in layer.tensors.items():
                tensor = attrgetter(name)(layer.module)
                for axis, kept in _kept_of_axes(groups, keep, index, layer, axes, tensor.shape):
                    tensor.mul_(torch.from_numpy(kept).view(-1, *[1] * (tensor.dim() - axis - 1)))
            own = keep[groups.group[groups.lines[index]]]
            if not own.all():
                masked.blocks[index] = Masked(masked.blocks[index], torch.from_numpy(own).float())
    return masked


def cut(model: Darknet, groups: Groups, keep: Mask, *, path: str) -> Darknet:
    """Return the network without the channels of the groups where `keep` [groups] is false.

    Its cfg, of `path`, differs from the expanded one of `model` in the keys of widths. Raises CfgError where a layer
    would have no channel left.
    """
    compact = Darknet(cut_cfg(model, groups, keep, path=path), allow_unknown=True)
    compact.header = model.header
    with torch.no_grad():
        for index, (layer, target) in enumerate(zip(model.layers, compact.layers, strict=True)):
            for name, axes in layer.tensors.items():
                tensor = attrgetter(name)(layer.module)
                for axis, kept in _kept_of_axes(groups, keep, index, layer, axes, tensor.shape):
                    tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(kept)).to(tensor.device))
                attrgetter(name)(target.module).copy_(tensor)
    return compact.eval()


def cut_cfg(model: Darknet, groups: Groups, keep: Mask, *, path: str) -> Cfg:
    """Write the widths that are left into a copy of the expanded cfg."""
    cfg = parse(dump(model.expanded), path)
    for index, (layer, section) in enumerate(zip(model.layers, cfg.sections[1:], strict=True)):
        lines = {"o": groups.lines[index], "i": groups.line(layer.inputs[0])}
        left = {letter: keep[groups.group[line]] for letter, line in lines.items()}
        if all(kept.all() for kept in left.values()):
            continue
        for key, width in layer.widths.items():
            value = width if isinstance(width, int) else int(left[width].sum())
            if key not in section.options or section.options[key].value != str(value):
                section.set(key, value)
    return cfg


def _kept_of_axes(
    groups: Groups, keep: Mask, index: int, layer: Layer, axes: str, shape: Sequence[int]
) -> Iterator[tuple[int, Mask]]:
    """Give the axes of a tensor along which a layer is cut, each with what is kept of it."""
    for axis, letter in enumerate(axes):
        if letter == "-":
            continue
        line = groups.lines[index] if letter == "o" else groups.line(layer.inputs[0])
        line = line[: shape[axis]] if letter == "g" else line
        yield axis, keep[groups.group[line]].repeat(shape[axis] // len(line))
