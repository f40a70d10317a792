"""utils.benchmark: which rows it makes, that they compute one thing, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from models.weights import save_checkpoint
from tests.networks import ROOT, seeded
from utils import benchmark, export
from utils.runtime import OnnxNetwork

DEMO = ROOT / "cfg/demo.cfg"


@pytest.fixture
def trained(tmp_path) -> Path:
    path = tmp_path / "demo.pt"
    save_checkpoint(path, {"cfg": DEMO.read_text(), "cfg_path": "demo.cfg", "model": seeded(DEMO).state_dict()})
    return path


@pytest.mark.parametrize("more", [[], ["openvino"]], ids=["default", "openvino"])
def test_every_backend_computes_the_same(trained, more):
    for package in more:
        pytest.importorskip(package)
    with torch.inference_mode():
        entries = benchmark.make_entries([str(trained)], [*benchmark.DEFAULT, *more], side=64, batch=2)
        outputs = [entry.network(entry.x) for entry in entries]
    assert [entry.backend for entry in entries] == ["eager", "fused", "onnx", *more]
    assert {*benchmark.BACKENDS} == {*benchmark.DEFAULT, "openvino"}
    assert [entry.network.is_fused for entry in entries[:2]] == [False, True]
    assert entries[1].x.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(entries[2].network, OnnxNetwork)
    for found in outputs:
        for ours, theirs in zip(outputs[0], found, strict=True):
            assert ours.shape == theirs.shape == (2, 27, *ours.shape[2:])
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_command_times_networks_and_backends_in_turn(command, trained):
    export.main(["--weights", str(trained), "--output", "demo.onnx", "--fixed", "--img-size", "64"])
    flags = ("--img-size", 64, "--backends", "eager", "onnx", "--rounds", 3, "--json", "rows.json")
    outcome = command("utils/benchmark", trained, DEMO, "demo.onnx", *flags)
    assert outcome.status == 0, outcome.err
    rows = json.loads(Path("rows.json").read_text())
    named = [(str(trained), "eager"), (str(trained), "onnx"), (str(DEMO), "eager"), (str(DEMO), "onnx")]
    assert [(row["network"], row["backend"]) for row in rows] == [*named, ("demo.onnx", "onnx")]
    for row in rows:
        assert (row["size"], row["batch"], row["rounds"]) == ([64, 64], 1, 3)
        assert row["median_ms"] > 0 <= row["spread_ms"]
        assert row["ratio"] == pytest.approx(rows[0]["median_ms"] / row["median_ms"])
    (first, *_) = (line for line in outcome.out.splitlines() + outcome.err.splitlines() if " eager " in line)
    assert first.split()[-1] == "1.00"


def test_fp32_and_int8_stand_in_one_table(command, trained, scenes):
    pytest.importorskip("openvino")
    flags = ("--weights", trained, "--data", scenes, "--img-size", 64)
    names = (scenes.parent / "demo.names").as_posix()
    assert command("utils/export", *flags, "--names", names, "--output", "a.onnx").status == 0
    outcome = command("utils/export", *flags, "--int8", "--calibrate", 4, "--output", "b.onnx")
    assert outcome.status == 0, outcome.err
    words = ("a.onnx", "b.onnx", trained, "--backends", "fused", "onnx", "openvino", "--img-size", 96, "--rounds", 2)
    outcome = command("utils/benchmark", *words, "--json", "rows.json")
    assert outcome.status == 0, outcome.err
    rows = json.loads(Path("rows.json").read_text())
    found = [(Path(row["network"]).name, row["backend"], row["arithmetic"]) for row in rows]
    runtimes = ("onnx", "openvino")
    files = [(name, runtime, kind) for name, kind in (("a.onnx", "FP32"), ("b.onnx", "INT8")) for runtime in runtimes]
    assert found == [*files, *(("demo.pt", backend, "FP32") for backend in ("fused", *runtimes))]
    assert {tuple(row["size"]) for row in rows} == {(96, 96)}
    (line,) = (
        line
        for line in outcome.out.splitlines() + outcome.err.splitlines()
        if line.startswith("b.onnx  ") and "openvino" in line
    )
    assert line.split()[1:4] == ["openvino", "INT8", "96x96"]


def test_simulated_integers_are_not_called_int8():
    quantised = str(ROOT / "tests/fixtures/valid/quantised.cfg")
    entries = benchmark.make_entries([quantised], ["eager", "onnx"], side=None, batch=1)
    assert {entry.arithmetic for entry in entries} == {"simulated"}


def test_each_file_has_its_own_size(trained):
    tiny = str(ROOT / "tests/fixtures/valid/every_section.cfg")
    entries = benchmark.make_entries([str(trained), tiny], ["eager"], side=None, batch=1)
    assert [tuple(entry.x.shape) for entry in entries] == [(1, 3, 256, 256), (1, 3, 64, 96)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["x.weights"], "x.weights: expected a name that ends in .cfg, .pt or .onnx"),
        (["x.onnx"], "x.onnx: cannot read the network: there is no such file"),
        ([str(DEMO), "--img-size", "65"], "--img-size 65: expected a multiple of"),
        ([str(DEMO), "--rounds", "1"], "expected at least 2, gets 1"),
        (["fixed.onnx", "--img-size", "96"], "fixed.onnx: takes 64x64 alone (give no --img-size)"),
    ],
)
def test_bad_words_are_told_in_a_line(command, trained, words, complaint):
    export.main(["--weights", str(trained), "--output", "fixed.onnx", "--fixed", "--img-size", "64"])
    outcome = command("utils/benchmark", *words)
    assert outcome.status == 2
    assert complaint in outcome.err.splitlines()[-1]
