"""Which heads of a teacher a student's heads learn from: heads of one stride, in them anchors of one shape, and the
maps that they read."""

from collections.abc import Sequence
from typing import NamedTuple

from models import Darknet
from models.yolo import HeadSpec

from . import feature_distillation as features
from . import output_distillation as outputs
from .log import DataError

KINDS = (*outputs.STRATEGIES, *features.STRATEGIES)
MAX_RATIO = 1.25  # anchors are alike whose sides differ by less than this factor: such boxes overlap by 0.64 at least


class Pair(NamedTuple):
    """Heads of one stride, by their places in `heads`, and their anchors that are alike (student's, teacher's)."""

    student: int
    teacher: int
    anchors: tuple[tuple[int, int], ...]


def find_pairs(student: Darknet, teacher: Darknet, kinds: Sequence[str]) -> tuple[dict[str, list[Pair]], list[str]]:
    """Give for each of the strategies `kinds` the heads that it has a meaning for, and lines on those left alone.

    Raises DataError where a strategy suits no head at all.
    """
    pairs = [_partner(place, head, teacher.heads) for place, head in enumerate(student.heads)]
    obstacles = {kind: [_obstacle(kind, student, teacher, pair) for pair in pairs] for kind in KINDS}
    useful = [kind for kind in KINDS if "" in obstacles[kind]]
    lines = []
    for kind in kinds:
        reasons = [
            f"stride {min(head.stride):g}: {why}"
            for head, why in zip(student.heads, obstacles[kind], strict=True)
            if why
        ]
        if kind not in useful:
            raise DataError(
                f"--kd {kind}: no head of {student.cfg.path} has a partner in {teacher.cfg.path}: {'; '.join(reasons)}"
                f" ({', '.join(useful) or 'no strategy'} would suit them)"
            )
        if reasons:
            lines.append(f"--kd {kind}: heads without a partner: {'; '.join(reasons)}")
    found = {
        kind: [pair for pair, why in zip(pairs, obstacles[kind], strict=True) if pair and not why] for kind in kinds
    }
    return found, lines


def feature_layer(model: Darknet, head: HeadSpec) -> int:
    """Give the layer whose map the last convolution before a head reads; -1 is the picture.

    Where several convolutions make up what the head gets, it is the first one's.
    """
    index = head.layer
    while index >= 0 and not model.layers[index].sets_channels:
        index = model.layers[index].inputs[0]
    return model.layers[index].inputs[0] if index >= 0 else -1


def _partner(place: int, own: HeadSpec, teacher: Sequence[HeadSpec]) -> Pair | None:
    """Give the teacher's head of a head's stride, of several the one most like it."""
    found = [Pair(place, other, _alike(own, spec)) for other, spec in enumerate(teacher) if spec.stride == own.stride]
    return max(found, key=lambda pair: len(pair.anchors), default=None)


def _alike(own: HeadSpec, other: HeadSpec) -> tuple[tuple[int, int], ...]:
    """Pair each anchor with the nearest of the other head, where it is near enough."""
    pairs = []
    for place, anchor in enumerate(own.anchors):
        away = [max(max(a / b, b / a) for a, b in zip(anchor, each, strict=True)) for each in other.anchors]
        if away and min(away) < MAX_RATIO:
            pairs.append((place, away.index(min(away))))
    return tuple(pairs)


def _obstacle(kind: str, student: Darknet, teacher: Darknet, pair: Pair | None) -> str:
    """Say why a strategy has no meaning for two heads, or nothing."""
    if not pair:
        return "no head of the teacher has this stride"
    own, other = student.heads[pair.student], teacher.heads[pair.teacher]
    if kind in features.STRATEGIES:
        maps = [feature_layer(student, own), feature_layer(teacher, other)]
        if min(maps) < 0:
            return "a head reads the picture itself"
        is_alike = student.layers[maps[0]].stride == teacher.layers[maps[1]].stride
        return "" if is_alike else "the maps that the heads read differ in stride"
    if not pair.anchors:
        return f"no anchor is within a factor of {MAX_RATIO:g} of one of the teacher's"
    return outputs.obstacle(kind, own, other)
