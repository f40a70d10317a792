"""Write a network with quantised convolutions so that they run in integers: QuantizeLinear and DequantizeLinear around
int8 weights, uint8 inputs and int32 biases.

Concatenation, pooling, upsampling and slices of quantised maps run on their levels.
"""

import numpy as np

from models import Darknet
from models.grid import BYTE_BITS
from models.quant import ActivationGrid, QuantConv2d
from models.storage import MOVERS, TOP, Levels, limits

from .integer_fold import Folded, fold
from .integer_plan import Plan
from .onnx_graph import Graph
from .onnx_layers import IMAGES, name_raws, window, write


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
        before, own, target = self.plan.before.get(index), self.plan.own.get(index), self.plan.target(index)
        folded = fold(self.model.blocks[index], self.plan.largest, wide, before or own or target)
        x = write_convolution(g, conv, x, wide, folded)
        if before:
            x = dequantise(g, quantise(g, x, before), before)
            self.reals[index] = self._shaped(index, write(g, block.blur, write(g, block.activation, x)))
        elif own:
            self._store(index, x, own, limits(block.activation, own))
        elif target:
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


def write_convolution(g: Graph, conv: QuantConv2d, x: str, grid: ActivationGrid, folded: Folded) -> str:
    """Write a convolution of int8 weights with a scale a channel and int32 biases; its input are levels of a grid."""
    weight = g.op("DequantizeLinear", folded.levels, folded.scale, axis=0)
    bias = g.op("DequantizeLinear", folded.bias, folded.scale * np.float32(grid.value), axis=0)
    sides = window(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return g.op("Conv", dequantise(g, x, grid), weight, bias, **sides)
