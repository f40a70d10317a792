"""Anchors by k-means: they find known clusters, fit better than a start, and are defined for few boxes and for none."""

import logging

import numpy as np
import pytest

from utils.anchors import anchor_fit, box_sizes, fit_anchors
from utils.labels import Labelled
from utils.log import DataError

CENTRES = np.array([[8, 8], [30, 12], [14, 40], [60, 60], [120, 50], [200, 180]], float)


def boxes(count: int, spread: float, seed: int = 0) -> np.ndarray:
    """Draw boxes [count, 2] around the centres."""
    generator = np.random.default_rng(seed)
    return CENTRES[generator.integers(len(CENTRES), size=count)] * np.exp(spread * generator.normal(size=(count, 2)))


def test_clusters_are_found() -> None:
    anchors = fit_anchors(boxes(3000, 0.03), len(CENTRES), ratio=4)
    assert anchors == pytest.approx(CENTRES[np.argsort(CENTRES.prod(1))], rel=0.05)


def test_anchors_are_sorted_by_area_and_the_same_every_time() -> None:
    sizes = boxes(30_000, 0.4)
    anchors = fit_anchors(sizes, 9, ratio=4)
    assert anchors.shape == (9, 2)
    assert (np.diff(anchors.prod(1)) > 0).all()
    assert np.array_equal(anchors, fit_anchors(sizes, 9, ratio=4))
    assert not np.array_equal(anchors, fit_anchors(sizes, 9, ratio=4, seed=1))


def test_search_beats_anchors_drawn_among_the_boxes() -> None:
    sizes = boxes(20_000, 0.5)
    found = anchor_fit(sizes, fit_anchors(sizes, 9, ratio=4), ratio=4)
    for seed in range(20):
        drawn = anchor_fit(sizes, np.random.default_rng(seed).choice(sizes, 9, replace=False), ratio=4)
        assert found.iou > drawn.iou + 0.01
        assert found.recall >= drawn.recall - 0.005


def test_fit_of_known_boxes() -> None:
    sizes, anchors = np.array([[10, 10], [20, 10], [80, 10], [4, 40]]), np.array([[10, 10], [20, 20.0]])
    # best IoUs: 1, 1/2 with both, 200/1000 and 40/220; 80 is four times 20 and 40 four times 10, which is not less
    fit = anchor_fit(sizes, anchors, ratio=4)
    assert fit.iou == pytest.approx((1 + 1 / 2 + 1 / 5 + 40 / 220) / 4)
    assert fit.recall == 0.5
    assert anchor_fit(sizes, anchors, ratio=4.1).recall == 1


@pytest.mark.parametrize("sizes", [[[7, 5]], [[7, 5]] * 40, [[7, 5], [30, 20], [30, 20]]])
def test_fewer_sizes_than_anchors_give_distinct_ones_and_a_line(sizes: list, caplog) -> None:
    caplog.set_level(logging.INFO, "darkslim")
    anchors = fit_anchors(np.array(sizes), 6, ratio=4)
    assert len(np.unique(anchors.round(), axis=0)) == 6
    assert (np.diff(anchors.prod(1)) > 0).all()
    assert [7, 5] in anchors.tolist()
    assert f"the boxes have {len(np.unique(sizes, axis=0))} sizes, fewer than 6 anchors" in caplog.text


def test_as_many_sizes_as_anchors_are_the_anchors(caplog) -> None:
    caplog.set_level(logging.INFO, "darkslim")
    assert fit_anchors(CENTRES[::-1], 6, ratio=4) == pytest.approx(CENTRES[np.argsort(CENTRES.prod(1))])
    assert not caplog.text


def test_a_rare_size_among_many_equal_ones() -> None:
    sizes = np.array([[10, 10]] * 50_000 + [[30, 30], [50, 20], [90, 90]])
    anchors = fit_anchors(sizes, 3, ratio=4)
    assert len(np.unique(anchors, axis=0)) == 3


def test_no_boxes_are_an_error() -> None:
    with pytest.raises(DataError, match="there are no boxes to fit them to"):
        fit_anchors(np.zeros((0, 2)), 6, ratio=4)


def test_sizes_are_those_of_the_letterboxed_input() -> None:
    rows = [np.array([[0, 0.5, 0.5, 0.5, 0.25], [1, 0.5, 0.5, 0.1, 1]]), np.zeros((0, 5)), np.array([[0, 0, 0, 1, 1]])]
    labelled = Labelled(["a", "b", "c"], np.array([[100, 200], [50, 50], [80, 40]]), rows)
    # (height, width) 100×200 scales to 50×100, 80×40 to 96×48
    assert box_sizes(labelled, (96, 100)) == pytest.approx(np.array([[50, 12.5], [10, 50], [48, 96]]))
    assert box_sizes(Labelled(["b"], np.array([[50, 50]]), [np.zeros((0, 5))]), (96, 96)).shape == (0, 2)
