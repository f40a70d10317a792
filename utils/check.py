"""Examine a dataset before training: files, labels, balance, box sizes, leakage from train to valid, and anchors.

    python -m utils.check data/visdrone.data --img-size 640

Where training stops at the first check, this reports all of it: counts, and the first of each kind with file and line.
Draws overview.png in runs/check/. Ends with exit status 0 for a healthy dataset, also one with oddities, and with 1 for
one with problems: what training refuses, and pictures of valid in train. 10,000 pictures take minutes on 2 cores.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import STRIDES, draw_overview
from .cli import make_parser, run, side
from .findings import DOT, KINDS, describe_split, find, gather, suggest_anchors
from .lists import load_data
from .log import DataError, log
from .runs import new_folder
from .survey import Look, readable, survey

SHOWN = 5  # findings of a kind that are told in full; --json has all
ANCHORS = (6, 9)  # of two heads and of three


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m utils.check`."""
    args = parse_args(argv)
    size = (args.img_size, args.img_size)
    data = load_data(args.data)
    splits: dict[str, list[Look]] = {}
    lists = []
    for split, source in (("train", data.train), ("valid", data.valid)):
        try:
            if source:
                splits[split] = survey(source, len(data.names))
        except DataError as error:
            lists.append(("list", str(error)))
    if not splits and not lists:
        raise DataError(f"{args.data}: needs train= or valid=")
    findings = gather(iter([*lists, *find(splits, data.names, size)]))
    figures: dict[str, Any] = {
        "data": args.data,
        "img_size": args.img_size,
        "splits": {split: describe_split(looks, data.names, size) for split, looks in splits.items()},
        "anchors": {},
        "problems": {kind: texts for kind, texts in findings.items() if KINDS[kind].is_problem},
        "oddities": {kind: texts for kind, texts in findings.items() if not KINDS[kind].is_problem},
    }
    if splits:
        looks = next(iter(splits.values()))
        figures["anchors"] = {str(count): suggest_anchors(looks, size, count) for count in ANCHORS}
    log.info(report(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if splits:
        folder = Path(args.output) if args.output else new_folder("check")
        folder.mkdir(parents=True, exist_ok=True)
        labelled = {split: readable(looks) for split, looks in splits.items()}
        titles = {KINDS[kind].title: (len(texts), KINDS[kind].is_problem) for kind, texts in findings.items()}
        anchors = figures["anchors"][str(ANCHORS[-1])]["anchors"]
        draw_overview(
            labelled, data.names, folder / "overview.png", side=args.img_size, anchors=anchors, findings=titles
        )
        log.info("overview in %s", folder)
    if figures["problems"]:
        sys.exit(1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help=".data file")
    parser.add_argument("--img-size", type=side, default=416, help="network side in pixels (default: %(default)s)")
    parser.add_argument("--json", default="", help="write all findings and figures to this file")
    parser.add_argument("--output", default="", help="folder of overview.png (default: a new one, runs/check)")
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"{args.json}: there is no folder {Path(args.json).parent}")
    return args


def report(figures: Mapping[str, Any]) -> str:
    """Lay the figures and the first findings of each kind out as text."""
    splits, lines = figures["splits"], []
    if splits:
        columns = "".join(f"{split + ' boxes':>14}{'images':>8}" for split in splits)
        lines.append(f"{'class':<24}{columns}")
        for name in next(iter(splits.values()))["per_class"]:
            counts = [split["per_class"][name] for split in splits.values()]
            lines.append(f"{name[:23]:<24}" + "".join(f"{each['boxes']:14,}{each['images']:8,}" for each in counts))
        totals = "".join(f"{split['boxes']:14,}{split['images']:8,}" for split in splits.values())
        lines.append(f"{'all':<24}{totals}")
    for name, split in splits.items():
        shares = [f"{split['under_cell'][str(stride)] / max(split['boxes'], 1):.1%} in {stride}" for stride in STRIDES]
        dots = f"{split['under_2px']:,} have a side under {DOT} px"
        lines.append(f"{name} at {figures['img_size']}: boxes that fit into one cell: {', '.join(shares)}; {dots}")
    for count, fit in figures["anchors"].items():
        pairs = ",  ".join(f"{w:g},{h:g}" for w, h in fit["anchors"])
        lines.append(f"{count} anchors: {pairs} (best possible recall {fit['recall']:.4f}, mean IoU {fit['iou']:.3f})")
    for level in ("problems", "oddities"):
        for kind, texts in figures[level].items():
            lines.append(f"{level[:-1] if level == 'problems' else 'oddity'}: {len(texts):,} {KINDS[kind].title}")
            lines += [f"    {text}" for text in texts[:SHOWN]]
            if len(texts) > SHOWN:
                lines.append(f"    … and {len(texts) - SHOWN:,} more")
    problems = sum(map(len, figures["problems"].values()))
    lines.append(f"{problems:,} problems" if problems else "no problems")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
