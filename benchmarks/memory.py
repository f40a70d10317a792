"""Peak memory of a forward pass that frees what no later layer reads, against one that keeps every layer's output.

    OMP_NUM_THREADS=1 python -m benchmarks.memory

Counts the bytes of all tensors that are alive at once on the meta device, where nothing is computed, and for YOLOv4
measures the growth of the process's peak as well. Writes benchmarks/memory.md and .json; takes half a minute. Needs the
official cfgs ($DARKSLIM_DATA).
"""

import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.real_data import real_data
from benchmarks.report import write_report
from models import Darknet, load_cfg

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.memory"
CFGS = real_data() / "darknet/official-cfg"
SIZES = {"yolov4": 608, "yolov3": 416, "yolov4-tiny": 416, "yolov7": 640, "yolov4-p6": 1280}
MEGABYTE = 2**20


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that operations make, until they are freed; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:  # a view, or an operation in place
            return
        self.seen.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


def make_model(cfg: str, *, keeps: bool) -> Darknet:
    """Build a network in evaluation mode; `keeps` stops it from freeing outputs before the pass is over."""
    model = Darknet(load_cfg(CFGS / f"{cfg}.cfg")).eval()
    if keeps:
        model._done = [[] for _ in model.layers]
    return model


def count_bytes(cfg: str, size: int, *, keeps: bool) -> int:
    """Give the most bytes of tensors that a forward pass at size x size holds at once, the picture aside."""
    with torch.device("meta"), torch.inference_mode():
        model = make_model(cfg, keeps=keeps)
        x = torch.empty(1, 3, size, size)
        with LiveBytes() as counter:
            model(x)
    return counter.peak


def measure_process(cfg: str, size: int, *, keeps: bool) -> int:
    """Run the pass in a process of its own and give the bytes by which its peak of resident memory grows."""
    words = [sys.executable, "-m", "benchmarks.memory", cfg, str(size), "keep" if keeps else "free"]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def run_pass(cfg: str, size: int, *, keeps: bool) -> None:
    """Print by how many bytes one forward pass raises this process's peak."""
    model, x = make_model(cfg, keeps=keeps), torch.zeros(1, 3, size, size)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))  # what the first pass allocates once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model(x)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def main() -> None:
    """Count, measure, report."""
    if len(sys.argv) == 4:
        run_pass(sys.argv[1], int(sys.argv[2]), keeps=sys.argv[3] == "keep")
        return
    rows: list[dict[str, Any]] = []
    for cfg, size in SIZES.items():
        kept, freed = (count_bytes(cfg, size, keeps=keeps) / MEGABYTE for keeps in (True, False))
        row = {"cfg": cfg, "input": f"{size}x{size}", "kept MB": kept, "freed MB": freed, "ratio": kept / freed}
        if cfg == "yolov4":
            kept, freed = (measure_process(cfg, size, keeps=keeps) / MEGABYTE for keeps in (True, False))
            row |= {"process, kept MB": kept, "process, freed MB": freed}
        rows.append(row)
    text = (
        "Forward pass of one picture, float32, evaluation mode. `kept` and `freed`: the most bytes of tensors alive at"
        " once, every layer's output kept until the end or freed after its last reader; every storage that an operation"
        " makes is counted from then until it is freed, weights and the picture are not. `process`: by how much the"
        " peak of resident memory of a process grows over its weights, the workspaces of the convolutions included."
    )
    first = rows[0]
    summary = {"kept_mb": first["kept MB"], "freed_mb": first["freed MB"], "ratio": first["ratio"]}
    write_report("memory", "Memory of a forward pass: freeing against keeping", text, COMMAND, rows, summary)


if __name__ == "__main__":
    main()
