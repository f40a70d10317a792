"""DoReFa quantisers (https://arxiv.org/abs/1606.06160) with straight-through gradients, and a convolution of them.

This is quantisation as training sees it: numbers on a grid, computed in floating point and no faster than any others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT_BITS = 32  # left as it is
BYTE_BITS = 8  # the most that integer kernels take


class ActivationGrid(NamedTuple):
    """Integer inputs: x is of level clip(round(x/step) + zero, 0, top), which is read as value·(level - zero)."""

    step: float
    zero: int
    top: int
    value: float


@dataclass(frozen=True)
class Grid:
    """Bits of weights and activations (32: float), and the value at which activations saturate."""

    w_bits: int
    a_bits: int
    a_range: float


def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """Put weights on 2^bits levels from -1 to 1, of one bit on ± the mean magnitude of all of them.

    2·round((tanh w / (2 max|tanh w|) + ½)·n)/n - 1 with n = 2^bits - 1. The gradient passes the rounding, or the sign
    and its scale, as if it were not there (sections 2.3 and 2.4 of the paper).
    """
    if bits == FLOAT_BITS:
        return w
    if bits == 1:
        return _straight_through(torch.where(w >= 0, 1.0, -1.0) * w.abs().mean(), w)
    t, n = w.tanh(), 2**bits - 1
    largest = t.abs().amax().clamp_min(torch.finfo(w.dtype).tiny)  # all weights may be zero
    return 2 * _round((t / (2 * largest) + 0.5) * n) / n - 1


def quantize_activation(x: Tensor, bits: int, limit: float) -> Tensor:
    """Put activations 0..limit on 2^bits levels from 0 to 1: round(clip(x/limit, 0, 1)·n)/n with n = 2^bits - 1.

    The gradient is that of the clipping alone. The paper's limit is 1.
    """
    if bits == FLOAT_BITS:
        return x
    n = 2**bits - 1
    return _round((x / limit).clamp(0, 1) * n) / n


class QuantConv2d(nn.Conv2d):
    """A convolution that quantises its weights and its own input.

    The activation quantiser stands at the input of the convolution that needs integers, not at the output of the layer
    before: whoever else reads that output gets it unchanged, and batch normalisation and activation, which run between
    two quantisers, become the scale of the second one in an exported network (Q, DQ, Conv). Levels run from 0 to 1,
    zero is one of them, so the zeros of the padding are exact; negative inputs saturate to it.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        size: int,
        stride: tuple[int, int] = (1, 1),
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        grid: Grid,
    ) -> None:
        super().__init__(channels, filters, size, stride, padding, dilation, groups, bias)
        self.grid, self.is_baked = grid, False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight if self.is_baked else quantize_weight(self.weight, self.grid.w_bits)
        x = quantize_activation(x, self.grid.a_bits, self.grid.a_range)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def bake(self) -> None:
        """Replace the weights by their levels, which a scale may be multiplied to: they are not quantised again."""
        self.weight = nn.Parameter(quantize_weight(self.weight, self.grid.w_bits).detach())
        self.is_baked = True

    def activation_grid(self) -> ActivationGrid | None:
        """Give the levels of the inputs, None where they do not fit a byte."""
        if self.grid.a_bits > BYTE_BITS:
            return None
        n = 2**self.grid.a_bits - 1
        return ActivationGrid(self.grid.a_range / n, 0, n, 1 / n)

    @torch.no_grad()
    def weight_levels(self) -> tuple[Tensor, Tensor] | None:
        """Give integers [O, I/groups, k, k] (int16) and scales [O] whose product the convolution's weights are.

        None where they have more than 8 bits.
        """
        if self.grid.w_bits > BYTE_BITS:
            return None
        w = self.weight
        if self.grid.w_bits == 1:
            return torch.where(w >= 0, 1, -1).short(), w.abs().mean().repeat(len(w))
        n = 2**self.grid.w_bits - 1
        return (quantize_weight(w, self.grid.w_bits) * n).round().short(), w.new_full((len(w),), 1 / n)


def _round(x: Tensor) -> Tensor:
    return _straight_through(x.round(), x)


def _straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Give `value`, exactly, with the gradient of `x`."""
    return value.detach() + (x - x.detach()) if x.requires_grad else value
