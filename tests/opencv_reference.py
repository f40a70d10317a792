"""What OpenCV 4 computes of every detector cfg that it loads, with seeded random weights on one picture.

    make opencv-reference

Runs in an environment of its own (OpenCV 5 reads no cfg, and this wants no PyTorch), propagates shapes by itself, and
writes the raw maps before every head as tests/.opencv/NAME.npz. tests/test_opencv.py compares ours with them. Takes
about five minutes and, for the largest network, 4 GB of memory. Needs the cfgs and the picture of the test data
($DARKSLIM_DATA).
"""

import hashlib
import json
import re
import struct
from pathlib import Path

import cv2
import numpy as np

from benchmarks.real_data import ROOT, real_data

OUTPUT = ROOT / "tests/.opencv"
SEED = 1234
GAMMAS = (1.0, 0.85, 0.7, 0.55, 0.4)  # of batch normalisation: the first that keeps the heads out of saturation
SIZES = {"yolov4-p6": (192, 128), "cspx-p7-mish": (256, 128)}  # (width, height); coarsest heads of stride 64 and 128
SIZE = (128, 96)  # not square, so that a swap of the axes shows
PICTURE = "images/alexeyab/data/dog.jpg"
# OpenCV 4.14 takes the convolutions that share another's weights for ones with weights of their own.
WRONG = {"resnet152_trident": "OpenCV reads share_index silently wrong"}

Section = tuple[str, dict[str, str]]


def detectors(data: Path) -> list[Path]:
    """List the cfgs of `data` that end in a [yolo] or [region] head."""
    paths = sorted(data.glob("darknet/**/*.cfg"), key=lambda path: path.stem)
    return [path for path in paths if re.search(r"^\[(yolo|region)\]", read(path), re.MULTILINE)]


def read(path: Path) -> str:
    """Read a cfg; what it says in comments may be of any encoding."""
    return path.read_text(encoding="utf-8", errors="replace")


def adapt(path: Path, width: int, height: int) -> str:
    """Read a cfg, set its input size, and drop xnor and bin_output, which OpenCV computes as plain floats."""
    text = re.sub(r"(?m)^\s*(xnor|bin_output)\s*=.*\n", "", read(path))
    if path.stem == "cspx-p7-mish":
        text = text.replace("num=16", "num=20")  # it lists 20 pairs of anchors, and OpenCV counts them
    for key, value in (("width", width), ("height", height)):
        text = re.sub(rf"(?m)^{key}\s*=.*$", f"{key}={value}", text, count=1)
    return text


def make_weights(text: str, seed: int, gamma: float) -> bytes:
    """Make the weights that the rule in reference/opencv_seeded/manifest.json describes."""
    random = np.random.RandomState(seed)  # the rule's own generator
    parts = []
    for filters, inputs, kernel, has_bn in convolutions(text):
        parts.append(0.1 * random.randn(filters))
        if has_bn:
            parts.append(gamma * (1 + 0.1 * random.randn(filters)))
            parts.append(0.1 * random.randn(filters))
            parts.append(random.uniform(0.5, 1.5, filters))
        fan_in = inputs * kernel * kernel
        parts.append((random.randn(filters * fan_in) * np.sqrt(2 / fan_in)).astype("<f4"))
    return struct.pack("<3iq", 0, 2, 5, 0) + b"".join(part.astype("<f4").tobytes() for part in parts)


def convolutions(text: str) -> list[tuple[int, int, int, bool]]:
    """List (filters, inputs of a filter, kernel, has batch normalisation) of every convolution in order."""
    (_, net), *layers = sections(text)
    channels, found = [int(net.get("channels", 3))], []  # of the image and of every layer
    for index, (name, options) in enumerate(layers):
        before = channels[-1]
        if name == "convolutional":
            filters, groups = number(options, "filters", 1), number(options, "groups", 1)
            has_bn = number(options, "batch_normalize", 0) == 1
            found.append((filters, before // groups, number(options, "size", 1), has_bn))
            channels.append(filters)
        elif name == "route":
            numbers = [int(part) for part in options["layers"].partition("#")[0].split(",") if part]
            places = [place + index if place < 0 else place for place in numbers]
            channels.append(sum(channels[place + 1] for place in places) // number(options, "groups", 1))
        elif name == "scale_channels":
            place = number(options, "from", 0)
            channels.append(channels[(place + index if place < 0 else place) + 1])
        elif name == "reorg":
            channels.append(before * number(options, "stride", 1) ** 2)
        elif name in ("maxpool", "avgpool", "upsample", "shortcut", "sam", "dropout", "yolo", "region"):
            channels.append(before)
        else:
            raise ValueError(f"[{name}] is unknown here")
    return found


def sections(text: str) -> list[Section]:
    """Split a cfg into its sections; white space means nothing, the first of two equal keys wins."""
    found: list[Section] = []
    for line in ("".join(raw.split()) for raw in text.splitlines()):
        if line.startswith("["):
            found.append((line[1 : line.index("]")], {}))
        elif line and line[0] not in "#;":
            key, _, value = line.partition("=")
            found[-1][1].setdefault(key, value)
    return found


def number(options: dict[str, str], key: str, default: int) -> int:
    """Read an integer as C's atoi does: what follows the digits is ignored."""
    match = re.match(r"[-+]?\d+", options.get(key, ""))
    return int(match[0]) if match else default


def run_opencv(text: str, weights: bytes, picture: np.ndarray) -> dict[str, np.ndarray]:
    """Give the map before every head, named by the index of the layer that makes it."""
    (_, net), *layers = sections(text)
    heads = [index for index, (name, _) in enumerate(layers) if name in ("yolo", "region")]
    network = cv2.dnn.readNetFromDarknet(np.frombuffer(text.encode(), np.uint8), np.frombuffer(weights, np.uint8))
    names = network.getLayerNames()
    wanted = [names[names.index(f"permute_{head}") - 1] for head in heads]  # its names of activations count otherwise
    size = (int(net["width"]), int(net["height"]))
    network.setInput(cv2.dnn.blobFromImage(picture, 1 / 255, size, swapRB=True, crop=False))
    maps = network.forward(wanted)
    return {f"raw_layer{head - 1}": each for head, each in zip(heads, maps, strict=True)}


def is_lively(text: str, maps: dict[str, np.ndarray]) -> bool:
    """Tell maps that a comparison means something on: finite, neither near zero nor huge, not saturated."""
    layers = sections(text)[1:]
    for key, values in maps.items():
        options = layers[int(key.removeprefix("raw_layer"))][1]
        if not np.isfinite(values).all():
            return False
        if options.get("activation") == "logistic":
            if np.mean((values > 0.01) & (values < 0.99)) < 0.5:
                return False
        elif not 0.05 < values.std() < 100:
            return False
    return True


def main() -> None:
    """Compute every reference, and write what was done to manifest.json."""
    data = real_data()
    picture = cv2.imread(str(data / PICTURE))
    if picture is None:
        raise SystemExit(f"{data / PICTURE}: cannot be read (set DARKSLIM_DATA)")
    OUTPUT.mkdir(exist_ok=True)
    for old in OUTPUT.iterdir():
        old.unlink()
    cv2.setNumThreads(1)
    manifest = {}
    for path in detectors(data):
        if path.stem in WRONG:
            manifest[path.stem] = {"refused": WRONG[path.stem]}
            continue
        text = adapt(path, *SIZES.get(path.stem, SIZE))
        try:
            cv2.dnn.readNetFromDarknet(np.frombuffer(text.encode(), np.uint8))  # its own reason comes first
            for gamma in GAMMAS:
                weights = make_weights(text, SEED, gamma)
                maps = run_opencv(text, weights, picture)
                if is_lively(text, maps):
                    break
        except cv2.error as error:
            manifest[path.stem] = {"refused": " ".join(error.err.split())}
            print(f"{path.stem}: {manifest[path.stem]['refused']}", flush=True)
            continue
        manifest[path.stem] = {
            "cfg": path.relative_to(data).as_posix(),
            "size": SIZES.get(path.stem, SIZE),
            "seed": SEED,
            "gamma": gamma,
            "is_lively": is_lively(text, maps),
            "weights_bytes": len(weights),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "opencv": cv2.__version__,
        }
        np.savez_compressed(OUTPUT / f"{path.stem}.npz", **maps)
        scales = ", ".join(f"{values.shape[2]}x{values.shape[3]} ±{values.std():.3g}" for values in maps.values())
        print(f"{path.stem}: gamma {gamma}, {scales}", flush=True)
    (OUTPUT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
