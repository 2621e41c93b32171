"""build/report.html: all tables and pictures on one page that needs nothing else."""

import base64
import re
from html import escape
from pathlib import Path

from bench import report, results
from hico_model.table_formats import render
from hico_model.tables import tables

STYLE = """
:root { color-scheme: light dark; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 870px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 12px; display: block; overflow-x: auto; }
th, td { padding: 2px 8px; border-bottom: 1px solid var(--line); text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""


def write(file: Path, pictures: Path, kept: Path = results.FOLDER) -> Path:
    """Write the page, with the pictures of a folder inside."""
    parts = ["<h1>hico_kernels: measured</h1>", html(report.readme_part(kept))]
    parts.append("<h2>The papers' tables</h2>")
    parts.append(html(render(tables(results=kept), "md")))
    body = "\n".join(parts)
    body = re.sub(r'"docs/([\w.-]+\.svg)"', lambda m: f'"{_inlined(pictures / m[1])}"', body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>hico_kernels: measured</title><style>{STYLE}</style>"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body>\n')
    return file


def _inlined(picture: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def html(markdown: str) -> str:
    """The little Markdown that our reports have: paragraphs, tables, lists, bold and code."""
    blocks = []
    for block in markdown.split("\n\n"):
        lines = block.split("\n")
        if block.startswith("<"):
            blocks.append(block)
        elif block.startswith("|"):
            head, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines)
            cells = "".join(f"<th>{inline(c)}</th>" for c in head)
            body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            blocks.append(f"<table><tr>{cells}</tr>{body}</table>")
        elif block.startswith("- "):
            items = "".join(f"<li>{inline(line[2:])}</li>" for line in lines)
            blocks.append(f"<ul>{items}</ul>")
        else:
            blocks.append(f"<p>{inline(block)}</p>")
    return "\n".join(blocks)


def _cell(text: str) -> str:
    kind = ' class="number"' if re.match(r"[\d.]+\*?$", text) else ""
    return f"<td{kind}>{inline(text)}</td>"


def inline(text: str) -> str:
    """Bold and code of a line, all else as text."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
