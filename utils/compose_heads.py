"""Heads that `utils.compose` writes on the maps C3, C4 and C5 of a backbone, the last of which is its last layer."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from .draft import Draft

COCO_9 = "10,13, 16,30, 33,23, 30,61, 62,45, 59,119, 116,90, 156,198, 373,326"
COCO_6 = "10,14, 23,27, 37,58, 81,82, 135,169, 344,319"
# Anchors by name and number, in pixels of a network input of 416
ANCHORS: dict[str, dict[int, str]] = {
    "coco": {9: COCO_9, 6: COCO_6},
    "visdrone": {
        9: "4,5, 6,10, 14,9, 11,18, 25,15, 21,30, 47,26, 37,53, 87,65",
        6: "5,6, 9,15, 18,11, 21,32, 38,23, 67,58",
    },
    "oxfordhand": {6: "16,19, 28,30, 40,42, 58,57, 85,85, 154,152"},
}
STOCK = {"jitter": ".3", "ignore_thresh": ".7", "truth_thresh": 1, "random": 1}
CIOU = {"iou_normalizer": "0.07", "cls_normalizer": "1.0", "iou_loss": "ciou"}
GREEDY = {"nms_kind": "greedynms", "beta_nms": "0.6"}


class Own(NamedTuple):
    """COCO's anchors of a head's own official cfg: its input size, the anchors, and the masks if they differ."""

    size: int
    anchors: str
    masks: tuple[str, ...] = ()


class Head(NamedTuple):
    """What writes a head, the maps that it reads, its masks, and keys of its [yolo] sections in their order."""

    write: Callable[[Draft], None]
    title: str
    paper: str
    reads: tuple[str, ...]
    masks: tuple[str, ...]
    keys: dict[str, object]
    scale_x_y: tuple[float, ...] = ()
    net: Mapping[str, object] = MappingProxyType({})  # keys of [net] for Darknet's own trainer
    coco: Own | None = None

    @property
    def anchors(self) -> int:
        """Count the anchors: three a scale."""
        return 3 * len(self.masks)


def yolov3(draft: Draft) -> None:
    """Write YOLOv3's head: three scales from the coarsest to the finest."""
    for level, filters in (("C5", 512), ("C4", 256), ("C3", 128)):
        if level != "C5":
            draft.route(-4)
            draft.conv(filters, 1)
            draft.upsample()
            draft.with_map(level)
        for _ in range(3):
            draft.conv(filters, 1)
            draft.conv(2 * filters)
        draft.predict()


def yolov3_tiny(draft: Draft) -> None:
    """Write YOLOv3-tiny's head: two scales."""
    draft.conv(256, 1)
    draft.conv(512)
    draft.predict()
    draft.route(-4)
    draft.conv(128, 1)
    draft.upsample()
    draft.with_map("C4")
    draft.conv(256)
    draft.predict()


def yolov4(draft: Draft) -> None:
    """Write YOLOv4's head: spatial pyramid pooling, a path from coarse to fine, and one back with three scales."""
    _bottlenecks(draft, 512, 3)
    draft.maxpool(5, 1)
    draft.route(-2)
    draft.maxpool(9, 1)
    draft.route(-4)
    draft.maxpool(13, 1)
    draft.route(-1, -3, -5, -6)
    path = [_bottlenecks(draft, 512, 3)]
    for level, filters in (("C4", 256), ("C3", 128)):
        draft.conv(filters, 1)
        draft.upsample()
        draft.route(draft.outputs[level], note=level)
        draft.conv(filters, 1)
        draft.route(-1, -3)
        path.append(_bottlenecks(draft, filters, 5))
    draft.conv(256)
    draft.predict()
    for filters, layer in ((256, path[1]), (512, path[0])):
        draft.route(-4)
        draft.conv(filters, stride=2)
        draft.route(-1, layer, note="with the path from coarse to fine")
        _bottlenecks(draft, filters, 5)
        draft.conv(2 * filters)
        draft.predict()


def pan_lite(draft: Draft, filters: tuple[int, int, int] = (64, 96, 128)) -> None:
    """Write a light path aggregation network (https://arxiv.org/abs/1803.01534) of `filters` for C3, C4 and C5.

    It steps down by depthwise-separable convolutions, and mixes in one [elan] a scale and direction.
    """
    fine, middle, coarse = filters
    tops = [draft.conv(coarse, 1, activation="swish")]
    for level, width in (("C4", middle), ("C3", fine)):
        draft.conv(width, 1, activation="swish")
        draft.upsample()
        draft.route(draft.outputs[level], note=level)
        draft.conv(width, 1, activation="swish")
        draft.route(-1, -3)
        tops.append(draft.macro("elan", filters=width))
    draft.predict("logistic")
    for before, width, top in ((fine, middle, tops[1]), (middle, coarse, tops[0])):
        draft.route(-3)
        draft.conv(before, stride=2, activation="linear", is_depthwise=True)
        draft.conv(width, 1, activation="swish")
        draft.route(-1, top, note="with the path from coarse to fine")
        draft.macro("elan", filters=width)
        draft.predict("logistic")


def _bottlenecks(draft: Draft, filters: int, count: int) -> int:
    """Write `count` convolutions, 1×1 to `filters` and 3×3 to twice as many by turns."""
    for place in range(count):
        layer = draft.conv(2 * filters) if place % 2 else draft.conv(filters, 1)
    return layer


COARSE_FIRST = ("6,7,8", "3,4,5", "0,1,2")
FINE_FIRST = COARSE_FIRST[::-1]
LEVELS = ("C3", "C4", "C5")

HEADS: dict[str, Head] = {
    "yolov3": Head(yolov3, "YOLOv3", "https://arxiv.org/abs/1804.02767", LEVELS, COARSE_FIRST, STOCK),
    "yolov3-tiny": Head(
        yolov3_tiny, "YOLOv3-tiny", "https://arxiv.org/abs/1804.02767", LEVELS[1:], COARSE_FIRST[1:], STOCK
    ),
    "yolov4": Head(
        yolov4,
        "YOLOv4",
        "https://arxiv.org/abs/2004.10934",
        LEVELS,
        FINE_FIRST,
        STOCK | {"iou_thresh": "0.213"} | CIOU | GREEDY | {"max_delta": 5},
        (1.2, 1.1, 1.05),
        {"momentum": "0.949", "learning_rate": "0.0013", "mosaic": 1},
        Own(608, "12,16, 19,36, 40,28, 36,75, 76,55, 72,146, 142,110, 192,243, 459,401"),
    ),
    # Of the six anchors the official cfg leaves out the smallest and uses another one twice.
    "yolov4-tiny": Head(
        yolov3_tiny,
        "YOLOv4-tiny",
        "https://arxiv.org/abs/2011.08036",
        LEVELS[1:],
        COARSE_FIRST[1:],
        STOCK | {"random": 0, "resize": "1.5"} | CIOU | GREEDY,
        (1.05, 1.05),
        {"learning_rate": "0.00261"},
        Own(416, COCO_6, ("3,4,5", "1,2,3")),
    ),
    "pan-lite": Head(
        pan_lite,
        "light PAN",
        "https://arxiv.org/abs/1803.01534",
        LEVELS,
        FINE_FIRST,
        STOCK | {"new_coords": 1, "resize": "1.5"} | CIOU | GREEDY | {"max_delta": 5},
        (2.0, 2.0, 2.0),
        {"mosaic": 1},
    ),
}
