"""Mutated cfgs: whatever a file says, it builds a network that runs, or is refused with CfgError and a line.

Networks are built and run on the meta device, which allocates nothing. The mutations are drawn by hypothesis without
chance, so that every run tries the same files.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import CFGS, INVALID

from benchmarks.real_data import real_data
from models import Cfg, CfgError, Darknet, dump, parse
from models.cfg import Mistake
from models.layers import SECTIONS
from models.macros import MACROS
from utils import lint

SECONDS = 20  # for one cfg, which takes a fraction of one; beyond it hangs
SOURCES = [
    path for path in [*CFGS, *INVALID, *sorted(real_data().glob("darknet/**/*.cfg"))] if path.stat().st_size < 6000
]

VALUES = """0 1 -1 2 3 5 7 13 64 255 1000 65535 65536 65537 2147483647 2147483648 -2147483649 99999999999999999999 1e3
    1e39 -1e39 1e-45 0.5 .5 5. 1.5.2 nan inf -inf 0x10 1_000 ８ ² none linear mish swish true , ,, 1, ,1 1,2 -1,-2
    -1,0,1 0,0 1;2 1#2 = == [net] ] " ' \\ %s {} $ é 10,13,16,30 relu6 per_channel softmax greedynms""".split()
KEYS = """filters size stride stride_x stride_y pad padding groups group group_id batch_normalize activation dilation
    layers from anchors mask num classes scale_x_y new_coords coords width height channels probability scale_wh
    share_index antialiasing xnor bin_output reverse output hidden weights_type weights_normalization stopbackward
    dontload train_only_bn reduction w_bits a_bits a_range ratio kernel_size kernelsize repeat inner join se gate convs
    ese residual units out_channels nonsense""".split()
LINES = [*(f"[{section}]" for section in (*SECTIONS, *MACROS)), *"[] [ [net] [nonsense] = == # ; \ufeff a=1".split()]

Lines = list[bytes]


class Hang(BaseException):
    """A cfg that takes too long; no Exception, so that nothing but the test sees it."""


def change_bytes(lines: Lines, draw: Callable) -> Lines:
    """Overwrite, insert or drop some bytes."""
    data = bytearray(b"\n".join(lines))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data).split(b"\n")


def move_lines(lines: Lines, draw: Callable) -> Lines:
    """Drop, repeat or move a stretch of lines."""
    start = draw(st.integers(0, len(lines) - 1))
    end = min(len(lines), start + draw(st.integers(1, 12)))
    part, rest = lines[start:end], lines[:start] + lines[end:]
    match draw(st.sampled_from(["drop", "repeat", "move"])):
        case "drop":
            return rest
        case "repeat":
            return lines[:end] + part + lines[end:]
        case _:
            place = draw(st.integers(0, len(rest)))
            return rest[:place] + part + rest[place:]


def add_line(lines: Lines, draw: Callable) -> Lines:
    """Write a section or a key where there was none."""
    line = draw(st.sampled_from(LINES) | st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES)))
    place = draw(st.integers(0, len(lines)))
    return [*lines[:place], line.encode(), *lines[place:]]


def change_value(lines: Lines, draw: Callable) -> Lines:
    """Give a key another value."""
    return _replace(lines, draw, st.sampled_from([*VALUES, "", "\t"]) | st.integers(-1, 70000).map(str))


def change_index(lines: Lines, draw: Callable) -> Lines:
    """Give a key other layers."""
    index = st.integers(-len(lines) // 4, len(lines) // 4)
    return _replace(lines, draw, st.lists(index, min_size=1, max_size=5).map(lambda each: ",".join(map(str, each))))


def change_key(lines: Lines, draw: Callable) -> Lines:
    """Give a value another key, or a section another name."""
    place = draw(st.integers(0, len(lines) - 1))
    _, equals, after = lines[place].partition(b"=")
    new = draw(st.sampled_from(KEYS if equals else LINES)).encode()
    return [*lines[:place], new + equals + after, *lines[place + 1 :]]


def _replace(lines: Lines, draw: Callable, values: st.SearchStrategy[str]) -> Lines:
    places = [place for place, line in enumerate(lines) if b"=" in line]
    if not places:
        return lines
    place = draw(st.sampled_from(places))
    return [*lines[:place], lines[place].partition(b"=")[0] + b"=" + draw(values).encode(), *lines[place + 1 :]]


MUTATIONS = [change_bytes, move_lines, add_line, change_value, change_value, change_index, change_key]


@st.composite
def mutated(draw: Callable) -> bytes:
    """Draw a cfg and change it a few times."""
    lines = draw(st.sampled_from(SOURCES)).read_bytes().split(b"\n")
    for mutation in draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=draw(st.integers(1, 4)))):
        lines = mutation(lines, draw) or [b""]
    return b"\n".join(lines)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hang in what takes longer than `seconds`."""

    def stop(*_: object) -> None:
        raise Hang(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(data: bytes) -> bool:
    """Build and run a cfg, or see it refused with a line; tell whether it was built."""
    text = data.decode("utf-8", "surrogateescape")
    lines = text.count("\n") + 1
    with limited(SECONDS):
        cfg = parse(text, "mutated.cfg")
        assert dump(cfg) == text
        model, mistakes = build(cfg)
        assert all(1 <= mistake.line <= lines and mistake.message for mistake in mistakes), mistakes
        if model:
            run(model)
    return model is not None


def build(cfg: Cfg) -> tuple[Darknet | None, list[Mistake]]:
    """Give the network or the mistakes."""
    try:
        with torch.device("meta"):
            return Darknet(cfg).eval(), []
    except CfgError as error:
        return None, error.mistakes


def run(model: Darknet) -> None:
    """Run the network on the meta device: what it returns has the shape that its arithmetic foretold."""
    assert lint.weights_bytes(model) >= lint.HEADER
    assert len(lint.receptive_fields(model)) == len(model.layers)
    assert model.summary()
    assert build(parse(dump(model.expanded)))[0]
    with torch.inference_mode():
        heads = model(torch.empty(1, model.channels, *model.size, device="meta"))
    wanted = [model.layers[head.layer] for head in model.heads] or model.layers[-1:]  # of a classifier the scores
    assert [head.shape[1:] for head in heads] == [(layer.channels, *layer.size) for layer in wanted]


def assert_all_build_or_are_refused(examples: int) -> None:
    """Check so many mutated cfgs; some must build and some must not."""
    built = []

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(mutated())
    def try_one(data: bytes) -> None:
        built.append(check(data))

    try_one()
    assert examples / 20 < sum(built) < len(built) - examples / 20


def test_some_mutated_cfgs_build_or_are_refused_with_a_line() -> None:
    assert_all_build_or_are_refused(300)


@pytest.mark.slow
def test_many_mutated_cfgs_build_or_are_refused_with_a_line() -> None:
    assert_all_build_or_are_refused(10_000)


def test_a_hang_is_seen() -> None:
    with pytest.raises(Hang, match="more than 1 s"), limited(1):
        signal.pause()
