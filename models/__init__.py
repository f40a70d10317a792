"""Text and numbers become a runnable network: cfg language, layers, heads, weights."""

from .cfg import Cfg, CfgError, dump, load_cfg, parse
from .darknet import Darknet
from .weights import WeightsError, load_model, load_weights, save_weights

__all__ = [
    "Cfg",
    "CfgError",
    "Darknet",
    "WeightsError",
    "dump",
    "load_cfg",
    "load_model",
    "load_weights",
    "parse",
    "save_weights",
]
