"""The network: a Cfg becomes an nn.Module whose forward pass is Darknet's own loop over its layers."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cfg import Cfg, CfgError, Section, suggest
from .channels import Channels, Line
from .layer import MAX_VALUES, Built, Layer, Rules, read_rules
from .layers import REFUSED, SECTIONS, TRAINER_KEYS
from .layers_conv import Convolution
from .layers_dense import Connected
from .macros import MACROS, primitives
from .storage import Stored, store_maps
from .yolo import HeadSpec, decode_all, diou_beta

log = logging.getLogger("darkslim.cfg")
MAX_SIDE, MAX_CHANNELS = 65536, 1024


class Darknet(nn.Module):
    """A detector or a classifier built from a cfg.

    `forward` takes images [B, channels, H, W] in 0..1 (RGB) and returns the raw map [B, A*entries, h, w] of every head,
    in the cfg's order and in every mode; `decode` makes boxes of them. A classifier has no `heads`: it returns one map,
    its scores. `cfg` is the cfg as written, `expanded` has primitive sections in place of macros, one for each layer.
    Raises CfgError with all mistakes of the file, before anything is allocated.
    """

    def __init__(self, cfg: Cfg, *, allow_unknown: bool = False) -> None:
        super().__init__()
        self.cfg = copy.deepcopy(cfg)
        with torch.device("meta"):  # the arithmetic alone: whatever is wrong or too large is told here
            tried = copy.deepcopy(cfg)  # building marks what it reads
            _check(_build(tried), tried, allow_unknown=allow_unknown)
        built = _build(self.cfg)
        sections = [self.cfg.sections[0], *built.sections]
        self.expanded = self.cfg if built.places is None else Cfg(cfg.path, self.cfg.preamble, sections)
        self.stored: Stored | None = None
        if built.stores_maps:
            built.layers, self.stored = store_maps(built.layers)
            if not any(self.stored):
                log.warning(
                    "%s: [net] map_bits=8 stores no map: no convolution computes in integers (leave it out)",
                    cfg.path,
                )
        self.layers = built.layers
        self.size, self.channels = built.image.size, built.image.channels  # (height, width) as [net] asks for
        self.blocks = nn.ModuleList(layer.module for layer in self.layers)
        self.heads: list[HeadSpec] = [layer.head for layer in self.layers if layer.head]
        self.header = (0, 2, 5, 0)  # of its .weights file: major, minor, revision, images seen
        self.is_fused = False
        self._kept = {spec.layer for spec in self.heads} or {len(self.layers) - 1}  # what forward returns
        last_use = {index: index for index in range(len(self.layers)) if index not in self._kept}  # what nobody reads
        last_use |= {index: reader for reader, layer in enumerate(self.layers) for index in layer.inputs}
        self._done = [[i for i, last in last_use.items() if last == reader] for reader in range(len(self.layers))]

    @property
    def stride(self) -> int:
        """Pixels that every input side must be a multiple of: the coarsest stride that a layer asks for."""
        return max(1, *(int(side) for layer in self.layers for side in layer.multiple))

    @property
    def diou_beta(self) -> float | None:
        """Exponent of the centres' distance in NMS where the heads ask for `diounms`."""
        return diou_beta(self.heads)

    @property
    def is_fixed(self) -> bool:
        """Tell whether it runs at its own size alone: a fully connected layer sees the whole map."""
        return any(isinstance(module, Connected) for module in self.modules())

    @property
    def classes(self) -> int:
        return self.heads[0].classes if self.heads else self.layers[-1].channels

    def forward(self, x: Tensor) -> list[Tensor]:
        return self._run(x)[0]

    def features(self, x: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Give what `forward` gives, and beside it the outputs of some layers, in their order."""
        kept, found = self._run(x, layers)
        return kept, [found[index] for index in layers]

    def _run(self, x: Tensor, wanted: Sequence[int] = ()) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Go through the layers; give what `forward` returns, and the outputs `wanted` by their index."""
        outputs, kept, found = {-1: x}, [], {}
        for index, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            output = block(*[outputs[i] for i in layer.inputs])
            outputs[index] = output.detach() if layer.rules.is_detached else output
            if index in self._kept:
                kept.append(outputs[index])
            if index in wanted:
                found[index] = outputs[index]
            for done in self._done[index]:
                del outputs[done]
        return kept, found

    def freeze(self, iteration: int) -> None:
        """Let the parameters learn that learn in `iteration` (from 0 on), as `stopbackward`, `train_only_bn` say."""
        last = max((i for i, layer in enumerate(self.layers) if _is_frozen(layer.rules, iteration)), default=-1)
        for index, block in enumerate(self.blocks):
            block.requires_grad_(index > last)

    def trace(self, *, is_approximate: bool = False) -> tuple[Channels, list[Line]]:
        """Give an id to every channel: what is known of the ids, and those of every layer's output in their order.

        With `is_approximate` gates that mix all channels (ECA, CBAM's gate of positions) hold none of them.
        """
        channels = Channels(is_approximate=is_approximate)
        image = channels.fresh(self.channels)
        channels.fix(image)
        lines: list[Line] = []
        for layer in self.layers:
            inputs = [lines[index] if index >= 0 else image for index in layer.inputs]
            lines.append(layer.flow(channels, inputs, layer.channels))
            if any(getattr(module, "mixes_channels", False) for module in layer.module.modules()):
                channels.fix(lines[-1])
            if layer.owner is not None:  # what reads and makes the same tensors
                source = self.layers[layer.owner].inputs[0]
                channels.tie(inputs[0], lines[source] if source >= 0 else image)
                channels.tie(lines[-1], lines[layer.owner])
        for index in self._kept:
            channels.fix(lines[index])
        return channels, lines

    def decode(self, heads: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode raw maps of an input of `size` (height, width): boxes [B, N, 4] xywh_px and scores [B, N, C]."""
        return decode_all(heads, self.heads, size)

    def fuse(self) -> "Darknet":
        """Return a copy in evaluation mode with every batch normalisation folded into the weights before it."""
        fused = copy.deepcopy(self).eval()
        for module in list(fused.modules()):
            if isinstance(module, (Convolution, Connected)):
                module.fuse()
        fused.is_fused = True
        return fused

    def summary(self) -> str:
        """Describe every layer: filters, output size at the cfg's own input size, parameters, BFLOPs."""
        rows = [
            f"{'layer':>5}  {'section':<16}{'from':>12}{'channels':>9}{'output':>11}{'parameters':>12}{'BFLOPs':>8}"
        ]
        for index, (layer, section) in enumerate(zip(self.layers, self.expanded.sections[1:], strict=True)):
            inputs = ",".join(map(str, layer.inputs)) if layer.inputs != (index - 1,) else ""
            output = f"{layer.size[0]}x{layer.size[1]}"
            count = sum(parameter.numel() for parameter in layer.module.parameters())
            rows.append(
                f"{index:5}  {section.name:<16}{inputs:>12}{layer.channels:9}{output:>11}{count or '':>12}"
                + (f"{layer.flops / 1e9:8.3f}" if layer.flops else "")
            )
        total, flops = count_parameters(self), sum(layer.flops for layer in self.layers) / 1e9
        rows.append(
            f"{len(self.layers)} layers, {total:,} parameters, {flops:.3f} BFLOPs at {self.size[1]}x{self.size[0]}"
        )
        return "\n".join(rows)


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _is_frozen(rules: Rules, iteration: int) -> bool:
    return rules.train_only_bn or rules.stop_backward == 1 or rules.stop_backward > iteration


def _build(cfg: Cfg) -> Built:
    """Build the layers of `cfg` and note its mistakes."""
    _refuse(cfg)
    net = cfg.sections[0]
    size = tuple(net.int(key, 416, minimum=1, maximum=MAX_SIDE) for key in ("height", "width"))
    channels = net.int("channels", 3, minimum=1, maximum=MAX_CHANNELS)
    stores_maps = net.choice("map_bits", ("8", "32"), "32") == "8"
    built = Built(Layer(nn.Identity(), (), channels, (size[0], size[1]), (1, 1)), stores_maps=stores_maps)
    _check_size(net, built.image)
    for section in primitives(cfg, built):
        builder = SECTIONS.get(section.name)
        rules = read_rules(section)
        if builder is None:
            section.fail(f"is no section (expected {suggest(section.name, {*SECTIONS, *MACROS})})")
            section.known.update(section.options)
            layer = replace(built.previous, inputs=(built.index - 1,), head=None, tensors={}, rules=Rules())
        else:
            layer = builder(section, built)
        _check_size(section, layer)
        guesses = {guess for index in layer.inputs for guess in built.at(index).guesses}
        if layer.sets_channels:
            guesses.discard("channels")
        if builder is None or section.unsure:
            guesses |= {"channels", "size"}
        built.layers.append(replace(layer, rules=rules, guesses=frozenset(guesses), references=built.references))
        built.references = {}
    return built


def _check_size(section: Section, layer: Layer) -> None:
    """Raise CfgError where a map is so large that what follows would be as absurd."""
    values = layer.channels * layer.size[0] * layer.size[1]
    if values > MAX_VALUES:
        section.fail(f"puts out {values:,} values (expected at most {MAX_VALUES:,}: is the size of [net] right?)")
        section.cfg.raise_mistakes()


def _refuse(cfg: Cfg) -> None:
    """Raise CfgError with one line where the file is no [net] at all, or a network of a kind that is not built."""
    if not cfg.sections or cfg.sections[0].name not in ("net", "network"):
        cfg.raise_mistakes()
    for section in (*cfg.sections[1:], cfg.sections[0]):
        what = REFUSED.get(section.name, "")
        if section.name == "region" and "tree" in section.options:
            what = "with a tree of classes is the head of YOLO9000"
        if section.name in ("net", "network") and "inputs" in section.options and "width" not in section.options:
            what = "with inputs= and no width= is a recurrent text model"
        if what:
            raise CfgError(cfg.path, section.line, f"[{section.name}] {what}, which Darkslim does not build")


def _check(built: Built, cfg: Cfg, *, allow_unknown: bool) -> None:
    """Raise CfgError with the mistakes of the layers and of the network as a whole."""
    if not any(layer.head or layer.ends_classifier for layer in built.layers):
        cfg.fail(cfg.sections[-1].line, "the cfg has no head (end it with a [yolo] section)")
    cfg.check_unread(TRAINER_KEYS, allow_unknown=allow_unknown)
    cfg.raise_mistakes()
