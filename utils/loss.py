"""The detection loss: which cells and anchors answer for a box, and how wrong they are.

Assignment by the ratio of sides and to neighbouring cells as far as a cell's decode reaches, complete IoU
(https://arxiv.org/abs/1911.08287) for boxes, binary cross-entropy for objectness (its target is the IoU) and classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, complete_box_iou_loss

from models.yolo import HeadSpec, split, to_xywh

from .dist import average
from .recipe import Recipe


class Matches(NamedTuple):
    """Cells that answer for boxes, one row a match: places in [B, A, H, W], the box in cells (xywh), its class."""

    places: tuple[Tensor, Tensor, Tensor, Tensor]
    boxes: Tensor
    classes: Tensor


def detection_loss(
    raws: list[Tensor], targets: Tensor, heads: list[HeadSpec], size: tuple[int, int], recipe: Recipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of raw maps of inputs of `size` (height, width) against targets [N, 6].

    A target is (place in the batch, class, xywh_n). Returns the loss, per image, and its parts for the log.
    """
    images = len(raws[0]) / average(len(raws[0]))
    box = objectness = classes = raws[0].new_zeros((), dtype=torch.float32)
    for raw, spec in zip(raws, heads, strict=True):
        t = split(raw.float(), spec)  # [B, A, H, W, 5+C]
        matches = assign(targets, t.shape[2:4], spec, size, recipe)
        goal = t.new_zeros(t.shape[:4])  # [B, A, H, W]
        share = len(matches.boxes) / max(1e-9, average(len(matches.boxes)))  # of all processes' matches; alone 1
        if len(matches.boxes):
            chosen = t[matches.places]  # [M, 5+C]
            iou_loss = _box_loss(chosen, matches, spec, size, t.shape[2:4])  # [M]
            box = box + share * iou_loss.mean()
            quality = (1 - iou_loss.detach()).clamp(0, 1)
            cells = torch.arange(goal.numel(), device=goal.device).view(goal.shape)[matches.places]  # [M]
            goal.view(-1).scatter_reduce_(0, cells, quality, "amax")  # where boxes claim one cell, the better counts
            if spec.classes > 1:
                loss = _class_loss(chosen[:, 5:], matches.classes, spec, recipe.label_smoothing)
                classes = classes + share * loss
        objectness = objectness + images * _balance(spec) * _binary(t[..., 4], goal, spec)
    scale = 3 / len(heads)
    box, objectness = recipe.box_gain * scale * box, recipe.objectness_gain * scale * objectness
    classes = recipe.class_gain * scale * classes
    return box + objectness + classes, {"box": box, "objectness": objectness, "class": classes}


def assign(
    targets: Tensor, shape: tuple[int, int] | torch.Size, spec: HeadSpec, size: tuple[int, int], recipe: Recipe
) -> Matches:
    """Match targets [N, 6] with the cells and anchors of one head of `shape` (H, W).

    An anchor takes a box whose width and height differ from its own by less than `anchor_ratio`; the cell of the centre
    answers, and the nearer neighbours too where their decode reaches so far.
    """
    H, W = shape
    anchors = targets.new_tensor(spec.anchors)  # [A, 2] wh_px
    wh_px = targets[:, 4:6] * targets.new_tensor([size[1], size[0]])
    ratios = wh_px[None] / anchors[:, None]  # [A, N, 2]
    anchor, target = (torch.maximum(ratios, 1 / ratios).amax(2) < recipe.anchor_ratio).nonzero(as_tuple=True)
    chosen = targets[target]
    xy = chosen[:, 2:4] * targets.new_tensor([W, H])
    cell = xy.floor().long().minimum(torch.tensor([W - 1, H - 1], device=xy.device))  # [M, 2]
    away = xy - cell  # place of the centre in its cell, 0..1
    step = torch.where(away < 0.5, -1, 1)  # towards the nearer neighbour on each axis
    distance = torch.minimum(away, 1 - away)
    zero = torch.zeros_like(step[:, 0])
    offsets = torch.stack(
        (torch.stack((zero, zero), 1), torch.stack((step[:, 0], zero), 1), torch.stack((zero, step[:, 1]), 1))
    )  # [3, M, 2]
    cells = cell + offsets
    inside = ((cells >= 0) & (cells < torch.tensor([W, H], device=xy.device))).all(2)  # [3, M]
    reach = (spec.scale_x_y - 1) / 2  # how far beyond its cell a decoded centre can lie
    is_reached = distance < min(recipe.neighbours, reach)  # [M, 2]
    inside[1:] &= is_reached.T
    _, match = inside.nonzero(as_tuple=True)
    column, row = cells[inside].unbind(1)
    boxes = torch.cat((xy, wh_px[target]), dim=1)[match]
    places = (chosen[match, 0].long(), anchor[match], row, column)
    return Matches(places, boxes, chosen[match, 1].long())


def _box_loss(
    chosen: Tensor, matches: Matches, spec: HeadSpec, size: tuple[int, int], shape: tuple[int, int] | torch.Size
) -> Tensor:
    """Give 1 - complete IoU of every match [M], computed in network-input pixels."""
    _, anchor, row, column = matches.places
    cell_px = chosen.new_tensor([size[1] / shape[1], size[0] / shape[0]])
    anchors = chosen.new_tensor(spec.anchors)[anchor]
    xy, wh = to_xywh(chosen[:, :4].clamp(max=10), torch.stack((column, row), 1), anchors, spec)  # e^10: overflow guard
    wh = wh.clamp_min(0.01)  # px: a side of 0 has no aspect ratio, and its loss would be NaN
    predicted = box_convert(torch.cat((xy * cell_px, wh), 1), "cxcywh", "xyxy")
    truth = box_convert(torch.cat((matches.boxes[:, :2] * cell_px, matches.boxes[:, 2:]), 1), "cxcywh", "xyxy")
    return complete_box_iou_loss(predicted, truth)


def _class_loss(chosen: Tensor, classes: Tensor, spec: HeadSpec, smoothing: float) -> Tensor:
    if spec.is_softmax:
        return F.cross_entropy(chosen, classes, label_smoothing=smoothing)
    goal = torch.full_like(chosen, smoothing / 2)
    goal[torch.arange(len(classes)), classes] = 1 - smoothing / 2
    return _binary(chosen, goal, spec)


def _binary(values: Tensor, goal: Tensor, spec: HeadSpec) -> Tensor:
    """Binary cross-entropy; the values are probabilities already where the head has `new_coords`."""
    if spec.is_new_coords:
        return F.binary_cross_entropy(values.clamp(0, 1), goal)
    return F.binary_cross_entropy_with_logits(values, goal)


def _balance(spec: HeadSpec) -> float:
    """Weigh objectness by the cells a head has: fine maps hold many, nearly all of them empty."""
    return (16 / min(spec.stride)) ** 1.5
