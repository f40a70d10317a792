"""Sections that bring several maps together: route, shortcut, scale_channels, sam; and channel_shuffle."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cfg import Section
from .channels import concatenated, shuffled, summed, tied
from .layer import MAX_FILTERS, Built, Layer, read_activation, shape

PER_CHANNEL = ("per_feature", "per_layer", "per_channel")  # of weights_type; the first two are one weight a layer
RELU = ("relu", "avg_relu")  # of weights_normalization
WEIGHT_FLOOR, WEIGHT_EPS = 1e-3, 1e-4  # Darknet's, of normalised weights and of their sum


class Route(nn.Module):
    """Concatenate slice `group` of `groups` of every input along the channels."""

    def __init__(self, groups: int, group: int) -> None:
        super().__init__()
        self.groups, self.group = groups, group

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.groups > 1:
            inputs = tuple(x.chunk(self.groups, dim=1)[self.group] for x in inputs)
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)


class Shortcut(nn.Module):
    """Add inputs to the first one, whose shape the sum has.

    Where channels differ, the first min(C) are added. A larger map is subsampled, a smaller one is added to every n-th
    cell (pjreddie's Darknet, for its ResNets). `weights` [inputs, 1 or C] scale the inputs.
    """

    def __init__(self, activation: nn.Module, weights: nn.Parameter | None = None, normalization: str = "none") -> None:
        super().__init__()
        self.activation, self.weights, self.normalization = activation, weights, normalization
        self.levels = nn.Identity()  # or those of storage.py

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Add maps [B, D, h, w] to the first one [B, C, H, W]."""
        scales = None if self.weights is None else self.normalised(self.weights)[:, :, None, None]  # [n, 1|C, 1, 1]
        total = x if scales is None else x * scales[0]
        for i, other in enumerate(others, start=1):
            C, D = x.shape[1], other.shape[1]
            if C < D:
                other = other[:, :C]
            if scales is not None:
                other = other * scales[i, : other.shape[1]]
            if other.shape[2:] != x.shape[2:]:
                total = _add_strided(total, other)
            elif C > D:
                total = torch.cat((total[:, :D] + other, total[:, D:]), dim=1)
            else:
                total = total + other
        return self.levels(self.activation(total))

    def normalised(self, weights: Tensor) -> Tensor:
        """Let the weights [inputs, 1 or C] of all inputs add up to nearly 1, as `weights_normalization` says."""
        if self.normalization in RELU:
            positive = weights.clamp_min(WEIGHT_FLOOR)
        elif self.normalization == "softmax":
            positive = (weights - weights.amax(0, keepdim=True)).exp()
        else:
            return weights
        return positive / (positive.sum(0, keepdim=True) + WEIGHT_EPS)


class ScaleChannels(nn.Module):
    """Multiply the second input [B, C, H, W] by the first, a gate [B, C, 1, 1] (or [B, 1, H, W], or of its shape)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.levels = nn.Identity()  # or those of storage.py

    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.levels(self.activation(x * gate))


class ChannelShuffle(nn.Module):
    """Take a channel of every group in turn (https://arxiv.org/abs/1707.01083): c of group g becomes c·groups + g."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(x, self.groups)


def route(section: Section, built: Built) -> Layer:
    """Build [route]: concatenate layers, or a slice of each."""
    indices = built.resolve(section, "layers")
    sources = [built.at(index) for index in indices]
    groups = section.int("groups", 1, minimum=1, maximum=MAX_FILTERS)
    group = section.int("group_id", 0, minimum=0, maximum=groups - 1)
    for index, source in zip(indices, sources, strict=True):
        if source.size != sources[0].size:
            sizes = f"{shape(sources[0])} from layer {indices[0]} and {shape(source)} from layer {index}"
            built.mismatch(section, sources, "size", f"expects maps of one size, gets {sizes}", "layers")
        if source.channels % groups:
            message = f"expects groups={groups} to divide the {source.channels} channels of layer {index}"
            built.mismatch(section, sources, "channels", message, "groups", keys="groups")
    channels = max(1, sum(source.channels // groups for source in sources))
    flow = concatenated(groups, group)
    return Layer(Route(groups, group), tuple(indices), channels, sources[0].size, sources[0].stride, flow)


def shortcut(section: Section, built: Built) -> Layer:
    """Build [shortcut]: add earlier layers to the previous one, with or without weights."""
    source, indices = built.previous, built.resolve(section, "from")
    activation = read_activation(section, "linear")
    for index in indices:
        other = built.at(index)
        if not _is_strided(source.size, other.size):
            message = (
                f"expects maps of one size, or a whole number of times larger or smaller,"
                f" gets {shape(source)} and {shape(other)} from layer {index}"
            )
            built.mismatch(section, [source, other], "size", message, "from")
    kind = section.choice("weights_type", ("none", *PER_CHANNEL), "none")
    normalization = section.choice("weights_normalization", ("none", *RELU, "softmax"), "none")
    inputs = (built.index - 1, *indices)
    weights = None
    if kind != "none":
        weights = nn.Parameter(torch.ones(len(inputs), source.channels if kind == "per_channel" else 1))
    return Layer(
        Shortcut(activation, weights, normalization),
        inputs,
        source.channels,
        source.size,
        source.stride,
        summed,
        {} if weights is None else {"weights": "-o" if kind == "per_channel" else ""},
        flops=len(indices) * source.channels * source.size[0] * source.size[1] * (1 if weights is None else 2),
    )


def scale_channels(section: Section, built: Built) -> Layer:
    """Build [scale_channels]: gate the channels of an earlier layer by the previous one."""
    gate, index = built.previous, built.resolve(section, "from")[0]
    source = built.at(index)
    is_spatial = section.flag("scale_wh")
    activation = read_activation(section, "linear")
    wanted = (1, source.size) if is_spatial else (source.channels, (1, 1))
    if (gate.channels, gate.size) != wanted:
        message = f"expects a gate of {wanted[0]} channels at {wanted[1][0]}×{wanted[1][1]} for layer {index}"
        kind = "channels" if gate.channels != wanted[0] else "size"
        built.mismatch(section, [gate, source], kind, f"{message}, gets {gate.channels} at {shape(gate)}")
    inputs = (built.index - 1, index)
    return Layer(ScaleChannels(activation), inputs, source.channels, source.size, source.stride, tied)


def sam(section: Section, built: Built) -> Layer:
    """Build [sam]: multiply an earlier layer by the previous one, cell by cell and channel by channel."""
    gate, index = built.previous, built.resolve(section, "from")[0]
    source = built.at(index)
    activation = read_activation(section, "linear")
    if (gate.channels, gate.size) != (source.channels, source.size):
        message = f"expects {source.channels} channels at {shape(source)} as layer {index} has"
        kind = "channels" if gate.channels != source.channels else "size"
        built.mismatch(section, [gate, source], kind, f"{message}, gets {gate.channels} at {shape(gate)}", "from")
    inputs = (built.index - 1, index)
    return Layer(ScaleChannels(activation), inputs, source.channels, source.size, source.stride, tied)


def channel_shuffle(section: Section, built: Built) -> Layer:
    """Build [channel_shuffle]: take a channel of every group in turn."""
    source, groups = built.previous, section.int("groups", 2, minimum=1, maximum=MAX_FILTERS)
    if source.channels % groups:
        message = f"expects groups={groups} to divide the {source.channels} channels of its input"
        built.mismatch(section, [source], "channels", message, "groups", keys="groups")
    return replace(built.pass_on(ChannelShuffle(groups)), flow=shuffled(groups))


def _add_strided(total: Tensor, other: Tensor) -> Tensor:
    height, other_height = total.shape[2], other.shape[2]
    stride, sample = max(1, round(other_height / height)), max(1, round(height / other_height))
    other = other[:, :, ::stride, ::stride]
    total = total.clone()
    total[:, : other.shape[1], ::sample, ::sample] += other
    return total


def _is_strided(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Tell whether two sizes are equal or one is a whole multiple of the other, the same on both axes."""
    small, large = min(a, b), max(a, b)
    factor = large[0] // small[0]
    return (small[0] * factor, small[1] * factor) == large
