"""Quantisers against their formulas and by hand, quantised convolutions in a network, and what files hold of them."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import FIXTURES, build, random, run, seeded
from numpy_reference import convolve

from models import Darknet, WeightsError, dump, load_cfg, load_model, load_weights, parse, save_weights
from models.grid import Grid
from models.layers_conv import Convolution
from models.quant import ActivationGrid, QuantConv2d, start_steps
from models.quantisers import quantize_activation, quantize_weight
from models.weights import save_checkpoint
from utils.recipe import Recipe
from utils.schedule import make_optimizer

QUANTISED = FIXTURES / "valid/quantised.cfg"
STEPS = FIXTURES / "valid/quantised_steps.cfg"
STEPS_TEXT = STEPS.read_text()
KEYS = re.compile(r"^(method|symmetric|[wa]_(bits|range))=.*\n", re.MULTILINE)
FLOAT_TEXT = KEYS.sub("", re.sub(r"\[(quan|quantize|IAO)_conv", "[conv", STEPS_TEXT))
METHODS = [("dorefa", False), ("lsq", False), ("lsq", True), ("iao", False), ("iao", True)]
BITS = [1, 2, 4, 7, 8, 32]


def seeded_text(text: str) -> Darknet:
    torch.manual_seed(0)
    return Darknet(parse(text)).eval()


def write(model: Darknet, path: Path) -> None:
    if path.suffix == ".weights":
        save_weights(model, path)
    else:
        save_checkpoint(path, {"cfg": dump(model.cfg), "model": model.state_dict()})


def weights_by_formula(w: np.ndarray, k: int) -> np.ndarray:
    if k == 32:
        return w
    if k == 1:
        return np.where(w >= 0, 1, -1) * np.abs(w).mean()
    n, t = 2**k - 1, np.tanh(w)
    return 2 * np.round((t / (2 * np.abs(t).max()) + 0.5) * n) / n - 1


def activations_by_formula(x: np.ndarray, k: int, r: float) -> np.ndarray:
    return x if k == 32 else np.round(np.clip(x / r, 0, 1) * (2**k - 1)) / (2**k - 1)


@pytest.mark.parametrize("k", BITS)
def test_weights(k: int) -> None:
    w = random(8, 4, 3, 3).double()
    q = quantize_weight(w, k)
    np.testing.assert_allclose(q, weights_by_formula(w.numpy(), k), atol=1e-14)
    if 1 < k < 32:
        n = 2**k - 1
        levels = q * n
        np.testing.assert_allclose(levels, levels.round(), atol=1e-9)
        assert (levels.round() % 2 == 1).all()  # odd integers, as n is odd
        assert q.abs().max() == 1


@pytest.mark.parametrize("limit", [1.0, 10.0])
@pytest.mark.parametrize("k", BITS)
def test_activations(k: int, limit: float) -> None:
    x = random(2, 3, 8, 8).double() * limit
    q = quantize_activation(x, k, limit)
    np.testing.assert_allclose(q, activations_by_formula(x.numpy(), k, limit), atol=1e-14)
    if k < 32:
        assert {*q.unique().tolist()} <= {level / (2**k - 1) for level in range(2**k)}
        assert (q.min(), q.max()) == (0, 1)


@pytest.mark.parametrize("k", BITS)
def test_the_gradient_is_that_of_the_formula_without_rounding(k: int) -> None:
    w, x = random(40).double().requires_grad_(), (random(40).double() * 8).requires_grad_()
    scale = torch.linspace(-1, 1, 40).double()
    (quantize_weight(w, k) * scale).sum().backward()
    (quantize_activation(x, k, 10) * scale).sum().backward()
    smooth_w, smooth_x = w.detach().requires_grad_(), x.detach().requires_grad_()
    t = smooth_w.tanh()
    ((smooth_w if k in (1, 32) else t / t.abs().max()) * scale).sum().backward()
    ((smooth_x if k == 32 else (smooth_x / 10).clamp(0, 1)) * scale).sum().backward()
    torch.testing.assert_close(w.grad, smooth_w.grad)
    torch.testing.assert_close(x.grad, smooth_x.grad)
    if k < 32:
        assert (x.grad == 0).equal((x < 0) | (x > 10))


@pytest.mark.parametrize("k", BITS)
def test_numbers_do_not_depend_on_the_gradient(k: int) -> None:
    w = random(64)
    with_grad = w.clone().requires_grad_()
    assert torch.equal(quantize_weight(with_grad, k), quantize_weight(w, k))
    assert torch.equal(quantize_activation(with_grad, k, 1), quantize_activation(w, k, 1))


@pytest.mark.parametrize("k", BITS)
def test_weights_of_zero_are_no_nan(k: int) -> None:
    assert quantize_weight(torch.zeros(2, 2, 3, 3), k).isfinite().all()


@pytest.mark.parametrize("name", ["quan_convolutional", "quantize_convolutional"])
@pytest.mark.parametrize(
    ("keys", "grid"),
    [("", Grid(8, 8, 10)), ("w_bits=1\na_bits=2\na_range=1.5", Grid(1, 2, 1.5)), ("a_bits=32", Grid(8, 32, 10))],
)
def test_section(name: str, keys: str, grid: Grid) -> None:
    text = f"filters=6\nsize=3\nstride=2\npad=1\ngroups=2\nactivation=leaky\n{keys}"
    layer, x = build(f"[{name}]\n{text}", (4, 6, 7)), random(1, 4, 6, 7) * 2
    plain = build("[convolutional]\n" + text.removesuffix(keys), (4, 6, 7))
    conv = layer.module.conv
    assert (conv.grid, layer.tensors, layer.flops) == (grid, plain.tensors, plain.flops)
    levels = activations_by_formula(x[0].numpy(), grid.a_bits, grid.a_range)
    expected = convolve(levels, weights_by_formula(conv.weight.detach().numpy(), grid.w_bits), (2, 2), 1, 2)
    expected += conv.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(run(layer, x)[0], np.where(expected > 0, expected, 0.1 * expected), atol=1e-5)


def test_a_network_of_32_bits_is_a_float_one_with_the_same_weights_file(tmp_path: Path) -> None:
    layers = (
        "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\npad=1\nactivation=leaky\n[convolutional]\nfilters=6\n"
    )
    text = f"[net]\nheight=12\nwidth=16\n{layers}[yolo]\nclasses=1\nanchors=8,8\n"
    model = Darknet(parse(text.replace("[convolutional]", "[quan_convolutional]\nw_bits=32\na_bits=32"))).eval()
    save_weights(model, tmp_path / "a.weights")
    plain, x = load_model(parse(text), tmp_path / "a.weights"), random(1, 3, 12, 16)
    assert (type(model.blocks[0].conv), type(plain.blocks[0].conv)) == (QuantConv2d, torch.nn.Conv2d)
    with torch.inference_mode():
        assert torch.equal(model(x)[0], plain(x)[0])


def test_a_fused_network_equals_the_unfused() -> None:
    model, x = seeded(QUANTISED).double(), random(2, 3, 64, 96).double()
    model.blocks[1].bn.weight.data[::2] *= -1
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = model.fuse()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        torch.testing.assert_close(fused(x)[0], model(x)[0], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_weights_round_trip(tmp_path: Path) -> None:
    model, x = seeded(QUANTISED), random(1, 3, 64, 96)
    save_weights(model, tmp_path / "a.weights")
    again = load_model(load_cfg(QUANTISED), tmp_path / "a.weights")
    save_weights(again, tmp_path / "b.weights")
    assert (tmp_path / "a.weights").read_bytes() == (tmp_path / "b.weights").read_bytes()
    with torch.inference_mode():
        assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize("path", [QUANTISED, STEPS])
def test_every_parameter_learns(path: Path) -> None:
    model = Darknet(load_cfg(path)).train()
    model(random(2, 3, 64, 96))[0].square().mean().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("bits", [1, 2, 7, 8, 9, 32])
def test_integers_are_what_the_convolution_reads(bits: int) -> None:
    conv, x = QuantConv2d(4, 6, 3, groups=2, bias=False, grid=Grid(bits, bits, 3)), random(1, 4, 5, 5) * 3
    grid, found = conv.activation_grid(), conv.weight_levels()
    if bits > 8:
        assert grid is found is None
        return
    levels, scale = found
    n = 2**bits - 1
    assert grid == ActivationGrid(3 / n, 0, n, 1 / n)
    assert (levels.dtype, levels.shape, scale.shape) == (torch.int16, (6, 2, 3, 3), (6,))
    assert (levels.abs() <= n).all()
    assert (levels % 2 == 1).all()
    read = grid.value * ((x / grid.step).round() + grid.zero).clamp(0, grid.top).sub(grid.zero)
    expected = torch.nn.functional.conv2d(read, levels * scale[:, None, None, None], groups=2)
    torch.testing.assert_close(conv(x), expected)


def test_learned_steps_by_hand() -> None:
    """3 bits: levels -4..3; two filters of two weights with steps 0.5 and 0.1."""
    conv = QuantConv2d(2, 2, 1, bias=False, grid=Grid(3, 32, 10, "lsq"))
    conv.weight.data = torch.tensor([[0.6, -2.5], [0.26, 0.04]])[..., None, None]
    conv.w_step.data = torch.tensor([0.5, 0.1])
    levels, scale = conv.weight_levels()
    assert levels[..., 0, 0].tolist() == [[1, -4], [3, 0]]
    assert scale.equal(conv.w_step)
    x = torch.tensor([10.0, 100.0])[None, :, None, None]
    out = conv(x)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.5 * 10 - 2 * 100, 0.3 * 10 + 0 * 100]))
    out.sum().backward()
    assert conv.weight.grad[..., 0, 0].tolist() == [[10, 0], [10, 100]]  # what saturates learns nothing
    first = 10 * (1 - 1.2) + 100 * -4  # round(u) - u inside, the limit beyond
    second = 10 * (3 - 2.6) + 100 * (0 - 0.4)
    torch.testing.assert_close(conv.w_step.grad, torch.tensor([first, second]) / (2 * 3) ** 0.5)


def test_learned_steps_of_one_bit_by_hand() -> None:
    conv = QuantConv2d(3, 1, 1, bias=False, grid=Grid(1, 32, 10, "lsq"))
    conv.weight.data = torch.tensor([[0.3, -0.1, 0.8]])[..., None, None]
    conv.reset_state()
    torch.testing.assert_close(conv.w_step.data, torch.tensor([0.4]))  # the mean magnitude
    out = conv(torch.tensor([1.0, 10.0, 100.0])[None, :, None, None])
    torch.testing.assert_close(out.flatten(), torch.tensor([0.4 * (1 - 10 + 100)]))
    out.backward()
    assert conv.weight.grad.flatten().tolist() == [1, 10, 0]
    expected = 1 * (1 - 0.75) + 10 * (-1 + 0.25) + 100 * 1
    torch.testing.assert_close(conv.w_step.grad, torch.tensor([expected / 3**0.5]))


@pytest.mark.parametrize(
    ("grid", "inputs", "levels"),
    [
        (Grid(32, 2, 10, "lsq"), [-1, 0.2, 0.3, 0.6, 9], [0, 0, 1, 1, 3]),
        (Grid(32, 2, 10, "lsq", True), [-9, -0.3, 0.2, 0.6, 9], [-2, -1, 0, 1, 1]),
        (Grid(32, 1, 10, "lsq"), [-1, 0.2, 0.3, 0.6, 9], [0, 0, 1, 1, 1]),
    ],
)
def test_learned_steps_of_inputs_by_hand(grid: Grid, inputs: list[float], levels: list[int]) -> None:
    conv = QuantConv2d(1, 1, 1, bias=False, grid=grid)
    conv.weight.data.fill_(1)
    conv.a_step.data.fill_(0.5)
    x = torch.tensor(inputs).view(1, 1, 1, 5).requires_grad_()
    out = conv(x)
    assert out.flatten().tolist() == [0.5 * level for level in levels]
    low, high = grid.input_levels
    assert conv.activation_grid() == ActivationGrid(0.5, -low, high - low, 0.5)
    out.sum().backward()
    u = [value / 0.5 for value in inputs]
    is_inside = [low < each < high for each in u]
    assert x.grad.flatten().tolist() == is_inside
    slopes = sum(q - each * inside for q, each, inside in zip(levels, u, is_inside, strict=True))
    torch.testing.assert_close(conv.a_step.grad, torch.tensor([slopes / (5 * high) ** 0.5]))


def test_a_step_that_learned_its_way_below_zero_is_a_small_one() -> None:
    conv, x = QuantConv2d(1, 1, 1, bias=False, grid=Grid(32, 8, 10, "lsq")), torch.ones(1, 1, 1, 1)
    conv.a_step.data.fill_(-0.5)
    assert conv.activation_grid().step == pytest.approx(1e-8)
    out = conv(x)
    torch.testing.assert_close(out, 255e-8 * conv.weight.data)
    out.sum().backward()
    assert conv.a_step.grad  # so that it may grow again


def test_8_bit_weights_are_symmetric() -> None:
    """-128 is left out, as ONNX's symmetric int8 has it."""
    assert [Grid(bits, 8, 10, "lsq").weight_levels for bits in (2, 4, 8, 16)] == [
        (-2, 1),
        (-8, 7),
        (-127, 127),
        (-32768, 32767),
    ]
    assert [Grid(bits, 8, 10, "iao").weight_levels for bits in (2, 8)] == [(-1, 1), (-127, 127)]


def test_steps_start_from_weights_and_from_a_batch() -> None:
    conv = QuantConv2d(3, 5, 3, grid=Grid(4, 8, 6, "lsq"))
    torch.testing.assert_close(conv.w_step.data, 2 * conv.weight.abs().mean((1, 2, 3)) / 7**0.5)
    assert conv.is_fresh
    assert conv.a_step.item() == pytest.approx(6 / 255)  # a_range, until a batch is seen
    model, x = torch.nn.Sequential(torch.nn.BatchNorm2d(3), conv), random(4, 3, 8, 8)
    assert start_steps(model, x) == 1
    normalised = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, unbiased=False)
    torch.testing.assert_close(conv.a_step.data, 2 * normalised.abs().mean()[None] / 255**0.5, rtol=1e-4, atol=0)
    assert not model[0].running_mean.any()
    assert start_steps(model, 2 * x) == 0


def test_ranges_seen_by_hand() -> None:
    """2 bits: levels 0..3; the range -0.5..1 has the step 0.5 and the zero point 1."""
    conv = QuantConv2d(1, 1, 1, bias=False, grid=Grid(32, 2, 4, "iao")).train()
    conv.weight.data.fill_(1)
    assert conv.activation_grid() == ActivationGrid(pytest.approx(4 / 3), 0, 3, pytest.approx(4 / 3))
    x = torch.tensor([-0.5, -0.2, 0.3, 0.8, 1]).view(1, 1, 1, 5).requires_grad_()
    out = conv(x)
    assert out.flatten().tolist() == [-0.5, 0, 0.5, 1, 1]
    assert conv.a_limits.tolist() == [-0.5, 1]
    assert conv.activation_grid() == ActivationGrid(0.5, 1, 3, 0.5)
    conv(torch.full((1, 1, 2, 2), 3.0))
    torch.testing.assert_close(conv.a_limits, torch.tensor([0.99 * -0.5, 0.99 + 0.01 * 3]))  # 0 belongs to every range
    conv.eval()(torch.full((1, 1, 2, 2), 99.0))
    torch.testing.assert_close(conv.a_limits, torch.tensor([0.99 * -0.5, 0.99 + 0.01 * 3]))
    conv.a_limits.copy_(torch.tensor([-0.5, 1]))
    far = torch.tensor([-2, -0.4, 0.9, 1.1]).view(1, 1, 1, 4).requires_grad_()
    conv(far).sum().backward()
    assert far.grad.flatten().tolist() == [0, 1, 1, 0]


def test_the_zero_point_is_nudged_to_a_level() -> None:
    conv = QuantConv2d(1, 1, 1, bias=False, grid=Grid(32, 8, 4, "iao"))
    conv.a_limits.copy_(torch.tensor([-0.1, 0.93]))
    grid = conv.activation_grid()
    assert grid.zero == round(0.1 / (1.03 / 255))
    conv.weight.data.fill_(1)
    assert conv(torch.zeros(1, 1, 1, 1)).item() == 0


def test_ranges_may_be_symmetric() -> None:
    conv = QuantConv2d(1, 1, 1, bias=False, grid=Grid(32, 3, 4, "iao", True)).train()
    conv.weight.data.fill_(1)
    out = conv(torch.tensor([-0.6, 0.25, 0.5]).view(1, 1, 1, 3))  # the step is 0.6/3
    torch.testing.assert_close(out.flatten(), torch.tensor([-0.6, 0.2, 0.4]))
    assert conv.activation_grid()[1:3] == (4, 7)


def test_weights_of_a_range_by_hand() -> None:
    """2 bits: -1..1 times the greatest magnitude of a filter; the gradient passes."""
    conv = QuantConv2d(2, 2, 1, bias=False, grid=Grid(2, 32, 4, "iao"))
    conv.weight.data = torch.tensor([[0.6, -2], [0, 0]])[..., None, None]
    levels, scale = conv.weight_levels()
    assert levels[..., 0, 0].tolist() == [[0, -1], [0, 0]]
    assert scale[0] == 2
    out = conv(torch.tensor([10.0, 100.0])[None, :, None, None])
    assert out.flatten().tolist() == [-200, 0]
    out.sum().backward()
    assert conv.weight.grad[..., 0, 0].tolist() == [[10, 100], [10, 100]]


GRIDS = [Grid(w, a, 3, method, s) for method, s in METHODS for w, a in ((8, 8), (7, 3), (3, 7), (2, 2))]
GRIDS += [Grid(1, 1, 3), Grid(1, 1, 3, "lsq"), Grid(2, 1, 3, "iao")]


@pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda grid: f"{grid.method}{grid.w_bits}-{grid.a_bits}-{grid.is_symmetric}"
)
def test_integers_of_every_method_baked_or_not(grid: Grid) -> None:
    """Integers, folded with batch normalisation too, are what the float arithmetic computes."""
    layer = Convolution(QuantConv2d(4, 6, 3, groups=2, bias=False, grid=grid), *(torch.nn.Identity() for _ in range(3)))
    layer.bn, conv = torch.nn.BatchNorm2d(6), layer.conv
    layer.bn.weight.data[::2] *= -1.5
    x = random(2, 4, 5, 5) * 2
    start_steps(layer.train(), x)
    layer(x)
    expected = layer.eval()(x)
    levels, scale = conv.weight_levels()
    fused = copy.deepcopy(layer)
    fused.fuse()
    again, folded = fused.conv.weight_levels()
    assert again.equal(levels)
    norm = layer.bn
    torch.testing.assert_close(folded, scale * norm.weight / (norm.running_var + norm.eps).sqrt())
    inputs = conv.activation_grid()
    assert fused.conv.activation_grid() == inputs
    read = ((x / inputs.step).round() + inputs.zero).clamp(0, inputs.top).sub(inputs.zero) * inputs.value
    out = torch.nn.functional.conv2d(read, levels * folded[:, None, None, None], fused.conv.bias, groups=2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "is_symmetric"), METHODS)
def test_32_bits_are_float_bit_for_bit(method: str, is_symmetric: bool) -> None:
    conv, x = QuantConv2d(4, 6, 3, grid=Grid(32, 32, 3, method, is_symmetric)), random(2, 4, 5, 5)
    assert conv(x).equal(torch.nn.functional.conv2d(x, conv.weight, conv.bias))
    assert [*conv.state_dict()] == ["weight", "bias"]


@pytest.mark.parametrize("suffix", [".pt", ".weights"])
def test_float_weights_load_into_quantised_cfgs(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of weights come from the weights, those of inputs and the ranges from a_range; a log line says so."""
    caplog.set_level("INFO", "darkslim")
    plain = seeded_text(FLOAT_TEXT)
    write(plain, tmp_path / f"float{suffix}")
    model = load_model(parse(STEPS_TEXT), tmp_path / f"float{suffix}")
    assert "has no steps or ranges for 7 layers" in caplog.text
    for conv in (module for module in model.modules() if isinstance(module, QuantConv2d)):
        fresh = copy.deepcopy(conv)
        fresh.reset_state()
        assert all(getattr(conv, name).equal(getattr(fresh, name)) for name in conv.state)
    state = model.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in plain.state_dict().items())


def test_a_part_of_a_float_file_loads_too(tmp_path: Path) -> None:
    plain = seeded_text(FLOAT_TEXT)
    save_weights(plain, tmp_path / "part.weights", 3)
    model = Darknet(parse(STEPS_TEXT))
    assert load_weights(model, tmp_path / "part.weights") == [0, 1, 2]
    assert model.blocks[2].conv.weight.equal(plain.blocks[2].conv.weight)


def test_steps_round_trip(tmp_path: Path) -> None:
    model, x = seeded_text(STEPS_TEXT), random(1, 3, 64, 96)
    start_steps(model, x)
    model.train()(x)
    for suffix in (".pt", ".weights"):
        write(model, tmp_path / f"a{suffix}")
        again = load_model(parse(STEPS_TEXT), tmp_path / f"a{suffix}")
        state = again.state_dict()
        assert all(
            tensor.equal(state[name]) for name, tensor in model.state_dict().items() if "num_batches" not in name
        )


def test_quantised_weights_load_into_the_float_cfg(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "darkslim")
    model = seeded_text(STEPS_TEXT)
    write(model, tmp_path / "a.pt")
    plain = load_model(parse(FLOAT_TEXT), tmp_path / "a.pt")
    assert "has 10 steps or ranges too many" in caplog.text
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    save_weights(model, tmp_path / "a.weights")
    with pytest.raises(WeightsError, match=r"is too long: .* those of method=lsq, iao or map_bits=8 load as \.pt"):
        load_model(parse(FLOAT_TEXT), tmp_path / "a.weights")


def test_steps_of_other_bits_start_afresh(tmp_path: Path) -> None:
    model = seeded_text(STEPS_TEXT)
    for conv in (module for module in model.modules() if isinstance(module, QuantConv2d)):
        for name in conv.state:
            getattr(conv, name).data.mul_(3)
    write(model, tmp_path / "a.pt")
    coarse = load_model(parse(STEPS_TEXT.replace("w_bits=4\na_bits=4", "w_bits=3\na_bits=4")), tmp_path / "a.pt")
    ours, theirs = (network.blocks[2].conv for network in (coarse, model))
    torch.testing.assert_close(ours.w_step, 2 * ours.weight.abs().mean((1, 2, 3)) / 3**0.5)
    assert ours.a_step.equal(theirs.a_step)
    assert coarse.blocks[1].conv.w_step.equal(model.blocks[1].conv.w_step)


def test_steps_get_no_weight_decay() -> None:
    model = Darknet(parse(STEPS_TEXT))
    groups = make_optimizer(model, Recipe()).param_groups
    free = {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}
    steps = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("_step")}
    assert steps
    assert steps <= free
