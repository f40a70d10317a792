"""Pictures for people: boxes with legible labels, training batches, and predictions beside truths."""

import colorsys
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_convert

from .augment import resize_to_fit
from .datasets import Batch
from .labels import Labelled
from .pictures import read_picture, save_picture

GOLDEN = 0.618034  # steps of the golden ratio around the colour circle keep neighbouring classes apart
MAX_TILES, MIN_TILE = 16, 320  # pictures in a drawn batch, and the least pixels of their longer side
MAX_PAIRS, PAIR_SIDE = 8, 480  # pictures with predictions, and the pixels of one


def draw_boxes(picture: np.ndarray, boxes: np.ndarray, labels: Sequence[str], classes: Sequence[int]) -> np.ndarray:
    """Draw xyxy_px boxes [N, 4] with their labels on a copy of an RGB picture, the first (best) ones on top."""
    drawn = np.ascontiguousarray(picture).copy()
    height, width = drawn.shape[:2]
    line = max(1, round(max(height, width) / 320))
    for box, text, label in reversed(list(zip(boxes, labels, classes, strict=True))):
        x1, y1, x2, y2 = (round(float(side)) for side in box)
        colour = class_colour(label)
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, line, cv2.LINE_AA)
        tag = _tag(text, max(11, round(min(height, width) / 36)), colour)
        tag = tag[:height, :width]
        h, w = tag.shape[:2]
        top = y1 - h if y1 >= h else min(y1, height - h)  # above the box, or inside at the upper edge
        left = min(max(x1 - line // 2, 0), width - w)
        drawn[top : top + h, left : left + w] = tag
    return drawn


def draw_batch(batch: Batch, names: Sequence[str], path: Path) -> None:
    """Draw the pictures of a training batch with their boxes in a grid and save it."""
    tiles = []
    for place in range(min(len(batch.pictures), MAX_TILES)):
        picture = batch.pictures[place].numpy().transpose(1, 2, 0)  # [H, W, channels]
        picture = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
        if max(picture.shape) < MIN_TILE:  # so that labels do not cover all
            picture = resize_to_fit(picture, (MIN_TILE, MIN_TILE))
        h, w = picture.shape[:2]
        targets = batch.targets[batch.targets[:, 0] == place].numpy()
        centre, half = targets[:, 2:4], targets[:, 4:6] / 2
        boxes = np.hstack((centre - half, centre + half)) * (w, h, w, h)
        classes = targets[:, 1].astype(int)
        tiles.append(draw_boxes(picture, boxes, [names[label] for label in classes], classes.tolist()))
    save_picture(path, _grid(tiles, columns=math.ceil(math.sqrt(len(tiles)))))


def draw_predictions(
    results: list[dict[str, Any]], labelled: Labelled, names: Sequence[str], path: Path, *, confidence: float
) -> None:
    """Draw pictures from all over a list, truths on the left and COCO results of at least `confidence` on the right."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if result["score"] >= confidence:
            found[result["image_id"]].append(result)
    count = len(labelled.paths)
    pairs = []
    for index in range(0, count, -(-count // MAX_PAIRS)):
        picture = resize_to_fit(read_picture(labelled.paths[index]), (PAIR_SIDE, PAIR_SIDE))
        h, w = picture.shape[:2]
        truths = labelled.labels[index]
        boxes = box_convert(torch.from_numpy(truths[:, 1:]), "cxcywh", "xyxy").numpy().clip(0, 1) * (w, h, w, h)
        labels = truths[:, 0].astype(int).tolist()
        left = draw_boxes(picture, boxes, [names[label] for label in labels], labels)
        scale = np.array([w, h, w, h]) / np.tile(labelled.sizes[index][::-1], 2)
        boxes = np.array([result["bbox"] for result in found[index]], float).reshape(-1, 4) * scale
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, (w, h, w, h))  # those of Darknet's protocol lie anywhere
        labels = [result["category_id"] for result in found[index]]
        texts = [f"{names[result['category_id']]} {result['score']:.2f}" for result in found[index]]
        right = draw_boxes(picture, boxes, texts, labels)
        titled = [_titled(left, "truth"), _titled(right, f"found, confidence {confidence:.2f} and more")]
        pairs.append(np.hstack(titled))
    save_picture(path, _grid(pairs, columns=2 if len(pairs) > 1 else 1))


def class_colour(label: int) -> tuple[int, int, int]:
    """Give the RGB colour of a class."""
    red, green, blue = colorsys.hsv_to_rgb(0.02 + label * GOLDEN % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _grid(tiles: list[np.ndarray], *, columns: int) -> np.ndarray:
    """Lay pictures of any sizes out in rows, in cells of the largest."""
    h, w = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    sheet = np.zeros((-(-len(tiles) // columns) * h, columns * w, 3), np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * h, place % columns * w
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
    """Put a picture under a line of text, both PAIR_SIDE wide."""
    tag = _tag(title, 14, (40, 40, 40))
    framed = np.zeros((tag.shape[0] + picture.shape[0], PAIR_SIDE, 3), np.uint8)
    framed[: tag.shape[0], : min(tag.shape[1], PAIR_SIDE)] = tag[:, :PAIR_SIDE]
    framed[tag.shape[0] :, : picture.shape[1]] = picture
    return framed


@lru_cache(maxsize=4096)
def _tag(text: str, size: int, colour: tuple[int, int, int]) -> np.ndarray:
    """Render a label in any script on its class colour, black or white whichever reads better."""
    font = _font(size)
    left, _, right, _ = font.getbbox(text)
    ascent, descent = font.getmetrics()
    tag = Image.new("RGB", (int(right - left) + size // 2, ascent + descent), colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ImageDraw.Draw(tag).text((size // 4 - left, 0), text, font=font, fill="black" if luminance > 120 else "white")
    return np.asarray(tag)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
