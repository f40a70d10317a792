"""Quantised weights in few bytes: their levels side by side in bits, and the weights that these restore.

What is restored stands on the grid: quantised once more it gives the same levels and scales to the last bit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .quant import QuantConv2d
from .quantisers import FLOOR


def pack(levels: Tensor, bits: int) -> Tensor:
    """Put integers 0..2^bits - 1, of at most 8 bits, side by side into bytes [⌈N·bits/8⌉], lowest first."""
    places = (levels.cpu().flatten()[:, None] >> torch.arange(bits)) & 1  # [N, bits]
    return torch.from_numpy(np.packbits(places.numpy().astype(np.uint8), bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Give the `count` integers (int16) [N] that `pack` has put into bytes."""
    places = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    return torch.from_numpy(places.astype(np.int16) @ (1 << np.arange(bits, dtype=np.int16)))


def pack_weight(conv: QuantConv2d) -> dict[str, Any] | None:
    """Give what restores the weights of a convolution: data alone. None where they have more than 8 bits."""
    found, grid = conv.weight_levels(), conv.grid
    if found is None:
        return None
    levels, scale = found
    low, gap = _lowest(grid.method, grid.w_bits, grid.weight_levels[0])
    if grid.method == "iao":
        scale = conv.weight.detach().abs().amax((1, 2, 3))
    what = {"method": grid.method, "bits": grid.w_bits, "shape": list(levels.shape), "low": grid.weight_levels[0]}
    return what | {"levels": pack((levels - low) // gap, grid.w_bits), "scale": scale.detach().cpu().clone()}


def restore_weight(packed: Mapping[str, Any]) -> Tensor:
    """Give weights [O, I/groups, k, k] that quantise to what was packed."""
    method, bits, shape = packed["method"], packed["bits"], packed["shape"]
    low, gap = _lowest(method, bits, packed["low"])
    levels = low + gap * unpack(packed["levels"], bits, int(np.prod(shape))).view(shape).float()
    scale = packed["scale"].view(-1, 1, 1, 1)
    if method == "dorefa" and bits > 1:
        n = 2**bits - 1
        return torch.atanh(levels / (2 * n)) * (levels.abs().amax() == n)  # else all were zero
    if method == "iao":  # the largest weight of a filter is its range, not a product that has been rounded
        step = (scale / -low).clamp_min(FLOOR)
        return torch.where(levels.abs() == -low, levels.sign() * scale, levels * step)
    return levels * scale


def _lowest(method: str, bits: int, low: int) -> tuple[int, int]:
    """Give the lowest level of weights, and the gap between two: DoReFa's are odd, those of one bit ±1."""
    if bits == 1:
        return -1, 2
    return (-(2**bits - 1), 2) if method == "dorefa" else (low, 1)
