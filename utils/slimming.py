"""One step of slimming: how much to cut for a goal, and the compact network with what it needs to work."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import Darknet
from models.darknet import count_parameters

from .compensate import compensate, recalibrate, with_constants
from .guard import difference
from .log import DataError
from .plan import Plan, smallest_cut
from .prune import Groups, Mask, cut, cut_cfg

Timer = Callable[[Sequence[Darknet]], list[float]]  # milliseconds of a forward pass of each, taken in turn


@dataclass(frozen=True)
class Goal:
    """What is to shrink to which share of itself: "groups", "parameters", "BFLOPs" or "ms" of a forward pass.

    `flag` is how the user said it.
    """

    kind: str
    share: float
    flag: str


def make_goal(args: Namespace, model: Darknet, timer: Timer) -> Goal:
    """Read the goal of a command line. Raises DataError where the network is there already."""
    if args.percent is not None:
        return Goal("groups", 1 - args.percent, f"--percent {args.percent:g}")
    if args.target_speedup is not None:
        goal = Goal("ms", 1 / args.target_speedup, f"--target-speedup {args.target_speedup:g}")
    elif args.target_latency is not None:
        goal = Goal("ms", args.target_latency / timer([model])[0], f"--target-latency {args.target_latency:g}")
    else:
        name, kind, now = next(
            (name, kind, now)
            for name, kind, now in (
                ("target_params", "parameters", count_parameters(model)),
                ("target_flops", "BFLOPs", count_flops(model)),
            )
            if getattr(args, name) is not None
        )
        wanted = getattr(args, name)
        goal = Goal(kind, wanted if wanted <= 1 else wanted / now, f"--{name.replace('_', '-')} {wanted:g}")
    if goal.share >= 1:
        raise DataError(f"{goal.flag}: the network is there already, nothing is to be cut")
    return goal


def groups_to_cut(goal: Goal, model: Darknet, groups: Groups, plan: Plan, timer: Timer) -> int:
    """Give how many groups of a plan to cut for a goal. Raises DataError where it cannot be met."""
    if goal.kind == "groups":
        return plan.count(1 - goal.share, goal.flag)
    count_of = {"parameters": count_parameters, "BFLOPs": count_flops}.get(goal.kind)

    def left(keep: Mask) -> float:
        """Give the share that is left."""
        if count_of is None:
            before, after = timer([model, cut(model, groups, keep, path=model.cfg.path)])
            return after / before
        with torch.device("meta"):  # the arithmetic alone
            compact = Darknet(cut_cfg(model, groups, keep, path=model.cfg.path), allow_unknown=True)
        return count_of(compact) / count_of(model)

    count = smallest_cut(plan, lambda keep: left(keep) <= goal.share)
    if count is None:
        best = left(plan.keep(len(plan.order)))
        raise DataError(
            f"{goal.flag}: asks for {goal.share:.3f} of the {goal.kind}, the most that can go leaves {best:.3f}"
            " (see --strategy slim, --layer-keep, --layers)"
        )
    return count


def slim(
    model: Darknet,
    groups: Groups,
    keep: Mask,
    *,
    path: str,
    notes: Sequence[str],
    is_compensated: bool,
    pictures: Sequence[Tensor],
) -> tuple[Darknet, float | None]:
    """Cut, and let what is left work: constants carried on, statistics estimated over inputs [B, C, H, W].

    Also returns how far the constants carried on differ from constants put out, relative to the largest value of each
    head: what padding and gates make of it.
    """
    compact = cut(model, groups, keep, path=path, notes=notes)
    error = None
    if is_compensated:
        constants = compensate(model, compact, groups, keep)
        error = difference(with_constants(model, groups, keep, constants), compact)
    if pictures:
        recalibrate(compact, pictures)
    return compact, error


def count_flops(model: Darknet) -> float:
    """Count the BFLOPs at the cfg's own input size."""
    return sum(layer.flops for layer in model.layers) / 1e9
