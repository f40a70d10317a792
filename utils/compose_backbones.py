"""Backbones that `utils.compose` writes: each hands its maps C3, C4 and C5, at strides 8, 16 and 32, to a head."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from .draft import Draft

# GhostNet, https://arxiv.org/abs/1911.11907, table 1: size, expansion, filters, squeeze and excitation or not, stride
GHOSTS = (
    (3, 16, 16, 0, 1),
    (3, 48, 24, 0, 2),
    (3, 72, 24, 0, 1),
    (5, 72, 40, 1, 2),
    (5, 120, 40, 1, 1),
    (3, 240, 80, 0, 2),
    (3, 200, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 480, 112, 1, 1),
    (3, 672, 112, 1, 1),
    (5, 672, 160, 1, 2),
    (5, 960, 160, 0, 1),
    (5, 960, 160, 1, 1),
    (5, 960, 160, 0, 1),
    (5, 960, 160, 1, 1),
)

# MobileNetV3, https://arxiv.org/abs/1905.02244, tables 1 and 2: as above, and the activation
MOBILES_LARGE = (
    (3, 16, 16, 0, 1, "relu"),
    (3, 64, 24, 0, 2, "relu"),
    (3, 72, 24, 0, 1, "relu"),
    (5, 72, 40, 1, 2, "relu"),
    (5, 120, 40, 1, 1, "relu"),
    (5, 120, 40, 1, 1, "relu"),
    (3, 240, 80, 0, 2, "hard_swish"),
    (3, 200, 80, 0, 1, "hard_swish"),
    (3, 184, 80, 0, 1, "hard_swish"),
    (3, 184, 80, 0, 1, "hard_swish"),
    (3, 480, 112, 1, 1, "hard_swish"),
    (3, 672, 112, 1, 1, "hard_swish"),
    (5, 672, 160, 1, 2, "hard_swish"),
    (5, 960, 160, 1, 1, "hard_swish"),
    (5, 960, 160, 1, 1, "hard_swish"),
)
MOBILES_SMALL = (
    (3, 16, 16, 1, 2, "relu"),
    (3, 72, 24, 0, 2, "relu"),
    (3, 88, 24, 0, 1, "relu"),
    (5, 96, 40, 1, 2, "hard_swish"),
    (5, 240, 40, 1, 1, "hard_swish"),
    (5, 240, 40, 1, 1, "hard_swish"),
    (5, 120, 48, 1, 1, "hard_swish"),
    (5, 144, 48, 1, 1, "hard_swish"),
    (5, 288, 96, 1, 2, "hard_swish"),
    (5, 576, 96, 1, 1, "hard_swish"),
    (5, 576, 96, 1, 1, "hard_swish"),
)


class Backbone(NamedTuple):
    """What writes a backbone, and what a title says of it."""

    write: Callable[[Draft], None]
    title: str
    paper: str


def darknet53(draft: Draft) -> None:
    """Write Darknet-53."""
    draft.conv(32)
    for filters, repeat, level in ((64, 1, ""), (128, 2, ""), (256, 8, "C3"), (512, 8, "C4"), (1024, 4, "C5")):
        draft.conv(filters, stride=2)
        draft.macro("residual", repeat=repeat)
        if level:
            draft.output(level)


def darknet_tiny(draft: Draft) -> None:
    """Write YOLOv3-tiny's backbone; attention stands once, after its widest convolution."""
    for filters, level in ((16, ""), (32, ""), (64, ""), (128, "C3"), (256, "C4"), (512, "")):
        draft.conv(filters)
        if level:
            draft.output(level, is_attended=False)
        draft.maxpool(2, 1 if filters == 512 else 2)
    draft.conv(1024)
    draft.output("C5")


def cspdarknet53(draft: Draft) -> None:
    """Write CSPDarknet-53, whose first stage is split into two whole halves."""
    draft.conv(32, activation="mish")
    draft.conv(64, stride=2, activation="mish")
    draft.macro("csp", filters=64, hidden=64, inner=32)
    for filters, repeat, level in ((128, 2, ""), (256, 8, "C3"), (512, 8, "C4"), (1024, 4, "C5")):
        draft.conv(filters, stride=2, activation="mish")
        draft.macro("csp", filters=filters, repeat=repeat)
        if level:
            draft.output(level)


def cspdarknet53_tiny(draft: Draft) -> None:
    """Write YOLOv4-tiny's backbone.

    C3 and C4 are maps inside a [csp_tiny], before it joins its two ways, so those two are written out.
    """
    draft.conv(32, stride=2)
    draft.conv(64, stride=2)
    draft.macro("csp_tiny", filters=64)
    for filters, level in ((128, "C3"), (256, "C4")):
        draft.maxpool(2, 2)
        first = draft.conv(filters)
        draft.add("route", {"layers": -1, "groups": 2, "group_id": 1})
        draft.conv(filters // 2)
        draft.conv(filters // 2)
        draft.route(-1, -2)
        draft.conv(filters, 1)
        draft.output(level)
        draft.route(first - len(draft.sections), -1)
    draft.maxpool(2, 2)
    draft.conv(512)
    draft.output("C5")


def ghostnet(draft: Draft, *, se_divisor: int, gate: str) -> None:
    """Write GhostNet; the hidden layers of squeeze and excitation are multiples of `se_divisor`."""
    draft.conv(16, stride=2, activation="relu")
    levels = _levels(GHOSTS)
    for place, (size, hidden, filters, has_se, stride) in enumerate(GHOSTS):
        keys = {"hidden": hidden, "filters": filters, "size": size, "stride": stride}
        se = {"se": divisible(draft.scaled(hidden) / 4, se_divisor), "gate": gate} if has_se else {}
        draft.macro("ghost_bottleneck", **keys, **se)
        if place in levels:
            draft.output(levels[place])
    draft.conv(960, 1, activation="relu")
    draft.output("C5")


def mobilenetv3(draft: Draft, *, blocks: Sequence[tuple], last: int) -> None:
    """Write MobileNetV3 up to its last convolution."""
    draft.conv(16, stride=2, activation="hard_swish")
    levels = _levels(blocks)
    for place, (size, hidden, filters, has_se, stride, activation) in enumerate(blocks):
        keys = {"hidden": hidden, "filters": filters, "size": size, "stride": stride, "activation": activation}
        se = {"se": divisible(draft.scaled(hidden) / 4, 8), "gate": "hard_sigmoid"} if has_se else {}
        draft.macro("inverted_residual", **keys, **se)
        if place in levels:
            draft.output(levels[place])
    draft.conv(last, 1, activation="hard_swish")
    draft.output("C5")


def vovnet39(draft: Draft) -> None:
    """Write VoVNet-39; its second blocks of a stage are residual."""
    draft.conv(64, stride=2, activation="relu")
    draft.conv(64, activation="relu")
    draft.conv(128, stride=2, activation="relu")
    for hidden, filters, blocks, level in (
        (128, 256, 1, ""),
        (160, 512, 1, "C3"),
        (192, 768, 2, "C4"),
        (224, 1024, 2, "C5"),
    ):
        if level:
            draft.maxpool(3, 2, padding=1)  # one cell right and below: the last window may reach over the border
        for block in range(blocks):
            draft.macro("osa", filters=filters, hidden=hidden, **({"residual": 1} if block else {}))
        if level:
            draft.output(level)


def shufflenetv2(draft: Draft, *, filters: tuple[int, int, int], is_thin: bool) -> None:
    """Write ShuffleNetV2; attention stands after stages 3, 4 and the last convolution.

    The first unit's second branch keeps the input's channels up to its last convolution if `is_thin`.
    """
    draft.conv(24, stride=2, activation="relu")
    draft.maxpool(3, 2)
    thin = {"hidden": 24} if is_thin else {}
    draft.macro("shuffle_stage", filters=filters[0], units=4, **thin)
    draft.output("C3", is_attended=False)
    draft.macro("shuffle_stage", filters=filters[1], units=8)
    draft.output("C4")
    draft.macro("shuffle_stage", filters=filters[2], units=4)
    draft.attend()
    draft.conv(1024, 1, activation="relu")
    draft.output("C5")


def slim(draft: Draft, *, stem: int, stages: Sequence[tuple[int, int, int]]) -> None:
    """Write a light backbone of ours: per stage a convolution of stride 2 and an [elan], at the end pooling of 3 sizes.

    A stage is filters, hidden filters and repeats.
    """
    draft.conv(stem, stride=2, activation="swish")
    for place, (filters, hidden, repeat) in enumerate(stages):
        draft.conv(filters, stride=2, activation="swish")
        draft.macro("elan", filters=filters, hidden=hidden, repeat=repeat)
        if 0 < place < len(stages) - 1:
            draft.output("C3" if place == 1 else "C4")
    filters = stages[-1][0]
    draft.conv(filters // 2, 1, activation="swish")
    for _ in range(3):  # one after the other: windows of 5, 9 and 13
        draft.maxpool(5, 1)
    draft.route(-1, -2, -3, -4)
    draft.conv(filters, 1, activation="swish")
    draft.output("C5")


def divisible(channels: float, divisor: int) -> int:
    """Round to a multiple of `divisor`, up where that takes away more than a tenth, as MobileNet's authors do."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _levels(blocks: Sequence[tuple]) -> dict[int, str]:
    """Give the blocks that put out C3 and C4: those before the last two that halve the sides."""
    halving = [place for place, block in enumerate(blocks) if block[4] == 2]
    return {halving[-2] - 1: "C3", halving[-1] - 1: "C4"}


DARKNET, CSPDARKNET = "https://arxiv.org/abs/1804.02767", "https://arxiv.org/abs/2004.10934"
GHOSTNET, VOVNET = "https://arxiv.org/abs/1911.11907", "https://arxiv.org/abs/1904.09730"
SHUFFLENET, MOBILENET = "https://arxiv.org/abs/1807.11164", "https://arxiv.org/abs/1905.02244"
SHUFFLED = {"0.5x": (48, 96, 192), "1x": (116, 232, 464), "1.5x": (176, 352, 704)}

# The "-imagenet" ones are laid out as the publicly released classifiers are.
BACKBONES: dict[str, Backbone] = {
    "darknet53": Backbone(darknet53, "Darknet-53", DARKNET),
    "darknet-tiny": Backbone(darknet_tiny, "Darknet-tiny", DARKNET),
    "cspdarknet53": Backbone(cspdarknet53, "CSPDarknet-53", CSPDARKNET),
    "cspdarknet53-tiny": Backbone(cspdarknet53_tiny, "CSPDarknet-53-tiny", "https://arxiv.org/abs/2011.08036"),
    "ghostnet": Backbone(partial(ghostnet, se_divisor=1, gate="logistic"), "GhostNet", GHOSTNET),
    "ghostnet-imagenet": Backbone(
        partial(ghostnet, se_divisor=4, gate="hard_sigmoid"), "GhostNet as released", GHOSTNET
    ),
    "vovnet39": Backbone(vovnet39, "VoVNet-39", VOVNET),
    **{
        f"shufflenetv2-{width}{kind}": Backbone(
            partial(shufflenetv2, filters=filters, is_thin=not kind),
            f"ShuffleNetV2 {width}{' as released' if kind else ''}",
            SHUFFLENET,
        )
        for width, filters in SHUFFLED.items()
        for kind in ("", "-imagenet")
    },
    "mobilenetv3-large": Backbone(partial(mobilenetv3, blocks=MOBILES_LARGE, last=960), "MobileNetV3-large", MOBILENET),
    "mobilenetv3-small": Backbone(partial(mobilenetv3, blocks=MOBILES_SMALL, last=576), "MobileNetV3-small", MOBILENET),
    "slim-s": Backbone(
        partial(slim, stem=16, stages=((32, 16, 2), (64, 32, 2), (96, 48, 2), (160, 64, 2))), "Slim-s", ""
    ),
    "slim-m": Backbone(
        partial(slim, stem=24, stages=((48, 24, 2), (96, 48, 2), (160, 80, 2), (256, 96, 2))), "Slim-m", ""
    ),
}
