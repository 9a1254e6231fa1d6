"""A page for eyes: some records with their pictures, words and provenance in one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....reasonedit_core.files import write_whole
from ...inline_picture import escaped, inline
from ..records import Record
from .output import share_of

FILE_NAME = "sample.html"
SIDE = 320
"""Long side of a picture on the page."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 1rem; margin: 0 0 1.2rem }
h2 { font-size: 1rem; margin: 0 0 .6rem } figure { display: inline-block; margin: 0 1rem .6rem 0 }
figcaption { color: #666; font-size: .85rem } img { max-width: 320px; display: block }
th { text-align: left; vertical-align: top; padding-right: 1rem; font-weight: 600; white-space: nowrap }
pre { white-space: pre-wrap; font-size: .8rem; background: #f3f3f3; padding: .6rem }
"""


def write_sheet(path: Path, records: Sequence[Record], number: int, rejects: Sequence[dict[str, Any]] = ()) -> Path:
    """Write a page of `number` records, chosen by the hash of their ids, and of as many rejects."""
    chosen = sorted(records, key=lambda record: share_of("sheet", record.id))[:number]
    parts = [_article(record) for record in chosen]
    lines = [f"{each['item']}: {each['step']}: {each['reason']}. {each['note']}" for each in list(rejects)[:number]]
    if lines:
        parts.append("<h2>Rejected</h2><ul>" + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>")
    words = f"{len(chosen)} of {len(records)} records, {len(rejects)} rejected"
    page = f'<!doctype html><meta charset="utf-8"><title>{words}</title><style>{_STYLE}</style><h1>{words}</h1>'
    return write_whole(path, (page + "".join(parts) + "\n").encode("utf-8", "replace"))


def _article(record: Record) -> str:
    pictures = "".join(
        f'<figure><img src="{inline(record.picture(name), SIDE)}" alt=""><figcaption>{escaped(name)}</figcaption></figure>'
        for name in record.files
    )
    rows = "".join(f"<tr><th>{escaped(name)}</th><td>{escaped(words)}</td></tr>" for name, words in _rows(record))
    steps = json.dumps([each.model_dump(exclude_none=True) for each in record.provenance], ensure_ascii=False, indent=1)
    made = f"<details><summary>how it was made</summary><pre>{escaped(steps)}</pre></details>"
    title = f"{record.id} ({record.kind}, {record.split})"
    return f"<article><h2>{escaped(title)}</h2>{pictures}<table>{rows}</table>{made}</article>"


def _rows(record: Record) -> list[tuple[str, str]]:
    rows = []
    if record.instruction:
        rows.append((f"instruction ({record.instruction.clarity or 'unsorted'})", record.instruction.raw))
    if record.think:
        rows += [(f"step {number}", step) for number, step in enumerate(record.think.steps, 1)]
    if record.edit and record.edit.instruction_used:
        rows.append(("the editor was told", record.edit.instruction_used))
    if record.reflect:
        said = record.reflect
        rows += [("target", said.target_description), ("consistency", f"{said.scores.consistency:g}")]
        rows += [("reason", said.reason), ("verdict", said.verdict)]
        rows += [("second instruction", said.second_instruction)] if said.second_instruction else []
    if record.reason50k:
        said = record.reason50k
        told = (("before", said.source_caption), ("after", said.target_caption), ("objects", ", ".join(said.objects)))
        rows += [(name, words) for name, words in told if words]
        if said.scores:
            rows.append(("what was measured", ", ".join(f"{name} {value:g}" for name, value in said.scores.items())))
    return rows
