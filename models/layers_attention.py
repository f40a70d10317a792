"""Sections that gate a map by what it says itself: [eca], and CBAM's [ca] and [sa]."""

from dataclasses import replace

from torch import nn

from .attention import ChannelGate, Eca, SpatialGate, adaptive_kernel
from .cfg import Section
from .layer import MAX_FILTERS, Built, Layer, read_odd


def eca(section: Section, built: Built) -> Layer:
    """Build [eca], efficient channel attention: gate every channel by the means of its neighbours."""
    channels = built.previous.channels
    kernel = read_odd(section, "kernel_size", 3, minimum=0) or adaptive_kernel(channels)
    return _gate(built, Eca(kernel), ("conv.weight",), 2 * kernel * channels)


def ca(section: Section, built: Built) -> Layer:
    """Build [ca], CBAM's gate of channels, by their means and maxima over the map."""
    channels = built.previous.channels
    ratio = section.int("ratio", 16, minimum=1, maximum=MAX_FILTERS)
    hidden = section.int("hidden", max(1, channels // ratio), minimum=1, maximum=MAX_FILTERS)
    built.afford(section, 2 * channels * hidden, "hidden")
    tensors = ("squeeze.weight", "excite.weight")
    return _gate(built, ChannelGate(channels, hidden), tensors, 2 * 4 * channels * hidden)


def sa(section: Section, built: Built) -> Layer:
    """Build [sa], CBAM's gate of positions, by the mean and the maximum of their channels."""
    kernel = read_odd(section, "kernelsize", 7, alias="kernel_size")
    height, width = built.previous.size
    return _gate(built, SpatialGate(kernel), ("conv.weight",), 2 * 2 * kernel**2 * height * width)


def _gate(built: Built, module: nn.Module, tensors: tuple[str, ...], flops: int) -> Layer:
    return replace(built.pass_on(module), tensors=tensors, flops=flops)
