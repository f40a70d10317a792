"""Sections with weights that are no convolution: [connected] and [batchnorm]."""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from .cfg import Section
from .channels import fresh
from .layer import BN_EPS, BN_MOMENTUM, MAX_FILTERS, Built, Layer, coarser, read_activation


class Connected(nn.Module):
    """A fully connected layer [B, C, H, W] -> [B, output, 1, 1], batch normalisation and activation."""

    def __init__(self, linear: nn.Linear, bn: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.bn, self.activation = linear, bn, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.linear(x.flatten(1)))  # [B, output]
        return self.activation(x[:, :, None, None])

    def fuse(self) -> None:
        """Fold the batch normalisation into the weights."""
        if isinstance(self.bn, nn.BatchNorm1d):
            self.linear, self.bn = fuse_linear_bn_eval(self.linear, self.bn), nn.Identity()


def connected(section: Section, built: Built) -> Layer:
    """Build [connected], which sees the whole map: it runs at the cfg's own size alone."""
    source, output = built.previous, section.int("output", 1, minimum=1, maximum=MAX_FILTERS)
    has_bn = section.flag("batch_normalize")
    activation = read_activation(section, "logistic")
    inputs = source.channels * source.size[0] * source.size[1]
    built.afford(section, inputs * output, "output")
    linear = nn.Linear(inputs, output, bias=not has_bn)
    bn = nn.BatchNorm1d(output, eps=BN_EPS, momentum=BN_MOMENTUM) if has_bn else nn.Identity()
    weight, scales = {"linear.weight": "oi"}, dict.fromkeys(("bn.weight", "bn.running_mean", "bn.running_var"), "o")
    return Layer(
        Connected(linear, bn, activation),
        (built.index - 1,),
        output,
        (1, 1),
        coarser(source, source.size),
        fresh,
        {"bn.bias": "o"} | weight | scales if has_bn else {"linear.bias": "o"} | weight,
        {"output": "o"},
        2 * inputs * output,
    )


def batchnorm(section: Section, built: Built) -> Layer:
    """Build [batchnorm], batch normalisation on its own."""
    source = built.previous
    bn = nn.BatchNorm2d(source.channels, eps=BN_EPS, momentum=BN_MOMENTUM)
    tensors = dict.fromkeys(("bias", "weight", "running_mean", "running_var"), "o")
    return replace(built.pass_on(bn), tensors=tensors)
