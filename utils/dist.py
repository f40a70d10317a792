"""Several processes, one training: `torchrun --nproc-per-node N [--nnodes M] train.py …`, as torchrun describes it to
each process in its environment. Alone, every function here gives back what it gets."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

T = TypeVar("T")
PATIENCE = 5.0  # seconds that a process which has lost another one waits to learn why
LOST = ("gloo", "NCCL", "TCPStore", "onnection")  # in the errors of an exchange that broke


def rank() -> int:
    """Give the number of this process, from 0."""
    return int(os.environ["RANK"]) if _is_launched() else 0


def local_rank() -> int:
    """Give the number of this process on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if _is_launched() else 0


def world_size() -> int:
    """Count the processes."""
    return int(os.environ["WORLD_SIZE"]) if _is_launched() else 1


def is_first() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return rank() == 0


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Meet the other processes, over nccl between GPUs and gloo between CPUs, and part from them when all is done."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others wait while the first reads a large dataset or judges
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def average(count: float) -> float:
    """Give the mean of a count over the processes.

    A sum over this process's part divided by it has a gradient whose mean over the processes, which is what DDP gives,
    is the gradient of the sum over all parts divided by the count of all.
    """
    return averages([count])[0]


def averages(counts: Sequence[float]) -> list[float]:
    """Give the mean of each count over the processes, in one exchange."""
    if world_size() == 1:
        return list(counts)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(counts, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return (shared / world_size()).tolist()


def share(items: Sequence[T]) -> Sequence[T]:
    """Give this process's part of a list that all of them have."""
    return items[rank() :: world_size()]


def gather(items: list[T]) -> list[T]:
    """Join the lists of all processes."""
    if world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process alone and give its result to all."""
    if world_size() == 1:
        return make()
    made: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]


def copy_statistics(module: nn.Module) -> None:
    """Give the statistics of the first process's module to all; without SyncBN each has its own."""
    if world_size() > 1:
        for value in module.buffers():
            dist.broadcast(value, src=0)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the other processes wait until the first one is through, and find what it has written."""
    if world_size() > 1 and not is_first():
        dist.barrier()
    yield
    if world_size() > 1 and is_first():
        dist.barrier()


def progress(items: Iterable[T], **options: Any) -> "tqdm[T]":
    """Show the progress through `items`, in the first process alone."""
    return tqdm(items, disable=not is_first(), **options)


def is_to_tell(*, waits: bool = False) -> bool:
    """Tell whether this process is the first with a mistake, the one that tells it; `waits`: give others the lead."""
    if world_size() == 1:
        return True
    try:
        store = next(rendezvous("env://", timeout=timedelta(seconds=PATIENCE)))[0]
        end = time.monotonic() + (PATIENCE if waits else 0)
        while store.add("mistakes", 0) == 0 and time.monotonic() < end:
            time.sleep(0.1)
        return store.add("mistakes", 1) == 1
    except RuntimeError:  # the store is gone, with those who would have told
        return not waits


def is_lost(error: Exception) -> bool:
    """Tell whether an error says that another process has gone away."""
    return world_size() > 1 and any(word in str(error) for word in LOST)


def _is_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
