"""What the guard lets pass, and what short trainings between steps do."""

import argparse

import numpy as np
import pytest
import torch
from networks import FIXTURES, seeded

from models import load_cfg
from models.darknet import count_parameters
from utils.bench import Bench
from utils.evaluate import Settings
from utils.guard import check_exactness, difference, largest_within, verdict
from utils.labels import check_labels
from utils.lists import load_data
from utils.log import DataError
from utils.plan import make_plan
from utils.prune import cut, find_groups
from utils.tuning import tune

TINY = FIXTURES / "tiny.cfg"


@pytest.mark.parametrize(
    ("before", "after", "max_drop", "words"),
    [
        (0.8, 0.081, None, ""),
        (0.8, 0.0799, None, "a ruin: mAP@.5 falls from 0.800 to 0.080, less than a tenth"),
        (0.0, 0.0, None, ""),
        (0.5, 0.6, 0, ""),
        (0.8, 0.76, 5, ""),
        (0.8, 0.74, 5, "mAP@.5 falls by 6.0 points, from 0.800 to 0.740 (--max-drop 5)"),
        (0.8, 0.01, 100, "a ruin: mAP@.5 falls from 0.800 to 0.010, less than a tenth"),
    ],
)
def test_the_verdict(before, after, max_drop, words) -> None:
    assert verdict(before, after, max_drop=max_drop) == words


def test_a_difference_is_relative_and_nan_is_one() -> None:
    one, other = seeded(TINY), seeded(TINY)
    assert difference(one, other) == 0
    head = other.layers[7].module.conv
    with torch.no_grad():
        head.weight.mul_(1.25)
        head.bias.mul_(1.25)
    assert difference(one, other) == pytest.approx(0.25, rel=1e-4)
    head.bias.data[0] = torch.nan
    assert np.isnan(difference(one, other))


def test_a_wrong_cut_is_not_exact() -> None:
    model = seeded(TINY)
    groups = find_groups(model)
    plan = make_plan(model, groups, np.random.default_rng(0).random(len(groups.is_free)))
    keep = plan.keep(5)
    compact = cut(model, groups, keep, path="pruned.cfg")
    errors = check_exactness(model, groups, keep, compact)
    assert errors.keys() == {"float64", "float32"}
    assert errors["float64"] <= 1e-9
    with torch.no_grad():
        compact.layers[0].module.conv.weight[0].mul_(1.01)
    with pytest.raises(DataError, match=r"masked and pruned network differ by .* in float64"):
        check_exactness(model, groups, keep, compact)


@pytest.mark.parametrize("safe", [0, 3, 10])
def test_the_largest_cut_within_a_loss(safe: int) -> None:
    model = seeded(TINY)
    groups = find_groups(model)
    plan = make_plan(model, groups, np.arange(len(groups.is_free), dtype=float))
    assert largest_within(plan, 20, lambda keep: float((~keep).sum() <= safe), 0.5) == safe


def test_tuning_trains_and_gives_the_average(scenes) -> None:
    data = load_data(scenes)
    train = check_labels(data.train, len(data.names))
    bench = Bench(None, train, data.names, Settings((96, 96)), torch.device("cpu"), torch.float32)
    model = seeded(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = argparse.Namespace(seed=0, hyp="", batch_size=4, workers=0)
    tuned = tune(args, model, bench, epochs=1)
    assert count_parameters(tuned) == count_parameters(model)
    assert not tuned.training
    assert tuned.cfg.path == load_cfg(TINY).path
    changed = [name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])]
    assert any("conv.weight" in name for name in changed)
    assert all(value.isfinite().all() for value in tuned.state_dict().values())
