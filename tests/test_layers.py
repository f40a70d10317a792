"""Every section against what Darknet computes, written as plain loops over numbers (darknet-format.md §2.2, §2.3)."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CFGS, SHIPPED, build, name, random, run
from numpy_reference import convolve, max_pool, sigmoid
from torch import nn

from models import Darknet, load_cfg
from models.activations import ACTIVATIONS
from models.layers_conv import Convolution


@pytest.mark.parametrize("H", [5, 8])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("padding", ["", "padding=0", "padding=1", "padding=2"])
def test_maxpool(size: int, stride: int, padding: str, H: int) -> None:
    layer = build(f"[maxpool]\nsize={size}\nstride={stride}\n{padding}", (2, H, 7))
    x = random(1, 2, H, 7) - 4  # all negative: a zero in the padding would win
    expected = max_pool(x[0].numpy(), size, (stride, stride), int(padding[8:] or size - 1))
    assert np.array_equal(run(layer, x)[0], expected)


def test_maxpool_reads_its_keys_as_darknet_does() -> None:
    x = random(1, 2, 9, 9)
    plain = build("[maxpool]\nstride=3", (2, 9, 9))  # size=stride
    assert np.array_equal(run(plain, x)[0], max_pool(x[0].numpy(), 3, (3, 3), 2))
    unequal = build("[maxpool]\nsize=3\nstride=2\nstride_x=1", (2, 9, 9))
    assert np.array_equal(run(unequal, x)[0], max_pool(x[0].numpy(), 3, (2, 1), 2))
    assert unequal.stride == (2, 1)


@pytest.mark.parametrize(
    ("keys", "stride", "padding", "groups"),
    [
        ("size=1", (1, 1), 0, 1),
        ("size=3", (1, 1), 0, 1),
        ("size=3\npad=1", (1, 1), 1, 1),
        ("size=5\npad=1\nstride=2", (2, 2), 2, 1),
        ("size=2\npad=1\nstride=2", (2, 2), 1, 1),
        ("size=3\npadding=2\nstride_x=2", (1, 2), 2, 1),
        ("size=3\npadding=2\nstride=2\nstride_x=-1", (2, 2), 2, 1),
        ("size=5\npad=1\npadding=1\nstride_y=3", (3, 1), 2, 1),  # pad wins
        ("size=3\npad=1\ngroups=2", (1, 1), 1, 2),
        ("size=3\npad=1\ngroup=4", (1, 1), 1, 4),
    ],
)
def test_convolution(keys: str, stride: tuple[int, int], padding: int, groups: int) -> None:
    layer = build(f"[convolutional]\nfilters=8\nactivation=linear\n{keys}", (4, 6, 7))
    x, conv = random(1, 4, 6, 7), layer.module.conv
    expected = convolve(x[0].numpy(), conv.weight.detach().numpy(), stride, padding, groups)
    expected += conv.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(run(layer, x)[0], expected, atol=1e-5)
    assert layer.stride == stride
    assert layer.flops == 2 * expected.size * conv.weight[0].numel()
    assert tuple(layer.tensors) == ("conv.bias", "conv.weight")


def test_batch_normalisation_stands_between_convolution_and_activation() -> None:
    layer = build("[convolutional]\nfilters=2\nbatch_normalize=1\nactivation=leaky", (3, 4, 4))
    bn, x = layer.module.bn, random(1, 3, 4, 4)
    for tensor, value in ((bn.weight, 2.0), (bn.bias, -1.0), (bn.running_mean, 0.25), (bn.running_var, 4.0)):
        tensor.data.fill_(value)
    raw = convolve(x[0].numpy(), layer.module.conv.weight.detach().numpy(), (1, 1), 0, 1)
    expected = 2 * (raw - 0.25) / math.sqrt(4 + bn.eps) - 1
    np.testing.assert_allclose(run(layer, x)[0], np.where(expected > 0, expected, 0.1 * expected), atol=1e-5)
    assert tuple(layer.tensors) == ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var", "conv.weight")


def test_a_convolution_without_activation_is_logistic_and_has_one_filter() -> None:
    layer, x = build("[convolutional]", (3, 2, 2)), random(1, 3, 2, 2)
    conv = layer.module.conv
    raw = convolve(x[0].numpy(), conv.weight.detach().numpy(), (1, 1), 0, 1) + conv.bias.item()
    np.testing.assert_allclose(run(layer, x)[0], 1 / (1 + np.exp(-raw)), atol=1e-6)


# Darknet's scalar functions; hard_sigmoid is ours
FORMULAS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "leaky": lambda x: x if x > 0 else 0.1 * x,
    "revleaky": lambda x: x if x > 0 else 0.1 * x,
    "relie": lambda x: x if x > 0 else 0.01 * x,
    "relu": lambda x: x if x > 0 else 0,
    "relu6": lambda x: min(max(x, 0), 6),
    "elu": lambda x: x if x >= 0 else math.exp(x) - 1,
    "selu": lambda x: 1.0507 * (x if x >= 0 else 1.6732 * (math.exp(x) - 1)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(0.797885 * x + 0.035677 * x**3)),
    "logistic": sigmoid,
    "loggy": lambda x: 2 * sigmoid(x) - 1,
    "hard_sigmoid": lambda x: min(max(x + 3, 0), 6) / 6,
    "tanh": math.tanh,
    "hardtan": lambda x: min(max(x, -1), 1),
    "lhtan": lambda x: 0.001 * x if x < 0 else 0.001 * (x - 1) + 1 if x > 1 else x,
    "ramp": lambda x: x * (x > 0) + 0.1 * x,
    "plse": lambda x: 0.01 * (x + 4) if x < -4 else 0.01 * (x - 4) + 1 if x > 4 else 0.125 * x + 0.5,
    "stair": lambda x: math.floor(x / 2) if math.floor(x) % 2 == 0 else x - math.floor(x) + math.floor(x / 2),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "hard_mish": lambda x: x if x > 0 else x * x / 2 + x if x > -2 else 0,
    "swish": lambda x: x * sigmoid(x),
    "hard_swish": lambda x: x * min(max(x + 3, 0), 6) / 6,
}
ALIASES = {"none": "linear", "silu": "swish", "h_swish": "hard_swish", "HardSwish": "hard_swish"}
# of the channels of one pixel
CHANNEL_FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normalize_channels": lambda x: np.maximum(x, 0) / (np.maximum(x, 0).sum() + 1e-4),
    "normalize_channels_softmax": lambda x: np.exp(x) / (np.exp(x).sum() + 1e-4),
    "normalize_channels_softmax_maxval": lambda x: np.exp(x - x.max()) / (np.exp(x - x.max()).sum() + 1e-4),
}


def test_every_activation_has_its_formula() -> None:
    assert set(ACTIVATIONS) == {*FORMULAS, *ALIASES, *CHANNEL_FORMULAS}


@pytest.mark.parametrize("activation", [*FORMULAS, *ALIASES])
def test_activation(activation: str) -> None:
    x = torch.linspace(-8, 8, 129)  # steps of 1/8: every corner of every function is among them
    expected = [FORMULAS[ALIASES.get(activation, activation)](value) for value in x.tolist()]
    np.testing.assert_allclose(
        ACTIVATIONS[activation]()(x).numpy(), expected, atol=2e-4 if activation == "selu" else 2e-6
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_section_leaves_the_map_that_others_read(activation: str) -> None:
    layer, x = build(f"[activation]\nactivation={activation}", (4, 2, 3)), random(1, 4, 2, 3)
    before = x.clone()
    expected = ACTIVATIONS[activation]()(x.clone())
    assert np.array_equal(run(layer, x), expected.numpy())
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", CHANNEL_FORMULAS)
def test_activation_over_the_channels(activation: str) -> None:
    x = random(2, 5, 3, 4)
    x[0, :, 0, 0] = -1  # no positive channel at all
    y = ACTIVATIONS[activation]()(x).numpy()
    for b, i, j in np.ndindex(2, 3, 4):
        expected = CHANNEL_FORMULAS[activation](x[b, :, i, j].numpy())
        np.testing.assert_allclose(y[b, :, i, j], expected, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_lets_gradients_through(activation: str) -> None:
    x = (random(2, 4, 3, 3) + 0.3).requires_grad_()
    ACTIVATIONS[activation]()(x * 1).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize(
    ("keys", "channels"),
    [
        ("layers=-1", [[10, 11, 12, 13]]),
        ("layers=0, -1", [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13]]),
        ("layers=1,0", [[10, 11, 12, 13], [0, 1, 2, 3, 4, 5]]),
        ("layers=-1,-1", [[10, 11, 12, 13]] * 2),
        ("layers=-1\ngroups=2", [[10, 11]]),
        ("layers=-1\ngroups=4\ngroup_id=2", [[12]]),
        ("layers=0,1\ngroups=2\ngroup_id=1", [[3, 4, 5], [12, 13]]),
    ],
)
def test_route(keys: str, channels: list[list[int]]) -> None:
    layer = build(f"[route]\n{keys}", (6, 2, 3), (4, 2, 3))
    outputs = [torch.arange(first, first + C).view(1, C, 1, 1).expand(1, C, 2, 3) for first, C in ((0, 6), (10, 4))]
    y = run(layer, *(outputs[index] for index in layer.inputs))
    assert y[0, :, 1, 2].tolist() == [channel for each in channels for channel in each]


@pytest.mark.parametrize(("below", "above"), [(4, 4), (6, 4), (4, 6)])
def test_shortcut_adds_the_channels_that_both_have(below: int, above: int) -> None:
    layer = build("[shortcut]\nfrom=0\nactivation=relu", (below, 2, 3), (above, 2, 3))
    inputs = [random(1, above, 2, 3), random(1, below, 2, 3) - 0.5]
    assert layer.inputs == (1, 0)
    expected = inputs[0].numpy().copy()
    expected[:, : min(below, above)] += inputs[1].numpy()[:, : min(below, above)]
    np.testing.assert_allclose(run(layer, *inputs), np.maximum(expected, 0), atol=1e-6)


def test_shortcut_adds_several_layers() -> None:
    layer = build("[shortcut]\nfrom=0,-2", (3, 2, 2), (3, 2, 2), (3, 2, 2))
    x = random(3, 3, 2, 2)
    assert layer.inputs == (2, 0, 1)
    np.testing.assert_allclose(run(layer, x[:1], x[1:2], x[2:]), x.sum(0, keepdim=True).numpy(), atol=1e-6)


@pytest.mark.parametrize(("keys", "gate"), [("", (4, 1, 1)), ("scale_wh=1", (1, 2, 3)), ("activation=relu", (4, 1, 1))])
def test_scale_channels(keys: str, gate: tuple[int, int, int]) -> None:
    layer = build(f"[scale_channels]\nfrom=0\n{keys}", (4, 2, 3), gate)
    factor, x = random(2, *gate), random(2, 4, 2, 3)
    expected = np.empty((2, 4, 2, 3), np.float32)
    for index in np.ndindex(expected.shape):
        b, c, i, j = index
        expected[index] = x[index] * (factor[b, 0, i, j] if gate[0] == 1 else factor[b, c, 0, 0])
    assert np.array_equal(run(layer, factor, x), np.maximum(expected, 0) if "relu" in keys else expected)


@pytest.mark.parametrize("keys", ["", "stride=2", "stride=3"])
def test_upsample_repeats_every_cell(keys: str) -> None:
    layer, x, factor = build(f"[upsample]\n{keys}", (2, 3, 4)), random(1, 2, 3, 4), int(keys[7:] or 2)
    assert np.array_equal(run(layer, x), x.numpy().repeat(factor, 2).repeat(factor, 3))
    assert layer.stride == (1 / factor, 1 / factor)


def test_avgpool_is_the_mean_of_a_channel() -> None:
    x = random(2, 3, 4, 5)
    np.testing.assert_allclose(run(build("[avgpool]", (3, 4, 5)), x)[:, :, 0, 0], x.numpy().mean((2, 3)), atol=1e-6)


def test_dropout_acts_only_in_training() -> None:
    layer, x = build("[dropout]\nprobability=.5", (3, 8, 8)), torch.ones(1, 3, 8, 8)
    assert np.array_equal(run(layer, x), x.numpy())
    assert sorted(layer.module.train()(x).unique().tolist()) == [0, 2]


def test_there_are_shipped_cfgs_and_fixtures() -> None:
    assert len(SHIPPED) >= 6
    assert len(CFGS) - len(SHIPPED) >= 4


@pytest.mark.parametrize("path", CFGS, ids=name)
def test_every_layer_has_the_size_it_declares(path: Path) -> None:
    with torch.device("meta"):  # sizes alone: nothing is computed
        model = Darknet(load_cfg(path)).eval()
        shapes: list[tuple[int, ...]] = []
        for block in model.blocks:
            block.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
        model(torch.zeros(1, model.channels, *model.size))
    assert shapes == [(1, layer.channels, *layer.size) for layer in model.layers]


@pytest.mark.parametrize(
    ("size", "stride", "groups", "is_exact"), [(3, 2, 8, True), (5, 1, 8, True), (3, 1, 8, False), (3, 2, 1, False)]
)
def test_depthwise_windows_that_are_slow_in_bfloat16_are_computed_in_float32(
    size: int, stride: int, groups: int, is_exact: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, size, stride, size // 2, groups=groups, bias=False)
    module = Convolution(conv, nn.Identity(), nn.Identity(), nn.Identity())
    x = torch.randn(2, 8, 16, 16, dtype=torch.bfloat16)
    exact = conv(x.float())
    assert torch.equal(module(x.float()), exact)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16()) == is_exact
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
