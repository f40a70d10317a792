"""The benchmark of distillation trains what it compares, and times what it says."""

from pathlib import Path

import pytest
import torch

from benchmarks.distillation import ALONE, Student, compare, step_rows
from models import Darknet, load_cfg, save_weights
from models.weights import save_checkpoint
from tests.networks import FIXTURES, ROOT
from utils.head_pairs import KINDS

CFG = FIXTURES / "tiny.cfg"


def test_the_ratio_is_to_a_step_and_a_pass_together():
    alone, forward, *taught = step_rows(CFG, Darknet(load_cfg(CFG)), 64, 2, rounds=1)
    assert [row["what"] for row in taught] == [f"step with {kind}" for kind in KINDS]
    for row in taught:
        assert row["ratio"] == pytest.approx(row["ms"] / (alone["ms"] + forward["ms"]))
    assert "ratio" not in alone | forward


@pytest.mark.slow
def test_a_student_is_trained_alone_and_by_a_strategy(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    torch.manual_seed(0)
    teacher = Darknet(load_cfg(CFG))
    save_checkpoint("runs/teacher/last.pt", {"cfg": CFG.read_text(), "model": teacher.state_dict()})
    save_weights(teacher, "start.weights")
    student = Student("a student", CFG, "by-others", ("--weights", "start.weights"), "teacher")
    rows = compare([student], scenes, (ALONE, "logits+cwd"), [0, 1], epochs=1)
    assert [row["kd"] for row in rows] == [ALONE, "logits+cwd"]
    assert [row["seeds"] for row in rows] == [2, 2]
    assert rows[0]["difference"] == "+0.000"
    names = {path.parent.relative_to("runs").as_posix() for path in Path("runs").rglob("metrics.jsonl")}
    others = {f"distillation/a-student-{each}" for each in ("alone-1", "logits+cwd-0", "logits+cwd-1")}
    assert names == {"by-others"} | others
    assert "kd_cwd" in (tmp_path / "runs/distillation/a-student-logits+cwd-0/metrics.jsonl").read_text()
