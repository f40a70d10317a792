"""Devices by the names that users type and by what they are, numeric precision, and seeds."""

import ctypes
import os
import platform
import random
from pathlib import Path

import numpy as np
import torch

from . import dist
from .log import DataError

CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def select_device(name: str) -> torch.device:
    """Turn '', 'cpu' or a GPU number into a device; '' is the first GPU where there is one, else the CPU.

    Each process of torchrun has the GPU of its own number.
    """
    if name == "cpu" or (not name and not torch.cuda.is_available()):
        return torch.device("cpu")
    if dist.world_size() > 1:
        if name:
            raise DataError(f"--device {name}: torchrun gives each process a GPU (leave it out, or --device cpu)")
        name = str(dist.local_rank())
    number = name.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdecimal():
        raise DataError(f"--device {name}: expected cpu or the number of one GPU (0, 1, …)")
    if int(number) >= torch.cuda.device_count():
        raise DataError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs (use --device cpu)")
    return torch.device("cuda", int(number))


def autocast_type(precision: str, device: torch.device) -> torch.dtype:
    """Give the type that a forward pass computes in; 'auto' is bf16 (or else fp16) on a GPU and fp32 on the CPU."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise DataError("--precision fp16: needs a GPU (on the CPU use bf16 or fp32)")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed every global generator; a resumed epoch thus starts where an uninterrupted one does.

    In an epoch each process has random numbers of its own; at the start all have the same.
    """
    process = [dist.rank()] if epoch and dist.rank() else []
    mixed = int(np.random.SeedSequence([seed, epoch, *process]).generate_state(1)[0])
    random.seed(mixed)
    torch.manual_seed(mixed)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: fresh pages cost as much time as the arithmetic on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine() -> str:
    """Name processor, cores, PyTorch and GPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, PyTorch {torch.__version__}{gpu}"
