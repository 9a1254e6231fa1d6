"""Two tables beside the main one: every measure of a run with its anchors, and every mean with its n_scored/n and bounds.

Anchors say what a measure is worth: `no edit` is the source itself in the place of the edited picture, `ground truth` the
benchmark's target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .differences import PARTS
from .judge import GROUND_TRUTH, NO_EDIT
from .marks import scales_of
from .tables import Row, Table

ANCHOR_NAMES: Mapping[str, str] = {NO_EDIT: "no edit", GROUND_TRUTH: "ground truth"}

_NAMES = {"l1": "L1", "psnr": "PSNR", "ssim": "SSIM", "shift": "shift (px)", "mse_256": "MSE at 256 px"}
_NAMES |= {"block": "largest block", "tone": "largest tone"}
_PARTS = {"to_source": "to source", "to_target": "to target", "outside": "outside mask", "inside": "inside mask"}

PIXEL_HEADS: Mapping[tuple[str, str], str] = {
    (part, name): f"{_NAMES[name]} {words}" for part, words in _PARTS.items() for name in PARTS[part]
}
"""(part, metric) of `differences` -> head."""

FEATURE_HEADS: Mapping[str, str] = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I to target",
    "clip_source": "CLIP-I to source",
    "clip_dir": "CLIP-dir",
    "dino": "DINO to target",
    "dino_source": "DINO to source",
    "lpips": "LPIPS to target",
    "lpips_source": "LPIPS to source",
    "aesthetics": "aesthetics",
    "clip_t_inside": "CLIP-T inside mask",
    "clip_i_inside": "CLIP-I to target inside mask",
    "dino_inside": "DINO to target inside mask",
    "clip_outside": "CLIP-I to source outside mask",
    "dino_outside": "DINO to source outside mask",
    "lpips_outside": "LPIPS to source outside mask",
}

_EQUAL = "equal pictures"
_TOLD = ("answers", "stop reasons", "without a picture", "damaged", "clamped")


def measures_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every measure: a row per run, for GEdit one of its intersection, and one per anchor that was measured."""
    bench = next(iter(runs.values()))["bench"]
    rows = [row for name, scores in runs.items() for row in _measured(name, scores)]
    heads = (*scales_of(bench), *PIXEL_HEADS.values(), _EQUAL, *FEATURE_HEADS.values(), "Ins-Align", *_TOLD)
    remarks = ["In brackets: n_scored/n. Equal pictures have no PSNR; they are counted and left out of its mean."]
    remarks += ["no edit: the source in the place of the edited picture; ground truth: the benchmark's target in its place."]
    return Table(bench, tuple(rows), tuple(remarks), heads, f"{bench}: measures and their anchors", whole=True)


def _measured(name: str, scores: Mapping[str, Any]) -> Iterator[Row]:
    pixels, features = scores.get("pixels") or {}, scores.get("features") or {}
    people = {"Ins-Align": scores["ins_align"]} if scores.get("ins_align") else {}
    own = {**_means(scores["overall"], pixels, features), **people}
    yield _row(name, own, pixels, _told(scores))
    if scores.get("intersection"):
        yield _row(f"{name}: intersection", scores["intersection"], {}, {})
    for anchor, words in ANCHOR_NAMES.items():
        seen = (pixels.get("anchors") or {}).get(anchor) or {}
        found = _means(scores["anchors"].get(anchor) or {}, seen, (features.get("anchors") or {}).get(anchor) or {})
        if found:
            yield _row(f"{name}: {words}", found, seen, {})


def _means(judged: Mapping[str, Any], pixels: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Head -> row with n, n_scored and mean."""
    found = dict(judged)
    found |= {head: pixels[part][name] for (part, name), head in PIXEL_HEADS.items() if name in pixels.get(part, {})}
    return found | {head: features[name] for name, head in FEATURE_HEADS.items() if name in features}


def _row(name: str, means: Mapping[str, Mapping[str, Any]], pixels: Mapping[str, Any], told: Mapping[str, str]) -> Row:
    facts = {head: _number(head, row["mean"]) for head, row in means.items()}
    counts = {head: f"{row['n_scored']}/{row['n']}" for head, row in means.items()}
    if pixels:
        facts[_EQUAL] = str(pixels["to_source"]["psnr"]["infinite"])
    return Row(name, {}, {**facts, **told}, None, counts)


def _number(head: str, mean: float | None) -> str:
    if mean is None:
        return "none"
    return f"{mean:.6f}" if head.startswith("MSE") else f"{mean:.2f}" if "PSNR" in head or "shift" in head else f"{mean:.4f}"


def _told(scores: Mapping[str, Any]) -> dict[str, str]:
    run = scores["run"]
    listed = {"answers": scores["answers"], "stop reasons": run.get("stops", {}), "without a picture": run.get("failed", {})}
    told = {name: ", ".join(f"{key} {count}" for key, count in found.items()) for name, found in listed.items()}
    told["damaged"] = ", ".join(scores["damaged"])
    return told | ({} if scores["clamp"] is None else {"clamped": str(scores["n_clamped"]) if scores["clamp"] else "off"})


# ---- means -----------------------------------------------------------------------------------------------------------------


def means_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every mean, one a row, with its interval, its n_scored/n, and the bounds that what is missing leaves."""
    bench = next(iter(runs.values()))["bench"]
    rows = [
        Row(name, {}, {"block": block, "metric": metric, **figures_of(row)})
        for name, scores in runs.items()
        for block, metric, row in means_of(scores)
    ]
    remarks = ("bounds: the mean if all that is missing were the worst, and the best; for cosines -1 and 1.",)
    heads = ("block", "metric", "mean", "95 % interval", "n_scored/n", "bounds")
    return Table(bench, tuple(rows), remarks, heads, f"{bench}: all means")


def means_of(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(block, metric, row) of every mean of a scores.json."""
    yield from (("overall", metric, row) for metric, row in scores["overall"].items())
    for kind in ("types", "dimensions", "groups"):
        for block, metrics in scores.get(kind, {}).items():
            yield from ((block, metric, row) for metric, row in metrics.items())
    yield from (("intersection", metric, row) for metric, row in (scores.get("intersection") or {}).items())
    if scores.get("ins_align"):
        yield "overall", "Ins-Align", scores["ins_align"]
    found = _means({}, scores.get("pixels") or {}, scores.get("features") or {})
    yield from (("overall", head, row) for head, row in found.items())
    for anchor, words in ANCHOR_NAMES.items():
        yield from ((words, metric, row) for metric, row in (scores["anchors"].get(anchor) or {}).items())


def figures_of(row: Mapping[str, Any]) -> dict[str, str]:
    """mean, 95 % interval, n_scored/n and bounds in words; what is not known is left out."""
    told = {"mean": "none" if row["mean"] is None else f"{row['mean']:.4f}", "n_scored/n": f"{row['n_scored']}/{row['n']}"}
    if row.get("low") is not None:
        told["95 % interval"] = f"[{row['low']:.4f}, {row['high']:.4f}]"
    bounds = [f"{row[name]:.4f}" if row.get(name) is not None else "" for name in ("at_least", "at_most")]
    if any(bounds) and row["n_scored"] < row["n"]:
        told["bounds"] = " .. ".join(bounds).strip()
    return told


def told_means(scores: Mapping[str, Any]) -> list[str]:
    """`means_of` as lines, groups left out: there may be many, and the table has them."""
    wanted: Sequence[tuple[str, str, Mapping[str, Any]]] = [
        (block, metric, row) for block, metric, row in means_of(scores) if block not in scores.get("groups", {})
    ]
    lines = []
    for block, metric, row in wanted:
        told = figures_of(row)
        interval = f" {told['95 % interval']}" if "95 % interval" in told else ""
        bounds = f", bounds {told['bounds']}" if "bounds" in told else ""
        lines.append(f"{block}: {metric}: {told['mean']}{interval}, n {told['n_scored/n']}{bounds}")
    return lines
