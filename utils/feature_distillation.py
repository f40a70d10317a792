"""Distillation of the maps that heads read: each strategy is a loss, and a module that makes the student's map
comparable with its teacher's.

The modules learn along with the student and are left behind when it is saved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import Darknet

MASKED = 0.65  # share of the cells that masked generation hides, the paper's for one-stage detectors
EPS = 1e-6


class Strategy(NamedTuple):
    """Makes the module for so many channels of student and teacher; gives the mean loss of the pictures."""

    make_aid: Callable[[int, int], nn.Module]
    loss: Callable[[Tensor, Tensor, float], Tensor]


class Pupil(nn.Module):
    """A student with its aids: gives its raw head maps, and for every strategy the maps of `layers` to compare."""

    def __init__(self, model: Darknet, layers: Sequence[int], aids: Mapping[str, nn.ModuleList]) -> None:
        super().__init__()
        self.model, self.layers, self.aids = model, tuple(layers), nn.ModuleDict(aids)

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        maps, features = self.model.features(x, self.layers)
        compared = {
            kind: [aid(feature) for aid, feature in zip(aids, features, strict=True)]
            for kind, aids in self.aids.items()
        }
        return maps, compared


class Mask(nn.Module):
    """Hide a random share of the cells, all channels of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x[:, :1]) >= MASKED)


def align(channels: int, wanted: int) -> nn.Module:
    """Make a 1x1 convolution where the channels differ; cwd and pkd do not see a bias, mgd has one behind it."""
    return nn.Identity() if channels == wanted else nn.Conv2d(channels, wanted, 1, bias=False)


def generate(channels: int, wanted: int) -> nn.Module:
    """Make what draws the teacher's map from some cells of the student's (https://arxiv.org/abs/2205.01529)."""
    first, second = (nn.Conv2d(wanted, wanted, 3, padding=1) for _ in range(2))
    return nn.Sequential(align(channels, wanted), Mask(), first, nn.ReLU(), second)


def cwd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compare where each channel [B, C, H, W] looks: KL of its softmax over the cells, https://arxiv.org/abs/2011.13256."""
    ours, theirs = ((x / temperature).permute(0, 2, 3, 1).flatten(1, 2) for x in (student, teacher))  # [B, H*W, C]
    away = theirs.log_softmax(1) - ours.log_softmax(1)  # in this layout, channels_last's, softmax copies nothing
    divergence = (theirs.softmax(1) * away).sum(1)  # [B, C]
    return temperature**2 * divergence.mean()


def pkd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compare by Pearson correlation: half the squared difference of standardised channels, which is one minus their
    correlation (https://arxiv.org/abs/2207.02039).

    The statistics are those of this process's batch.
    """
    ours, theirs = _centre(student), _centre(teacher)
    own, other = (ours * ours).mean(0), (theirs * theirs).mean(0)  # variances [C]
    a, b = (own + EPS).rsqrt(), (other + EPS).rsqrt()
    return ((own * a * a + other * b * b) / 2 - (ours * theirs).mean(0) * a * b).mean()


def mgd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compare a generated map with the teacher's (https://arxiv.org/abs/2205.01529)."""
    return (student - teacher).square().mean()


STRATEGIES = {"cwd": Strategy(align, cwd), "pkd": Strategy(align, pkd), "mgd": Strategy(generate, mgd)}


def _centre(x: Tensor) -> Tensor:
    """Take the mean off every channel: [B*H*W, C]. Of what is centred the gradient does not see the mean."""
    flat = x.permute(0, 2, 3, 1).flatten(0, 2)
    return flat - flat.detach().mean(0)
