"""Darknet's loss: what every key asks of the outputs of a small head, by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.yolo import HeadSpec, decode
from utils.darknet_loss import darknet_loss, overlap_of
from utils.darknet_recipe import HeadRules

SIZE = (64, 64)  # 2x2 cells of 32 px
SPEC = HeadSpec(0, anchors=((16, 16), (32, 16)), classes=2, stride=(32, 32))
NEW = replace(SPEC, is_new_coords=True, scale_x_y=2.0)
RULES = HeadRules(iou_normalizer=1)
TRUTH = [0, 1, 0.625, 0.125, 0.25, 0.25]  # class 1 in row 0, column 1, a 16x16 square at 1.25, .25 of the cells


def deltas(
    rules: HeadRules, *, raw: Tensor | None = None, targets: Sequence[list[float]] = (TRUTH,), spec: HeadSpec = SPEC
) -> Tensor:
    """Give minus the gradient of the loss by a raw map of one picture: [A, H, W, 5+C]."""
    raw = torch.zeros(1, 14, 2, 2) if raw is None else raw
    raw = raw.clone().requires_grad_()
    loss, parts = darknet_loss([raw], torch.tensor(list(targets)).view(-1, 6), [spec], SIZE, (rules,))
    loss.backward()
    found = -raw.grad.view(2, 7, 2, 2).permute(0, 2, 3, 1)
    assert loss.item() == pytest.approx(found.square().sum().item(), rel=1e-5)
    assert sum(parts.values()).item() == pytest.approx(loss.item(), rel=1e-5)
    return found


def raw_of(values: dict[tuple[int, int, int, int], float]) -> Tensor:
    """Make a raw map of zeros but for values at (anchor, entry, row, column)."""
    raw = torch.zeros(1, 2, 7, 2, 2)
    for place, value in values.items():
        raw[(0, *place)] = value
    return raw.view(1, 14, 2, 2)


def test_the_best_anchor_answers_with_mse() -> None:
    found = deltas(replace(RULES, ignore_thresh=1))
    small = 2 - 0.25 * 0.25
    expected = torch.zeros(2, 2, 2, 7)
    expected[..., 4] = -0.5  # nothing there: 0 - sigmoid(0)
    expected[0, 0, 1] = torch.tensor([small * (0.25 - 0.5), small * (0.25 - 0.5), 0, 0, 0.5, -0.5, 0.5])
    torch.testing.assert_close(found, expected)


def test_mse_of_sides_is_in_logarithms() -> None:
    wide = [0, 0, 0.25, 0.25, 0.625, 0.25]  # 40x16: nearest to the second anchor, ln 1.25 wider
    found = deltas(RULES, targets=[wide])[1, 0, 0]
    assert found[2].item() == pytest.approx((2 - 0.625 * 0.25) * math.log(1.25), rel=1e-5)
    assert found[3].item() == pytest.approx(0, abs=1e-6)
    raw = raw_of({(1, 2, 0, 0): 0.3})
    assert deltas(RULES, raw=raw, targets=[wide])[1, 0, 0, 2].item() == pytest.approx(
        (2 - 0.625 * 0.25) * (math.log(1.25) - 0.3), rel=1e-5
    )


def test_new_coords_have_no_sigmoid() -> None:
    raw = torch.full((1, 14, 2, 2), 0.5)
    found = deltas(replace(RULES, ignore_thresh=1), raw=raw, spec=NEW)[0, 0, 1]
    small = 2 - 0.25 * 0.25  # x is 2 * .5 - .5 = .5; a side is 4 * .5² = 1 anchor
    torch.testing.assert_close(found, torch.tensor([-0.25 * small, -0.25 * small, 0, 0, 0.5, -0.5, 0.5]))


def test_empty_pictures_ask_for_no_objects() -> None:
    found = deltas(RULES, targets=[])
    expected = torch.zeros(2, 2, 2, 7)
    expected[..., 4] = -0.5
    torch.testing.assert_close(found, expected)


def test_anchors_of_other_heads_may_be_the_best() -> None:
    coarse = replace(SPEC, anchors=((16, 16), (64, 64)))
    fine = replace(SPEC, anchors=((32, 16), (8, 8)))
    raws = [torch.zeros(1, 14, 2, 2, requires_grad=True) for _ in range(2)]
    loss, _ = darknet_loss(raws, torch.tensor([TRUTH]), [coarse, fine], SIZE, (RULES, RULES))
    loss.backward()
    boxes = [raw.grad.view(2, 7, 2, 2)[:, :2].abs().sum((1, 2, 3)).tolist() for raw in raws]
    assert boxes[0][0] > 0
    assert (boxes[0][1], boxes[1]) == (0, [0, 0])


def test_the_loss_is_per_picture() -> None:
    raw = torch.zeros(4, 14, 2, 2, requires_grad=True)
    loss, _ = darknet_loss([raw], torch.tensor([TRUTH]), [SPEC], SIZE, (RULES,))
    loss.backward()
    assert raw.grad[3].abs().max().item() == 0.5 / 4


# Normalisers


def test_normalisers_weigh_their_parts() -> None:
    base = deltas(replace(RULES, ignore_thresh=1))
    rules = replace(RULES, ignore_thresh=1, iou_normalizer=0.1, obj_normalizer=0.2, cls_normalizer=0.3)
    weights = torch.tensor([0.1] * 4 + [0.2] + [0.3] * 2)
    torch.testing.assert_close(deltas(rules), base * weights)
    torch.testing.assert_close(deltas(replace(rules, delta_normalizer=0.5)), base * weights / 2)


def test_counters_weigh_the_classes_truths_have() -> None:
    base = deltas(replace(RULES, ignore_thresh=1))
    found = deltas(replace(RULES, ignore_thresh=1, class_weights=(1.0, 3.0)))
    expected = base.clone()
    expected[0, 0, 1] *= torch.tensor([3, 3, 3, 3, 3, 1, 3])  # not the false class
    torch.testing.assert_close(found, expected)


def test_smoothed_labels() -> None:
    found = deltas(replace(RULES, label_smooth_eps=0.2))[0, 0, 1]
    torch.testing.assert_close(found[5:], torch.tensor([0.1 - 0.5, 0.9 - 0.5]))


def test_focal_loss_of_classes() -> None:
    raw = raw_of({(0, 6, 0, 1): math.log(3)})  # .75 of the true class
    p = torch.tensor([0.5, 0.75])
    factor = 0.5 * -(1 - 0.75) * (2 * 0.75 * math.log(0.75) + 0.75 - 1)
    found = deltas(replace(RULES, is_focal=True), raw=raw)[0, 0, 1]
    torch.testing.assert_close(found[5:], (torch.tensor([0, 1]) - p) * factor)


def test_two_boxes_of_a_cell_add_up_and_both_classes_are_true() -> None:
    other = [0, 0, 0.625, 0.125, 0.25, 0.25]
    once, twice = deltas(RULES)[0, 0, 1], deltas(RULES, targets=[TRUTH, other])[0, 0, 1]
    torch.testing.assert_close(twice[:4], 2 * once[:4])
    torch.testing.assert_close(twice[4:], torch.tensor([0.5, 0.5, 0.5]))
    averaged = deltas(replace(RULES, iou_thresh=0.99), targets=[TRUTH, other])[0, 0, 1]
    torch.testing.assert_close(averaged, once + torch.tensor([0, 0, 0, 0, 0, 1.0, 0]))


def test_max_counts_the_truths_of_a_picture() -> None:
    far = [0, 0, 0.1, 0.9, 0.25, 0.25]
    torch.testing.assert_close(deltas(replace(RULES, max_boxes=1), targets=[TRUTH, far]), deltas(RULES))
    assert not torch.equal(deltas(RULES, targets=[TRUTH, far]), deltas(RULES))


# Thresholds


def test_iou_thresh_lets_more_anchors_answer() -> None:
    """The second anchor, twice as wide, has an IoU of one half with the truth's shape."""
    assert deltas(replace(RULES, iou_thresh=0.51))[1, 0, 1, :4].abs().sum() == 0
    found = deltas(replace(RULES, iou_thresh=0.49))[1, 0, 1]
    assert found[4].item() == 0.5
    assert found[2].item() == pytest.approx((2 - 1 / 16) * math.log(0.5), rel=1e-5)
    # giou: hull and union are the same; ciou: .5 minus the aspect ratio's part
    part = 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2
    ciou = 0.5 - part * part / (1.5 - 1 + part + 1e-6)
    for kind, value in (("giou", 0.5), ("diou", 0.5), ("ciou", ciou)):
        for thresh, answers in ((value - 1e-3, True), (value + 1e-3, False)):
            rules = replace(RULES, iou_thresh=thresh, iou_thresh_kind=kind)
            assert (deltas(rules)[1, 0, 1, 2] != 0).item() == answers, (kind, thresh)


def perfect(sure: float = 0.0) -> Tensor:
    """Make a raw map whose second anchor, which does not answer, has exactly the truth's box."""
    entries = {0: -math.log(3), 1: -math.log(3), 2: math.log(0.5), 5: sure, 6: sure}
    return raw_of({(1, entry, 0, 1): value for entry, value in entries.items()})


def test_ignore_thresh_spares_boxes_that_overlap_a_truth() -> None:
    assert deltas(replace(RULES, ignore_thresh=0.99), raw=perfect())[1, 0, 1, 4].item() == 0
    assert deltas(replace(RULES, ignore_thresh=0.99), raw=perfect(-2))[1, 0, 1, 4].item() == -0.5  # of no class
    half = raw_of({(1, 0, 0, 1): -math.log(3), (1, 1, 0, 1): -math.log(3)})  # twice as wide: an IoU of one half
    assert deltas(replace(RULES, ignore_thresh=0.49), raw=half)[1, 0, 1, 4].item() == 0
    assert deltas(replace(RULES, ignore_thresh=0.51), raw=half)[1, 0, 1, 4].item() == -0.5


def test_objectness_smooth_asks_for_the_overlap() -> None:
    half = raw_of({(1, 0, 0, 1): -math.log(3), (1, 1, 0, 1): -math.log(3), (1, 4, 0, 1): math.log(3)})
    rules = replace(RULES, ignore_thresh=0.4, is_smooth=True)
    assert deltas(rules, raw=half)[1, 0, 1, 4].item() == pytest.approx(0.5 - 0.75)
    # the cell that answers: its overlap where that is above ignore_thresh, else Darknet leaves "nothing there"
    found = deltas(replace(rules, ignore_thresh=0.9))[0, 0, 1]
    assert found[4].item() == -0.5
    torch.testing.assert_close(found[:4], deltas(RULES)[0, 0, 1, :4])
    # outputs: the box of the cell that answers is a quarter of a cell away on each axis: 8 of 16 px
    shared = 8 * 8
    overlap = shared / (2 * 256 - shared)
    found = deltas(replace(rules, ignore_thresh=overlap - 0.01))[0, 0, 1]
    assert found[4].item() == pytest.approx(overlap - 0.5)


def test_truth_thresh_lets_boxes_answer_that_overlap() -> None:
    found = deltas(replace(RULES, truth_thresh=0.99), raw=perfect())[1, 0, 1]
    torch.testing.assert_close(found, torch.tensor([0, 0, 0, 0, 0.5, -0.5, 0.5]), atol=1e-5, rtol=0)
    assert deltas(replace(RULES, ignore_thresh=0.5), raw=perfect())[1, 0, 1, 5:].abs().sum() == 0
    half = raw_of({(1, 0, 0, 1): -math.log(3), (1, 1, 0, 1): -math.log(3)})
    found = deltas(replace(RULES, truth_thresh=0.45, is_smooth=True), raw=half)[1, 0, 1]
    torch.testing.assert_close(found[4:], torch.tensor([0.25 - 0.5, -0.5, 0.25 - 0.5]))  # of the overlap squared


# Overlaps


@pytest.mark.parametrize(
    ("kind", "box", "expected"),
    [
        ("iou", (0.5, 0.5, 0.2, 0.2), 1),
        ("iou", (0.6, 0.5, 0.2, 0.2), 1 / 3),
        ("iou", (0.9, 0.5, 0.2, 0.2), 0),
        ("giou", (0.9, 0.5, 0.2, 0.2), -(0.12 - 0.08) / 0.12),
        ("giou", (0.6, 0.5, 0.2, 0.2), 1 / 3),
        ("diou", (0.6, 0.5, 0.2, 0.2), 1 / 3 - 0.01 / (0.09 + 0.04)),
        ("ciou", (0.6, 0.5, 0.2, 0.2), 1 / 3 - 0.01 / (0.09 + 0.04)),
        (
            "ciou",
            (0.5, 0.5, 0.4, 0.2),
            0.5 - (v := 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2) ** 2 / (0.5 + v),
        ),
    ],
)
def test_overlaps_by_hand(kind: str, box: tuple[float, ...], expected: float) -> None:
    truth = torch.tensor([0.5, 0.5, 0.2, 0.2])
    assert overlap_of(kind, torch.tensor(box), truth).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
@pytest.mark.parametrize("spec", [SPEC, NEW], ids=["plain", "new_coords"])
def test_iou_losses_climb_the_overlap(kind: str, spec: HeadSpec) -> None:
    """x and y move up the slope in fractions of the picture, w and h up that times their exponential."""
    start = 0.45 if spec.is_new_coords else 0.2
    raw = torch.full((1, 14, 2, 2), start)
    found = deltas(replace(RULES, iou_loss=kind, iou_normalizer=0.7), raw=raw, spec=spec)[0, 0, 1]
    xywh_px = decode(raw, spec, SIZE)[0].view(2, 2, 2, 4)[0, 0, 1]
    box = (xywh_px / 64).double()
    truth = torch.tensor(TRUTH[2:]).double()
    slope = []
    for axis in range(4):
        step = torch.zeros(4, dtype=torch.double)
        step[axis] = 1e-6
        slope.append((overlap_of(kind, box + step, truth) - overlap_of(kind, box - step, truth)).item() / 2e-6)
    factor = 1.0 if spec.is_new_coords else math.exp(start)
    expected = torch.tensor(slope) * torch.tensor([1, 1, factor, factor]) * 0.7
    torch.testing.assert_close(found[:4], expected.float(), rtol=1e-3, atol=1e-4)


def test_the_aspect_ratio_of_a_ciou_has_the_slope_of_sides_of_one() -> None:
    truth, box = torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([0.5, 0.5, 0.4, 0.2], requires_grad=True)
    slopes = [torch.autograd.grad(overlap_of(kind, box, truth), box)[0] for kind in ("diou", "ciou")]
    gap = math.atan(1) - math.atan(2)
    aspect = 4 / math.pi**2 * gap**2
    share = aspect / (0.5 + aspect + 1e-6) * 8 / math.pi**2 * gap
    torch.testing.assert_close(slopes[1] - slopes[0], torch.tensor([0, 0, share * 0.2, -share * 0.4]))


def test_max_delta_bounds_the_climb() -> None:
    free = deltas(replace(RULES, iou_loss="ciou"))[0, 0, 1, :4]
    assert free.abs().max() > 1
    bound = deltas(replace(RULES, iou_loss="ciou", max_delta=0.5))[0, 0, 1, :4]
    torch.testing.assert_close(bound, free.clamp(-0.5, 0.5))


def test_boxes_apart_have_no_slope_but_are_finite() -> None:
    raw = raw_of({(0, 2, 0, 1): -80.0, (0, 3, 0, 1): -80.0})
    for kind in ("iou", "giou", "diou", "ciou"):
        assert deltas(replace(RULES, iou_loss=kind), raw=raw)[0, 0, 1].isfinite().all()


def test_following_the_loss_finds_the_truths() -> None:
    targets = torch.tensor([TRUTH, [0, 0, 0.3, 0.7, 0.5, 0.25]])
    torch.manual_seed(0)
    raw = torch.randn(1, 14, 2, 2, requires_grad=True)
    for kind in ("mse", "ciou"):
        rules = (replace(RULES, iou_loss=kind),)
        optimizer = torch.optim.SGD([raw], lr=0.2, momentum=0.9)
        for _ in range(400):
            optimizer.zero_grad()
            darknet_loss([raw], targets, [SPEC], SIZE, rules)[0].backward()
            optimizer.step()
        boxes, scores = decode(raw.detach(), SPEC, SIZE)
        for label, truth in ((1, targets[0, 2:]), (0, targets[1, 2:])):
            best = scores[0, :, label].argmax()
            assert scores[0, best, label] > 0.9
            assert overlap_of("iou", boxes[0, best] / 64, truth) > 0.8
