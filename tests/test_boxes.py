"""NMS against a plain greedy reference, and boxes on their way between a picture and the network input."""

import numpy as np
import pytest
import torch
from torch import Tensor

from utils import boxes as boxes_module
from utils.boxes import Fit, non_maximum_suppression

COMMON = {"conf_thres": 0.1, "iou_thres": 0.5, "max_det": 5000}


def random_boxes(seed: int, count: int = 120, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator) * torch.tensor([100.0, 100, 60, 60]) + 5
    return boxes, torch.rand(count, classes, generator=generator)


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Give the IoU of one xyxy box with others."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = sides.clip(0).prod(1)
    return shared / (np.prod(box[2:] - box[:2]) + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def greedy(boxes: Tensor, scores: Tensor, *, is_agnostic: bool) -> np.ndarray:
    """Take the best box, drop what overlaps it, and so on, in float64."""
    x, y, w, h = boxes.double().numpy().T
    corners = np.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), axis=1)
    left = [
        (*corners[row], float(scores[row, label]), label)
        for row, label in np.ndindex(*scores.shape)
        if scores[row, label] > COMMON["conf_thres"]
    ]
    found = np.array(sorted(left, key=lambda row: -row[4])).reshape(-1, 6)
    kept: list[int] = []
    for place, box in enumerate(found):
        rivals = found[kept]
        rivals = rivals if is_agnostic else rivals[rivals[:, 5] == box[5]]
        if (overlaps(box[:4], rivals[:, :4]) <= COMMON["iou_thres"]).all():
            kept.append(place)
    return found[kept]


@pytest.mark.parametrize("is_agnostic", [False, True])
@pytest.mark.parametrize(("seed", "count", "classes"), [(0, 120, 4), (1, 120, 1), (2, 40, 30), (3, 300, 5), (5, 1, 1)])
def test_nms_is_greedy(seed: int, count: int, classes: int, is_agnostic: bool) -> None:
    boxes, scores = random_boxes(seed, count, classes)
    expected = greedy(boxes, scores, is_agnostic=is_agnostic)
    found = non_maximum_suppression(boxes, scores, **COMMON, is_agnostic=is_agnostic)
    assert 0 < len(expected) <= count * classes
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_classes_never_meet() -> None:
    """A box may reach past the top left corner, so classes shifted apart by the largest coordinate would overlap."""
    boxes = torch.tensor([[180.0, 180, 20, 20], [0, 0, 40, 40]])  # 190 is the largest coordinate
    found = non_maximum_suppression(boxes, torch.tensor([[0.9, 0], [0, 0.8]]), **{**COMMON, "iou_thres": 0.2})
    assert found[:, 5].tolist() == [0, 1]


def test_max_det_keeps_the_best() -> None:
    boxes, scores = random_boxes(0)
    every = non_maximum_suppression(boxes, scores, **COMMON)
    few = non_maximum_suppression(boxes, scores, **{**COMMON, "max_det": 7})
    assert len(every) > 7
    torch.testing.assert_close(few, every[:7])


@pytest.mark.parametrize("is_agnostic", [False, True])
def test_the_class_filter_comes_before_suppression(is_agnostic: bool) -> None:
    boxes, scores = random_boxes(0)
    wanted = scores * torch.tensor([0.0, 1, 0, 1])
    found = non_maximum_suppression(boxes, scores, **COMMON, classes=[3, 1], is_agnostic=is_agnostic)
    torch.testing.assert_close(found, non_maximum_suppression(boxes, wanted, **COMMON, is_agnostic=is_agnostic))
    assert set(found[:, 5].tolist()) == {1.0, 3.0}


def test_a_box_counts_for_every_class_above_the_threshold() -> None:
    box, scores = torch.tensor([[50.0, 40, 20, 10]]), torch.tensor([[0.3, 0.1, 0.9]])  # .1 is not above .1
    found = non_maximum_suppression(box, scores, **COMMON)
    torch.testing.assert_close(found, torch.tensor([[40.0, 35, 60, 45, 0.9, 2], [40, 35, 60, 45, 0.3, 0]]))
    assert len(non_maximum_suppression(box, scores, **COMMON, is_agnostic=True)) == 1


@pytest.mark.parametrize(("count", "classes"), [(0, 3), (5, 3)])
@pytest.mark.parametrize("is_agnostic", [False, True])
def test_nothing_found(count: int, classes: int, is_agnostic: bool) -> None:
    found = non_maximum_suppression(
        torch.ones(count, 4), torch.zeros(count, classes), **COMMON, is_agnostic=is_agnostic
    )
    assert found.shape == (0, 6)


@pytest.mark.parametrize("rubbish", [float("inf"), float("nan"), 3e38, 1e20, 1e7])
@pytest.mark.parametrize("is_agnostic", [False, True])
def test_the_endless_boxes_of_an_untrained_head_leave_the_others_alone(rubbish: float, is_agnostic: bool) -> None:
    boxes, scores = random_boxes(0)
    expected = non_maximum_suppression(boxes, scores, **COMMON, is_agnostic=is_agnostic)
    strange = torch.tensor([[50.0, 50, rubbish, 10], [50, 50, rubbish, rubbish]])
    found = non_maximum_suppression(
        torch.cat((strange, boxes)),
        torch.cat((torch.tensor([[0.0, 0, 0, 0.99], [0.98, 0, 0, 0]]), scores)),
        **COMMON,
        is_agnostic=is_agnostic,
    )
    assert found.isfinite().all()
    torch.testing.assert_close(found[(found[:, 2] - found[:, 0]) < 1000], expected)


def test_too_many_candidates_are_cut_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores = random_boxes(0)
    best = scores.flatten().topk(20).values.min()
    expected = non_maximum_suppression(boxes, scores * (scores >= best), **COMMON)
    monkeypatch.setattr(boxes_module, "MAX_CANDIDATES", 20)
    torch.testing.assert_close(non_maximum_suppression(boxes, scores, **COMMON), expected)


def test_fit_by_hand() -> None:
    fit = Fit((100, 200), (0.5, 0.25), (10, 20))  # of a picture 200 wide, halved in height, quartered in width
    boxes = np.array([[40.0, 20, 80, 60]])
    np.testing.assert_allclose(fit.to_input(boxes), [[30, 20, 40, 40]])
    torch.testing.assert_close(fit.to_picture(torch.tensor([[30.0, 20, 40, 40]])), torch.tensor(boxes).float())
    torch.testing.assert_close(
        fit.to_picture(torch.tensor([[0.0, 0, 500, 500], [-9, 5, 10, 500]])),
        torch.tensor([[0.0, 0, 200, 100], [0, 0, 0, 100]]),
    )


@pytest.mark.parametrize("seed", range(5))
def test_to_picture_undoes_to_input(seed: int) -> None:
    generator = np.random.default_rng(seed)
    h, w = generator.integers(1, 3000, 2)
    fit = Fit((int(h), int(w)), tuple(generator.uniform(0.01, 4, 2)), tuple(map(int, generator.integers(0, 300, 2))))
    boxes = np.sort(generator.uniform(0, 1, (50, 2, 2)), axis=1).reshape(-1, 4) * (w, h, w, h)
    back = fit.to_picture(torch.from_numpy(fit.to_input(boxes)))
    np.testing.assert_allclose(back.numpy(), boxes, atol=1e-6)
    assert fit.to_picture(torch.zeros(0, 4)).shape == fit.to_input(np.zeros((0, 4))).shape == (0, 4)


def test_diou_nms_spares_boxes_with_centres_far_apart() -> None:
    """Two boxes of IoU 1/3: side by side, by hand d = 25, c = 325, so that their overlap is 1/3 - (1/13) ** beta."""
    boxes = torch.tensor([[5.0, 5.0, 10.0, 10.0], [10.0, 5.0, 10.0, 10.0]])
    scores = torch.tensor([[0.9], [0.8]])

    def kept(iou_thres: float, beta: float | None) -> int:
        options = {"conf_thres": 0.1, "iou_thres": iou_thres, "max_det": 9, "diou_beta": beta}
        return len(non_maximum_suppression(boxes, scores, **options))

    overlap = 1 / 3 - (1 / 13) ** 0.6
    assert kept(0.3, None) == 1
    assert kept(0.3, 0.6) == 2
    assert kept(overlap - 1e-4, 0.6) == 1
    assert kept(overlap + 1e-4, 0.6) == 2


@pytest.mark.parametrize("is_agnostic", [True, False])
def test_diou_nms_of_a_great_exponent_is_plain_nms(is_agnostic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(200, 4, generator=generator) * 50 + 1
    scores = torch.rand(200, 3, generator=generator)
    options = {"conf_thres": 0.3, "iou_thres": 0.4, "is_agnostic": is_agnostic, "max_det": 50}
    plain = non_maximum_suppression(boxes, scores, **options)
    assert len(plain) > 10
    assert torch.equal(non_maximum_suppression(boxes, scores, **options, diou_beta=100), plain)


def test_diou_nms_of_nothing() -> None:
    options = {"conf_thres": 0.5, "iou_thres": 0.5, "max_det": 9, "diou_beta": 0.6}
    assert non_maximum_suppression(torch.zeros(0, 4), torch.zeros(0, 2), **options).shape == (0, 6)
