"""Constants of cut channels, carried on: the network equals the one whose channels put them out."""

import copy

import numpy as np
import pytest
import torch
from networks import ROOT, seeded
from torch import Tensor

from models import Darknet, parse
from utils.compensate import compensate, recalibrate, with_constants
from utils.importance import gamma, norms
from utils.plan import make_plan
from utils.prune import Groups, Mask, cut, find_groups

CONV = "[convolutional]\nbatch_normalize=1\nfilters=8\nsize={}\npad=1\nactivation=leaky\n"
HEAD = "[convolutional]\nfilters=6\nactivation=linear\n[yolo]\nanchors=9,9\nmask=0\nnum=1\nclasses=1\n"


def prepare(model: Darknet, share: float = 0.5) -> tuple[Groups, Mask]:
    """Choose the groups that go, and let their γ be nearly 0 everywhere, as sparse training does."""
    groups = find_groups(model)
    plan = make_plan(model, groups, np.random.default_rng(0).random(len(groups.is_free)))
    keep = plan.keep(round(share * len(plan.order)))
    for index, norm in norms(model):
        norm.weight.data[torch.from_numpy(~keep[groups.group[groups.lines[index]]])] = 0
    return groups, keep


def middles(model: Darknet, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [y[..., y.shape[2] // 2, y.shape[3] // 2] for y in model(x)]


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("padding", ["", "stride=2\n"])
def test_a_chain_is_exact_away_from_its_border(padding: str) -> None:
    text = f"[net]\nwidth=64\nheight=64\n{CONV.format(3)}{padding}{CONV.format(1)}{CONV.format(3)}{HEAD}"
    torch.manual_seed(0)
    model = Darknet(parse(text)).eval()
    for _, norm in norms(model):
        norm.bias.data.uniform_(-1, 1)
    groups, keep = prepare(model)
    compact = cut(model, groups, keep, path="pruned.cfg")
    x, before = torch.rand(1, 3, 64, 64), copy.deepcopy(compact)
    constants = compensate(model, compact, groups, keep)
    wanted = middles(with_constants(model, groups, keep, constants), x)
    assert distance(middles(model, x), wanted) <= 1e-6  # γ = 0: the channels are these constants
    assert distance(middles(compact, x), wanted) <= 1e-5
    assert distance(middles(before, x), wanted) > 0.01
    for layer, values in zip(range(3), constants, strict=False):
        kept = torch.from_numpy(keep[groups.group[groups.lines[layer]]])
        bias = model.layers[layer].module.bn.bias.detach()
        assert torch.equal(values[kept], torch.zeros(int(kept.sum())))
        assert torch.allclose(values[~kept], torch.nn.functional.leaky_relu(bias, 0.1)[~kept])


@pytest.mark.parametrize(
    ("stem", "side"), [("yolov4-tiny", 640), pytest.param("ghostnet-yolov3", 1024, marks=pytest.mark.slow)]
)
def test_shipped_networks_come_nearer(stem: str, side: int) -> None:
    """Exact in the middle of maps so large that no border reaches it; gates (GhostNet's SE) average over borders."""
    model = seeded(ROOT / f"cfg/{stem}.cfg")
    groups, keep = prepare(model, 0.3)
    compact = cut(model, groups, keep, path="pruned.cfg")
    x, before = torch.rand(1, 3, side, side), copy.deepcopy(compact)
    constants = compensate(model, compact, groups, keep)
    wanted = middles(with_constants(model, groups, keep, constants), x)
    after = distance(middles(compact, x), wanted)
    if stem == "yolov4-tiny":
        assert after <= 1e-5
    assert after < distance(middles(before, x), wanted) / 2


def test_nothing_changes_where_nothing_is_cut() -> None:
    model = seeded(ROOT / "cfg/demo.cfg")
    groups = find_groups(model)
    keep = np.ones(len(groups.is_free), bool)
    compact = cut(model, groups, keep, path="pruned.cfg")
    constants = compensate(model, compact, groups, keep)
    assert not any(values.any() for values in constants)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in compact.state_dict().items() if "tracked" not in key)


def test_recalibration_gives_the_statistics_of_the_pictures() -> None:
    torch.manual_seed(0)
    model = Darknet(parse(f"[net]\nwidth=16\nheight=16\n{CONV.format(1)}{HEAD}")).eval()
    batches = [torch.rand(4, 3, 16, 16) for _ in range(3)]
    recalibrate(model, batches)
    module = model.layers[0].module
    with torch.inference_mode():
        maps = [module.conv(x) for x in batches]
    assert torch.allclose(module.bn.running_mean, torch.stack([y.mean((0, 2, 3)) for y in maps]).mean(0), atol=1e-6)
    assert torch.allclose(module.bn.running_var, torch.stack([y.var((0, 2, 3)) for y in maps]).mean(0), atol=1e-6)
    assert not model.training
    assert np.isfinite(gamma(model, find_groups(model))[find_groups(model).is_free]).all()
