"""Optimizer, learning rate and weight averaging over a training, by our recipe or by Darknet's."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from .darknet_recipe import DarknetRecipe, average_decay, rate
from .recipe import Recipe

AnyRecipe = Recipe | DarknetRecipe


def make_optimizer(model: nn.Module, recipe: AnyRecipe) -> Optimizer:
    """Make SGD or Adam with weight decay on convolution weights alone, not on biases and batch normalisation."""
    is_darknet = isinstance(recipe, DarknetRecipe)
    decay = recipe.decay if is_darknet else recipe.weight_decay
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if is_darknet and recipe.is_adam:
        return Adam(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps)
    if is_darknet:
        return SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
    if recipe.optimizer == "adamw":
        return AdamW(groups, lr=recipe.lr / 20, betas=(recipe.momentum, 0.999))
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)


def batches_per_step(recipe: AnyRecipe, batch_size: int, batches: int) -> int:
    """Give the batches whose gradients make one step of a training of `batches` in all.

    `nominal_batch` images a step is for large data; a short training needs its steps more than it needs large ones.
    Darknet makes a step of `batch` images.
    """
    if isinstance(recipe, DarknetRecipe):
        return max(1, round(recipe.batch / batch_size))
    return max(1, min(round(recipe.nominal_batch / batch_size), batches // recipe.min_steps))


def make_scheduler(optimizer: Optimizer, recipe: AnyRecipe, *, epochs: int, steps: int, seed: int = 0) -> LambdaLR:
    """Make a schedule by optimizer step, over `epochs` of `steps` each.

    Ours is a linear warm-up, then a cosine to `final_lr`; Darknet's counts iterations, whatever the epochs are, and
    takes `seed` for its random policy.
    """
    if isinstance(recipe, DarknetRecipe):
        return LambdaLR(optimizer, lambda step: rate(recipe, step + 1, seed) / recipe.learning_rate)
    warmup, total = max(1, round(min(recipe.warmup_epochs, epochs / 2) * steps)), max(1, epochs * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return recipe.final_lr + (1 - recipe.final_lr) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def make_ema(model: nn.Module, recipe: AnyRecipe) -> AveragedModel:
    """Make an exponential moving average of all weights and statistics; ours decays slower the more steps are done."""

    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        step = int(count)
        if isinstance(recipe, DarknetRecipe):
            decay = average_decay(recipe, step)
        else:
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), 1 - decay)
        else:
            torch._foreach_copy_(list(averaged), list(current))

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
