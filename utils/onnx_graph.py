"""An ONNX graph in the making (https://onnx.ai/onnx/operators): nodes by operator, constants as plain values."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .log import DataError
from .optional import require

OPSET, IR_VERSION = 18, 8  # of ONNX 1.13, December 2022: the first with Mish and with reductions over given axes
MAX_BYTES = 2**31  # of a protobuf file

Operand: TypeAlias = str | float | Sequence[int] | np.ndarray | Tensor
Shape: TypeAlias = Sequence[int | str]  # a free axis has a name


class Graph:
    """Nodes and constants so far. `shapes` has (channels, height, width) of layers at the cfg's own input size."""

    def __init__(self) -> None:
        self.onnx = require("onnx")
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.prefix = ""  # of the names of new nodes

    def op(self, operator: str, *operands: Operand, output: str = "", **attributes: Any) -> str:
        """Add a node and give the name of its output.

        An operand is the name of another output, or a constant: floats and tensors are float32, integers int64.
        """
        name = output or f"{self.prefix}{operator}_{len(self.nodes)}"
        inputs = [operand if isinstance(operand, str) else self._constant(operand) for operand in operands]
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def model(
        self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], metadata: Mapping[str, str]
    ) -> tuple[Any, bytes]:
        """Give the finished model of float32 inputs and outputs, and its bytes. Raises DataError where it is too large.

        What no output needs is left out.
        """
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        self._drop_unused(outputs)
        infos = [
            [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in each.items()]
            for each in (inputs, outputs)
        ]
        if sum(constant.ByteSize() for constant in self.constants.values()) > MAX_BYTES - 2**20:
            raise DataError("the network has more than 2 GB of weights, which one .onnx file cannot hold")
        graph = helper.make_graph(self.nodes, "darkslim", *infos, initializer=list(self.constants.values()))
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="Darkslim")
        helper.set_model_props(model, dict(metadata))
        return model, model.SerializeToString()

    def _constant(self, value: Any) -> str:
        if isinstance(value, Tensor):
            value = value.detach().to("cpu", torch.float32).numpy()
        elif isinstance(value, float):
            value = np.float32(value)
        array = np.ascontiguousarray(value).reshape(np.shape(value))  # 0-d stays so
        name = f"{array.dtype}{list(array.shape)}_{hashlib.sha1(array.tobytes()).hexdigest()[:16]}"
        if array.ndim and array.dtype == np.float32:
            name = self.prefix + name  # a quantiser gives the weights and biases of each layer scales of their own
        if name not in self.constants:
            self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def _drop_unused(self, outputs: Mapping[str, Shape]) -> None:
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        self.constants = {name: constant for name, constant in self.constants.items() if name in needed}
