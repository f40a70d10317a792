"""Training on the CPU: pictures against torchvision, a step against plain PyTorch, and the parts of an epoch.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.training

Measures each pair in turn in one process, medians over rounds, ratios within a round; writes benchmarks/training.md and
.json in about seven minutes on 2 busy cores. Needs the pictures of BCCD ($DARKSLIM_DATA).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.bccd import write_bccd
from benchmarks.report import write_report
from benchmarks.zoo import LIGHT, write_cfg
from models import Darknet, load_cfg
from utils.augment import MIN_SIDE
from utils.boxes import Fit
from utils.datasets import Batch, Item, Key, Pictures, TrainingBatches, collate, make_loader
from utils.device import seed_everything
from utils.distillation import Distiller, Lessons
from utils.engine import distribute, make_freeze, make_step_loss, make_trainer, train_one_epoch
from utils.labels import Labelled, check_labels
from utils.lists import load_data
from utils.log import start_logging
from utils.loss import detection_loss
from utils.recipe import Recipe
from utils.schedule import make_optimizer

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.training"
GHOST = "cfg/ghost-yolov3-visdrone.cfg"
ROUNDS = 3
RATIO = "times the first row's seconds"
GREY = 114
CPU = torch.device("cpu")
TEXT = """Medians of rounds in turn, in one process; ratios are medians of the ratios within a round.

Loader: pictures of BCCD, 640x480 JPEGs, as a batch of 16 at 320x320. Each sample decodes four pictures, fits them to
320, lays them out as a mosaic on 640x640, zooms by 0.5 to 1.5, shifts, cuts 320x320 out, clips the boxes and drops
what is too small, changes hue, saturation and brightness, and flips every second picture. Darkslim does it with
OpenCV on NumPy arrays, its colour through tables in HSV, its affine straight into the window. The other decodes with
Pillow (`torchvision.io` is a little faster, but deprecated), resizes tensors with antialiasing, and takes
`v2.RandomAffine`, `CenterCrop`, `ClampBoundingBoxes`, `SanitizeBoundingBoxes`, `ColorJitter` and
`RandomHorizontalFlip` with the same ranges; mosaic on tensors is the benchmark's own. v2 has no affine into a smaller
window, so the whole canvas is transformed and then cut. It does without the rule that drops a box of which less than
a tenth is left. Both go through the same batches and collation of `torch.utils.data`. Most of torchvision's time is
spent in its affine and its colour.

Step: GhostNet-YOLOv3 at 416, batch 8, 20 boxes a picture. Darkslim's is `train_one_epoch` as train.py runs it with
`--precision bf16` (channels_last, autocast) or `fp32`: loss, clipped gradient, SGD, schedule, moving average and the
sums of the log. The plain loop has the same network, loss and optimizer in float32 and NCHW, and neither clipping nor
schedule nor average.

Epoch: slim-m at 320, batch 16, bfloat16 where the processor has it, 96 pictures, 2 workers, which share the cores with
the step."""


@dataclass
class TorchvisionPictures(Dataset[Item]):
    """The pictures that `Pictures` gives by the recipe, made by torchvision; mosaic alone has to be written.

    `is_pil`: affine, colour and flip work on PIL images, else on tensors.
    """

    labelled: Labelled
    recipe: Recipe
    size: tuple[int, int]
    is_pil: bool

    def __post_init__(self) -> None:
        recipe, zoom = self.recipe, self.recipe.scale
        # shifts are fractions of the canvas, which is twice the window; v2 can only cut the window out afterwards
        shifts, shear = (recipe.translate / 2,) * 2, (-recipe.shear, recipe.shear) * 2
        linear = v2.InterpolationMode.BILINEAR
        self.transforms = v2.Compose(
            [
                *[v2.ToPILImage()] * self.is_pil,
                v2.RandomAffine(recipe.degrees, shifts, (1 - zoom, 1 + zoom), shear, interpolation=linear, fill=GREY),
                v2.CenterCrop(self.size),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=MIN_SIDE),
                v2.ColorJitter(brightness=recipe.value, saturation=recipe.saturation, hue=recipe.hue),
                v2.RandomHorizontalFlip(recipe.flip_lr),
                *[v2.PILToTensor()] * self.is_pil,
            ]
        )

    def __getitem__(self, key: Key) -> Item:
        others = torch.randint(len(self.labelled.paths), (3,)).tolist()
        canvas, boxes, classes = self._mosaic([key.index, *others])
        picture, kept = self.transforms(canvas, {"boxes": boxes, "labels": classes})
        x1, y1, x2, y2 = kept["boxes"].as_subclass(Tensor).T / torch.tensor([self.size[::-1] * 2]).T
        targets = torch.stack((kept["labels"], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=1)  # [N, 5]
        return Item(picture.as_subclass(Tensor), targets, key.index, Fit(self.size, (1, 1), (0, 0)))

    def _mosaic(self, indices: Sequence[int]) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes, Tensor]:
        H, W = self.size
        canvas = torch.full((3, 2 * H, 2 * W), GREY, dtype=torch.uint8)
        cy, cx = (int(side * (0.5 + float(torch.rand(1)))) for side in self.size)
        boxes, classes = [], []
        for corner, index in enumerate(indices):
            picture, xyxy_px, labels = self._load(index)
            h, w = picture.shape[1:]
            top, left = cy - h * (corner < 2), cx - w * (corner % 2 == 0)
            y1, x1, y2, x2 = max(top, 0), max(left, 0), min(top + h, 2 * H), min(left + w, 2 * W)
            canvas[:, y1:y2, x1:x2] = picture[:, y1 - top : y2 - top, x1 - left : x2 - left]
            boxes.append(xyxy_px + torch.tensor([left, top, left, top]))
            classes.append(labels)
        placed = tv_tensors.BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=(2 * H, 2 * W))
        return tv_tensors.Image(canvas), v2.functional.clamp_bounding_boxes(placed), torch.cat(classes)

    def _load(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        with Image.open(self.labelled.paths[index]) as image:
            picture = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        h, w = picture.shape[1:]
        ratio = min(self.size[0] / h, self.size[1] / w)
        h, w = round(h * ratio), round(w * ratio)
        classes, x, y, bw, bh = torch.from_numpy(self.labelled.labels[index]).T
        boxes = torch.stack((x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2), dim=1) * torch.tensor([w, h, w, h])
        return v2.functional.resize(picture, [h, w]), boxes, classes


def seconds_in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time calls in turn, `rounds` times after one round to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                spent[name].append(time.perf_counter() - start)
    return spent


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Give the median over rounds of how many times longer `slow` takes."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def make_rows(spent: Mapping[str, Sequence[float]], images: int, pair: str) -> list[dict[str, Any]]:
    """Give a row for each of the calls that took `spent` seconds a round; ratios are to the first of them."""
    first = next(iter(spent.values()))
    return [
        {
            "pair": pair,
            "what": name,
            "images_per_s": images / statistics.median(seconds),
            RATIO: paired_ratio(seconds, first),
        }
        for name, seconds in spent.items()
    ]


def drain(loader: DataLoader[Item]) -> None:
    """Ask for every batch of an epoch."""
    for _ in loader:
        pass


def loader_rows(labelled: Labelled, side: int, workers: int, *, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Compare our pictures with torchvision's, on PIL images and on tensors."""
    recipe, size = Recipe(), (side, side)
    batches = TrainingBatches(labelled.sizes, 16, [size], seed=0, mosaic_epochs=1)
    loaders = {"Darkslim": make_loader(Pictures(labelled, recipe=recipe), batches, workers=workers)}
    for is_pil in (True, False):
        theirs = TorchvisionPictures(labelled, recipe, size, is_pil)
        loaders[f"torchvision, {'PIL images' if is_pil else 'tensors'}"] = DataLoader(
            theirs, batch_sampler=batches, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
        )
    calls = {name: lambda loader=loader: drain(loader) for name, loader in loaders.items()}
    return make_rows(seconds_in_turn(calls, rounds), len(labelled.paths), f"loader, {workers} workers")


def random_batch(number: int, side: int, boxes: int = 20) -> Batch:
    """Draw `number` pictures of noise with as many random boxes of class 0 each."""
    torch.manual_seed(0)
    pictures = torch.randint(256, (number, 3, side, side), dtype=torch.uint8)
    places = torch.arange(number).repeat_interleave(boxes)[:, None]
    centres, sides = 0.1 + 0.8 * torch.rand(number * boxes, 2), 0.02 + 0.15 * torch.rand(number * boxes, 2)
    targets = torch.cat((places, torch.zeros_like(places), centres, sides), dim=1)  # [N, 6]
    return Batch(pictures, targets, list(range(number)), [])


def our_epoch(
    cfg: str | Path, dtype: torch.dtype, teacher: Darknet | None = None, lessons: Lessons | None = None
) -> Callable[[Any], object]:
    """Make what trains a network on the batches of a loader or a list once, as train.py does on the CPU.

    With a teacher it learns `lessons`, without them what distill.py takes unless told otherwise.
    """
    seed_everything(0)
    model, recipe = Darknet(load_cfg(cfg)).to(memory_format=torch.channels_last), Recipe()
    distiller = Distiller(model, teacher, lessons or Lessons()) if teacher else None
    trainer = make_trainer(model, recipe, epochs=100, steps=100, device=CPU, dtype=dtype, distiller=distiller)
    network = distribute(model, CPU, distiller.pupil if distiller else None)
    step_loss = make_step_loss(network, model, recipe, CPU, dtype, distiller)
    freeze = make_freeze(model, 0)

    def epoch(batches: Any) -> object:
        return train_one_epoch(trainer, batches, step_loss, device=CPU, accumulate=1, title="", freeze=freeze)

    return epoch


def plain_epoch(cfg: str | Path) -> Callable[[Any], object]:
    """Make the loop that one would type: eager, float32, NCHW; our loss and optimizer, no schedule and no averaging."""
    seed_everything(0)
    model, recipe = Darknet(load_cfg(cfg)).train(), Recipe()
    optimizer = make_optimizer(model, replace(recipe, lr=recipe.lr / 100))  # the warm-up's first rate

    def epoch(batches: Any) -> None:
        for batch in batches:
            x = batch.pictures.float() / 255
            loss, _ = detection_loss(model(x), batch.targets, model.heads, (x.shape[2], x.shape[3]), recipe)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def has_bf16() -> bool:
    """Tell whether the processor computes in bfloat16 itself."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's


def step_rows(cfg: str | Path, side: int, number: int, *, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Compare our training step, in bfloat16 where the processor has it and in float32, with a plain loop."""
    batches = [random_batch(number, side)]
    epochs = {"Darkslim, float32": our_epoch(cfg, torch.float32), "plain loop, float32, NCHW": plain_epoch(cfg)}
    skipped = []
    if has_bf16():
        epochs = {"Darkslim, bfloat16": our_epoch(cfg, torch.bfloat16)} | epochs
    else:
        skipped.append({"pair": "step", "what": "Darkslim, bfloat16: skipped, this processor lacks it"})
    calls = {name: lambda epoch=epoch: epoch(batches) for name, epoch in epochs.items()}
    return skipped + make_rows(seconds_in_turn(calls, rounds), number, "step")


def epoch_rows(labelled: Labelled, cfg: str | Path, side: int, *, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Measure the loader with 2 workers, the step on batches at hand, and an epoch of both."""
    batches = TrainingBatches(labelled.sizes, 16, [(side, side)], seed=0, mosaic_epochs=1)
    loader = make_loader(Pictures(labelled, recipe=Recipe()), batches, workers=2)
    loaded = list(loader)
    epoch = our_epoch(cfg, torch.bfloat16 if has_bf16() else torch.float32)
    calls = {
        "both: an epoch of train.py": lambda: epoch(loader),
        "step alone": lambda: epoch(loaded),
        "loader alone": lambda: drain(loader),
    }
    return make_rows(seconds_in_turn(calls, rounds), len(labelled.paths), "epoch")


def main() -> None:
    """Measure, report."""
    start_logging()
    Path("runs/zoo").mkdir(parents=True, exist_ok=True)
    path = write_bccd(Path("runs/bccd"))
    data = load_data(path)
    labelled = check_labels(data.train, len(data.names))
    some, more = (
        replace(labelled, paths=labelled.paths[:number], labels=labelled.labels[:number], sizes=labelled.sizes[:number])
        for number in (64, 96)
    )
    loaders = [loader_rows(some, 320, workers) for workers in (0, 2)]
    steps = step_rows(GHOST, 416, 8)
    both, step, loader = epoch_rows(more, write_cfg(LIGHT, "full", path), 320)
    summary = {
        "loader_vs_torchvision": min(row[RATIO] for rows in loaders for row in rows[1:]),
        "ghost_step_vs_plain": steps[-1][RATIO],
        "loader_images_per_s": loader["images_per_s"],
        "step_images_per_s": step["images_per_s"],
        "both_images_per_s": both["images_per_s"],
    }
    rows = [row for each in loaders for row in each] + steps + [both, step, loader]
    write_report("training", "Training on the CPU", TEXT, COMMAND, rows, summary)


if __name__ == "__main__":
    main()
