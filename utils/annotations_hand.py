"""The Oxford Hand dataset's .mat files: https://www.robots.ox.ac.uk/~vgg/data/hands/

`boxes` is a row of cells, each a struct with the corners a, b, c and d of a quadrilateral that is turned with the hand:
a corner is (y, x). They become the upright box around them.
"""

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .annotations import Box, Choice, Part, Record, Source, check_all_annotated, find_image, index_images, to_numbers
from .log import DataError

LAYOUT = "hand_dataset with training_dataset/training_data, validation_dataset/… and test_dataset/…"


def read_hand(source: Path, choice: Choice) -> Source:
    """Read the splits: training and validation are trained on, as published results do. Raises DataError."""
    loader = _import_loader()
    root = source / "hand_dataset" if (source / "hand_dataset").is_dir() else source
    parts = []
    for part, splits in (("train", choice.train or "training,validation"), ("valid", choice.valid or "test")):
        items = []
        for split in splits.split(","):
            folder = root / f"{split}_dataset/{split}_data"
            if not (folder / "annotations").is_dir() or not (folder / "images").is_dir():
                raise DataError(f"{folder}: has no annotations and images (expected {LAYOUT})")
            images = index_images(folder / "images")
            files = sorted((folder / "annotations").glob("*.mat"))
            check_all_annotated(folder / "annotations", images, files)
            items += [(file, images, split) for file in files]
        parts.append(Part(part, items, partial(_read_item, loader=loader)))
    return Source(parts)


def _import_loader() -> ModuleType:
    try:
        import scipy.io
    except ImportError:
        raise DataError("oxfordhand: its .mat files need SciPy (pip install scipy)") from None
    return scipy.io


def _read_item(item: tuple[Path, dict[str, Path], str], *, loader: ModuleType) -> Record:
    file, images, split = item
    image = find_image(images, file.stem, str(file))
    try:
        cells = loader.loadmat(str(file))["boxes"].ravel()
    except Exception as error:  # SciPy raises whatever broken bytes lead its reader to
        raise DataError(f"{file}: cannot be read as a MATLAB file with 'boxes': {error}") from None
    boxes = [Box("hand", _around(cell, f"{file}: box {place}")) for place, cell in enumerate(cells, start=1)]
    return Record(str(file), image, f"{split}/{image.name}", None, boxes)


def _around(cell: Any, where: str) -> tuple[float, float, float, float]:
    """Give the upright box around the corners. In MATLAB the first pixel's centre is at 1, its edge at 0.5."""
    if not isinstance(cell, np.ndarray) or cell.size != 1 or not {*"abcd"} <= set(cell.dtype.names or ()):
        raise DataError(f"{where}: expected a struct with corners a, b, c and d")
    corners = [to_numbers(np.ravel(cell.ravel()[0][name]), 2, f"{where}, corner {name}") for name in "abcd"]
    (y1, x1), (y2, x2) = (np.array(pick(corners, axis=0)) - 0.5 for pick in (np.min, np.max))
    return float(x1), float(y1), float(x2), float(y2)
