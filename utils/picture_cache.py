"""Decoded pictures on disk, for --cache-images disk: one .npy each in a folder beside the list of images.

A file's name holds the picture's path, size and time of change, so a changed picture is decoded again and its old file
removed; files are written whole or not at all.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from . import dist
from .augment import resize_to_fit
from .log import DataError, log
from .pictures import read_picture


def fill_cache(folder: Path, paths: Sequence[str], size: tuple[int, int]) -> list[Path]:
    """Write every picture that is not there yet, fitted to `size` (height, width), and give the files of all.

    Raises DataError where a picture cannot be read or the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = {name: name.rpartition("@")[0] for name in os.listdir(folder)}
        files = [folder / _name(path, size) for path in paths]
        wanted, pictures = {file.name for file in files}, {_place(path, size) for path in paths}
        for name in (name for name, place in there.items() if place in pictures and name not in wanted):
            (folder / name).unlink(missing_ok=True)
        missing = [(path, file) for path, file in zip(paths, files, strict=True) if file.name not in there]
        for path, file in dist.progress(missing, desc=f"caching in {folder}", unit="img", leave=False):
            _write(file, resize_to_fit(read_picture(path), size))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot keep pictures: {error.strerror} (make room, or --cache-images ram)"
        ) from None
    log.info("%s: %d pictures of %d decoded anew", folder, len(missing), len(paths))
    return files


def read_cached(file: Path, path: str, size: tuple[int, int]) -> np.ndarray:
    """Read a file of the cache, or where it is damaged or gone the picture itself."""
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return resize_to_fit(read_picture(path), size)


def _write(file: Path, picture: np.ndarray) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            np.save(stream, picture, allow_pickle=False)
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _place(path: str, size: tuple[int, int]) -> str:
    return (
        f"{hashlib.sha256(os.path.abspath(path).encode(errors='surrogateescape')).hexdigest()[:24]}-{size[0]}x{size[1]}"
    )


def _name(path: str, size: tuple[int, int]) -> str:
    status = os.stat(path)
    return f"{_place(path, size)}@{status.st_mtime_ns:x}-{status.st_size:x}.npy"
