"""Detection heads: what a `[yolo]` or `[region]` section says, and how its raw map becomes boxes and scores.

The decode rules are Darknet's (YOLOv3, https://arxiv.org/abs/1804.02767; `scale_x_y` and `new_coords` of scaled YOLOv4,
https://arxiv.org/abs/2011.08036; Gaussian YOLOv3, https://arxiv.org/abs/1904.04620). The loss lives elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NMS_KINDS = ("default", "greedynms", "diounms", "cornersnms")
POINTS = {"center": 0.0, "left_top": 0.5, "right_bottom": -0.5}  # from it to the centre, in sides of the box
GAUSSIAN = (0, 2, 4, 6), (1, 3, 5, 7)  # entries of a Gaussian head: the coordinates, and how unsure each is


@dataclass(frozen=True)
class HeadSpec:
    """One head. `anchors` are (width, height) in network-input pixels, `stride` is (height, width) in pixels a cell."""

    layer: int
    anchors: tuple[tuple[float, float], ...]
    classes: int
    stride: tuple[float, float]
    scale_x_y: float = 1.0
    is_new_coords: bool = False
    is_softmax: bool = False
    nms_kind: str = "default"
    beta_nms: float = 0.6
    is_gaussian: bool = False
    point: str = "center"  # the point of the box that x and y tell

    @property
    def entries(self) -> int:
        """Count the channels of one anchor."""
        return self.classes + (9 if self.is_gaussian else 5)


def split(raw: Tensor, spec: HeadSpec) -> Tensor:
    """View a raw map [B, A*entries, H, W] as [B, A, H, W, 5+C]: x, y, w, h, objectness, classes.

    The uncertainties of a Gaussian head are left out.
    """
    t = _entries(raw, spec)
    return t[..., [*GAUSSIAN[0], *range(8, spec.entries)]] if spec.is_gaussian else t  # [B, A, H, W, 5+C]


def uncertainty(raw: Tensor, spec: HeadSpec) -> Tensor:
    """Give the mean uncertainty 0..1 of each box of a Gaussian head, [B, A, H, W, 1]."""
    return _entries(raw, spec)[..., GAUSSIAN[1]].sigmoid().mean(-1, keepdim=True)


def _entries(raw: Tensor, spec: HeadSpec) -> Tensor:
    B, _, H, W = raw.shape
    return raw.view(B, len(spec.anchors), spec.entries, H, W).permute(0, 1, 3, 4, 2)  # [B, A, H, W, entries]


def to_xywh(t: Tensor, cell: Tensor, anchor: Tensor, spec: HeadSpec) -> tuple[Tensor, Tensor]:
    """Turn predictions t [..., 4] at `cell` [..., 2] (column, row) into a centre in cells and a size in pixels.

    The size has the unit of `anchor` [..., 2]. With `new_coords` the convolution before the head is logistic already
    and the size is a square, otherwise an exponential.
    """
    xy, wh = t[..., :2], t[..., 2:4]
    if spec.is_new_coords:
        size = 4 * wh.square() * anchor
    else:
        xy, size = xy.sigmoid(), wh.exp() * anchor
    return cell + xy * spec.scale_x_y - (spec.scale_x_y - 1) / 2, size  # [..., 2], [..., 2]


def decode_all(heads: Sequence[Tensor], specs: Sequence[HeadSpec], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Decode the raw maps of all heads: boxes [B, N, 4] xywh_px and scores [B, N, C], head after head."""
    pairs = [decode(raw.float(), spec, size) for raw, spec in zip(heads, specs, strict=True)]
    boxes, scores = zip(*pairs, strict=True)
    return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)


def diou_beta(specs: Sequence[HeadSpec]) -> float | None:
    """Give the exponent of the centres' distance in NMS, where the last head asks for `diounms`: Darknet goes by it."""
    return specs[-1].beta_nms if specs[-1].nms_kind == "diounms" else None


def decode(raw: Tensor, spec: HeadSpec, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Decode a raw map [B, A*entries, H, W] of a network input of `size` (height, width).

    Returns boxes [B, A*H*W, 4] as xywh_px (centre, width, height in network-input pixels) and scores [B, A*H*W, C]
    (objectness times class, of a Gaussian head times its certainty).
    """
    t = split(raw, spec)  # [B, A, H, W, 5+C]
    B, A, H, W, _ = t.shape
    rows, columns = torch.arange(H, device=raw.device), torch.arange(W, device=raw.device)
    cell = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(raw.dtype)  # [H, W, 2]
    anchor = torch.tensor(spec.anchors, device=raw.device, dtype=raw.dtype).view(A, 1, 1, 2)
    xy, wh = to_xywh(t[..., :4], cell, anchor, spec)
    xy = xy * torch.tensor([size[1] / W, size[0] / H], device=raw.device, dtype=raw.dtype)
    if spec.point != "center":
        xy = xy + POINTS[spec.point] * wh
    objectness, classes = t[..., 4:5], t[..., 5:]
    if not spec.is_new_coords:
        objectness = objectness.sigmoid()
        classes = classes.softmax(-1) if spec.is_softmax else classes.sigmoid()
    boxes, scores = torch.cat((xy, wh), -1), objectness * classes
    if spec.is_gaussian:
        scores = scores * (1 - uncertainty(raw, spec))
    return boxes.reshape(B, A * H * W, 4), scores.reshape(B, A * H * W, spec.classes)
