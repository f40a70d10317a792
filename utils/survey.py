"""Look at every image and label of a list without stopping at what is wrong: what utils/findings.py judges.

Pictures are told apart by their bytes; what looks alike is told by difference hashes: whether each of 8 × 8 places is
brighter than the one to its right, and than the one below it.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from .labels import Labelled, check_ignore_file, check_words
from .lists import label_path, list_images, read_lines
from .log import DataError
from .pictures import check_picture

PLAIN = 2.0  # grey levels; a thumbnail that varies less has a hash of noise
REDUCED = 512  # pixels of the shorter side, from where an eighth of them is enough for a hash


class Mistake(NamedTuple):
    """A line of a label or ignore file that training refuses: which sort of mistake, and file, line and reason."""

    kind: str
    text: str


@dataclass(frozen=True)
class Look:
    """What one image and its label file hold; `size` is (height, width), (0, 0) for a picture that cannot be read.

    `rows` [n, 5] (class, xywh_n) are the good label lines, `lines` [n] their numbers in the file. `content` is a hash
    of the file's bytes, `likeness` [2] uint64 of how it looks, None for a picture that is plain.
    """

    path: str
    size: tuple[int, int]
    problem: str
    content: bytes
    likeness: np.ndarray | None
    has_labels: bool
    rows: np.ndarray
    lines: np.ndarray
    mistakes: tuple[Mistake, ...]


def survey(source: str | Path, classes: int) -> list[Look]:
    """Look at all images that `source` names and at their labels, several at a time. Raises DataError on a bad list."""
    paths = list_images(source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = pool.map(lambda path: look(path, classes), paths)
        return list(tqdm(looks, total=len(paths), desc=f"checking {source}", unit="img", leave=False))


def look(path: str, classes: int) -> Look:
    """Look at one image and its labels."""
    size, problem = check_picture(path)
    data = np.zeros(0, np.uint8)
    if not problem:
        data = np.fromfile(path, np.uint8)
    content = hashlib.blake2b(data.data, digest_size=16).digest()
    likeness = None if problem else difference_hash(data, size)
    rows, lines, mistakes = _read_labels(label_path(path), classes)
    mistakes += tuple(Mistake("ignore", text) for text in check_ignore_file(path, classes)[1])
    return Look(path, size, problem, content, likeness, label_path(path).is_file(), rows, lines, mistakes)


def difference_hash(data: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """Give two difference hashes of 64 bits, across and down, of an encoded picture; None for a plain one."""
    is_large = min(size) >= REDUCED
    try:
        grey = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8 if is_large else cv2.IMREAD_GRAYSCALE)
    except cv2.error:  # a picture beyond OpenCV's own limit of pixels
        grey = None
    if grey is None:
        return None
    thumbnail = cv2.resize(grey, (9, 9), interpolation=cv2.INTER_AREA).astype(np.int16)
    if thumbnail.std() < PLAIN:
        return None
    across = thumbnail[:8, :8] > thumbnail[:8, 1:]
    down = thumbnail[:8, :8] > thumbnail[1:, :8]
    return np.packbits(np.stack((across, down)).reshape(2, 64), axis=1).view(np.uint64)[:, 0]  # [2]


def readable(looks: list[Look]) -> Labelled:
    """Give the images that can be read with their good labels, as training would see them."""
    good = [each for each in looks if not each.problem]
    sizes = np.array([each.size for each in good], np.int32).reshape(-1, 2)
    return Labelled([each.path for each in good], sizes, [each.rows for each in good])


def orphans(looks: list[Look]) -> Iterator[str]:
    """Find label files, in the folders where labels are looked for, that have no image beside them or in the lists."""
    known = {label_path(each.path) for each in looks}
    folders: dict[Path, set[Path]] = {}
    for each in looks:
        folders.setdefault(label_path(each.path).parent, set()).add(Path(each.path).parent)
    for folder in sorted(folders):
        stems = {image.stem for beside in folders[folder] for image in _files(beside) if image.suffix != ".txt"}
        for file in sorted(_files(folder)):
            if file.suffix == ".txt" and file not in known and file.stem not in stems and _is_label(file):
                yield str(file)


def _files(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []


def _is_label(file: Path) -> bool:
    """Tell a label file from a list of images or of names that lies beside it."""
    try:
        first = next((line for line in read_lines(file) if line.strip()), "0 0 0 0 0")
    except DataError:
        return False
    return len(first.split()) == 5


def _read_labels(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray, tuple[Mistake, ...]]:
    rows: list[list[float]] = []
    lines: list[int] = []
    mistakes: list[Mistake] = []
    try:
        texts = read_lines(path) if path.is_file() else []
    except DataError as error:
        texts, mistakes = [], [Mistake("line", str(error))]
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        row, problem = check_words(text.split(), classes)
        if problem:
            mistakes.append(Mistake(_sort(text.split(), classes), f"{path}:{number}: {problem}"))
        else:
            rows.append(row)
            lines.append(number)
    return np.array(rows, np.float32).reshape(-1, 5), np.array(lines, int), tuple(mistakes)


def _sort(words: list[str], classes: int) -> str:
    """Tell which sort of mistake a refused line is."""
    try:
        row = np.array(words, float)
    except ValueError:
        return "line"
    if len(row) != 5 or not np.isfinite(row).all():
        return "line"
    if row[0] != int(row[0]) or not 0 <= row[0] < classes:
        return "class"
    return "degenerate" if min(row[3:]) <= 0 else "outside"
