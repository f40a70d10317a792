"""Lists, names and labels: what is read, and that every mistake is told, all in one report."""

import errno
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.labels import REPORTED, check_labels, merge_classes
from utils.lists import label_path, list_images, load_data, load_names
from utils.log import DataError

GOOD = "0 .5 .5 .2 .4"


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def draw(path: Path, shape: tuple[int, int] = (40, 60)) -> Path:
    """Write a noisy picture, so that its file is longer than a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8))
    return path


def dataset(folder: Path, labels: dict[str, str | bytes | None]) -> Path:
    """Write images, label files (None: no label file) and the list that names them."""
    for name, text in labels.items():
        draw(folder / "images" / f"{name}.jpg")
        if text is not None:
            write(folder / "labels" / f"{name}.txt", text)
    return write(folder / "list.txt", "".join(f"images/{name}.jpg\n" for name in labels))


def mistakes(source: Path, classes: int = 2) -> list[str]:
    with pytest.raises(DataError) as caught:
        check_labels(source, classes)
    return str(caught.value).splitlines()


def spoil(path: Path) -> None:
    """Turn a file into rubbish in a way that shows only to those who read it."""
    status = path.stat()
    path.write_bytes(b"?" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# .data and names


def test_data_paths_are_relative_to_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sets/one.names", "cat\n\n big dog \n")
    write(tmp_path / "sets/train.txt", "a.jpg")
    file = write(
        tmp_path / "sets/one.data",
        "# comment\nclasses = 2\ntrain=train.txt # here\nvalid = ../there\nnames=one.names\nmax_det=500\nbackup = b/\n",
    )
    monkeypatch.chdir(tmp_path)
    data = load_data(file)
    assert data.names == ("cat", "big dog")
    assert data.train == tmp_path / "sets/train.txt"
    assert data.valid == tmp_path / "sets/../there"
    assert (data.max_det, data.path) == (500, str(file))
    assert load_data("sets/one.data").train == Path("sets/train.txt")


def test_data_without_lists_has_defaults(tmp_path: Path) -> None:
    write(tmp_path / "n", "a")
    data = load_data(write(tmp_path / "d", "names=n"))
    assert (data.train, data.valid, data.max_det, data.names) == (None, None, 100, ("a",))


def test_a_path_that_is_not_beside_the_data_file_counts_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data/n.names", "a")
    monkeypatch.chdir(tmp_path)
    assert load_data(write(tmp_path / "data/d.data", "names=data/n.names")).names == ("a",)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tarin=x.txt", "does not know 'tarin' (expected one of classes, max_det, names, train, valid)"),
        ("just words", "expected key=value, gets 'just words'"),
        ("train=", "expected key=value, gets 'train='"),
        ("classes=two", "'classes' expects a number of at least 1, gets 'two'"),
        ("classes=0", "'classes' expects a number of at least 1, gets '0'"),
        ("max_det=-5", "'max_det' expects a number of at least 1, gets '-5'"),
        ("max_det=²", "'max_det' expects a number of at least 1, gets '²'"),
    ],
)
def test_data_mistakes(tmp_path: Path, line: str, expected: str) -> None:
    write(tmp_path / "n", "a\nb")
    with pytest.raises(DataError) as caught:
        load_data(write(tmp_path / "x.data", f"names=n\n{line}\nunknown=1"))
    first, second = sorted(str(caught.value).splitlines(), key=lambda text: "'unknown'" in text)
    assert expected in first
    assert second.startswith(f"{tmp_path}/x.data:3: does not know 'unknown'")


def test_data_needs_names_that_fit_its_classes(tmp_path: Path) -> None:
    write(tmp_path / "n", "a\nb")
    with pytest.raises(DataError, match="classes=3, but n has 2 names"):
        load_data(write(tmp_path / "x.data", "classes=3\nnames=n"))
    with pytest.raises(DataError, match="has no names="):
        load_data(write(tmp_path / "x.data", "classes=3"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "cannot be read: No such file"), (b"\n \n", "has no class names"), (b"\xff\xfe\x00", "is not a text file")],
)
def test_names_that_cannot_be_read(tmp_path: Path, text: bytes | None, expected: str) -> None:
    if text is not None:
        write(tmp_path / "n", text)
    with pytest.raises(DataError, match=expected):
        load_names(tmp_path / "n")


def test_names_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    assert load_names(write(tmp_path / "n", "\ufeffcat\r\nVögel im Flug\r\n")) == ("cat", "Vögel im Flug")


# Lists of images


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (".", ["a.jpg", "b c.PNG", "deep/er/ü.jpeg"]),
        ("deep", ["deep/er/ü.jpeg"]),
        ("*.jpg", ["a.jpg"]),
        ("*", ["a.jpg", "b c.PNG"]),
        ("list.txt", ["deep/er/ü.jpeg", "gone.jpg", "a.jpg"]),
        ("a.jpg", ["a.jpg"]),
    ],
)
def test_list_images(tmp_path: Path, source: str, expected: list[str]) -> None:
    for name in ("a.jpg", "b c.PNG", "deep/er/ü.jpeg", "deep/notes.md"):
        write(tmp_path / name, "")
    write(tmp_path / "list.txt", "\n  deep/er/ü.jpeg \r\n\n gone.jpg\n" + str(tmp_path / "a.jpg"))
    found = list_images(f"{tmp_path}/{source}".removesuffix("/."))
    assert found == [str(tmp_path / name) for name in expected]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gone", "gone: no such file or folder"),
        ("gone.txt", "gone.txt: no such file or folder"),
        ("*.gif", "names no image"),
        ("blank.txt", "names no image"),
        ("binary.txt", "is not a text file"),
        ("folder", "names no image"),
    ],
)
def test_a_list_without_images(tmp_path: Path, source: str, expected: str) -> None:
    write(tmp_path / "blank.txt", "\n  \n")
    write(tmp_path / "binary.txt", b"\xff\xd8\xff")
    write(tmp_path / "folder/readme.txt", "a.jpg")
    with pytest.raises(DataError, match=expected):
        check_labels(tmp_path / source, 2)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("/d/images/a.jpg", "/d/labels/a.txt"),
        ("d/JPEGImages/sub/a.b.jpeg", "d/labels/sub/a.b.txt"),
        ("/images/d/images/a.jpg", "/images/d/labels/a.txt"),
        ("/JPEGImages/images/a.jpg", "/JPEGImages/labels/a.txt"),
        ("./images/train/a.png", "labels/train/a.txt"),
        ("/d/my_images/images.jpg", "/d/my_images/images.txt"),
        ("a.jpg", "a.txt"),
    ],
)
def test_label_path(image: str, expected: str) -> None:
    assert label_path(image) == Path(expected)


# Checking


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 .5 .5 .2", "expected 5 numbers: class x y w h, gets 4"),
        ("0 .5 .5 .2 .2 .9", "expected 5 numbers: class x y w h, gets 6"),
        ("0 .5 .5 .2 cat", "expected numbers: class x y w h, gets '0 .5 .5 .2 cat'"),
        ("0 .5 .5 nan .2", "expected finite numbers, gets '0 .5 .5 nan .2'"),
        ("0 .5 inf .2 .2", "expected finite numbers"),
        ("nan .5 .5 .2 .2", "expected finite numbers"),
        ("0 .5 .5 .2 1e400", "expected finite numbers"),
        ("2 .5 .5 .2 .2", "class 2 is out of range (the names file has 2: 0 to 1)"),
        ("-1 .5 .5 .2 .2", "class -1 is out of range"),
        ("0.5 .5 .5 .2 .2", "class 0.5 is out of range"),
        ("1e308 .5 .5 .2 .2", "class 1e308 is out of range"),
        ("9" * 40 + " .5 .5 .2 .2", "is out of range"),
        ("0 .5 .5 -.2 .2", "expected a width and height above 0, gets -0.2 and 0.2"),
        ("0 .5 .5 .2 0", "expected a width and height above 0, gets 0.2 and 0"),
        ("0 1.2 .5 .2 .2", "expected fractions of the image from 0 to 1, gets 1.2 .5 .2 .2 (pixels?)"),
        ("0 .5 -.1 .2 .2", "expected fractions"),
        ("1 100 80 30 20", "expected fractions"),
        ("0 .5 .5 1e300 .2", "expected fractions"),
    ],
)
def test_a_bad_label_line(tmp_path: Path, line: str, expected: str) -> None:
    source = dataset(tmp_path, {"a": f"{GOOD}\n\n{line}\n{GOOD}\n", "b": GOOD})
    (told,) = mistakes(source)
    assert told.startswith(f"{tmp_path}/labels/a.txt:3: ")
    assert expected in told


@pytest.mark.parametrize("line", ["1 0 0 1 1", "0 1 1 1.005 1e-6", "1.0 .5 .5 1e-6 1", "\t+1  5e-1 .5\t.2 .2  "])
def test_a_good_label_line(tmp_path: Path, line: str) -> None:
    (rows,) = check_labels(dataset(tmp_path, {"a": line}), 2).labels
    np.testing.assert_array_equal(rows, np.float32([line.split()]))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such image"),
        (b"", "broken image: no image format known here"),
        (b"a text\n" * 99, "broken image: no image format known here"),
        (slice(0, 0.6), "broken image: image file is truncated"),
        (slice(0, 0.1), "broken image"),
        ("folder", "broken image: "),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_bad_image(tmp_path: Path, suffix: str, content: bytes | slice | str | None, expected: str) -> None:
    source = dataset(tmp_path, {"a": GOOD, "b": GOOD})
    bad = draw(tmp_path / f"images/bad{suffix}")
    data = bad.read_bytes()
    bad.unlink()
    if content == "folder":
        bad.mkdir()
    elif content is not None:
        bad.write_bytes(data[: int(content.stop * len(data))] if isinstance(content, slice) else content)
    source.write_text(f"{source.read_text()}images/bad{suffix}")
    (told,) = mistakes(source)
    assert told.startswith(f"{bad}: ")
    assert expected in told


def test_all_mistakes_come_in_one_report(tmp_path: Path) -> None:
    source = dataset(tmp_path, {"a": f"{GOOD}\n9 .5 .5 .2 .2\n0 .5\n", "b": b"\xff\xd8\xff\x00", "c": "x", "d": None})
    write(tmp_path / "images/c.jpg", "no picture")
    write(source, source.read_text() + "images/gone.jpg\n")
    folder = str(tmp_path)
    assert [told.removeprefix(folder) for told in mistakes(source)] == [
        "/labels/a.txt:2: class 9 is out of range (the names file has 2: 0 to 1)",
        "/labels/a.txt:3: expected 5 numbers: class x y w h, gets 2",
        "/labels/b.txt: is not a text file",
        "/images/c.jpg: broken image: no image format known here",
        "/labels/c.txt:1: expected numbers: class x y w h, gets 'x'",
        "/images/gone.jpg: no such image",
    ]


def test_a_long_report_is_cut_and_counted(tmp_path: Path) -> None:
    told = mistakes(dataset(tmp_path, {"a": "7 .5 .5 .2 .2\n" * (REPORTED + 50)}))
    assert len(told) == REPORTED + 1
    assert told[-1] == "… and 50 more mistakes"


def test_no_label_file_at_all(tmp_path: Path) -> None:
    (told,) = mistakes(dataset(tmp_path, {"a": None, "b": None}))
    assert told == f"{tmp_path}/list.txt: no image has a label file (expected one like {tmp_path}/labels/a.txt)"


def test_images_without_boxes(tmp_path: Path) -> None:
    labelled = check_labels(dataset(tmp_path, {"empty": "", "blank": "\n \n", "none": None, "one": GOOD}), 1)
    assert [rows.shape for rows in labelled.labels] == [(0, 5), (0, 5), (0, 5), (1, 5)]
    assert all(rows.dtype == np.float32 for rows in labelled.labels)


def test_boxes_that_stand_twice_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = dataset(tmp_path, {"a": f"1 .1 .2 .1 .1\n{GOOD}\n{GOOD}\n0 .50 .5 .2 .4\n1 .5 .5 .2 .4\n", "b": GOOD})
    with caplog.at_level(logging.INFO, "darkslim"):
        labelled = check_labels(source, 2)
    assert sorted(map(tuple, labelled.labels[0].round(3).tolist())) == [
        pytest.approx(row, abs=1e-3)
        for row in [(0, 0.5, 0.5, 0.2, 0.4), (1, 0.1, 0.2, 0.1, 0.1), (1, 0.5, 0.5, 0.2, 0.4)]
    ]
    assert f"{source}: 2 images, 4 boxes, 0 images without a label file" in caplog.messages
    assert f"{source}: 2 boxes stand twice in their label file and count once" in caplog.messages


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_the_size_is_that_of_the_upright_picture(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = draw(tmp_path / f"a.{suffix}", (40, 60))
    Image.open(path).save(path, exif=exif)
    write(tmp_path / "a.txt", GOOD)
    shape = cv2.imread(str(path)).shape[:2]
    assert shape == ((60, 40) if orientation in (5, 6, 7, 8) else (40, 60))
    assert check_labels(path, 1).sizes.tolist() == [list(shape)]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 4), (8, 8), (3, 2000)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "ppm", "tif"])
def test_images_of_any_shape(tmp_path: Path, suffix: str, shape: tuple[int, int]) -> None:
    path = draw(tmp_path / f"a.{suffix}", shape)
    write(tmp_path / "a.txt", GOOD)
    assert check_labels(path, 1).sizes.tolist() == [list(shape)]


@pytest.mark.parametrize("name", ["with space", "größe/日本 語", "a.b.c", "[x]*?"])
def test_names_with_spaces_and_letters_of_any_kind(tmp_path: Path, name: str) -> None:
    source = dataset(tmp_path / "ein Ordner é", {name: GOOD, "plain": "1 .5 .5 .1 .1"})
    for chosen in (source, source.parent / "images", source):  # the last one from the cache
        labelled = check_labels(chosen, 2)
        found = {Path(path).stem: rows[0, 0] for path, rows in zip(labelled.paths, labelled.labels, strict=True)}
        assert found == {Path(name + ".jpg").stem: 0, "plain": 1}


def test_merge_classes(tmp_path: Path) -> None:
    labelled = check_labels(dataset(tmp_path, {"a": "1 .5 .5 .2 .4", "b": ""}), 2)
    merged = merge_classes(labelled)
    np.testing.assert_array_equal(merged.labels[0], np.float32([[0, 0.5, 0.5, 0.2, 0.4]]))
    assert merged.labels[1].shape == (0, 5)
    assert labelled.labels[0][0, 0] == 1


# The cache


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """Return a checked list whose files are spoilt since: only what the cache holds can be given again."""
    source = dataset(tmp_path, {"a": GOOD, "b": f"{GOOD}\n1 .2 .2 .1 .1", "c": None, "d": ""})
    check_labels(source, 2)
    for path in [*tmp_path.glob("images/*"), *tmp_path.glob("labels/*")]:
        spoil(path)
    return source


def counts(source: Path, classes: int = 2) -> dict[str, int]:
    labelled = check_labels(source, classes)
    return {Path(path).stem: len(rows) for path, rows in zip(labelled.paths, labelled.labels, strict=True)}


def test_the_second_run_reads_no_file_anew(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "darkslim"):
        labelled = check_labels(cached, 2)
    np.testing.assert_array_equal(labelled.labels[1], np.float32([[0, 0.5, 0.5, 0.2, 0.4], [1, 0.2, 0.2, 0.1, 0.1]]))
    assert labelled.labels[1].dtype == np.float32
    assert labelled.sizes.tolist() == [[40, 60]] * 4
    assert [len(rows) for rows in labelled.labels] == [1, 2, 0, 0]
    assert f"{cached}: 4 images, 3 boxes, 1 images without a label file" in caplog.messages
    assert counts(cached, classes=3) == {"a": 1, "b": 2, "c": 0, "d": 0}


def test_a_changed_file_is_read_anew(cached: Path) -> None:
    folder = cached.parent
    draw(folder / "images/a.jpg", (20, 30))
    write(folder / "labels/a.txt", "1 .5 .5 .1 .1\n0 .2 .3 .1 .1\n")
    labelled = check_labels(cached, 2)
    assert labelled.sizes.tolist() == [[20, 30], [40, 60], [40, 60], [40, 60]]
    np.testing.assert_array_equal(labelled.labels[0], np.float32([[0, 0.2, 0.3, 0.1, 0.1], [1, 0.5, 0.5, 0.1, 0.1]]))


def test_files_that_come_and_go(cached: Path) -> None:
    folder = cached.parent
    draw(folder / "images/a.jpg")
    (folder / "labels/a.txt").unlink()
    draw(folder / "images/c.jpg")
    write(folder / "labels/c.txt", f"{GOOD}\n1 .3 .3 .1 .1\n1 .6 .3 .1 .1")
    assert counts(cached) == {"a": 0, "b": 2, "c": 3, "d": 0}
    (folder / "images/d.jpg").unlink()
    assert mistakes(cached) == [f"{folder}/images/d.jpg: no such image"]


def test_a_changed_label_of_the_same_length_is_read_anew(tmp_path: Path) -> None:
    source = dataset(tmp_path, {"a": GOOD})
    check_labels(source, 2)
    label = write(tmp_path / "labels/a.txt", GOOD.replace("0", "1", 1))
    os.utime(label, ns=(0, label.stat().st_mtime_ns + 1))
    assert check_labels(source, 2).labels[0][0, 0] == 1


def test_fewer_classes_are_checked_anew(tmp_path: Path) -> None:
    source = dataset(tmp_path, {"a": GOOD, "b": "1 .5 .5 .1 .1"})
    check_labels(source, 2)
    (told,) = mistakes(source, classes=1)
    assert "labels/b.txt:1: class 1 is out of range (the names file has 1: 0 to 0)" in told


@pytest.mark.parametrize("change", ["empty", "rubbish", "cut", "bit", "encrypted", "version", "not ours"])
def test_a_broken_cache_is_made_anew(tmp_path: Path, change: str) -> None:
    source = dataset(tmp_path, {"a": GOOD, "b": "1 .5 .5 .1 .1"})
    check_labels(source, 2)
    cache = Path(f"{source}.cache.npz")
    data = bytearray(cache.read_bytes())
    entry = data.index(b"PK\x01\x02")  # the first entry of the zip's directory
    match change:
        case "empty":
            data.clear()
        case "rubbish":
            data[:] = b"rubbish\n" * 50
        case "cut":
            del data[len(data) // 2 :]
        case "bit":
            data[data.index(b"NUMPY") + 200] ^= 1
        case "encrypted":
            data[entry + 8] |= 1
        case "version":
            data[entry + 6] = 200
    cache.write_bytes(data)
    if change == "not ours":
        np.savez(cache, other=np.zeros(3))
    assert counts(source) == {"a": 1, "b": 1}
    spoil(tmp_path / "images/a.jpg")
    assert counts(source) == {"a": 1, "b": 1}


def test_a_reordered_list_keeps_its_cache(cached: Path) -> None:
    write(cached, "images/b.jpg\nimages/d.jpg\nimages/a.jpg\nimages/b.jpg\n")
    labelled = check_labels(cached, 2)
    assert [Path(path).stem for path in labelled.paths] == ["b", "d", "a", "b"]
    assert [len(rows) for rows in labelled.labels] == [2, 0, 1, 2]


@pytest.mark.parametrize("obstacle", ["file system", "folder"])
def test_no_cache_where_none_can_be_written(
    tmp_path: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = dataset(tmp_path, {"a": GOOD})
    if obstacle == "folder":
        Path(f"{source}.cache.npz").mkdir()
    else:  # root may write anywhere, so a read-only file system is played

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(np, "savez", refuse)
        monkeypatch.setattr(os, "unlink", refuse)
    before = sorted(tmp_path.iterdir())
    with caplog.at_level(logging.INFO, "darkslim"):
        assert counts(source) == {"a": 1}
    assert any("no label cache written: " in message for message in caplog.messages)
    assert sorted(tmp_path.iterdir()) == before
