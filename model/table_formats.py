"""Tables of costs as text, Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from hico_model.tables import SOURCE, Cell, Table, as_printed, memory_as_printed


def render(found: Sequence[Table], form: str) -> str:
    """The tables as "text", "md", "csv" or "json", without a final new line."""
    if form in ("text", "md"):
        return "\n\n".join(_page(table, markdown=form == "md") for table in found)
    if form == "csv":
        return _csv(found)
    return json.dumps([_record(t) for t in found], indent=2, ensure_ascii=False)


def _heading(table: Table) -> str:
    convention = f"; convention: {table.convention}" if table.convention else ""
    return f"Table {table.number}. {table.title} ({SOURCE}{convention})"


def _page(table: Table, *, markdown: bool) -> str:
    first = table.rows[0][1]
    columns = [[c[i] for _, c in table.rows] for i in range(len(first))]
    shown = [  # of each quantity, what any row has
        [
            name
            for name in ("paper", "recomputed", "counted", "measured")
            if any(getattr(c, name) is not None for c in own)
        ]
        for own in columns
    ]
    head = [*table.labels]
    for cell, names in zip(first, shown, strict=True):
        head += [f"{cell.quantity} ({cell.unit}): {names[0]}", *names[1:]]
    body = []
    for labels, cells in table.rows:
        line = [str(label) for label in labels]
        for cell, names in zip(cells, shown, strict=True):
            line += [_figure(cell, name) for name in names]
        body.append(line)
    left = [isinstance(x, str) for x in table.rows[0][0]] + [False] * (
        len(head) - len(table.labels)
    )
    lines = _columns([head, *body], left, " | " if markdown else "  ")
    if not markdown:
        notes = [fill(n, 100, initial_indent="- ", subsequent_indent="  ") for n in table.notes]
        return "\n".join([_heading(table), "", *lines, "", *notes])
    rule = "|".join(" :--- " if x else " ---: " for x in left)
    lines = [f"| {line} |" for line in lines]
    lines.insert(1, f"|{rule}|")
    return "\n".join([f"**{_heading(table)}**", "", *lines, "", *(f"- {n}" for n in table.notes)])


def _figure(cell: Cell, name: str) -> str:
    value = getattr(cell, name)
    if value is None or isinstance(value, str):  # as printed, or why there is none
        return value or ""
    if name == "measured":
        return f"{value:.1f}" if value >= 10 else f"{value:.2g}"
    if name == "recomputed" and cell.unit == "GB" and memory_as_printed(value) == "oom":
        return f"oom ({value:.0f})"
    return as_printed(value) + ("*" if name == "recomputed" and cell.agrees is False else "")


def _columns(rows: Sequence[Sequence[str]], left: Sequence[bool], between: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        between.join(
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(row, widths, left, strict=True)
        ).rstrip(" " if between == "  " else "")
        for row in rows
    ]


def _csv(found: Sequence[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "convention", "row", *Cell._fields])
    for table in found:
        for labels, cells in table.rows:
            row = "; ".join(f"{k} {v}" for k, v in zip(table.labels, labels, strict=True))
            writer.writerows([table.number, table.convention, row, *cell] for cell in cells)
    return out.getvalue().removesuffix("\n")


def _record(table: Table) -> dict[str, Any]:
    return {
        "table": table.number,
        "title": table.title,
        "source": SOURCE,
        "convention": table.convention,
        "rows": [
            dict(zip(table.labels, labels, strict=True)) | {"cells": [c._asdict() for c in cells]}
            for labels, cells in table.rows
        ],
        "notes": table.notes,
    }
