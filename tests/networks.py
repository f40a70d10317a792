"""The cfgs that the tests of models/ build, and networks made of them."""

from pathlib import Path

import torch
from torch import nn

from models import Darknet, load_cfg

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures"
SHIPPED = sorted(ROOT.glob("cfg/*.cfg"))
INVALID = sorted(FIXTURES.glob("invalid/*.cfg"))
CFGS = SHIPPED + sorted({*FIXTURES.rglob("*.cfg")} - {*INVALID})


def name(path: Path) -> str:
    """Give a parametrised test the name of its file."""
    return path.stem


def seeded(cfg: Path, seed: int = 0) -> Darknet:
    """Build a network in evaluation mode whose batch normalisations hold random statistics, no fresh 0 and 1."""
    torch.manual_seed(seed)
    model = Darknet(load_cfg(cfg)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
    return model
