"""Detect on every image, and judge: by pycocotools, or by the protocol of Pascal VOC or Darknet."""

import contextlib
import io
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from . import dist
from .boxes import non_maximum_suppression
from .datasets import Pictures, evaluation_batches, make_loader, to_input
from .device import synchronize
from .ignored import Judge, drop_covered, ignored_truths
from .labels import Labelled
from .log import DataError
from .network import Network
from .predict import predict
from .protocols import COCO as COCO_PROTOCOL
from .protocols import Protocol, rank
from .scores import Evaluation, Ranked, summarise


@dataclass(frozen=True)
class Settings:
    """How detections are made: network size (height, width), thresholds and the number kept per image."""

    size: tuple[int, int]
    conf_thres: float = 0.001
    iou_thres: float = 0.6
    max_det: int = 100
    batch_size: int = 16
    workers: int = 0
    is_rectangular: bool = True
    is_stretched: bool = False
    is_augmented: bool = False
    is_single_class: bool = False
    protocol: Protocol = COCO_PROTOCOL


def evaluate(
    model: Network,
    labelled: Labelled,
    names: tuple[str, ...],
    settings: Settings,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Detect on every image and judge; returns the evaluation and the detections in COCO's results format."""
    results, clock = detect_all(model, labelled, settings, device=device, dtype=dtype)
    ms = {stage: 1000 * dist.world_size() * seconds / len(labelled.paths) for stage, seconds in clock.items()}
    results = dist.gather(results)

    def judge_all() -> Evaluation:
        return judge(results, labelled, names, max_det=settings.max_det, ms_per_image=ms, protocol=settings.protocol)

    return dist.from_first(judge_all), results


@torch.inference_mode()
def detect_all(
    model: Network, labelled: Labelled, settings: Settings, *, device: torch.device, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Detect on every image: COCO results (image_id and category_id 0-based, bbox xywh of the picture) and seconds.

    Of several processes each does its part. The clock has three stages: preprocess (waiting for the loader and moving
    to the device), forward (with decoding) and nms.
    """
    model.eval()
    pictures = Pictures(labelled, model.channels, is_stretched=settings.is_stretched)
    batches = evaluation_batches(
        labelled.sizes,
        settings.batch_size,
        settings.size,
        model.stride,
        is_rectangular=settings.is_rectangular and not settings.is_stretched,
    )
    results: list[dict[str, Any]] = []
    clock = {"preprocess": 0.0, "forward": 0.0, "nms": 0.0}
    start = time.perf_counter()
    loader = make_loader(pictures, dist.share(batches), workers=settings.workers)
    for batch in dist.progress(loader, desc="testing", unit="batch", leave=False):
        if batch.problem:
            raise DataError(batch.problem)
        x = to_input(batch.pictures, device)
        start = _lap(clock, "preprocess", start, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            boxes, scores = predict(model, x, is_augmented=settings.is_augmented)
        if settings.is_single_class:
            scores = scores.amax(-1, keepdim=True)
        start = _lap(clock, "forward", start, device)
        for place, (index, fit) in enumerate(zip(batch.indices, batch.fits, strict=True)):
            found = non_maximum_suppression(
                boxes[place],
                scores[place],
                conf_thres=settings.conf_thres,
                iou_thres=settings.iou_thres,
                max_det=settings.max_det,
                diou_beta=model.diou_beta,
            )
            corners = fit.to_picture(found[:, :4], is_clipped=settings.protocol.is_clipped)
            corners[:, 2:] -= corners[:, :2]
            results += [
                {"image_id": index, "category_id": int(label), "bbox": box, "score": score}
                for box, score, label in zip(corners.tolist(), found[:, 4].tolist(), found[:, 5].tolist(), strict=True)
            ]
        start = _lap(clock, "nms", start, device)
    return results, clock


def judge(
    results: list[dict[str, Any]],
    labelled: Labelled,
    names: tuple[str, ...],
    *,
    max_det: int,
    ms_per_image: dict[str, float] | None = None,
    protocol: Protocol = COCO_PROTOCOL,
) -> Evaluation:
    """Judge COCO results against the labels, with pycocotools unless another `protocol` is given.

    What the pictures' ignore files name counts neither way (utils/ignored.py). Classes without truths do not count in
    the means, but in those of Darknet's protocol.
    """
    results, labelled = drop_covered(results, labelled)
    if protocol.name == "coco":
        ranked, ap = _judge_coco(results, labelled, names, max_det)
    else:
        ranked, ap = rank(results, labelled, len(names), protocol)
    images, ms = len(labelled.paths), ms_per_image or {}
    return summarise(ranked, ap, names, images=images, ms_per_image=ms, confidence=protocol.confidence)


def _judge_coco(
    results: list[dict[str, Any]], labelled: Labelled, names: tuple[str, ...], max_det: int
) -> tuple[list[Ranked], np.ndarray]:
    """Give what every class found at IoU .5 and its average precision [10 IoUs, classes], by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = _coco_truth(labelled, names)
        truth.createIndex()
        detections = [dict(result) for result in results]  # loadRes writes into what it is given
        judged = Judge(truth, truth.loadRes(detections) if results else COCO(), "bbox")
        judged.params.maxDets = [max_det]  # pycocotools sorts these and takes the last
        judged.params.imgIds = list(range(len(labelled.paths)))
        judged.params.catIds = list(range(len(names)))
        judged.evaluate()
        judged.accumulate()
    precision = judged.eval["precision"][:, :, :, 0, -1]  # [10 IoUs, 101 recalls, classes], -1 without truths
    truths = np.bincount(np.concatenate([rows[:, 0] for rows in labelled.labels]).astype(int), minlength=len(names))
    ranked = [_matched(judged, index, int(count)) for index, count in enumerate(truths)]
    return ranked, precision.mean(1).clip(0)


def _coco_truth(labelled: Labelled, names: tuple[str, ...]) -> dict[str, Any]:
    annotations = []
    for index, ((h, w), rows) in enumerate(zip(labelled.sizes.tolist(), labelled.labels, strict=True)):
        corners = box_convert(torch.from_numpy(rows[:, 1:]) * torch.tensor([w, h, w, h]), "cxcywh", "xyxy")
        corners = corners.clamp_min(0).minimum(torch.tensor([w, h, w, h]))  # as the picture clips what it shows
        sides = corners[:, 2:] - corners[:, :2]
        for label, (x, y), (bw, bh) in zip(rows[:, 0], corners[:, :2].tolist(), sides.tolist(), strict=True):
            annotations.append(
                {
                    "image_id": index,
                    "category_id": int(label),
                    "bbox": [x, y, bw, bh],
                    "area": bw * bh,
                    "iscrowd": 0,
                }
            )
    annotations += ignored_truths(labelled, len(names))
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number  # pycocotools takes id 0 for "no match"
    return {
        "info": {},
        "images": [{"id": index, "width": w, "height": h} for index, (h, w) in enumerate(labelled.sizes.tolist())],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
        "annotations": annotations,
    }


def _matched(judged: COCOeval, category: int, truths: int) -> Ranked:
    """Give the detections of a class at IoU .5, from pycocotools' own matches."""
    images = len(judged.params.imgIds)
    start = category * len(judged.params.areaRng) * images
    matched = [found for found in judged.evalImgs[start : start + images] if found]
    if not matched:
        return Ranked(np.zeros(0), np.zeros(0, bool), truths)
    is_counted = np.concatenate([~found["dtIgnore"][0].astype(bool) for found in matched])
    scores = np.concatenate([found["dtScores"] for found in matched])[is_counted]
    is_true = np.concatenate([found["dtMatches"][0] > 0 for found in matched])[is_counted]
    return Ranked(scores, is_true, truths)


def _lap(clock: dict[str, float], stage: str, start: float, device: torch.device) -> float:
    synchronize(device)
    now = time.perf_counter()
    clock[stage] += now - start
    return now
