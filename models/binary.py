"""XNOR-Net's convolution (https://arxiv.org/abs/1603.05279), what `binary` and `xnor` of a [convolutional] ask for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BinaryConv2d(nn.Conv2d):
    """A convolution whose weights are ± the filter's mean |w|.

    With `is_xnor` the input is ±1 too, except for the zeros of the padding. Gradients go straight through, to the input
    where it lies within ±1.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        size: int,
        stride: tuple[int, int],
        padding: int,
        dilation: int,
        groups: int,
        bias: bool,
        *,
        is_xnor: bool,
    ) -> None:
        super().__init__(channels, filters, size, stride, padding, dilation, groups, bias)
        self.is_xnor = is_xnor

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = w + (self.binary_weight() - w).detach()
        if self.is_xnor:
            clipped = x.clamp(-1, 1)
            x = clipped + (torch.where(x > 0, 1.0, -1.0) - clipped).detach()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def binary_weight(self) -> Tensor:
        """Give the weights that it computes with."""
        return torch.where(self.weight > 0, 1.0, -1.0) * self.weight.abs().mean((1, 2, 3), keepdim=True)
