"""Post-training quantisation as utils.export --int8 runs it: calibrate, keep what is sensitive in float, compare."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cli, int8, int8_sensitivity
from .bench import spread
from .calibration import METHODS, inputs
from .int8 import Calibrated, compare, explain, judge, prepare, table
from .labels import Labelled, check_labels
from .log import DataError, log
from .onnx_metadata import Metadata
from .runtime import OnnxNetwork

JUDGED = 8  # pictures that sensitivity is measured on


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --calibration, --sensitivity, --keep-float and --max-drop."""
    parser.add_argument("--calibration", choices=tuple(METHODS), help="of --int8: how to find ranges (default: minmax)")
    parser.add_argument(
        "--sensitivity", action="store_true", help="of --int8: rank the layers by what integers cost; writes json, png"
    )
    parser.add_argument(
        "--keep-float", type=cli.natural, nargs="+", metavar="LAYER", help="of --int8: layers whose convolutions stay"
    )
    parser.add_argument(
        "--max-drop",
        type=cli.fraction,
        help="of --int8: mAP@.5 that may be lost, 0..1; sensitive layers go back to float until it holds",
    )


def given_flags(args: argparse.Namespace) -> list[str]:
    """Name the flags of add_flags that are given."""
    values = {
        "--calibration": args.calibration,
        "--sensitivity": args.sensitivity,
        "--keep-float": args.keep_float,
        "--max-drop": args.max_drop is not None,
    }
    return [flag for flag, value in values.items() if value]


def quantise(
    args: argparse.Namespace, detector: cli.Detector, graph: Any, data: bytes, metadata: Metadata, train: Labelled
) -> tuple[bytes, Metadata]:
    """Give the integer form of an ONNX model of make_onnx, whose bytes are `data`, and what it says of itself.

    Says what it costs and why a convolution stays in float, and writes what --sensitivity asks for. Raises DataError.
    """
    valid = (
        check_labels(detector.data.valid, len(detector.data.names)) if detector.data and detector.data.valid else None
    )
    if args.max_drop is not None and valid is None:
        raise DataError("--max-drop: needs pictures to test on (give a --data with valid=)")
    model, size = detector.model, metadata.size
    pictures = inputs(spread(train, args.calibrate), model.channels, size)
    method = args.calibration or "minmax"
    calibrated = prepare(graph, model, pictures, method=method, reduce_range=args.reduce_range)
    layers = [group.layer for group in calibrated.groups]
    if unknown := set(args.keep_float or ()) - set(layers):
        raise DataError(
            f"--keep-float {min(unknown)}: has no convolution that would compute in integers (those that would are"
            f" {', '.join(map(str, layers))})"
        )
    kept = dict.fromkeys(args.keep_float or (), "as --keep-float says")
    rows = []
    if args.sensitivity or args.max_drop is not None:
        rows = int8_sensitivity.rank(calibrated, inputs(spread(train, JUDGED), model.channels, size))
        log.info(int8_sensitivity.table(rows))
    if args.max_drop is not None and valid is not None:
        network = OnnxNetwork("FP32", data)
        map50 = judge(network, valid, detector.names).map50
        order = [row.layer for row in rows if row.layer not in kept]
        kept |= return_to_float(calibrated, metadata, valid, order, kept, map50=map50, max_drop=args.max_drop)
    quantised, described = seal(calibrated, kept, metadata)
    for reason, names in explain(quantised, calibrated, kept).items():
        log.info("in float: %s (%s)", ", ".join(names), reason)
    log.info(table(compare({"FP32": data, "INT8": quantised}, valid, detector.names, size)))
    if args.sensitivity:
        output = Path(args.output or Path(args.weights or cli.BEST).with_suffix(".onnx"))
        files = int8_sensitivity.write(rows, kept, output.with_name(f"{output.stem}-sensitivity"))
        log.info("wrote %s", " and ".join(map(str, files)))
    return quantised, described


def return_to_float(
    calibrated: Calibrated,
    metadata: Metadata,
    valid: Labelled,
    order: Sequence[int],
    kept: Collection[int],
    *,
    map50: float,
    max_drop: float,
) -> dict[int, str]:
    """Give the fewest layers, first in `order`, beside `kept`, whose floats hold the drop from `map50`; and the reason.

    Raises DataError where no number of them does.
    """
    drops = {}

    def holds(count: int) -> bool:
        data, described = seal(calibrated, [*kept, *order[:count]], metadata)
        drops[count] = map50 - judge(OnnxNetwork("INT8", data), valid, described.names).map50
        log.info("%d of %d layers back in float: mAP@.5 %+.4f", count, len(order), -drops[count])
        return drops[count] <= max_drop

    count = int8_sensitivity.least(holds, len(order) - 1)
    if count is None:
        raise DataError(
            f"--max-drop {max_drop:g}: mAP@.5 drops by {min(drops.values()):.4f} at least, however many layers are in"
            " float (nothing is written; try more --calibrate, another --calibration or a larger drop)"
        )
    return dict.fromkeys(order[:count], f"sensitive: --max-drop {max_drop:g} does not hold without")


def seal(
    calibrated: Calibrated, kept: Mapping[int, str] | Collection[int], metadata: Metadata
) -> tuple[bytes, Metadata]:
    """Give the bytes with all layers but `kept` in integers, and what they say of themselves. Raises DataError."""
    layers = [group.layer for group in calibrated.groups if group.layer not in kept]
    return int8.seal(calibrated.quantise(layers), metadata)
