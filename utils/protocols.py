"""Average precision as Pascal VOC and Darknet define it; COCO's is pycocotools' own, in utils/evaluate.py.

Both match a detection to the truth of its class that it overlaps most, whether that is taken or not; a truth counts
once. They differ from COCO there: pycocotools looks for the best truth that is still free. docs/evaluation.md tells
what else differs.

VOC: https://www.robots.ox.ac.uk/~vgg/projects/pascal/VOC/voc2012/devkit_doc.pdf, sections 3.4.1 and 4.4; Darknet:
`detector map` of https://github.com/AlexeyAB/darknet
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from .labels import Labelled
from .scores import Ranked, interpolate

IOUS = np.linspace(0.5, 0.95, 10)
OPTIONAL = -2  # stands for a truth that need not be found, such as VOC's difficult ones; -1 for none


@dataclass(frozen=True)
class Protocol:
    """How average precision is taken, and which detections a protocol asks for where no flag says otherwise.

    `points` of recall are averaged, 0 is the area under the interpolated curve. With a `confidence`, precision and
    recall are those at it, and means go over all classes, also those without truths.
    """

    name: str
    points: int = 0
    conf_thres: float = 0.001
    iou_thres: float = 0.6
    is_clipped: bool = True  # boxes to the picture
    is_strict: bool = False  # a hit overlaps more than the threshold, not just as much
    confidence: float | None = None


COCO = Protocol("coco", points=101)
# Darknet's thresholds: thresh, nms and thresh_calc_avg_iou of `detector map`
DARKNET = Protocol("darknet", conf_thres=0.005, iou_thres=0.45, is_clipped=False, is_strict=True, confidence=0.25)
PROTOCOLS = {each.name: each for each in (COCO, Protocol("voc"), Protocol("voc07", points=11), DARKNET)}


def rank(
    results: list[dict[str, Any]], labelled: Labelled, classes: int, protocol: Protocol, *, ious: np.ndarray = IOUS
) -> tuple[list[Ranked], np.ndarray]:
    """Match COCO results with the truths of VOC or Darknet, class by class.

    Returns every class at the first of the `ious`, and its average precision at all of them [len(ious), classes].
    """
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, result in enumerate(results):
        found[result["category_id"], result["image_id"]].append(place)
    overlaps, nearest = np.zeros(len(results)), np.full(len(results), -1)
    counts, groups = [0] * classes, [[] for _ in range(classes)]
    for image, rows in enumerate(labelled.labels):
        ignored = labelled.ignored[image] if labelled.ignored else np.zeros((0, 6))
        boxes, others = (
            truth_corners(each, labelled.sizes[image], is_clipped=protocol.is_clipped) for each in (rows, ignored)
        )
        for label in range(classes):
            own = (rows[:, 0] == label).nonzero()[0]
            optional = np.isin(ignored[:, 0], (label, -1)).nonzero()[0]
            places = found.get((label, image), [])
            groups[label] += places
            if len(own) + len(optional) and places:
                corners = box_convert(
                    torch.tensor([results[place]["bbox"] for place in places]).double(), "xywh", "xyxy"
                )
                best = box_iou(corners, torch.cat((boxes[own], others[optional]))).max(1)
                overlaps[places] = best.values
                nearest[places] = torch.where(best.indices < len(own), counts[label] + best.indices, OPTIONAL)
            counts[label] += len(own)
    ranked, average_precision = [], np.zeros((len(ious), classes))
    scores = np.array([result["score"] for result in results], float)
    for label, truths in enumerate(counts):
        places = np.array(groups[label], int)
        order = places[np.argsort(-scores[places], kind="stable")]
        hits = [_hits(overlaps[order], nearest[order], iou, is_strict=protocol.is_strict) for iou in ious]
        average_precision[:, label] = [
            average(is_hit[is_judged], truths, points=protocol.points) for is_hit, is_judged in hits
        ]
        is_hit, is_judged = hits[0]
        ranked.append(Ranked(scores[order][is_judged], is_hit[is_judged], truths))
    return ranked, average_precision


def truth_corners(rows: np.ndarray, size: np.ndarray, *, is_clipped: bool = True) -> torch.Tensor:
    """Give rows of class and xywh_n in a picture of `size` (height, width) as xyxy_px [N, 4], float64."""
    h, w = size.tolist()
    scale = torch.tensor([w, h, w, h], dtype=torch.float64)
    corners = box_convert(torch.from_numpy(rows[:, 1:5]).double() * scale, "cxcywh", "xyxy")
    return corners.clamp_min(0).minimum(scale) if is_clipped else corners


def average(is_hit: np.ndarray, truths: int, *, points: int) -> float:
    """Give the average precision of detections, the best first: the area, or the mean over `points` of recall."""
    if not truths or not len(is_hit):
        return 0.0
    hits = np.cumsum(is_hit)
    if points:
        return float(interpolate(hits, truths, np.arange(points) / (points - 1)).mean())
    # each hit adds 1 / truths of recall at the best precision there or beyond
    return float(interpolate(hits, truths, np.arange(1, hits[-1] + 1) / truths).sum() / truths)


def _hits(overlaps: np.ndarray, nearest: np.ndarray, iou: float, *, is_strict: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tell which detections, best first, are the first on their truth, and which count: those on no optional one."""
    is_over = (overlaps > iou) if is_strict else (overlaps >= iou)
    (places,) = (is_over & (nearest >= 0)).nonzero()
    _, first = np.unique(nearest[places], return_index=True)
    is_hit = np.zeros(len(overlaps), bool)
    is_hit[places[first]] = True
    return is_hit, ~(is_over & (nearest == OPTIONAL))
