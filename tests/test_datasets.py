"""Samples and batches: the same for everyone who asks with the same key, and everything once an epoch."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.augment import letterbox
from utils.datasets import (
    Item,
    Key,
    Pictures,
    TrainingBatches,
    collate,
    evaluation_batches,
    make_loader,
    read_picture,
    rectangle,
    to_input,
    to_tensor,
)
from utils.labels import Labelled
from utils.log import DataError
from utils.odds import image_odds
from utils.recipe import Recipe

SIZE = (64, 96)
SHAPES = [(64, 96), (50, 40), (30, 90), (1, 1), (200, 100)]
RECIPE = Recipe(mixup=0.5, degrees=5, shear=2, flip_ud=0.5)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    """Five pictures of different shapes; picture i has i boxes, all of class i."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths, labels = [], []
    for index, shape in enumerate(SHAPES):
        paths.append(str(folder / f"{index}.png"))
        cv2.imwrite(paths[-1], generator.integers(0, 256, (*shape, 3)).astype(np.uint8))
        sides, centres = generator.uniform(0.3, 0.6, (index, 2)), generator.uniform(0.3, 0.7, (index, 2))
        labels.append(np.hstack((np.full((index, 1), index), centres, sides)).astype(np.float32))
    return Labelled(paths, np.array(SHAPES, np.int32), labels)


def batches(
    shapes: Sequence[tuple[int, int]], size: int, *, sizes: Sequence[tuple[int, int]] = (SIZE,), **settings: object
) -> TrainingBatches:
    return TrainingBatches(np.array(shapes), size, sizes, **{"seed": 3, "mosaic_epochs": 2, **settings})


def assert_same(first: Item, second: Item) -> None:
    assert torch.equal(first.picture, second.picture)
    assert torch.equal(first.targets, second.targets)
    assert (first.index, first.fit) == (second.index, second.fit)


def differ(first: Item, second: Item) -> bool:
    return not torch.equal(first.picture, second.picture)


# Samples


def test_a_fitted_sample_is_letterboxed_with_its_boxes(labelled: Labelled) -> None:
    item = Pictures(labelled)[Key(2, 0, SIZE, False)]
    expected, fit = letterbox(read_picture(labelled.paths[2]), SIZE)
    assert torch.equal(item.picture, torch.from_numpy(expected).permute(2, 0, 1))
    assert (item.index, item.fit) == (2, fit)
    assert fit.offset == (16, 0)  # 30x90 becomes 32x96
    rows = labelled.labels[2]
    expected = np.stack((rows[:, 0], rows[:, 1], rows[:, 2] / 2 + 0.25, rows[:, 3], rows[:, 4] / 2), axis=1)
    np.testing.assert_allclose(item.targets.numpy(), expected, atol=1e-5)


def test_a_stretched_sample_keeps_its_fractions(labelled: Labelled) -> None:
    item = Pictures(labelled, is_stretched=True)[Key(4, 0, SIZE, False)]
    assert item.picture.shape == (3, *SIZE)
    np.testing.assert_allclose(item.targets.numpy(), labelled.labels[4], atol=1e-5)


@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("is_mosaic", [False, True])
def test_an_augmented_sample_fits_the_network(labelled: Labelled, index: int, is_mosaic: bool) -> None:
    for epoch in range(8):
        item = Pictures(labelled, recipe=RECIPE)[Key(index, epoch, SIZE, is_mosaic)]
        assert (item.picture.shape, item.picture.dtype) == ((3, *SIZE), torch.uint8)
        assert (item.targets.shape[1], item.targets.dtype) == (5, torch.float32)
        assert (item.targets[:, 1:3] - item.targets[:, 3:] / 2 >= -1e-6).all()
        assert (item.targets[:, 1:3] + item.targets[:, 3:] / 2 <= 1 + 1e-6).all()
        assert (item.targets[:, 3:] > 0).all()


def test_one_channel_is_the_grey_of_three(labelled: Labelled) -> None:
    for recipe, index in itertools.product((None, RECIPE), (1, 3)):
        key = Key(index, 0, SIZE, recipe is not None)
        grey, colour = (Pictures(labelled, channels, recipe)[key] for channels in (1, 3))
        expected = cv2.cvtColor(colour.picture.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
        assert grey.picture.shape == (1, *SIZE)
        np.testing.assert_array_equal(grey.picture[0].numpy(), expected)
        assert torch.equal(grey.targets, colour.targets)


def test_pictures_are_rgb_and_upright(tmp_path: Path) -> None:
    path = str(tmp_path / "röd.png")
    cv2.imwrite(path, np.full((2, 3, 3), (0, 0, 255), np.uint8))  # OpenCV writes BGR: this is red
    assert to_tensor(read_picture(path), 3)[:, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(DataError, match="No such file"):
        read_picture(str(tmp_path / "gone.png"))
    whole = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[1].tobytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) - 400])
    with pytest.raises(DataError, match=r"cut\.jpg: (broken image|cannot be read)"):
        read_picture(str(tmp_path / "cut.jpg"))


def test_to_input_scales_to_fractions() -> None:
    x = to_input(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1), torch.device("cpu"))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([0, 0.2, 1]))
    assert to_input(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.device("cpu")).is_contiguous(
        memory_format=torch.channels_last
    )


# The same for the same key


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_sample_depends_on_seed_epoch_and_index_alone(labelled: Labelled, workers: int) -> None:
    alone = {index: Pictures(labelled, recipe=RECIPE, seed=7)[Key(index, 4, SIZE, True)] for index in (4, 2, 0, 1, 3)}
    loader = make_loader(Pictures(labelled, recipe=RECIPE, seed=7), batches(SHAPES, 2, epoch=4), workers=workers)
    loader.batch_sampler.mosaic_epochs = 9
    seen = []
    for batch in loader:
        for place, index in enumerate(batch.indices):
            targets = batch.targets[batch.targets[:, 0] == place, 1:]
            assert_same(Item(batch.pictures[place], targets, index, batch.fits[place]), alone[index])
            seen.append(index)
    assert sorted(seen) == list(range(5))


@pytest.mark.parametrize("is_mosaic", [False, True])
def test_another_seed_epoch_or_index_is_another_sample(labelled: Labelled, is_mosaic: bool) -> None:
    pictures, key = Pictures(labelled, recipe=RECIPE, seed=7), Key(1, 4, SIZE, is_mosaic)
    assert_same(pictures[key], pictures[key])
    assert differ(pictures[key], pictures[key._replace(epoch=5)])
    assert differ(pictures[key], pictures[key._replace(index=2)])
    assert differ(pictures[key], replace(pictures, seed=8)[key])


@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_pictures_in_memory_give_the_same_samples(labelled: Labelled, recipe: Recipe | None) -> None:
    plain, cached = Pictures(labelled, recipe=recipe), Pictures(labelled, recipe=recipe)
    cached.cache_in_memory(SIZE)
    assert len(cached.cache) == len(cached) == 5
    for index, is_mosaic in itertools.product(range(5), (False, True)):
        key = Key(index, 1, SIZE, is_mosaic)
        assert_same(plain[key], cached[key])


def test_pictures_in_memory_are_not_read_again(labelled: Labelled) -> None:
    cached = Pictures(labelled, recipe=RECIPE)
    cached.cache_in_memory(SIZE)
    expected = cached[Key(4, 0, SIZE, True)]
    cached.labelled = replace(labelled, paths=["gone.png"] * 5)
    assert_same(cached[Key(4, 0, SIZE, True)], expected)


def test_mosaic_mixes_pictures_and_closes(labelled: Labelled) -> None:
    pictures = Pictures(labelled, recipe=Recipe(mosaic=1, mixup=0))
    classes = {}
    for epoch in range(4):
        found = [pictures[key] for batch in batches(SHAPES, 2, epoch=epoch) for key in batch]
        classes[epoch] = any(label != item.index for item in found for label in item.targets[:, 0].tolist())
    assert classes == {0: True, 1: True, 2: False, 3: False}  # mosaic_epochs is 2


def test_without_mosaic_there_is_no_mixup(labelled: Labelled) -> None:
    pictures = Pictures(labelled, recipe=Recipe(mosaic=1, mixup=1))
    for index in range(5):
        assert set(pictures[Key(index, 0, SIZE, False)].targets[:, 0].tolist()) <= {float(index)}


# Batches


@pytest.mark.parametrize("is_rectangular", [False, True])
@pytest.mark.parametrize(("count", "size"), [(10, 5), (10, 4), (3, 8), (1, 1), (1, 16)])
def test_an_epoch_has_every_picture_once(count: int, size: int, is_rectangular: bool) -> None:
    shapes = np.random.default_rng(0).integers(10, 500, (count, 2))
    sampler = batches(shapes, size, is_rectangular=is_rectangular)
    orders = []
    for sampler.epoch in (0, 1):
        found = list(sampler)
        lengths = sorted((len(batch) for batch in found), reverse=True)
        assert len(found) == len(sampler) == -(-count // size)
        assert lengths == ([size] * (count // size) + [count % size] * (count % size > 0))
        assert is_rectangular or [len(batch) for batch in found] == lengths
        assert sorted(key.index for batch in found for key in batch) == list(range(count))
        assert all(key.epoch == sampler.epoch for batch in found for key in batch)
        assert all(key.is_mosaic == (not is_rectangular) for batch in found for key in batch)
        assert list(sampler) == found
        orders.append([key.index for batch in found for key in batch])
    if count > size:  # a single rectangular batch is sorted by shape
        assert orders[0] != orders[1]


RARE = [
    np.array([[label, 0.5, 0.5, 1, 1] for label in labels], np.float32).reshape(-1, 5)
    for labels in [(0,)] * 6 + [(0, 1), (1,), (2, 0), ()]
]


@pytest.mark.parametrize("is_rectangular", [False, True])
@pytest.mark.parametrize("power", [0.5, 1])
def test_a_rare_class_comes_as_often_as_its_weight_says(power: float, is_rectangular: bool) -> None:
    weights = np.array([1 / 8] * 6 + [1 / 2, 1 / 2, 1, 1 / 8]) ** power  # class 0 in 8 pictures, 1 in 2, 2 in 1
    shapes = np.random.default_rng(0).integers(10, 500, (10, 2))
    sampler = batches(shapes, 4, is_rectangular=is_rectangular, odds=image_odds(RARE, power))
    counts, epochs = np.zeros(10), 2000
    for sampler.epoch in range(epochs):
        found = [key for batch in sampler for key in batch]
        assert len(found) == 10
        assert len(set(found)) == 10  # a picture that comes again is another sample
        counts += np.bincount([key.index for key in found], minlength=10)
    np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), atol=0.01)


def test_power_0_leaves_the_order_as_it_is() -> None:
    assert image_odds(RARE, 0) is None
    order = np.random.default_rng([3, 5]).permutation(10).tolist()
    assert [key for batch in batches([(9, 9)] * 10, 4, epoch=5) for key in batch] == [
        Key(index, 5, SIZE, False) for index in order
    ]


def test_without_a_box_every_picture_is_as_likely() -> None:
    np.testing.assert_allclose(image_odds([np.zeros((0, 5), np.float32)] * 4, 1), [0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("is_rectangular", [False, True])
def test_processes_share_a_weighted_epoch_out(is_rectangular: bool) -> None:
    settings = {"epoch": 1, "is_rectangular": is_rectangular, "odds": image_odds(RARE, 1)}
    shapes = np.random.default_rng(0).integers(10, 500, (10, 2))
    parts = [list(batches(shapes, 2, rank=rank, world=2, **settings)) for rank in (0, 1)]
    whole = list(batches(shapes, 4, **settings))
    assert [(batch[0::2], batch[1::2]) for batch in whole] == list(zip(*parts, strict=True))


def test_a_picture_that_comes_again_is_augmented_anew(labelled: Labelled) -> None:
    pictures, key = Pictures(labelled, recipe=RECIPE), Key(1, 4, SIZE, False)
    assert differ(pictures[key], pictures[key._replace(repeat=1)])


@pytest.mark.parametrize("recipe", [Recipe(mosaic=1), Recipe(mosaic=0, mixup=1)])
def test_mosaic_and_mixup_draw_by_weight_too(labelled: Labelled, recipe: Recipe) -> None:
    certain = np.array([0, 0, 0, 0, 1.0])  # draws picture 4 alone
    pictures = Pictures(labelled, recipe=recipe, odds=certain)
    found = [pictures[Key(1, epoch, SIZE, True)].targets[:, 0] for epoch in range(8)]
    assert set(torch.cat(found).tolist()) == {1, 4}


def test_another_seed_is_another_order() -> None:
    first, second = (list(batches([(9, 9)] * 20, 4, seed=seed)) for seed in (0, 1))
    assert first != second


def test_multi_scale_draws_one_size_a_batch() -> None:
    sizes = [(side, side) for side in (256, 320, 384)]
    drawn = [{key.size for key in batch} for batch in batches([(9, 9)] * 100, 3, sizes=sizes)]
    assert all(len(of_batch) == 1 for of_batch in drawn)
    assert set.union(*drawn) == set(sizes)


def test_rectangular_batches_hold_pictures_alike_in_shape() -> None:
    shapes = [(100, 400)] * 4 + [(400, 100)] * 4 + [(300, 300)] * 4
    found = list(batches(shapes, 4, sizes=[(320, 320)], is_rectangular=True))
    sizes = {frozenset(key.index // 4 for key in batch): {key.size for key in batch} for batch in found}
    assert sizes == {frozenset([0]): {(96, 320)}, frozenset([1]): {(320, 96)}, frozenset([2]): {(320, 320)}}


@pytest.mark.parametrize("is_rectangular", [False, True])
@pytest.mark.parametrize(("count", "size"), [(10, 4), (3, 8), (1, 1)])
def test_evaluation_batches(count: int, size: int, is_rectangular: bool) -> None:
    sizes = np.random.default_rng(1).integers(10, 500, (count, 2))
    found = evaluation_batches(sizes, size, (320, 416), 32, is_rectangular=is_rectangular)
    assert [len(batch) for batch in found] == [size] * (count // size) + [count % size] * (count % size > 0)
    order = [key.index for batch in found for key in batch]
    assert sorted(order) == list(range(count))
    assert {key.is_mosaic for batch in found for key in batch} == {False}
    if not is_rectangular:
        assert order == list(range(count))
        assert {key.size for batch in found for key in batch} == {(320, 416)}
    for batch in found:
        (fitted,) = {key.size for key in batch}
        assert all(side % 32 == 0 for side in fitted)
        for key in batch:
            picture = np.zeros((*sizes[key.index], 3), np.uint8)
            assert letterbox(picture, fitted)[1].scale == letterbox(picture, (320, 416))[1].scale


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(480, 640)], (320, 416)),  # 312 rounds up
        ([(100, 400)], (128, 416)),  # 104
        ([(400, 100)], (416, 128)),
        ([(100, 400), (400, 100)], (416, 416)),
        ([(1, 2000)], (32, 416)),
        ([(416, 416)], (416, 416)),
        ([(320, 416)], (320, 416)),  # a multiple of the stride stays
    ],
)
def test_rectangle(shapes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    assert rectangle(np.array([h / w for h, w in shapes]), (416, 416), 32) == expected


@pytest.mark.parametrize("size", [320, 416, 480, 608, 640])
def test_a_rectangle_that_is_exact_is_not_widened_by_rounding(size: int) -> None:
    for side in range(32, size + 1, 32):
        assert rectangle(np.array([size / side]), (size, size), 32) == (size, side)
        assert rectangle(np.array([side / size]), (size, size), 32) == (side, size)


def test_collate_numbers_targets_by_place(labelled: Labelled) -> None:
    pictures = Pictures(labelled)
    items = [pictures[Key(index, 0, SIZE, False)] for index in (0, 2, 0, 1)]
    batch = collate(items)
    assert batch.pictures.shape == (4, 3, *SIZE)
    assert batch.indices == [0, 2, 0, 1]
    assert batch.fits == [item.fit for item in items]
    assert batch.targets[:, 0].tolist() == [1, 1, 3]
    torch.testing.assert_close(batch.targets[:, 1:], torch.cat((items[1].targets, items[3].targets)))


def test_collate_without_any_box(labelled: Labelled) -> None:
    batch = collate([Pictures(labelled)[Key(0, 0, SIZE, False)]] * 2)
    assert (batch.targets.shape, batch.targets.dtype) == ((0, 6), torch.float32)


def test_one_picture_and_a_batch_larger_than_the_set(labelled: Labelled) -> None:
    one = replace(labelled, paths=labelled.paths[1:2], sizes=labelled.sizes[1:2], labels=labelled.labels[1:2])
    loader = make_loader(Pictures(one, recipe=RECIPE), batches(one.sizes, 16), workers=0)
    (batch,) = loader
    assert batch.pictures.shape == (1, 3, *SIZE)
    assert batch.indices == [0]
