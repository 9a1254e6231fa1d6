"""From records to a table: means, shares, intervals and paired differences. Nothing is run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arms import Outcome, Record
from .drawing import ABSTRACT, ALL, GROUPS, Task
from .reflecting import RIGHT, is_wrong, rates
from .report import Measured
from .statistics import interval, paired
from .tables import REFLECTIONS, Pair, Table

PLANTED = "planted"

Records = Mapping[tuple[str, str], Record]
"""By run and key of the item."""


def measure(table: Table, records: Records, tasks: Sequence[Task], system: str, seed: int) -> Measured:
    """The table over `tasks`, of each of which every run has a record."""
    if table.name == "reflector":
        rows, pairs = _reflector(table, records, tasks, seed)
    else:
        rows, pairs = _systems(table, records, tasks, seed)
    return {"table": table.name, "system": system, "n": len(tasks), "seed": seed, "rows": rows, "paired": pairs}


def _systems(table: Table, records: Records, tasks: Sequence[Task], seed: int) -> tuple[list[dict], list[dict]]:
    outcomes = {name: {task.key: row.view(records[row.run, task.key]) for task in tasks} for name, row in table.rows.items()}
    groups = {group: [task.key for task in tasks if group in task.groups] for group in GROUPS}
    rows = [
        figures(name, group, [found[key] for key in keys], seed)
        for name, found in outcomes.items()
        for group, keys in groups.items()
        if keys
    ]
    pairs = [*table.pairs, *(at_equal_time(rows) if table.name == "rounds" else ())]

    def compare(pair: Pair) -> dict[str, Any]:
        values = [[outcomes[name][key].marks["overall"] for key in groups[pair.group]] for name in (pair.a, pair.b)]
        return _difference(pair, *values, seed)

    named = {(pair.a, pair.b, pair.group): pair for pair in pairs}
    return rows, [compare(pair) for pair in named.values() if groups[pair.group]]


def figures(system: str, group: str, outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """One row: scores are means on 0..10, low and high the interval of `overall`, seconds the work per item."""
    marks = [outcome.marks for outcome in outcomes]
    means = {name: _mean(mark[name] for mark in marks) for name in ("overall", "success", "preservation", "quality")}
    low, high = interval([mark["overall"] for mark in marks], seed, group)
    return {
        "system": system,
        "group": group,
        "n": len(outcomes),
        **means,
        "low": round(low, 4),
        "high": round(high, 4),
        "seconds": _mean(outcome.seconds for outcome in outcomes),
        "success_rate": _mean(mark["done"] for mark in marks),
        "preservation_rate": _mean(mark["exact"] for mark in marks),
    }


def _difference(pair: Pair, a: Sequence[float], b: Sequence[float], seed: int) -> dict[str, Any]:
    difference, low, high = (round(value, 4) for value in paired(a, b, seed, pair.group))
    return {"a": pair.a, "b": pair.b, "group": pair.group, "difference": difference, "low": low, "high": high}


def at_equal_time(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Every `rounds` row beside the first `reroll` row that took at least as long, or beside the last one."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    seconds = {row["system"]: row["seconds"] for row in rows if row["group"] == groups[0]}
    rolls = [name for name in seconds if name.startswith("reroll")]
    pairs = []
    for number in range(1, REFLECTIONS + 1):
        name = f"rounds-{number}"
        as_long = [roll for roll in rolls if seconds[roll] >= seconds[name]]
        pairs += [Pair(name, (as_long or rolls[-1:])[0], group) for group in groups if group in (groups[0], ABSTRACT)]
    return pairs


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 4)


# ---- the reflector -------------------------------------------------------------------------------------------------------


def _reflector(table: Table, records: Records, tasks: Sequence[Task], seed: int) -> tuple[list[dict], list[dict]]:
    found = [records[run, task.key] for run in table.runs for task in tasks]
    groups: dict[str, list[Record]] = {ALL: found, RIGHT: [], PLANTED: []}
    for record in found:
        # What counts is what the pixels show: a fault that the VAE has mended is none, and one that it has made is one.
        groups[PLANTED if is_wrong(record) else RIGHT].append(record)
        if record["fault"] != RIGHT:
            groups.setdefault(record["fault"], []).append(record)
    order = [ALL, RIGHT, PLANTED, *sorted(set(groups) - {ALL, RIGHT, PLANTED})]
    rows, pairs = [], []
    for group in order:
        own = groups[group]
        if not own:
            continue
        seen = {name: [row.view(record) for record in own] for name, row in table.rows.items()}
        rows.append(figures("shown", group, seen["shown"], seed))
        rows.append({**figures("mended", group, seen["mended"], seed), **_rounded(rates(own))})
        values = ([outcome.marks["overall"] for outcome in seen[name]] for name in ("mended", "shown"))
        pairs.append(_difference(Pair("mended", "shown", group), *values, seed))
    return rows, pairs


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: round(share, 4) for name, share in shares.items()}


# ---- what is claimed -----------------------------------------------------------------------------------------------------


def weigh_claims(table: Table, measured: Measured) -> list[str]:
    """A sentence for every ordering that the paper claims: whether it was found."""
    found = {(pair["a"], pair["b"], pair["group"]): pair for pair in measured["paired"]}
    claims = [(pair, "") for pair in table.pairs if pair.claim]
    if table.name == "rounds":
        claims += [(pair, ", at equal time") for pair in at_equal_time(measured["rows"])]
    words = []
    for claim, how in claims:
        pair = found.get((claim.a, claim.b, claim.group))
        if pair is not None:
            interval_ = f"{pair['difference']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}]"
            words.append(f"{claim.a} above {claim.b} ({claim.group}{how}): {_verdict(pair)}, {interval_}.")
    return [*words, *(_recovered(measured) if table.name == "loop" else ())]


def _verdict(pair: Mapping[str, Any]) -> str:
    if pair["low"] > 0:
        return "found"
    if pair["high"] < 0:
        return "the opposite was found"
    return "not shown, the interval holds zero"


def _recovered(measured: Measured) -> list[str]:
    """How much of the gap that reasoning could close it does."""
    overall = {row["system"]: row["overall"] for row in measured["rows"] if row["group"] == "abstract"}
    if not overall:
        return []
    gap = overall["concrete-oracle"] - overall["base"]
    if gap <= 0:
        return [f"abstract: the true concrete instruction gains nothing over the user's words ({gap:+.2f}); no gap to close."]
    share = (overall["think+reflect"] - overall["base"]) / gap
    return [f"abstract: think+reflect closes {100 * share:.0f} % of the gap of {gap:.2f} between base and concrete-oracle."]
