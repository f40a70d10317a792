"""Sections without parameters that work on one map: pooling, resizing, reordering, dropout."""

import torch.nn.functional as F
from torch import Tensor, nn

from .cfg import Section
from .channels import Flow, folded, scrambled, unfolded
from .layer import MAX_KERNEL, Built, Layer, coarser, read_activation, read_strides, shape, slide, window


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


class LocalAvgPool(nn.Module):
    """The mean over the cells of a window that lie inside the map; padding is placed as in MaxPool."""

    def __init__(self, size: int, stride: tuple[int, int], padding: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.before, self.after = padding // 2, padding - padding // 2

    def forward(self, x: Tensor) -> Tensor:
        return self._sum(x) / self._sum(x.new_ones(1, 1, *x.shape[2:]))

    def _sum(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.before, self.after) * 2)
        return F.avg_pool2d(x, self.size, self.stride, divisor_override=1)


class Blur(nn.Module):
    """Low-pass filter before subsampling (https://arxiv.org/abs/1904.11486).

    Of kind 1 [1 2 1]⊗[1 2 1]/16 with one zero around, of kind 2 the mean of 2×2 cells without padding. Its constants
    are no parameters and stand in no file.
    """

    def __init__(self, kind: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.kind, self.stride = kind, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 2:
            return F.avg_pool2d(x, 2, self.stride)
        line, C = x.new_tensor([0.25, 0.5, 0.25]), x.shape[1]
        kernel = (line[:, None] * line).expand(C, 1, 3, 3)  # [C, 1, 3, 3]
        return F.conv2d(x, kernel, stride=self.stride, padding=1, groups=C)

    def extra_repr(self) -> str:
        return f"{self.kind}, stride={self.stride}"


class Reorg3d(nn.Module):
    """Move s×s cells into channels, [dy·s+dx][c] -> channel (dy·s+dx)·C + c, or back."""

    def __init__(self, stride: int, is_reverse: bool) -> None:
        super().__init__()
        self.stride, self.is_reverse = stride, is_reverse

    def forward(self, x: Tensor) -> Tensor:
        (B, C, H, W), s = x.shape, self.stride
        if self.is_reverse:
            x = x.reshape(B, s, s, C // s**2, H, W).permute(0, 3, 4, 1, 5, 2)  # [B, C/s², H, s, W, s]
            return x.reshape(B, C // s**2, H * s, W * s)
        x = x.reshape(B, C, H // s, s, W // s, s).permute(0, 3, 5, 1, 2, 4)  # [B, s, s, C, H/s, W/s]
        return x.reshape(B, C * s**2, H // s, W // s)


class Reorg(nn.Module):
    """YOLOv2's own order of space-to-depth: it takes the map for one of C/s² channels and s times the sides."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        (B, C, H, W), s = x.shape, self.stride
        x = x.reshape(B, C // s**2, H, s, W, s).permute(0, 3, 5, 1, 2, 4)  # [B, s, s, C/s², H, W]
        return x.reshape(B, C * s**2, H // s, W // s)


class Crop(nn.Module):
    """Darknet's crop at inference: the middle of the map, `scale` of its sides, from 0..1 to -1..1 if adjusted."""

    def __init__(self, scale: tuple[float, float], is_adjusted: bool) -> None:
        super().__init__()
        self.scale, self.is_adjusted = scale, is_adjusted

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        h, w = round(self.scale[0] * H), round(self.scale[1] * W)
        top, left = (H - h) // 2, (W - w) // 2
        x = x[:, :, top : top + h, left : left + w]
        return 2 * x - 1 if self.is_adjusted else x


class Activation(nn.Module):
    """An activation of a map that other layers may read too: most activations work in place, so it takes a copy."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone())


def read_blur(section: Section, stride: tuple[int, int]) -> tuple[nn.Module, tuple[int, int]]:
    """Read `antialiasing`: the blur that takes over `stride`, and the stride that is left to the layer itself."""
    kind = section.int("antialiasing", 0, minimum=0, maximum=2)
    return (Blur(kind, stride), (1, 1)) if kind else (nn.Identity(), stride)


def blurred(section: Section, built: Built, blur: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Give the size of a map of `size` after `blur`."""
    if not isinstance(blur, Blur):
        return size
    height, width = window(size, 2, blur.stride, 0) if blur.kind == 2 else window(size, 3, blur.stride, 2)
    if height < 1 or width < 1:
        message = f"blurs 2×2 cells, but its map is only {size[0]}×{size[1]} (set antialiasing=1)"
        built.mismatch(section, [built.previous], "size", message, "antialiasing", keys="size padding pad")
    return max(1, height), max(1, width)


def maxpool(section: Section, built: Built) -> Layer:
    """Build [maxpool]."""
    source, stride = built.previous, read_strides(section)
    kernel, padding = _pool_window(section, stride)
    blur, own_stride = read_blur(section, stride)
    size = slide(section, built, kernel, own_stride, padding)
    pool = MaxPool(kernel, own_stride, padding)
    return Layer(
        nn.Sequential(pool, blur) if isinstance(blur, Blur) else pool,
        (built.index - 1,),
        source.channels,
        blurred(section, built, blur, size),
        coarser(source, stride),
        flops=kernel * kernel * source.channels * size[0] * size[1],
    )


def local_avgpool(section: Section, built: Built) -> Layer:
    """Build [local_avgpool]."""
    source, stride = built.previous, read_strides(section)
    kernel, padding = _pool_window(section, stride)
    size = slide(section, built, kernel, stride, padding)
    flops = kernel * kernel * source.channels * size[0] * size[1]
    module = LocalAvgPool(kernel, stride, padding)
    return Layer(module, (built.index - 1,), source.channels, size, coarser(source, stride), flops=flops)


def avgpool(section: Section, built: Built) -> Layer:
    """Build [avgpool], the mean over the whole map."""
    source = built.previous
    stride = coarser(source, source.size)
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
        multiple=source.stride,
    )


def reorg3d(section: Section, built: Built) -> Layer:
    """Build [reorg3d], cells into channels; with `reverse` channels into cells."""
    source, s = built.previous, section.int("stride", 1, minimum=1, maximum=64)
    if not section.flag("reverse"):
        return _fold(section, built, Reorg3d(s, False), s, folded(s**2))
    _check_channels(section, built, s)
    return Layer(
        Reorg3d(s, True),
        (built.index - 1,),
        max(1, source.channels // s**2),
        (source.size[0] * s, source.size[1] * s),
        (source.stride[0] / s, source.stride[1] / s),
        unfolded(s**2),
        multiple=source.stride,
    )


def reorg(section: Section, built: Built) -> Layer:
    """Build [reorg], YOLOv2's (https://arxiv.org/abs/1612.08242)."""
    s = section.int("stride", 1, minimum=1, maximum=64)
    _check_channels(section, built, s)
    return _fold(section, built, Reorg(s), s, scrambled(s**2))


def crop(section: Section, built: Built) -> Layer:
    """Build [crop]: random in Darknet's training, the middle of the map here."""
    source = built.previous
    height = section.int("crop_height", 1, minimum=1, maximum=source.size[0])
    width = section.int("crop_width", 1, minimum=1, maximum=source.size[1])
    module = Crop((height / source.size[0], width / source.size[1]), not section.flag("noadjust"))
    return Layer(module, (built.index - 1,), source.channels, (height, width), source.stride)


def dropout(section: Section, built: Built) -> Layer:
    """Build [dropout]."""
    return built.pass_on(nn.Dropout(section.float("probability", 0.2, minimum=0, maximum=1)))


def activation(section: Section, built: Built) -> Layer:
    """Build [activation]."""
    return built.pass_on(Activation(read_activation(section, "linear")))


def empty(section: Section, built: Built) -> Layer:
    """Build [empty], which passes its input on."""
    return built.pass_on(nn.Identity())


def _pool_window(section: Section, stride: tuple[int, int]) -> tuple[int, int]:
    kernel = section.int("size", stride[0], minimum=1, maximum=MAX_KERNEL)
    return kernel, section.int("padding", kernel - 1, minimum=0, maximum=2 * kernel - 2)


def _fold(section: Section, built: Built, module: nn.Module, s: int, flow: Flow) -> Layer:
    source = built.previous
    if source.size[0] % s or source.size[1] % s:
        message = f"expects stride={s} to divide the sides of its input, gets {shape(source)}"
        built.mismatch(section, [source], "size", message, "stride", keys="stride")
    size = max(1, source.size[0] // s), max(1, source.size[1] // s)
    stride = coarser(source, (s, s))
    return Layer(module, (built.index - 1,), source.channels * s**2, size, stride, flow, multiple=stride)


def _check_channels(section: Section, built: Built, s: int) -> None:
    source = built.previous
    if source.channels % s**2:
        message = f"expects channels in multiples of {s**2} (stride={s}), gets {source.channels}"
        built.mismatch(section, [source], "channels", message, "stride", keys="stride")
