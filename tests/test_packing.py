"""Packed weights: what is restored quantises to the same numbers, to the last bit, and the file is as small as told."""

from pathlib import Path

import pytest
import torch
from networks import FIXTURES, random, seeded

from models import load_cfg, load_model
from models.grid import Grid
from models.packing import pack, pack_weight, restore_weight, unpack
from models.quant import QuantConv2d
from models.weights import load_checkpoint, save_checkpoint

CFGS = [FIXTURES / "valid/quantised.cfg", FIXTURES / "valid/quantised_steps.cfg"]
BITS = [("dorefa", range(1, 9)), ("lsq", range(1, 9)), ("iao", range(2, 9))]


def test_bits_by_hand() -> None:
    packed = pack(torch.tensor([5, 2, 7, 0, 1]), 3)
    assert packed.tolist() == [0b11_010_101, 0b0_001_000_1]
    assert unpack(packed, 3, 5).tolist() == [5, 2, 7, 0, 1]


@pytest.mark.parametrize("scale", [0.05, 3, 1e-10, 0])
@pytest.mark.parametrize(("method", "bits"), [(method, bits) for method, each in BITS for bits in each])
def test_restored_weights_quantise_to_the_same(method: str, bits: int, scale: float) -> None:
    conv = QuantConv2d(6, 10, 3, groups=2, grid=Grid(bits, 8, 10, method))
    conv.weight.data = scale * random(10, 3, 3, 3)
    conv.weight.data[3] = 0
    conv.reset_state()
    again = QuantConv2d(6, 10, 3, groups=2, grid=conv.grid)
    again.load_state_dict(conv.state_dict())
    packed = pack_weight(conv)
    assert packed["levels"].numel() == -(-270 * bits // 8)
    again.weight.data = restore_weight(packed)
    for ours, theirs in zip(again.weight_levels(), conv.weight_levels(), strict=True):
        assert ours.equal(theirs)
    x = random(1, 6, 7, 7)
    assert again(x).equal(conv(x))


@pytest.mark.parametrize("path", CFGS, ids=lambda path: path.stem)
def test_a_packed_checkpoint_is_the_network(path: Path, command, tmp_path: Path) -> None:
    model = seeded(path)
    described = {"cfg": path.read_text(), "cfg_path": str(path), "names": ["a", "b"], "model": model.state_dict()}
    save_checkpoint(tmp_path / "whole.pt", described)
    outcome = command("utils/export", "--weights", "whole.pt", "--output", "packed.pt", "--packed")
    assert outcome.status == 0, outcome.err
    size = (tmp_path / "packed.pt").stat().st_size
    assert f": the file has {size} bytes" in outcome.out
    assert size < (tmp_path / "whole.pt").stat().st_size
    again, x = load_model(load_cfg(path), tmp_path / "packed.pt"), random(1, 3, 64, 96)
    with torch.inference_mode():
        assert again(x)[0].equal(model(x)[0])
        assert again.fuse()(x)[0].equal(model.fuse()(x)[0])


def test_what_cannot_be_packed_is_told(command, trained: Path) -> None:
    outcome = command("utils/export", "--weights", trained, "--output", "packed.pt", "--packed")
    assert outcome.status == 2
    assert "--packed: demo.cfg has no quantised convolution of 1 to 8 bits\n" in outcome.err
    outcome = command("utils/export", "--weights", trained, "--output", "a.weights", "--packed")
    assert outcome.status == 2
    assert "argument --packed: goes with --format pt alone" in outcome.err


def test_damaged_packs_are_refused(command, tmp_path: Path) -> None:
    model = seeded(CFGS[0])
    packed = {"blocks.1.conv.weight": pack_weight(model.blocks[1].conv)}
    packed["blocks.1.conv.weight"]["levels"] = packed["blocks.1.conv.weight"]["levels"][:-1]
    described = {"cfg": CFGS[0].read_text(), "names": ["a", "b"], "model": model.state_dict(), "packed": packed}
    save_checkpoint(tmp_path / "bad.pt", described)
    outcome = command("detect", "--weights", "bad.pt", "--source", ".")
    assert (outcome.status, outcome.err) == (2, "bad.pt: holds packed weights that cannot be read (damaged?)\n")
    assert "packed" in described
    with pytest.raises(ValueError, match="packed weights"):
        load_checkpoint(tmp_path / "bad.pt")
