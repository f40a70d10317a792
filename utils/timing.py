"""How fast detectors are: the forward pass alone and the whole path from file to boxes, in three forms of a network.

What is compared is timed in turn, so that what else the machine does hits all of them alike, and medians are given.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import Darknet

from .boxes import non_maximum_suppression
from .datasets import Key, Pictures, collate, to_input
from .device import CPU, synchronize
from .evaluate import Settings
from .labels import Labelled
from .predict import predict

ROUNDS, SECONDS = 15, 20.0  # timings of a row at most, and the time after which three are enough


class Timing(NamedTuple):
    """The median of timings in milliseconds, and how far their quartiles lie apart."""

    ms: float
    spread_ms: float


@torch.inference_mode()
def paired_ms(
    models: Sequence[Darknet],
    size: tuple[int, int],
    rounds: int = ROUNDS,
    *,
    device: torch.device = CPU,
    seconds: float = SECONDS,
) -> list[Timing]:
    """Time the forward passes of unfused networks in turn: fused, channels_last, one picture of `size`, FP32."""
    x = torch.rand(1, models[0].channels, *size, generator=torch.Generator().manual_seed(0))  # [1, C, H, W]
    x = x.to(device, memory_format=torch.channels_last)
    fused = [model.fuse().to(device, memory_format=torch.channels_last) for model in models]
    return [summarise(ms) for ms in time_in_turn([partial(model, x) for model in fused], device, rounds, seconds)]


def time_in_turn(
    calls: Sequence[Callable[[], object]],
    device: torch.device = CPU,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> list[list[float]]:
    """Time every call once a round, after a round to warm up, in milliseconds."""
    for call in calls:
        call()
    spent: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begin > seconds:
            break
        for call, times in zip(calls, spent, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
    return spent


def summarise(ms: Sequence[float]) -> Timing:
    """Give median and spread of timings, two or more."""
    low, middle, high = statistics.quantiles(ms, n=4, method="inclusive")
    return Timing(middle, high - low)


@torch.inference_mode()
def benchmark(
    model: Darknet, labelled: Labelled, settings: Settings, *, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Time an unfused network at batch 1 and at the settings' batch, at the settings' whole size.

    Rows: variant (eager, fused, channels_last), batch, milliseconds a picture of the forward pass alone and of the
    whole path (read, resize, forward, decode, NMS) and their quartile spreads, pictures a second of the whole path,
    the forward pass's speed relative to eager's, and the number of timings.
    """
    eager = copy.deepcopy(model).eval().to(device)
    fused = eager.fuse()
    variants = {
        "eager": (eager, torch.contiguous_format),
        "fused": (fused, torch.contiguous_format),
        "fused, channels_last": (copy.deepcopy(fused).to(memory_format=torch.channels_last), torch.channels_last),
    }
    pictures = Pictures(labelled, model.channels, is_stretched=settings.is_stretched)
    rows: list[dict[str, Any]] = []
    for batch in dict.fromkeys((1, settings.batch_size)):
        keys = [Key(index % len(pictures), 0, settings.size, False) for index in range(batch)]
        calls: list[Callable[[], object]] = []
        for network, form in variants.values():
            x = _read(pictures, keys, device).contiguous(memory_format=form)
            calls += [_forward(network, x, dtype), _whole_path(network, pictures, keys, form, settings, device, dtype)]
        spent = time_in_turn(calls, device)
        for place, variant in enumerate(variants):
            forward, path = ([ms / batch for ms in spent[2 * place + part]] for part in (0, 1))
            rows.append({"variant": variant, "batch": batch, **_summary("forward", forward), **_summary("path", path)})
            eager_ms = rows[-1 - place]["forward_ms"]
            rows[-1] |= {
                "images_per_s": 1000 / rows[-1]["path_ms"],
                "speedup": eager_ms / rows[-1]["forward_ms"],
                "rounds": len(path),
            }
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows of a benchmark out."""
    lines = [
        f"{'network':<22}{'batch':>6}{'forward ms':>12}{'±':>9}{'whole ms':>11}{'±':>9}{'pictures/s':>12}{'× eager':>9}"
    ]
    for row in rows:
        numbers = f"{row['forward_ms']:12.2f}{row['forward_spread_ms']:9.2f}{row['path_ms']:11.2f}"
        more = f"{row['path_spread_ms']:9.2f}{row['images_per_s']:12.1f}{row['speedup']:9.2f}"
        lines.append(f"{row['variant']:<22}{row['batch']:6}{numbers}{more}")
    threads = torch.get_num_threads()
    lines.append(
        f"a picture; medians and quartile spreads of {rows[0]['rounds']} timings in turn, {threads} CPU threads"
    )
    return "\n".join(lines)


def _read(pictures: Pictures, keys: Sequence[Key], device: torch.device) -> Tensor:
    return to_input(collate([pictures[key] for key in keys]).pictures, device)


def _forward(model: Darknet, x: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    def forward() -> object:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return model(x)

    return forward


def _whole_path(
    model: Darknet,
    pictures: Pictures,
    keys: Sequence[Key],
    form: torch.memory_format,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], object]:
    def path() -> object:
        x = _read(pictures, keys, device).contiguous(memory_format=form)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = predict(model, x, is_augmented=settings.is_augmented)
        limits = {"conf_thres": settings.conf_thres, "iou_thres": settings.iou_thres, "max_det": settings.max_det}
        return [
            non_maximum_suppression(boxes, scores, **limits, diou_beta=model.diou_beta)
            for boxes, scores in zip(*found, strict=True)
        ]

    return path


def _summary(name: str, ms: list[float]) -> dict[str, float]:
    middle, spread = summarise(ms)
    return {f"{name}_ms": middle, f"{name}_spread_ms": spread}
