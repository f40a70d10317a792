"""What evaluation looks away from: the side files `ignore/<stem>.txt`, and judging as the datasets' protocols do.

A picture `images/a.jpg` may have, beside `labels/a.txt`, a file `ignore/a.txt` with `class x y w h kind` lines: xywh_n
as in labels, class -1 for every class. A detection that falls on one is neither true nor false. The kinds:

- `crowd`: by the share of the detection that lies inside, against each IoU threshold (COCO's iscrowd, VisDrone's score
  0, BDD100K's crowds);
- `difficult`: by IoU, as an object that need not be found (Pascal VOC);
- `region`: truths and detections that lie to one half or more inside are taken out beforehand (VisDrone,
  dropObjectsInIgr.m of https://github.com/VisDrone/VisDrone2018-DET-toolkit).
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from .labels import IGNORED_KINDS, Labelled

DIFFICULT, REGION = IGNORED_KINDS.index("difficult"), IGNORED_KINDS.index("region")


def drop_covered(results: list[dict[str, Any]], labelled: Labelled) -> tuple[list[dict[str, Any]], Labelled]:
    """Take out truths and detections (COCO results) of which one half or more lies in the regions of their picture."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        found[result["image_id"]].append(result)
    labels, dropped = list(labelled.labels), set()
    for image, rows in enumerate(labelled.ignored):
        regions = rows[rows[:, 5] == REGION, 1:5]
        if not len(regions):
            continue
        size = labelled.sizes[image]
        sums = _area_sums(_to_pixels(regions, size), size)
        labels[image] = labels[image][_covered(sums, _to_pixels(labels[image][:, 1:], size)) < 0.5]
        boxes = np.array([result["bbox"] for result in found[image]], float).reshape(-1, 4)
        inside = _covered(sums, boxes) >= 0.5
        dropped |= {id(result) for result, is_inside in zip(found[image], inside, strict=True) if is_inside}
    return [result for result in results if id(result) not in dropped], replace(labelled, labels=labels)


def ignored_truths(labelled: Labelled, classes: int) -> list[dict[str, Any]]:
    """Give crowds and difficult objects as COCO annotations without ids, one a class where the class is -1."""
    annotations = []
    for image, rows in enumerate(labelled.ignored):
        kept = rows[rows[:, 5] != REGION]
        boxes = _to_pixels(kept[:, 1:5], labelled.sizes[image]).tolist()
        for label, kind, box in zip(kept[:, 0].astype(int), kept[:, 5], boxes, strict=True):
            for category in range(classes) if label < 0 else (int(label),):
                truth = {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
                annotations.append({**truth, "iscrowd": 1, "is_difficult": kind == DIFFICULT})
    return annotations


def fall_on_ignored(results: list[dict[str, Any]], labelled: Labelled, classes: int, *, iou: float) -> np.ndarray:
    """Tell which detections (COCO results) [N] fall on a crowd or a difficult object of their class."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, result in enumerate(results):
        places[result["image_id"], result["category_id"]].append(place)
    truths: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for truth in ignored_truths(labelled, classes):
        truths[truth["image_id"], truth["category_id"]].append(truth)
    falls = np.zeros(len(results), bool)
    for key in places.keys() & truths.keys():
        boxes = [results[place]["bbox"] for place in places[key]]
        is_crowd = [not truth["is_difficult"] for truth in truths[key]]
        overlaps = mask.iou(boxes, [truth["bbox"] for truth in truths[key]], is_crowd)  # [detections, truths]
        falls[places[key]] = overlaps.max(1) >= iou
    return falls


class Judge(COCOeval):
    """pycocotools' evaluation that knows difficult objects: crowds that a detection meets by IoU."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """Compute overlaps [detections, truths]: with crowds, the share of the detection that lies inside."""
        difficult = [truth for truth in self._gts[imgId, catId] if truth.get("is_difficult")]
        for truth in difficult:
            truth["iscrowd"] = 0
        overlaps = super().computeIoU(imgId, catId)
        for truth in difficult:
            truth["iscrowd"] = 1  # ignored, and met by any number of detections
        return overlaps


def _to_pixels(boxes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Turn xywh_n boxes [N, 4] into left, top, width, height in pixels of a picture of `size` (height, width)."""
    x, y, w, h = boxes.astype(np.float64).T
    return np.stack(((x - w / 2) * size[1], (y - h / 2) * size[0], w * size[1], h * size[0]), axis=1)


def _area_sums(regions: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Sum up the pixels inside any region: [H+1, W+1]. Pixels count from 1, and a region has its end, as there."""
    height, width = size
    inside = np.zeros((height + 1, width + 1), np.int64)
    for left, top, w, h in np.maximum(1, np.floor(regions + 0.5).astype(int)):
        inside[top : top + h + 1, left : left + w + 1] = 1
    return inside.cumsum(0).cumsum(1)


def _covered(sums: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Give the share of each box (left, top, width, height) that lies in the regions, by the toolkit's own rounding."""
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    left, top, w, h = np.maximum(1, np.floor(boxes + 0.5).astype(int)).T  # MATLAB's round()
    right, bottom = np.minimum(width, left + w), np.minimum(height, top + h)
    left, top = np.minimum(width, left), np.minimum(height, top)
    return (sums[bottom, right] + sums[top, left] - sums[top, right] - sums[bottom, left]) / (w * h)
