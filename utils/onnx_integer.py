"""Write a network with quantised convolutions so that they run in integers: QuantizeLinear and DequantizeLinear around
int8 weights, uint8 inputs and int32 biases.

Concatenation, pooling, upsampling and slices of quantised maps run on their levels.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from models import Darknet
from models.grid import BYTE_BITS
from models.layers_conv import Convolution
from models.quant import ActivationGrid, QuantConv2d
from models.storage import MOVERS, TOP, Levels, limits

from .integer_plan import Plan
from .onnx_graph import Graph
from .onnx_layers import IMAGES, name_raws, window, write

MAX_BIAS, TINY = 2**30, 1e-30  # of a bias, which leaves the sums room in 32 bits; of a scale


class IntegerWriter:
    """Writes the layers of a network into a graph, each map in the forms in which it is read."""

    def __init__(self, g: Graph, model: Darknet, plan: Plan) -> None:
        self.g, self.model, self.plan = g, model, plan
        self.fused = model.fuse()
        for module in self.fused.modules():
            if isinstance(module, Levels):  # the plan has them
                module.reset_state()
        self.reals: dict[int, str] = {-1: IMAGES}
        self.levels: dict[tuple[int, ActivationGrid], str] = {}
        self.shapes = {-1: (model.channels, *model.size)}
        self.shapes |= {index: (layer.channels, *layer.size) for index, layer in enumerate(model.layers)}
        g.shapes[IMAGES] = self.shapes[-1]

    def write(self) -> list[str]:
        """Write all layers and give the names of what the network's forward returns: raw_N of layer N."""
        for index, block in enumerate(self.model.blocks):
            self.g.prefix = f"{index}/"
            if conv := self.plan.convs.get(index):
                self._convolve(index, conv)
            elif not isinstance(block, MOVERS):
                self._compute(index)
        return name_raws(self.g, self.model, self.real)

    def real(self, index: int) -> str:
        """Give the output of a layer in real numbers."""
        if index not in self.reals:
            if grid := self.plan.own.get(index):
                name = dequantise(self.g, self.quantised(index, grid), grid)
            else:
                name = write(self.g, self.fused.blocks[index], *map(self.real, self.model.layers[index].inputs))
            self.reals[index] = self._shaped(index, name)
        return self.reals[index]

    def quantised(self, index: int, grid: ActivationGrid) -> str:
        """Give the output of a layer in levels of a grid."""
        if (index, grid) not in self.levels:
            block = self.fused.blocks[index] if index >= 0 else None
            if isinstance(block, MOVERS):
                inputs = [self.quantised(i, grid) for i in self.model.layers[index].inputs]
                self.levels[index, grid] = self._shaped(index, write(self.g, block, *inputs))
            else:
                self._store(index, self.real(index), grid)
        return self.levels[index, grid]

    def _compute(self, index: int) -> None:
        """Write a layer that computes in floating point, or in integers where ONNX Runtime sees that it may."""
        x = write(self.g, self.fused.blocks[index], *map(self.real, self.model.layers[index].inputs))
        if grid := self.plan.own.get(index):
            self._store(index, x, grid)
        else:
            self.reals[index] = self._shaped(index, x)

    def _convolve(self, index: int, conv: QuantConv2d) -> None:
        """Write a convolution in integers, and its output on the grid that its readers share or on its own."""
        g, block, grid = self.g, self.fused.blocks[index], conv.activation_grid()
        x, wide = widen(g, self.quantised(self.model.layers[index].inputs[0], grid), grid)
        x = write_convolution(g, self.model.blocks[index], x, wide, self.plan.largest)
        if before := self.plan.before.get(index):
            x = dequantise(g, quantise(g, x, before), before)
            self.reals[index] = self._shaped(index, write(g, block.blur, write(g, block.activation, x)))
        elif own := self.plan.own.get(index):
            self._store(index, x, own, limits(block.activation, own))
        elif target := self.plan.target(index):
            self._store(index, x, target, limits(block.activation, target))

    def _store(self, index: int, x: str, grid: ActivationGrid, within: tuple[int, int] | None = None) -> None:
        self.levels[index, grid] = self._shaped(index, quantise(self.g, x, grid, within))

    def _shaped(self, index: int, name: str) -> str:
        self.g.shapes[name] = self.shapes[index]
        return name


def quantise(g: Graph, x: str, grid: ActivationGrid, within: tuple[int, int] | None = None) -> str:
    """Write real numbers as levels of a grid, cut off at the ends of `within`."""
    low, high = within or (0, grid.top)
    x = g.op("QuantizeLinear", x, grid.step, np.uint8(grid.zero))
    return x if (low, high) == (0, TOP) else g.op("Clip", x, np.uint8(low), np.uint8(high))


def dequantise(g: Graph, x: str, grid: ActivationGrid) -> str:
    """Write levels as the numbers that they are read for."""
    return g.op("DequantizeLinear", x, grid.value, np.uint8(grid.zero))


def widen(g: Graph, x: str, grid: ActivationGrid) -> tuple[str, ActivationGrid]:
    """Write levels of few bits as the same number of levels over a whole byte.

    The unit of biases becomes as much finer.
    """
    bits = BYTE_BITS - grid.top.bit_length()
    if not bits:
        return x, grid
    wide = ActivationGrid(grid.step / 2**bits, grid.zero << bits, grid.top << bits, grid.value / 2**bits)
    return g.op("BitShift", x, np.uint8(bits), direction="LEFT"), wide


def write_convolution(g: Graph, block: Convolution, x: str, grid: ActivationGrid, largest: int) -> str:
    """Write a convolution of int8 weights with a scale a channel and int32 biases; its input are levels of a grid."""
    conv = block.conv
    levels, scale, bias = fold(block, largest, grid.value)
    weight = g.op("DequantizeLinear", levels, scale, axis=0)
    bias = g.op("DequantizeLinear", bias, scale * np.float32(grid.value), axis=0)
    sides = window(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return g.op("Conv", dequantise(g, x, grid), weight, bias, **sides)


def byte_levels(conv: QuantConv2d, largest: int) -> tuple[Tensor, Tensor]:
    """Give levels of weights up to ±`largest` [O, I/groups, k, k] and their scales [O], in float64.

    Levels that are larger (DoReFa's of 8 bits are the odd numbers up to 255) are put on new ones over each channel's
    own range; that is off by at most half of a new step.
    """
    levels, scale = (each.double() for each in conv.weight_levels())
    times = (largest / levels.abs().amax((1, 2, 3)).clamp_min(1)).clamp_max(1)
    return (levels * times[:, None, None, None]).round(), scale / times


@torch.no_grad()
def fold(block: Convolution, largest: int, value: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fold batch normalisation: weights' levels (int8), scales [O], and biases [O] (int32).

    The unit of a bias is a level of a weight times one of an input, which is read for `value`. Levels of few bits are
    multiplied by the number that leaves the least of the bias to rounding, which changes nothing else.
    """
    conv, bn = block.conv, block.bn
    levels, scale = byte_levels(conv, largest)
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    if isinstance(bn, nn.BatchNorm2d):
        factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        bias = (bias - bn.running_mean.double()) * factor + bn.bias.double()
        levels, scale = levels * factor.sign()[:, None, None, None], scale * factor.abs()
    times = finest(scale * value, bias, largest / levels.abs().amax((1, 2, 3)).clamp_min(1))
    levels, scale = levels * times[:, None, None, None], scale / times
    least = (bias.abs() / (value * MAX_BIAS)).clamp_min(TINY)  # of a channel that is nearly constant
    kept = torch.maximum(scale, least).float()
    levels = (levels * (scale / kept)[:, None, None, None]).round()
    biases = (bias / (kept.double() * value)).round()
    return levels.numpy().astype(np.int8), kept.numpy(), biases.numpy().astype(np.int32)


def finest(unit: Tensor, bias: Tensor, most: Tensor) -> Tensor:
    """Give by what whole number up to `most` >= 1 to divide each unit, so that the nearest multiple is nearest."""
    times = torch.arange(1, int(most.max()) + 1, dtype=bias.dtype)[:, None]
    finer = unit / times
    errors = ((bias / finer).round() * finer - bias).abs()
    return errors.where(times <= most, math.inf).argmin(0) + 1
