"""Two pictures: scores by group, and quality against time with the re-roll arm. They need matplotlib."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .aggregate import headline
from .marks import HEADLINE, SCALES
from .tables import published_curves

log = logging.getLogger(__name__)

ARMS = {"loop": ("-", "loop"), "reroll": ("--", "re-roll")}
"""Kind of a run -> line that joins its runs of several numbers of rounds."""


def draw_all(runs: Mapping[str, Mapping[str, Any]], folder: Path, references: bool) -> list[Path]:
    """groups.png, and time.png where seconds are known. Nothing, with a line in the log, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("matplotlib is not installed: no pictures of the table are drawn (pip install 'comfyui-reasonedit[train]')")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    bench = next(iter(runs.values()))["bench"]
    made = []
    for name, fill in (("groups.png", _bars), ("time.png", _curves)):
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        if fill(axis, runs, bench, references):
            axis.set_ylabel(f"{bench} {HEADLINE[bench]}")
            axis.grid(axis="y", alpha=0.3)
            axis.legend(fontsize="small")
            figure.savefig(folder / name, dpi=100, metadata={"Software": None})
            made.append(folder / name)
    return made


def _bars(axis: Any, runs: Mapping[str, Mapping[str, Any]], bench: str, references: bool) -> bool:
    main = HEADLINE[bench]
    groups = list(dict.fromkeys(group for scores in runs.values() for group in scores["groups"]))
    width = 0.8 / len(runs)
    for number, (name, scores) in enumerate(runs.items()):
        rows = [(at, scores["groups"].get(group, {}).get(main)) for at, group in enumerate(groups)]
        rows = [(at, row) for at, row in rows if row and row["mean"] is not None]
        where = [at + (number - (len(runs) - 1) / 2) * width for at, _ in rows]
        axis.bar(
            where, [row["mean"] for _, row in rows], width * 0.92, yerr=_errors([r for _, r in rows]), label=name, capsize=2
        )
    axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize="small")
    axis.set_ylim(SCALES[bench][main].low, SCALES[bench][main].high)
    return True


def _curves(axis: Any, runs: Mapping[str, Mapping[str, Any]], bench: str, references: bool) -> bool:
    points: dict[str, list[tuple[float, Mapping[str, Any], str]]] = {}
    for name, scores in runs.items():
        row = headline(bench, scores)
        if scores["run"].get("seconds") and row["mean"] is not None:
            points.setdefault(scores["run"].get("kind", ""), []).append((scores["run"]["seconds"]["mean"], row, name))
    if not points:
        return False
    for kind, own in points.items():
        own.sort(key=lambda each: each[0])
        line, label = ARMS.get(kind, ("", kind))
        x, rows = [seconds for seconds, *_ in own], [row for _, row, _ in own]
        axis.errorbar(x, [row["mean"] for row in rows], _errors(rows), fmt=f"o{line}", capsize=2, label=label)
        for seconds, row, name in own:
            axis.annotate(name, (seconds, row["mean"]), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    for curve in published_curves(bench) if references else ():
        style = ":" if curve["arm"] == "reflection" else "-."
        axis.plot(
            curve["seconds"], curve["values"], style, color="grey", label=f"{curve['arm']}, published [{curve['source']}]"
        )
    axis.set_xlabel("seconds per item (published curves: on hardware that their paper does not name)")
    return True


def _errors(rows: list[Mapping[str, Any]]) -> list[list[float]]:
    below = [max(0.0, row["mean"] - row["low"]) for row in rows]
    return [below, [max(0.0, row["high"] - row["mean"]) for row in rows]]
