"""A measured table as JSON, as Markdown and as a picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...reasonedit_core.files import write_json, write_whole
from .tables import Table

log = logging.getLogger(__name__)

Measured = dict[str, Any]
"""table, system, n, seed, rows, paired: see `measure.measure`."""


def write_report(measured: Measured, table: Table, claims: Sequence[str], folder: Path, made: str) -> list[Path]:
    """Write TABLE.json, TABLE.md and TABLE.png; returns what was written. made: one line on how, for the Markdown.

    The picture is left out, with a line in the log, where matplotlib is not installed.
    """
    name = measured["table"]
    files = [write_json(folder / f"{name}.json", measured)]
    text = markdown(measured, table, claims, made)
    files.append(write_whole(folder / f"{name}.md", text.encode()))
    picture = draw(measured, folder / f"{name}.png")
    return [*files, picture] if picture else files


# ---- words ---------------------------------------------------------------------------------------------------------------


def markdown(measured: Measured, table: Table, claims: Sequence[str], made: str = "") -> str:
    """The table as Markdown: scores by group, rates, differences, what was claimed and what was found."""
    systems = list(dict.fromkeys(row["system"] for row in measured["rows"]))
    groups = list(dict.fromkeys(row["group"] for row in measured["rows"]))
    found = {(row["system"], row["group"]): row for row in measured["rows"]}
    counts = {group: next(row["n"] for row in measured["rows"] if row["group"] == group) for group in groups}
    head = f"### {measured['system']}: {table.name}\n\n{table.what} {measured['n']} held-out items, seed {measured['seed']}."
    what = "Scores 0..10 by the exact judge, means with 95 % bootstrap intervals; seconds: work per item, its share of batches."
    blocks = [f"{head} {what}{' ' + made if made else ''}"]
    rows = [[system, *(_score(found.get((system, group))) for group in groups)] for system in systems]
    blocks.append(_grid(["overall", *(f"{group} ({counts[group]})" for group in groups)], rows))
    blocks.append(_grid(*_details(measured)))
    if measured["paired"]:
        rows = [[f"{p['a']} - {p['b']}", p["group"], _signed(p)] for p in measured["paired"]]
        blocks.append(_grid(["difference", "group", "overall, paired"], rows))
    if claims:
        blocks.append("\n".join(["What the paper claims, and what was measured:", *(f"- {claim}" for claim in claims)]))
    return "\n\n".join([*blocks, *table.notes]) + "\n"


_ALWAYS = ("system", "group", "n", "overall", "low", "high")
_SHARES = {"success_rate", "preservation_rate", "caught", "rejected", "verdicts", "instructions"}


def _details(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """The figures of every row beside its overall score."""
    columns = list(dict.fromkeys(name for row in measured["rows"] for name in row if name not in _ALWAYS))

    def say(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return f"{100 * row[name]:.1f} %" if name in _SHARES else f"{row[name]:.2f}"

    rows = [[row["system"], row["group"], *(say(row, name) for name in columns)] for row in measured["rows"]]
    return ["system", "group", *(name.replace("_", " ") for name in columns)], rows


def _score(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['overall']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _signed(pair: dict[str, Any]) -> str:
    return f"{pair['difference']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}]"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- the picture ---------------------------------------------------------------------------------------------------------


def draw(measured: Measured, path: Path) -> Path | None:
    """Scores with their intervals: bars by group, or for table `rounds` over the seconds that they take."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("matplotlib is not installed: no picture of the table is drawn (pip install 'comfyui-reasonedit[train]')")
        return None
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    (_curves if measured["table"] == "rounds" else _bars)(axis, measured["rows"])
    axis.set_title(f"{measured['system']}: {measured['table']} ({measured['n']} held-out items, seed {measured['seed']})")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path


def _bars(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    systems, groups = (list(dict.fromkeys(row[name] for row in rows)) for name in ("system", "group"))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        own = [row for row in rows if row["system"] == system]
        at = [groups.index(row["group"]) + (number - (len(systems) - 1) / 2) * width for row in own]
        axis.bar(at, [row["overall"] for row in own], width * 0.92, yerr=_errors(own), label=system, capsize=2)
    axis.set_xticks(range(len(groups)), groups, rotation=20 if len(groups) > 7 else 0)
    axis.set_ylabel("overall")
    axis.set_ylim(0, 10)
    axis.legend(fontsize="small", ncols=min(len(systems), 6), loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _curves(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for kind, style in (("rounds", "-"), ("reroll", "--")):
        for colour, group in (("tab:blue", "all"), ("tab:orange", "abstract")):
            own = [row for row in rows if row["group"] == group and row["system"].startswith(kind)]
            if own:
                x, y = [row["seconds"] for row in own], [row["overall"] for row in own]
                axis.errorbar(x, y, _errors(own), fmt=f"o{style}", color=colour, capsize=2, label=f"{kind}, {group}")
    axis.set_xlabel("seconds per item")
    axis.set_ylabel("overall")
    axis.legend(fontsize="small")


def _errors(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    below = [max(0.0, row["overall"] - row["low"]) for row in rows]
    return [below, [max(0.0, row["high"] - row["overall"]) for row in rows]]
