"""What becomes of quantised convolutions in an .onnx: integer kernels that give the levels of the training."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from models import Darknet
from models.cfg import parse
from models.quant import ActivationGrid, start_steps
from models.storage import before_heads, integer_convs, limits
from models.weights import save_checkpoint
from utils.export import bits
from utils.int8 import count_integer
from utils.integer_fold import byte_levels
from utils.integer_plan import make_plan
from utils.onnx_graph import Graph
from utils.onnx_integer import IntegerWriter
from utils.onnx_layers import IMAGES
from utils.runtime import start_session

NET = "[net]\nwidth=64\nheight=64\nchannels=3\n"
STORED = f"{NET}map_bits=8\n"
HEAD = "[yolo]\nmask=0,1\nanchors=8,8, 16,16\nclasses=4\n"


def make(text: str, net: str = NET) -> Darknet:
    """Build a network whose statistics are those of noise and half of whose γ are negative."""
    torch.manual_seed(0)
    model = Darknet(parse(net + text))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.uniform_(-0.5, 1.5)
    start_steps(model, torch.rand(4, 3, 64, 64))
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(4, 3, 64, 64))
    return model.eval()


def conv(filters: int, w_bits: int, a_bits: int, activation: str = "leaky", *keys: str) -> str:
    lines = [f"w_bits={w_bits}", f"a_bits={a_bits}", f"filters={filters}", f"activation={activation}", "pad=1", *keys]
    return "\n".join(["[quan_convolutional]", "batch_normalize=1", *lines, ""])


def network(w: int, a: int, *keys: str) -> str:
    """Give a cfg with all that a quantised map may pass on its way, and more keys for its quantised layers."""
    text = "\n".join(
        [
            "[convolutional]\nbatch_normalize=1\nfilters=16\nsize=3\nstride=2\npad=1\nactivation=leaky",
            conv(32, w, a, "leaky", "size=3"),  # 1
            conv(32, w, a, "relu6", "size=3", "groups=32"),
            "[maxpool]\nsize=2\nstride=2",
            conv(16, w, a, "relu", "size=1"),
            conv(16, w, a, "linear", "size=3", "stride=2"),  # 5
            "[upsample]\nstride=2",
            "[route]\nlayers=-1,-3",
            "[channel_shuffle]\ngroups=2",
            conv(32, w, a, "elu", "size=1", "groups=2"),
            "[route]\nlayers=-1\ngroups=2\ngroup_id=1",  # 10
            conv(16, w, a, "linear", "size=3"),
            "[shortcut]\nfrom=4\nactivation=linear",
            conv(16, w, a, "swish", "size=3"),
            conv(16, w, a, "leaky", "size=3"),
            "[convolutional]\nfilters=18\nsize=1\nactivation=linear",
            HEAD,
        ]
    )
    return text.replace("[quan_convolutional]", "\n".join(("[quan_convolutional]", *keys)))


def write(model: Darknet, x: torch.Tensor) -> tuple[IntegerWriter, list[str], bytes]:
    """Write a network's graph with the levels of all maps beside the raw heads; those before an activation too."""
    g = Graph()
    writer = IntegerWriter(g, model, make_plan(model, [x]))
    with torch.inference_mode():
        raws = writer.write()
    raw, _ = g.model({IMAGES: ["batch", 3, 64, 64]}, {raw: ["b", "c", "h", "w"] for raw in raws}, {})
    for node in raw.graph.node:
        layers = {name.partition("/")[0] for name in (node.input[0], node.output[0])}  # N/… is of layer N
        for index, grid in writer.plan.before.items():
            if node.op_type == "QuantizeLinear" and layers == {str(index)}:
                writer.levels.setdefault((index, grid), node.output[0])
    for output in writer.levels.values():
        raw.graph.output.append(g.onnx.helper.make_tensor_value_info(output, g.onnx.TensorProto.UINT8, None))
    return writer, raws, raw.SerializeToString()


def find_levels(writer: IntegerWriter, data: bytes, x: torch.Tensor) -> dict[tuple[int, ActivationGrid], torch.Tensor]:
    """Run a graph of `write` and give the levels of all maps."""
    found = start_session(data, onnxruntime.SessionOptions()).run([*writer.levels.values()], {IMAGES: x.numpy()})
    return {key: torch.from_numpy(each).float() for key, each in zip(writer.levels, found, strict=True)}


DOREFA = [((), w, a) for w, a in ((1, 1), (1, 8), (2, 2), (3, 7), (4, 4), (7, 7), (7, 8), (7, 1))]
LSQ, IAO, SYMMETRIC = "method=lsq", "method=iao", "symmetric=1"
OTHERS = [
    ((LSQ,), 1, 4),
    ((LSQ,), 4, 4),
    ((LSQ,), 8, 8),
    ((LSQ, SYMMETRIC), 8, 8),
    ((IAO,), 8, 8),
    ((IAO, SYMMETRIC), 5, 6),
]


@pytest.mark.parametrize("net", [NET, STORED], ids=["", "stored"])
@pytest.mark.parametrize(("keys", "w", "a"), DOREFA + OTHERS)
@torch.inference_mode()
def test_layers_give_the_levels_of_the_training(keys: tuple[str, ...], w: int, a: int, net: str) -> None:
    model = make(network(w, a, *keys), net)
    x = torch.rand(16, 3, 64, 64)
    writer, _, data = write(model, x)
    assert ({*writer.plan.own, *writer.plan.before} == writer.plan.trained) == (net == STORED)
    levels = find_levels(writer, data, x)
    compared = 0
    for index, block in enumerate(model.blocks):
        before = writer.plan.before.get(index)
        target = before or writer.plan.own.get(index) or writer.plan.target(index)
        if index not in writer.plan.convs or target is None:
            continue
        grid = block.conv.activation_grid()
        x = (levels[model.layers[index].inputs[0], grid] - grid.zero) * grid.step
        y = block.bn(block.conv(x)) if before else block(x)
        wanted = (y / target.step + target.zero).clamp(0, target.top).round()
        apart = (levels[index, target] - wanted).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() <= (1e-3 if w < 8 else 2e-3)
        assert len(wanted.unique()) > 1
        compared += 1
    assert compared >= (1 if keys else 4)  # where steps are learned readers rarely share one


@torch.inference_mode()
def test_levels_are_off_by_one_at_most_whatever_the_statistics_say() -> None:
    model, x = make(network(7, 8)), torch.rand(4, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var[::2] = 0
    writer, _, data = write(model, x)
    levels = find_levels(writer, data, x)
    for index, block in enumerate(model.blocks[:9]):
        target = writer.plan.own.get(index) or writer.plan.target(index)
        if index in writer.plan.convs:
            grid = block.conv.activation_grid()
            y = block((levels[model.layers[index].inputs[0], grid] - grid.zero) * grid.step)
            wanted = (y / target.step + target.zero).clamp(0, target.top).round()
            assert (levels[index, target] - wanted).abs().max() <= 1


@torch.inference_mode()
def test_what_saw_no_batch_is_calibrated_alone() -> None:
    model, x = make(network(7, 8), STORED), torch.rand(2, 3, 64, 64)
    whole = make_plan(model, [x])
    model.blocks[11].levels.reset_state()
    plan = make_plan(model, [x])
    assert whole.trained - plan.trained == {11}
    assert plan.own[11] != whole.own[11]
    assert {**plan.own, 11: None} == {**whole.own, 11: None}
    assert plan.before == whole.before


def test_integers_run_wherever_the_cfg_is_quantised() -> None:
    model = make(network(7, 8))
    x = torch.rand(2, 3, 64, 64)
    _, raws, data = write(model, x)
    assert count_integer(data) == (8, 10)  # the first layer and the head are [convolutional]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        wanted = model.fuse()(x)
    for ours, theirs in zip(wanted, session.run(raws, {IMAGES: x.numpy()}), strict=True):
        assert (ours - torch.from_numpy(theirs)).std() < 0.1 * ours.std()


@torch.inference_mode()
def test_relu_holds_on_a_grid_that_it_shares_with_negative_numbers() -> None:
    layers = [conv(8, 7, 8, "linear"), conv(8, 7, 8, "relu"), "[route]\nlayers=-1,-2", "[convolutional]\nfilters=18"]
    model, x = make("\n".join([*layers, HEAD])), torch.rand(2, 3, 64, 64)
    writer, _, data = write(model, x)
    grid = writer.plan.own[1]
    assert writer.plan.own[0] == grid
    assert grid.zero > 0
    assert find_levels(writer, data, x)[1, grid].min() == grid.zero


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["linear", "relu6"])
def test_a_float_convolution_between_quantised_ones_stays_float(activation: str) -> None:
    plain = f"[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\nactivation={activation}"
    model = make("\n".join([conv(8, 7, 8, "relu"), plain, conv(8, 7, 8), "[convolutional]\nfilters=18", HEAD]))
    x = torch.rand(2, 3, 64, 64)
    writer, _, data = write(model, x)
    assert count_integer(data) == (2, 4)
    levels = find_levels(writer, data, x)
    (own,), target = writer.plan.own.values(), writer.plan.target(1)
    y = model.blocks[1]((levels[0, own] - own.zero) * own.step)
    assert (levels[1, target] - (y / target.step).clamp(0, target.top).round()).abs().mean() <= 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("bits", [1, 4])
def test_levels_of_few_bits_take_a_whole_byte_and_integer_kernels(bits: int) -> None:
    model, x = make(network(bits, bits)), torch.rand(2, 3, 64, 64)
    _, _, data = write(model, x)
    assert count_integer(data) == (8, 10)
    shifts = [node for node in onnx.load_from_string(data).graph.node if node.op_type == "BitShift"]
    assert len(shifts) == 8


def test_eight_bits_are_off_by_half_a_step() -> None:
    layer = make(network(8, 8)).blocks[1]
    levels, scale = byte_levels(layer.conv, 127)
    exact, step = layer.conv.weight_levels()
    assert exact.abs().max() == 255
    assert levels.abs().amax((1, 2, 3)).tolist() == [127] * len(levels)
    error = (levels * scale[:, None, None, None] - exact * step[:, None, None, None]).abs()
    assert 0 < error.max() <= scale.max() / 2 + 1e-9


@pytest.mark.parametrize("bits", range(1, 8))
def test_fewer_bits_are_exact(bits: int) -> None:
    conv = make(network(bits, 8)).blocks[1].conv
    levels, scale = byte_levels(conv, 127)
    exact, step = conv.weight_levels()
    assert torch.equal(levels, levels.round())
    assert levels.abs().max() <= 127
    torch.testing.assert_close(levels * scale[:, None, None, None], exact * step.double()[:, None, None, None])


def test_limits() -> None:
    unsigned, signed = ActivationGrid(0.1, 0, 255, 0.01), ActivationGrid(0.1, 128, 255, 0.1)
    assert limits(nn.LeakyReLU(0.1), unsigned) == (0, 255)
    assert limits(nn.LeakyReLU(0.1), signed) is None
    assert limits(nn.ReLU6(), unsigned) == (0, 60)
    assert limits(nn.ReLU6(), signed) == (128, 188)
    assert limits(nn.ReLU(), signed) == (128, 255)
    assert limits(nn.SiLU(), unsigned) is None
    assert limits(nn.Hardtanh(), signed) == (118, 138)


@pytest.fixture
def quantised(tmp_path: Path, scenes: Path) -> Path:
    """Write a checkpoint for the drawn pictures, one of whose quantised layers has no integer kernel."""
    text = network(8, 8).replace("w_bits=8", "w_bits=16", 1)
    names = (scenes.parent / "demo.names").read_text().split()
    described = {"cfg": NET + text, "cfg_path": "x.cfg", "names": names, "data": str(scenes)}
    save_checkpoint(tmp_path / "quantised.pt", described | {"model": make(text).state_dict()})
    return tmp_path / "quantised.pt"


def test_the_command_says_what_runs_in_integers(command, quantised):
    flags = ("--int8", "--calibrate", 4, "--img-size", 64, "--output", "int8.onnx")
    outcome = command("utils/export", "--weights", quantised, *flags)
    assert outcome.status == 0, outcome.err
    said = outcome.out + outcome.err
    for line in (
        "of the quantised multiply-adds are computed in integers",
        "in float: layers 0 (not quantised in the cfg)",
        "in float: layers 1 (more than 8 bits)",
        "in float: layers 15 (before a head)",
        "weights are moved by up to 0.",
        "INT8, 7 of 10 convolutions in integers",
    ):
        assert line in said, line
    lines = [line.split() for line in said.splitlines()]
    assert ["simulated", "INT8"] in lines
    outcome = command("test", "--weights", "int8.onnx", "--noplots", "--workers", 0, "--device", "cpu")
    assert outcome.status == 0, outcome.err


def test_flags_of_float_networks_are_refused(command, quantised):
    outcome = command("utils/export", "--weights", quantised, "--int8", "--keep-float", 1)
    assert outcome.status == 2
    assert "--keep-float: is for float networks" in outcome.err.splitlines()[-1]


@torch.inference_mode()
def test_a_quantised_convolution_before_a_head_stays_simulated() -> None:
    text = network(8, 8).replace("[convolutional]\nfilters=18", "[quan_convolutional]\nfilters=18")
    model, x = make(text), torch.rand(2, 3, 64, 64)
    writer, raws, data = write(model, x)
    assert 15 not in writer.plan.convs
    (raw,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(raws, {IMAGES: x.numpy()})
    assert len(set(raw.ravel().tolist())) > 256


def test_what_is_moved_on_its_way_to_a_head_stays_float() -> None:
    head = conv(18, 8, 8, "linear").replace("batch_normalize=1\n", "")
    layers = [
        conv(8, 8, 8),
        head,
        "[dropout]",
        HEAD,
        HEAD,
        "[route]\nlayers=1",
        "[maxpool]\nsize=1",
        HEAD,
        conv(18, 8, 8),
    ]
    model = Darknet(parse(NET + "\n".join([*layers, HEAD])))
    assert before_heads(model.layers) == {1, 2, 3, 5, 6, 8}
    assert {*integer_convs(model.layers)} == {0}


def test_bits_of_floating_point_are_not_simulated() -> None:
    cases = {(32, 32): "", (8, 32): "8", (32, 4): "4"}
    assert {(w, a): bits(Darknet(parse(f"{NET}{conv(18, w, a)}{HEAD}"))) for w, a in cases} == cases
