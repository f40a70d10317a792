"""Quantise an exported network after training: 8-bit integer convolutions, by ONNX Runtime's static quantisation.

Activations are uint8 with one scale a map, from calibration pictures; weights are symmetric int8 with a scale a
channel. The convolution before each head stays FP32, as does what ONNX Runtime has no integer kernel for.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from models import Darknet

from .bench import spread
from .datasets import Pictures, evaluation_batches, make_loader
from .device import CPU
from .evaluate import Settings, evaluate
from .labels import Labelled
from .log import DataError
from .onnx_layers import IMAGES
from .onnx_metadata import Metadata
from .optional import require
from .runtime import OnnxNetwork
from .timing import Timing, summarise, time_in_turn

# What has an integer kernel, or only moves numbers. Mish, HardSwish and HardSigmoid have none and run in FP32.
KINDS = "Conv MaxPool Resize Concat Add Mul Sigmoid LeakyRelu Relu Slice Gather GlobalAveragePool".split()
MEANS = {"@.5": "map50", "@.5:.95": "map50_95"}


class Form(NamedTuple):
    """One form of a network: bytes of its file, mAP where there are pictures to test on, and its latency."""

    name: str
    size: int
    map50: float | None
    map50_95: float | None
    timing: Timing


class Reader:
    """Calibration pictures, one a step, as quantize_static asks for them."""

    def __init__(self, labelled: Labelled, channels: int, size: tuple[int, int]) -> None:
        pictures = Pictures(labelled, channels)
        keys = evaluation_batches(labelled.sizes, 1, size, 1, is_rectangular=False)
        self.batches: Iterator[Any] = iter(make_loader(pictures, keys, workers=0))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        if batch.problem:
            raise DataError(batch.problem)
        return {IMAGES: (batch.pictures.float() / 255).numpy()}


def quantise(
    graph: Any, model: Darknet, metadata: Metadata, labelled: Labelled, *, images: int, reduce_range: bool = False
) -> tuple[bytes, Metadata]:
    """Give the bytes of the integer form of an ONNX model of make_onnx, and what it says of itself.

    `images` pictures, spread over all, calibrate it. Raises DataError where no convolution would compute in integers,
    so that nothing is called INT8 that is not.
    """
    onnx, quantization = require("onnx"), require("onnxruntime.quantization")
    ends = [place for place, node in enumerate(graph.graph.node) if node.output[0].startswith("raw_")]
    layers = [node.name for node in graph.graph.node[: max(ends)]]  # decoding stands behind them
    float_layers = tuple(f"{index}/" for spec in model.heads for index in model.layers[spec.layer].inputs)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            graph,
            path,
            Reader(spread(labelled, images), model.channels, metadata.size),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=KINDS,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=[name for name in layers if not name.startswith(float_layers)],
            extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
        )
        quantised = onnx.load(path)
    integer, convolutions = count_integer(quantised.SerializeToString())
    if not integer:
        raise DataError(f"{metadata.cfg_path}: no convolution of it runs in integers here (nothing is written)")
    metadata = replace(metadata, arithmetic=f"INT8, {integer} of {convolutions} convolutions in integers")
    onnx.helper.set_model_props(quantised, metadata.pack())
    return quantised.SerializeToString(), metadata


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep off the log ONNX Runtime's advice to optimise first: batch normalisation is folded already.

    It goes to the root logger, which would make itself a handler for it, and tell our lines a second time.
    """
    silent = logging.NullHandler()
    logging.root.addHandler(silent)
    try:
        yield
    finally:
        logging.root.removeHandler(silent)


def count_integer(data: bytes) -> tuple[int, int]:
    """Count the convolutions that ONNX Runtime runs as QLinearConv after its optimisation, and all of them."""
    runtime, onnx = require("onnxruntime"), require("onnx")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.log_severity_level = 3
        runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    integer = kinds.count("QLinearConv")
    return integer, integer + kinds.count("Conv") + kinds.count("FusedConv")


def compare(
    files: dict[str, bytes], labelled: Labelled | None, names: tuple[str, ...], size: tuple[int, int]
) -> list[Form]:
    """Test forms of a network on pictures, where there are some, and time them in turn."""
    networks = [OnnxNetwork(name, data) for name, data in files.items()]
    x = torch.rand(1, networks[0].channels, *size, generator=torch.Generator().manual_seed(0))
    spent = time_in_turn([lambda network=network: network(x) for network in networks])
    settings = Settings(size, is_rectangular=not networks[0].is_fixed)
    forms = []
    for network, data, ms in zip(networks, files.values(), spent, strict=True):
        found = evaluate(network, labelled, names, settings, device=CPU)[0] if labelled else None
        judged = (found.map50, found.map50_95) if found else (None, None)
        forms.append(Form(network.path, len(data), *judged, summarise(ms)))
    return forms


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
