"""One epoch of training, and the state that a checkpoint carries so that a resumed run equals an uninterrupted one."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from models import Darknet

from . import dist
from .darknet_loss import darknet_loss
from .darknet_recipe import DarknetRecipe
from .datasets import Item, to_input
from .device import keep_freed_memory
from .distillation import Distiller
from .log import DataError
from .loss import detection_loss
from .schedule import AnyRecipe, make_ema, make_optimizer, make_scheduler
from .sparsity import Penalty, Sparsity, travels

MAX_GRADIENT = 10.0  # norm that gradients are clipped to by our recipe

StepLoss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Trainer:
    """What an epoch changes: the network, its optimizer, schedule, moving average, gradient scaler, sparsity, and what
    learns along with it from a teacher."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    ema: AveragedModel
    scaler: torch.amp.GradScaler
    max_gradient: float = math.inf
    sparsity: Sparsity | None = None
    distiller: Distiller | None = None

    def state(self) -> dict[str, Any]:
        """Give everything that the next epoch depends on, beside the epoch's number."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict(),
            "s": self.sparsity.s if self.sparsity else 0.0,
            "distiller": self.distiller.state() if self.distiller else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state given by `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.ema.load_state_dict(state["ema"])
        if self.sparsity and "s" in state:
            self.sparsity.s = state["s"]
        if self.distiller:
            self.distiller.restore(state["distiller"])


def make_trainer(
    model: nn.Module,
    recipe: AnyRecipe,
    *,
    epochs: int,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    distiller: Distiller | None = None,
) -> Trainer:
    """Make the trainer of `epochs` of `steps` optimizer steps; gradients are scaled for fp16 alone."""
    if device.type == "cpu":
        keep_freed_memory()
    optimizer = make_optimizer(distiller.pupil if distiller else model, recipe)
    scheduler = make_scheduler(optimizer, recipe, epochs=epochs, steps=steps, seed=seed)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    limit = math.inf if isinstance(recipe, DarknetRecipe) else MAX_GRADIENT
    return Trainer(model, optimizer, scheduler, make_ema(model, recipe), scaler, limit, distiller=distiller)


def start_sparsity(
    trainer: Trainer, plan: Penalty | None, model: Darknet, recipe: AnyRecipe, *, epochs: int, steps: int, first: int
) -> Trainer:
    """Let a trainer draw γ to zero as `plan` says, but for the `first` layers, which are frozen."""
    if not plan:
        return trainer
    each = travels(trainer.scheduler, recipe, epochs=epochs, steps=steps)
    return replace(trainer, sparsity=Sparsity(model, plan, each, first=first))


def make_step_loss(
    network: nn.Module,
    model: Darknet,
    recipe: AnyRecipe,
    device: torch.device,
    dtype: torch.dtype,
    distiller: Distiller | None = None,
) -> StepLoss:
    """Make the loss of one batch: forward through `network`, the model or what wraps it, in `dtype`, loss in fp32.

    With a distiller `network` is its pupil, or what wraps that.
    """

    def step_loss(x: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        theirs = distiller.ask(x, dtype) if distiller else None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ours = network(x)
        raws = ours[0] if distiller else ours
        size = (x.shape[2], x.shape[3])
        if isinstance(recipe, DarknetRecipe):
            loss, parts = darknet_loss(raws, targets, model.heads, size, recipe.heads)
        else:
            loss, parts = detection_loss(raws, targets, model.heads, size, recipe)
        return distiller.add(loss, parts, ours, theirs, targets, size) if distiller else (loss, parts)

    return step_loss


def synchronise_statistics(model: Darknet, device: torch.device) -> Darknet:
    """Let every batch normalisation see the batches of all processes (SyncBN). Raises DataError where it cannot."""
    if dist.world_size() == 1 or device.type == "cpu":
        raise DataError("--sync-bn: needs several processes with a GPU each (start them with torchrun)")
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.layers = [replace(layer, module=block) for layer, block in zip(model.layers, model.blocks, strict=True)]
    return model


def make_freeze(model: Darknet, first: int) -> Callable[[int], None]:
    """Make what is called before each step with its number: `stopbackward` and its like, and the `first` layers.

    These stay as they are, the statistics of their batch normalisation too. Raises DataError where nothing is left.
    """
    if not any(True for _ in model.blocks[first:].parameters()):
        raise DataError(f"--freeze {first}: nothing is left to learn (the network has {len(model.layers)} layers)")

    def freeze(iteration: int) -> None:
        model.freeze(iteration)
        model.blocks[:first].requires_grad_(False).eval()

    return freeze


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Let forward and backward passes run compiled, after a try. Raises DataError where there is no compiler."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except (RuntimeError, ImportError) as error:
        raise DataError(_no_compiler(error)) from None
    model.compile()


@contextmanager
def _explained() -> Iterator[None]:
    """Name --compile where the compiler fails: the try of `compile_model` is small, the network comes with a batch.

    Raises DataError, also where a batch is too small for batch normalisation.
    """
    try:
        yield
    except TorchDynamoException as error:
        raise DataError(_no_compiler(getattr(error, "inner_exception", error))) from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            "a channel has a single number, which has no variance (larger --batch-size or --img-size)"
        ) from None


def _no_compiler(error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"--compile: torch.compile does not work here: {reason} (leave it out)"


def distribute(model: Darknet, device: torch.device, pupil: nn.Module | None = None) -> nn.Module:
    """Wrap a model, or the pupil that holds it, so that the gradients of a backward pass are means over the processes.

    Alone it stays as it is.
    """
    network = pupil or model
    if dist.world_size() == 1:
        return network
    changes = any(layer.rules.stop_backward > 1 for layer in model.layers)  # of what learns, during the training
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=changes)


def train_one_epoch(
    trainer: Trainer,
    loader: DataLoader[Item],
    step_loss: StepLoss,
    *,
    device: torch.device,
    accumulate: int,
    title: str,
    hold_back: Callable[[], AbstractContextManager[None]] = nullcontext,
    freeze: Callable[[int], None],
    after_backward: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train on every batch once and return the mean of each part of the loss.

    `step_loss` takes inputs [B, C, H, W] and targets [N, 6] and returns the loss and its parts. `accumulate` batches
    make one optimizer step, the last step of the epoch takes what is left. `freeze` gets the number of the step, from 0
    on, before its first batch; `after_backward` may add to the gradients of a step when they are unscaled and clipped.
    Batches that make no step run within `hold_back`, which spares the exchange between processes. Raises DataError when
    the loss is not finite, before any weight is touched by it.

    A batch's loss is exact over all processes. A step's gradient is the mean over its batches, an approximation of one
    large batch: where the loss is a mean over matches, it becomes a mean of means.
    """
    trainer.model.train()
    sums: dict[str, float] = defaultdict(float)
    steps = len(loader)
    for number, batch in enumerate(progress := dist.progress(loader, desc=title, unit="batch")):
        if batch.problem:
            raise DataError(batch.problem)
        if number % accumulate == 0:
            freeze(trainer.scheduler.last_epoch)
        makes_step = (number + 1) % accumulate == 0 or number + 1 == steps
        first = number - number % accumulate
        with _explained(), nullcontext() if makes_step else hold_back():
            loss, parts = step_loss(to_input(batch.pictures, device), batch.targets.to(device))
            values = _finite_values({"loss": loss, **parts}, f"{title}, batch {number + 1}")
            trainer.scaler.scale(loss / min(accumulate, steps - first)).backward()
        if makes_step:
            _step(trainer, after_backward)
        for name, value in values.items():
            sums[name] += value
        progress.set_postfix({name: f"{total / (number + 1):.3g}" for name, total in sums.items()})
    means = dist.averages([total / steps for total in sums.values()])
    return dict(zip(sums, means, strict=True))


def _finite_values(parts: Mapping[str, Tensor], where: str) -> dict[str, float]:
    """Fetch the loss and its parts from the device at one go. Raises DataError unless the loss is finite."""
    values = dict(zip(parts, torch.stack([part.detach() for part in parts.values()]).tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        raise DataError(
            f"{where}: the loss is {values['loss']}; the last checkpoint is kept (lower --lr, or look at the labels of"
            " this batch)"
        )
    return values


def _step(trainer: Trainer, after_backward: Callable[[], None] | None) -> None:
    """Make one optimizer step; one that fp16 overflows in is left out, as its scaler asks for."""
    scale = trainer.scaler.get_scale()
    trainer.scaler.unscale_(trainer.optimizer)
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.max_gradient)
    if trainer.distiller:  # apart, so that the student's steps do not depend on them
        aids = list(trainer.distiller.pupil.aids.parameters())
        norm = norm + nn.utils.clip_grad_norm_(aids, trainer.max_gradient)
    if not trainer.scaler.is_enabled() and not norm.isfinite():
        raise DataError(f"the gradient is {norm.item()}; the last checkpoint is kept (lower --lr)")
    if after_backward:
        after_backward()
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad()
    if trainer.scaler.get_scale() >= scale:
        trainer.scheduler.step()
        trainer.ema.update_parameters(trainer.model)
