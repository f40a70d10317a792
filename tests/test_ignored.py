"""Crowds, difficult objects and regions in evaluation, by hand, and the files that name them."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from utils.confusion import confuse
from utils.evaluate import Evaluation, judge
from utils.ignored import drop_covered
from utils.labels import IGNORED_KINDS, Labelled, check_labels, merge_classes
from utils.lists import ignore_path
from utils.log import DataError

W, H = 200, 100
CAT = (0, 10, 10, 20, 20)


def one_image(truths: list[tuple[float, ...]], ignored: list[tuple[Any, ...]]) -> Labelled:
    """Make labels of one picture; boxes are (class, left, top, width, height) in pixels, and a kind where ignored."""

    def rows(boxes: list[tuple[Any, ...]], columns: int) -> np.ndarray:
        found = np.array(boxes, np.float64).reshape(-1, columns)
        found[:, 1:3] += found[:, 3:5] / 2
        found[:, 1:5] /= (W, H, W, H)
        return found

    places = [(*box, IGNORED_KINDS.index(kind)) for *box, kind in ignored]
    return Labelled(["a.jpg"], np.array([(H, W)]), [rows(truths, 5).astype(np.float32)], [rows(places, 6)])


def found(bbox: tuple[float, ...], score: float, label: int = 0) -> dict[str, Any]:
    return {"image_id": 0, "category_id": label, "bbox": list(bbox), "score": score}


HIT = found(CAT[1:], 0.5)


def judged(ignored: list[tuple[Any, ...]], *others: dict[str, Any], truths: Any = (CAT,)) -> Evaluation:
    return judge([HIT, *others], one_image(list(truths), ignored), ("cat", "dog"), max_det=100)


def test_a_detection_on_nothing_is_false() -> None:
    """The false one has the higher score: precision is 1/2 all along."""
    evaluation = judged([], found((110, 50, 20, 20), 0.9))
    assert (evaluation.map50, evaluation.precision) == pytest.approx((1 / 2, 1 / 2))


def test_any_number_of_detections_inside_a_crowd_do_not_count() -> None:
    crowd = (0, 100, 40, 80, 50, "crowd")
    inside = [found((110, 50, 20, 20), 0.9), found((112, 50, 20, 20), 0.8), found((150, 60, 8, 8), 0.7)]
    evaluation = judged([crowd], *inside)
    assert (evaluation.map50, evaluation.map50_95, evaluation.precision, evaluation.recall) == pytest.approx((1,) * 4)
    assert evaluation.per_class["cat"].truths == 1


def test_a_crowd_is_met_by_the_share_of_the_detection_against_each_threshold() -> None:
    """3/4 of the detection lie in the crowd: ignored at .5 to .75 (6 of 10), false above: AP 1/2 there."""
    evaluation = judged([(0, 100, 40, 80, 50, "crowd")], found((95, 50, 20, 20), 0.9))
    assert evaluation.map50 == pytest.approx(1)
    assert evaluation.map50_95 == pytest.approx((6 * 1 + 4 * 0.5) / 10)


def test_a_crowd_is_of_its_class_or_of_every_class() -> None:
    dog = (1, 60, 10, 20, 20)
    guess = [found((110, 50, 20, 20), 0.9, label=1), found(dog[1:], 0.4, label=1)]
    assert judged([(0, 100, 40, 80, 50, "crowd")], *guess, truths=(CAT, dog)).per_class["dog"].ap50 == pytest.approx(
        0.5
    )
    assert judged([(-1, 100, 40, 80, 50, "crowd")], *guess, truths=(CAT, dog)).per_class["dog"].ap50 == pytest.approx(1)


def test_a_difficult_object_is_met_by_iou() -> None:
    """A small detection inside one is false, where a crowd would swallow it; one that fits it does not count."""
    difficult = (0, 100, 40, 40, 40, "difficult")
    assert judged([difficult], found((110, 50, 10, 10), 0.9)).map50 == pytest.approx(1 / 2)
    fits = [found((100, 40, 40, 40), 0.9), found((101, 40, 40, 40), 0.8)]
    evaluation = judged([difficult], *fits)
    assert (evaluation.map50, evaluation.precision, evaluation.recall) == pytest.approx((1, 1, 1))
    # IoU 40·30 / (40·40) = 3/4: not counted at .5 to .75, false above
    assert judged([difficult], found((100, 40, 40, 30), 0.9)).map50_95 == pytest.approx((6 + 4 * 0.5) / 10)


def test_a_difficult_object_need_not_be_found() -> None:
    assert judged([(0, 100, 40, 40, 40, "difficult")]).recall == pytest.approx(1)


def test_a_true_detection_in_a_crowd_stays_true() -> None:
    evaluation = judged([(0, 0, 0, 200, 100, "crowd")], found((110, 50, 20, 20), 0.9))
    assert (evaluation.map50, evaluation.recall) == pytest.approx((1, 1))


CROWD, DIFFICULT = (0, 100, 40, 80, 50, "crowd"), (0, 10, 50, 40, 40, "difficult")
CONFUSED = [  # truth, ignored, detections, matrix
    (
        CAT,
        [CROWD],
        [HIT, found((110, 50, 20, 20), 0.9), found((150, 60, 8, 8), 0.7)],
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
    ),
    (CAT, [DIFFICULT], [HIT, found((10, 50, 40, 36), 0.9)], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
    (CAT, [DIFFICULT], [HIT, found((20, 60, 10, 10), 0.9)], [[1, 0, 0], [0, 0, 0], [1, 0, 0]]),  # too small for it
    (CAT, [DIFFICULT], [HIT], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),  # need not be found
    (CAT, [CROWD], [HIT, found((110, 50, 20, 20), 0.9, 1)], [[1, 0, 0], [0, 0, 0], [0, 1, 0]]),  # of another class
    (CAT, [(-1, *CROWD[1:])], [HIT, found((110, 50, 20, 20), 0.9, 1)], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
    (CAT, [(*CAT, "crowd")], [HIT], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),  # a true one stays true
    ((1, *CAT[1:]), [(*CAT, "crowd")], [HIT], [[0, 0, 0], [0, 0, 1], [0, 0, 0]]),  # a cat of the crowd, not the dog
    ((1, *CAT[1:]), [], [HIT], [[0, 0, 0], [1, 0, 0], [0, 0, 0]]),
]


@pytest.mark.parametrize(("truth", "ignored", "results", "matrix"), CONFUSED)
def test_what_is_ignored_stands_nowhere_in_the_confusion_matrix(truth, ignored, results, matrix) -> None:
    assert confuse(results, one_image([truth], ignored), 2, confidence=0.1).tolist() == matrix


def test_the_confusion_matrix_excuses_what_the_table_does() -> None:
    """False positives of a class are its column without the diagonal, in a set with all kinds of ignored things."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        spots = [(int(generator.integers(2)), x, 0, 18, 40) for x in range(0, 200, 20)]
        kinds = generator.permutation(["truth"] * 5 + ["crowd", "crowd", "difficult", "difficult", "air"])
        truths = [spot for spot, kind in zip(spots, kinds, strict=True) if kind == "truth"]
        ignored = [(*spot, kind) for spot, kind in zip(spots, kinds, strict=True) if kind in IGNORED_KINDS]
        results = [found(spot[1:], 0.5, spot[0]) for spot in spots]
        evaluation = judge(results, one_image(truths, ignored), ("cat", "dog"), max_det=100)
        matrix = confuse(results, one_image(truths, ignored), 2, confidence=0.5)
        for label, score in enumerate(evaluation.per_class.values()):
            if score.truths:
                assert matrix[label, label] / max(matrix[:, label].sum(), 1) == pytest.approx(score.precision)


def test_regions_take_out_what_lies_to_one_half_inside() -> None:
    """Counted from 1 the region holds the columns 100 to 160, a box of 20 columns those from left+1 to left+20."""
    region = (-1, 100, 40, 60, 50, "region")
    labelled = one_image([CAT, (0, 110, 50, 20, 20)], [region])
    lefts = {89: True, 88: False, 150: True, 151: False}  # 10 of 20 columns inside, and 9
    results = [found((left, 50, 20, 20), 0.9) for left in lefts]
    kept, rest = drop_covered(results, labelled)
    assert [result["bbox"][0] for result in kept] == [left for left, is_dropped in lefts.items() if not is_dropped]
    assert len(rest.labels[0]) == 1
    assert rest.labels[0][0] == pytest.approx([0, 0.1, 0.2, 0.1, 0.2])


def test_regions_count_together_and_at_every_threshold() -> None:
    """Half of the detection in each of two regions, of which neither holds more than a half: it is gone even at .95."""
    regions = [(-1, 100, 40, 20, 50, "region"), (-1, 121, 40, 20, 50, "region")]
    assert judged(regions, found((110, 50, 20, 20), 0.9)).map50_95 == pytest.approx(1)
    assert judged(regions[:1], found((114, 50, 20, 20), 0.9)).map50_95 == pytest.approx(1 / 2)  # 6 of 20 columns


def test_regions_at_the_border_and_tiny_boxes() -> None:
    """The region holds 11 · 11 pixels, of 15 · 15 (54 %), 17 · 17 (42 %) and one."""
    labelled = one_image([CAT], [(-1, 190, 90, 10, 10, "region")])
    boxes = [(185, 85, 15, 15), (183, 83, 17, 17), (199, 99, 0.2, 0.2), (0, 0, 0, 0)]
    kept, _ = drop_covered([found(box, 0.9) for box in boxes], labelled)
    assert [tuple(result["bbox"]) for result in kept] == [boxes[1], boxes[3]]


def test_ignore_files_are_read_and_checked(tmp_path: Path) -> None:
    for folder in ("images/x", "labels/x", "ignore/x"):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images/x/a.png"), np.zeros((H, W, 3), np.uint8))
    (tmp_path / "labels/x/a.txt").write_text("1 .5 .5 .1 .1\n")
    (tmp_path / "list.txt").write_text("images/x/a.png\n")
    ignore = tmp_path / "ignore/x/a.txt"
    assert ignore_path(str(tmp_path / "images/x/a.png")) == ignore
    assert ignore_path("elsewhere/a.png") is None
    ignore.write_text("1 .5 .5 .2 .2 crowd\n-1 .1 .1 .2 .2 region\n0 .2 .2 .1 .1 difficult\n")
    labelled = check_labels(tmp_path / "list.txt", 2)
    assert labelled.ignored[0].tolist() == [
        [1, 0.5, 0.5, 0.2, 0.2, 0],
        [-1, 0.1, 0.1, 0.2, 0.2, 2],
        [0, 0.2, 0.2, 0.1, 0.1, 1],
    ]
    assert merge_classes(labelled).ignored[0][:, 0].tolist() == [0, -1, 0]
    ignore.write_text("2 .5 .5 .2 .2 crowd\n0 .5 .5 .2 .2 group\n\n0 .5 .5 0 .2 crowd\n")
    with pytest.raises(DataError) as caught:
        check_labels(tmp_path / "list.txt", 2)
    lines = str(caught.value).splitlines()
    assert [line.partition(f"{ignore}:")[2].partition(":")[0] for line in lines] == [
        "1",
        "2",
        "4",
    ]  # a blank line is none
    assert "one of crowd, difficult, region" in lines[1]
