"""Sensitivity: which layers make a set, what is cut of each, that an interruption keeps what is known, the picture."""

import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from models import Darknet, parse
from tests.networks import ROOT, seeded
from utils import sensitivity
from utils.importance import gamma
from utils.log import DataError
from utils.prune import Masked, find_groups
from utils.sensitivity import RATIOS, Row, draw_sensitivity, layer_sets, measure_sensitivity, write_sensitivity

CONV = "[convolutional]\nbatch_normalize=1\nfilters={}\nsize=3\npad=1\nactivation=leaky\n"
DEPTHWISE = "[convolutional]\nbatch_normalize=1\nfilters=8\ngroups=8\nsize=3\npad=1\nactivation=leaky\n"
HEAD = "[convolutional]\nfilters=18\nactivation=linear\n[yolo]\nanchors=9,9, 20,20, 30,30\nmask=0,1,2\nclasses=1\n"
# 0 and 4 are summed, 1 feeds 2 alone, 3 is the depthwise convolution of 2; 6 is the head's.
TEXT = f"[net]\nwidth=32\nheight=32\n{CONV.format(4)}{CONV.format(16)}{CONV.format(8)}{DEPTHWISE}{CONV.format(4)}"
TEXT += f"[shortcut]\nfrom=0\nactivation=linear\n{HEAD}"


def built() -> Darknet:
    """Build the network with γ = 1, 2, 3, … in every layer."""
    torch.manual_seed(0)
    model = Darknet(parse(TEXT)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = torch.arange(1.0, len(module.weight) + 1)
    return model


def cuts(model: Darknet) -> dict[int, list[int]]:
    """Give the channels that are masked, of every layer with a width of its own."""
    return {
        index: np.flatnonzero(block.keep.flatten() == 0).tolist()
        for index, block in enumerate(model.blocks)
        if isinstance(block, Masked) and model.layers[index].sets_channels
    }


def test_what_shares_groups_is_a_set() -> None:
    model = built()
    assert layer_sets(model, find_groups(model)) == [(0, 4), (1,), (2, 3)]


@pytest.mark.parametrize("stem", ["ghostnet-yolov3", "slim-m", "yolov3-tiny"])
def test_sets_share_nothing_and_leave_out_no_layer(stem: str) -> None:
    model = seeded(ROOT / f"cfg/{stem}.cfg")
    groups = find_groups(model)
    sets = layer_sets(model, groups)
    assert len(sets) > 5
    owners: dict[int, set[tuple[int, ...]]] = {}
    for index, layer in enumerate(model.layers):
        members = groups.group[groups.lines[index]]
        free = members[groups.is_free[members]].tolist()
        (mine,) = [each for each in sets if index in each] if free and layer.sets_channels else [()]
        for group in free if mine else ():
            owners.setdefault(group, set()).add(mine)
    assert {len(each) for each in owners.values()} == {1}


def test_one_set_at_a_time_loses_its_least_important_groups() -> None:
    model, judged = built(), []
    groups = find_groups(model)

    def judge(network: Darknet) -> float:
        judged.append(cuts(network))
        return 0.8 - 0.01 * sum(map(len, judged[-1].values()))

    rows = list(measure_sensitivity(model, groups, gamma(model, groups), judge, (0.1, 0.5, 0.9)))
    assert [(row.layers, row.groups, row.ratio, row.cut) for row in rows] == [
        ((0, 4), 4, 0.1, 0),
        ((0, 4), 4, 0.5, 2),
        ((0, 4), 4, 0.9, 3),  # of 3.6, as every layer keeps one
        ((1,), 16, 0.1, 2),
        ((1,), 16, 0.5, 8),
        ((1,), 16, 0.9, 14),
        ((2, 3), 8, 0.1, 1),
        ((2, 3), 8, 0.5, 4),
        ((2, 3), 8, 0.9, 7),
    ]
    assert judged[:3] == [{}, {0: [0, 1], 4: [0, 1]}, {0: [0, 1, 2], 4: [0, 1, 2]}]
    assert judged[-1] == {2: list(range(7)), 3: list(range(7))}
    assert len(judged) == 9  # the network as it is, and every cut that takes something away
    assert [round(100 * row.drop) for row in rows] == [0, 4, 6, 2, 8, 14, 2, 8, 14]
    assert all(row.map50 == pytest.approx(0.8 - row.drop) for row in rows)


def test_the_same_cut_is_judged_once() -> None:
    model, judged = built(), []
    groups = find_groups(model)
    judge = lambda network: judged.append(network) or 0.5  # noqa: E731
    rows = list(measure_sensitivity(model, groups, gamma(model, groups), judge, (0.45, 0.5, 0.55)))
    assert [row.cut for row in rows[:3]] == [2, 2, 2]
    assert len(judged) == 1 + 1 + 3 + 1  # of 4, 16 and 8 groups


def test_channels_that_do_nothing_cost_nothing() -> None:
    """Half of the channels of layer 1 have γ = β = 0: without them the outputs are the same, without one more not."""
    model = built()
    for tensor in (model.layers[1].module.bn.weight, model.layers[1].module.bn.bias):
        tensor.data[:8] = 0
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    groups = find_groups(model)
    truth = model(x)[0].detach()

    @torch.inference_mode()
    def judge(network: Darknet) -> float:
        return 1 - float((network(x)[0] - truth).norm() / truth.norm())

    rows = [row for row in measure_sensitivity(model, groups, gamma(model, groups), judge) if row.layers == (1,)]
    assert [row.ratio for row in rows] == list(RATIOS)
    assert abs(rows[0].drop) < 1e-6 > abs(rows[1].drop)
    assert 0.01 < rows[2].drop < rows[3].drop


def test_nothing_to_cut_is_told() -> None:
    model = built()
    groups = find_groups(model)
    with pytest.raises(DataError, match=r"^<string>: no channel may go, so there is nothing to measure$"):
        list(measure_sensitivity(model, groups, np.full(len(groups.is_free), np.nan), lambda network: 0.5))


def test_an_interruption_keeps_what_is_known(tmp_path: Path) -> None:
    model = built()
    groups = find_groups(model)
    left = iter([0.8, 0.7, 0.6])

    def judge(network: Darknet) -> float:
        for value in left:
            return value
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sensitivity(measure_sensitivity(model, groups, gamma(model, groups), judge), tmp_path)
    rows = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [(row["layers"], row["ratio"], row["map50"]) for row in rows] == [([0, 4], 0.25, 0.7), ([0, 4], 0.5, 0.6)]
    assert cv2.imread(str(tmp_path / "sensitivity.png")).std() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sensitivity.json", "sensitivity.png"]


def made(sets: int, before: float = 0.8) -> list[Row]:
    return [
        Row((7 * index, 7 * index + 3), 64, ratio, round(64 * ratio), before - drop, drop)
        for index in range(sets)
        for ratio, drop in zip(RATIOS, (0.001 * index, 0.01, 0.1, 0.3), strict=True)
    ]


def test_all_rows_are_written(tmp_path: Path) -> None:
    rows = made(3)
    assert write_sensitivity(rows, tmp_path) == rows
    written = json.loads((tmp_path / "sensitivity.json").read_text())
    assert written == [asdict(row) | {"layers": list(row.layers)} for row in rows]
    assert write_sensitivity([], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "rows",
    [made(1)[:1], made(60), made(200)[:-3], made(5, before=0.3), [Row((3,), 8, 0.5, 4, 0.0, 0.0)]],
    ids=["one", "sixty", "many, interrupted", "poor", "blind"],
)
def test_every_picture_is_drawn(rows: list[Row], tmp_path: Path) -> None:
    draw_sensitivity(rows, tmp_path / "sensitivity.png")
    picture = cv2.imread(str(tmp_path / "sensitivity.png"))
    assert picture.shape == (900, 1500, 3)
    assert picture.std() > 5


def test_what_gains_by_a_cut_is_inside_the_chart() -> None:
    axes = Figure().subplots()
    sensitivity._draw_curves(axes, np.array([[-0.1], [0.2]]), [(0,)], (0.25, 0.5), 0.8)
    assert axes.get_ylim()[1] > 0.9
