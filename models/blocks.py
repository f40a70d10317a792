"""The macros: blocks of light-weight networks, written as the primitive sections that they stand for.

A macro takes its section and the layers so far, and gives cfg text. Its layers stand in the order in which the public
weights of these networks hold their tensors.
"""

from .activations import ACTIVATIONS
from .cfg import Section
from .grid import grid_keys, is_quantised, read_grid
from .layer import MAX_FILTERS, MAX_KERNEL, Built, read_odd

MAX_REPEAT = 128  # four times what any network has
STAGE_UNITS = {"stage2": 4, "stage3": 8, "stage4": 4}  # of ShuffleNetV2


class Writer:
    """Sections in the making. Methods append one or more and give the index of the last one's layer."""

    def __init__(self, built: Built) -> None:
        self.start, self.sections, self.convolution = built.index, list[str](), ["[convolutional]"]

    @property
    def text(self) -> str:
        return "\n".join(self.sections)

    @property
    def last(self) -> int:
        return self.start + len(self.sections) - 1

    def add(self, *lines: str) -> int:
        self.sections.append("\n".join(lines) + "\n")
        return self.last

    def conv(self, filters: int, activation: str, size: int = 1, stride: int = 1, groups: int = 1) -> int:
        """Write a convolution with batch normalisation that keeps the size but for its stride."""
        shape = [f"filters={filters}", f"size={size}", f"stride={stride}", "pad=1"]
        shape += [f"groups={groups}"] if groups > 1 else []
        return self.add(*self.convolution, "batch_normalize=1", *shape, f"activation={activation}")

    def biased(self, filters: int, activation: str) -> int:
        """Write a 1×1 convolution that stays float: what gates compute is cheap, and may be negative."""
        return self.add("[convolutional]", f"filters={filters}", "size=1", "stride=1", f"activation={activation}")

    def route(self, *layers: int, half: int | None = None) -> int:
        """Concatenate layers, or take the first (0) or second (1) half of one."""
        halves = [] if half is None else ["groups=2", f"group_id={half}"]
        return self.add("[route]", "layers=" + ",".join(map(self._back, layers)), *halves)

    def shortcut(self, layer: int) -> int:
        return self.add("[shortcut]", f"from={self._back(layer)}", "activation=linear")

    def squeeze(self, channels: int, hidden: int, gate: str) -> int:
        """Gate the last layer's channels by what their means say (https://arxiv.org/abs/1709.01507)."""
        self.add("[avgpool]")
        self.biased(hidden, "relu")
        self.biased(channels, gate)
        return self.add("[scale_channels]", "from=-4")

    def ghost(self, filters: int, activation: str) -> int:
        """Make half of the channels by a 1×1 convolution, and the others of these by a depthwise one."""
        half = filters // 2
        first = self.conv(half, activation)
        return self.route(first, self.conv(half, activation, 3, groups=half))

    def _back(self, layer: int) -> str:
        return str(layer - self.last - 1)


def se(section: Section, built: Built) -> str:
    """Write [se], squeeze and excitation: gate every channel by what the means of all channels say.

    https://arxiv.org/abs/1709.01507: the hidden layer has a `reduction`-th of the channels, at least one.
    """
    channels, writer = built.previous.channels, Writer(built)
    reduction = section.int("reduction", 16, minimum=1, maximum=MAX_FILTERS)
    hidden = _read_filters(section, "hidden", max(1, channels // reduction))
    writer.squeeze(channels, hidden, _read_activation(section, "logistic"))
    return writer.text


def cbam(section: Section, built: Built) -> str:
    """Write [cbam], CBAM (https://arxiv.org/abs/1807.06521): [ca], then [sa]."""
    writer = Writer(built)
    writer.add("[ca]", f"ratio={section.int('ratio', 16, minimum=1, maximum=MAX_FILTERS)}")
    writer.add("[sa]", f"kernelsize={read_odd(section, 'kernel_size', 7)}")
    return writer.text


def residual(section: Section, built: Built) -> str:
    """Write [residual], Darknet-53's block: 1×1 to fewer channels, 3×3 back, and the input added."""
    channels, writer = built.previous.channels, _make_writer(section, built)
    hidden = _read_filters(section, "hidden", max(1, channels // 2))
    activation = _read_activation(section, "leaky")
    for _ in range(_read_repeat(section, "repeat", 1)):
        _residual(writer, hidden, channels, activation)
    return writer.text


def csp(section: Section, built: Built) -> str:
    """Write [csp], a stage of CSPDarknet-53 without its downsampling: residual blocks beside a way around them.

    https://arxiv.org/abs/1911.11929, in the order of yolov4.cfg.
    """
    writer, source = _make_writer(section, built), built.index - 1
    filters = _read_filters(section, "filters")
    hidden = _read_filters(section, "hidden", max(1, filters // 2))
    inner = _read_filters(section, "inner", hidden)
    activation = _read_activation(section, "mish")
    around = writer.conv(hidden, activation)
    writer.route(source)
    writer.conv(hidden, activation)
    for _ in range(_read_repeat(section, "repeat", 1)):
        _residual(writer, inner, hidden, activation)
    writer.route(writer.conv(hidden, activation), around)
    writer.conv(filters, activation)
    return writer.text


def csp_tiny(section: Section, built: Built) -> str:
    """Write [csp_tiny], a stage of yolov4-tiny.cfg without its pooling; it puts out twice its `filters`."""
    writer, filters = _make_writer(section, built), _read_even(section, "filters")
    activation = _read_activation(section, "leaky")
    first = writer.conv(filters, activation, 3)
    writer.route(first, half=1)
    second = writer.conv(filters // 2, activation, 3)
    writer.route(writer.conv(filters // 2, activation, 3), second)
    last = writer.conv(filters, activation)
    if section.flag("join", True):
        writer.route(first, last)
    return writer.text


def elan(section: Section, built: Built) -> str:
    """Write [elan], efficient layer aggregation: two 1×1 convolutions and a chain after one of them, side by side.

    https://arxiv.org/abs/2211.04800
    """
    writer, source = _make_writer(section, built), built.index - 1
    filters = _read_filters(section, "filters")
    hidden = _read_filters(section, "hidden", max(1, filters // 2))
    activation, size = _read_activation(section, "swish"), read_odd(section, "size", 3)
    layers = [writer.conv(hidden, activation)]
    writer.route(source)
    layers.append(writer.conv(hidden, activation))
    layers += [writer.conv(hidden, activation, size) for _ in range(_read_repeat(section, "repeat", 2))]
    writer.route(*layers)
    writer.conv(filters, activation)
    return writer.text


def inverted_residual(section: Section, built: Built) -> str:
    """Write [inverted_residual], MobileNetV2's and V3's block: 1×1 to more channels, depthwise, SE, 1×1 linear.

    https://arxiv.org/abs/1801.04381, https://arxiv.org/abs/1905.02244
    """
    writer, source, channels = _make_writer(section, built), built.index - 1, built.previous.channels
    hidden, filters = (_read_filters(section, key) for key in ("hidden", "filters"))
    size, stride = read_odd(section, "size", 3), section.int("stride", 1, minimum=1, maximum=MAX_KERNEL)
    squeezed, gate = _read_gate(section, "hard_sigmoid")
    activation = _read_activation(section, "relu6")
    if hidden != channels:
        writer.conv(hidden, activation)
    writer.conv(hidden, activation, size, stride, groups=hidden)
    if squeezed:
        writer.squeeze(hidden, squeezed, gate)
    writer.conv(filters, "linear")
    if stride == 1 and filters == channels:
        writer.shortcut(source)
    return writer.text


def ghost_bottleneck(section: Section, built: Built) -> str:
    """Write [ghost_bottleneck], GhostNet's block: a ghost module to `hidden` channels and one to `filters`.

    https://arxiv.org/abs/1911.11907: a ghost module makes half of its channels of the other half, depthwise.
    """
    writer, source, channels = _make_writer(section, built), built.index - 1, built.previous.channels
    hidden, filters = (_read_even(section, key) for key in ("hidden", "filters"))
    size, stride = read_odd(section, "size", 3), section.int("stride", 1, minimum=1, maximum=MAX_KERNEL)
    squeezed, gate = _read_gate(section, "logistic")
    writer.ghost(hidden, _read_activation(section, "relu"))
    if stride > 1:
        writer.conv(hidden, "linear", size, stride, groups=hidden)
    if squeezed:
        writer.squeeze(hidden, squeezed, gate)
    last = writer.ghost(filters, "linear")
    if stride == 1 and filters == channels:
        writer.shortcut(source)
    else:
        writer.route(source)
        writer.conv(channels, "linear", size, stride, groups=channels)
        writer.conv(filters, "linear")
        writer.shortcut(last)
    return writer.text


def osa(section: Section, built: Built) -> str:
    """Write [osa], VoVNet's one-shot aggregation: a chain of 3×3 convolutions, all of them and the input side by side.

    https://arxiv.org/abs/1904.09730; `ese` and `residual` are those of VoVNetV2, https://arxiv.org/abs/1911.06667.
    """
    writer, source, channels = _make_writer(section, built), built.index - 1, built.previous.channels
    filters, hidden = (_read_filters(section, key) for key in ("filters", "hidden"))
    convs, activation = _read_repeat(section, "convs", 5), _read_activation(section, "relu")
    writer.route(source, *[writer.conv(hidden, activation, 3) for _ in range(convs)])
    writer.conv(filters, activation)
    if section.flag("ese"):
        writer.add("[avgpool]")
        writer.biased(filters, "hard_sigmoid")
        writer.add("[scale_channels]", "from=-3")
    if section.flag("residual"):
        writer.shortcut(source)
        if filters != channels:
            message = f"expects as many filters as its input has channels, {channels}, gets {filters} (set residual=0)"
            built.mismatch(section, [built.previous], "channels", message, "residual", keys="filters")
    return writer.text


def shuffle_stage(section: Section, built: Built) -> str:
    """Write [shuffle_stage], a stage of ShuffleNetV2, at half the size of its input.

    https://arxiv.org/abs/1807.11164
    """
    return _shuffle_stage(section, built, "filters", _read_repeat(section, "units", 4))


def stage(section: Section, built: Built) -> str:
    """Write a [shuffle_stage] with the units that ShuffleNetV2 has in this stage: 4, 8, 4.

    In the detectors that write it so, the first unit's second branch keeps its channels up to its last convolution.
    """
    units, channels = STAGE_UNITS[section.name], built.previous.channels
    return _shuffle_stage(section, built, "out_channels", units, hidden=channels)


def _shuffle_stage(section: Section, built: Built, key: str, units: int, *, hidden: int | None = None) -> str:
    writer, source, channels = _make_writer(section, built), built.index - 1, built.previous.channels
    half, activation = _read_even(section, key) // 2, _read_activation(section, "relu")
    hidden = _read_filters(section, "hidden", hidden or half)
    writer.conv(channels, "linear", 3, 2, groups=channels)
    beside = writer.conv(half, activation)
    writer.route(source)
    for unit in range(units):
        if unit > 0:
            beside = writer.route(writer.last, half=0)
            writer.route(beside - 1, half=1)
        inner = half if unit else hidden
        writer.conv(inner, activation)
        writer.conv(inner, "linear", 3, 1 if unit else 2, groups=inner)
        writer.route(beside, writer.conv(half, activation))
        writer.add("[channel_shuffle]", "groups=2")
    return writer.text


def _make_writer(section: Section, built: Built) -> Writer:
    """Make a Writer whose convolutions are quantised where the section says how."""
    writer, grid = Writer(built), read_grid(section)
    if is_quantised(section):
        writer.convolution = ["[quan_convolutional]", *(f"{key}={value}" for key, value in grid_keys(grid).items())]
    return writer


def _residual(writer: Writer, hidden: int, filters: int, activation: str) -> None:
    source = writer.last
    writer.conv(hidden, activation)
    writer.conv(filters, activation, 3)
    writer.shortcut(source)


def _read_filters(section: Section, key: str, default: int | None = None) -> int:
    return section.int(key, default, minimum=1, maximum=MAX_FILTERS)


def _read_even(section: Section, key: str) -> int:
    filters = section.int(key, minimum=2, maximum=MAX_FILTERS)
    if filters % 2:
        section.fail(f"{key!r} expects an even number, gets {filters} (set {key}={filters + 1})", key)
        section.unsure.add(key)
    return filters + filters % 2


def _read_repeat(section: Section, key: str, default: int) -> int:
    return section.int(key, default, minimum=1, maximum=MAX_REPEAT)


def _read_gate(section: Section, default: str) -> tuple[int, str]:
    """Read the hidden channels of squeeze and excitation, 0 where there is none, and the activation of its gate."""
    return section.int("se", 0, minimum=0, maximum=MAX_FILTERS), section.choice("gate", ACTIVATIONS, default)


def _read_activation(section: Section, default: str) -> str:
    return section.choice("activation", ACTIVATIONS, default)
