"""Training as a user runs it: what a run leaves, killing and resuming, and what stops it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._inductor.exc import CppCompileError
from torch._inductor.graph import GraphLowering

from models import load_cfg, load_model
from models.weights import load_checkpoint, save_checkpoint
from utils.log import DataError
from utils.runs import run_folder

ROOT = Path(__file__).resolve().parent.parent
CFG = ROOT / "tests/fixtures/tiny.cfg"


def flags(scenes: Path, *more: object) -> list[object]:
    basic = ("--cfg", CFG, "--data", scenes, "--epochs", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu")
    return [*basic, "--precision", "fp32", "--name", "run", *more]


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(file)["model"]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_run_leaves_everything_it_promises(command, scenes, tmp_path):
    outcome = command("train", *flags(scenes))
    assert outcome.status == 0, outcome.err
    run = tmp_path / "runs/run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert set(rows[0]["loss"]) == {"loss", "box", "objectness", "class"}
    assert {"map50", "map50_95", "precision", "recall", "f1", "lr", "seconds"} <= rows[1].keys()
    for name in (
        "train.log",
        "settings.json",
        "curves.png",
        "labels.png",
        "first_batch.jpg",
        "second_batch.jpg",
        "third_batch.jpg",
        "rates.png",
        "ap.png",
        "confusion.png",
        "predictions.jpg",
        "last.pt",
        "best.pt",
        "last.weights",
        "best.weights",
    ):
        assert (run / name).stat().st_size > 0, name
    events = EventAccumulator(str(run)).Reload().Tags()
    assert {"loss/box", "lr", "map50"} <= set(events["scalars"])
    assert set(events["images"]) == {path.stem for path in [*run.glob("*.png"), *run.glob("*.jpg")]}
    assert (tmp_path / "weights/last.pt").read_bytes() == (run / "last.pt").read_bytes()
    checkpoint = load_checkpoint(run / "last.pt")
    assert checkpoint["names"] == ["balloon", "sailboat", "fish", "butterfly"]
    assert checkpoint["cfg"] == CFG.read_text()
    from_darknet = load_model(CFG, run / "last.weights")
    trained = load_model(CFG, run / "last.pt")
    assert from_darknet.header == (0, 2, 5, 24)
    names = [name for name in trained.state_dict() if "num_batches" not in name]
    assert all(torch.equal(trained.state_dict()[name], from_darknet.state_dict()[name]) for name in names)


def test_a_second_run_overwrites_nothing(command, scenes, tmp_path):
    command("train", *flags(scenes, "--epochs", 1))
    first = (tmp_path / "runs/run/last.pt").read_bytes()
    outcome = command("train", *flags(scenes, "--epochs", 1, "--seed", 1))
    assert "runs/run-2" in outcome.out
    assert (tmp_path / "runs/run/last.pt").read_bytes() == first
    assert (tmp_path / "weights/last.pt").read_bytes() == (tmp_path / "runs/run-2/last.pt").read_bytes()


@pytest.mark.parametrize(
    "more", [(), ("--adam", "--multi-scale", "--workers", 1), ("--rect", "--cache-images", "disk")]
)
def test_a_killed_training_resumes_bit_for_bit(command, scenes, tmp_path, more):
    arguments = [str(flag) for flag in flags(scenes, "--epochs", 4, *more)]
    assert command("train", *arguments, "--name", "whole").status == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments, "--name", "killed"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoint = tmp_path / "runs/killed/last.pt"
    sign = checkpoint if not more else tmp_path / "runs/killed/metrics.jsonl"  # in the first epoch, or after one
    deadline = time.time() + 120
    while not sign.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert load_checkpoint(checkpoint)["epoch"] < 4
    assert command("train", "--resume", checkpoint).status == 0
    assert_equal(weights_of(tmp_path / "runs/whole/last.pt"), weights_of(checkpoint))
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "runs/killed/metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]


def test_a_finished_run_is_not_resumed(command, scenes):
    command("train", *flags(scenes, "--epochs", 1))
    outcome = command("train", "--resume")
    assert outcome.status == 2
    assert outcome.err == (
        "weights/last.pt: its training is finished (start a new one with --weights weights/last.pt)\n"
    )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(command, scenes, tmp_path):
    command("train", *flags(scenes, "--epochs", 1))
    good = weights_of(tmp_path / "weights/last.pt")
    outcome = command("train", *flags(scenes, "--epochs", 3, "--lr", 1e9))
    assert outcome.status == 2
    assert "the last checkpoint is kept" in outcome.err
    assert "Traceback" not in outcome.err
    assert_equal(good, weights_of(tmp_path / "runs/run/last.pt"))
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "weights/last.pt").values())


def test_a_full_disk_stops_with_one_line_and_harms_nothing(command, scenes, tmp_path):
    command("train", *flags(scenes, "--epochs", 1))
    good = (tmp_path / "weights/last.pt").read_bytes()
    limit = len(good) * 3 // 2  # bytes a file may have: too few for a last.pt that carries the trainer's state
    outcome = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, flags(scenes, "--name", "full"))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert outcome.returncode == 2
    last_line = outcome.stderr.splitlines()[-1]
    assert last_line.startswith("runs/full/last.pt: cannot write:")
    assert "unharmed" not in last_line  # there was none
    assert "Traceback" not in outcome.stderr
    assert (tmp_path / "weights/last.pt").read_bytes() == good
    assert not list((tmp_path / "runs/full").glob("*.partial"))


def test_partial_weights_fill_the_layers_they_hold(command, scenes, tmp_path):
    command("train", *flags(scenes, "--epochs", 1))
    data = (tmp_path / "runs/run/last.weights").read_bytes()
    first = 20 + 4 * (4 * 8 + 8 * 3 * 9)  # header and layer 0
    (tmp_path / "backbone.conv.1").write_bytes(data[:first])
    outcome = command("train", *flags(scenes, "--epochs", 1, "--weights", tmp_path / "backbone.conv.1"))
    assert outcome.status == 0, outcome.err
    assert f"{tmp_path}/backbone.conv.1 fills layers 0 of 13, the others start fresh" in outcome.out
    (tmp_path / "cut.weights").write_bytes(data[: first + 40])
    outcome = command("train", *flags(scenes, "--weights", tmp_path / "cut.weights"))
    assert outcome.status == 2
    assert "ends inside layer 1" in outcome.err


def test_sparse_training_shrinks_gammas(command, scenes, tmp_path):
    def mean_gamma(*more: object) -> float:
        command("train", *flags(scenes, "--epochs", 3, "--notest", "--lr", 0.02, *more))
        folder = sorted((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)[-1]
        state = weights_of(folder / "last.pt")
        return float(np.mean([value.abs().mean() for name, value in state.items() if name.endswith("bn.weight")]))

    assert mean_gamma("-sr", "--s", 5) < mean_gamma() - 0.01


def test_frozen_layers_and_their_statistics_stay(command, scenes, tmp_path):
    command("train", *flags(scenes, "--epochs", 1))
    before = weights_of(tmp_path / "runs/run/last.pt")
    outcome = command("train", *flags(scenes, "--epochs", 2, "--weights", "weights/last.pt", "--freeze", 3, "-sr"))
    assert outcome.status == 0, outcome.err
    after = weights_of(tmp_path / "runs/run-2/last.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name]) and "num_batches" not in name}
    assert {int(name.split(".")[1]) for name in changed} == {5, 7, 10, 11}  # 0 to 2 stay, those between have no weights
    assert "blocks.0.bn.running_mean" in before


def test_patience_ends_a_training_that_gets_no_better(command, scenes, tmp_path):
    outcome = command("train", *flags(scenes, "--epochs", 9, "--lr", 1e-12, "--patience", 2, "--freeze", 9))
    assert outcome.status == 0, outcome.err
    assert "no better mAP since epoch 1: the training ends (--patience 2)" in outcome.out
    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert "trainer" not in load_checkpoint(tmp_path / "runs/run/last.pt")


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_plain_one(command, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiler"))  # a kill may leave half a library in it
    small = ("--epochs", 1, "--lr", 1e-4)  # larger steps magnify rounding further
    command("train", *flags(scenes, *small))
    outcome = command("train", *flags(scenes, *small, "--compile", "--name", "compiled"))
    assert outcome.status == 0, outcome.err
    metrics = [(tmp_path / f"runs/{name}/metrics.jsonl").read_text() for name in ("run", "compiled")]
    plain, compiled = (json.loads(text)["loss"] for text in metrics)
    assert compiled == pytest.approx(plain, rel=0.05)


def test_without_a_compiler_compile_says_so(command, scenes, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", fail)
    outcome = command("train", *flags(scenes, "--compile"))
    assert outcome.status == 2
    reason = "Failed to find C++ compiler"
    assert outcome.err.splitlines()[-1] == f"--compile: torch.compile does not work here: {reason} (leave it out)"


@pytest.mark.parametrize("is_backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiler_that_fails_on_the_network_alone_says_so(command, scenes, tmp_path, monkeypatch, is_backward):
    real = GraphLowering.compile_to_module

    def fail(graph: GraphLowering) -> object:
        if graph.is_backward == is_backward and len(graph.graph.nodes) > 20:  # compile_model's try is smaller
            raise CppCompileError(["c++"], "no such instruction")
        return real(graph)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiler"))
    monkeypatch.setattr(GraphLowering, "compile_to_module", fail)
    torch._dynamo.reset()  # it keeps what it compiled for other networks of the same code
    outcome = command("train", *flags(scenes, "--compile", "--epochs", 1))
    assert outcome.status == 2
    reason = "C++ compile error"
    assert outcome.err.splitlines()[-1] == f"--compile: torch.compile does not work here: {reason} (leave it out)"
    assert "Traceback" not in outcome.err


def test_one_class(command, scenes, tmp_path):
    cfg = tmp_path / "one.cfg"
    cfg.write_text(CFG.read_text().replace("classes=4", "classes=1").replace("filters=18", "filters=12"))
    outcome = command("train", *flags(scenes, "--cfg", cfg, "--single-cls", "--epochs", 1))
    assert outcome.status == 0, outcome.err
    assert load_checkpoint(tmp_path / "runs/run/last.pt")["names"] == ["object"]


def test_two_datasets_of_one_picture(command, scenes, tmp_path):
    """One picture to train on, one to test on, and neither has a box."""
    folder = tmp_path / "empty"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    picture = next((scenes.parent / "images/train").iterdir())
    (folder / "images/a.jpg").write_bytes(picture.read_bytes())
    (folder / "labels/a.txt").write_text("")
    (folder / "a.data").write_text("classes=4\ntrain=images\nvalid=images\nnames=a.names\n")
    (folder / "a.names").write_text("a\nb\nc\nd\n")
    outcome = command("train", *flags(folder / "a.data", "--epochs", 2, "--batch-size", 16))
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()[-1])["map50"] == 0

    one = ("--epochs", 1, "--batch-size", 1, "--img-size", 16)
    outcome = command("train", *flags(folder / "a.data", *one))
    assert outcome.status == 2
    assert "a channel has a single number, which has no variance" in outcome.err.splitlines()[-1]


def test_corners_are_no_centres(command, scenes, tmp_path):
    head = "[Gaussian_yolo]\nmask=0\nanchors=8,8\nclasses=4\nyolo_point=left_top\n"
    (tmp_path / "x.cfg").write_text(f"[net]\nwidth=32\nheight=32\n[convolutional]\nfilters=13\nstride=8\n{head}")
    outcome = command("train", "--data", scenes, "--cfg", "x.cfg", "--img-size", 32)
    assert outcome.status == 2
    assert "x.cfg:11: yolo_point=left_top is detected with, but not trained" in outcome.err.splitlines()[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_epoch_in_mixed_precision_on_a_gpu(command, scenes, tmp_path, precision):
    outcome = command("train", *flags(scenes, "--epochs", 1, "--device", 0, "--precision", precision))
    assert outcome.status == 0, outcome.err
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "runs/run/last.pt").values())


def test_resuming_takes_no_other_flags(command, scenes, tmp_path):
    outcome = command("train", "--resume", "x.pt", "--epochs", 9)
    assert outcome.status == 2
    assert "give no other flag but --device and --workers" in outcome.err


def test_a_copy_one_epoch_behind_belongs_to_its_run(tmp_path, monkeypatch):
    """What a kill leaves between writing a run's last.pt and copying it to weights/."""
    monkeypatch.chdir(tmp_path)
    run = {"cfg": "[net]\n", "model": {}, "settings": {"seed": 0}, "recipe": {"lr": 0.01}, "folder": "runs/a"}
    save_checkpoint("runs/a/last.pt", run | {"epoch": 2})
    assert run_folder("weights/last.pt", run | {"epoch": 1}) == Path("runs/a")
    with pytest.raises(DataError, match=r"is not the last\.pt of runs/a"):
        run_folder("weights/last.pt", run | {"settings": {"seed": 1}})
    with pytest.raises(DataError, match=r"is not the last\.pt of runs/b"):
        run_folder("weights/last.pt", run | {"folder": "runs/b"})


def test_sizes_to_train_and_to_test_at_differ(command, scenes):
    outcome = command("train", *flags(scenes, "--epochs", 1, "--img-size", 64, 64, 96))
    assert outcome.status == 0, outcome.err


def test_the_copy_in_weights_resumes_its_own_run_only(command, scenes, tmp_path):
    command("train", *flags(scenes, "--epochs", 1))
    (tmp_path / "weights/last.pt").write_bytes((tmp_path / "runs/run/best.pt").read_bytes())
    outcome = command("train", "--resume")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--cfg", "missing.cfg"], "missing.cfg: cannot read the cfg: No such file or directory\n"),
        (["--data", "missing.data"], "missing.data: cannot be read: No such file or directory\n"),
        (["--weights", "missing.weights"], "missing.weights: cannot read the weights: No such file or directory\n"),
        (["--device", "7"], "--device 7: this machine has"),
        (["--precision", "fp16"], "--precision fp16: needs a GPU"),
        (["--img-size", "100"], "--img-size 100: expected a multiple of 16 for this cfg (say 96)\n"),
        (["--cfg", ROOT / "cfg/yolov3-tiny.cfg"], "the head has classes=80, but"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--img-size", "96", "64", "--multi-scale"], "--img-size expects N, or MIN MAX"),
        (["--img-size", "64", "96"], "--img-size MIN MAX needs --multi-scale"),
        (["--s", "0.1"], "--s needs -sr"),
        (
            ["--batch-size", "auto"],
            "--batch-size auto: measures the memory of a GPU (on the CPU give a number, say 16)",
        ),
        (["--batch-size", "many"], "--batch-size: expected a number, gets 'many'"),
        (["--freeze", "13"], "--freeze 13: nothing is left to learn (the network has 13 layers)"),
        (["--patience", "2", "--notest"], "--patience needs the tests that --notest leaves out"),
        (["--cache-images", "tape"], "--cache-images: invalid choice: 'tape'"),
        (["--recipe", "darknet", "--adam"], "--recipe darknet takes everything from the cfg: leave out --adam"),
        (["--recipe", "darknet", "--multi-scale"], "leave out --multi-scale"),
    ],
)
def test_mistakes_are_one_line_and_status_2(command, scenes, change, message):
    outcome = command("train", *flags(scenes, *change))
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_the_cfg_of_a_checkpoint_is_the_one_that_was_trained(command, scenes, tmp_path):
    cfg = tmp_path / "mine.cfg"
    cfg.write_text("# my notes\n" + CFG.read_text())
    command("train", *flags(scenes, "--cfg", cfg, "--epochs", 1))
    cfg.write_text("[net]\n")
    outcome = command("test", "--device", "cpu")
    assert outcome.status == 0, outcome.err
    assert load_cfg(CFG).sections[1].options.keys()
