"""Our raw heads beside OpenCV's, for tests/test_opencv.py and the table of docs/darknet-compatibility.md."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import opencv_reference
import torch

from benchmarks.real_data import real_data
from models import Darknet, load_weights, parse

DATA = real_data()
COMPUTED, SHARED = opencv_reference.OUTPUT, DATA / "reference/opencv_seeded"


class Reference(NamedTuple):
    """A stored reference: where its maps are, and how its weights were made."""

    maps: Path
    cfg: Path
    size: tuple[int, int]  # (width, height)
    seed: int
    gamma: float
    sha256: str


def find(name: str) -> tuple[str, Reference | None]:
    """Give the source of a reference, and the reference, where there is one."""
    maps = COMPUTED / f"{name}.npz"
    manifest = COMPUTED / "manifest.json"
    item = json.loads(manifest.read_text()).get(name, {}) if manifest.exists() else {}
    if maps.exists() and "cfg" in item and (DATA / item["cfg"]).exists():
        rule = (tuple(item["size"]), item["seed"], item["gamma"], item["weights_sha256"])
        return "computed", Reference(maps, DATA / item["cfg"], *rule)
    for maps in SHARED.glob(f"{name}_dog_*.npz"):
        items = json.loads((SHARED / "manifest.json").read_text())["items"]
        (item,) = (item for item in items if item["cfg"] == f"{name}.cfg")
        rule = (tuple(item["net_wh"]), item["seed"], item["gamma"], item["weights_sha256"])
        return "shared", Reference(maps, DATA / "darknet/official-cfg" / item["cfg"], *rule)
    return "none", None


def compare(reference: Reference, folder: Path) -> float:
    """Give the largest difference between our raw heads and OpenCV's, relative to the largest value of the map."""
    width, height = reference.size
    text = opencv_reference.adapt(reference.cfg, width, height)
    data = opencv_reference.make_weights(text, reference.seed, reference.gamma)
    assert hashlib.sha256(data).hexdigest() == reference.sha256
    (folder / "seeded.weights").write_bytes(data)
    del data
    model = Darknet(parse(text, str(reference.cfg))).eval()
    assert len(load_weights(model, folder / "seeded.weights")) == len(model.layers)
    (folder / "seeded.weights").unlink()
    picture = cv2.cvtColor(cv2.imread(str(DATA / opencv_reference.PICTURE)), cv2.COLOR_BGR2RGB)
    x = torch.from_numpy(cv2.resize(picture, (width, height)) / np.float32(255)).permute(2, 0, 1)  # [3, H, W]
    with torch.inference_mode():
        heads = model(x[None])
    with np.load(reference.maps) as stored:
        maps = {key: stored[key] for key in stored if key.startswith("raw")}
    assert [f"raw_layer{head.layer - 1}" for head in model.heads] == list(maps)
    return max(
        float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())
        for ours, theirs in zip(heads, maps.values(), strict=True)
    )
