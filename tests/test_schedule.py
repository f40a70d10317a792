"""Learning rate, weight averaging and the optimizer's groups."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from utils.recipe import Recipe
from utils.schedule import make_ema, make_optimizer, make_scheduler


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))


def rates(recipe: Recipe, *, epochs: int, steps: int) -> list[float]:
    """Give the learning rate of every step of a training."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = make_scheduler(optimizer, recipe, epochs=epochs, steps=steps)
    found = []
    for _ in range(epochs * steps + 3):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_is_linear_and_then_a_cosine_falls() -> None:
    found = rates(Recipe(lr=0.2, final_lr=0.1, warmup_epochs=2), epochs=10, steps=5)
    expected = [0.2 * (step + 1) / 10 for step in range(10)]
    expected += [0.02 + 0.18 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert found[:50] == pytest.approx(expected)
    assert found[9] == found[10] == pytest.approx(0.2)
    assert found[30] == pytest.approx(0.11)  # half way down
    assert found[50:] == pytest.approx([0.02] * 3)  # and stays there


@pytest.mark.parametrize(("epochs", "steps", "peak"), [(2, 6, 5), (1, 4, 1), (1, 1, 0), (3, 1, 1)])
def test_a_short_training_warms_up_for_half_of_it_at_most(epochs: int, steps: int, peak: int) -> None:
    found = rates(Recipe(lr=1.0, warmup_epochs=3), epochs=epochs, steps=steps)
    assert found[peak] == 1
    assert all(rate < 1 for rate in found[:peak])
    assert found[: peak + 1] == sorted(found[: peak + 1])


def test_no_warm_up() -> None:
    assert rates(Recipe(lr=1.0, warmup_epochs=0), epochs=4, steps=5)[0] == 1


@pytest.mark.parametrize(("optimizer", "kind", "lr"), [("sgd", SGD, 0.03), ("adamw", AdamW, 0.0015)])
def test_weight_decay_is_on_convolution_weights_alone(model: nn.Module, optimizer: str, kind: type, lr: float) -> None:
    recipe = Recipe(optimizer=optimizer, lr=0.03, weight_decay=0.01, momentum=0.8)
    made = make_optimizer(model, recipe)
    assert type(made) is kind
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decays == {"0.weight": 0.01, "3.weight": 0.01, "1.weight": 0, "1.bias": 0, "3.bias": 0}
    for group in made.param_groups:
        assert group["lr"] == pytest.approx(lr)
        assert (
            (group["betas"] == (0.8, 0.999))
            if kind is AdamW
            else (group["momentum"], group["nesterov"])
            == (
                0.8,
                True,
            )
        )


@pytest.mark.parametrize("limit", [0.999, 0.3])
def test_ema_equals_a_plain_loop(model: nn.Module, limit: float) -> None:
    ema = make_ema(model, Recipe(ema_decay=limit))
    expected: dict[str, torch.Tensor] = {}
    for step in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.train()(torch.randn(2, 2, 5, 5) * (step + 1))  # moves the running statistics
        ema.update_parameters(model)
        decay = min(limit, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if step and value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.clone().double() if value.is_floating_point() else value.clone()
    averaged = ema.module.state_dict()
    assert averaged.keys() == expected.keys()
    assert averaged["1.num_batches_tracked"] == 30
    for name, value in averaged.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-5)
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        assert not torch.allclose(averaged[name], model.state_dict()[name])


def test_ema_leaves_the_model_alone_and_goes_on_after_a_reload(model: nn.Module) -> None:
    recipe = Recipe()
    ema = make_ema(model, recipe)
    before = copy.deepcopy(model.state_dict())
    for _ in range(5):
        ema.update_parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    resumed = make_ema(copy.deepcopy(model), recipe)
    resumed.load_state_dict(ema.state_dict())
    with torch.no_grad():
        model[0].weight.mul_(3)
    for average in (ema, resumed):
        average.update_parameters(model)
    for name, value in ema.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
