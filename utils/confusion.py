"""What is taken for what: the confusion matrix of a detector, with the background as one more class."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from .ignored import fall_on_ignored
from .labels import Labelled
from .protocols import truth_corners

IOU = 0.5  # of a detection and the truth that it is taken for


def confuse(results: list[dict[str, Any]], labelled: Labelled, classes: int, *, confidence: float) -> np.ndarray:
    """Count truths (rows) by what COCO results of at least `confidence` take them for (columns): [C+1, C+1].

    Detections and truths pair up one to one, first those of one class and then the rest, those that overlap most before
    others. The last column counts truths that were missed, the last row detections of nothing. What falls on a crowd or
    a difficult object of its class counts only where it finds a truth of that class.
    """
    matrix = np.zeros((classes + 1, classes + 1), int)
    results = [result for result in results if result["score"] >= confidence]
    is_excused = fall_on_ignored(results, labelled, classes, iou=IOU)
    found: dict[int, list[int]] = defaultdict(list)
    for place, result in enumerate(results):
        found[result["image_id"]].append(place)
    for image, rows in enumerate(labelled.labels):
        true = rows[:, 0].astype(int)
        seen = np.array([results[place]["category_id"] for place in found[image]], int)
        boxes = torch.tensor([results[place]["bbox"] for place in found[image]]).double().view(-1, 4)
        overlaps = box_iou(
            truth_corners(labelled.labels[image], labelled.sizes[image]), box_convert(boxes, "xywh", "xyxy")
        ).numpy()
        is_free, is_new = np.ones(len(true), bool), np.ones(len(seen), bool)
        is_same = true[:, None] == seen
        is_near = (overlaps >= IOU) & (is_same | ~is_excused[found[image]])
        rank = overlaps + is_same  # a box may stand once for each of several classes
        for truth, place in np.argwhere(is_near)[np.argsort(-rank[is_near], kind="stable")]:
            if is_free[truth] and is_new[place]:
                is_free[truth] = is_new[place] = False
                matrix[true[truth], seen[place]] += 1
        is_new &= ~is_excused[found[image]]
        matrix[:, -1] += np.bincount(true[is_free], minlength=classes + 1)
        matrix[-1] += np.bincount(seen[is_new], minlength=classes + 1)
    return matrix
