"""Short trainings inside other work, such as those between two steps of pruning."""

import math
from argparse import Namespace

import torch

from models import Darknet

from .bench import Bench
from .datasets import Pictures, TrainingBatches, make_loader
from .device import seed_everything
from .engine import make_step_loss, make_trainer, train_one_epoch
from .log import log
from .recipe import Recipe, load_recipe
from .schedule import batches_per_step


def tune(args: Namespace, model: Darknet, bench: Bench, *, epochs: int) -> Darknet:
    """Train a network for some epochs by our recipe (--hyp), and return the moving average of its weights."""
    assert bench.train is not None
    seed_everything(args.seed)
    recipe = load_recipe(args.hyp, Recipe())
    model = model.to(device=bench.device, memory_format=torch.channels_last)
    pictures = Pictures(bench.train, model.channels, recipe, args.seed)
    mosaic_epochs = round(epochs * (1 - recipe.close_mosaic))
    sizes = [bench.settings.size]
    batches = TrainingBatches(bench.train.sizes, args.batch_size, sizes, args.seed, mosaic_epochs, stride=model.stride)
    loader = make_loader(pictures, batches, workers=args.workers)
    accumulate = batches_per_step(recipe, args.batch_size, epochs * len(loader))
    trainer = make_trainer(
        model,
        recipe,
        epochs=epochs,
        steps=math.ceil(len(loader) / accumulate),
        device=bench.device,
        dtype=bench.dtype,
        seed=args.seed,
    )
    step_loss = make_step_loss(model, model, recipe, bench.device, bench.dtype)
    for batches.epoch in range(epochs):
        title = f"epoch {batches.epoch + 1}/{epochs}"
        losses = train_one_epoch(
            trainer, loader, step_loss, device=bench.device, accumulate=accumulate, title=title, freeze=model.freeze
        )
        log.info("%s: loss %.3f", title, losses["loss"])
    return trainer.ema.module.cpu().eval()
