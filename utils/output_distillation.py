"""Distillation of what heads put out: classes and objectness, and boxes.

A strategy takes the outputs of paired anchors and gives a sum and what it is to be divided by, both over this process's
part of the batch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss

from models.yolo import HeadSpec

from .assignment import assign
from .loss import predicted_boxes, truth_boxes
from .recipe import Recipe

CERTAIN = 1e-4  # how near to 0 and 1 probabilities count, where a head gives them in place of logits


class Outputs(NamedTuple):
    """Outputs t [B, A, H, W, 5+C] of a head's anchors that have a partner, and its spec with these anchors alone."""

    t: Tensor
    spec: HeadSpec


class Truths(NamedTuple):
    """Targets [N, 6] of a batch of `size` (height, width), and the recipe by which anchors answer for them."""

    targets: Tensor
    size: tuple[int, int]
    recipe: Recipe


def logits(student: Outputs, teacher: Outputs, truths: Truths, temperature: float) -> tuple[Tensor, Tensor]:
    """Compare the distributions of classes, and objectness, where the teacher is sure that there is something.

    KL divergence (https://arxiv.org/abs/1503.02531), of every class alone or, with softmax, of all together, at
    `temperature` and times its square; weighted by the teacher's objectness
    (https://arxiv.org/abs/1805.06361), by whose sum it is to be divided. Objectness has temperature 1.
    """
    ours, theirs = _logits(student), _logits(teacher)
    confidence = theirs[..., 0].sigmoid()  # [B, A, H, W]
    objectness = _binary_divergence(ours[..., 0], theirs[..., 0]).sum()
    ours, theirs = ours[..., 1:] / temperature, theirs[..., 1:] / temperature
    if student.spec.is_softmax:
        classes = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True)
    else:
        classes = _binary_divergence(ours, theirs)
    return objectness + temperature**2 * (confidence * classes.sum(-1)).sum(), confidence.sum()


def box(student: Outputs, teacher: Outputs, truths: Truths, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw boxes to the teacher's where those are nearer to the truth, as much as they overlap with it.

    Bounded by the teacher as in "Learning efficient object detection models with knowledge distillation" (Chen et al.,
    NeurIPS 2017), whose regression is to the truth; that the detection loss does. Divided by the matches
    of the student's anchors with truths.
    """
    size = truths.size
    matches = assign(truths.targets, student.t.shape[2:4], student.spec, size, truths.recipe)
    if not len(matches.classes):
        return student.t.new_zeros(()), student.t.new_zeros(())
    wanted = truth_boxes(student.t, matches, size)  # [M, 4] xyxy_px
    ours = predicted_boxes(student.t, matches.places, student.spec, size)
    theirs = predicted_boxes(teacher.t, matches.places, teacher.spec, size)
    own_error, error = complete_box_iou_loss(ours.detach(), wanted), complete_box_iou_loss(theirs, wanted)
    weight = torch.where(error < own_error, (1 - error).clamp_min(0), 0)  # [M]
    return (weight * complete_box_iou_loss(ours, theirs)).sum(), weight.new_tensor(len(weight))


STRATEGIES = {"logits": logits, "box": box}


def obstacle(kind: str, student: HeadSpec, teacher: HeadSpec) -> str:
    """Say why a strategy has no meaning for two heads of one stride and like anchors, or nothing."""
    if kind == "logits" and student.is_softmax != teacher.is_softmax:
        return "the classes of one exclude each other (softmax), those of the other do not"
    if kind == "box" and student.point != teacher.point:
        return f"one tells the box's {student.point}, the other its {teacher.point}"
    return ""


def _logits(outputs: Outputs) -> Tensor:
    """Give objectness and classes [B, A, H, W, 1+C] as logits; what is too certain keeps its gradient."""
    values = outputs.t[..., 4:]
    if not outputs.spec.is_new_coords:
        return values
    kept = values.clamp(CERTAIN, 1 - CERTAIN)
    return (values + (kept - values).detach()).logit()


def _binary_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Give the KL divergence of Bernoulli distributions from the teacher's, by their logits."""
    return theirs.sigmoid() * (theirs - ours) + F.softplus(ours) - F.softplus(theirs)
