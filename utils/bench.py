"""What a network is measured by while it is pruned: pictures where there are any, a device and a size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import Darknet

from .cli import Detector, check_names
from .datasets import Batch, Pictures, evaluation_batches, make_loader, to_input
from .evaluate import Settings, evaluate
from .labels import Labelled, check_labels, merge_classes
from .log import DataError
from .recipe import Recipe
from .scores import Evaluation
from .timing import Timing, paired_ms

SECONDS = 4.0  # of timing, after which three rounds are enough
ROUNDS = 40  # timings of a forward pass: the median of fewer moves by more than a percent


@dataclass(frozen=True)
class Bench:
    """Checked pictures to test and to train on, or None; how to test; the device and what it computes in."""

    valid: Labelled | None
    train: Labelled | None
    names: tuple[str, ...]
    settings: Settings
    device: torch.device
    dtype: torch.dtype

    def judge(self, model: Darknet, images: int | None = None) -> Evaluation:
        """Test on the validation pictures, or on some of them that are spread over all."""
        assert self.valid is not None
        labelled = self.valid if images is None else spread(self.valid, images)
        network = model.fuse().to(device=self.device, memory_format=torch.channels_last)
        return evaluate(network, labelled, self.names, self.settings, device=self.device, dtype=self.dtype)[0]

    def time(self, *models: Darknet) -> list[Timing]:
        """Time forward passes of one picture in turn."""
        return paired_ms(models, self.settings.size, ROUNDS, device=self.device, seconds=SECONDS)

    def batches(self, model: Darknet, images: int) -> Iterator[Batch]:
        """Give training pictures, spread over all, as the last epochs of a training see them: without mosaic.

        Statistics of pictures as they are tested on lose more: slim-m on BCCD 2 points of mAP@.5 against 0.3.
        """
        assert self.train is not None
        labelled, settings = spread(self.train, images), self.settings
        pictures = Pictures(labelled, model.channels, Recipe())
        keys = evaluation_batches(labelled.sizes, settings.batch_size, settings.size, 1, is_rectangular=False)
        for batch in make_loader(pictures, keys, workers=settings.workers):
            if batch.problem:
                raise DataError(batch.problem)
            yield batch

    def inputs(self, model: Darknet, images: int) -> Iterator[Tensor]:
        """Give training pictures as inputs [B, C, H, W]."""
        for batch in self.batches(model, images):
            yield to_input(batch.pictures, self.device)


def make_bench(detector: Detector, settings: Settings, *, device: torch.device, dtype: torch.dtype) -> Bench:
    """Read and check the pictures that the detector's data name.

    Where all classes are tested as one, a network of several trains on several all the same. Raises DataError.
    """
    is_single = settings.is_single_class
    if not is_single:
        check_names(detector)

    def read(source: Path | None, *, is_merged: bool) -> Labelled | None:
        if not (detector.data and source):
            return None
        labelled = check_labels(source, len(detector.data.names))
        return merge_classes(labelled) if is_merged else labelled

    valid, train = (detector.data.valid, detector.data.train) if detector.data else (None, None)
    return Bench(
        read(valid, is_merged=is_single),
        read(train, is_merged=is_single and detector.model.classes == 1),
        ("object",) if is_single else detector.names,
        settings,
        device,
        dtype,
    )


def spread(labelled: Labelled, images: int) -> Labelled:
    """Give as many pictures, evenly spread over a list."""
    count = len(labelled.paths)
    chosen: Sequence[int] = np.linspace(0, count - 1, min(images, count)).round().astype(int).tolist()
    return replace(
        labelled,
        paths=[labelled.paths[index] for index in chosen],
        sizes=labelled.sizes[chosen],
        labels=[labelled.labels[index] for index in chosen],
        ignored=[labelled.ignored[index] for index in chosen] if len(labelled.ignored) else (),
    )
