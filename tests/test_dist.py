"""Several processes train as one: gradients, batches, evaluation, what is printed, and how they end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models import Darknet, load_cfg
from models.weights import load_checkpoint
from tests.processes import run_together
from utils import dist
from utils.darknet_recipe import DarknetRecipe, HeadRules
from utils.datasets import TrainingBatches
from utils.engine import distribute, make_step_loss
from utils.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
CFG = ROOT / "tests/fixtures/tiny.cfg"
CPU = torch.device("cpu")
TARGETS = torch.tensor(  # eight pictures; the last five, which the second process has with an empty one, have no truth
    [
        [0, 1, 0.3, 0.4, 0.3, 0.2],
        [0, 3, 0.7, 0.6, 0.2, 0.4],
        [1, 0, 0.5, 0.5, 0.8, 0.7],
        [2, 2, 0.2, 0.8, 0.1, 0.2],
        [3, 1, 0.6, 0.3, 0.25, 0.3],
    ]
)


def gradients(recipe: Recipe | DarknetRecipe, pictures: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Give the loss and all gradients of one batch, with the statistics of batch normalisation frozen."""
    torch.manual_seed(1)
    model = Darknet(load_cfg(CFG)).eval()
    network = distribute(model, CPU)
    loss, _ = make_step_loss(network, model, recipe, CPU, torch.float32)(pictures, targets)
    loss.backward()
    (mean,) = dist.averages([loss.item()])
    return [torch.tensor(mean), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(label_smoothing=0.1), DarknetRecipe(heads=(HeadRules(iou_loss="ciou"),) * 2)],
    ids=["ours", "smooth", "darknet"],
)
@pytest.mark.parametrize("first", [4, 3, 7], ids=["even", "uneven", "one-empty"])
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path, recipe, first):
    torch.manual_seed(0)
    pictures = torch.rand(8, 3, 64, 64)
    parts = [(0, first), (first, 8)]

    def work(rank: int) -> None:
        low, high = parts[rank]
        own = TARGETS[(TARGETS[:, 0] >= low) & (TARGETS[:, 0] < high)] - torch.tensor([low, 0, 0, 0, 0, 0])
        with dist.joined(CPU):
            torch.save(gradients(recipe, pictures[low:high], own), tmp_path / f"{rank}.pt")

    assert run_together(2, work) == [0, 0]
    alone = gradients(recipe, pictures, TARGETS)
    together = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert max(gradient.abs().max() for gradient in alone) > 1e-3
    for whole, *halves in zip(alone, *together, strict=True):
        assert torch.equal(*halves)
        torch.testing.assert_close(halves[0], whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize(("images", "world"), [(12, 2), (13, 2), (9, 4), (17, 4)])
@pytest.mark.parametrize("is_rectangular", [False, True])
def test_batches_are_shared_out(images: int, world: int, is_rectangular: bool) -> None:
    shapes = np.random.default_rng(0).integers(20, 90, (images, 2))
    sizes = [(64, 64), (96, 96), (32, 32)]
    own = [
        list(TrainingBatches(shapes, 2, sizes, 5, 1, is_rectangular, epoch=1, rank=rank, world=world))
        for rank in range(world)
    ]
    whole = list(TrainingBatches(shapes, 2 * world, sizes, 5, 1, is_rectangular, epoch=1))
    assert {len(batches) for batches in own} == {len(whole)}
    for one, *parts in zip(whole, *own, strict=True):
        keys = [key for part in parts for key in part]
        assert {key.index for key in keys} == {key.index for key in one}
        assert {key.size for key in keys} == {key.size for key in one}
        assert all(parts)
        assert len(keys) == max(len(one), world)


def test_exchanges(tmp_path):
    def work(rank: int) -> None:
        module = torch.nn.BatchNorm2d(2)
        module.running_mean.fill_(rank + 5)
        with dist.joined(CPU):
            assert dist.average(rank + 1) == 1.5
            assert dist.gather([rank, -rank]) == [0, 0, 1, -1]
            assert dist.from_first(lambda: f"of {rank}") == "of 0"
            assert list(dist.share("abcde")) == (["a", "c", "e"], ["b", "d"])[rank]
            dist.copy_statistics(module)
            assert module.running_mean.tolist() == [5, 5]
            with dist.first_goes_first():
                assert (tmp_path / "written").exists() == (rank == 1)
                (tmp_path / "written").touch()

    assert run_together(2, work) == [0, 0]


def test_alone_nothing_is_exchanged():
    assert (dist.rank(), dist.world_size(), dist.average(3), dist.gather([1])) == (0, 1, 3, [1])
    assert dist.is_to_tell()
    assert not dist.is_lost(RuntimeError("gloo: Connection closed by peer"))


def torchrun(folder: Path, *flags: object) -> subprocess.CompletedProcess:
    """Run train.py in two processes on the CPU."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    basic = ["--cfg", CFG, "--batch-size", 2, "--workers", 0, "--device", "cpu", "--name", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, ROOT / "train.py", *basic, *flags]
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_run_of_two_processes_prints_and_writes_once(scenes, tmp_path):
    outcome = torchrun(tmp_path, "--data", scenes, "--epochs", 2, "--precision", "fp32")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("training in runs/run\n") == 1
    assert outcome.stdout.count("epoch 1/2: map50") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]
    assert len((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()) == 2
    assert load_checkpoint(tmp_path / "weights/last.pt")["epoch"] == 2


@pytest.mark.slow
def test_a_mistake_is_told_once(scenes, tmp_path):
    """Both processes find the first mistake; the second, a broken picture, comes up in one of them alone."""
    outcome = torchrun(tmp_path, "--data", "missing.data")
    assert outcome.returncode != 0
    assert outcome.stderr.count("missing.data: cannot be read: No such file or directory\n") == 1
    folder = tmp_path / "broken"
    (folder / "images").mkdir(parents=True)
    pictures = sorted((scenes.parent / "images/train").iterdir())[:4]
    for picture in pictures:
        (folder / "images" / picture.name).write_bytes(picture.read_bytes())
    listed = "".join(f"images/{picture.name}\n" for picture in pictures)
    (folder / "list.txt").write_text(listed)
    (folder / "a.data").write_text("classes=4\ntrain=list.txt\nvalid=list.txt\nnames=a.names\n")
    (folder / "a.names").write_text("a\nb\nc\nd\n")
    (folder / "labels").mkdir()
    (folder / "labels" / pictures[0].with_suffix(".txt").name).write_text("0 .5 .5 .2 .2\n")
    assert torchrun(tmp_path, "--data", folder / "a.data", "--epochs", 1).returncode == 0
    target = folder / "images" / pictures[1].name
    stamp = target.stat()
    data = bytearray(target.read_bytes())
    target.write_bytes(bytes(len(data)))  # as large and as old as the cache of labels knows it
    os.utime(target, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    outcome = torchrun(tmp_path, "--data", folder / "a.data", "--epochs", 1)
    assert outcome.returncode != 0
    ours = [line for line in outcome.stderr.splitlines() if pictures[1].name in line]
    assert len(ours) == 1
    assert str(ROOT / "utils") not in outcome.stderr  # no traceback of ours


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_synchronised_statistics_of_two_gpus(scenes, tmp_path):
    flags = ("--data", scenes, "--epochs", 1, "--sync-bn", "--device", "")
    outcome = torchrun(tmp_path, *flags)
    assert outcome.returncode == 0, outcome.stderr
    state = load_checkpoint(tmp_path / "runs/run/last.pt")["model"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("more", [("--device", "cpu")])
def test_synchronised_statistics_need_gpus(command, scenes, more):
    outcome = command("train", "--cfg", CFG, "--data", scenes, "--sync-bn", *more)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == (
        "--sync-bn: needs several processes with a GPU each (start them with torchrun)"
    )
