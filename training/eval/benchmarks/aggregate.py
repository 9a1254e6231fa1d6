"""From items to tables: means per group, per type and overall, with what is missing shown beside every mean.

An overall is a weighted mean of block means, and the name of the rule says which blocks and which weights:

    gedit-macro, imgedit-macro, reason50k   groups, each as much as the next
    gedit-micro, imgedit-items              groups, by their items (evalscope; BAGEL's ImgEdit script)
    kris-sample                             the three types of knowledge, by their items (official, StepFun)
    kris-flat                               the three types, by their single marks (BAGEL, SAIR)
    rise-2026-04                            groups, by their items
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....reasonedit_core.errors import ConfigError
from ..statistics import interval
from .items import Item
from .marks import HEADLINE, ItemScore, Scale, Values, scales_of

KRIS_TYPES: Mapping[str, tuple[str, ...]] = {
    "factual": (
        *("count_change", "color_change", "size_adjustment", "part_completion", "anomaly_correction"),
        *("viewpoint_change", "position_movement", "temporal_prediction"),
    ),
    "conceptual": (
        *("humanities", "practical_knowledge", "biology", "chemistry", "geography", "medicine", "mathematics", "physics"),
    ),
    "procedural": (
        *("abstract_reasoning", "rule-based_reasoning", "multi-element_composition", "multi-instruction_execution"),
    ),
}
"""KRIS: type of knowledge -> categories (449, 518 and 300 items of the official set)."""

KRIS_DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "attribute perception": KRIS_TYPES["factual"][:5],
    "spatial perception": KRIS_TYPES["factual"][5:7],
    "temporal perception": KRIS_TYPES["factual"][7:],
    "social science": KRIS_TYPES["conceptual"][:2],
    "natural science": KRIS_TYPES["conceptual"][2:],
    "logical reasoning": KRIS_TYPES["procedural"][:2],
    "instruction decomposition": KRIS_TYPES["procedural"][2:],
}


@dataclass(frozen=True, slots=True)
class Rule:
    """bench; blocks: of what the overall is the mean, by group; weigh: each block alike, by `items`, or by `values`."""

    bench: str
    weigh: str
    block_of: Callable[[Item], str]


def _group(item: Item) -> str:
    return item.group


def kris_type(item: Item) -> str:
    """Type of knowledge of a KRIS category; its own name where it is none of the published ones."""
    return next((name for name, groups in KRIS_TYPES.items() if item.group in groups), item.group)


RULES: Mapping[str, Rule] = {
    "gedit-macro": Rule("gedit", "blocks", _group),
    "gedit-micro": Rule("gedit", "items", _group),
    "imgedit-macro": Rule("imgedit", "blocks", _group),
    "imgedit-items": Rule("imgedit", "items", _group),
    "kris-sample": Rule("kris", "items", kris_type),
    "kris-flat": Rule("kris", "values", kris_type),
    "rise-2026-04": Rule("rise", "items", _group),
    "reason50k": Rule("reason50k", "blocks", _group),
}


def rule_of(name: str, bench: str) -> Rule:
    """The rule of a name. ConfigError where it is not one of the benchmark's."""
    own = [each for each, rule in RULES.items() if rule.bench == bench]
    if name not in own:
        raise ConfigError(f"--aggregate: expected one of {', '.join(own)} for {bench}, found {name!r}. Correct it.")
    return RULES[name]


def combine(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean of block means: 58.23, 60.55, 46.21 by 449, 518, 300 give 56.33."""
    return sum(weights[name] * mean for name, mean in means.items()) / sum(weights[name] for name in means)


Scores = Sequence[tuple[Item, ItemScore]]


def summarise(rule: Rule, scores: Scores) -> dict[str, Any]:
    """metric -> its overall row, and per group (KRIS: per type and dimension as well) -> metric -> row. See `_row`."""
    metrics = scales_of(rule.bench)
    whole = {name: _overall(rule, scores, name, scale) for name, scale in metrics.items()}
    parts = {"groups": _split(scores, lambda item: item.group)}
    if rule.bench == "kris":
        parts["types"] = _split(scores, kris_type)
        dimensions = {group: name for name, groups in KRIS_DIMENSIONS.items() for group in groups}
        parts["dimensions"] = _split(scores, lambda item: dimensions.get(item.group, item.group))
    told = {"overall": {name: row for name, row in whole.items() if row["n"]}}
    for kind, split in parts.items():
        told[kind] = {
            block: {name: row for name, scale in metrics.items() if (row := _block(rule, own, name, scale))["n"]}
            for block, own in split.items()
        }
    return told


def item_value(rule: Rule, values: Values) -> tuple[float | None, float]:
    """(the number that an item counts with, how much it counts inside its block).

    By items: the mean of all its values, None where one of them is missing. By values: the mean of those that are there.
    """
    there = [value for value in values if value is not None]
    if rule.weigh == "values":
        return (sum(there) / len(there), len(there)) if there else (None, 0)
    return (sum(there) / len(there), 1.0) if there and len(there) == len(values) else (None, 0)


@dataclass(frozen=True, slots=True)
class Spread:
    """An overall, and how single items move it. values: per scored item a number whose mean is the overall, and whose
    resampled means spread as the overall's do; a block counts as much in every resample as it does in the overall."""

    overall: float
    items: tuple[Item, ...]
    values: tuple[float, ...]


def spread(rule: Rule, found: Sequence[tuple[Item, Values]]) -> Spread | None:
    """The overall of items; None where none is scored."""
    scored = [(item, *item_value(rule, values)) for item, values in found]
    scored = [each for each in scored if each[1] is not None]
    if not scored:
        return None
    blocks: dict[str, list[tuple[float, float]]] = {}
    for item, value, weight in scored:
        blocks.setdefault(rule.block_of(item), []).append((value, weight))
    sums = {name: sum(weight for _, weight in own) for name, own in blocks.items()}
    means = {name: sum(value * weight for value, weight in own) / sums[name] for name, own in blocks.items()}
    weights = dict.fromkeys(blocks, 1.0) if rule.weigh == "blocks" else sums
    overall, total = combine(means, weights), sum(weights.values())
    moved = []
    for item, value, weight in scored:
        name = rule.block_of(item)
        # Where blocks count alike, the number of items a block has in a resample says nothing; else it is part of the chance.
        centre = means[name] if rule.weigh == "blocks" else overall
        moved.append(overall + (value - centre) * (weight / sums[name]) * (weights[name] / total) * len(scored))
    return Spread(overall, tuple(item for item, *_ in scored), tuple(moved))


def mean_of(
    values: Sequence[float | None], n: int, low: float | None = None, high: float | None = None
) -> dict[str, float | int | None]:
    """n: items that a metric applies to; n_scored: that have it; mean of these. low, high: ends of its scale, for at_least and
    at_most, the mean if all that is missing were at one of them; without them there are no bounds."""
    there = [value for value in values if value is not None]
    told: dict[str, float | int | None] = {"n": n, "n_scored": len(there), "mean": sum(there) / len(there) if there else None}
    for name, end in (("at_least", low), ("at_most", high)):
        if end is not None and n:
            told[name] = (sum(there) + end * (n - len(there))) / n
    return told


def _overall(rule: Rule, scores: Scores, name: str, scale: Scale) -> dict[str, Any]:
    return _row(rule, [(item, score.metrics[name]) for item, score in scores if name in score.metrics], name, scale)


def _block(rule: Rule, scores: Scores, name: str, scale: Scale) -> dict[str, Any]:
    """Inside one block there is nothing to weigh but items or values."""
    within = Rule(rule.bench, "items" if rule.weigh == "blocks" else rule.weigh, lambda item: "")
    return _overall(within, scores, name, scale)


def _row(rule: Rule, found: Sequence[tuple[Item, Values]], name: str, scale: Scale) -> dict[str, Any]:
    """n: items that the metric applies to; n_scored: that have it; mean; low, high: its 95 % bootstrap interval; at_least,
    at_most: the mean if all that is missing were the worst, or the best; zeros: share of scored items at the scale's least."""
    spreaded = spread(rule, found)
    row: dict[str, Any] = {"n": len(found), "n_scored": 0, "mean": None, "low": None, "high": None, "zeros": None}
    if spreaded is not None:
        # Runs that are scored on the same number of items get the same resamples.
        low, high = interval(spreaded.values, rule.bench, name)
        values = [item_value(rule, values)[0] for _, values in found]
        there = [value for value in values if value is not None]
        row |= {"n_scored": len(there), "mean": spreaded.overall, "low": low, "high": high}
        row["zeros"] = sum(value <= scale.low for value in there) / len(there)
    if found:
        row["at_least"], row["at_most"] = (_filled(rule, found, end) for end in (scale.low, scale.high))
    return row


def _filled(rule: Rule, found: Sequence[tuple[Item, Values]], end: float) -> float:
    full = [(item, tuple(end if value is None else value for value in values)) for item, values in found]
    made = spread(rule, full)
    assert made is not None
    return made.overall


def _split(scores: Scores, name_of: Callable[[Item], str]) -> dict[str, Scores]:
    split: dict[str, list[tuple[Item, ItemScore]]] = {}
    for item, score in scores:
        split.setdefault(name_of(item), []).append((item, score))
    return split


def headline(bench: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a summary that stands for the benchmark."""
    overall = summary["overall"]
    return overall.get(HEADLINE[bench]) or next(iter(overall.values()))
