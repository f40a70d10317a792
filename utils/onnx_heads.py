"""Darknet's decoding of raw maps (models/yolo.py) and non-maximum suppression in ONNX's operators."""

from dataclasses import replace

import torch

from models.yolo import GAUSSIAN, POINTS, HeadSpec

from .onnx_graph import Graph
from .onnx_layers import IMAGES
from .onnx_metadata import DETECTED, Metadata

BOXES, SCORES, DETECTIONS = "boxes", "scores", "detections"


def write_decode(g: Graph, raws: list[str], specs: list[HeadSpec]) -> tuple[str, str]:
    """Write boxes [B, N, 4] xywh_px and scores [B, N, C] of all heads, in the order of Darknet.decode."""
    decoded = [_decode(g, raw, spec) for raw, spec in zip(raws, specs, strict=True)]
    boxes, scores = zip(*decoded, strict=True)
    g.prefix = ""
    return g.op("Concat", *boxes, axis=1, output=BOXES), g.op("Concat", *scores, axis=1, output=SCORES)


def add_nms(
    data: bytes, metadata: Metadata, *, conf_thres: float, iou_thres: float, max_det: int
) -> tuple[bytes, Metadata]:
    """Put NMS behind the boxes and scores of an ONNX model; give its bytes and what they say of themselves now."""
    limits = f"scores over {conf_thres:g}, overlaps up to {iou_thres:g}, {max_det} boxes a class"
    g, metadata = Graph(), replace(metadata, outputs=DETECTED, limits=limits)
    onnx = g.onnx
    detected = write_nms(g, BOXES, SCORES, conf_thres=conf_thres, iou_thres=iou_thres, max_det=max_det)
    model = onnx.load_from_string(data)
    known = {constant.name for constant in model.graph.initializer}
    model.graph.node.extend(g.nodes)
    model.graph.initializer.extend(constant for name, constant in g.constants.items() if name not in known)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(detected, onnx.TensorProto.FLOAT, ["detected", 7]))
    onnx.helper.set_model_props(model, metadata.pack())
    return model.SerializeToString(), metadata


def write_nms(g: Graph, boxes: str, scores: str, *, conf_thres: float, iou_thres: float, max_det: int) -> str:
    """Write what remains of the boxes, [M, 7]: picture of the batch, xyxy_px, score, class.

    Suppression goes class by class, and `max_det` counts within each.
    """
    g.prefix = "nms/"
    by_class = g.op("Transpose", scores, perm=[0, 2, 1])  # [B, C, N]
    limits = ([max_det], float(iou_thres), float(conf_thres))
    kept = g.op("NonMaxSuppression", boxes, by_class, *limits, center_point_box=1)  # [M, 3]: picture, class, box
    box = g.op("GatherND", boxes, g.op("Gather", kept, [0, 2], axis=1))  # [M, 4] xywh_px
    score = g.op("GatherND", by_class, kept)  # [M]
    centre, half = _columns(g, box, 0, 2), g.op("Mul", _columns(g, box, 2, 4), 0.5)
    picture, label = (_columns(g, g.op("Cast", kept, to=g.onnx.TensorProto.FLOAT), i, i + 1) for i in (0, 1))
    corners = g.op("Sub", centre, half), g.op("Add", centre, half)
    return g.op("Concat", picture, *corners, g.op("Unsqueeze", score, [1]), label, axis=1, output=DETECTIONS)


def _decode(g: Graph, raw: str, spec: HeadSpec) -> tuple[str, str]:
    """Write decode() of models/yolo.py, one line for one of its lines."""
    A, g.prefix = len(spec.anchors), f"{spec.layer}/"
    entries = g.op("Transpose", g.op("Reshape", raw, [0, A, spec.entries, -1]), perm=[0, 1, 3, 2])  # [B, A, HW, E]
    t = g.op("Gather", entries, [*GAUSSIAN[0], *range(8, spec.entries)], axis=3) if spec.is_gaussian else entries
    cell, stride = _cells(g, raw)
    xy, wh = _columns(g, t, 0, 2), _columns(g, t, 2, 4)
    if spec.is_new_coords:
        wh = g.op("Mul", g.op("Mul", wh, wh), 4.0)
    else:
        xy, wh = g.op("Sigmoid", xy), g.op("Exp", wh)
    wh = g.op("Mul", wh, torch.tensor(spec.anchors)[:, None])  # [A, 1, 2]
    if spec.scale_x_y != 1:
        xy = g.op("Sub", g.op("Mul", xy, float(spec.scale_x_y)), (spec.scale_x_y - 1) / 2)
    xy = g.op("Mul", g.op("Add", cell, xy), stride)
    if spec.point != "center":
        xy = g.op("Add", xy, g.op("Mul", wh, POINTS[spec.point]))
    objectness, classes = _columns(g, t, 4, 5), _columns(g, t, 5, 5 + spec.classes)
    if not spec.is_new_coords:
        objectness = g.op("Sigmoid", objectness)
        classes = g.op("Softmax", classes, axis=-1) if spec.is_softmax else g.op("Sigmoid", classes)
    scores = g.op("Mul", objectness, classes)
    if spec.is_gaussian:
        unsure = g.op("ReduceMean", g.op("Sigmoid", g.op("Gather", entries, list(GAUSSIAN[1]), axis=3)), [3])
        scores = g.op("Mul", scores, g.op("Sub", 1.0, unsure))
    boxes = g.op("Concat", xy, wh, axis=3)
    return g.op("Reshape", boxes, [0, -1, 4]), g.op("Reshape", scores, [0, -1, spec.classes])


def _cells(g: Graph, raw: str) -> tuple[str, str]:
    """Write (column, row) of every cell, [HW, 2], and the pixels that a cell spans, [2] (x, y)."""
    kind = g.onnx.TensorProto.FLOAT
    image, sides = (g.op("Shape", x, start=2) for x in (IMAGES, raw))
    index, width = g.op("Range", 0, g.op("ReduceProd", sides, keepdims=0), 1), g.op("Gather", sides, 1)
    parts = [g.op("Unsqueeze", g.op(operator, index, width), [1]) for operator in ("Mod", "Div")]
    pixels, cells = (g.op("Cast", g.op("Gather", each, [1, 0]), to=kind) for each in (image, sides))
    return g.op("Cast", g.op("Concat", *parts, axis=1), to=kind), g.op("Div", pixels, cells)


def _columns(g: Graph, x: str, start: int, stop: int) -> str:
    """Write the entries from `start` to before `stop` along the last axis."""
    return g.op("Slice", x, [start], [stop], [-1])
