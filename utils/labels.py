"""Lists of images and their labels, checked before anything runs: every bad image and label line in one report.

A label file lies at the image's path with its last `images` (or `JPEGImages`) folder replaced by `labels`, or beside
the image; it holds one `class x y w h` a line, in fractions of the image. What was checked is kept in a cache beside
the list and looked at again only where a file has changed. A file in the folder `ignore` beside `labels` holds what
counts neither way in evaluation, one `class x y w h kind` a line with class -1 for every class (utils/ignored.py).
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import dist
from .lists import ignore_path, label_path, list_images, read_lines
from .log import DataError, log
from .pictures import check_picture

REPORTED = 100  # mistakes told in full
IGNORED_KINDS = ("crowd", "difficult", "region")


@dataclass(frozen=True)
class Labelled:
    """Checked images: paths, sizes [N, 2] (height, width) and labels, each [n, 5] float32 (class, xywh_n).

    `ignored`, empty or one a path, is what evaluation ignores: [n, 6] (class or -1, xywh_n, place in IGNORED_KINDS).
    """

    paths: list[str]
    sizes: np.ndarray
    labels: list[np.ndarray]
    ignored: Sequence[np.ndarray] = ()


def check_labels(source: str | Path, classes: int) -> Labelled:
    """Read the images of `source` and check every one of them and of its labels.

    Raises DataError with all mistakes: images that are missing or broken, label lines with a wrong number of values,
    a class out of range, NaN, a side that is not above 0, a centre outside the image; the same of ignore files.
    """
    paths = list_images(source)
    cache_file = Path(f"{str(source).rstrip('/')}.cache.npz")
    cache = _read_cache(cache_file)
    mistakes: list[str] = []
    stamps, sizes, labels, missing, repeated = [], [], [], 0, 0

    def check(path: str) -> tuple[np.ndarray, tuple[int, int], np.ndarray, list[str]]:
        stamp = np.array([*_stamp(path), *_stamp(label_path(path))], np.int64)
        known = cache.get(path)
        if known and np.array_equal(known[0], stamp) and (not len(known[2]) or known[2][:, 0].max() < classes):
            return stamp, known[1], known[2], []
        size, problem = check_picture(path)
        rows, bad = _check_label_file(label_path(path), classes)
        return stamp, size, rows, [problem, *bad] if problem else bad

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = dist.progress(
            pool.map(check, paths), total=len(paths), desc=f"checking {source}", unit="img", leave=False
        )
        for stamp, size, rows, wrong in checked:
            mistakes += wrong
            missing += int(stamp[2] < 0)
            unique = np.unique(rows, axis=0) if len(rows) else rows
            repeated += len(rows) - len(unique)
            stamps.append(stamp)
            sizes.append(size)
            labels.append(unique)
    ignored = []
    for path in paths:
        rows, wrong = check_ignore_file(path, classes)
        ignored.append(rows)
        mistakes += wrong
    if missing == len(paths):
        mistakes.append(f"{source}: no image has a label file (expected one like {label_path(paths[0])})")
    if mistakes:
        more = [f"… and {len(mistakes) - REPORTED} more mistakes"] if len(mistakes) > REPORTED else []
        raise DataError("\n".join(mistakes[:REPORTED] + more))
    boxes = sum(map(len, labels))
    log.info("%s: %d images, %d boxes, %d images without a label file", source, len(paths), boxes, missing)
    if repeated:
        log.info("%s: %d boxes stand twice in their label file and count once", source, repeated)
    if looked_away := sum(map(len, ignored)):
        log.info("%s: %d regions and objects that evaluation ignores", source, looked_away)
    labelled = Labelled(paths, np.array(sizes, np.int32).reshape(-1, 2), labels, ignored)
    _write_cache(cache_file, labelled, stamps)
    return labelled


def merge_classes(labelled: Labelled) -> Labelled:
    """Take all classes for one, class 0."""
    ignored = [np.hstack((np.minimum(rows[:, :1], 0), rows[:, 1:])) for rows in labelled.ignored]
    return replace(labelled, labels=[rows * np.float32([0, 1, 1, 1, 1]) for rows in labelled.labels], ignored=ignored)


def _check_label_file(path: Path, classes: int) -> tuple[np.ndarray, list[str]]:
    if not path.is_file():
        return np.zeros((0, 5), np.float32), []
    rows, mistakes = [], []
    try:
        lines = read_lines(path)
    except DataError as error:
        return np.zeros((0, 5), np.float32), [str(error)]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, problem = check_words(line.split(), classes)
        if problem:
            mistakes.append(f"{path}:{number}: {problem}")
        else:
            rows.append(row)
    return np.array(rows, np.float32).reshape(-1, 5), mistakes


def check_ignore_file(image: str, classes: int) -> tuple[np.ndarray, list[str]]:
    """Read what evaluation ignores of an image, [n, 6] as in `Labelled`, and what is wrong with the file."""
    path, lines = ignore_path(image), []
    rows, mistakes = [], []
    try:
        lines = read_lines(path) if path and path.is_file() else []
    except DataError as error:
        mistakes.append(str(error))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        *words, kind = line.split()
        row, problem = check_words(words, classes, lowest=-1)
        if kind not in IGNORED_KINDS:
            problem = f"expected class x y w h and one of {', '.join(IGNORED_KINDS)}, gets {line!r}"
        if problem:
            mistakes.append(f"{path}:{number}: {problem}")
        else:
            rows.append([*row, IGNORED_KINDS.index(kind)])
    return np.array(rows, np.float64).reshape(-1, 6), mistakes


def check_words(words: Sequence[str], classes: int, *, lowest: int = 0) -> tuple[list[float], str]:
    """Read `class x y w h`: its numbers, and what is wrong with them."""
    try:
        row = [float(word) for word in words]
    except ValueError:
        return [], f"expected numbers: class x y w h, gets {' '.join(words)!r}"
    if len(row) != 5:
        return [], f"expected 5 numbers: class x y w h, gets {len(row)}"
    if not all(map(math.isfinite, row)):
        return [], f"expected finite numbers, gets {' '.join(words)!r}"
    label, x, y, w, h = row
    if label != int(label) or not lowest <= label < classes:
        return [], f"class {words[0]} is out of range (the names file has {classes}: 0 to {classes - 1})"
    if w <= 0 or h <= 0:
        return [], f"expected a width and height above 0, gets {w:g} and {h:g}"
    if not (0 <= x <= 1 and 0 <= y <= 1 and w <= 1.01 and h <= 1.01):
        return [], f"expected fractions of the image from 0 to 1, gets {' '.join(words[1:])} (pixels?)"
    return row, ""


def _stamp(path: str | Path) -> tuple[int, int]:
    """Give (modification time in ns, size), (-1, -1) for a file that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_mtime_ns, status.st_size


def _read_cache(file: Path) -> dict[str, tuple[np.ndarray, tuple[int, int], np.ndarray]]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as cache:
            ends = np.cumsum(cache["counts"])
            labels = np.split(cache["labels"], ends[:-1])
            sizes = [(int(h), int(w)) for h, w in cache["sizes"]]
            return {
                str(p): (stamp, size, rows)
                for p, stamp, size, rows in zip(cache["paths"], cache["stamps"], sizes, labels, strict=True)
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError):
        return {}  # there is none, or it is broken: everything is checked anew


def _write_cache(file: Path, labelled: Labelled, stamps: list[np.ndarray]) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial.npz")
    try:
        np.savez(
            partial,
            paths=np.array(labelled.paths),
            stamps=np.stack(stamps),
            sizes=labelled.sizes,
            counts=np.array([len(rows) for rows in labelled.labels]),
            labels=np.concatenate(labelled.labels),
        )
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only file system refuses this too
            partial.unlink()
        log.info("%s: no label cache written: %s", file, error.strerror)
