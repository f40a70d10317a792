"""Sparse training (network slimming, https://arxiv.org/abs/1708.06519): an L1 penalty draws γ to zero where its channel
may be pruned; the share that has come there is watched, foretold and, on wish, steered. docs/slimming.md explains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LambdaLR

from models import Darknet

from .importance import prunable_norms
from .log import DataError
from .prune import find_groups
from .schedule import AnyRecipe

Values = NDArray[np.float64]

SCHEDULES = ("constant", "global", "local")
HARMLESS = 0.01  # |γ| under which a channel may go; measured: docs/slimming.md
RELIEF = 0.01  # what is left of s for channels that are spared
MARGIN = 0.1  # of the groups: a fixed s that will miss its target by more is called too small or too large
EDGES = np.geomspace(1e-4, 10, 76)  # of the histogram of |γ|; what lies outside counts in the bins at its ends
# Of --s auto, measured in docs/slimming.md
ARRIVAL = 0.5  # of the epochs, when the target shall be reached: what stays needs the others to settle
HORIZON = 0.25  # of the epochs, what it plans ahead at least: stragglers shall not drive s up without end
SURPLUS = 1.1  # of the target, how many groups it draws on: those stay whose γ the loss holds up most
CHANGE = 2.0  # factor by which s changes at most from one epoch to the next


@dataclass(frozen=True)
class Penalty:
    """What sparse training is to do: a penalty of strength `s`, None to steer it to a share `target` of the groups.

    After `turn` epochs s falls to RELIEF of itself, by the schedule "global" everywhere, by "local" for the largest
    1 - `target` of the groups.
    """

    s: float | None = 1e-4
    schedule: str = "constant"
    turn: int = 0
    target: float = 0.5


class Sparsity:
    """The penalty on a network's γ, epoch by epoch.

    A group of channels counts with its largest |γ|. `travels` say how far each epoch moves a γ for s=1, see `travels`.
    Layers before `first` do not learn. `s` is all the state there is, the rest follows from epoch and weights. Raises
    DataError where nothing may be pruned.
    """

    def __init__(self, model: Darknet, plan: Penalty, travels: Sequence[float], *, first: int = 0) -> None:
        groups = find_groups(model)
        found = prunable_norms(model, groups)
        lines = [groups.group[groups.lines[index]] for index, *_ in found]
        counts = np.zeros(len(groups.is_free), bool)
        for line, (_, _, is_free) in zip(lines, found, strict=True):
            counts[line[is_free.numpy()]] = True
        for line, (index, *_) in zip(lines, found, strict=True):
            if index < first:
                counts[line] = False
        self.count = int(counts.sum())
        if not self.count:
            path = model.cfg.path
            raise DataError(
                f"{path}: -sr: no channel with a batch normalisation that learns may be pruned (leave out -sr)"
            )
        place = np.where(counts, counts.cumsum() - 1, self.count)  # what stays shares the last place
        self.plan, self.travels = plan, np.maximum(travels, 1e-12)
        self.weights = [norm.weight for _, norm, _ in found]
        self.places = [
            torch.from_numpy(place[line]).to(weight.device) for line, weight in zip(lines, self.weights, strict=True)
        ]  # [C] each
        self.s = plan.s if plan.s is not None else self._needed(self.gammas(), np.zeros(self.count), 0)
        self.begin(0)

    def gammas(self) -> Values:
        """Give the largest |γ| of every group that may be pruned [groups]."""
        values, places = torch.cat([weight.detach().abs() for weight in self.weights]), torch.cat(self.places)
        largest = torch.zeros(self.count + 1, device=values.device).scatter_reduce(0, places, values, "amax")
        return largest[:-1].cpu().double().numpy()

    def begin(self, epoch: int) -> None:
        """Settle the strength of every channel for an epoch, from 0 on."""
        self.before = self.gammas()
        strengths = torch.from_numpy(np.append(self.s * self._factors(epoch), 0)).float()
        self.strengths = [strengths.to(place.device)[place] for place in self.places]  # [C] each

    def shrink(self) -> None:
        """Add the subgradient of strength times |γ| to the gradients, after all that scales those."""
        for weight, strength in zip(self.weights, self.strengths, strict=True):
            if weight.grad is not None:
                weight.grad.addcmul_(weight.detach().sign(), strength)

    def finish(self, epoch: int) -> dict[str, Any]:
        """Give the figures of an epoch that is done, for metrics.jsonl, and steer s.

        The forecast `end` lets every group go on under s as the schedule has it, and under what pulled it beside s.
        """
        now, rest = self.gammas(), self.travels[epoch + 1 :]
        pull = (self.before - now) / self.travels[epoch] - self.s * self._factors(epoch)
        pushes = [travel * self._factors(later) for later, travel in enumerate(rest, epoch + 1)]
        end = now - rest.sum() * pull - self.s * sum(pushes, np.zeros(self.count))
        is_under = now < HARMLESS
        row = {
            "s": self.s,
            "target": self.plan.target,
            "share": float(is_under.mean()),
            "end": float((is_under | (end < HARMLESS)).mean()),
            **dict(zip(("q25", "q50", "q75"), np.quantile(now, (0.25, 0.5, 0.75)).tolist(), strict=True)),
            "counts": np.histogram(now.clip(EDGES[0], EDGES[-1]), EDGES)[0].tolist(),
        }
        if self.plan.s is None and len(rest):
            self.s = self._needed(now, pull, epoch + 1)
        return row

    def describe(self, row: dict[str, Any]) -> str:
        """Say in a line what the figures of an epoch mean."""
        text = f"{row['share']:.0%} of {self.count:,} groups have |γ| under {HARMLESS:g}"
        text += f", quartiles {row['q25']:.3g} {row['q50']:.3g} {row['q75']:.3g}, s {row['s']:.3g}"
        if self.plan.s is None:
            verdict = f"s goes to {self.s:.3g}, "
        elif abs(row["end"] - row["target"]) > MARGIN:
            verdict = f"s is too {'small' if row['end'] < row['target'] else 'large'}: "
        else:
            verdict = ""
        return f"{text}; {verdict}at this pace {row['end']:.0%} by the end, wanted {row['target']:.0%}"

    def _factors(self, epoch: int) -> Values:
        """Give what is in force of s for every group, by the γ at the start of the epoch that `begin` began."""
        factors = np.ones(self.count)
        if self.plan.schedule != "constant" and epoch >= self.plan.turn:
            target = self.plan.target * (SURPLUS if self.plan.s is None else 1)
            first = 0 if self.plan.schedule == "global" else math.ceil(target * self.count)
            factors[self.before.argsort(kind="stable")[first:]] = RELIEF
        return factors

    def _needed(self, gammas: Values, pull: Values, epoch: int) -> float:
        """Give the s that from `epoch` on brings the target's share under HARMLESS in time.

        Never less than moves a γ by HARMLESS in the whole training: from nothing s could not come back.
        """
        epochs = len(self.travels)
        travel = self.travels[epoch : max(round(ARRIVAL * epochs), epoch + math.ceil(HORIZON * epochs))].sum()
        each = np.where(gammas < HARMLESS, 0, (gammas - HARMLESS) / travel - pull)
        wanted = float(np.quantile(each, self.plan.target))
        if epoch:
            wanted = float(np.clip(wanted, self.s / CHANGE, self.s * CHANGE))
        return max(wanted, HARMLESS / float(self.travels.sum()))


def travels(scheduler: LambdaLR, recipe: AnyRecipe, *, epochs: int, steps: int) -> list[float]:
    """Give for each epoch how far s=1 moves a γ that nothing else pulls: lr · steps / (1 - momentum).

    The rate is that of the step in the middle. Adam's moves are about lr a step however large s is, so there it only
    gives the shape of the schedule.
    """
    momentum = 0 if getattr(recipe, "optimizer", "") == "adamw" else recipe.momentum
    (rate, *_), (factor, *_) = scheduler.base_lrs, scheduler.lr_lambdas
    scale = rate * steps / max(1 - momentum, 1e-3)  # momentum may be 1
    return [scale * factor(epoch * steps + steps // 2) for epoch in range(epochs)]
