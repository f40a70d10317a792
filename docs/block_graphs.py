"""The graph of a macro, taken from the layers that it expands to: what docs/draw_blocks.py draws.

A route of one whole layer is a wire, no box. Gates of one layer ([eca], [ca], [sa]) are traced into their parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx
from torch import nn

from models import Darknet, parse
from models.attention import ChannelGate, Eca, SpatialGate
from models.cfg import Section
from models.layer import Layer
from models.layers_merge import Route

WIRES = ("getitem", "transpose")  # of a trace: they only arrange axes
HEAD = "[convolutional]\nfilters=18\n\n[yolo]\nmask=0,1,2\nanchors=1,1, 2,2, 3,3\nclasses=1\nnum=3\n"
SIDE = 64  # pixels of the input


@dataclass(frozen=True)
class Panel:
    """One drawing: a macro after a convolution of `channels`; of its units only number `unit`, where it is not None."""

    macro: str
    keys: str
    channels: int
    unit: int | None = None
    note: str = ""

    @property
    def text(self) -> str:
        keys = "\n".join(self.keys.split())
        before = f"[net]\nwidth={SIDE}\nheight={SIDE}\n\n[convolutional]\nfilters={self.channels}"
        return f"{before}\n\n[{self.macro}]\n{keys}\n\n{HEAD}"


@dataclass(frozen=True)
class Box:
    """A box of a drawing: what it says, and the boxes before it that it reads.

    `layer` is the number of the layer that it is, or that it is a part of where `gate` names its section.
    """

    label: str
    detail: str
    kind: str
    layer: int
    inputs: tuple[int, ...] = ()
    gate: str = ""


def build(panel: Panel) -> Darknet:
    """Build the network around a panel's macro, without memory for its weights."""
    with torch.device("meta"):
        return Darknet(parse(panel.text, f"[{panel.macro}]"))


def boxes(panel: Panel) -> list[Box]:
    """Give the boxes of a panel in the order of the layers, the input first."""
    model = build(panel)
    first, last = span(panel, model)
    source = model.layers[first - 1]
    found = [Box("input", str(source.channels), "input", first - 1)]
    place = {first - 1: 0}  # of every layer's output among the boxes
    for index in range(first, last):
        layer, section = model.layers[index], model.expanded.sections[index + 1]
        inputs = tuple(place[source] for source in layer.inputs)
        if isinstance(layer.module, Route) and layer.module.groups == 1 and len(inputs) == 1:
            place[index] = inputs[0]
            continue
        if isinstance(layer.module, (Eca, ChannelGate, SpatialGate)):
            found += _parts(layer, section.name, index, inputs[0], len(found))
        else:
            found.append(replace(_describe(layer, section, model.layers), layer=index, inputs=inputs))
        place[index] = len(found) - 1
    return found


def span(panel: Panel, model: Darknet) -> tuple[int, int]:
    """Give the first layer of a panel and the one after its last."""
    first, last = 1, len(model.layers) - 2  # between the convolution and the head
    if panel.unit is None:
        return first, last
    ends = [i + 1 for i in range(first, last) if model.expanded.sections[i + 1].name == "channel_shuffle"]
    return [first, *ends][panel.unit], ends[panel.unit]


def _describe(layer: Layer, section: Section, layers: Sequence[Layer]) -> Box:
    """Say what a layer of the expansion is, in a few words."""
    value = {key: option.value for key, option in section.options.items()}
    channels = str(layer.channels)
    match section.name:
        case "convolutional":
            window = f"{value['size']}×{value['size']}"
            kind = "depthwise" if int(value.get("groups", 1)) == layer.channels else "conv"
            stride = "" if value["stride"] == "1" else f" · stride {value['stride']}"
            activation = value["activation"].replace("_", " ")
            return Box(f"{window} {kind}", f"{channels} · {activation}{stride}", kind, 0)
        case "avgpool":
            return Box("mean", f"{channels} · over the map", "pool", 0)
        case "scale_channels":
            return Box("multiply", channels, "gate", 0)
        case "shortcut":
            return Box("add", channels, "merge", 0)
        case "route" if len(layer.inputs) > 1:
            return Box("concat", channels, "merge", 0)
        case "route":
            half = ("first", "second")[int(value["group_id"])]
            return Box(f"{half} half", channels, "split", 0)
        case "channel_shuffle":
            return Box("shuffle", f"{channels} · {value['groups']} groups", "split", 0)
    raise ValueError(f"no way to draw [{section.name}]")


def _parts(layer: Layer, gate: str, index: int, source: int, count: int) -> list[Box]:
    """Trace the module of a gate into boxes, which will stand from number `count` on."""
    found: list[Box] = []
    place: dict[torch.fx.Node, int] = {}
    for node in torch.fx.symbolic_trace(layer.module).graph.nodes:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        inputs = tuple(place[each] for each in node.all_input_nodes)
        if node.op == "placeholder":
            place[node] = source
        elif node.op == "output" or name in WIRES:
            place[node] = inputs[0]
        elif name in ("relu", "sigmoid"):  # stands in the box of what it activates
            place[node] = inputs[0]
            before = found[inputs[0] - count]
            found[inputs[0] - count] = replace(before, detail=f"{before.detail} · {name}".removeprefix(" · "))
        else:
            place[node] = count + len(found)
            part = layer.module.get_submodule(name) if node.op == "call_module" else None
            found.append(replace(_describe_part(name, part, node, layer), layer=index, inputs=inputs, gate=gate))
    return found


def _describe_part(name: str, part: nn.Module | None, node: torch.fx.Node, layer: Layer) -> Box:
    match name, part:
        case (("mean" | "amax"), _):
            detail = "1 · over channels" if node.args[1] == 1 else f"{layer.channels} · over the map"
            return Box({"mean": "mean", "amax": "maximum"}[name], detail, "pool", 0)
        case (("stack" | "cat"), _):
            return Box("concat" if name == "cat" else name, "", "merge", 0)
        case "sum", _:
            return Box("add", "", "merge", 0)
        case "mul", _:
            return Box("multiply", str(layer.channels), "gate", 0)
        case _, nn.Conv1d(kernel_size=(size,)):
            return Box(f"1-D conv of {size}", str(layer.channels), "conv", 0)
        case _, nn.Conv2d(kernel_size=(height, width)):
            return Box(f"{height}×{width} conv", str(part.out_channels), "conv", 0)
        case _, nn.Linear():
            return Box("linear", str(part.out_features), "conv", 0)
    raise ValueError(f"no way to draw {name}")
