"""A convolution whose weights and inputs are quantised by DoReFa, LSQ or IAO.

This is quantisation as training sees it: numbers on a grid, computed in floating point and no faster than any others.
"""

import copy
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import BYTE_BITS, FLOAT_BITS, Grid
from .quantisers import (
    FLOOR,
    OnGrid,
    mean_magnitude,
    quantize_activation,
    quantize_weight,
    signs,
    through,
    to_levels,
)

STATE = ("w_step", "a_step", "a_limits")  # what quantisers learn or see beside the weights
MOMENTUM = 0.01  # of a batch in the moving average of ranges


class ActivationGrid(NamedTuple):
    """Integer inputs: x is of level clip(round(x/step) + zero, 0, top), which is read as value·(level - zero)."""

    step: float
    zero: int
    top: int
    value: float


class QuantConv2d(nn.Conv2d):
    """A convolution that quantises its weights and its own input.

    The activation quantiser stands at the input of the convolution that needs integers, not at the output of the layer
    before: whoever else reads that output gets it unchanged, and batch normalisation and activation, which run between
    two quantisers, become the scale of the second one in an exported network (Q, DQ, Conv). Zero is always a level, so
    the zeros of the padding are exact.

    LSQ learns `w_step` [O] and `a_step` [1]; IAO has `a_limits` [2], a moving average of the least and the greatest
    input. They start where `a_range` says; `start_steps` finds a better start for the steps of inputs, and the first
    batch that IAO trains on is where its average starts.
    """

    levels: Tensor | None
    w_step: Tensor
    a_step: Tensor
    a_limits: Tensor

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
        self.grid, self.is_baked, self.is_starting = grid, False, False
        self.register_buffer("levels", None, persistent=False)  # of baked weights
        if grid.method == "lsq" and grid.w_bits != FLOAT_BITS:
            self.w_step = nn.Parameter(torch.empty(filters))
        if grid.method == "lsq" and grid.a_bits != FLOAT_BITS:
            self.a_step = nn.Parameter(torch.empty(1))
        if grid.method == "iao" and grid.a_bits != FLOAT_BITS:
            self.register_buffer("a_limits", torch.empty(2))
        self.reset_state()

    @property
    def state(self) -> list[str]:
        """Name the tensors of its quantisers."""
        return [name for name in STATE if hasattr(self, name)]

    @torch.no_grad()
    def reset_state(self, names: Collection[str] = STATE) -> None:
        """Let the quantisers start afresh: weights' steps from the weights, what is known of inputs from `a_range`."""
        if "w_step" in names and hasattr(self, "w_step"):
            means = self.weight.abs().mean((1, 2, 3))
            self.w_step.copy_(means if self.grid.w_bits == 1 else 2 * means / self.grid.weight_levels[1] ** 0.5)
        if "a_step" in names and hasattr(self, "a_step"):
            self.a_step.fill_(self._first_step)
        if "a_limits" in names and hasattr(self, "a_limits"):
            low, high = self._first_limits
            self.a_limits[0], self.a_limits[1] = low, high

    @property
    def is_fresh(self) -> bool:
        """Tell whether the step of inputs is still the one that `a_range` gives."""
        return hasattr(self, "a_step") and bool(self.a_step == self._first_step)

    def forward(self, x: Tensor) -> Tensor:
        w, x = self._quantised_weight(), self._quantised_input(x)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def bake(self) -> None:
        """Replace the weights by their levels, which a scale may be multiplied to: they are not quantised again."""
        if not self.is_baked:
            self.levels = (self.weight_levels() or (None,))[0]
            self.weight = nn.Parameter(self._quantised_weight().detach())
            self.is_baked = True

    @torch.no_grad()
    def activation_grid(self) -> ActivationGrid | None:
        """Give the levels of the inputs, None where they do not fit a byte."""
        if self.grid.a_bits > BYTE_BITS:
            return None
        top = 2**self.grid.a_bits - 1
        if self.grid.method == "dorefa":
            return ActivationGrid(self.grid.a_range / top, 0, top, 1 / top)
        step, low, _ = self.input_grid()
        return ActivationGrid(float(step), -int(low), top, float(step))

    @torch.no_grad()
    def weight_levels(self) -> tuple[Tensor, Tensor] | None:
        """Give integers [O, I/groups, k, k] (int16) and scales [O] whose product the convolution's weights are.

        None where they have more than 8 bits. A scale may be negative where batch normalisation is folded in.
        """
        w, grid = self.weight, self.grid
        if grid.w_bits > BYTE_BITS:
            return None
        if self.levels is not None:
            place = self.levels.flatten(1).abs().argmax(1, keepdim=True)
            largest = self.levels.flatten(1).gather(1, place)[:, 0]
            return self.levels, w.flatten(1).gather(1, place)[:, 0] / torch.where(largest == 0, 1, largest)
        if grid.method != "dorefa":
            step = self._weight_step()
            return to_levels(w / step, *grid.weight_levels, is_binary=grid.w_bits == 1).short(), step.flatten()
        if grid.w_bits == 1:
            return signs(w).short(), mean_magnitude(w).repeat(len(w))
        n = 2**grid.w_bits - 1
        return (quantize_weight(w, grid.w_bits) * n).round().short(), w.new_full((len(w),), 1 / n)

    def input_grid(self) -> tuple[Tensor, Any, Any]:
        """Give the step of LSQ's or IAO's inputs, no dimension, and their least and greatest level: of IAO tensors."""
        low, high = self.grid.input_levels
        if self.grid.method == "lsq":
            step = self.a_step[0]
            return through(step, step.clamp_min(FLOOR)), low, high
        least, most = self.a_limits.unbind()
        if self.grid.is_symmetric:
            return (torch.maximum(-least, most) / high).clamp_min(FLOOR), low, high
        return affine_grid(least, most, high)

    def start_step(self, x: Tensor) -> None:
        """Let the step of inputs start from a batch of them: 2·mean|x|/√(greatest level)."""
        self.a_step.copy_(2 * x.abs().mean(dtype=self.a_step.dtype) / self.grid.input_levels[1] ** 0.5)
        self.is_starting = False

    @property
    def _first_step(self) -> float:
        return self.grid.a_range / self.grid.input_levels[1]

    @property
    def _first_limits(self) -> tuple[float, float]:
        return -self.grid.a_range if self.grid.is_symmetric else 0.0, self.grid.a_range

    def _quantised_weight(self) -> Tensor:
        w, grid = self.weight, self.grid
        if self.is_baked or grid.w_bits == FLOAT_BITS:
            return w
        if grid.method == "dorefa":
            return quantize_weight(w, grid.w_bits)
        low, high = grid.weight_levels
        if grid.method == "iao":
            step = self._weight_step()
            return through(w, to_levels(w.detach() / step, low, high).mul_(step))
        share = (w[0].numel() * high) ** -0.5
        return OnGrid.apply(w, self.w_step.view(-1, 1, 1, 1), low, high - low, share, grid.w_bits == 1)

    def _quantised_input(self, x: Tensor) -> Tensor:
        grid = self.grid
        if grid.a_bits == FLOAT_BITS:
            return x
        if grid.method == "dorefa":
            return quantize_activation(x, grid.a_bits, grid.a_range)
        if self.is_starting:
            self.start_step(x)
        if grid.method == "iao" and self.training:
            watch(self.a_limits, x, is_fresh=(self.a_limits == self.a_limits.new_tensor(self._first_limits)).all())
        step, low, _ = self.input_grid()
        share = (x[0].numel() * grid.input_levels[1]) ** -0.5
        return OnGrid.apply(x, step, low, 2**grid.a_bits - 1, share, False)

    def _weight_step(self) -> Tensor:
        """Give the steps [O, 1, 1, 1] of LSQ's or IAO's weights."""
        if self.grid.method == "lsq":
            return self.w_step.view(-1, 1, 1, 1).clamp_min(FLOOR)
        return (self.weight.detach().abs().amax((1, 2, 3), keepdim=True) / self.grid.weight_levels[1]).clamp_min(FLOOR)


def affine_grid(least: Tensor, most: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the step of `top` + 1 levels from `least` <= 0 to `most` >= 0, and the first and the last of them.

    They are nudged, so that 0 is one.
    """
    step = ((most - least) / top).clamp_min(FLOOR)
    zero = (-least / step).round().clamp(0, top)
    return step, -zero, top - zero


@torch.no_grad()
def watch(limits: Tensor, x: Tensor, *, is_fresh: Tensor) -> None:
    """Let limits [2] follow the range of a batch, which always contains 0; fresh ones become it."""
    seen = torch.stack((x.amin().clamp_max(0), x.amax().clamp_min(0))).to(limits.dtype)
    limits.copy_(torch.where(is_fresh, seen, limits.lerp(seen, MOMENTUM)))


@torch.no_grad()
def start_steps(model: nn.Module, x: Tensor) -> int:
    """Let every step of inputs that is still fresh start from a batch `x` of the network's; count them.

    A copy in training mode sees it, so that no statistics of the network itself move.
    """
    if not any(module.is_fresh for module in model.modules() if isinstance(module, QuantConv2d)):
        return 0
    trial = copy.deepcopy(model).train()
    pairs = [
        (own, module)
        for own, module in zip(model.modules(), trial.modules(), strict=True)
        if isinstance(own, QuantConv2d) and isinstance(module, QuantConv2d) and own.is_fresh
    ]
    for _, module in pairs:
        module.is_starting = True
    trial(x)
    for own, module in pairs:
        own.a_step.copy_(module.a_step)
    return len(pairs)
