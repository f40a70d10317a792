"""Keys that any section may have, keys of the heads, and what is read although it is broken."""

import logging
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CLASSIFIER, FIXTURES, random
from torch import Tensor

from models import Darknet, WeightsError, load_cfg, load_model, load_weights, parse, save_weights
from utils.cli import check_model
from utils.datasets import Batch
from utils.engine import make_trainer, train_one_epoch
from utils.log import DataError
from utils.recipe import Recipe

NET = "[net]\nheight=12\nwidth=16\nchannels=3\n"
HEAD = "[convolutional]\nfilters=6\nactivation=linear\n[yolo]\nanchors=9,9\nclasses=1\n"


def conv(*keys: str) -> str:
    return "\n".join(("[convolutional]", "filters=2", "batch_normalize=1", *keys, ""))


def test_nms_is_kept_for_every_head() -> None:
    text = HEAD + "nms_kind=diounms\nbeta_nms=0.8\n" + HEAD + HEAD + "nms_kind=greedynms\n"
    heads = Darknet(parse(NET + text)).heads
    assert [(head.nms_kind, head.beta_nms) for head in heads] == [
        ("diounms", 0.8),
        ("default", 0.6),
        ("greedynms", 0.6),
    ]


@pytest.mark.parametrize(
    ("keys", "frozen"),
    [
        ((), [(), (), ()]),
        (("stopbackward=1",), [(0, 1), (0, 1), (0, 1)]),
        (("stopbackward=3",), [(0, 1), (0, 1), ()]),
        (("train_only_bn=1",), [(0, 1), (0, 1), (0, 1)]),
    ],
)
def test_freeze(keys: tuple[str, ...], frozen: list[tuple[int, ...]]) -> None:
    model = Darknet(parse(NET + conv() + conv(*keys) + HEAD))
    for iteration, indices in zip((0, 2, 3), frozen, strict=True):
        model.freeze(iteration)
        model.zero_grad()
        model(random(2, 3, 12, 16))[0].square().sum().backward()
        for index in range(3):
            learns = {parameter.grad is not None for parameter in model.blocks[index].parameters()}
            assert learns == {index not in indices}


def test_the_last_stop_holds() -> None:
    model = Darknet(parse(NET + conv("stopbackward=1") + conv("stopbackward=5") + conv() + HEAD))
    states = []
    for iteration in (0, 4, 5, 9):
        model.freeze(iteration)
        states.append([next(block.parameters()).requires_grad for block in list(model.blocks)[:3]])
    assert states == [[False, False, True]] * 2 + [[False, True, True]] * 2


def test_training_follows_stopbackward() -> None:
    model, device = Darknet(parse(NET + conv("stopbackward=2") + HEAD)), torch.device("cpu")
    trainer = make_trainer(model, Recipe(), epochs=2, steps=2, device=device, dtype=torch.float32)
    batch = Batch((random(2, 3, 12, 16).abs() * 50).byte(), torch.zeros(0, 6), [0, 1], [])

    def step_loss(x: Tensor, _targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(x)[0].square().mean(), {}

    weights = []
    for epoch in range(2):  # of 4 batches that make 2 steps
        weights.append(model.blocks[0].conv.weight.detach().clone())
        train_one_epoch(
            trainer, [batch] * 4, step_loss, device=device, accumulate=2, title=f"epoch {epoch}", freeze=model.freeze
        )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], model.blocks[0].conv.weight)


def test_no_gradient_passes_onlyforward() -> None:
    model = Darknet(parse(NET + conv() + "[route]\nlayers=-1\nonlyforward=1\n" + conv() + HEAD))
    model(random(2, 3, 12, 16))[0].square().sum().backward()
    assert [any(p.grad is not None for p in model.blocks[index].parameters()) for index in (0, 2, 3)] == [
        False,
        True,
        True,
    ]


def test_keys_of_darknets_trainer_are_set_aside_in_any_section(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "darkslim")
    Darknet(parse(NET + conv("clip=1", "learning_rate=.1") + HEAD + "burnin_update=2\ndont_update=3\nmap=x"))
    assert caplog.messages == [
        "<string>: keys without a meaning here, set aside: burnin_update, clip, dont_update, learning_rate, map"
    ]


def test_a_missing_comma_between_anchors_is_read_as_darknet_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    text = "[convolutional]\nfilters=12\n[yolo]\nclasses=1\nnum=4\nmask=1,3\nanchors=10,13, 16,30  33,23, 30,61"
    assert Darknet(parse(NET + text)).heads[0].anchors == ((16, 3033), (61, 0.5))
    assert caplog.messages == ["<string>:11: 'anchors' lacks a comma between two numbers: Darknet reads them as one"]


WAYS = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "tabs": lambda text: text.replace("=", "\t=\t\t").replace("\n", "\t\n"),
    "BOM": lambda text: "\ufeff" + text,
    "blanks before [net]": lambda text: "  \n\t\n" + text,
    "inline comments": lambda text: re.sub(r"(=.*)", r"\1 ###P6", text),
    "duplicate keys": lambda text: re.sub(r"((filters|size)=).*", r"\g<0>\n\g<1>7", text),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_network_is_the_same_however_its_file_is_written(way: str) -> None:
    text = (FIXTURES / "valid/stock_sections.cfg").read_text(encoding="utf-8")
    written = WAYS[way](text)
    assert written != text
    with torch.device("meta"):
        plain, model = Darknet(parse(text)), Darknet(parse(written))
    assert model.summary() == plain.summary()
    assert model.heads == plain.heads


BROKEN = {  # official cfgs, and the last anchor of their last head
    "cspx-p7-mish": (1408, 1408),  # num=16, but 20 pairs and masks up to 19
    "cspx-p7-mish_hp": (800, 0.5),  # a comma is missing: every anchor after it is shifted by one number
    "yolov4-csp-x-swish": (459, 401),  # blanks before [net]
    "yolov4-csp-x-swish-frozen": (459, 401),
    "enet-coco": (81, 82),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_official_cfgs_load_as_darknet_reads_them(name: str, shared_data: Path) -> None:
    with torch.device("meta"):
        model = Darknet(load_cfg(shared_data / f"darknet/official-cfg/{name}.cfg"))
    assert model.heads[-1].anchors[-1] == BROKEN[name]


def file_of(path: Path, count: int) -> np.ndarray:
    """Write a .weights file of `count` values, 0.5, 1.5, …, and give them."""
    values = np.arange(count, dtype="<f4") + np.float32(0.5)
    path.write_bytes(struct.pack("<3iq", 0, 2, 5, 0) + values.tobytes())
    return values


def test_a_weights_file_holds_nothing_of_a_layer_with_dontload(tmp_path: Path) -> None:
    cfg, path = parse(NET + conv() + conv("dontload=1") + HEAD), tmp_path / "x.weights"
    values = file_of(path, 4 * 2 + 6 + 6 + 12)  # layers 0 and 2
    model = Darknet(cfg)
    fresh = model.blocks[1].conv.weight.clone()
    assert load_weights(model, path) == [0, 2, 3]
    assert np.array_equal(model.blocks[0].conv.weight.detach().numpy().ravel(), values[8:14])
    assert torch.equal(model.blocks[1].conv.weight, fresh)
    assert np.array_equal(model.blocks[2].conv.bias.detach().numpy(), values[14:20])
    assert np.array_equal(load_model(cfg, path).blocks[2].conv.bias.detach().numpy(), values[14:20])
    file_of(path, 4 * 2 + 6)
    assert load_weights(model, path) == [0]
    with pytest.raises(WeightsError, match="layer 2 is missing"):
        load_model(cfg, path)


def test_dontloadscales_leaves_scales_and_statistics_alone(tmp_path: Path) -> None:
    cfg, path = parse(NET + conv("dontloadscales=1") + HEAD), tmp_path / "x.weights"
    values = file_of(path, 2 + 6 + 6 + 12)
    model = load_model(cfg, path)
    block = model.blocks[0]
    assert np.array_equal(block.bn.bias.detach().numpy(), values[:2])
    assert (block.bn.weight.tolist(), block.bn.running_mean.tolist(), block.bn.running_var.tolist()) == (
        [1, 1],
        [0, 0],
        [1, 1],
    )
    assert np.array_equal(block.conv.weight.detach().numpy().ravel(), values[2:8])
    save_weights(model, path)  # as Darknet: all that the layer has
    assert path.stat().st_size == 20 + 4 * (2 + 6 + 6 + 6 + 12)


def test_commands_for_detectors_refuse_a_classifier() -> None:
    with pytest.raises(DataError, match=r"classifier\.cfg: is a classifier"):
        check_model(Darknet(load_cfg(CLASSIFIER)), ("a",) * 10, "x.data")
