"""Boxes in the pixels of a picture and of the network input, and what remains of them after NMS."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, box_iou

MAX_CANDIDATES = 5000  # boxes that enter NMS, the best by score: 30000 give the same mAP, but take seconds untrained
FAR = 1e6  # px, farther than any picture reaches


@dataclass(frozen=True)
class Fit:
    """How a picture of `shape` (height, width) lies in the network input: `scale` (y, x), then `offset` (top, left)."""

    shape: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]

    def to_picture(self, boxes: Tensor, *, is_clipped: bool = True) -> Tensor:
        """Move xyxy_px boxes [N, 4] of the network input into the picture and, where asked, clip them to it."""
        (h, w), (sy, sx), (top, left) = self.shape, self.scale, self.offset
        shift = boxes.new_tensor([left, top, left, top])
        factor = boxes.new_tensor([sx, sy, sx, sy])
        moved = (boxes - shift) / factor
        return moved.clamp_min(0).minimum(boxes.new_tensor([w, h, w, h])) if is_clipped else moved

    def to_input(self, boxes: np.ndarray) -> np.ndarray:
        """Move xyxy_px boxes [N, 4] of the picture into the network input."""
        (sy, sx), (top, left) = self.scale, self.offset
        return boxes * (sx, sy, sx, sy) + (left, top, left, top)


def scaled_size(size: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    """Scale (height, width) to the nearest multiples of `stride`, at least one."""
    height, width = (max(1, round(side * scale / stride)) * stride for side in size)
    return height, width


def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    *,
    conf_thres: float,
    iou_thres: float,
    max_det: int,
    is_agnostic: bool = False,
    classes: list[int] | None = None,
    diou_beta: float | None = None,
) -> Tensor:
    """Keep the best boxes of one picture.

    `boxes` [N, 4] are xywh_px, `scores` [N, C] objectness times class. As in Darknet a box counts once for every class
    whose score is above `conf_thres`, and suppression goes class by class unless `is_agnostic`. `classes` keeps only
    those; `diou_beta` makes the distance of centres count too. Returns [M, 6]: xyxy_px, score, class, the best first.
    """
    if classes is not None:
        wanted = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        wanted[classes] = True
        scores = scores * wanted
    rows, labels = (scores > conf_thres).nonzero(as_tuple=True)
    values = scores[rows, labels]
    if len(values) > MAX_CANDIDATES:
        values, best = values.topk(MAX_CANDIDATES)
        rows, labels = rows[best], labels[best]
    corners = box_convert(boxes[rows], "cxcywh", "xyxy")
    finite = corners.isfinite().all(1)  # an untrained head may put out infinite sizes
    corners, values, labels = corners[finite], values[finite], labels[finite]
    # batched_nms moves classes apart by offsets, which is exact only for positive coordinates in float64
    moved, ranks = corners.double().clamp(-FAR, FAR) + FAR, values.double()
    groups = torch.zeros_like(labels) if is_agnostic else labels
    if diou_beta is None:
        keep = batched_nms(moved, ranks, groups, iou_thres)[:max_det]
    else:
        keep = diou_nms(moved, ranks, groups, iou_thres, beta=diou_beta, max_det=max_det)
    return torch.cat((corners[keep], values[keep, None], labels[keep, None].to(corners.dtype)), dim=1)  # [M, 6]


def diou_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thres: float, *, beta: float, max_det: int) -> Tensor:
    """Keep boxes [N, 4] xyxy_px greedily within each group; boxes with centres far apart suppress each other less.

    The overlap is IoU - (d / c) ** beta, with d the squared distance of the centres and c the squared diagonal of the
    box around both (https://arxiv.org/abs/1911.08287, Darknet's `diounms`). Returns indices, the best first.
    """
    order, keep = scores.argsort(descending=True, stable=True), []
    while len(order) and len(keep) < max_det:
        best, order = order[0], order[1:]
        keep.append(best)
        first, others = boxes[best], boxes[order]
        low, high = torch.minimum(first[:2], others[:, :2]), torch.maximum(first[2:], others[:, 2:])
        diagonal = (high - low).square().sum(1)
        distance = ((first[:2] + first[2:] - others[:, :2] - others[:, 2:]) / 2).square().sum(1)
        overlap = box_iou(first[None], others)[0] - (distance / diagonal.clamp_min(1e-9)) ** beta
        order = order[(overlap <= iou_thres) | (groups[order] != groups[best])]
    return torch.stack(keep) if keep else order
