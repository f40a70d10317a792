"""Darknet's own recipe: what [net] and the [yolo] sections of a cfg say, for `train.py --recipe darknet`.

Keys, defaults and formulas are those of AlexeyAB's Darknet. Reading marks a key as obeyed: the line that lists what a
cfg sets aside then leaves it out.
"""

import math
from dataclasses import dataclass

import numpy as np

from models import Cfg
from models.cfg import Section

POLICIES = ("constant", "steps", "step", "exp", "poly", "sig", "sigmoid", "random", "sgdr")
IOU_LOSSES = ("mse", "iou", "giou", "diou", "ciou")
MULTI_SCALE = 1.4  # `random=1` draws sizes up to this factor larger or smaller
HELD = 10  # iterations for which a drawn size holds


@dataclass(frozen=True)
class HeadRules:
    """What a [yolo] section says about its loss."""

    ignore_thresh: float = 0.5  # no objectness is asked of a box that overlaps a truth by more than this
    truth_thresh: float = 1.0  # a box that overlaps a truth by more than this answers for it
    iou_thresh: float = 1.0  # anchors whose shape overlaps a truth's by more than this answer for it too
    iou_thresh_kind: str = "iou"
    iou_loss: str = "mse"
    iou_normalizer: float = 0.75
    obj_normalizer: float = 1.0
    cls_normalizer: float = 1.0
    delta_normalizer: float = 1.0
    max_delta: float = math.inf
    is_smooth: bool = False  # objectness_smooth: the target is the overlap
    is_focal: bool = False
    label_smooth_eps: float = 0.0
    class_weights: tuple[float, ...] = ()  # from counters_per_class: the largest count over each
    max_boxes: int = 200  # truths counted per picture


@dataclass(frozen=True)
class Distortion:
    """How pictures are changed: crops by `jitter`, zoom by `resize`, colours, and what is joined."""

    jitter: float = 0.2  # fraction of a side that each edge moves by, either way
    resize: float = 1.0  # edges move out and in by up to this factor; below 1: out only
    hue: float = 0.0  # fraction of the circle, either way
    saturation: float = 1.0  # factor, or its inverse
    exposure: float = 1.0
    angle: float = 0.0  # degrees, either way
    is_flipped: bool = True
    is_mixed: bool = False
    is_mosaic: bool = False
    is_bounded: bool = False  # mosaic_bound: a box ends at the border of its quarter
    keeps_shape: bool = False  # letter_box


@dataclass(frozen=True)
class DarknetRecipe:
    """One training as [net] describes it."""

    batch: int = 1
    subdivisions: int = 1
    max_batches: int = 0
    learning_rate: float = 0.001
    learning_rate_min: float = 1e-5
    policy: str = "constant"
    burn_in: int = 0
    power: float = 4.0
    steps: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    step: int = 1
    scale: float = 1.0
    gamma: float = 1.0
    sgdr_cycle: int = 0
    sgdr_mult: int = 2
    momentum: float = 0.9
    decay: float = 1e-4
    is_adam: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    ema_alpha: float = 0.0
    random: float = 0.0  # multi-scale: 1 is MULTI_SCALE
    resize_step: int = 32
    distortion: Distortion = Distortion()
    heads: tuple[HeadRules, ...] = ()

    @property
    def mini_batch(self) -> int:
        """Pictures of one forward pass."""
        return self.batch // self.subdivisions


def read_darknet_recipe(cfg: Cfg) -> DarknetRecipe:
    """Read the recipe of a cfg. Its mistakes are noted there and told with those of the network."""
    net = cfg.sections[0]
    heads = [section for section in cfg.sections if section.name == "yolo"]
    for section in cfg.sections:
        if section.name in ("region", "Gaussian_yolo"):
            section.fail("is no head that --recipe darknet trains (expected [yolo], or --recipe darkslim)")
    policy = net.choice("policy", POLICIES, "constant")
    batch = net.int("batch", 1, minimum=1, maximum=65536)
    subdivisions = net.int("subdivisions", 1, minimum=1, maximum=65536)
    if batch % subdivisions:
        net.fail(f"expects batch={batch} to be a multiple of subdivisions={subdivisions}", "subdivisions")
        subdivisions = 1
    max_batches = net.int("max_batches", 0, minimum=0)
    steps = net.ints("steps", ()) if policy == "steps" else ()
    scales = net.floats("scales", ()) if policy == "steps" else ()
    if len(steps) != len(scales) or list(steps) != sorted(steps):
        net.fail(f"expects steps in rising order and as many scales, gets {len(steps)} and {len(scales)}", "steps")
    if policy == "poly" and not max_batches:
        net.fail("policy=poly expects 'max_batches'", "policy")
    is_sgdr, is_adam = policy == "sgdr", net.flag("adam")
    return DarknetRecipe(
        batch=batch,
        subdivisions=subdivisions,
        max_batches=max_batches,
        learning_rate=net.float("learning_rate", 0.001, minimum=1e-12, maximum=1e6),
        learning_rate_min=net.float("learning_rate_min", 1e-5, minimum=0, maximum=1e6) if is_sgdr else 0.0,
        policy="sigmoid" if policy == "sig" else policy,
        burn_in=(burn_in := net.int("burn_in", 0, minimum=0)),
        power=net.float("power", 4.0, minimum=0, maximum=100) if burn_in or policy in ("poly", "random") else 4.0,
        steps=steps,
        scales=scales,
        step=net.int("step", 1, minimum=1) if policy in ("step", "sigmoid") else 1,
        scale=net.float("scale", 1.0, minimum=0) if policy == "step" else 1.0,
        gamma=net.float("gamma", 1.0, minimum=0) if policy in ("exp", "sigmoid") else 1.0,
        sgdr_cycle=net.int("sgdr_cycle", max(1, max_batches), minimum=1) if is_sgdr else 0,
        sgdr_mult=net.int("sgdr_mult", 2, minimum=1) if is_sgdr else 2,
        momentum=net.float("momentum", 0.9, minimum=0, maximum=1) if not is_adam else 0.0,
        decay=net.float("decay", 1e-4, minimum=0, maximum=1),
        is_adam=is_adam,
        betas=_read_betas(net) if is_adam else (0.9, 0.999),
        eps=net.float("eps", 1e-6, minimum=1e-12) if is_adam else 1e-6,
        ema_alpha=net.float("ema_alpha", 0.0, minimum=0, maximum=1),
        random=_last([section.float("random", 0.0, minimum=0, maximum=10) for section in heads], 0.0),
        resize_step=net.int("resize_step", 32, minimum=1, maximum=4096),
        distortion=_read_distortion(net, heads),
        heads=tuple(map(_read_rules, heads)),
    )


def rate(recipe: DarknetRecipe, iteration: int, seed: int = 0) -> float:
    """Give the learning rate of an iteration, the first of which is 1, as Darknet counts when it updates."""
    lr = recipe.learning_rate
    if iteration < recipe.burn_in:
        return lr * (iteration / recipe.burn_in) ** recipe.power
    match recipe.policy:
        case "steps":
            passed = [scale for step, scale in zip(recipe.steps, recipe.scales, strict=True) if step <= iteration]
            return lr * math.prod(passed)
        case "step":
            return lr * recipe.scale ** (iteration // recipe.step)
        case "exp":
            return lr * recipe.gamma**iteration
        case "poly":
            return lr * max(0.0, 1 - iteration / recipe.max_batches) ** recipe.power
        case "sigmoid":
            exponent = min(700.0, recipe.gamma * (iteration - recipe.step))  # e^700: the largest a float holds
            return lr / (1 + math.exp(exponent))
        case "random":
            return lr * np.random.default_rng([seed, iteration]).random() ** recipe.power
        case "sgdr":
            start, cycle = 0, recipe.sgdr_cycle
            while start + cycle < iteration:
                start, cycle = start + cycle, cycle * recipe.sgdr_mult
            swing = (1 + math.cos(math.pi * (iteration - start) / cycle)) / 2
            return recipe.learning_rate_min + (lr - recipe.learning_rate_min) * swing
    return lr


def average_decay(recipe: DarknetRecipe, step: int) -> float:
    """Give the decay of the weights' average at a step: `ema_alpha` in the second half of the training, 0 before."""
    return recipe.ema_alpha if 2 * step >= recipe.max_batches else 0.0


def drawn_sizes(recipe: DarknetRecipe, size: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """Give the sizes (height, width) that `random` draws from: multiples of `resize_step` about `size`."""
    factor = MULTI_SCALE if recipe.random == 1 else recipe.random
    if factor == 0:
        return [size]
    step = math.lcm(recipe.resize_step, stride)
    longer, factor = max(size), max(factor, 1 / factor)
    low, high = (round(longer * zoom / step) + 1 for zoom in (1 / factor, factor))  # Darknet adds a step
    scaled = [number * step / longer for number in range(low, high + 1)]
    return [(max(1, round(size[0] * s / step)) * step, max(1, round(size[1] * s / step)) * step) for s in scaled]


def _read_betas(net: Section) -> tuple[float, float]:
    return net.float("B1", 0.9, minimum=0, maximum=0.9999999), net.float("B2", 0.999, minimum=0, maximum=0.9999999)


def _read_distortion(net: Section, heads: list[Section]) -> Distortion:
    return Distortion(
        jitter=_last([section.float("jitter", 0.2, minimum=0, maximum=0.49) for section in heads], 0.2),
        resize=_last([section.float("resize", 1.0, minimum=0.1, maximum=10) for section in heads], 1.0),
        hue=net.float("hue", 0.0, minimum=0, maximum=1),
        saturation=net.float("saturation", 1.0, minimum=1e-3, maximum=1e3),
        exposure=net.float("exposure", 1.0, minimum=1e-3, maximum=1e3),
        angle=net.float("angle", 0.0, minimum=0, maximum=180),
        is_flipped=net.flag("flip", True),
        is_mixed=net.flag("mixup"),
        is_mosaic=(is_mosaic := net.flag("mosaic")),
        is_bounded=net.flag("mosaic_bound") if is_mosaic else False,
        keeps_shape=net.flag("letter_box"),
    )


def _read_rules(section: Section) -> HeadRules:
    counts = section.floats("counters_per_class", ())
    if any(count <= 0 for count in counts):
        section.fail("'counters_per_class' expects numbers above 0", "counters_per_class")
        counts = ()
    classes = section.int("classes", 20)
    if counts and len(counts) != classes:
        section.fail(
            f"'counters_per_class' expects {classes} numbers, one a class, gets {len(counts)}", "counters_per_class"
        )
    weight = {"minimum": 0.0, "maximum": 1e6}
    return HeadRules(
        ignore_thresh=section.float("ignore_thresh", 0.5, minimum=0, maximum=1),
        truth_thresh=section.float("truth_thresh", 1.0, minimum=0, maximum=1),
        iou_thresh=section.float("iou_thresh", 1.0, minimum=0, maximum=1),
        iou_thresh_kind=section.choice("iou_thresh_kind", IOU_LOSSES[1:], "iou"),
        iou_loss=section.choice("iou_loss", IOU_LOSSES, "mse"),
        iou_normalizer=section.float("iou_normalizer", 0.75, **weight),
        obj_normalizer=section.float("obj_normalizer", 1.0, **weight),
        cls_normalizer=section.float("cls_normalizer", 1.0, **weight),
        delta_normalizer=section.float("delta_normalizer", 1.0, **weight),
        max_delta=section.float("max_delta", math.inf, minimum=0, maximum=math.inf),
        is_smooth=section.flag("objectness_smooth"),
        is_focal=section.flag("focal_loss"),
        label_smooth_eps=section.float("label_smooth_eps", 0.0, minimum=0, maximum=1),
        class_weights=tuple(max(counts) / count for count in counts),
        max_boxes=section.int("max", 200, minimum=1),
    )


def _last(values: list[float], default: float) -> float:
    """Give the value of the last head, by which Darknet goes."""
    return values[-1] if values else default
