"""What quantisers compute, with straight-through gradients: DoReFa's formulas, and values on multiples of a step.

DoReFa (https://arxiv.org/abs/1606.06160), learned step size, LSQ (https://arxiv.org/abs/1902.08153), and
integer-arithmetic-only inference, IAO (https://arxiv.org/abs/1712.05877).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .grid import FLOAT_BITS

FLOOR = 1e-8  # of a step: weights may all be zero


def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """Put weights on DoReFa's 2^bits levels from -1 to 1, of one bit on ± the mean magnitude of all of them.

    2·round((tanh w / (2 max|tanh w|) + ½)·n)/n - 1 with n = 2^bits - 1. The gradient passes the rounding, or the sign
    and its scale, as if it were not there (sections 2.3 and 2.4 of the paper).
    """
    if bits == FLOAT_BITS:
        return w
    if bits == 1:
        return through(w, signs(w) * mean_magnitude(w))
    t, n = w.tanh(), 2**bits - 1
    largest = t.abs().amax().clamp_min(torch.finfo(w.dtype).tiny)  # all weights may be zero
    shares = (t / (2 * largest) + 0.5) * n
    return 2 * through(shares, shares.detach().round()) / n - 1


def quantize_activation(x: Tensor, bits: int, limit: float) -> Tensor:
    """Put activations 0..limit on DoReFa's 2^bits levels from 0 to 1: round(clip(x/limit, 0, 1)·n)/n, n = 2^bits - 1.

    The gradient is that of the clipping alone. The paper's limit is 1.
    """
    return x if bits == FLOAT_BITS else _Clipped.apply(x, limit, 2**bits - 1)


class _Through(Function):
    """A value with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Clipped(Function):
    """DoReFa's activations: what stays within 0..limit keeps its gradient. In place where it can be: passes cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, n: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit, ctx.n = limit, n
        return (x / limit).clamp_(0, 1).mul_(n).round_().div_(n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _within(grad, x, 0, ctx.limit).div_(ctx.n).mul_(ctx.n).div_(ctx.limit), None, None


class OnGrid(Function):
    """Values on `top` + 1 levels from `low` on times a step, which learns (LSQ, section 2.1) or has no gradient (IAO).

    x keeps its gradient between the limits. That of the step, times `share`, is the sum over x/step = u of round(u) - u
    there, and of the limit beyond; binary levels are ±1, their limits too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Any, top: int, share: float, is_binary: bool) -> Tensor:
        step = step.clamp_min(FLOOR)
        ctx.save_for_backward(x, step)
        ctx.low, ctx.top, ctx.share, ctx.is_binary = low, top, share, is_binary
        return to_levels(x / step, low, low + top, is_binary=is_binary).mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        x, step = ctx.saved_tensors
        u = x / step
        if not ctx.needs_input_grad[1]:
            return _within(grad, u.sub_(ctx.low), 0, ctx.top), None, None, None, None, None
        high = ctx.low + ctx.top
        to_x = _within(grad, u, ctx.low, high)
        slope = to_levels(u.clone(), ctx.low, high, is_binary=ctx.is_binary).mul_(grad).addcmul_(to_x, u, value=-1)
        axes = tuple(range(1 if step.dim() else 0, x.dim()))
        return to_x, ctx.share * slope.sum(axes, dtype=step.dtype).view_as(step), None, None, None, None


def to_levels(u: Tensor, low: Any, high: Any, *, is_binary: bool = False) -> Tensor:
    """Round to the integers low..high, or to ±1; `u` is written over."""
    if is_binary:
        return signs(u)
    if isinstance(low, Tensor):  # a clamp between tensors takes several times as long
        return torch.minimum(torch.maximum(u.round_(), low, out=u), high, out=u)
    return u.clamp_(low, high).round_()


def _within(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Give the gradient where low < x < high, else 0, in one pass."""
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)


def signs(x: Tensor) -> Tensor:
    """Give 1 where x is at least 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def through(x: Tensor, value: Tensor) -> Tensor:
    return _Through.apply(x, value.detach())


def mean_magnitude(w: Tensor) -> Tensor:
    """Give mean |w|, without rounding where all are equal: what a packed file restores."""
    return w.abs().mean(dtype=torch.float64).to(w.dtype)
