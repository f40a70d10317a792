"""Darknet's activation functions by the names that a cfg gives them, and the aliases met in the wild."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pointwise(nn.Module):
    """An activation that torch.nn lacks, as a module around a plain function.

    `mixes_channels` tells that a channel's output depends on the others too.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, mixes_channels: bool = False) -> None:
        super().__init__()
        self.function, self.mixes_channels = function, mixes_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.function.__name__


def loggy(x: Tensor) -> Tensor:
    return 2 * torch.sigmoid(x) - 1


def ramp(x: Tensor) -> Tensor:
    return F.relu(x) + 0.1 * x


def plse(x: Tensor) -> Tensor:
    middle = 0.125 * x + 0.5
    return torch.where(x < -4, 0.01 * (x + 4), torch.where(x > 4, 0.01 * (x - 4) + 1, middle))


def stair(x: Tensor) -> Tensor:
    floor, half = torch.floor(x), torch.floor(x / 2)
    return torch.where(floor % 2 == 0, half, x - floor + half)


def lhtan(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.001 * x, torch.where(x > 1, 0.001 * (x - 1) + 1, x))


def hard_mish(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.where(x > -2, x * x / 2 + x, torch.zeros_like(x)))


def normalize_channels(x: Tensor) -> Tensor:
    """Share of each positive value in the positive sum over the channels of its pixel."""
    positive = F.relu(x)
    return positive / (positive.sum(1, keepdim=True) + 1e-4)  # 1e-4: Darknet's eps


def normalize_channels_softmax(x: Tensor) -> Tensor:
    power = x.exp()
    return power / (power.sum(1, keepdim=True) + 1e-4)


def normalize_channels_softmax_maxval(x: Tensor) -> Tensor:
    power = (x - x.amax(1, keepdim=True)).exp()
    return power / (power.sum(1, keepdim=True) + 1e-4)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "none": nn.Identity,
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "revleaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "relie": lambda: nn.LeakyReLU(0.01, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "selu": lambda: nn.SELU(inplace=True),
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "logistic": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
    "tanh": nn.Tanh,
    "hardtan": nn.Hardtanh,
    "mish": lambda: nn.Mish(inplace=True),
    "swish": lambda: nn.SiLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "hard_swish": lambda: nn.Hardswish(inplace=True),
    "h_swish": lambda: nn.Hardswish(inplace=True),
    "HardSwish": lambda: nn.Hardswish(inplace=True),
    "loggy": lambda: Pointwise(loggy),
    "ramp": lambda: Pointwise(ramp),
    "plse": lambda: Pointwise(plse),
    "stair": lambda: Pointwise(stair),
    "lhtan": lambda: Pointwise(lhtan),
    "hard_mish": lambda: Pointwise(hard_mish),
    "normalize_channels": lambda: Pointwise(normalize_channels, mixes_channels=True),
    "normalize_channels_softmax": lambda: Pointwise(normalize_channels_softmax, mixes_channels=True),
    "normalize_channels_softmax_maxval": lambda: Pointwise(normalize_channels_softmax_maxval, mixes_channels=True),
}
