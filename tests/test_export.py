"""What utils.export writes: ONNX graphs that compute what the networks compute, and files that describe themselves."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from documents import code_blocks, run_python
from torch import Tensor, nn

from models import Darknet, load_cfg, load_model, save_weights
from models.activations import ACTIVATIONS
from models.layers_conv import Convolution
from models.quant import QuantConv2d
from models.weights import load_checkpoint, save_checkpoint
from tests.networks import CFGS, ROOT, SHIPPED, build, name, random, seeded
from utils.boxes import non_maximum_suppression
from utils.export import make_onnx
from utils.log import DataError
from utils.onnx_graph import Graph
from utils.onnx_heads import add_nms
from utils.onnx_layers import IMAGES, write
from utils.onnx_metadata import DECODED, DETECTED, RAW, Metadata, unpack

DEMO = ROOT / "cfg/demo.cfg"
BOUND = 1e-4  # of the largest value
LIMITS = {"conf_thres": 0.28, "iou_thres": 0.5, "max_det": 300}
# The fixtures have every section; of the shipped cfgs the smaller ones with each kind of block stand for all.
FAST = {DEMO, *(ROOT / f"cfg/{stem}.cfg" for stem in ("slim-s", "shufflenetv2-1x-hand", "mobilenetv3-small"))}
QUANTISED = [path for path in SHIPPED if path.stem.endswith("-quan")]
PARITY = [
    pytest.param(path, marks=[pytest.mark.slow] * (path in SHIPPED and path not in FAST))
    for path in CFGS
    if path not in QUANTISED
]


def describe(model: Darknet, outputs: str = RAW, *, is_fixed: bool = False) -> Metadata:
    names = tuple(str(index) for index in range(model.classes))
    return Metadata(
        outputs, names, "", model.size, is_fixed, model.channels, model.stride, tuple(model.heads), "float32", "x", ""
    )


def run(data: bytes, x: Tensor) -> list[np.ndarray]:
    """Run a graph on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {IMAGES: x.numpy()})


def noise(model: Darknet, size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.rand(batch, model.channels, *size, generator=torch.Generator().manual_seed(0))


def assert_near(found: list[np.ndarray], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for theirs, ours in zip(found, wanted, strict=True):
        assert theirs.shape == ours.shape
        is_finite = ours.isfinite().numpy()  # a random head may make a box infinite
        assert is_finite.mean() > 0.5
        error = np.abs(theirs - ours.numpy())[is_finite].max() / np.abs(ours.numpy()[is_finite]).max()
        assert error < BOUND


@pytest.mark.parametrize("path", PARITY, ids=name)
@torch.inference_mode()
def test_onnx_runtime_gives_what_pytorch_gives(path):
    model = seeded(path).fuse()
    size = (2 * model.stride, 3 * model.stride) if path in SHIPPED else model.size
    x = noise(model, size)
    graph, data = make_onnx(model, describe(model))
    onnx.checker.check_model(graph, full_check=True)
    raws = model(x)
    assert_near(run(data, x), raws)
    if model.heads:
        assert_near(run(make_onnx(model, describe(model, DECODED))[1], x), list(model.decode(raws, size)))


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * ("tiny" not in path.stem)) for path in QUANTISED], ids=name
)
@torch.inference_mode()
def test_quantised_convolutions_agree_layer_by_layer(path):
    """From layer to layer rounding errors become whole levels: each layer gets PyTorch's input."""
    model = seeded(path).fuse()
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Convolution):
            module.register_forward_hook(
                lambda module, inputs, y: seen.update({module: (inputs[0].clone(), y.clone())})
            )
    model(noise(model, (2 * model.stride, 3 * model.stride), batch=1))
    assert sum(isinstance(module.conv, QuantConv2d) for module in seen) > 5
    for module, (x, y) in seen.items():
        g = Graph()
        output = g.op("Identity", write(g, module, IMAGES), output="y")
        assert_near(run(g.model({IMAGES: x.shape}, {output: y.shape}, {})[1], x), [y])


def test_every_shipped_cfg_stands_in_a_list():
    assert {*QUANTISED, *(param.values[0] for param in PARITY)} >= {*SHIPPED}
    assert len(FAST & {*SHIPPED}) == 4
    assert len(QUANTISED) == 4


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@torch.inference_mode()
def test_activations(activation):
    layer = build(f"[activation]\nactivation={activation}", (5, 6, 7))
    x = 4 * random(2, 5, 6, 7)
    x[0, 0, 0] = torch.tensor([-4, -2, -1, 0, 1, 2, 4])  # where pieces meet
    g = Graph()
    output = g.op("Identity", write(g, layer.module, IMAGES), output="y")
    _, data = g.model({IMAGES: x.shape}, {output: x.shape}, {})
    np.testing.assert_allclose(run(data, x)[0], layer.module(x).numpy(), rtol=1e-5, atol=2e-6)


def test_any_batch_and_size_pass_unless_the_size_is_fixed():
    model = seeded(DEMO).fuse()
    free, fixed = (make_onnx(model, describe(model, is_fixed=is_fixed))[1] for is_fixed in (False, True))
    other = noise(model, (64, 96), batch=3)
    assert [each.shape[0] for each in run(free, other)] == [3, 3]
    assert [each.shape[0] for each in run(fixed, noise(model, model.size))] == [2, 2]
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(fixed, other)


def test_batch_normalisation_is_folded():
    model = seeded(DEMO)
    graph, _ = make_onnx(model, describe(model))
    kinds = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == sum(layer.widths.get("filters") == "o" for layer in model.layers)
    assert not model.is_fused


@torch.inference_mode()
def test_detections_are_those_of_our_nms():
    model = seeded(DEMO).fuse()
    x = noise(model, (64, 96))
    decoded = describe(model, DECODED)
    data, metadata = add_nms(make_onnx(model, decoded)[1], decoded, **LIMITS)
    assert metadata == replace(decoded, outputs=DETECTED, limits=metadata.limits)
    (found,) = run(data, x)  # [M, 7]
    boxes, scores = model.decode(model(x), (64, 96))
    for picture in range(2):
        ours = non_maximum_suppression(boxes[picture], scores[picture], **LIMITS)  # [N, 6]
        theirs = found[found[:, 0] == picture, 1:]
        theirs = theirs[np.argsort(-theirs[:, 4], kind="stable")]
        assert 10 < len(ours) < 300
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-3, atol=1e-3)


def test_layers_share_no_weights():
    """Two layers of equal biases must not: quantised, each has a scale of its own."""
    model = Darknet(load_cfg(DEMO)).eval()
    graph, _ = make_onnx(model, describe(model))
    tensors = [name for node in graph.graph.node if node.op_type == "Conv" for name in node.input[1:]]
    assert len(tensors) > 10
    assert len({*tensors}) == len(tensors)


def test_a_file_describes_itself():
    model = Darknet(load_cfg(ROOT / "tests/fixtures/valid/stock_sections.cfg"))
    metadata = replace(describe(model), names=("größe", "b"), data="data/x.data", is_fixed=True, cfg="[net]\n")
    graph, _ = make_onnx(model, metadata)
    properties = {each.key: each.value for each in graph.metadata_props}
    assert unpack(properties, "x.onnx") == metadata
    with pytest.raises(DataError, match=r"x\.onnx: .*expected an \.onnx of python -m utils\.export"):
        unpack({}, "x.onnx")
    with pytest.raises(DataError, match=r"x\.onnx: .*export it again"):
        unpack(properties | {"heads": "[3]"}, "x.onnx")


@pytest.fixture
def trained(tmp_path) -> Path:
    """Write a checkpoint of a small network and give its path."""
    model, path = seeded(DEMO), tmp_path / "demo.pt"
    described = {"cfg": DEMO.read_text(), "cfg_path": str(DEMO), "names": [*"abcd"], "data": "none.data"}
    save_checkpoint(path, described | {"model": model.state_dict()})
    return path


def test_the_command_writes_and_measures(command, trained):
    outcome = command("utils/export", "--weights", trained, "--img-size", 64, "--decode")
    assert outcome.status == 0, outcome.err
    graph = onnx.load(trained.with_suffix(".onnx"))
    metadata = unpack({each.key: each.value for each in graph.metadata_props}, "")
    assert (metadata.names, metadata.size, metadata.outputs) == (tuple("abcd"), (64, 64), DECODED)
    assert metadata.cfg == DEMO.read_text()
    assert [each.name for each in graph.graph.output] == ["boxes", "scores"]
    assert "differs from PyTorch by" in outcome.err + outcome.out


def test_simulated_quantisation_is_called_so(command, tmp_path):
    cfg = ROOT / "tests/fixtures/valid/quantised.cfg"
    save_weights(seeded(cfg), tmp_path / "q.weights")
    outcome = command("utils/export", "--cfg", cfg, "--weights", "q.weights", "--output", "q.onnx")
    assert outcome.status == 0, outcome.err
    assert "simulated" in outcome.err + outcome.out


def test_weights_pt_and_plain_darknet_hold_the_same_numbers(command, trained, tmp_path):
    for output in ("a.weights", "plain.cfg"):
        outcome = command("utils/export", "--weights", trained, "--output", output)
        assert outcome.status == 0, outcome.err
    outcome = command("utils/export", "--cfg", DEMO, "--weights", "a.weights", "--format", "pt")
    assert outcome.status == 0, outcome.err
    assert Path("a.weights").read_bytes() == Path("plain.weights").read_bytes()
    wanted = load_checkpoint(trained)["model"]
    for model in (load_model("plain.cfg", "plain.weights"), load_model(DEMO, "a.pt")):
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in wanted.items() if "num_batches" not in key)
    assert load_checkpoint("a.pt")["cfg"] == DEMO.read_text()


def test_plain_darknet_has_no_macros(command, tmp_path):
    cfg = ROOT / "cfg/shufflenetv2-1x-hand.cfg"
    save_weights(seeded(cfg), tmp_path / "s.weights")
    outcome = command("utils/export", "--cfg", cfg, "--weights", "s.weights", "--output", "plain.cfg")
    assert "Darknet does not know its sections [channel_shuffle], [eca]" in outcome.err + outcome.out
    assert "\n[shuffle_stage]" not in Path("plain.cfg").read_text()
    assert "[channel_shuffle]" in Path("plain.cfg").read_text()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--output", "x.tflite"], "expected a name that ends in .onnx or .weights or .pt or .cfg, gets 'x.tflite'"),
        (["--format", "pt", "--output", "x.onnx"], "expected a name that ends in .pt, gets 'x.onnx'"),
        (["--format", "weights", "--nms"], "--nms: goes with --format onnx alone"),
        (["--img-size", "65"], "--img-size 65: expected a multiple of"),
        (["--format", "pt"], "demo.pt: is read and would be written over"),
    ],
)
def test_bad_flags_are_told_in_a_line(command, trained, flags, complaint):
    outcome = command("utils/export", "--weights", trained, *flags)
    assert outcome.status == 2
    assert complaint in outcome.err
    assert "Traceback" not in outcome.err
    assert {path.name for path in trained.parent.iterdir()} == {"demo.pt"}


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(command, trained, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    outcome = command("utils/export", "--weights", trained)
    assert outcome.status == 2
    assert outcome.err == f"{package}: is not installed, and this needs it (pip install onnx onnxruntime)\n"


def test_commands_of_the_document_run(command, trained, tmp_path):
    shutil.copytree(ROOT / "cfg", tmp_path / "cfg")
    (tmp_path / "weights").mkdir()
    trained.rename(tmp_path / "weights/best.pt")
    blocks = [block for kind, block in code_blocks((ROOT / "docs/export.md").read_text()) if kind == "bash"]
    for line in blocks[0].splitlines()[1:] + blocks[-1].splitlines():
        run_python(line, command)
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {"best.onnx", "best-nms.onnx", "best.weights", "plain.cfg", "plain.weights", "speed.json"}
