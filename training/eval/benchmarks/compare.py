"""Two runs by one judge, item by item; and two judges on one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ....reasonedit_core.errors import DataError
from ..statistics import interval
from .aggregate import Rule, item_value, rule_of, spread
from .items import Item, Manifest
from .marks import HEADLINE

TIE = 1e-9


def compare_runs(manifest: Manifest, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """b - a of the headline on the items that both are scored on: overall and per group, with 95 % paired bootstrap intervals
    and wins, ties, losses of b. DataError where the two do not compare."""
    for key in ("bench", "manifest", "judge", "questions", "aggregate", "quirks", "lang", "clamp", "missing"):
        if key == "missing" and not a["absent"] and not b["absent"]:
            continue  # nothing was missing, so that nothing came of the choice
        if a[key] != b[key]:
            raise DataError(f"expected two runs with one {key}, found {a[key]!r} and {b[key]!r}. Judge and score them alike.")
    rule, metric = rule_of(a["aggregate"], a["bench"]), HEADLINE[a["bench"]]
    own, other = (_values(manifest, scores, metric) for scores in (a, b))
    both = [item for item in manifest.items if _scored(rule, own, item) and _scored(rule, other, item)]
    if not both:
        raise DataError("expected items that both runs are scored on, found none. Judge them on the same items.")
    blocks = {"overall": both}
    for item in both:
        blocks.setdefault(item.group, []).append(item)
    inside = Rule(rule.bench, "items" if rule.weigh == "blocks" else rule.weigh, lambda item: "")
    rows = [_difference(rule if name == "overall" else inside, name, items, own, other) for name, items in blocks.items()]
    return {"metric": metric, "n": len(both), "left_out": len(own.keys() | other.keys()) - len(both), "rows": rows}


def _values(manifest: Manifest, scores: Mapping[str, Any], metric: str) -> dict[str, tuple[float | None, ...]]:
    return {each["item"]: tuple(each["metrics"][metric]) for each in scores["items"] if metric in each["metrics"]}


def _scored(rule: Rule, values: Mapping[str, tuple[float | None, ...]], item: Item) -> bool:
    return item.id in values and item_value(rule, values[item.id])[0] is not None


def _difference(rule: Rule, name: str, items: Sequence[Item], a: Mapping, b: Mapping) -> dict[str, Any]:
    one, two = (spread(rule, [(item, values[item.id]) for item in items]) for values in (a, b))
    assert one is not None and two is not None
    moved = [y - x for x, y in zip(one.values, two.values, strict=True)]
    low, high = interval(moved, rule.bench, "compare")
    signs = [item_value(rule, b[item.id])[0] - item_value(rule, a[item.id])[0] for item in items]
    counts = {
        "wins": sum(sign > TIE for sign in signs),
        "ties": sum(abs(sign) <= TIE for sign in signs),
        "losses": sum(sign < -TIE for sign in signs),
    }
    means = {"a": one.overall, "b": two.overall, "difference": two.overall - one.overall}
    return {"group": name, "n": len(items), **means, "low": low, "high": high, **counts}


def compared_markdown(told: Mapping[str, Any], a: str, b: str) -> str:
    """As a table."""
    lines = [f"{b} - {a}: {told['metric']} on {told['n']} items that both are scored on ({told['left_out']} left out).", ""]
    lines += ["| group | n | " + f"{a} | {b} | difference | win / tie / loss |", "|---|---:|---:|---:|---:|---:|"]
    for row in told["rows"]:
        difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        record = f"{row['wins']} / {row['ties']} / {row['losses']}"
        lines.append(f"| {row['group']} | {row['n']} | {row['a']:.3f} | {row['b']:.3f} | {difference} | {record} |")
    return "\n".join(lines) + "\n"


# ---- judges ----------------------------------------------------------------------------------------------------------------


def agree(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two judges' rows, mark by mark: n, Spearman's rank correlation, quadratic weighted kappa, bias (mean of b - a), and the
    share of equal marks. Figures that the marks do not determine (one judge always says the same) are None.

    Only marks of the very same picture are held together. DataError where no mark was given by both.
    """
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    left = {_asked(row): row["marks"] for row in a if row["marks"]}
    for row in b:
        marks = left.get(_asked(row))
        if marks and row["marks"]:
            for name in marks.keys() & row["marks"].keys():
                found.setdefault((row["role"], name), []).append((marks[name], row["marks"][name]))
    if not found:
        raise DataError("expected marks that both judges gave, found none. Let both judge the same run.")
    return [_agreement(role, name, pairs) for (role, name), pairs in sorted(found.items())]


def _asked(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["item"], row["role"], row.get("anchor"), row.get("edited")


def _agreement(role: str, name: str, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    x, y = np.asarray(pairs, dtype=np.float64).T
    return {
        "role": role,
        "mark": name,
        "n": len(pairs),
        "spearman": rank_correlation(x, y),
        "kappa": weighted_kappa(x, y),
        "bias": float((y - x).mean()),
        "equal": float((x == y).mean()),
    }


def weighted_kappa(x: np.ndarray, y: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights: 1 - mean (x - y)^2 / the same over all pairings of the two; None for 0 / 0."""
    chance = float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return None if chance == 0 else 1 - float(((x - y) ** 2).mean()) / chance


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's, of equally many numbers; None where one side is all alike."""
    return _correlation(_ranks(np.asarray(x, np.float64)), _ranks(np.asarray(y, np.float64)))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks; equals share the mean of theirs."""
    values, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def agreed_markdown(rows: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """As a table."""
    lines = [f"{a} and {b}; bias: how much higher the second marks.", ""]
    lines += ["| call | mark | n | Spearman | weighted kappa | bias | equal |", "|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        figures = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("spearman", "kappa")]
        tail = f"{row['bias']:+.2f} | {100 * row['equal']:.1f} %"
        lines.append(f"| {row['role']} | {row['mark']} | {row['n']} | {' | '.join(figures)} | {tail} |")
    return "\n".join(lines) + "\n"
