"""What happens to a picture before training: letterbox, mosaic (https://arxiv.org/abs/2004.10934), affine,
colour, flip, mixup.

Pictures are uint8 RGB [H, W, 3], boxes float32 xyxy_px [N, 4]; randomness comes from the generator that is passed.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from .boxes import Fit
from .recipe import Recipe

GREY = (114, 114, 114)  # padding close to the mean of natural pictures
MIN_SIDE, MIN_AREA = 2.0, 0.1  # a cut box stays with at least 2 px a side and a tenth of its area

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]  # picture, classes [N], boxes [N, 4]


def resize_to_fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a picture so that it just fits into `size` (height, width), keeping its shape."""
    h, w = picture.shape[:2]
    ratio = min(size[0] / h, size[1] / w)
    if ratio == 1:
        return picture
    target = max(1, round(w * ratio)), max(1, round(h * ratio))
    return cv2.resize(picture, target, interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR)


def letterbox(picture: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, Fit]:
    """Scale a picture into `size` (height, width) and pad it with grey on both sides."""
    h, w = picture.shape[:2]
    resized = resize_to_fit(picture, size)
    rh, rw = resized.shape[:2]
    top, left = (size[0] - rh) // 2, (size[1] - rw) // 2
    fit = Fit((h, w), (rh / h, rw / w), (top, left))
    if (rh, rw) == size:
        return resized, fit
    bottom, right = size[0] - rh - top, size[1] - rw - left
    return cv2.copyMakeBorder(resized, top, bottom, left, right, cv2.BORDER_CONSTANT, value=GREY), fit


def stretch(picture: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, Fit]:
    """Resize a picture to `size` (height, width) whatever its shape, as Darknet does unless letter_box=1."""
    h, w = picture.shape[:2]
    fit = Fit((h, w), (size[0] / h, size[1] / w), (0, 0))
    if (h, w) == size:
        return picture, fit
    return cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_LINEAR), fit


def mosaic(samples: Sequence[Sample], size: tuple[int, int], generator: np.random.Generator) -> Sample:
    """Lay four pictures, each fitted to `size`, around a random centre of a canvas of twice that size."""
    H, W = size
    cy, cx = (int(side * generator.uniform(0.5, 1.5)) for side in size)
    canvas = np.full((2 * H, 2 * W, 3), GREY, np.uint8)
    classes, boxes, areas = [], [], []
    for corner, (picture, labels, xyxy_px) in enumerate(samples):
        h, w = picture.shape[:2]
        top = cy - h if corner < 2 else cy
        left = cx - w if corner % 2 == 0 else cx
        y1, x1, y2, x2 = max(top, 0), max(left, 0), min(top + h, 2 * H), min(left + w, 2 * W)
        canvas[y1:y2, x1:x2] = picture[y1 - top : y2 - top, x1 - left : x2 - left]
        classes.append(labels)
        boxes.append(xyxy_px + np.float32([left, top, left, top]))
        areas.append((xyxy_px[:, 2:] - xyxy_px[:, :2]).prod(1))
    return canvas, *clip_boxes(np.concatenate(classes), np.concatenate(boxes), canvas.shape[:2], np.concatenate(areas))


def random_affine(sample: Sample, size: tuple[int, int], recipe: Recipe, generator: np.random.Generator) -> Sample:
    """Rotate, zoom, shear and move a picture about its centre into a window of `size` (height, width)."""
    picture, classes, boxes = sample
    h, w = picture.shape[:2]
    zoom = generator.uniform(1 - recipe.scale, 1 + recipe.scale)
    angle, shear_x, shear_y = np.deg2rad(
        [generator.uniform(-limit, limit) for limit in (recipe.degrees, recipe.shear, recipe.shear)]
    )
    dx, dy = (generator.uniform(0.5 - recipe.translate, 0.5 + recipe.translate) for _ in range(2))
    rotation = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = np.array([[1, np.tan(shear_x)], [np.tan(shear_y), 1]]) @ rotation
    shift = np.array([dx * size[1], dy * size[0]]) - linear @ (w / 2, h / 2)
    matrix = np.hstack((linear, shift[:, None])).astype(np.float32)  # [2, 3]
    picture = cv2.warpAffine(picture, matrix, (size[1], size[0]), borderValue=GREY)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ linear.T + shift  # [N, 4, 2]
    moved = np.concatenate((corners.min(1), corners.max(1)), axis=1).astype(np.float32)
    area = zoom * zoom * (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return picture, *clip_boxes(classes, moved, size, area)


def clip_boxes(
    classes: np.ndarray, boxes: np.ndarray, size: tuple[int, ...], area: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to `size` and drop those of which too little is left of `area` [N]."""
    clipped = boxes.clip(0, np.float32([size[1], size[0], size[1], size[0]]))
    w, h = clipped[:, 2] - clipped[:, 0], clipped[:, 3] - clipped[:, 1]
    keep = (w >= MIN_SIDE) & (h >= MIN_SIDE) & (w * h >= MIN_AREA * area)
    return classes[keep], clipped[keep]


def jitter_colour(picture: np.ndarray, recipe: Recipe, generator: np.random.Generator) -> np.ndarray:
    """Turn the hue and scale saturation and value of a picture."""
    limits = np.array([recipe.hue, recipe.saturation, recipe.value])
    if not limits.any():
        return picture
    hue, saturation, value = 1 + generator.uniform(-1, 1, 3) * limits
    ramp = np.arange(256)
    tables = (ramp * hue % 180, (ramp * saturation).clip(0, 255), (ramp * value).clip(0, 255))
    table = np.stack(tables, axis=-1).astype(np.uint8)[None]  # [1, 256, 3]
    hsv = cv2.LUT(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV), table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def flip(sample: Sample, recipe: Recipe, generator: np.random.Generator) -> Sample:
    """Mirror a picture left-right or upside down."""
    picture, classes, boxes = sample
    h, w = picture.shape[:2]
    if generator.random() < recipe.flip_lr:
        x1, y1, x2, y2 = boxes.T
        picture, boxes = picture[:, ::-1], np.stack((w - x2, y1, w - x1, y2), axis=1)
    if generator.random() < recipe.flip_ud:
        x1, y1, x2, y2 = boxes.T
        picture, boxes = picture[::-1], np.stack((x1, h - y2, x2, h - y1), axis=1)
    return picture, classes, boxes


def mixup(first: Sample, second: Sample, generator: np.random.Generator) -> Sample:
    """Blend two pictures about half and half and keep the boxes of both (https://arxiv.org/abs/1710.09412)."""
    share = generator.beta(32, 32)
    picture = cv2.addWeighted(first[0], share, second[0], 1 - share, 0)
    return picture, np.concatenate((first[1], second[1])), np.concatenate((first[2], second[2]))
