"""Augmentation: boxes follow the pixels, whatever is done to the picture."""

import numpy as np
import pytest
import torch

from utils.augment import (
    GREY,
    Sample,
    clip_boxes,
    flip,
    jitter_colour,
    letterbox,
    mixup,
    mosaic,
    random_affine,
    resize_to_fit,
    stretch,
)
from utils.recipe import Recipe

SIZE = (128, 192)
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], np.uint8)  # of the class
STILL = Recipe(hue=0, saturation=0, value=0, translate=0, scale=0, flip_lr=0)
NO_BOXES = np.zeros(0, np.float32), np.zeros((0, 4), np.float32)
SHAPES = [(1, 1), (1, 7), (2000, 3), (3, 2000), (97, 131), SIZE]


def picture_with_box(box: tuple[int, int, int, int], label: int = 0, shape: tuple[int, int] = SIZE) -> Sample:
    """Draw a bright rectangle in the colour of its class on black."""
    picture = np.zeros((*shape, 3), np.uint8)
    x1, y1, x2, y2 = box
    picture[y1:y2, x1:x2] = COLOURS[label]
    return picture, np.float32([label]), np.float32([box])


def bright_box(picture: np.ndarray, label: int = 0) -> np.ndarray | None:
    """Find the box around the pixels in the colour of a class; 140 is above the grey of the padding."""
    rows, columns = np.nonzero(((picture > 140) == (COLOURS[label] > 140)).all(axis=2))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) if len(rows) else None


def random_box(generator: np.random.Generator, shape: tuple[int, int] = SIZE) -> tuple[int, int, int, int]:
    """Draw a box of at least 30 px a side."""
    (y1, y2), (x1, x2) = (
        (start := int(generator.integers(0, side - 30)), int(generator.integers(start + 30, side + 1)))
        for side in shape
    )
    return x1, y1, x2, y2


@pytest.mark.parametrize("fit_picture", [letterbox, stretch])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(96, 160), (160, 96), (32, 32)])
def test_fit_takes_boxes_there_and_back(fit_picture: type, shape: tuple[int, int], size: tuple[int, int]) -> None:
    picture, fit = fit_picture(np.full((*shape, 3), 255, np.uint8), size)
    assert (picture.shape, picture.dtype) == ((*size, 3), np.uint8)
    h, w = shape
    whole = fit.to_input(np.float32([[0, 0, w, h]]))[0]
    np.testing.assert_array_equal(bright_box(picture, 3), whole.round(4))
    assert fit_picture is letterbox or whole.tolist() == pytest.approx([0, 0, size[1], size[0]])
    boxes = np.sort(np.random.default_rng(0).uniform(0, 1, (20, 2, 2)), axis=1).reshape(-1, 4) * (w, h, w, h)
    back = fit.to_picture(torch.from_numpy(fit.to_input(boxes)))
    np.testing.assert_allclose(back.numpy(), boxes, atol=1e-6)


@pytest.mark.parametrize("fit_picture", [letterbox, stretch])
@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (64, 64), SIZE])
def test_fitted_boxes_lie_on_their_pixels(fit_picture: type, shape: tuple[int, int]) -> None:
    picture, _, boxes = picture_with_box(random_box(np.random.default_rng(1), shape), shape=shape)
    fitted, fit = fit_picture(picture, SIZE)
    np.testing.assert_allclose(bright_box(fitted), fit.to_input(boxes)[0], atol=1)


def test_letterbox_centres_on_grey_and_keeps_the_shape() -> None:
    picture, fit = letterbox(np.full((50, 100, 3), 200, np.uint8), (101, 100))
    assert (fit.offset, fit.scale, fit.shape) == ((25, 0), (1, 1), (50, 100))
    assert (picture[25:75] == 200).all()
    assert (picture[:25] == GREY).all()
    assert (picture[75:] == GREY).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_resize_to_fit_just_fits(shape: tuple[int, int]) -> None:
    h, w = resize_to_fit(np.zeros((*shape, 3), np.uint8), SIZE).shape[:2]
    assert h <= SIZE[0]
    assert w <= SIZE[1]
    assert h == SIZE[0] or w == SIZE[1]
    assert h / w == pytest.approx(shape[0] / shape[1], abs=1 / w, rel=1 / min(h, w))


@pytest.mark.parametrize("seed", range(40))
def test_mosaic_boxes_follow_the_pixels(seed: int) -> None:
    """As in training: four pictures of any shape, then zoomed and moved, down to where the canvas ends."""
    generator = np.random.default_rng(seed)
    shapes = [(SIZE[0], int(generator.integers(60, SIZE[1] + 1))) for _ in range(4)]
    samples = [picture_with_box(random_box(generator, shape), k, shape) for k, shape in enumerate(shapes)]
    sample = mosaic(samples, SIZE, generator)
    assert sample[0].shape == (2 * SIZE[0], 2 * SIZE[1], 3)
    zoomed = random_affine(sample, SIZE, Recipe(scale=0.5, translate=0.2), generator)
    assert zoomed[0].shape == (*SIZE, 3)
    for picture, classes, boxes in (sample, zoomed):
        returned = dict(zip(classes.astype(int).tolist(), boxes, strict=True))
        assert len(returned) == len(classes)
        for label in range(4):
            seen = bright_box(picture, label)
            if label in returned:
                np.testing.assert_allclose(returned[label], seen, atol=2)
            elif seen is not None:  # what is dropped was cut to a sliver: under a tenth of the picture's box
                assert np.prod(seen[2:] - seen[:2]) < 0.1 * SIZE[0] * SIZE[1] * 1.5**2


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(scale=0.5, translate=0.3),
        Recipe(scale=0.3, translate=0.1, degrees=45),
        Recipe(scale=0.3, translate=0.1, shear=20),
        Recipe(scale=0.3, translate=0.1, degrees=180, shear=10),
    ],
    ids=["zoom", "rotation", "shear", "all"],
)
def test_affine_boxes_follow_the_pixels(recipe: Recipe) -> None:
    compared = 0
    is_upright = recipe.degrees == recipe.shear == 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        picture, classes, boxes = random_affine(picture_with_box(random_box(generator)), SIZE, recipe, generator)
        seen = bright_box(picture)
        if seen is None or not len(boxes):
            continue
        is_whole = (seen[:2] > 0).all() and (seen[2:] < SIZE[::-1]).all()
        if is_upright or is_whole:  # a turned rectangle that is cut by the border fills its box no more
            np.testing.assert_allclose(boxes[0], seen, atol=2)
            assert classes.tolist() == [0]
            compared += 1
    assert compared >= 12


def test_a_box_that_is_zoomed_away_but_whole_stays() -> None:
    sample = picture_with_box((90, 60, 100, 70))  # 10 px at the centre
    sides = []
    for seed in range(60):
        picture, _, boxes = random_affine(sample, SIZE, Recipe(scale=0.75, translate=0), np.random.default_rng(seed))
        np.testing.assert_allclose(boxes[0], bright_box(picture), atol=2)
        sides.append(boxes[0, 2] - boxes[0, 0])
    assert min(sides) < 3  # under a tenth of its old area


def test_affine_without_limits_changes_nothing() -> None:
    sample = picture_with_box((10, 20, 60, 90))
    same = random_affine(sample, SIZE, STILL, np.random.default_rng(0))
    for before, after in zip(sample, same, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("lr", "ud", "expected"),
    [(0, 0, (10, 20, 60, 90)), (1, 0, (132, 20, 182, 90)), (0, 1, (10, 38, 60, 108)), (1, 1, (132, 38, 182, 108))],
)
def test_flip(lr: int, ud: int, expected: tuple[int, ...]) -> None:
    recipe = Recipe(flip_lr=lr, flip_ud=ud)
    picture, classes, boxes = flip(picture_with_box((10, 20, 60, 90), 2), recipe, np.random.default_rng(0))
    assert boxes.tolist() == [list(expected)]
    assert bright_box(picture, 2).tolist() == list(expected)
    assert classes.tolist() == [2]


@pytest.mark.parametrize(
    ("box", "area", "expected"),
    [
        ((10, 10, 50, 50), 1600, (10, 10, 50, 50)),
        ((-10, -20, 50, 500), 3000, (0, 0, 50, 128)),
        ((100, 50, 999, 60), 1000, (100, 50, 192, 60)),
        ((191, 10, 300, 50), 100, None),  # 1 px wide is left
        ((150, 126.5, 190, 300), 100, None),  # 1.5 px high
        ((190, 10, 300, 50), 80, (190, 10, 192, 50)),  # 2 px wide, all the area
        ((182, 10, 300, 50), 4720, None),  # 8 % of the area
        ((176, 10, 300, 50), 4960, (176, 10, 192, 50)),  # 13 %
        ((-50, 10, -5, 50), 1800, None),
        ((300, 300, 400, 400), 10000, None),
    ],
)
def test_clip_boxes_drops_slivers(box: tuple, area: float, expected: tuple | None) -> None:
    near = (20, 30, 40, 60)  # stays, whatever happens to its neighbour
    classes, boxes = clip_boxes(np.float32([7, 1]), np.float32([box, near]), SIZE, np.float32([area, 600]))
    assert boxes.tolist() == [list(box) for box in (expected, near) if box]
    assert classes.tolist() == ([7, 1] if expected else [1])


@pytest.mark.parametrize("limits", [(0.5, 0, 0), (0, 0.7, 0), (0, 0, 0.4), (0.015, 0.7, 0.4), (1, 1, 1)])
def test_jitter_colour(limits: tuple[float, float, float]) -> None:
    generator = np.random.default_rng(3)
    picture = generator.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    recipe = Recipe(hue=limits[0], saturation=limits[1], value=limits[2])
    before = picture.copy()
    after = jitter_colour(picture, recipe, generator)
    assert (after.shape, after.dtype) == (picture.shape, np.uint8)
    assert not np.array_equal(after, picture)
    np.testing.assert_array_equal(picture, before)
    if not limits[2]:  # value is the largest of the three colours
        np.testing.assert_allclose(after.max(2), picture.max(2), atol=1)


def test_jitter_colour_at_zero_is_the_identity() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    np.testing.assert_array_equal(jitter_colour(picture, STILL, np.random.default_rng(0)), picture)


def test_mixup_blends_and_keeps_all_boxes() -> None:
    first, second = picture_with_box((10, 20, 60, 90), 0), picture_with_box((80, 20, 120, 90), 2)
    picture, classes, boxes = mixup(first, second, np.random.default_rng(0))
    assert classes.tolist() == [0, 2]
    assert boxes.tolist() == [[10, 20, 60, 90], [80, 20, 120, 90]]
    red, blue = int(picture[50, 30, 0]), int(picture[50, 100, 2])
    assert red + blue == pytest.approx(255, abs=1)
    assert min(red, blue) > 60


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_pictures_without_boxes_and_of_any_shape(shape: tuple[int, int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    recipe = Recipe(degrees=30, shear=10, flip_lr=1, flip_ud=1)
    picture = resize_to_fit(np.full((*shape, 3), 255, np.uint8), SIZE)
    joined = mosaic([(picture, *NO_BOXES)] * 4, SIZE, generator)
    for sample in (joined, (picture, *NO_BOXES)):
        moved = flip(random_affine(sample, SIZE, recipe, generator), recipe, generator)
        mixed = mixup(moved, moved, generator)
        assert (jitter_colour(mixed[0], recipe, generator).shape, mixed[0].dtype) == ((*SIZE, 3), np.uint8)
        assert mixed[1].shape == (0,)
        assert mixed[2].shape == (0, 4)
