"""One step of slimming: how much to cut for a goal, and the compact network with what it needs to work."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import Darknet
from models.darknet import count_parameters

from .bench import Bench
from .compensate import compensate, recalibrate, with_constants
from .datasets import to_input
from .engine import make_step_loss
from .guard import check_exactness, difference, largest_within
from .importance import Values, filter_norm, gamma, random_values, taylor
from .log import DataError
from .plan import Plan, make_plan, smallest_cut
from .prune import Groups, Mask, cut, cut_cfg, find_groups
from .recipe import Recipe, load_recipe

ALIKE = 1e-3  # of the largest γ: a fresh network's differ by nothing


@dataclass(frozen=True)
class Goal:
    """What is to shrink to which share of itself: "groups", "parameters", "BFLOPs" or "ms" of a forward pass.

    `flag` is how the user said it.
    """

    kind: str
    share: float
    flag: str


def make_goal(args: Namespace, model: Darknet, bench: Bench) -> Goal:
    """Read the goal of a command line. Raises DataError where the network is there already."""
    if args.percent is not None:
        return Goal("groups", 1 - args.percent, f"--percent {args.percent:g}")
    if args.target_speedup is not None:
        goal = Goal("ms", 1 / args.target_speedup, f"--target-speedup {args.target_speedup:g}")
    elif args.target_latency is not None:
        goal = Goal("ms", args.target_latency / bench.time(model)[0].ms, f"--target-latency {args.target_latency:g}")
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


def groups_to_cut(goal: Goal, model: Darknet, groups: Groups, plan: Plan, bench: Bench) -> int:
    """Give how many groups of a plan to cut for a goal. Raises DataError where it cannot be met."""
    if goal.kind == "groups":
        return plan.count(1 - goal.share, goal.flag)
    count_of = {"parameters": count_parameters, "BFLOPs": count_flops}.get(goal.kind)

    def left(keep: Mask) -> float:
        """Give the share that is left."""
        if count_of is None:
            before, after = bench.time(model, cut(model, groups, keep, path=model.cfg.path))
            return after.ms / before.ms
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


@dataclass(frozen=True)
class Step:
    """One cut: the network before it, its groups, what was planned and kept, and the compact network.

    `errors` are those of check_exactness; `compensation` is how far constants that are carried on differ from constants
    that are put out, relative to the largest value of each head: what padding and gates make of it.
    """

    start: Darknet
    groups: Groups
    plan: Plan
    count: int
    keep: Mask
    compact: Darknet
    errors: dict[str, float]
    compensation: float | None


def cut_once(
    args: Namespace, goal: Goal, model: Darknet, bench: Bench, *, path: str, notes: Sequence[str] = ()
) -> Step:
    """Rank, plan, cut as a command line asks for, and let what is left work."""
    groups = find_groups(model, is_approximate=args.approximate)
    plan = make_plan(
        model,
        groups,
        rank_groups(args, model, groups, bench),
        cuts_residual=args.strategy == "slim",
        layer_keep=args.layer_keep,
        divisor=args.divisor,
    )
    count = groups_to_cut(goal, model, groups, plan, bench)
    keep = plan.keep(count)
    compact = cut(model, groups, keep, path=path, notes=notes)
    errors = {} if args.approximate else check_exactness(model, groups, keep, compact)
    compensation = make_work(args, model, groups, keep, compact, bench)
    return Step(model, groups, plan, count, keep, compact, errors, compensation)


def make_work(
    args: Namespace, model: Darknet, groups: Groups, keep: Mask, compact: Darknet, bench: Bench
) -> float | None:
    """Carry constants on and estimate statistics anew, as a command line asks for; see Step.compensation."""
    error = None
    if args.compensate:
        constants = compensate(model, compact, groups, keep)
        error = difference(with_constants(model, groups, keep, constants), compact)
    if args.recalibrate and bench.train:
        recalibrate(compact.to(bench.device), bench.inputs(model, args.recalibrate))
        compact.cpu()
    return error


def safe_share(args: Namespace, step: Step, bench: Bench, *, loss: float, images: int) -> float:
    """Give the greatest share of the free groups that costs at most `loss` of mAP@.5 on so many pictures."""

    def score(keep: Mask) -> float:
        compact = cut(step.start, step.groups, keep, path=step.compact.cfg.path)
        make_work(args, step.start, step.groups, keep, compact, bench)
        return bench.judge(compact, images).map50

    least = bench.judge(step.start, images).map50 - loss
    return largest_within(step.plan, step.count, score, least)


def count_flops(model: Darknet) -> float:
    """Count the BFLOPs at the cfg's own input size."""
    return sum(layer.flops for layer in model.layers) / 1e9


def rank_groups(args: Namespace, model: Darknet, groups: Groups, bench: Bench) -> Values:
    """Give the importance of every group by the criterion of a command line.

    Raises DataError where it says nothing: γ that are all alike, or no training pictures for `taylor`.
    """
    if args.criterion == "random":
        return random_values(groups, args.seed)
    if args.criterion in ("l1", "l2"):
        return filter_norm(model, groups, int(args.criterion[1]))
    gammas = gamma(model, groups)
    free = gammas[groups.is_free & ~np.isnan(gammas)]
    if not len(free):
        raise DataError(f"{model.cfg.path}: no channel that may go has a γ (take --criterion l2)")
    if args.criterion == "gamma":
        if np.ptp(free) <= ALIKE * free.max():
            raise DataError(
                f"every γ is {free[0]:.3g}, which tells no channel from another: sparse training first"
                " (train.py -sr), or another --criterion"
            )
        return gammas
    recipe = load_recipe(args.hyp, Recipe()) if args.hyp else Recipe()
    return taylor(model, groups, _losses(model, bench, recipe, args.batches))


def _losses(model: Darknet, bench: Bench, recipe: Recipe, count: int) -> Iterator[Tensor]:
    """Give the loss of one batch of training pictures after another."""
    step_loss = make_step_loss(model, model, recipe, bench.device, bench.dtype)
    model.to(bench.device).eval()
    for batch in bench.batches(model, count * bench.settings.batch_size):
        yield step_loss(to_input(batch.pictures, bench.device), batch.targets.to(bench.device))[0]
    model.cpu()
