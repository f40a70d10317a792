"""Which cells and anchors of the heads answer for a box.

By the ratio of sides, and to neighbouring cells as far as a cell's decode reaches; of these all, or those alone whose
predictions suit the box best (task-aligned, https://arxiv.org/abs/2108.07755).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.yolo import HeadSpec

from .recipe import Recipe

ALIGNMENT = 6  # power of the IoU in a match's worth, the paper's beta


class Matches(NamedTuple):
    """Cells that answer for boxes, one row a match: places in [B, A, H, W], the box in cells (xywh), its class and
    its row in the targets."""

    places: tuple[Tensor, ...]
    boxes: Tensor
    classes: Tensor
    truths: Tensor

    def take(self, chosen: Tensor) -> "Matches":
        """Give the matches where `chosen` [M] is true."""
        places = tuple(place[chosen] for place in self.places)
        return Matches(places, self.boxes[chosen], self.classes[chosen], self.truths[chosen])


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
    return Matches(places, boxes, chosen[match, 1].long(), target[match])


def best_matches(
    truths: Sequence[Tensor], scores: Sequence[Tensor], ious: Sequence[Tensor], count: int
) -> list[Tensor]:
    """Tell of the matches of every head, [M] each, whether they are among the `count` best of their truth.

    A match is worth the score that it predicts for the truth's class times a power of the IoU.
    """
    truth = torch.cat(list(truths))
    worth = torch.cat(list(scores)) * torch.cat(list(ious)) ** ALIGNMENT
    order = worth.argsort(descending=True)
    order = order[truth[order].argsort(stable=True)]  # truth by truth, the best first
    _, sizes = truth[order].unique_consecutive(return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    is_best = torch.zeros_like(truth, dtype=torch.bool)
    is_best[order] = torch.arange(len(order), device=order.device) - starts < count
    return list(is_best.split([len(each) for each in truths]))
