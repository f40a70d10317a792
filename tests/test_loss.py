"""The loss: who answers for a box, what a perfect answer costs, and that a network learns from it."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from models import Darknet, load_cfg
from models.yolo import HeadSpec, decode, split
from utils.assignment import assign, best_matches
from utils.datasets import Key, Pictures, collate, to_input
from utils.evaluate import Settings, evaluate
from utils.labels import Labelled
from utils.loss import detection_loss, efficient_box_iou_loss
from utils.recipe import Recipe

SIZE = (64, 96)  # height, width: 4x6 cells of 16 px
SHAPE = (4, 6)
PLAIN = HeadSpec(0, anchors=((16, 16), (40, 20)), classes=3, stride=(16, 16))
SPECS = {
    "plain": PLAIN,
    "scale_x_y": replace(PLAIN, scale_x_y=2.0),
    "new_coords": replace(PLAIN, scale_x_y=2.0, is_new_coords=True),
    "softmax": replace(PLAIN, is_softmax=True),
}
CENTRES = Recipe(neighbours=0)
PARTS = {"box", "objectness", "class"}


def target(x: float, y: float, w: float, h: float, *, label: int = 0, place: int = 0) -> list[float]:
    """Make a target of a centre in cells and a size in pixels."""
    return [place, label, x / SHAPE[1], y / SHAPE[0], w / SIZE[1], h / SIZE[0]]


def cells(targets: list[list[float]], spec: HeadSpec = PLAIN, recipe: Recipe = CENTRES) -> set[tuple[int, ...]]:
    """Give the (place, anchor, row, column) that answer, each once."""
    matches = assign(torch.tensor(targets).view(-1, 6), SHAPE, spec, SIZE, recipe)
    rows = [tuple(row) for row in torch.stack(matches.places, 1).tolist()]
    assert len(rows) == len(set(rows)) == len(matches.boxes) == len(matches.classes)
    return set(rows)


def encode(targets: Tensor, spec: HeadSpec, recipe: Recipe, batch: int = 2) -> Tensor:
    """Make the raw map that says exactly what the targets say: the inverse of decode."""
    is_sure = 1.0 if spec.is_new_coords else 30.0
    t = torch.full((batch, len(spec.anchors), *SHAPE, 5 + spec.classes), 1 - is_sure if is_sure == 1 else -is_sure)
    matches = assign(targets, SHAPE, spec, SIZE, recipe)
    _, anchor, row, column = matches.places
    away = matches.boxes[:, :2] - torch.stack((column, row), 1)
    xy = (away + (spec.scale_x_y - 1) / 2) / spec.scale_x_y
    ratio = matches.boxes[:, 2:] / torch.tensor(spec.anchors)[anchor]
    wh = (ratio / 4).sqrt() if spec.is_new_coords else ratio.log()
    t[matches.places] = torch.cat(
        (
            xy if spec.is_new_coords else xy.logit(),
            wh,
            torch.full_like(xy[:, :1], is_sure),
            torch.where(torch.eye(spec.classes)[matches.classes] == 1, is_sure, t.min()),
        ),
        dim=1,
    )
    return t.permute(0, 1, 4, 2, 3).flatten(1, 2)  # [B, A*(5+C), H, W]


TARGETS = torch.tensor(
    [
        target(1.3, 2.6, 20, 12, label=2),
        target(4.5, 0.7, 38, 25, label=1),
        target(3.2, 1.1, 16, 16, place=1),
        target(0.4, 3.4, 12, 11, label=1, place=1),
    ]
)


def loss_of(raw: Tensor, spec: HeadSpec, recipe: Recipe, targets: Tensor = TARGETS) -> tuple[Tensor, dict[str, Tensor]]:
    return detection_loss([raw], targets, [spec], SIZE, recipe)


# Assignment


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (target(2.5, 1.5, 16, 16), {(0, 0, 1, 2), (0, 1, 1, 2)}),  # 16x16 is within 4 of both anchors
        (target(2.99, 1.01, 60, 30), {(0, 0, 1, 2), (0, 1, 1, 2)}),
        (target(2, 1, 100, 20, place=3), {(3, 1, 1, 2)}),  # a centre on a corner lies in the cell that begins there
        (target(0, 0, 4.5, 4.5), {(0, 0, 0, 0)}),
        (target(6, 4, 16, 16), {(0, 0, 3, 5), (0, 1, 3, 5)}),  # exactly 1.0: the last cell
        (target(6, 0, 16, 16), {(0, 0, 0, 5), (0, 1, 0, 5)}),
        (target(0, 4, 16, 16), {(0, 0, 3, 0), (0, 1, 3, 0)}),
        (target(1.5, 1.5, 3, 16), set()),  # 16/3 and 40/3 are too far
        (target(1.5, 1.5, 64, 16), {(0, 1, 1, 1)}),  # exactly 4 is not below 4
        (target(1.5, 1.5, 63.9, 16), {(0, 0, 1, 1), (0, 1, 1, 1)}),
        (target(1.5, 1.5, 10.01, 79), {(0, 1, 1, 1)}),
        (target(1.5, 1.5, 0, 0), set()),
    ],
)
def test_the_cell_of_the_centre_answers(box: list[float], expected: set[tuple[int, ...]]) -> None:
    assert cells([box]) == expected


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (2.3, 1.6, {(1, 2), (1, 1), (2, 2)}),  # left and below
        (2.7, 1.2, {(1, 2), (1, 3), (0, 2)}),  # right and above
        (2.5, 1.5, {(1, 2)}),  # .5 from all borders is not below .5
        (2.5, 1.4, {(1, 2), (0, 2)}),
        (2.0, 1.0, {(1, 2), (1, 1), (0, 2)}),
        (0.2, 0.2, {(0, 0)}),  # there is nothing beyond the picture
        (0, 0, {(0, 0)}),
        (5.9, 3.9, {(3, 5)}),
        (6, 4, {(3, 5)}),  # exactly 1.0
        (6, 1.2, {(1, 5), (0, 5)}),
        (0.1, 2.8, {(2, 0), (3, 0)}),
    ],
)
def test_the_nearer_neighbours_answer_too(x: float, y: float, expected: set[tuple[int, int]]) -> None:
    """A head with scale_x_y=2 decodes centres as far as .5 outside its cell."""
    spec = replace(PLAIN, anchors=((16, 16),), scale_x_y=2.0)
    assert {place[2:] for place in cells([target(x, y, 16, 16)], spec, Recipe(neighbours=0.5))} == expected


@pytest.mark.parametrize(
    ("neighbours", "scale_x_y", "expected"),
    [
        (0.0, 2.0, {(1, 2)}),
        (0.1, 2.0, {(1, 2)}),
        (0.2, 2.0, {(1, 2), (1, 1)}),
        (0.35, 2.0, {(1, 2), (1, 1), (2, 2)}),
        (0.5, 1.0, {(1, 2)}),  # decodes to its own cell only
        (0.5, 1.2, {(1, 2)}),  # to .1 outside it
        (0.5, 1.4, {(1, 2), (1, 1)}),
        (0.5, 1.7, {(1, 2), (1, 1), (2, 2)}),
    ],
)
def test_neighbours_reach_as_far_as_recipe_and_decode_let_them(
    neighbours: float, scale_x_y: float, expected: set[tuple[int, int]]
) -> None:
    spec = replace(PLAIN, anchors=((16, 16),), scale_x_y=scale_x_y)
    box = target(2.15, 1.7, 16, 16)  # .15 from the left border of its cell, .3 from the lower one
    assert {place[2:] for place in cells([box], spec, Recipe(neighbours=neighbours))} == expected


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0, 8.0])
def test_the_ratio_of_the_recipe_limits_anchors_both_ways(ratio: float) -> None:
    spec, recipe = replace(PLAIN, anchors=((16, 16),)), Recipe(neighbours=0, anchor_ratio=ratio)
    for side in (16 * ratio * 0.99, 16 / ratio * 1.01):
        assert len(cells([target(2.5, 1.5, side, 16)], spec, recipe)) == 1
        assert len(cells([target(2.5, 1.5, 16, side)], spec, recipe)) == 1
    for side in (16 * ratio * 1.01, 16 / ratio * 0.99):
        assert not cells([target(2.5, 1.5, side, 16)], spec, recipe)
        assert not cells([target(2.5, 1.5, 16, side)], spec, recipe)


def test_matches_carry_their_box_and_class() -> None:
    matches = assign(TARGETS, SHAPE, SPECS["scale_x_y"], SIZE, Recipe())
    assert len(matches.boxes) > len(TARGETS)
    by_key = {(int(t[0]), int(t[1])): t for t in TARGETS}
    for place, label, box in zip(matches.places[0], matches.classes, matches.boxes, strict=True):
        t = by_key[int(place), int(label)]
        torch.testing.assert_close(box, t[2:] * torch.tensor([6.0, 4, 96, 64]))


def test_no_targets_match_nothing() -> None:
    assert cells([]) == set()


# The loss


@pytest.mark.parametrize(
    ("name", "neighbours"), [*[(name, 0.0) for name in SPECS], ("scale_x_y", 0.5), ("new_coords", 0.5)]
)
def test_the_truth_costs_nothing_and_each_mistake_costs_its_own_part(name: str, neighbours: float) -> None:
    spec, recipe = SPECS[name], Recipe(neighbours=neighbours)
    raw = encode(TARGETS, spec, recipe)
    total, parts = loss_of(raw, spec, recipe)
    assert parts.keys() == PARTS
    assert total == pytest.approx(0, abs=1e-3)
    places = assign(TARGETS, SHAPE, spec, SIZE, recipe).places
    for part, change in {
        "box": lambda t: t[..., 0:4].mul_(0.6),
        "class": lambda t: t[..., 5:].copy_(t[..., 5:].roll(1, -1)),
        "objectness": lambda t: t[..., 4].zero_(),
    }.items():
        wrong = raw.clone()
        t = split(wrong, spec)
        chosen = t[places]
        change(chosen)
        t[places] = chosen
        worse, mistaken = loss_of(wrong, spec, recipe)
        assert mistaken[part] > 0.1
        assert worse == pytest.approx(float(sum(mistaken.values())), rel=1e-5)
        for other in PARTS - {part} - ({"objectness"} if part == "box" else set()):  # its goal is the IoU
            assert mistaken[other] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_what_the_loss_calls_perfect_decodes_to_the_truth(name: str) -> None:
    boxes, scores = decode(encode(TARGETS, SPECS[name], CENTRES), SPECS[name], SIZE)
    for place in (0, 1):
        truth = TARGETS[TARGETS[:, 0] == place]
        rows, labels = (scores[place] > 0.5).nonzero(as_tuple=True)
        found = {
            (int(label), *box) for label, box in zip(labels, boxes[place][rows].round().int().tolist(), strict=True)
        }
        xywh = (truth[:, 2:] * torch.tensor([96.0, 64, 96, 64])).round().int().tolist()
        assert found == {(int(label), *box) for label, box in zip(truth[:, 1], xywh, strict=True)}


def test_false_objects_cost() -> None:
    raw = encode(TARGETS, PLAIN, CENTRES)
    raw[0, 4, 3, 5] = 5  # nothing is there
    assert loss_of(raw, PLAIN, CENTRES)[1]["objectness"] > 0.1


def test_the_box_loss_is_complete_iou_in_pixels() -> None:
    """By hand: boxes of one size, shifted by half a cell; IoU 8/24, centres 8 px apart, diagonal² of both 24² + 16²."""
    spec = replace(PLAIN, anchors=((16, 16),))
    raw = encode(torch.tensor([target(2.9, 1.5, 16, 16)]), spec, CENTRES, batch=1)
    _, parts = loss_of(raw, spec, Recipe(neighbours=0, box_gain=1), torch.tensor([target(2.4, 1.5, 16, 16)]))
    assert parts["box"] == pytest.approx(3 * (1 - 8 / 24 + 64 / (24**2 + 16**2)), rel=1e-4)  # 3 / 1 head


def test_gains_weigh_their_parts() -> None:
    raw = torch.randn(2, 16, *SHAPE, generator=torch.Generator().manual_seed(0))
    _, one = loss_of(raw, PLAIN, Recipe(box_gain=1, objectness_gain=1, class_gain=1))
    total, many = loss_of(raw, PLAIN, Recipe(box_gain=2, objectness_gain=3, class_gain=5))
    for part, gain in {"box": 2, "objectness": 3, "class": 5}.items():
        assert many[part] == pytest.approx(gain * float(one[part]), rel=1e-5)
    assert total == pytest.approx(float(sum(many.values())), rel=1e-6)


def test_label_smoothing_makes_certainty_cost() -> None:
    raw = encode(TARGETS, PLAIN, CENTRES).clamp(-9, 9)
    _, parts = loss_of(raw, PLAIN, replace(CENTRES, label_smoothing=0.1, class_gain=1))
    certain = 0.05 * 9 + np.log1p(np.exp(-9))  # the goals are .95 and .05, the logits 9 and -9
    assert parts["class"] == pytest.approx(3 * certain, rel=1e-5)  # 3 / 1 head


def test_one_class_has_no_class_loss() -> None:
    spec = replace(PLAIN, classes=1)
    _, parts = loss_of(torch.randn(2, 12, *SHAPE), spec, Recipe(), TARGETS * torch.tensor([1.0, 0, 1, 1, 1, 1]))
    assert parts["class"] == 0
    assert parts["box"] > 0


def test_of_two_boxes_in_a_cell_the_better_one_is_the_goal() -> None:
    spec = replace(PLAIN, anchors=((16, 16),))
    near, far = target(2.5, 1.5, 16, 16), target(2.9, 1.9, 30, 8)
    raw = encode(torch.tensor([near]), spec, CENTRES, batch=1)
    for both in ([near, far], [far, near]):
        assert loss_of(raw, spec, CENTRES, torch.tensor(both))[1]["objectness"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_no_targets_at_all(name: str) -> None:
    raw = torch.rand(2, 16, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total, parts = loss_of(raw, SPECS[name], Recipe(), torch.zeros(0, 6))
    total.backward()
    assert total > 0
    assert (parts["box"], parts["class"]) == (0, 0)
    gradient = split(raw.grad, SPECS[name])
    assert gradient.isfinite().all()
    assert (gradient[..., 4] > 0).all()  # less objectness everywhere
    assert gradient[..., :4].abs().sum() == gradient[..., 5:].abs().sum() == 0


@pytest.mark.parametrize("name", SPECS)
def test_gradients_flow_to_the_cells_that_answer(name: str) -> None:
    spec, recipe = SPECS[name], Recipe()
    raw = (torch.rand(2, 16, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1).requires_grad_()
    loss_of(raw, spec, recipe)[0].backward()
    gradient = split(raw.grad, spec)
    assert gradient.isfinite().all()
    answers = torch.zeros(gradient.shape[:4], dtype=torch.bool)
    answers[assign(TARGETS, SHAPE, spec, SIZE, recipe).places] = True
    assert 0 < answers.sum() < answers.numel()
    for values in (gradient[..., :4], gradient[..., 5:]):
        assert torch.equal((values != 0).any(-1), answers)
    assert (gradient[..., 4] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(dtype: torch.dtype) -> None:
    raw = torch.randn(2, 16, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    total, _ = loss_of(raw, PLAIN, Recipe())
    full, _ = loss_of(raw.detach().float(), PLAIN, Recipe())
    assert total.dtype == torch.float32
    assert total == full
    total.backward()
    assert raw.grad.dtype == dtype
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_extreme_outputs_keep_the_loss_finite(name: str, value: float) -> None:
    raw = torch.full((2, 16, *SHAPE), value, requires_grad=True)
    total, _ = loss_of(raw, SPECS[name], Recipe())
    total.backward()
    assert total.isfinite()
    assert raw.grad.isfinite().all()


def test_heads_add_up_and_coarse_ones_weigh_more() -> None:
    coarse = replace(PLAIN, stride=(32, 32))
    raw = torch.zeros(2, 16, *SHAPE)
    _, fine_part = detection_loss([raw], torch.zeros(0, 6), [PLAIN], SIZE, Recipe())
    _, both = detection_loss([raw, raw], torch.zeros(0, 6), [PLAIN, coarse], SIZE, Recipe())
    assert both["objectness"] == pytest.approx(float(fine_part["objectness"]) / 2 * (1 + 0.5**1.5), rel=1e-5)


# Learning

CFG = """[net]
width=64
height=64
channels=3
[convolutional]
batch_normalize=1
filters=16
size=3
stride=4
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=32
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters=14
size=1
activation={activation}
[yolo]
mask=0,1
anchors=12,12, 20,20
classes=2
num=2
scale_x_y={scale_x_y}
new_coords={new_coords}
"""


@pytest.mark.parametrize(
    "head",
    [
        {"activation": "linear", "scale_x_y": 1.05, "new_coords": 0},
        {"activation": "logistic", "scale_x_y": 2.0, "new_coords": 1},
    ],
    ids=["plain", "new_coords"],
)
def test_a_small_network_learns_four_pictures(tmp_path: Path, head: dict[str, object]) -> None:
    generator = np.random.default_rng(0)
    labels = []
    for index in range(4):
        picture, rows = generator.integers(60, 100, (64, 64, 3)).astype(np.uint8), []
        for label, (row, column) in enumerate(generator.permutation(np.argwhere(np.ones((2, 2))))[:2]):
            x, y, side = 16 + 32 * column + generator.integers(-4, 5), 16 + 32 * row, 12 + 8 * (index % 2)
            picture[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = (255, 40, 40)[:: 1 - 2 * label]
            rows.append([label, x / 64, y / 64, side / 64, side / 64])
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture)
        labels.append(np.float32(rows))
    labelled = Labelled([str(tmp_path / f"{i}.png") for i in range(4)], np.full((4, 2), 64, np.int32), labels)
    (tmp_path / "net.cfg").write_text(CFG.format(**head))
    torch.manual_seed(0)
    model = Darknet(load_cfg(tmp_path / "net.cfg"))
    names, settings, cpu = ("red", "blue"), Settings((64, 64)), torch.device("cpu")
    assert evaluate(model, labelled, names, settings, device=cpu)[0].map50 < 0.5
    batch = collate([Pictures(labelled)[Key(index, 0, (64, 64), False)] for index in range(4)])
    x = to_input(batch.pictures, cpu)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    for _ in range(250):
        optimizer.zero_grad()
        detection_loss(model(x), batch.targets, model.heads, (64, 64), Recipe())[0].backward()
        optimizer.step()
    evaluation, _ = evaluate(model, labelled, names, settings, device=cpu)
    assert evaluation.map50 > 0.9
    assert evaluation.map50_95 > 0.6


def test_the_best_matches_of_every_truth_are_kept_over_all_heads() -> None:
    truths = [torch.tensor([0, 1, 0]), torch.tensor([0, 1])]
    scores = [torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0.9, 0.1])]
    ious = [torch.tensor([0.9, 0.2, 0.5]), torch.tensor([0.9, 0.9])]  # worth .27, .00003, .016; .48, .053
    assert [kept.tolist() for kept in best_matches(truths, scores, ious, 1)] == [[False] * 3, [True, True]]
    assert [kept.tolist() for kept in best_matches(truths, scores, ious, 2)] == [[True, True, False], [True, True]]
    none = torch.zeros(0)
    assert [len(kept) for kept in best_matches([none.long()], [none], [none], 2)] == [0]


def test_the_efficient_iou_loss_adds_the_distance_of_sides() -> None:
    predicted, truth = torch.tensor([[0.0, 0.0, 4.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    # IoU 1/2; centres (2, 1) and (1, 1) in a hull of diagonal² 20; widths differ by 2 of 4
    assert efficient_box_iou_loss(predicted, truth).item() == pytest.approx(1 - 0.5 + 1 / 20 + (2 / 4) ** 2)
