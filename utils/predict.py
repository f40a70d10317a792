"""From a network input to boxes: the forward pass, decoding, and test-time augmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import scaled_size
from .network import Network

VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # test-time augmentation: (scale, mirrored)


def predict(model: Network, x: Tensor, *, is_augmented: bool = False) -> tuple[Tensor, Tensor]:
    """Run inputs [B, C, H, W] in 0..1 and return boxes [B, N, 4] xywh_px and scores [B, N, classes].

    With `is_augmented` the boxes of three views (scaled, mirrored) stand one after the other.
    """
    H, W = x.shape[-2:]
    views = []
    for scale, is_mirrored in VIEWS if is_augmented else VIEWS[:1]:
        size = scaled_size((H, W), scale, model.stride)
        view = x if scale == 1 else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        h, w = view.shape[-2:]
        boxes, scores = model.decode(model(view.flip(3) if is_mirrored else view), (h, w))
        if is_mirrored:
            boxes = torch.cat((w - boxes[..., :1], boxes[..., 1:]), dim=-1)
        views.append((boxes * boxes.new_tensor([W / w, H / h, W / w, H / h]), scores))
    boxes, scores = zip(*views, strict=True)
    return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
