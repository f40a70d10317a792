"""Darknet's recipe: learning rates by hand for every policy, what is read of a cfg, and what it makes of pictures."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import CfgError, Darknet, parse
from utils.darknet_augment import colour, distort, distorted, quarters, window
from utils.darknet_recipe import DarknetRecipe, Distortion, drawn_sizes, rate, read_darknet_recipe
from utils.schedule import batches_per_step, make_ema, make_optimizer, make_scheduler

TINY = (Path(__file__).resolve().parent / "fixtures/tiny.cfg").read_text()
PLAIN = DarknetRecipe(learning_rate=0.1, max_batches=100)


def tiny(net: str = "", yolo: str = "") -> str:
    """Give the tiny cfg with lines added to [net] and to each [yolo]."""
    text = "".join(line for line in TINY.splitlines(keepends=True) if not line.startswith("#"))
    return text.replace("[net]\n", f"[net]\n{net}").replace("[yolo]\n", f"[yolo]\n{yolo}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {1: 0.1, 99: 0.1}),
        ({"burn_in": 10}, {1: 0.1 * 0.1**4, 5: 0.1 / 16, 9: 0.1 * 0.9**4, 10: 0.1}),
        ({"burn_in": 10, "power": 1.0}, {1: 0.01, 9: 0.09, 10: 0.1, 11: 0.1}),
        (
            {"policy": "steps", "steps": (40, 60), "scales": (0.1, 0.5)},
            {1: 0.1, 39: 0.1, 40: 0.01, 59: 0.01, 60: 0.005, 999: 0.005},
        ),
        ({"policy": "step", "step": 30, "scale": 0.5}, {29: 0.1, 30: 0.05, 59: 0.05, 60: 0.025}),
        ({"policy": "exp", "gamma": 0.9}, {1: 0.09, 2: 0.081, 10: 0.1 * 0.9**10}),
        ({"policy": "poly", "power": 2.0}, {0: 0.1, 50: 0.025, 90: 0.001, 100: 0, 101: 0}),
        (
            {"policy": "sigmoid", "gamma": 0.1, "step": 50},
            {50: 0.05, 60: 0.1 / (1 + math.e), 40: 0.1 / (1 + 1 / math.e)},
        ),
        (
            {"policy": "sgdr", "learning_rate_min": 0.02, "sgdr_cycle": 10, "sgdr_mult": 2},
            {0: 0.1, 5: 0.06, 10: 0.02, 11: 0.02 + 0.04 * (1 + math.cos(math.pi / 20)), 20: 0.06, 30: 0.02, 50: 0.06},
        ),
    ],
)
def test_rates_by_hand(changes: dict[str, object], expected: dict[int, float]) -> None:
    recipe = replace(PLAIN, **changes)
    assert {i: rate(recipe, i) for i in expected} == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_random_rate_is_the_seeds() -> None:
    recipe = replace(PLAIN, policy="random", power=1.0)
    drawn = [rate(recipe, i, seed=3) for i in range(1, 400)]
    assert drawn == [rate(recipe, i, seed=3) for i in range(1, 400)]
    assert drawn != [rate(recipe, i, seed=4) for i in range(1, 400)]
    assert np.mean(drawn) == pytest.approx(0.05, abs=0.005)
    assert 0 <= min(drawn) < 0.002
    assert 0.098 < max(drawn) <= 0.1


def test_the_schedule_and_the_optimizer_are_darknets() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    recipe = replace(PLAIN, burn_in=4, power=1.0, momentum=0.7, decay=0.03)
    optimizer = make_optimizer(model, recipe)
    scheduler = make_scheduler(optimizer, recipe, epochs=1, steps=1)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    weights, others = optimizer.param_groups
    assert (weights["momentum"], weights["nesterov"], weights["weight_decay"]) == (0.7, False, 0.03)
    assert others["weight_decay"] == 0
    assert len(weights["params"]) == 1
    adam = make_optimizer(model, replace(recipe, is_adam=True, betas=(0.8, 0.9), eps=1e-3))
    assert type(adam) is torch.optim.Adam
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.8, 0.9), 1e-3)
    assert batches_per_step(replace(recipe, batch=64), 16, 10) == 4
    assert batches_per_step(replace(recipe, batch=4), 16, 10) == 1


def test_ema_alpha_averages_the_second_half() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = make_ema(model, replace(PLAIN, max_batches=6, ema_alpha=0.75))
    expected = 0.0
    for step in range(6):
        nn.init.constant_(model.weight, step + 1.0)
        ema.update_parameters(model)
        expected = step + 1 if step < 3 else 0.75 * expected + 0.25 * (step + 1)
        assert ema.module.weight.item() == pytest.approx(expected)
    off = make_ema(model, PLAIN)
    for _ in range(60):
        nn.init.normal_(model.weight)
        off.update_parameters(model)
        assert torch.equal(off.module.weight, model.weight)


def test_everything_written_is_read() -> None:
    net = """batch=8
subdivisions=2
max_batches=50
learning_rate=.02
policy=steps
steps=10,20
scales=.1,.2
burn_in=5
power=2
momentum=.8
decay=.001
ema_alpha=.9
angle=7
hue=.1
saturation=1.5
exposure=1.25
flip=0
mosaic=1
mosaic_bound=1
mixup=1
letter_box=1
resize_step=64
"""
    yolo = """ignore_thresh=.7
truth_thresh=.9
iou_thresh=.2
iou_thresh_kind=giou
iou_loss=ciou
iou_normalizer=.07
obj_normalizer=.4
cls_normalizer=.3
delta_normalizer=.6
max_delta=5
objectness_smooth=1
focal_loss=1
counters_per_class=10,20,40,5
label_smooth_eps=.1
jitter=.3
resize=1.5
random=1
max=90
"""
    recipe = read_darknet_recipe(parse(tiny(net, yolo)))
    assert (recipe.batch, recipe.subdivisions, recipe.mini_batch, recipe.max_batches) == (8, 2, 4, 50)
    assert (recipe.learning_rate, recipe.policy, recipe.steps, recipe.scales) == (0.02, "steps", (10, 20), (0.1, 0.2))
    assert (recipe.burn_in, recipe.power, recipe.momentum, recipe.decay) == (5, 2, 0.8, 0.001)
    assert (recipe.ema_alpha, recipe.random, recipe.resize_step) == (0.9, 1, 64)
    assert recipe.distortion == Distortion(0.3, 1.5, 0.1, 1.5, 1.25, 7, False, True, True, True, True)
    rules = recipe.heads[0]
    assert (rules.ignore_thresh, rules.truth_thresh, rules.iou_thresh) == (0.7, 0.9, 0.2)
    assert (rules.iou_thresh_kind, rules.iou_loss, rules.iou_normalizer) == ("giou", "ciou", 0.07)
    assert (rules.obj_normalizer, rules.cls_normalizer, rules.delta_normalizer) == (0.4, 0.3, 0.6)
    assert (rules.max_delta, rules.is_smooth, rules.is_focal) == (5, True, True)
    assert (rules.class_weights, rules.label_smooth_eps, rules.max_boxes) == ((4, 2, 1, 8), 0.1, 90)


def test_only_what_is_not_obeyed_is_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    text = tiny("learning_rate=.1\nmosaic=1\nblur=1\nscales=.1\n", "ignore_thresh=.7\nmap=x\n")
    caplog.set_level(logging.INFO, "darkslim")
    Darknet(parse(text))
    ours = caplog.messages[-1]
    assert ours.endswith("set aside: blur, ignore_thresh, learning_rate, map, mosaic, scales")
    cfg = parse(text)
    read_darknet_recipe(cfg)
    Darknet(cfg)
    assert caplog.messages[-1].endswith("set aside: blur, map, scales")  # policy=constant takes no scales


@pytest.mark.parametrize(
    ("net", "yolo", "message"),
    [
        ("policy=step_s\n", "", "'policy' expects 'step"),
        ("policy=steps\nsteps=1,2\nscales=.1\n", "", "expects steps in rising order and as many scales, gets 2 and 1"),
        ("policy=steps\nsteps=9,2\nscales=1,1\n", "", "expects steps in rising order"),
        ("policy=poly\n", "", "policy=poly expects 'max_batches'"),
        ("batch=8\nsubdivisions=3\n", "", "expects batch=8 to be a multiple of subdivisions=3"),
        ("mosaic=2\n", "", "'mosaic' expects at most 1, gets 2"),
        ("learning_rate=fast\n", "", "'learning_rate' expects a number, gets 'fast'"),
        ("", "iou_loss=l1\n", "'iou_loss' expects"),
        ("", "counters_per_class=1,0,1,1\n", "'counters_per_class' expects numbers above 0"),
        ("", "counters_per_class=1,2\n", "'counters_per_class' expects 4 numbers, one a class, gets 2"),
        ("", "ignore_thresh=7\n", "'ignore_thresh' expects at most 1"),
    ],
)
def test_mistakes_are_told_with_those_of_the_network(net: str, yolo: str, message: str) -> None:
    cfg = parse(tiny(net, yolo))
    read_darknet_recipe(cfg)
    with pytest.raises(CfgError) as error:
        Darknet(cfg)
    assert message in str(error.value)


def test_other_heads_are_refused() -> None:
    cfg = parse(TINY.replace("[yolo]", "[region]"))
    read_darknet_recipe(cfg)
    assert "is no head that --recipe darknet trains" in str(cfg.mistakes)


@pytest.mark.parametrize(
    ("random", "size", "expected"),
    [
        (0, (320, 416), [(320, 416)]),
        (
            1,
            (320, 320),
            [(256, 256), (288, 288), (320, 320), (352, 352), (384, 384), (416, 416), (448, 448), (480, 480)],
        ),
        (1.2, (96, 192), [(96, 192), (128, 224), (128, 256)]),
    ],
)
def test_sizes_that_random_draws(random: float, size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert drawn_sizes(replace(PLAIN, random=random), size, 32) == expected


# Pictures


def picture(h: int = 40, w: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)


def sample(h: int = 40, w: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    boxes = np.float32([[10, 10, 30, 30], [50, 5, 78, 20]])
    return picture(h, w), np.float32([0, 1]), boxes


STILL = Distortion(jitter=0, is_flipped=False)


def test_without_jitter_a_picture_is_stretched() -> None:
    found, classes, boxes = distort(sample(), (80, 80), STILL, np.random.default_rng(0))
    assert found.shape == (80, 80, 3)
    assert classes.tolist() == [0, 1]
    np.testing.assert_allclose(boxes, [[10, 20, 30, 60], [50, 10, 78, 40]])


def test_letter_box_keeps_the_shape() -> None:
    rules = replace(STILL, keeps_shape=True)
    assert window(40, 80, (64, 64), rules, np.random.default_rng(0)) == (0, -20, 80, 60)
    assert window(80, 40, (64, 64), rules, np.random.default_rng(0)) == (-20, 0, 60, 80)
    assert window(40, 80, (32, 64), rules, np.random.default_rng(0)) == (0, 0, 80, 40)


def test_windows_reach_as_far_as_jitter_and_resize_say() -> None:
    generator = np.random.default_rng(0)
    found = np.array([window(100, 100, (9, 9), replace(STILL, jitter=0.2), generator) for _ in range(500)])
    low, high = found.min(0), found.max(0)
    np.testing.assert_allclose(low, [-20, -20, 80, 80], atol=1)
    np.testing.assert_allclose(high, [20, 20, 120, 120], atol=1)
    found = np.array([window(100, 100, (9, 9), replace(STILL, resize=2), generator) for _ in range(500)])
    np.testing.assert_allclose(found.min(0), [-50, -50, 75, 75], atol=1)
    np.testing.assert_allclose(found.max(0), [25, 25, 150, 150], atol=1)
    assert (found[:, 0] == found[:, 1]).all()  # left and top move alike: the shape changes little
    found = np.array([window(100, 100, (9, 9), replace(STILL, resize=0.5), generator) for _ in range(500)])
    np.testing.assert_allclose(found.max(0), [0, 0, 150, 150], atol=1)  # below 1: smaller only


def test_flips_and_turns_take_their_boxes_along() -> None:
    seen = set()
    for seed in range(20):
        _, _, boxes = distort(sample(), (40, 80), replace(STILL, is_flipped=True), np.random.default_rng(seed))
        seen.add(tuple(boxes[0].tolist()))
    assert seen == {(10, 10, 30, 30), (50, 10, 70, 30)}
    marked = np.zeros((60, 60, 3), np.uint8)
    marked[25:35, 40:50] = 255
    for seed in range(5):
        found, _, boxes = distort(
            (marked, np.float32([0]), np.float32([[40, 25, 50, 35]])),
            (60, 60),
            replace(STILL, angle=90),
            np.random.default_rng(seed),
        )
        rows, columns = np.nonzero((found == 255).all(-1))
        x1, y1, x2, y2 = boxes[0]
        assert x1 - 1 <= columns.min()
        assert columns.max() <= x2
        assert y1 - 1 <= rows.min()
        assert rows.max() <= y2


def test_colours() -> None:
    assert colour(picture(), STILL, np.random.default_rng(0)) is not None
    grey = np.full((2, 2, 3), 100, np.uint8)
    found = {int(colour(grey, replace(STILL, exposure=2), np.random.default_rng(seed))[0, 0, 0]) for seed in range(200)}
    assert min(found) in (50, 51)
    assert max(found) in (198, 199, 200)
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 200
    assert (colour(red, replace(STILL, saturation=1.5), np.random.default_rng(0))[0, 0, 0]) == 200
    turned = [colour(red, replace(STILL, hue=0.5), np.random.default_rng(seed))[0, 0] for seed in range(50)]
    assert any(pixel[1] > 150 > pixel[0] for pixel in turned)  # green
    assert any(pixel[2] > 150 > pixel[0] for pixel in turned)  # blue


def test_quarters_meet_at_the_cut_and_bind_boxes() -> None:
    whole = np.float32([[0, 0, 60, 40]])
    inputs = [(np.full((40, 60, 3), value, np.uint8), np.float32([value]), whole) for value in (10, 20, 30, 40)]
    canvas, classes, boxes = quarters(inputs, replace(STILL, is_bounded=True), np.random.default_rng(1))
    assert classes.tolist() == [10, 20, 30, 40]
    for value, (x1, y1, x2, y2) in zip(classes, boxes.astype(int), strict=True):
        assert (canvas[y1:y2, x1:x2] == value).all()
    assert ((boxes[:, 2:] - boxes[:, :2]).prod(1).sum()) == 40 * 60
    _, _, loose = quarters(inputs, STILL, np.random.default_rng(1))
    assert loose[0].tolist() == boxes[0].tolist()  # its box ends at the cut anyway
    small = np.float32([[30, 20, 59, 39]])  # ends short of the inner corner
    _, _, moved = quarters([(i[0], i[1], small) for i in inputs], STILL, np.random.default_rng(1))
    x, y = boxes[0, 2:]
    assert moved[0].tolist() == [max(0, x - 30), max(0, y - 20), x - 1, y - 1]


@pytest.mark.parametrize(("rules", "most"), [({"is_mosaic": True}, 4), ({"is_mixed": True}, 2), ({}, 1)])
def test_half_of_the_pictures_are_joined(rules: dict[str, bool], most: int) -> None:
    counts = []
    for seed in range(60):
        read: list[int] = []
        distorted(
            lambda i, read=read: read.append(i) or sample(),
            7,
            10,
            (32, 32),
            replace(STILL, **rules),
            np.random.default_rng(seed),
        )
        assert read[0] == 7
        counts.append(len(read))
    assert set(counts) == {1, most}
    assert most == 1 or 15 <= counts.count(most) <= 45
