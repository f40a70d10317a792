"""Weights in and out: Darknet's `.weights`, exact to the byte, and `.pt` checkpoints that hold only data.

A `.weights` file is a header (three int32 for the version, then the images seen: int64 from version 0.2 on, int32
before) and float32 values layer by layer, in the order of each Layer's `tensors`.
"""

import logging
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cfg import Cfg, CfgError, load_cfg, parse
from .darknet import Darknet
from .layer import Layer
from .packing import restore_weight
from .quant import STATE

log = logging.getLogger("darkslim.weights")

SCALES = ("bn.weight", "bn.running_mean", "bn.running_var")  # what dontloadscales leaves out


class WeightsError(ValueError):
    """A weights file that cannot be used: which file, what it holds, what was expected."""


def load_model(cfg: Cfg | str | Path, weights: str | Path, *, allow_unknown: bool = False) -> Darknet:
    """Build the network of `cfg` and fill all of it from a `.weights` or `.pt` file.

    Raises CfgError for the cfg, WeightsError for a file that is broken, partial or another network's.
    """
    model = Darknet(cfg if isinstance(cfg, Cfg) else load_cfg(cfg), allow_unknown=allow_unknown)
    filled = load_weights(model, weights)
    missing = [
        i for i, layer in enumerate(model.layers) if i not in filled and layer.tensors and not layer.rules.skip_load
    ]
    if missing:
        raise WeightsError(
            f"{weights}: is partial: it fills {describe(model, filled)} layers of {model.cfg.path},"
            f" layer {missing[0]} is missing (train it first, or give the whole file)"
        )
    return model.eval()


def load_weights(model: Darknet, path: str | Path) -> list[int]:
    """Fill `model` from a `.weights` or `.pt` file, whole or partial, and return the indices of the filled layers.

    A layer without parameters counts as filled when what is before it is. A `.weights` file holds nothing of a layer
    with `dontload` and neither scales nor statistics of one with `dontloadscales`, as Darknet reads it. Quantisers
    start afresh where the file is of the network's float form, or of other bits. Raises WeightsError.
    """
    if Path(path).suffix == ".onnx":
        raise WeightsError(
            f"{path}: runs in test.py, detect.py and utils.benchmark alone (give the .pt or .weights it was made of)"
        )
    if Path(path).suffix == ".pt":
        checkpoint = load_checkpoint(path)
        stale = _stale_steps(model, checkpoint, path)
        return load_state(model, {key: each for key, each in checkpoint["model"].items() if key not in stale}, path)
    return _load_darknet(model, path)


def load_state(model: Darknet, state: Mapping[str, Tensor], path: str | Path) -> list[int]:
    """Fill every layer of `model` whose tensors all stand in `state` with the same shapes.

    A layer without parameters counts as filled when the last one before it that has some is; quantisers of a filled
    layer start afresh where `state` has not theirs.
    """
    own, filled, is_filled = model.state_dict(), [], True
    for index, layer in enumerate(model.layers):
        names = _state_names(index, layer, has_steps=False)
        if names:
            is_filled = all(getattr(state.get(name), "shape", None) == own[name].shape for name in names)
        if is_filled:
            if not all(state[name].isfinite().all() for name in _state_names(index, layer) if name in state):
                raise WeightsError(f"{path}: holds NaN or infinity in layer {index} (a failed training?)")
            variance = state.get(f"blocks.{index}.bn.running_var")
            if variance is not None and (variance < 0).any():
                raise WeightsError(f"{path}: holds a negative variance in layer {index} (damaged?)")
            filled.append(index)
    if not any(model.layers[index].has_weights for index in filled):
        raise WeightsError(f"{path}: no layer of it fits {model.cfg.path} (was it made with another cfg?)")
    fresh = 0
    for index in filled:  # all has been checked: a refused file changes nothing
        layer = model.layers[index]
        names = _state_names(index, layer)
        found = [name for name in names if getattr(state.get(name), "shape", None) == own[name].shape]
        for name in found:
            own[name].copy_(state[name])
        fresh += _reset_steps(layer, {*names} - {*found})
    surplus = sum(name.endswith(STATE) and name not in own for name in state)
    if fresh or surplus:
        what = (
            f"has no steps or ranges for {fresh} layers of" if fresh else f"has {surplus} steps or ranges too many for"
        )
        log.info("%s: %s %s: they %s", path, what, model.cfg.path, "start afresh" if fresh else "are left out")
    return filled


def save_weights(model: Darknet, path: str | Path, count: int | None = None) -> None:
    """Write Darknet's `.weights`, atomically: of all layers, or a partial file of the first `count`.

    The header is the one that was read, or version 0.2.5.
    """
    assert not model.is_fused, "a fused network has no batch normalisation left to write"
    major, minor, revision, seen = model.header
    seen_bytes = struct.pack("<q" if major * 10 + minor >= 2 else "<i", seen)
    parts = [struct.pack("<3i", major, minor, revision) + seen_bytes]
    tensors = (tensor for layer in model.layers[:count] for tensor in _tensors(layer))
    parts += [tensor.detach().cpu().numpy().astype("<f4").tobytes() for tensor in tensors]
    write_atomically(path, lambda partial: partial.write_bytes(b"".join(parts)))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a `.pt` checkpoint: tensors, numbers and text only. Packed weights are restored. Raises WeightsError."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\3\4"  # what torch.save writes; its older format is not ours
    except OSError as error:
        raise WeightsError(f"{path}: cannot read the weights: {error.strerror or error}") from None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if is_zip else None
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, LookupError, ValueError):
        checkpoint = None
    if checkpoint is None:
        raise WeightsError(f"{path}: is not a readable checkpoint (cut short, or not written by train.py)")
    match checkpoint:
        case {"cfg": str(), "model": dict()} if _are_texts(checkpoint.get("names", [])):
            return _unpacked(checkpoint, path)
        case {"cfg": str(), "model": dict()}:
            raise WeightsError(f"{path}: its class names are no list of texts (damaged?)")
    raise WeightsError(f"{path}: is not a Darkslim checkpoint (expected the keys 'cfg' and 'model')")


def _are_texts(names: Any) -> bool:
    return isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)


def _unpacked(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Put the packed weights of a checkpoint among the others."""
    packed = checkpoint.pop("packed", {})
    try:
        checkpoint["model"] |= {name: restore_weight(each) for name, each in packed.items()}
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise WeightsError(f"{path}: holds packed weights that cannot be read (damaged?)") from None
    return checkpoint


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: a reader finds the old file or the new one, never half of one."""
    write_atomically(path, lambda partial: torch.save(dict(checkpoint), partial))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, then rename. Raises WeightsError when the disk refuses."""
    file = Path(path)
    file = file.resolve() if file.is_symlink() else file  # a link stays one
    partial, has_file = Path(f"{file}.partial"), file.exists()
    if has_file and not (file.is_file() or file.is_dir()):
        raise WeightsError(f"{path}: cannot write: it is a device or the like, and no file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):
            partial.unlink()
        unharmed = "; the file that was there is unharmed" if has_file else ""
        raise WeightsError(f"{path}: cannot write: {error}{unharmed}") from None


def checkpoint_cfg(checkpoint: Mapping[str, Any], path: str | Path) -> Cfg:
    """Give the cfg that a checkpoint carries."""
    return parse(checkpoint["cfg"], checkpoint.get("cfg_path", str(path)))


def describe(model: Darknet, filled: list[int]) -> str:
    """Say which layers were filled: '0-14 of 24'."""
    return f"{_ranges(filled)} of {len(model.layers)}"


def count_layers(model: Darknet, values: int, path: str | Path, *, has_steps: bool = True) -> int:
    """Count the layers that a `.weights` file of so many values fills, those without parameters among them.

    Without `has_steps` it is one of the network's float form. Raises WeightsError where it ends inside a layer or goes
    on behind the last.
    """
    ends = _ends(model, has_steps=has_steps)
    count = sum(end <= values for end in ends)  # layers that the file reaches the end of
    held = f"the file holds {values} values, {model.cfg.path} takes {ends[-1]}"
    if values > ends[-1]:
        raise WeightsError(
            f"{path}: is too long: {held} (another cfg's? those of method=lsq, iao or map_bits=8 load as .pt)"
        )
    if values == 0 or values != ends[count - 1]:
        raise WeightsError(f"{path}: ends inside layer {count}: {held} (cut off, or the weights of another cfg?)")
    return count


def _load_darknet(model: Darknet, path: str | Path) -> list[int]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot read the weights: {error.strerror}") from None
    header, offset = _read_header(data, path)
    if (len(data) - offset) % 4:
        raise WeightsError(
            f"{path}: its {len(data) - offset} bytes of values are no multiple of 4 (damaged or cut off)"
        )
    values = np.frombuffer(data, "<f4", offset=offset)
    has_steps = _has_steps(model, len(values))
    count = count_layers(model, len(values), path, has_steps=has_steps)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        layer = sum(end <= bad for end in _ends(model, has_steps=has_steps))
        raise WeightsError(f"{path}: holds NaN or infinity in layer {layer} (a failed training?)")
    start = 0
    with torch.no_grad():
        for tensor in (tensor for layer in model.layers[:count] for tensor in _read_tensors(layer, has_steps)):
            part = values[start : start + tensor.numel()].astype(np.float32)
            tensor.copy_(torch.from_numpy(part).view(tensor.shape))
            start += tensor.numel()
    if not has_steps:
        fresh = sum(_reset_steps(layer, layer.tensors) for layer in model.layers[:count])
        log.info("%s: has no steps or ranges for %d layers of %s: they start afresh", path, fresh, model.cfg.path)
    model.header = header
    return [index for index in range(count) if not model.layers[index].rules.skip_load]


def _read_header(data: bytes, path: str | Path) -> tuple[tuple[int, int, int, int], int]:
    """Give (major, minor, revision, images seen) and the offset of the first value."""
    if len(data) < 16:
        raise WeightsError(f"{path}: holds {len(data)} bytes, less than a header (an empty or failed download?)")
    major, minor, revision = struct.unpack_from("<3i", data)
    if not (0 <= major < 1000 and 0 <= minor < 1000):  # Darknet's own bound for a sane version
        raise WeightsError(f"{path}: is not a Darknet weights file (its version reads {major}.{minor}.{revision})")
    is_long = major * 10 + minor >= 2 and len(data) >= 20
    (seen,) = struct.unpack_from("<q" if is_long else "<i", data, 12)
    return (major, minor, revision, seen), 20 if is_long else 16


def _ends(model: Darknet, *, has_steps: bool = True) -> list[int]:
    """Count the values of a `.weights` file, or of one of the float form, up to the end of every layer."""
    return list(accumulate(sum(tensor.numel() for tensor in _read_tensors(layer, has_steps)) for layer in model.layers))


def _has_steps(model: Darknet, values: int) -> bool:
    """Tell whether a file of so many values has those of quantisers: where both may be, a whole file is likelier."""
    own, plain = _ends(model), _ends(model, has_steps=False)
    return values == own[-1] or (values != plain[-1] and (values in own or values not in plain))


def _stale_steps(model: Darknet, checkpoint: Mapping[str, Any], path: str | Path) -> set[str]:
    """Name the steps in a checkpoint that were learned for other bits, or by another method, than `model` asks for."""
    if not any(name.endswith(STATE) for name in model.state_dict()):
        return set()
    try:
        with torch.device("meta"):
            source = Darknet(checkpoint_cfg(checkpoint, path), allow_unknown=True)
    except CfgError:
        return set()
    stale = set()
    for index, (layer, other) in enumerate(zip(model.layers, source.layers, strict=False)):
        ours, theirs = (getattr(getattr(each.module, "conv", None), "grid", None) for each in (layer, other))
        if ours and theirs and ours.method == theirs.method:
            stale |= {f"blocks.{index}.conv.w_step"} if ours.w_bits != theirs.w_bits else set()
            stale |= {f"blocks.{index}.conv.a_step"} if ours.input_levels != theirs.input_levels else set()
    return stale


def _reset_steps(layer: Layer, names: Iterable[str]) -> bool:
    """Let those quantisers of a layer start afresh whose tensors are named; tell whether there are any."""
    found = [name.split(".")[-2:] for name in names if name.endswith(STATE)]
    for module, tensor in found:
        getattr(layer.module, module).reset_state([tensor])
    return bool(found)


def _state_names(index: int, layer: Layer, *, has_steps: bool = True) -> list[str]:
    return [f"blocks.{index}.{name}" for name in layer.tensors if has_steps or not name.endswith(STATE)]


def _tensors(layer: Layer) -> list[Tensor]:
    return [attrgetter(name)(layer.module) for name in layer.tensors]


def _read_tensors(layer: Layer, has_steps: bool) -> list[Tensor]:
    """Give the tensors that Darknet reads; it writes all of them. The float form has no steps of quantisers."""
    if layer.rules.skip_load:
        return []
    left_out = (SCALES if layer.rules.skip_scales else ()) + (() if has_steps else STATE)
    return [attrgetter(name)(layer.module) for name in layer.tensors if not name.endswith(left_out)]


def _ranges(indices: list[int]) -> str:
    """Write sorted indices as '0-11, 14'."""
    groups: list[list[int]] = []
    for index in indices:
        if groups and index == groups[-1][-1] + 1:
            groups[-1].append(index)
        else:
            groups.append([index])
    return ", ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
