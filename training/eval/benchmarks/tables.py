"""The table of several runs of one benchmark, in the papers' column order, with published rows beside it.

A published row is in italics and names its source; it was judged by another judge on another day. Ours name judge, protocol,
aggregation, language and n_scored/n, and what was chosen where there is a choice: what a missing picture counts as, whether
marks are clamped, whether official faults are repeated. What does not compare is told apart in a remark.
"""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from ....reasonedit_core.errors import ConfigError
from .aggregate import headline
from .marks import HEADLINE, SCALES
from .protocols import IDENTITY

FORMAT = "reasonedit.references/1"

COLUMNS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "gedit": (("SC", "G_SC"), ("PQ", "G_PQ"), ("O", "G_O")),
    "imgedit": (
        *(
            (name, name)
            for name in ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
        ),
        ("overall", "overall"),
    ),
    "kris": (
        ("factual", "FK"),
        ("conceptual", "CK"),
        ("procedural", "PK"),
        ("overall", "overall"),
        *(("consistency", "VC"), ("quality", "VQ"), ("instruction", "IF"), ("knowledge", "KP")),
    ),
    "rise": (
        *((f"{name}_reasoning", name) for name in ("temporal", "causal", "spatial", "logical")),
        *(("overall", "accuracy"), ("score", "score")),
    ),
    "reason50k": (
        *((name, name) for name in ("physical", "temporal", "causal", "story")),
        *(("overall", "MLLM"), ("ins_align", "Ins-Align"), ("ins_align_proxy", "Ins-Align proxy"), ("clip", "CLIP")),
    ),
}
"""Key of a value -> head of its column, as the papers order them."""


@dataclass(frozen=True, slots=True)
class Row:
    """values: by key of COLUMNS; facts: judge, protocol, n and so on, hardly any for a published row; source: its tag, None for
    ours; counts: n_scored/n of a value or a fact, by its key."""

    name: str
    values: Mapping[str, float]
    facts: Mapping[str, str]
    source: str | None = None
    counts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """remarks: sentences that belong under it; facts: names of those that are columns, in their order; title: what stands above
    it, the benchmark where it is left out; whole: a count is shown where nothing is missing as well."""

    bench: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    facts: tuple[str, ...] = ()
    title: str = ""
    whole: bool = False


FACTS = (
    "95 % interval",
    "n",
    "lang",
    "missing",
    "damaged",
    "clamp",
    "bounds",
    "zeros",
    "identity",
    "LPIPS",
    "aesthetics",
    "no-op",
    "outside L1",
    "rounds",
    "seconds",
    "judge",
    "protocol",
    "aggregate",
    "backbones",
)


PUBLISHED_LANG = "en"
"""Of GEdit's two; the papers print the English set."""


def make_table(runs: Mapping[str, Mapping[str, Any]], references: bool) -> Table:
    """runs: name -> scores.json. ConfigError for runs of two benchmarks."""
    benches = sorted({scores["bench"] for scores in runs.values()})
    if len(benches) != 1:
        raise ConfigError(f"expected runs of one benchmark, found {' and '.join(benches) or 'none'}. Report them one by one.")
    (bench,) = benches
    ours = [Row(name, values_of(scores), _facts(scores), None, counts_of(scores)) for name, scores in runs.items()]
    published = [_published(each) for each in published_rows(bench)] if references else []
    return Table(bench, (*ours, *published), tuple(_remarks(runs, published)))


def _published(told: Mapping[str, Any]) -> Row:
    """KRIS rows say which aggregation their overall follows, as far as one does."""
    rule = {"aggregate": "neither" if told["rule"] == "none" else told["rule"]} if "rule" in told else {}
    lang = {"lang": PUBLISHED_LANG} if told["bench"] == "gedit" else {}
    return Row(told["model"], told["values"], {**rule, **lang}, told["source"])


def values_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """The values of a scores.json by key of COLUMNS; those that are not scored are left out."""
    return {key: row["mean"] for key, row in _rows_of(scores).items() if row["mean"] is not None}


def counts_of(scores: Mapping[str, Any]) -> dict[str, str]:
    """n_scored/n of `values_of`."""
    return {key: f"{row['n_scored']}/{row['n']}" for key, row in _rows_of(scores).items() if row["mean"] is not None}


def _rows_of(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Key of COLUMNS -> row with mean, n and n_scored."""
    bench, main = scores["bench"], HEADLINE[scores["bench"]]
    found = dict(scores["overall"])
    if bench != "gedit" and main in found:
        found["overall"] = found.pop(main)
    blocks = scores["types"] if bench == "kris" else {} if bench == "gedit" else scores["groups"]
    for block, metrics in blocks.items():
        key = next((key for key, _ in COLUMNS[bench] if key == block.lower() or key == f"{block.lower()}_reasoning"), None)
        if key and main in metrics:
            found[key] = metrics[main]
    if scores.get("ins_align"):
        found["ins_align"] = scores["ins_align"]
    if scores.get("features") and "clip_t" in scores["features"]:
        found["clip"] = scores["features"]["clip_t"]
    return {key: found[key] for key, _ in COLUMNS[bench] if key in found}


def _facts(scores: Mapping[str, Any]) -> dict[str, str]:
    row, run, pixels = headline(scores["bench"], scores), scores["run"], scores["pixels"]
    digits = SCALES[scores["bench"]][HEADLINE[scores["bench"]]].decimals
    facts = {
        "n": f"{row['n_scored']}/{row['n']}",
        "lang": scores["lang"] if scores["bench"] == "gedit" else "",
        "missing": _missing(scores),
        "damaged": str(len(scores["damaged"])) if scores["damaged"] else "",
        "clamp": {None: "", True: f"{scores['n_clamped']} lowered", False: "off"}[scores["clamp"]],
        "judge": scores["judge"],
        "protocol": scores["protocol"]
        + (f" ({scores['prompts'][:8]})" if scores["prompts"] else "")
        + (", pictures resized to their sources" if scores.get("resized") else ""),
        "aggregate": scores["aggregate"] + (" with official faults" if scores["quirks"] else ""),
        "zeros": "" if row["zeros"] is None else f"{100 * row['zeros']:.1f} %",
        "no-op": f"{100 * pixels['no_op_rate']:.1f} %" if pixels else "",
    }
    facts |= {name: f"{run[name]['mean']:.2f}" for name in ("rounds", "seconds") if run.get(name)}
    if scores.get("features"):
        facts["backbones"] = ", ".join(
            f"{each['name']} ({each['sha256'][:8]})" for each in scores["features"]["backbones"].values()
        )
        for name, head in (("lpips_source", "LPIPS"), ("aesthetics", "aesthetics")):
            if name in scores["features"]:
                facts[head] = f"{scores['features'][name]['mean']:.3f}"
    if (kept := scores["overall"].get(IDENTITY)) and kept["mean"] is not None:
        facts["identity"] = f"{kept['mean']:.2f}"
    if pixels and pixels.get("outside"):
        facts["outside L1"] = f"{pixels['outside']['l1']['mean']:.4f}"
    if row["mean"] is not None:
        facts["95 % interval"] = f"[{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    if row["n_scored"] < row["n"]:
        facts["bounds"] = f"{row['at_least']:.{digits}f} .. {row['at_most']:.{digits}f}"
    return facts


def _missing(scores: Mapping[str, Any]) -> str:
    """What became of items without a picture; with `zero` they are in n_scored, so that n alone would hide them."""
    if not scores["absent"]:
        return ""
    return f"{scores['absent']} {'counted as the worst' if scores['missing'] == 'zero' else 'left out'}"


_ALIKE = {
    "judge": "judge",
    "protocol": "protocol",
    "questions": "questions",
    "aggregate": "aggregate",
    "manifest": "manifest",
    "lang": "language (lang)",
    "clamp": "clamping (--no-clamp)",
    "missing": "handling of missing pictures (--missing)",
    "quirks": "repeated faults (--quirks)",
}
"""Keys of scores.json that are the same in runs that compare -> what they are called."""


def _remarks(runs: Mapping[str, Mapping[str, Any]], published: Sequence[Row]) -> list[str]:
    remarks = []
    for key, words in _ALIKE.items():
        if key == "missing" and not any(scores["absent"] for scores in runs.values()):
            continue
        found = sorted({str(scores[key]) for scores in runs.values()})
        if len(found) > 1:
            told = ", ".join(each[:40] for each in found)
            remarks.append(f"These runs differ in their {words} ({told}): they do not compare.")
    if any(scores["protocol"].endswith("-re") for scores in runs.values()):
        remarks.append("The judge was asked in this project's own words; these are not the benchmark's official scores.")
    if any(scores["clamp"] is False for scores in runs.values()):
        remarks.append("clamp off: marks may exceed the first one, which the benchmark's rubric does not allow.")
    if any(scores["quirks"] for scores in runs.values()):
        remarks.append("With official faults: faults of the official script are repeated; to be held against its numbers only.")
    if published:
        if any(scores["bench"] == "gedit" and scores["lang"] != PUBLISHED_LANG for scores in runs.values()):
            remarks.append("Published rows of GEdit are of its English set; rows of another language do not compare with them.")
        tags = sorted({str(row.source) for row in published})
        told = _references()["sources"]
        remarks.append(
            "Rows in italics are published and not reproduced here. " + " ".join(f"[{tag}] {told[tag]}." for tag in tags)
        )
    return remarks


# ---- references ------------------------------------------------------------------------------------------------------------


@cache
def _references() -> dict[str, Any]:
    told = tomllib.loads((files(__package__) / "references.toml").read_text(encoding="utf-8"))
    if told.get("format") != FORMAT:
        raise ConfigError(f"references.toml: expected format {FORMAT}, found {told.get('format')!r}. Install the package anew.")
    return told


def published_rows(bench: str) -> list[dict[str, Any]]:
    """Rows of papers: model, source, values, and for KRIS `rule`, the aggregation that its overall follows."""
    return [row for row in _references()["row"] if row["bench"] == bench]


def published_curves(bench: str) -> list[dict[str, Any]]:
    """Curves of papers: arm, source, seconds, values."""
    return [each for each in _references()["curve"] if each["bench"] == bench]


# ---- forms -----------------------------------------------------------------------------------------------------------------


def cells_of(table: Table, counted: bool = True) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """(heads, row -> cells). counted: n_scored/n stands in the cell, where something is missing or the table shows all."""
    there = {key for row in table.rows for key in row.values}
    columns = [(key, head) for key, head in COLUMNS[table.bench] if key in there]
    facts = [name for name in table.facts or FACTS if any(row.facts.get(name) for row in table.rows)]
    digits = SCALES[table.bench][HEADLINE[table.bench]].decimals

    def cell(row: Row, key: str, text: str) -> str:
        count = row.counts.get(key) if counted and text else None
        one, _, all_ = (count or "").partition("/")
        return f"{text} ({count})" if count and (table.whole or one != all_) else text

    body = [
        (
            row,
            [cell(row, key, f"{row.values[key]:.{digits}f}" if key in row.values else "") for key, _ in columns]
            + [cell(row, name, row.facts.get(name, "")) for name in facts],
        )
        for row in table.rows
    ]
    return [head for _, head in columns] + facts, body


def markdown(table: Table) -> str:
    """The table and its remarks."""
    head, body = cells_of(table)
    lines = [f"### {table.title or table.bench}", "", f"| system | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    for row, cells in body:
        name = row.name if row.source is None else f"*{row.name} [{row.source}]*"
        shown = cells if row.source is None else [cell and f"*{cell}*" for cell in cells]
        lines.append(f"| {' | '.join(_plain(cell) for cell in (name, *shown))} |")
    return "\n".join([*lines, "", *table.remarks]) + "\n"


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def as_csv(table: Table) -> str:
    """The table; `source` is empty for our own rows. Numbers stand alone, and behind all others one column for each that has
    counts: its head and `n_scored/n`."""
    head, body = cells_of(table, counted=False)
    keys = {name: key for key, name in COLUMNS[table.bench]}
    counted = [name for name in head if any(_count(row, keys, name) for row in table.rows)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "source", *head, *(f"{name} n_scored/n" for name in counted)])
    for row, cells in body:
        writer.writerow([row.name, row.source or "", *cells, *(_count(row, keys, name) for name in counted)])
    return out.getvalue()


def _count(row: Row, keys: Mapping[str, str], name: str) -> str:
    return row.counts.get(keys.get(name, name)) or row.counts.get(name, "")


def latex(table: Table) -> str:
    """A tabular for booktabs; remarks as comments."""
    head, body = cells_of(table)
    lines = [f"% {remark}" for remark in table.remarks]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(head)}}}", r"\toprule"]
    lines += [" & ".join(_tex(cell) for cell in ("system", *head)) + r" \\", r"\midrule"]
    for row, cells in body:
        own = [_tex(cell) for cell in (row.name if row.source is None else f"{row.name} [{row.source}]", *cells)]
        lines.append(" & ".join(own if row.source is None else [cell and rf"\textit{{{cell}}}" for cell in own]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {each: "\\" + each for each in "&%$#_{}"}


def _tex(cell: str) -> str:
    return "".join(_TEX.get(each, each) for each in cell)
