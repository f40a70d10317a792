"""Prune a network: cut the channels that it would miss least, and check what is left.

    python normal_prune.py --weights runs/sparse/last.pt --data data/x.data --percent 0.6

Writes pruned.cfg, weights/pruned.weights and .pt, and report.md, .json and .png; prints what it did to parameters,
operations, size, latency and mAP. Takes seconds, and as long as three tests take where --data is given.
"""

import logging
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from models import Darknet
from models.darknet import count_parameters
from utils import cli
from utils.bench import Bench, make_bench
from utils.device import autocast_type, seed_everything, select_device
from utils.evaluate import Settings
from utils.guard import TOLERATED, verdict
from utils.log import DataError, log
from utils.prune import find_groups, mask
from utils.prune_flags import parse_args
from utils.prune_report import summary_table
from utils.prune_results import describe, output_paths, write_results
from utils.residual_blocks import Block, choose_blocks, remove_blocks
from utils.scores import Evaluation
from utils.sensitivity import measure_sensitivity, write_sensitivity
from utils.slimming import Step, cut_once, make_goal, plan_cut, rank_groups, safe_count
from utils.tuning import tune

SEARCHED = 200  # validation pictures that judge what is only compared


def main(argv: Sequence[str] | None = None) -> None:
    """Open, cut, check, judge, write."""
    args = parse_args(__doc__, argv)
    device = select_device(args.device)
    paths = output_paths(args)
    detector = cli.open_detector(args)
    log.getChild("cfg").setLevel(logging.ERROR)  # what there is to say of the cfg has been said, its copies repeat it
    model = detector.model
    settings = Settings(
        cli.network_size(model, args.img_size),
        max_det=detector.data.max_det if detector.data else 100,
        batch_size=args.batch_size,
        workers=args.workers,
        is_stretched=args.stretch,
        is_single_class=args.single_cls,
    )
    bench = make_bench(detector, settings, device=device, dtype=autocast_type(args.precision, device))
    check_needs(args, bench)
    seed_everything(args.seed)
    words = shlex.join(["normal_prune.py", *(sys.argv[1:] if argv is None else argv)])
    blocks = choose_blocks(model, args.layers) if args.layers else []
    start = take_out(model, blocks) if blocks else model
    if args.sensitivity:
        explore(args, start, bench, paths["report"])
    steps = cut_in_steps(args, model, start, bench, path=str(paths["cfg"]))
    if args.recalibrate and not bench.train:
        log.info("no --data with train= is given: batch normalisation keeps the statistics of the whole network")
    if not bench.valid:
        log.info("no --data with valid= is given: nothing is tested, and the network may be a ruin")
    evaluations = judge(args, model, steps, bench) if bench.valid else [None] * 3
    pruning = describe(args, model, blocks, steps, bench, evaluations, command=words)
    write_results(steps[-1].compact, pruning, paths, described=detector.described)
    log.info(summary_table(pruning))
    log.info("wrote %s, %s and .pt, and report.md, .json and .png", paths["cfg"], paths["weights"])


def check_needs(args: Namespace, bench: Bench) -> None:
    """Raise DataError where flags need pictures that are not given."""
    needs = {
        "valid": {"--max-drop": args.max_drop is not None, "--sensitivity": args.sensitivity},
        "train": {"--criterion taylor": args.criterion == "taylor", "--iterative": args.iterative > 1},
    }
    for split, flags in needs.items():
        for flag, is_given in flags.items():
            if is_given and getattr(bench, split) is None:
                raise DataError(f"{flag}: needs --data with {split}=")


def take_out(model: Darknet, blocks: Sequence[Block]) -> Darknet:
    """Return the network without these blocks, and say which they are."""
    left = remove_blocks(model, blocks, path=model.cfg.path)
    names = ", ".join(f"{block.first} to {block.last}" for block in sorted(blocks, key=lambda block: block.first))
    count = f"{len(blocks)} residual block{'s' * (len(blocks) > 1)}"
    log.info("%s taken out (layers %s): parameters %s", count, names, shrinking(model, left))
    return left


def cut_in_steps(args: Namespace, model: Darknet, start: Darknet, bench: Bench, *, path: str) -> list[Step]:
    """Cut `start`, `model` without the blocks that go, in steps of one share, with a short training between two."""
    goal = make_goal(args, model, start, bench)
    if args.iterative > 1:
        plan_cut(args, goal, start, bench)  # what cannot be reached is told before any training
        goal = replace(goal, share=goal.share ** (1 / args.iterative))
    steps: list[Step] = []
    for number in range(args.iterative):
        start = tune(args, steps[-1].compact, bench, epochs=args.epochs) if steps else start
        now = replace(goal, whole=goal.whole * goal.share**number)
        steps.append(cut_once(args, now, start, bench, path=path))
        text = f"step {number + 1} of {args.iterative}: " if args.iterative > 1 else ""
        gone, free, sizes = steps[-1].gone, steps[-1].plan.free, shrinking(steps[-1].start, steps[-1].compact)
        log.info("%s%s of %s free groups cut, parameters %s", text, f"{gone:,}", f"{free:,}", sizes)
    return steps


def explore(args: Namespace, model: Darknet, bench: Bench, folder: Path) -> None:
    """Measure and draw what mAP every set of layers costs that is cut alone."""
    groups = find_groups(model, is_approximate=args.approximate)
    values = rank_groups(args, model, groups, bench)
    rows = measure_sensitivity(model, groups, values, lambda network: bench.judge(network, SEARCHED).map50)
    write_sensitivity(rows, folder)
    log.info("wrote sensitivity.json and .png")


def judge(args: Namespace, model: Darknet, steps: Sequence[Step], bench: Bench) -> list[Evaluation]:
    """Test original, masked and compact network. Raises DataError where the guard refuses what is left."""
    step = steps[-1]
    masked = mask(step.start, step.groups, step.keep)
    before, between, after = (bench.judge(each) for each in (model, masked, step.compact))
    problem = verdict(before.map50, after.map50, max_drop=args.max_drop)
    drop = before.map50 - after.map50
    tolerated = TOLERATED if args.max_drop is None else min(TOLERATED, args.max_drop / 100)
    hints = []
    if drop > tolerated and steps[0].gone:
        count = safe_count(args, model, step, bench, loss=tolerated, images=SEARCHED)
        share = math.floor(100 * (count + sum(each.gone for each in steps[:-1])) / steps[0].plan.free) / 100
        which = f"--percent {share:.2f}" if count and share else "no --percent that was tried"
        hints.append(f"{which} would lose at most {100 * tolerated:g} points before fine-tuning")
    if problem and not args.force:
        hints.append("--force writes it all the same")
        raise DataError(f"{problem}; nothing is written ({'; '.join(hints)})")
    if problem or drop > tolerated:
        problem = problem or f"mAP@.5 falls by {100 * drop:.1f} points, from {before.map50:.3f} to {after.map50:.3f}"
        log.warning("%s", "; ".join((problem, *hints)))
    return [before, between, after]


def shrinking(before: Darknet, after: Darknet) -> str:
    """Say how many parameters two networks have."""
    return f"{count_parameters(before):,} to {count_parameters(after):,}"


if __name__ == "__main__":
    cli.run(main)
