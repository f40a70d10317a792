"""Networks that ONNX Runtime or OpenVINO computes, as test.py and detect.py take them in place of PyTorch's."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from models.yolo import decode_all, diou_beta

from . import cli
from .log import DataError, log
from .onnx_layers import IMAGES
from .onnx_metadata import DECODED, DETECTED, unpack
from .optional import require

Run: TypeAlias = Callable[[np.ndarray], list[np.ndarray]]  # the input [B, C, H, W] to the outputs
# Puts the float weights of a convolution between quantised maps on 8 bits, one scale for all (ONNX Runtime 1.32)
UNASKED = ["WeightBiasQuantization"]


class OnnxNetwork:
    """An .onnx of utils.export on the CPU, with as many threads as PyTorch has, in ONNX Runtime or in OpenVINO.

    It has the members of Network (utils/network.py). Its arithmetic and its place are the file's: `fuse`, `eval` and
    `to` change nothing. `data` are the bytes of a file that is not written. Raises DataError where the file is no such
    network.
    """

    def __init__(self, path: str | Path, data: bytes | None = None, *, runtime: str = "onnxruntime") -> None:
        if data is None and not Path(path).is_file():
            raise DataError(f"{path}: cannot read the network: there is no such file")
        properties, self.run = RUNTIMES[runtime](str(path), data)
        self.metadata = unpack(properties, str(path))
        self.path, self.size, self.channels = str(path), self.metadata.size, self.metadata.channels
        self.stride, self.heads, self.is_fixed = self.metadata.stride, self.metadata.heads, self.metadata.is_fixed

    @property
    def classes(self) -> int:
        return self.heads[0].classes

    @property
    def diou_beta(self) -> float | None:
        return diou_beta(self.heads)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Run pictures [B, channels, H, W] in 0..1. Raises DataError where they do not fit the file or the memory."""
        if self.is_fixed and tuple(x.shape[2:]) != self.size:
            raise DataError(f"{self.path}: takes {_sides(self.size)} alone, gets {_sides(x.shape[2:])}")
        try:
            outputs = [torch.from_numpy(output) for output in self.run(x.float().cpu().contiguous().numpy())]
        except Exception as error:  # of ONNX Runtime and of OpenVINO, without a common base
            asked, reason = f"{len(x)} pictures of {_sides(x.shape[2:])}", (str(error).splitlines() or [""])[0]
            raise DataError(f"{self.path}: cannot compute {asked}: {reason} (try fewer, or smaller ones)") from None
        if len(outputs) != {DECODED: 2, DETECTED: 1}.get(self.metadata.outputs, len(self.heads)):
            raise DataError(f"{self.path}: gives {len(outputs)} outputs, which are no {self.metadata.outputs}")
        if self.metadata.outputs == DETECTED:
            outputs = spread(outputs[0], len(x), self.classes)
        return [output.to(x.device) for output in outputs]

    def decode(self, heads: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode what a call gave; a graph with decoding in it has done so."""
        if self.metadata.outputs in (DECODED, DETECTED):
            return heads[0], heads[1]
        return decode_all(heads, self.heads, size)

    def fuse(self) -> Self:
        return self

    def eval(self) -> Self:
        return self

    def to(self, *_: Any, **__: Any) -> Self:
        return self


def spread(detected: Tensor, pictures: int, classes: int) -> list[Tensor]:
    """Turn detections [M, 7] (picture, xyxy_px, score, class) back into boxes [B, N, 4] xywh_px and scores [B, N, C].

    Each box has one class; where a picture has fewer than others, boxes without a score follow.
    """
    picture, label = detected[:, 0].long(), detected[:, 6].long()
    count = F.one_hot(picture, pictures).cumsum(0)  # [M, B]
    place = count.gather(1, picture[:, None])[:, 0] - 1
    most = int(count[-1].max()) if len(count) else 0
    boxes, scores = detected.new_zeros(pictures, most, 4), detected.new_zeros(pictures, most, classes)
    boxes[picture, place] = box_convert(detected[:, 1:5], "xyxy", "cxcywh")
    scores[picture, place, label] = detected[:, 5]
    return [boxes, scores]


def in_onnxruntime(path: str, data: bytes | None) -> tuple[Mapping[str, str], Run]:
    """Load an .onnx, or the bytes of one, in ONNX Runtime; give its properties and what runs it. Raises DataError."""
    options = require("onnxruntime").SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between two calls others compute
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = start_session(data or path, options)
    except Exception as error:  # its classes have no base of their own
        raise _not_loaded(path, "ONNX Runtime", error) from None
    return session.get_modelmeta().custom_metadata_map, lambda x: session.run(None, {IMAGES: x})


def start_session(source: str | bytes, options: Any) -> Any:
    """Start a session of ONNX Runtime on the CPU, in which what is float in a file stays float."""
    options.log_severity_level = 3  # errors, which are raised as well
    providers = ["CPUExecutionProvider"]
    return require("onnxruntime").InferenceSession(source, options, providers, disabled_optimizers=UNASKED)


def in_openvino(path: str, data: bytes | None) -> tuple[Mapping[str, str], Run]:
    """Load an .onnx, or the bytes of one, in OpenVINO; give its properties and what runs it. Raises DataError."""
    openvino, onnx = require("openvino"), require("onnx")
    data = data or Path(path).read_bytes()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else it takes bf16 where the processor has it
    }
    try:
        graph = onnx.load_from_string(data)  # OpenVINO does not tell the properties
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(data), "CPU", settings)
    except Exception as error:  # of onnx and of OpenVINO, without a common base
        raise _not_loaded(path, "OpenVINO", error) from None
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> list[np.ndarray]:
        found = request.infer({IMAGES: x}, share_inputs=True)
        return [found[output].copy() for output in compiled.outputs]

    return {each.key: each.value for each in graph.metadata_props}, run


def _not_loaded(path: str, runtime: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"{path}: is not an .onnx that {runtime} loads: {reason}")


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def open_detector(args: argparse.Namespace, *, names: str = "") -> cli.Detector:
    """Load what --weights names: an .onnx, or else what cli.open_detector loads, with its errors.

    Raises DataError where flags ask for what an .onnx cannot do.
    """
    weights = cli.find_weights(args)
    if Path(weights).suffix != ".onnx":
        if args.runtime:
            raise DataError(f"--runtime {args.runtime}: computes an .onnx, and {weights} is none (export it)")
        return cli.open_detector(args, names=names)
    runtime = args.runtime or "onnxruntime"
    network = OnnxNetwork(weights, runtime=runtime)
    check_flags(args, network)
    carried = {"names": network.metadata.names, "data": network.metadata.data}
    data = cli.find_data(args, carried)
    named, source = cli.name_classes(args, data, carried, weights=weights, names=names)
    if len(named) != network.classes:
        raise DataError(f"{source}: names {len(named)} classes, but {weights} has {network.classes}")
    log.info("%s in %s (%s): %d classes", weights, TITLES[runtime], network.metadata.arithmetic, network.classes)
    if network.metadata.limits:
        log.info("its own NMS keeps %s: flags can take away from that alone", network.metadata.limits)
    if network.is_fixed and not args.stretch:
        log.info("it takes %s alone: every picture is padded to that", _sides(network.size))
    return cli.Detector(network, named, data, {})


def check_flags(args: argparse.Namespace, network: OnnxNetwork) -> None:
    """Raise DataError with everything that flags ask for and the file cannot do."""
    path, given = network.path, vars(args)
    asks_size = bool(args.img_size) and args.img_size != max(network.size)
    limits = {
        f"--cfg: {path} describes itself (leave --cfg out)": bool(args.cfg),
        f"--device {args.device}: an .onnx runs on the CPU": args.device not in ("", "cpu"),
        f"--precision {given.get('precision')}: an .onnx computes as it was exported": (
            given.get("precision", "auto") not in ("auto", "fp32")
        ),
        "--half: an .onnx computes as it was exported": given.get("half", False),
        "--task benchmark: times forms of a PyTorch network (python -m utils.benchmark times an .onnx)": (
            given.get("task") == "benchmark"
        ),
    }
    fixed = {"--augment": args.augment, "--task study": given.get("task") == "study", "--img-size": asks_size}
    limits |= {
        f"{flag}: {path} takes {_sides(network.size)} alone (export it without --fixed)": network.is_fixed and value
        for flag, value in fixed.items()
    }
    if mistakes := [message for message, holds in limits.items() if holds]:
        raise DataError("\n".join(mistakes))


def _sides(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"
