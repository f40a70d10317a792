"""A run's folder: runs/<name>/ with its log, metrics, TensorBoard events, pictures and checkpoints."""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from models import Darknet, dump, save_weights
from models.weights import load_checkpoint, save_checkpoint, write_atomically

from . import dist
from .album import draw_evaluation
from .charts import draw_curves, draw_labels
from .datasets import Pictures, TrainingBatches, collate
from .engine import Trainer
from .gamma_charts import draw_gammas
from .labels import Labelled
from .log import DataError, log, start_logging
from .pictures import read_picture
from .plots import draw_batch
from .schedule import AnyRecipe
from .scores import Evaluation

RUNS, WEIGHTS = Path("runs"), Path("weights")
FIRST_BATCHES = ("first_batch.jpg", "second_batch.jpg", "third_batch.jpg")


class Run:
    """One training's folder; `resumed` is the checkpoint that it goes on from, empty for a new run.

    What describes the run goes into settings.json and into every checkpoint. Of several processes the first alone
    writes.
    """

    def __init__(
        self, folder: Path, resumed: Mapping[str, Any], *, args: Namespace, recipe: AnyRecipe, names: tuple[str, ...]
    ) -> None:
        self.folder = folder
        settings = {name: value for name, value in vars(args).items() if name != "resume"}
        self.description = {
            "names": list(names),
            "data": args.data,
            "folder": str(folder),
            "settings": settings,
            "recipe": asdict(recipe),
        }
        self.best: float = resumed.get("best", -1.0)
        self.best_epoch: int = resumed.get("best_epoch", 0)
        if not dist.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        start_logging(folder / "train.log")
        text = json.dumps(self.description, indent=1) + "\n"
        write_atomically(folder / "settings.json", lambda partial: partial.write_text(text, encoding="utf-8"))
        self.metrics_file = folder / "metrics.jsonl"
        epoch = resumed.get("epoch", 0)
        if self.metrics_file.exists():  # drop the epochs that are done again
            rows = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(row for row in rows if row.endswith("\n") and json.loads(row)["epoch"] <= epoch)
            write_atomically(self.metrics_file, lambda partial: partial.write_text(kept, encoding="utf-8"))
        self.events = SummaryWriter(str(folder), purge_step=epoch + 1 if epoch else None)
        log.info("%s in %s", f"going on after epoch {epoch}" if epoch else "training", folder)

    def add_metrics(self, row: Mapping[str, Any]) -> bool:
        """Append one epoch's figures to metrics.jsonl and TensorBoard; tell whether its mAP@.5:.95 is the best yet."""
        if is_best := row.get("map50_95", -2.0) > self.best:
            self.best, self.best_epoch = row["map50_95"], row["epoch"]
        if not dist.is_first():
            return is_best
        with _naming(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            parts = {f"{name}/{part}": number for part, number in value.items()} if isinstance(value, dict) else {}
            for tag, number in (parts or {name: value}).items():
                if not isinstance(number, list):
                    self.events.add_scalar(tag, number, row["epoch"])
        self.events.flush()
        return is_best

    def save(self, averaged: Darknet, trainer: Trainer | None, *, epoch: int, seen: int, is_best: bool) -> None:
        """Write last.pt, and best.pt where `is_best`, and copy them to weights/.

        last.pt carries the trainer's state where one is given: not after the last epoch. `seen` counts images. Raises
        WeightsError when the disk refuses, with the earlier file unharmed.
        """
        if not dist.is_first():
            return
        if not all(value.isfinite().all() for value in averaged.state_dict().values()):
            raise DataError(f"epoch {epoch}: the weights are not finite; the last checkpoint is kept (lower --lr)")
        averaged.header = (0, 2, 5, seen)
        checkpoint = self.description | {
            "cfg": dump(averaged.cfg),
            "cfg_path": averaged.cfg.path,
            "epoch": epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "model": averaged.state_dict(),
        }
        if is_best:
            self._write("best", averaged, checkpoint)
        self._write("last", averaged, checkpoint | ({"trainer": trainer.state()} if trainer else {}))

    def has_settled(self, epoch: int, patience: int | None) -> bool:
        """Tell, and say, when `patience` epochs up to `epoch` have brought no better mAP."""
        if not patience or epoch - self.best_epoch < patience:
            return False
        log.info("no better mAP since epoch %d: the training ends (--patience %d)", self.best_epoch, patience)
        return True

    def draw_inputs(self, pictures: Pictures, batches: TrainingBatches, valid: Labelled) -> None:
        """Draw the statistics of the labels, and the first batches with their boxes."""
        if not dist.is_first():
            return
        names = self.description["names"]
        draw_labels({"train": pictures.labelled, "valid": valid}, names, self.folder / "labels.png")
        for file, keys in zip(FIRST_BATCHES, batches, strict=False):
            draw_batch(collate([pictures[key] for key in keys]), names, self.folder / file)

    def draw_curves(self) -> None:
        """Draw loss, mAP and learning rate up to now into curves.png."""
        if dist.is_first():
            with _naming(self.folder / "curves.png"):
                draw_curves(self.metrics_file, self.folder / "curves.png")

    def draw_gammas(self, gammas: np.ndarray, epoch: int) -> None:
        """Show TensorBoard the γ of this epoch, and draw those of all epochs up to now into gammas.png."""
        if dist.is_first():
            self.events.add_histogram("gammas", gammas, epoch)
            with _naming(self.folder / "gammas.png"):
                draw_gammas(self.metrics_file, self.folder / "gammas.png")

    def draw_results(self, evaluation: Evaluation, results: list[dict[str, Any]], valid: Labelled) -> None:
        """Draw the pictures of the last evaluation."""
        if dist.is_first():
            draw_evaluation(self.folder, evaluation, results, valid, tuple(self.description["names"]))

    def close(self) -> None:
        """Show the run's pictures in TensorBoard too and finish the event file."""
        if not dist.is_first():
            return
        epoch = json.loads(self.metrics_file.read_text(encoding="utf-8").splitlines()[-1])["epoch"]
        for path in sorted([*self.folder.glob("*.png"), *self.folder.glob("*.jpg")]):
            self.events.add_image(path.stem, read_picture(str(path)), epoch, dataformats="HWC")
        self.events.close()

    def _write(self, name: str, averaged: Darknet, checkpoint: Mapping[str, Any]) -> None:
        path = self.folder / f"{name}.pt"
        save_checkpoint(path, checkpoint)
        save_weights(averaged, path.with_suffix(".weights"))
        write_atomically(WEIGHTS / path.name, lambda partial: shutil.copyfile(path, partial))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that the disk refuses to write."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot write: {error.strerror}; the last checkpoint is unharmed") from None


def run_folder(checkpoint_path: str, checkpoint: Mapping[str, Any]) -> Path:
    """Give the folder of the run that a last.pt belongs to: its own, or for the copy in weights/ the one it came from.

    Raises DataError where that folder holds another run, or none.
    """
    folder = Path(checkpoint_path).parent
    if folder.resolve() != WEIGHTS.resolve():
        return folder
    folder = Path(checkpoint["folder"])
    original = folder / "last.pt"  # one epoch ahead of the copy where the run was killed between the two
    there = load_checkpoint(original) if original.is_file() else {}
    if any(there.get(key) != checkpoint[key] for key in ("cfg", "settings", "recipe")):
        raise DataError(f"{checkpoint_path}: is not the last.pt of {folder} (resume from the run's own folder)")
    return folder


def new_folder(name: str) -> Path:
    """Give runs/<name>, or the first of <name>-2, -3, … that is not there: nothing is overwritten."""
    folder, number = RUNS / name, 1
    while folder.exists() and os.listdir(folder):
        number += 1
        folder = RUNS / f"{name}-{number}"
    if number > 1:
        log.info("runs/%s is there already: this run goes to %s", name, folder)
    return folder
