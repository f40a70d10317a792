"""A cfg in the making: sections written one after the other, numbered as `route` and `shortcut` count them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

STRIDES = {"C3": 8, "C4": 16, "C5": 32}  # of the maps that a backbone hands to a head
WIDTHS = ("filters", "hidden", "inner")  # keys that a width scales
FEW_BITS, FEW_RANGE = 2, 3  # bits whose levels a range of 10 spreads too far (docs/quantisation.md), and theirs
# Where squeeze and excitation, CBAM and ECA stand in a tiny network with their published parameter counts
ATTENTIONS = {
    "none": {},
    "se": {"reduction": 8},
    "cbam": {"ratio": 16, "kernel_size": 7},
    "eca": {"kernel_size": 3},
}


@dataclass
class Draft:
    """The sections so far, and what shapes those that follow.

    `width` scales all channels but the heads' own, to multiples of 8; `bits` is 0 or quantises every convolution but
    the first one and the heads' last; `attention` goes after the maps that the head `reads`; `yolos` are the keys of
    the [yolo] sections to come; `outputs` are the layers of the maps C3, C4 and C5; `neck` has the filters of a light
    head at each of them, and its repeats.
    """

    size: int
    width: float = 1.0
    bits: int = 0
    attention: str = "none"
    reads: Sequence[str] = ()
    yolos: list[dict[str, object]] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    neck: tuple[tuple[int, int, int], int] = ((64, 96, 160), 2)

    def add(self, name: str, keys: dict[str, object] | None = None, *, note: str = "") -> int:
        """Write a section, under a comment where `note` has one, and give its layer's number."""
        lines = [f"# {note}"] if note else []
        lines += [f"[{name}]", *(f"{key}={value}" for key, value in (keys or {}).items())]
        self.sections.append("\n".join(lines) + "\n")
        return len(self.sections) - 1

    def scaled(self, filters: int) -> int:
        """Scale a number of channels by the width: a multiple of 8, at least 8; at width 1 the number itself."""
        return filters if self.width == 1 else max(8, round(filters * self.width / 8) * 8)

    def conv(self, filters: int, size: int = 3, *, stride: int = 1, activation: str = "leaky") -> int:
        """Write a convolution with batch normalisation."""
        keys = {"batch_normalize": 1, "filters": self.scaled(filters), "size": size, "stride": stride, "pad": 1}
        name = "quan_convolutional" if self.bits and self.sections else "convolutional"
        bits = self._bit_keys() if self.sections else {}
        return self.add(name, keys | {"activation": activation} | bits)

    def macro(self, name: str, **keys: object) -> int:
        """Write a macro of convolutions."""
        scaled = {key: self.scaled(value) if key in WIDTHS else value for key, value in keys.items()}
        return self.add(name, scaled | self._bit_keys())

    def maxpool(self, size: int, stride: int, **keys: object) -> int:
        """Write a max pooling."""
        return self.add("maxpool", {"size": size, "stride": stride} | keys)

    def upsample(self) -> int:
        """Write an upsampling to twice the sides."""
        return self.add("upsample", {"stride": 2})

    def route(self, *layers: int, note: str = "") -> int:
        """Write a route: negative numbers count back from it, others are layers."""
        return self.add("route", {"layers": ",".join(map(str, layers))}, note=note)

    def with_map(self, level: str) -> int:
        """Write a route of the layer before it and of a map of the backbone."""
        return self.route(-1, self.outputs[level], note=f"with {level}")

    def output(self, level: str, *, is_attended: bool = True) -> None:
        """Hand the last layer to the head as `level`, behind attention if the head reads it."""
        if is_attended and level in self.reads:
            self.attend()
        side, layer = self.size // STRIDES[level], len(self.sections) - 1
        self.outputs[level] = layer
        self.sections[layer] = f"# {level}: {side}x{side}, layer {layer}\n" + self.sections[layer]

    def attend(self) -> None:
        """Write the attention, if there is any."""
        if self.attention != "none":
            self.add(self.attention, ATTENTIONS[self.attention])

    def predict(self, activation: str = "linear") -> int:
        """Write the next head: a convolution, which stays float, and [yolo]."""
        keys = self.yolos.pop(0)
        filters = len(str(keys["mask"]).split(",")) * (5 + int(str(keys["classes"])))
        self.add("convolutional", {"filters": filters, "size": 1, "stride": 1, "pad": 1, "activation": activation})
        return self.add("yolo", keys)

    def _bit_keys(self) -> dict[str, object]:
        if not self.bits:
            return {}
        narrow = {"a_range": FEW_RANGE} if self.bits <= FEW_BITS else {}
        return {"w_bits": self.bits, "a_bits": self.bits} | narrow
