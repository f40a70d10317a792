"""The table of docs/darknet-compatibility.md is current, as far as that shows without weights."""

from pathlib import Path

import pytest
from networks import ROOT
from test_opencv import STOCK

from benchmarks.compatibility import BEYOND, TEXT, expected_bytes
from utils import lint

DOCUMENT = (ROOT / "docs/darknet-compatibility.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """Give the cells of every row of the document by the cfg in its first."""
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_document_opens_as_its_command_writes_it() -> None:
    assert DOCUMENT.startswith(TEXT)


def test_the_44_stock_detectors_are_listed_and_whole() -> None:
    listed = rows()
    assert len({*STOCK, *BEYOND}) == 44
    assert {*STOCK, *BEYOND} <= listed.keys()
    for name in STOCK:
        _, _, expected, written, again, opencv, *_ = listed[name]
        assert (expected, again) == (written, "equal")
        assert 0 <= float(opencv) <= 1e-4


@pytest.mark.parametrize("part", range(4))
def test_every_cfg_has_its_row(part: int, shared_data: Path) -> None:
    listed, sizes = rows(), expected_bytes()
    for path in sorted(shared_data.glob("darknet/**/*.cfg"))[part::4]:
        verdict = lint.judge(str(path))
        if verdict.model:
            figures = lint.figures(verdict)
            written = f"{figures['weights_bytes']:,}"
            wanted = [str(figures["sections"] - 1), f"{figures['parameters']:,}", written]
            layers, parameters, expected, found, *_ = listed[path.stem]
            assert [layers, parameters, found] == wanted
            assert expected == (written if path.stem in sizes else "")
            assert sizes.get(path.stem, figures["weights_bytes"]) == figures["weights_bytes"]
        else:
            line, message = listed[path.stem]
            assert verdict.errors[0] == f"{path}:{line}: {message}"
