"""How many images a GPU holds at once, for --batch-size auto."""

import copy

import torch

from models import Darknet

from . import dist
from .engine import make_step_loss
from .log import DataError, log
from .schedule import AnyRecipe

SHARE = 0.85  # of the memory that is free; the rest is for what the largest batch of a training adds
MOST = 1024
BOXES = 20  # a picture


def largest_batch(
    model: Darknet, recipe: AnyRecipe, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> int:
    """Find the images of `size` (height, width) that a training step on this GPU has memory for.

    A copy of the model makes steps with 1, 2, 4, … random pictures, as long as twice as many would fit; of several
    processes the least counts. Raises DataError on a CPU, and where not even one fits.
    """
    if device.type == "cpu":
        raise DataError("--batch-size auto: measures the memory of a GPU (on the CPU give a number, say 16)")
    free, _ = torch.cuda.mem_get_info(device)
    budget = SHARE * free - 2 * sum(parameter.nbytes for parameter in model.parameters())  # momentum and gradients
    peaks: dict[int, int] = {}
    count = 1
    try:
        while count <= MOST and (not peaks or 2 * max(peaks.values()) < budget):
            peaks[count] = _peak(model, recipe, count, size, device, dtype)
            count *= 2
    except torch.cuda.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()
    found = min(dist.gather([fitting_batch(peaks, budget)]))
    if found < 1:
        raise DataError(f"--batch-size auto: not one image of {size[1]}×{size[0]} fits (lower --img-size)")
    log.info("--batch-size auto: %d images, of %.1f GB free", found, free / 1e9)
    return found


def fitting_batch(peaks: dict[int, int], budget: float) -> int:
    """Give the images that fit into `budget` bytes, by the line through the two largest of `peaks` (bytes by images).

    Above 8 it is a multiple of 8, which GPUs like.
    """
    measured = sorted(count for count, peak in peaks.items() if peak <= budget)
    if not measured:
        return 0
    found = measured[-1]
    if len(measured) > 1:
        low, high = measured[-2:]
        slope = max(1.0, (peaks[high] - peaks[low]) / (high - low))
        found = max(found, min(MOST, int(high + (budget - peaks[high]) / slope)))
    return found if found < 8 else found // 8 * 8


def _peak(
    model: Darknet, recipe: AnyRecipe, count: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> int:
    """Give the bytes that one forward and backward pass needs at most."""
    tried = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(count * BOXES, 6, generator=generator) * 0.5 + 0.25
    targets[:, 0], targets[:, 1] = torch.arange(count).repeat_interleave(BOXES), 0
    pictures = torch.rand(count, model.channels, *size, generator=generator)
    torch.cuda.reset_peak_memory_stats(device)
    x = pictures.to(device).contiguous(memory_format=torch.channels_last)
    loss, _ = make_step_loss(tried, tried, recipe, device, dtype)(x, targets.to(device))
    loss.backward()
    return torch.cuda.max_memory_allocated(device)
