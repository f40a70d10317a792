"""What is taken for what: the confusion matrix of a detector, with the background as one more class."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from .labels import Labelled
from .protocols import truth_corners

IOU = 0.5  # of a detection and the truth that it is taken for


def confuse(results: list[dict[str, Any]], labelled: Labelled, classes: int, *, confidence: float) -> np.ndarray:
    """Count truths (rows) by what COCO results of at least `confidence` take them for (columns): [C+1, C+1].

    Detections and truths pair up one to one, first those of one class and then the rest, those that overlap most before
    others. The last column counts truths that were missed, the last row detections of nothing.
    """
    matrix = np.zeros((classes + 1, classes + 1), int)
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if result["score"] >= confidence:
            found[result["image_id"]].append(result)
    for image, rows in enumerate(labelled.labels):
        true = rows[:, 0].astype(int)
        seen = np.array([result["category_id"] for result in found[image]], int)
        boxes = torch.tensor([result["bbox"] for result in found[image]]).double().view(-1, 4)
        overlaps = box_iou(
            truth_corners(labelled.labels[image], labelled.sizes[image]), box_convert(boxes, "xywh", "xyxy")
        ).numpy()
        is_free, is_new = np.ones(len(true), bool), np.ones(len(seen), bool)
        near = np.argwhere(overlaps >= IOU)
        rank = overlaps + (true[:, None] == seen)  # a box may stand once for each of several classes
        for truth, place in near[np.argsort(-rank[overlaps >= IOU], kind="stable")]:
            if is_free[truth] and is_new[place]:
                is_free[truth] = is_new[place] = False
                matrix[true[truth], seen[place]] += 1
        matrix[:, -1] += np.bincount(true[is_free], minlength=classes + 1)
        matrix[-1] += np.bincount(seen[is_new], minlength=classes + 1)
    return matrix
