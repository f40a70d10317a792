"""The arithmetic of a quantised convolution in integers: int8 weights, int32 biases, and a scale for each channel."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.layers_conv import Convolution
from models.quant import ActivationGrid, QuantConv2d

MAX_BIAS, TINY = 2**30, 1e-30  # of a bias, which leaves the sums room in 32 bits; of a scale
MOST_LEAN = 0.5  # levels by which a scale that makes up for a rounded bias may move the outermost border
DOUBT = 0.02  # share of the outputs that are not as batch normalisation says


class Folded(NamedTuple):
    """Levels of weights [O, I/groups, k, k] (int8), what one of them is worth [O] (float32), biases [O] (int32).

    The unit of a bias is a level of a weight times one of an input.
    """

    levels: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def byte_levels(conv: QuantConv2d, largest: int) -> tuple[Tensor, Tensor]:
    """Give levels of weights up to ±`largest` [O, I/groups, k, k] and their scales [O], in float64.

    Levels that are larger (DoReFa's of 8 bits are the odd numbers up to 255) are put on new ones over each channel's
    own range; that is off by at most half of a new step.
    """
    levels, scale = (each.double() for each in conv.weight_levels())
    times = (largest / levels.abs().amax((1, 2, 3)).clamp_min(1)).clamp_max(1)
    return (levels * times[:, None, None, None]).round(), scale / times


@torch.no_grad()
def fold(block: Convolution, largest: int, grid: ActivationGrid, target: ActivationGrid | None) -> Folded:
    """Fold batch normalisation into weights of levels up to ±`largest`, for inputs on `grid` and outputs on `target`.

    Levels of few bits are multiplied by the number that leaves the least of the bias to rounding, which changes nothing
    else.
    """
    conv, bn, value = block.conv, block.bn, grid.value
    levels, scale = byte_levels(conv, largest)
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    mean, deviation = bias, torch.full_like(bias, math.inf)  # of the outputs
    if isinstance(bn, nn.BatchNorm2d):
        factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        bias = (bias - bn.running_mean.double()) * factor + bn.bias.double()
        levels, scale = levels * factor.sign()[:, None, None, None], scale * factor.abs()
        mean, deviation = bn.bias.double(), bn.weight.double().abs().clamp_min(TINY)
    times = finest(scale * value, bias, largest / levels.abs().amax((1, 2, 3)).clamp_min(1))
    levels, scale = levels * times[:, None, None, None], scale / times
    kept = torch.maximum(scale, bias.abs() / (value * MAX_BIAS)).clamp_min(TINY)  # of a channel that is nearly constant
    levels = (levels * (scale / kept)[:, None, None, None]).round()
    scale, bias = kept, bias / (kept * value)
    if target:
        scale, bias = settle(scale, bias, value, times * (grid.top & -grid.top), target, (mean, deviation))
    return Folded(levels.numpy().astype(np.int8), scale.float().numpy(), bias.round().numpy().astype(np.int32))


def finest(unit: Tensor, bias: Tensor, most: Tensor) -> Tensor:
    """Give by what whole number up to `most` >= 1 to divide each unit, so that the nearest multiple is nearest."""
    times = torch.arange(1, int(most.max()) + 1, dtype=bias.dtype)[:, None]
    finer = unit / times
    errors = ((bias / finer).round() * finer - bias).abs()
    return errors.where(times <= most, math.inf).argmin(0) + 1


def settle(
    scale: Tensor, bias: Tensor, value: float, multiple: Tensor, target: ActivationGrid, outputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Choose scales and whole biases [O] with which the fewest sums end beyond a border between levels of `target`.

    Sums are multiples of `multiple` [O] and worth `scale` times `value`. A bias that is rounded moves all borders by up
    to half a unit. The nearest number and its neighbours are tried, each also with the scale that takes the move back
    at the borders where outputs are frequent: `outputs` are their mean and deviation [O].
    """
    borders = torch.arange(target.top).double()[:, None] + 0.5 - target.zero  # [T, 1], in levels
    mean, deviation = (each / target.step for each in outputs)
    odds = (1 - DOUBT) * (-((borders - mean) / deviation).square() / 2).softmax(0) + DOUBT / len(borders)  # [T, O]
    unit = scale * value / target.step
    wanted = ((borders / unit - bias) / multiple).floor()  # [T, O], the last sum before each border
    weight = unit * (odds * borders).sum(0) / (odds * borders.square()).sum(0)
    most = MOST_LEAN / borders.abs().max()
    tried = []
    for whole in (bias.round(), bias.round() + 1, bias.round() - 1):
        lean = 1 + (weight * (whole - bias)).clamp(-most, most)
        for kept in (scale.float(), (scale / lean).float()):
            unit = (kept * np.float32(value) / np.float32(target.step)).double()  # in FP32, as kernels compute it
            found = ((borders / unit - whole) / multiple).floor()
            tried.append(((odds * (found != wanted)).sum(0), kept, whole))
    errors, scales, wholes = (torch.stack(each) for each in zip(*tried, strict=True))
    best = errors.argmin(0, keepdim=True)
    return scales.gather(0, best)[0], wholes.gather(0, best)[0]
