"""Gates that a network learns to put on its own maps; each gives back a map of its input's shape.

ECA (https://arxiv.org/abs/1910.03151), and the two gates of CBAM (https://arxiv.org/abs/1807.06521). Squeeze and
excitation is a macro of stock sections (blocks.py).
"""

import math

import torch
from torch import Tensor, nn


class Eca(nn.Module):
    """Gate every channel by the means of its neighbours: a convolution along the channels, without a bias."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))[:, None]  # [B, 1, C]
        return x * self.conv(means).sigmoid().transpose(1, 2)[..., None]


class ChannelGate(nn.Module):
    """CBAM's gate of channels: the mean and the maximum of each go through one perceptron, without biases."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack((x.mean((2, 3)), x.amax((2, 3))))  # [2, B, C]
        gate = self.excite(self.squeeze(both).relu()).sum(0).sigmoid()  # [B, C]
        return x * gate[..., None, None]


class SpatialGate(nn.Module):
    """CBAM's gate of positions: a convolution, without a bias, over the mean and the maximum of all channels."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), dim=1)  # [B, 2, H, W]
        return x * self.conv(both).sigmoid()


def adaptive_kernel(channels: int) -> int:
    """Give the odd number nearest to log2(C)/2 + 1/2, the greater of two (section 3.2.3 of ECA's paper)."""
    return 2 * int((math.log2(channels) + 1) / 4) + 1
