"""The judge: known answers, pycocotools' own answers, and evaluation of a network end to end."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models import Darknet, load_cfg
from utils.evaluate import Evaluation, Settings, detect_all, evaluate, judge
from utils.labels import Labelled

NAMES = ("cat", "dog", "owl")
NOTHING = np.zeros((0, 5), np.float32)


def truths(*images: list[tuple[float, ...]], size: tuple[int, int] = (100, 200)) -> Labelled:
    """Make labels of images of one size from rows (class, x, y, w, h) in pixels, x and y the top left corner."""
    h, w = size
    labels = []
    for rows in images:
        boxes = np.array(rows, np.float32).reshape(-1, 5)
        boxes[:, 1:3] += boxes[:, 3:5] / 2
        labels.append(boxes / np.float32([1, w, h, w, h]))
    return Labelled([f"{i}.jpg" for i in range(len(images))], np.array([size] * len(images), np.int32), labels)


def found(image: int, label: int, bbox: tuple[float, ...], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": label, "bbox": list(bbox), "score": score}


def random_case(seed: int) -> tuple[Labelled, list[dict[str, Any]]]:
    """Draw truths of classes 0 and 1 in 12 images, and detections near them, far off and of the wrong class."""
    generator = np.random.default_rng(seed)
    images, results = [], []
    for image in range(12):
        rows = []
        for _ in range(generator.integers(0, 6)):
            label = int(generator.integers(0, 2))
            x, y, w, h = generator.uniform((0, 0, 10, 10), (140, 60, 60, 40))
            rows.append((label, x, y, w, h))
            for _ in range(generator.integers(0, 3)):
                guess = int(generator.integers(0, 3)) if generator.random() < 0.3 else label
                near = np.array([x, y, w, h]) + generator.normal(0, 3, 4)
                results.append(found(image, guess, tuple(near.tolist()), float(generator.random())))
        images.append(rows)
    return truths(*images), results


def rates(evaluation: Evaluation) -> tuple[float, ...]:
    return tuple(evaluation.means().values())


TWO_IMAGES = truths(
    [(0, 10, 10, 50, 40), (1, 100, 20, 60, 60)],
    [(0, 0, 0, 200, 100), (2, 30, 30, 10, 10), (2, 90, 30, 30, 10)],
)
PERFECT = [
    found(0, 0, (10, 10, 50, 40), 0.9),
    found(0, 1, (100, 20, 60, 60), 0.8),
    found(1, 0, (0, 0, 200, 100), 0.7),
    found(1, 2, (30, 30, 10, 10), 0.6),
    found(1, 2, (90, 30, 30, 10), 0.5),
]


def test_perfect_detections_get_full_marks() -> None:
    evaluation = judge(PERFECT, TWO_IMAGES, NAMES, max_det=100)
    assert rates(evaluation) == pytest.approx((1, 1, 1, 1, 1))
    assert evaluation.confidence <= 0.5
    assert evaluation.images == 2
    assert {name: score.truths for name, score in evaluation.per_class.items()} == {"cat": 2, "dog": 1, "owl": 2}
    assert all(score.ap == pytest.approx(1) for score in evaluation.per_class.values())


@pytest.mark.parametrize(
    "results",
    [[], [found(0, 1, (10, 10, 50, 40), 0.9)], [found(1, 0, (10, 10, 50, 40), 0.9)], [found(0, 0, (0, 0, 9, 9), 1)]],
    ids=["none", "wrong class", "wrong image", "wrong place"],
)
def test_what_finds_nothing_gets_nothing(results: list[dict[str, Any]]) -> None:
    evaluation = judge(results, TWO_IMAGES, NAMES, max_det=100)
    assert rates(evaluation) == (0, 0, 0, 0, 0)
    assert all((s.ap50, s.ap, s.precision, s.recall, s.f1) == (0,) * 5 for s in evaluation.per_class.values())


def test_a_case_by_hand() -> None:
    """Four cats; hits at .9 and .7, misses at .8 and .6, one cat never found.

    Precision at the hits: 1/1, 2/3, and a third hit at .5: 3/5. The curve is 1 up to recall .25 (26 of 101 points), 2/3
    up to .5 (25), 3/5 up to .75 (25), then 0. F1 over the detections above each confidence: 2·1/(4+1) = .4 at .9,
    2·2/(4+3) = 4/7 at .7, 2·3/(4+5) = 2/3 at .5: the best.
    """
    cats = [(0, 10, 10, 20, 20), (0, 50, 10, 20, 20), (0, 90, 10, 20, 20), (0, 130, 10, 20, 20)]
    results = [
        found(0, 0, (10, 10, 20, 20), 0.9),
        found(0, 0, (10, 60, 20, 20), 0.8),
        found(0, 0, (50, 10, 20, 20), 0.7),
        found(0, 0, (50, 60, 20, 20), 0.6),
        found(0, 0, (90, 14, 20, 20), 0.5),  # IoU 16/24: a hit at .5, .55, .6 and .65, a miss above
        found(0, 0, (130, 60, 20, 20), 0.4),
    ]
    evaluation = judge(results, truths(cats), ("cat",), max_det=100)
    ap50 = (26 + 25 * 2 / 3 + 25 * 3 / 5) / 101
    assert evaluation.map50 == pytest.approx(ap50)
    assert evaluation.precision == pytest.approx(3 / 5)
    assert evaluation.recall == pytest.approx(3 / 4)
    assert evaluation.f1 == pytest.approx(2 / 3)
    assert 0.4 < evaluation.confidence <= 0.5
    assert evaluation.map50_95 == pytest.approx((4 * ap50 + 6 * (26 + 25 * 2 / 3) / 101) / 10)


def test_the_confidence_is_where_the_mean_f1_of_the_classes_is_best() -> None:
    labelled = truths([(0, 10, 10, 20, 20), (1, 50, 10, 20, 20)])
    results = [
        found(0, 0, (10, 10, 20, 20), 0.3),
        found(0, 1, (50, 10, 20, 20), 0.9),
        found(0, 1, (50, 60, 20, 20), 0.6),
        found(0, 1, (90, 60, 20, 20), 0.2),
    ]
    evaluation = judge(results, labelled, NAMES[:2], max_det=100)
    assert 0.2 < evaluation.confidence <= 0.3  # F1 is 1 and 2/3 there; at .9 it is 0 and 1
    assert evaluation.f1 == pytest.approx((1 + 2 / 3) / 2)
    assert evaluation.precision == pytest.approx((1 + 1 / 2) / 2)
    assert evaluation.per_class["dog"].precision == pytest.approx(1 / 2)
    assert evaluation.per_class["dog"].ap50 == pytest.approx(1)


def test_a_class_without_truths_does_not_count() -> None:
    labelled = truths([(0, 10, 10, 20, 20)], [])
    results = [found(0, 0, (10, 10, 20, 20), 0.9), found(1, 1, (10, 10, 20, 20), 0.95)]
    evaluation = judge(results, labelled, NAMES, max_det=100)
    assert rates(evaluation) == pytest.approx((1, 1, 1, 1, 1))
    assert list(evaluation.per_class) == list(NAMES)
    for name in ("dog", "owl"):
        score = evaluation.per_class[name]
        assert (score.truths, score.ap50, score.ap, score.precision, score.recall, score.f1) == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("results", [[], [found(1, 2, (10, 10, 20, 20), 0.9)]], ids=["none", "one"])
def test_no_truths_at_all(results: list[dict[str, Any]]) -> None:
    evaluation = judge(results, truths([], []), NAMES, max_det=100)
    assert rates(evaluation) == (0, 0, 0, 0, 0)
    assert evaluation.images == 2


def test_detections_on_images_without_boxes_are_false() -> None:
    labelled = truths([(0, 10, 10, 20, 20)], [], [])
    results = [
        found(0, 0, (10, 10, 20, 20), 0.5),
        found(1, 0, (10, 10, 20, 20), 0.9),
        found(2, 0, (10, 10, 20, 20), 0.8),
    ]
    evaluation = judge(results, labelled, ("cat",), max_det=100)
    assert (evaluation.map50, evaluation.precision) == pytest.approx((1 / 3, 1 / 3))
    assert evaluation.recall == 1


@pytest.mark.parametrize("max_det", [1, 2, 5, 10, 15])
def test_max_det_is_honoured(max_det: int) -> None:
    boxes = [(x, y, 8, 8) for y in (0, 20, 40, 60) for x in (0, 20, 40, 60, 80)]
    labelled = truths([(0, *box) for box in boxes])
    results = [found(0, 0, box, 0.9 - 0.01 * place) for place, box in enumerate(boxes)]
    evaluation = judge(results, labelled, ("cat",), max_det=max_det)
    assert evaluation.recall == pytest.approx(max_det / 20)
    assert evaluation.map50 == pytest.approx(sum(r <= 100 * max_det / 20 for r in range(101)) / 101)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_det", [3, 100])
def test_pycocotools_says_the_same(seed: int, max_det: int) -> None:
    labelled, results = random_case(seed)
    evaluation = judge(copy.deepcopy(results), labelled, NAMES, max_det=max_det)
    truth, number = COCO(), iter(range(1, 1000))
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": i} for i in range(3)],
        "annotations": [
            {
                "id": next(number),
                "image_id": i,
                "category_id": int(label),
                "bbox": [(x - w / 2) * 200, (y - h / 2) * 100, w * 200, h * 100],
                "area": w * 200 * h * 100,
                "iscrowd": 0,
            }
            for i, rows in enumerate(labelled.labels)
            for label, x, y, w, h in rows.astype(float).tolist()
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        reference = COCOeval(truth, truth.loadRes(results), "bbox")
        reference.params.maxDets = [max_det]
        reference.evaluate()
        reference.accumulate()
    precision = reference.eval["precision"][:, :, :2, 0, 0]  # classes 0 and 1 have truths
    assert precision.min() >= 0
    assert 0.1 < evaluation.map50_95 < evaluation.map50 < 0.95
    assert evaluation.map50_95 == pytest.approx(precision.mean(), abs=1e-6)
    assert evaluation.map50 == pytest.approx(precision[0].mean(), abs=1e-6)
    assert evaluation.per_class["dog"].ap == pytest.approx(precision[:, :, 1].mean(), abs=1e-6)
    for score in evaluation.per_class.values():
        assert score.f1 == pytest.approx(2 * score.precision * score.recall / max(score.precision + score.recall, 1e-9))


def test_judging_leaves_the_detections_as_they_were() -> None:
    results = copy.deepcopy(PERFECT)
    judge(results, TWO_IMAGES, NAMES, max_det=100)
    assert results == PERFECT


def test_a_truth_that_reaches_past_the_picture_is_clipped_as_detections_are() -> None:
    labelled = truths([(0, -10, -10, 40, 40)])
    assert judge([found(0, 0, (0, 0, 30, 30), 0.9)], labelled, ("cat",), max_det=100).map50_95 == pytest.approx(1)


def test_an_evaluation_is_plain_data_and_a_table() -> None:
    evaluation = judge(PERFECT[:3], TWO_IMAGES, NAMES, max_det=100, ms_per_image={"forward": 1.25})
    data = json.loads(json.dumps(evaluation.figures()))
    assert data["per_class"]["owl"] == {"ap50": 0, "ap": 0, "precision": 0, "recall": 0, "f1": 0, "truths": 2}
    assert data["map50"] == pytest.approx(2 / 3)
    assert data["ms_per_image"] == {"forward": 1.25}
    assert {"map50", "map50_95", "precision", "recall", "f1", "per_class", "images"} <= data.keys()
    head, every, *classes, _ = evaluation.table().splitlines()
    assert every.split() == ["all", "5", "0.667", "0.667", "0.667", "0.667", "0.667"]
    assert [line.split()[:2] for line in classes] == [["cat", "2"], ["dog", "1"], ["owl", "2"]]
    assert len({len(line) for line in (head, every, *classes)}) == 1


# End to end


CFG = """[net]
width=64
height=64
channels=3
[convolutional]
filters=8
size=3
stride=16
pad=1
activation=leaky
[convolutional]
filters=16
size=1
activation=linear
[yolo]
mask=0,1
anchors=10,10, 30,20
classes=3
num=2
"""


@pytest.fixture
def model(tmp_path: Path) -> Darknet:
    (tmp_path / "net.cfg").write_text(CFG)
    torch.manual_seed(0)
    return Darknet(load_cfg(tmp_path / "net.cfg")).train()


@pytest.fixture
def labelled(tmp_path: Path) -> Labelled:
    generator = np.random.default_rng(0)
    shapes = [(64, 64), (30, 90), (90, 30), (40, 50), (1, 1)]
    for index, shape in enumerate(shapes):
        cv2.imwrite(str(tmp_path / f"{index}.png"), generator.integers(0, 256, (*shape, 3)).astype(np.uint8))
    labels = [np.float32([[1, 0.5, 0.5, 0.3, 0.3]])] * 4 + [NOTHING]
    return Labelled([str(tmp_path / f"{i}.png") for i in range(5)], np.array(shapes, np.int32), labels)


@pytest.mark.parametrize("is_rectangular", [False, True])
def test_evaluate_a_network(model: Darknet, labelled: Labelled, is_rectangular: bool) -> None:
    settings = Settings((64, 64), batch_size=2, max_det=7, is_rectangular=is_rectangular)
    evaluation, results = evaluate(model, labelled, NAMES, settings, device=torch.device("cpu"))
    assert set(evaluation.ms_per_image) == {"preprocess", "forward", "nms"}
    assert all(ms > 0 for ms in evaluation.ms_per_image.values())
    assert evaluation.images == 5
    assert all(set(result) == {"image_id", "category_id", "bbox", "score"} for result in results)
    assert {result["image_id"] for result in results} == set(range(5))
    for image, (h, w) in enumerate(labelled.sizes.tolist()):
        mine = [result for result in results if result["image_id"] == image]
        assert 0 < len(mine) <= 7
        assert [result["score"] for result in mine] == sorted((result["score"] for result in mine), reverse=True)
        for x, y, bw, bh in (result["bbox"] for result in mine):
            assert min(x, y, bw, bh) >= 0
            assert x + bw <= w + 1e-3
            assert y + bh <= h + 1e-3
    json.dumps(results)


@pytest.mark.parametrize("is_stretched", [False, True])
def test_detections_do_not_depend_on_the_batch(model: Darknet, labelled: Labelled, is_stretched: bool) -> None:
    alone, together = (
        detect_all(
            model,
            labelled,
            Settings((64, 64), batch_size=size, is_rectangular=False, is_stretched=is_stretched),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )[0]
        for size in (1, 8)
    )
    assert len(alone) == len(together) > 0
    for first, second in zip(alone, together, strict=True):
        assert (first["image_id"], first["category_id"]) == (second["image_id"], second["category_id"])
        assert first["bbox"] == pytest.approx(second["bbox"], abs=1e-2)
        assert first["score"] == pytest.approx(second["score"], abs=1e-4)


def test_a_network_that_finds_nothing(model: Darknet, labelled: Labelled) -> None:
    settings = Settings((64, 64), conf_thres=1.0)
    evaluation, results = evaluate(model, labelled, NAMES, settings, device=torch.device("cpu"))
    assert results == []
    assert rates(evaluation) == (0, 0, 0, 0, 0)
