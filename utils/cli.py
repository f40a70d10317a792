"""Command lines: flags that several scripts share, each defined once, and the one handler of the user's mistakes."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from models import CfgError, Darknet, WeightsError, load_cfg
from models.weights import checkpoint_cfg, load_checkpoint, load_model

from .device import PRECISIONS
from .lists import DataSpec, load_data, load_names
from .log import DataError, log, start_logging

BEST = "weights/best.pt"


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest flag when one is unknown."""

    def error(self, message: str) -> NoReturn:
        for wrong in re.findall(r"(?<=arguments: )(-\S+)", message):
            near = difflib.get_close_matches(wrong.partition("=")[0], self._option_string_actions, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        super().error(message)


class Detector(NamedTuple):
    """A network with its weights, its class names and, where one is known, its data."""

    model: Darknet
    names: tuple[str, ...]
    data: DataSpec | None


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a command: the user's mistakes become plain lines on standard error and exit status 2."""
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
    except KeyboardInterrupt:
        sys.exit(130)


def make_parser(doc: str | None) -> Parser:
    """Make a parser that shows a script's docstring as its help."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add --cfg, --weights, --data, --single-cls and --allow-unknown."""
    parser.add_argument("--cfg", default="", help="cfg of the network (default: the one that a .pt carries)")
    parser.add_argument("--weights", default="", help=f".weights or .pt (default: {BEST}, the latest run's)")
    parser.add_argument("--data", default="", help=".data file (default: the one that a .pt names)")
    parser.add_argument("--single-cls", action="store_true", help="take all classes for one")
    parser.add_argument("--allow-unknown", action="store_true", help="warn of unknown cfg keys instead of refusing")


def add_run_flags(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add --batch-size, --img-size, --device, --precision and --workers."""
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="images a batch (default: %(default)s)")
    parser.add_argument(
        "--img-size", type=positive, nargs="+", default=[], help="longer side in pixels (default: as in the cfg)"
    )
    parser.add_argument("--device", default="", help="cpu or a GPU's number (default: the first GPU, else cpu)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="auto: bf16 or fp16 on a GPU, fp32 on the CPU"
    )
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=natural, default=workers, help="loader processes (default: %(default)s)")


def add_detection_flags(parser: argparse.ArgumentParser, *, conf_thres: float) -> None:
    """Add --conf-thres, --iou-thres, --augment and --stretch."""
    parser.add_argument(
        "--conf-thres", type=fraction, default=conf_thres, help="least score of a detection (default: %(default)s)"
    )
    parser.add_argument(
        "--iou-thres", type=fraction, default=0.6, help="overlap that NMS allows (default: %(default)s)"
    )
    parser.add_argument("--augment", action="store_true", help="join the boxes of three scaled and mirrored views")
    parser.add_argument("--stretch", action="store_true", help="resize without keeping the shape, as Darknet does")


def open_detector(args: argparse.Namespace, *, names: str = "") -> Detector:
    """Load the network that --cfg, --weights, --data and `names` describe, or that a checkpoint describes itself.

    Raises CfgError, WeightsError, and DataError where something needed is not given.
    """
    weights = args.weights or BEST
    if not args.weights and not Path(BEST).is_file():
        raise DataError(f"--weights: not given, and there is no {BEST} of a training (give --cfg and --weights)")
    cfg, checkpoint = None, {}
    if Path(weights).suffix == ".pt":
        checkpoint = load_checkpoint(weights)
        cfg = checkpoint_cfg(checkpoint, weights)
    if args.cfg:
        cfg = load_cfg(args.cfg)
    if cfg is None:
        raise DataError(f"--cfg: not given, and {weights} carries none (only a .pt does)")
    data_path = args.data or checkpoint.get("data", "")
    data = load_data(data_path) if args.data or (data_path and Path(data_path).is_file()) else None
    model = load_model(cfg, weights, allow_unknown=args.allow_unknown)
    if names:
        found = load_names(names)
    elif args.data and data:
        found = data.names
    else:
        found = tuple(checkpoint.get("names", ())) or (data.names if data else ())
    found = found or tuple(str(index) for index in range(model.classes))
    check_classes(model, found, names or data_path or weights)
    log.info("%s with %s: %d classes", cfg.path, weights, model.classes)
    return Detector(model, found, data)


def check_classes(model: Darknet, names: tuple[str, ...], source: str) -> None:
    """Raise DataError unless the network detects, and there is one name for every class of it."""
    if not model.heads:
        raise DataError(f"{model.cfg.path}: is a classifier (expected a detector, whose cfg has a [yolo] section)")
    if model.classes != len(names):
        line = model.cfg.sections[1 + model.heads[0].layer].line_of("classes")
        filters = len(model.heads[0].anchors) * (5 + len(names))
        raise DataError(
            f"{model.cfg.path}:{line}: the head has classes={model.classes}, but {source} names {len(names)}"
            f" (set classes={len(names)} in every head and filters={filters} before it)"
        )


def network_size(model: Darknet, longer: int | None) -> tuple[int, int]:
    """Give (height, width) with `longer` as its longer side and the cfg's shape, in multiples of the coarsest stride.

    Raises DataError where `longer` is no multiple of the stride.
    """
    height, width = model.size
    if longer is None:
        return height, width
    if longer % model.stride:
        nearest = max(1, round(longer / model.stride)) * model.stride
        raise DataError(f"--img-size {longer}: expected a multiple of {model.stride} for this cfg (say {nearest})")
    scale = longer / max(height, width)
    return tuple(max(1, round(side * scale / model.stride)) * model.stride for side in (height, width))


def positive(text: str) -> int:
    """Read an integer above 0 (for argparse)."""
    return _bounded(int, text, 1, 10**9)


def natural(text: str) -> int:
    """Read an integer of at least 0 (for argparse)."""
    return _bounded(int, text, 0, 10**9)


def fraction(text: str) -> float:
    """Read a number from 0 to 1 (for argparse)."""
    return _bounded(float, text, 0, 1)


def _bounded(kind: type, text: str, low: float, high: float):
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, gets {text!r}") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected {low} to {high}, gets {text}")
    return value


def _complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2
