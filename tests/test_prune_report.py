"""The report of a pruning: its rows by hand, the texts in full, and that every picture is drawn."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import Darknet, load_cfg, save_weights
from tests.networks import ROOT, seeded
from tests.test_evaluate import NAMES, PERFECT, TWO_IMAGES
from utils.evaluate import judge
from utils.lint import bflops
from utils.prune import cut, find_groups
from utils.prune_report import LayerRow, NetworkRow, Pruning, layer_rows, network_row, summary_table, write_report
from utils.residual_blocks import choose_blocks, find_blocks, remove_blocks
from utils.timing import Timing

DEMO = ROOT / "cfg/demo.cfg"
BEFORE = NetworkRow("original", 2_000_000, 4.0, 8_000_020, 30.0, 1.5, 0.8, 0.5)
MASKED = replace(BEFORE, network="masked", ms=None, spread_ms=None, map50=0.6, map50_95=0.4)
AFTER = NetworkRow("pruned", 500_000, 1.0, 2_000_020, 12.0, 0.7, 0.75, 0.45)
PRUNING = Pruning(
    command="python normal_prune.py --percent 0.6",
    cfg="cfg/x.cfg",
    weights="x.pt",
    strategy="slim",
    criterion="gamma",
    percent=0.6,
    free_groups=200,
    cut_groups=120,
    removed_blocks=1,
    size=(416, 320),
    layers=(
        LayerRow(0, "convolutional", 7, 16, 16),
        LayerRow(1, "convolutional", 15, 64, 8),
        LayerRow(2, "conv", 9, 32, 0),
    ),
    networks=(BEFORE, MASKED, AFTER),
    error_float64=1.5e-15,
    error_float32=2e-7,
)


def test_rows_of_layers() -> None:
    """Every group but the first two of each layer is asked to go; widths are those of the compact network's cfg."""
    model = seeded(DEMO)
    groups = find_groups(model)
    keep = ~groups.is_free
    for line in groups.lines:
        keep[groups.group[line[:2]]] = True
    compact = cut(model, groups, keep, path="pruned.cfg")
    rows = layer_rows(model, compact)
    written = [s.int("filters", 0) for s in compact.cfg.sections[1:] if s.name == "convolutional"]
    assert [row.after for row in rows] == written
    assert rows[0] == LayerRow(0, "convolutional", load_cfg(DEMO).sections[1].line, model.layers[0].channels, 2)
    heads = [row for row in rows if row.index + 1 in {spec.layer for spec in model.heads}]
    assert len(heads) == 2
    assert all(row.after == row.before for row in heads)


def test_layers_of_removed_blocks_have_no_channels_left() -> None:
    model = seeded(DEMO)
    blocks = choose_blocks(model, 2)
    rows = layer_rows(model, remove_blocks(model, blocks, path="pruned.cfg"), blocks)
    gone = {index for block in find_blocks(model) if block in blocks for index in range(block.first, block.last)}
    assert {row.index for row in rows if row.after == 0} == gone
    assert all(row.after == row.before for row in rows if row.index not in gone)
    with pytest.raises(AssertionError, match="made of another one"):
        layer_rows(model, remove_blocks(model, blocks, path="pruned.cfg"))


def test_rows_of_networks(tmp_path: Path) -> None:
    model = seeded(DEMO)
    save_weights(model, tmp_path / "demo.weights")
    row = network_row("original", model, (64, 96))
    assert row.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert row.weights_bytes == (tmp_path / "demo.weights").stat().st_size
    assert (row.ms, row.spread_ms, row.map50, row.map50_95) == (None,) * 4
    evaluation = judge(PERFECT, TWO_IMAGES, NAMES, max_det=100)
    row = network_row("original", model, (64, 96), timing=Timing(3.0, 0.5), evaluation=evaluation)
    assert (row.ms, row.spread_ms, row.map50, row.map50_95) == (3.0, 0.5, evaluation.map50, evaluation.map50_95)
    assert row.map50 > 0.9


def test_operations_of_any_size() -> None:
    cfg = load_cfg(DEMO)
    cfg.sections[0].set("height", 64)
    cfg.sections[0].set("width", 96)
    expected = sum(layer.flops for layer in Darknet(cfg).layers) / 1e9
    assert bflops(Darknet(load_cfg(DEMO)), (64, 96)) == expected > 0
    assert bflops(Darknet(load_cfg(DEMO)), (64, 97)) is None


def test_the_table_for_the_terminal() -> None:
    assert summary_table(PRUNING).splitlines() == [
        "                original     masked      pruned              change",
        "parameters     2,000,000  2,000,000     500,000              -75.0%",
        "BFLOPs             4.000      4.000       1.000              -75.0%",
        ".weights, MB        8.00       8.00        2.00              -75.0%",
        "latency, ms   30.0 ± 1.5          -  12.0 ± 0.7  2.50 times as fast",
        "mAP@.5             0.800      0.600       0.750              -0.050",
        "mAP@.5:.95         0.500      0.400       0.450              -0.050",
    ]


def test_what_was_not_measured_has_no_row() -> None:
    bare = [replace(row, ms=None, spread_ms=None, map50=None, map50_95=None) for row in (BEFORE, AFTER)]
    lines = summary_table(replace(PRUNING, networks=tuple(bare))).splitlines()
    assert [line.split()[0] for line in lines] == ["original", "parameters", "BFLOPs", ".weights,"]


def test_all_of_it_is_written(tmp_path: Path) -> None:
    pruning = replace(PRUNING, compensation_error=0.02)
    write_report(pruning, tmp_path)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert f"PyTorch {torch.__version__}" in figures.pop("machine")
    assert figures == json.loads(json.dumps(asdict(pruning)))
    text = (tmp_path / "report.md").read_text()
    for line in (
        "| parameters | 2,000,000 | 2,000,000 | 500,000 | -75.0% |",
        "| latency, ms | 30.0 ± 1.5 | - | 12.0 ± 0.7 | 2.50 times as fast |",
        "| 1 | convolutional | 15 | 64 | 8 | 12% |",
        "| 2 | conv | 9 | 32 | 0 | 0% |",
        "- 120 of 200 free groups of channels cut (60.0%)",
        "- 1 residual block removed",
        "- relative error of compensation: 2.0e-02",
    ):
        assert line in text.splitlines()
    assert "1.5e-15 in float64, 2.0e-07 in float32" in text
    assert "BFLOPs and latency at 320x416" in text


MANY = tuple(LayerRow(index, "convolutional", index, 8 << index % 8, 1 + index % 8) for index in range(160))
CASES = {
    "three layers": PRUNING,
    "thirty": replace(PRUNING, layers=MANY[:30]),
    "many": replace(PRUNING, layers=MANY, networks=(BEFORE, MASKED, replace(AFTER, network="compensated"), AFTER)),
    "one layer, nothing cut": replace(PRUNING, layers=MANY[:1], networks=(BEFORE, replace(BEFORE, network="pruned"))),
    "mAP is zero": replace(PRUNING, networks=(replace(BEFORE, map50=0.0), AFTER)),
    "nothing measured": replace(PRUNING, networks=tuple(replace(r, bflops=None, ms=None) for r in (BEFORE, AFTER))),
    "a name for matplotlib": replace(PRUNING, cfg="a$b$.cfg"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_picture_is_drawn(case: str, tmp_path: Path) -> None:
    write_report(CASES[case], tmp_path)
    picture = cv2.imread(str(tmp_path / "report.png"))
    assert picture.shape == (1050, 1500, 3)
    assert picture.std() > 10


def test_a_layer_that_lost_half_shows_half(tmp_path: Path) -> None:
    """In the panel of shares the grey above a bar grows with what was cut."""
    greys = []
    for after in (64, 32, 0):
        layers = tuple(LayerRow(index, "convolutional", 1, 64, after) for index in range(4))
        write_report(replace(PRUNING, layers=layers), tmp_path)
        picture = cv2.imread(str(tmp_path / "report.png"))[470:650]  # the middle panel
        greys.append(np.all(picture == 0xD9, axis=2).mean())
    assert greys[0] < 0.02
    assert greys[1] == pytest.approx(greys[2] / 2, rel=0.15)
    assert greys[2] > 0.5
