"""A judge's marks in the files that the benchmarks' own scripts read, so that their statistics can be held against ours.

    gedit    <backbone>/eval_results_new/<model>_<group>_gpt_score.csv and <model>_combined_gpt_score.csv
    imgedit  result.json beside the pictures: key -> reason and one `Name: mark` line for each mark
    kris     <category>/metrics.json: id -> <metric>_score and <metric>_reasoning
    rise     <model>.pkl, from which gpt_eval.py goes on without asking, and <model>_judge.csv, as it writes it

<model> is the name of the folder that is exported to. What is written are the judge's marks: no clamp, no guess, no worst score
for a missing picture. Marks that are missing are left out, or null where the file has a place for them.
"""

from __future__ import annotations

import csv
import io
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....reasonedit_core.files import write_json, write_whole
from .items import Item
from .marks import Options, score_item
from .outputs import official_name
from .protocols import calls_of, is_logical

GEDIT_COLUMNS = (
    *("source_image", "edited_image", "instruction", "sementics_score", "quality_score", "intersection_exist"),
    "instruction_language",
)
"""As its script spells them."""

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""item -> role -> row of judgements.jsonl."""


def write_judged(items: Sequence[Item], rows: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """The files for the items' benchmark; none for Reason50K, which has no script that is public."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("anchor") is None and row["role"] is not None:
            found.setdefault(row["item"], {})[row["role"]] = row
    write = _WRITERS.get(items[0].bench)
    return write(items, found, out) if write else []


def _marks(found: Rows, item: Item) -> dict[str, Mapping[str, int] | None]:
    own = found.get(item.id, {})
    return {role: own[role]["marks"] if role in own else None for role in calls_of(item)}


def _reason(found: Rows, item: Item, role: str) -> str:
    return str(found.get(item.id, {}).get(role, {}).get("reason") or "")


# ---- GEdit -----------------------------------------------------------------------------------------------------------------


def _gedit(items: Sequence[Item], found: Rows, out: Path) -> list[Path]:
    judges = {row["judge"] for roles in found.values() for row in roles.values()}
    # Its scripts know these two folders and no other; scores.json names the judge.
    backbone = "qwen25vl" if any("qwen" in judge.casefold() for judge in judges) else "gpt4o"
    told: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        marks = _marks(found, item)
        if None not in marks.values():
            path = out / official_name(item)
            sc, pq = (min(marks[role].values()) for role in ("SC", "PQ"))
            names = (path.with_name(f"{path.name}_SRCIMG.png"), path.with_name(f"{path.name}.png"))
            values = (*map(str, names), item.instruction, sc, pq, item.flags.get("intersection", False), item.lang)
            told.setdefault(item.group, []).append(dict(zip(GEDIT_COLUMNS, values, strict=True)))
    folder = out / backbone / "eval_results_new"
    parts = {**told, "combined": [row for rows in told.values() for row in rows]}
    return [_csv(folder / f"{out.name}_{name}_gpt_score.csv", GEDIT_COLUMNS, rows) for name, rows in parts.items()]


def _csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, out.getvalue().encode())


# ---- ImgEdit, KRIS ---------------------------------------------------------------------------------------------------------


def _imgedit(items: Sequence[Item], found: Rows, out: Path) -> list[Path]:
    told = {}
    for item in items:
        (role,) = calls_of(item)
        if (marks := _marks(found, item)[role]) is not None:
            # Its script takes every line with one ": " and digits behind it for a mark.
            reason = " ".join(_reason(found, item, role).split()).replace(": ", " - ")
            lines = [f"{name.replace('_', ' ').title()}: {mark}" for name, mark in marks.items()]
            told[item.id] = "\n".join([reason, *lines])
    return [write_json(out / "result.json", told)]


def _kris(items: Sequence[Item], found: Rows, out: Path) -> list[Path]:
    told: dict[str, dict[str, Any]] = {}
    for item in items:
        entry: dict[str, Any] = {"instruction": item.instruction, "explain": item.refs.get("explain", "")}
        for role, call in calls_of(item).items():
            marks = _marks(found, item)[role] or {}
            for name in (role, "knowledge") if call == "dual" else (role,):
                entry |= {f"{name}_score": marks.get(name), f"{name}_reasoning": _reason(found, item, role)}
        told.setdefault(item.group, {})[item.id.rpartition("/")[2]] = entry
    return [write_json(out / group / "metrics.json", entries) for group, entries in told.items()]


# ---- RISE ------------------------------------------------------------------------------------------------------------------

_JUDGES = {"consistency": "judge1", "reasoning": "judge2", "plausibility": "judge3"}
_DIMENSIONS = {"reasoning": "Reasoning", "consistency": "ApprConsistency", "plausibility": "VisualPlausibility_total"}
_OWN = {"reasoning": "Reasoning", "consistency": "Consistency", "plausibility": "Quality"}
_KINDS = {"temporal": "Temp", "causal": "Causal", "spatial": "Spa", "logical": "Logic"}


def _rise(items: Sequence[Item], found: Rows, out: Path) -> list[Path]:
    told = {}
    for item in items:
        marks = _marks(found, item)
        if None not in marks.values():
            texts: dict[str, str | None] = dict.fromkeys(("judge1", "judge2", *(() if is_logical(item) else ("judge3",))))
            for role, mark in marks.items():
                # Its script takes the first number behind these words, however they are written.
                reason = re.sub(r"final\s+score", "score", _reason(found, item, role), flags=re.IGNORECASE)
                texts[_JUDGES[role]] = f"{reason}\nFinal Score: {next(iter(mark.values()))}"
            told[item.id] = texts
    pickled = write_whole(out / f"{out.name}.pkl", pickle.dumps(told))
    return [pickled, _csv(out / f"{out.name}_judge.csv", _COLUMNS, _table(items, found))]


def _table(items: Sequence[Item], found: Rows) -> list[dict[str, Any]]:
    """As gpt_eval.py has it: overall, per category, per dimension of both, per subtask where the set names them."""
    scored = [(item, score_item(item, _marks(found, item), Options()).metrics) for item in items]
    rows = []

    def add(name: str, own: Sequence[tuple[Item, Mapping[str, Any]]], metric: str = "score") -> None:
        values, right = (_there(metrics[each] for _, metrics in own if each in metrics) for each in (metric, "accuracy"))
        mean = sum(values) / len(values) if values else None
        whole = sum(right) / len(right) / 100 if right and metric == "score" else None
        cells = (name, None if mean is None else mean / 25 + 1, mean, whole)
        rows.append({key: "" if cell is None else cell for key, cell in zip(_COLUMNS, cells, strict=True)})

    by_kind = {kind: [each for each in scored if each[0].group.startswith(kind)] for kind in _KINDS}
    add("Overall", scored)
    for kind, own in by_kind.items():
        add(kind.title(), own)
    for metric, words in _DIMENSIONS.items():
        add(f"Overall_{words}", scored, metric)
    for kind, own in by_kind.items():
        for metric, words in _OWN.items():
            if (kind, metric) != ("logical", "plausibility"):
                add(f"{kind.title()}_{words}", own, metric)
    for kind, short in _KINDS.items():
        for subtask in dict.fromkeys(item.refs["subtask"] for item, _ in by_kind[kind] if "subtask" in item.refs):
            add(f"{short}-{subtask}", [each for each in by_kind[kind] if each[0].refs.get("subtask") == subtask])
    return rows


def _there(values: Iterable[Sequence[float | None]]) -> list[float]:
    return [value for (value,) in values if value is not None]


_COLUMNS = ("-", "Score-Origin", "Score-Percentage", "Accuracy")

_WRITERS: Mapping[str, Callable[[Sequence[Item], Rows, Path], list[Path]]] = {
    "gedit": _gedit,
    "imgedit": _imgedit,
    "kris": _kris,
    "rise": _rise,
}
