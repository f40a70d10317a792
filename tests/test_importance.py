"""What groups of channels are worth by every criterion, computed by hand."""

import numpy as np
import pytest
import torch

from models import Darknet, parse
from utils.importance import filter_norm, gamma, norms, prunable_norms, random_values, taylor
from utils.prune import Groups, find_groups

CONV = "[convolutional]\nbatch_normalize=1\nfilters=2\nsize=1\nactivation=linear\n"
HEAD = "[convolutional]\nfilters=6\nactivation=linear\n[yolo]\nanchors=9,9\nmask=0\nnum=1\nclasses=1\n"
TIED = CONV + CONV + "[shortcut]\nfrom=-2\nactivation=linear\n"


def built(layers: str) -> tuple[Darknet, Groups]:
    model = Darknet(parse(f"[net]\nwidth=8\nheight=8\n{layers}{HEAD}")).eval()
    return model, find_groups(model)


def of_layer(values: np.ndarray, groups: Groups, index: int) -> list[float]:
    return values[groups.group[groups.lines[index]]].tolist()


def set_gammas(model: Darknet, *rows: tuple[float, float]) -> None:
    for (_, norm), row in zip(norms(model), rows, strict=True):
        norm.weight.data = torch.tensor(row, dtype=torch.float32)


def test_gamma_is_the_largest_of_a_group() -> None:
    model, groups = built(TIED)
    set_gammas(model, (0.25, -3), (-1, 2))
    values = gamma(model, groups)
    assert of_layer(values, groups, 0) == of_layer(values, groups, 1) == [1, 3]
    assert np.isnan(of_layer(values, groups, 3)).all()  # the head's convolution has no γ


def test_norms_of_filters_are_relative_to_their_layer() -> None:
    model, groups = built(CONV)
    model.layers[0].module.conv.weight.data = torch.tensor([[3.0, 0, -4], [0, 0, 15]])[..., None, None]
    assert of_layer(filter_norm(model, groups, 1), groups, 0) == pytest.approx([7 / 11, 15 / 11])
    assert of_layer(filter_norm(model, groups, 2), groups, 0) == pytest.approx([0.5, 1.5])


def test_taylor_is_the_squared_sum_of_what_gates_would_change() -> None:
    model, groups = built(CONV + CONV)
    set_gammas(model, (2, 3), (4, 5))
    (_, first), (_, second) = norms(model)
    first.bias.data = torch.tensor([10.0, 20.0])

    def losses():
        yield (first.weight * torch.tensor([1.0, 2])).sum() + (first.bias * torch.tensor([0.5, 0])).sum()
        yield (first.weight * torch.tensor([-1.0, 1])).sum() + (second.weight**2).sum()

    values = taylor(model, groups, losses())
    # first layer: 2·1 + 10·.5 = 7 and 3·2 = 6, then 2·-1 and 3·1; second: nothing, then γ · 2γ
    assert of_layer(values, groups, 0) == [(7**2 + 2**2) / 2, (6**2 + 3**2) / 2]
    assert of_layer(values, groups, 1) == [32**2 / 2, 50**2 / 2]
    assert np.isnan(of_layer(values, groups, 2)).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_taylor_adds_the_terms_of_a_group() -> None:
    model, groups = built(TIED)
    set_gammas(model, (1, 1), (2, 2))
    (_, first), (_, second) = norms(model)
    values = taylor(model, groups, iter([first.weight.sum() - second.weight.sum() / 2]))
    assert of_layer(values, groups, 0) == [0, 0]  # 1·1 and 2·-.5 make up for each other


def test_taylor_foretells_what_a_factor_changes() -> None:
    torch.manual_seed(0)
    model, groups = built(CONV + CONV)
    model, x = model.double(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    (_, norm) = next(iter(norms(model)))
    values = taylor(model, groups, (model(x)[0].mean() for _ in range(1)))
    with torch.no_grad():
        before = model(x)[0].mean()
        norm.weight[0] *= 1 - 1e-6
        norm.bias[0] *= 1 - 1e-6
        change = (model(x)[0].mean() - before) / 1e-6
    assert of_layer(values, groups, 0)[0] == pytest.approx(float(change) ** 2, rel=1e-4)


def test_random_values_follow_the_seed() -> None:
    _, groups = built(CONV)
    assert np.array_equal(random_values(groups, 1), random_values(groups, 1))
    assert not np.array_equal(random_values(groups, 1), random_values(groups, 2))


def test_what_sparse_training_shrinks() -> None:
    model, groups = built(CONV + CONV)
    assert [(index, is_free.tolist()) for index, _, is_free in prunable_norms(model, groups)] == [
        (0, [True, True]),
        (1, [True, True]),
    ]
