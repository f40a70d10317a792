"""Pictures for people: boxes with legible labels, training batches, and the curves of a run."""

import colorsys
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from .datasets import Batch
from .pictures import save_picture

GOLDEN = 0.618034  # steps of the golden ratio around the colour circle keep neighbouring classes apart
MAX_TILES = 16  # pictures in a drawn batch


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
        h, w = picture.shape[:2]
        targets = batch.targets[batch.targets[:, 0] == place].numpy()
        centre, half = targets[:, 2:4], targets[:, 4:6] / 2
        boxes = np.hstack((centre - half, centre + half)) * (w, h, w, h)
        classes = targets[:, 1].astype(int)
        tiles.append(draw_boxes(picture, boxes, [names[label] for label in classes], classes.tolist()))
    columns = int(np.ceil(np.sqrt(len(tiles))))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    save_picture(path, np.vstack(rows))


def draw_curves(metrics_file: Path, path: Path) -> None:
    """Draw loss, mAP and learning rate of a run from its metrics.jsonl."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss_axes, map_axes, lr_axes = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in rows]
    for part in rows[0]["loss"]:
        loss_axes.plot(epochs, [row["loss"][part] for row in rows], label=part)
    tested = [row for row in rows if "map50" in row]
    for key, title in (("map50", "mAP@.5"), ("map50_95", "mAP@.5:.95"), ("f1", "F1")):
        values = [row[key] for row in tested]
        label = f"{title} (last {values[-1]:.3f})" if values else title
        map_axes.plot([row["epoch"] for row in tested], values, marker=".", label=label)
    lr_axes.plot(epochs, [row["lr"] for row in rows], label="at the end of the epoch")
    for axes, title in ((loss_axes, "training loss"), (map_axes, "validation"), (lr_axes, "learning rate")):
        axes.set(title=title, xlabel="epoch")
        axes.set_xlim(0, epochs[-1] + 1)
        axes.grid(alpha=0.3)
        axes.legend()
    map_axes.set_ylim(0, 1)
    figure.savefig(path, dpi=100)


def class_colour(label: int) -> tuple[int, int, int]:
    """Give the RGB colour of a class."""
    red, green, blue = colorsys.hsv_to_rgb(0.02 + label * GOLDEN % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


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
