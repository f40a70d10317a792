"""Convolutions: [convolutional] in all its variants, [depthwise], [quan_convolutional], [crnn]."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .binary import BinaryConv2d
from .cfg import Section
from .channels import convolved, kept
from .grid import Grid, read_grid
from .layer import (
    BN_EPS,
    BN_MOMENTUM,
    MAX_FILTERS,
    MAX_KERNEL,
    Built,
    Layer,
    coarser,
    read_activation,
    read_strides,
    shape,
    slide,
    window,
)
from .layers_pool import blurred, read_blur
from .quant import QuantConv2d


class Convolution(nn.Module):
    """Convolution, batch normalisation (Identity where there is none), activation, and the blur of antialiasing.

    `levels`, and `early_levels` before the activation, are those of storage.py, where the cfg asks for them.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.Module, activation: nn.Module, blur: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.activation, self.blur = conv, bn, activation, blur
        self.early_levels, self.levels = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.levels(self.blur(self.activation(self.early_levels(self.bn(self._convolved(x))))))

    def _convolved(self, x: Tensor) -> Tensor:
        """Convolve; strided and large depthwise windows in float32, also where the CPU computes in bfloat16.

        Their gradients take oneDNN several times to a hundred times as long in bfloat16.
        """
        conv = self.conv
        is_slow = conv.groups == conv.in_channels > 1 and (max(conv.stride) > 1 or max(conv.kernel_size) > 3)
        if not (is_slow and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return conv(x)
        with torch.autocast("cpu", enabled=False):
            return conv(x.float()).to(torch.get_autocast_dtype("cpu"))

    def fuse(self) -> None:
        """Fold the batch normalisation into the convolution, whose quantised weights are baked before."""
        if isinstance(self.conv, QuantConv2d):
            self.conv.bake()
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class SharedConvolution(nn.Module):
    """The weights, bias and batch normalisation of another Convolution with a stride, padding and dilation of its own.

    The owner stands in a tuple, so that its tensors are not listed twice.
    """

    def __init__(self, owner: Convolution, window: "Window", activation: nn.Module, blur: nn.Module) -> None:
        super().__init__()
        self.owner, self.window = (owner,), window
        self.activation, self.blur = activation, blur

    def forward(self, x: Tensor) -> Tensor:
        (owner,), (_, stride, padding, dilation, groups) = self.owner, self.window
        x = F.conv2d(x, owner.conv.weight, owner.conv.bias, stride, padding * dilation, dilation, groups)
        return self.blur(self.activation(owner.bn(x)))


class Crnn(nn.Module):
    """A convolutional recurrent layer on the first frame, where the state before is zero.

    state = input(x) + self(0), output(state). Darknet carries the state from frame to frame of a video (`track`); here
    every picture is a first frame. `shortcut` adds the state before, which is zero too.
    """

    def __init__(self, input_: Convolution, self_: Convolution, output: Convolution) -> None:
        super().__init__()
        self.input, self.self, self.output = input_, self_, output

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return self.output(x + self.self(torch.zeros_like(x)))


class Window(NamedTuple):
    """What a convolution does to sizes. Darknet dilates the padding as well."""

    size: int
    stride: tuple[int, int]
    padding: int
    dilation: int
    groups: int


def convolutional(section: Section, built: Built) -> Layer:
    """Build [convolutional]: convolution, optional batch normalisation, activation, optional blur."""
    return _convolutional(section, built, section.int("groups", 1, minimum=1, maximum=MAX_FILTERS, alias="group"))


def depthwise(section: Section, built: Built) -> Layer:
    """Build [depthwise], a convolution with as many groups as channels."""
    return _convolutional(section, built, built.previous.channels)


def quan_convolutional(section: Section, built: Built) -> Layer:
    """Build [quan_convolutional], a convolution with quantised weights and quantised inputs."""
    groups = section.int("groups", 1, minimum=1, maximum=MAX_FILTERS, alias="group")
    return _convolutional(section, built, groups, read_grid(section))


def crnn(section: Section, built: Built) -> Layer:
    """Build [crnn]: three convolutions of one window, for one frame (see Crnn)."""
    source = built.previous
    hidden = section.int("hidden", 1, minimum=1, maximum=MAX_FILTERS)
    filters = section.int("output", 1, minimum=1, maximum=MAX_FILTERS)
    groups = section.int("groups", 1, minimum=1, maximum=MAX_FILTERS)
    groups = _check_groups(section, built, groups, (source.channels, hidden, filters), "groups output hidden")
    window, size = _read_window(section, built, groups, read_strides(section), default_size=3)
    if size != source.size:
        message = (
            f"expects a window that keeps its input's {shape(source)} (stride=1, pad=1), gives {size[0]}×{size[1]}"
        )
        built.mismatch(section, [source], "size", message, keys="size stride padding pad dilation")
    is_xnor, has_bn = section.flag("xnor"), section.flag("batch_normalize")
    activation = read_activation(section, "logistic")
    section.flag("shortcut")  # adds the state before, which is zero
    per_channel = hidden * window.size**2 // groups
    built.afford(section, per_channel * (source.channels + hidden + filters), "hidden")
    parts = [
        _make_convolution(C, out, window, has_bn=has_bn, is_binary=is_xnor, is_xnor=is_xnor)
        for C, out in ((source.channels, hidden), (hidden, hidden), (hidden, filters))
    ]
    axes = dict.fromkeys(("input", "self", "output"), "") if groups > 1 else {"input": "-i", "self": "", "output": "o"}
    tensors = {f"{part}.{name}": each for part in axes for name, each in _tensors(has_bn, axes[part]).items()}
    built.filters_line = section.line_of("output")
    return Layer(
        Crnn(*(Convolution(conv, bn, activation, nn.Identity()) for conv, bn in parts)),
        (built.index - 1,),
        filters,
        source.size,
        source.stride,
        convolved(1, keeps_inputs=is_xnor) if groups == 1 else kept,
        tensors,
        {"output": "o"},
        2 * per_channel * (source.channels + hidden + filters) * source.size[0] * source.size[1],
    )


def _convolutional(section: Section, built: Built, groups: int, grid: Grid | None = None) -> Layer:
    source = built.previous
    filters = section.int("filters", 1, minimum=1, maximum=MAX_FILTERS)
    is_xnor = section.flag("xnor")
    is_binary = section.flag("binary") or is_xnor
    if is_binary and grid:
        section.fail("quantises by w_bits and a_bits, not by binary=1 or xnor=1", "xnor" if is_xnor else "binary")
    section.flag("bin_output")  # packs the output of xnor layers into bits, which changes no number
    groups = 1 if is_xnor else groups
    groups = _check_groups(section, built, groups, (source.channels, filters), "filters groups group")
    stride = read_strides(section)
    blur, own_stride = read_blur(section, stride)
    window, size = _read_window(section, built, groups, own_stride)
    has_bn = section.flag("batch_normalize") or section.flag("cbn")  # cbn changes the statistics of training alone
    activation = read_activation(section, "logistic")
    weights = filters * (source.channels // groups) * window.size**2
    index, owner = _find_owner(section, built, filters, window, has_bn=has_bn, is_plain=not is_binary and grid is None)
    if owner:
        module: nn.Module = SharedConvolution(owner, window, activation, blur)
    else:
        built.afford(section, weights, "filters")
        conv, bn = _make_convolution(
            source.channels, filters, window, has_bn=has_bn, is_binary=is_binary, is_xnor=is_xnor, grid=grid
        )
        module = Convolution(conv, bn, activation, blur)
    built.filters_line = section.line_of("filters")
    is_depthwise = groups == source.channels > 1
    axes = "o" if is_depthwise else "og" if groups > 1 else "oi"
    key = next((key for key in ("groups", "group") if key in section.options), "")
    widths = {"filters": "o"} | ({key: "i"} if is_depthwise and key else {})
    return Layer(
        module,
        (built.index - 1,),
        filters,
        blurred(section, built, blur, size),
        coarser(source, stride),
        kept if grid and grid.w_bits == 1 and grid.method == "dorefa" else convolved(groups, keeps_inputs=is_binary),
        {} if owner else _tensors(has_bn, axes) | _steps(module),
        widths,
        2 * weights * size[0] * size[1] // (32 if is_xnor else 1),  # Darknet's, as 32 bits go in one step
        owner=index,
    )


def _read_window(
    section: Section, built: Built, groups: int, stride: tuple[int, int], *, default_size: int = 1
) -> tuple[Window, tuple[int, int]]:
    """Read size, stride, padding and dilation; give them with the size of the output."""
    kernel = section.int("size", default_size, minimum=1, maximum=MAX_KERNEL)
    padding = section.int("padding", 0, minimum=0, maximum=MAX_KERNEL)
    padding = kernel // 2 if section.flag("pad") else padding
    dilation = section.int("dilation", 1, minimum=1, maximum=MAX_KERNEL)
    dilation = 1 if kernel == 1 else dilation
    size = slide(section, built, kernel, stride, 2 * padding)
    source, reach = built.previous, dilation * (kernel - 1) + 1
    if dilation > 1 and window(source.size, reach, stride, 2 * padding * dilation) != size:
        message = f"expects a padding of size/2 for dilation={dilation}, gets {padding} (set pad=1)"
        built.mismatch(section, [source], "size", message, "dilation", keys="size dilation padding pad stride")
    return Window(kernel, stride, padding, dilation, groups), size


def _check_groups(section: Section, built: Built, groups: int, counts: tuple[int, ...], keys: str) -> int:
    if all(count % groups == 0 for count in counts):
        return groups
    message = (
        f"expects groups={groups} to divide its {counts[0]} inputs and {' and '.join(map(str, counts[1:]))} filters"
    )
    built.mismatch(section, [built.previous], "channels", message, "groups", keys=keys)
    return 1


def _make_convolution(
    channels: int,
    filters: int,
    window: Window,
    *,
    has_bn: bool,
    is_binary: bool,
    is_xnor: bool,
    grid: Grid | None = None,
) -> tuple[nn.Conv2d, nn.Module]:
    size, stride, padding, dilation, groups = window
    arguments = (channels, filters, size, stride, padding * dilation, dilation, groups, not has_bn)
    if is_binary:
        conv: nn.Conv2d = BinaryConv2d(*arguments, is_xnor=is_xnor)
    else:
        conv = QuantConv2d(*arguments, grid=grid) if grid else nn.Conv2d(*arguments)
    return conv, nn.BatchNorm2d(filters, eps=BN_EPS, momentum=BN_MOMENTUM) if has_bn else nn.Identity()


def _tensors(has_bn: bool, axes: str) -> dict[str, str]:
    """Give the tensors of a convolution whose weights have `axes`."""
    names = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var") if has_bn else ("conv.bias",)
    return dict.fromkeys(names, axes[:1].strip("-")) | {"conv.weight": axes}


def _steps(module: nn.Module) -> dict[str, str]:
    """Give the tensors of a convolution's quantisers: weights have a step a filter."""
    conv = module.conv if isinstance(module, Convolution) else None
    names = conv.state if isinstance(conv, QuantConv2d) else ()
    return {f"conv.{name}": "o" if name == "w_step" else "" for name in names}


def _find_owner(
    section: Section, built: Built, filters: int, window: Window, *, has_bn: bool, is_plain: bool
) -> tuple[int | None, Convolution | None]:
    """Read `share_index` and give the convolution that it names, if this one can be told to share its weights."""
    if "share_index" not in section.options:
        section.known.add("share_index")
        return None, None
    (index,) = built.resolve(section, "share_index")[:1]
    module = built.at(index).module
    module = module.owner[0] if isinstance(module, SharedConvolution) else module
    if not isinstance(module, Convolution):
        section.fail(f"'share_index' names layer {index}, which is no convolution", "share_index")
        return None, None
    conv = module.conv
    if not is_plain or isinstance(conv, BinaryConv2d | QuantConv2d):
        section.fail("'share_index' and binary or quantised weights do not go together", "share_index")
        return index, module
    wanted = (filters, built.previous.channels // window.groups, window.size, window.size)
    is_alike = tuple(conv.weight.shape) == wanted and isinstance(module.bn, nn.BatchNorm2d) == has_bn
    if not is_alike or conv.groups != window.groups:
        message = f"'share_index' names layer {index}, whose weights, groups or batch_normalize differ"
        sources = [built.previous, built.at(index)]
        built.mismatch(section, sources, "channels", message, "share_index", keys="filters size groups group")
    return index, module
