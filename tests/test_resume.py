"""Nothing is lost: a training that is interrupted, killed or out of disk goes on to the numbers it would have had."""

import errno
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.weights import load_checkpoint, save_checkpoint
from tests.processes import run_together
from utils import cli
from utils.log import start_logging
from utils.runs import Run

ROOT = Path(__file__).resolve().parent.parent
CFG = ROOT / "tests/fixtures/tiny.cfg"
HYPS = {"ema": "min_steps=1\n", "no-ema": "min_steps=1\nema_decay=0\n"}  # and two batches a step
CLOSING = "close_mosaic=0.5\nmixup=0.5\nimage_weights=1\n"  # mosaic in the first half alone


def train(*flags: object) -> None:
    """Run train.py in this process, as a user would in the working directory."""
    spec = importlib.util.spec_from_file_location("script_train", ROOT / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.argv = ["train.py", *map(str, flags)]
    cli.run(script.main)


def flags(scenes: Path, name: str, *more: object) -> list[object]:
    basic = ["--cfg", CFG, "--data", scenes, "--epochs", 4, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
    return [*basic, "--precision", "fp32", "--img-size", 64, "--name", name, *more]


def stop_after(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come at the end of an epoch, after its checkpoint."""

    def draw_curves(run: Run) -> None:
        if json.loads(run.metrics_file.read_text().splitlines()[-1])["epoch"] == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "draw_curves", draw_curves)


def assert_same_end(folder: Path, first: str, second: str) -> None:
    """Compare every number that two finished runs leave: all weights, and the figures of every epoch."""
    whole, parts = (load_checkpoint(folder / f"runs/{name}/last.pt") for name in (first, second))
    assert "trainer" not in whole
    assert "trainer" not in parts
    assert whole["epoch"] == parts["epoch"]
    assert [key for key, value in whole["model"].items() if not torch.equal(value, parts["model"][key])] == []
    rows = [
        [json.loads(line) | {"seconds": 0} for line in (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in (first, second)
    ]
    assert rows[0] == rows[1]


PRODUCT = list(itertools.product(HYPS, ("sgd", "adamw"), ("one-size", "multi-scale"), ("mosaic", "closing"), (1, 3)))
FEW = [("ema", "sgd", "one-size", "closing", 1), ("no-ema", "adamw", "multi-scale", "closing", 3)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FEW else pytest.mark.slow) for case in PRODUCT], ids=str
)
def test_an_interrupted_run_goes_on_bit_for_bit(command, scenes, tmp_path, monkeypatch, case):
    average, optimizer, scale, mosaic, epoch = case
    (tmp_path / "hyp").write_text(HYPS[average] + (CLOSING if mosaic == "closing" else "") + "nominal_batch=8\n")
    more = ["--hyp", "hyp", "--notest"]
    more += ["--adam"] if optimizer == "adamw" else []
    more += ["--multi-scale"] if scale == "multi-scale" else []
    assert command("train", *flags(scenes, "whole", *more)).status == 0
    with monkeypatch.context() as patch:
        stop_after(epoch, patch)
        assert command("train", *flags(scenes, "parts", *more)).status == 130
    assert load_checkpoint(tmp_path / "runs/parts/last.pt")["epoch"] == epoch
    assert command("train", "--resume", "runs/parts/last.pt").status == 0
    assert_same_end(tmp_path, "whole", "parts")


@pytest.mark.parametrize("more", [(), pytest.param(("--adam", "--multi-scale"), marks=pytest.mark.slow)])
def test_two_processes_go_on_bit_for_bit(scenes, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)

    def work(*given: object, epoch: int = 0) -> Callable[[int], None]:
        def run(rank: int) -> None:
            if epoch:
                patch = pytest.MonkeyPatch()
                done: list[None] = []

                def draw_curves(_: Run) -> None:
                    done.append(None)
                    if len(done) == epoch:
                        raise KeyboardInterrupt

                patch.setattr(Run, "draw_curves", draw_curves)
            train(*given)

        return run

    assert run_together(2, work(*flags(scenes, "whole", "--batch-size", 2, *more))) == [0, 0]
    assert run_together(2, work(*flags(scenes, "parts", "--batch-size", 2, *more), epoch=2)) == [130, 130]
    assert load_checkpoint("runs/parts/last.pt")["epoch"] == 2
    assert run_together(2, work("--resume", "runs/parts/last.pt")) == [0, 0]
    assert_same_end(tmp_path, "whole", "parts")


def test_a_run_goes_on_with_as_many_processes(command, scenes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        command("train", *flags(scenes, "run", "--notest"))
    checkpoint = load_checkpoint(tmp_path / "runs/run/last.pt")
    checkpoint["settings"]["processes"] = 4
    save_checkpoint(tmp_path / "runs/run/last.pt", checkpoint)
    outcome = command("train", "--resume", "runs/run/last.pt")
    assert outcome.status == 2
    assert outcome.err == "runs/run/last.pt: was trained by 4 processes, not 1 (start as many)\n"


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own and give its number."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        work()
    finally:
        os._exit(0)


@pytest.mark.slow
def test_no_kill_leaves_an_unreadable_checkpoint(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.waitpid(forked(lambda: train(*flags(scenes, "whole", "--epochs", 12, "--notest"))), 0)
    start = time.monotonic()
    os.waitpid(forked(lambda: train(*flags(scenes, "once", "--epochs", 12, "--notest"))), 0)
    seconds = time.monotonic() - start
    generator, checkpoint, kills = random.Random(0), tmp_path / "runs/killed/last.pt", 0
    while kills < 20:
        begun = ("--resume", checkpoint) if checkpoint.exists() else flags(scenes, "killed", "--epochs", 12, "--notest")
        child = forked(lambda begun=begun: train(*begun))
        time.sleep(generator.uniform(0, seconds / 6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        for file in (checkpoint, tmp_path / "weights/last.pt"):
            if file.exists():
                state = load_checkpoint(file)
                assert all(value.isfinite().all() for value in state["model"].values())
        if checkpoint.exists() and "trainer" not in load_checkpoint(checkpoint):
            break  # it came to its end between kills
        if not checkpoint.exists():
            for folder in (tmp_path / "runs").glob("killed*"):  # nothing to resume yet: start again in its place
                for file in folder.iterdir():
                    file.unlink()
    assert kills >= 5
    if "trainer" in load_checkpoint(checkpoint):
        os.waitpid(forked(lambda: train("--resume", checkpoint)), 0)
    assert_same_end(tmp_path, "whole", "killed")


@pytest.mark.parametrize("moment", ["half", "before-rename", "after-rename"])
def test_a_kill_while_a_checkpoint_is_written(scenes, tmp_path, monkeypatch, moment):
    monkeypatch.chdir(tmp_path)
    os.waitpid(forked(lambda: train(*flags(scenes, "whole", "--notest"))), 0)

    def work() -> None:
        save, replace, count = torch.save, Path.replace, itertools.count()

        def is_time(path: Path) -> bool:
            return str(path) == "runs/killed/last.pt.partial" and next(count) == 2  # after the second epoch

        def killed_save(checkpoint: object, path: Path) -> None:
            save(checkpoint, path)
            if moment == "half" and is_time(path):
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def killed_replace(path: Path, target: Path) -> Path:
            now = moment != "half" and is_time(path)
            if now and moment == "before-rename":
                os.kill(os.getpid(), signal.SIGKILL)
            moved = replace(path, target)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return moved

        torch.save, Path.replace = killed_save, killed_replace
        train(*flags(scenes, "killed", "--notest"))

    _, status = os.waitpid(forked(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert load_checkpoint("runs/killed/last.pt")["epoch"] == (2 if moment == "after-rename" else 1)
    os.waitpid(forked(lambda: train("--resume", "runs/killed/last.pt")), 0)
    assert_same_end(tmp_path, "whole", "killed")


# A full disk


@pytest.mark.parametrize("file", ["metrics.jsonl", "train.log", "last.pt.partial", "curves.png"])
def test_no_space_is_one_line_and_the_last_checkpoint_stays(command, scenes, tmp_path, monkeypatch, file):
    """Writing `file` fails from the second epoch on, as on a full disk."""

    def stop(run: Run, row: dict[str, object]) -> bool:
        if row["epoch"] == 2:
            (run.folder / file).unlink(missing_ok=True)
            (run.folder / file).symlink_to("/dev/full")  # which refuses every write for want of space
            if file == "train.log":
                start_logging(run.folder / file)
        return add_metrics(run, row)

    add_metrics = Run.add_metrics
    monkeypatch.setattr(Run, "add_metrics", stop)
    outcome = command("train", *flags(scenes, "run", "--notest"))
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert file.removesuffix(".partial") in last
    assert "Traceback" not in outcome.err
    assert "Logging error" not in outcome.err
    assert load_checkpoint(tmp_path / "runs/run/last.pt")["epoch"] >= 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1 MB, or skip."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    os.chdir("/")
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_disk_that_fills_up(command, scenes, small_disk, monkeypatch):
    monkeypatch.chdir(small_disk)
    (small_disk / "ballast").write_bytes(bytes(300_000))
    outcome = command("train", *flags(scenes, "run", "--notest", "--epochs", 9))
    assert outcome.status == 2
    assert os.strerror(errno.ENOSPC) in outcome.err.splitlines()[-1] or "cannot write" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    for file in small_disk.rglob("*.pt"):
        assert load_checkpoint(file)["model"]
