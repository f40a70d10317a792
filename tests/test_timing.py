"""Timings in turn: the order of calls, the figures by hand, and what of a network is timed."""

import time

import pytest
import torch

from models import Darknet, load_cfg
from tests.networks import ROOT
from utils.timing import Timing, paired_ms, summarise, time_in_turn


def test_calls_take_turns() -> None:
    said: list[str] = []
    spent = time_in_turn([lambda: said.append("a"), lambda: (said.append("b"), time.sleep(0.005))], rounds=4)
    assert said == ["a", "b"] * 5  # one round to warm up
    assert [len(times) for times in spent] == [4, 4]
    assert min(spent[1]) >= 5 > min(spent[0])


def test_median_and_quartile_spread() -> None:
    assert summarise([5, 1, 2, 100, 3]) == Timing(3, 3)


def test_networks_are_timed_fused_on_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = Darknet.forward
    monkeypatch.setattr(Darknet, "forward", lambda model, x: (seen.append((model.is_fused, x)), forward(model, x))[1])
    models = [Darknet(load_cfg(ROOT / "cfg/demo.cfg")) for _ in range(2)]
    timings = paired_ms(models, (64, 96), 3)
    assert all(timing.ms > 0 for timing in timings)
    assert len(timings) == 2
    assert len(seen) == 2 * 4
    for is_fused, x in seen:
        assert is_fused
        assert x.shape == (1, 3, 64, 96)
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert not any(model.is_fused for model in models)
