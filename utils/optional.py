"""Packages that a few commands need and most users do not."""

import importlib
from types import ModuleType

from .log import DataError


def require(name: str) -> ModuleType:
    """Import a package. Raises DataError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        wanted = "openvino" if package == "openvino" else "onnx onnxruntime"
        raise DataError(f"{package}: is not installed, and this needs it (pip install {wanted})") from None
