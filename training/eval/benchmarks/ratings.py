"""Ins-Align: what people say of edited pictures, out of a CSV file; and how far its stand-in by a judge agrees with them.

Reason50K's paper takes the mean of ten people. No judge's mark is that; where one stands in for it, it is called
`ins_align_proxy`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError, DataError
from ..statistics import interval
from .aggregate import mean_of
from .compare import rank_correlation
from .items import Item
from .marks import ItemScore

COLUMNS = ("rater", "id", "score")
PROXY = "ins_align_proxy"


@dataclass(frozen=True, slots=True)
class Ratings:
    """item -> rater -> score, brought to 0..1. name: of the file."""

    name: str
    scores: Mapping[str, Mapping[str, float]]


def read_ratings(path: Path, scale: tuple[float, float] = (0.0, 1.0)) -> Ratings:
    """A CSV with the columns rater, id and score, one line per person and picture. scale: least and best of their scores.

    Raises DataError for a file without these columns or lines, for a score that is none or out of the scale, and for two scores
    of one person for one picture; ConfigError for a scale that is none.
    """
    low, high = scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"--ratings-scale: expected LEAST,BEST such as 0,1, found {low:g},{high:g}. Correct it.")
    found: dict[str, dict[str, float]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                raise DataError(f"{path}: expected the columns {', '.join(COLUMNS)}, found {reader.fieldnames}. Add them.")
            for row in reader:
                rater, item = (str(row[name] or "").strip() for name in ("rater", "id"))
                where = f"{path}:{reader.line_num}"
                value = _score(row["score"], low, high, where)
                if not rater or not item or rater in found.get(item, ()):
                    told = "the same rater and id twice" if rater and item else "none"
                    raise DataError(f"{where}: expected a rater and an id, each pair once, found {told}. Correct the line.")
                found.setdefault(item, {})[rater] = (value - low) / (high - low)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a CSV file of ratings, found none ({error}). Check the path.") from error
    if not found:
        raise DataError(f"{path}: expected ratings, one a line, found none. Check the file.")
    return Ratings(path.name, found)


def _score(text: str | None, low: float, high: float, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise DataError(f"{where}: expected a score from {low:g} to {high:g}, found {text!r}. Correct it or --ratings-scale.")
    return value


def ins_align(ratings: Ratings, items: Sequence[Item], scored: Sequence[tuple[Item, ItemScore]]) -> dict[str, Any]:
    """n: items; n_scored: that somebody rated; mean over items of the mean over raters, its 95 % interval, by group, by rater;
    proxy: rank correlation with the judge's stand-in on the items that have both.

    DataError where ratings name an item that is none: then the file is another run's.
    """
    known = {item.id: item for item in items}
    strange = [name for name in ratings.scores if name not in known]
    if strange:
        raise DataError(
            f"{ratings.name}: expected ids of items that were judged, found {', '.join(strange[:3])} ({len(strange)} such). "
            "Name the ratings of this run."
        )
    means = {name: sum(given.values()) / len(given) for name, given in ratings.scores.items()}
    low, high = interval(list(means.values()), "ratings", "ins_align")
    bounds = mean_of(list(means.values()), len(items), 0.0, 1.0)
    groups: dict[str, list[float]] = {}
    raters: dict[str, list[float]] = {}
    for name, given in ratings.scores.items():
        groups.setdefault(known[name].group, []).append(means[name])
        for rater, score in given.items():
            raters.setdefault(rater, []).append(score)
    pairs = [(means[item.id], value) for item, score in scored if item.id in means
             for value in score.metrics.get(PROXY, ()) if value is not None]  # fmt: skip
    return {
        "file": ratings.name,
        "n": len(items),
        "n_scored": len(means),
        "mean": sum(means.values()) / len(means),
        "low": low,
        "high": high,
        "at_least": bounds["at_least"],
        "at_most": bounds["at_most"],
        "groups": {name: {"n": len(own), "mean": sum(own) / len(own)} for name, own in groups.items()},
        "raters": {name: {"n": len(own), "mean": sum(own) / len(own)} for name, own in sorted(raters.items())},
        "proxy": {"n": len(pairs), "spearman": rank_correlation(*zip(*pairs, strict=True))} if pairs else None,
    }
