"""The training recipe: every hyper-parameter, its default and its unit, in one frozen dataclass."""

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .log import DataError

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "box_loss": ("ciou", "diou", "giou", "eiou"),
    "objectness_target": ("iou", "one"),
}
BOUNDS = {  # of the numbers that are not simply 0 or more
    **dict.fromkeys(("final_lr", "momentum", "ema_decay", "label_smoothing", "close_mosaic"), (0, 1)),
    **dict.fromkeys(("mosaic", "mixup", "flip_lr", "flip_ud", "translate", "saturation", "value", "hue"), (0, 1)),
    **dict.fromkeys(("lr", "anchor_ratio"), (1e-12, 1e6)),
    **dict.fromkeys(("nominal_batch", "min_steps"), (1, 10**9)),
    **dict.fromkeys(("degrees", "shear"), (0, 90)),
    "scale": (0, 0.99),
    "image_weights": (0, 10),
}


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training. Gains weigh the parts of the loss, probabilities are per image."""

    optimizer: str = "sgd"  # sgd (Nesterov) or adamw
    lr: float = 0.02  # peak learning rate; AdamW takes a twentieth
    final_lr: float = 0.01  # last learning rate as a fraction of the peak (cosine)
    momentum: float = 0.937  # of SGD, and beta1 of AdamW
    weight_decay: float = 5e-4  # on convolution weights
    warmup_epochs: float = 3.0
    nominal_batch: int = 64  # gradients are accumulated up to this many images, as long as
    min_steps: int = 3000  # the training still makes this many optimizer steps
    ema_decay: float = 0.999  # limit of (1 + n) / (10 + n) after n steps
    box_gain: float = 16.0
    objectness_gain: float = 32.0
    class_gain: float = 8.0
    box_loss: str = "ciou"  # ciou, diou, giou or eiou
    objectness_target: str = "iou"  # iou of the predicted box, or one
    focal_gamma: float = 0.0  # power by which objectness that is nearly right weighs less
    anchor_ratio: float = 4.0  # an anchor takes a box whose sides differ from its own by less than this factor
    neighbours: float = 0.5  # cells answer for centres this far (in cells) outside, at most as far as decode reaches
    top_matches: int = 0  # cells and anchors that answer for a box at most, the best predicting ones; 0: all
    label_smoothing: float = 0.0
    image_weights: float = 0.0  # power by which pictures of rare classes are drawn more often; 0: each once an epoch
    mosaic: float = 1.0  # probability
    close_mosaic: float = 0.3  # last fraction of the epochs, which see whole images
    mixup: float = 0.0  # probability
    hue: float = 0.015  # fraction of the hue, either way
    saturation: float = 0.7  # fraction, either way
    value: float = 0.4  # fraction, either way
    degrees: float = 0.0  # rotation, either way
    translate: float = 0.1  # fraction of the size, either way
    scale: float = 0.5  # zoom by 1 - scale to 1 + scale
    shear: float = 0.0  # degrees, either way
    flip_lr: float = 0.5  # probability
    flip_ud: float = 0.0  # probability


def load_recipe(path: str | Path, base: Recipe) -> Recipe:
    """Read key=value lines over the values of `base`, which an empty path leaves as they are.

    Raises DataError with every line that cannot be read.
    """
    if not path:
        return base
    kinds = {field.name: type(field.default) for field in fields(Recipe)}
    found: dict[str, Any] = {}
    mistakes = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', 'not a text file')}") from None
    for number, line in enumerate(lines, start=1):
        key, equals, value = (part.strip() for part in line.partition("#")[0].partition("="))
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            if key or equals:
                mistakes.append(f"{path}:{number}: does not know {key!r} (expected {', '.join(near or kinds)})")
            continue
        try:
            found[key] = kinds[key](value)
        except ValueError:
            mistakes.append(f"{path}:{number}: {key!r} expects a number, gets {value!r}")
        else:
            low, high = BOUNDS.get(key, (0, 1e6))
            if isinstance(found[key], str):
                if found[key] not in CHOICES[key]:
                    mistakes.append(f"{path}:{number}: {key!r} expects {' or '.join(CHOICES[key])}, gets {value!r}")
            elif not low <= found[key] <= high:
                mistakes.append(f"{path}:{number}: {key!r} expects {low} to {high}, gets {value}")
    if mistakes:
        raise DataError("\n".join(mistakes))
    return replace(base, **found)
