"""Write the cfg of a detector from a backbone, a head, an attention and a dataset.

    python -m utils.compose --backbone ghostnet --head yolov3 --attention eca --classes 3 -o mine.cfg

Prints its parameters and BFLOPs; takes a second, or as long as reading the labels where anchors come from a dataset.
`--all` writes the cfgs of utils/zoo.py, which are those of cfg/, again.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from models import Darknet, parse
from models.cfg import suggest
from models.darknet import MAX_SIDE as MAX_ANCHOR
from models.darknet import count_parameters
from models.grid import BYTE_BITS
from models.layer import MAX_FILTERS

from .anchors import anchor_fit, box_sizes, fit_anchors, rounded
from .cli import MAX_SIDE, make_parser, positive, run
from .compose_backbones import BACKBONES
from .compose_heads import ANCHORS, HEADS, Head
from .draft import ATTENTIONS, STRIDES, Draft
from .labels import check_labels
from .lists import DataSpec, load_data
from .log import DataError, log, start_logging
from .recipe import Recipe
from .zoo import ZOO

STRIDE = STRIDES["C5"]
ANCHOR_SIZE = 416  # network input that named anchors are for
# Backbone and head that are known together by one name
PAIRS = {
    ("darknet53", "yolov3"): "YOLOv3",
    ("darknet-tiny", "yolov3-tiny"): "YOLOv3-tiny",
    ("cspdarknet53", "yolov4"): "YOLOv4",
    ("cspdarknet53-tiny", "yolov4-tiny"): "YOLOv4-tiny",
}
DATASETS = {"visdrone": "VisDrone", "oxfordhand": "Oxford Hand", "coco": "COCO", "bdd100k": "BDD100K", "dior": "DIOR"}
FLAGS = ("backbone", "head", "attention", "data", "classes", "width", "img_size", "anchors", "quantize", "note")


def compose(args: argparse.Namespace) -> str:
    """Give the text of the cfg that the arguments ask for. Raises DataError."""
    backbone, head = BACKBONES[args.backbone], HEADS[args.head]
    data = load_data(args.data) if args.data else None
    classes = len(data.names) if data else args.classes
    anchors, masks = _anchors(args, head, data)
    most = MAX_FILTERS // max(mask.count(",") + 1 for mask in masks) - 5  # a box and its objectness beside the classes
    if classes > most:
        raise DataError(f"{args.data or '--classes'}: expected at most {most} classes for --head {args.head}")
    yolos = [
        {"mask": mask, "anchors": anchors, "classes": classes, "num": head.anchors}
        | head.keys
        | ({"scale_x_y": head.scale_x_y[place]} if head.scale_x_y else {})
        for place, mask in enumerate(masks)
    ]
    draft = Draft(args.img_size, args.width, args.quantize or 0, args.attention, head.reads, yolos)
    backbone.write(draft)
    head.write(draft)
    body = "\n".join([_net(args, classes, head.net), *draft.sections])
    with torch.device("meta"):
        model = Darknet(parse(body, args.output))
    flops = sum(layer.flops for layer in model.layers) / 1e9
    data_file, cfg_file = args.data or "FILE", "CFG" if args.output == "-" else args.output
    lines = [
        _title(args),
        f"{count_parameters(model):,} parameters, {flops:.2f} BFLOPs at {args.img_size}x{args.img_size}",
        *([args.note] if args.note else []),
        f"python -m utils.compose {_command(args)}",
        shlex.join(["python", "train.py", "--data", data_file, "--cfg", cfg_file, "--img-size", str(args.img_size)]),
    ]
    return "".join(f"# {line}\n" for line in lines) + "\n" + body


def make_compose_parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--backbone", type=_one_of(BACKBONES), metavar="NAME", help=", ".join(BACKBONES))
    parser.add_argument("--head", type=_one_of(HEADS), metavar="NAME", help=", ".join(HEADS))
    parser.add_argument(
        "--attention",
        type=_one_of(ATTENTIONS),
        default="none",
        metavar="NAME",
        help=f"{', '.join(ATTENTIONS)} (default)",
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--classes", type=positive, help="number of classes")
    classes.add_argument("--data", default="", help=".data file, whose names are the classes")
    parser.add_argument("--width", type=_width, default=1.0, help="scale all channels by this (default: 1)")
    parser.add_argument("--img-size", type=_side, default=416, help="sides of the input in pixels (default: 416)")
    parser.add_argument(
        "--anchors",
        default="auto",
        help=f"w,h, w,h, … in pixels of the input, or {', '.join(ANCHORS)}, or auto: from the boxes of --data, else"
        " COCO's (default)",
    )
    parser.add_argument("--quantize", type=_bits, metavar="BITS", help="quantise weights and inputs of convolutions")
    parser.add_argument("--note", default="", help="a line of comment for the cfg")
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="cfg to write, - for the screen (default)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument(
        "--all",
        action="store_true",
        help="write every cfg of utils/zoo.py over what is there, run where cfg/ and data/ are",
    )
    return parser


def zoo_arguments(name: str) -> argparse.Namespace:
    """Give the arguments that make a cfg of the zoo."""
    return make_compose_parser().parse_args([*shlex.split(ZOO[name]), "-o", f"cfg/{name}.cfg"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m utils.compose`."""
    parser = make_compose_parser()
    args = parser.parse_args(argv)
    start_logging(stream=sys.stderr, tells_cfg=False)  # standard output is for a cfg
    if any(len(text.splitlines()) > 1 for text in (args.note, args.data, args.output)):
        parser.error("--note, --data and --output expect one line: they stand in a comment of the cfg")
    if args.all:
        if any(getattr(args, name) != parser.get_default(name) for name in (*FLAGS, "output")):
            parser.error("--all takes no other flag")
        for name in ZOO:
            _save(zoo_arguments(name))
        return
    missing = [flag for flag in ("backbone", "head") if not getattr(args, flag)]
    missing += [] if args.classes or args.data else ["classes or --data"]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(f'--{flag}' for flag in missing)}")
    if Path(args.output).exists() and not args.force:
        raise DataError(f"{args.output}: is there already (give --force to overwrite it)")
    _save(args)


def _save(args: argparse.Namespace) -> None:
    text = compose(args)
    if args.output == "-":
        print(text, end="")
        return
    Path(args.output).write_text(text, encoding="utf-8")
    log.info("%s: %s", args.output, text.splitlines()[1].removeprefix("# "))


def _title(args: argparse.Namespace) -> str:
    backbone, head = BACKBONES[args.backbone], HEADS[args.head]
    title = PAIRS.get((args.backbone, args.head), f"{backbone.title} with the {head.title} head")
    parts = [{"se": "squeeze and excitation", "cbam": "CBAM", "eca": "ECA"}.get(args.attention, "")]
    parts += [f"width {args.width:g}" if args.width != 1 else ""]
    parts += [f"{args.quantize}-bit convolutions" if args.quantize else ""]
    data = Path(args.data).stem
    where = DATASETS.get(data, data) if data else f"{args.classes} class{'es' if args.classes > 1 else ''}"
    papers = dict.fromkeys(paper for paper in (backbone.paper, head.paper) if paper)
    return ", ".join([f"{title} for {where}", *filter(None, parts), *papers])


def _command(args: argparse.Namespace) -> str:
    """Write the arguments that differ from their defaults."""
    parser, words = make_compose_parser(), []
    for flag in FLAGS:
        if getattr(args, flag) != parser.get_default(flag):
            words += [f"--{flag.replace('_', '-')}", f"{getattr(args, flag)}"]
    return shlex.join([*words, "-o", args.output])


def _net(args: argparse.Namespace, classes: int, own: Mapping[str, object]) -> str:
    batches = max(20000, 2000 * classes)
    keys = {"batch": 64, "subdivisions": 16, "momentum": "0.9", "decay": "0.0005", "angle": 0, "saturation": "1.5"}
    keys |= {"exposure": "1.5", "hue": ".1", "learning_rate": "0.001", "burn_in": 1000, "max_batches": batches}
    keys |= {"policy": "steps", "steps": f"{batches * 8 // 10},{batches * 9 // 10}", "scales": ".1,.1"} | dict(own)
    lines = ["[net]", f"width={args.img_size}", f"height={args.img_size}", "channels=3"]
    lines += ["map_bits=8"] if args.quantize and args.quantize <= BYTE_BITS else []
    lines += ["# Darknet's own trainer"]
    return "\n".join(lines + [f"{key}={value}" for key, value in keys.items()]) + "\n"


def _anchors(args: argparse.Namespace, head: Head, data: DataSpec | None) -> tuple[str, Sequence[str]]:
    """Give the anchors as a cfg has them, and the masks."""
    size, named = ANCHOR_SIZE, "coco" if args.anchors == "auto" and not data else args.anchors
    if named == "auto":
        return _format(rounded(_from_boxes(args, head, data))), head.masks
    if named == "coco" and head.coco:
        size, text, masks = head.coco
        return _format(rounded(_numbers(text, args) * args.img_size / size)), masks or head.masks
    if named not in ANCHORS:
        return _format(_numbers(named, args)), head.masks
    if head.anchors not in ANCHORS[named]:
        counts = " or ".join(map(str, ANCHORS[named]))
        raise DataError(f"--anchors {named}: has {counts} anchors (expected {head.anchors} for --head {args.head})")
    anchors = _numbers(ANCHORS[named][head.anchors], args) * args.img_size / size
    return _format(rounded(anchors)), head.masks


def _from_boxes(args: argparse.Namespace, head: Head, data: DataSpec) -> np.ndarray:
    if not data.train:
        raise DataError(f"{args.data}: has no train= to take anchors from (give --anchors)")
    sizes = box_sizes(check_labels(data.train, len(data.names)), (args.img_size, args.img_size))
    ratio = Recipe().anchor_ratio
    anchors = fit_anchors(sizes, head.anchors, ratio=ratio)
    fit = anchor_fit(sizes, anchors, ratio=ratio)
    log.info("anchors for %d boxes: best possible recall %.4f, mean IoU %.4f", len(sizes), fit.recall, fit.iou)
    return anchors


def _numbers(text: str, args: argparse.Namespace) -> np.ndarray:
    """Read as many anchors [K, 2] as the head has. Raises DataError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--anchors: expected auto, numbers or {suggest(text, ANCHORS)}, gets {text!r}") from None
    count = HEADS[args.head].anchors
    if len(values) != 2 * count:
        raise DataError(
            f"--anchors: expected {count} pairs of width and height for --head {args.head}, gets {len(values)} numbers"
        )
    if not all(0 < value <= MAX_ANCHOR for value in values):
        raise DataError(f"--anchors: expected sizes above 0 and up to {MAX_ANCHOR}, gets {text!r}")
    return np.array(values).reshape(-1, 2)


def _format(anchors: np.ndarray) -> str:
    return ", ".join(f"{w:g},{h:g}" for w, h in anchors)


def _one_of(names: Collection[str]):
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected {suggest(text, names)}, gets {text!r}")
        return text

    return read


def _width(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 8:
        raise argparse.ArgumentTypeError(f"expected a factor from 0.01 to 8, gets {text!r}")
    return value


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) % STRIDE or not STRIDE <= int(text) <= MAX_SIDE:
        raise argparse.ArgumentTypeError(f"expected a multiple of {STRIDE} up to {MAX_SIDE}, gets {text!r}")
    return int(text)


def _bits(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"expected 1 to 16 bits, gets {text!r}")
    return int(text)


if __name__ == "__main__":
    run(main)
