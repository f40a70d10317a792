"""Real weights against what OpenCV 4.14 and the original Darknet (59596d78) make of them; see $DARKSLIM_DATA/README.md.

The two differ: Darknet's batch normalisation has an epsilon of 1e-5, OpenCV's and ours 1e-6; Darknet stretches pictures
between the centres of the corner pixels; OpenCV zeroes scores under 0.2 and lists rows by (row, column, anchor).
"""

import hashlib
import json
import struct
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from networks import seeded
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from models import CfgError, Darknet, load_cfg, load_model, load_weights
from models.layers_conv import Convolution
from models.yolo import HeadSpec, decode

NETWORKS = {
    "mbv2-yolo-fastest-voc-v1": "MobileNetV2-YOLO-Fastest-voc",
    "mbv2-yolov3-nano-voc": "MobileNetV2-YOLOv3-Nano-voc",
    "yolo-fastest-1.1": "yolo-fastest-1.1",
    "yolo-fastest-1.1-xl": "yolo-fastest-1.1-xl",
    "yolo-lite-trial3": "tiny-yolov2-trial3",
    "yolo-lite-trial3-noBatch": "tiny-yolov2-trial3-noBatch",
    "yoloface-500k-v1": "yoloface-500k",
}
OPENCV = [
    "mbv2-yolov3-nano-voc_dog_320x320",
    "yolo-fastest-1.1-xl_dog_320x320",
    "yolo-fastest-1.1_dog_320x320",
    "yolo-lite-trial3-noBatch_dog_224x224",
    "yolo-lite-trial3_dog_224x224",
    "yoloface-500k-v1_zidane_320x256",
]
SEEDED = ["yolov3-tiny_dog_416x416", "yolov4-tiny_dog_416x416"]
NO_RESIZE, LETTERBOX = "yolo-fastest-1.1-xl_dog320png", "yolo-fastest-1.1-xl_letterbox"
KEYS = ("center_x", "center_y", "width", "height")
FOLDERS = {
    "opencv_raw/*.npz": {*OPENCV},
    "opencv_seeded/*.npz": {*SEEDED},
    "darknet/*.json": {*NETWORKS, NO_RESIZE, LETTERBOX},
}


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(f"**/{pattern}")
    return path


def load(shared_data: Path, key: str) -> Darknet:
    stem = NETWORKS[key]
    return load_model(
        one(shared_data / "darknet", f"{stem}.cfg"), one(shared_data / "darknet", f"{stem}.weights")
    ).eval()


def read(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)  # [H, W, 3]


def tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))[None]  # [1, 3, H, W]


def rows(part: Tensor, spec: HeadSpec) -> np.ndarray:
    """Order decoded rows [1, A*H*W, n] by (row, column, anchor), as OpenCV does."""
    return part.view(len(spec.anchors), -1, part.shape[-1]).transpose(0, 1).flatten(0, 1).numpy()


def assert_like_opencv(model: Darknet, image: Path, reference: Path) -> None:
    """Compare raw heads and decoded rows of a stretched picture."""
    width, height = map(int, reference.stem.rpartition("_")[2].split("x"))
    with torch.inference_mode():
        heads = model(tensor(cv2.resize(read(image), (width, height)) / np.float32(255)))
    arrays = np.load(reference)
    raws = [arrays[key] for key in arrays if key.startswith("raw")]
    decoded = [arrays[key] for key in arrays if key.startswith("decoded")]
    for head, spec, raw, wanted in zip(heads, model.heads, raws, decoded, strict=True):
        assert np.abs(head.numpy() - raw).max() <= 1e-4 * np.abs(raw).max()
        boxes, scores = (rows(part, spec) for part in decode(head, spec, (height, width)))
        places = wanted[:, :4] * [width, height, width, height]
        assert (
            np.abs(boxes - places) < np.maximum(0.5, 1e-4 * places)
        ).all()  # random weights make boxes of 10^5 pixels
        told = wanted[:, 5:] > 0
        assert np.abs(scores - wanted[:, 5:])[told].max(initial=0) < 1e-3
        if not spec.is_softmax:  # OpenCV's [region] suppresses overlapping boxes too
            assert scores[~told].max() < 0.2 + 1e-3


@pytest.mark.parametrize("reference", OPENCV)
def test_heads_and_boxes_are_opencvs(reference: str, shared_data: Path) -> None:
    key, picture, _ = reference.rsplit("_", 2)
    image = one(shared_data / "images", f"{picture}.jpg")
    assert_like_opencv(load(shared_data, key), image, shared_data / f"reference/opencv_raw/{reference}.npz")


def seeded_weights(model: Darknet, seed: int, gamma: float) -> bytes:
    """Make the weights that the rule in opencv_seeded/manifest.json describes."""
    random = np.random.RandomState(seed)  # the rule's own generator
    parts = []
    for block in model.blocks:
        if not isinstance(block, Convolution):
            continue
        filters, shape = block.conv.out_channels, block.conv.weight.shape
        parts.append(0.1 * random.randn(filters))
        if isinstance(block.bn, nn.BatchNorm2d):
            parts.append(gamma * (1 + 0.1 * random.randn(filters)))
            parts.append(0.1 * random.randn(filters))
            parts.append(random.uniform(0.5, 1.5, filters))
        parts.append(random.randn(*shape) * np.sqrt(2 / shape[1:].numel()))
    return struct.pack("<3iq", 0, 2, 5, 0) + b"".join(part.astype("<f4").tobytes() for part in parts)


@pytest.mark.parametrize("reference", SEEDED)
def test_heads_and_boxes_of_seeded_weights_are_opencvs(reference: str, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "reference/opencv_seeded"
    manifest = json.loads((folder / "manifest.json").read_text())
    (item,) = (item for item in manifest["items"] if item["cfg"] == reference.split("_")[0] + ".cfg")
    model = Darknet(load_cfg(shared_data / "darknet/official-cfg" / item["cfg"])).eval()
    data = seeded_weights(model, item["seed"], item["gamma"])
    assert hashlib.sha256(data).hexdigest() == item["weights_sha256"]
    (tmp_path / "seeded.weights").write_bytes(data)
    assert len(load_weights(model, tmp_path / "seeded.weights")) == len(model.layers)
    assert_like_opencv(model, shared_data / manifest["image"], folder / f"{reference}.npz")


def stretch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [H, W, 3] as Darknet does: bilinear, corner pixel to corner pixel, columns first."""
    for axis, new in ((1, width), (0, height)):
        old = image.shape[axis]
        position = np.linspace(0, old - 1, new, dtype=np.float32)
        low = np.minimum(position.astype(int), old - 2)
        part = np.expand_dims(position - low, tuple({0, 1, 2} - {axis})).astype(np.float32)
        image = image.take(low, axis) * (1 - part) + image.take(low + 1, axis) * part
    return image


def candidates(model: Darknet, image: np.ndarray, *, is_letterboxed: bool) -> tuple[Tensor, Tensor]:
    """Decode a picture [H, W, 3] in 0..1 as Darknet resizes it: boxes xywh_n of the picture, and scores."""
    (height, width), (h, w) = model.size, model.size  # of the network's input and of the picture in it
    if is_letterboxed:
        scale = min(height / image.shape[0], width / image.shape[1])
        h, w = int(image.shape[0] * scale), int(image.shape[1] * scale)
    top, left = (height - h) // 2, (width - w) // 2
    canvas = np.full((height, width, 3), 0.5, np.float32)
    canvas[top : top + h, left : left + w] = image if image.shape[:2] == (h, w) else stretch(image, h, w)
    with torch.inference_mode():
        (boxes,), (scores,) = model.decode(model(tensor(canvas)), model.size)
    return (boxes - torch.tensor([left, top, 0, 0])) / torch.tensor([w, h, w, h]), scores


def assert_like_darknet(model: Darknet, shared_data: Path, reference: str, *, pixels: float, score: float) -> None:
    """Find each of Darknet's detections among ours, within `pixels` and `score`, and each of ours below one of them."""
    height, width = model.size
    for frame in json.loads((shared_data / f"reference/darknet/{reference}.json").read_text()):
        image = read(shared_data / frame["filename"]) / np.float32(255)
        boxes, scores = candidates(model, image, is_letterboxed=reference == LETTERBOX)
        places = [[each["relative_coordinates"][key] for key in KEYS] for each in frame["objects"]]
        labels = torch.tensor([each["class_id"] for each in frame["objects"]])
        confidences = torch.tensor([each["confidence"] for each in frame["objects"]])
        wanted = torch.tensor(places)  # [M, 4]
        distance = (boxes[:, None] - wanted).mul(torch.tensor([width, height] * 2)).abs().amax(-1)  # [N, M]
        is_there = (distance < pixels) & ((scores[:, labels] - confidences).abs() < score)  # [N, M]
        assert is_there.any(0).all(), frame["filename"]
        index, ours = (scores > 0.1 + score).nonzero(as_tuple=True)  # Darknet ran with -thresh 0.1
        iou = box_iou(box_convert(boxes[index], "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        assert ((iou > 0.4) & (ours[:, None] == labels)).any(1).all(), frame["filename"]  # its NMS cuts at 0.45


@pytest.mark.parametrize("reference", [*NETWORKS, LETTERBOX])
def test_detections_are_darknets(reference: str, shared_data: Path) -> None:
    # measured: JPEG decoders differ, which moves scores by up to 0.018 and boxes by up to 0.65 pixels
    key = reference.removesuffix("_letterbox")
    assert_like_darknet(load(shared_data, key), shared_data, reference, pixels=1, score=0.02)


def test_detections_on_a_lossless_picture_that_needs_no_resize_are_darknets(shared_data: Path) -> None:
    model = load(shared_data, NO_RESIZE.removesuffix("_dog320png"))
    assert_like_darknet(model, shared_data, NO_RESIZE, pixels=0.5, score=1e-3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5  # Darknet's: all that was left between the two
    assert_like_darknet(model, shared_data, NO_RESIZE, pixels=1e-3, score=1e-5)


def test_every_reference_is_compared(shared_data: Path) -> None:
    found = {kind: {path.stem for path in shared_data.glob(f"reference/{kind}")} for kind in FOLDERS}
    assert found == FOLDERS


REFUSED = {  # official cfgs that are no detectors or classifiers of pictures
    "crnn.train": "1: [net] with inputs= and no width= is a recurrent text model, which Darkslim does not build",
    "gru": "14: [gru] is a recurrent text model, which Darkslim does not build",
    "jnet-conv": "115: the cfg has no head (end it with a [yolo] section)",
    "lstm.train": "15: [lstm] is a recurrent text model, which Darkslim does not build",
    "rnn": "14: [rnn] is a recurrent text model, which Darkslim does not build",
    "rnn.train": "14: [rnn] is a recurrent text model, which Darkslim does not build",
    "t1.test": "103: [detection] is the head of YOLOv1, which Darkslim does not build",
    "vgg-conv": "118: the cfg has no head (end it with a [yolo] section)",
    "yolo9000": "198: [region] with a tree of classes is the head of YOLO9000, which Darkslim does not build",
}
BYTES = {  # of .weights, where official_cfg_sizes.tsv is silent: darknet-format.md, appendix A and "Extra byte sizes"
    "Gaussian_yolov3_BDD": 246_585_408,
    "darknet19": 83_427_124,
    "darknet53": 166_582_580,
    "efficientnet-lite3": 30_091_444,
    "efficientnet_b0": 19_560_180,
    "resnet50": 91_303_604,
    "yolov3-tiny_occlusion_track": 62_656_100,
    "yolov4-tiny_contrastive": 29_561_736,
}


def check_shape(wanted: tuple[int, ...], _module: nn.Module, _inputs: object, output: Tensor) -> None:
    assert tuple(output.shape) == wanted


def test_official_cfgs_have_their_size_and_run_or_are_refused(shared_data: Path) -> None:
    lines = (shared_data / "reference/official_cfg_sizes.tsv").read_text().splitlines()[1:]
    wanted = {Path(cells[0]).stem: int(cells[3]) for cells in (line.split("\t") for line in lines)} | BYTES
    wanted = {name: size for name, size in wanted.items() if name not in REFUSED}
    paths = sorted(shared_data.glob("darknet/official-cfg/*.cfg"))
    assert len(paths) > 80
    refused, sizes = {}, {}
    for path in paths:
        try:
            with torch.device("meta"):  # sizes alone: nothing is computed
                model = Darknet(load_cfg(path)).eval()
        except CfgError as error:
            refused[path.stem] = str(error).removeprefix(f"{path}:")
            continue
        for index, block in enumerate(model.blocks):
            wanted_shape = (1, model.layers[index].channels, *model.layers[index].size)
            block.register_forward_hook(partial(check_shape, wanted_shape))
        model(torch.zeros(1, model.channels, *model.size, device="meta"))
        state = model.state_dict()
        names = [f"blocks.{i}.{name}" for i, layer in enumerate(model.layers) for name in layer.tensors]
        assert {*state} - {*names} == {name for name in state if name.endswith("num_batches_tracked")}
        sizes[path.stem] = 20 + 4 * sum(state[name].numel() for name in names)
    assert refused == REFUSED
    assert {name: sizes[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "name", ["cifar", "darknet", "densenet201", "efficientnet_b0", "efficientnet-lite3", "resnet50"]
)
def test_official_classifiers_give_class_scores(name: str, shared_data: Path) -> None:
    model = seeded(shared_data / f"darknet/official-cfg/{name}.cfg")
    height, width = model.size
    picture = cv2.resize(read(shared_data / "images/alexeyab/data/dog.jpg"), (width, height)) / np.float32(255)
    with torch.inference_mode():
        (scores,) = model(tensor(picture))
    assert model.heads == []
    assert scores.shape == (1, 10 if name == "cifar" else 1000, 1, 1)
    assert scores.sum() == pytest.approx(1, abs=1e-4)
    assert scores.min() >= 0
    assert scores.max() > 1.2 / scores.numel()  # not the same for every class
