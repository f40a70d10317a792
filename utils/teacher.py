"""The teacher of a distillation: read as the flags name it, checked, and kept in the run's folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from models import Darknet, dump, load_cfg
from models.weights import checkpoint_cfg, load_checkpoint, load_model, save_checkpoint

from . import dist
from .log import DataError, log

FILE = "teacher.pt"  # in the run's folder


def load_teacher(args: argparse.Namespace, names: Sequence[str], kept: Path | None) -> Darknet:
    """Read the teacher of --t_cfg and --t_weights, or the one that an interrupted run kept; a .pt describes itself.

    Raises DataError where it does not know the classes `names`.
    """
    weights = kept or Path(args.t_weights)
    checkpoint = load_checkpoint(weights) if weights.suffix == ".pt" else {}
    if not (args.t_cfg or checkpoint):
        raise DataError(f"--t_cfg: not given, and {weights} carries none (only a .pt does)")
    cfg = load_cfg(args.t_cfg) if args.t_cfg and not kept else checkpoint_cfg(checkpoint, weights)
    teacher = load_model(cfg, weights, allow_unknown=args.allow_unknown)
    if not teacher.heads:
        raise DataError(f"{cfg.path}: is a classifier (expected a detector to learn from)")
    for head in teacher.heads:
        if head.classes != len(names):
            line = teacher.expanded.sections[1 + head.layer].line_of("classes")
            raise DataError(
                f"{cfg.path}:{line}: the teacher knows {head.classes} classes, {args.data} names {len(names)}"
                " (a teacher must have learned the same classes)"
            )
    learned = tuple(checkpoint.get("names", names))
    if learned != tuple(names) and not args.single_cls:
        raise DataError(f"{args.data}: names {', '.join(names)}, but {weights} learned {', '.join(learned)}")
    log.info("%s teaches", weights)
    return teacher


def check_teacher(
    teacher: Darknet, student: Darknet, sizes: Sequence[tuple[int, int]], args: argparse.Namespace
) -> None:
    """Raise DataError where a teacher cannot see what the student does: inputs of `sizes` (height, width)."""
    path, stride = teacher.cfg.path, teacher.stride
    if teacher.channels != student.channels:
        raise DataError(
            f"{path}: the teacher sees {teacher.channels} channels, the student {student.channels}"
            " (channels= of [net] must be the same)"
        )
    wrong = next((size for size in sizes if size[0] % stride or size[1] % stride), None)
    if wrong:
        raise DataError(
            f"{path}: the teacher takes sides of multiples of {stride}, not {wrong[1]}×{wrong[0]} (--img-size)"
        )
    if args.rect and student.stride % stride:
        raise DataError(f"{path}: the teacher takes sides of multiples of {stride}, --rect makes others (leave it out)")


def save_teacher(teacher: Darknet, names: Sequence[str], folder: Path) -> None:
    """Keep an unfused teacher in a run's folder, so that the run can be resumed whatever becomes of its file."""
    if dist.is_first():
        described = {"cfg": dump(teacher.cfg), "cfg_path": teacher.cfg.path, "names": list(names)}
        content = described | {"model": teacher.state_dict()}
        save_checkpoint(folder / FILE, content)
