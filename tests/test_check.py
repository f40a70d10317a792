"""The check of a dataset: one that is broken in every way, a healthy one, leakage, and what the command says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from utils.findings import KINDS, find, gather, nearest, suggest_anchors
from utils.labels import check_labels
from utils.log import DataError
from utils.survey import difference_hash, look, survey


class Dataset(NamedTuple):
    """A folder with images/, labels/, train.txt, valid.txt and d.data for two classes."""

    folder: Path

    def picture(self, name: str, seed: int, shape: tuple[int, int] = (60, 80)) -> np.ndarray:
        """Write a picture of soft random spots, of which two are never alike."""
        spots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        picture = cv2.resize(spots, shape[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(self.folder / "images" / name), picture)
        return picture

    def label(self, name: str, *lines: str) -> None:
        (self.folder / "labels" / name).write_text("".join(f"{line}\n" for line in lines))

    def compose(self, split: str, *names: str) -> None:
        (self.folder / f"{split}.txt").write_text("".join(f"images/{name}\n" for name in names))

    def found(self, size: tuple[int, int] = (80, 80)) -> dict[str, list[str]]:
        """Give the findings with paths shortened."""
        splits = {split: survey(self.folder / f"{split}.txt", 2) for split in ("train", "valid")}
        findings = gather(find(splits, ("cat", "dog"), size))
        return {kind: [text.replace(f"{self.folder}/", "") for text in texts] for kind, texts in findings.items()}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Make a healthy dataset: two pictures to train on, one to test on, with both classes in each."""
    made = Dataset(tmp_path)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(("a", "b", "v")):
        made.picture(f"{name}.png", number)
        made.label(f"{name}.txt", "0 0.3 0.3 0.2 0.2", "1 0.7 0.7 0.3 0.4")
    made.compose("train", "a.png", "b.png")
    made.compose("valid", "v.png")
    (tmp_path / "d.names").write_text("cat\ndog\n")
    (tmp_path / "d.data").write_text("classes=2\ntrain=train.txt\nvalid=valid.txt\nnames=d.names\n")
    return made


def refused(dataset: Dataset) -> list[str]:
    """Give what training says of the dataset, with paths shortened."""
    mistakes = []
    for split in ("train", "valid"):
        try:
            check_labels(dataset.folder / f"{split}.txt", 2)
        except DataError as error:
            mistakes += str(error).replace(f"{dataset.folder}/", "").splitlines()
    return mistakes


def test_a_healthy_dataset_has_no_findings(dataset: Dataset) -> None:
    assert dataset.found() == {}


def test_every_mistake_of_a_label_file_is_told_with_its_line(dataset: Dataset) -> None:
    dataset.label(
        "a.txt",
        "0 0.5 0.5 0.2",  # 1: four numbers
        "cat 0.5 0.5 0.2 0.2",  # 2: no number
        "0 nan 0.5 0.2 0.2",  # 3
        "2 0.5 0.5 0.2 0.2",  # 4: two classes
        "0.5 0.5 0.5 0.2 0.2",  # 5
        "0 0.5 0.5 0 0.2",  # 6: no area
        "",
        "1 0.5 0.5 0.2 -0.2",  # 8
        "1 1.5 0.5 0.2 0.2",  # 9: outside
        "0 40 30 20 10",  # 10: pixels
        "0 0.5 0.5 0.2 0.2",  # 11: good
        "1 0.5 0.5 0.2 0.2",  # 12: the same place, another class
        "0 0.5 0.501 0.2 0.2",  # 13: nearly 11 again
        "1 0.95 0.5 0.2 0.2",  # 14: 5 % past the border
        "1 0.5 0.5 0.01 0.2",  # 15: 0.8 px wide at 80
    )
    found = dataset.found()
    lines = {kind: [text.split(": ")[0] for text in texts] for kind, texts in found.items()}
    assert lines == {
        "line": ["labels/a.txt:1", "labels/a.txt:2", "labels/a.txt:3"],
        "class": ["labels/a.txt:4", "labels/a.txt:5"],
        "degenerate": ["labels/a.txt:6", "labels/a.txt:8"],
        "outside": ["labels/a.txt:9", "labels/a.txt:10"],
        "past": ["labels/a.txt:14"],
        "repeated": ["labels/a.txt:13"],
        "dot": ["labels/a.txt:15"],
    }
    assert found["past"] == ["labels/a.txt:14: by 5.0%"]
    assert found["repeated"] == ["labels/a.txt:13: as line 11"]
    assert found["dot"] == ["labels/a.txt:15: 0.8 x 12.0"]


def test_images_and_labels_that_are_not_there_or_broken(dataset: Dataset) -> None:
    whole = (dataset.folder / "images/b.png").read_bytes()
    (dataset.folder / "images/b.png").write_bytes(whole[: len(whole) // 2])
    (dataset.folder / "images/text.png").write_text("no picture")
    dataset.picture("bare.png", 7)
    dataset.picture("unlisted.png", 8)
    for name in ("text", "gone", "orphan", "unlisted"):
        dataset.label(f"{name}.txt", "0 0.5 0.5 0.2 0.2", "1 0.5 0.5 0.3 0.3")
    (dataset.folder / "labels/classes.txt").write_text("cat\ndog\n")
    dataset.compose("train", "a.png", "b.png", "text.png", "gone.png", "bare.png", "a.png")
    found = dataset.found()
    assert found.pop("corrupt")[0].startswith("images/b.png: broken image")
    assert found == {
        "missing": ["images/gone.png: no such image"],
        "copy": ["train: images/a.png is images/a.png"],
        "unlabelled": ["images/bare.png"],
        "orphan": ["labels/orphan.txt"],
    }


def test_what_training_refuses_of_ignore_files_is_told_with_its_line(dataset: Dataset) -> None:
    (dataset.folder / "ignore").mkdir()
    good = "-1 0.5 0.5 0.2 0.2 region\n1 0.5 0.5 0.2 0.2 crowd\n\n"
    (dataset.folder / "ignore/a.txt").write_text(f"{good}0 0.5 0.5 0.2 0.2\n2 0.5 0.5 0.2 0.2 crowd\n")
    (dataset.folder / "ignore/v.txt").write_bytes(b"\xff\xfe")
    (dataset.folder / "ignore/b.txt").write_text(good)
    texts = [
        "ignore/a.txt:4: expected class x y w h and one of crowd, difficult, region, gets '0 0.5 0.5 0.2 0.2'",
        "ignore/a.txt:5: class 2 is out of range (the names file has 2: 0 to 1)",
        "ignore/v.txt: is not a text file",
    ]
    assert dataset.found() == {"ignore": texts}
    assert refused(dataset) == texts


def test_a_split_without_any_label_file(dataset: Dataset) -> None:
    (dataset.folder / "labels/v.txt").unlink()
    found = dataset.found()
    text = "no image has a label file (expected one like labels/v.txt)"
    assert found.pop("bare") == [f"valid: {text}"]
    assert found == {"unlabelled": ["images/v.png"], "absent": ["valid: cat", "valid: dog"]}
    assert refused(dataset) == [f"valid.txt: {text}"]


def test_a_class_that_a_split_lacks(dataset: Dataset) -> None:
    dataset.label("v.txt", "0 0.5 0.5 0.2 0.2")
    assert dataset.found() == {"absent": ["valid: dog"]}


def test_what_leaks_from_train_into_valid(dataset: Dataset) -> None:
    """A copy under another name, the same picture smaller and compressed again, brighter, and a stranger."""
    shutil.copy(dataset.folder / "images/a.png", dataset.folder / "images/copy.png")
    picture = cv2.imread(str(dataset.folder / "images/b.png"))
    cv2.imwrite(str(dataset.folder / "images/small.jpg"), cv2.resize(picture, (60, 45)), [cv2.IMWRITE_JPEG_QUALITY, 60])
    cv2.imwrite(str(dataset.folder / "images/bright.png"), (picture * 0.7 + 60).astype(np.uint8))
    for name in ("copy", "small", "bright"):
        dataset.label(f"{name}.txt", "0 0.5 0.5 0.2 0.2", "1 0.5 0.5 0.3 0.3")
    dataset.compose("valid", "copy.png", "small.jpg", "bright.png", "v.png")
    found = dataset.found()
    assert found["leaked"] == ["images/copy.png is images/a.png"]
    assert [text.split(" (")[0] for text in found["alike"]] == [
        "images/small.jpg looks like images/b.png",
        "images/bright.png looks like images/b.png",
    ]
    assert found.keys() == {"leaked", "alike"}


def test_plain_pictures_look_like_nothing(dataset: Dataset) -> None:
    for name in ("a.png", "v.png"):
        cv2.imwrite(str(dataset.folder / "images" / name), np.full((60, 80, 3), 90 + (name == "v.png"), np.uint8))
    assert look(str(dataset.folder / "images/a.png"), 2).likeness is None
    assert dataset.found() == {}


def test_hashes_are_of_brightness_across_and_down() -> None:
    ramp = np.tile(np.arange(90, dtype=np.uint8) * 2, (90, 1))
    hashes = [
        difference_hash(cv2.imencode(".png", np.ascontiguousarray(each))[1], (90, 90))
        for each in (ramp, ramp[:, ::-1], ramp.T[::-1])
    ]
    assert [each.tolist() for each in hashes] == [[0, 0], [2**64 - 1, 0], [0, 2**64 - 1]]


def test_the_nearest_is_what_counting_bits_gives(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    monkeypatch.setattr("utils.findings.BLOCK", 3)
    generator = np.random.default_rng(0)
    one = look(str(dataset.folder / "images/a.png"), 2)
    groups = [
        [replace(one, likeness=bits) for bits in generator.integers(0, 2**64, (count, 2), np.uint64)]
        for count in (5, 8)
    ]
    expected = []
    for each in groups[0]:
        bits = [
            sum(int(a ^ b).bit_count() for a, b in zip(each.likeness, other.likeness, strict=True))
            for other in groups[1]
        ]
        expected.append((min(bits), bits.index(min(bits))))
    assert nearest(*groups) == expected
    assert nearest([], groups[1]) == []


def test_anchors_and_their_recall(dataset: Dataset) -> None:
    """Boxes of 16 x 12 and 24 x 24 px at 80: two anchors hit them."""
    looks = survey(dataset.folder / "train.txt", 2)
    fit = suggest_anchors(looks, (80, 80), 2)
    assert fit["anchors"] == [[16, 12], [24, 24]]
    assert (fit["recall"], fit["iou"]) == pytest.approx((1, 1))


def test_the_command_reports_all_and_ends_with_1(command, dataset: Dataset, tmp_path: Path) -> None:
    dataset.label("a.txt", *["0 0.5 0.5 0 0.2"] * 7, "0 0.95 0.5 0.2 0.2")
    (tmp_path / "images/b.png").unlink()
    outcome = command("utils/check", "d.data", "--img-size", 80, "--json", "c.json", "--output", "sheet")
    assert outcome.status == 1, outcome.err
    assert "problem: 7 boxes without an area" in outcome.out
    assert "labels/a.txt:5: expected a width and height above 0, gets 0 and 0.2" in outcome.out
    assert "labels/a.txt:6" not in outcome.out
    assert "… and 2 more" in outcome.out
    assert "oddity: 1 boxes that reach past the border" in outcome.out
    assert outcome.out.splitlines()[-2] == "8 problems"
    figures = json.loads((tmp_path / "c.json").read_text())
    assert {kind: len(texts) for kind, texts in figures["problems"].items()} == {"missing": 1, "degenerate": 7}
    assert figures["splits"]["train"]["per_class"] == {
        "cat": {"boxes": 1, "images": 1},
        "dog": {"boxes": 0, "images": 0},
    }
    assert figures["splits"]["valid"]["under_cell"] == {"8": 0, "16": 0, "32": 2}
    assert cv2.imread(str(tmp_path / "sheet/overview.png")).std() > 1


def test_the_command_on_a_healthy_dataset(command, dataset: Dataset, tmp_path: Path) -> None:
    outcome = command("utils/check", "d.data")
    assert outcome.status == 0, outcome.err
    assert "no problems" in outcome.out
    assert (tmp_path / "runs/check/overview.png").is_file()


@pytest.mark.parametrize("broken", ["valid.txt", "both"])
def test_a_list_that_is_not_there_does_not_stop_the_rest(
    command, dataset: Dataset, tmp_path: Path, broken: str
) -> None:
    for name in ("valid.txt", "train.txt")[: 1 + (broken == "both")]:
        (tmp_path / name).unlink()
    outcome = command("utils/check", "d.data", "--output", "sheet")
    assert outcome.status == 1, outcome.err
    assert "valid.txt: no such file or folder" in outcome.out
    assert (tmp_path / "sheet/overview.png").exists() == (broken != "both")


def test_mistakes_in_the_command_are_status_2(command, tmp_path: Path) -> None:
    (tmp_path / "n.names").write_text("cat\n")
    (tmp_path / "empty.data").write_text("names=n.names\n")
    for words, message in (
        (("missing.data",), "missing.data: cannot be read"),
        (("empty.data",), "empty.data: needs train= or valid="),
        (("empty.data", "--json", "no/where.json"), "there is no folder no"),
    ):
        outcome = command("utils/check", *words)
        assert outcome.status == 2
        assert message in outcome.err


def test_the_table_of_kinds_tells_problems_from_oddities() -> None:
    problems = {kind for kind, each in KINDS.items() if each.is_problem}
    assert problems == set("list missing corrupt line class degenerate outside ignore bare leaked".split())
