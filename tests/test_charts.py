"""Pictures of evaluations: the confusion matrix by hand, and that every chart is drawn of much, little and nothing."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.test_evaluate import NAMES, PERFECT, TWO_IMAGES, found, random_case, truths
from utils.album import draw_evaluation
from utils.charts import count_classes, draw_curves, draw_labels, draw_study, shown
from utils.confusion import confuse
from utils.evaluate import judge
from utils.labels import Labelled


def on_disk(labelled: Labelled, folder: Path) -> Labelled:
    """Give the same labels with grey pictures."""
    paths = [str(folder / path) for path in labelled.paths]
    for path, (h, w) in zip(paths, labelled.sizes.tolist(), strict=True):
        cv2.imwrite(path, np.full((h, w, 3), 128, np.uint8))
    return Labelled(paths, labelled.sizes, labelled.labels)


def test_what_is_taken_for_what() -> None:
    """Two cats, a dog and an owl; one cat seen twice, the dog taken for an owl, the owl missed, a cat in the air."""
    labelled = truths([(0, 0, 0, 40, 40), (0, 50, 0, 40, 40), (1, 100, 0, 40, 40), (2, 150, 0, 40, 40)], [])
    results = [
        found(0, 0, (0, 0, 40, 40), 0.9),
        found(0, 0, (2, 0, 40, 40), 0.8),
        found(0, 1, (50, 0, 40, 40), 0.95),  # as good as the next, but a dog
        found(0, 0, (51, 0, 40, 40), 0.6),
        found(0, 2, (100, 0, 40, 40), 0.5),
        found(1, 0, (0, 0, 40, 40), 0.4),
        found(0, 2, (150, 0, 40, 40), 0.1),  # below the confidence
    ]
    matrix = confuse(results, labelled, 3, confidence=0.3)
    assert matrix.tolist() == [[2, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [2, 1, 0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_the_matrix_counts_every_truth_and_every_detection_once(seed: int) -> None:
    labelled, results = random_case(seed)
    matrix = confuse(results, labelled, 3, confidence=0.2)
    assert matrix[:-1].sum(1).tolist() == count_classes(labelled, 3).tolist()
    seen = np.bincount([r["category_id"] for r in results if r["score"] >= 0.2], minlength=3)
    assert matrix[:, :-1].sum(0).tolist() == seen.tolist()


def test_the_diagonal_holds_the_hits_of_the_table() -> None:
    """Of boxes that lie apart, what matching by score finds is what pairing by overlap finds."""
    labelled = truths([(0, 0, 0, 20, 20), (1, 40, 0, 20, 20), (1, 80, 0, 20, 20)])
    results = [found(0, 0, (1, 0, 20, 20), 0.9), found(0, 0, (40, 0, 20, 20), 0.8), found(0, 1, (41, 0, 20, 20), 0.5)]
    evaluation = judge(results, labelled, NAMES, max_det=100)
    matrix = confuse(results, labelled, 3, confidence=evaluation.confidence)
    recall = [score.recall for score in evaluation.per_class.values()]
    assert recall == pytest.approx((np.diag(matrix)[:3] / np.maximum(matrix[:3].sum(1), 1)).tolist())


MANY = tuple(f"class {number}" for number in range(80))
CASES = {
    "perfect": (PERFECT, TWO_IMAGES, NAMES),
    "nothing found": ([], TWO_IMAGES, NAMES),
    "nothing there": ([found(0, 0, (1, 1, 9, 9), 0.9)], truths([]), NAMES),
    "nothing at all": ([], truths([], []), NAMES),
    "one class": ([found(0, 0, (0, 0, 20, 20), 0.9)], truths([(0, 0, 0, 20, 20)]), ("_$a$",)),
    "past the picture": ([found(0, 0, (500, 900, 1e12, 9), 0.9)], truths([(0, 190, 90, 40, 40)]), NAMES),
    "many classes": (PERFECT, TWO_IMAGES, MANY),
}


@pytest.mark.parametrize("case", CASES)
def test_every_picture_is_drawn(case: str, tmp_path: Path) -> None:
    results, labelled, names = CASES[case]
    labelled = on_disk(labelled, tmp_path)
    draw_evaluation(tmp_path / "out", judge(results, labelled, names, max_det=100), results, labelled, names)
    draw_labels({"train": labelled, "valid": labelled}, names, tmp_path / "out/labels.png")
    for name in ("rates.png", "ap.png", "confusion.png", "predictions.jpg", "labels.png"):
        picture = cv2.imread(str(tmp_path / "out" / name))
        assert picture.std() > 1, name
        assert max(picture.shape) < 4000, name


def test_predictions_stand_beside_truths(tmp_path: Path) -> None:
    """A truth on the left half of the sheet, its detection on the right; below the confidence it would be gone."""
    labelled = on_disk(truths([(0, 20, 20, 120, 60)]), tmp_path)
    results = [found(0, 0, (20, 20, 120, 60), 0.9)]
    draw_evaluation(tmp_path / "a", judge(results, labelled, NAMES, max_det=9), results, labelled, NAMES)
    sheet = cv2.imread(str(tmp_path / "a/predictions.jpg")).astype(int)
    assert sheet.shape[1] == 2 * 480
    is_drawn = (sheet.max(2) - sheet.min(2)) > 60
    left, right = is_drawn[:, :480], is_drawn[:, 480:]
    assert left.sum() > 500
    assert (left & right).sum() > 0.8 * left.sum()


def test_curves_of_a_run_that_was_never_tested(tmp_path: Path) -> None:
    row = {"epoch": 1, "loss": {"loss": 3.0, "box": 1.0}, "lr": 0.01}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")).std() > 1


def test_a_study_is_drawn(tmp_path: Path) -> None:
    evaluation = judge(PERFECT, TWO_IMAGES, NAMES, max_det=100, ms_per_image={"forward": 3.0})
    draw_study([(256, evaluation), (320, evaluation)], tmp_path / "study.png")
    assert cv2.imread(str(tmp_path / "study.png")).std() > 1


def test_names_mean_nothing_to_matplotlib() -> None:
    assert shown("_a$b") == r" _a\$b"
    assert shown("x" * 50) == "x" * 20
