"""One HTML file with everything in it: the tables, and items side by side with their marks and the judge's reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....reasonedit_core.files import write_whole
from ...inline_picture import escaped, inline
from .items import Item, Manifest
from .outputs import OUTPUTS, damage, find_output
from .tables import Table, cells_of

SIDE = 288
"""Long side of a picture on the page."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 1rem; margin: 0 0 1.2rem }
h2 { font-size: 1rem; margin: 0 0 .6rem } figure { display: inline-block; vertical-align: top; margin: 0 1rem .6rem 0; width:
288px } figcaption { color: #555; font-size: .85rem } img { max-width: 288px; display: block }
table { border-collapse: collapse; margin: 0 0 1.2rem; font-size: .9rem } td, th { padding: .15rem .7rem .15rem 0; text-align:
right } td:first-child, th:first-child { text-align: left } tr.published { font-style: italic; color: #666 } p.none { color:
#a33 }
"""


@dataclass(frozen=True, slots=True)
class Shown:
    """A run on the page. rows: of its judgements; scores: its scores.json."""

    folder: Path
    scores: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def write_page(
    path: Path, tables: Sequence[Table], manifest: Manifest, runs: Mapping[str, Shown], items: Sequence[Item]
) -> Path:
    """Write the page: the tables, then the items. Its pictures are small JPEGs inside it."""
    title = f"{tables[0].bench}: {', '.join(runs)}"
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>{escaped(title)}</title><style>{_STYLE}</style><h1>{escaped(title)}</h1>'
    ]
    for table in tables:
        parts += [f"<h2>{escaped(table.title)}</h2>"] if table.title else []
        parts += [_table(table), *(f"<p>{escaped(remark)}</p>" for remark in table.remarks)]
    parts += [_article(manifest, item, runs) for item in items]
    return write_whole(path, ("\n".join(parts) + "\n").encode("utf-8", "replace"))


def _table(table: Table) -> str:
    head, body = cells_of(table)
    rows = ["<tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in ("system", *head)) + "</tr>"]
    for row, cells in body:
        name = row.name if row.source is None else f"{row.name} [{row.source}]"
        kind = "" if row.source is None else ' class="published"'
        rows.append(f"<tr{kind}>" + "".join(f"<td>{escaped(cell)}</td>" for cell in (name, *cells)) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _article(manifest: Manifest, item: Item, runs: Mapping[str, Shown]) -> str:
    figures = [_figure(path, "source") for path in manifest.sources(item)]
    if (target := manifest.picture(item, "gt_img")) is not None:
        figures.append(_figure(target, "target of the benchmark"))
    for name, run in runs.items():
        edited = find_output(run.folder / OUTPUTS, item)
        if edited is None:
            figures.append(f'<figure><p class="none">no picture</p><figcaption>{escaped(name)}</figcaption></figure>')
        else:
            figures.append(_figure(edited, name, *_words(item, run)))
    return f"<article><h2>{escaped(item.id)}: {escaped(item.instruction)}</h2>{''.join(figures)}</article>"


def _words(item: Item, run: Shown) -> list[str]:
    own = next((each for each in run.scores["items"] if each["item"] == item.id), None)
    lines = []
    if own:
        told = [
            f"{name} {'/'.join('none' if v is None else f'{v:.4g}' for v in values)}" for name, values in own["metrics"].items()
        ]
        lines.append(", ".join(told))
    for row in run.rows:
        if row["item"] == item.id and row.get("anchor") is None and row["role"]:
            lines.append(f"{row['role']}: {row.get('reason') or row.get('note') or row['status']}")
    return lines


def _figure(path: Path, *words: str) -> str:
    lines = "<br>".join(escaped(each) for each in words)
    if damage(path) is not None:
        return f'<figure><p class="none">damaged picture</p><figcaption>{lines}</figcaption></figure>'
    return f'<figure><img src="{inline(path, SIDE, "JPEG")}" alt=""><figcaption>{lines}</figcaption></figure>'
