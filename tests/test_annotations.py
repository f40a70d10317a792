"""The published formats: boxes computed by hand, and real files of each that nobody here wrote."""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.layouts import bdd_pictures, coco, draw, small_voc, visdrone, voc, voc_xml, write
from utils.annotations import DIFFICULT, OBJECT, Box, Choice, Record, Source
from utils.annotations_bdd100k import read_bdd100k
from utils.annotations_coco import read_coco
from utils.annotations_hand import read_hand
from utils.annotations_voc import read_dior, read_voc
from utils.convert import READERS, Writer, convert
from utils.labels import check_labels
from utils.lists import load_data, load_names
from utils.log import DataError
from utils.pictures import read_picture

ROOT = Path(__file__).resolve().parent.parent
ALL = Choice()


def records(source: Source, part: str) -> list[Record]:
    (found,) = [each for each in source.parts if each.name == part]
    return [found.read(item) for item in found.items]


def labels(folder: Path, name: str) -> list[list[float]]:
    return [list(map(float, line.split())) for line in (folder / f"labels/{name}.txt").read_text().splitlines()]


def converted(source: Source, target: Path, kind: str) -> Writer:
    _, writer = convert(source, target, name=kind, names=load_names(ROOT / f"data/{kind}.names"))
    return writer


# Pascal VOC


def test_voc_counts_pixels_from_1_and_holds_the_last(tmp_path: Path) -> None:
    source = read_voc(small_voc(tmp_path / "src"), ALL)
    assert source.names == ("dog", "cat")  # the most frequent first
    convert(source, tmp_path / "dst", name="x", names=source.names)
    assert labels(tmp_path / "dst", "a") == [[0, 0.25, 0.25, 0.5, 0.5]]  # 1 to 100 is the left half of 200
    assert labels(tmp_path / "dst", "b") == []
    assert labels(tmp_path / "dst", "c") == [[1, 0.5, 0.5, 0.5, 0.5], [0, 0.05, 0.1, 0.1, 0.2]]


def test_voc_years_join_as_published_results_do(tmp_path: Path) -> None:
    dog = [("dog", 1, 1, 100, 50)]
    voc(tmp_path / "VOCdevkit/VOC2007", {"1": dog, "2": dog, "3": dog}, {"train": "1", "trainval": "12", "test": "3"})
    voc(tmp_path / "VOCdevkit/VOC2012", {"2008_1": dog}, {"trainval": ["2008_1"], "train": []})
    source = read_voc(tmp_path, ALL)
    assert [record.name for record in records(source, "train")] == [
        "VOC2007/1.jpg",
        "VOC2007/2.jpg",
        "VOC2012/2008_1.jpg",
    ]
    assert [record.name for record in records(source, "valid")] == ["VOC2007/3.jpg"]
    assert source.names == ()  # the 20 classes of data/voc.names


def test_voc_without_a_test_list_keeps_val_apart(tmp_path: Path) -> None:
    dog = [("dog", 1, 1, 100, 50)]
    lists = {"train": "1", "val": "2", "trainval": "12"}
    source = read_voc(voc(tmp_path, {"1": dog, "2": dog}, lists), ALL)
    assert [len(part.items) for part in source.parts] == [1, 1]


def test_voc_difficult_objects_are_ignored_and_empty_ones_dropped(tmp_path: Path) -> None:
    things = [("dog", 1, 1, 100, 50), ("dog", 101, 1, 200, 50, 1), ("dog", 30, 30, 30, 60), ("dog", 0, 0, 0, 0)]
    source = read_voc(voc(tmp_path / "src", {"a": things}, {"train": "a", "val": "a"}), ALL)
    (record,) = records(source, "train")
    assert [box.kind for box in record.boxes] == [OBJECT, DIFFICULT]
    assert len(record.dropped) == 2
    convert(source, tmp_path / "dst", name="x", names=("dog",))
    assert (tmp_path / "dst/ignore/a.txt").read_text() == "0 0.750000 0.250000 0.500000 0.500000 difficult\n"
    assert labels(tmp_path / "dst", "a") == [[0, 0.25, 0.25, 0.5, 0.5]]


def test_voc_parts_of_a_person_are_no_objects(tmp_path: Path) -> None:
    xml = voc_xml([("person", 11, 11, 60, 60)]).replace(
        "</bndbox></object>",
        "</bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part></object>",
    )
    voc(tmp_path, {"a": []}, {"train": "a", "val": "a"})
    write(tmp_path / "Annotations/a.xml", xml)
    (record,) = records(read_voc(tmp_path, ALL), "train")
    assert record.boxes == [Box("person", (10, 10, 60, 60))]


def test_bccd_is_what_it_was(shared_data: Path, tmp_path: Path) -> None:
    """4,888 objects, of which 2 have no area; the labels are those that the published benchmarks were trained on."""
    source = read_voc(shared_data / "datasets/bccd/BCCD", ALL)
    assert source.names == ("RBC", "WBC", "Platelets")
    _, writer = convert(source, tmp_path, name="bccd", names=source.names)
    train, valid = writer.counts["train"], writer.counts["valid"]
    assert (train["images"], valid["images"]) == (292, 72)
    assert train["boxes"] + valid["boxes"] == 4886
    assert train["dropped: without an area"] == 2
    digest = hashlib.sha256()
    for file in sorted((tmp_path / "labels").glob("*.txt")):
        digest.update(file.name.encode() + file.read_bytes())
    assert digest.hexdigest() == "bf29449231c6042606dc395303cf269852698a65e223fb6c1c3fb056d9532421"
    data = load_data(tmp_path / "bccd.data")
    assert sum(map(len, check_labels(data.train, 3).labels)) == train["boxes"]


def test_raccoon_takes_its_lists_from_csv(shared_data: Path, tmp_path: Path) -> None:
    choice = Choice("data/train_labels.csv", "data/test_labels.csv")
    source = read_voc(shared_data / "datasets/raccoon", choice)
    found = {part.name: [part.read(item) for item in part.items] for part in source.parts}
    assert sum(len(record.boxes) for part in found.values() for record in part) == 217
    assert len(found["train"]) + len(found["valid"]) == 200
    with pytest.raises(DataError, match="has no list train"):
        read_voc(shared_data / "datasets/raccoon", ALL)


# DIOR


def dior(root: Path, xmls: dict[str, str | bytes]) -> Path:
    for stem, xml in xmls.items():
        write(root / f"Annotations/Horizontal Bounding Boxes/{stem}.xml", xml)
        draw(root / f"JPEGImages-{'trainval' if int(stem) <= 11725 else 'test'}/{stem}.jpg", (800, 800))
    for name, low, high in (("train", 1, 5862), ("val", 5863, 11725), ("test", 11726, 23463)):
        stems = sorted(stem for stem in xmls if low <= int(stem) <= high)
        write(root / f"ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in stems))
    return root


def test_dior_names_are_found_in_any_case(tmp_path: Path) -> None:
    xml = voc_xml([("expressway-service-area", 1, 1, 400, 802), ("windmill", 0, 1, 80, 80)], (800, 800))
    source = read_dior(dior(tmp_path / "src", {"00001": xml, "06000": xml, "20000": xml}), ALL)
    writer = converted(source, tmp_path / "dst", "dior")
    assert {part: count["images"] for part, count in writer.counts.items()} == {"train": 2, "valid": 1}
    assert labels(tmp_path / "dst", "20000") == [[7, 0.25, 0.5, 0.5, 1], [19, 0.05, 0.05, 0.1, 0.1]]


def test_real_dior_annotations(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "datasets/dior/DIOR/Annotations").glob("*.xml"))
    source = dior(tmp_path / "src", {file.stem: file.read_bytes() for file in files})
    writer = converted(read_dior(source, ALL), tmp_path / "dst", "dior")
    objects = sum(file.read_text().count("<object>") for file in files)
    dropped = sum(count["dropped: without an area"] for count in writer.counts.values())
    boxes = sum(count["boxes"] for count in writer.counts.values())
    assert boxes + dropped == objects
    assert 1 <= dropped <= 6  # of the six degenerate boxes of the whole dataset
    names = Counter(name for file in files for name in re.findall(r"<name>(.*)</name>", file.read_text()))
    assert len(names) == 20


# VisDrone


def test_visdrone_by_hand(tmp_path: Path) -> None:
    """Scores, categories, a trailing comma, a blank line, and a box that reaches past the picture."""
    lines = (
        "0,0,100,50,1,1,0,0\n150,50,100,25,1,10,1,2,\n\n20,20,40,40,0,0,0,0\n10,10,20,20,0,4,0,0\n"
        "10,10,20,20,1,11,0,0\n10,10,20,20,0,11,0,0\n10,10,0,20,1,4,0,0\n"
    )
    source = READERS["visdrone"](visdrone(tmp_path / "src", {"train": lines, "val": ""}), ALL)
    writer = converted(source, tmp_path / "dst", "visdrone")
    assert labels(tmp_path / "dst", "train/train_1") == [[0, 0.25, 0.25, 0.5, 0.5], [9, 0.875, 0.625, 0.25, 0.25]]
    assert (tmp_path / "dst/ignore/train/train_1.txt").read_text() == (
        "-1 0.200000 0.400000 0.200000 0.400000 region\n3 0.100000 0.200000 0.100000 0.200000 crowd\n"
    )
    assert labels(tmp_path / "dst", "val/val_1") == []
    count = writer.counts["train"]
    assert (count["dropped: category 'others'"], count["dropped: without an area in the picture"]) == (2, 1)


def test_visdrone_equals_an_independent_converter(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "datasets/visdrone"
    source = READERS["visdrone"](root, Choice(train="val"))
    converted(source, tmp_path, "visdrone")
    (reference,) = root.glob("VisDrone2019-DET-val/labels_ultralytics/0000001_02999_d_0000005.txt")
    ours = (tmp_path / f"labels/val/{reference.name}").read_text().split()
    assert len(ours) == 5 * 127
    assert ours == reference.read_text().split()


# BDD100K

CAR = {"category": "car", "box2d": {"x1": 128, "y1": 72, "x2": 384, "y2": 216}}
BOX = [0.2, 0.2, 0.2, 0.2]


def bdd(root: Path, generation: str, labels: list[dict[str, Any]]) -> Path:
    bdd_pictures(root, {"train": ["0a-1", "0b-2"], "val": ["0c-3"]})
    frames = {"train": [{"name": "0a-1.jpg", "labels": labels}, {"name": "0b-2.jpg"}], "val": [{"name": "0c-3.jpg"}]}
    for split, found in frames.items():
        if generation == "2018":
            write(root / f"labels/bdd100k_labels_images_{split}.json", json.dumps(found))
        elif generation == "2020":
            write(root / f"labels/det_20/det_{split}.json", json.dumps({"frames": found}))
        else:
            for frame in found:
                data = {"name": frame["name"][:-4], "frames": [{"objects": frame.get("labels", [])}]}
                write(root / f"labels/100k/{split}/{data['name']}.json", json.dumps(data))
    return root


@pytest.mark.parametrize("generation", ["2018", "2020", "single"])
def test_bdd100k_in_three_generations(tmp_path: Path, generation: str) -> None:
    words = ["bike", "motor", "person", "van", "traffic sign"]
    if generation == "2020":
        words = ["bicycle", "motorcycle", "pedestrian", "car", "traffic sign"]
    things = [CAR | {"category": word} for word in words]
    things += [CAR | {"attributes": {"crowd": True}}, CAR | {"category": "trailer"}, CAR | {"category": "other person"}]
    things += [{"category": "lane", "poly2d": [[0, 0]]}, {"category": "drivable area", "box2d": None}]
    writer = converted(read_bdd100k(bdd(tmp_path / "src", generation, things), ALL), tmp_path / "dst", "bdd100k")
    assert labels(tmp_path / "dst", "train/0a-1") == [[label, *BOX] for label in (7, 6, 0, 2, 9)]
    ignored = (tmp_path / "dst/ignore/train/0a-1.txt").read_text().splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in ignored] == [(label, "crowd") for label in "230"]
    assert labels(tmp_path / "dst", "train/0b-2") == []
    assert writer.counts["train"]["dropped: lanes and drivable areas"] == 2
    assert [writer.counts[part]["images"] for part in ("train", "valid")] == [2, 1]


@pytest.mark.parametrize(
    ("file", "frames", "boxes", "crowds"),
    [("history_a1aa08e/unitest_val_bdd.json", 1, 34, 0), ("history_ca5618b/track_sample_anns.json", 202, 3109, 132)],
)
def test_real_bdd100k_annotations(
    shared_data: Path, tmp_path: Path, file: str, frames: int, boxes: int, crowds: int
) -> None:
    data = (shared_data / "datasets/bdd100k" / file).read_bytes()
    stems = [Path(frame["name"]).stem for frame in json.loads(data)]
    bdd_pictures(tmp_path / "src", {"val": stems})
    write(tmp_path / "src/labels/det_20/det_val.json", data)
    writer = converted(read_bdd100k(tmp_path / "src", Choice(train="val")), tmp_path / "dst", "bdd100k")
    count = writer.counts["valid"]
    outside = count["dropped: without an area in the picture"]
    assert (count["images"], count["boxes"] + count["ignored"] + outside) == (frames, boxes + crowds)
    assert crowds - outside <= count["ignored"] <= crowds


# COCO


def coco_labels(tmp_path: Path, **parts: Any) -> Path:
    image = {"id": 7, "file_name": "000000000007.jpg", "width": 200, "height": 100}
    parts = {"images": [image], "annotations": [], "categories": []} | parts
    return coco(tmp_path / "src", **parts)


def test_coco_ids_have_gaps_and_crowds_are_ignored(tmp_path: Path) -> None:
    names = list(load_names(ROOT / "data/coco.names"))
    spelled = {"aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "motorbike": "motorcycle"}
    spelled |= {"pottedplant": "potted plant", "diningtable": "dining table"}
    categories = [{"id": 1 + index + index // 9, "name": spelled.get(name, name)} for index, name in enumerate(names)]
    ids = {category["name"]: category["id"] for category in categories}
    annotations = [
        {"id": 1, "image_id": 7, "category_id": ids["tv"], "bbox": [50, 25, 100, 50], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": ids["toothbrush"], "bbox": [0, 0, 20.5, 10], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": ids["person"], "bbox": [0, 50, 200, 50], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": ids["dog"], "bbox": [10, 10, 0, 5], "iscrowd": 0},
    ]
    source = read_coco(coco_labels(tmp_path, categories=categories, annotations=annotations), ALL)
    writer = converted(source, tmp_path / "dst", "coco")
    assert labels(tmp_path / "dst", "val2017/000000000007") == [
        [names.index("tvmonitor"), 0.5, 0.5, 0.5, 0.5],
        [79, 0.05125, 0.05, 0.1025, 0.1],
    ]
    assert (
        tmp_path / "dst/ignore/train2017/000000000007.txt"
    ).read_text() == "0 0.500000 0.750000 1.000000 0.500000 crowd\n"
    assert writer.counts["valid"]["dropped: without an area in the picture"] == 1


def test_coco_of_other_people_starts_at_0_and_keeps_its_classes(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "datasets/sahi/tests/data/coco_utils/visdrone2019-det-train-first50image.json"
    data = json.loads(file.read_text())
    for image in data["images"]:
        draw(tmp_path / "src" / image["file_name"], (image["height"], image["width"]))
    write(tmp_path / "src/all.json", file.read_bytes())
    source = read_coco(tmp_path / "src", Choice("all.json", "all.json"))
    assert source.names == ("human", "vehicle")
    _, writer = convert(source, tmp_path / "dst", name="x", names=source.names)
    assert (writer.counts["train"]["images"], writer.counts["train"]["boxes"]) == (50, 3326)
    checked = check_labels(tmp_path / "dst/train.txt", 2)
    by_class = Counter(int(label) for rows in checked.labels for label in rows[:, 0])
    assert set(by_class) == {0, 1}
    assert not (tmp_path / "dst/images/labels").exists()  # file_name says images/…, which names label folders


# JSON of any kind

JUNK = [None, [], {}, "", 0, -1, 1e308, "x", [1], True, {"a": 1}, float("nan"), "9" * 99]
COCO_JSON = {
    "images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}],
    "categories": [{"id": 1, "name": "car"}],
}


def spoiled(value: Any, generator: np.random.Generator) -> Any:
    """Replace or remove one thing somewhere in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or generator.random() < 0.1:
        return JUNK[generator.integers(len(JUNK))]
    key = keys[generator.integers(len(keys))]
    copy = value.copy()
    if generator.random() < 0.1:
        del copy[key]
    else:
        copy[key] = spoiled(value[key], generator)
    return copy


@pytest.mark.parametrize("kind", ["coco", "2018", "single"])
def test_spoiled_json_is_converted_or_refused(tmp_path: Path, kind: str) -> None:
    if kind == "coco":
        file = coco(tmp_path / "src", **COCO_JSON) / "annotations/instances_val2017.json"
        reader = read_coco
    else:
        bdd(tmp_path / "src", kind, [CAR | {"attributes": {"crowd": False}}])
        place = "bdd100k_labels_images_train.json" if kind == "2018" else "100k/train/0a-1.json"
        file, reader = tmp_path / "src/labels" / place, read_bdd100k
    sound, generator, refused = json.loads(file.read_text()), np.random.default_rng(0), 0
    for _ in range(150):
        file.write_text(json.dumps(spoiled(sound, generator)))
        try:
            convert(reader(tmp_path / "src", ALL), tmp_path / "dst", name="x", names=("car", "dog"))
        except DataError:
            refused += 1
    assert 30 < refused < 150


# Oxford Hand


@pytest.fixture
def savemat() -> Callable[..., None]:
    return pytest.importorskip("scipy.io").savemat


def hand_boxes(*boxes: list[tuple[float, float]]) -> dict[str, np.ndarray]:
    cells = np.empty((1, len(boxes)), object)
    for place, corners in enumerate(boxes):
        struct = np.empty((1, 1), [(name, object) for name in "abcd"])
        for name, corner in zip("abcd", corners, strict=True):
            struct[name][0, 0] = np.array([corner], float)
        cells[0, place] = struct
    return {"boxes": cells}


def test_hands_are_y_x_corners_of_a_turned_box(tmp_path: Path, savemat: Callable[..., None]) -> None:
    """Corners (row, column) from 1: rows 10.5 to 60.5 and columns 20.5 to 120.5 are 10 … 60 and 20 … 120 from 0."""
    turned = [(10.5, 70.5), (35.5, 120.5), (60.5, 70.5), (35.5, 20.5)]
    past = [(-10.0, -20.0), (-10.0, 40.5), (50.5, 40.5), (50.5, -20.0)]
    for split in ("training", "validation", "test"):
        folder = tmp_path / f"src/hand_dataset/{split}_dataset/{split}_data"
        draw(folder / "images/Buffy_1.jpg", (100, 200))
        (folder / "annotations").mkdir()
        boxes = {"training": [turned, past], "validation": [turned], "test": []}[split]
        savemat(folder / "annotations/Buffy_1.mat", hand_boxes(*boxes))
    writer = converted(read_hand(tmp_path / "src", ALL), tmp_path / "dst", "oxfordhand")
    assert labels(tmp_path / "dst", "training/Buffy_1") == [[0, 0.35, 0.35, 0.5, 0.5], [0, 0.1, 0.25, 0.2, 0.5]]
    assert labels(tmp_path / "dst", "validation/Buffy_1") == [[0, 0.35, 0.35, 0.5, 0.5]]
    assert labels(tmp_path / "dst", "test/Buffy_1") == []
    assert [writer.counts[part]["images"] for part in ("train", "valid")] == [2, 1]


@pytest.mark.parametrize("content", [b"", b"rubbish", b"MATLAB 5.0 MAT-file" + b"\0" * 300])
def test_a_broken_mat_file_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("scipy.io")
    for split in ("training", "validation", "test"):
        draw(tmp_path / f"{split}_dataset/{split}_data/images/x.jpg", (100, 200))
        write(tmp_path / f"{split}_dataset/{split}_data/annotations/x.mat", content)
    with pytest.raises(DataError, match=r"x\.mat: cannot be read as a MATLAB file"):
        records(read_hand(tmp_path, ALL), "train")


def test_hands_without_scipy_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="pip install scipy"):
        read_hand(tmp_path, ALL)


# Pictures that their EXIF data turns

ASYMMETRIC = np.zeros((60, 100, 3), np.uint8)
ASYMMETRIC[10:20, 30:70] = 255  # the box 30, 10, 70, 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_picture(tmp_path: Path, orientation: int) -> None:
    """The loader shows pictures upright: the white rectangle has to lie in the label's box."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    voc(tmp_path / "src", {"a": []}, {"train": "a", "val": "a"})
    Image.fromarray(ASYMMETRIC).save(tmp_path / "src/JPEGImages/a.jpg", exif=exif, quality=100)
    write(tmp_path / "src/Annotations/a.xml", voc_xml([("dog", 31, 11, 70, 20)], (60, 100)))
    _, writer = convert(read_voc(tmp_path / "src", ALL), tmp_path / "dst", name="x", names=("dog",))
    picture = read_picture(str(tmp_path / "dst/images/a.jpg"))
    height, width = picture.shape[:2]
    ((_, x, y, w, h),) = labels(tmp_path / "dst", "a")
    rows, columns = np.where(picture[..., 0] > 128)
    assert (x - w / 2) * width == pytest.approx(columns.min(), abs=1e-3)
    assert (x + w / 2) * width == pytest.approx(columns.max() + 1, abs=1e-3)
    assert (y - h / 2) * height == pytest.approx(rows.min(), abs=1e-3)
    assert (y + h / 2) * height == pytest.approx(rows.max() + 1, abs=1e-3)
    assert bool(writer.notes) == (orientation > 1)


def test_boxes_of_an_upright_annotation_stay(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    voc(tmp_path / "src", {"a": []}, {"train": "a", "val": "a"})
    Image.fromarray(ASYMMETRIC).save(tmp_path / "src/JPEGImages/a.jpg", exif=exif)
    write(tmp_path / "src/Annotations/a.xml", voc_xml([("dog", 1, 1, 30, 50)], (100, 60)))
    convert(read_voc(tmp_path / "src", ALL), tmp_path / "dst", name="x", names=("dog",))
    assert labels(tmp_path / "dst", "a") == [[0, 0.25, 0.25, 0.5, 0.5]]
