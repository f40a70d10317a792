"""What each part of the training recipe is worth: one change at a time, on BCCD from scratch.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.recipe

Trains slim-m on the short protocol (protocol.py) with every change of CHANGES and two seeds, and as it is on the full
protocol with three seeds; writes benchmarks/recipe.md and .json. Takes some three hours on 2 cores; trainings that are
done stay in runs/recipe, and a second call goes on from there. `--only N` stops after the first N changes and reports
what there is.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bccd import write_bccd
from benchmarks.protocol import run_all, run_protocol
from benchmarks.report import write_report
from benchmarks.zoo import LIGHT, slug, write_cfg
from models import Darknet, load_cfg
from models.darknet import count_parameters
from utils.cli import make_parser, positive

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.recipe"
WORK = Path("runs/recipe")
SEEDS, FULL_SEEDS = (0, 1), (0, 1, 2)
# What differs from the recipe: lines for --hyp, or flags of train.py
CHANGES: dict[str, str] = {
    "the recipe as it is": "",
    "no mosaic": "mosaic=0",
    "mosaic closed for the last 15 %": "close_mosaic=0.15",
    "mixup 0.15": "mixup=0.15",
    "10 best matches a box": "top_matches=10",
    "no neighbouring cells": "neighbours=0",
    "GIoU": "box_loss=giou",
    "EIoU": "box_loss=eiou",
    "objectness target 1": "objectness_target=one",
    "EMA decay 0.9998": "ema_decay=0.9998",
    "label smoothing 0.1": "label_smoothing=0.1",
    "focal loss, gamma 1.5": "focal_gamma=1.5",
    "warm-up of 1 epoch": "warmup_epochs=1",
    "AdamW": "--adam",
    "multi-scale": "--multi-scale",
    "class gain 8": "class_gain=8",
    "fp32": "--precision fp32",
    "learning rate 0.01": "lr=0.01",
    "box gain 8": "box_gain=8",
    "image weights for rare classes": "image_weights=1",
}


def main() -> None:
    """Train, report."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", type=positive, default=len(CHANGES), help="changes to look at (default: all)")
    changes = dict(list(CHANGES.items())[: parser.parse_args().only])
    WORK.mkdir(parents=True, exist_ok=True)
    Path("runs/zoo").mkdir(exist_ok=True)
    data = write_bccd(Path("runs/bccd"))
    cfgs = {protocol: write_cfg(LIGHT, protocol, data) for protocol in ("short", "full")}
    tasks = {
        f"full-{seed}": partial(
            run_protocol, f"recipe/full-{seed}", "full", cfgs["full"], data, flags=["--seed", str(seed)]
        )
        for seed in FULL_SEEDS
    }
    for name, change in changes.items():
        for seed in SEEDS:
            is_flag = change.startswith("--")
            tasks[f"{slug(name)}-{seed}"] = partial(
                run_protocol,
                f"recipe/{slug(name)}-{seed}",
                "short",
                cfgs["short"],
                data,
                hyp="" if is_flag else change,
                flags=["--seed", str(seed), *(change.split() if is_flag else ())],
            )
    scores = run_all(tasks)
    rows: list[dict[str, Any]] = [
        {"change": name, "flag": change} | _means([scores[f"{slug(name)}-{seed}"] for seed in SEEDS])
        for name, change in changes.items()
    ]
    for row in rows:
        row["difference"] = f"{row['mAP@.5:.95'] - rows[0]['mAP@.5:.95']:+.3f}"
    full = [scores[f"full-{seed}"] for seed in FULL_SEEDS]
    summary = {"params": count_parameters(Darknet(load_cfg(cfgs["full"]))), "seeds": len(full)}
    summary |= {key: statistics.mean(score[key] for score in full) for key in ("map50", "map50_95")}
    each = ", ".join(f"{score['map50']:.3f} / {score['map50_95']:.3f}" for score in full)
    text = (
        f"`{LIGHT}` from scratch on BCCD, short protocol (256x256, 30 epochs), one change at a time against the"
        f" recipe with class_gain=2, mean of {len(SEEDS)} seeds; {len(changes)} of the {len(CHANGES)} changes that"
        " `benchmarks/recipe.py` lists. Two seeds of one recipe lie about 0.02 apart: smaller differences mean little."
        f"\n\nFull protocol (320x320, 60 epochs), {summary['params']:,} parameters, {len(full)} seeds: mAP@.5"
        f" {summary['map50']:.3f}, mAP@.5:.95 {summary['map50_95']:.3f} ({each})."
    )
    write_report("recipe", "The training recipe, part by part", text, COMMAND, rows, summary)


def _means(scores: list[dict[str, Any]]) -> dict[str, float]:
    keys = {"mAP@.5": "map50", "mAP@.5:.95": "map50_95"}
    return {title: statistics.mean(score[key] for score in scores) for title, key in keys.items()}


if __name__ == "__main__":
    main()
