"""The detection loss: how wrong the cells and anchors are that answer for boxes, and how sure the others.

Complete IoU (https://arxiv.org/abs/1911.08287) or a relative of it for boxes, binary cross-entropy for objectness (its
target is the IoU) and classes; as options focal loss (https://arxiv.org/abs/1708.02002, with the continuous targets of
https://arxiv.org/abs/2006.04388) and label smoothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from models.yolo import HeadSpec, split, to_xywh

from .assignment import Matches, assign, best_matches
from .dist import average
from .recipe import Recipe


def detection_loss(
    raws: list[Tensor], targets: Tensor, heads: list[HeadSpec], size: tuple[int, int], recipe: Recipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of raw maps of inputs of `size` (height, width) against targets [N, 6].

    A target is (place in the batch, class, xywh_n). Returns the loss, per image, and its parts for the log.
    """
    images = len(raws[0]) / average(len(raws[0]))
    maps = [split(raw.float(), spec) for raw, spec in zip(raws, heads, strict=True)]  # [B, A, H, W, 5+C]
    matches = [assign(targets, t.shape[2:4], spec, size, recipe) for t, spec in zip(maps, heads, strict=True)]
    errors = [
        _box_loss(t, match, spec, size, recipe) for t, match, spec in zip(maps, matches, heads, strict=True)
    ]  # [M]
    if recipe.top_matches:
        scores = [_scores(t, match, spec) for t, match, spec in zip(maps, matches, heads, strict=True)]
        ious = [(1 - error.detach()).clamp(0, 1) for error in errors]
        kept = best_matches([match.truths for match in matches], scores, ious, recipe.top_matches)
        matches = [match.take(keep) for match, keep in zip(matches, kept, strict=True)]
        errors = [error[keep] for error, keep in zip(errors, kept, strict=True)]
    box = objectness = classes = raws[0].new_zeros((), dtype=torch.float32)
    for t, match, error, spec in zip(maps, matches, errors, heads, strict=True):
        goal = t.new_zeros(t.shape[:4])  # [B, A, H, W]
        share = len(error) / max(1e-9, average(len(error)))  # of all processes' matches; alone 1
        if len(error):
            box = box + share * error.mean()
            quality = (1 - error.detach()).clamp(0, 1) if recipe.objectness_target == "iou" else torch.ones_like(error)
            cells = torch.arange(goal.numel(), device=goal.device).view(goal.shape)[match.places]  # [M]
            goal.view(-1).scatter_reduce_(0, cells, quality, "amax")  # where boxes claim one cell, the better counts
            if spec.classes > 1:
                loss = _class_loss(t[match.places][:, 5:], match.classes, spec, recipe.label_smoothing)
                classes = classes + share * loss
        objectness = objectness + images * _balance(spec) * _objectness_loss(t[..., 4], goal, spec, recipe.focal_gamma)
    scale = 3 / len(heads)
    box, objectness = recipe.box_gain * scale * box, recipe.objectness_gain * scale * objectness
    classes = recipe.class_gain * scale * classes
    return box + objectness + classes, {"box": box, "objectness": objectness, "class": classes}


def efficient_box_iou_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Give the efficient IoU loss [M] of boxes xyxy [M, 4]: the distance of centres, of widths and of heights.

    https://arxiv.org/abs/2101.08158, equation 6.
    """
    hull = torch.maximum(predicted[:, 2:], truth[:, 2:]) - torch.minimum(predicted[:, :2], truth[:, :2])  # [M, 2]
    sides = (predicted[:, 2:] - predicted[:, :2]) - (truth[:, 2:] - truth[:, :2])
    return distance_box_iou_loss(predicted, truth) + (sides / hull.clamp_min(1e-7)).square().sum(1)


BOX_LOSSES = {
    "ciou": complete_box_iou_loss,
    "diou": distance_box_iou_loss,
    "giou": generalized_box_iou_loss,
    "eiou": efficient_box_iou_loss,
}


def predicted_boxes(t: Tensor, places: tuple[Tensor, ...], spec: HeadSpec, size: tuple[int, int]) -> Tensor:
    """Decode outputs t [B, A, H, W, 5+C] at M places into boxes xyxy_px [M, 4]."""
    _, anchor, row, column = places
    chosen = t[places][:, :4].clamp(max=10)  # e^10: overflow guard
    xy, wh = to_xywh(chosen, torch.stack((column, row), 1), t.new_tensor(spec.anchors)[anchor], spec)
    wh = wh.clamp_min(0.01)  # px: a side of 0 has no aspect ratio, and its loss would be NaN
    return box_convert(torch.cat((xy * _cell_px(t, size), wh), 1), "cxcywh", "xyxy")


def truth_boxes(t: Tensor, matches: Matches, size: tuple[int, int]) -> Tensor:
    """Give the boxes xyxy_px [M, 4] that cells of outputs t [B, A, H, W, 5+C] answer for."""
    return box_convert(torch.cat((matches.boxes[:, :2] * _cell_px(t, size), matches.boxes[:, 2:]), 1), "cxcywh", "xyxy")


def _box_loss(t: Tensor, matches: Matches, spec: HeadSpec, size: tuple[int, int], recipe: Recipe) -> Tensor:
    """Give the loss of every matched box [M], computed in network-input pixels."""
    predicted = predicted_boxes(t, matches.places, spec, size)
    return BOX_LOSSES[recipe.box_loss](predicted, truth_boxes(t, matches, size))


def _cell_px(t: Tensor, size: tuple[int, int]) -> Tensor:
    """Give the (width, height) of a cell in pixels of the input."""
    H, W = t.shape[2:4]
    return t.new_tensor([size[1] / W, size[0] / H])


def _scores(t: Tensor, matches: Matches, spec: HeadSpec) -> Tensor:
    """Give the score that every match predicts for the class of its truth [M]."""
    chosen = t[matches.places].detach()  # [M, 5+C]
    objectness, classes = chosen[:, 4], chosen[:, 5:]
    if not spec.is_new_coords:
        objectness, classes = objectness.sigmoid(), classes.softmax(1) if spec.is_softmax else classes.sigmoid()
    return objectness * classes.gather(1, matches.classes[:, None])[:, 0]


def _objectness_loss(values: Tensor, goal: Tensor, spec: HeadSpec, gamma: float) -> Tensor:
    if not gamma:
        return _binary(values, goal, spec)
    probability = values if spec.is_new_coords else values.sigmoid()
    away = (probability.detach() - goal).abs()
    return (away**gamma * _binary(values, goal, spec, reduction="none")).mean()


def _class_loss(chosen: Tensor, classes: Tensor, spec: HeadSpec, smoothing: float) -> Tensor:
    if spec.is_softmax:
        return F.cross_entropy(chosen, classes, label_smoothing=smoothing)
    goal = torch.full_like(chosen, smoothing / 2)
    goal[torch.arange(len(classes)), classes] = 1 - smoothing / 2
    return _binary(chosen, goal, spec)


def _binary(values: Tensor, goal: Tensor, spec: HeadSpec, *, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy; the values are probabilities already where the head has `new_coords`."""
    if spec.is_new_coords:
        return F.binary_cross_entropy(values.clamp(0, 1), goal, reduction=reduction)
    return F.binary_cross_entropy_with_logits(values, goal, reduction=reduction)


def _balance(spec: HeadSpec) -> float:
    """Weigh objectness by the cells a head has: fine maps hold many, nearly all of them empty."""
    return (16 / min(spec.stride)) ** 1.5
