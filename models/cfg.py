"""The cfg language: lossless parse and dump, typed reads, and all mistakes of a file in one report.

The grammar is Darknet's: white space means nothing, `#` and `;` start a comment, `[name]` opens a section, the first
`=` of a line splits key from value, and the first of two equal keys wins.
"""

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias, TypeVar

log = logging.getLogger("darkslim.cfg")

T = TypeVar("T")
Number = TypeVar("Number", int, float)
Int: TypeAlias = int  # Section.int and Section.float hide the builtins inside the class
Float: TypeAlias = float

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_VALUE = re.compile(r"(?P<blank>\s*(?=[^\s#;])|)(?P<value>[^#;]*?)(?P<rest>\s*(?:[#;].*)?)", re.DOTALL)
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MISSING_COMMA = re.compile(r"[\d.][ \t]+[-+\d.]")


class Mistake(NamedTuple):
    """One mistake of the user: what was found, what was expected and, where it is known, the fix."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" if self.line else f"{self.path}: {self.message}"


class CfgError(ValueError):
    """The mistakes of a cfg, sorted by line. `path`, `line` and `message` are those of the first."""

    def __init__(self, path: str, line: int, message: str) -> None:
        super().__init__(path, line, message)
        self.path, self.line, self.message = path, line, message
        self.mistakes = [Mistake(path, line, message)]

    @classmethod
    def report(cls, mistakes: Iterable[Mistake]) -> Self:
        """Join several mistakes into one error; the same mistake found twice is told once."""
        ordered = sorted(set(mistakes), key=lambda mistake: mistake[1:])
        error = cls(*ordered[0])
        error.mistakes = ordered
        return error

    def __str__(self) -> str:
        return "\n".join(map(str, self.mistakes))


@dataclass
class Option:
    """One `key=value` line; `row` is its place among the lines of its section, `line` its place in the file."""

    key: str
    value: str
    row: int
    line: int
    lacks_comma: bool = False  # between two of its numbers, which Darknet reads as one


@dataclass(eq=False)
class Section:
    """One `[name]` with its raw lines and options.

    Every typed read marks its key; what no builder has read is reported by `Cfg.check_unread`. A value that cannot be
    read is noted among the file's mistakes and the default returned, so that building goes on and finds the others.
    """

    name: str
    line: int
    cfg: "Cfg" = field(repr=False)
    lines: list[str] = field(default_factory=list, repr=False)
    options: dict[str, Option] = field(default_factory=dict)
    known: set[str] = field(default_factory=set, repr=False)
    unsure: set[str] = field(default_factory=set, repr=False)  # keys whose number could not be read

    def fail(self, message: str, key: str = "") -> None:
        """Note a mistake at the line of `key`, or of the section itself."""
        self.cfg.fail(self.line_of(key), f"[{self.name}] {message}")

    def line_of(self, key: str) -> Int:
        """Give the line of `key`, or of the section where the key is not written."""
        return self.options[key].line if key in self.options else self.line

    def int(
        self, key: str, default: Int | None = None, *, minimum: Int = -(2**31), maximum: Int = 2**31, alias: str = ""
    ) -> Int:
        """Read an integer between `minimum` and `maximum`; without a default the key must be there."""
        if alias:
            self.known.add(alias)
            key = alias if alias in self.options and key not in self.options else key
        return self._bounded(key, self._read(key, default, minimum, "an integer", _to_int), minimum, maximum)

    def float(self, key: str, default: Float | None = None, *, minimum: Float = -3e38, maximum: Float = 3e38) -> Float:
        """Read a number between `minimum` and `maximum`; without a default the key must be there."""
        return self._bounded(key, self._read(key, default, minimum, "a number", _to_float), minimum, maximum)

    def flag(self, key: str, default: bool = False) -> bool:
        """Read 0 or 1."""
        return self.int(key, default, minimum=0, maximum=1) == 1

    def ints(self, key: str, default: tuple[Int, ...] | None = None) -> tuple[Int, ...]:
        """Read integers between commas; without a default the key must be there."""
        return self._read(key, default, (), "integers between commas", lambda text: _to_list(text, _to_int))

    def floats(self, key: str, default: tuple[Float, ...] | None = None) -> tuple[Float, ...]:
        """Read numbers between commas; without a default the key must be there."""
        return self._read(key, default, (), "numbers between commas", lambda text: _to_list(text, _to_float))

    def choice(self, key: str, choices: Collection[str], default: str) -> str:
        """Read one of `choices`."""
        value = self._read(key, default, default, "a word", str)
        if value in choices:
            return value
        self.fail(f"{key!r} expects {suggest(value, choices)}, gets {value!r}", key)
        return default

    def set(self, key: str, value: str | Int) -> None:
        """Give `key` a new value: only its own line changes; a new key goes in below the header."""
        option = self.options.get(key)
        if option is None:
            for other in self.options.values():
                other.row += 1
            header = self.lines[0].rstrip("\r\n")
            ending = self.lines[0][len(header) :] or "\n"
            self.lines[:1] = [header + ending, f"{key}={value}{ending}"]
            self.options[key] = Option(key, str(value), 1, self.line)
            return
        head, _, tail = self.lines[option.row].partition("=")
        match = _VALUE.fullmatch(tail)
        assert match is not None  # the pattern takes any text
        self.lines[option.row] = f"{head}={match['blank']}{value}{match['rest']}"
        option.value = str(value)

    def _read(self, key: str, default: T | None, fallback: T, kind: str, convert: Callable[[str], T]) -> T:
        self.known.add(key)
        option = self.options.get(key)
        if option is None:
            if default is None:
                self.fail(f"expects {key!r}, which is missing (add a line {key}=)")
                self.unsure.add(key)
            return fallback if default is None else default
        try:
            return convert(option.value)
        except ValueError:
            self.fail(f"{key!r} expects {kind}, gets {option.value!r}", key)
            self.unsure.add(key)
            return fallback if default is None else default

    def _bounded(self, key: str, value: Number, minimum: Number, maximum: Number) -> Number:
        bounded = min(max(value, minimum), maximum)
        if bounded != value:
            self.unsure.add(key)
            self.fail(f"{key!r} expects at {'least' if value < minimum else 'most'} {bounded}, gets {value}", key)
        return bounded


@dataclass(eq=False)
class Cfg:
    """A parsed cfg: `[net]` is the first section, layer 0 the second."""

    path: str
    preamble: list[str] = field(default_factory=list, repr=False)
    sections: list[Section] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)

    def fail(self, line: int, message: str) -> None:
        """Note a mistake at `line`; `raise_mistakes` tells them all together."""
        self.mistakes.append(Mistake(self.path, line, message))

    def raise_mistakes(self) -> None:
        """Raise one CfgError with every mistake noted so far, if there is any."""
        if self.mistakes:
            raise CfgError.report(self.mistakes)

    def check_unread(self, ignored: Mapping[str, Collection[str]], *, allow_unknown: bool = False) -> None:
        """Note every key that no typed read asked for.

        `ignored` lists, per section name, Darknet's own keys that mean nothing here: one INFO line names those.
        `allow_unknown` turns the other ones into warnings.
        """
        set_aside = set()
        for section in self.sections:
            idle = ignored.get(section.name, ())
            for key, option in section.options.items():
                if key in section.known:
                    continue
                if key in idle:
                    set_aside.add(key)
                    continue
                message = f"[{section.name}] does not know {key!r} (expected {suggest(key, {*section.known, *idle})})"
                if allow_unknown:
                    log.warning("%s:%d: %s, ignored", self.path, option.line, message)
                else:
                    self.fail(option.line, message)
        if set_aside:
            log.info("%s: keys without a meaning here, set aside: %s", self.path, ", ".join(sorted(set_aside)))


def load_cfg(path: str | Path) -> Cfg:
    """Read and parse the cfg file at `path`. Raises CfgError when it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CfgError(str(path), 0, f"cannot read the cfg: {error.strerror}") from None
    if b"\0" in data:
        raise CfgError(str(path), 0, "is not a text file (expected a cfg in UTF-8, is it a weights file?)")
    return parse(data.decode("utf-8", "surrogateescape"), str(path))


def parse(text: str, path: str = "<string>") -> Cfg:
    """Parse `text`. Mistakes of syntax are noted in the Cfg, to be told together with those of its network."""
    cfg = Cfg(path)
    for number, raw in enumerate(_LINES.findall(text), start=1):
        line = "".join(raw.split()).removeprefix("\ufeff").strip("\0")
        if line.startswith("["):
            name, bracket, rest = line[1:].partition("]")
            if not bracket or rest[:1] not in ("", "#", ";"):
                cfg.fail(number, f"expected a section like [convolutional] alone on its line, gets {line!r}")
            name = name if name.isprintable() else ascii(name)
            cfg.sections.append(Section(name, number, cfg))
        target = cfg.sections[-1].lines if cfg.sections else cfg.preamble
        target.append(raw)
        if line and line[0] not in "[#;":
            _parse_option(cfg, line, raw, number)
    if not cfg.sections:
        cfg.fail(1, "expected a [net] section, the file has none")
    elif cfg.sections[0].name not in ("net", "network"):
        cfg.fail(cfg.sections[0].line, f"the first section must be [net], not [{cfg.sections[0].name}]")
    return cfg


def dump(cfg: Cfg) -> str:
    """Write the Cfg as text: `dump(parse(text)) == text`; an edited cfg differs only in the edited lines."""
    return "".join(cfg.preamble) + "".join(line for section in cfg.sections for line in section.lines)


def suggest(word: str, choices: Collection[str]) -> str:
    """Name the nearest of `choices`, or all of them when none is near."""
    near = difflib.get_close_matches(word, sorted(choices), n=1)
    return repr(near[0]) if near else "one of " + ", ".join(sorted(choices))


def _parse_option(cfg: Cfg, line: str, raw: str, number: int) -> None:
    key, equals, value = line.partition("=")
    if not equals:
        cfg.fail(number, f"expected key=value, gets {line!r} (a comment starts with #)")
        return
    if not cfg.sections:
        cfg.fail(number, f"{key!r} stands before the first section (start the file with [net])")
        return
    section = cfg.sections[-1]
    value = value.partition("#")[0].partition(";")[0]
    if key in section.options:
        first = section.options[key]
        log.info(
            "%s:%d: %r is already set to %r at line %d, which holds", cfg.path, number, key, first.value, first.line
        )
        return
    lacks_comma = "," in value and bool(_MISSING_COMMA.search(raw.partition("=")[2].partition("#")[0]))
    if lacks_comma:
        log.warning("%s:%d: %r lacks a comma between two numbers: Darknet reads them as one", cfg.path, number, key)
    section.options[key] = Option(key, value, len(section.lines) - 1, number, lacks_comma)


def _to_int(text: str) -> int:
    if not _INT.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _to_float(text: str) -> float:
    if not _FLOAT.fullmatch(text):
        raise ValueError(text)
    return float(text)


def _to_list(text: str, convert: Callable[[str], T]) -> tuple[T, ...]:
    return tuple(convert(part) for part in text.removesuffix(",").split(","))
