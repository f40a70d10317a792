"""Ranges of a network's maps for its integer form, from calibration pictures, by ONNX Runtime's calibrators."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from .datasets import Pictures, evaluation_batches, make_loader
from .labels import Labelled
from .log import DataError
from .onnx_layers import IMAGES
from .optional import require

# What has an integer kernel, or only moves numbers. Mish, HardSwish and HardSigmoid have none and run in FP32.
KINDS = "Conv MaxPool Resize Concat Add Mul Sigmoid LeakyRelu Relu Slice Gather GlobalAveragePool".split()
# ONNX Runtime's name of each method, and its options; entropy takes minutes where it has more bins than its 128
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMax", {}),
    "percentile": ("Percentile", {"symmetric": False, "percentile": 99.999}),
    "entropy": ("Entropy", {}),
}


def inputs(labelled: Labelled, channels: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Give pictures as inputs [1, channels, *size], letterboxed as they are tested. Raises DataError."""
    keys = evaluation_batches(labelled.sizes, 1, size, 1, is_rectangular=False)
    for batch in make_loader(Pictures(labelled, channels), keys, workers=0):
        if batch.problem:
            raise DataError(batch.problem)
        yield (batch.pictures.float() / 255).numpy()


def calibrate(graph: Any, pictures: Iterator[np.ndarray], method: str) -> Any:
    """Give the range of every map of an ONNX model, as QDQQuantizer takes them.

    One picture at a time: the calibrators keep all maps of what they are given at once, and their own option against
    that, CalibMaxIntermediateOutputs, forgets what it has seen (ONNX Runtime 1.32). Raises DataError where even the
    maps of one picture are too many.
    """
    quantization, onnx = require("onnxruntime.quantization"), require("onnx")
    kind, options = METHODS[method]
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "network.onnx"
        onnx.save(graph, path)
        try:
            calibrator = quantization.calibrate.create_calibrator(
                path,
                KINDS,
                str(Path(folder) / "augmented.onnx"),
                calibrate_method=quantization.CalibrationMethod[kind],
                extra_options=options,
            )
            for x in pictures:
                calibrator.collect_data(SimpleNamespace(get_next=iter([{IMAGES: x}, None]).__next__))
            return calibrator.compute_data()
        except MemoryError:
            message = "the histograms of all maps do not fit into memory (take minmax, or a smaller --img-size)"
            raise DataError(f"--calibration {method}: {message}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep off the screen what ONNX Runtime's quantisation prints, and off the log its advice to optimise first.

    Batch normalisation is folded already. The advice goes to the root logger, which would make itself a handler for it,
    and tell our lines a second time.
    """
    silent = logging.NullHandler()
    logging.root.addHandler(silent)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.removeHandler(silent)
