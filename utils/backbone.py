"""Start a backbone from ImageNet: map a classifier's state dict onto a cfg and write partial weights for train.py.

    python -m utils.backbone --cfg cfg/mine.cfg --from shufflenetv2_x1.pth -o weights/backbone.weights

The mapping goes by structure: the convolutions of the state dict, in its order, must have the shapes of the cfg's
layers, up to the classifier. Strides and activations stand in no state dict: the cfg must be of the same network. Gates
that the cfg adds as sections of their own (an [eca] after a stage) start fresh; a .weights file has no gaps, so that
calls for a .pt. Prints the layers that it fills, within seconds.

The features then equal the classifier's: the constant of its batch normalisation is folded into the variance,
ImageNet's mean and deviation into the first layer. One thing differs: the classifier pads with the mean colour, the
cfg's network with black. --no-normalize is for what was trained on plain RGB in 0..1.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import Darknet, WeightsError, dump, load_cfg, load_weights, save_weights
from models.layer import Layer
from models.layers_conv import Convolution
from models.quant import STATE, QuantConv2d
from models.weights import describe, save_checkpoint

from .cli import make_parser, rate, run
from .log import log

NESTED = ("state_dict", "model", "model_state_dict", "net")  # where training scripts put the state dict
STATISTICS = {"weight", "bias", "running_mean", "running_var"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB in 0..1: torchvision's presets
EPS = 1e-5  # PyTorch's default: ShuffleNetV2, GhostNet, VoVNet
KNOWN_EPS = ((r"features\.1\.block\.0\.0\.weight", "torchvision's MobileNetV3", 1e-3),)  # a state dict does not say it


@dataclass(frozen=True)
class Group:
    """A convolution or linear layer of a state dict with the batch normalisation behind it, if there is one."""

    name: str  # of its weight
    weight: Tensor
    bias: Tensor | None = None
    bn: Mapping[str, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its weight as a convolution: a linear layer is one of 1×1."""
        return tuple(self.weight.shape) + (1, 1) * (self.weight.ndim == 2)

    @property
    def is_feature(self) -> bool:
        """Tell it from the layers of a classifier: 1×1, without batch normalisation."""
        return self.bn is not None or self.shape[2:] != (1, 1)

    def __str__(self) -> str:
        return f"{self.name} {tuple(self.weight.shape)}{' with batch normalisation' if self.bn else ''}"


@dataclass(frozen=True)
class Match:
    """Which layers of a network a state dict fills, and what is left over on both sides."""

    pairs: list[tuple[int, Group]]
    fresh: list[int]  # gates between them that the state dict does not have
    rest: list[Group]  # the classifier


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, also one inside a training checkpoint; nothing but tensors is ever unpickled.

    Raises WeightsError.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of the age of a format: what can be read is read
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot read the state dict: {error.strerror or error}") from None
    except Exception as error:  # whatever bytes that are no pickle make of the unpickler
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise WeightsError(f"{path}: holds Python objects (a whole module?): save its state_dict()") from None
        raise WeightsError(
            f"{path}: is not a readable state dict (empty, cut short or damaged: get it again)"
        ) from None
    if isinstance(found, Mapping) and isinstance(found.get("cfg"), str):
        raise WeightsError(f"{path}: is a Darkslim checkpoint (give it to train.py --weights as it is)")
    for _ in range(3):  # levels of nesting
        if isinstance(found, Mapping):
            found = next((found[key] for key in NESTED if isinstance(found.get(key), Mapping)), found)
    entries = found.items() if isinstance(found, Mapping) else ()
    state = {str(name): tensor for name, tensor in entries if isinstance(tensor, Tensor) and _is_value(tensor)}
    if not state:
        raise WeightsError(f"{path}: holds no tensors by name (expected a state dict, alone or under 'state_dict')")
    return state


def group(state: Mapping[str, Tensor]) -> list[Group]:
    """Join the tensors of a state dict, in its order, to convolutions with their batch normalisation."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, dot, leaf = name.rpartition(".")
        modules.setdefault(module + dot, {})[leaf] = tensor
    groups: list[Group] = []
    for module, tensors in modules.items():
        last = groups[-1] if groups else None
        shapes = {tensor.shape for tensor in tensors.values()}
        if last and last.bn is None and tensors.keys() >= STATISTICS and shapes == {last.weight.shape[:1]}:
            groups[-1] = replace(last, bn=tensors)
        else:
            leaf = "weight" if "weight" in tensors else next(iter(tensors))
            groups.append(Group(module + leaf, tensors[leaf], tensors.get("bias")))
    return groups


def match(model: Darknet, groups: Sequence[Group], path: str | Path) -> Match:
    """Walk the layers of `model` and the groups of a state dict side by side, to the end of the backbone.

    The backbone ends where they first disagree, which has to be at the classifier. Raises WeightsError with the first
    mismatch where it is elsewhere.
    """
    features = max((i + 1 for i, each in enumerate(groups) if each.is_feature), default=0)
    pairs: list[tuple[int, Group]] = []
    skipped, fresh = [], []
    following = None  # the layer that disagrees
    for index in (index for index, layer in enumerate(model.layers) if layer.has_weights):
        each = groups[len(pairs)] if len(pairs) < len(groups) else None
        if each and _fits(model.layers[index], each):
            pairs.append((index, each))
            fresh, skipped = fresh + skipped, []
        elif each and _is_own_gate(model, index, each):
            skipped.append(index)
        else:
            following = index
            break
    rest = list(groups[len(pairs) :])
    is_inside = bool(pairs) and following is not None and _line(model, following) == _line(model, pairs[-1][0])
    if not pairs or len(pairs) < features or is_inside:
        theirs = f"{path}: {rest[0]}" if rest else f"{path}: ends with {pairs[-1][1]}, which"
        ours = f"{model.cfg.path}, which has no layer left" if following is None else _wish(model, following)
        advice = "give the cfg of the same network and width: utils.compose has backbones as released, …-imagenet"
        raise WeightsError(f"{theirs} does not fit {ours} ({advice})")
    return Match(pairs, fresh, rest)


def fill(model: Darknet, found: Match, path: str | Path, *, eps: float, normalize: bool) -> None:
    """Copy what matches into `model`, with the constant `eps` that the state dict's batch normalisation adds.

    `normalize` folds ImageNet's mean and deviation into the first layer. Raises WeightsError for unusable values.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (MEAN, STD))
    for place, (index, each) in enumerate(found.pairs):
        layer = model.layers[index]
        bias = torch.zeros(len(each.weight)) if each.bias is None else each.bias
        parts = {"weight": each.weight.view(each.shape), "bias": bias}
        parts |= {f"bn.{name}": each.bn[name] for name in STATISTICS} if each.bn else {}
        if not all(tensor.float().isfinite().all() for tensor in parts.values()):
            raise WeightsError(f"{path}: {each.name} or what normalises it holds NaN or infinity (a failed training?)")
        values = {name: tensor.double() for name, tensor in parts.items()}
        if normalize and place == 0:
            values["weight"] = values["weight"] / std
            values["bias"] = values["bias"] - (values["weight"] * mean).sum((1, 2, 3))
        if each.bn:
            if (values["bn.running_var"] + eps <= 0).any():
                raise WeightsError(f"{path}: the variance behind {each.name} is negative (a damaged file?)")
            values["bn.running_mean"] -= values["bias"]
            values["bn.running_var"] += eps - layer.module.bn.eps
        own = layer.module.state_dict()
        for name in layer.tensors:
            if not name.endswith(STATE):
                own[name].copy_(values[name.removeprefix("conv.")])
        if isinstance(layer.module, Convolution) and isinstance(layer.module.conv, QuantConv2d):
            layer.module.conv.reset_state()


def write(model: Darknet, found: Match, path: str | Path) -> None:
    """Write the filled layers, as Darknet's `.weights` or as a `.pt`. Raises WeightsError."""
    filled = [index for index, _ in found.pairs]
    if Path(path).suffix == ".pt":
        names = {f"blocks.{index}.{name}" for index in filled for name in model.layers[index].tensors}
        state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
        save_checkpoint(path, {"cfg": dump(model.cfg), "cfg_path": model.cfg.path, "model": state})
        return
    if found.fresh:
        places = _places(model, found.fresh)
        raise WeightsError(f"{path}: a .weights file has no gaps, but the state dict lacks {places} (write a .pt)")
    if any(model.layers[index].rules.skip_load or model.layers[index].rules.skip_scales for index in filled):
        raise WeightsError(f"{path}: a .weights file leaves out what dontload and dontloadscales say (write a .pt)")
    save_weights(model, path, filled[-1] + 1)


def guess_eps(state: Mapping[str, Any]) -> tuple[float, str]:
    """Give the constant of a state dict's batch normalisation, and why it is taken."""
    for pattern, family, eps in KNOWN_EPS:
        if any(re.search(pattern, name) for name in state):
            return eps, family
    return EPS, "PyTorch's default"


def _is_value(tensor: Tensor) -> bool:
    """Tell plain numbers from counts such as num_batches_tracked."""
    return tensor.is_floating_point() and tensor.ndim > 0 and tensor.layout == torch.strided and not tensor.is_meta


def _fits(layer: Layer, each: Group) -> bool:
    if not isinstance(layer.module, Convolution):
        return False
    is_like = each.shape == tuple(layer.module.conv.weight.shape) and bool(each.bn) == ("bn.weight" in layer.tensors)
    return is_like and (each.bias is None or tuple(each.bias.shape) == each.shape[:1])


def _is_own_gate(model: Darknet, index: int, each: Group) -> bool:
    """Tell whether a layer is of an attention section, all of whose layers are gates, and `each` is of another kind."""
    line = _line(model, index)
    members = [layer for i, layer in enumerate(model.layers) if layer.has_weights and _line(model, i) == line]
    is_other = each.bn is not None or not isinstance(model.layers[index].module, Convolution)
    return is_other and all(map(_is_gate, members))


def _is_gate(layer: Layer) -> bool:
    """Tell whether a layer keeps its input's channels, or computes on the mean of a map."""
    if isinstance(layer.module, Convolution):
        return layer.size == (1, 1) and "bn.weight" not in layer.tensors
    return not layer.sets_channels


def _line(model: Darknet, index: int) -> int:
    return model.expanded.sections[1 + index].line


def _section(model: Darknet, index: int) -> str:
    """Name the section of a layer as it is written in the cfg, which may be a macro."""
    return next(f"[{section.name}]" for section in model.cfg.sections[1:] if section.line == _line(model, index))


def _places(model: Darknet, indices: Sequence[int]) -> str:
    return ", ".join(f"layer {index} ({_section(model, index)} at line {_line(model, index)})" for index in indices)


def _wish(model: Darknet, index: int) -> str:
    """Say where a layer stands and what it takes."""
    layer = model.layers[index]
    key = "conv.weight" if "conv.weight" in layer.tensors else next(iter(layer.tensors))
    shape = tuple(layer.module.state_dict()[key].shape)
    has_bn = " with batch normalisation" if "bn.weight" in layer.tensors else ""
    return f"{model.cfg.path}:{_line(model, index)}: layer {index}, {_section(model, index)}, takes {shape}{has_bn}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--cfg", required=True, help="cfg of the network")
    parser.add_argument("--from", dest="source", required=True, help="state dict of a classifier, .pth or .pt")
    parser.add_argument("-o", "--output", required=True, help="partial weights to write, .weights or .pt")
    parser.add_argument(
        "--bn-eps",
        type=rate,
        help="constant of its batch normalisation (default: 1e-3 for torchvision's MobileNetV3, 1e-5)",
    )
    parser.add_argument("--no-normalize", action="store_true", help="it was trained on RGB in 0..1, not normalised")
    args = parser.parse_args(argv)
    if Path(args.output).suffix not in (".weights", ".pt"):
        parser.error(f"argument -o/--output: expected a name that ends in .weights or .pt, gets {args.output!r}")
    if Path(args.output).resolve() == Path(args.source).resolve():
        parser.error("argument -o/--output: expected another file than --from")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m utils.backbone`."""
    args = parse_args(argv)
    model = Darknet(load_cfg(args.cfg))
    state = read_state(args.source)
    found = match(model, group(state), args.source)
    first = model.layers[found.pairs[0][0]]
    if not args.no_normalize and (first.inputs != (-1,) or model.channels != len(MEAN)):
        raise WeightsError(
            f"{args.cfg}: its first convolution reads no RGB picture, as ImageNet's normalisation needs"
            " (give --no-normalize, or set channels=3)"
        )
    eps, why = (args.bn_eps, "--bn-eps") if args.bn_eps else guess_eps(state)
    fill(model, found, args.source, eps=eps, normalize=not args.no_normalize)
    verb = "overwrote" if Path(args.output).exists() else "wrote"
    write(model, found, args.output)
    log.info("%s fills layers %s of %s", args.source, describe(model, load_weights(model, args.output)), args.cfg)
    if found.fresh:
        log.info("not in it, these start fresh: %s", _places(model, found.fresh))
    if found.rest:
        log.info("set aside, as its classifier: %s", ", ".join(map(str, found.rest)))
    log.info("its batch normalisation adds %g to the variance (%s; --bn-eps sets it)", eps, why)
    if not args.no_normalize:
        log.info(
            "ImageNet's mean and deviation are folded into layer %d (--no-normalize leaves them)", found.pairs[0][0]
        )
    log.info("%s %s", verb, args.output)


if __name__ == "__main__":
    run(main)
