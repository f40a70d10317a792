"""How long parsing and building may take, and how much memory a forward pass, in time of this process's processor."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import ROOT, SHIPPED

from benchmarks.memory import LiveBytes
from models import CfgError, Darknet, load_cfg, parse


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Give the shortest of some runs."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken)


def build(path: Path) -> None:
    with torch.device("meta"):
        Darknet(load_cfg(path))


def test_ten_thousand_lines_parse_in_a_fifth_of_a_second() -> None:
    lines = (ROOT / "cfg/yolov3.cfg").read_text().splitlines(keepends=True)
    text = "".join((lines * 20)[:10_000])
    assert seconds(lambda: parse(text), 5) < 0.2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_cfgs_build_within_two_seconds(path: Path) -> None:
    assert seconds(lambda: build(path), 1) < 2


@pytest.mark.slow
def test_official_cfgs_build_within_two_seconds(shared_data: Path) -> None:
    paths = sorted(shared_data.glob("darknet/**/*.cfg"))
    assert len(paths) > 80
    for path in paths:
        start = time.process_time()
        try:
            build(path)
        except CfgError:
            continue
        assert time.process_time() - start < 2, path


def test_a_forward_pass_frees_what_no_later_layer_reads() -> None:
    convolution = "[convolutional]\nfilters=8\nsize=3\npad=1\n"
    head = "[convolutional]\nfilters=6\n[yolo]\nclasses=1\nanchors=8,8\n"
    with torch.device("meta"), torch.inference_mode():
        model = Darknet(parse(f"[net]\nheight=32\nwidth=32\n{convolution * 20}{head}"))
        x = torch.empty(1, 3, 32, 32)
        with LiveBytes() as counter:
            model(x)
    one = 8 * 32 * 32 * 4
    # a layer's input, its convolution and its activation: three maps at most, whatever the depth
    assert 2 * one <= counter.peak <= 3 * one
