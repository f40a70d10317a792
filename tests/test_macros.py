"""Macros: what they expand to, how indices around them count, and where their mistakes are told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CFGS, FIXTURES, ROOT, name, random, seeded

from models import CfgError, Darknet, dump, load_cfg, load_model, parse, save_weights
from models.layer import Rules
from models.macros import MACROS
from utils import lint
from utils.cli import check_model
from utils.log import DataError

SQUEEZED = FIXTURES / "valid/squeezed.cfg"
NET = "[net]\nheight=12\nwidth=16\n"
CONV = "[convolutional]\nfilters=6\nactivation=linear\n"
HEAD = CONV + "[yolo]\nanchors=9,9\nclasses=1\n"


def expanded(body: str) -> list[dict[str, str]]:
    """Give the options of every layer of the expanded cfg."""
    sections = Darknet(parse(NET + body)).expanded.sections[1:]
    return [{key: option.value for key, option in section.options.items()} for section in sections]


PLAIN = [path for path in CFGS if MACROS.keys().isdisjoint(section.name for section in load_cfg(path).sections)]


@pytest.mark.parametrize("path", PLAIN, ids=name)
def test_a_cfg_without_macros_is_untouched(path: Path) -> None:
    assert len(PLAIN) > 10
    with torch.device("meta"):
        model = Darknet(load_cfg(path))
    assert model.expanded is model.cfg


def test_the_written_cfg_stays_as_it_is() -> None:
    model = Darknet(load_cfg(SQUEEZED))
    assert dump(model.cfg) == SQUEEZED.read_text(encoding="utf-8")
    assert len(model.cfg.sections) == 11
    assert len(model.expanded.sections) == 1 + len(model.layers) == 20
    assert dump(Darknet(model.cfg).expanded) == dump(model.expanded)


def test_the_expansion_is_the_same_network(tmp_path: Path) -> None:
    model, x = seeded(SQUEEZED), random(2, 3, 64, 96)
    text = dump(model.expanded)
    plain = Darknet(parse(text)).eval()
    assert (plain.expanded is plain.cfg, plain.summary()) == (True, model.summary())
    save_weights(model, tmp_path / "a.weights")
    again = load_model(plain.cfg, tmp_path / "a.weights")
    with torch.inference_mode():
        assert torch.equal(again(x)[0], model(x)[0])
        np.testing.assert_allclose(model.fuse()(x)[0], model(x)[0], atol=1e-5)


def test_the_expansion_has_stock_sections_only() -> None:
    stock = {"net", "convolutional", "avgpool", "scale_channels", "shortcut", "route", "yolo"}
    assert {section.name for section in Darknet(load_cfg(SQUEEZED)).expanded.sections} == stock


def test_se_is_the_formula_of_the_paper() -> None:
    model, x = Darknet(parse(NET + CONV + "[se]\nreduction=2\n" + HEAD)).eval(), random(2, 3, 12, 16)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    with torch.inference_mode():
        u = model.blocks[0](x)
        found = model.blocks[4](model.blocks[3](model.blocks[2](model.blocks[1](u))), u)
    z = u.numpy().mean((2, 3))
    hidden = np.maximum(z @ state["blocks.2.conv.weight"][:, :, 0, 0].T + state["blocks.2.conv.bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ state["blocks.3.conv.weight"][:, :, 0, 0].T + state["blocks.3.conv.bias"])))
    assert hidden.shape == (2, 3)
    np.testing.assert_allclose(found, u.numpy() * gate[:, :, None, None], atol=1e-5)


@pytest.mark.parametrize(("reduction", "hidden"), [("", "1"), ("reduction=1", "6"), ("reduction=4", "1")])
def test_se_has_at_least_one_hidden_channel(reduction: str, hidden: str) -> None:
    assert expanded(CONV + f"[se]\n{reduction}\n" + HEAD)[2]["filters"] == hidden


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("-1", "-1"),  # layer 3, a convolution
        ("3", "9"),
        ("-2", "-2"),  # layer 2, the second [se]: its scale_channels
        ("2", "8"),
        ("-3", "-6"),
        ("1", "4"),  # the first [se]
        ("0", "0"),
        ("-4", "-10"),
        ("-1, -4,2", "-1,-10,8"),
    ],
)
def test_indices_count_written_sections(written: str, layers: str) -> None:
    body = f"{CONV}[se]\n[se]\n{CONV}[route]\nlayers={written}\n{HEAD}"
    assert expanded(body)[10] == {"layers": layers}


def test_every_key_that_names_a_layer_counts_so() -> None:
    shared = CONV + "share_index=2\n"
    gates = "[avgpool]\n[scale_channels]\nfrom=-2\n[sam]\nfrom=3\n[shortcut]\nfrom=1,-7\n"
    model = Darknet(parse(NET + CONV + "[se]\n" + CONV + shared + gates + HEAD + "[contrastive]\nyolo_layer=9\n"))
    values = [section.options for section in model.expanded.sections[1:]]
    assert values[6]["share_index"].value == "5"
    assert [values[index]["from"].value for index in (8, 9, 10)] == ["-2", "6", "4,-10"]
    assert values[13]["yolo_layer"].value == "12"
    assert model.blocks[6].owner[0] is model.blocks[5]


def test_a_macro_keeps_its_comments_its_line_endings_and_its_line() -> None:
    text = NET + CONV + "[se]  # gate\n; why\nreduction=3\n\n# next\n" + HEAD
    model = Darknet(parse(text.replace("\n", "\r\n")))
    dumped = dump(model.expanded)
    assert dumped.count("\n") == dumped.count("\r\n")
    assert "[avgpool]\r\n# of [se] reduction=3\r\n" in dumped
    assert "[scale_channels]\r\nfrom=-4\r\n; why\r\n\r\n# next\r\n[convolutional]" in dumped
    assert {section.line for section in model.expanded.sections[2:6]} == {7}
    assert {option.line for section in model.expanded.sections[2:6] for option in section.options.values()} == {7}


def test_keys_of_every_layer_hold_for_a_macro() -> None:
    model = Darknet(parse(NET + CONV + "[se]\nstopbackward=3\ndontload=1\nonlyforward=1\nclip=1\n" + HEAD))
    assert [layer.rules for layer in model.layers] == [Rules()] + [Rules(3, True, skip_load=True)] * 4 + [Rules()] * 2
    assert "clip" not in model.expanded.sections[2].options


def test_a_mistake_inside_an_expansion_is_told_at_the_macro() -> None:
    route = "[route]\nlayers=" + ",".join(["0"] * 2) + "\n"
    body = "[convolutional]\nfilters=65536\n" + route + "[se]\nreduction=65536\n" + HEAD
    with pytest.raises(CfgError) as caught:
        Darknet(parse(NET + body))
    assert caught.value.mistakes[0].line == 8
    assert "'filters' expects at most 65536, gets 131072" in str(caught.value)


def test_a_head_after_a_macro_is_told_at_its_own_line() -> None:
    with pytest.raises(DataError, match=r"squeezed\.cfg:58: the head has classes=2"):
        check_model(Darknet(load_cfg(SQUEEZED)), ("a",), "x.data")


def test_expand_prints_the_expansion(capsys: pytest.CaptureFixture[str]) -> None:
    lint.main(["--expand", str(SQUEEZED)])
    assert capsys.readouterr().out == dump(Darknet(load_cfg(SQUEEZED)).expanded)
    lint.main(["--expand", str(ROOT / "cfg/yolov3.cfg")])
    assert capsys.readouterr().out == (ROOT / "cfg/yolov3.cfg").read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        lint.main(["--expand", str(FIXTURES / "invalid/macro.cfg")])
    assert stop.value.code == 2
    assert "macro.cfg:6: [se] 'reduction' expects at least 1, gets 0" in capsys.readouterr().out


def test_every_macro_stands_in_a_fixture() -> None:
    written = {section.name for path in CFGS for section in load_cfg(path).sections}
    assert set(MACROS) <= written
