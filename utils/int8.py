"""Quantise an exported network after training: 8-bit integer convolutions, by ONNX Runtime's static quantisation.

Activations are uint8 with one scale a map, from calibration pictures; weights are symmetric int8 with a scale a
channel. The convolution before each head stays FP32, as does what ONNX Runtime has no integer kernel for.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from models import Darknet
from models.storage import before_heads

from .calibration import KINDS, calibrate, quiet
from .device import CPU
from .evaluate import Settings, evaluate
from .labels import Labelled
from .log import DataError
from .onnx_metadata import Metadata
from .optional import require
from .runtime import OnnxNetwork, start_session
from .scores import Evaluation
from .timing import Timing, summarise, time_in_turn

MEANS = {"@.5": "map50", "@.5:.95": "map50_95"}
FLOATS = ("Conv", "FusedConv")  # what computes a convolution in floating point


class Form(NamedTuple):
    """One form of a network: bytes of its file, mAP where there are pictures to test on, and its latency."""

    name: str
    size: int
    map50: float | None
    map50_95: float | None
    timing: Timing


class Group(NamedTuple):
    """A layer that convolves, and the names of its nodes and of those behind it, up to the next such layer."""

    layer: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Calibrated:
    """An ONNX model of make_onnx with the ranges of its maps, and the groups that may compute in integers."""

    graph: Any
    ranges: Any
    groups: tuple[Group, ...]
    reduce_range: bool

    def quantise(self, layers: Collection[int]) -> Any:
        """Give the ONNX model with the groups of these layers in integers."""
        quantization = require("onnxruntime.quantization")
        names = [name for group in self.groups if group.layer in layers for name in group.nodes]
        if not names:  # which QDQQuantizer would take for all
            return copy.deepcopy(self.graph)
        with quiet():
            quantizer = quantization.qdq_quantizer.QDQQuantizer(
                copy.deepcopy(self.graph),
                per_channel=True,
                reduce_range=self.reduce_range,
                weight_qType=quantization.QuantType.QInt8,
                activation_qType=quantization.QuantType.QUInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=names,
                nodes_to_exclude=[],
                op_types_to_quantize=KINDS,
                extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
            )
            quantizer.quantize_model()
        return quantizer.model.model


def prepare(
    graph: Any, model: Darknet, pictures: Iterator[np.ndarray], *, method: str, reduce_range: bool = False
) -> Calibrated:
    """Calibrate an ONNX model of make_onnx on pictures by a method of calibration.METHODS. Raises DataError."""
    tools = require("onnxruntime.quantization").quant_utils
    ranges = calibrate(graph, pictures, method)
    inferred = tools.save_and_reload_model_with_shape_infer(graph)
    return Calibrated(inferred, ranges, tuple(split(graph, model)), reduce_range)


def split(graph: Any, model: Darknet) -> list[Group]:
    """Give the groups of an ONNX model of make_onnx; the convolutions before heads and the decoding are in none."""
    ends = [place for place, node in enumerate(graph.graph.node) if node.output[0].startswith("raw_")]
    heads = before_heads(model.layers)
    nodes = [(layer_of(node.name), node) for node in graph.graph.node[: max(ends)] if not node.name.startswith("raw_")]
    convolve = {layer for layer, node in nodes if node.op_type == "Conv"} - heads
    groups: dict[int, list[str]] = {}
    current = min(convolve, default=0)
    for layer, node in nodes:
        if layer in heads:
            continue
        current = layer if layer in convolve else current
        groups.setdefault(current, []).append(node.name)
    return [Group(layer, tuple(names)) for layer, names in groups.items()]


def layer_of(node: str) -> int:
    """Give the number of the layer that a node of make_onnx belongs to."""
    return int(node.partition("/")[0])


def beside(node: Any, other: Any) -> list[str]:
    """Give the operator of `other` where one of both reads the other."""
    return [other.op_type] if node.output[0] in other.input or other.output[0] in node.input else []


def explain(data: bytes, calibrated: Calibrated, kept: Mapping[int, str]) -> dict[str, list[str]]:
    """Give the names of the float convolutions of an integer form, by the reason: `kept` has those of its layers."""
    nodes = {node.name: node for node in calibrated.graph.graph.node}
    grouped = {name for group in calibrated.groups for name in group.nodes}
    reasons: dict[str, list[str]] = {}
    for name in sorted(float_convolutions(data), key=layer_of):
        around = {kind for node in nodes.values() for kind in beside(nodes[name], node)}
        alien = f": beside it {', '.join(sorted(around - {*KINDS}))}" if around - {*KINDS} else ""
        reason = kept.get(layer_of(name), f"no integer kernel{alien}") if name in grouped else "before a head"
        reasons.setdefault(reason, []).append(name)
    return reasons


def seal(quantised: Any, metadata: Metadata) -> tuple[bytes, Metadata]:
    """Give the bytes of an integer form, and what it says of itself.

    Raises DataError where no convolution of it computes in integers, so that nothing is called INT8 that is not.
    """
    integer, convolutions = count_integer(quantised.SerializeToString())
    if not integer:
        raise DataError(f"{metadata.cfg_path}: no convolution of it runs in integers here (nothing is written)")
    metadata = replace(metadata, arithmetic=f"INT8, {integer} of {convolutions} convolutions in integers")
    require("onnx").helper.set_model_props(quantised, metadata.pack())
    return quantised.SerializeToString(), metadata


def count_integer(data: bytes) -> tuple[int, int]:
    """Count the convolutions that ONNX Runtime runs as QLinearConv after its optimisation, and all of them."""
    kinds = Counter(kind for _, kind in optimised(data))
    integer = kinds["QLinearConv"]
    return integer, integer + sum(kinds[kind] for kind in FLOATS)


def float_convolutions(data: bytes) -> list[str]:
    """Name the convolutions that ONNX Runtime runs in floating point after its optimisation."""
    return [name for name, kind in optimised(data) if kind in FLOATS]


def optimised(data: bytes) -> list[tuple[str, str]]:
    """Give the names and operators of the nodes that ONNX Runtime makes of an .onnx on this machine.

    Raises DataError where the folder for temporary files has no room for them.
    """
    runtime, onnx = require("onnxruntime"), require("onnx")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        try:
            start_session(data, options)
            nodes = onnx.load(options.optimized_model_filepath).graph.node
        except Exception as error:  # of ONNX Runtime and onnx, without a common base
            raise DataError(
                f"{folder}: ONNX Runtime cannot write there: {error} (is the disk full? TMPDIR names another folder)"
            ) from None
        return [(node.name, node.op_type) for node in nodes]


def compare(
    files: dict[str, bytes], labelled: Labelled | None, names: tuple[str, ...], size: tuple[int, int]
) -> list[Form]:
    """Test forms of a network on pictures, where there are some, and time them in turn."""
    networks = [OnnxNetwork(name, data) for name, data in files.items()]
    x = torch.rand(1, networks[0].channels, *size, generator=torch.Generator().manual_seed(0))
    spent = time_in_turn([lambda network=network: network(x) for network in networks])
    forms = []
    for network, data, ms in zip(networks, files.values(), spent, strict=True):
        found = judge(network, labelled, names) if labelled else None
        judged = (found.map50, found.map50_95) if found else (None, None)
        forms.append(Form(network.path, len(data), *judged, summarise(ms)))
    return forms


def judge(network: OnnxNetwork, labelled: Labelled, names: tuple[str, ...]) -> Evaluation:
    """Test a network on pictures."""
    settings = Settings(network.size, is_rectangular=not network.is_fixed)
    return evaluate(network, labelled, names, settings, device=CPU)[0]


def table(forms: list[Form]) -> str:
    """Lay forms out side by side."""
    first = forms[0]
    rows = [("", [form.name for form in forms])]
    if first.map50 is not None:
        rows += [(f"mAP{key}", [f"{getattr(form, name):.4f}" for form in forms]) for key, name in MEANS.items()]
    rows.append(("MB", [f"{form.size / 1e6:.2f}" for form in forms]))
    rows.append(("ms", [f"{form.timing.ms:.2f}" for form in forms]))
    rows.append(("± ms", [f"{form.timing.spread_ms:.2f}" for form in forms]))
    rows.append(("times as fast", [f"{first.timing.ms / form.timing.ms:.2f}" for form in forms]))
    return "\n".join(f"{key:<14}" + "".join(f"{value:>10}" for value in values) for key, values in rows)
