"""Test a detector: mAP by pycocotools or another protocol, precision, recall, F1 and speed.

    python test.py --weights weights/best.pt --data data/visdrone.data --img-size 640

Prints a table of all classes, which --json writes too, and draws curves, confusion matrix and pictures in runs/test/.
70 images at 320 take about 3 s on 2 cores, the pictures as long again.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from utils import cli
from utils.album import draw_evaluation
from utils.boxes import MAX_CANDIDATES, scaled_size
from utils.charts import draw_study
from utils.device import autocast_type, select_device
from utils.evaluate import Settings, evaluate
from utils.labels import Labelled, check_labels, merge_classes
from utils.log import DataError, log
from utils.protocols import COCO, DARKNET, PROTOCOLS
from utils.runs import new_folder
from utils.runtime import open_detector
from utils.scores import Evaluation
from utils.timing import benchmark, table

STUDY_SIDES = (256, 320, 416, 512, 608)  # longer sides in pixels


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(__doc__)
    cli.add_model_flags(parser)
    cli.add_runtime_flag(parser)
    cli.add_run_flags(parser)
    cli.add_detection_flags(parser, conf_thres=0.001)
    parser.add_argument("--max-det", type=cli.positive, help="detections counted per image (default: the .data file's)")
    parser.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="coco",
        help="whose average precision: coco (pycocotools), voc, voc07 (11 points), or Darknet's, with its --conf-thres"
        " 0.005 and --iou-thres 0.45 (default: coco)",
    )
    parser.add_argument(
        "--points", type=int, choices=(0, 11, 101), help="points of recall of --protocol darknet, 0: area (default: 0)"
    )
    parser.add_argument("--square", action="store_true", help="pad every picture to the whole network size")
    parser.add_argument(
        "--task",
        choices=("test", "study", "benchmark"),
        default="test",
        help="test once, study mAP and speed over sizes, or benchmark the speed of forward pass and whole path"
        " (default: test)",
    )
    parser.add_argument("--output", default="", help="folder of the pictures (default: a new one, runs/test)")
    parser.add_argument("--noplots", action="store_true", help="draw no pictures")
    parser.add_argument("--json", default="", help="write the figures to this file")
    parser.add_argument(
        "--save-json", nargs="?", const="detections.json", help="write COCO results to this file (detections.json)"
    )
    protocol = PROTOCOLS[parser.parse_args(argv).protocol]
    parser.set_defaults(conf_thres=protocol.conf_thres, iou_thres=protocol.iou_thres)
    args = parser.parse_args(argv)
    if args.points is not None and protocol is not DARKNET:
        parser.error("--points needs --protocol darknet")
    if args.task == "study" and args.img_size:
        parser.error("--task study goes through sizes: give no --img-size")
    if args.task != "test" and args.save_json:
        parser.error(f"--task {args.task} keeps no detections: give no --save-json")
    if args.output and (args.noplots or args.task == "benchmark"):
        parser.error("--output is the folder of pictures, and none are drawn")
    for file in filter(None, (args.json, args.save_json)):
        if not Path(file).resolve().parent.is_dir():
            parser.error(f"{file}: there is no folder {Path(file).parent}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Load, check, test, report."""
    args = parse_args(argv)
    device = select_device(args.device)
    dtype = autocast_type(args.precision, device)
    detector = open_detector(args)
    labelled, names = read_truths(detector, is_single=args.single_cls)
    settings = make_settings(args, detector)
    if args.task == "benchmark":
        speeds = benchmark(detector.model, labelled, settings, device=device, dtype=dtype)
        log.info(table(speeds))
        write_json(args.json, [{"size": settings.size, **row} for row in speeds])
        return
    model = detector.model.fuse().to(device=device, memory_format=torch.channels_last)
    rows = []
    for varied in variants(args.task, settings, detector.model.stride):
        evaluation, results = evaluate(model, labelled, names, varied, device=device, dtype=dtype)
        rows.append((varied, evaluation))
    log.info(rows[0][1].table() if args.task == "test" else compare(rows))
    figures = [
        {"size": varied.size, "iou_thres": varied.iou_thres, "protocol": varied.protocol.name, **each.figures()}
        for varied, each in rows
    ]
    write_json(args.json, figures[0] if args.task == "test" else figures)
    write_json(args.save_json, results, indent=None)
    if args.noplots:
        return
    folder = Path(args.output) if args.output else new_folder("test")
    if args.task == "test":
        draw_evaluation(folder, evaluation, results, labelled, names)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        draw_study([(max(varied.size), each) for varied, each in rows], folder / "study.png")
    log.info("pictures in %s", folder)


def read_truths(detector: cli.Detector, *, is_single: bool) -> tuple[Labelled, tuple[str, ...]]:
    """Read and check the images to test on, and give the names of their classes."""
    if detector.data is None or detector.data.valid is None:
        raise DataError("--data: not given, and the weights name no .data file with valid= that is there")
    names = ("object",) if is_single else detector.names
    if not is_single:
        cli.check_names(detector)
    labelled = check_labels(detector.data.valid, len(detector.data.names))
    return (merge_classes(labelled) if is_single else labelled), names


def make_settings(args: argparse.Namespace, detector: cli.Detector) -> Settings:
    """Gather how detections are made."""
    protocol = PROTOCOLS[args.protocol]
    assert detector.data is not None
    if protocol is not COCO:
        log.info("%s's protocol: confidence %g, NMS %g", protocol.name, args.conf_thres, args.iou_thres)
    return Settings(
        cli.network_size(detector.model, args.img_size),
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        max_det=args.max_det or (detector.data.max_det if protocol is COCO else MAX_CANDIDATES),
        batch_size=args.batch_size,
        workers=args.workers,
        is_rectangular=not (args.square or detector.model.is_fixed),
        is_stretched=args.stretch,
        is_augmented=args.augment,
        is_single_class=args.single_cls,
        protocol=replace(protocol, points=args.points or protocol.points),
    )


def variants(task: str, settings: Settings, stride: int) -> list[Settings]:
    """Give the settings that a task goes through."""
    if task == "test":
        return [settings]
    sizes = [scaled_size(settings.size, side / max(settings.size), stride) for side in STUDY_SIDES]
    return [replace(settings, size=size) for size in sizes]


def compare(rows: Sequence[tuple[Settings, Evaluation]]) -> str:
    """Lay several tests out as a table, one a line."""
    lines = [f"{'size':>9}{'mAP@.5':>8}{'mAP@.5:.95':>12}{'ms/image':>10}"]
    for settings, evaluation in rows:
        size = f"{settings.size[1]}x{settings.size[0]}"
        ms = sum(evaluation.ms_per_image.values())
        lines.append(f"{size:>9}{evaluation.map50:8.3f}{evaluation.map50_95:12.3f}{ms:10.1f}")
    return "\n".join(lines)


def write_json(path: str | None, figures: object, *, indent: int | None = 1) -> None:
    """Write figures to a file where one is named."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=indent) + "\n")


if __name__ == "__main__":
    cli.run(main)
