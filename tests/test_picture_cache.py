"""Decoded pictures on disk: read back as they were, made anew when a picture changes, never half written."""

import errno
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.augment import resize_to_fit
from utils.datasets import Key, Pictures
from utils.labels import Labelled
from utils.log import DataError
from utils.picture_cache import fill_cache, read_cached
from utils.pictures import read_picture
from utils.recipe import Recipe

SIZE = (32, 48)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    found = [str(tmp_path / f"{index}.png") for index in range(3)]
    for index, path in enumerate(found):
        cv2.imwrite(path, np.random.default_rng(index).integers(0, 256, (40 + index, 60, 3)).astype(np.uint8))
    return found


def test_files_hold_the_fitted_pictures(paths: list[str], tmp_path: Path) -> None:
    files = fill_cache(tmp_path / "cache", paths, SIZE)
    for path, file in zip(paths, files, strict=True):
        assert np.array_equal(np.load(file), resize_to_fit(read_picture(path), SIZE))
        assert np.array_equal(read_cached(file, "is not read", SIZE), np.load(file))
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(file.name for file in files)


def test_only_what_changed_is_made_anew(paths: list[str], tmp_path: Path) -> None:
    before = fill_cache(tmp_path / "cache", paths, SIZE)
    other = fill_cache(tmp_path / "cache", paths[:1], (16, 16))  # of another size: stays
    stamps = [file.stat().st_mtime_ns for file in before]
    cv2.imwrite(paths[1], np.zeros((30, 60, 3), np.uint8))
    after = fill_cache(tmp_path / "cache", paths, SIZE)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert [after[index].stat().st_mtime_ns for index in (0, 2)] == [stamps[0], stamps[2]]
    assert not before[1].exists()
    assert other[0].exists()
    assert not np.load(after[1]).any()


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"rubbish"])
def test_a_damaged_file_is_passed_over(paths: list[str], tmp_path: Path, damage: bytes) -> None:
    file = fill_cache(tmp_path / "cache", paths, SIZE)[0]
    file.write_bytes(damage)
    assert np.array_equal(read_cached(file, paths[0], SIZE), resize_to_fit(read_picture(paths[0]), SIZE))


def test_a_full_disk_is_one_line_and_leaves_no_part(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stream: object, picture: object, **_: object) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(DataError, match=r"cache: cannot keep pictures: No space left on device \(make room") as error:
        fill_cache(tmp_path / "cache", paths, SIZE)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "cache") == []


def test_samples_are_those_of_the_cache_in_memory(paths: list[str], tmp_path: Path) -> None:
    sizes = np.array([[40, 60], [41, 60], [42, 60]])
    labelled = Labelled(paths, sizes, [np.float32([[0, 0.5, 0.5, 0.5, 0.5]])] * 3)
    in_memory, on_disk = Pictures(labelled, recipe=Recipe()), Pictures(labelled, recipe=Recipe())
    in_memory.cache_in_memory(SIZE)
    on_disk.cache_on_disk(tmp_path / "cache", SIZE)
    for index in range(3):
        first, second = (pictures[Key(index, 1, SIZE, True)] for pictures in (in_memory, on_disk))
        assert (first.picture == second.picture).all()
