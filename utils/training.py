"""A whole training: what train.py and distill.py have in common, from the settings to the last picture of the run."""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from models import Darknet, load_cfg, load_weights
from models.darknet import count_parameters
from models.quant import QuantConv2d, start_steps
from models.weights import checkpoint_cfg, describe, load_checkpoint

from . import cli, dist
from .compensate import recalibrate
from .darknet_recipe import DarknetRecipe
from .datasets import Item, Pictures, TrainingBatches, collate, make_loader, to_input
from .device import autocast_type, seed_everything, select_device
from .distillation import Distiller
from .distillation_flags import make_lessons
from .engine import (
    Trainer,
    compile_model,
    distribute,
    make_freeze,
    make_step_loss,
    make_trainer,
    start_sparsity,
    synchronise_statistics,
    train_one_epoch,
)
from .evaluate import Evaluation, Settings, evaluate
from .lists import load_data
from .log import DataError, log
from .memory import largest_batch
from .runs import Run, new_folder, run_folder
from .schedule import AnyRecipe, batches_per_step
from .teacher import FILE, check_teacher, load_teacher, save_teacher
from .train_flags import make_plan, make_recipe, restore_args, set_bits
from .training_data import read_images, settle_lengths, training_pictures, training_sizes

STARTING_BATCHES = 8
Judgement = tuple[Evaluation, list[dict[str, Any]]]


def train(args: argparse.Namespace) -> None:
    """Train, test and save epoch by epoch, as the flags say or as the checkpoint does that they resume."""
    resumed = load_checkpoint(args.resume) if args.resume else {}
    if resumed:
        args = restore_args(args, resumed)
    device = select_device(args.device)
    with dist.joined(device):
        _train(args, resumed, device)


def _train(args: argparse.Namespace, resumed: dict[str, Any], device: torch.device) -> None:
    """Train from the start or from the checkpoint `resumed`; each of several processes its part."""
    dtype = autocast_type(args.precision, device)
    data = load_data(args.data)
    names = ("object",) if args.single_cls else data.names
    seed_everything(args.seed)
    cfg = checkpoint_cfg(resumed, args.resume) if resumed else set_bits(load_cfg(args.cfg), args)
    recipe = make_recipe(args, cfg, resumed)  # before the network: what it reads of the cfg is not set aside
    model = Darknet(cfg, allow_unknown=args.allow_unknown)
    cli.check_model(model, names, args.data)
    _check_points(model)
    sizes, test_size = training_sizes(model, args, recipe)
    filled = load_weights(model, args.weights) if args.weights and not resumed else []
    name = args.name or Path(args.cfg).stem
    folder = dist.from_first(lambda: run_folder(args.resume, resumed) if resumed else new_folder(name))
    teacher = load_teacher(args, names, folder / FILE if resumed else None) if args.t_weights else None
    if teacher:
        check_teacher(teacher, model, [*sizes, test_size], args)
    train_set, valid_set = read_images(data, is_single=args.single_cls)
    model = model.to(device=device, memory_format=torch.channels_last)
    if args.batch_size == "auto":
        args.batch_size = min(len(train_set.paths), largest_batch(model, recipe, sizes[-1], device, dtype))
    args.batch_size, args.epochs = settle_lengths(args, recipe, len(train_set.paths))
    model = synchronise_statistics(model, device) if args.sync_bn else model
    distiller = Distiller(model, teacher, make_lessons(args, recipe)) if teacher else None

    run = Run(folder, resumed, args=args, recipe=recipe, names=names)
    log.info("%s: %s parameters, %d heads, on %s", cfg.path, f"{count_parameters(model):,}", len(model.heads), device)
    if filled:
        log.info("%s fills layers %s, the others start fresh", args.weights, describe(model, filled))
    for line in distiller.describe() if distiller else []:
        log.info("%s", line)
    if teacher and not (resumed or args.nosave):
        save_teacher(teacher, names, folder)
    pictures, batches = training_pictures(model, train_set, data.train, sizes, recipe, args)
    run.draw_inputs(pictures, batches, valid_set)
    if not resumed:
        _start_quantisers(model, pictures, batches, device, dtype, has_weights=bool(filled))
    loader = make_loader(pictures, batches, workers=args.workers)
    trainer, train_epoch = _make_epochs(args, resumed, model, recipe, loader, distiller, device, dtype)
    settings = Settings(
        test_size,
        max_det=data.max_det,
        batch_size=args.batch_size,
        workers=args.workers,
        is_stretched=isinstance(recipe, DarknetRecipe) and not recipe.distortion.keeps_shape,
    )
    judge = partial(evaluate, labelled=valid_set, names=names, settings=settings, device=device, dtype=dtype)
    evaluation, results = run_epochs(args, run, trainer, batches, train_epoch, judge, first=resumed.get("epoch", 0))
    run.draw_results(evaluation, results, valid_set)
    run.close()


def _check_points(model: Darknet) -> None:
    """Raise DataError where a head tells another point of a box than the centre, which the losses do not know."""
    for head in model.heads:
        if head.point != "center":
            line = model.expanded.sections[1 + head.layer].line_of("yolo_point")
            raise DataError(
                f"{model.cfg.path}:{line}: yolo_point={head.point} is detected with, but not trained (set"
                " yolo_point=center)"
            )


def _start_quantisers(
    model: Darknet,
    pictures: Pictures,
    batches: TrainingBatches,
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_weights: bool,
) -> None:
    """Fit a quantised network to its first batches: learned steps of inputs of which nothing was learned, and, where it
    has weights, the statistics of batch normalisation.

    Quantised numbers are of another size than those that the float network's statistics are of: slim-m, whose mAP@.5 on
    BCCD is 0.86, has 0.03 with them at 8 bits, and 0.83 with its own. Of several processes each sees its own batches;
    what the first one finds holds, as all of its weights do.
    """
    if not any(isinstance(module, QuantConv2d) for module in model.modules()):
        return
    keys = islice(batches, STARTING_BATCHES)
    inputs = [to_input(collate([pictures[key] for key in batch]).pictures, device) for batch in keys]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if count := start_steps(model, inputs[0]):
            log.info("the steps of the inputs of %d convolutions start from the first batch", count)
        if has_weights:
            recalibrate(model, inputs)
            log.info("batch normalisation starts from the statistics of the first %d batches", len(inputs))


def _make_epochs(
    args: argparse.Namespace,
    resumed: dict[str, Any],
    model: Darknet,
    recipe: AnyRecipe,
    loader: DataLoader[Item],
    distiller: Distiller | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Trainer, Callable[..., dict[str, float]]]:
    """Make the trainer of a network, and what trains it for an epoch."""
    accumulate = batches_per_step(recipe, args.batch_size * dist.world_size(), args.epochs * len(loader))
    steps = math.ceil(len(loader) / accumulate)
    lengths = {"epochs": args.epochs, "steps": steps}
    trainer = make_trainer(model, recipe, **lengths, device=device, dtype=dtype, seed=args.seed, distiller=distiller)
    trainer = start_sparsity(trainer, make_plan(args), model, recipe, **lengths, first=args.freeze)
    if resumed:
        trainer.restore(resumed["trainer"])
    freeze = make_freeze(model, args.freeze)
    freeze(trainer.scheduler.last_epoch)  # before DDP looks at what learns
    pupil = distiller.pupil if distiller else None
    network = distribute(model, device, pupil)
    if args.compile:
        compile_model(pupil or model, device)
    train_epoch = partial(
        train_one_epoch,
        trainer,
        loader,
        make_step_loss(network, model, recipe, device, dtype, distiller),
        device=device,
        accumulate=accumulate,
        hold_back=getattr(network, "no_sync", nullcontext),
        freeze=freeze,
        after_backward=trainer.sparsity.shrink if trainer.sparsity else None,
    )
    return trainer, train_epoch


def run_epochs(
    args: argparse.Namespace,
    run: Run,
    trainer: Trainer,
    batches: TrainingBatches,
    train_epoch: Callable[..., dict[str, float]],
    judge: Callable[[Darknet], Judgement],
    *,
    first: int,
) -> Judgement:
    """Train, test and save epoch by epoch from `first` on, and give the last judgement."""
    averaged, images = trainer.ema.module, len(batches.shapes)
    if first == 0 and not args.nosave:  # so that a run that dies in its first epoch can be resumed too
        run.save(averaged, trainer, epoch=0, seen=0, is_best=False)
    for epoch in range(first, args.epochs):
        start, is_end = time.time(), epoch + 1 == args.epochs
        seed_everything(args.seed, epoch)
        batches.epoch = epoch
        title = f"epoch {epoch + 1}/{args.epochs}"
        if trainer.sparsity:
            trainer.sparsity.begin(epoch)
        if trainer.distiller:
            trainer.distiller.begin(epoch)
        losses = train_epoch(title=title)
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": losses, "lr": trainer.scheduler.get_last_lr()[0]}
        if trainer.sparsity:
            row["gammas"] = trainer.sparsity.finish(epoch)
            log.info("%s: %s", title, trainer.sparsity.describe(row["gammas"]))
        dist.copy_statistics(averaged)
        if is_end or not args.notest:
            evaluation, results = judge(averaged)
            row |= evaluation.means()
            log.info(evaluation.table() if is_end else f"{title}: {evaluation.line()}")
        is_best = run.add_metrics(row | {"seconds": time.time() - start})
        is_last = is_end or run.has_settled(epoch + 1, args.patience)
        if is_last and not is_end:
            log.info(evaluation.table())
        if is_last or not args.nosave:
            run.save(
                averaged, None if is_last else trainer, epoch=epoch + 1, seen=(epoch + 1) * images, is_best=is_best
            )
        if trainer.sparsity:
            run.draw_gammas(trainer.sparsity.gammas(), epoch + 1)
        run.draw_curves()
        if is_last:
            break
    return evaluation, results
