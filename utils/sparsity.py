"""Sparse training (network slimming, https://arxiv.org/abs/1708.06519): L1 on the γ of batch
normalisation."""

from torch import nn


def shrink_gammas(model: nn.Module, strength: float) -> None:
    """Add the subgradient of `strength` times |γ| to the gradient of every batch normalisation's weight."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and module.weight.grad is not None:
            module.weight.grad.add_(module.weight.detach().sign(), alpha=strength)
