"""From a judge's marks to the numbers of one item: the rules of each benchmark, and the official scripts' faults on demand.

A number is None where an answer is missing or cannot be read. It stays None: no rule here puts a value in its place, except
`quirks`, which repeats what the official scripts do and is for comparing with them only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ....reasonedit_core.mini.dice import digest
from .items import Item
from .protocols import IDENTITY, calls_of, is_logical

Marks = Mapping[str, Mapping[str, int] | None]
"""Role -> mark -> number; None where there is no answer that can be read."""

Values = tuple[float | None, ...]
"""What one metric of one item is the mean of: mostly one number; the score of KRIS has three or four."""


@dataclass(frozen=True, slots=True)
class Options:
    """clamp: no ImgEdit mark counts more than the first, as its rubric and the ReasonEdit paper ask for and its script does not
    see to. quirks: repeat the official scripts' faults (see `_guessed`, `_rise`). quirk_free: whether any RISE item of the set
    has the field consistency_free, which decides the fault of all others."""

    clamp: bool = True
    quirks: bool = False
    quirk_free: bool = False


@dataclass(frozen=True, slots=True)
class ItemScore:
    """metrics: name -> values, only those that apply to the item; clamped: a mark was lowered."""

    metrics: Mapping[str, Values]
    clamped: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """Least and best of a metric, and how many decimals papers give it."""

    low: float
    high: float
    decimals: int = 2


SCALES: Mapping[str, Mapping[str, Scale]] = {
    "gedit": {name: Scale(0, 10) for name in ("SC", "PQ", "O")},
    "imgedit": {"score": Scale(1, 5)},
    "kris": {name: Scale(0, 100) for name in ("consistency", "quality", "instruction", "knowledge", "score")},
    "rise": {name: Scale(0, 100, 1) for name in ("consistency", "reasoning", "plausibility", "score", "accuracy")},
    "reason50k": {"mllm": Scale(0, 1, 3), "ins_align_proxy": Scale(0, 1, 3)},
}
"""Metrics per benchmark."""

EVERYWHERE: Mapping[str, Scale] = {IDENTITY: Scale(0, 10)}
"""Metrics that can be asked for beside those of any benchmark."""


def scales_of(bench: str) -> dict[str, Scale]:
    """Metric -> scale, of a benchmark and of EVERYWHERE."""
    return {**SCALES[bench], **EVERYWHERE}


HEADLINE: Mapping[str, str] = {"gedit": "O", "imgedit": "score", "kris": "score", "rise": "accuracy", "reason50k": "mllm"}


def score_item(item: Item, marks: Marks, options: Options, every: Sequence[str] = ()) -> ItemScore:
    """The numbers of an item. marks: by role, as `protocols.calls_of` names them; every: the roles that were asked of every
    item beside these, which are the runs of identity preservation."""
    complete = {role: marks.get(role) for role in calls_of(item)}
    found = _RULES[item.bench](item, complete, options)
    runs = [marks.get(role) for role in every]
    return replace(found, metrics={**found.metrics, **_identity(runs)}) if runs else found


def _identity(runs: Sequence[Mapping[str, int] | None]) -> dict[str, Values]:
    """The mean of the runs that have a mark (Complex-Edit); None where none has."""
    values = [float(found[IDENTITY]) for found in runs if found is not None]
    return {IDENTITY: (sum(values) / len(values) if values else None,)}


def worst(item: Item, options: Options, every: Sequence[str] = ()) -> ItemScore:
    """What an item counts as when a missing picture is to count as the worst one: every metric at its least."""
    shape, scales = score_item(item, {}, options, every).metrics, scales_of(item.bench)
    return ItemScore({name: (scales[name].low,) * len(values) for name, values in shape.items()})


# ---- rules ---------------------------------------------------------------------------------------------------------------


def _gedit(item: Item, marks: Marks, options: Options) -> ItemScore:
    """VIEScore's "tie" task: SC = min(success, restraint), PQ = min(naturalness, cleanness), O = sqrt(SC * PQ), per item."""
    if options.quirks:
        marks = {role: found or _guessed(item, role) for role, found in marks.items()}
    sc, pq = (None if marks[role] is None else float(min(marks[role].values())) for role in ("SC", "PQ"))
    overall = None if sc is None or pq is None else math.sqrt(sc * pq)
    return ItemScore({"SC": (sc,), "PQ": (pq,), "O": (overall,)})


def _guessed(item: Item, role: str) -> dict[str, int]:
    """The official GEdit script draws a whole number 0..10 for an answer that it cannot read. Here it follows from the item."""
    return {"guess": digest("guess", item.id, role) % 11}


def _imgedit(item: Item, marks: Marks, options: Options) -> ItemScore:
    """The mean of three marks, to two decimals as the official step 1 writes it."""
    if marks["edit"] is None:
        return ItemScore({"score": (None,)})
    given = list(marks["edit"].values())
    used = [min(mark, given[0]) for mark in given] if options.clamp and not options.quirks else given
    return ItemScore({"score": (round(sum(used) / len(used), 2),)}, clamped=used != given)


def _kris(item: Item, marks: Marks, options: Options) -> ItemScore:
    """(mark - 1) * 25 for consistency, quality, instruction, and knowledge where the item was asked for it. `score` keeps
    them apart, because the two aggregations in use differ in whether items or single values count alike."""
    roles = ("consistency", "quality", "instruction")
    found = {role: None if marks[role] is None else 25.0 * (marks[role][role] - 1) for role in roles}
    if calls_of(item)["instruction"] == "dual":
        both = marks["instruction"]
        found["knowledge"] = None if both is None else 25.0 * (both["knowledge"] - 1)
    return ItemScore({**{name: (value,) for name, value in found.items()}, "score": tuple(found.values())})


def _rise(item: Item, marks: Marks, options: Options) -> ItemScore:
    """RISE as of 2026-04: weights by category, halved where reasoning has the least mark, accuracy = every mark the best.

    Fault of the official script (quirks): once any item of the set has the field consistency_free, which is NaN for the
    others and so counts as true, all items that are not logical are scored by reasoning and plausibility alone.
    """
    logical = is_logical(item)
    found = {role: _rise_mark(each, role, logical) for role, each in marks.items()}
    free = "consistency" not in found or (options.quirks and options.quirk_free and not logical)
    if logical:
        weights = {"consistency": 0.3, "reasoning": 0.7}
    elif free:
        weights = {"reasoning": 0.8, "plausibility": 0.2}
    else:
        weights = {"consistency": 0.3, "reasoning": 0.5, "plausibility": 0.2}
    score = accuracy = None
    if all(found[role] is not None for role in weights):
        score = sum(weight * found[role] for role, weight in weights.items())
        if found["reasoning"] == 1:
            score = max(1.0, score / 2)
    if None not in found.values():
        accuracy = 100.0 if all(mark == 5 for mark in found.values()) else 0.0
    elif any(mark is not None and mark < 5 for mark in found.values()):
        accuracy = 0.0  # whatever the missing mark is, not all are the best
    metrics = {role: (None if mark is None else 25.0 * (mark - 1),) for role, mark in found.items()}
    return ItemScore({**metrics, "score": (None if score is None else 25.0 * (score - 1),), "accuracy": (accuracy,)})


def _rise_mark(found: Mapping[str, int] | None, role: str, logical: bool) -> int | None:
    if found is None:
        return None
    return (1, 5)[found[role]] if logical else found[role]


def _reason50k(item: Item, marks: Marks, options: Options) -> ItemScore:
    """mllm: 0 or 1, as the ReasonBrain paper scores with a video MLLM; ins_align_proxy: a judge's mark in the place of the
    paper's ten human raters, and no substitute for them."""
    metrics: dict[str, Values] = {}
    if "mllm" in marks:
        metrics["mllm"] = (None if marks["mllm"] is None else float(marks["mllm"]["mllm"]),)
    metrics["ins_align_proxy"] = (None if marks["align"] is None else marks["align"]["align"] / 10,)
    return ItemScore(metrics)


_RULES: Mapping[str, Callable[[Item, Marks, Options], ItemScore]] = {
    "gedit": _gedit,
    "imgedit": _imgedit,
    "kris": _kris,
    "rise": _rise,
    "reason50k": _reason50k,
}
