"""Prune a network: cut the channels that it would miss least, and check what is left.

    python normal_prune.py --weights runs/sparse/last.pt --data data/x.data --percent 0.6

Writes pruned.cfg, weights/pruned.weights and .pt, and report.md, .json and .png; prints what it did to parameters,
operations, size, latency and mAP. Takes seconds, and as long as three tests take where --data is given.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models import Darknet, dump, save_weights
from models.darknet import count_parameters
from models.weights import save_checkpoint, write_atomically
from utils import cli
from utils.bench import Bench, make_bench
from utils.device import autocast_type, seed_everything, select_device
from utils.evaluate import Settings
from utils.guard import TOLERATED, verdict
from utils.log import DataError, log, start_logging
from utils.prune import find_groups, mask
from utils.prune_flags import parse_args
from utils.prune_report import Pruning, layer_rows, network_row, summary_table, write_report
from utils.residual_blocks import Block, choose_blocks, remove_blocks
from utils.scores import Evaluation
from utils.sensitivity import measure_sensitivity, write_sensitivity
from utils.slimming import Goal, Step, cut_once, make_goal, rank_groups, safe_share
from utils.tuning import tune

SEARCHED = 200  # validation pictures that judge what is only compared


def main(argv: Sequence[str] | None = None) -> None:
    """Open, cut, check, judge, write."""
    args = parse_args(__doc__, argv)
    device = select_device(args.device)
    paths = output_paths(args)
    detector = cli.open_detector(args)
    start_logging(tells_cfg=False)  # what the cfg's copies set aside has been told
    model = detector.model
    settings = Settings(
        cli.network_size(model, args.img_size),
        max_det=detector.data.max_det if detector.data else 100,
        batch_size=args.batch_size,
        workers=args.workers,
        is_stretched=args.stretch,
        is_single_class=args.single_cls,
    )
    dtype = autocast_type(args.precision, device)
    bench = make_bench(detector, settings, device=device, dtype=dtype)
    check_needs(args, bench)
    seed_everything(args.seed)
    words = shlex.join(["normal_prune.py", *(sys.argv[1:] if argv is None else argv)])
    blocks = choose_blocks(model, args.layers) if args.layers else []
    start = remove_blocks(model, blocks, path=model.cfg.path) if blocks else model
    if args.sensitivity:
        explore(args, start, bench, paths["report"])
    step = cut_in_steps(args, start, bench, path=str(paths["cfg"]), note=f"pruned by: {words}")
    evaluations = judge(args, model, step, bench) if bench.valid else [None] * 3
    if not bench.valid:
        log.info("no --data with valid= is given: nothing is tested, and the network may be a ruin")
    write_network(step.compact, paths, described=detector.described)
    pruning = describe(args, model, blocks, step, bench, evaluations, command=words)
    write_report(pruning, paths["report"])
    log.info(summary_table(pruning))
    log.info("wrote %s, %s and .pt, and report.md, .json and .png", paths["cfg"], paths["weights"])


def output_paths(args: Namespace) -> dict[str, Path]:
    """Give the files to write. Raises DataError where one of them is what is read."""
    folder = Path(args.output)
    weights = folder if args.output else Path("weights")
    paths = {"cfg": folder / "pruned.cfg", "weights": weights / "pruned.weights", "pt": weights / "pruned.pt"}
    for path in paths.values():
        if any(each and Path(each).resolve() == path.resolve() for each in (args.cfg, args.weights)):
            raise DataError(f"{path}: is read and would be written over (give --output another folder)")
        if path.exists():
            log.info("%s is there already and will be written over", path)
    folder.mkdir(parents=True, exist_ok=True)
    return paths | {"report": folder}


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


def cut_in_steps(args: Namespace, start: Darknet, bench: Bench, *, path: str, note: str) -> Step:
    """Cut in steps of one share each, with a short training between two, and give the last step."""
    goal = make_goal(args, start, bench)
    goal = Goal(goal.kind, goal.share ** (1 / args.iterative), goal.flag)
    step = cut_once(args, goal, start, bench, path=path, notes=[note])
    for number in range(1, args.iterative):
        log.info("step %d of %d: %s", number, args.iterative, summary(step))
        start = tune(args, step.compact, bench, epochs=args.epochs)
        step = cut_once(args, goal, start, bench, path=path)
    return step


def explore(args: Namespace, model: Darknet, bench: Bench, folder: Path) -> None:
    """Measure and draw what mAP every set of layers costs that is cut alone."""
    groups = find_groups(model, is_approximate=args.approximate)
    values = rank_groups(args, model, groups, bench)
    rows = measure_sensitivity(model, groups, values, lambda network: bench.judge(network, SEARCHED).map50)
    write_sensitivity(rows, folder)
    log.info("wrote sensitivity.json and .png")


def judge(args: Namespace, model: Darknet, step: Step, bench: Bench) -> list[Evaluation]:
    """Test original, masked and compact network. Raises DataError where the guard refuses what is left."""
    masked = mask(step.start, step.groups, step.keep)
    before, between, after = (bench.judge(each) for each in (model, masked, step.compact))
    problem = verdict(before.map50, after.map50, max_drop=args.max_drop)
    hint = ""
    if before.map50 - after.map50 > TOLERATED and step.count:
        share = safe_share(args, step, bench, loss=TOLERATED, images=SEARCHED)
        hint = f"--percent {share:.2f} would lose at most {100 * TOLERATED:g} points before fine-tuning"
    if problem and not args.force:
        raise DataError(f"{problem}; nothing is written ({hint}; --force writes it all the same)")
    if problem or hint:
        log.warning("%s", "; ".join(filter(None, (problem, hint))))
    return [before, between, after]


def summary(step: Step) -> str:
    """Say in a line what a step has cut."""
    return (
        f"{len(step.keep) - int(step.keep.sum())} of {step.plan.free} free groups cut, parameters"
        f" {count_parameters(step.start):,} to {count_parameters(step.compact):,}"
    )


def write_network(compact: Darknet, paths: dict[str, Path], *, described: Mapping[str, Any]) -> None:
    """Write the cfg, its .weights, and both in a checkpoint that describes itself."""
    text = dump(compact.cfg)
    save_weights(compact, paths["weights"])
    network = {"cfg": text, "cfg_path": str(paths["cfg"]), "model": compact.state_dict()}
    save_checkpoint(paths["pt"], {**described, **network})
    write_atomically(paths["cfg"], lambda partial: partial.write_text(text, "utf-8", "surrogateescape"))


def describe(
    args: Namespace,
    model: Darknet,
    blocks: Sequence[Block],
    step: Step,
    bench: Bench,
    evaluations: Sequence[Evaluation | None],
    *,
    command: str,
) -> Pruning:
    """Gather what the report tells."""
    size, (before, after) = bench.settings.size, bench.time(model, step.compact)
    rows = (("original", model, before), ("masked", step.start, None), ("compact", step.compact, after))
    return Pruning(
        command,
        model.cfg.path,
        args.weights or cli.BEST,
        args.strategy,
        args.criterion,
        args.percent,
        step.plan.free,
        len(step.keep) - int(step.keep.sum()),
        len(blocks),
        size,
        layer_rows(model, step.compact, blocks),
        tuple(
            network_row(name, network, size, timing=timing, evaluation=evaluation)
            for (name, network, timing), evaluation in zip(rows, evaluations, strict=True)
        ),
        step.errors.get("float64"),
        step.errors.get("float32"),
        step.compensation,
    )


if __name__ == "__main__":
    cli.run(main)
