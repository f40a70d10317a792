"""How Darknet changes pictures before training, as [net] and [yolo] say: crops, colours, flips, mosaic, mixup.

Pictures are uint8 RGB [H, W, 3], boxes float32 xyxy_px [N, 4]; randomness comes from the generator that is passed.
"""

from collections.abc import Callable

import cv2
import numpy as np

from .augment import GREY, Sample, clip_boxes
from .darknet_recipe import Distortion

JOINED = 0.5  # probability of a mosaic or a mixture where there is one
CUT = 0.2, 0.8  # where a mosaic is cut, in fractions of a side


def distorted(
    load: Callable[[int], Sample],
    index: int,
    count: int,
    size: tuple[int, int],
    rules: Distortion,
    generator: np.random.Generator,
) -> Sample:
    """Give picture `index` of `count` as it is trained on, of `size`, alone or joined with others; `load` reads one."""
    joins = 4 if rules.is_mosaic else 2 if rules.is_mixed else 1
    if joins > 1 and generator.random() < 1 - JOINED:
        joins = 1
    chosen = [index, *map(int, generator.integers(count, size=joins - 1))]
    samples = [distort(load(i), size, rules, generator) for i in chosen]
    if joins == 1:
        return samples[0]
    return quarters(samples, rules, generator) if joins == 4 else blend(*samples)


def distort(sample: Sample, size: tuple[int, int], rules: Distortion, generator: np.random.Generator) -> Sample:
    """Cut a window out of a picture (or around it), scale it to `size`, rotate, flip and colour it."""
    picture, classes, boxes = sample
    h, w = picture.shape[:2]
    left, top, right, bottom = window(h, w, size, rules, generator)
    zoom_x, zoom_y = size[1] / (right - left), size[0] / (bottom - top)
    matrix = np.array([[zoom_x, 0, -left * zoom_x], [0, zoom_y, -top * zoom_y]])
    if rules.is_flipped and generator.random() < 0.5:
        matrix[0] = [-zoom_x, 0, right * zoom_x]
    if rules.angle:
        turn = np.deg2rad(generator.uniform(-rules.angle, rules.angle))
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        centre = np.array([size[1], size[0]]) / 2
        matrix = rotation @ matrix
        matrix[:, 2] += centre - rotation @ centre
    picture = cv2.warpAffine(picture, matrix, (size[1], size[0]), borderValue=GREY)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ matrix[:, :2].T + matrix[:, 2]  # [N, 4, 2]
    moved = np.concatenate((corners.min(1), corners.max(1)), axis=1).astype(np.float32)
    area = zoom_x * zoom_y * (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return colour(picture, rules, generator), *clip_boxes(classes, moved, size, area)


def window(
    h: int, w: int, size: tuple[int, int], rules: Distortion, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw the window (left, top, right, bottom) of a picture that becomes the input; it may reach beyond it."""
    moves = generator.uniform(-rules.jitter, rules.jitter, 4)
    factor = max(rules.resize, 1 / rules.resize)
    out, into = (1 - factor) / 2, (1 - 1 / factor) / 2  # of a side, on each of its ends
    moves += generator.uniform(out, into if rules.resize >= 1 else 0, 2)[[0, 0, 1, 1]]
    left, top, right, bottom = moves.clip(max=0.49) * [w, h, w, h]  # 0.49: opposite edges never meet
    if rules.keeps_shape:
        wider = w / h / (size[1] / size[0])
        grow_x, grow_y = max(0, w / wider - w) / 2, max(0, h * wider - h) / 2
        left, right, top, bottom = left - grow_x, right - grow_x, top - grow_y, bottom - grow_y
    return left, top, w - right, h - bottom


def colour(picture: np.ndarray, rules: Distortion, generator: np.random.Generator) -> np.ndarray:
    """Turn the hue, and scale saturation and exposure by a factor or its inverse."""
    if (rules.hue, rules.saturation, rules.exposure) == (0, 1, 1):
        return picture
    turn = generator.uniform(-rules.hue, rules.hue)
    saturation, exposure = (
        generator.uniform(min(1, most), max(1, most)) ** generator.choice([-1, 1])
        for most in (rules.saturation, rules.exposure)
    )
    ramp = np.arange(256)  # OpenCV's hues are half degrees: 0 to 179
    tables = ((ramp + 180 * turn) % 180, (ramp * saturation).clip(0, 255), (ramp * exposure).clip(0, 255))
    hsv = cv2.LUT(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV), np.stack(tables, axis=-1).astype(np.uint8)[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def quarters(samples: list[Sample], rules: Distortion, generator: np.random.Generator) -> Sample:
    """Fill the quarters about a random point with the inner parts of four inputs (https://arxiv.org/abs/2004.10934).

    A box ends at the border of its quarter where `mosaic_bound` says so, else at that of the input.
    """
    H, W = samples[0][0].shape[:2]
    x, y = (int(side * generator.uniform(*CUT)) for side in (W, H))
    canvas = np.empty_like(samples[0][0])
    classes, boxes = [], []
    for corner, (picture, labels, xyxy_px) in enumerate(samples):
        left, right = (0, x) if corner % 2 == 0 else (x, W)
        top, bottom = (0, y) if corner < 2 else (y, H)
        dx, dy = (x - W if corner % 2 == 0 else x), (y - H if corner < 2 else y)  # the cut is a corner of each input
        canvas[top:bottom, left:right] = picture[top - dy : bottom - dy, left - dx : right - dx]
        moved = xyxy_px + np.float32([dx, dy, dx, dy])
        shown = moved.clip(np.float32([left, top, left, top]), np.float32([right, bottom, right, bottom]))
        area = (xyxy_px[:, 2:] - xyxy_px[:, :2]).prod(1)
        kept, _ = clip_boxes(np.arange(len(labels)), shown - np.float32([left, top] * 2), (H, W), area)
        classes.append(labels[kept])
        boxes.append((shown if rules.is_bounded else moved.clip(0, np.float32([W, H, W, H])))[kept])
    return canvas, np.concatenate(classes), np.concatenate(boxes)


def blend(first: Sample, second: Sample) -> Sample:
    """Mix two inputs half and half and keep the boxes of both."""
    picture = cv2.addWeighted(first[0], 0.5, second[0], 0.5, 0)
    return picture, np.concatenate((first[1], second[1])), np.concatenate((first[2], second[2]))
