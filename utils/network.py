"""What commands ask of a network, whatever computes it: a Darknet, or an exported file in a runtime."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

from torch import Tensor

from models.yolo import HeadSpec


class Network(Protocol):
    """A detector; its members are those of models.Darknet."""

    size: tuple[int, int]
    channels: int
    heads: Sequence[HeadSpec]

    @property
    def stride(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def diou_beta(self) -> float | None: ...

    @property
    def is_fixed(self) -> bool: ...

    def __call__(self, x: Tensor) -> list[Tensor]: ...

    def decode(self, heads: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]: ...

    def fuse(self) -> Self: ...

    def eval(self) -> Self: ...

    def to(self, *args: Any, **kwargs: Any) -> Self: ...
