"""What a training sees: checked images, the sizes of its batches, and how many epochs of them."""

import argparse
import math
from pathlib import Path

from models import Darknet

from . import cli, dist
from .darknet_recipe import HELD, DarknetRecipe, drawn_sizes
from .datasets import Pictures, TrainingBatches
from .labels import Labelled, check_labels, merge_classes
from .lists import DataSpec
from .log import DataError, log
from .odds import image_odds
from .schedule import AnyRecipe, batches_per_step
from .train_flags import BATCH_SIZE, EPOCHS


def read_images(data: DataSpec, *, is_single: bool) -> list[Labelled]:
    """Read and check the images to train and to test on; the mistakes of both come together."""
    sources = [source for source in (data.train, data.valid) if source]
    if len(sources) < 2:
        raise DataError(f"{data.path}: needs train= and valid= for training")
    found, mistakes = [], []
    with dist.first_goes_first():  # the others read its cache
        for source in sources:
            try:
                found.append(check_labels(source, len(data.names)))
            except DataError as error:
                mistakes.append(str(error))
    if mistakes:
        raise DataError("\n".join(mistakes))
    return [merge_classes(labelled) for labelled in found] if is_single else found


def training_sizes(
    model: Darknet, args: argparse.Namespace, recipe: AnyRecipe
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Give the network sizes (height, width) to train at and the one to test at: --img-size MIN [MAX [TEST]]."""
    asked = [cli.network_size(model, longer) for longer in args.img_size] or [model.size]
    smallest, largest, test = asked[0], asked[min(1, len(asked) - 1)], asked[-1]
    if isinstance(recipe, DarknetRecipe):
        return drawn_sizes(recipe, largest, model.stride), test
    if not args.multi_scale:
        return [largest], test
    stride, (low, high) = model.stride, (max(smallest), max(largest))
    if low == high:  # one size: half as large again either way
        low, high = round(low / 1.5 / stride) * stride, round(high * 1.5 / stride) * stride
    return [cli.network_size(model, longer) for longer in range(max(low, stride), high + 1, stride)], test


def training_pictures(
    model: Darknet,
    train_set: Labelled,
    source: Path,
    sizes: list[tuple[int, int]],
    recipe: AnyRecipe,
    args: argparse.Namespace,
) -> tuple[Pictures, TrainingBatches]:
    """Give the augmented pictures, decoded before where asked, and the batches that are drawn from them.

    `source` is the list of images, beside which --cache-images disk keeps them.
    """
    is_darknet, together = isinstance(recipe, DarknetRecipe), args.batch_size * dist.world_size()
    odds = None if is_darknet else image_odds(train_set.labels, recipe.image_weights)
    pictures = Pictures(train_set, model.channels, recipe.distortion if is_darknet else recipe, args.seed, odds=odds)
    if args.cache_images == "disk":
        pictures.cache_on_disk(Path(f"{source}.pictures"), sizes[-1])
    elif args.cache_images:
        pictures.cache_in_memory(sizes[-1])
    mosaic_epochs = args.epochs if is_darknet else round(args.epochs * (1 - recipe.close_mosaic))
    held = HELD * batches_per_step(recipe, together, 0) if is_darknet else 1
    shapes, stride = train_set.sizes, model.stride
    batches = TrainingBatches(
        shapes,
        args.batch_size,
        sizes,
        args.seed,
        mosaic_epochs,
        args.rect,
        stride=stride,
        held=held,
        rank=dist.rank(),
        world=dist.world_size(),
        odds=odds,
    )
    return pictures, batches


def settle_lengths(args: argparse.Namespace, recipe: AnyRecipe, images: int) -> tuple[int, int]:
    """Give the images a batch and the epochs to train.

    Where flags do not say so, 16 and 300, or the cfg's own batches and as many as `max_batches` iterations take.

    Raises DataError where neither is given.
    """
    if not isinstance(recipe, DarknetRecipe):
        return args.batch_size or BATCH_SIZE, args.epochs or EPOCHS
    batch_size = args.batch_size or recipe.mini_batch
    together = batch_size * dist.world_size()
    accumulate = batches_per_step(recipe, together, 0)
    steps = math.ceil(math.ceil(images / together) / accumulate)
    if not (args.epochs or recipe.max_batches):
        raise DataError(f"{args.cfg}: [net] has no max_batches, which says how long to train (or give --epochs)")
    epochs = args.epochs or math.ceil(recipe.max_batches / steps)
    log.info(
        "the cfg's recipe: policy %s, %d images a step, %d at a time; %d epochs are %d iterations of max_batches=%d",
        *(recipe.policy, together * accumulate, together, epochs, epochs * steps, recipe.max_batches),
    )
    if not recipe.distortion.keeps_shape:
        log.info("pictures are stretched as Darknet does: give test.py and detect.py --stretch (or set letter_box=1)")
    return batch_size, epochs
