"""Calibration, which layers suffer from integers, and how utils.export --int8 keeps those in float."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnxruntime import quantization

from models import Darknet
from tests.networks import ROOT, seeded
from utils import calibration, int8_sensitivity, ptq
from utils.export import describe_network, make_onnx
from utils.int8 import Calibrated, count_integer, explain, float_convolutions, layer_of, prepare
from utils.onnx_layers import IMAGES
from utils.onnx_metadata import DECODED
from utils.runtime import OnnxNetwork

DEMO = ROOT / "cfg/demo.cfg"
SIZE = (64, 64)


@pytest.fixture
def model() -> Darknet:
    return seeded(DEMO)


def export(model: Darknet):
    metadata = describe_network(model, outputs=DECODED, names=tuple("abcd"), size=SIZE)
    return make_onnx(model, metadata)[0]


def pictures(count: int = 3) -> list[np.ndarray]:
    return [np.random.default_rng(seed).random((1, 3, *SIZE), np.float32) for seed in range(count)]


def calibrated(model: Darknet, method: str = "minmax") -> Calibrated:
    return prepare(export(model), model, iter(pictures()), method=method)


def test_it_computes_what_static_quantisation_does(model, tmp_path):
    ours = calibrated(model)
    pending = iter([*({IMAGES: x} for x in pictures()), None])
    with calibration.quiet():
        quantization.quantize_static(
            export(model),
            tmp_path / "theirs.onnx",
            SimpleNamespace(get_next=pending.__next__),
            op_types_to_quantize=calibration.KINDS,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=[name for group in ours.groups for name in group.nodes],
            extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
        )
    theirs = OnnxNetwork(tmp_path / "theirs.onnx")
    found = OnnxNetwork("ours", ours.quantise([group.layer for group in ours.groups]).SerializeToString())
    x = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    for a, b in zip(found(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_group_is_a_layer_that_convolves_and_what_follows_it(model):
    groups = calibrated(model).groups
    heads = {spec.layer - 1 for spec in model.heads}
    convolve = {index for index, layer in enumerate(model.layers) if "conv.weight" in layer.tensors}
    assert [group.layer for group in groups] == sorted(convolve - heads)
    for group in groups:
        assert layer_of(group.nodes[0]) == group.layer
    nodes = [name for group in groups for name in group.nodes]
    assert len(nodes) == len(set(nodes))


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_histograms_leave_out_what_is_rare(model, method, monkeypatch):
    monkeypatch.setitem(calibration.METHODS, "percentile", ("Percentile", {"symmetric": False, "percentile": 99.0}))
    whole, clipped = (
        {name: each.range_value for name, each in calibration.calibrate(export(model), iter(pictures()), kind).items()}
        for kind in ("minmax", method)
    )
    assert whole.keys() == clipped.keys() > {IMAGES}
    maps = [name for group in calibrated(model).groups for name in group.nodes]  # not those of decoding
    for name in maps:
        low, high = clipped[name]
        assert whole[name][0] <= low < high <= whole[name][1]
    narrower = sum(np.ptp(clipped[name]) < 0.99 * np.ptp(whole[name]) for name in maps)
    assert narrower > 5 or method == "entropy"  # which begins to choose where later pictures have greater values


def test_every_picture_counts(model):
    bright = [x * (1 + 3 * (place == 1)) for place, x in enumerate(pictures())]
    for method in calibration.METHODS:
        found = calibration.calibrate(export(model), iter(bright), method)
        assert found[IMAGES].range_value[1] > 3


def test_memory_that_does_not_do_is_told_in_a_line(command, trained, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(quantization.calibrate, "create_calibrator", fail)
    outcome = command("utils/export", "--weights", trained, "--int8", "--calibration", "entropy")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("--calibration entropy: the histograms of all maps do not fit")


@torch.no_grad()
def test_a_layer_with_an_outlier_is_the_most_sensitive(model):
    """A channel a thousand times as large, which nobody reads, takes all levels of its map for itself."""
    layer = next(i for i, each in enumerate(model.layers) if i and "conv.weight" in each.tensors)
    (reader,) = (block for block, each in zip(model.blocks, model.layers, strict=True) if each.inputs == (layer,))
    block = model.blocks[layer]
    block.bn.weight[0], block.bn.bias[0] = 0, 1000
    reader.conv.weight[:, 0] = 0
    rows = int8_sensitivity.rank(calibrated(model), pictures(2))
    assert rows[0].layer in (layer, layer + 1)
    assert rows[0].error > 5 * rows[2].error > 0
    assert [row.error for row in rows] == sorted((row.error for row in rows), reverse=True)


@pytest.mark.parametrize("wanted", [0, 1, 2, 5, 6, 7, 10])
def test_the_least_number_that_holds_is_found(wanted):
    asked = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count >= wanted

    assert int8_sensitivity.least(holds, 10) == wanted
    assert len(asked) == len(set(asked)) <= 7


def test_no_number_may_hold():
    assert int8_sensitivity.least(lambda count: count > 10, 10) is None
    assert int8_sensitivity.least(lambda count: False, 0) is None


def export_int8(command, weights: Path, *flags: object):
    common = ("--int8", "--calibrate", 4, "--img-size", 64, "--output", "int8.onnx")
    return command("utils/export", "--weights", weights, *common, *flags)


def test_sensitivity_is_written_as_json_and_picture(command, trained, model):
    outcome = export_int8(command, trained, "--sensitivity", "--keep-float", 0, 1)
    assert outcome.status == 0, outcome.err
    rows = json.loads(Path("int8-sensitivity.json").read_text())
    assert {row["layer"] for row in rows if row["is_float"]} == {0, 1}
    assert [row["error"] for row in rows] == sorted((row["error"] for row in rows), reverse=True)
    assert all(0 < row["error"] < 1 and row["convolutions"] == 1 for row in rows)
    integer, convolutions = count_integer(Path("int8.onnx").read_bytes())
    assert len(rows) == integer + 2 == convolutions - len(model.heads)
    assert Path("int8-sensitivity.png").stat().st_size > 5000
    floats = float_convolutions(Path("int8.onnx").read_bytes())
    assert {layer_of(name) for name in floats} == {0, 1, *(spec.layer - 1 for spec in model.heads)}
    assert "in float: 0/Conv_0, 1/Conv_2 (as --keep-float says)" in outcome.out + outcome.err


def judge_integers(most: int):
    """Give a judge that says 0.8, and 0.7 where more convolutions than `most` are integer ones."""

    def judge(network: OnnxNetwork, *_: object) -> SimpleNamespace:
        words = network.metadata.arithmetic.split()
        return SimpleNamespace(map50=0.7 if words[0] == "INT8," and int(words[1]) > most else 0.8)

    return judge


def test_the_most_sensitive_layers_go_back_to_float_until_the_drop_holds(command, trained, model, monkeypatch):
    count = sum("conv.weight" in layer.tensors for layer in model.layers) - len(model.heads)
    monkeypatch.setattr(ptq, "judge", judge_integers(count - 3))
    outcome = export_int8(command, trained, "--max-drop", 0.05, "--sensitivity")
    assert outcome.status == 0, outcome.err
    assert count_integer(Path("int8.onnx").read_bytes())[0] == count - 3
    rows = json.loads(Path("int8-sensitivity.json").read_text())
    assert [row["is_float"] for row in rows] == [True] * 3 + [False] * (len(rows) - 3)
    assert "(sensitive: --max-drop 0.05 does not hold without)" in outcome.out + outcome.err


def test_where_no_number_of_floats_holds_nothing_is_written(command, trained, monkeypatch):
    monkeypatch.setattr(ptq, "judge", judge_integers(0))
    outcome = export_int8(command, trained, "--max-drop", 0.05, "--sensitivity")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("--max-drop 0.05: mAP@.5 drops by 0.1000 at least")
    assert not list(Path().glob("int8*"))


def test_a_layer_that_is_no_candidate_is_refused(command, trained, model):
    head = model.heads[0].layer - 1
    outcome = export_int8(command, trained, "--keep-float", head)
    assert outcome.status == 2
    complaint = f"--keep-float {head}: has no convolution that would compute in integers (those that would are 0, 1, "
    assert outcome.err.splitlines()[-1].startswith(complaint)


def test_a_drop_needs_pictures_to_test_on(command, trained, scenes):
    Path("train.data").write_text("".join(line for line in scenes.read_text().splitlines(True) if "valid" not in line))
    text = (
        Path("train.data")
        .read_text()
        .replace("train=", f"train={scenes.parent}/")
        .replace("names=", f"names={scenes.parent}/")
    )
    Path("train.data").write_text(text)
    outcome = export_int8(command, trained, "--max-drop", 0.05, "--data", "train.data")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == "--max-drop: needs pictures to test on (give a --data with valid=)"


def test_every_float_convolution_has_its_reason(model):
    """One layer is kept, of another nothing is known, and those before heads stand in no group."""
    ours = calibrated(model)
    layers = [group.layer for group in ours.groups]
    data = ours.quantise(layers[2:]).SerializeToString()
    reasons = explain(data, ours, {layers[0]: "wanted"})
    assert {reason: [layer_of(name) for name in names] for reason, names in reasons.items()} == {
        "wanted": layers[:1],
        "no integer kernel": layers[1:2],
        "before a head": [spec.layer - 1 for spec in model.heads],
    }


def test_a_neighbour_without_an_integer_kernel_is_named(model):
    ours = calibrated(model)
    data = ours.quantise([group.layer for group in ours.groups[1:]]).SerializeToString()
    for node in ours.graph.graph.node:
        if node.name.startswith(f"{ours.groups[0].layer}/") and node.op_type == "LeakyRelu":
            node.op_type = "Mish"
    assert explain(data, ours, {})["no integer kernel: beside it Mish"] == [ours.groups[0].nodes[0]]
