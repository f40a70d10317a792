"""Public ImageNet classifiers as plain PyTorch modules, with the names and the order of the released state dicts.

torchvision has ShuffleNetV2 and MobileNetV3; here are GhostNet, VoVNet-39 and the ShuffleNetV2 that shuffles first.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GHOSTS = (  # size, expansion, filters, squeeze and excitation or not, stride: https://arxiv.org/abs/1911.11907, table 1
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 1, 2),),
    ((5, 120, 40, 1, 1),),
    ((3, 240, 80, 0, 2),),
    ((3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 1, 1), (3, 672, 112, 1, 1)),
    ((5, 672, 160, 1, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 1, 1), (5, 960, 160, 0, 1), (5, 960, 160, 1, 1)),
)
OSAS = ((128, 256, 1), (160, 512, 1), (192, 768, 2), (224, 1024, 2))  # https://arxiv.org/abs/1904.09730, table 1


def conv(channels: int, filters: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, size, stride, size // 2, groups=groups, bias=False)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(4, int(channels / 4 + 2) // 4 * 4)
        self.conv_reduce, self.conv_expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_expand(F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * F.relu6(gate + 3) / 6


class GhostModule(nn.Module):
    def __init__(self, channels: int, filters: int, *, is_linear: bool) -> None:
        super().__init__()
        half, act = filters // 2, nn.Identity() if is_linear else nn.ReLU()
        self.primary_conv = nn.Sequential(conv(channels, half), nn.BatchNorm2d(half), act)
        self.cheap_operation = nn.Sequential(conv(half, half, 3, groups=half), nn.BatchNorm2d(half), act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary_conv(x)
        return torch.cat([x, self.cheap_operation(x)], 1)


class GhostBottleneck(nn.Module):
    def __init__(self, channels: int, size: int, hidden: int, filters: int, has_se: int, stride: int) -> None:
        super().__init__()
        self.ghost1 = GhostModule(channels, hidden, is_linear=False)
        if stride > 1:
            self.conv_dw = conv(hidden, hidden, size, stride, hidden)
            self.bn_dw = nn.BatchNorm2d(hidden)
        self.se = SqueezeExcite(hidden) if has_se else None
        self.ghost2 = GhostModule(hidden, filters, is_linear=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != filters:
            self.shortcut = nn.Sequential(
                conv(channels, channels, size, stride, channels),
                nn.BatchNorm2d(channels),
                conv(channels, filters),
                nn.BatchNorm2d(filters),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        y = self.bn_dw(self.conv_dw(y)) if hasattr(self, "conv_dw") else y
        y = self.se(y) if self.se else y
        return self.ghost2(y) + self.shortcut(x)


class ConvBnAct(nn.Module):
    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv, self.bn1 = conv(channels, filters), nn.BatchNorm2d(filters)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv(x)))


class GhostNet(nn.Module):
    """GhostNet 1.0 as its authors released it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = conv(3, 16, 3, 2), nn.BatchNorm2d(16)
        stages, channels = [], 16
        for stage in GHOSTS:
            blocks = []
            for size, hidden, filters, has_se, stride in stage:
                blocks.append(GhostBottleneck(channels, size, hidden, filters, has_se, stride))
                channels = filters
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages, nn.Sequential(ConvBnAct(channels, 960)))
        self.conv_head = nn.Conv2d(960, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def features(self, x: Tensor) -> list[Tensor]:
        """Give C3, C4 and the last convolution."""
        x, outputs = F.relu(self.bn1(self.conv_stem(x))), []
        for stage in self.blocks:
            x = stage(x)
            outputs.append(x)
        return [outputs[4], outputs[6], outputs[9]]


def named_conv(name: str, channels: int, filters: int, size: int = 3, stride: int = 1) -> OrderedDict[str, nn.Module]:
    """Give the layers of VoVNet's convolution by their released names."""
    return OrderedDict(
        {
            f"{name}/conv": conv(channels, filters, size, stride),
            f"{name}/norm": nn.BatchNorm2d(filters),
            f"{name}/relu": nn.ReLU(),
        }
    )


class Osa(nn.Module):
    def __init__(self, name: str, channels: int, hidden: int, filters: int, *, is_residual: bool) -> None:
        super().__init__()
        widths = [channels] + [hidden] * 5
        self.layers = nn.ModuleList(nn.Sequential(named_conv(f"{name}_{i}", widths[i], hidden)) for i in range(5))
        self.concat = nn.Sequential(named_conv(f"{name}_concat", sum(widths), filters, 1))
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        y = self.concat(torch.cat(outputs, 1))
        return y + x if self.is_residual else y


class VoVNet39(nn.Module):
    """VoVNet-39 as its authors released it."""

    def __init__(self) -> None:
        super().__init__()
        stem = (("stem_1", 3, 64, 3, 2), ("stem_2", 64, 64, 3, 1), ("stem_3", 64, 128, 3, 2))
        self.stem = nn.Sequential(OrderedDict(pair for each in stem for pair in named_conv(*each).items()))
        channels = 128
        for stage, (hidden, filters, blocks) in enumerate(OSAS, 2):
            layers = OrderedDict({"Pooling": nn.MaxPool2d(3, 2, ceil_mode=True)} if stage > 2 else {})
            for block in range(blocks):
                name = f"OSA{stage}_{block + 1}"
                layers[name] = Osa(name, channels, hidden, filters, is_residual=block > 0)
                channels = filters
            self.add_module(f"stage{stage}", nn.Sequential(layers))
        self.classifier = nn.Linear(channels, 1000)

    def features(self, x: Tensor) -> list[Tensor]:
        """Give C3, C4 and C5."""
        x = self.stage3(self.stage2(self.stem(x)))
        y = self.stage4(x)
        return [x, y, self.stage5(y)]


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        layers = (conv(channels, filters), nn.BatchNorm2d(filters), nn.ReLU())
        layers += (conv(filters, filters, 3, stride, filters), nn.BatchNorm2d(filters))
        own = filters if stride == 1 else filters * 2 - channels
        self.branch_main = nn.Sequential(*layers, conv(filters, own), nn.BatchNorm2d(own), nn.ReLU())
        self.branch_proj = None
        if stride == 2:
            layers = (conv(channels, channels, 3, 2, channels), nn.BatchNorm2d(channels))
            self.branch_proj = nn.Sequential(*layers, conv(channels, channels), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.branch_proj:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, ::2], self.branch_main(x[:, 1::2])], 1)


class ShuffleFirst(nn.Module):
    """ShuffleNetV2 0.5x up to its last stage; units split even channels from odd ones and have branch_main first."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(conv(3, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU())
        channels = 24
        for stage, (filters, units) in enumerate(((48, 4), (96, 8), (192, 4)), 2):
            first = ShuffleUnit(channels, filters // 2, 2)
            others = [ShuffleUnit(filters // 2, filters // 2, 1) for _ in range(units - 1)]
            self.add_module(f"stage{stage}", nn.Sequential(first, *others))
            channels = filters

    def features(self, x: Tensor) -> list[Tensor]:
        """Give C3, C4 and C5."""
        x = self.stage2(F.max_pool2d(self.first_conv(x), 3, 2, 1))
        y = self.stage3(x)
        return [x, y, self.stage4(y)]
