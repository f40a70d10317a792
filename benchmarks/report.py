"""Benchmark results as benchmarks/NAME.json and, for people, benchmarks/NAME.md."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.device import describe_machine

FOLDER = Path(__file__).parent


def write_report(
    name: str, title: str, text: str, command: str, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, float]
) -> None:
    """Write both files and print the table."""
    machine = describe_machine()
    date = datetime.date.today().isoformat()
    figures = {"command": command, "machine": machine, "date": date, "rows": list(rows), "summary": dict(summary)}
    (FOLDER / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    table = make_table(rows)
    lines = [f"# {title}", "", text, "", "```", command, "```", "", f"{machine}, {date}", "", table, ""]
    (FOLDER / f"{name}.md").write_text("\n".join(lines))
    print(table)


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out as a Markdown table; a key that a row lacks stays empty."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    for row in rows:
        cells = (f"{row[key]:.3f}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in keys)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
