"""One builder per primitive section, and SECTIONS, the table that names them.

A builder reads its section's keys and returns a Layer; a mistake is noted in the section and the builder goes on with
the nearest thing that can be built, so that one report tells all mistakes of a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .cfg import Section
from .yolo import HeadSpec

MAX_FILTERS, MAX_KERNEL = 65536, 1024  # far beyond any network: larger values are typing mistakes
BN_EPS = 1e-6  # OpenCV's; Darknet's 1e-5 differs by less than 4e-4 in any score of real weights (measured)
BN_MOMENTUM = 0.03  # a short training's statistics settle within some hundred steps


@dataclass(frozen=True)
class Layer:
    """A built section. `inputs` are indices of earlier layers (-1: the image), `size` is (height, width) at the cfg's
    own input size, `stride` the input pixels a cell spans, `tensors` the names of its parameters in .weights order,
    `flops` counts a multiply-add as two, as Darknet does."""

    module: nn.Module
    inputs: tuple[int, ...]
    channels: int
    size: tuple[int, int]
    stride: tuple[float, float]
    tensors: tuple[str, ...] = ()
    flops: int = 0
    head: HeadSpec | None = None
    is_fresh: bool = False  # its channels do not depend on those of its inputs
    guesses: frozenset[str] = frozenset()  # "channels", "size": what a mistake before makes uncertain


@dataclass
class Built:
    """The layers so far, as the builder of the next one sees them."""

    image: Layer
    layers: list[Layer] = field(default_factory=list)
    filters_line: int = 0  # where the last convolution says filters=

    @property
    def index(self) -> int:
        return len(self.layers)

    @property
    def previous(self) -> Layer:
        return self.at(self.index - 1)

    def at(self, index: int) -> Layer:
        """Give the layer of an absolute index; -1 is the image."""
        return self.layers[index] if index >= 0 else self.image

    def mismatch(
        self, section: Section, sources: Sequence[Layer], kind: str, message: str, key: str = "", *, keys: str = ""
    ) -> None:
        """Note that the "channels" or "size" of sources do not fit.

        It is no mistake of its own where an earlier one makes them uncertain, or one of the `keys` that were read.
        """
        if section.unsure.isdisjoint(keys.split()) and not any(kind in source.guesses for source in sources):
            section.fail(message, key)

    def resolve(self, section: Section, key: str) -> list[int]:
        """Read layer indices, negative ones relative to this layer, and make them absolute."""
        found = []
        for written in section.ints(key):
            index = written + self.index if written < 0 else written
            if 0 <= index < self.index:
                found.append(index)
            else:
                before = f"layers 0 to {self.index - 1} stand" if self.index else "no layer stands"
                section.fail(f"{key!r} names layer {written}, but {before} before it", key)
        return found or [self.index - 1]


class Convolution(nn.Module):
    """Convolution, batch normalisation (Identity where there is none) and activation."""

    def __init__(self, conv: nn.Conv2d, bn: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.activation = conv, bn, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class MaxPool(nn.Module):
    """Darknet's max pooling: `padding` cells in all, the smaller half left and above, filled with minus infinity."""

    def __init__(self, size: int, stride: tuple[int, int], padding: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.before, self.after = padding // 2, padding - padding // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.before == self.after <= self.size // 2:
            return F.max_pool2d(x, self.size, self.stride, self.before)
        if (self.before, self.after, self.size, self.stride) == (0, 1, 2, (2, 2)):
            return F.max_pool2d(x, 2, 2, ceil_mode=True)  # the odd last cell stands alone
        x = F.pad(x, (self.before, self.after) * 2, value=float("-inf"))
        return F.max_pool2d(x, self.size, self.stride)

    def extra_repr(self) -> str:
        return f"{self.size}, stride={self.stride}, before={self.before}, after={self.after}"


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
    """Add inputs to the first one; where channels differ, the first min(C) channels are added."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            C, D = x.shape[1], other.shape[1]
            if C == D:
                x = x + other
            elif C < D:
                x = x + other[:, :C]
            else:
                x = torch.cat((x[:, :D] + other, x[:, D:]), dim=1)
        return self.activation(x)


class ScaleChannels(nn.Module):
    """Multiply the second input [B, C, H, W] by the first, a gate [B, C, 1, 1] (or [B, 1, H, W])."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.activation(x * gate)


def convolutional(section: Section, built: Built) -> Layer:
    """Build [convolutional]: convolution, optional batch normalisation, activation."""
    source = built.previous
    filters = section.int("filters", 1, minimum=1, maximum=MAX_FILTERS)
    kernel = section.int("size", 1, minimum=1, maximum=MAX_KERNEL)
    stride = _strides(section)
    padding = section.int("padding", 0, minimum=0, maximum=MAX_KERNEL)
    padding = kernel // 2 if section.flag("pad") else padding
    groups = section.int("groups", 1, minimum=1, maximum=MAX_FILTERS, alias="group")
    if source.channels % groups or filters % groups:
        message = f"expects groups={groups} to divide its {source.channels} inputs and {filters} filters"
        built.mismatch(section, [source], "channels", message, "groups", keys="filters groups group")
        groups = 1
    has_bn = section.flag("batch_normalize")
    activation = ACTIVATIONS[section.choice("activation", ACTIVATIONS, "logistic")]()
    size = _window(section, built, kernel, stride, 2 * padding)
    conv = nn.Conv2d(source.channels, filters, kernel, stride, padding, groups=groups, bias=not has_bn)
    bn = nn.BatchNorm2d(filters, eps=BN_EPS, momentum=BN_MOMENTUM) if has_bn else nn.Identity()
    names = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var") if has_bn else ("conv.bias",)
    built.filters_line = section.line_of("filters")
    return Layer(
        Convolution(conv, bn, activation),
        (built.index - 1,),
        filters,
        size,
        (source.stride[0] * stride[0], source.stride[1] * stride[1]),
        (*names, "conv.weight"),
        2 * filters * (source.channels // groups) * kernel * kernel * size[0] * size[1],
        is_fresh=True,
    )


def maxpool(section: Section, built: Built) -> Layer:
    """Build [maxpool]."""
    source, stride = built.previous, _strides(section)
    kernel = section.int("size", stride[0], minimum=1, maximum=MAX_KERNEL)
    padding = section.int("padding", kernel - 1, minimum=0, maximum=2 * kernel - 2)
    size = _window(section, built, kernel, stride, padding)
    return Layer(
        MaxPool(kernel, stride, padding),
        (built.index - 1,),
        source.channels,
        size,
        (source.stride[0] * stride[0], source.stride[1] * stride[1]),
        flops=kernel * kernel * source.channels * size[0] * size[1],
    )


def avgpool(section: Section, built: Built) -> Layer:
    """Build [avgpool], the mean over the whole map."""
    source = built.previous
    stride = (source.stride[0] * source.size[0], source.stride[1] * source.size[1])
    return Layer(nn.AdaptiveAvgPool2d(1), (built.index - 1,), source.channels, (1, 1), stride)


def upsample(section: Section, built: Built) -> Layer:
    """Build [upsample], nearest neighbour."""
    source = built.previous
    factor = section.int("stride", 2, minimum=1, maximum=64)
    return Layer(
        nn.Upsample(scale_factor=factor, mode="nearest"),
        (built.index - 1,),
        source.channels,
        (source.size[0] * factor, source.size[1] * factor),
        (source.stride[0] / factor, source.stride[1] / factor),
    )


def route(section: Section, built: Built) -> Layer:
    """Build [route]: concatenate layers, or a slice of each."""
    indices = built.resolve(section, "layers")
    sources = [built.at(index) for index in indices]
    groups = section.int("groups", 1, minimum=1, maximum=MAX_FILTERS)
    group = section.int("group_id", 0, minimum=0, maximum=groups - 1)
    for index, source in zip(indices, sources, strict=True):
        if source.size != sources[0].size:
            sizes = f"{_shape(sources[0])} from layer {indices[0]} and {_shape(source)} from layer {index}"
            built.mismatch(section, sources, "size", f"expects maps of one size, gets {sizes}", "layers")
        if source.channels % groups:
            message = f"expects groups={groups} to divide the {source.channels} channels of layer {index}"
            built.mismatch(section, sources, "channels", message, "groups", keys="groups")
    channels = max(1, sum(source.channels // groups for source in sources))
    return Layer(Route(groups, group), tuple(indices), channels, sources[0].size, sources[0].stride)


def shortcut(section: Section, built: Built) -> Layer:
    """Build [shortcut]: add earlier layers to the previous one."""
    source, indices = built.previous, built.resolve(section, "from")
    activation = ACTIVATIONS[section.choice("activation", ACTIVATIONS, "linear")]()
    for index in indices:
        other = built.at(index)
        if other.size != source.size:
            message = f"expects maps of one size, gets {_shape(source)} and {_shape(other)} from layer {index}"
            built.mismatch(section, [source, other], "size", message, "from")
    inputs = (built.index - 1, *indices)
    return Layer(Shortcut(activation), inputs, source.channels, source.size, source.stride)


def scale_channels(section: Section, built: Built) -> Layer:
    """Build [scale_channels]: gate the channels of an earlier layer by the previous one."""
    gate, index = built.previous, built.resolve(section, "from")[0]
    source = built.at(index)
    is_spatial = section.flag("scale_wh")
    activation = ACTIVATIONS[section.choice("activation", ACTIVATIONS, "linear")]()
    wanted = (1, source.size) if is_spatial else (source.channels, (1, 1))
    if (gate.channels, gate.size) != wanted:
        message = f"expects a gate of {wanted[0]} channels at {wanted[1][0]}×{wanted[1][1]} for layer {index}"
        kind = "channels" if gate.channels != wanted[0] else "size"
        built.mismatch(section, [gate, source], kind, f"{message}, gets {gate.channels} at {_shape(gate)}")
    return Layer(ScaleChannels(activation), (built.index - 1, index), source.channels, source.size, source.stride)


def dropout(section: Section, built: Built) -> Layer:
    """Build [dropout]."""
    source = built.previous
    module = nn.Dropout(section.float("probability", 0.2, minimum=0, maximum=1))
    return Layer(module, (built.index - 1,), source.channels, source.size, source.stride)


def yolo(section: Section, built: Built) -> Layer:
    """Build [yolo]: a head whose anchors `mask` picks, in network-input pixels."""
    source, values = built.previous, section.floats("anchors")
    pairs = _pairs(section, values)
    count = section.int("num", 1, minimum=1)
    mask = section.ints("mask", tuple(range(count)))
    if any(not 0 <= chosen < len(pairs) for chosen in mask):
        if pairs:
            section.fail(
                f"'mask' picks {min(mask)} to {max(mask)}, but 'anchors' has pairs 0 to {len(pairs) - 1}", "mask"
            )
        mask = ()  # so that the channels are not judged by it
    spec = HeadSpec(
        built.index,
        tuple(pairs[chosen] for chosen in mask),
        section.int("classes", 20, minimum=1, maximum=MAX_FILTERS),
        source.stride,
        section.float("scale_x_y", 1, minimum=1, maximum=4),
        section.flag("new_coords"),
    )
    return _head(section, built, spec)


def region(section: Section, built: Built) -> Layer:
    """Build [region], YOLOv2's head (https://arxiv.org/abs/1612.08242): anchors in cells, softmax over classes."""
    source, values = built.previous, section.floats("anchors")
    section.int("coords", 4, minimum=4, maximum=4)
    pairs = _pairs(section, values)[: section.int("num", 1, minimum=1)]
    spec = HeadSpec(
        built.index,
        tuple((w * source.stride[1], h * source.stride[0]) for w, h in pairs),
        section.int("classes", 20, minimum=1, maximum=MAX_FILTERS),
        source.stride,
        is_softmax=section.flag("softmax"),
    )
    return _head(section, built, spec)


def _head(section: Section, built: Built, spec: HeadSpec) -> Layer:
    source, count = built.previous, len(spec.anchors)
    wanted = count * (5 + spec.classes)
    if count and source.channels != wanted:
        line = built.filters_line
        fix = f"set filters={wanted} at line {line}" if line else "put a convolution before it"
        message = f"expects {wanted} channels ({count} anchors, classes={spec.classes}), gets {source.channels} ({fix})"
        built.mismatch(section, [source], "channels", message, keys="classes num mask anchors")
    return Layer(nn.Identity(), (built.index - 1,), source.channels, source.size, source.stride, head=spec)


def _pairs(section: Section, values: tuple[float, ...]) -> list[tuple[float, float]]:
    if len(values) % 2:
        section.fail(f"'anchors' expects pairs of width and height, gets {len(values)} numbers", "anchors")
    if any(not 0 < value < 1e6 for value in values):
        section.fail("'anchors' expects sizes above 0", "anchors")
    return list(zip(values[::2], values[1::2], strict=False))


def _strides(section: Section) -> tuple[int, int]:
    stride = section.int("stride", 1, minimum=1, maximum=MAX_KERNEL)
    return (
        section.int("stride_y", stride, minimum=1, maximum=MAX_KERNEL),
        section.int("stride_x", stride, minimum=1, maximum=MAX_KERNEL),
    )


def _window(section: Section, built: Built, kernel: int, stride: tuple[int, int], padding: int) -> tuple[int, int]:
    """Give the output size of a sliding window over the previous layer; `padding` counts both sides."""
    source = built.previous
    height = (source.size[0] + padding - kernel) // stride[0] + 1
    width = (source.size[1] + padding - kernel) // stride[1] + 1
    if height < 1 or width < 1:
        message = f"has a window of {kernel}, but its input is only {_shape(source)} (padding {padding})"
        built.mismatch(section, [source], "size", message, "size", keys="size padding pad")
    return max(1, height), max(1, width)


def _shape(layer: Layer) -> str:
    return f"{layer.size[0]}×{layer.size[1]}"


SECTIONS: dict[str, Callable[[Section, Built], Layer]] = {
    "convolutional": convolutional,
    "conv": convolutional,
    "maxpool": maxpool,
    "max": maxpool,
    "avgpool": avgpool,
    "avg": avgpool,
    "upsample": upsample,
    "route": route,
    "shortcut": shortcut,
    "scale_channels": scale_channels,
    "dropout": dropout,
    "yolo": yolo,
    "region": region,
}
