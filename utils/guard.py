"""What stands between a cut and its files: the cut must be exact, and what is left must not be a ruin."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch

from models import Darknet
from models.layers_dense import Connected
from models.quant import QuantConv2d

from .log import DataError
from .plan import Plan
from .prune import Groups, Mask, mask

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the relative difference of masked and compact
RUIN = 0.1  # of the original's mAP@.5: less is refused
TOLERATED = 0.05  # of mAP@.5: a loss above it is worth a warning
TRIES = 6  # networks that are judged to find the share that loses no more


def check_exactness(model: Darknet, groups: Groups, keep: Mask, compact: Darknet) -> dict[str, float]:
    """Give the difference of the masked and the compact network in float64 and in FP32.

    In a quantised network rounding errors of FP32 become whole levels: only float64 is compared. Raises DataError where
    the difference is larger than rounding explains.
    """
    masked, found = mask(model, groups, keep), {}
    is_quantised = any(isinstance(module, QuantConv2d) for module in model.modules())
    for dtype, bound in list(BOUNDS.items())[: 1 if is_quantised else None]:
        name = str(dtype).removeprefix("torch.")
        found[name] = difference(masked, compact, dtype)
        if math.isnan(found[name]):
            raise DataError(f"{model.cfg.path}: the network puts out NaN (did its training diverge?)")
        if found[name] > bound:
            raise DataError(
                f"masked and pruned network differ by {found[name]:.1e} in {name} (expected {bound:g}; this is a bug)"
            )
    return found


def difference(one: Darknet, other: Darknet, dtype: torch.dtype = torch.float32) -> float:
    """Give the greatest difference of two networks in evaluation mode on a random picture.

    It is relative to each head's largest value.
    """
    is_sized = any(isinstance(module, Connected) for module in one.modules())
    size = one.size if is_sized else (max(64, 2 * one.stride),) * 2
    x = torch.rand(1, one.channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = torch.float32  # no need of copies, which take most of the time
        outputs = [(network if dtype == same else copy.deepcopy(network).to(dtype))(x) for network in (one, other)]
    pairs = zip(*outputs, strict=True)
    return float(np.max([(a - b).abs().max() / a.abs().max().clamp_min(1e-30) for a, b in pairs]))  # NaN where any is


def largest_within(plan: Plan, count: int, score: Callable[[Mask], float], least: float) -> int:
    """Give the greatest number of groups, up to `count`, whose cut scores at least `least`; 0 where none is found."""
    low, high = 0, count
    for _ in range(TRIES):
        middle = (low + high + 1) // 2
        if score(plan.keep(middle)) >= least:
            low = middle
        else:
            high = middle
    return low


def verdict(before: float, after: float, *, max_drop: float | None) -> str:
    """Say why a network with mAP@.5 `after` instead of `before` is to be refused, or nothing; `max_drop` in points."""
    drop = 100 * (before - after)
    if max_drop is not None and drop > max_drop:
        return f"mAP@.5 falls by {drop:.1f} points, from {before:.3f} to {after:.3f} (--max-drop {max_drop:g})"
    if after < RUIN * before:
        return f"a ruin: mAP@.5 falls from {before:.3f} to {after:.3f}, less than a tenth"
    return ""
