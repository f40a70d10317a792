"""How much a network would miss its channels: one number a group, by one of several criteria.

|γ| of batch normalisation after sparse training (https://arxiv.org/abs/1708.06519), the norm of a filter
(https://arxiv.org/abs/1608.08710), the first-order Taylor term of the loss (https://arxiv.org/abs/1906.10771).
"""

from collections.abc import Iterable, Iterator
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from models import Darknet

from .prune import Groups

Values = NDArray[np.float64]

CRITERIA = ("gamma", "l1", "l2", "taylor", "random")


def norms(model: Darknet) -> Iterator[tuple[int, nn.Module]]:
    """Give the batch normalisations of a layer's own channels, each with the layer's index."""
    for index, layer in enumerate(model.layers):
        for name, axes in layer.tensors.items():
            head, _, tail = name.rpartition(".")
            module = attrgetter(head)(layer.module) if head else layer.module
            if tail == "weight" and axes == "o" and isinstance(module, _NormBase):
                yield index, module


def prunable_norms(model: Darknet, groups: Groups) -> list[tuple[int, nn.Module, Tensor]]:
    """Give the batch normalisations that sparse training shrinks: layer, module, and which channels may go [C]."""
    found = []
    for index, norm in norms(model):
        is_free = groups.is_free[groups.group[groups.lines[index]]]
        if is_free.any():
            found.append((index, norm, torch.from_numpy(is_free)))
    return found


def gamma(model: Darknet, groups: Groups) -> Values:
    """Give the largest |γ| of every group, NaN where it has none."""
    return _largest(groups, ((index, norm.weight.detach().abs()) for index, norm in norms(model)))


def filter_norm(model: Darknet, groups: Groups, order: int) -> Values:
    """Give the largest L1 or L2 norm of every group's filters, relative to the mean of their layers."""

    def each() -> Iterator[tuple[int, Tensor]]:
        for index, layer in enumerate(model.layers):
            for name, axes in layer.tensors.items():
                tensor = attrgetter(name)(layer.module).detach()
                if axes[:1] == "o" and tensor.dim() > 1:
                    values = tensor.flatten(1).norm(order, dim=1)  # [C]
                    yield index, values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)

    return _largest(groups, each())


def taylor(model: Darknet, groups: Groups, losses: Iterable[Tensor]) -> Values:
    """Give the mean square of what every loss would change, to first order, without a group; NaN without a γ.

    A channel's term is γ ∂L/∂γ + β ∂L/∂β, the derivative for a factor on its normalised output; terms of a group add
    up, terms of losses do not.
    """
    squares = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        terms = np.zeros(len(groups.is_free))
        for index, norm in norms(model):
            change = sum(each.detach() * each.grad for each in norm.parameters() if each.grad is not None)
            if isinstance(change, Tensor):
                np.add.at(terms, groups.group[groups.lines[index]], change.cpu().double().numpy())
        squares.append(terms**2)
    model.zero_grad()
    return np.where(np.isnan(gamma(model, groups)), np.nan, np.mean(squares, axis=0))


def random_values(groups: Groups, seed: int) -> Values:
    """Give random numbers: what any criterion must beat."""
    return np.random.default_rng(seed).random(len(groups.is_free))


def _largest(groups: Groups, values: Iterator[tuple[int, Tensor]]) -> Values:
    """Give the largest value of every group over the layers' channels [C], NaN where there is none."""
    found = np.full(len(groups.is_free), -np.inf)
    for index, each in values:
        np.maximum.at(found, groups.group[groups.lines[index]], each.cpu().double().numpy())
    return np.where(np.isfinite(found), found, np.nan)
