"""The network as a whole: builds, runs at any size, counts, fuses, frees what it no longer needs, and decodes."""

import re
import weakref
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CFGS, HEAVY_DETECTORS, SHIPPED, name, seeded
from torch import Tensor, nn

from models import Darknet, load_cfg, parse
from models.darknet import count_parameters
from models.quant import QuantConv2d
from models.yolo import decode
from utils.zoo import ZOO

WRITTEN_OUT = {path for path in SHIPPED if path.stem not in ZOO}  # without macros; networks that the zoo has too


def images(model: Darknet, height: int, width: int, batch: int = 1) -> Tensor:
    """Give random images whose sides are `height` and `width` times the stride."""
    shape = (batch, model.channels, height * model.stride, width * model.stride)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", HEAVY_DETECTORS, ids=name)
def test_fused_and_plain_networks_agree_at_any_size(path: Path) -> None:
    model = seeded(path)
    if any(isinstance(module, QuantConv2d) for module in model.modules()):
        model.double()  # in float32 some values are rounded to the level beside, which later layers multiply
    dtype = next(model.parameters()).dtype
    fused = model.fuse()
    left = {module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)}
    assert left <= {*fused.blocks}  # sections of their own, [batchnorm]
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for height, width, batch in ((3, 5, 1), (1, 2, 2)):
        x = images(model, height, width, batch).to(dtype)
        with torch.inference_mode():
            heads, fused_heads = model(x), fused(x)
        for head, fused_head, spec in zip(heads, fused_heads, model.heads, strict=True):
            cells = [int(side // stride) for side, stride in zip(x.shape[2:], spec.stride, strict=True)]
            assert list(head.shape) == [batch, len(spec.anchors) * spec.entries, *cells]
            assert head.isfinite().all()
            assert (head - fused_head).abs().max() <= 1e-5 * head.abs().max()


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_shipped_cfg_says_what_it_is(path: Path) -> None:
    said = re.search(r"^# ([\d,]+) parameters, ([\d.]+) BFLOPs at (\d+)x(\d+)$", path.read_text(), re.MULTILINE)
    assert said, "expected a line like '# 8,669,876 parameters, 5.45 BFLOPs at 416x416'"
    with torch.device("meta"):
        model = Darknet(load_cfg(path))
    assert f"{count_parameters(model):,}" == said[1]
    assert model.size == (int(said[4]), int(said[3]))
    assert f"{sum(layer.flops for layer in model.layers) / 1e9:.2f}" == said[2]
    assert model.summary().splitlines()[-1].startswith(f"{len(model.layers)} layers, {said[1]} parameters, ")


@pytest.mark.parametrize(
    ("cfg", "parameters"),
    [
        ("yolov3-hand", 61_523_734),
        ("yolov3-tiny-hand", 8_669_876),
        ("yolov3-tiny-se-hand", 8_933_172),
        ("yolov3-tiny-cbam-hand", 8_801_046),
        ("yolov3-tiny-eca-hand", 8_669_879),
        ("shufflenetv2-1x-hand", 3_570_547),
        ("shufflenetv2-1.5x-hand", 5_067_277),
        ("shufflenetv2-1x-visdrone", 3_591_337),
        ("shufflenetv2-1.5x-visdrone", 5_088_067),
        ("ghost-yolov3-visdrone", 23_495_111),
        ("vovnet-yolov3-visdrone", 42_660_871),
    ],
)
def test_parameters_are_as_published(cfg: str, parameters: int) -> None:
    (path,) = (path for path in SHIPPED if path.stem == cfg)
    with torch.device("meta"):
        assert count_parameters(Darknet(load_cfg(path))) == parameters


@pytest.mark.parametrize(
    ("cfg", "stride"),
    [("yolov3", 32), ("yolov3-tiny", 32), ("every_section", 8), ("upsampled_head", 8), ("stock_sections", 8)],
)
def test_the_stride_is_the_coarsest_that_the_network_needs(cfg: str, stride: int) -> None:
    (path,) = (path for path in CFGS if path.stem == cfg)
    with torch.device("meta"):
        assert Darknet(load_cfg(path)).stride == stride


@pytest.mark.parametrize(
    "path", [path for path in CFGS if path.stem in {"every_section", "tiny", "yolov3-tiny"}], ids=name
)
def test_forward_keeps_only_what_a_later_layer_reads(path: Path) -> None:
    model = seeded(path)
    outputs: list[weakref.ref[Tensor]] = []

    def check(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        reader = len(outputs)
        outputs.append(weakref.ref(output))
        needed = {index for layer in model.layers[reader:] for index in layer.inputs if 0 <= index < reader}
        needed |= {reader} | {index for index in range(reader) if model.layers[index].head}
        alive = {id(output()) for output in outputs if output() is not None}
        assert alive <= {id(outputs[index]()) for index in needed}, f"too many outputs live at layer {reader}"

    for block in model.blocks:
        block.register_forward_hook(check)
    with torch.inference_mode():
        model(images(model, 2, 2))
    assert len(outputs) == len(model.layers)


@pytest.mark.parametrize("path", [param for param in HEAVY_DETECTORS if param.values[0] not in WRITTEN_OUT], ids=name)
def test_training_and_evaluation_return_the_same_and_every_parameter_learns(path: Path) -> None:
    model = seeded(path)
    x = images(model, 3, 3, batch=2)
    shapes = [head.shape for head in model(x)]
    heads = model.train()(x)
    assert [head.shape for head in heads] == shapes
    sum(head.square().mean() for head in heads).backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert [name for name in idle if ".self." not in name] == []  # of [crnn]: the state that it reads is zero


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


HEADS = {
    "default": "[yolo]\nmask=2,0\nnum=3\nclasses=3\nanchors=10,14, 1,1, 30,20",
    "all anchors": "[yolo]\nnum=2\nclasses=3\nanchors=30,20, 10,14",
    "scale_x_y": "[yolo]\nmask=2,0\nclasses=3\nanchors=10,14, 1,1, 30,20\nscale_x_y=1.2",
    "new_coords": "[yolo]\nmask=2,0\nclasses=3\nanchors=10,14, 1,1, 30,20\nscale_x_y=2\nnew_coords=1",
    "region": "[region]\nnum=2\nclasses=3\nanchors=3.75,2.5, 1.25,1.75\nsoftmax=1",
    "region without softmax": "[region]\nnum=2\nclasses=3\nanchors=3.75,2.5, 1.25,1.75",
}
ANCHORS = ((30, 20), (10, 14))  # of every head above, in pixels: a cell has 8


@pytest.mark.parametrize("head", HEADS)
def test_decode(head: str) -> None:
    conv = "[convolutional]\nfilters=16\nsize=8\nstride=8\nactivation=logistic\n"
    model = Darknet(parse(f"[net]\nheight=64\nwidth=96\n{conv}{HEADS[head]}"))
    height, width, H, W = 32, 48, 4, 6  # half of the cfg's own size
    raw = torch.randn(2, 16, H, W, generator=torch.Generator().manual_seed(0))
    boxes, scores = (tensor.numpy() for tensor in model.decode([raw], (height, width)))
    assert (boxes.shape, scores.shape) == ((2, 2 * H * W, 4), (2, 2 * H * W, 3))
    s = {"scale_x_y": 1.2, "new_coords": 2.0}.get(head, 1.0)
    for b, a, i, j in np.ndindex(2, 2, H, W):
        x, y, w, h, objectness, *classes = raw[b, a * 8 : a * 8 + 8, i, j].tolist()
        if head != "new_coords":
            x, y, w, h, objectness = sigmoid(x), sigmoid(y), exp(w), exp(h), sigmoid(objectness)
        else:
            w, h = 4 * w * w, 4 * h * h
        if head == "region":
            classes = softmax(np.array(classes)).tolist()
        elif head != "new_coords":
            classes = [sigmoid(value) for value in classes]
        center = (j + x * s - (s - 1) / 2) / W * width, (i + y * s - (s - 1) / 2) / H * height
        row = (a * H + i) * W + j
        np.testing.assert_allclose(boxes[b, row], [*center, w * ANCHORS[a][0], h * ANCHORS[a][1]], rtol=1e-5)
        np.testing.assert_allclose(scores[b, row], objectness * np.array(classes), rtol=1e-5, atol=1e-7)


def test_decode_joins_the_heads_in_the_order_of_the_cfg() -> None:
    (path,) = (path for path in CFGS if path.stem == "every_section")
    model = seeded(path)
    with torch.inference_mode():
        heads = model(images(model, 3, 5))
        boxes, scores = model.decode(heads, (24, 40))
        parts = [decode(head, spec, (24, 40)) for head, spec in zip(heads, model.heads, strict=True)]
    assert boxes.shape == (1, 2 * (3 * 5 + 6 * 10), 4)
    assert torch.equal(boxes, torch.cat([boxes for boxes, _ in parts], dim=1))
    assert torch.equal(scores, torch.cat([scores for _, scores in parts], dim=1))
