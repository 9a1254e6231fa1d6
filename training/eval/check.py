"""Whether a measured table still shows what a model card says: for CI, where few items have to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...reasonedit_core.errors import ConfigError

ORDERED = (("think", "base"), ("think+reflect", "think"))
"""Pairs of which the second must not be surely above the first."""


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
