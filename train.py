"""Train a detector from a cfg and a .data file.

    python train.py --data data/visdrone.data --cfg cfg/yolov3-tiny.cfg --batch-size 16 --epochs 300

Writes runs/<name>/ (log, metrics.jsonl, TensorBoard events, pictures, last.pt and best.pt, and both as
Darknet .weights) and copies the checkpoints to weights/. On 2 cores with --precision bf16 YOLOv3-tiny sees about 30
images a second at 320.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import Darknet, load_cfg, load_weights
from models.darknet import count_parameters
from models.weights import checkpoint_cfg, describe, load_checkpoint
from utils import cli
from utils.datasets import Pictures, TrainingBatches, make_loader
from utils.device import autocast_type, seed_everything, select_device
from utils.engine import StepLoss, make_trainer, train_one_epoch
from utils.evaluate import Settings, evaluate
from utils.labels import Labelled, check_labels, merge_classes
from utils.lists import DataSpec, load_data
from utils.log import DataError, log
from utils.loss import detection_loss
from utils.recipe import Recipe, load_recipe
from utils.runs import Run, new_folder, run_folder
from utils.schedule import batches_per_step
from utils.sparsity import shrink_gammas


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(__doc__)
    cli.add_model_flags(parser, is_training=True)
    cli.add_run_flags(parser)
    parser.add_argument(
        "--img-size", type=cli.side, nargs="+", default=[], help="longer side in pixels: N, or MIN MAX [TEST]"
    )
    parser.add_argument("--epochs", type=cli.positive, default=300, help="passes over the images (default: 300)")
    parser.add_argument("--name", default="", help="folder under runs/ (default: the cfg's name)")
    parser.add_argument("--seed", type=cli.natural, default=0, help="seed of all randomness (default: 0)")
    parser.add_argument("--hyp", default="", help="file of key=value lines over the recipe's defaults")
    parser.add_argument("--lr", type=cli.rate, help=f"peak learning rate (default: {Recipe.lr})")
    parser.add_argument("--adam", action="store_true", help="AdamW (at a tenth of --lr) instead of SGD")
    parser.add_argument("--multi-scale", action="store_true", help="draw a size between MIN and MAX for every batch")
    parser.add_argument("--rect", action="store_true", help="batches of like shapes, without mosaic")
    parser.add_argument("--cache-images", action="store_true", help="keep decoded images in memory")
    parser.add_argument("--notest", action="store_true", help="test after the last epoch only")
    parser.add_argument("--nosave", action="store_true", help="write checkpoints after the last epoch only")
    parser.add_argument("--resume", nargs="?", const="weights/last.pt", help="go on with a last.pt, as it was started")
    parser.add_argument("-sr", "--sparsity-regularization", action="store_true", help="sparse training for pruning")
    parser.add_argument("--s", type=cli.rate, default=1e-4, help="strength of -sr on every γ (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.resume:
        given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        if given - {"resume", "device", "workers"}:
            parser.error("--resume goes on as the run was started: give no other flag but --device and --workers")
    elif not (args.cfg and args.data):
        parser.error("give --cfg and --data, or --resume")
    if len(args.img_size) > 3 or args.img_size[:2] != sorted(args.img_size[:2]):
        parser.error("--img-size expects N, or MIN MAX [TEST] with MIN at most MAX")
    if len(set(args.img_size[:2])) > 1 and not args.multi_scale:
        parser.error("--img-size MIN MAX needs --multi-scale")
    if args.s != parser.get_default("s") and not args.sparsity_regularization:
        parser.error("--s needs -sr")
    if args.multi_scale and args.rect:
        parser.error("give --multi-scale or --rect, not both")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, test and save epoch by epoch."""
    args = parse_args(argv)
    resumed = load_checkpoint(args.resume) if args.resume else {}
    if resumed:
        args = restore_args(args, resumed)
    device = select_device(args.device)
    dtype = autocast_type(args.precision, device)
    recipe = Recipe(**resumed["recipe"]) if resumed else make_recipe(args)
    data = load_data(args.data)
    names = ("object",) if args.single_cls else data.names
    seed_everything(args.seed)
    cfg = checkpoint_cfg(resumed, args.resume) if resumed else load_cfg(args.cfg)
    model = Darknet(cfg, allow_unknown=args.allow_unknown)
    cli.check_model(model, names, args.data)
    sizes, test_size = training_sizes(model, args)
    filled = load_weights(model, args.weights) if args.weights and not resumed else []
    train_set, valid_set = read_images(data, is_single=args.single_cls)
    model = model.to(device=device, memory_format=torch.channels_last)

    folder = run_folder(args.resume, resumed) if resumed else new_folder(args.name or Path(args.cfg).stem)
    run = Run(folder, resumed, args=args, recipe=recipe, names=names)
    log.info("%s: %s parameters, %d heads, on %s", cfg.path, f"{count_parameters(model):,}", len(model.heads), device)
    if filled:
        log.info("%s fills layers %s, the others start fresh", args.weights, describe(model, filled))
    pictures, batches = training_pictures(model, train_set, sizes, recipe, args)
    run.draw_inputs(pictures, batches, valid_set)
    loader = make_loader(pictures, batches, workers=args.workers)
    accumulate = batches_per_step(recipe, args.batch_size, args.epochs * len(loader))
    steps = math.ceil(len(loader) / accumulate)
    trainer = make_trainer(model, recipe, epochs=args.epochs, steps=steps, device=device, dtype=dtype)
    if resumed:
        trainer.restore(resumed["trainer"])
    settings = Settings(test_size, max_det=data.max_det, batch_size=args.batch_size, workers=args.workers)
    step_loss = make_step_loss(model, recipe, device, dtype)
    after_backward = (lambda: shrink_gammas(model, args.s)) if args.sparsity_regularization else None

    if not resumed and not args.nosave:  # so that a run that dies in its first epoch can be resumed too
        run.save(trainer.ema.module, trainer, epoch=0, seen=0, is_best=False)
    for epoch in range(resumed.get("epoch", 0), args.epochs):
        start, is_last = time.time(), epoch + 1 == args.epochs
        seed_everything(args.seed, epoch)
        batches.epoch = epoch
        title = f"epoch {epoch + 1}/{args.epochs}"
        losses = train_one_epoch(
            trainer,
            loader,
            step_loss,
            device=device,
            accumulate=accumulate,
            title=title,
            freeze=model.freeze,
            after_backward=after_backward,
        )
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": losses, "lr": trainer.scheduler.get_last_lr()[0]}
        averaged = trainer.ema.module
        if is_last or not args.notest:
            evaluation, results = evaluate(averaged, valid_set, names, settings, device=device, dtype=dtype)
            row |= evaluation.means()
            log.info(evaluation.table() if is_last else f"{title}: {evaluation.line()}")
        is_best = run.add_metrics(row | {"seconds": time.time() - start})
        if is_last or not args.nosave:
            seen = (epoch + 1) * len(pictures)
            run.save(averaged, None if is_last else trainer, epoch=epoch + 1, seen=seen, is_best=is_best)
        run.draw_curves()
    run.draw_results(evaluation, results, valid_set)
    run.close()


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Give the recipe's defaults with --hyp, and then the flags, on top."""
    recipe = load_recipe(args.hyp, Recipe()) if args.hyp else Recipe()
    recipe = replace(recipe, optimizer="adamw") if args.adam else recipe
    return recipe if args.lr is None else replace(recipe, lr=args.lr)


def read_images(data: DataSpec, *, is_single: bool) -> list[Labelled]:
    """Read and check the images to train and to test on; the mistakes of both come together."""
    sources = [source for source in (data.train, data.valid) if source]
    if len(sources) < 2:
        raise DataError(f"{data.path}: needs train= and valid= for training")
    found, mistakes = [], []
    for source in sources:
        try:
            found.append(check_labels(source, len(data.names)))
        except DataError as error:
            mistakes.append(str(error))
    if mistakes:
        raise DataError("\n".join(mistakes))
    return [merge_classes(labelled) for labelled in found] if is_single else found


def restore_args(args: argparse.Namespace, resumed: dict[str, Any]) -> argparse.Namespace:
    """Give the settings that the interrupted run was started with; only device and workers may change."""
    if "settings" not in resumed:
        raise DataError(f"{args.resume}: carries no settings of a training (only a last.pt of train.py does)")
    if "trainer" not in resumed:
        raise DataError(f"{args.resume}: its training is finished (start a new one with --weights {args.resume})")
    changes = {"resume": args.resume, "workers": args.workers} | ({"device": args.device} if args.device else {})
    return argparse.Namespace(**resumed["settings"] | changes)


def training_sizes(model: Darknet, args: argparse.Namespace) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Give the network sizes (height, width) to train at and the one to test at: --img-size MIN [MAX [TEST]]."""
    asked = [cli.network_size(model, longer) for longer in args.img_size] or [model.size]
    smallest, largest, test = asked[0], asked[min(1, len(asked) - 1)], asked[-1]
    if not args.multi_scale:
        return [largest], test
    stride, (low, high) = model.stride, (max(smallest), max(largest))
    if low == high:  # one size: half as large again either way
        low, high = round(low / 1.5 / stride) * stride, round(high * 1.5 / stride) * stride
    return [cli.network_size(model, longer) for longer in range(max(low, stride), high + 1, stride)], test


def training_pictures(
    model: Darknet, train_set: Labelled, sizes: list[tuple[int, int]], recipe: Recipe, args: argparse.Namespace
) -> tuple[Pictures, TrainingBatches]:
    """Give the augmented pictures, in memory where asked, and the batches that are drawn from them."""
    pictures = Pictures(train_set, model.channels, recipe, args.seed)
    if args.cache_images:
        pictures.cache_in_memory(sizes[-1])
    mosaic_epochs = round(args.epochs * (1 - recipe.close_mosaic))
    shapes, stride = train_set.sizes, model.stride
    return pictures, TrainingBatches(shapes, args.batch_size, sizes, args.seed, mosaic_epochs, args.rect, stride)


def make_step_loss(model: Darknet, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> StepLoss:
    """Make the loss of one batch: forward in `dtype`, loss in fp32."""

    def step_loss(x: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            raws = model(x)
        return detection_loss(raws, targets, model.heads, tuple(x.shape[-2:]), recipe)

    return step_loss


if __name__ == "__main__":
    cli.run(main)
