"""Draw a small detection dataset: paper-cut balloons, sailboats, fish and butterflies on textured backgrounds.

Every class comes in every colour, among clouds, stones, stars, rings, triangles and leaves that belong to no class, so
a detector has to learn shapes. Boxes are measured on the drawn pixels; a picture depends on (seed, split, index) only.

    python -m utils.scenes --output data/demo --train 400 --valid 80 --size 320 --seed 0

prints the path of the written demo.data; 480 pictures take about 12 seconds on one core.
"""

import argparse
import logging
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from utils.cli import run

SAMPLES = {  # file name: seed, (height, width)
    "morning-over-blue-hills.jpg": (5, (480, 640)),
    "boats-on-a-green-sea.jpg": (6, (480, 640)),
    "lagoon-from-above.jpg": (107, (640, 480)),
    "regatta-at-sunset.jpg": (215, (640, 640)),
    "picnic-among-the-leaves.jpg": (305, (450, 800)),
}
SUPERSAMPLING = 4
SOLID = 0.6  # alpha which only a drawing exceeds, not its shadow
Paint = np.ndarray  # RGB [3], 0..1
Layers = list[tuple[np.ndarray, Paint]]  # polygons [N, 2] (x right, y down, any unit) and their colours, back to front


def rgb(lch: tuple[float, float, float]) -> Paint:
    """Convert a CIE lightness (0..100), chroma and hue (degrees), by which colours match better than by HSV; clip."""
    lightness, chroma, hue = lch[0], lch[1], np.deg2rad(lch[2])
    lab = np.array([[[lightness, chroma * np.cos(hue), chroma * np.sin(hue)]]], np.float32)
    return np.clip(cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)[0, 0], 0, 1)


def mix_paints(generator: Generator) -> dict[str, Paint]:
    """Mix a main colour of any hue, an accent that stands away from it, a light and a dark."""
    hue = generator.uniform(0, 360)
    main = rgb((*generator.uniform((42, 38), (70, 68)), hue))
    accent = rgb((*generator.uniform((60, 32), (84, 60)), hue + generator.choice([-70, 45, 140, 180, 215])))
    return {"main": main, "accent": accent, "light": rgb((94, 8, hue + 60)), "dark": rgb((24, 22, hue + 20))}


def ribbon(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the polygon between two curves [N, 2] that run the same way."""
    return np.concatenate([one, other[::-1]])


def blob(points: list[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """Round a closed polygon by cutting its corners three times (Chaikin); a point given twice stays nearly sharp."""
    polygon = np.array(points, float)
    for _ in range(3):
        after = np.roll(polygon, -1, axis=0)
        polygon = np.stack([0.75 * polygon + 0.25 * after, 0.25 * polygon + 0.75 * after], axis=1).reshape(-1, 2)
    return polygon


def draw_balloon(generator: Generator, *, main: Paint, accent: Paint, light: Paint, dark: Paint) -> Layers:
    """Draw a hot-air balloon: ropes, striped envelope, perhaps a band, and a basket."""
    angle = np.linspace(0.42, np.pi, 40)  # from the open mouth of a teardrop to its crown
    width = generator.uniform(0.72, 0.86) * np.sin(angle) * np.sin(angle / 2) ** 0.75
    height = 0.72 * np.cos(angle) - 0.28
    cuts = np.sin(np.linspace(-np.pi / 2, np.pi / 2, generator.choice([6, 8, 10])))
    net = np.stack([np.outer(width, cuts), height[:, None] + 0.14 * np.outer(width, 1 - cuts**2)], axis=2)
    pair = ((main, accent), (main, light), (accent, main))[generator.integers(3)]
    layers = [(CIRCLE * (0.018, 0.2) + (x, 0.55), dark) for x in (-0.16, -0.05, 0.05, 0.16)]
    layers += [(ribbon(net[:, i], net[:, i + 1]), pair[i % 2]) for i in range(len(cuts) - 1)]
    row = generator.integers(14, 24)
    bands = [(row, row + 7, dark), (row + 1, row + 6, light)] * (generator.random() < 0.6) + [(0, 3, dark)]
    layers += [(ribbon(net[upper], net[lower]), paint) for upper, lower, paint in bands]
    basket = blob([(-0.17, 0.72)] * 2 + [(0.17, 0.72)] * 2 + [(0.14, 1), (-0.14, 1)])
    return [*layers, (basket, rgb((45, 30, 60))), (CIRCLE * (0.2, 0.045) + (0, 0.73), rgb((68, 30, 70)))]


def draw_sailboat(generator: Generator, *, main: Paint, accent: Paint, light: Paint, dark: Paint) -> Layers:
    """Draw a sailing boat: mast, mainsail with stripes, jib, pennant and a hull with a light rail."""
    top, reach, fore = generator.uniform((-1, 0.65, 0.65), (-0.8, 0.85, 1))
    down = np.linspace(0, 1, 21)[:, None]
    luff = (0.06, top) + down * (0, 0.3 - top)
    leech = luff + (reach * down + 0.14 * np.sin(np.pi * down)) * (1, 0)
    sail, stripe, rows = ((light, main, (4, 12)), (accent, light, (9,)), (main, accent, (12,)))[generator.integers(3)]
    layers = [(CIRCLE * (0.035, 0.8) + (0, top + 0.7), rgb((38, 25, 60))), (ribbon(luff, leech), sail)]
    layers += [(ribbon(luff[row : row + 5], leech[row : row + 5]), stripe) for row in rows]
    layers.append((ribbon(luff, leech) * (-fore, 0.88), stripe))
    layers.append((np.array([(0, top - 0.12), (0, top + 0.04), (-0.26, top - 0.05)]), main))
    hull = blob([(-0.95, 0.38)] * 2 + [(0.85, 0.42)] * 2 + [(0.68, 0.85), (-0.55, 0.88)])
    rail = np.array([(-0.9, 0.4), (0.84, 0.44), (0.81, 0.55), (-0.82, 0.53)])
    return [*layers, (hull, (main, dark)[generator.integers(2)]), (rail, light)]


def draw_fish(generator: Generator, *, main: Paint, accent: Paint, light: Paint, dark: Paint) -> Layers:
    """Draw a fish: forked tail, fins, a body with light belly and stripes, and an eye."""
    tall, fork, fin = generator.uniform((0.38, 0.3, 0.12), (0.54, 0.5, 0.28))
    along = np.linspace(0, 1, 41)
    half = tall * np.sin(np.pi * along**0.75) ** 0.8 + 0.06 * along
    back, middle, belly = (np.stack([1.45 * along - 0.95, side * half], axis=1) for side in (-1, 0.45, 1))
    tail = [(0.35, 0), (0.62, -0.1)] + [(1, -fork)] * 2 + [(0.86, 0)] + [(1, fork)] * 2 + [(0.62, 0.1)]
    upper = [(-0.5, -0.6 * tall), (-0.2, -tall - fin), (0.15, -tall - fin), (0.2, -tall), (0.4, -0.1)]
    lower = CIRCLE * (0.15, 0.1 + 0.9 * fin) + (0.12, 0.9 * tall)
    layers = [(points, accent) for points in (blob(tail), blob(upper), lower)]
    layers += [(ribbon(back, belly), main), (ribbon(middle, belly), 0.45 * main + 0.55 * light)]
    rows = ((16, 24, 32), (17, 28), (), (16,))[generator.integers(4)]
    layers += [(ribbon(back[row : row + 5], belly[row : row + 5]), light) for row in rows]
    layers.append((blob([(-0.3, 0.02), (0.05, 0.0), (0.12, 0.26), (-0.12, 0.24)]), accent))
    return [*layers, (0.13 * CIRCLE + (-0.62, -0.1), light), (0.075 * CIRCLE + (-0.64, -0.1), dark)]


def draw_butterfly(generator: Generator, *, main: Paint, accent: Paint, light: Paint, dark: Paint) -> Layers:
    """Draw a butterfly: four bordered and spotted wings, one side foreshortened, feelers and a body."""
    spread, drop, fold = generator.uniform((0.85, 0.75, 0.55), (1.1, 1.0, 1.0))
    upper = blob([(0.02, -0.12), (0.2, -0.55), (0.6, -0.98), (1.05, -0.85), (0.95, -0.3), (0.7, 0.02), (0.2, 0.05)])
    lower = blob([(0.02, 0.0), (0.45, -0.02), (0.8, 0.15), (0.75, 0.6), (0.45, 0.95), (0.22, 0.7), (0.05, 0.3)])
    border, front, back = ((dark, main, accent), (main, accent, light), (light, main, accent))[generator.integers(3)]
    half = []
    for wing, paint in ((lower * (1, drop), back), (upper * (spread, 1), front)):
        half += [(wing, border), (0.76 * wing + 0.2 * wing.mean(axis=0), paint)]
    half += [(0.12 * CIRCLE + (0.78 * spread, -0.62), light), (0.1 * CIRCLE + (0.52, 0.48 * drop), border)]
    feeler = blob([(-0.02, -0.3), (0.06, -0.62), (0.31, -0.89), (0.31, -0.82), (0.12, -0.62), (0.02, -0.3)])
    half += [(feeler, dark), (0.055 * CIRCLE + (0.29, -0.84), dark)]
    wings = [(points * (side, 1), paint) for side in (1, -fold) for points, paint in half]
    return [*wings, (CIRCLE * (0.075, 0.45) + (0, 0.12), dark), (0.1 * CIRCLE + (0, -0.33), dark)]


def draw_distractor(generator: Generator, *, main: Paint, accent: Paint, light: Paint, dark: Paint) -> Layers:
    """Draw a thing of no class in the colours of the classes: a cloud, stone, star, ring, triangle or leaf."""
    return (
        [(size * CIRCLE + (x, -0.8 * size), light) for x, size in ((-0.7, 0.4), (-0.1, 0.65), (0.6, 0.5), (1, 0.3))],
        [(blob(CIRCLE[::4] * generator.uniform(0.65, 1, (10, 1)) * (1, 0.7)), 0.4 * main + 0.35)],
        [(blob(np.repeat(CIRCLE[::4] * np.tile([[1.0], [0.5]], (5, 1)), 2, axis=0)), accent)],
        [(CIRCLE, main), (0.7 * CIRCLE, light), (0.36 * CIRCLE, accent)],
        [(blob([(-0.8, 0.7)] * 2 + [(0.8, 0.6)] * 2 + [(generator.uniform(-0.8, 0.8), -1)] * 2), main)],
        [(LEAF, main), (CIRCLE * (0.95, 0.035) - (0.3, 0), dark)],
    )[generator.integers(6)]


CIRCLE = np.stack([np.cos(np.arange(40) * np.pi / 20), np.sin(np.arange(40) * np.pi / 20)], axis=1)
LEAF = blob([(-1, 0), (-1, 0), (-0.5, -0.4), (0.3, -0.4), (1, 0), (1, 0), (0.3, 0.4), (-0.5, 0.4)])
SHAPES = {"balloon": draw_balloon, "sailboat": draw_sailboat, "fish": draw_fish, "butterfly": draw_butterfly}
CLASSES = tuple(SHAPES)


def render(layers: Layers, generator: Generator, *, longer: float, light: np.ndarray) -> np.ndarray:
    """Turn, stretch and rasterise a drawing, its longer side `longer` pixels, embossed towards `light` (x, y).

    Returns premultiplied RGB and alpha (0..1), float32 [h, w, 4]; its shadow's alpha stays below SOLID.
    """
    turn, stretch = generator.uniform(-0.5, 0.5), generator.choice([-1, 1]) * generator.uniform(0.85, 1.15)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    vertices = np.concatenate([points for points, _ in layers]) * (stretch, 1) @ matrix
    vertices = (vertices - vertices.min(axis=0)) * longer / np.ptp(vertices, axis=0).max()
    margin = 2 + int(0.15 * longer)
    width, height = np.ceil(vertices.max(axis=0)).astype(int) + 2 * margin
    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING, 4), np.uint8)
    pixels = np.round((vertices + margin) * SUPERSAMPLING).astype(np.int32)
    for points, paint in layers:
        cv2.fillPoly(canvas, [pixels[: len(points)]], (*(255.0 * paint).tolist(), 255))
        pixels = pixels[len(points) :]
    patch = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    soft = cv2.GaussianBlur(patch[..., 3], (0, 0), 0.06 * longer)
    # The blurred outline, moved away from the light: lit and shaded edges, and the shadow.
    cast = np.roll(soft, np.round(-0.06 * longer * light[::-1]).astype(int), axis=(0, 1))
    patch[..., :3] *= np.clip(1 + 2.6 * (soft - cast), 0.6, 1.35)[..., None]
    patch[..., 3] += (1 - patch[..., 3]) * 0.4 * cast
    return patch


def fractal(generator: Generator, size: tuple[int, int], *, rows: int, columns: int) -> np.ndarray:
    """Return smooth noise [H, W] that fills 0..1: five octaves, the coarsest of rows x columns cells."""
    grids = [generator.random(((rows << k) + 1, (columns << k) + 1), dtype=np.float32) for k in range(5)]
    octaves = [cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC) * 0.5**k for k, grid in enumerate(grids)]
    return cv2.normalize(sum(octaves), None, 0, 1, cv2.NORM_MINMAX)


def paint_background(generator: Generator, size: tuple[int, int]) -> np.ndarray:
    """Paint a cloudy sky, rippled water, layered dunes, foliage or cut-paper strata: RGB float32 [H, W, 3]."""
    height, width = size
    hue, lightness = generator.uniform(0, 360), generator.uniform(45, 82)
    far = rgb((lightness + 14, generator.uniform(10, 36), hue + generator.uniform(-80, 80)))
    near = rgb((lightness - 16, generator.uniform(18, 44), hue))
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    noise, shadow, kind = fractal(generator, size, rows=2, columns=3), np.ones(size, np.float32), generator.integers(5)
    if kind == 0:
        share = 1 - y - np.clip(2.5 * fractal(generator, size, rows=5, columns=2) - 1.2, 0, 1)
    elif kind == 1:
        share = 0.15 + 0.7 * y + 0.15 * np.sin(2 * np.pi * (22 * (y + 0.15) ** 0.6 + 3 * noise)) ** 3
    elif kind == 2:
        share = 0.25 * y + 0.1 * noise
        for depth in np.linspace(0.2, 1, 5):
            above = height * (0.15 + 0.75 * depth - y + 0.2 * fractal(generator, (1, width), rows=1, columns=2) - 0.1)
            hidden = 1 - np.clip(above + 0.5, 0, 1)
            shadow = hidden + (1 - hidden) * shadow * (1 - 0.3 * np.exp(-above.clip(0) / (0.05 * height)))
            share = hidden * (depth + 0.08 * noise) + (1 - hidden) * share
    elif kind == 3:
        tones = np.full(size, 235, np.uint8)
        for tone in np.linspace(235, 30, 110) + generator.uniform(-25, 25, 110):
            spine = generator.normal(0, 0.08 * min(size), 2)
            points = LEAF @ [spine, spine[::-1] * (-0.9, 0.9)] + generator.random(2) * (width, height)
            cv2.fillPoly(tones, [np.round(points * 16).astype(np.int32)], tone, cv2.LINE_AA, 4)
        share = tones / np.float32(255) + 0.15 * noise
    else:
        steps = 5.99 * cv2.GaussianBlur(noise, (0, 0), min(size) / 60)
        share, shadow = np.floor(steps) / 5, 1 - 0.3 * (steps % 1) ** 6
    return (far + share[..., None] * (near - far)) * shadow[..., None]


def lay(picture: np.ndarray, owner: np.ndarray, *, patch: np.ndarray, left: int, top: int) -> bool:
    """Lay a patch onto the picture and, under a new number, the owner map, in place; refuse (False) a crowded place."""
    window = np.s_[max(top, 0) : top + patch.shape[0], max(left, 0) : left + patch.shape[1]]
    seen = patch[max(-top, 0) : owner.shape[0] - top, max(-left, 0) : owner.shape[1] - left]
    mask, area, number = seen[..., 3] > SOLID, (patch[..., 3] > SOLID).sum(), owner.max() + 1
    hidden, visible = (np.bincount(own, minlength=number)[1:] for own in (owner[window][mask], owner.ravel()))
    # Of the patch, at most 30 % outside and 30 % on others; of what is seen of another, at most 25 % hidden by it.
    if mask.sum() < 0.7 * area or hidden.sum() > 0.3 * area or (hidden > 0.25 * visible).any():
        return False
    picture[window] = picture[window] * (1 - seen[..., 3:]) + seen[..., :3]
    owner[window][mask] = number
    return True


def draw_scene(generator: Generator, *, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw 1..8 objects (none in 3 % of pictures) and some distractors, all that find room, sized by the shorter side.

    Returns the picture, RGB uint8 [H, W, 3], the classes [N], and boxes around what is seen, xyxy_px int [N, 4].
    """
    picture, owner, kinds = paint_background(generator, size), np.zeros(size, np.int64), []
    light = np.array([generator.uniform(-0.8, 0.8), -1])
    count = 0 if generator.random() < 0.03 else generator.integers(1, 9)
    wanted = [*generator.integers(len(CLASSES), size=count), *[-1] * generator.integers(2, 7)]  # -1: a distractor
    for kind in generator.permutation(wanted):
        drawing = (draw_distractor if kind < 0 else SHAPES[CLASSES[kind]])(generator, **mix_paints(generator))
        # At 320 pixels 20..150 (distractors 20..90), small ones more often.
        longer = min(size) / 16 * (4.5 if kind < 0 else 7.5) ** generator.random() ** 0.8
        patch = render(drawing, generator, longer=longer, light=light)
        places = (generator.random((20, 2)) * size[::-1] - np.array(patch.shape[1::-1]) / 2).astype(int)
        if any(lay(picture, owner, patch=patch, left=left, top=top) for left, top in places):
            kinds.append(kind)
    found = [cv2.boundingRect((owner == i).astype(np.uint8)) for i, kind in enumerate(kinds, start=1) if kind >= 0]
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in found], int).reshape(-1, 4)
    y, x = np.linspace(-1, 1, size[0])[:, None, None], np.linspace(-1, 1, size[1])[:, None]
    picture *= 1 + 0.1 * (light[0] * x + light[1] * y) - 0.06 * (x * x + y * y)
    picture = cv2.GaussianBlur(picture, (0, 0), generator.uniform(0.25, 0.7))
    picture += generator.uniform(0.003, 0.012) * generator.standard_normal((*size, 1), np.float32)
    return (255 * picture.clip(0, 1)).astype(np.uint8), np.array([k for k in kinds if k >= 0], int), boxes


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture as JPEG of quality 90, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1])


def write_dataset(folder: Path | str, *, train: int, valid: int, size: int, seed: int) -> Path:
    """Write pictures of size x size with labels, lists and names in Darknet's layout; return the path of demo.data."""
    folder = Path(folder)
    data = folder / "demo.data"
    if data.exists():
        logging.getLogger("darkslim").info("%s is overwritten; files beyond the new counts stay, unlisted", data)
    for split, (name, count) in enumerate((("train", train), ("valid", valid))):
        files = [f"images/{name}/{index:05d}.jpg" for index in range(count)]
        (folder / "labels" / name).mkdir(parents=True, exist_ok=True)
        for index, file in enumerate(tqdm(files, desc=name, unit="picture")):
            picture, classes, boxes = draw_scene(np.random.default_rng([seed, split, index]), size=(size, size))
            write_picture(folder / file, picture)
            xywh_n = np.hstack([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]]) / size
            np.savetxt(folder / f"labels/{name}/{index:05d}.txt", np.c_[classes, xywh_n], fmt="%d" + 4 * " %.6f")
        (folder / f"{name}.txt").write_text("".join(f"{file}\n" for file in files))
    (folder / "demo.names").write_text("".join(f"{name}\n" for name in CLASSES))
    data.write_text(f"classes={len(CLASSES)}\ntrain=train.txt\nvalid=valid.txt\nnames=demo.names\n")
    return data


def main(argv: list[str] | None = None) -> None:
    """Write the dataset, or the sample pictures, and print where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("data/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--train", type=int, default=400, help="training pictures (default: %(default)s)")
    parser.add_argument("--valid", type=int, default=80, help="validation pictures (default: %(default)s)")
    parser.add_argument("--size", type=int, default=320, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every picture (default: %(default)s)")
    parser.add_argument("--samples", type=Path, help="write only the pictures of data/samples, there")
    args = parser.parse_args(argv)
    if args.size < 64 or min(args.train, args.valid) < 1 or args.seed < 0:
        parser.error("expected --size of at least 64, --train and --valid of at least 1, --seed of at least 0")
    if args.samples is None:
        print(write_dataset(args.output, train=args.train, valid=args.valid, size=args.size, seed=args.seed))
        return
    for name, (seed, size) in SAMPLES.items():
        write_picture(args.samples / name, draw_scene(np.random.default_rng(seed), size=size)[0])
        print(args.samples / name)


if __name__ == "__main__":
    run(main)
