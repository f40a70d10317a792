"""The whole chain on real data: baseline, sparse training, pruning, fine-tuning; and the criteria at equal size.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.slimming

GhostNet-YOLOv3 to a quarter of its parameters and YOLOv3-tiny to an eighth, on BCCD, the short protocol (protocol.py)
for each training; then YOLOv3-tiny's sparse network cut to a quarter by every criterion, before and after a short
fine-tuning. Writes benchmarks/slimming.md, .json and pictures; takes about two hours on 2 cores. Trainings that are
done stay in runs/zoo and runs/slimming, and a second call goes on from there.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.bccd import write_bccd
from benchmarks.protocol import PROTOCOLS, run_protocol
from benchmarks.report import FOLDER, make_table, write_report
from benchmarks.zoo import slug, write_cfg
from models import load_model
from utils.bench import ROUNDS
from utils.charts import COLOURS, GREY, save_figure
from utils.importance import CRITERIA
from utils.timing import paired_ms

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.slimming"
WORK = Path("runs/slimming")
JUDGED, SHARE, EPOCHS = "yolov3-tiny", 0.25, 10  # the network, size and fine-tuning that criteria are compared by


class Chain(NamedTuple):
    """Groups that sparse training is to empty, the share of the parameters to keep, and more flags of the pruning."""

    target: float
    share: float
    flags: tuple[str, ...] = ()


CHAINS = {"ghostnet-yolov3": Chain(0.55, 0.25), "yolov3-tiny": Chain(0.65, 0.125)}


def main() -> None:
    """Train, prune, fine-tune, time, report."""
    WORK.mkdir(parents=True, exist_ok=True)
    data = write_bccd(Path("runs/bccd"))
    rows, summary = [], {}
    for name, chain in CHAINS.items():
        more = run_chain(name, chain, data)
        rows += more
        short = name.partition("net")[0] if name.startswith("ghost") else "tiny"
        for key, row in (("before", more[0]), ("after", more[-1])):
            summary |= {f"{short}_params_{key}": row["parameters"], f"{short}_map50_{key}": row["mAP@.5"]}
        summary[f"{short}_speedup"] = more[0]["ms"] / more[-1]["ms"]
        shutil.copyfile(WORK / f"{slug(name)}-pruned/report.png", FOLDER / f"slimming-{short}.png")
    criteria = compare_criteria(data)
    draw_criteria(criteria, FOLDER / "slimming-criteria.png")
    side = PROTOCOLS["short"].side
    text = f"""Baseline, sparse training, pruning, fine-tuning: the short protocol ({side}x{side}, 30 epochs) for each
training, one seed. Commands of a chain, with NAME the network and S, P its figures below:

    python train.py --weights runs/zoo/NAME/last.pt -sr --s auto --sr-target S …
    python normal_prune.py --weights runs/slimming/NAME-sparse/last.pt --target-params P --data …
    python train.py --cfg runs/slimming/NAME-pruned/pruned.cfg --weights runs/slimming/NAME-pruned/pruned.weights …

{", ".join(f"{name}: S {chain.target}, P {chain.share}" for name, chain in CHAINS.items())}. Latency: fused,
channels_last, one picture of 416x416, baseline and pruned network timed in turn in one process.

![GhostNet-YOLOv3](slimming-ghost.png)

![YOLOv3-tiny](slimming-tiny.png)

Criteria: {JUDGED} after sparse training, cut to {SHARE:g} of its parameters, and fine-tuned for {EPOCHS} epochs.

{make_table(criteria)}

![criteria](slimming-criteria.png)"""
    write_report("slimming", "Slimming: the chain on real data", text, COMMAND, rows, summary)


def run_chain(name: str, chain: Chain, data: Path) -> list[dict[str, Any]]:
    """Go through a chain and give a row for every network in it."""
    cfg = write_cfg(name, "short", data)
    baseline = run_protocol(f"zoo/{slug(name)}", "short", cfg, data)
    flags = ["--weights", f"runs/zoo/{slug(name)}/last.pt", "-sr", "--s", "auto", "--sr-target", str(chain.target)]
    sparse = run_protocol(f"slimming/{slug(name)}-sparse", "short", cfg, data, flags=flags)
    folder = WORK / f"{slug(name)}-pruned"
    report = prune(folder, f"slimming/{slug(name)}-sparse", data, chain.share, *chain.flags)
    flags = ["--weights", str(folder / "pruned.weights")]
    tuned = run_protocol(f"slimming/{slug(name)}-tuned", "short", folder / "pruned.cfg", data, flags=flags)
    models = [
        load_model(cfg, f"runs/zoo/{slug(name)}/last.pt"),
        load_model(folder / "pruned.cfg", f"runs/slimming/{slug(name)}-tuned/last.pt"),
    ]
    before, after = (timing.ms for timing in paired_ms(models, (416, 416), ROUNDS))
    first, _, compact = report["networks"]
    stages = (
        ("baseline", first, baseline, before),
        ("after sparse training", first, sparse, before),
        ("pruned", compact, compact, after),
        ("fine-tuned", compact, tuned, after),
    )
    return [
        {
            "network": name,
            "stage": stage,
            "parameters": cost["parameters"],
            "BFLOPs": cost["bflops"],
            "mAP@.5": scores["map50"],
            "mAP@.5:.95": scores["map50_95"],
            "ms": ms,
        }
        for stage, cost, scores, ms in stages
    ]


def compare_criteria(data: Path) -> list[dict[str, Any]]:
    """Cut one sparse-trained network to the same size by every criterion, and fine-tune a little."""
    rows = []
    for criterion in CRITERIA:
        folder = WORK / f"criterion-{criterion}"
        flags = ["--criterion", criterion, "--force"]
        compact = prune(folder, f"slimming/{slug(JUDGED)}-sparse", data, SHARE, *flags)["networks"][-1]
        flags = ["--weights", str(folder / "pruned.weights")]
        name = f"slimming/criterion-{criterion}-tuned"
        tuned = run_protocol(name, "short", folder / "pruned.cfg", data, flags=flags, epochs=EPOCHS)
        rows.append(
            {
                "criterion": criterion,
                "parameters": compact["parameters"],
                "BFLOPs": compact["bflops"],
                "mAP@.5 pruned": compact["map50"],
                "fine-tuned": tuned["map50"],
                "mAP@.5:.95 pruned": compact["map50_95"],
                "fine-tuned, .5:.95": tuned["map50_95"],
            }
        )
    return rows


def prune(folder: Path, run: str, data: Path, share: float, *flags: str) -> dict[str, Any]:
    """Prune the network of a run into `folder`, unless that is done already, and give its report."""
    report = folder / "report.json"
    if not report.exists():
        words = ["normal_prune.py", "--weights", f"runs/{run}/last.pt", "--data", data, "--workers", 0]
        words += ["--hyp", f"runs/{run}.hyp", "--target-params", share, "--output", folder, *flags]
        subprocess.run([sys.executable, *map(str, words)], check=True)
    return json.loads(report.read_text())


def draw_criteria(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw mAP@.5 of every criterion before and after fine-tuning."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for shift, key, colour in ((-0.2, "mAP@.5 pruned", GREY), (0.2, "fine-tuned", COLOURS[0])):
        values = [row[key] for row in rows]
        bars = axes.bar([place + shift for place in range(len(rows))], values, 0.38, label=key, color=colour)
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(rows)), [row["criterion"] for row in rows])
    axes.set_ylabel("mAP@.5")
    axes.set_ylim(0, 1)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
