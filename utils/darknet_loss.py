"""Darknet's loss of [yolo] heads, as its own trainer computes it: a change asked of every output, key by key.

Darknet has no loss that it differentiates: it writes down `deltas`, how far each output of the convolution before a
head is to move, and counts their squares as the loss. The value here is that sum per picture, its gradient is exactly
minus the deltas. Overlaps: https://arxiv.org/abs/1902.09630 (giou), https://arxiv.org/abs/1911.08287 (diou, ciou).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.yolo import HeadSpec, split, to_xywh

from .darknet_recipe import HeadRules
from .dist import average

SURE = 0.25  # a box overlaps "a truth" only where one of its classes has at least this probability
FOCAL_ALPHA = 0.5


class Claims(NamedTuple):
    """Cells that answer for truths, one row a claim: places in [B, A, H, W], rows of the targets, and a target for
    objectness."""

    places: tuple[Tensor, Tensor, Tensor, Tensor]
    rows: Tensor
    goal: Tensor


class Head(NamedTuple):
    """One head: outputs t and probabilities p [B, A, H, W, 5+C], its boxes xywh_n, and what it is judged by."""

    t: Tensor
    p: Tensor
    boxes: Tensor
    targets: Tensor
    spec: HeadSpec
    rules: HeadRules
    size: tuple[int, int]

    @property
    def size_px(self) -> Tensor:
        """(width, height) of the input."""
        return self.t.new_tensor([self.size[1], self.size[0]])

    def labels(self, claims: Claims) -> Tensor:
        """Give the class of each claim's truth [M]."""
        return self.targets[claims.rows, 1].long()


def darknet_loss(
    raws: list[Tensor], targets: Tensor, heads: list[HeadSpec], size: tuple[int, int], rules: tuple[HeadRules, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of raw maps of inputs of `size` (height, width) against targets [N, 6].

    A target is (place in the batch, class, xywh_n). Returns the loss per picture and its parts for the log.
    """
    shapes = list(dict.fromkeys(anchor for spec in heads for anchor in spec.anchors))
    pull = sums = raws[0].new_zeros(3, dtype=torch.float32)
    for raw, spec, rule in zip(raws, heads, rules, strict=True):
        t = split(raw.float(), spec)  # [B, A, H, W, 5+C]
        delta = head_deltas(t.detach(), targets, spec, rule, shapes=shapes, size=size)
        pull = pull - (delta * t).sum()
        sums = sums + torch.stack([part.square().sum() for part in delta.split([4, 1, spec.classes], dim=-1)])
    images = average(len(raws[0]))
    box, objectness, classes = (sums / images).unbind()
    pull = pull[0] / images
    loss = sums.sum() / images + pull - pull.detach()
    return loss, {"box": box, "objectness": objectness, "class": classes}


@torch.no_grad()
def head_deltas(
    t: Tensor,
    targets: Tensor,
    spec: HeadSpec,
    rules: HeadRules,
    *,
    shapes: list[tuple[float, float]],
    size: tuple[int, int],
) -> Tensor:
    """Give the deltas [B, A, H, W, 5+C] of one head's outputs t of the same shape, for targets [N, 6].

    `shapes` are the anchors of all heads, among which a truth has its best one.
    """
    p = t if spec.is_new_coords else t.sigmoid()
    head = Head(t, p, _boxes(t, spec, size), _first_boxes(targets, rules.max_boxes), spec, rules, size)
    overlap, best = _best_overlaps(head.boxes, head.targets)  # [B, A, H, W] both
    delta = torch.zeros_like(t)
    is_near = (overlap > rules.ignore_thresh) & (p[..., 5:] > SURE).any(-1)
    near = overlap - p[..., 4] if rules.is_smooth else torch.zeros_like(overlap)
    delta[..., 4] = rules.obj_normalizer * torch.where(is_near, near, -p[..., 4])
    places = (overlap > rules.truth_thresh).nonzero(as_tuple=True)
    goal = overlap[places].square() if rules.is_smooth else torch.ones_like(overlap[places])
    _claim(delta, Claims(places, best[places], goal), head)
    delta[(*places, 4)] = rules.obj_normalizer * (goal - p[(*places, 4)])
    claims = _anchor_claims(head, shapes)
    _claim(delta, claims, head)
    is_open = delta[..., 4] == 0 if rules.is_smooth else torch.ones_like(is_near)  # smooth: the overlap goes first
    weight = _largest(_weights(head.labels(claims), rules), claims.places, overlap)
    asked = rules.obj_normalizer * weight * (1 - p[..., 4])
    delta[..., 4] = torch.where((weight > 0) & is_open, asked, delta[..., 4])
    if rules.iou_thresh < 1:
        count = (delta[..., 5:] > 0).sum(-1).clamp_min(1)
        delta[..., :4] /= torch.where(delta[..., 4] != 0, count, 1)[..., None]
    return delta * rules.delta_normalizer


def overlap_of(kind: str, boxes: Tensor, truths: Tensor) -> Tensor:
    """Give iou, giou, diou or ciou of boxes and truths [..., 4] xywh, broadcast against each other.

    As in Darknet the aspect ratio's part of the ciou has a gradient of the size that sides of 1 would give it.
    """
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    truth_low, truth_high = truths[..., :2] - truths[..., 2:] / 2, truths[..., :2] + truths[..., 2:] / 2
    shared = (torch.minimum(high, truth_high) - torch.maximum(low, truth_low)).clamp_min(0).prod(-1)
    union = boxes[..., 2:].prod(-1) + truths[..., 2:].prod(-1) - shared
    iou = shared / union.clamp_min(1e-12)
    if kind == "iou":
        return iou
    hull = torch.maximum(high, truth_high) - torch.minimum(low, truth_low)
    if kind == "giou":
        area = hull.prod(-1).clamp_min(1e-12)
        return iou - (area - union) / area
    away = (boxes[..., :2] - truths[..., :2]).square().sum(-1) / hull.square().sum(-1).clamp_min(1e-12)
    if kind == "diou":
        return iou - away
    w, h = boxes[..., 2], boxes[..., 3].clamp_min(1e-12)
    aspect = 4 / math.pi**2 * (torch.atan(truths[..., 2] / truths[..., 3].clamp_min(1e-12)) - torch.atan(w / h)) ** 2
    share = (aspect / (1 - iou + aspect + 1e-6)).detach()
    steep = aspect * (w * w + h * h).detach()
    return iou - away - share * (aspect.detach() + steep - steep.detach())


def _first_boxes(targets: Tensor, most: int) -> Tensor:
    """Keep the first `most` targets of every picture."""
    same = targets[:, None, 0] == targets[None, :, 0]  # [N, N]
    return targets[same.tril().sum(1) <= most]


def _boxes(t: Tensor, spec: HeadSpec, size: tuple[int, int]) -> Tensor:
    """Decode outputs [B, A, H, W, 5+C] into xywh_n."""
    A, H, W = t.shape[1:4]
    columns, rows = torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy")
    cell = torch.stack((columns, rows), -1).to(t)  # [H, W, 2]
    xy, wh = to_xywh(t[..., :4], cell, t.new_tensor(spec.anchors).view(A, 1, 1, 2), spec)
    return torch.cat((xy / t.new_tensor([W, H]), wh / t.new_tensor([size[1], size[0]])), -1)


def _best_overlaps(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Give each box's largest IoU with a target of its picture, and the row of that target."""
    value, row = boxes.new_zeros(boxes.shape[:-1]), boxes.new_zeros(boxes.shape[:-1], dtype=torch.long)
    for place in range(len(boxes)):
        rows = (targets[:, 0] == place).nonzero().flatten()
        if len(rows):
            found = overlap_of("iou", boxes[place].unsqueeze(-2), targets[rows, 2:]).max(-1)
            value[place], row[place] = found.values, rows[found.indices]
    return value, row


def _anchor_claims(head: Head, shapes: list[tuple[float, float]]) -> Claims:
    """Let the anchor of all heads that is most like a truth answer, and those of this head that are like it enough."""
    targets, (H, W) = head.targets, head.t.shape[2:4]
    wh = torch.cat((torch.zeros_like(targets[:, 2:4]), targets[:, 4:6] * head.size_px), 1)  # [N, 4] at the origin
    every = torch.cat((targets.new_zeros(len(shapes), 2), targets.new_tensor(shapes)), 1)  # [S, 4]
    own = torch.tensor([shapes.index(anchor) for anchor in head.spec.anchors], device=targets.device)  # [A]
    answers = overlap_of("iou", every, wh[:, None]).argmax(1)[:, None] == own  # [N, A]
    if head.rules.iou_thresh < 1:
        answers |= overlap_of(head.rules.iou_thresh_kind, every[own], wh[:, None]) > head.rules.iou_thresh
    row, anchor = answers.nonzero(as_tuple=True)
    cell = (targets[row, 2:4] * targets.new_tensor([W, H])).long()
    column, line = cell[:, 0].clamp(0, W - 1), cell[:, 1].clamp(0, H - 1)
    return Claims((targets[row, 0].long(), anchor, line, column), row, targets.new_ones(len(row)))


def _claim(delta: Tensor, claims: Claims, head: Head) -> None:
    """Write the deltas of boxes, which add up, and classes, where several may be true, of the cells that answer."""
    if not len(claims.rows):
        return
    rules, places, label = head.rules, claims.places, head.labels(claims)
    weight = _weights(label, rules)
    move = _box_deltas(claims, head) * (rules.iou_normalizer * weight)[:, None]
    if rules.iou_loss != "mse":
        move = move.clamp(-rules.max_delta, rules.max_delta)
    columns = torch.arange(4, device=delta.device)
    delta.index_put_((*(place[:, None] for place in places), columns), move, accumulate=True)
    q, eps = head.p[..., 5:], rules.label_smooth_eps
    if rules.is_focal:
        sure = q[(*places, label)] + 1e-15
        steep = -(1 - sure) * (2 * sure * sure.log() + sure - 1)
        scale = FOCAL_ALPHA * _largest(steep, places, q[..., 0])[places]
        false, true = -q[places] * scale[:, None], (claims.goal - q[(*places, label)]) * scale
    else:
        goal = claims.goal * (1 - eps) + eps / 2
        false, true = eps / 2 - q[places], (goal - q[(*places, label)]) * weight
    delta[..., 5:].index_put_(places, rules.cls_normalizer * false)
    delta[..., 5:].index_put_((*places, label), rules.cls_normalizer * true)


def _box_deltas(claims: Claims, head: Head) -> Tensor:
    """Give how x, y, w and h of claimed cells [M, 4] are to move: to the truth, or up the overlap's gradient."""
    t, boxes, truths = head.t[claims.places], head.boxes[claims.places], head.targets[claims.rows, 2:]
    if head.rules.iou_loss == "mse":
        _, anchor, line, column = claims.places
        cells, corner = truths.new_tensor([head.t.shape[3], head.t.shape[2]]), torch.stack((column, line), 1)
        ratio = truths[:, 2:] * head.size_px / truths.new_tensor(head.spec.anchors)[anchor]
        goal_wh = (ratio / 4).sqrt() if head.spec.is_new_coords else ratio.log()
        goal = torch.cat((truths[:, :2] * cells - corner, goal_wh), 1)
        is_at = torch.cat((boxes[:, :2] * cells - corner, t[:, 2:4]), 1)
        return (2 - truths[:, 2:].prod(1, keepdim=True)) * (goal - is_at)  # small boxes count up to twice
    with torch.enable_grad():
        moving = boxes.clone().requires_grad_()
        (slope,) = torch.autograd.grad(overlap_of(head.rules.iou_loss, moving, truths).sum(), moving)
    if not head.spec.is_new_coords:
        slope = torch.cat((slope[:, :2], slope[:, 2:] * t[:, 2:4].exp()), 1)
    return slope.nan_to_num(0, 0, 0)


def _weights(label: Tensor, rules: HeadRules) -> Tensor:
    """Give the weight of each class in `label` [M]."""
    if not rules.class_weights:
        return torch.ones(len(label), device=label.device)
    return torch.tensor(rules.class_weights, device=label.device)[label]


def _largest(values: Tensor, places: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Lay values [M] of places out on a map shaped as `like`; the largest of a cell counts, elsewhere 0."""
    cells = torch.arange(like.numel(), device=like.device).view(like.shape)[places]
    return torch.zeros_like(like).flatten().scatter_reduce(0, cells, values.to(like), "amax").view(like.shape)
