"""Take whole residual blocks out of a network: a body whose output a [shortcut] adds to what the body reads.

What is left equals the network whose body puts out zero: depth goes, widths stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import Cfg, Darknet, dump
from models.cfg import Section, parse
from models.layer import Rules
from models.layers_merge import Shortcut

from .importance import Values, norms
from .log import DataError


@dataclass(frozen=True)
class Block:
    """Layers `first` to `last`, a [shortcut] that adds the body before it to layer `first` - 1.

    Where the sum is activated, its activation stays in the place of `last`.
    """

    first: int
    last: int
    is_activated: bool = False


def find_blocks(model: Darknet) -> list[Block]:
    """Find the blocks that can go, in the order of their shortcuts; a block may hold smaller ones.

    Both inputs of the shortcut have one shape and no weights; the body reads nothing but itself and the layer before
    it; nothing outside reads it, names it or uses its tensors; it holds no head and no key of freezing or loading.
    """
    blocks = []
    for last, layer in enumerate(model.layers):
        module = layer.module
        if not isinstance(module, Shortcut) or module.weights is not None or len(layer.inputs) != 2:
            continue
        block = Block(layer.inputs[1] + 1, last, not isinstance(module.activation, nn.Identity))
        if block.first < last and _adds_like(model, block) and _stands_alone(model, block):
            blocks.append(block)
    return blocks


def importance_of(model: Darknet, blocks: Sequence[Block]) -> Values:
    """Give what every block adds relative to what it is added to, NaN where batch normalisation does not tell.

    A normalised channel has the variance γ²: a body adds the mean γ² of its last normalisations to a stream that holds
    the sum of those before it. On GhostNet-YOLOv3 trained on BCCD the three blocks that cost mAP come last in this
    order; by mean |γ| alone the one that costs most came first. Criteria of groups cannot tell blocks apart: a group of
    a stream is in all of them.
    """
    powers = np.array(_powers(model))
    added, stream = powers[[block.last - 1 for block in blocks]], powers[[block.first - 1 for block in blocks]]
    return added / np.maximum(stream, 1e-30)  # sparse training may leave nothing of a stream


def choose_blocks(model: Darknet, count: int) -> list[Block]:
    """Give the `count` least important blocks, the least important first. Raises DataError where there are fewer."""
    blocks = find_blocks(model)
    if count > len(blocks):
        number = f"{len(blocks)} residual block{'s' * (len(blocks) > 1)}" if blocks else "no residual block"
        raise DataError(
            f"--layers {count}: {model.cfg.path} has {number} that can go (a body that only its [shortcut] reads,"
            " which adds it to the layer before it)"
        )
    order = np.argsort(importance_of(model, blocks), kind="stable")  # NaN is sorted last
    return [blocks[place] for place in order[:count]]


def remove_blocks(model: Darknet, blocks: Sequence[Block], *, path: str) -> Darknet:
    """Return the network without these blocks, in evaluation mode.

    Its cfg, of `path`, is the expanded one of `model` without their sections, with indices that count what is left.
    """
    is_kept = kept_layers(model, blocks)
    place = is_kept.cumsum() - 1  # of every layer; of a block, that of the layer before it
    compact = Darknet(_cfg_without(model, blocks, is_kept, place, path=path), allow_unknown=True)
    compact.header = model.header
    with torch.no_grad():
        for old in np.flatnonzero(is_kept):
            source, target = model.layers[old], compact.layers[place[old]]
            for name in target.tensors.keys() & source.tensors.keys():  # a sum may get levels that it had not
                attrgetter(name)(target.module).copy_(attrgetter(name)(source.module))
    return compact.eval()


def kept_layers(model: Darknet, blocks: Sequence[Block]) -> NDArray[np.bool_]:
    """Tell which layers are left without these blocks."""
    is_kept = np.ones(len(model.layers), bool)
    for block in blocks:
        is_kept[block.first : block.last + (not block.is_activated)] = False
    return is_kept


def _powers(model: Darknet) -> list[float]:
    """Give the mean γ² that makes every layer's output: of a sum the sum, of others the mean of what is known."""
    gammas = {index: float(norm.weight.detach().square().mean()) for index, norm in norms(model)}
    powers: list[float] = []
    for index, layer in enumerate(model.layers):
        inputs = np.array([powers[i] if i >= 0 else np.nan for i in layer.inputs])
        known = ~np.isnan(inputs)
        if index in gammas:
            power = gammas[index]
        elif layer.owner is not None:
            power = powers[layer.owner]
        elif isinstance(layer.module, Shortcut):
            power = inputs.sum()
        elif layer.has_weights or not known.any():  # a convolution with a bias, a gate
            power = np.nan
        else:
            power = np.average(inputs[known], weights=[model.layers[i].channels for i in np.array(layer.inputs)[known]])
        powers.append(float(power))
    return powers


def _adds_like(model: Darknet, block: Block) -> bool:
    """Tell whether what the shortcut adds has the shape of what it is added to."""
    source, added = (model.layers[index] for index in (block.first - 1, block.last - 1))
    return (source.channels, source.size, source.stride) == (added.channels, added.size, added.stride)


def _stands_alone(model: Darknet, block: Block) -> bool:
    """Tell whether nothing outside needs the body, and the body nothing outside but the layer before it."""
    body = range(block.first, block.last)
    for index, layer in enumerate(model.layers):
        named = {*layer.inputs, *(each for indices in layer.references.values() for each in indices)}
        if index in body:
            if layer.head or layer.ends_classifier or min(layer.inputs) < block.first - 1:
                return False
        elif index != block.last and not named.isdisjoint(body):
            return False
    return all(model.layers[index].rules == Rules() for index in (*body, block.last))


def _cfg_without(
    model: Darknet,
    blocks: Sequence[Block],
    is_kept: NDArray[np.bool_],
    place: NDArray[np.int64],
    *,
    path: str,
) -> Cfg:
    """Write the sections that are kept, with indices that count them, relative ones relative as they were."""
    cfg = parse(dump(model.expanded), path)
    sections = cfg.sections[1:]
    for index in np.flatnonzero(is_kept):
        section = sections[index]
        for key, layers in model.layers[index].references.items():
            written = section.ints(key)
            values = tuple(
                place[i] - (place[index] if value < 0 else 0) for i, value in zip(layers, written, strict=True)
            )
            if values != written:
                section.set(key, ",".join(map(str, values)))
    for block in sorted(blocks, key=lambda block: block.last, reverse=True):
        section, before = sections[block.last], sections[block.first - 1]
        end = _end(section)
        if block.is_activated:
            section.lines[:end] = ["[activation]\n", f"activation={section.options['activation'].value}\n"]
        else:
            before.lines[_end(before) :] = section.lines[end:]  # what is said there introduces the next section
    kept = [cfg.sections[0], *(section for section, stays in zip(sections, is_kept, strict=True) if stays)]
    return parse(dump(Cfg(path, cfg.preamble, kept)), path)


def _end(section: Section) -> int:
    """Give the number of a section's lines up to its last key."""
    return 1 + max((option.row for option in section.options.values()), default=0)
