"""What a teacher brings: a pruned GhostNet-YOLOv3 and slim-s, trained alone and with each strategy; and what it costs.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.distillation

Every student's training is the short protocol (protocol.py) on BCCD. The first is the network that
benchmarks/slimming.py, which comes first, makes a quarter of sparsely trained GhostNet-YOLOv3; the teacher is the
unpruned one, fine-tuned three times as long as its students. Each strategy gets one seed, the best of them and
fine-tuning alone get SEEDS; slim-s learns by the best. A third student is cut from the teacher itself, by L2. Then a
training step with a teacher is timed against one without and the teacher's forward pass. Writes
benchmarks/distillation.md and .json; takes some three hours on 2 cores. Trainings that are done stay in
runs/distillation, and a second call goes on from there. `--kd` takes some of the strategies, without a report.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.bccd import write_bccd
from benchmarks.protocol import PROTOCOLS, run_all, run_protocol
from benchmarks.report import make_table, write_report
from benchmarks.slimming import prune
from benchmarks.training import has_bf16, our_epoch, random_batch, seconds_in_turn
from benchmarks.zoo import slug, write_cfg
from models import Darknet, load_cfg, load_model
from models.darknet import count_parameters
from models.weights import checkpoint_cfg, load_checkpoint
from utils.cli import make_parser
from utils.datasets import to_input
from utils.distillation import DEFAULT, Lessons
from utils.head_pairs import KINDS
from utils.log import start_logging

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.distillation"
WORK = Path("runs/distillation")
LARGE, SMALL = "ghostnet-yolov3", "slim-s"
SPARSE, SPARED = Path(f"runs/slimming/{LARGE}-sparse/last.pt"), Path(f"runs/slimming/{LARGE}-pruned")  # slimming's
PRUNED = WORK / "pruned"
TEACHER, TEACHER_EPOCHS = "distillation/teacher", 90
ALONE = "alone"
VARIANTS = (ALONE, *KINDS, "pkd+box")
SEEDS = (0, 1, 2)
CPU = torch.device("cpu")

Key = tuple[str, str, int]  # student, strategy, seed


class Student(NamedTuple):
    """A network, the run of other benchmarks (or "") that trains it alone with seed 0, its flags, its teacher's run."""

    name: str
    cfg: Path
    alone: str
    flags: tuple[str, ...]
    teacher: str = TEACHER


def main() -> None:
    """Train, time, report."""
    parser = make_parser(__doc__)
    parser.add_argument("--kd", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:], help="strategies (default: all)")
    args = parser.parse_args()
    start_logging()
    if not (SPARED / "pruned.cfg").exists():
        raise SystemExit(f"{SPARED}/pruned.cfg: is not there (run python -m benchmarks.slimming first)")
    WORK.mkdir(parents=True, exist_ok=True)
    data = write_bccd(Path("runs/bccd"))
    flags = ["--weights", str(SPARSE)]
    taught = run_protocol(TEACHER, "short", write_cfg(LARGE, "short", data), data, flags=flags, epochs=TEACHER_EPOCHS)
    cut = prune(PRUNED, TEACHER, data, 0.25, "--criterion", "l2", "--force")["networks"][-1]
    students = [
        Student(f"pruned {LARGE}", SPARED / "pruned.cfg", f"slimming/{LARGE}-tuned", weights_of(SPARED)),
        Student(SMALL, write_cfg(SMALL, "short", data), f"zoo/{slug(SMALL)}", ()),
    ]
    rows = compare(students, data, (ALONE, *args.kd), SEEDS)
    third = Student(f"{LARGE} cut from its teacher", PRUNED / "pruned.cfg", "", weights_of(PRUNED))
    rows += compare([third], data, (ALONE, "logits"), SEEDS[:1])
    side = PROTOCOLS["short"].side
    times = step_rows(students[0].cfg, load_model(*teacher_of(students[0])), side, PROTOCOLS["short"].batch)
    first, *others = (row for row in rows if row["student"] == students[0].name)
    best = max((row for row in others if row["seeds"] == len(SEEDS)), key=lambda row: row["mAP@.5:.95"])
    if {*args.kd} != {*VARIANTS[1:]}:
        print(make_table(rows + times))
        return
    summary = {
        "finetune_map50_95": first["mAP@.5:.95"],
        "best_map50_95": best["mAP@.5:.95"],
        "gain": best["mAP@.5:.95"] - first["mAP@.5:.95"],
        "best": best["kd"],
        "seeds": len(SEEDS),
        "teacher_map50_95": taught["map50_95"],
        "step_ratio": next(row["ratio"] for row in times if row["what"] == f"step with {'+'.join(DEFAULT)}"),
    }
    text = f"""Short protocol on BCCD ({side}x{side}, 30 epochs, batch 16); `--kd-weight auto` at its default share.
The teacher is {LARGE} after sparse training and {TEACHER_EPOCHS} epochs of fine-tuning: mAP@.5 {taught["map50"]:.3f},
mAP@.5:.95 {taught["map50_95"]:.3f}. The pruned one is cut by |γ| from what sparse training left (slimming.md), and
starts from there; the last one from a quarter of the teacher itself that L2 leaves, mAP@.5 {cut["map50"]:.3f},
mAP@.5:.95 {cut["map50_95"]:.3f}.

`difference` is to the same student alone with the same seeds, in mAP@.5:.95; where a row has one seed, the standard
error of a paired difference on these 72 test pictures is about 0.003 in mAP@.5 and 0.004 in mAP@.5:.95, and the best of
several is better than it is.

A step: the pruned network at batch 16, in turn in one process; the ratio is that of a step with a teacher to the sum of
a step without and the teacher's forward pass, median over rounds. mgd's generator, two 3x3 convolutions a head as wide
as the teacher's map, is larger than the student."""
    write_report("distillation", "Distillation", text, COMMAND, rows + times, summary)


def weights_of(folder: Path) -> tuple[str, str]:
    """Give the flags that start a student from a pruned network."""
    return "--weights", str(folder / "pruned.weights")


def teacher_of(student: Student) -> tuple[Any, Path]:
    """Give the cfg and the weights of a student's teacher, from its last checkpoint."""
    path = Path(f"runs/{student.teacher}/last.pt")
    return checkpoint_cfg(load_checkpoint(path), path), path


def compare(
    students: Sequence[Student],
    data: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    *,
    epochs: int | None = None,
) -> list[dict[str, Any]]:
    """Train the first student by every variant, alone and by the best with all seeds; the others so with the first."""
    named = {student.name: student for student in students}

    def run(keys: list[Key]) -> dict[Key, dict[str, Any]]:
        tasks = {"/".join(map(str, key)): partial(train, named[key[0]], data, *key[1:], epochs) for key in keys}
        return dict(zip(keys, run_all(tasks).values(), strict=True))

    first, *others = named
    scores = run([(first, variant, seeds[0]) for variant in variants])
    best = max(variants[1:], key=lambda variant: scores[first, variant, seeds[0]]["map50_95"])
    compared = (ALONE, best)
    scores |= run([*itertools.product([first], compared, seeds), *itertools.product(others, compared, seeds[:1])])
    shown = dict.fromkeys((name, variant) for name, variant, _ in scores)
    return [make_row(named[name], variant, scores) for name, variant in shown]


def make_row(student: Student, variant: str, scores: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    """Give the means over the seeds of one variant, and how far they lie from those of training alone."""
    seeds = [seed for name, each, seed in scores if (name, each) == (student.name, variant)]
    each_seed = [f"{scores[student.name, variant, seed]['map50_95']:.3f}" for seed in seeds]

    def mean(each: str, key: str) -> float:
        return statistics.mean(scores[student.name, each, seed][key] for seed in seeds)

    return {
        "student": student.name,
        "teacher": Path(student.teacher).name,
        "kd": variant,
        "parameters": count_parameters(Darknet(load_cfg(student.cfg))),
        "seeds": len(seeds),
        "mAP@.5": mean(variant, "map50"),
        "mAP@.5:.95": mean(variant, "map50_95"),
        "by seed": " ".join(each_seed),
        "difference": f"{mean(variant, 'map50_95') - mean(ALONE, 'map50_95'):+.3f}",
    }


def train(
    student: Student, data: Path, variant: str, seed: int, epochs: int | None, *, threads: int | None = None
) -> dict[str, Any]:
    """Train a student by one strategy, unless that is done already."""
    flags = [*student.flags, "--seed", str(seed)]
    if variant != ALONE:
        flags += ["--t_weights", f"runs/{student.teacher}/last.pt", "--kd", variant]
    is_done = student.alone and variant == ALONE and seed == 0
    name = student.alone if is_done else f"distillation/{slug(student.name)}-{variant}-{seed}"
    return run_protocol(name, "short", student.cfg, data, flags=flags, epochs=epochs, threads=threads)


def step_rows(cfg: str | Path, teacher: Darknet, side: int, number: int, *, rounds: int = 10) -> list[dict[str, Any]]:
    """Time a step alone, a teacher's forward pass and a step with it; `ratio` is to the sum of the first two."""
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    batches = [random_batch(number, side)]
    fused = teacher.fuse().to(memory_format=torch.channels_last)
    x = to_input(batches[0].pictures, CPU)
    calls = {
        "step alone": partial(our_epoch(cfg, dtype), batches),
        "teacher's forward pass": partial(forward, fused, x, dtype),
    }
    for kind in KINDS:
        calls[f"step with {kind}"] = partial(our_epoch(cfg, dtype, teacher, Lessons((kind,))), batches)
    spent = seconds_in_turn(calls, rounds)
    rows: list[dict[str, Any]] = [
        {"what": name, "ms": 1000 * statistics.median(seconds)} for name, seconds in spent.items()
    ]
    alone, passes, *taught = spent.values()
    for row, seconds in zip(rows[2:], taught, strict=True):
        row["ratio"] = statistics.median(c / (a + b) for a, b, c in zip(alone, passes, seconds, strict=True))
    return rows


@torch.no_grad()
def forward(model: Darknet, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Run a network as a teacher runs."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(x)


if __name__ == "__main__":
    main()
