"""DoReFa's quantisers against their formulas, and quantised convolutions in a network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import FIXTURES, build, random, run, seeded
from numpy_reference import convolve

from models import Darknet, load_cfg, load_model, parse, save_weights
from models.quant import ActivationGrid, Grid, QuantConv2d, quantize_activation, quantize_weight

QUANTISED = FIXTURES / "valid/quantised.cfg"
BITS = [1, 2, 4, 7, 8, 32]


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


def test_every_parameter_learns() -> None:
    model = Darknet(load_cfg(QUANTISED)).train()
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
