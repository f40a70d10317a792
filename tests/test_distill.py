"""distill.py as a user runs it: what it logs and leaves, resuming, two processes, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from documents import code_blocks, commands, run_python

from models import Darknet, load_cfg, save_weights
from models.weights import load_checkpoint, save_checkpoint
from tests.networks import CLASSIFIER, FIXTURES, ROOT
from tests.processes import run_together
from tests.test_resume import assert_same_end, flags, stop_after
from utils import dist
from utils.distillation import Distiller, Lessons
from utils.engine import distribute, make_step_loss
from utils.recipe import Recipe
from utils.scenes import write_dataset

CPU = torch.device("cpu")
CFG = FIXTURES / "tiny.cfg"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Give the .weights of a teacher that is wider than its student; its cfg lies beside it."""
    cfg = tmp_path / "wide.cfg"
    cfg.write_text(CFG.read_text().replace("filters=32", "filters=48"))
    torch.manual_seed(5)
    save_weights(Darknet(load_cfg(cfg)), tmp_path / "wide.weights")
    return tmp_path / "wide.weights"


def taught(teacher: Path) -> list[object]:
    return ["--t_cfg", teacher.with_suffix(".cfg"), "--t_weights", teacher, "--notest"]


def test_distilling_goes_on_bit_for_bit(command, scenes, tmp_path, monkeypatch, teacher):
    """With adapters, masks, running means, and a teacher whose file is gone when the run is resumed."""
    more = [*taught(teacher), "--kd", "logits,box+cwd,mgd", "--kd-schedule", "cosine", "--epochs", 3]
    outcome = command("distill", *flags(scenes, "whole", *more))
    assert outcome.status == 0, outcome.err
    assert f"learns logits+box+cwd+mgd from {teacher.with_suffix('.cfg')}, at 0.5 of the detection loss" in outcome.out
    rows = [json.loads(line) for line in (tmp_path / "runs/whole/metrics.jsonl").read_text().splitlines()]
    assert {"kd", "kd_logits", "kd_box", "kd_cwd", "kd_mgd"} <= rows[0]["loss"].keys()
    assert rows[0]["loss"]["kd"] > rows[2]["loss"]["kd"] > 0
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert command("train", *flags(scenes, "parts", *more)).status == 130  # which does the same
    state = load_checkpoint(tmp_path / "runs/parts/last.pt")
    assert set(state["trainer"]["distiller"]["means"]) == {"detection", "logits", "box", "cwd", "mgd"}
    assert state["model"].keys() == Darknet(load_cfg(CFG)).state_dict().keys()
    assert load_checkpoint(tmp_path / "runs/parts/teacher.pt")["names"] == state["names"]
    teacher.unlink()
    assert command("distill", "--resume", "runs/parts/last.pt").status == 0
    assert_same_end(tmp_path, "whole", "parts")


def gradients(pictures: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Give the parts of the loss and all gradients of one batch, with the statistics of batch normalisation frozen."""
    torch.manual_seed(1)
    student = Darknet(load_cfg(CFG)).eval()
    other = load_cfg(CFG)
    distiller = Distiller(student, Darknet(other), Lessons(("logits", "box", "cwd")))
    network = distribute(student, CPU, distiller.pupil)
    step_loss = make_step_loss(network, student, Recipe(), CPU, torch.float32, distiller)
    loss, parts = step_loss(pictures, targets)
    loss.backward()
    means = dist.averages([parts[name].item() for name in ("kd", "kd_logits", "kd_box", "kd_cwd")])
    return [torch.tensor(means), *(parameter.grad for parameter in student.parameters())]


@pytest.mark.parametrize("first", [3, 4])
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path, first):
    torch.manual_seed(0)
    pictures = torch.rand(5, 3, 64, 64)
    targets = torch.tensor([[0, 1, 0.3, 0.4, 0.3, 0.2], [1, 0, 0.5, 0.5, 0.8, 0.7], [3, 1, 0.6, 0.3, 0.25, 0.3]])

    def work(rank: int) -> None:
        low, high = ((0, first), (first, 5))[rank]
        own = targets[(targets[:, 0] >= low) & (targets[:, 0] < high)] - torch.tensor([low, 0, 0, 0, 0, 0])
        with dist.joined(CPU):
            torch.save(gradients(pictures[low:high], own), tmp_path / f"{rank}.pt")

    assert run_together(2, work) == [0, 0]
    alone = gradients(pictures, targets)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for whole, one, other in zip(alone, *halves, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_mistakes_are_one_line_and_status_2(command, scenes, tmp_path, teacher):
    names = Path("wide.weights"), Path("wide.cfg")
    (tmp_path / "three.cfg").write_text(CFG.read_text().replace("classes=4", "classes=3").replace("=18", "=16"))
    save_weights(Darknet(load_cfg(tmp_path / "three.cfg")), tmp_path / "three.weights")
    save_weights(Darknet(load_cfg(CLASSIFIER)), tmp_path / "classifier.weights")
    grey = tmp_path / "grey.cfg"
    grey.write_text(CFG.read_text().replace("channels=3", "channels=1"))
    save_weights(Darknet(load_cfg(grey)), tmp_path / "grey.weights")
    fine = load_cfg(CFG)
    other = {"cfg": CFG.read_text(), "model": Darknet(fine).state_dict(), "names": list("abcd")}
    save_checkpoint(tmp_path / "other.pt", other)
    weights, cfg = names
    own = ["--t_cfg", cfg, "--t_weights", weights]
    cases = [
        ([], "give --t_weights, the teacher's, and with a .weights file its --t_cfg"),
        (["--t_cfg", cfg], "give --t_weights, the teacher's"),
        (["--t_weights", weights], "--t_cfg: not given, and wide.weights carries none (only a .pt does)"),
        (["--t_cfg", CFG, "--t_weights", weights], "wide.weights: is too long"),
        (["--t_cfg", "three.cfg", "--t_weights", "three.weights"], "the teacher knows 3 classes"),
        (["--t_weights", "other.pt"], "names balloon, sailboat, fish, butterfly, but other.pt learned a, b, c, d"),
        (["--t_cfg", CLASSIFIER, "--t_weights", "classifier.weights"], "is a classifier (expected a detector to learn"),
        (["--t_cfg", grey, "--t_weights", "grey.weights"], "the teacher sees 1 channels, the student 3"),
        ([*own, "--kd", "logit"], "does not know 'logit' (expected logits)"),
        ([*own, "--kd-weight", "-1"], "--kd-weight"),
        ([*own, "--kd", "box", "--kd-temperature", "3"], "--kd-temperature means nothing to --kd box"),
        ([*own, "--kd-temperature", "3"], "--kd-temperature means nothing to --kd pkd"),
        ([*own, "--kd-weight", "3", "--kd-share", ".3"], "--kd-share says what --kd-weight auto aims at"),
        ([*own, "--batch-size", "auto"], "--batch-size auto does not count what a teacher takes"),
        ([*own, "--resume", "x.pt"], "give no other flag but --device and --workers"),
    ]
    for more, message in cases:
        outcome = command("distill", *flags(scenes, "run", *more))
        assert outcome.status == 2, more
        assert message in outcome.err, more
        assert "Traceback" not in outcome.err
    outcome = command("train", *flags(scenes, "run", "--kd", "cwd"))
    assert outcome.status == 2
    assert "--kd needs --t_weights, the teacher's" in outcome.err


def test_a_coarser_teacher_wants_its_own_sizes(command, scenes, tmp_path):
    text = (ROOT / "cfg/yolov3-tiny.cfg").read_text().replace("classes=80", "classes=4").replace("=255", "=27")
    (tmp_path / "coarse.cfg").write_text(text)
    with torch.device("meta"):
        model = Darknet(load_cfg(tmp_path / "coarse.cfg"))
    save_weights(model.to_empty(device="cpu").apply(_zero), tmp_path / "coarse.weights")
    more = ["--t_cfg", "coarse.cfg", "--t_weights", "coarse.weights"]
    outcome = command("distill", *flags(scenes, "run", *more, "--img-size", 80))
    assert outcome.status == 2
    assert "coarse.cfg: the teacher takes sides of multiples of 32, not 80×80" in outcome.err
    outcome = command("distill", *flags(scenes, "run", *more, "--img-size", 96, "--rect"))
    assert "--rect makes others" in outcome.err


def _zero(module: torch.nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.zero_()


@pytest.mark.slow
def test_the_pages_commands_run(command, tmp_path):
    shutil.copytree(ROOT / "cfg", tmp_path / "cfg")
    write_dataset(tmp_path / "data/demo", train=6, valid=2, size=64, seed=0)
    page = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    lines = [line for kind, block in code_blocks(page) if kind == "bash" for line in commands(block)]
    assert len(lines) == 3
    for line in lines:
        run_python(line, command)
    assert {path.parent.name for path in tmp_path.glob("runs/*/last.pt")} == {"teacher", "demo"}
    assert (tmp_path / "runs/demo/teacher.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_teacher_on_a_gpu(command, scenes, tmp_path, teacher, precision):
    more = [*taught(teacher), "--kd", "logits+box+cwd+pkd+mgd", "--device", 0, "--precision", precision]
    outcome = command("distill", *flags(scenes, "run", *more))
    assert outcome.status == 0, outcome.err
    state = load_checkpoint(tmp_path / "runs/run/last.pt")["model"]
    assert all(value.isfinite().all() for value in state.values())
