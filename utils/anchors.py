"""Anchors for a dataset: k-means over the sizes of its boxes, refined by mutation, and how well they fit.

The distance is 1 - IoU of boxes with one centre, as in YOLOv2 (https://arxiv.org/abs/1612.08242, section 2): with the
Euclidean one large boxes would count more than small ones. numpy alone; 340,000 boxes take a second.
"""

from typing import NamedTuple

import numpy as np

from .labels import Labelled
from .log import DataError, log

SAMPLE = 10_000  # boxes that the search looks at; of these every anchor has hundreds
ROUNDS = 100  # of k-means at most
MUTATIONS = 500
SPREAD = 0.1  # standard deviation of a mutation, in the logarithm of a side


class AnchorFit(NamedTuple):
    """How well anchors fit boxes: the share that some anchor takes in training, and the mean IoU of the best one."""

    recall: float
    iou: float


def fit_anchors(sizes: np.ndarray, count: int, *, ratio: float, seed: int = 0) -> np.ndarray:
    """Find `count` distinct anchors for boxes.

    `sizes` [N, 2] are widths and heights in the pixels that the anchors [count, 2] are wanted in; the anchors are
    sorted by area. Mutations raise the mean best IoU over the boxes that an anchor takes, those whose sides differ from
    its own by less than the factor `ratio`. Where the boxes have fewer sizes than `count`, larger copies of them fill
    up and a line says so. Raises DataError where there is no box.
    """
    if not len(sizes):
        raise DataError("anchors: there are no boxes to fit them to (give them as a list)")
    generator = np.random.default_rng(seed)
    distinct = np.unique(sizes, axis=0).astype(np.float64)
    if len(distinct) <= count:
        anchors = distinct
        if len(distinct) < count:
            log.info("anchors: the boxes have %d sizes, fewer than %d anchors: enlarged copies", len(distinct), count)
            anchors = _filled(distinct, count)
    else:
        sample = np.asarray(sizes, np.float64)
        if len(sample) > SAMPLE:
            sample = sample[generator.choice(len(sample), SAMPLE, replace=False)]
        start = _start(sample if len(np.unique(sample, axis=0)) > count else distinct, count, generator)
        anchors = _mutated(sample, _settled(sample, start), ratio, generator)
    return anchors[np.lexsort((anchors[:, 0], anchors.prod(1)))]


def anchor_fit(sizes: np.ndarray, anchors: np.ndarray, *, ratio: float) -> AnchorFit:
    """Judge anchors [K, 2] by boxes [N, 2], both in the same pixels."""
    best, is_taken = _best(sizes, anchors, ratio)
    return AnchorFit(float(is_taken.mean()), float(best.mean()))


def rounded(anchors: np.ndarray) -> np.ndarray:
    """Round anchors to whole pixels, or to decimals where they would be no longer distinct or no longer above 0."""
    for decimals in range(4):
        tried = anchors.round(decimals)
        if (tried > 0).all() and len(np.unique(tried, axis=0)) == len(anchors):
            return tried
    return anchors


def box_sizes(labelled: Labelled, size: tuple[int, int]) -> np.ndarray:
    """Give width and height [N, 2] of all boxes in pixels of a network input of `size` (height, width), letterboxed."""
    pictures = labelled.sizes.astype(np.float64)  # [P, 2] (height, width)
    scales = np.min(np.array(size) / pictures, axis=1)  # [P]
    wh_px = (pictures * scales[:, None])[:, ::-1]  # [P, 2] of the picture in the input
    counts = [len(rows) for rows in labelled.labels]
    wh_n = np.concatenate([rows[:, 3:5] for rows in labelled.labels]) if counts else np.zeros((0, 2))
    return wh_n * np.repeat(wh_px, counts, axis=0)  # [N, 2]


def _ious(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Give the IoU [K, N] of boxes with one centre."""
    (w, h), (W, H) = sizes.T, anchors.T[:, :, None]
    overlap = np.minimum(w, W) * np.minimum(h, H)
    return overlap / (w * h + W * H - overlap)


def _best(sizes: np.ndarray, anchors: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Give each box's best IoU with an anchor, and whether its sides differ from some anchor's by less than `ratio`."""
    (w, h), (W, H) = sizes.T, anchors.T[:, :, None]
    larger = np.maximum(np.maximum(w / W, W / w), np.maximum(h / H, H / h))  # [K, N]
    return _ious(sizes, anchors).max(0), larger.min(0) < ratio


def _start(sizes: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the first anchors among the boxes as k-means++ does: those far from the ones drawn are likelier."""
    chosen = [sizes[generator.integers(len(sizes))]]
    far = np.full(len(sizes), np.inf)
    while len(chosen) < count:
        far = np.minimum(far, 1 - _ious(sizes, chosen[-1][None])[0])
        weights = np.maximum(far, 0) ** 2
        chosen.append(sizes[generator.choice(len(sizes), p=weights / weights.sum())])
    return np.array(chosen)


def _settled(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Move every anchor to the mean of the boxes nearest to it, until no box changes sides."""
    nearest = np.full(len(sizes), -1)
    for _ in range(ROUNDS):
        before, nearest = nearest, _ious(sizes, anchors).argmax(0)
        if np.array_equal(before, nearest):
            break
        members = np.bincount(nearest, minlength=len(anchors))[:, None]  # [K, 1]
        sums = np.stack([np.bincount(nearest, side, minlength=len(anchors)) for side in sizes.T], axis=1)
        anchors = np.where(members > 0, sums / np.maximum(members, 1), anchors)
    return anchors


def _mutated(sizes: np.ndarray, anchors: np.ndarray, ratio: float, generator: np.random.Generator) -> np.ndarray:
    """Change some sides at random again and again and keep what fits better and leaves the anchors distinct."""

    def fitness(anchors: np.ndarray) -> float:
        best, is_taken = _best(sizes, anchors, ratio)
        return float((best * is_taken).mean())

    record = fitness(anchors)
    for _ in range(MUTATIONS):
        is_changed = generator.random(anchors.shape) < 0.5
        mutant = anchors * np.exp(SPREAD * is_changed * generator.standard_normal(anchors.shape))
        score = fitness(mutant)
        if score > record and len(np.unique(mutant, axis=0)) == len(mutant):
            anchors, record = mutant, score
    return anchors


def _filled(distinct: np.ndarray, count: int) -> np.ndarray:
    """Add copies, each 1.25 times as large as the one before, that equal no size."""
    anchors = [*distinct]
    for place in range(count - len(distinct)):
        copy = distinct[place % len(distinct)]
        while any(np.allclose(copy, anchor) for anchor in anchors):
            copy = copy * 1.25
        anchors.append(copy)
    return np.array(anchors)
