"""test.py and detect.py with an .onnx: the figures and boxes of the same network in PyTorch, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.networks import ROOT, seeded
from utils import export
from utils.runtime import OnnxNetwork, spread

DEMO = ROOT / "cfg/demo.cfg"


def write(weights: Path, *flags: str) -> Path:
    """Export weights and give the path of the .onnx."""
    path = weights.with_name(f"demo{''.join(flags).replace('-', '')}.onnx")
    export.main(["--weights", str(weights), "--output", str(path), "--img-size", "96", *flags])
    return path


def run_test(command, weights: Path, *flags: object) -> tuple[dict, list[dict]]:
    """Run test.py and give its means and its detections."""
    common = ("--img-size", 96, "--noplots", "--workers", 0, "--device", "cpu", "--json", "r.json", "--save-json")
    outcome = command("test", "--weights", weights, *common, *flags)
    assert outcome.status == 0, outcome.err
    means = {key: json.loads(Path("r.json").read_text())[key] for key in ("map50", "map50_95", "precision", "recall")}
    return means, json.loads(Path("detections.json").read_text())


def assert_alike(theirs: list[dict], ours: list[dict]) -> None:
    """Every box has its twin; boxes of nearly the same score may stand in another order."""
    assert len(theirs) == len(ours) > 10
    for key in {_key(row) for row in ours}:
        found, wanted = (
            np.array([[*row["bbox"], row["score"]] for row in rows if _key(row) == key]) for rows in (theirs, ours)
        )
        assert found.shape == wanted.shape
        apart = np.abs(found[:, None] - wanted[None]) / (1, 1, 1, 1, 0.01)  # pixels, and hundredths of a score
        assert apart.max(-1).min(1).max() < 0.01


def _key(row: dict) -> tuple[int, int]:
    return row["image_id"], row["category_id"]


NMS = ("--nms", "--conf-thres", "0.001", "--max-det", "30000")  # as little as test.py drops
AUGMENTED = ("--augment", "--batch-size", 3)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [((), ()), ((), AUGMENTED), (("--decode",), ()), (("--decode",), AUGMENTED), (NMS, ())],
    ids=["raw", "raw-augmented", "decoded", "decoded-augmented", "suppressed"],
)
def test_test_gives_the_figures_of_pytorch(command, trained, kind, flags):
    means, boxes = run_test(command, trained, *flags)
    found, theirs = run_test(command, write(trained, *kind), *flags)
    assert found == pytest.approx(means, abs=1e-3)
    assert_alike(theirs, boxes)


def test_a_fixed_size_pads_every_picture_to_it(command, trained):
    means, boxes = run_test(command, trained, "--square")
    found, theirs = run_test(command, write(trained, "--fixed"))
    assert found == pytest.approx(means, abs=1e-3)
    assert_alike(theirs, boxes)


def test_detect_finds_the_same_boxes(command, trained, scenes):
    found = []
    for weights in (trained, write(trained), write(trained, "--nms", "--conf-thres", "0.2")):
        flags = ("--conf-thres", 0.27, "--img-size", 96, "--save-json", "--device", "cpu")
        outcome = command("detect", "--weights", weights, "--source", scenes.parent / "images/valid", *flags)
        assert outcome.status == 0, outcome.err
        found.append(json.loads(Path("output/detections.json").read_text()))
        shutil.rmtree("output")
    assert "its own NMS keeps scores over 0.2, overlaps up to 0.6, 300 boxes a class" in outcome.out + outcome.err
    assert_alike(found[1], found[0])
    assert_alike(found[2], found[0])
    assert {row["category"] for row in found[1]} <= {"balloon", "butterfly", "fish", "sailboat"}


@torch.inference_mode()
def test_it_has_the_members_of_a_network(trained):
    network, model = OnnxNetwork(write(trained)), seeded(DEMO)
    for member in ("stride", "classes", "channels", "diou_beta", "is_fixed"):
        assert getattr(network, member) == getattr(model, member)
    assert network.size == (96, 96)
    assert [*network.heads] == model.heads
    assert network.fuse().eval().to(device="cpu", memory_format=torch.channels_last) is network
    x = torch.rand(1, 3, 64, 96).to(memory_format=torch.channels_last)
    for ours, theirs in zip(model(x), network(x), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_detections_become_boxes_of_their_pictures():
    rows = [[2, 0, 0, 4, 2, 0.9, 1], [0, 2, 2, 4, 8, 0.8, 0], [2, 1, 1, 3, 3, 0.7, 0]]
    boxes, scores = spread(torch.tensor(rows), 3, 2)
    assert boxes.tolist() == [[[3, 5, 2, 6], [0] * 4], [[0] * 4] * 2, [[2, 1, 4, 2], [2, 2, 2, 2]]]
    assert scores.equal(torch.tensor([[[0.8, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0.9], [0.7, 0]]]))
    boxes, scores = spread(torch.zeros(0, 7), 3, 2)
    assert (boxes.shape, scores.shape) == ((3, 0, 4), (3, 0, 2))


@pytest.mark.parametrize(
    ("kind", "script", "flags", "complaint"),
    [
        ("--fixed", "test", ["--augment"], "--augment: {} takes 96x96 alone (export it without --fixed)"),
        ("--fixed", "test", ["--img-size", 64], "--img-size: {} takes 96x96 alone (export it without --fixed)"),
        ("--fixed", "test", ["--task", "study"], "--task study: {} takes 96x96 alone (export it without --fixed)"),
        ("--fixed", "detect", ["--img-size", 64], "--img-size: {} takes 96x96 alone (export it without --fixed)"),
        ("--decode", "detect", ["--cfg", DEMO], "--cfg: {} describes itself (leave --cfg out)"),
        ("--decode", "test", ["--precision", "bf16"], "--precision bf16: an .onnx computes as it was exported"),
        (
            "--decode",
            "test",
            ["--task", "benchmark"],
            "--task benchmark: times forms of a PyTorch network (python -m utils.benchmark times an .onnx)",
        ),
    ],
)
def test_what_an_onnx_cannot_do_is_refused_in_a_line(command, trained, kind, script, flags, complaint):
    path = write(trained, kind)
    outcome = command(script, "--weights", path, "--device", "cpu", *flags)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == complaint.format(path)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("heads", [], "there is no head"),
        ("size", [96], "a size has two sides"),
        ("stride", 0, "sizes, strides and channels are whole numbers from 1 on"),
        ("names", 5, "int"),
        ("data", 5, "names and paths are texts"),
        ("outputs", "boxes and scores", "gives 1 outputs, which are no boxes and scores"),
        ("outputs", "nothing", "outputs are no 'nothing'"),
    ],
)
def test_a_description_that_is_wrong(command, trained, scenes, key, value, complaint):
    graph = onnx.load(write(trained))
    if key == "outputs":
        del graph.graph.output[1:]
    next(each for each in graph.metadata_props if each.key == key).value = json.dumps(value)
    onnx.save(graph, "wrong.onnx")
    outcome = command("detect", "--weights", "wrong.onnx", "--source", scenes.parent / "images/valid")
    assert outcome.status == 2, outcome.err
    assert "wrong.onnx" in outcome.err.splitlines()[-1]
    assert complaint in outcome.err.splitlines()[-1]


def test_files_that_are_no_such_network(command, trained, tmp_path):
    graph = onnx.load(write(trained))
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "foreign.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nothing like it")
    for name, complaint in {
        "foreign.onnx": "does not say what its outputs mean (expected an .onnx of python -m utils.export)",
        "broken.onnx": "is not an .onnx that ONNX Runtime loads: ",
        "missing.onnx": "cannot read the network: there is no such file",
    }.items():
        for script in ("test", "detect"):
            outcome = command(script, "--weights", name, "--device", "cpu")
            assert outcome.status == 2
            (line,) = outcome.err.splitlines()
            assert line.startswith(f"{name}: {complaint}")


@pytest.mark.parametrize("kind", [(), ("--decode",), ("--int8", "--calibrate", "6")], ids=["raw", "decoded", "int8"])
def test_openvino_gives_the_figures_of_onnx_runtime(command, trained, kind):
    pytest.importorskip("openvino")
    path = write(trained, *kind)
    means, boxes = run_test(command, path)
    found, theirs = run_test(command, path, "--runtime", "openvino")
    assert found == pytest.approx(means, abs=1e-2 if "--int8" in kind else 1e-3)
    if "--int8" not in kind:
        assert_alike(theirs, boxes)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "tolerance"), [((), 1e-5), (("--int8", "--calibrate", "6"), 0.05)])
def test_openvino_computes_the_same(trained, kind, tolerance, monkeypatch, tmp_path):
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    path = write(trained, *kind)
    ours, theirs = (OnnxNetwork(path, runtime=name) for name in ("onnxruntime", "openvino"))
    assert theirs.metadata == ours.metadata
    for shape in ((1, 3, 96, 96), (2, 3, 64, 96)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        outputs = theirs(x)
        theirs(torch.rand(shape))
        for a, b in zip(ours(x), outputs, strict=True):  # which the second call leaves alone
            assert a.shape == b.shape
            assert (a - b).norm() < tolerance * a.norm()


def test_openvino_detects(command, trained, scenes):
    pytest.importorskip("openvino")
    flags = ("--runtime", "openvino", "--source", scenes.parent / "images/valid", "--device", "cpu")
    outcome = command("detect", "--weights", write(trained), *flags)
    assert outcome.status == 0, outcome.err
    assert "in OpenVINO (float32): 4 classes" in outcome.out + outcome.err


def test_a_runtime_computes_an_onnx_alone(command, trained):
    for script in ("test", "detect"):
        outcome = command(script, "--weights", trained, "--runtime", "openvino", "--device", "cpu")
        assert outcome.status == 2
        complaint = f"--runtime openvino: computes an .onnx, and {trained} is none (export it)"
        assert outcome.err.splitlines()[-1] == complaint


def test_without_openvino_the_command_that_installs_it_is_told(command, trained, monkeypatch):
    path = write(trained)
    monkeypatch.setitem(sys.modules, "openvino", None)
    outcome = command("test", "--weights", path, "--runtime", "openvino", "--device", "cpu")
    assert outcome.status == 2
    assert outcome.err == "openvino: is not installed, and this needs it (pip install openvino)\n"


def test_a_broken_file_in_openvino(command):
    pytest.importorskip("openvino")
    Path("broken.onnx").write_bytes(b"nothing like it")
    outcome = command("test", "--weights", "broken.onnx", "--runtime", "openvino", "--device", "cpu")
    assert outcome.status == 2
    assert outcome.err.startswith("broken.onnx: is not an .onnx that OpenVINO loads: ")
    assert outcome.err.count("\n") == 1


def test_a_names_file_of_another_length(command, trained):
    Path("two.names").write_text("a\nb\n")
    outcome = command("detect", "--weights", write(trained), "--names", "two.names", "--device", "cpu")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("two.names: names 2 classes, but ")


def test_without_the_package_the_command_that_installs_it_is_told(command, trained, monkeypatch):
    path = write(trained)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = command("detect", "--weights", path, "--device", "cpu")
    assert outcome.status == 2
    assert outcome.err == "onnxruntime: is not installed, and this needs it (pip install onnx onnxruntime)\n"
