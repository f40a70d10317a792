"""What every module of a fused network is in ONNX's operators: a table, and one short function a module."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import Darknet
from models.attention import ChannelGate, Eca, SpatialGate
from models.binary import BinaryConv2d
from models.grid import FLOAT_BITS
from models.layers_conv import Convolution, Crnn, SharedConvolution
from models.layers_dense import Connected
from models.layers_head import Softmax
from models.layers_merge import ChannelShuffle, Route, ScaleChannels, Shortcut
from models.layers_pool import Activation, Blur, Crop, LocalAvgPool, MaxPool, Reorg, Reorg3d
from models.quant import QuantConv2d
from models.storage import Levels

from .onnx_activations import ACTIVATIONS
from .onnx_graph import Graph

IMAGES = "images"  # the graph's input [B, channels, H, W], RGB in 0..1


def write_layers(g: Graph, model: Darknet) -> list[str]:
    """Write the layers of a fused network and give the names of what its forward returns: raw_N of layer N."""
    assert model.is_fused, "batch normalisation is folded before a network is written"
    outputs = {-1: IMAGES}
    g.shapes[IMAGES] = model.channels, *model.size
    for index, (layer, block) in enumerate(zip(model.layers, model.blocks, strict=True)):
        g.prefix = f"{index}/"
        outputs[index] = write(g, block, *(outputs[i] for i in layer.inputs))
        g.shapes[outputs[index]] = layer.channels, *layer.size
    return name_raws(g, model, outputs.__getitem__)


def name_raws(g: Graph, model: Darknet, output: Callable[[int], str]) -> list[str]:
    """Give what a network's forward returns the names raw_N; `output` tells that of layer N until then."""
    kept = [spec.layer for spec in model.heads] or [len(model.layers) - 1]
    g.prefix = ""
    raws = {index: g.op("Identity", output(index), output=f"raw_{index}") for index in kept}
    g.shapes |= {raw: g.shapes[output(index)] for index, raw in raws.items()}
    return [*raws.values()]


def write(g: Graph, module: nn.Module, *inputs: str) -> str:
    """Write one module and give the name of its output."""
    return MODULES[type(module)](g, module, *inputs)


def convolution(g: Graph, m: Convolution, x: str) -> str:
    assert isinstance(m.bn, nn.Identity), "folded"
    for module in (m.conv, m.early_levels, m.activation, m.blur, m.levels):
        x = write(g, module, x)
    return x


def levels(g: Graph, m: Levels, x: str) -> str:
    """Write 256 levels as they train: numbers on a grid, computed in floating point."""
    grid = m.grid()
    return x if m.is_fresh else _on_grid(g, x, grid.step, float(-grid.zero), float(grid.top - grid.zero))


def conv(g: Graph, m: nn.Conv2d, x: str) -> str:
    return _conv(g, x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def quant_conv(g: Graph, m: QuantConv2d, x: str) -> str:
    """Write the quantisers as they train: numbers on a grid, computed in floating point."""
    assert m.is_baked, "the weights of a fused network are on their grid"
    if m.grid.a_bits != FLOAT_BITS and m.grid.method == "dorefa":
        n = float(2**m.grid.a_bits - 1)
        share = g.op("Clip", g.op("Div", x, float(m.grid.a_range)), 0.0, 1.0)
        x = g.op("Div", g.op("Round", g.op("Mul", share, n)), n)
    elif m.grid.a_bits != FLOAT_BITS:
        x = _on_grid(g, x, *map(float, m.input_grid()))
    return _conv(g, x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def binary_conv(g: Graph, m: BinaryConv2d, x: str) -> str:
    x = g.op("Where", g.op("Greater", x, 0.0), 1.0, -1.0) if m.is_xnor else x
    return _conv(g, x, m.binary_weight(), m.bias, m.stride, m.padding, m.dilation, m.groups)


def shared_convolution(g: Graph, m: SharedConvolution, x: str) -> str:
    (owner,), (_, stride, padding, dilation, groups) = m.owner, m.window
    pads = (padding * dilation,) * 2
    x = _conv(g, x, owner.conv.weight, owner.conv.bias, stride, pads, (dilation, dilation), groups)
    return write(g, m.blur, write(g, m.activation, x))


def crnn(g: Graph, m: Crnn, x: str) -> str:
    x = write(g, m.input, x)
    before = g.op("ConstantOfShape", g.op("Shape", x))
    return write(g, m.output, g.op("Add", x, write(g, m.self, before)))


def connected(g: Graph, m: Connected, x: str) -> str:
    assert isinstance(m.bn, nn.Identity), "folded"
    x = g.op("Gemm", g.op("Flatten", x), m.linear.weight, m.linear.bias, transB=1)
    return write(g, m.activation, g.op("Unsqueeze", x, [2, 3]))


def batchnorm(g: Graph, m: nn.BatchNorm2d, x: str) -> str:
    return g.op("BatchNormalization", x, m.weight, m.bias, m.running_mean, m.running_var, epsilon=m.eps)


def pool(operator: str) -> Callable[[Graph, MaxPool | LocalAvgPool, str], str]:
    """Give the writer of a pooling that leaves out what lies beyond the map, as ONNX's do."""
    return lambda g, m, x: g.op(
        operator, x, kernel_shape=[m.size] * 2, strides=list(m.stride), pads=[m.before] * 2 + [m.after] * 2
    )


def blur(g: Graph, m: Blur, x: str) -> str:
    """Write [1 2 1]⊗[1 2 1]/16 as the mean of 2×2 cells twice, which asks for no number of channels."""
    if m.kind == 1:
        x = g.op("AveragePool", x, kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1)
    return g.op("AveragePool", x, kernel_shape=[2, 2], strides=list(m.stride))


def upsample(g: Graph, m: nn.Upsample, x: str) -> str:
    scales = np.array([1, 1, m.scale_factor, m.scale_factor], np.float32)
    return g.op(
        "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


def reorg3d(g: Graph, m: Reorg3d, x: str) -> str:
    return g.op("DepthToSpace" if m.is_reverse else "SpaceToDepth", x, blocksize=m.stride)


def reorg(g: Graph, m: Reorg, x: str) -> str:
    """Write YOLOv2's order: the map is taken for one of C/s² channels and s times the sides, then unfolded."""
    C, s = g.shapes[x][0], m.stride
    sides = g.op("Shape", x, start=2)
    x = g.op("Reshape", x, g.op("Concat", [0, C // s**2], g.op("Mul", sides, s), axis=0))
    x = g.op("SpaceToDepth", x, blocksize=s)
    return g.op("Reshape", x, g.op("Concat", [0, C * s**2], g.op("Div", sides, s), axis=0))


def crop(g: Graph, m: Crop, x: str) -> str:
    kinds, sides = g.onnx.TensorProto, g.op("Shape", x, start=2)
    exact = g.op("Mul", g.op("Cast", sides, to=kinds.DOUBLE), np.array(m.scale))
    kept = g.op("Cast", g.op("Round", exact), to=kinds.INT64)
    first = g.op("Div", g.op("Sub", sides, kept), 2)
    x = g.op("Slice", x, first, g.op("Add", first, kept), [2, 3])
    return g.op("Sub", g.op("Mul", x, 2.0), 1.0) if m.is_adjusted else x


def route(g: Graph, m: Route, *inputs: str) -> str:
    if m.groups > 1:
        widths = [g.shapes[x][0] // m.groups for x in inputs]
        inputs = tuple(
            g.op("Slice", x, [m.group * width], [(m.group + 1) * width], [1])
            for x, width in zip(inputs, widths, strict=True)
        )
    return inputs[0] if len(inputs) == 1 else g.op("Concat", *inputs, axis=1)


def shortcut(g: Graph, m: Shortcut, x: str, *others: str) -> str:
    """Add maps to the first one as Shortcut does: channels that both have, every n-th cell where sizes differ."""
    scales = None if m.weights is None else m.normalised(m.weights)[:, :, None, None]  # [n, 1|C, 1, 1]
    C, H, _ = g.shapes[x]
    total = x if scales is None else g.op("Mul", x, scales[0])
    for i, other in enumerate(others, start=1):
        D, h, _ = g.shapes[other]
        if D > C:
            other = g.op("Slice", other, [0], [C], [1])
        if scales is not None:
            other = g.op("Mul", other, scales[i, :D])
        if h > H:
            other = g.op("Slice", other, [0, 0], [2**31, 2**31], [2, 3], [round(h / H)] * 2)
        elif h < H:
            other = _spread(g, other, min(C, D), round(H / h))
        if D < C:
            other = g.op("Pad", other, [0, 0, 0, 0, 0, C - D, 0, 0])
        total = g.op("Add", total, other)
    return write(g, m.levels, write(g, m.activation, total))


def channel_shuffle(g: Graph, m: ChannelShuffle, x: str) -> str:
    order = np.arange(g.shapes[x][0]).reshape(m.groups, -1).T.ravel()
    return g.op("Gather", x, order, axis=1)


def eca(g: Graph, m: Eca, x: str) -> str:
    means = g.op("Transpose", g.op("GlobalAveragePool", x), perm=[0, 2, 1, 3])  # [B, 1, C, 1]
    pads = (m.conv.padding[0], 0)
    gate = g.op("Sigmoid", _conv(g, means, m.conv.weight[..., None], None, (1, 1), pads, (1, 1), 1))
    return g.op("Mul", x, g.op("Transpose", gate, perm=[0, 2, 1, 3]))


def channel_gate(g: Graph, m: ChannelGate, x: str) -> str:
    sums = []
    for operator in ("GlobalAveragePool", "GlobalMaxPool"):
        hidden = g.op("Relu", g.op("Conv", g.op(operator, x), m.squeeze.weight[..., None, None]))
        sums.append(g.op("Conv", hidden, m.excite.weight[..., None, None]))
    return g.op("Mul", x, g.op("Sigmoid", g.op("Add", *sums)))


def spatial_gate(g: Graph, m: SpatialGate, x: str) -> str:
    both = g.op("Concat", g.op("ReduceMean", x, [1]), g.op("ReduceMax", x, [1]), axis=1)
    return g.op("Mul", x, g.op("Sigmoid", write(g, m.conv, both)))


def softmax(g: Graph, m: Softmax, x: str) -> str:
    parts = [0, m.groups, g.shapes[x][0] // m.groups, -1] if m.is_spatial else [0, m.groups, -1]
    powers = g.op("Reshape", g.op("Div", x, float(m.temperature)), parts)
    return g.op("Reshape", g.op("Softmax", powers, axis=2), g.op("Shape", x))


def sequential(g: Graph, m: nn.Sequential, x: str) -> str:
    for module in m:
        x = write(g, module, x)
    return x


def _conv(
    g: Graph,
    x: str,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    operands = (x, weight) if bias is None else (x, weight, bias)
    return g.op("Conv", *operands, **window(weight.shape[2:], stride, padding, dilation, groups))


def window(
    size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> dict[str, Any]:
    """Give the attributes of a Conv node."""
    sides = {"kernel_shape": size, "strides": stride, "pads": [*padding, *padding], "dilations": dilation}
    return {name: list(values) for name, values in sides.items()} | {"group": groups}


def _on_grid(g: Graph, x: str, step: float, low: float, high: float) -> str:
    return g.op("Mul", g.op("Round", g.op("Clip", g.op("Div", x, step), low, high)), step)


def _spread(g: Graph, x: str, channels: int, step: int) -> str:
    """Put the cells of a map on every n-th cell of a larger one, zeros between them."""
    ones = torch.ones(channels, 1, 1, 1)
    return g.op("ConvTranspose", x, ones, group=channels, strides=[step] * 2, output_padding=[step - 1] * 2)


MODULES: dict[type[nn.Module], Callable[..., str]] = {
    **ACTIVATIONS,
    Convolution: convolution,
    nn.Conv2d: conv,
    QuantConv2d: quant_conv,
    Levels: levels,
    BinaryConv2d: binary_conv,
    SharedConvolution: shared_convolution,
    Crnn: crnn,
    Connected: connected,
    nn.BatchNorm2d: batchnorm,
    MaxPool: pool("MaxPool"),
    LocalAvgPool: pool("AveragePool"),
    nn.AdaptiveAvgPool2d: lambda g, m, x: g.op("GlobalAveragePool", x),
    Blur: blur,
    nn.Upsample: upsample,
    Reorg3d: reorg3d,
    Reorg: reorg,
    Crop: crop,
    nn.Dropout: lambda g, m, x: x,
    nn.Identity: lambda g, m, x: x,
    Activation: lambda g, m, x: write(g, m.function, x),
    Route: route,
    Shortcut: shortcut,
    ScaleChannels: lambda g, m, gate, x: write(g, m.levels, write(g, m.activation, g.op("Mul", x, gate))),
    ChannelShuffle: channel_shuffle,
    Eca: eca,
    ChannelGate: channel_gate,
    SpatialGate: spatial_gate,
    Softmax: softmax,
    nn.Sequential: sequential,
}
