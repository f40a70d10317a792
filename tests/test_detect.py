"""Detection and testing as a user runs them, on drawn pictures, on real weights and on mistakes."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import Darknet, load_cfg, save_weights

ROOT = Path(__file__).resolve().parent.parent
CFG = ROOT / "tests/fixtures/tiny.cfg"
FASTEST = "darknet/yolo-fastest/ModelZoo/yolo-fastest-1.1_coco"


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Random weights of the small network: it finds a great many things anywhere."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.weights"
    save_weights(Darknet(load_cfg(CFG)), path)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three pictures of odd shapes, one of them grey and one with a name that is not ASCII."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, shape in (("wide.jpg", (40, 300, 3)), ("grey.png", (97, 101)), ("größe 1.png", (7, 5, 3))):
        coded = cv2.imencode(name[-4:], generator.integers(0, 256, shape, np.uint8))[1]
        (folder / name).write_bytes(coded.tobytes())
    return folder


@pytest.fixture
def detected(command, weights):
    """Run detect.py with the small network."""
    return lambda *more: command("detect", "--cfg", CFG, "--weights", weights, "--device", "cpu", *more)


def test_dog_by_yolo_fastest(command, shared_data, tmp_path):
    def found(*more: str) -> dict[str, list[float]]:
        outcome = command(
            *("detect", "--cfg", shared_data / FASTEST / "yolo-fastest-1.1.cfg", "--stretch", "--img-size", 320),
            *("--weights", shared_data / FASTEST / "yolo-fastest-1.1.weights", "--device", "cpu"),
            *("--names", shared_data / FASTEST / "coco.names", "--conf-thres", 0.3, "--iou-thres", 0.45),
            *("--source", shared_data / "images/alexeyab/data/dog.jpg", "--save-json", *more),
        )
        assert outcome.status == 0, outcome.err
        scores: dict[str, list[float]] = {}
        for row in json.loads((tmp_path / "output/detections.json").read_text()):
            scores.setdefault(row["category"], []).append(row["score"])
        return scores

    agnostic = {"car": [0.897, 0.444], "dog": [0.654], "bicycle": [0.529], "person": [0.312]}
    by_class = agnostic | {"cat": [0.567], "bicycle": [0.529, 0.313]}
    for scores, expected in ((found("--agnostic-nms"), agnostic), (found(), by_class)):
        assert scores.keys() == expected.keys()
        for name, values in expected.items():
            assert scores[name] == pytest.approx(values, abs=0.005), name


def test_a_folder_gives_pictures_text_and_json(detected, pictures, tmp_path):
    outcome = detected("--source", pictures, "--conf-thres", 0.1, "--save-txt", "--save-json")
    assert outcome.status == 0, outcome.err
    for name in ("wide.jpg", "grey.png", "größe 1.png"):
        drawn = cv2.imdecode(np.fromfile(next((tmp_path / "output").glob(f"*{Path(name).suffix}")), np.uint8), 1)
        assert drawn is not None
    rows = json.loads((tmp_path / "output/detections.json").read_text())
    assert rows
    assert {row["image_id"] for row in rows} <= {0, 1, 2}
    wide = [row for row in rows if row["file_name"].endswith("wide.jpg")]
    lines = (tmp_path / "output/wide.txt").read_text().splitlines()
    assert len(lines) == len(wide)
    for row, line in zip(wide, lines, strict=True):
        label, x, y, w, h, conf = map(float, line.split())
        assert [label, conf] == pytest.approx([row["category_id"], row["score"]], abs=1e-5)
        box = [(x - w / 2) * 300, (y - h / 2) * 40, w * 300, h * 40]
        assert box == pytest.approx(row["bbox"], abs=1e-2)


def test_a_class_filter_and_a_glob(detected, pictures, tmp_path):
    outcome = detected("--source", pictures / "*.png", "--classes", 2, "--conf-thres", 0.05, "--save-json")
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "output/detections.json").read_text())
    assert {row["category_id"] for row in rows} == {2}
    assert {Path(row["file_name"]).suffix for row in rows} == {".png"}


def test_a_video_keeps_its_frames_and_rate(detected, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, (64, 48))
    for level in range(0, 250, 25):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    outcome = detected("--source", path, "--save-txt", "--conf-thres", 0.05)
    assert outcome.status == 0, outcome.err
    capture = cv2.VideoCapture(str(tmp_path / "output/clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 10
    capture.release()
    assert len(list((tmp_path / "output").glob("clip_*.txt"))) == 10


def test_nothing_found_is_no_mistake(detected, pictures, tmp_path):
    outcome = detected("--source", pictures, "--conf-thres", 1, "--save-txt", "--save-json")
    assert outcome.status == 0, outcome.err
    assert "nothing" in outcome.out
    assert json.loads((tmp_path / "output/detections.json").read_text()) == []
    assert (tmp_path / "output/wide.txt").read_text() == ""


@pytest.mark.parametrize("more", [("--augment",), ("--stretch",), ("--img-size", 160), ("--agnostic-nms",)])
def test_ways_of_detecting(detected, pictures, more):
    outcome = detected("--source", pictures, *more)
    assert outcome.status == 0, outcome.err


def test_test_writes_the_figures_it_prints(command, weights, scenes, tmp_path):
    flags = ("--cfg", CFG, "--weights", weights, "--data", scenes, "--device", "cpu", "--workers", 0)
    outcome = command("test", *flags, "--json", tmp_path / "t.json", "--save-json", tmp_path / "d.json")
    assert outcome.status == 0, outcome.err
    figures = json.loads((tmp_path / "t.json").read_text())
    assert {"map50", "map50_95", "precision", "recall", "f1", "per_class", "images", "ms_per_image"} <= figures.keys()
    assert figures["per_class"].keys() == {"balloon", "sailboat", "fish", "butterfly"}
    assert figures["images"] == 4
    assert figures["ms_per_image"].keys() == {"preprocess", "forward", "nms"}
    assert json.loads((tmp_path / "d.json").read_text())
    pictures = {path.name for path in (tmp_path / "runs/test").iterdir()}
    assert pictures == {"rates.png", "ap.png", "confusion.png", "predictions.jpg"}


def test_study_and_benchmark(command, weights, scenes, tmp_path):
    flags = ("--cfg", CFG, "--weights", weights, "--data", scenes, "--device", "cpu", "--workers", 0)
    outcome = command("test", *flags, "--task", "study", "--output", "pictures", "--json", "t.json")
    assert outcome.status == 0, outcome.err
    assert [max(row["size"]) for row in json.loads((tmp_path / "t.json").read_text())] == [256, 320, 416, 512, 608]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["study.png"]
    more = ("--task", "benchmark", "--batch-size", 3, "--img-size", 64, "--json", "t.json")
    outcome = command("test", *flags, *more)
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "t.json").read_text())
    forms = ["eager", "fused", "fused, channels_last"]
    assert [(row["variant"], row["batch"]) for row in rows] == [(form, batch) for batch in (1, 3) for form in forms]
    for row in rows:
        assert 0 < row["forward_ms"] < row["path_ms"] == pytest.approx(1000 / row["images_per_s"])
        eager = next(other for other in rows if other["batch"] == row["batch"])
        assert row["speedup"] == pytest.approx(eager["forward_ms"] / row["forward_ms"])
    assert not (tmp_path / "runs").exists()
    outcome = command("test", *flags, "--task", "benchmark", "--output", "pictures")
    assert (outcome.status, "none are drawn" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        ("detect", ("--source", "missing"), "--source missing: no such file or folder\n"),
        ("detect", ("--source", "*.jpg"), "--source *.jpg: names no image and no video\n"),
        ("detect", ("--classes", 9), "--classes 9: there are 4 classes, 0 to 3\n"),
        ("detect", ("--half",), "--half: needs a GPU\n"),
        ("detect", ("--names", "missing"), "missing: cannot be read: No such file or directory\n"),
        ("detect", ("--weights", "missing.weights"), "missing.weights: cannot read the weights"),
        ("detect", ("--weights", "missing.pt"), "missing.pt: cannot read the weights"),
        ("detect", ("--cfg", ROOT / "cfg/yolov3-tiny.cfg"), "ends inside layer"),
        ("detect", ("--conf-thres", 2), "expected 0 to 1, gets 2"),
        ("test", (), "--data: not given, and the weights name no .data file with valid= that is there\n"),
    ],
)
def test_mistakes_are_one_line_and_status_2(command, weights, script, more, message):
    outcome = command(script, "--cfg", CFG, "--weights", weights, "--device", "cpu", *more)
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("script", ["detect", "test"])
def test_without_weights_the_usage_is_told(command, script):
    outcome = command(script)
    assert outcome.status == 2
    assert "there is no weights/best.pt" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no picture", b"hello"])
def test_a_broken_picture_is_named(detected, tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    outcome = detected("--source", "bad.jpg")
    assert outcome.status == 2
    assert "bad.jpg: cannot be read as a picture\n" in outcome.err


def test_the_other_pictures_are_detected_on(detected, pictures, tmp_path):
    (pictures / "bad.jpg").write_bytes(b"no picture")
    outcome = detected("--source", pictures, "--save-json")
    assert outcome.status == 2
    assert outcome.err.endswith("bad.jpg: cannot be read as a picture\n")
    assert (tmp_path / "output/wide.jpg").exists()
    assert (tmp_path / "output/detections.json").exists()


def test_the_pictures_themselves_are_never_overwritten(detected, pictures, tmp_path):
    before = {path.name: path.read_bytes() for path in pictures.iterdir()}
    outcome = detected("--source", pictures, "--output", pictures, "--save-txt")
    assert outcome.status == 2
    assert "give another folder" in outcome.err
    assert {path.name: path.read_bytes() for path in pictures.iterdir()} == before


def test_a_network_of_one_class_is_tested_with_single_cls(command, scenes, weights, tmp_path):
    flags = ("--cfg", CFG, "--weights", weights, "--data", scenes, "--device", "cpu", "--workers", 0)
    outcome = command("test", *flags, "--single-cls", "--json", tmp_path / "t.json")
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "t.json").read_text())["per_class"].keys() == {"object"}


def test_other_names_than_those_learned_are_refused(command, scenes, tmp_path):
    flags = ("--cfg", CFG, "--data", scenes, "--device", "cpu", "--workers", 0)
    command("train", *flags, "--epochs", 1, "--name", "run")
    (tmp_path / "other.names").write_text("fish\nballoon\nsailboat\nbutterfly\n")
    valid = scenes.parent / "valid.txt"
    (tmp_path / "other.data").write_text(f"classes=4\nvalid={valid}\nnames=other.names\n")
    outcome = command("test", "--data", tmp_path / "other.data", "--device", "cpu")
    assert outcome.status == 2
    assert "learned balloon, sailboat, fish, butterfly" in outcome.err


def test_partial_weights_are_refused(command, weights, tmp_path):
    (tmp_path / "part.weights").write_bytes(weights.read_bytes()[: 20 + 4 * (4 * 8 + 8 * 3 * 9)])
    outcome = command("detect", "--cfg", CFG, "--weights", "part.weights", "--device", "cpu")
    assert outcome.status == 2
    assert "part.weights: is partial: it fills 0 of 13 layers" in outcome.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_half_precision_on_a_gpu_finds_what_the_cpu_finds(command, shared_data, tmp_path):
    def found(*more: object) -> list[dict]:
        flags = ("--cfg", shared_data / FASTEST / "yolo-fastest-1.1-xl.cfg", "--save-json", "--conf-thres", 0.3)
        flags = (*flags, "--weights", shared_data / FASTEST / "yolo-fastest-1.1-xl.weights")
        outcome = command("detect", *flags, "--source", shared_data / "images/alexeyab/data", *more)
        assert outcome.status == 0, outcome.err
        return json.loads((tmp_path / "output/detections.json").read_text())

    on_cpu, on_gpu = found("--device", "cpu"), found("--device", 0, "--half")
    assert len(on_cpu) == len(on_gpu)
    for first, second in zip(on_cpu, on_gpu, strict=True):
        assert first["category"] == second["category"]
        assert first["score"] == pytest.approx(second["score"], abs=0.01)
        assert first["bbox"] == pytest.approx(second["bbox"], abs=1)
