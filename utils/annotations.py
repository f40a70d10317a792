"""What every reader of a dataset's annotations makes: records of pictures and boxes, and how it reads files."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .lists import IMAGE_SUFFIXES
from .log import DataError

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
    except (UnicodeDecodeError, RecursionError):
        raise DataError(f"{path}: is no JSON") from None


def to_numbers(values: Sequence[Any], count: int, where: str) -> tuple[float, ...]:
    """Turn `count` values into finite numbers. Raises DataError."""
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: expected {count} numbers, gets {values!r}")
    return numbers
