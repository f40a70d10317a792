"""What Darkslim makes of every cfg of the test data: the table of docs/darknet-compatibility.md.

    PYTHONPATH=tests OMP_NUM_THREADS=1 python -m benchmarks.compatibility

Builds each network, writes random weights, reads them into a second one and writes that; compares raw heads with what
`make opencv-reference` stored. Takes about five minutes; the largest network has 1.1 GB of weights. Needs
$DARKSLIM_DATA.
"""

import filecmp
import tempfile
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from opencv_comparison import DATA, compare, find
from test_opencv import STOCK

from benchmarks.report import make_table
from models import CfgError, Darknet, load_cfg, load_weights, save_weights
from models.darknet import count_parameters
from utils.device import describe_machine
from utils.lint import weights_bytes

COMMAND = "PYTHONPATH=tests OMP_NUM_THREADS=1 python -m benchmarks.compatibility"
TARGET = Path(__file__).resolve().parent.parent / "docs/darknet-compatibility.md"

# The 44 stock detectors: what OpenCV 4.14 loads, and these; their sections are compared in tests/test_sections.py.
BEYOND = {
    "cspx-p7-mish": "OpenCV once `num` counts the anchors",
    "cspx-p7-mish_hp": "the network of cspx-p7-mish; `sam`, missing commas: tests",
    "resnet152_trident": "`share_index`, `dilation`: numpy",
    "yolov3-tiny_occlusion_track": "`crnn`: numpy",
    "yolov4-sam-mish-csp-reorg-bfm": "`sam`, `reorg3d`: numpy",
    "yolov4-tiny_contrastive": "`local_avgpool`, `contrastive`: numpy",
}
# Other proofs than the comparison with OpenCV.
PROOFS = BEYOND | {
    "Gaussian_yolov3_BDD": "`Gaussian_yolo`: numpy",
    **dict.fromkeys(
        "MobileNetV2-YOLO-Fastest-voc MobileNetV2-YOLOv3-Nano-voc yolo-fastest-1.1 yolo-fastest-1.1-xl"
        " tiny-yolov2-trial3 tiny-yolov2-trial3-noBatch yoloface-500k".split(),
        "real weights: Darknet's detections",
    ),
    **dict.fromkeys(["yolov3-tiny_xnor", "tiny-yolo_xnor"], "compared as floats; one-bit weights: numpy"),
}
# Bytes of .weights that reference/official_cfg_sizes.tsv lacks; the tsv's own come from another program.
BYTES = {
    "Gaussian_yolov3_BDD": 246_585_408,
    "MobileNetV2-YOLO-Fastest-voc": 764_876,
    "MobileNetV2-YOLOv3-Nano-voc": 3_079_020,
    "darknet19": 83_427_124,
    "darknet53": 166_582_580,
    "efficientnet-lite3": 30_091_444,
    "efficientnet_b0": 19_560_180,
    "resnet50": 91_303_604,
    "yolo-fastest": 1_425_644,
    "yolo-fastest-1.1": 1_384_268,
    "yolo-fastest-1.1-xl": 3_693_964,
    "yolo-fastest-1.1_body": 1_177_604,
    "yolo-fastest-xl": 3_650_764,
    "yolov3-tiny_occlusion_track": 62_656_100,
    "yolov4-tiny_contrastive": 29_561_736,
    "yoloface-500k": 520_580,
}

TEXT = f"""\
# Darknet's networks in Darkslim

```
{COMMAND}
```

writes this table. Random weights are written, read into a second network and written again: `written` are the bytes of
that file, and `again` says whether both files are equal. `expected` are the bytes that another program, or a real file
with a header of 20 bytes, has. That a file which ends on a layer fills the layers before, and any other is refused,
`tests/test_partial_weights.py` tries on every detector. `OpenCV` is the largest difference between our raw head maps
and those of OpenCV 4.14's `readNetFromDarknet` on the same seeded weights and picture, relative to the largest value of
the map (`make opencv-reference`, `tests/test_opencv.py`: at most 1e-4). Where OpenCV does not load a network, or reads
it wrong, its sections are compared with plain numpy in `tests/test_sections.py`, and `tests/test_real_weights.py`
compares detections of real weights with those of the original Darknet and of OpenCV."""


def expected_bytes() -> dict[str, int]:
    """Give the known sizes of .weights files."""
    lines = (DATA / "reference/official_cfg_sizes.tsv").read_text().splitlines()[1:]
    return {cells[0].removesuffix(".cfg"): int(cells[3]) for cells in (line.split("\t") for line in lines)} | BYTES


def write_twice(model: Darknet, other: Darknet, folder: Path) -> tuple[int, bool]:
    """Write random weights, read them into the other network, write that; give the bytes and whether they are equal."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (attrgetter(name)(layer.module) for layer in model.layers for name in layer.tensors):
        tensor.detach().normal_(generator=generator)
    first, second = folder / "first.weights", folder / "second.weights"
    save_weights(model, first)
    load_weights(other, first)
    save_weights(other, second)
    return second.stat().st_size, filecmp.cmp(first, second, shallow=False)


def judge(path: Path, expected: dict[str, int], folder: Path) -> dict[str, Any]:
    """Give one row of the table. Raises CfgError where the network is not built."""
    model = Darknet(load_cfg(path))
    row: dict[str, Any] = {"cfg": path.stem, "layers": len(model.layers), "parameters": f"{count_parameters(model):,}"}
    written, is_equal = write_twice(model, Darknet(load_cfg(path)), folder)
    assert written == weights_bytes(model)
    size = expected.get(path.stem)
    row |= {"expected": f"{size:,}" if size else "", "written": f"{written:,}", "again": "equal" if is_equal else "no"}
    assert size in (None, written), f"{path}: writes {written} bytes, {size} expected"
    del model
    _, reference = find(path.stem)
    row["OpenCV"] = f"{compare(reference, folder):.1e}" if reference else ""
    return row | {"further proof": PROOFS.get(path.stem, "")}


def write_document(rows: Sequence[dict[str, Any]], refused: Sequence[dict[str, str]]) -> None:
    """Write the tables: the stock detectors, all other networks, and what is refused."""
    stock = [row for row in rows if row["cfg"] in {*STOCK, *BEYOND}]
    others = [row for row in rows if row not in stock]
    parts = [TEXT, describe_machine(), f"## The {len(stock)} stock detectors", make_table(stock)]
    parts += ["## YOLOv2, other detectors and classifiers", make_table(others)]
    parts += ["## Refused, with these words", make_table(refused)]
    TARGET.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Judge every cfg and write the document."""
    expected, rows, refused = expected_bytes(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(DATA.glob("darknet/**/*.cfg"), key=lambda path: path.stem.lower()):
            try:
                rows.append(judge(path, expected, Path(folder)))
                print(*rows[-1].values(), flush=True)
            except CfgError as error:
                refused.append({"cfg": path.stem, "line": str(error.line), "message": error.message})
    write_document(rows, refused)


if __name__ == "__main__":
    main()
