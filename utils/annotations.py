"""What every reader of a dataset's annotations makes and needs: records of pictures and boxes, files, numbers."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .lists import IMAGE_SUFFIXES
from .log import DataError
from .pictures import read_header

OBJECT, CROWD, DIFFICULT, REGION = "object", "crowd", "difficult", "region"  # all but the first as in ignore files


class Box(NamedTuple):
    """A box of the annotated picture: class name ("" for every class), xyxy_px with 0 at the left and top edge."""

    label: str
    xyxy_px: tuple[float, float, float, float]
    kind: str = OBJECT


@dataclass(frozen=True)
class Record:
    """One picture: its file, its name below images/, its annotated size (height, width), boxes, reasons of drops."""

    source: str
    image: Path
    name: str
    size: tuple[int, int] | None
    boxes: Sequence[Box]
    dropped: Sequence[str] = ()


class Shape(NamedTuple):
    """A picture as annotated: (height, width) there, and the EXIF orientation that its boxes do not know yet."""

    size: tuple[int, int]
    orientation: int


@dataclass(frozen=True)
class Part:
    """The pictures of one list, `train` or `valid`: `read` makes a record of an item, or raises DataError."""

    name: str
    items: Sequence[Any]
    read: Callable[[Any], Record]


@dataclass(frozen=True)
class Source:
    """A dataset as it was published: parts, class names where the annotations give them, and other spellings."""

    parts: Sequence[Part]
    names: tuple[str, ...] = ()
    aliases: dict[str, str] | None = None


@dataclass(frozen=True)
class Choice:
    """Which splits the lists hold; empty: those of the published protocol."""

    train: str = ""
    valid: str = ""


def find_folder(root: Path, *names: str, expected: str) -> Path:
    """Give the first of the folders `names` that is there. Raises DataError, naming what was expected of the layout."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: has no {' or '.join(names)} (expected {expected})")


def index_images(*folders: Path) -> dict[str, Path]:
    """Map the stems of the folders' pictures to their paths. Raises DataError where a folder cannot be read."""
    found: dict[str, Path] = {}
    for folder in folders:
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise DataError(f"{folder}: cannot be read: {error.strerror} (expected a folder of pictures)") from None
        for path in entries:
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                if path.stem in found:
                    raise DataError(f"{path}: and {found[path.stem]} would share a label file (rename one)")
                found[path.stem] = path
    return found


def find_image(images: dict[str, Path], stem: str, source: str) -> Path:
    """Give the picture of an annotation. Raises DataError where there is none."""
    if stem not in images:
        raise DataError(f"{source}: there is no picture {stem} (expected {stem}.jpg)")
    return images[stem]


def check_all_annotated(folder: Path, images: dict[str, Path], files: Sequence[Path]) -> None:
    """Raise DataError unless there are annotations, and one for every picture."""
    if not files:
        raise DataError(f"{folder}: holds no annotations")
    bare = sorted(images.keys() - {file.stem for file in files})
    if bare:
        raise DataError(
            f"{folder}: there is no {bare[0]}{files[0].suffix}, and {len(bare) - 1} more pictures have none"
        )


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DataError."""
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is no JSON: {error.msg} (a download cut short?)") from None
    except (ValueError, RecursionError):  # no text, a number of thousands of digits, or thousands of brackets
        raise DataError(f"{path}: is no JSON") from None


def to_numbers(values: Sequence[Any], count: int, where: str) -> tuple[float, ...]:
    """Turn `count` values into finite numbers. Raises DataError."""
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: expected {count} numbers, gets {values!r}")
    return numbers


def check_picture(record: Record) -> Shape:
    """Read a picture's size, without decoding it, and compare it with the annotated one. Raises DataError."""
    stored, orientation = read_header(record.image)
    turned = stored[::-1] if orientation >= 5 else stored
    if record.size in (None, stored):
        return Shape(stored, orientation)
    if record.size == turned:
        return Shape(turned, 1)
    (h, w), (ah, aw) = stored, record.size
    raise DataError(
        f"{record.source}: says {aw}x{ah}, but {record.image} is {w}x{h} (another version of the pictures?)"
    )


def to_fractions(box: Box, shape: Shape) -> str | None:
    """Clip a box to its picture, turn it upright, and give `x y w h` in fractions; None where nothing is left."""
    height, width = shape.size
    x1, y1, x2, y2 = box.xyxy_px
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x2 <= x1 or y2 <= y1:
        return None
    if shape.orientation in (2, 3, 7, 8):  # EXIF: mirrored along, then across, then transposed
        x1, x2 = width - x2, width - x1
    if shape.orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    if shape.orientation >= 5:
        x1, y1, x2, y2, width, height = y1, x1, y2, x2, height, width
    values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    words = [f"{value:.6f}" for value in values]
    return None if "0.000000" in words[2:] else " ".join(words)
