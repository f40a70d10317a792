"""What is wrong with a dataset, and what is odd: findings by kind, each with its file and line."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from .anchors import anchor_fit, box_sizes, fit_anchors, rounded
from .charts import STRIDES, count_classes
from .lists import label_path
from .recipe import Recipe
from .survey import Look, orphans, readable

ALIKE = 24  # of 128 bits, up to which two pictures look alike; measured: docs/dataset-check.md
REPEATED_IOU = 0.95  # from which two boxes of one class are one object labelled twice
PAST = 0.005  # of a picture's side that a box may reach past its border, rounding aside
BLOCK = 2048  # pictures compared with all others at once
DOT = 2  # pixels, under which a box holds nothing to learn


class Kind(NamedTuple):
    """A sort of finding; training refuses a dataset with a problem, or its figures mean nothing."""

    title: str
    is_problem: bool = False


KINDS = {
    "list": Kind("lists that cannot be read", True),
    "missing": Kind("images that are not there", True),
    "corrupt": Kind("images that cannot be read to their end", True),
    "line": Kind("label lines that are no `class x y w h`", True),
    "class": Kind("boxes of a class that there is not", True),
    "degenerate": Kind("boxes without an area", True),
    "outside": Kind("boxes with their centre outside the image, or in pixels", True),
    "ignore": Kind("lines of ignore files that are no `class x y w h kind`", True),
    "bare": Kind("splits without any label file", True),
    "leaked": Kind("images of valid that are in train too", True),
    "alike": Kind("images of valid that look like one in train"),
    "copy": Kind("images that stand twice in a split"),
    "unlabelled": Kind("images without a label file"),
    "orphan": Kind("label files without an image"),
    "past": Kind("boxes that reach past the border"),
    "repeated": Kind("boxes that are labelled twice"),
    "dot": Kind(f"boxes with a side under {DOT} pixels at this size"),
    "absent": Kind("classes without a box in a split"),
}


def find(splits: Mapping[str, list[Look]], names: tuple[str, ...], size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of everything that is wrong or odd; `size` (height, width) is the network input's."""
    for split, looks in splits.items():
        for each in looks:
            yield from _in_one(each, size)
        if not any(each.has_labels for each in looks):
            yield "bare", f"{split}: no image has a label file (expected one like {label_path(looks[0].path)})"
        yield from _copies(split, looks)
        counts = count_classes(readable(looks), len(names))
        yield from (("absent", f"{split}: {name}") for name, count in zip(names, counts, strict=True) if not count)
    yield from (("orphan", path) for path in orphans([each for looks in splits.values() for each in looks]))
    if len(splits) > 1:
        yield from _leaks(*splits.values())


def _in_one(each: Look, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Judge one image and its labels."""
    if each.problem:
        yield ("missing" if "no such image" in each.problem else "corrupt"), each.problem
    if not each.has_labels:
        yield "unlabelled", each.path
    yield from each.mistakes
    corners = box_convert(torch.from_numpy(each.rows[:, 1:]).double(), "cxcywh", "xyxy")
    texts = [f"{label_path(each.path)}:{line}" for line in each.lines]
    over = torch.maximum(-corners, corners - 1).amax(1) if len(corners) else []
    yield from (("past", f"{text}: by {share:.1%}") for text, share in zip(texts, over, strict=True) if share > PAST)
    same = box_iou(corners, corners).triu(1) * torch.from_numpy(each.rows[:, :1] == each.rows[:, 0])
    yield from (
        ("repeated", f"{texts[second]}: as line {each.lines[first]}")
        for first, second in (same >= REPEATED_IOU).nonzero().tolist()
    )
    if not each.problem:
        sides = box_sizes(readable([each]), size)
        yield from (
            ("dot", f"{text}: {w:.1f} x {h:.1f}") for text, (w, h) in zip(texts, sides, strict=True) if min(w, h) < DOT
        )


def _copies(split: str, looks: list[Look]) -> Iterator[tuple[str, str]]:
    first: dict[bytes, str] = {}
    for each in looks:
        if not each.problem and each.content in first:
            yield "copy", f"{split}: {each.path} is {first[each.content]}"
        first.setdefault(each.content, each.path)


def _leaks(train: list[Look], valid: list[Look]) -> Iterator[tuple[str, str]]:
    """Find images of `valid` that are in `train` byte for byte, or look like one there."""
    known = {each.content: each.path for each in train if not each.problem}
    rest = []
    for each in valid:
        if not each.problem and each.content in known:
            yield "leaked", f"{each.path} is {known[each.content]}"
        elif each.likeness is not None:
            rest.append(each)
    shown = [each for each in train if each.likeness is not None]
    for each, (distance, place) in zip(rest, nearest(rest, shown), strict=True):
        if distance <= ALIKE:
            yield "alike", f"{each.path} looks like {shown[place].path} ({distance} of 128 bits differ)"


def nearest(looks: list[Look], others: list[Look]) -> list[tuple[int, int]]:
    """Give the least distance in bits, 128 at most, and place of the picture of `others` most like each of `looks`."""
    if not looks or not others:
        return [(129, -1)] * len(looks)
    ours, theirs = (np.stack([each.likeness for each in group]) for group in (looks, others))  # [N, 2], [M, 2]
    found = []
    for start in range(0, len(ours), BLOCK):
        block = ours[start : start + BLOCK, None]
        best, place = np.full(len(block), 129), np.full(len(block), -1)
        for begin in range(0, len(theirs), BLOCK):
            distances = np.bitwise_count(block ^ theirs[None, begin : begin + BLOCK]).sum(-1, dtype=np.int64)
            nearer, least = distances.argmin(1), distances.min(1)
            place = np.where(least < best, begin + nearer, place)
            best = np.minimum(best, least)
        found += list(zip(best.tolist(), place.tolist(), strict=True))
    return found


def describe_split(looks: list[Look], names: tuple[str, ...], size: tuple[int, int]) -> dict[str, object]:
    """Count a split's images and boxes, each class's, and how many boxes fall under a cell at the network's size."""
    labelled = readable(looks)
    sides = box_sizes(labelled, size) if labelled.paths else np.zeros((0, 2))
    boxes = count_classes(labelled, len(names))
    images = Counter(int(label) for rows in labelled.labels for label in np.unique(rows[:, 0]))
    return {
        "images": len(looks),
        "boxes": len(sides),
        "per_class": {
            name: {"boxes": int(count), "images": images[label]}
            for label, (name, count) in enumerate(zip(names, boxes, strict=True))
        },
        "under_cell": {str(stride): int((sides.max(1) < stride).sum()) for stride in STRIDES},
        "under_2px": int((sides.min(1) < DOT).sum()),
    }


def suggest_anchors(looks: list[Look], size: tuple[int, int], count: int) -> dict[str, object]:
    """Fit anchors to the boxes of a split; the recall is the share of boxes that an anchor takes in training."""
    labelled = readable(looks)
    sides = box_sizes(labelled, size) if labelled.paths else np.zeros((0, 2))
    if not len(sides):
        return {"anchors": [], "recall": 0.0, "iou": 0.0}
    anchors = rounded(fit_anchors(sides, count, ratio=Recipe.anchor_ratio))
    fit = anchor_fit(sides, anchors, ratio=Recipe.anchor_ratio)
    return {"anchors": anchors.tolist(), "recall": fit.recall, "iou": fit.iou}


def gather(found: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Collect findings by kind, in the order of KINDS."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for kind, text in found:
        by_kind[kind].append(text)
    return {kind: by_kind[kind] for kind in KINDS if kind in by_kind}
