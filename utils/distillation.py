"""Distillation: a student network learns from a teacher's outputs and feature maps beside the truths.

The teacher sees the same augmented batch. docs/distillation.md says which strategy is for what.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from models import Darknet
from models.quant import QuantConv2d
from models.yolo import HeadSpec, split

from . import dist
from . import feature_distillation as features
from . import output_distillation as outputs
from .head_pairs import Pair, feature_layer, find_pairs
from .log import DataError
from .recipe import Recipe

DEFAULT = ("pkd",)
SCHEDULES = ("constant", "cosine")
TEMPERATURES = {"logits": 2.0, "cwd": 1.0}
MEMORY = 0.95  # of the running means that auto goes by: some twenty batches count
MOST = 1e4  # weight that auto gives at most: what is left between like networks is rounding


@dataclass(frozen=True)
class Lessons:
    """What distillation is to do.

    `kinds` are strategies. `weight` multiplies each loss; None holds all of them together at `share` of the detection
    loss. "cosine" takes that to 0 by the last of `epochs`. By `recipe` anchors answer for truths.
    """

    kinds: tuple[str, ...] = DEFAULT
    weight: float | None = None
    share: float = 0.5
    schedule: str = "constant"
    temperature: float | None = None
    epochs: int = 1
    recipe: Recipe = field(default_factory=Recipe)


class Distiller:
    """A teacher, what of it a student learns, and how much each lesson counts.

    `pupil` is the student with the modules that learn along. Those and the running means are the state. The teacher is
    a copy, fused where it is not quantised. Raises DataError where a strategy suits no heads of the two.
    """

    def __init__(self, student: Darknet, teacher: Darknet, lessons: Lessons) -> None:
        device = next(student.parameters()).device
        is_quantised = any(isinstance(module, QuantConv2d) for module in teacher.modules())  # fused, levels would move
        teacher = copy.deepcopy(teacher).eval() if is_quantised else teacher.fuse()
        self.teacher = teacher.requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.heads = student.heads
        self.lessons = lessons
        self.pairs, self.notes = find_pairs(student, teacher, lessons.kinds)
        mapped = next((pairs for kind, pairs in self.pairs.items() if kind in features.STRATEGIES), [])
        layers = [feature_layer(student, student.heads[pair.student]) for pair in mapped]
        self.layers = [feature_layer(teacher, teacher.heads[pair.teacher]) for pair in mapped]
        widths = [
            (student.layers[own].channels, teacher.layers[other].channels)
            for own, other in zip(layers, self.layers, strict=True)
        ]
        aids = {
            kind: nn.ModuleList(features.STRATEGIES[kind].make_aid(*width) for width in widths)
            for kind in self.pairs
            if kind in features.STRATEGIES
        }
        self.pupil = features.Pupil(student, layers, aids)
        self.pupil.aids.to(device, memory_format=torch.channels_last)
        self.means: dict[str, float] = {}
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Settle how much the lessons of an epoch count, from 0 on."""
        progress = epoch / self.lessons.epochs if self.lessons.schedule == "cosine" else 0.0
        self.factor = (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def ask(self, x: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Give what the teacher makes of a batch; best before the student's pass, which holds on to memory."""
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return self.teacher.features(x, self.layers)

    def add(
        self,
        loss: Tensor,
        parts: dict[str, Tensor],
        ours: tuple[list[Tensor], Mapping[str, list[Tensor]]],
        theirs: tuple[list[Tensor], list[Tensor]],
        targets: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the lessons to the detection loss of a batch of `size` (height, width) and its parts.

        `ours` is what the pupil gave for it, `theirs` what `ask` gave. Of the parts "kd" is what is added, and "kd_"
        with the name of a strategy its loss before it is weighed.
        """
        (maps, compared), (their_maps, their_features) = ours, theirs
        truths = outputs.Truths(targets, size, self.lessons.recipe)
        sums, counts = [], []
        for kind, pairs in self.pairs.items():
            if kind in outputs.STRATEGIES:
                total, count = self._compare_outputs(kind, pairs, maps, their_maps, truths)
            else:
                total, count = self._compare_features(kind, compared[kind], their_features)
            sums.append(total)
            counts.append(count)
        least = 1 / dist.world_size()  # one match, or one object that the teacher sees, of all processes
        shares = [max(mean, least) for mean in dist.averages(torch.stack(counts).tolist())]
        losses = {kind: total / share for kind, total, share in zip(self.pairs, sums, shares, strict=True)}
        weights = self._weigh(losses, loss)
        added = self.factor * torch.stack([weights[kind] * value for kind, value in losses.items()]).sum()
        return loss + added, parts | {"kd": added} | {f"kd_{kind}": value for kind, value in losses.items()}

    def state(self) -> dict[str, Any]:
        """Give what the next epoch depends on."""
        return {"aids": self.pupil.aids.state_dict(), "means": dict(self.means)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state given by `state`."""
        self.pupil.aids.load_state_dict(state["aids"])
        self.means = dict(state["means"])

    def describe(self) -> list[str]:
        """Say in lines what is learned from which teacher, and what is not."""
        lessons, count = self.lessons, sum(parameter.numel() for parameter in self.pupil.aids.parameters())
        how = f"weight {lessons.weight:g}" if lessons.weight else f"at {lessons.share:g} of the detection loss"
        aids = f"; {count:,} parameters learn along and are not saved with the network" if count else ""
        what = f"learns {'+'.join(self.pairs)} from {self.teacher.cfg.path}"
        return [f"{what}, {how}, {lessons.schedule}{aids}", *self.notes]

    def _compare_outputs(
        self,
        kind: str,
        pairs: Sequence[Pair],
        maps: list[Tensor],
        their_maps: list[Tensor],
        truths: outputs.Truths,
    ) -> tuple[Tensor, Tensor]:
        temperature = self._temperature(kind)
        found = []
        for pair in pairs:
            own, other = (list(places) for places in zip(*pair.anchors, strict=True))
            ours = _choose(maps[pair.student], self.heads[pair.student], own)
            theirs = _choose(their_maps[pair.teacher], self.teacher.heads[pair.teacher], other)
            _check_shapes(ours.t, theirs.t, self.teacher)
            found.append(outputs.STRATEGIES[kind](ours, theirs, truths, temperature))
        totals, counts = zip(*found, strict=True)
        return torch.stack(totals).sum(), torch.stack(counts).sum()

    def _compare_features(self, kind: str, ours: list[Tensor], theirs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Give the sum over pictures of the mean over the maps, and the number of pictures."""
        temperature, losses = self._temperature(kind), []
        for own, other in zip(ours, theirs, strict=True):
            _check_shapes(own, other, self.teacher)
            losses.append(features.STRATEGIES[kind].loss(own.float(), other.float(), temperature))
        count = losses[0].new_tensor(len(ours[0]))
        return torch.stack(losses).mean() * count, count

    def _temperature(self, kind: str) -> float:
        return self.lessons.temperature or TEMPERATURES.get(kind, 1.0)

    def _weigh(self, losses: Mapping[str, Tensor], detection: Tensor) -> dict[str, float]:
        """Give the weight of every strategy; to balance them note the sizes of all losses."""
        if self.lessons.weight is not None:
            return dict.fromkeys(losses, self.lessons.weight)
        values = torch.stack([detection.detach(), *(value.detach() for value in losses.values())])
        for name, value in zip(("detection", *losses), dist.averages(values.tolist()), strict=True):
            self.means[name] = MEMORY * (self.means.get(name) or value) + (1 - MEMORY) * value
        wanted = self.lessons.share * self.means["detection"] / len(losses)
        return {kind: min(MOST, wanted / max(self.means[kind], 1e-12)) for kind in losses}


def _choose(raw: Tensor, spec: HeadSpec, anchors: list[int]) -> outputs.Outputs:
    """Take some anchors' outputs from a raw head map."""
    chosen = tuple(spec.anchors[place] for place in anchors)
    return outputs.Outputs(split(raw.float(), spec)[:, anchors], replace(spec, anchors=chosen))


def _check_shapes(ours: Tensor, theirs: Tensor, teacher: Darknet) -> None:
    if ours.shape != theirs.shape:
        raise DataError(
            f"{teacher.cfg.path}: its maps of {tuple(theirs.shape)} and the student's of {tuple(ours.shape)} differ:"
            " their layers round sizes differently (choose another --img-size)"
        )
