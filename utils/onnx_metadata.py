"""What an exported .onnx says of itself: written by utils.export into metadata_props, read by utils.runtime."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from models.yolo import HeadSpec

from .log import DataError

MAKER = "Darkslim"
RAW, DECODED, DETECTED = "raw heads", "boxes and scores", "detections"  # what a graph puts out


@dataclass(frozen=True)
class Metadata:
    """A network without its numbers; each field is JSON under its own name.

    `size` is (height, width), the only one where `is_fixed`; `stride` what sides are multiples of; `arithmetic` says
    what the graph computes in, `limits` what its NMS keeps.
    """

    outputs: str
    names: tuple[str, ...]
    data: str
    size: tuple[int, int]
    is_fixed: bool
    channels: int
    stride: int
    heads: tuple[HeadSpec, ...]
    arithmetic: str
    cfg_path: str
    cfg: str
    limits: str = ""

    def pack(self) -> dict[str, str]:
        """Give the properties of the file."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["heads"] = [asdict(spec) for spec in self.heads]
        return {"maker": MAKER} | {key: json.dumps(value) for key, value in plain.items()}


def unpack(properties: Mapping[str, str], path: str) -> Metadata:
    """Read the properties of a file. Raises DataError where another program wrote it."""
    if properties.get("maker") != MAKER:
        raise DataError(f"{path}: does not say what its outputs mean (expected an .onnx of python -m utils.export)")
    try:
        known = [field.name for field in fields(Metadata) if field.name in properties]
        plain = {name: _tuples(json.loads(properties[name])) for name in known}
        heads = tuple(HeadSpec(**spec) for spec in plain.pop("heads"))
        metadata = Metadata(heads=heads, **plain)
        _check(metadata)
        return metadata
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its description cannot be read: {error} (export it again)") from None


def _check(metadata: Metadata) -> None:
    """Raise ValueError where a value cannot be what it says."""
    numbers = (*metadata.size, metadata.stride, metadata.channels)
    texts = (*metadata.names, metadata.data, metadata.arithmetic, metadata.cfg_path, metadata.cfg, metadata.limits)
    sound = {
        f"outputs are no {metadata.outputs!r}": metadata.outputs in (RAW, DECODED, DETECTED),
        "there is no head": bool(metadata.heads),
        "a size has two sides": len(metadata.size) == 2,
        "sizes, strides and channels are whole numbers from 1 on": all(type(n) is int and n > 0 for n in numbers),
        "names and paths are texts": all(isinstance(text, str) for text in texts),
    }
    if wrong := [rule for rule, holds in sound.items() if not holds]:
        raise ValueError(wrong[0])


def _tuples(value: Any) -> Any:
    """Turn JSON's lists into tuples, all the way down."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
