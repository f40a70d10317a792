"""Macros: sections that stand for several primitive ones, and the numbering of layers around them.

A macro writes cfg text, so that an expanded network is a cfg like any other: the inner convolutions can be pruned one
by one, and Darknet and OpenCV load it. Indices in a cfg count the sections as they are written, macros included.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from . import blocks
from .cfg import Cfg, Section, parse
from .layer import Built, read_rules

Macro: TypeAlias = Callable[[Section, Built], str]


MACROS: dict[str, Macro] = {
    "se": blocks.se,
    "cbam": blocks.cbam,
    "residual": blocks.residual,
    "csp": blocks.csp,
    "csp_tiny": blocks.csp_tiny,
    "elan": blocks.elan,
    "inverted_residual": blocks.inverted_residual,
    "ghost_bottleneck": blocks.ghost_bottleneck,
    "osa": blocks.osa,
    "shuffle_stage": blocks.shuffle_stage,
    "stage2": blocks.stage,
    "stage3": blocks.stage,
    "stage4": blocks.stage,
}


def primitives(cfg: Cfg, built: Built) -> Iterator[Section]:
    """Yield the primitive section of every layer in turn, and note it in `built.sections` as an expanded cfg has it.

    The caller appends the layer of each to `built` before it asks for the next: a macro is expanded when its turn
    comes, as it depends on the channels of the layer before it.
    """
    for section in cfg.sections[1:]:
        macro, places = MACROS.get(section.name), built.places
        if macro is None:
            yield section
            built.sections.append(_renumbered(section, built.renumbered))
            built.renumbered = {}
        else:
            places, built.places = places or list(range(built.index)), None  # inside a macro layers count as they are
            for inner in _expand(section, macro, built):
                yield inner
                built.sections.append(inner)
            built.places = places
        if places is not None:
            places.append(built.index - 1)


def _expand(section: Section, macro: Macro, built: Built) -> list[Section]:
    """Give the sections that a macro stands for, each on its line, with its comments and the keys of every layer."""
    probe = replace(section, known=set(), unsure=set())
    read_rules(probe)
    section.known |= probe.known
    rules = [option for key, option in section.options.items() if key in probe.known - probe.unsure]
    words = [f"[{section.name}]", *(f"{option.key}={option.value}" for option in section.options.values())]
    text = macro(section, built)
    if built.index == 0:
        section.fail("expects a layer before it (put a convolution before it)")
        text = "[empty]\n"
    header, _, rest = text.partition("\n")
    ending = section.lines[0][len(section.lines[0].rstrip("\r\n")) :] or "\n"
    inner = parse(f"[net]\n{header}\n# of {' '.join(words)}\n{rest}".replace("\n", ending))
    assert not inner.mistakes, inner.mistakes
    sections = inner.sections[1:]
    for each in sections:
        for rule in rules:
            each.set(rule.key, rule.value)
        each.cfg, each.line, each.unsure = section.cfg, section.line, {*section.unsure}
        for option in each.options.values():
            option.line = section.line
    sections[-1].lines += [line for line in section.lines[1:] if line.lstrip()[:1] in ("", "#", ";")]
    return sections


def _renumbered(section: Section, values: dict[str, str]) -> Section:
    """Give a copy of a section with other layer indices, or the section itself where none has changed."""
    if not values:
        return section
    options = {key: replace(option) for key, option in section.options.items()}
    copy = replace(section, lines=list(section.lines), options=options)
    for key, value in values.items():
        copy.set(key, value)
    return copy
