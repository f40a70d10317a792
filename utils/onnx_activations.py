"""Activation functions in ONNX's operators."""

import math
from collections.abc import Callable

from torch import nn

from models import activations
from models.activations import Pointwise

from .onnx_graph import Graph

NORMALISED_EPS = 1e-4  # Darknet's, of the normalize_channels family


def gelu(g: Graph, x: str) -> str:
    """Write GELU's approximation by tanh; ONNX has it from opset 20 on."""
    cube = g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), 0.044715)
    tanh = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), math.sqrt(2 / math.pi)))
    return g.op("Mul", g.op("Mul", x, 0.5), g.op("Add", tanh, 1.0))


def loggy(g: Graph, x: str) -> str:
    return g.op("Sub", g.op("Mul", g.op("Sigmoid", x), 2.0), 1.0)


def ramp(g: Graph, x: str) -> str:
    return g.op("Add", g.op("Relu", x), g.op("Mul", x, 0.1))


def plse(g: Graph, x: str) -> str:
    low = g.op("Mul", g.op("Add", x, 4.0), 0.01)
    high = g.op("Add", g.op("Mul", g.op("Sub", x, 4.0), 0.01), 1.0)
    middle = g.op("Add", g.op("Mul", x, 0.125), 0.5)
    return _piecewise(g, x, (-4.0, low), middle, (4.0, high))


def stair(g: Graph, x: str) -> str:
    floor, half = g.op("Floor", x), g.op("Floor", g.op("Mul", x, 0.5))
    is_even = g.op("Equal", g.op("Mul", half, 2.0), floor)
    return g.op("Where", is_even, half, g.op("Add", g.op("Sub", x, floor), half))


def lhtan(g: Graph, x: str) -> str:
    high = g.op("Add", g.op("Mul", g.op("Sub", x, 1.0), 0.001), 1.0)
    return _piecewise(g, x, (0.0, g.op("Mul", x, 0.001)), x, (1.0, high))


def hard_mish(g: Graph, x: str) -> str:
    middle = g.op("Add", g.op("Mul", g.op("Mul", x, x), 0.5), x)
    positive = g.op("Where", g.op("Greater", x, 0.0), x, middle)
    return g.op("Where", g.op("Greater", x, -2.0), positive, 0.0)


def normalize_channels(g: Graph, x: str) -> str:
    return _share(g, g.op("Relu", x))


def normalize_channels_softmax(g: Graph, x: str) -> str:
    return _share(g, g.op("Exp", x))


def normalize_channels_softmax_maxval(g: Graph, x: str) -> str:
    return _share(g, g.op("Exp", g.op("Sub", x, g.op("ReduceMax", x, [1]))))


def _share(g: Graph, positive: str) -> str:
    return g.op("Div", positive, g.op("Add", g.op("ReduceSum", positive, [1]), NORMALISED_EPS))


def _piecewise(g: Graph, x: str, low: tuple[float, str], middle: str, high: tuple[float, str]) -> str:
    rest = g.op("Where", g.op("Greater", x, high[0]), high[1], middle)
    return g.op("Where", g.op("Less", x, low[0]), low[1], rest)


POINTWISE: dict[Callable, Callable[[Graph, str], str]] = {
    activations.loggy: loggy,
    activations.ramp: ramp,
    activations.plse: plse,
    activations.stair: stair,
    activations.lhtan: lhtan,
    activations.hard_mish: hard_mish,
    activations.normalize_channels: normalize_channels,
    activations.normalize_channels_softmax: normalize_channels_softmax,
    activations.normalize_channels_softmax_maxval: normalize_channels_softmax_maxval,
}
ACTIVATIONS: dict[type[nn.Module], Callable[..., str]] = {
    nn.LeakyReLU: lambda g, m, x: g.op("LeakyRelu", x, alpha=m.negative_slope),
    nn.ReLU: lambda g, m, x: g.op("Relu", x),
    nn.ReLU6: lambda g, m, x: g.op("Clip", x, 0.0, 6.0),
    nn.ELU: lambda g, m, x: g.op("Elu", x, alpha=float(m.alpha)),
    nn.SELU: lambda g, m, x: g.op("Selu", x),
    nn.GELU: lambda g, m, x: gelu(g, x),
    nn.Sigmoid: lambda g, m, x: g.op("Sigmoid", x),
    nn.Hardsigmoid: lambda g, m, x: g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5),
    nn.Tanh: lambda g, m, x: g.op("Tanh", x),
    nn.Hardtanh: lambda g, m, x: g.op("Clip", x, -1.0, 1.0),
    nn.Mish: lambda g, m, x: g.op("Mish", x),
    nn.SiLU: lambda g, m, x: g.op("Mul", x, g.op("Sigmoid", x)),
    nn.Hardswish: lambda g, m, x: g.op("HardSwish", x),
    Pointwise: lambda g, m, x: POINTWISE[m.function](g, x),
}
