"""What of a quantised network runs in integers once it is exported, and why the rest does not."""

import torch

from models import Darknet
from models.layers_conv import Convolution
from models.quant import QuantConv2d
from models.storage import before_heads

from .int8 import FLOATS, layer_of, optimised
from .integer_fold import byte_levels
from .integer_plan import Plan

EXACT = 1e-6
FROM_TRAINING = "as in training"
CALIBRATED = "from calibration, which the training did not have (map_bits=8 in [net], and training, give it them)"
UNFUSED = "not fused by ONNX Runtime"


def explain(model: Darknet, plan: Plan, data: bytes) -> list[str]:
    """Say in lines how much of the bytes of an .onnx is computed in integers, and what in floating point, and why."""
    kinds = {layer_of(name): kind for name, kind in optimised(data) if kind in (*FLOATS, "QLinearConv")}
    layers = {index: model.layers[index] for index, block in enumerate(model.blocks) if is_quantised(block)}
    whole = sum(layer.flops for layer in layers.values())
    integer = sum(layer.flops for index, layer in layers.items() if kinds.get(index) == "QLinearConv")
    lines = [f"{integer / whole:.1%} of the quantised multiply-adds are computed in integers"]
    heads, reasons = before_heads(model.layers), dict[str, list[str]]()
    for index, kind in kinds.items():
        if kind != "QLinearConv":
            reason = "before a head" if index in heads else _reason(model, plan, index)
            reasons.setdefault(reason, []).append(str(index))
    lines += [f"in float: layers {', '.join(indices)} ({reason})" for reason, indices in reasons.items()]
    own = {*plan.own, *plan.before}
    for count, origin in ((len(plan.trained), FROM_TRAINING), (len(own - plan.trained), CALIBRATED)):
        lines += [f"{count} maps have levels of their own, {origin}"] if count else []
    error = max(moved(conv, plan.largest) for conv in plan.convs.values())
    if error > EXACT:
        lines.append(f"weights are moved by up to {error:.2%} of the greatest to fit {2 * plan.largest + 1} levels")
    return lines


def is_quantised(block: torch.nn.Module) -> bool:
    """Tell whether a layer is a quantised convolution."""
    return isinstance(block, Convolution) and isinstance(block.conv, QuantConv2d)


def moved(conv: QuantConv2d, largest: int) -> float:
    """Give how far weights are moved at most to fit levels up to ±`largest`, as a share of the greatest one."""
    levels, scale = byte_levels(conv, largest)
    exact, step = (each.double() for each in conv.weight_levels())
    exact = exact * step[:, None, None, None]
    return ((levels * scale[:, None, None, None] - exact).abs().max() / exact.abs().max().clamp_min(EXACT)).item()


def _reason(model: Darknet, plan: Plan, index: int) -> str:
    if not is_quantised(model.blocks[index]):
        return "not quantised in the cfg"
    return UNFUSED if index in plan.convs else "more than 8 bits"
