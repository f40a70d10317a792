"""What utils.export --int8 writes: integers where it says so, FP32 heads, and nearly the numbers of the network."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from models import Darknet, load_cfg, save_weights
from models.weights import load_model
from tests.networks import ROOT, seeded
from utils.boxes import non_maximum_suppression
from utils.int8 import count_integer, float_convolutions, layer_of, optimised
from utils.onnx_metadata import unpack
from utils.runtime import OnnxNetwork

DEMO = ROOT / "cfg/demo.cfg"


def export_int8(command, weights: Path, *flags: str):
    flags = ("--int8", "--calibrate", 6, "--img-size", 64, "--output", "int8.onnx", *flags)
    outcome = command("utils/export", "--weights", weights, *flags)
    assert outcome.status == 0, outcome.err
    return outcome


@torch.inference_mode()
def test_integers_compute_nearly_the_same(command, trained):
    export_int8(command, trained)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(load_model(DEMO, trained)(x), OnnxNetwork("int8.onnx")(x), strict=True):
        error = (ours - theirs).std() / ours.std()
        assert 1e-4 < error < 0.1  # integers: neither equal nor far off


def test_all_convolutions_but_the_heads_run_in_integers(command, trained):
    outcome = export_int8(command, trained)
    model = Darknet(load_cfg(DEMO))
    convolutions = sum("conv.weight" in layer.tensors for layer in model.layers)
    data = Path("int8.onnx").read_bytes()
    assert count_integer(data) == (convolutions - len(model.heads), convolutions)
    graph = onnx.load("int8.onnx")
    assert float_convolutions(data) == [name for name, kind in optimised(data) if kind in ("Conv", "FusedConv")]
    floats = sorted(float_convolutions(data), key=layer_of)
    assert [layer_of(name) for name in floats] == [spec.layer - 1 for spec in model.heads]
    assert f"in float: {', '.join(floats)} (before a head)" in outcome.out + outcome.err
    assert "ConvInteger" not in {kind for _, kind in optimised(data)}
    said = f"INT8, {convolutions - len(model.heads)} of {convolutions} convolutions in integers"
    assert unpack({each.key: each.value for each in graph.metadata_props}, "").arithmetic == said
    assert said in outcome.out + outcome.err
    assert count_integer(float_form(command, trained)) == (0, convolutions)


def float_form(command, trained: Path) -> bytes:
    assert command("utils/export", "--weights", trained, "--output", "float.onnx").status == 0
    return Path("float.onnx").read_bytes()


@pytest.mark.parametrize(("flags", "largest"), [((), 127), (("--reduce-range",), 64)], ids=["whole", "reduced"])
def test_weights_are_symmetric_int8_with_a_scale_a_channel(command, trained, flags, largest):
    export_int8(command, trained, *flags)
    constants = {each.name: numpy_helper.to_array(each) for each in onnx.load("int8.onnx").graph.initializer}
    weights = {name: each for name, each in constants.items() if each.dtype == np.int8 and each.ndim == 4}
    assert len(weights) > 10
    for name, weight in weights.items():
        stem = name.removesuffix("_quantized")
        assert constants[f"{stem}_scale"].shape == (len(weight),)
        assert not constants[f"{stem}_zero_point"].any()
        assert np.abs(weight.astype(int)).reshape(len(weight), -1).max(1).min() in (largest, largest - 1)
    assert {each.dtype for name, each in constants.items() if "zero_point" in name} >= {np.dtype(np.uint8)}


def test_fp32_and_int8_stand_side_by_side(command, trained):
    outcome = export_int8(command, trained, "--decode")
    lines = [line.split() for line in (outcome.out + outcome.err).splitlines()]
    assert ["FP32", "INT8"] in lines
    rows = {line[0]: [float(value) for value in line[-2:]] for line in lines if line and line[0] in TABLE}
    assert rows.keys() == TABLE
    assert rows["MB"][1] < 0.35 * rows["MB"][0]
    assert rows["MB"][1] == pytest.approx(Path("int8.onnx").stat().st_size / 1e6, abs=0.006)


def test_nms_stands_behind_integers(command, trained):
    export_int8(command, trained, "--decode")
    network, x = OnnxNetwork("int8.onnx"), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outcome = export_int8(command, trained, "--nms", "--conf-thres", 0.25)
    assert "detections: INT8, " in outcome.out
    assert "mAP@.5 " in outcome.out
    assert count_integer(Path("int8.onnx").read_bytes())[0] > 10
    boxes, scores = network(x)
    found = torch.from_numpy(*OnnxNetwork("int8.onnx").run(x.numpy()))  # [M, 7]
    for picture in range(2):
        ours = non_maximum_suppression(boxes[picture], scores[picture], conf_thres=0.25, iou_thres=0.6, max_det=10**6)
        theirs = found[found[:, 0] == picture, 1:]
        assert len(ours) == len(theirs) > 5
        torch.testing.assert_close(theirs[theirs[:, 4].argsort(descending=True), 4], ours[:, 4])


TABLE = {"mAP@.5", "mAP@.5:.95", "MB", "ms", "±", "times"}


def test_test_runs_it(command, trained):
    export_int8(command, trained)
    outcome = command("test", "--weights", "int8.onnx", "--noplots", "--workers", 0, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    assert "int8.onnx in ONNX Runtime (INT8, " in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--reduce-range"], "--reduce-range: goes with --int8 alone"),
        (["--calibrate", 5], "--calibrate: goes with --int8 alone"),
        (["--conf-thres", 0.5], "--conf-thres: goes with --nms alone"),
        (["--max-det", 5, "--output", "x.pt"], "--max-det: goes with --format onnx alone"),
        (["--int8", "--format", "pt", "--output", "x.pt"], "--int8: goes with --format onnx alone"),
        (["--calibration", "entropy", "--output", "x.pt"], "--calibration: goes with --format onnx alone"),
        (["--sensitivity"], "--sensitivity: goes with --int8 alone"),
        (["--max-drop", 0], "--max-drop: goes with --int8 alone"),
        (["--int8", "--max-drop", 2], "argument --max-drop: expected 0 to 1, gets 2"),
    ],
)
def test_flags_that_do_not_go_together(command, trained, flags, complaint):
    outcome = command("utils/export", "--weights", trained, *flags)
    assert outcome.status == 2
    assert complaint in outcome.err.splitlines()[-1]


def test_what_is_needed_is_told(command, tmp_path):
    save_weights(seeded(DEMO), tmp_path / "x.weights")
    outcome = command("utils/export", "--cfg", DEMO, "--weights", "x.weights", "--int8")
    assert outcome.status == 2
    complaint = "--int8: needs pictures to calibrate with (give a --data with train=)"
    assert complaint in outcome.err.splitlines()[-1]
    assert not Path("x.onnx").exists()
