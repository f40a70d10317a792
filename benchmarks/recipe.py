"""What each part of the training recipe is worth: one change at a time, from scratch on BCCD and on raccoons.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.recipe

Trains slim-m on the short protocol (protocol.py) with every change of CHANGES and two seeds, and as it is on the full
protocol with three seeds; some of the changes on the raccoon set too, with one seed. Writes benchmarks/recipe.md and
.json. Takes some three hours on 2 cores; trainings that are done stay in runs/recipe, and a second call goes on from
there. `--only N` stops after the first N changes and reports what there is.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bccd import write_bccd
from benchmarks.protocol import run_all, run_protocol
from benchmarks.raccoon import write_raccoon
from benchmarks.report import write_report
from benchmarks.zoo import LIGHT, slug, write_cfg
from models import Darknet, load_cfg
from models.darknet import count_parameters
from utils.cli import make_parser, positive

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.recipe"
WORK = Path("runs/recipe")
SEEDS, FULL_SEEDS, RACCOON_SEEDS = (0, 1), (0, 1, 2), (0,)
RACCOON = "raccoon-"  # before the names of trainings on that set
# What differs from the recipe: lines for --hyp, or flags of train.py
FINDINGS = """

What follows. Mosaic until 30 % of the epochs are left, IoU as the target of objectness, SGD, one size and no mixup
stay: changing one of them loses 0.01 to 0.07. The loss of boxes, neighbouring cells, ten best matches, label smoothing,
the warm-up and bfloat16 make no difference that these seeds can tell; 570 steps never reach the limit of the moving
average. Image weights gain with both seeds where a class is rare, focal loss with one of two: both stay options. On the
raccoon set, 300 steps from scratch with one seed, nothing is learned to its end, and what learns faster wins: AdamW,
several sizes. Try `--adam` for so few steps."""
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
    "fp32": "--precision fp32",
    "image weights for rare classes": "image_weights=1",
}
ON_OTHERS = (
    "\n\nSome of them on the raccoon set too (160 training and 40 test pictures, 44 boxes to find, one class), same"
    " protocol, one seed: only large differences mean something."
)
ON_RACCOONS = (
    "the recipe as it is",
    "no mosaic",
    "mosaic closed for the last 15 %",
    "10 best matches a box",
    "EIoU",
    "AdamW",
    "multi-scale",
    "mixup 0.15",
)


def main() -> None:
    """Train, report."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", type=positive, default=len(CHANGES), help="changes to look at (default: all)")
    names = list(CHANGES)[: parser.parse_args().only]
    some = [name for name in names if name in ON_RACCOONS]
    WORK.mkdir(parents=True, exist_ok=True)
    Path("runs/zoo").mkdir(exist_ok=True)
    data, raccoons = write_bccd(Path("runs/bccd")), write_raccoon(Path("runs/raccoon"))
    cfgs = {protocol: write_cfg(LIGHT, protocol, data) for protocol in ("short", "full")}
    tasks = {
        f"full-{seed}": partial(
            run_protocol, f"recipe/full-{seed}", "full", cfgs["full"], data, flags=["--seed", str(seed)]
        )
        for seed in FULL_SEEDS
    }
    tasks |= _tasks("", names, SEEDS, cfgs["short"], data)
    tasks |= _tasks(RACCOON, some, RACCOON_SEEDS, write_cfg(LIGHT, "short", raccoons, folder=raccoons.parent), raccoons)
    scores = run_all(tasks)
    rows = _rows("BCCD", "", names, SEEDS, scores) + _rows("raccoon", RACCOON, some, RACCOON_SEEDS, scores)
    full = [scores[f"full-{seed}"] for seed in FULL_SEEDS]
    summary = {"params": count_parameters(Darknet(load_cfg(cfgs["full"]))), "seeds": len(full)}
    summary |= {key: statistics.mean(score[key] for score in full) for key in ("map50", "map50_95")}
    each = ", ".join(f"{score['map50']:.3f} / {score['map50_95']:.3f}" for score in full)
    text = (
        f"`{LIGHT}` from scratch on BCCD, short protocol (256x256, 30 epochs), one change at a time against the"
        f" recipe with class_gain=2, mean of {len(SEEDS)} seeds; {len(names)} of the {len(CHANGES)} changes that"
        " `benchmarks/recipe.py` lists. Two seeds of one recipe lie about 0.02 apart: smaller differences mean little."
        f"{ON_OTHERS if some else ''}"
        f"{FINDINGS if names == list(CHANGES) else ''}"
        f"\n\nFull protocol (BCCD, 320x320, 60 epochs), {summary['params']:,} parameters, {len(full)} seeds: mAP@.5"
        f" {summary['map50']:.3f}, mAP@.5:.95 {summary['map50_95']:.3f} ({each})."
    )
    write_report("recipe", "The training recipe, part by part", text, COMMAND, rows, summary)


def _tasks(
    prefix: str, names: Sequence[str], seeds: Sequence[int], cfg: Path, data: Path
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Give the trainings of changes on the short protocol, named `prefix`, change and seed, as in runs/recipe."""
    tasks = {}
    for name, seed in itertools.product(names, seeds):
        change, key = CHANGES[name], f"{prefix}{slug(name)}-{seed}"
        is_flag = change.startswith("--")
        flags = ["--seed", str(seed), *(change.split() if is_flag else ())]
        hyp = "" if is_flag else change
        tasks[key] = partial(run_protocol, f"recipe/{key}", "short", cfg, data, hyp=hyp, flags=flags)
    return tasks


def _rows(
    dataset: str, prefix: str, names: Sequence[str], seeds: Sequence[int], scores: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Give a row for each change: means over the seeds, and how far it lies from the first."""
    rows: list[dict[str, Any]] = [
        {"dataset": dataset, "change": name, "flag": CHANGES[name]}
        | _means([scores[f"{prefix}{slug(name)}-{seed}"] for seed in seeds])
        for name in names
    ]
    for row in rows:
        row["difference"] = f"{row['mAP@.5:.95'] - rows[0]['mAP@.5:.95']:+.3f}"
    return rows


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    keys = {"mAP@.5": "map50", "mAP@.5:.95": "map50_95"}
    return {title: statistics.mean(score[key] for score in scores) for title, key in keys.items()}


if __name__ == "__main__":
    main()
