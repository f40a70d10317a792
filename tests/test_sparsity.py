"""Sparse training: which γ are drawn to zero and how strongly, its schedules and its steering, and what a run shows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from models import Darknet, parse
from models.weights import load_checkpoint
from tests.processes import run_together
from tests.test_resume import assert_same_end, flags, stop_after
from utils import dist
from utils.darknet_recipe import DarknetRecipe
from utils.datasets import Batch
from utils.engine import Trainer, distribute, make_trainer, start_sparsity, train_one_epoch
from utils.gamma_charts import draw_gammas
from utils.log import DataError
from utils.recipe import Recipe
from utils.sparsity import ARRIVAL, EDGES, HARMLESS, Penalty, Sparsity, travels

CPU = torch.device("cpu")
HEAD = "[yolo]\nclasses=1\nanchors=10,10, 20,20, 30,30\nmask=0,1,2\nnum=3\n"
# The last 6 channels of the first layer are free: the others are summed with those that the head needs.
PARTLY = f"""[net]
width=32
height=32
channels=3
[convolutional]
batch_normalize=1
filters=24
activation=linear
[convolutional]
batch_normalize=1
filters=18
activation=linear
[shortcut]
from=-2
activation=linear
{HEAD}"""
CONV = "[convolutional]\nbatch_normalize=1\nfilters=8\nactivation=relu\n"
WIDE = f"""[net]
width=32
height=32
channels=3
[convolutional]
batch_normalize=1
filters=100
activation=relu
[convolutional]
filters=18
activation=linear
{HEAD}"""


def gamma_of(model: Darknet, layer: int = 0) -> Tensor:
    return model.blocks[layer].bn.weight


def wide(plan: Penalty, each: list[float]) -> tuple[Darknet, Sparsity]:
    """Give a network of 100 free channels, whose γ are .005, .015, … .995, and its sparsity."""
    model = Darknet(parse(WIDE))
    gamma_of(model).data = torch.arange(100) / 100 + 0.005
    return model, Sparsity(model, plan, each)


# Which γ, and how strongly


def test_the_subgradient_is_added_where_a_channel_is_free() -> None:
    model = Darknet(parse(PARTLY))
    sparsity = Sparsity(model, Penalty(s=0.5), [1.0])
    assert sparsity.count == 6
    with torch.no_grad():
        gamma_of(model)[-6:] = torch.tensor([0.3, -0.3, 0.0, 2.0, -1e-9, 1.0])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    sparsity.shrink()
    assert gamma_of(model).grad[-6:].tolist() == [0.75, -0.25, 0.25, 0.75, -0.25, 0.75]
    others = [gamma_of(model).grad[:18], *(each.grad for each in model.parameters() if each is not gamma_of(model))]
    assert all((grad == 0.25).all() for grad in others)


def test_a_group_counts_with_its_largest_gamma() -> None:
    tied = "[convolutional]\nbatch_normalize=1\nfilters=100\ngroups=100\nactivation=linear\n"
    model = Darknet(parse(WIDE.replace("[convolutional]\nfilters=18", f"{tied}[convolutional]\nfilters=18")))
    with torch.no_grad():
        gamma_of(model, 0).fill_(0.3)
        gamma_of(model, 1).copy_(torch.linspace(-0.5, 0.49, 100))
    expected = gamma_of(model, 1).detach().abs().clamp_min(0.3)
    np.testing.assert_allclose(Sparsity(model, Penalty(), [1.0]).gammas(), expected, rtol=1e-7)


def train_by_nothing(trainer: Trainer, network: torch.nn.Module, *, batches: int, accumulate: int, pull: float) -> None:
    """Train an epoch whose loss has no gradient but `pull`, on the bias of the head."""
    batch = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, 6), [0], [])

    def step_loss(x: Tensor, _targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (raw,) = network(x)
        return 0 * raw.sum() + pull * raw.mean(), {}

    options = {"device": CPU, "accumulate": accumulate, "title": "", "after_backward": trainer.sparsity.shrink}
    train_one_epoch(trainer, [batch] * batches, step_loss, freeze=trainer.model.freeze, **options)


def moved_gamma(*, batches: int, accumulate: int, pull: float = 0.0, is_scaled: bool = False) -> Tensor:
    """Give the γ of PARTLY after plain SGD of lr 0.1 with s=0.02."""
    torch.manual_seed(0)
    model = Darknet(parse(PARTLY))
    recipe = Recipe(lr=0.1, momentum=0.9, warmup_epochs=0, final_lr=1)
    trainer = make_trainer(model, recipe, epochs=1, steps=-(-batches // accumulate), device=CPU, dtype=torch.float32)
    for group in trainer.optimizer.param_groups:
        group.update(momentum=0, nesterov=False)
    trainer = start_sparsity(trainer, Penalty(s=0.02), model, recipe, epochs=1, steps=1, first=0)
    if is_scaled:
        trainer = replace(trainer, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    train_by_nothing(trainer, distribute(model, CPU), batches=batches, accumulate=accumulate, pull=pull)
    return gamma_of(model).detach()


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ({"batches": 3, "accumulate": 1}, 3),
        ({"batches": 6, "accumulate": 3}, 2),
        ({"batches": 4, "accumulate": 3}, 2),
        ({"batches": 2, "accumulate": 1, "is_scaled": True}, 2),
    ],
)
def test_every_step_draws_as_strongly(how, steps) -> None:
    gamma = moved_gamma(**how)
    assert gamma[:18].tolist() == [1] * 18
    torch.testing.assert_close(gamma[18:], torch.full((6,), 1 - 0.1 * 0.02 * steps))


def test_clipping_does_not_weaken_the_penalty() -> None:
    gamma = moved_gamma(batches=1, accumulate=1, pull=1e6)  # a gradient that is clipped to 10 of about 1e6
    torch.testing.assert_close(gamma[18:], torch.full((6,), 1 - 0.1 * 0.02))


def test_two_processes_draw_as_one(tmp_path) -> None:
    def work(rank: int) -> None:
        with dist.joined(CPU):
            torch.save(moved_gamma(batches=3, accumulate=2), tmp_path / f"{rank}.pt")

    assert run_together(2, work) == [0, 0]
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), moved_gamma(batches=3, accumulate=2))


def test_frozen_layers_do_not_count() -> None:
    model = Darknet(parse(WIDE.replace("[convolutional]\nfilters=18", f"{CONV}[convolutional]\nfilters=18")))
    assert Sparsity(model, Penalty(), [1.0]).count == 108
    assert Sparsity(model, Penalty(), [1.0], first=1).count == 8
    with pytest.raises(DataError, match="no channel with a batch normalisation that learns may be pruned"):
        Sparsity(model, Penalty(), [1.0], first=2)


# Schedules


def strengths(sparsity: Sparsity, epoch: int) -> list[float]:
    sparsity.begin(epoch)
    return [round(value, 6) for value in sparsity.strengths[0].tolist()]


def test_schedules() -> None:
    each = [1.0] * 4
    _, constant = wide(Penalty(0.5), each)
    assert strengths(constant, 3) == [0.5] * 100
    _, falling = wide(Penalty(0.5, "global", turn=2), each)
    assert strengths(falling, 1) == [0.5] * 100
    assert strengths(falling, 2) == [0.005] * 100
    model, local = wide(Penalty(0.5, "local", turn=2, target=0.7), each)
    assert strengths(local, 1) == [0.5] * 100
    assert strengths(local, 2) == [0.5] * 70 + [0.005] * 30
    gamma_of(model).data = gamma_of(model).data.flip(0)  # the strengths follow the weights alone
    assert strengths(local, 3) == [0.005] * 30 + [0.5] * 70


# Figures and forecast


def test_figures_of_an_epoch() -> None:
    """γ falls by s · travel / 2 an epoch: the loss takes half back."""
    model, sparsity = wide(Penalty(s=0.1), [1.0, 1.0, 2.0])
    sparsity.begin(0)
    gamma_of(model).data = (gamma_of(model).data - 0.05).clamp_min(0)
    row = sparsity.finish(0)
    assert row["share"] == 0.06  # what was at most .055
    assert row["end"] == 0.21  # what was at most .205: 3 · .05 are to go
    assert [row["q25"], row["q50"], row["q75"]] == pytest.approx([0.2025, 0.45, 0.6975], abs=1e-6)
    assert sum(row["counts"]) == 100
    assert row["counts"][0] == 5  # what is zero stands in the first bin
    assert sparsity.describe(row) == (
        "6% of 100 groups have |γ| under 0.01, quartiles 0.202 0.45 0.697, s 0.1; s is too small: at this pace 21% by"
        " the end, wanted 50%"
    )


def test_a_large_s_is_called_too_large() -> None:
    model, sparsity = wide(Penalty(s=0.1, target=0.3), [1.0, 9.0])
    sparsity.begin(0)
    gamma_of(model).data = (gamma_of(model).data - 0.05).clamp_min(0)
    assert "; s is too large: at this pace 51% by the end, wanted 30%" in sparsity.describe(sparsity.finish(0))
    _, sparsity = wide(Penalty(s=0.1), [1.0] * 5)
    assert "too" not in sparsity.describe(sparsity.finish(0) | {"end": 0.55})


def test_the_forecast_knows_the_schedule() -> None:
    model, sparsity = wide(Penalty(0.1, "global", turn=1), [1.0, 1.0, 1.0])
    sparsity.begin(0)
    gamma_of(model).data = (gamma_of(model).data - 0.1).clamp_min(0)
    assert sparsity.finish(0)["end"] == 0.11  # 2 · .001 are to go; s in full would have .2


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(lr=0.1, momentum=0.9, warmup_epochs=0, final_lr=1), [10, 10, 10]),
        (Recipe(lr=0.1, momentum=0.9, warmup_epochs=0, final_lr=1, optimizer="adamw"), [0.05, 0.05, 0.05]),
        (Recipe(lr=0.1, momentum=0.5, warmup_epochs=1, final_lr=1), [2 * 0.1 * 6, 2, 2]),
        (DarknetRecipe(learning_rate=0.1, momentum=0.9, policy="constant", burn_in=0), [10, 10, 10]),
    ],
    ids=["sgd", "adamw", "warm-up", "darknet"],
)
def test_how_far_an_epoch_moves_what_nothing_holds(recipe, expected) -> None:
    trainer = make_trainer(Darknet(parse(WIDE)), recipe, epochs=3, steps=10, device=CPU, dtype=torch.float32)
    assert travels(trainer.scheduler, recipe, epochs=3, steps=10) == pytest.approx(expected)


# Steering


def test_auto_begins_with_the_strength_that_would_do_alone() -> None:
    _, sparsity = wide(Penalty(None, target=0.5), [1.0] * 10)
    quantile = np.quantile(np.arange(100) / 100 + 0.005, 0.5)
    assert sparsity.s == pytest.approx((quantile - HARMLESS) / round(ARRIVAL * 10), rel=1e-6)


def test_auto_goes_up_where_the_loss_resists_and_down_when_it_is_there() -> None:
    model, sparsity = wide(Penalty(None), [1.0] * 10)
    before = sparsity.s
    sparsity.begin(0)
    sparsity.finish(0)  # nothing has moved
    assert before < sparsity.s <= 2 * before
    before = sparsity.s
    sparsity.begin(1)
    gamma_of(model).data[:60] = 0
    sparsity.finish(1)
    assert sparsity.s == before / 2


def test_auto_can_begin_where_its_target_is_reached() -> None:
    model, _ = wide(Penalty(), [1.0])
    gamma_of(model).data[:70] = 0
    sparsity = Sparsity(model, Penalty(None), [1.0] * 10)
    assert sparsity.s == HARMLESS / 10
    sparsity.finish(0)
    assert sparsity.s == HARMLESS / 10
    sparsity.begin(1)
    gamma_of(model).data[:70] = 0.5  # the loss wants them back
    sparsity.finish(1)
    assert sparsity.s == 2 * HARMLESS / 10


@pytest.mark.parametrize("resistance", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "local"])
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_auto_reaches_its_target(resistance, schedule, target) -> None:
    """A loss that pulls every γ up by a random amount, under a learning rate that falls."""
    model, epochs = Darknet(parse(WIDE)), 20
    sparsity = Sparsity(model, Penalty(None, schedule, 2, target), list(np.linspace(4, 0.2, epochs)))
    pulls = torch.rand(100, generator=torch.Generator().manual_seed(0)) * resistance
    for epoch in range(epochs):
        sparsity.begin(epoch)
        gamma = gamma_of(model)
        gamma.data = (gamma.data + sparsity.travels[epoch] * (pulls - sparsity.strengths[0])).clamp(0, 1.2)
        row = sparsity.finish(epoch)
    assert (row["share"] >= 0.94 * target) if resistance == 0 else (abs(row["share"] - target) < 0.06)


# Runs


@pytest.mark.parametrize("more", [("auto",), ("auto", "--sr-schedule", "constant"), (2, "--sr-schedule", "local")])
def test_an_interrupted_run_goes_on_bit_for_bit(command, scenes, tmp_path, monkeypatch, more) -> None:
    given = ["--notest", "-sr", "--s", *more]
    assert command("train", *flags(scenes, "whole", *given)).status == 0
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert command("train", *flags(scenes, "parts", *given)).status == 130
    assert load_checkpoint(tmp_path / "runs/parts/last.pt")["epoch"] == 2
    (tmp_path / "runs/parts/gammas.png").unlink(missing_ok=True)
    assert command("train", "--resume", "runs/parts/last.pt").status == 0
    assert_same_end(tmp_path, "whole", "parts")
    pictures = [(tmp_path / f"runs/{name}/gammas.png").read_bytes() for name in ("whole", "parts")]
    assert pictures[0] == pictures[1]  # of all epochs


def test_what_a_run_shows(command, scenes, tmp_path) -> None:
    outcome = command("train", *flags(scenes, "run", "--notest", "-sr", "--s", "auto", "--sr-target", 0.4))
    assert outcome.status == 0, outcome.err
    assert "sparse training: --s auto, --sr-schedule local from epoch 2 on, --sr-target 0.4\n" in outcome.out
    assert "epoch 4/4: " in outcome.out
    folder = tmp_path / "runs/run"
    rows = [json.loads(line)["gammas"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["target"] for row in rows] == [0.4] * 4
    tags = EventAccumulator(str(folder)).Reload().Tags()
    assert {"gammas/s", "gammas/share", "gammas/q25", "gammas/q50", "gammas/q75"} <= set(tags["scalars"])
    assert tags["histograms"] == ["gammas"]
    assert "gammas" in tags["images"]


def test_without_sr_nothing_is_shown(command, scenes, tmp_path) -> None:
    command("train", *flags(scenes, "run", "--notest", "--epochs", 1))
    assert "gammas" not in json.loads((tmp_path / "runs/run/metrics.jsonl").read_text())
    assert not (tmp_path / "runs/run/gammas.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sr-schedule", "local"], "--sr-schedule needs -sr"),
        (["--sr-epoch", 2], "--sr-epoch needs -sr"),
        (["--sr-target", 0.3], "--sr-target needs -sr"),
        (["--s", "auto"], "--s needs -sr"),
        (["-sr", "--s", "much"], "--s: expected a number or auto, gets 'much'"),
        (["-sr", "--s", -1], "--s: expected 1e-12 to"),
        (["-sr", "--sr-target", 1], "--sr-target expects a share above 0 and below 1"),
        (["-sr", "--sr-epoch", 2], "--sr-epoch needs --sr-schedule global or local"),
        (["-sr", "--s", "auto", "--sr-schedule", "global"], "--s auto would make up for what --sr-schedule global"),
        (["-sr", "--s", "auto", "--sr-schedule", "constant", "--sr-epoch", 1], "--sr-epoch needs --sr-schedule"),
        (["-sr", "--sr-schedule", "local", "--sr-epoch", 4], "--sr-epoch 4: expected fewer than the 4 epochs"),
    ],
)
def test_flags_that_do_not_go_together(command, scenes, given, message) -> None:
    outcome = command("train", *flags(scenes, "run", *given))
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_network_without_batch_normalisation_is_refused(command, scenes, tmp_path) -> None:
    cfg = tmp_path / "plain.cfg"
    cfg.write_text((Path(__file__).parent / "fixtures/tiny.cfg").read_text().replace("batch_normalize=1\n", ""))
    outcome = command("train", *flags(scenes, "run", "-sr", "--cfg", cfg))
    assert outcome.status == 2
    reason = "-sr: no channel with a batch normalisation that learns may be pruned (leave out -sr)"
    assert outcome.err.splitlines()[-1] == f"{cfg}: {reason}"


# The picture


@pytest.mark.parametrize("epochs", [1, 5, 300])
def test_the_picture_of_few_and_many_epochs(tmp_path, epochs) -> None:
    random = np.random.default_rng(0)
    lines = []
    for epoch in range(epochs):
        values = random.lognormal(-2 * epoch / epochs, 0.5, 500)
        row = dict(zip(("q25", "q50", "q75"), np.quantile(values, (0.25, 0.5, 0.75)).tolist(), strict=True))
        row |= {"s": 0.01, "share": epoch / 300, "end": 0.4, "target": 0.5}
        row["counts"] = np.histogram(values, EDGES)[0].tolist()
        lines.append(json.dumps({"epoch": epoch + 1, "gammas": row}) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    draw_gammas(tmp_path / "metrics.jsonl", tmp_path / "gammas.png")
    assert (tmp_path / "gammas.png").read_bytes()[:4] == b"\x89PNG"
