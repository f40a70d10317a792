"""Command lines: flags that several scripts share, each defined once, and the one handler of the user's mistakes."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from models import CfgError, Darknet, WeightsError, load_cfg
from models.grid import FLOAT_BITS, MAX_BITS
from models.weights import checkpoint_cfg, load_checkpoint, load_model

from . import dist
from .boxes import scaled_size
from .device import PRECISIONS
from .lists import DataSpec, load_data, load_names
from .log import DataError, log, start_logging
from .network import Network

BEST = "weights/best.pt"
RUNTIMES = ("onnxruntime", "openvino")
MAX_SIDE = 16384  # pixels of a network input


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest flag when one is unknown."""

    def error(self, message: str) -> NoReturn:
        if not dist.is_first():
            sys.exit(2)
        for wrong in re.findall(r"(?<=arguments: )(-\S+)", message):
            near = difflib.get_close_matches(wrong.partition("=")[0], self._option_string_actions, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        super().error(message)


class Detector(NamedTuple):
    """A network with its weights, its class names and, where one is known, its data.

    `described` are the names, the path of the data and the recipe as a checkpoint carries them, where they are known.
    """

    model: Network
    names: tuple[str, ...]
    data: DataSpec | None
    described: dict[str, Any]


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a command: the user's mistakes become plain lines on standard error and exit status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    sys.stderr.reconfigure(errors="backslashreplace")
    start_logging()
    try:
        main(None)
    except (CfgError, WeightsError, DataError) as error:
        sys.exit(_complain(str(error)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        sys.exit(_complain(f"{error.filename or 'a file'}: cannot be read or written: {error.strerror}"))
    except (RuntimeError, MemoryError) as error:
        if _is_memory(error):
            reason = (str(error).splitlines() or ["not enough"])[0]
            sys.exit(_complain(f"memory does not suffice: {reason} (smaller --batch-size or --img-size)"))
        if not dist.is_lost(error):
            raise
        sys.exit(_complain(f"process {dist.rank()} has lost another one: {str(error).splitlines()[0]}", waits=True))
    except KeyboardInterrupt:
        sys.exit(130)


def _is_memory(error: Exception) -> bool:
    """Tell whether an error is of memory that a GPU, PyTorch on the CPU or Python does not get."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def make_parser(doc: str | None) -> Parser:
    """Make a parser that shows a script's docstring as its help."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_model_flags(parser: argparse.ArgumentParser, *, is_training: bool = False) -> None:
    """Add --cfg, --weights, --data and --allow-unknown."""
    own = (
        ("", "start from this .weights or .pt, whole or partial", "")
        if is_training
        else (
            " (default: the one that a .pt carries)",
            f".weights or .pt, in test.py and detect.py an .onnx too (default: {BEST}, the latest run's)",
            " (default: the one that a .pt names)",
        )
    )
    parser.add_argument("--cfg", default="", help=f"cfg of the network{own[0]}")
    parser.add_argument("--weights", default="", help=own[1])
    parser.add_argument("--data", default="", help=f".data file{own[2]}")
    parser.add_argument("--allow-unknown", action="store_true", help="warn of unknown cfg keys instead of refusing")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="", help="cpu or a GPU's number (default: the first GPU, else cpu)")


def add_runtime_flag(parser: argparse.ArgumentParser) -> None:
    """Add --runtime."""
    parser.add_argument("--runtime", choices=RUNTIMES, help="what computes an .onnx (default: onnxruntime)")


def add_run_flags(parser: argparse.ArgumentParser, *, is_training: bool = False) -> None:
    """Add --batch-size, --device, --precision, --workers and --single-cls."""
    default = None if is_training else 16
    note = "16; as the cfg says with --recipe darknet" if is_training else "16"
    kind, more = (batch_size, "; auto: as many as the GPU holds") if is_training else (positive, "")
    parser.add_argument("--batch-size", type=kind, default=default, help=f"images a batch (default: {note}){more}")
    add_device_flag(parser)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="auto: bf16 or fp16 on a GPU, fp32 on the CPU"
    )
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=natural, default=workers, help="loader processes (default: %(default)s)")
    parser.add_argument("--single-cls", action="store_true", help="take all classes for one")


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """Add --img-size and --stretch."""
    parser.add_argument("--img-size", type=side, help="longer side in pixels (default: as in the cfg)")
    parser.add_argument("--stretch", action="store_true", help="resize without keeping the shape, as Darknet does")


def add_detection_flags(parser: argparse.ArgumentParser, *, conf_thres: float) -> None:
    """Add --img-size, --stretch, --conf-thres, --iou-thres and --augment."""
    add_size_flags(parser)
    parser.add_argument(
        "--conf-thres", type=fraction, default=conf_thres, help="least score of a detection (default: %(default)s)"
    )
    parser.add_argument(
        "--iou-thres", type=fraction, default=0.6, help="overlap that NMS allows (default: %(default)s)"
    )
    parser.add_argument("--augment", action="store_true", help="join the boxes of three scaled and mirrored views")


def open_detector(args: argparse.Namespace, *, names: str = "") -> Detector:
    """Load the network that --cfg, --weights, --data and `names` describe, or that a checkpoint describes itself.

    Raises CfgError, WeightsError, and DataError where something needed is not given.
    """
    weights = find_weights(args)
    cfg, checkpoint = None, {}
    if Path(weights).suffix == ".pt":
        checkpoint = load_checkpoint(weights)
        cfg = checkpoint_cfg(checkpoint, weights)
    if args.cfg:
        cfg = load_cfg(args.cfg)
    if cfg is None:
        raise DataError(f"--cfg: not given, and {weights} carries none (only a .pt does)")
    data = find_data(args, checkpoint)
    model = load_model(cfg, weights, allow_unknown=args.allow_unknown)
    trained, source = name_classes(args, data, checkpoint, weights=weights, names=names)
    path = args.data or checkpoint.get("data", "")
    told = {"names": list(trained), "data": path, "recipe": checkpoint.get("recipe")}
    trained = trained or tuple(str(index) for index in range(model.classes))
    check_model(model, trained, source)
    log.info("%s with %s: %d classes", cfg.path, weights, model.classes)
    match checkpoint.get("recipe"):
        case {"distortion": {"keeps_shape": False}} if not args.stretch:
            log.info("%s learned from stretched pictures, as Darknet's recipe makes them: give --stretch", weights)
    return Detector(model, trained, data, {key: value for key, value in told.items() if value})


def check_names(detector: Detector) -> None:
    """Raise DataError where the detector's data name other classes than it learned."""
    if detector.data and detector.names != detector.data.names:
        raise DataError(f"{detector.data.path}: names other classes than the weights learned (give --single-cls?)")


def find_weights(args: argparse.Namespace) -> str:
    """Give --weights or the latest training's. Raises DataError where there are neither."""
    if not args.weights and not Path(BEST).is_file():
        raise DataError(f"--weights: not given, and there is no {BEST} of a training (give --cfg and --weights)")
    return args.weights or BEST


def find_data(args: argparse.Namespace, carried: Mapping[str, Any]) -> DataSpec | None:
    """Read --data, or the .data file that the weights carry the path of, where it is there. Raises DataError."""
    path = args.data or carried.get("data", "")
    return load_data(path) if args.data or (path and Path(path).is_file()) else None


def name_classes(
    args: argparse.Namespace, data: DataSpec | None, carried: Mapping[str, Any], *, weights: str, names: str
) -> tuple[tuple[str, ...], str]:
    """Give the class names, none where nothing tells them, and what tells them: `names`, --data or the weights.

    Raises DataError where data and weights disagree.
    """
    trained = tuple(carried.get("names", ()))
    if names:
        return load_names(names), names
    if args.data and data and not (trained and getattr(args, "single_cls", False)):
        if trained and trained != data.names:
            raise DataError(f"{data.path}: names {', '.join(data.names)}, but {weights} learned {', '.join(trained)}")
        return data.names, data.path
    return trained, weights


def check_model(model: Darknet, names: tuple[str, ...], source: str) -> None:
    """Raise DataError unless it detects, with one class a name in every head, on pictures of 1 or 3 channels."""
    if not model.heads:
        raise DataError(f"{model.cfg.path}: is a classifier (expected a detector, whose cfg has a [yolo] section)")
    mistakes = []
    for head in model.heads:
        section = model.expanded.sections[1 + head.layer]
        if head.classes != len(names):
            filters = len(head.anchors) * (head.entries - head.classes + len(names))
            mistakes.append(
                f"{model.cfg.path}:{section.line_of('classes')}: the head has classes={head.classes}, but {source}"
                f" names {len(names)} (set classes={len(names)} here and filters={filters} before it)"
            )
    if model.channels not in (1, 3):
        line = model.cfg.sections[0].line_of("channels")
        mistakes.append(f"{model.cfg.path}:{line}: pictures have 1 channel or 3, [net] has channels={model.channels}")
    if mistakes:
        raise DataError("\n".join(mistakes))


def network_size(model: Network, longer: int | None) -> tuple[int, int]:
    """Give (height, width) with `longer` as its longer side and the cfg's shape, in multiples of the coarsest stride.

    Raises DataError where `longer` is no multiple of the stride.
    """
    height, width = model.size
    if longer is None:
        return height, width
    if longer % model.stride:
        nearest = max(1, round(longer / model.stride)) * model.stride
        raise DataError(f"--img-size {longer}: expected a multiple of {model.stride} for this cfg (say {nearest})")
    return scaled_size((height, width), longer / max(height, width), model.stride)


def positive(text: str) -> int:
    """Read an integer above 0 (for argparse)."""
    return _bounded(int, text, 1, 10**9)


def batch_size(text: str) -> int | str:
    """Read an integer above 0, or "auto" (for argparse)."""
    return text if text == "auto" else positive(text)


def natural(text: str) -> int:
    """Read an integer of at least 0 (for argparse)."""
    return _bounded(int, text, 0, 10**9)


def bits(text: str) -> int:
    """Read the bits of a quantiser (for argparse); 32 is floating point."""
    value = _bounded(int, text, 1, FLOAT_BITS)
    if MAX_BITS < value < FLOAT_BITS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_BITS}, or {FLOAT_BITS} for floating point, gets {text}")
    return value


def side(text: str) -> int:
    """Read a number of pixels (for argparse)."""
    return _bounded(int, text, 1, MAX_SIDE)


def rate(text: str) -> float:
    """Read a number above 0 (for argparse)."""
    return _bounded(float, text, 1e-12, 1e12)


def fraction(text: str) -> float:
    """Read a number from 0 to 1 (for argparse)."""
    return _bounded(float, text, 0, 1)


def points(text: str) -> float:
    """Read a number of percentage points (for argparse)."""
    return _bounded(float, text, 0, 100)


def _bounded(kind: type, text: str, low: float, high: float):
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, gets {text!r}") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected {low} to {high}, gets {text}")
    return value


def _complain(message: str, *, waits: bool = False) -> int:
    if dist.is_to_tell(waits=waits):
        print(message, file=sys.stderr)
    return 2
