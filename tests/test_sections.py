"""The rarer sections and keys of the stock cfgs against tests/numpy_reference.py, which writes them as loops."""

import copy

import numpy as np
import pytest
import torch
from networks import CLASSIFIER, build, random, run, seeded
from numpy_reference import (
    add_strided,
    add_weighted,
    binarise,
    blur,
    convolve,
    gaussian_box,
    leaky,
    max_pool,
    mean_pool,
    normalise,
    reorg,
    reorg3d,
    sigmoid,
    softmax,
)
from torch import Tensor, nn

from models import CfgError, Darknet, parse
from models.layers import REFUSED

NET = "[net]\nheight=12\nwidth=16\nchannels=3\n"
HEAD = "[convolutional]\nfilters=6\nactivation=linear\n[yolo]\nanchors=9,9\nclasses=1\n"


def shake(module: nn.Module) -> None:
    """Give every batch normalisation statistics of its own."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d):
            for number, tensor in enumerate((bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var)):
                tensor.copy_(torch.linspace(0.5, 1.5, len(tensor)).roll(number))


def statistics(bn: nn.Module) -> tuple[np.ndarray, ...]:
    tensors = (bn.bias, bn.weight, bn.running_mean, bn.running_var)
    return (*(tensor.detach().numpy() for tensor in tensors), bn.eps)


def convolved(x: Tensor, block: nn.Module, padding: int, **keys: int) -> np.ndarray:
    """Run a Convolution with batch normalisation, stride 1 and leaky through the reference."""
    raw = convolve(x.numpy(), block.conv.weight.detach().numpy(), (1, 1), padding, **keys)
    return leaky(normalise(raw, *statistics(block.bn)))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "stride", "padding", "dilation"),
    [
        ("size=3\npad=1\ndilation=2", (1, 1), 1, 2),
        ("size=3\npad=1\ndilation=3", (1, 1), 1, 3),
        ("size=5\npad=1\ndilation=2\nstride=2", (2, 2), 2, 2),
        ("size=3\npadding=1\ndilation=2\nstride_y=2", (2, 1), 1, 2),
        ("size=1\npad=1\ndilation=4", (1, 1), 0, 1),  # 1×1 cannot be dilated
    ],
)
def test_dilation_spreads_the_padding_too(keys: str, stride: tuple[int, int], padding: int, dilation: int) -> None:
    layer, x = build(f"[convolutional]\nfilters=4\nactivation=linear\n{keys}", (3, 9, 8)), random(1, 3, 9, 8)
    conv = layer.module.conv
    raw = convolve(x[0].numpy(), conv.weight.detach().numpy(), stride, padding, dilation=dilation)
    assert_close(run(layer, x)[0], raw + conv.bias.detach().numpy()[:, None, None])


SHARED = f"""{NET}[convolutional]
batch_normalize=1
filters=3
size=3
pad=1
activation=leaky
[convolutional]
share_index=-1
batch_normalize=1
filters=3
size=3
pad=1
dilation=2
activation=leaky
[convolutional]
share_index=1
batch_normalize=1
filters=3
size=3
pad=1
stride=2
activation=leaky
{HEAD}"""


def test_share_index_uses_the_weights_of_another_layer_and_a_window_of_its_own() -> None:
    model = Darknet(parse(SHARED)).eval()
    shake(model)
    x, owner = random(1, 3, 12, 16), model.blocks[0]
    with torch.inference_mode():
        first = owner(x)
        second = model.blocks[1](first)
        third = model.blocks[2](second)
    expected = convolved(x[0], owner, 1)
    assert_close(first[0].numpy(), expected)
    expected = convolved(torch.tensor(expected), owner, 1, dilation=2)
    assert_close(second[0].numpy(), expected)
    assert_close(third[0].numpy(), convolved(torch.tensor(expected), owner, 1)[:, ::2, ::2])
    assert third.shape[1:] == (3, *model.layers[2].size)


def test_shared_weights_stand_once_and_stay_shared() -> None:
    model = Darknet(parse(SHARED))
    shake(model)
    assert not any(layer.tensors for layer in model.layers[1:3])
    assert not any(name.startswith(("blocks.1.", "blocks.2.")) for name in model.state_dict())
    x = random(2, 3, 12, 16)
    twin = copy.deepcopy(model)
    for each in (twin, model.fuse()):
        assert each.blocks[1].owner[0] is each.blocks[2].owner[0] is each.blocks[0]
        assert each.blocks[0] is not model.blocks[0]
    with torch.inference_mode():
        plain, fused = model.eval()(x)[0], model.fuse()(x)[0]
        double = model.fuse().double()(x.double())[0]
        for parameter in twin.blocks[0].parameters():
            parameter.zero_()
        zeroed = twin.eval()(x)[0]
    assert (plain - fused).abs().max() < 1e-5 * plain.abs().max()
    assert double.dtype == torch.float64
    assert (plain - double).abs().max() < 1e-5 * plain.abs().max()
    assert torch.equal(zeroed, twin.blocks[3].conv.bias[None, :, None, None].expand_as(zeroed))
    model.train()(x)[0].square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
def test_antialiasing_blurs_before_it_subsamples(kind: int, stride: tuple[int, int]) -> None:
    steps = f"stride_y={stride[0]}\nstride_x={stride[1]}\nantialiasing={kind}"
    x = random(1, 3, 9, 10)
    layer = build(
        f"[convolutional]\nbatch_normalize=1\nfilters=4\nsize=3\npad=1\nactivation=leaky\n{steps}", (3, 9, 10)
    )
    shake(layer.module)
    assert_close(run(layer, x)[0], blur(convolved(x[0], layer.module, 1), kind, stride))
    assert layer.stride == stride
    assert not [name for name in layer.module.state_dict() if "blur" in name]
    pool = build(f"[maxpool]\nsize=2\n{steps}", (3, 9, 10))
    assert_close(run(pool, x)[0], blur(max_pool(x[0].numpy(), 2, (1, 1), 1), kind, stride))
    assert pool.stride == stride


@pytest.mark.parametrize("key", ["xnor", "binary"])
@pytest.mark.parametrize("has_bn", [0, 1])
def test_binary_weights_are_the_mean_with_their_sign(key: str, has_bn: int) -> None:
    keys = f"filters=4\nsize=3\npad=1\nactivation=leaky\ngroups=2\nbatch_normalize={has_bn}\n{key}=1\nbin_output=1"
    layer, x = build(f"[convolutional]\n{keys}", (6, 5, 4)), random(1, 6, 5, 4)
    shake(layer.module)
    weight = layer.module.conv.weight.detach().numpy()
    assert weight.shape[1] == (6 if key == "xnor" else 3)  # xnor knows no groups
    inputs = np.where(x[0].numpy() > 0, 1.0, -1.0) if key == "xnor" else x[0].numpy()
    y = convolve(inputs, binarise(weight), (1, 1), 1, groups=6 // weight.shape[1])
    bn = layer.module.bn
    y = normalise(y, *statistics(bn)) if has_bn else y + layer.module.conv.bias.detach().numpy()[:, None, None]
    assert_close(run(layer, x)[0], leaky(y))


def test_gradients_go_straight_through_the_signs() -> None:
    layer = build("[convolutional]\nfilters=2\nxnor=1\nactivation=linear", (3, 1, 1))
    conv, x = layer.module.conv, torch.tensor([-2.0, -0.5, 0.5]).view(1, 3, 1, 1).requires_grad_()
    layer.module(x).sum().backward()
    signs = torch.tensor([-1.0, -1.0, 1.0])
    assert torch.equal(conv.weight.grad[:, :, 0, 0], signs.expand(2, 3))
    passed = binarise(conv.weight.detach().numpy())[:, :, 0, 0].sum(0)
    assert_close(x.grad[0, :, 0, 0].numpy(), np.array([0, passed[1], passed[2]]))  # nothing where |x| > 1


@pytest.mark.parametrize("has_bn", [0, 1])
def test_connected_sees_the_whole_map(has_bn: int) -> None:
    layer, x = build(f"[connected]\noutput=5\nbatch_normalize={has_bn}", (3, 2, 4)), random(2, 3, 2, 4)
    shake(layer.module)
    linear, bn = layer.module.linear, layer.module.bn
    for b in range(2):
        y = np.array([float((row * x[b].numpy().ravel()).sum()) for row in linear.weight.detach().numpy()])
        y = normalise(y, *statistics(bn)) if has_bn else y + linear.bias.detach().numpy()
        assert_close(run(layer, x)[b, :, 0, 0], np.array([sigmoid(value) for value in y]))
    values = ("bn.bias", "linear.weight", "bn.weight", "bn.running_mean", "bn.running_var")
    assert tuple(layer.tensors) == (values if has_bn else ("linear.bias", "linear.weight"))
    layer.module.eval()
    with torch.inference_mode():
        before = layer.module(x)
        layer.module.fuse()
        assert_close(layer.module(x).numpy(), before.numpy())
    assert isinstance(layer.module.bn, nn.Identity)


@pytest.mark.parametrize("section", ["batchnorm", "BatchNorm2d"])
def test_batchnorm_stands_alone(section: str) -> None:
    layer, x = build(f"[{section}]", (3, 4, 5)), random(1, 3, 4, 5)
    shake(layer.module)
    assert_close(run(layer, x)[0], normalise(x[0].numpy(), *statistics(layer.module)))
    assert tuple(layer.tensors) == ("bias", "weight", "running_mean", "running_var")


@pytest.mark.parametrize("keys", ["size=3\npad=1", "size=1", "pad=1", "pad=1\nshortcut=1", "pad=1\ngroups=2"])
def test_crnn_on_its_first_frame(keys: str) -> None:
    text = f"[crnn]\nbatch_normalize=1\nhidden=4\noutput=6\nactivation=leaky\n{keys}"
    layer, x = build(text, (2, 5, 4)), random(1, 2, 5, 4)
    shake(layer.module)
    crnn, groups = layer.module, int("groups=2" in keys) + 1
    padding = 0 if keys == "size=1" else 1
    state = convolved(x[0], crnn.input, padding, groups=groups)
    state += convolved(torch.zeros(4, 5, 4), crnn.self, padding, groups=groups)
    assert_close(
        run(layer, x)[0], convolved(torch.tensor(state, dtype=torch.float32), crnn.output, padding, groups=groups)
    )
    assert len(layer.tensors) == 15
    assert tuple(layer.tensors)[5:7] == ("self.bn.bias", "self.bn.weight")


def test_depthwise_has_a_group_for_every_channel() -> None:
    layer, x = build("[depthwise]\nfilters=6\nsize=3\npad=1\nactivation=linear", (3, 4, 5)), random(1, 3, 4, 5)
    conv = layer.module.conv
    raw = convolve(x[0].numpy(), conv.weight.detach().numpy(), (1, 1), 1, groups=3)
    assert_close(run(layer, x)[0], raw + conv.bias.detach().numpy()[:, None, None])


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["", "padding=0", "padding=2"])
def test_local_avgpool_ignores_what_lies_outside(size: int, stride: int, padding: str) -> None:
    layer, x = build(f"[local_avgpool]\nsize={size}\nstride={stride}\n{padding}", (2, 5, 7)), random(1, 2, 5, 7)
    assert_close(run(layer, x)[0], mean_pool(x[0].numpy(), size, (stride, stride), int(padding[8:] or size - 1)))


@pytest.mark.parametrize("s", [1, 2, 3])
def test_reorg3d_and_back(s: int) -> None:
    x = random(1, 4, 6, 12)
    layer = build(f"[reorg3d]\nstride={s}", (4, 6, 12))
    y = run(layer, x)
    assert np.array_equal(y[0], reorg3d(x[0].numpy(), s))
    assert layer.stride == layer.multiple == (s, s)
    back = build(f"[reorg3d]\nstride={s}\nreverse=1", y.shape[1:])
    assert np.array_equal(run(back, torch.tensor(y)), x.numpy())
    assert back.stride == (1 / s, 1 / s)


@pytest.mark.parametrize(("s", "C"), [(1, 3), (2, 4), (2, 8), (3, 9)])
def test_reorg_has_yolov2s_own_order(s: int, C: int) -> None:
    layer, x = build(f"[reorg]\nstride={s}", (C, 6, 12)), random(1, C, 6, 12)
    assert np.array_equal(run(layer, x)[0], reorg(x[0].numpy(), s))
    if s > 1:
        assert not np.array_equal(run(layer, x)[0], reorg3d(x[0].numpy(), s))


@pytest.mark.parametrize(
    ("keys", "h", "w"), [("crop_height=3", 3, 1), ("crop_height=4\ncrop_width=5\nnoadjust=1", 4, 5)]
)
def test_crop_takes_the_middle(keys: str, h: int, w: int) -> None:
    x = random(1, 2, 6, 7)
    y = x[:, :, (6 - h) // 2 :, (7 - w) // 2 :][:, :, :h, :w].numpy()
    assert_close(run(build(f"[crop]\n{keys}", (2, 6, 7)), x), y if "noadjust" in keys else 2 * y - 1)


@pytest.mark.parametrize("section", ["empty", "silence", "blank", "cost", "activation"])
def test_sections_that_pass_their_input_on(section: str) -> None:
    x = random(1, 2, 3, 4)
    assert np.array_equal(run(build(f"[{section}]", (2, 3, 4)), x), x.numpy())
    active = build("[activation]\nactivation=relu", (2, 3, 4))
    assert np.array_equal(run(active, x), np.maximum(x.numpy(), 0))


def test_sam_multiplies_cell_by_cell_and_channel_by_channel() -> None:
    layer = build("[sam]\nfrom=-2\nactivation=leaky", (3, 2, 4), (3, 2, 4))
    gate, x = random(1, 3, 2, 4), random(2, 3, 2, 4)[1:]
    assert layer.inputs == (1, 0)
    expected = np.zeros((3, 2, 4))
    for index in np.ndindex(expected.shape):
        expected[index] = x[0][index] * gate[0][index]
    assert_close(run(layer, gate, x)[0], leaky(expected))


@pytest.mark.parametrize("channels", [(4, 4, 4), (4, 6, 2)])
@pytest.mark.parametrize("kind", ["none", "per_feature", "per_layer", "per_channel"])
@pytest.mark.parametrize("normalization", ["none", "relu", "avg_relu", "softmax"])
def test_weighted_shortcut(channels: tuple[int, ...], kind: str, normalization: str) -> None:
    keys = f"from=1,0\nactivation=leaky\nweights_type={kind}\nweights_normalization={normalization}"
    layer = build(f"[shortcut]\n{keys}", *((C, 2, 3) for C in reversed(channels)))
    xs = [random(5, C, 2, 3)[i : i + 1] for i, C in enumerate(channels)]
    weights = np.ones((3, 1))
    if kind == "none":
        assert not layer.tensors
        normalization = "none"
    else:
        assert tuple(layer.tensors) == ("weights",)
        assert layer.module.weights.shape == (3, 4 if kind == "per_channel" else 1)
        layer.module.weights.data = random(*layer.module.weights.shape)
        weights = layer.module.weights.detach().numpy()
    assert_close(run(layer, *xs)[0], leaky(add_weighted([x[0].numpy() for x in xs], weights, normalization)))


@pytest.mark.parametrize(("below", "above"), [((8, 12), (4, 6)), ((4, 6), (8, 12)), ((9, 3), (3, 1))])
@pytest.mark.parametrize(("C", "D"), [(2, 2), (3, 2), (2, 3)])
def test_shortcut_between_sizes(below: tuple[int, int], above: tuple[int, int], C: int, D: int) -> None:
    layer = build("[shortcut]\nfrom=0", (D, *below), (C, *above))
    x, other = random(1, C, *above), random(2, D, *below)[1:]
    kept = x.clone()
    assert_close(run(layer, x, other)[0], add_strided(x[0].numpy(), other[0].numpy()))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("keys", "groups", "temperature"), [("", 1, 1), ("groups=2", 2, 1), ("groups=3\ntemperature=2.5", 3, 2.5)]
)
@pytest.mark.parametrize("is_spatial", [False, True])
def test_softmax(keys: str, groups: int, temperature: float, is_spatial: bool) -> None:
    layer, x = build(f"[softmax]\n{keys}\nspatial={int(is_spatial)}", (6, 2, 2)), random(2, 6, 2, 2)
    found = run(layer, x)
    for b in range(2):
        if is_spatial:
            vectors = [(x[b, :, i, j], found[b, :, i, j]) for i, j in np.ndindex(2, 2)]
        else:
            vectors = [(x[b].flatten(), found[b].ravel())]
        for given, scores in vectors:
            parts = [softmax(part.tolist(), temperature) for part in given.chunk(groups)]
            assert_close(scores, np.array([value for part in parts for value in part]))


@pytest.mark.parametrize("point", ["center", "left_top", "right_bottom"])
def test_gaussian_yolo(point: str) -> None:
    cfg = parse(
        "[net]\nheight=64\nwidth=96\n[convolutional]\nfilters=24\nsize=8\nstride=8\n"
        "[Gaussian_yolo]\nmask=2,0\nclasses=3\nanchors=10,14, 1,1, 30,20\nscale_x_y=1.2\n"
        f"yolo_point={point}\nuc_normalizer=1.0\nnms_kind=cornersnms"
    )
    model, raw = Darknet(cfg), random(2, 24, 3, 5)
    assert model.heads[0].nms_kind == "cornersnms"
    boxes, scores = model.decode([raw], (24, 40))
    assert (boxes.shape, scores.shape) == ((2, 30, 4), (2, 30, 3))
    for b, a, i, j in np.ndindex(2, 2, 3, 5):
        values, anchor = raw[b, a * 12 : a * 12 + 12, i, j].tolist(), ((30, 20), (10, 14))[a]
        box, score = gaussian_box(values, (i, j), (3, 5), anchor, (24, 40), scale_x_y=1.2, point=point)
        row = (a * 3 + i) * 5 + j
        np.testing.assert_allclose(boxes[b, row], box, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scores[b, row], score, rtol=1e-4)


def test_contrastive_adds_nothing_at_inference() -> None:
    tail = "[route]\nlayers=0\n[contrastive]\nyolo_layer=-2\nclasses=1\ntemperature=1.0\n"
    plain, model = Darknet(parse(NET + HEAD)), Darknet(parse(NET + HEAD + tail))
    model.load_state_dict(plain.state_dict())
    x = random(1, 3, 12, 16)
    assert len(model.heads) == len(model(x)) == 1
    assert torch.equal(model(x)[0], plain(x)[0])
    y = random(1, 6, 12, 16)
    assert np.array_equal(run(model.layers[3], y), y.numpy())


def test_a_classifier_returns_its_scores() -> None:
    model = seeded(CLASSIFIER)
    x = random(3, 3, 36, 40)
    assert (model.heads, model.classes) == ([], 10)
    with torch.inference_mode():
        (scores,), (fused,) = model(x), model.fuse()(x)
    assert scores.shape == (3, 10, 1, 1)
    assert_close(scores.view(3, 2, 5).sum(2).numpy(), np.ones((3, 2)))  # two groups
    assert_close(fused.numpy(), scores.numpy())
    assert len(model.summary().splitlines()) == 9
    (trained,) = model.train()(x)
    trained.square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_of_another_kind_is_refused_in_one_clear_line(name: str) -> None:
    with pytest.raises(CfgError) as caught:
        Darknet(parse(f"{NET}[nonsense]\n[{name}]\nfilters=x\n", "x.cfg"))
    message = str(caught.value)
    assert message.startswith(f"x.cfg:6: [{name}] is ")
    assert message.endswith(", which Darkslim does not build")
    assert (message.count("\n"), message.count(", which")) == (0, 1)
