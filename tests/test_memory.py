"""--batch-size auto: what fits into a GPU's memory; and memory of the CPU that is used again."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.memory import fitting_batch

MB = 1_000_000
ROOT = Path(__file__).resolve().parent.parent
CFG = ROOT / "tests/fixtures/tiny.cfg"
FAULTS = """
import resource, torch
from utils.device import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

lost = faults(10)
keep_freed_memory()
faults(20)
print(lost, faults(10))
"""


@pytest.mark.parametrize(
    ("peaks", "budget", "expected"),
    [
        ({1: 110, 2: 120, 4: 140}, 200, 8),  # 100 and 10 an image: 10, rounded down
        ({1: 110, 2: 120, 4: 140, 8: 180}, 340, 24),
        ({1: 110, 2: 120}, 155, 5),
        ({1: 110}, 130, 1),
        ({1: 110}, 100, 0),
        ({}, 100, 0),
        ({1: 1, 2: 1, 4: 1}, 10**9, 1024),
        ({1: 110, 2: 120, 4: 400}, 150, 5),
    ],
)
def test_the_line_through_what_was_measured(peaks: dict[int, int], budget: int, expected: int) -> None:
    assert fitting_batch({count: peak * MB for count, peak in peaks.items()}, budget * MB) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_measured(command, scenes):
    flags = ("--cfg", CFG, "--data", scenes, "--epochs", 1, "--batch-size", "auto", "--workers", 0)
    outcome = command("train", *flags)
    assert outcome.status == 0, outcome.err
    assert "--batch-size auto:" in outcome.out


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this system's C library has no mallopt")
def test_memory_that_was_freed_is_used_again() -> None:
    outcome = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    lost, kept = map(int, outcome.stdout.split())
    assert kept < lost / 10


def test_memory_that_does_not_suffice_has_its_line(command) -> None:
    outcome = command("utils/benchmark", CFG, "--batch-size", 10**9, "--img-size", 960, "--backends", "eager")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("memory does not suffice: ")
    assert outcome.err.splitlines()[-1].endswith("(smaller --batch-size or --img-size)")
