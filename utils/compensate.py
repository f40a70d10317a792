"""Make up for what cut channels put out: they are constants once their γ is small, and constants are a bias.

After the exact cut a channel puts out zero; before it, with γ near 0, it put out act(β) everywhere. That constant goes
through the next convolution into its bias, or the mean of its batch normalisation: exactly, but at zero-padded borders
and behind gates, which depend on the picture.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import update_bn

from models import Darknet
from models.layers_conv import Convolution
from models.layers_dense import Connected

from .prune import Groups, Mask

SIDE = 16  # of constant maps in cells: the middle one of them sees no border


class Constant(nn.Module):
    """A layer some of whose channels put out constants."""

    def __init__(self, block: nn.Module, keep: Tensor, values: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("keep", keep[:, None, None])  # [C, 1, 1]
        self.register_buffer("values", values[:, None, None])  # [C, 1, 1], zero where kept

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.block(*inputs) * self.keep + self.values


@torch.inference_mode()
def compensate(model: Darknet, compact: Darknet, groups: Groups, keep: Mask) -> list[Tensor]:
    """Add to the biases or means of `compact` what the cut channels of `model` put out.

    Returns these constants for every layer [C], zero where a channel is kept.
    """
    constants: list[Tensor] = []
    image = torch.zeros(model.channels)
    for index, layer in enumerate(model.layers):
        inputs = [constants[i] if i >= 0 else image for i in layer.inputs]
        kept = torch.from_numpy(keep[groups.group[groups.lines[index]]])
        is_moved = any(each.any() for each in inputs)
        if is_moved and isinstance(layer.module, Convolution | Connected):
            source = model.layers[layer.inputs[0]].size
            _shift(layer.module, compact.layers[index].module, inputs[0], source, kept)
        values = torch.zeros(layer.channels)
        if not kept.all():
            values = _outputs(layer.module, inputs) if layer.owner is None else values
        constants.append(values.masked_fill(kept, 0))
    return constants


def with_constants(model: Darknet, groups: Groups, keep: Mask, constants: list[Tensor]) -> Darknet:
    """Return a copy whose cut channels put out their constants: what a compensated network is to equal."""
    changed = copy.deepcopy(model).eval()
    for index, values in enumerate(constants):
        kept = torch.from_numpy(keep[groups.group[groups.lines[index]]])
        if not kept.all():
            changed.blocks[index] = Constant(changed.blocks[index], kept.float(), values.clone())
    return changed


def recalibrate(model: Darknet, batches: Iterable[Tensor]) -> None:
    """Estimate the statistics of all batch normalisations anew, over inputs [B, C, H, W]."""
    update_bn(batches, model)
    model.eval()


def _shift(module: nn.Module, target: nn.Module, values: Tensor, size: tuple[int, int], kept: Tensor) -> None:
    """Take the constants of cut inputs into the bias or mean of `target`, the layer `module` after the cut."""
    is_convolution = isinstance(module, Convolution)
    weighted = module.conv if is_convolution else module.linear
    if is_convolution:
        side = 2 * weighted.dilation[0] * weighted.kernel_size[0] + max(weighted.stride)
        x = _map(values, (side, side))
    else:
        x = _map(values, size).flatten(1)
    both = weighted(torch.cat((x, torch.zeros_like(x))))  # [2, C, H, W] or [2, C]
    shift = _middle(both[:1] - both[1:])[kept] if is_convolution else (both[0] - both[1])[kept]
    if isinstance(target.bn, _NormBase):
        target.bn.running_mean -= shift
    else:
        (target.conv if is_convolution else target.linear).bias += shift


def _outputs(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Give what a layer puts out for constant inputs [C]; the mean of a normalised channel is its β."""
    norm = module if isinstance(module, _NormBase) else getattr(module, "bn", None)
    if isinstance(norm, _NormBase):
        y = norm.bias[None, :, None, None].clone()
        for name in ("early_levels", "activation", "levels"):
            y = getattr(module, name, nn.Identity())(y)
        return y[0, :, 0, 0]
    if isinstance(module, Connected):
        return module.activation(module.linear.bias[None, :, None, None].clone())[0, :, 0, 0]
    return _middle(module(*[_map(each, (SIDE, SIDE)) for each in inputs]))


def _map(values: Tensor, size: tuple[int, int]) -> Tensor:
    return values[None, :, None, None].expand(1, -1, *size).contiguous()


def _middle(x: Tensor) -> Tensor:
    """Give the values [C] in the middle of a map [1, C, H, W]."""
    return x[0, :, x.shape[2] // 2, x.shape[3] // 2]
