"""From a `.data` file to batches: lists of images, checked labels, and a loader.

A batch is asked for by keys: (index, epoch, size, mosaic or not, repeat). All randomness of a sample comes from the
seed and the key, so workers hold no state and a resumed training sees what an uninterrupted one sees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import dist
from .augment import Sample, flip, jitter_colour, letterbox, mixup, mosaic, random_affine, resize_to_fit, stretch
from .boxes import Fit
from .darknet_augment import distorted
from .darknet_recipe import Distortion
from .labels import Labelled
from .log import DataError
from .odds import draw, occurrences
from .picture_cache import fill_cache, read_cached
from .pictures import read_picture
from .recipe import Recipe


class Key(NamedTuple):
    """What one sample of a batch is to be; `repeat` counts how often the picture came before in its epoch."""

    index: int
    epoch: int
    size: tuple[int, int]
    is_mosaic: bool
    repeat: int = 0


class Item(NamedTuple):
    """A sample: picture [3, H, W] uint8 RGB, targets [N, 5] (class, xywh_n of the input), where it came from.

    `problem` says why it could not be read: an exception would come out of a worker with its traceback.
    """

    picture: Tensor
    targets: Tensor
    index: int
    fit: Fit
    problem: str = ""


class Batch(NamedTuple):
    """Pictures [B, 3, H, W] uint8, targets [N, 6] (place in the batch, class, xywh_n), dataset indices and fits."""

    pictures: Tensor
    targets: Tensor
    indices: list[int]
    fits: list[Fit]
    problem: str = ""


@dataclass
class Pictures(Dataset[Item]):
    """The samples of a checked list. With a `recipe`, ours or Darknet's, they are augmented, else only fitted.

    `odds` are those by which mosaic and mixup choose further pictures, as in `TrainingBatches`.
    """

    labelled: Labelled
    channels: int = 3
    recipe: Recipe | Distortion | None = None
    seed: int = 0
    is_stretched: bool = False
    cache: dict[int, np.ndarray] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)  # of the cache on disk
    odds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labelled.paths)

    def __getitem__(self, key: Key) -> Item:
        try:
            picture, classes, boxes, fit = self._augmented(key) if self.recipe else self._fitted(key)
        except DataError as error:
            blank = torch.zeros(self.channels, *key.size, dtype=torch.uint8)
            return Item(blank, torch.zeros(0, 5), key.index, Fit(key.size, (1, 1), (0, 0)), str(error))
        h, w = picture.shape[:2]
        targets = np.empty((len(boxes), 5), np.float32)
        targets[:, 0] = classes
        targets[:, 1:3] = (boxes[:, :2] + boxes[:, 2:]) / 2 / (w, h)
        targets[:, 3:5] = (boxes[:, 2:] - boxes[:, :2]) / (w, h)
        return Item(to_tensor(picture, self.channels), torch.from_numpy(targets), key.index, fit)

    def cache_in_memory(self, size: tuple[int, int]) -> None:
        """Decode every picture once and keep it, fitted to `size`, in memory."""
        for index in dist.progress(range(len(self)), desc="caching", unit="img"):
            self.cache[index] = resize_to_fit(read_picture(self.labelled.paths[index]), size)

    def cache_on_disk(self, folder: Path, size: tuple[int, int]) -> None:
        """Decode every picture once and keep it, fitted to `size`, in files of `folder`."""
        with dist.first_goes_first():
            self.files = fill_cache(folder, self.labelled.paths, size)

    def _load(self, index: int, size: tuple[int, int]) -> Sample:
        """Give a picture fitted to `size`, its classes and its boxes in xyxy_px."""
        path, picture = self.labelled.paths[index], self.cache.get(index)
        if picture is None:
            picture = read_cached(self.files[index], path, size) if self.files else read_picture(path)
        picture = resize_to_fit(picture, size)
        return picture, *self._boxes(index, picture.shape[:2])

    def _boxes(self, index: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        labels = self.labelled.labels[index]  # [N, 5]: class, xywh_n
        half, scale = labels[:, 3:5] / 2, np.float32([shape[1], shape[0]])
        boxes = np.hstack(((labels[:, 1:3] - half) * scale, (labels[:, 1:3] + half) * scale))
        return labels[:, 0], boxes.astype(np.float32)

    def _fitted(self, key: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray, Fit]:
        picture = read_picture(self.labelled.paths[key.index])
        classes, boxes = self._boxes(key.index, picture.shape)
        picture, fit = stretch(picture, key.size) if self.is_stretched else letterbox(picture, key.size)
        return picture, classes, fit.to_input(boxes), fit

    def _augmented(self, key: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray, Fit]:
        assert self.recipe is not None
        generator = np.random.default_rng([self.seed, key.epoch, key.index, key.repeat])
        if isinstance(self.recipe, Distortion):
            load = partial(self._load, size=key.size)
            sample = distorted(load, key.index, len(self), key.size, self.recipe, generator)
            return *sample, Fit(key.size, (1, 1), (0, 0))
        sample = self._composed(key, self.recipe, generator)
        if key.is_mosaic and generator.random() < self.recipe.mixup:
            (other,) = self._others(1, generator)
            sample = mixup(sample, self._composed(key._replace(index=other), self.recipe, generator), generator)
        picture = jitter_colour(sample[0], self.recipe, generator)
        sample = flip((picture, sample[1], sample[2]), self.recipe, generator)
        return *sample, Fit(key.size, (1, 1), (0, 0))

    def _composed(self, key: Key, recipe: Recipe, generator: np.random.Generator) -> Sample:
        sample = self._load(key.index, key.size)
        if key.is_mosaic and generator.random() < recipe.mosaic:
            others = [self._load(index, key.size) for index in self._others(3, generator)]
            sample = mosaic([sample, *others], key.size, generator)
        return random_affine(sample, key.size, recipe, generator)

    def _others(self, count: int, generator: np.random.Generator) -> list[int]:
        if self.odds is None:
            return generator.integers(len(self), size=count).tolist()
        return draw(self.odds, count, generator).tolist()


@dataclass
class TrainingBatches(Sampler[list[Key]]):
    """Shuffled batches over pictures of `shapes` [N, 2] (height, width); `epoch` is set before each epoch.

    `sizes` are the network sizes to choose from, one draw for `held` batches. Where `is_rectangular`, the pictures of a
    batch are alike in shape, the network size is just what they need, and there is no mosaic. Of several processes each
    gets every `world`-th picture of a batch that is `world` times as large, and at least one. With `odds`, see
    odds.py, an epoch draws as many pictures as there are, each time from all of them.
    """

    shapes: np.ndarray
    batch_size: int
    sizes: Sequence[tuple[int, int]]
    seed: int
    mosaic_epochs: int
    is_rectangular: bool = False
    stride: int = 32
    epoch: int = 0
    held: int = 1  # batches for which a drawn size holds
    rank: int = 0
    world: int = 1
    odds: np.ndarray | None = None

    def __len__(self) -> int:
        return -(-len(self.shapes) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        count = len(self.shapes)
        order = generator.permutation(count) if self.odds is None else draw(self.odds, count, generator)
        together = self.batch_size * self.world
        starts = np.arange(0, len(order), together)
        ratios = self.shapes[:, 0] / self.shapes[:, 1]
        if self.is_rectangular:
            order = order[np.argsort(ratios[order], kind="stable")]
            starts = generator.permutation(starts)
        is_mosaic = not self.is_rectangular and self.epoch < self.mosaic_epochs
        repeats = occurrences(order)
        for number, start in enumerate(starts):
            places = np.arange(count)[start : start + together]
            if number % self.held == 0:
                drawn = self.sizes[generator.integers(len(self.sizes))]
            size = drawn
            if self.is_rectangular:
                size = rectangle(ratios[order[places]], size, self.stride)
            if len(places) < self.world:
                places = np.resize(places, self.world)  # repeats them
            yield [
                Key(int(order[place]), self.epoch, size, is_mosaic, repeats[place])
                for place in places[self.rank :: self.world]
            ]


def evaluation_batches(
    sizes: np.ndarray, batch_size: int, size: tuple[int, int], stride: int, *, is_rectangular: bool
) -> list[list[Key]]:
    """Make fixed batches over all pictures of `sizes` [N, 2] (height, width), sorted by shape where rectangular."""
    shapes = sizes[:, 0] / sizes[:, 1]
    order = np.argsort(shapes, kind="stable") if is_rectangular else np.arange(len(shapes))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        fitted = rectangle(shapes[chosen], size, stride) if is_rectangular else size
        batches.append([Key(int(index), 0, fitted, False) for index in chosen])
    return batches


def rectangle(shapes: np.ndarray, size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Give the smallest network size within `size` that holds pictures of `shapes` (height / width) unshrunk."""
    tallest, widest = shapes.max(), shapes.min()
    cells = np.array([size[1] * tallest, size[0] / widest]) / stride
    height, width = np.ceil(cells - 1e-6).astype(int) * stride  # 1e-6: 13 cells and a rounding error are 13
    return min(size[0], int(height)), min(size[1], int(width))


def make_loader(pictures: Pictures, batches: Sampler[list[Key]] | list[list[Key]], *, workers: int) -> DataLoader[Item]:
    """Make the loader: worker processes stay alive between epochs, batches are pinned where there is a GPU."""
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # of its own: starting workers must not move the network's randomness
    )


def collate(items: Sequence[Item]) -> Batch:
    """Stack pictures and join targets, each with its place in the batch in front."""
    targets = [
        torch.cat((torch.full((len(item.targets), 1), float(place)), item.targets), dim=1)
        for place, item in enumerate(items)
    ]
    pictures = torch.stack([item.picture for item in items])
    problem = "\n".join(dict.fromkeys(item.problem for item in items if item.problem))  # mosaics share pictures
    return Batch(pictures, torch.cat(targets), [item.index for item in items], [item.fit for item in items], problem)


def to_tensor(picture: np.ndarray, channels: int) -> Tensor:
    """Turn an RGB picture [H, W, 3] into a uint8 tensor [channels, H, W]; one channel is grey."""
    if channels == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


def to_input(pictures: Tensor, device: torch.device) -> Tensor:
    """Move uint8 pictures [B, 3, H, W] to the device as 0..1 floats in channels_last order."""
    moved = pictures.to(device, non_blocking=True)
    return moved.to(torch.float32, memory_format=torch.channels_last) / 255


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
