"""`train.py --recipe darknet`: the cfg says how long, how fast and on what, and real pictures are learned."""

import json
from pathlib import Path

import pytest

from benchmarks.bccd import write_bccd
from models.weights import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = (ROOT / "tests/fixtures/tiny.cfg").read_text()
NET = "[net] batch=8 subdivisions=2 learning_rate=.01 burn_in=2 power=1 mosaic=1 policy=steps steps=4 scales=.5\n"
NET = NET.replace(" ", "\n")


def write_cfg(path: Path, net: str) -> Path:
    path.write_text(TINY.replace("[net]\n", net, 1))
    return path


def test_the_cfg_says_how_long_and_how_fast(command, scenes, tmp_path):
    cfg = write_cfg(tmp_path / "a.cfg", NET + "max_batches=5\n")
    flags = ("--recipe", "darknet", "--cfg", cfg, "--data", scenes, "--workers", 0, "--device", "cpu", "--name", "run")
    outcome = command("train", *flags)
    assert outcome.status == 0, outcome.err
    assert "policy steps, 8 images a step, 4 at a time; 3 epochs are 6 iterations of max_batches=5" in outcome.out
    assert "give test.py and detect.py --stretch" in outcome.out
    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([0.01, 0.005, 0.005])  # of iterations 3, 5 and 7
    assert load_checkpoint(tmp_path / "runs/run/last.pt")["settings"]["batch_size"] == 4


@pytest.mark.parametrize(("letter_box", "is_told"), [(0, True), (1, False)])
def test_who_learned_from_stretched_pictures_is_told_to_stretch(command, scenes, tmp_path, letter_box, is_told):
    cfg = write_cfg(tmp_path / "a.cfg", f"{NET}letter_box={letter_box}\n")
    flags = ("--recipe", "darknet", "--cfg", cfg, "--data", scenes, "--workers", 0, "--device", "cpu", "--epochs", 1)
    assert command("train", *flags, "--name", "run", "--notest").status == 0
    weights = ("--weights", "runs/run/last.pt", "--device", "cpu")
    line = "runs/run/last.pt learned from stretched pictures, as Darknet's recipe makes them: give --stretch\n"
    pictures = scenes.parent / "images/valid"
    for script, *more in (("test", "--noplots", "--workers", 0), ("detect", "--source", pictures)):
        plain, stretched = command(script, *weights, *more), command(script, *weights, *more, "--stretch")
        assert plain.status == stretched.status == 0
        assert plain.out.count(line) == is_told
        assert "give --stretch" not in stretched.out


def test_without_max_batches_epochs_are_asked_for(command, scenes, tmp_path):
    flags = ("--recipe", "darknet", "--cfg", write_cfg(tmp_path / "a.cfg", NET), "--data", scenes, "--device", "cpu")
    outcome = command("train", *flags)
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert last == f"{tmp_path}/a.cfg: [net] has no max_batches, which says how long to train (or give --epochs)"


@pytest.mark.slow
def test_yolov3_tiny_learns_blood_cells(command, shared_data, tmp_path):
    text = (ROOT / "cfg/yolov3-tiny.cfg").read_text()
    for old, new in (
        ("classes=80", "classes=3"),
        ("filters=255", "filters=24"),
        ("batch=64", "batch=8"),
        ("subdivisions=16", "subdivisions=1"),
        ("burn_in=1000", "burn_in=20"),
        ("max_batches=500200", "max_batches=222"),
        ("steps=400000,450000", "steps=170,200"),
        ("random=1", "random=0"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "tiny3.cfg").write_text(text)
    data = write_bccd(tmp_path / "bccd")
    flags = ("--cfg", "tiny3.cfg", "--data", data, "--img-size", 160, "--device", "cpu", "--workers", 0, "--notest")
    outcome = command("train", "--recipe", "darknet", *flags, "--name", "run")
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"]["loss"] for row in rows]
    assert len(rows) == 6
    assert losses[-1] < losses[0] / 2
    assert rows[-1]["map50"] > 0.01
