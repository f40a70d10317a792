"""Two pairs, each measured in turn in one run: the forward pass against plain PyTorch, the loader against the step.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.speed

Writes benchmarks/speed.md and .json; takes about three minutes on 2 cores. The loader needs the pictures of BCCD
($DARKSLIM_DATA).
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.bccd import write_bccd
from benchmarks.report import write_report
from models import Darknet, load_cfg
from utils.datasets import Pictures, TrainingBatches, make_loader, to_input
from utils.device import seed_everything
from utils.engine import make_trainer
from utils.labels import check_labels
from utils.lists import load_data
from utils.log import start_logging
from utils.loss import detection_loss
from utils.recipe import Recipe
from utils.timing import summarise, time_in_turn

ROUNDS = 60
COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.speed"


class PlainTiny(nn.Module):
    """YOLOv3-tiny as one would type it, with the convolutions of a fused Darknet."""

    def __init__(self, model: Darknet, *, is_fused: bool) -> None:
        super().__init__()
        units = [
            nn.Sequential(_conv(block, is_fused=is_fused), nn.LeakyReLU(0.1, inplace=True))
            if type(block.activation) is nn.LeakyReLU
            else _conv(block, is_fused=is_fused)
            for block in model.blocks
            if hasattr(block, "conv")
        ]
        pool = nn.MaxPool2d(2, 2)
        self.stem = nn.Sequential(units[0], pool, units[1], pool, units[2], pool, units[3], pool, units[4])
        self.deep = nn.Sequential(pool, units[5], nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1), units[6], units[7])
        self.coarse = nn.Sequential(units[8], units[9])
        self.up = nn.Sequential(units[10], nn.Upsample(scale_factor=2))
        self.fine = nn.Sequential(units[11], units[12])

    def forward(self, x: Tensor) -> list[Tensor]:
        middle = self.stem(x)
        deep = self.deep(middle)
        return [self.coarse(deep), self.fine(torch.cat((self.up(deep), middle), dim=1))]


def _conv(block: nn.Module, *, is_fused: bool) -> nn.Module:
    if isinstance(block.bn, nn.Identity):
        return block.conv
    return fuse_conv_bn_eval(block.conv, block.bn) if is_fused else nn.Sequential(block.conv, block.bn)


def forward_rows() -> list[dict]:
    """Compare the fused forward pass of YOLOv3-tiny with plain PyTorch at 416, batch 1."""
    torch.manual_seed(0)
    model = Darknet(load_cfg("cfg/yolov3-tiny.cfg")).eval()
    x = torch.rand(1, 3, 416, 416)
    last = torch.channels_last
    variants = {
        "Darkslim, fused, channels_last": (model.fuse().to(memory_format=last), x.to(memory_format=last)),
        "Darkslim, fused": (model.fuse(), x),
        "plain nn.Sequential, convolutions fused": (PlainTiny(model, is_fused=True).eval(), x),
        "plain nn.Sequential": (PlainTiny(model, is_fused=False).eval(), x),
    }
    with torch.inference_mode():
        calls = [partial(network, inputs) for network, inputs in variants.values()]
        ms = [summarise(spent).ms for spent in time_in_turn(calls, rounds=ROUNDS)]
    return [
        {"pair": "forward", "what": name, "ms": value, "ratio": value / ms[0]}
        for name, value in zip(variants, ms, strict=True)
    ]


def loader_rows() -> list[dict]:
    """Compare the images a second of the loader alone (mosaic, 2 workers) and of the training step alone at 320."""
    data = load_data(write_bccd(Path("runs/bccd")))
    labelled = check_labels(data.train, len(data.names))
    recipe = Recipe()
    batches = TrainingBatches(labelled.sizes, 16, [(320, 320)], seed=0, mosaic_epochs=1)
    loader = make_loader(Pictures(labelled, recipe=recipe), batches, workers=2)
    next(iter(loader))  # the workers start
    start = time.perf_counter()
    loaded = list(loader)
    loader_speed = len(labelled.paths) / (time.perf_counter() - start)
    rows = [{"pair": "training", "what": "loader alone, 2 workers, mosaic", "images_per_s": loader_speed}]
    for dtype in (torch.float32, torch.bfloat16):
        seed_everything(0)
        model = Darknet(load_cfg("cfg/yolov3-tiny-hand.cfg")).to(memory_format=torch.channels_last).train()
        trainer = make_trainer(model, recipe, epochs=1, steps=20, device=torch.device("cpu"), dtype=dtype)
        speeds = []
        for batch in loaded[:8]:
            start = time.perf_counter()
            x = to_input(batch.pictures, torch.device("cpu"))
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                raws = model(x)
            targets = batch.targets * torch.tensor([1, 0, 1, 1, 1, 1])
            detection_loss(raws, targets, model.heads, (320, 320), recipe)[0].backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.ema.update_parameters(model)
            speeds.append(len(x) / (time.perf_counter() - start))
        speed = float(np.median(speeds))
        name = f"step alone, YOLOv3-tiny, {str(dtype).removeprefix('torch.')}, channels_last"
        rows.append({"pair": "training", "what": name, "images_per_s": speed, "ratio": loader_speed / speed})
    return rows


def main() -> None:
    """Measure both pairs and write the report."""
    start_logging()
    rows = forward_rows() + loader_rows()
    summary = {
        "plain_vs_channels_last": rows[3]["ms"] / rows[0]["ms"],
        "plain_vs_fused": rows[3]["ms"] / rows[1]["ms"],
        "loader_vs_step_fp32": rows[-2]["ratio"],
        "loader_vs_step_bf16": rows[-1]["ratio"],
    }
    text = (
        "Forward pass of YOLOv3-tiny at 416, batch 1, on the CPU: medians of calls in turn, the ratio is to the first"
        " row, which is what detect.py runs. Loader against training step at 320, batch 16: the ratio is how many times"
        " more images a second the loader gives than the step takes."
    )
    write_report("speed", "Forward pass and loader", text, COMMAND, rows, summary)


if __name__ == "__main__":
    main()
