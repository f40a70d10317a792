"""The reference of the cfg language: every section and key that is read, with its default and its meaning.

Kind and default are found by building small networks of sections that note what is asked of them; MEANINGS says what a
key is for. `python -m utils.lint --keys` prints the result, which is docs/cfg-reference.md.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from models import CfgError, Darknet, parse
from models.activations import ACTIVATIONS
from models.cfg import Section
from models.layers import SECTIONS, TRAINER_KEYS
from models.macros import MACROS

INTRODUCTION = """\
# The cfg language

`python -m utils.lint --keys` writes this text from the code that reads cfgs.

A cfg is a list of sections, each a `[name]` and below it lines `key=value`. The first is `[net]`, every other one is a
layer or a macro, which stands for several; indices count the sections as written from 0, negative ones back from the
section that names them. White space means nothing, `#` and `;` start a comment, the first of two equal keys holds. A
key that is not listed here is an error, or, with `--allow-unknown`, a warning. Darknet's own keys that describe its
trainer are accepted; `train.py --recipe darknet` obeys those that docs/training.md lists, all others are set aside.
Where the default is empty, it follows another key, or the key means nothing unless it is written."""

COMMON = "every layer"
MAKERS: dict[str, Callable[..., object]] = {**SECTIONS, **MACROS}

STRIDES = {
    "stride": "step in both directions",
    "stride_x": "step along the columns (unwritten: `stride`)",
    "stride_y": "step along the rows (unwritten: `stride`)",
}
POOL = {
    **STRIDES,
    "size": "side of the window (unwritten: `stride`)",
    "padding": "cells around the map, both sides together, the smaller half left and above; they are no part of the"
    " result (unwritten: `size`-1)",
}
WINDOW = {
    **STRIDES,
    "size": "side of the kernel",
    "pad": "1: pad by half the kernel, whatever `padding` says",
    "padding": "cells of zeros on every side",
    "dilation": "step between the cells under the kernel; the padding grows with it",
    "batch_normalize": "1: batch normalisation in place of a bias",
    "activation": "activation of the output",
    "xnor": "1: weights of one bit with a scale a filter, inputs of one bit, no groups",
}
CONVOLUTION = {
    **WINDOW,
    "filters": "output channels",
    "binary": "1: weights of one bit with a scale a filter",
    "bin_output": "packs the output of an xnor layer, which changes no number",
    "antialiasing": "1: blur by [1 2 1] before the stride is taken, 2: by the mean of 2×2 cells",
    "cbn": "1: as `batch_normalize`; it changes the statistics of training alone",
    "share_index": "layer whose weights, bias and batch normalisation are used",
}
GROUPS = {"groups": "groups of channels that are convolved apart; as many as channels: depthwise"}
BLUR = {"antialiasing": CONVOLUTION["antialiasing"]}
HEAD = {
    "anchors": "pairs of width and height in pixels of the network's input",
    "mask": "which pairs of `anchors` this head uses (unwritten: the first `num`)",
    "num": "pairs in `anchors`; where it differs, their count holds",
    "classes": "classes",
    "scale_x_y": "stretch of a box's centre beyond its cell",
    "nms_kind": "how boxes suppress each other: by IoU (`cornersnms` too), or by IoU and distance of centres",
    "beta_nms": "exponent of the distance of centres in `diounms`",
}

GATE = {"se": "hidden channels of squeeze and excitation; 0: none", "gate": "activation of its gate"}
QUANTISED = dict.fromkeys(
    ("w_bits", "a_bits", "method", "symmetric", "a_range"),
    "as in `[quan_convolutional]`, which the convolutions are where one of the five is written",
)
BLOCK = {
    "filters": "output channels",
    "hidden": "channels of the convolutions inside",
    "activation": "activation of the convolutions",
    **QUANTISED,
}
DEPTHWISE = {
    **BLOCK,
    **GATE,
    "hidden": "channels of the depthwise convolution",
    "size": "side of the depthwise kernel, odd",
    "stride": "step of the depthwise convolution",
}
STAGE = {
    "activation": "activation of the 1×1 convolutions",
    "hidden": "channels of the first unit's second branch before its last convolution",
    **QUANTISED,
}

# What the keys of a section are for; a section stands under its first name in SECTIONS, or its name in MACROS.
MEANINGS: dict[str, dict[str, str]] = {
    "net": {
        "height": "rows of the network's input",
        "width": "columns of the network's input",
        "channels": "channels of the network's input",
        "map_bits": "8: of a quantised network, the maps that its export stores on levels of their own have these in"
        " training too ([quantisation.md](quantisation.md#integers)); 32: floating point",
    },
    COMMON: {
        "stopbackward": "1: this layer and all before it stay as they are, N: during the first N iterations",
        "onlyforward": "1: no gradient passes back through the layer",
        "train_only_bn": "1: of this layer and all before it only the statistics of batch normalisation move",
        "dontload": "1: a .weights file that is read holds nothing of the layer",
        "dontloadscales": "1: a .weights file that is read holds neither its scales nor its statistics",
    },
    "convolutional": {**CONVOLUTION, **GROUPS},
    "depthwise": CONVOLUTION,
    "quan_convolutional": {
        **CONVOLUTION,
        **GROUPS,
        **dict.fromkeys(("binary", "xnor"), "0; `w_bits=1` and `a_bits=1` are what it has instead"),
        "w_bits": "bits of the weights, 1 to 16; 32: floating point",
        "a_bits": "bits of the inputs, 1 to 16; 32: floating point",
        "a_range": "value at which the inputs saturate, with `lsq` and `iao` until training has seen a batch; without"
        " `symmetric` negative ones become 0, but in a range that `iao` has seen",
        "method": "how the grids are found: fixed, by learned steps, or from the ranges seen"
        " ([quantisation.md](quantisation.md)); `iao` in `[IAO_convolutional]`",
        "symmetric": "1: inputs may be negative, on a grid around 0; of `lsq` and `iao`",
    },
    "connected": {
        "output": "output channels",
        "batch_normalize": WINDOW["batch_normalize"],
        "activation": WINDOW["activation"],
    },
    "batchnorm": {},
    "crnn": {
        **WINDOW,
        "hidden": "channels of the state",
        "output": "output channels",
        "groups": "groups of channels that are convolved apart",
        "shortcut": "1: add the state of the frame before, zero in a picture",
    },
    "maxpool": {**POOL, **BLUR},
    "local_avgpool": POOL,
    "avgpool": {},
    "upsample": {"stride": "factor of both sides, nearest neighbour"},
    "reorg3d": {"stride": "side of the cells that become channels", "reverse": "1: channels become cells"},
    "reorg": {"stride": "side of the cells that become channels, in YOLOv2's own order"},
    "crop": {
        "crop_height": "rows that are kept",
        "crop_width": "columns that are kept",
        "noadjust": "1: leave the values; 0: map 0..1 to -1..1",
    },
    "dropout": {"probability": "share of values that training zeroes"},
    "activation": {"activation": "activation of the previous layer's output"},
    "empty": {},
    "route": {
        "layers": "layers to concatenate along the channels",
        "groups": "parts that every layer is cut into",
        "group_id": "which of these parts is taken",
    },
    "shortcut": {
        "from": "layers to add to the previous one, whose shape the sum has; of unequal channels the first ones count",
        "activation": "activation of the sum",
        "weights_type": "learned weights of the summands: one a layer (`per_feature`, `per_layer`) or one a channel",
        "weights_normalization": "how these weights are made positive with a sum of one",
    },
    "scale_channels": {
        "from": "layer whose channels are multiplied by the previous layer's",
        "scale_wh": "1: the previous layer has one channel and scales positions",
        "activation": "activation of the product",
    },
    "sam": {
        "from": "layer that is multiplied by the previous one, value by value",
        "activation": "activation of the product",
    },
    "channel_shuffle": {"groups": "groups of channels, of which one after the other gives its next"},
    "eca": {"kernel_size": "neighbours that a gate looks at, an odd number; 0: as many as fit the channels"},
    "ca": {
        "ratio": "how many times fewer channels the hidden layer has, at least one",
        "hidden": "channels of the hidden layer, whatever `ratio` says",
    },
    "sa": {"kernelsize": "side of the kernel, odd"},
    "yolo": {**HEAD, "new_coords": "1: the convolution before is logistic, sizes are squares"},
    "Gaussian_yolo": {**HEAD, "yolo_point": "the point of a box that x and y tell; training knows the centre alone"},
    "region": {
        "anchors": "pairs of width and height in cells",
        "num": "how many pairs of `anchors` this head uses",
        "coords": "numbers that place a box; 4",
        "classes": "classes",
        "softmax": "1: softmax over the classes, else a logistic each",
    },
    "contrastive": {"yolo_layer": "the head that the loss belongs to", "classes": "classes of the loss"},
    "softmax": {
        "groups": "parts that get a softmax each",
        "temperature": "divisor of the values before it",
        "spatial": "1: over the channels of every cell, else over all values",
    },
    "cost": {},
    "se": {
        "reduction": "how many times fewer channels the hidden convolution has, at least one",
        "hidden": "channels of the hidden convolution, whatever `reduction` says",
        "activation": "activation of the gate",
    },
    "cbam": {"ratio": "that of `[ca]`", "kernel_size": "that of `[sa]`"},
    "residual": {
        "hidden": "channels of the 1×1 convolution (unwritten: half of the input's)",
        "activation": BLOCK["activation"],
        **QUANTISED,
        "repeat": "blocks, one after the other",
    },
    "csp": {
        **BLOCK,
        "hidden": "channels of either way (unwritten: half of `filters`)",
        "inner": "channels between the two convolutions of a residual block (unwritten: `hidden`)",
        "repeat": "residual blocks",
    },
    "csp_tiny": {
        "filters": "channels of the first convolution and of the last, even",
        "activation": BLOCK["activation"],
        "join": "1: put out the first and the last convolution side by side; 0: the last alone",
        **QUANTISED,
    },
    "elan": {
        **BLOCK,
        "hidden": "channels of every convolution but the last (unwritten: half of `filters`)",
        "size": "side of the kernels in the chain, odd",
        "repeat": "convolutions in the chain",
    },
    "inverted_residual": DEPTHWISE,
    "ghost_bottleneck": {
        **DEPTHWISE,
        "filters": "output channels, even",
        "hidden": "channels between the two ghost modules, even",
        "size": "side of the depthwise kernels outside the ghost modules, odd",
        "stride": "step of the block",
        "activation": "activation of the first ghost module",
    },
    "osa": {
        **BLOCK,
        "hidden": "channels of every 3×3 convolution",
        "convs": "3×3 convolutions",
        "ese": "1: gate the output by effective squeeze and excitation",
        "residual": "1: add the input, which needs as many channels as `filters`",
    },
    "shuffle_stage": {
        **STAGE,
        "filters": "output channels, even",
        "units": "units, of which the first halves the size",
    },
    "stage2": {**STAGE, "out_channels": "output channels, even"},
}

# Lines that open branches of a builder, or show that a default follows another key; tried besides an empty section.
VARIANTS: dict[str, tuple[str, ...]] = {
    "convolutional": ("share_index=0",),
    "depthwise": ("share_index=0",),
    "quan_convolutional": ("share_index=0",),
    "yolo": ("num=2",),
    "Gaussian_yolo": ("num=2",),
    "csp": ("filters=8", "hidden=8"),
    "elan": ("filters=8",),
    "shuffle_stage": ("filters=8",),
    "stage2": ("out_channels=8",),
}

KINDS = {
    "an integer": "integer",
    "a number": "number",
    "integers between commas": "integers",
    "numbers between commas": "numbers",
}


@dataclass(frozen=True)
class Key:
    """How a key is read: the kind of its value, and its default, None where it must be written."""

    name: str
    kind: str
    default: object


@dataclass(eq=False)
class Recorder(Section):
    """A section that tells `note` of every key that is read. A copy of it tells the same function."""

    note: Callable[[Key], object] = print

    def int(self, key: str, default: Any = None, *, alias: str = "", **limits: Any) -> Any:
        if alias:
            self.note(Key(alias, f"as `{key}`", ""))
        return super().int(key, default, alias=alias, **limits)

    def choice(self, key: str, choices: Collection[str], default: str) -> str:
        kind = "activation" if choices is ACTIVATIONS else ", ".join(f"`{choice}`" for choice in choices)
        self.note(Key(key, kind, default))
        return super().choice(key, choices, default)

    def _read(self, key: str, default: Any, fallback: Any, kind: str, convert: Callable[[str], Any]) -> Any:
        self.note(Key(key, "0 or 1" if isinstance(default, bool) else KINDS.get(kind, kind), default))
        return super()._read(key, default, fallback, kind, convert)


def section_names() -> dict[str, list[str]]:
    """Give the names of every kind of layer and macro, the one that MEANINGS uses first."""
    names: dict[str, list[str]] = {}
    for name, builder in MAKERS.items():
        first = next(first for first in [*names, name] if MAKERS[first] is builder)
        names.setdefault(first, []).append(name)
    return names


def read_keys() -> dict[str, dict[str, Key]]:
    """Find every key that is read, under the section's first name; those of all layers under COMMON."""
    found = {"net": _record("net", 0), **{name: _record(name, -1) for name in section_names()}}
    layers = [keys for name, keys in found.items() if name != "net"]
    common = set.intersection(*map(set, layers))
    shared = {key: layers[0][key] for key in layers[0] if key in common}
    own = {name: {key: value for key, value in keys.items() if key not in common} for name, keys in found.items()}
    return {"net": found["net"], COMMON: shared, **{name: keys for name, keys in own.items() if name != "net"}}


def _record(name: str, place: int) -> dict[str, Key]:
    """Build small networks with the section at `place` recording, and join what was read of it.

    A default is empty where it follows another key, or where the key is read only if it is written.
    """
    runs = [_reads(name, place, lines) for lines in ("", "stride=3\nsize=7", *VARIANTS.get(name, ()))]
    keys = {key.name: key for run in (*runs, runs[0]) for key in run.values()}
    return {
        name: key if {run.get(name) for run in runs} == {key} else replace(key, default="")
        for name, key in keys.items()
    }


def _reads(name: str, place: int, lines: str) -> dict[str, Key]:
    """Give the keys that building reads of a section that says `lines`."""
    reads: dict[str, Key] = {}
    tail = "" if name == "net" else f"[{name}]\n{lines}\n"
    filters = 32 if lines else 16  # a default may follow them
    cfg = parse(f"[net]\n[convolutional]\nfilters={filters}\n{tail}")
    cfg.sections[place] = Recorder(**vars(cfg.sections[place]), note=lambda key: reads.setdefault(key.name, key))
    with suppress(CfgError), torch.device("meta"):  # the section lacks what must be written, or is no head
        Darknet(cfg)
    return reads


def reference() -> str:
    """Write the reference in Markdown."""
    names, keys = section_names(), read_keys()
    idle = sorted(set.intersection(*(set(TRAINER_KEYS.get(name, ())) for name in MAKERS)))
    parts = [INTRODUCTION, "## `[net]`", *_table("net", keys.pop("net")), *_set_aside(TRAINER_KEYS["net"])]
    parts += ["## Every layer", *_table(COMMON, keys.pop(COMMON)), *_set_aside(idle)]
    for name, own in keys.items():
        parts.append("## " + ", ".join(f"`[{each}]`" for each in names[name]) + (", a macro" if name in MACROS else ""))
        sentence = (MAKERS[name].__doc__ or "").partition("\n")[0].removeprefix("Build ").removeprefix("Write ")
        parts += [sentence] if sentence != f"[{name}]." else []
        parts += [*_table(name, own), *_set_aside(key for key in TRAINER_KEYS.get(name, ()) if key not in idle)]
    activations = ", ".join(f"`{activation}`" for activation in ACTIVATIONS)
    parts += ["## Activations", activations + "."]
    return "\n\n".join(parts) + "\n"


def _table(name: str, keys: dict[str, Key]) -> Iterator[str]:
    meanings = MEANINGS.get(name, {})
    rows = [f"| `{key.name}` | {key.kind} | {_default(key)} | {meanings.get(key.name, '')} |" for key in keys.values()]
    if rows:
        yield "\n".join(["| key | value | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _default(key: Key) -> str:
    match key.default:
        case None:
            return "must be written"
        case bool(value):
            return str(int(value))
        case float(value):
            return f"{value:g}"
        case tuple(values):
            return ",".join(f"{value:g}" for value in values)
        case value:
            return str(value)


def _set_aside(keys: Iterable[str]) -> Iterator[str]:
    if words := ", ".join(f"`{key}`" for key in keys):
        yield f"Set aside: {words}."
