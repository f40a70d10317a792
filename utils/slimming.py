"""One step of slimming: how much to cut for a goal, and the compact network with what it needs to work."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import Darknet
from models.darknet import count_parameters

from .bench import Bench
from .cli import BEST
from .compensate import compensate, recalibrate, with_constants
from .datasets import to_input
from .engine import make_step_loss
from .guard import check_exactness, difference, largest_within
from .importance import Values, filter_norm, gamma, random_values, taylor
from .lint import bflops
from .log import DataError, log
from .plan import Plan, make_plan, smallest_cut
from .prune import Groups, Mask, cut, cut_cfg, find_groups
from .recipe import Recipe, load_recipe

ALIKE = 1e-3  # of the largest γ: a fresh network's differ by nothing


@dataclass(frozen=True)
class Goal:
    """What is to shrink to which share of itself: "groups", "parameters", "BFLOPs" or "ms" of a forward pass.

    `flag` is how the user said it, `whole` what there is of it before.
    """

    kind: str
    share: float
    flag: str
    whole: float = 1


def make_goal(args: Namespace, model: Darknet, start: Darknet, bench: Bench) -> Goal:
    """Read the goal of a command line for `start`, what is left of `model` without the blocks that go.

    Raises DataError where the network is there already, unless blocks go.
    """
    if args.percent is not None:
        return Goal("groups", 1 - args.percent, f"--percent {args.percent:g}")
    if args.target_speedup is not None or args.target_latency is not None:
        kind = "ms"
        before, now = (timing.ms for timing in bench.time(model, start))
        wanted = args.target_latency or before / args.target_speedup
        name, value = ("latency", args.target_latency) if args.target_latency else ("speedup", args.target_speedup)
    else:
        name, kind, unit = ("params", "parameters", 1) if args.target_params else ("flops", "BFLOPs", 1e9)
        before, now = (cost(kind, network, bench) for network in (model, start))
        value = getattr(args, f"target_{name}")
        wanted = value * before if value <= 1 else value / unit
    goal = Goal(
        kind, wanted / now, f"--target-{name} {value:,g}" if value < 1e6 else f"--target-{name} {value:,.0f}", now
    )
    if goal.share >= 1 and start is model:
        raise DataError(f"{goal.flag}: the network is there already ({in_units(goal, 1)}), nothing is to be cut")
    return goal


def cost(kind: str, model: Darknet, bench: Bench) -> float:
    """Count "parameters" or "BFLOPs" at the size to test at."""
    return count_parameters(model) if kind == "parameters" else bflops(model, bench.settings.size) or bflops(model)


def in_units(goal: Goal, share: float) -> str:
    """Write a share of what a goal is to shrink, in its units."""
    form = {"parameters": "{:,.0f} parameters", "BFLOPs": "{:.3f} BFLOPs", "ms": "{:.1f} ms"}[goal.kind]
    return form.format(share * goal.whole)


def groups_to_cut(goal: Goal, model: Darknet, groups: Groups, plan: Plan, bench: Bench) -> int:
    """Give how many groups of a plan to cut for a goal. Raises DataError where it cannot be met."""
    if goal.kind == "groups":
        return plan.count(1 - goal.share, goal.flag)

    def left(keep: Mask) -> float:
        """Give the share that is left."""
        if goal.kind == "ms":
            before, after = bench.time(model, cut(model, groups, keep, path=model.cfg.path))
            return after.ms / before.ms
        with torch.device("meta"):  # the arithmetic alone
            compact = Darknet(cut_cfg(model, groups, keep, path=model.cfg.path), allow_unknown=True)
        return cost(goal.kind, compact, bench) / cost(goal.kind, model, bench)

    best = left(plan.keep(len(plan.order)))
    if best > goal.share:
        raise DataError(
            f"{goal.flag}: asks for {in_units(goal, goal.share)}, {goal.share:.3f} of what there is; the most that can"
            f" go leaves {in_units(goal, best)}, {best:.3f} (see --strategy slim, --layer-keep, --divisor, --layers)"
        )
    log.info("%s: %s now, %s if all went that can; searching", goal.flag, in_units(goal, 1), in_units(goal, best))
    return smallest_cut(plan, lambda keep: left(keep) <= goal.share)


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

    @property
    def gone(self) -> int:
        """Count the groups that are cut."""
        return int((~self.keep).sum())


def plan_cut(args: Namespace, goal: Goal, model: Darknet, bench: Bench) -> tuple[Groups, Plan, int]:
    """Find the groups, order them, and give how many to cut for a goal. Raises DataError where it cannot be met."""
    groups = find_groups(model, is_approximate=args.approximate)
    plan = make_plan(
        model,
        groups,
        rank_groups(args, model, groups, bench),
        cuts_residual=args.strategy == "slim",
        layer_keep=args.layer_keep,
        divisor=args.divisor,
    )
    return groups, plan, groups_to_cut(goal, model, groups, plan, bench)


def cut_once(args: Namespace, goal: Goal, model: Darknet, bench: Bench, *, path: str) -> Step:
    """Plan and cut as a command line asks for, and let what is left work. Raises DataError where nothing would go."""
    groups, plan, count = plan_cut(args, goal, model, bench)
    keep = plan.keep(count)
    if count and keep.all():
        raise DataError(f"--divisor {args.divisor}: fills every layer up again, so that nothing would be cut")
    compact = cut(model, groups, keep, path=path)
    is_exact = np.array_equal(groups.is_free, find_groups(model).is_free)  # --approximate found nothing to cut through
    errors = check_exactness(model, groups, keep, compact) if is_exact else {}
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
        images = min(len(bench.train.paths), args.recalibrate)
        if bench.settings.size == (model.stride,) * 2 and images % args.batch_size == 1:
            raise DataError(
                "--recalibrate: the last batch is one picture of one cell, which has no variance"
                " (take a larger --img-size, or another --batch-size)"
            )
        recalibrate(compact.to(bench.device), bench.inputs(model, args.recalibrate))
        compact.cpu()
    return error


def safe_count(args: Namespace, model: Darknet, step: Step, bench: Bench, *, loss: float, images: int) -> int:
    """Give how many groups a step can cut for at most `loss` of the mAP@.5 of `model` on so many pictures."""

    def score(keep: Mask) -> float:
        compact = cut(step.start, step.groups, keep, path=step.compact.cfg.path)
        make_work(args, step.start, step.groups, keep, compact, bench)
        return bench.judge(compact, images).map50

    least = bench.judge(model, images).map50 - loss
    return largest_within(step.plan, step.count, score, least)


def rank_groups(args: Namespace, model: Darknet, groups: Groups, bench: Bench) -> Values:
    """Give the importance of every group by the criterion of a command line.

    Raises DataError where it says nothing: no γ, or γ that are all alike. `taylor` needs training pictures.
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
                f"{args.weights or BEST}: every γ is {free[0]:.3g}, which tells no channel from another:"
                " sparse training first (train.py -sr), or another --criterion"
            )
        return gammas
    recipe = load_recipe(args.hyp, Recipe())
    return taylor(model, groups, _losses(model, bench, recipe, args.batches))


def _losses(model: Darknet, bench: Bench, recipe: Recipe, count: int) -> Iterator[Tensor]:
    """Give the loss of one batch of training pictures after another."""
    step_loss = make_step_loss(model, model, recipe, bench.device, bench.dtype)
    model.to(bench.device).eval()
    for batch in bench.batches(model, count * bench.settings.batch_size):
        yield step_loss(to_input(batch.pictures, bench.device), batch.targets.to(bench.device))[0]
    model.cpu()
