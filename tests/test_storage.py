"""Levels on which integers store maps, as training has them with map_bits=8."""

from pathlib import Path

import pytest
import torch
from torch import nn

from models import CfgError, Darknet, load_model, save_weights
from models.cfg import parse
from models.storage import Levels, Stored
from models.weights import load_state

NET = "[net]\nwidth=32\nheight=32\nchannels=3\n"
STORED = f"{NET}map_bits=8\n"
CONV = "[quan_convolutional]\nbatch_normalize=1\nfilters=8\nsize=1\na_range=1\nactivation="
HEAD = "[convolutional]\nfilters=18\n[yolo]\nmask=0,1\nanchors=8,8, 16,16\nclasses=4\n"
LAYERS = [
    CONV + "leaky",  # read by the next one alone: its levels
    CONV + "swish",  # early levels
    CONV + "linear",  # read by the shortcut
    CONV + "relu",  # read by the shortcut, and joined with it for a convolution in floating point
    "[shortcut]\nfrom=-2\nactivation=linear",
    "[route]\nlayers=-1,-2",
    "[maxpool]\nsize=2\nstride=2",
    "[convolutional]\nfilters=8\nactivation=leaky",
    CONV + "relu",  # read by the convolution before the head
    HEAD,
]
CFG = "\n".join(LAYERS)
FLOAT = CFG.replace("quan_", "").replace("a_range=1\n", "")


def trained(text: str) -> Darknet:
    torch.manual_seed(0)
    model = Darknet(parse(text)).train()
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32))
    return model.eval()


def test_levels_are_those_of_the_range_seen() -> None:
    levels = Levels()
    x = torch.tensor([-1.0, -0.031, 0.0, 0.029, 1.0, 4.1])
    assert torch.equal(levels.eval()(x), x)  # nothing seen
    wanted = torch.tensor([-1.0, -0.04, 0.0, 0.02, 1.0, 4.1])
    torch.testing.assert_close(levels.train()(x), wanted)
    torch.testing.assert_close(levels.eval()(x), wanted)
    torch.testing.assert_close(levels(torch.tensor([-2.0, 9.0])), torch.tensor([-1.0, 4.1]))
    grid = levels.grid()
    assert grid[1:3] == (50, 255)
    assert grid.step == pytest.approx(0.02)


def test_ranges_are_a_moving_average_that_contains_zero() -> None:
    levels = Levels().train()
    levels(torch.tensor([2.0, 10.0]))
    assert levels.a_limits.tolist() == [0, 10]
    levels(torch.tensor([-5.0, 20.0]))
    torch.testing.assert_close(levels.a_limits, torch.tensor([-0.05, 10.1]))


def test_gradients_pass_within_the_range() -> None:
    levels = Levels().train()
    levels(torch.tensor([-1.0, 4.1]))
    x = torch.tensor([-3.0, -0.5, 2.0, 9.0], requires_grad=True)
    levels.eval()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_layers_that_integers_store_on_levels_of_their_own() -> None:
    model = Darknet(parse(STORED + CFG))
    assert model.stored == Stored(groups=((2,), (3, 4, 5, 6), (8,)), before=(1,))
    found = {name for name, module in model.named_modules() if isinstance(module, Levels)}
    assert found == {f"blocks.{place}" for place in ("1.early_levels", "2.levels", "3.levels", "4.levels", "8.levels")}
    assert Darknet(parse(NET + CFG)).stored is None


def test_maps_that_are_joined_share_their_levels() -> None:
    model = trained(STORED + CFG)
    one, other = model.blocks[3].levels, model.blocks[4].levels
    assert not torch.equal(one.a_limits, other.a_limits)
    assert one.grid() == other.grid()


def test_a_float_network_stores_nothing() -> None:
    model = Darknet(parse(STORED + FLOAT))
    assert model.stored == Stored((), ())


@pytest.mark.parametrize("suffix", ["pt", "weights"])
def test_files_keep_the_levels(suffix: str, tmp_path: Path) -> None:
    model, path = trained(STORED + CFG), tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save({"model": model.state_dict(), "cfg": STORED + CFG}, path)
    else:
        save_weights(model, path)
    again, x = load_model(parse(STORED + CFG), path).eval(), torch.rand(1, 3, 32, 32)
    assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize("text", [NET + CFG, NET + FLOAT], ids=["quantised", "float"])
def test_weights_without_levels_fill_a_network_with_them_and_back(text: str, tmp_path: Path) -> None:
    plain, path = trained(text), tmp_path / "plain.weights"
    save_weights(plain, path)
    model = load_model(parse(STORED + CFG), path)
    assert all(module.is_fresh for module in model.modules() if isinstance(module, Levels))
    assert torch.equal(model.blocks[8].conv.weight, plain.blocks[8].conv.weight)
    stored = trained(STORED + CFG)
    assert len(load_state(plain, stored.state_dict(), path)) == len(plain.layers)
    load_state(stored, plain.state_dict(), path)
    assert all(module.is_fresh for module in stored.modules() if isinstance(module, Levels))


def test_levels_move_numbers_by_half_a_step() -> None:
    model, x = trained(STORED + CFG), torch.rand(2, 3, 32, 32)
    kept, (y,) = model.features(x, [2])
    levels, model.blocks[2].levels = model.blocks[2].levels, nn.Identity()
    raw, (z,) = model.features(x, [2])
    assert not torch.equal(kept[0], raw[0])
    assert len(y.unique()) < len(z.unique())
    inside = (z > y.min()) & (z < y.max())
    assert (y - z)[inside].abs().max() <= levels.grid().step / 2 + 1e-6


def test_nothing_to_store_is_told(caplog) -> None:
    text = STORED + CFG.replace("[quan_convolutional]", "[quan_convolutional]\nw_bits=16")
    assert Darknet(parse(text)).stored == Stored((), ())
    assert "[net] map_bits=8 stores no map: no convolution computes in integers (leave it out)" in caplog.text


def test_other_bits_are_refused() -> None:
    with pytest.raises(CfgError, match="'map_bits' expects"):
        Darknet(parse(STORED.replace("=8", "=7") + CFG))
