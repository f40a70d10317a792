"""Raw heads of every detector cfg that OpenCV 4.14 loads, against OpenCV's on the same seeded weights and picture.

`make opencv-reference` stores what OpenCV computes under tests/.opencv, for all of them; without it, what stands in
$DARKSLIM_DATA/reference/opencv_seeded is compared. Each test's name says which: computed, shared or none.
"""

import hashlib
import json
from pathlib import Path

import opencv_reference
import pytest
from opencv_comparison import COMPUTED, DATA, SHARED, compare, find

TOLERANCE = 1e-4  # of the largest value of a map

# The 39 stock detectors that OpenCV 4.14 loads, less resnet152_trident, which it reads wrong.
STOCK = """cd53paspp-gamma csresnext50-panet-spp csresnext50-panet-spp-original-optimal enet-coco yolo-fastest
    yolo-fastest-1.1 yolo-fastest-1.1-xl yolo-fastest-1.1_body yolo-fastest-xl yolov3 yolov3-openimages yolov3-spp
    yolov3-tiny yolov3-tiny-prn yolov3-tiny_3l yolov3-tiny_obj yolov3-tiny_xnor yolov3.coco-giou-12 yolov3_5l yolov4
    yolov4-csp yolov4-csp-s-mish yolov4-csp-swish yolov4-csp-x-mish yolov4-csp-x-swish yolov4-csp-x-swish-frozen
    yolov4-custom yolov4-p5 yolov4-p5-frozen yolov4-p6 yolov4-tiny yolov4-tiny-3l yolov4-tiny-custom yolov4_new
    yolov4x-mish yolov7 yolov7-tiny yolov7x""".split()
REFUSED = """cspx-p7-mish_hp resnet152_trident yolo9000 yolov3-tiny_occlusion_track yolov4-sam-mish-csp-reorg-bfm
    yolov4-tiny_contrastive""".split()
# Beyond the 44, and cspx-p7-mish, which OpenCV loads once its `num` counts its anchors: a network of 1.1 GB with [sam].
OTHERS = """cspx-p7-mish MobileNetV2-YOLO-Fastest-voc MobileNetV2-YOLOv3-Nano-voc tiny-yolo tiny-yolo-voc tiny-yolo_xnor
    tiny-yolov2-trial3 tiny-yolov2-trial3-noBatch yolo yolo-voc yolo-voc.2.0 yolo.2.0 yoloface-500k yolov2 yolov2-tiny
    yolov2-tiny-voc yolov2-voc yolov3-voc yolov3-voc.yolov3-giou-40""".split()
QUICK = """enet-coco tiny-yolov2-trial3 yolo-fastest yolo-fastest-1.1 yolo-fastest-1.1-xl yoloface-500k yolov2-tiny
    yolov3-tiny yolov3-tiny-prn yolov4-csp-s-mish yolov4-tiny yolov4-tiny-3l yolov7-tiny""".split()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=f"{name}-{find(name)[0]}")
        for name in [*STOCK, *OTHERS]
    ],
)
def test_raw_heads_are_opencvs(name: str, tmp_path: Path) -> None:
    source, reference = find(name)
    if reference is None:
        pytest.skip(f"no reference of {name} (run `make opencv-reference`, it needs the data of $DARKSLIM_DATA)")
    difference = compare(reference, tmp_path)
    assert difference <= TOLERANCE, f"{name}: differs by {difference:.2e} from OpenCV ({source}: {reference.maps})"


def test_every_detector_is_compared_or_refused_by_opencv() -> None:
    manifest = COMPUTED / "manifest.json"
    if not manifest.exists():
        pytest.skip("nothing computed (run `make opencv-reference`)")
    items = json.loads(manifest.read_text())
    assert sorted(key for key, item in items.items() if "refused" in item) == sorted(REFUSED)
    assert sorted(key for key, item in items.items() if "refused" not in item) == sorted([*STOCK, *OTHERS])
    assert [key for key, item in items.items() if not item.get("is_lively", True)] == []


def test_reference_weights_follow_the_shared_rule() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED} (set DARKSLIM_DATA)")
    items = json.loads((SHARED / "manifest.json").read_text())["items"]
    small = [item for item in items if item["weights_bytes"] < 40e6]
    assert len(small) > 3
    for item in small:
        text = opencv_reference.read(DATA / "darknet/official-cfg" / item["cfg"])
        data = opencv_reference.make_weights(text, item["seed"], item["gamma"])
        assert hashlib.sha256(data).hexdigest() == item["weights_sha256"], item["cfg"]
