"""Learning rate and weight averaging over a training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from .recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Make SGD or AdamW with weight decay on convolution weights alone, not on biases and batch normalisation."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return AdamW(groups, lr=recipe.lr / 20, betas=(recipe.momentum, 0.999))
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)


def batches_per_step(recipe: Recipe, batch_size: int, batches: int) -> int:
    """Give the batches whose gradients make one step of a training of `batches` in all.

    `nominal_batch` images a step is for large data; a short training needs its steps more than it needs large ones.
    """
    return max(1, min(round(recipe.nominal_batch / batch_size), batches // recipe.min_steps))


def make_scheduler(optimizer: Optimizer, recipe: Recipe, *, epochs: int, steps: int) -> LambdaLR:
    """Make a schedule by optimizer step: linear warm-up, then a cosine to `final_lr`, over `epochs` of `steps` each."""
    warmup, total = max(1, round(min(recipe.warmup_epochs, epochs / 2) * steps)), max(1, epochs * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return recipe.final_lr + (1 - recipe.final_lr) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def make_ema(model: nn.Module, recipe: Recipe) -> AveragedModel:
    """Make an exponential moving average of all weights and statistics; its decay grows with the steps done."""

    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        decay = min(recipe.ema_decay, (1 + int(count)) / (10 + int(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), 1 - decay)
        else:
            torch._foreach_copy_(list(averaged), list(current))

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
