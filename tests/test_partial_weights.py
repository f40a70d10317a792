"""Partial `.weights` files of the stock detectors: one that ends on a layer fills the layers before, no other is read.

Of the large networks only the arithmetic runs, on the meta device; of the small ones real files.
"""

import os
import struct
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_opencv import OTHERS, QUICK, STOCK

from benchmarks.compatibility import BEYOND
from models import Darknet, WeightsError, load_cfg, load_weights
from models.weights import count_layers

HEADER = struct.pack("<3iq", 0, 2, 5, 0)
DETECTORS = sorted({*STOCK, *BEYOND, *OTHERS, "Gaussian_yolov3_BDD"})  # the 44, the [region] family, and others
SMALL = sorted({*QUICK, "yolov3-tiny_occlusion_track", "yolov4-tiny_contrastive"})

# Backbones as Darknet's users cut them: the file, a cfg that starts with it, its layers and its bytes
# (darknet-format.md, "Partials"). The classifiers are what two of them are cut from.
BACKBONES = [
    ("darknet53.conv.74", "yolov3", 74, 162_482_580),
    ("darknet53.conv.74", "darknet53", 74, 162_482_580),
    ("darknet53.conv.74", "Gaussian_yolov3_BDD", 74, 162_482_580),
    ("yolov3-tiny.conv.11", "yolov3-tiny", 11, 6_303_188),
    ("yolov3-tiny.conv.15", "yolov3-tiny", 15, 30_973_396),
    ("yolov4.conv.137", "yolov4", 137, 170_038_676),
    ("yolov4.conv.137", "yolov4-custom", 137, 170_038_676),
    ("yolov4-tiny.conv.29", "yolov4-tiny", 29, 19_789_716),
    ("csresnext50-panet-spp.conv.112", "csresnext50-panet-spp", 112, 140_311_316),
    ("enetb0-coco.conv.132", "enet-coco", 132, 14_436_180),
    ("enetb0-coco.conv.132", "efficientnet_b0", 132, 14_436_180),
    ("yolov7-tiny.conv.87", "yolov7-tiny", 87, 17_843_092),
    ("yolov7.conv.132", "yolov7", 132, 121_266_068),
    ("yolov7x.conv.147", "yolov7x", 147, 244_607_860),
    ("yolov4-csp.conv.142", "yolov4-csp", 142, 146_548_116),
    ("yolov4-p5.conv.232", "yolov4-p5", 232, 256_427_412),
    ("yolov4-p6.conv.289", "yolov4-p6", 289, 463_340_948),
    ("yolo-fastest-1.1.conv.109", "yolo-fastest-1.1", 109, 840_692),
]


def load(name: str, shared_data: Path, device: str) -> Darknet:
    (path,) = shared_data.glob(f"darknet/**/{name}.cfg")
    with torch.device(device):
        return Darknet(load_cfg(path))


def ends(model: Darknet) -> list[int]:
    """Count the values of a whole .weights file up to the end of every layer."""
    state = model.state_dict()
    sizes = (sum(state[f"blocks.{i}.{n}"].numel() for n in layer.tensors) for i, layer in enumerate(model.layers))
    return list(accumulate(sizes))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_file_ends_on_a_layer_or_is_refused(name: str, shared_data: Path) -> None:
    model = load(name, shared_data, "meta")
    places = ends(model)
    for layer, (start, end) in enumerate(pairwise([0, *places])):
        if start == end:
            continue
        followers = next((i for i, place in enumerate(places) if place > end), len(places))
        assert count_layers(model, end, "x.weights") == followers
        for inside in {start + 1, end - 1}:
            with pytest.raises(WeightsError, match=rf"^x\.weights: ends inside layer {layer}: .* {inside} values"):
                count_layers(model, inside, "x.weights")
    with pytest.raises(WeightsError, match="is too long"):
        count_layers(model, places[-1] + 1, "x.weights")


def test_the_stock_detectors_are_all_there() -> None:
    assert len({*STOCK, *BEYOND}) == 44
    assert {*STOCK, *BEYOND, *SMALL} < {*DETECTORS}


@pytest.mark.parametrize(("file", "name", "layers", "size"), BACKBONES, ids=lambda value: str(value))
def test_a_backbone_ends_where_its_name_says(file: str, name: str, layers: int, size: int, shared_data: Path) -> None:
    assert file.endswith(f".{layers}")
    model = load(name, shared_data, "meta")
    assert len(HEADER) + 4 * ends(model)[layers - 1] == size
    count = count_layers(model, (size - len(HEADER)) // 4, file)
    assert count >= layers
    assert not any(layer.tensors for layer in model.layers[layers:count])  # what follows needs no file


@pytest.mark.parametrize("name", SMALL)
def test_a_file_fills_its_layers_and_leaves_the_others(name: str, shared_data: Path, tmp_path: Path) -> None:
    model, path = load(name, shared_data, "cpu"), tmp_path / "x.weights"
    places = ends(model)
    values = np.random.default_rng(0).random(places[-1], np.float32)
    path.write_bytes(HEADER + values.tobytes())
    boundaries = sorted(set(places))
    for boundary in [boundaries[-1], boundaries[len(boundaries) // 2], boundaries[0]]:
        for tensor in model.state_dict().values():
            tensor.zero_()
        os.truncate(path, len(HEADER) + 4 * boundary)
        filled = load_weights(model, path)
        assert filled == list(range(sum(place <= boundary for place in places)))
        assert np.array_equal(written(model)[:boundary], values[:boundary])
        assert not written(model)[boundary:].any()
        os.truncate(path, len(HEADER) + 4 * (boundary - 1))
        before = written(model)
        with pytest.raises(WeightsError, match="ends inside layer"):
            load_weights(model, path)
        assert np.array_equal(written(model), before)


def written(model: Darknet) -> np.ndarray:
    """Give the values of the network in the order of a .weights file."""
    state = model.state_dict()
    names = [f"blocks.{i}.{name}" for i, layer in enumerate(model.layers) for name in layer.tensors]
    return np.concatenate([state[name].numpy().ravel() for name in names])
