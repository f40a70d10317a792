"""What a teacher brings: a pruned GhostNet-YOLOv3 and slim-s, trained alone and with each strategy; and what it costs.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.distillation

Every training is the short protocol (protocol.py) on BCCD: the pruned network is fine-tuned beside the one that it was
cut from (benchmarks/slimming.py comes first), slim-s learns from scratch beside slim-m. Then a training step with a
teacher is timed against one without and the teacher's forward pass. Writes benchmarks/distillation.md and .json; takes
some six hours on 2 cores a seed. Trainings that are done stay in runs/distillation, and a second call goes on from
there. `--seeds N` repeats all with more seeds, `--kd` takes some of the strategies.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.bccd import write_bccd
from benchmarks.protocol import PROTOCOLS, run_protocol
from benchmarks.report import write_report
from benchmarks.training import has_bf16, our_epoch, random_batch, seconds_in_turn
from benchmarks.zoo import slug, write_cfg
from models import Darknet, load_cfg, load_model
from models.darknet import count_parameters
from models.weights import checkpoint_cfg, load_checkpoint
from utils.cli import make_parser, positive
from utils.datasets import to_input
from utils.head_pairs import KINDS
from utils.log import start_logging

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.distillation"
WORK = Path("runs/distillation")
PRUNED = Path("runs/slimming/ghostnet-yolov3-pruned")  # benchmarks/slimming.py leaves it
ALONE = "alone"
VARIANTS = (ALONE, *KINDS, "logits+cwd", "logits+box+cwd")
CPU = torch.device("cpu")


class Student(NamedTuple):
    """A network, the run of other benchmarks that trains it alone with seed 0, its flags, and its teacher's run."""

    name: str
    cfg: Path
    alone: str
    flags: tuple[str, ...]
    teacher: str


def main() -> None:
    """Train, time, report."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=positive, default=1, help="trainings of every kind (default: %(default)s)")
    parser.add_argument("--kd", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:], help="strategies (default: all)")
    args = parser.parse_args()
    start_logging()
    if not (PRUNED / "pruned.cfg").exists():
        raise SystemExit(f"{PRUNED}/pruned.cfg: is not there (run python -m benchmarks.slimming first)")
    WORK.mkdir(parents=True, exist_ok=True)
    data = write_bccd(Path("runs/bccd"))
    students = make_students(data)
    rows = [row for student in students for row in compare(student, data, (ALONE, *args.kd), range(args.seeds))]
    side = PROTOCOLS["short"].side
    pruned = students[0]
    times = step_rows(pruned.cfg, load_model(*teacher_of(pruned)), side, PROTOCOLS["short"].batch)
    first, *others = (row["mAP@.5:.95"] for row in rows if row["student"] == pruned.name)
    summary = {
        "finetune_map50_95": first,
        "best_map50_95": max(others),
        "gain": max(others) - first,
        "step_ratio": times[-1]["ratio"],
        "seeds": args.seeds,
    }
    text = f"""Short protocol on BCCD ({side}x{side}, 30 epochs, batch 16), means of {args.seeds} seed(s);
`--kd-weight auto` at its default share. The best of several on 72 test pictures is better than it is: the standard
error of a paired difference is about 0.003 in mAP@.5 and 0.004 in mAP@.5:.95.

A step: the pruned network at batch 16, in turn in one process; the ratio is that of a step with a teacher to the sum of
a step without and the teacher's forward pass, median over rounds."""
    write_report("distillation", "Distillation", text, COMMAND, rows + times, summary)


def make_students(data: Path) -> list[Student]:
    """Give the networks to train and their teachers' runs."""
    weights = ("--weights", str(PRUNED / "pruned.weights"))
    light = write_cfg("slim-s", "short", data)
    return [
        Student(
            "pruned ghostnet", PRUNED / "pruned.cfg", "slimming/ghostnet-yolov3-tuned", weights, "zoo/ghostnet-yolov3"
        ),
        Student("slim-s", light, f"zoo/{slug('slim-s')}", (), "zoo/slim-m"),
    ]


def teacher_of(student: Student) -> tuple[Any, Path]:
    """Give the cfg and the weights of a student's teacher, from its last checkpoint."""
    path = Path(f"runs/{student.teacher}/last.pt")
    return checkpoint_cfg(load_checkpoint(path), path), path


def compare(
    student: Student, data: Path, variants: Sequence[str], seeds: Sequence[int], *, epochs: int | None = None
) -> list[dict[str, Any]]:
    """Train a student alone and by every strategy, and give a row for each: means over the seeds."""
    rows: list[dict[str, Any]] = []
    for variant in variants:
        scores = [train(student, data, variant, seed, epochs) for seed in seeds]
        row = {
            "student": student.name,
            "teacher": Path(student.teacher).name,
            "kd": variant,
            "parameters": count_parameters(Darknet(load_cfg(student.cfg))),
            "mAP@.5": statistics.mean(score["map50"] for score in scores),
            "mAP@.5:.95": statistics.mean(score["map50_95"] for score in scores),
        }
        rows.append(row)
        row["difference"] = f"{row['mAP@.5:.95'] - rows[0]['mAP@.5:.95']:+.3f}"
    return rows


def train(student: Student, data: Path, variant: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """Train a student by one strategy, unless that is done already."""
    flags = [*student.flags, "--seed", str(seed)]
    if variant != ALONE:
        flags += ["--t_weights", f"runs/{student.teacher}/last.pt", "--kd", variant]
    is_done = variant == ALONE and seed == 0
    name = student.alone if is_done else f"distillation/{slug(student.name)}-{variant}-{seed}"
    return run_protocol(name, "short", student.cfg, data, flags=flags, epochs=epochs)


def step_rows(cfg: str | Path, teacher: Darknet, side: int, number: int, *, rounds: int = 5) -> list[dict[str, Any]]:
    """Time a step alone, a teacher's forward pass and a step with it; `ratio` is to the sum of the first two."""
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    batches = [random_batch(number, side)]
    fused = teacher.fuse().to(memory_format=torch.channels_last)
    x = to_input(batches[0].pictures, CPU)
    calls = {
        "step alone": partial(our_epoch(cfg, dtype), batches),
        "teacher's forward pass": partial(forward, fused, x, dtype),
        "step with a teacher": partial(our_epoch(cfg, dtype, teacher), batches),
    }
    spent = seconds_in_turn(calls, rounds)
    alone, passes, taught = spent.values()
    ratio = statistics.median(c / (a + b) for a, b, c in zip(alone, passes, taught, strict=True))
    rows: list[dict[str, Any]] = [
        {"what": name, "ms": 1000 * statistics.median(seconds)} for name, seconds in spent.items()
    ]
    rows[-1]["ratio"] = ratio
    return rows


@torch.no_grad()
def forward(model: Darknet, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Run a network as a teacher runs."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(x)


if __name__ == "__main__":
    main()
