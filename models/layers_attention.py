"""Sections that gate a map by what it says itself: [eca], and CBAM's [ca] and [sa]."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from .attention import ChannelGate, Eca, SpatialGate, adaptive_kernel
from .cfg import Section
from .channels import Flow, mixed, same
from .layer import MAX_FILTERS, Built, Layer, read_odd


def eca(section: Section, built: Built) -> Layer:
    """Build [eca], efficient channel attention: gate every channel by the means of its neighbours."""
    channels = built.previous.channels
    kernel = read_odd(section, "kernel_size", 3, minimum=0) or adaptive_kernel(channels)
    widths = {} if section.int("kernel_size", 3) else {"kernel_size": kernel}
    return _gate(built, Eca(kernel), {"conv.weight": ""}, 2 * kernel * channels, flow=mixed, widths=widths)


def ca(section: Section, built: Built) -> Layer:
    """Build [ca], CBAM's gate of channels, by their means and maxima over the map."""
    channels = built.previous.channels
    ratio = section.int("ratio", 16, minimum=1, maximum=MAX_FILTERS)
    hidden = section.int("hidden", max(1, channels // ratio), minimum=1, maximum=MAX_FILTERS)
    built.afford(section, 2 * channels * hidden, "hidden")
    tensors = {"squeeze.weight": "-o", "excite.weight": "o"}
    flops = 2 * 4 * channels * hidden
    return _gate(built, ChannelGate(channels, hidden), tensors, flops, widths={"hidden": hidden})


def sa(section: Section, built: Built) -> Layer:
    """Build [sa], CBAM's gate of positions, by the mean and the maximum of their channels."""
    kernel = read_odd(section, "kernelsize", 7, alias="kernel_size")
    height, width = built.previous.size
    return _gate(built, SpatialGate(kernel), {"conv.weight": ""}, 2 * 2 * kernel**2 * height * width, flow=mixed)


def _gate(
    built: Built,
    module: nn.Module,
    tensors: dict[str, str],
    flops: int,
    *,
    flow: Flow = same,
    widths: Mapping[str, str | int] | None = None,
) -> Layer:
    return replace(built.pass_on(module), tensors=tensors, flops=flops, flow=flow, widths=widths or {})
