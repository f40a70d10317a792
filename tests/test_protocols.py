"""The protocols: published results of two reference cases, Darknet's rules by hand, and what the command says."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import Darknet, load_cfg, save_weights
from tests.test_evaluate import NAMES, PERFECT, TWO_IMAGES, found, random_case, truths
from utils.evaluate import judge
from utils.labels import Labelled
from utils.protocols import DARKNET, IOUS, PROTOCOLS, rank
from utils.scores import interpolate

CFG = Path(__file__).resolve().parent / "fixtures/tiny.cfg"
SIDE = 1000  # pixels of the pictures that the reference cases leave out
VOC, VOC07 = PROTOCOLS["voc"], PROTOCOLS["voc07"]


def read_case(truth_folder: Path, found_folder: Path, *, corners: bool) -> tuple[Labelled, list[dict[str, Any]], tuple]:
    """Read `class x y w h` or, with `corners`, `class x1 y1 x2 y2` files; detections have a score after the class.

    Both count pixels inclusively: the last pixel belongs to the box, so that in lengths it is one wider.
    """
    files = sorted(truth_folder.glob("*.txt"))
    lines = [[line.split() for line in file.read_text().splitlines()] for file in files]
    names = tuple(sorted({words[0] for rows in lines for words in rows}))
    images = [[(names.index(words[0]), *box_of(words[1:], corners)) for words in rows] for rows in lines]
    results = [
        found(image, names.index(words[0]), box_of(words[2:], corners), float(words[1]))
        for image, file in enumerate(files)
        for words in map(str.split, (found_folder / file.name).read_text().splitlines())
        if words[0] in names
    ]
    return truths(*images, size=(SIDE, SIDE)), results, names


def box_of(words: list[str], corners: bool) -> tuple[float, ...]:
    x, y, w, h = map(float, words)
    return (x, y, w - x + 1, h - y + 1) if corners else (x, y, w + 1, h + 1)


def test_the_reference_case_of_object_detection_metrics(shared_data: Path) -> None:
    folder = shared_data / "eval/rafaelpadilla"
    expected = json.loads((folder.parent / "rafaelpadilla_expected.json").read_text())
    labelled, results, names = read_case(folder / "groundtruths", folder / "detections", corners=False)
    assert (sum(map(len, labelled.labels)), len(results), names) == (15, 24, ("person",))
    at_30 = np.array([expected["iou"]])
    every_point = rank(results, labelled, 1, VOC, ious=at_30)[1]
    assert every_point.item() == pytest.approx(expected["AP_every_point"], abs=1e-6)
    assert rank(results, labelled, 1, VOC07, ious=at_30)[1].item() == pytest.approx(expected["AP_11point"], abs=1e-6)


def test_the_reference_case_of_cartucho_map(shared_data: Path) -> None:
    folder = shared_data / "eval/cartucho-map"
    text = (folder / "expected_output_voc_iou0.5.txt").read_text()
    percents = {name: float(percent) for percent, name in re.findall(r"^([\d.]+)% = (\S+) AP", text, re.MULTILINE)}
    hits = {
        name: (int(tp), int(fp))
        for name, tp, fp in re.findall(r"^(\S+): \d+ \(tp:(\d+), fp:(\d+)\)", text, re.MULTILINE)
    }
    labelled, results, names = read_case(
        folder / "input/ground-truth", folder / "input/detection-results", corners=True
    )
    assert len(labelled.paths) == 85
    assert set(names) == percents.keys()
    evaluation = judge(results, labelled, names, max_det=100, protocol=VOC)
    assert 100 * evaluation.map50 == pytest.approx(31.05, abs=0.005)
    for name, score in evaluation.per_class.items():
        assert 100 * score.ap50 == pytest.approx(percents[name], abs=0.005), name
    for name, kind in zip(names, rank(results, labelled, len(names), VOC)[0], strict=True):
        tp = int(kind.is_hit.sum())
        assert (tp, len(kind.is_hit) - tp) == hits.get(name, (0, 0)), name


@pytest.mark.parametrize("name", PROTOCOLS)
def test_perfect_detections_get_full_marks(name: str) -> None:
    evaluation = judge(PERFECT, TWO_IMAGES, NAMES, max_det=100, protocol=PROTOCOLS[name])
    assert tuple(evaluation.means().values()) == pytest.approx((1, 1, 1, 1, 1))


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize(
    ("images", "results"), [([], []), ([], [found(0, 0, (1, 1, 9, 9), 0.9)]), ([(0, 1, 1, 9, 9)], [])]
)
def test_nothing_gets_nothing(name: str, images: list, results: list) -> None:
    evaluation = judge(results, truths(images), NAMES, max_det=100, protocol=PROTOCOLS[name])
    assert tuple(evaluation.means().values()) == (0, 0, 0, 0, 0)


def test_a_truth_that_is_taken_does_not_pass_a_detection_on() -> None:
    """Two cats side by side; the second detection overlaps the first cat most, but also the other."""
    labelled = truths([(0, 0, 0, 40, 40), (0, 10, 0, 40, 40)])
    results = [found(0, 0, (0, 0, 40, 40), 0.9), found(0, 0, (3, 0, 40, 40), 0.8)]
    assert judge(results, labelled, ("cat",), max_det=100).map50 == pytest.approx(1)
    for name in ("voc", "darknet"):
        assert judge(results, labelled, ("cat",), max_det=100, protocol=PROTOCOLS[name]).map50 == pytest.approx(0.5)
    assert judge(results, labelled, ("cat",), max_det=100, protocol=VOC07).map50 == pytest.approx(6 / 11)


def test_an_overlap_of_just_the_threshold_is_a_hit_but_in_darknet() -> None:
    labelled = truths([(0, 0, 0, 64, 64)], size=(128, 128))
    results = [found(0, 0, (0, 0, 32, 64), 0.9)]  # IoU .5 exactly
    figures = {
        name: judge(results, labelled, ("cat",), max_det=9, protocol=each).map50 for name, each in PROTOCOLS.items()
    }
    assert figures == pytest.approx({"coco": 1, "voc": 1, "voc07": 1, "darknet": 0})


def test_darknet_divides_by_all_classes_and_pools_its_rates_at_a_quarter() -> None:
    """Cats: hits at .9 and .3, a miss at .8; a hit at .2 is below Darknet's confidence. No owl is there."""
    labelled = truths([(0, 10, 10, 20, 20), (0, 50, 10, 20, 20), (0, 90, 10, 20, 20), (1, 130, 10, 20, 20)])
    results = [
        found(0, 0, (10, 10, 20, 20), 0.9),
        found(0, 0, (10, 60, 20, 20), 0.8),
        found(0, 0, (50, 10, 20, 20), 0.3),
        found(0, 0, (90, 10, 20, 20), 0.2),
        found(0, 1, (130, 10, 20, 20), 0.5),
        found(0, 2, (130, 60, 20, 20), 0.6),
    ]
    evaluation = judge(results, labelled, NAMES, max_det=100, protocol=DARKNET)
    cats = (1 + 3 / 4 + 3 / 4) / 3
    assert evaluation.map50 == pytest.approx((cats + 1 + 0) / 3)
    assert judge(results, labelled, NAMES, max_det=100, protocol=VOC).map50 == pytest.approx((cats + 1) / 2)
    assert (evaluation.confidence, evaluation.precision, evaluation.recall) == pytest.approx((0.25, 3 / 5, 3 / 4))
    assert evaluation.f1 == pytest.approx(2 * 3 / (5 + 4))
    at_11 = judge(results, labelled, NAMES, max_det=100, protocol=replace(DARKNET, points=11)).per_class["cat"]
    assert at_11.ap50 == pytest.approx((4 * 1 + 7 * 3 / 4) / 11)  # recalls 0, .1, .2, .3, and .4 to 1


def test_truths_past_the_picture_are_clipped_but_in_darknet() -> None:
    labelled = truths([(0, -40, 0, 80, 40)])
    results = [found(0, 0, (0, 0, 40, 40), 0.9)]
    assert judge(results, labelled, ("cat",), max_det=9, protocol=VOC).map50_95 == pytest.approx(1)
    assert judge(results, labelled, ("cat",), max_det=9, protocol=DARKNET).map50 == 0


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_what_counting_rank_by_rank_gives(seed: int) -> None:
    """Darknet's own way: walk down the ranks, take the truth if it is free, add slices from the last rank up."""
    labelled, results = random_case(seed)
    ranked, average_precision = rank(results, labelled, len(NAMES), DARKNET)
    for kind, ours in zip(ranked, average_precision[0], strict=True):
        hits, precision, recall = 0, [], []
        for number, is_hit in enumerate(kind.is_hit, start=1):
            hits += int(is_hit)
            precision.append(hits / number)
            recall.append(hits / max(kind.truths, 1))
        area, best, last = 0.0, precision[-1], recall[-1]
        for p, r in zip(reversed(precision[:-1]), reversed(recall[:-1]), strict=True):
            area += (last - r) * (best := max(best, p))
            last = r
        assert ours == pytest.approx(area + last * best)
    assert average_precision.shape == (len(IOUS), len(NAMES))


def test_the_curve_steps_down_where_recall_ends() -> None:
    assert interpolate(np.array([1, 1, 2]), 4, np.array([0, 0.25, 0.26, 0.5, 0.51])) == pytest.approx(
        [1, 1, 2 / 3, 2 / 3, 0]
    )


def test_the_command_takes_a_protocol_with_its_thresholds(command, scenes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "net.weights"
    save_weights(Darknet(load_cfg(CFG)), weights)
    model = ("--cfg", CFG, "--weights", weights, "--data", scenes, "--device", "cpu", "--workers", 0)
    outcome = command("test", *model, "--protocol", "darknet", "--points", 11, "--json", "result.json")
    assert outcome.status == 0, outcome.err
    assert "darknet's protocol: confidence 0.005, NMS 0.45" in outcome.out
    figures = json.loads((tmp_path / "result.json").read_text())
    assert (figures["protocol"], figures["iou_thres"], figures["confidence"]) == ("darknet", 0.45, 0.25)
    outcome = command("test", *model, "--protocol", "darknet", "--conf-thres", 0.01, "--iou-thres", 0.5)
    assert "darknet's protocol: confidence 0.01, NMS 0.5" in outcome.out
    outcome = command("test", *model, "--points", 11)
    assert outcome.status == 2
    assert "--points needs --protocol darknet" in outcome.err


def test_a_detection_of_a_difficult_object_counts_neither_way() -> None:
    labelled = truths([(0, 10, 10, 20, 20)], size=(100, 100))
    difficult = np.array([[0, 0.7, 0.7, 0.2, 0.2, 1]])  # 60..80 on both axes
    results = [found(0, 0, (60, 60, 20, 20), 0.9), found(0, 0, (10, 10, 20, 20), 0.8), found(0, 0, (40, 5, 9, 9), 0.7)]
    ranked, average_precision = rank(results, replace(labelled, ignored=[difficult]), 1, VOC)
    assert (ranked[0].truths, ranked[0].scores.tolist()) == (1, [0.8, 0.7])
    assert average_precision[0, 0] == 1
    assert rank(results, labelled, 1, VOC)[1][0, 0] == 0.5
