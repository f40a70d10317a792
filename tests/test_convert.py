"""The converter's command line: what it writes, that it goes on after a break, and what it refuses in one line."""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.layouts import bdd_pictures, coco, draw, small_voc, visdrone, voc, voc_xml, write
from utils import convert
from utils.annotations import Choice
from utils.annotations_voc import read_voc
from utils.labels import check_labels
from utils.lists import load_data, load_names

LINE = "0,0,100,50,1,1,0,0\n"


def tree(folder: Path) -> dict[str, str]:
    """Give the contents of all files and the target of all links below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_text("latin-1") for p in paths}


def test_what_is_written(command, tmp_path: Path) -> None:
    source = visdrone(tmp_path / "src", {"train": LINE, "val": LINE + "20,20,40,40,0,0,0,0\n"})
    outcome = command("utils/convert", "visdrone", source, "data/visdrone")
    assert outcome.status == 0, outcome.err
    target = tmp_path / "data/visdrone"
    box = "0 0.250000 0.250000 0.500000 0.500000\n"
    names = (convert.OURS / "visdrone.names").read_text()
    assert tree(target) == {
        "images/train/train_1.jpg": str(source.resolve() / "VisDrone2019-DET-train/images/train_1.jpg"),
        "images/val/val_1.jpg": str(source.resolve() / "VisDrone2019-DET-val/images/val_1.jpg"),
        "labels/train/train_1.txt": box,
        "labels/val/val_1.txt": box,
        "ignore/val/val_1.txt": "-1 0.200000 0.400000 0.200000 0.400000 region\n",
        "train.txt": "images/train/train_1.jpg\n",
        "valid.txt": "images/val/val_1.jpg\n",
        "visdrone.names": names,
        "visdrone.data": "classes=10\ntrain=train.txt\nvalid=valid.txt\nnames=visdrone.names\nmax_det=500\n",
    }
    table = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines()}
    assert (table["images"], table["boxes"], table["ignored"]) == (["1", "1"], ["1", "1"], ["0", "1"])
    assert "python train.py --data data/visdrone/visdrone.data --cfg" in outcome.out
    data = load_data(target / "visdrone.data")
    assert data.max_det == 500
    assert len(check_labels(data.valid, 10).ignored[0]) == 1


def test_our_data_file_fits(command, tmp_path: Path) -> None:
    """Where DST is the folder that data/visdrone.data names, that file is the one to train on."""
    for name in ("visdrone.data", "visdrone.names"):
        write(tmp_path / "data" / name, (convert.OURS / name).read_bytes())
    source = visdrone(tmp_path / "src", {"train": LINE, "val": LINE})
    outcome = command("utils/convert", "visdrone", source)
    assert "python train.py --data data/visdrone.data --cfg" in outcome.out
    assert len(check_labels(load_data("data/visdrone.data").train, 10).paths) == 1


@pytest.mark.parametrize("kind", convert.READERS)
def test_our_data_file_names_the_default_folder(kind: str) -> None:
    data = load_data(convert.OURS / f"{kind}.data")
    assert (data.train, data.valid) == tuple(convert.OURS / kind / f"{part}.txt" for part in ("train", "valid"))
    assert data.names == load_names(convert.OURS / f"{kind}.names")


def test_the_next_commands_are_told(command, tmp_path: Path) -> None:
    small_voc(tmp_path / "src")
    lines = command("utils/convert", "voc", "src", "dst").out.splitlines()
    assert lines[-2:] == [
        "python -m utils.compose --backbone slim-m --head pan-lite --data dst/dst.data -o dst.cfg",
        "python train.py --data dst/dst.data --cfg dst.cfg",
    ]


def test_classes_keep_the_order_of_a_names_file(command, tmp_path: Path) -> None:
    small_voc(tmp_path / "src")
    write(tmp_path / "two.names", "Cat\ndog\n")
    assert command("utils/convert", "voc", "src", "dst", "--names", "two.names").status == 0
    assert (tmp_path / "dst/dst.names").read_text() == "Cat\ndog\n"
    assert [line[0] for line in (tmp_path / "dst/labels/c.txt").read_text().splitlines()] == ["0", "1"]


# Again, and after a break


def test_a_second_run_changes_nothing_that_is_right(command, tmp_path: Path) -> None:
    small_voc(tmp_path / "src")
    command("utils/convert", "voc", "src", "dst")
    before, stamps = tree(tmp_path / "dst"), {p: p.lstat().st_mtime_ns for p in (tmp_path / "dst").rglob("*")}
    (tmp_path / "dst/labels/a.txt").unlink()
    (tmp_path / "dst/images/c.jpg").unlink()
    write(tmp_path / "dst/labels/c.txt", "9 9 9")
    outcome = command("utils/convert", "voc", "src", "dst")
    assert tree(tmp_path / "dst") == before
    kept = tmp_path / "dst/labels/b.txt", tmp_path / "dst/train.txt", tmp_path / "dst/images/a.jpg"
    assert all(path.lstat().st_mtime_ns == stamps[path] for path in kept)
    assert "1 files of an earlier run" in outcome.out


def test_a_killed_run_leaves_no_lists_and_goes_on(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_voc(tmp_path / "src")
    with monkeypatch.context() as patch:
        put, calls = convert._put, []

        def killed(path: Path, make) -> None:
            calls.append(path)
            if len(calls) == 4:
                make(path.with_name(f"{path.name}.partial"))
                raise KeyboardInterrupt
            put(path, make)

        patch.setattr(convert, "_put", killed)
        assert command("utils/convert", "voc", "src", "dst").status == 130
    assert (tmp_path / "dst/labels/b.txt.partial").exists()
    assert not list((tmp_path / "dst").glob("*.*"))
    assert command("utils/convert", "voc", "src", "dst").status == 0
    command("utils/convert", "voc", "src", "whole", "--name", "dst")
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


def test_images_are_copied_where_links_fail(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_voc(tmp_path / "src")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        outcome = command("utils/convert", "voc", "src", "dst")
    assert (outcome.status, "3 images were copied" in outcome.out) == (0, True)
    copy = tmp_path / "dst/images/a.jpg"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (tmp_path / "src/JPEGImages/a.jpg").read_bytes()
    assert command("utils/convert", "voc", "src", "dst").status == 0
    assert not copy.is_symlink()


def test_a_link_to_elsewhere_is_renewed_and_a_picture_of_the_users_stays(command, tmp_path: Path) -> None:
    small_voc(tmp_path / "src")
    (tmp_path / "dst/images").mkdir(parents=True)
    (tmp_path / "dst/images/a.jpg").symlink_to("/nowhere.jpg")
    assert command("utils/convert", "voc", "src", "dst").status == 0
    assert (tmp_path / "dst/images/a.jpg").resolve() == (tmp_path / "src/JPEGImages/a.jpg").resolve()
    (tmp_path / "dst/images/a.jpg").unlink()
    write(tmp_path / "dst/images/a.jpg", "mine")
    outcome = command("utils/convert", "voc", "src", "dst")
    assert (outcome.status, "is another picture than" in outcome.err) == (2, True)
    assert (tmp_path / "dst/images/a.jpg").read_text() == "mine"


def test_an_ignore_file_goes_when_nothing_is_ignored_any_more(command, tmp_path: Path) -> None:
    source = visdrone(tmp_path / "src", {"train": "20,20,40,40,0,0,0,0\n", "val": LINE})
    command("utils/convert", "visdrone", source, "dst")
    assert (tmp_path / "dst/ignore/train/train_1.txt").exists()
    write(source / "VisDrone2019-DET-train/annotations/train_1.txt", LINE)
    command("utils/convert", "visdrone", source, "dst")
    assert not (tmp_path / "dst/ignore/train/train_1.txt").exists()


# Refused: one line a mistake, exit status 2, no lists

BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


def bad_voc(root: Path, xml: str | bytes) -> Path:
    small_voc(root)
    write(root / "Annotations/a.xml", xml)
    return root


VOC_MISTAKES = {
    "is no XML": "<annotation><object>",
    "has a <!DOCTYPE": voc_xml([("dog", 1, 1, 9, 9)], extra=BOMB),
    "is no XML: ": b"\xff\xfe\x00",
    "has no <name>": voc_xml([("", 1, 1, 9, 9)]),
    "expected 4 numbers": voc_xml([("dog", 1, 1, "x", 9)]),
    "expected 4 numbers, gets ['1', '1', 'nan', '9']": voc_xml([("dog", 1, 1, "nan", 9)]),
    "has no <bndbox>": voc_xml([("dog", 1, 1, 9, 9)]).replace("bndbox", "robndbox"),
    "says 300x100, but": voc_xml([("dog", 1, 1, 9, 9)], (100, 300)),
    "'unicorn' is no class": voc_xml([("unicorn", 1, 1, 9, 9)]),
}


@pytest.mark.parametrize("message", VOC_MISTAKES)
def test_bad_annotations(command, tmp_path: Path, message: str) -> None:
    bad_voc(tmp_path / "src", VOC_MISTAKES[message])
    write(tmp_path / "two.names", "cat\ndog\n")
    outcome = command("utils/convert", "voc", "src", "dst", "--names", "two.names")
    lines = [line for line in outcome.err.splitlines() if "a.xml" in line]
    assert (outcome.status, len(lines)) == (2, 1), outcome.err
    assert message in lines[0]
    assert "Traceback" not in outcome.err
    assert not list((tmp_path / "dst").glob("*.*"))


def test_a_doctype_is_seen_in_utf_16(command, tmp_path: Path) -> None:
    xml = f'<?xml version="1.0" encoding="utf-16"?>{BOMB}<annotation/>'.encode("utf-16")
    bad_voc(tmp_path / "src", xml)
    assert "has a <!DOCTYPE" in command("utils/convert", "voc", "src", "dst").err


def test_all_mistakes_come_together(command, tmp_path: Path) -> None:
    things = {f"p{index:02}": [("dog", 1, 1, "x", 9)] for index in range(30)}
    voc(tmp_path / "src", things, {"train": sorted(things), "val": []})
    write(tmp_path / "src/ImageSets/Main/val.txt", "p00\n")
    write(tmp_path / "one.names", "dog\n")
    outcome = command("utils/convert", "voc", "src", "dst", "--names", "one.names")
    assert outcome.err.count("expected 4 numbers") == 20
    assert "… and 10 more mistakes" in outcome.err


def test_an_absent_picture_and_a_broken_one(command, tmp_path: Path) -> None:
    small_voc(tmp_path / "src")
    (tmp_path / "src/JPEGImages/a.jpg").unlink()
    outcome = command("utils/convert", "voc", "src", "dst")
    assert (outcome.status, "a.xml: there is no picture a (expected a.jpg)" in outcome.err) == (2, True)
    write(tmp_path / "src/JPEGImages/a.jpg", "no picture")
    assert "broken image" in command("utils/convert", "voc", "src", "dst").err


def test_two_pictures_under_one_label_file(command, tmp_path: Path) -> None:
    small_voc(tmp_path / "src")
    draw(tmp_path / "src/JPEGImages/a.png", (100, 200))
    outcome = command("utils/convert", "voc", "src", "dst")
    assert (outcome.status, "would share a label file" in outcome.err) == (2, True)


@pytest.mark.parametrize("kind", convert.READERS)
def test_a_wrong_folder_says_what_was_expected(command, tmp_path: Path, kind: str) -> None:
    (tmp_path / "src").mkdir()
    outcome = command("utils/convert", kind, "src", "dst")
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert "src" in outcome.err
    assert "expected" in outcome.err
    assert not (tmp_path / "dst").exists()
    assert "no such folder" in command("utils/convert", kind, "absent", "dst").err


@pytest.mark.parametrize("target", ["src", "src/converted"])
def test_a_target_inside_the_source(command, tmp_path: Path, target: str) -> None:
    small_voc(tmp_path / "src")
    before = tree(tmp_path / "src")
    outcome = command("utils/convert", "voc", "src", target)
    assert (outcome.status, "stays as it is" in outcome.err) == (2, True)
    assert tree(tmp_path / "src") == before


def test_a_target_that_cannot_be_written(command, tmp_path: Path) -> None:
    small_voc(tmp_path / "src")
    write(tmp_path / "file", "")
    outcome = command("utils/convert", "voc", "src", "file/dst")
    assert (outcome.status, "file/dst: cannot be written: Not a directory" in outcome.err) == (2, True)


@pytest.mark.parametrize("which", [1, 2, 5])
def test_a_full_disk(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    small_voc(tmp_path / "src")
    writes = []

    def fill(path: Path, text: str, **_: object) -> None:
        writes.append(path)
        if len(writes) < which:
            path.write_bytes(text.encode())
        else:
            path.write_bytes(text.encode()[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill)
        outcome = command("utils/convert", "voc", "src", "dst")
    assert outcome.status == 2
    (line,) = [line for line in outcome.err.splitlines() if "cannot be written" in line]
    assert "No space left on device (run again to go on from here)" in line
    assert not list((tmp_path / "dst").rglob("*.partial"))
    assert not (tmp_path / "dst/dst.data").exists()
    assert command("utils/convert", "voc", "src", "dst").status == 0


IMAGE = {"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}
CATEGORY = {"id": 1, "name": "dog"}
OBJECT = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 1, 9, 9]}
COCO_MISTAKES = {
    "is no COCO detection file (expected a list 'annotations' with image_id, category_id, bbox": {
        "annotations": [{"id": 1, "image_id": 7, "caption": "a dog"}]
    },
    "is no COCO detection file (expected a list 'images'": {"images": [{"id": 7}]},
    "there is no category 2": {"annotations": [OBJECT | {"category_id": 2}]},
    "an annotation names one that is not there": {"annotations": [OBJECT | {"image_id": 8}]},
    "annotation 1: 'bbox': expected 4 numbers, gets [1, 1, 9]": {"annotations": [OBJECT | {"bbox": [1, 1, 9]}]},
    "expected 4 numbers, gets 'abcd'": {"annotations": [OBJECT | {"bbox": "abcd"}]},
    "in every row": {"annotations": [OBJECT | {"image_id": [7]}]},
    "has a category without a name": {"categories": [CATEGORY | {"name": " "}]},
    "says 100x200, but": {"images": [IMAGE | {"width": 100, "height": 200}]},
    "names no image": {"images": []},
}


@pytest.mark.parametrize("message", COCO_MISTAKES)
def test_bad_coco(command, tmp_path: Path, message: str) -> None:
    coco(tmp_path / "src", images=[IMAGE], annotations=[OBJECT], categories=[CATEGORY])
    for file in (tmp_path / "src/annotations").iterdir():
        file.write_text(json.dumps(json.loads(file.read_text()) | COCO_MISTAKES[message]))
    outcome = command("utils/convert", "coco", "src", "dst")
    lines = [line for line in outcome.err.splitlines() if "instances_" in line]
    assert (outcome.status, len(lines)) == (2, 1), outcome.err
    assert message in lines[0]
    assert not list((tmp_path / "dst").glob("*.*"))


def test_own_classes_win_over_other_spellings(command, tmp_path: Path) -> None:
    categories = [{"id": 3, "name": "tvmonitor"}, {"id": 5, "name": "tv"}]
    annotations = [OBJECT | {"category_id": 5}, OBJECT | {"category_id": 3}]
    coco(tmp_path / "src", images=[IMAGE], annotations=annotations, categories=categories)
    assert command("utils/convert", "coco", "src", "dst").status == 0
    assert [line[0] for line in (tmp_path / "dst/labels/val2017/7.txt").read_text().splitlines()] == ["1", "0"]


def test_classes_that_differ_in_case_only(command, tmp_path: Path) -> None:
    coco(tmp_path / "src", images=[IMAGE], annotations=[], categories=[CATEGORY, {"id": 2, "name": "Dog"}])
    outcome = command("utils/convert", "coco", "src", "dst")
    assert (outcome.status, "two differ in case only" in outcome.err) == (2, True)


def test_a_name_that_no_list_can_hold(command, tmp_path: Path) -> None:
    coco(tmp_path / "src", images=[IMAGE | {"file_name": "a\nb.jpg"}], annotations=[], categories=[CATEGORY])
    outcome = command("utils/convert", "coco", "src", "dst")
    assert (outcome.status, "cannot stand in a list" in outcome.err) == (2, True)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_a_file_name_that_leads_out(command, tmp_path: Path, name: str) -> None:
    coco(tmp_path / "src", images=[IMAGE], annotations=[], categories=[CATEGORY])
    for file in (tmp_path / "src/annotations").iterdir():
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | {"images": [*data["images"], IMAGE | {"id": 8, "file_name": name}]}))
    outcome = command("utils/convert", "coco", "src", "dst")
    assert (outcome.status, "leads out of the dataset" in outcome.err) == (2, True)


@pytest.mark.parametrize("text", ['{"images": [', "", "\x00", "[" * 100_000], ids=["cut", "empty", "rubbish", "deep"])
def test_json_cut_short(command, tmp_path: Path, text: str) -> None:
    coco(tmp_path / "src", images=[IMAGE], annotations=[], categories=[CATEGORY])
    write(tmp_path / "src/annotations/instances_val2017.json", text)
    outcome = command("utils/convert", "coco", "src", "dst")
    (line,) = outcome.err.splitlines()
    assert (outcome.status, "is no JSON" in line, "instances_val2017.json" in line) == (2, True, True)


BDD_MISTAKES = {
    "is no BDD100K detection file": {"images": []},
    "is no BDD100K detection file (expected a list": [],
    "there is no picture elsewhere": [{"name": "elsewhere.jpg", "labels": []}],
    "label 1: has no category": [{"name": "a.jpg", "labels": [{"box2d": {}}]}],
    "'labels' is no list": [{"name": "a.jpg", "labels": {"x": 1}}],
    "'box2d': expected 4 numbers": [{"name": "a.jpg", "labels": [{"category": "car", "box2d": {"x1": 1}}]}],
    "'box2d' is not x1": [{"name": "a.jpg", "labels": [{"category": "car", "box2d": [1, 2, 3, 4]}]}],
    "'tram' is no class": [
        {"name": "a.jpg", "labels": [{"category": "tram", "box2d": {"x1": 1, "y1": 1, "x2": 9, "y2": 9}}]}
    ],
}


@pytest.mark.parametrize("message", BDD_MISTAKES)
def test_bad_bdd100k(command, tmp_path: Path, message: str) -> None:
    bdd_pictures(tmp_path / "src", {"train": "a", "val": "a"})
    write(tmp_path / "src/labels/det_20/det_train.json", json.dumps(BDD_MISTAKES[message]))
    write(tmp_path / "src/labels/det_20/det_val.json", json.dumps([{"name": "a.jpg"}]))
    outcome = command("utils/convert", "bdd100k", "src", "dst")
    assert (outcome.status, message in outcome.err, "Traceback" in outcome.err) == (2, True, False), outcome.err


VISDRONE_MISTAKES = {
    "train_1.txt:2: expected 8 numbers": LINE + "1,2,3\n",
    "train_1.txt:1: expected 8 numbers": "0 0.5 0.5 0.1 0.1\n",
    "train_1.txt:1: expected a score 0 or 1": "0,0,100,50,0.9,1,0,0\n",
    "category 0 to 11, gets '0,0,100,50,1,12,0,0'": "0,0,100,50,1,12,0,0\n",
}


@pytest.mark.parametrize("message", VISDRONE_MISTAKES)
def test_bad_visdrone(command, tmp_path: Path, message: str) -> None:
    source = visdrone(tmp_path / "src", {"train": VISDRONE_MISTAKES[message], "val": LINE})
    outcome = command("utils/convert", "visdrone", source, "dst")
    assert (outcome.status, message in outcome.err) == (2, True), outcome.err


def test_a_picture_without_an_annotation(command, tmp_path: Path) -> None:
    source = visdrone(tmp_path / "src", {"train": LINE, "val": LINE})
    draw(source / "VisDrone2019-DET-train/images/more.jpg", (10, 10))
    outcome = command("utils/convert", "visdrone", source, "dst")
    assert (outcome.status, "there is no more.txt" in outcome.err) == (2, True)


def test_no_picture_is_decoded(tmp_path: Path) -> None:
    """A picture cut off behind its header converts: 118,000 of them would take hours to decode."""
    small_voc(tmp_path / "src")
    picture = tmp_path / "src/JPEGImages/a.jpg"
    picture.write_bytes(picture.read_bytes()[:60])
    _, writer = convert.convert(read_voc(tmp_path / "src", Choice()), tmp_path / "dst", name="x", names=("cat", "dog"))
    assert writer.counts["train"]["images"] == 2
