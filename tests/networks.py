"""The cfgs that the tests of models/ build, and networks made of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import Darknet, load_cfg, parse
from models.layer import Built, Layer
from models.layers import SECTIONS
from utils.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures"
SHIPPED = sorted(ROOT.glob("cfg/*.cfg"))
INVALID = sorted(FIXTURES.glob("invalid/*.cfg"))
CLASSIFIER = FIXTURES / "valid/classifier.cfg"
CFGS = SHIPPED + sorted({*FIXTURES.rglob("*.cfg")} - {*INVALID})
# Of the zoo's cfgs that differ in classes and anchors alone, one stands for all; make test-all takes every one.
_FIRST = {words.split(" --data")[0]: stem for stem, words in reversed(ZOO.items())}
REPEATED = {path for path in SHIPPED if path.stem in ZOO.keys() - _FIRST.values()}
HEAVY_CFGS = [pytest.param(path, marks=[pytest.mark.slow] * (path in REPEATED)) for path in CFGS]
HEAVY_DETECTORS = [param for param in HEAVY_CFGS if param.values != (CLASSIFIER,)]


def name(path: Path) -> str:
    """Give a parametrised test the name of its file."""
    return path.stem


def seeded(cfg: Path, seed: int = 0) -> Darknet:
    """Build a network in evaluation mode whose batch normalisations hold random statistics, no fresh 0 and 1."""
    torch.manual_seed(seed)
    model = Darknet(load_cfg(cfg)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
    return model


def build(text: str, *sources: tuple[int, int, int]) -> Layer:
    """Build one section above layers of the given (channels, height, width)."""
    section = parse(f"[net]\n{text}").sections[1]
    below = [Layer(nn.Identity(), (), C, (H, W), (1, 1)) for C, H, W in sources]
    layer = SECTIONS[section.name](section, Built(below[-1], below))
    section.cfg.raise_mistakes()
    return layer


def random(*shape: int) -> Tensor:
    """Draw from the normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(layer: Layer, *inputs: Tensor) -> np.ndarray:
    """Run a layer in evaluation mode and check the shape that it declares."""
    with torch.inference_mode():
        y = layer.module.eval()(*inputs)
    assert y.shape[1:] == (layer.channels, *layer.size)
    return y.numpy()
