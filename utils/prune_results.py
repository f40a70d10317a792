"""What pruning leaves behind: where it goes, what its report tells, and all of its files or none."""

import os
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models import Darknet, WeightsError, dump, save_weights
from models.weights import save_checkpoint

from .bench import Bench
from .cli import BEST
from .log import DataError, log
from .prune_report import Pruning, layer_rows, network_row, write_report
from .residual_blocks import Block
from .scores import Evaluation
from .slimming import Step

REPORT = ("report.md", "report.json", "report.png")


def output_paths(args: Namespace) -> dict[str, Path]:
    """Give the files to write. Raises DataError where one of them is what is read."""
    folder = Path(args.output)
    weights = folder if args.output else Path("weights")
    paths = {"cfg": folder / "pruned.cfg", "weights": weights / "pruned.weights", "pt": weights / "pruned.pt"}
    for path in paths.values():
        if any(each and Path(each).resolve() == path.resolve() for each in (args.cfg, args.weights)):
            raise DataError(f"{path}: is read and would be written over (give --output another folder)")
    for place in {folder, weights}:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise DataError(f"{place}: cannot be written to (give --output another folder)")
    there = [path for path in (*paths.values(), *(folder / name for name in REPORT)) if path.exists()]
    if there:
        log.info("there already, and will be written over: %s", ", ".join(map(str, there)))
    return paths | {"report": folder}


def describe(
    args: Namespace,
    model: Darknet,
    blocks: Sequence[Block],
    steps: Sequence[Step],
    bench: Bench,
    evaluations: Sequence[Evaluation | None],
    *,
    command: str,
) -> Pruning:
    """Gather what the report tells."""
    step = steps[-1]
    size, (before, after) = bench.settings.size, bench.time(model, step.compact)
    rows = (("original", model, before), ("masked", step.start, None), ("compact", step.compact, after))
    return Pruning(
        command,
        model.cfg.path,
        args.weights or BEST,
        args.strategy,
        args.criterion,
        args.percent,
        steps[0].plan.free,
        sum(each.gone for each in steps),
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


def write_results(compact: Darknet, pruning: Pruning, paths: dict[str, Path], *, described: Mapping[str, Any]) -> None:
    """Write the cfg, its .weights, both in a checkpoint that describes itself, and the report: all, or nothing."""
    first, last, folder = pruning.networks[0], pruning.networks[-1], paths["report"]
    notes = (
        f"pruned by: {' '.join(pruning.command.splitlines())}",
        f"{last.parameters:,} of {first.parameters:,} parameters",
    )
    text = "".join(f"# {note}\n" for note in notes) + dump(compact.cfg)
    network = {"cfg": text, "cfg_path": str(paths["cfg"]), "model": compact.state_dict()}
    try:
        with TemporaryDirectory(prefix=".pruned-", dir=folder) as name:
            made = Path(name)
            (made / "pruned.cfg").write_text(text, "utf-8", "surrogateescape")
            save_weights(compact, made / "pruned.weights")
            save_checkpoint(made / "pruned.pt", {**described, **network})
            write_report(pruning, made)
            targets = {path.name: path for path in paths.values()} | {each: folder / each for each in REPORT}
            for each in made.iterdir():
                shutil.move(each, targets[each.name])
    except (OSError, WeightsError) as error:
        raise DataError(f"{folder}: cannot be written to: {error}") from None
