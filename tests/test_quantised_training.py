"""Training with quantised convolutions as a user runs it: their bits, where they start, resuming and distilling."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_end, flags, stop_after

from models import Darknet, dump, load_cfg, parse, save_weights
from models.quant import QuantConv2d
from models.weights import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CFG = ROOT / "tests/fixtures/tiny.cfg"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """Write tiny.cfg with a convolution of every method."""
    text, count = CFG.read_text(), iter(["", "method=lsq\n", "method=lsq\nsymmetric=1\n", "method=iao\n", ""])

    def section(match: re.Match) -> str:
        keys = next(count)
        return f"[quan_convolutional]\n{keys}w_bits=6\n{match[1]}" if keys else match[0]

    path = tmp_path / "quantised.cfg"
    path.write_text(re.sub(r"\[convolutional\]\n(batch)", section, text))
    return path


def steps(file: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in load_checkpoint(file)["model"].items() if name.endswith(("_step", "_limits"))
    }


def test_steps_go_on_bit_for_bit(command, scenes, tmp_path, monkeypatch, quantised):
    more = ["--cfg", quantised, "--notest", "--w-bits", 5]
    assert command("train", *flags(scenes, "whole", *more)).status == 0
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert command("train", *flags(scenes, "parts", *more)).status == 130
    middle = steps(tmp_path / "runs/parts/last.pt")
    assert command("train", "--resume", "runs/parts/last.pt").status == 0
    assert_same_end(tmp_path, "whole", "parts")
    end = steps(tmp_path / "runs/parts/last.pt")
    assert len(end) == 5
    assert not any(tensor.equal(middle[name]) for name, tensor in end.items())


def test_bits_go_into_every_quantised_section_and_the_checkpoint(command, scenes, tmp_path, quantised):
    text = quantised.read_text().replace("[dropout]", "[residual]\nw_bits=8\n\n[dropout]")
    quantised.write_text(text)
    outcome = command("train", *flags(scenes, "run", "--cfg", quantised, "--epochs", 1, "--w-bits", 4, "--a-bits", 3))
    assert outcome.status == 0, outcome.err
    assert "the steps of the inputs of 2 convolutions start from the first batch\n" in outcome.out
    model = Darknet(parse(load_checkpoint(tmp_path / "runs/run/last.pt")["cfg"]))
    grids = [module.grid for module in model.modules() if isinstance(module, QuantConv2d)]
    assert {(grid.w_bits, grid.a_bits) for grid in grids} == {(4, 3)}
    assert len(grids) == 5
    assert quantised.read_text() == text


def test_bits_need_a_quantised_section(command, scenes):
    for flag in ("--w-bits", "--a-bits"):
        outcome = command("train", *flags(scenes, "run", flag, 4))
        assert outcome.status == 2
        assert outcome.err.startswith(
            f"{CFG}: has no [quan_convolutional] for --w-bits and --a-bits (docs/quantisation"
        )
    outcome = command("train", *flags(scenes, "run", "--w-bits", 20))
    assert outcome.status == 2
    assert "argument --w-bits: expected 1 to 16, or 32 for floating point, gets 20" in outcome.err


def test_a_quantised_student_starts_from_float_weights_and_learns_from_a_teacher(command, scenes, tmp_path, quantised):
    save_weights(Darknet(load_cfg(CFG)), tmp_path / "float.weights")
    more = ["--weights", "float.weights", "--t_cfg", CFG, "--t_weights", "float.weights", "--epochs", 1]
    outcome = command("distill", *flags(scenes, "run", "--cfg", quantised, *more))
    assert outcome.status == 0, outcome.err
    assert "float.weights: has no steps or ranges for 3 layers" in outcome.out
    assert "the steps of the inputs of 2 convolutions start from the first batch\n" in outcome.out


def test_statistics_start_from_quantised_numbers(command, scenes, tmp_path, quantised):
    save_weights(Darknet(load_cfg(CFG)), tmp_path / "float.weights")  # means 0 and variances 1
    for cfg, is_own in ((CFG, False), (quantised, True)):
        more = ["--weights", "float.weights", "--cfg", cfg, "--epochs", 1]
        outcome = command("train", *flags(scenes, cfg.stem, *more))
        assert outcome.status == 0, outcome.err
        assert ("batch normalisation starts from the statistics of the first" in outcome.out) == is_own
        state = load_checkpoint(tmp_path / f"runs/{cfg.stem}/last.pt")["model"]
        variances = torch.cat([each for name, each in state.items() if name.endswith("running_var")])
        assert ((variances - 1).abs().mean() > 0.5) == is_own  # a few steps move the float ones by 3 % each


def test_the_pages_command_leaves_the_first_and_the_heads_float(tmp_path: Path) -> None:
    page = (ROOT / "docs/quantisation.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^sed .*", page, re.MULTILINE)
    subprocess.run(line.replace("> ", f"> {tmp_path}/"), shell=True, check=True, cwd=ROOT)
    model = Darknet(load_cfg(tmp_path / "quantised.cfg"))
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    plain = [conv for conv in convs if not isinstance(conv, QuantConv2d)]
    assert [conv.out_channels for conv in plain] == [16, 255, 255]
    assert len(convs) == 13
    assert dump(model.cfg).count("[quan_convolutional]") == 10
