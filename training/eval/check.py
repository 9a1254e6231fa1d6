"""Whether a measured table still shows what a model card says: for CI, where few items have to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...reasonedit_core.errors import ConfigError
from ..mini.brain_rows import COMPONENTS, FULL, PLAIN_ROW
from .drawing import ALL

ORDERED = (("think", "base"), ("think+reflect", "think"))
"""Pairs of which the second must not be surely above the first."""

LEAST_ITEMS = 200
"""Items that the components table of a shipped mini-brain is of."""


def read_table(path: Path) -> dict[str, Any]:
    """A TABLE.json. Raises ConfigError for another file."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a table that `reasonedit-eval miniature` wrote, found: {error}.") from error
    if not isinstance(table, dict) or not {"table", "system", "rows", "paired"} <= table.keys():
        raise ConfigError(f"{path}: expected a table with table, system, rows and paired, found other JSON. Name a TABLE.json.")
    return table


def faults_of(measured: Mapping[str, Any], card: Mapping[str, Any], *, group: str = "abstract", most: float = 1.0) -> list[str]:
    """One sentence for each pair of ORDERED whose 95 % interval lies wholly below zero, and for each mean that lies more than
    `most` below the card's. Raises ConfigError for tables that do not compare."""
    for name in ("table", "system"):
        if measured[name] != card[name]:
            raise ConfigError(f"expected two tables of one {name}, found {measured[name]!r} and {card[name]!r}. Name others.")
    faults = []
    pairs = {(pair["a"], pair["b"]): pair for pair in measured["paired"] if pair["group"] == group}
    for a, b in ORDERED:
        pair = pairs.get((a, b))
        if pair is None:
            raise ConfigError(f"expected a pair {a} - {b} of the group {group}, found none. Measure table loop on that group.")
        if pair["high"] < 0:
            faults.append(
                f"{a} - {b} ({group}): expected an interval that reaches zero, found {pair['difference']:+.2f} "
                f"[{pair['low']:+.2f}, {pair['high']:+.2f}]"
            )
    shown = {row["system"]: row["overall"] for row in card["rows"] if row["group"] == group}
    for row in measured["rows"]:
        if row["group"] == group and row["system"] in shown and row["overall"] < shown[row["system"]] - most:
            faults.append(
                f"{row['system']} ({group}): expected at least {shown[row['system']] - most:.2f}, {most:g} below the card's "
                f"{shown[row['system']]:.2f}, found {row['overall']:.2f}"
            )
    return faults


def faults_of_components(table: Mapping[str, Any]) -> list[str]:
    """Why a components table of mini-brain (the paper's Table 4 in small) may not be shipped, one sentence for each reason.

    At least LEAST_ITEMS items, exactly the rows of `brain_rows.COMPONENTS`, the full model surely above the plain one, and no
    row surely above the full one.
    """
    if table["table"] != "components":
        raise ConfigError(f"expected a table components, found {table['table']!r}. Name another.")
    faults = []
    if table["n"] < LEAST_ITEMS:
        faults.append(f"expected at least {LEAST_ITEMS} items, found {table['n']}")
    rows = sorted({row["system"] for row in table["rows"]})
    if rows != sorted(COMPONENTS):
        faults.append(f"expected the systems {', '.join(sorted(COMPONENTS))}, found {', '.join(rows)}")
    pairs = {pair["b"]: pair for pair in table["paired"] if pair["a"] == FULL and pair["group"] == ALL}
    for row in (name for name in COMPONENTS if name != FULL):
        if row not in pairs:
            faults.append(f"expected a pair {FULL} - {row} of the group {ALL}, found none")
            continue
        pair = pairs[row]
        if pair["high"] < 0 or (row == PLAIN_ROW and pair["low"] <= 0):
            wanted = "above zero" if row == PLAIN_ROW else "that reaches zero"
            span = f"{pair['difference']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}]"
            faults.append(f"{FULL} - {row}: expected an interval {wanted}, found {span}")
    return faults
