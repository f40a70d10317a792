"""The benchmark of training compares like with like: torchvision's mosaic is ours, and the timed loops train."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.training import (
    RATIO,
    TorchvisionPictures,
    loader_rows,
    our_epoch,
    plain_epoch,
    random_batch,
    step_rows,
)
from utils.augment import mosaic
from utils.datasets import Key, Pictures
from utils.labels import Labelled, check_labels
from utils.lists import load_data
from utils.recipe import Recipe

SIZE = (96, 96)
CFG = "cfg/yolov3-tiny-hand.cfg"


class Middle:
    """A generator that puts a mosaic's centre into the middle of its canvas."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2


@pytest.fixture(scope="module")
def labelled(scenes) -> Labelled:
    data = load_data(scenes)
    return check_labels(data.train, len(data.names))


@pytest.mark.parametrize("is_pil", [True, False])
def test_torchvision_gives_the_pictures_and_boxes_of_our_mosaic(labelled, monkeypatch, is_pil):
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 0.5))
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.arange(1, 4))
    still = Recipe(scale=0, translate=0, hue=0, saturation=0, value=0, flip_lr=0)
    item = TorchvisionPictures(labelled, still, SIZE, is_pil)[Key(0, 0, SIZE, True)]

    ours = Pictures(labelled, recipe=still)
    canvas, classes, boxes = mosaic([ours._load(index, SIZE) for index in range(4)], SIZE, Middle())
    window = canvas[48:144, 48:144]
    boxes = (boxes - 48).clip(0, 96)
    keep = (boxes[:, 2:] - boxes[:, :2]).min(1) >= 2
    assert np.abs(item.picture.permute(1, 2, 0).numpy().astype(int) - window).max() <= 1
    assert item.targets[:, 0].tolist() == classes[keep].tolist()
    half = item.targets[:, 3:] / 2
    found = torch.cat((item.targets[:, 1:3] - half, item.targets[:, 1:3] + half), dim=1) * 96
    np.testing.assert_allclose(found.numpy(), boxes[keep], atol=1e-3)


def test_both_loops_lower_the_loss(monkeypatch):
    batches = [random_batch(2, 64, boxes=3)] * 4
    epoch = our_epoch(CFG, torch.float32)
    losses = [epoch(batches)["loss"] for _ in range(3)]
    assert all(later < earlier for earlier, later in pairwise(losses))

    seen = []
    real = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (seen.append(loss.item()), real(loss)))
    plain_epoch(CFG)(batches * 3)
    assert seen[-1] < seen[0]


def test_the_first_row_is_the_measure_of_the_others(labelled):
    for rows in (loader_rows(labelled, 64, 0, rounds=1), step_rows(CFG, 64, 1, rounds=1)):
        timed = [row for row in rows if RATIO in row]
        assert timed[0][RATIO] == 1
        assert timed[0]["what"].startswith("Darkslim")
        assert len(timed) >= 2
        for row in timed:
            assert row["images_per_s"] * row[RATIO] == pytest.approx(timed[0]["images_per_s"])
