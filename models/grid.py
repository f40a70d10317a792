"""How a convolution is quantised: bits, method and range, as the keys of a section say."""

from dataclasses import dataclass

from .cfg import Section

METHODS = ("dorefa", "lsq", "iao")
FLOAT_BITS = 32  # left as it is
BYTE_BITS = 8  # the most that integer kernels take
MAX_BITS = 16  # levels that float32 still tells apart after a division
KEYS = frozenset("w_bits a_bits a_range method symmetric".split())  # any of them makes a macro quantised


@dataclass(frozen=True)
class Grid:
    """Bits of weights and inputs (32: float), where inputs saturate, and the method.

    DoReFa's inputs saturate at `a_range`, those of the other methods until training has seen a batch. Symmetric inputs
    may be negative.
    """

    w_bits: int
    a_bits: int
    a_range: float
    method: str = "dorefa"
    is_symmetric: bool = False

    @property
    def is_integer(self) -> bool:
        """Tell whether integer kernels can compute with it."""
        return max(self.w_bits, self.a_bits) <= BYTE_BITS

    @property
    def weight_levels(self) -> tuple[int, int]:
        """Give the least and the greatest level of LSQ's and IAO's weights; as ONNX has it, 8 bits leave out -128."""
        if self.w_bits == 1:
            return -1, 1
        half = 2 ** (self.w_bits - 1)
        return -half + (self.method == "iao" or self.w_bits == BYTE_BITS), half - 1

    @property
    def input_levels(self) -> tuple[int, int]:
        """Give the least and the greatest level of inputs, where a range that is not symmetric starts at 0."""
        zero = 2 ** (self.a_bits - 1) if self.is_symmetric else 0
        return -zero, 2**self.a_bits - 1 - zero


def read_grid(section: Section) -> Grid:
    """Read how a convolution is quantised; [IAO_convolutional] names its method."""
    w_bits, a_bits = _read_bits(section, "w_bits"), _read_bits(section, "a_bits")
    method = section.choice("method", METHODS, "iao" if section.name.startswith("IAO") else METHODS[0])
    is_symmetric = section.flag("symmetric")
    if method == "dorefa" and "symmetric" in section.options:
        section.fail("has inputs from 0 on with method=dorefa (leave out symmetric=, or set method=lsq)", "symmetric")
        is_symmetric = False
    if is_symmetric and a_bits == 1:
        section.fail("'a_bits' expects at least 2 with symmetric=1, gets 1", "a_bits")
        a_bits = FLOAT_BITS
    if method == "iao" and w_bits == 1:
        section.fail("'w_bits' expects at least 2 with method=iao, gets 1 (set method=dorefa or method=lsq)", "w_bits")
        w_bits = FLOAT_BITS
    return Grid(w_bits, a_bits, section.float("a_range", 10, minimum=1e-6), method, is_symmetric)


def is_quantised(section: Section) -> bool:
    """Tell whether a section, or the macro that it is, has quantised convolutions."""
    has_grid = not section.options.keys().isdisjoint(KEYS)
    return has_grid or section.name.startswith(("quan", "IAO"))


def grid_keys(grid: Grid) -> dict[str, object]:
    """Give the keys that say how a convolution is quantised."""
    keys: dict[str, object] = {"w_bits": grid.w_bits, "a_bits": grid.a_bits, "a_range": grid.a_range}
    return keys | ({} if grid.method == "dorefa" else {"method": grid.method, "symmetric": int(grid.is_symmetric)})


def _read_bits(section: Section, key: str) -> int:
    bits = section.int(key, 8, minimum=1, maximum=FLOAT_BITS)
    if MAX_BITS < bits < FLOAT_BITS:
        section.fail(f"{key!r} expects 1 to {MAX_BITS}, or {FLOAT_BITS} for floating point, gets {bits}", key)
        return FLOAT_BITS
    return bits
