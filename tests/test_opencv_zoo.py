"""The zoo's cfgs that have Darknet's sections only once they are expanded, with weights that we write,
in OpenCV 4, whole and pruned.

OpenCV 5 reads no cfg, so an environment of its own runs it, which `make opencv-reference` makes; without it they skip.
"""

import subprocess
from pathlib import Path

import cv2
import numpy as np
import opencv_reference
import pytest
import torch
from networks import REPEATED, ROOT, SHIPPED, name

from models import dump, load_cfg, load_model, save_weights
from models.darknet import Darknet
from utils.plan import make_plan
from utils.prune import cut_cfg, find_groups

OPENCV = ROOT / ".opencv-venv/bin/python"
SECTIONS = {"net", "convolutional", "maxpool", "avgpool", "route", "shortcut", "upsample", "scale_channels", "yolo"}
ACTIVATIONS = {"leaky", "linear", "logistic", "mish", "relu", "swish"}
LARGE = 80_000_000  # bytes of a .weights file that is compared by `make test-all` alone
WIDTH, HEIGHT = 128, 96
PICTURE = min(ROOT.glob("data/samples/*.jpg"))
SHARES = (0, 0.3, 0.7)  # of the free groups that are cut
TOLERANCE = 1e-4  # of the largest value of a map
# Run by OpenCV's interpreter: cfg, weights and picture in, the map before every head out.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from opencv_reference import run_opencv
cfg, weights, picture, output = sys.argv[1:]
np.savez(output, **run_opencv(Path(cfg).read_text(), Path(weights).read_bytes(), np.load(picture)))
"""


def expand(path: Path) -> Darknet:
    """Build the network of a cfg on the meta device."""
    with torch.device("meta"):
        return Darknet(load_cfg(path))


def is_darknets(model: Darknet) -> bool:
    """Tell whether Darknet knows every section and activation of the expanded cfg."""
    sections = model.expanded.sections
    activations = {section.options["activation"].value for section in sections if "activation" in section.options}
    return {section.name for section in sections} <= SECTIONS and activations <= ACTIVATIONS


def is_large(path: Path) -> bool:
    return 4 * sum(parameter.numel() for parameter in expand(path).parameters()) > LARGE


DARKNETS = [path for path in SHIPPED if is_darknets(expand(path))]


def test_which_cfgs_are_darknets() -> None:
    assert {path.stem for path in SHIPPED} - {path.stem for path in DARKNETS} == {
        *(path.stem for path in SHIPPED if "-quan" in path.stem),
        *(f"yolov3-tiny-{gate}{data}" for gate in ("cbam", "eca") for data in ("", "-hand")),
        *(f"shufflenetv2-{width}{data}" for width in ("1x", "1.5x") for data in ("", "-hand", "-visdrone")),
        "mobilenetv3-large",
        "mobilenetv3-small",
    }


def write_cut(path: Path, share: float, target: Path) -> None:
    """Write the expanded cfg without a random share of its free groups, for pictures of WIDTH x HEIGHT."""
    model = expand(path)
    groups = find_groups(model)
    values = np.random.default_rng(0).random(len(groups.is_free))
    plan = make_plan(model, groups, values, cuts_residual=True)
    cfg = cut_cfg(model, groups, plan.keep(min(len(plan.order), round(share * plan.free))), path=str(target))
    for key, side in (("width", WIDTH), ("height", HEIGHT)):
        cfg.sections[0].set(key, side)
    target.write_text(dump(cfg))


@pytest.mark.skipif(not OPENCV.exists(), reason="no OpenCV 4 here (run `make opencv-reference`)")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path in REPEATED or is_large(path))) for path in DARKNETS],
    ids=name,
)
def test_opencv_agrees_on_the_expanded_cfg_whole_and_cut(path: Path, share: float, tmp_path: Path) -> None:
    files = [tmp_path / each for each in ("a.cfg", "a.weights", "picture.npy", "maps.npz")]
    write_cut(path, share, files[0])
    picture = cv2.resize(cv2.imread(str(PICTURE)), (WIDTH, HEIGHT))  # BGR
    np.save(files[2], picture)
    ours = run_ours(files[0], files[1], picture)
    subprocess.run([OPENCV, "-c", SCRIPT, *files], check=True, env={"PYTHONPATH": str(ROOT / "tests")})
    files[1].unlink()
    with np.load(files[3]) as theirs:
        assert list(theirs) == list(ours)
        for key, expected in theirs.items():
            assert np.abs(ours[key] - expected).max() <= TOLERANCE * np.abs(expected).max()


def run_ours(cfg: Path, weights: Path, picture: np.ndarray) -> dict[str, np.ndarray]:
    """Write random weights with the first scale of batch normalisation whose maps neither vanish nor explode."""
    text = cfg.read_text()
    x = torch.from_numpy(picture[..., ::-1] / np.float32(255)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    for gamma in opencv_reference.GAMMAS:
        weights.write_bytes(opencv_reference.make_weights(text, opencv_reference.SEED, gamma))
        model = load_model(cfg, weights)
        with torch.inference_mode():
            maps = {f"raw_layer{head.layer - 1}": raw.numpy() for head, raw in zip(model.heads, model(x), strict=True)}
        if opencv_reference.is_lively(text, maps):
            save_weights(model, weights)
            return maps
    raise AssertionError(f"{cfg}: no scale gives maps that a comparison means something on")
