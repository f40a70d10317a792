"""Where a network ends: detection heads, and what follows the scores of a classifier."""

from torch import Tensor, nn

from .cfg import Section
from .channels import fixed
from .layer import MAX_FILTERS, Built, Layer
from .yolo import NMS_KINDS, POINTS, HeadSpec

HALF_PAIR = 0.5  # Darknet's anchor where the list ends too early


class Softmax(nn.Module):
    """Softmax over all values of a picture in `groups` parts or, if `is_spatial`, over the channels of each cell."""

    def __init__(self, groups: int, temperature: float, is_spatial: bool) -> None:
        super().__init__()
        self.groups, self.temperature, self.is_spatial = groups, temperature, is_spatial

    def forward(self, x: Tensor) -> Tensor:
        B, (H, W) = len(x), x.shape[2:] if self.is_spatial else (1, 1)
        parts = x.reshape(B, self.groups, -1, H, W)  # values of one softmax along the third axis
        return (parts / self.temperature).softmax(2).view_as(x)


def yolo(section: Section, built: Built) -> Layer:
    """Build [yolo]: a head whose anchors `mask` picks, in network-input pixels."""
    return _yolo(section, built, is_gaussian=False)


def gaussian_yolo(section: Section, built: Built) -> Layer:
    """Build [Gaussian_yolo] (https://arxiv.org/abs/1904.04620): a head that tells how sure it is of each coordinate."""
    return _yolo(section, built, is_gaussian=True)


def region(section: Section, built: Built) -> Layer:
    """Build [region], YOLOv2's head (https://arxiv.org/abs/1612.08242): anchors in cells, softmax over classes."""
    source = built.previous
    section.int("coords", 4, minimum=4, maximum=4)
    pairs = _read_pairs(section)[: section.int("num", 1, minimum=1)]
    spec = HeadSpec(
        built.index,
        tuple((w * source.stride[1], h * source.stride[0]) for w, h in pairs),
        section.int("classes", 20, minimum=1, maximum=MAX_FILTERS),
        source.stride,
        is_softmax=section.flag("softmax"),
    )
    return _head(section, built, spec)


def contrastive(section: Section, built: Built) -> Layer:
    """Build [contrastive], a loss of Darknet's own trainer: at inference it passes its input on."""
    index = built.resolve(section, "yolo_layer")[0]
    if not built.at(index).head:
        section.fail(f"'yolo_layer' names layer {index}, which is no head", "yolo_layer")
    section.int("classes", 1000, minimum=1)
    return built.pass_on(nn.Identity())


def softmax(section: Section, built: Built) -> Layer:
    """Build [softmax], the scores of a classifier."""
    source, groups = built.previous, section.int("groups", 1, minimum=1, maximum=MAX_FILTERS)
    temperature = section.float("temperature", 1, minimum=1e-6)
    is_spatial = section.flag("spatial")
    values = source.channels * (1 if is_spatial else source.size[0] * source.size[1])
    if values % groups:
        message = f"expects groups={groups} to divide its {values} values"
        built.mismatch(section, [source], "channels", message, "groups", keys="groups")
    module = Softmax(groups, temperature, is_spatial)
    inputs = (built.index - 1,)
    return Layer(module, inputs, source.channels, source.size, source.stride, fixed, ends_classifier=True)


def cost(section: Section, built: Built) -> Layer:
    """Build [cost], a loss: at inference it passes the scores on."""
    source, inputs = built.previous, (built.index - 1,)
    return Layer(nn.Identity(), inputs, source.channels, source.size, source.stride, ends_classifier=True)


def _yolo(section: Section, built: Built, *, is_gaussian: bool) -> Layer:
    pairs, count = _read_pairs(section), section.int("num", 1, minimum=1, maximum=MAX_FILTERS)
    mask = section.ints("mask", tuple(range(count)))
    if any(not 0 <= chosen < len(pairs) for chosen in mask):
        if pairs:
            section.fail(
                f"'mask' picks {min(mask)} to {max(mask)}, but 'anchors' has pairs 0 to {len(pairs) - 1}", "mask"
            )
        mask = ()  # so that the channels are not judged by it
    spec = HeadSpec(
        built.index,
        tuple(pairs[chosen] for chosen in mask),
        section.int("classes", 20, minimum=1, maximum=MAX_FILTERS),
        built.previous.stride,
        section.float("scale_x_y", 1, minimum=1, maximum=4),
        not is_gaussian and section.flag("new_coords"),
        nms_kind=section.choice("nms_kind", NMS_KINDS, "default"),
        beta_nms=section.float("beta_nms", 0.6, minimum=0, maximum=100),
        is_gaussian=is_gaussian,
        point=section.choice("yolo_point", POINTS, "center") if is_gaussian else "center",
    )
    return _head(section, built, spec)


def _head(section: Section, built: Built, spec: HeadSpec) -> Layer:
    source, count = built.previous, len(spec.anchors)
    wanted = count * spec.entries
    if count and source.channels != wanted:
        line = built.filters_line
        fix = f"set filters={wanted} at line {line}" if line else "put a convolution before it"
        message = f"expects {wanted} channels ({count} anchors, classes={spec.classes}), gets {source.channels} ({fix})"
        built.mismatch(section, [source], "channels", message, keys="classes num mask anchors")
    inputs = (built.index - 1,)
    return Layer(nn.Identity(), inputs, source.channels, source.size, source.stride, head=spec, multiple=source.stride)


def _read_pairs(section: Section) -> list[tuple[float, float]]:
    """Read `anchors`. Where a comma is missing the list may end within a pair, which Darknet fills up."""
    values = section.floats("anchors")
    if len(values) % 2 and section.options["anchors"].lacks_comma:
        values = (*values, HALF_PAIR)
    elif len(values) % 2:
        section.fail(f"'anchors' expects pairs of width and height, gets {len(values)} numbers", "anchors")
    if any(not 0 < value < 1e6 for value in values):
        section.fail("'anchors' expects sizes above 0 and below 1000000", "anchors")
    return list(zip(values[::2], values[1::2], strict=False))
