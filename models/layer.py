"""What a builder makes of a section, and the arithmetic that builders share.

A builder reads its section's keys and returns a Layer; a mistake is noted in the section and the builder goes on with
the nearest thing that can be built, so that one report tells all mistakes of a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from .activations import ACTIVATIONS
from .cfg import Section
from .channels import Flow, same
from .quant import STATE
from .yolo import HeadSpec

MAX_FILTERS, MAX_KERNEL = 65536, 1024  # far beyond any network: larger values are typing mistakes
MAX_VALUES = 2**30  # weights of a network, values of a map: 4 GiB each, four times those of the largest known

BN_EPS = 1e-6  # OpenCV's; Darknet's 1e-5 differs by less than 4e-4 in any score of real weights (measured)
BN_MOMENTUM = 0.03  # a short training's statistics settle within some hundred steps


@dataclass(frozen=True)
class Rules:
    """What any section may say about training and loading its layer."""

    stop_backward: int = 0  # 1: this layer and all before it are frozen, N: during the first N iterations
    is_detached: bool = False  # no gradient passes back through it
    train_only_bn: bool = False  # of this layer and all before it only the statistics of batch normalisation move
    skip_load: bool = False  # a .weights file does not hold it
    skip_scales: bool = False  # a .weights file holds neither its scales nor its statistics


@dataclass(frozen=True)
class Layer:
    """A built section. `inputs` are indices of earlier layers (-1: the image), `size` is (height, width) at the cfg's
    own input size, `stride` the input pixels a cell spans, `flops` counts a multiply-add as two, as Darknet does,
    `multiple` is what the sides of an input must divide by.

    `flow` says how the ids of channels pass (channels.py). `tensors` names its parameters in .weights order, each with
    a letter an axis: "o" its own channels, "i" those of its input, "g" those of the first of its groups, "-" neither;
    what is left over is "-". An axis may hold several numbers a channel, side by side. `widths` are the keys that say
    how wide it is: "o", "i", or a number that the cfg leaves to be derived from the channels.
    """

    module: nn.Module
    inputs: tuple[int, ...]
    channels: int
    size: tuple[int, int]
    stride: tuple[float, float]
    flow: Flow = same
    tensors: Mapping[str, str] = field(default_factory=dict)
    widths: Mapping[str, str | int] = field(default_factory=dict)
    flops: int = 0
    head: HeadSpec | None = None
    ends_classifier: bool = False
    multiple: tuple[float, float] = (1, 1)
    rules: Rules = Rules()
    references: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # layers that its index keys name
    owner: int | None = None  # the layer whose tensors it uses
    guesses: frozenset[str] = frozenset()  # "channels", "size": what a mistake before makes uncertain

    @property
    def has_weights(self) -> bool:
        """Tell whether it has tensors beside what quantisers learn or see."""
        return any(not name.endswith(STATE) for name in self.tensors)

    @property
    def sets_channels(self) -> bool:
        """Tell whether the cfg says how many channels it has, whatever its inputs have."""
        return "o" in self.widths.values()


@dataclass
class Built:
    """The layers so far, as the builder of the next one sees them."""

    image: Layer
    layers: list[Layer] = field(default_factory=list)
    stores_maps: bool = False  # on 8 bits, as [net] asks
    filters_line: int = 0  # where the last convolution says filters=
    weights: int = 0  # that were asked for so far
    sections: list[Section] = field(default_factory=list)  # of the layers, as the expanded cfg has them
    places: list[int] | None = None  # after a macro: the last layer of every section that is written in the cfg
    renumbered: dict[str, str] = field(default_factory=dict)  # index keys of this section, as they count layers
    references: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the layers that they name

    @property
    def index(self) -> int:
        return len(self.layers)

    @property
    def previous(self) -> Layer:
        return self.at(self.index - 1)

    def at(self, index: int) -> Layer:
        """Give the layer of an absolute index; -1 is the image."""
        return self.layers[index] if index >= 0 else self.image

    def pass_on(self, module: nn.Module) -> Layer:
        """Make a layer of the previous one's shape."""
        source = self.previous
        return Layer(module, (self.index - 1,), source.channels, source.size, source.stride)

    def afford(self, section: Section, weights: int, key: str) -> None:
        """Count weights before they are made. Raises CfgError where the network gets absurdly large."""
        self.weights += weights
        if self.weights > MAX_VALUES:
            section.fail(f"brings the network to {self.weights:,} weights (expected at most {MAX_VALUES:,})", key)
            section.cfg.raise_mistakes()

    def mismatch(
        self, section: Section, sources: Sequence[Layer], kind: str, message: str, key: str = "", *, keys: str = ""
    ) -> None:
        """Note that the "channels" or "size" of sources do not fit.

        It is no mistake of its own where an earlier one makes them uncertain, or one of the `keys` that were read.
        """
        if section.unsure.isdisjoint(keys.split()) and not any(kind in source.guesses for source in sources):
            section.fail(message, key)

    def resolve(self, section: Section, key: str) -> list[int]:
        """Read layer indices, negative ones relative to this layer, and make them absolute.

        They count written sections: where a macro makes several layers of one, it is the last of them.
        """
        places = range(self.index) if self.places is None else self.places
        found, values = [], []
        for written in section.ints(key):
            index = written + len(places) if written < 0 else written
            if 0 <= index < len(places):
                found.append(places[index])
                values.append(places[index] - self.index if written < 0 else places[index])
            else:
                before = f"layers 0 to {len(places) - 1} stand" if places else "no layer stands"
                section.fail(f"{key!r} names layer {written}, but {before} before it", key)
        if self.places is not None and found:
            self.renumbered[key] = ",".join(map(str, values))
        self.references[key] = tuple(found)
        return found or [self.index - 1]


Builder: TypeAlias = Callable[[Section, Built], Layer]


def read_rules(section: Section) -> Rules:
    """Read the keys that any section may have."""
    return Rules(
        section.int("stopbackward", 0, minimum=0),
        section.flag("onlyforward"),
        section.flag("train_only_bn"),
        section.flag("dontload"),
        section.flag("dontloadscales"),
    )


def read_activation(section: Section, default: str) -> nn.Module:
    """Read `activation`."""
    return ACTIVATIONS[section.choice("activation", ACTIVATIONS, default)]()


def read_strides(section: Section) -> tuple[int, int]:
    """Read (stride_y, stride_x), both `stride` where they are not written or below 1, as Darknet's -1 is."""
    stride = section.int("stride", 1, minimum=1, maximum=MAX_KERNEL)
    y, x = (section.int(key, stride, minimum=-1, maximum=MAX_KERNEL) for key in ("stride_y", "stride_x"))
    return (y if y > 0 else stride), (x if x > 0 else stride)


def read_odd(section: Section, key: str, default: int, *, minimum: int = 1, alias: str = "") -> int:
    """Read the side of a window that has a cell in its middle; `minimum` may be 0, which passes."""
    value = section.int(key, default, minimum=minimum, maximum=MAX_KERNEL - 1, alias=alias)
    if value == 0 or value % 2:
        return value
    key = key if key in section.options else alias
    section.fail(f"{key!r} expects an odd number, gets {value} (set {key}={value + 1})", key)
    section.unsure.add(key)
    return value + 1


def slide(section: Section, built: Built, kernel: int, stride: tuple[int, int], padding: int) -> tuple[int, int]:
    """Give the output size of a sliding window over the previous layer; `padding` counts both sides."""
    source = built.previous
    height, width = window(source.size, kernel, stride, padding)
    if height < 1 or width < 1:
        message = f"has a window of {kernel}, but its input is only {shape(source)} (padding {padding})"
        built.mismatch(section, [source], "size", message, "size", keys="size padding pad dilation")
    return max(1, height), max(1, width)


def window(size: tuple[int, int], kernel: int, stride: tuple[int, int], padding: int) -> tuple[int, int]:
    """Count the places of a window on a map of `size`; `padding` counts both sides."""
    return (size[0] + padding - kernel) // stride[0] + 1, (size[1] + padding - kernel) // stride[1] + 1


def coarser(source: Layer, stride: tuple[int, int]) -> tuple[float, float]:
    """Give the pixels that a cell spans after a step of `stride` cells."""
    return source.stride[0] * stride[0], source.stride[1] * stride[1]


def shape(layer: Layer) -> str:
    """Write the size of a map."""
    return f"{layer.size[0]}×{layer.size[1]}"
