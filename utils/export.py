"""Export a network: to ONNX, or from .pt to .weights and back, or as a plain Darknet cfg with its .weights.

    python -m utils.export --weights weights/best.pt --output best.onnx

Writes an .onnx that describes itself, so that test.py and detect.py take it as --weights; says how far its outputs are
from the network's. Takes seconds; --int8, which calibrates on training pictures and tests both forms, a minute or more.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import Darknet, dump, save_weights
from models.grid import BYTE_BITS, FLOAT_BITS
from models.layers import OWN
from models.packing import pack_weight
from models.quant import QuantConv2d
from models.weights import save_checkpoint, write_atomically

from . import cli, integer, ptq
from .bench import spread
from .calibration import inputs
from .int8 import compare, seal, table
from .integer_plan import Plan, make_plan
from .labels import check_labels
from .log import DataError, log
from .onnx_graph import Graph
from .onnx_heads import add_nms, write_decode
from .onnx_integer import IntegerWriter
from .onnx_layers import IMAGES, write_layers
from .onnx_metadata import DECODED, RAW, Metadata
from .optional import require

FORMATS = {"onnx": ".onnx", "weights": ".weights", "pt": ".pt", "darknet": ".cfg"}
LIMITS = {"conf_thres": 0.3, "iou_thres": 0.6, "max_det": 300}  # of --nms
BOUND = 1e-4  # of the largest value: what FP32 may differ by


def make_onnx(model: Darknet, metadata: Metadata, *, plan: Plan | None = None) -> tuple[Any, bytes]:
    """Give the ONNX model of `model`, its batch normalisation folded, and its bytes.

    `metadata.outputs` says what it puts out, raw heads or boxes and scores; the batch is free, and the size unless
    `metadata.is_fixed`. With a `plan` an unfused network's quantised convolutions are integer ones. Raises DataError.
    """
    graph = Graph()
    with torch.inference_mode():
        if plan:
            raws = IntegerWriter(graph, model, plan).write()
        else:
            raws = write_layers(graph, model if model.is_fused else model.fuse())
        sides = metadata.size if metadata.is_fixed else ("height", "width")
        outputs = {raw: ["batch", graph.shapes[raw][0], f"{raw}_height", f"{raw}_width"] for raw in raws}
        if metadata.outputs != RAW:
            boxes, scores = write_decode(graph, raws, model.heads)
            outputs = {boxes: ["batch", "boxes", 4], scores: ["batch", "boxes", model.classes]}
        return graph.model({IMAGES: ["batch", model.channels, *sides]}, outputs, metadata.pack())


def difference(data: bytes, model: Darknet, metadata: Metadata) -> float:
    """Give the largest difference of ONNX Runtime's outputs and PyTorch's, relative to the largest value.

    On noise, at the metadata's size; boxes an untrained network makes infinite do not count.
    """
    session = require("onnxruntime").InferenceSession(data, providers=["CPUExecutionProvider"])
    x = torch.rand(1, model.channels, *metadata.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted: Sequence[Tensor] = model(x)
        if metadata.outputs == DECODED:
            wanted = model.decode(list(wanted), metadata.size)
    found = session.run(None, {IMAGES: x.numpy()})
    return max(_relative(ours.numpy(), theirs) for ours, theirs in zip(wanted, found, strict=True))


def describe(args: argparse.Namespace, detector: cli.Detector) -> Metadata:
    """Gather what the file says of itself. Raises DataError where the network cannot have the size."""
    model = detector.model
    size = cli.network_size(model, args.img_size)
    if model.is_fixed and size != model.size:
        raise DataError(f"--img-size {args.img_size}: a fully connected layer of {model.cfg.path} takes its size alone")
    return describe_network(
        model,
        outputs=DECODED if args.decode or args.nms else RAW,
        names=detector.names,
        data=detector.data.path if detector.data else "",
        size=size,
        is_fixed=args.fixed,
    )


def describe_network(
    model: Darknet,
    *,
    outputs: str,
    names: tuple[str, ...],
    size: tuple[int, int],
    data: str = "",
    is_fixed: bool = False,
) -> Metadata:
    """Give the metadata of a network of `size` (height, width), which is fixed where it has to be."""
    return Metadata(
        outputs=outputs,
        names=names,
        data=data,
        size=size,
        is_fixed=is_fixed or model.is_fixed,
        channels=model.channels,
        stride=model.stride,
        heads=tuple(model.heads),
        arithmetic=f"float32, {bits(model)}-bit convolutions simulated" if bits(model) else "float32",
        cfg_path=model.cfg.path,
        cfg=dump(model.cfg).encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
    )


def write_onnx(args: argparse.Namespace, detector: cli.Detector, path: Path) -> None:
    """Write an .onnx and say what is in it and how exact it is. Raises DataError and WeightsError."""
    metadata, model = describe(args, detector), detector.model.fuse()
    graph, data = make_onnx(model, metadata)
    if args.int8:
        data, metadata = make_int8(args, detector, graph, data, metadata)
    else:
        check(model, data, metadata, path)
    if args.nms:
        if model.diou_beta is not None:
            log.info("%s asks for diounms, which ONNX has not: the graph suppresses by IoU", model.cfg.path)
        data, metadata = add_nms(data, metadata, **{name: vars(args)[name] for name in LIMITS})
    write_atomically(path, lambda partial: partial.write_bytes(data))
    sides = f"{metadata.size[1]}x{metadata.size[0]}{'' if metadata.is_fixed else ' or any other size'}"
    log.info("%s: %s, %s, any batch, %.1f MB", metadata.outputs, metadata.arithmetic, sides, len(data) / 1e6)


def check(model: Darknet, data: bytes, metadata: Metadata, path: Path) -> None:
    """Say how far the outputs of a network's .onnx, that is to be written to `path`, are from PyTorch's."""
    error = difference(data, model, metadata)
    why = " (in simulated quantisation rounding errors become whole levels)" if bits(model) else ""
    log.info("ONNX Runtime differs from PyTorch by %.1e of the largest value%s", error, why)
    if not error < BOUND and not why:
        log.warning("%s: that is more than rounding explains (%.0e)", path, BOUND)


def make_int8(
    args: argparse.Namespace, detector: cli.Detector, graph: Any, data: bytes, metadata: Metadata
) -> tuple[bytes, Metadata]:
    """Give the integer form of an ONNX model and say what it costs. Raises DataError."""
    model, source = detector.model, detector.data
    if source is None or source.train is None:
        raise DataError("--int8: needs pictures to calibrate with (give a --data with train=)")
    train = check_labels(source.train, len(source.names))
    if not bits(model):
        return ptq.quantise(args, detector, graph, data, metadata, train)
    if given := ptq.given_flags(args):
        raise DataError(f"{given[0]}: is for float networks ({model.cfg.path} says itself what is quantised)")
    pictures = inputs(spread(train, args.calibrate), model.channels, metadata.size)
    plan = make_plan(model, map(torch.from_numpy, pictures), reduce_range=args.reduce_range)
    quantised, metadata = seal(make_onnx(model, metadata, plan=plan)[0], metadata)
    for line in integer.explain(model, plan, quantised):
        log.info(line)
    valid = check_labels(source.valid, len(source.names)) if source.valid else None
    log.info(table(compare({"simulated": data, "INT8": quantised}, valid, detector.names, metadata.size)))
    return quantised, metadata


def write_weights(args: argparse.Namespace, detector: cli.Detector, path: Path) -> None:
    """Write Darknet's `.weights`. Raises WeightsError."""
    save_weights(detector.model, path)


def write_checkpoint(args: argparse.Namespace, detector: cli.Detector, path: Path) -> None:
    """Write a checkpoint that describes itself. Raises WeightsError."""
    model, data = detector.model, detector.data.path if detector.data else ""
    described = {"cfg": dump(model.cfg), "cfg_path": model.cfg.path, "names": list(detector.names), "data": data}
    state, packed = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        found = pack_weight(module) if args.packed and isinstance(module, QuantConv2d) else None
        if found:
            packed[f"{name}.weight"] = found
            del state[f"{name}.weight"]
    if args.packed and not packed:
        raise DataError(f"--packed: {model.cfg.path} has no quantised convolution of 1 to {BYTE_BITS} bits")
    save_checkpoint(path, described | {"model": state} | ({"packed": packed} if packed else {}))
    if packed:
        whole = sum(tensor.nbytes for tensor in model.state_dict().values())
        log.info(
            "packed %d convolutions: the file has %d bytes, its tensors had %d", len(packed), path.stat().st_size, whole
        )


def write_darknet(args: argparse.Namespace, detector: cli.Detector, path: Path) -> None:
    """Write a cfg with its macros expanded and its `.weights` beside it. Raises WeightsError."""
    text = dump(detector.model.expanded)
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8", "surrogateescape"))
    save_weights(detector.model, path.with_suffix(".weights"))
    own = {section.name for section in detector.model.expanded.sections} & OWN
    if own:
        log.info("%s: Darknet does not know its sections %s", path, ", ".join(f"[{name}]" for name in sorted(own)))


def bits(model: Darknet) -> str:
    """Name the bits of quantised convolutions, of weights or inputs the fewer, as 4/8; a float network has none."""
    grids = [module.grid for module in model.modules() if isinstance(module, QuantConv2d)]
    found = {min(grid.w_bits, grid.a_bits) for grid in grids} - {FLOAT_BITS}
    return "/".join(map(str, sorted(found)))


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    is_finite = np.isfinite(ours)
    return float(np.abs(ours - theirs)[is_finite].max() / max(np.abs(ours[is_finite]).max(), 1e-30))


WRITERS = {"onnx": write_onnx, "weights": write_weights, "pt": write_checkpoint, "darknet": write_darknet}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--names", default="", help="file of class names (default: the .data file's or the .pt's)")
    parser.add_argument(
        "--format",
        choices=tuple(WRITERS),
        help="darknet is a .cfg with macros expanded and its .weights (default: as --output ends, or onnx)",
    )
    parser.add_argument("--output", default="", help="file to write (default: beside --weights)")
    parser.add_argument("--img-size", type=cli.side, help="longer side in pixels (default: as in the cfg)")
    parser.add_argument("--fixed", action="store_true", help="an .onnx of this size alone, as some compilers want it")
    parser.add_argument("--decode", action="store_true", help="put out boxes (xywh in pixels) and scores")
    parser.add_argument("--nms", action="store_true", help="put out detections: picture, xyxy, score, class")
    parser.add_argument("--conf-thres", type=cli.fraction, help="of --nms: least score (default: 0.3)")
    parser.add_argument("--iou-thres", type=cli.fraction, help="of --nms: overlap allowed (default: 0.6)")
    parser.add_argument("--max-det", type=cli.positive, help="of --nms: boxes a class (default: 300)")
    parser.add_argument("--int8", action="store_true", help="quantise it, calibrated on train= of --data")
    parser.add_argument("--calibrate", type=cli.positive, help="of --int8: pictures (default: 300)")
    parser.add_argument(
        "--reduce-range", action="store_true", help="of --int8: 7-bit weights, for processors without VNNI"
    )
    ptq.add_flags(parser)
    parser.add_argument("--packed", action="store_true", help="a .pt whose quantised weights take as many bits as said")
    args = parser.parse_args(argv)
    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    suffix = Path(args.output).suffix
    args.format = args.format or (by_suffix.get(suffix) if args.output else "onnx")
    if args.format is None or (args.output and suffix != FORMATS[args.format]):
        wanted = FORMATS[args.format] if args.format else " or ".join(by_suffix)
        parser.error(f"argument --output: expected a name that ends in {wanted}, gets {args.output!r}")
    is_set = {"--img-size": args.img_size, "--fixed": args.fixed, "--decode": args.decode, "--nms": args.nms}
    is_set |= {"--int8": args.int8, "--reduce-range": args.reduce_range}
    int8_flags = [*ptq.given_flags(args), *["--calibrate"] * (args.calibrate is not None)]
    nms_flags = [f"--{name.replace('_', '-')}" for name in LIMITS if vars(args)[name] is not None]
    idle = [flag for flag, value in is_set.items() if value] + int8_flags + nms_flags
    if args.format != "onnx" and idle:
        parser.error(f"argument {idle[0]}: goes with --format onnx alone")
    if args.packed and args.format != "pt":
        parser.error("argument --packed: goes with --format pt alone")
    int8_flags += ["--reduce-range"] if args.reduce_range else []
    if int8_flags and not args.int8:
        parser.error(f"argument {int8_flags[0]}: goes with --int8 alone")
    if nms_flags and not args.nms:
        parser.error(f"argument {nms_flags[0]}: goes with --nms alone")
    for name, value in {**LIMITS, "calibrate": 300}.items():
        if vars(args)[name] is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m utils.export`."""
    args = parse_args(argv)
    path = Path(args.output or Path(args.weights or cli.BEST).with_suffix(FORMATS[args.format]))
    written = [path, path.with_suffix(".weights")] if args.format == "darknet" else [path]
    for each in written:
        if each.resolve() in (Path(args.weights or cli.BEST).resolve(), Path(args.cfg or cli.BEST).resolve()):
            raise DataError(f"{each}: is read and would be written over (give another --output)")
    if args.format == "onnx":
        for package in ("onnx", "onnxruntime"):
            require(package)
    detector = cli.open_detector(args, names=args.names)
    verb = "overwrote" if any(map(Path.exists, written)) else "wrote"
    WRITERS[args.format](args, detector, path)
    log.info("%s %s", verb, " and ".join(map(str, written)))


if __name__ == "__main__":
    cli.run(main)
