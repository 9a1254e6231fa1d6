"""`scores.json` of one judge: a function of the rows, the manifest and the options, and of nothing else but what is measured of
the pictures, which is kept beside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....reasonedit_core.errors import ConfigError, DataError
from ....reasonedit_core.files import write_json
from .aggregate import rule_of, summarise
from .differences import masks_of, measure, pixel_means
from .generate import run_facts
from .items import Item, Manifest
from .judge import ABOUT, ANCHORS, JUDGEMENTS
from .judges import read_rows
from .marks import HEADLINE, ItemScore, Options, score_item, worst
from .protocols import IDENTITY
from .ratings import Ratings, ins_align

if TYPE_CHECKING:
    from .embeddings import Scorers

SCORES, FORMAT = "scores.json", "reasonedit.scores/2"

MISSING = ("skip", "zero", "error")
"""What a missing or damaged picture counts as: no score (shown as n_scored/n), the worst score, or an error."""

QUIRKS = ("gedit", "imgedit", "rise")
"""Benchmarks of whose official scripts a fault in scoring can be repeated."""


@dataclass(frozen=True, slots=True)
class Choice:
    """aggregate: name of a rule, None for the protocol's; lang: of GEdit's two; missing: one of MISSING; scorers:
    of the metrics that need a network or a function; masks: a folder of the official layout with a mask per item, white where
    the edit may change the picture; ratings: people's, for Ins-Align."""

    aggregate: str | None = None
    lang: str | None = None
    missing: str = "skip"
    clamp: bool = True
    quirks: bool = False
    pixels: bool = True
    scorers: Scorers | None = None
    masks: Path | None = None
    ratings: Ratings | None = None


def score_judged(manifest: Manifest, run: Path, folder: Path, choice: Choice) -> dict[str, Any]:
    """The scores of a folder that `judge` wrote; also written there as scores.json.

    Raises ConfigError for choices that do not fit, DataError for rows of another manifest, and for missing pictures with
    `missing="error"`.
    """
    about = _about(folder)
    if about["manifest"] != manifest.sha256:
        raise DataError(f"{folder}: expected judgements of {manifest.folder}, found those of another manifest. Judge it again.")
    rows = read_rows(folder / JUDGEMENTS)
    asked = {row["item"] for row in rows if row.get("anchor") is None}
    items = _in_one_language([item for item in manifest.items if item.id in asked], choice.lang)
    name = choice.aggregate or about["aggregate"]
    rule = rule_of(name, manifest.bench)
    if choice.quirks and manifest.bench not in QUIRKS:
        raise ConfigError(
            f"--quirks: expected gedit, imgedit or rise, as no fault of {manifest.bench} is repeated. Leave it out."
        )
    free = any(item.flags.get("consistency_free") for item in items)
    options = Options(choice.clamp, choice.quirks, free)
    every = tuple(sorted({row["role"] for row in rows if str(row["role"]).startswith(f"{IDENTITY}_")}))
    scored = _scored(items, rows, options, choice.missing, every)
    absent = _absent(rows) & {item.id for item in items}
    pictures = measure(manifest, run, items, choice.masks) if choice.pixels else None
    features = _features(manifest, run, items, choice)
    damaged = {row["item"]: row.get("note", "") for row in rows if row["status"] == "damaged" and row["item"] in absent}
    told = {
        "format": FORMAT,
        **{key: about[key] for key in ("bench", "protocol", "prompts", "judge", "endpoint", "questions", "manifest")},
        "aggregate": name,
        "lang": choice.lang or items[0].lang,
        "quirks": "official" if choice.quirks else None,
        "resized": bool(about.get("resized")),
        "clamp": choice.clamp if manifest.bench == "imgedit" else None,
        "missing": choice.missing,
        "absent": len(absent),
        "damaged": {**(features or {}).get("damaged", {}), **(pictures.damaged if pictures else {}), **damaged},
        "run": run_facts(run, [item.id for item in items]),
        "answers": dict(Counter(row["status"] for row in rows if row.get("anchor") is None)),
        "n_clamped": sum(score.clamped for _, score in scored),
        "headline": HEADLINE[manifest.bench],
        **summarise(rule, scored),
        "intersection": _intersection(rule, scored),
        "pixels": pixel_means(pictures) if pictures else None,
        "features": features,
        "ins_align": ins_align(choice.ratings, items, scored) if choice.ratings else None,
        "anchors": {anchor: _anchor(rule, manifest, rows, anchor, options, every) for anchor in ANCHORS},
        "items": [
            {"item": item.id, "group": item.group, "metrics": {key: list(values) for key, values in score.metrics.items()}}
            for item, score in scored
        ],
    }
    write_json(folder / SCORES, told)
    return told


def read_scores(path: Path) -> dict[str, Any]:
    """A scores.json, of a folder of judgements or of the only one of a run. ConfigError where there is none, or several."""
    paths = (
        [path] if path.is_file() else [path / SCORES] if (path / SCORES).is_file() else sorted(path.glob(f"judged/*/{SCORES}"))
    )
    if len(paths) != 1:
        found = "none" if not paths else "several: " + ", ".join(each.parent.name for each in paths)
        raise ConfigError(
            f"{path}: expected a run with one {SCORES}, found {found}. Score it, or name the folder below judged/."
        )
    try:
        told = json.loads(paths[0].read_text(encoding="utf-8"))
        if told.get("format") != FORMAT or not {"bench", "judge", "overall", "items"} <= told.keys():
            raise ValueError(f"its format is {told.get('format')!r}, not {FORMAT}")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{paths[0]}: expected scores, found none ({error}). Run `reasonedit-eval score` again.") from error
    return told | {"path": str(paths[0])}


# ---- items -----------------------------------------------------------------------------------------------------------------


def _in_one_language(items: Sequence[Item], lang: str | None) -> list[Item]:
    if not items:
        raise DataError("expected judgements of items of the manifest, found none. Run `reasonedit-eval judge` first.")
    languages = sorted({item.lang for item in items})
    if lang is None and len(languages) > 1:
        raise ConfigError(
            f"--lang: expected one of {', '.join(languages)}, as their scores are not mixed, found none. Name one."
        )
    own = [item for item in items if lang in (None, item.lang)]
    if not own:
        raise ConfigError(f"--lang: expected one of {', '.join(languages)}, found {lang!r}. Correct it.")
    return own


def _scored(
    items: Sequence[Item], rows: Sequence[Mapping[str, Any]], options: Options, missing: str, every: Sequence[str]
) -> list:
    marks, absent = _marks(rows, None), _absent(rows)
    if missing == "error" and absent:
        some = ", ".join(sorted(absent)[:5])
        raise DataError(
            f"expected a picture for every item, found none for {len(absent)}: {some}. Generate them, or --missing."
        )
    lost = absent if missing == "zero" else ()
    return [
        (item, worst(item, options, every) if item.id in lost else score_item(item, marks.get(item.id, {}), options, every))
        for item in items
    ]


def _absent(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Items without a picture, or with one that cannot be decoded, which is none."""
    return {row["item"] for row in rows if row["status"] in ("missing", "damaged")}


def _marks(rows: Sequence[Mapping[str, Any]], anchor: str | None) -> dict[str, dict[str, Mapping[str, int] | None]]:
    found: dict[str, dict[str, Mapping[str, int] | None]] = {}
    for row in rows:
        if row.get("anchor") == anchor and row["role"] is not None:
            found.setdefault(row["item"], {})[row["role"]] = row["marks"]
    return found


def _anchor(
    rule, manifest: Manifest, rows: Sequence[Mapping[str, Any]], anchor: str, options: Options, every: Sequence[str]
) -> dict[str, Any] | None:
    marks = _marks(rows, anchor)
    scored = [(item, score_item(item, marks[item.id], options, every)) for item in manifest.items if item.id in marks]
    return summarise(rule, scored)["overall"] if scored else None


def _intersection(rule, scored: Sequence[tuple[Item, ItemScore]]) -> dict[str, Any] | None:
    """GEdit: the same on items that every closed model of the paper answered."""
    own = [each for each in scored if each[0].flags.get("intersection")]
    return summarise(rule, own)["overall"] if own else None


def _features(manifest: Manifest, run: Path, items: Sequence[Item], choice: Choice) -> dict[str, Any] | None:
    if choice.scorers is None or not choice.scorers.there:
        return None
    from .embeddings import measure_features

    return measure_features(manifest, run, items, choice.scorers, masks_of(manifest, items, choice.masks))


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: expected what `reasonedit-eval judge` writes, found none ({error}). Judge the run."
        ) from error
