"""Short trainings inside other work, such as those between two steps of pruning."""

import math

import torch

from models import Darknet

from .datasets import Pictures, TrainingBatches, make_loader
from .device import seed_everything
from .engine import make_step_loss, make_trainer, train_one_epoch
from .labels import Labelled
from .recipe import Recipe
from .schedule import batches_per_step


def fine_tune(
    model: Darknet,
    labelled: Labelled,
    recipe: Recipe,
    *,
    epochs: int,
    size: tuple[int, int],
    batch_size: int,
    workers: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Darknet:
    """Train a network for some epochs at `size` (height, width), and return the moving average of its weights."""
    seed_everything(seed)
    model = model.to(device=device, memory_format=torch.channels_last)
    pictures = Pictures(labelled, model.channels, recipe, seed)
    mosaic_epochs = round(epochs * (1 - recipe.close_mosaic))
    batches = TrainingBatches(labelled.sizes, batch_size, [size], seed, mosaic_epochs, stride=model.stride)
    loader = make_loader(pictures, batches, workers=workers)
    accumulate = batches_per_step(recipe, batch_size, epochs * len(loader))
    steps = math.ceil(len(loader) / accumulate)
    trainer = make_trainer(model, recipe, epochs=epochs, steps=steps, device=device, dtype=dtype, seed=seed)
    step_loss = make_step_loss(model, model, recipe, device, dtype)
    for batches.epoch in range(epochs):
        title = f"epoch {batches.epoch + 1}/{epochs}"
        train_one_epoch(
            trainer, loader, step_loss, device=device, accumulate=accumulate, title=title, freeze=model.freeze
        )
    return trainer.ema.module.cpu().eval()
