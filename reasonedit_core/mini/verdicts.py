"""What a faultless reflector says of an edited picture: verdict, findings, score, words, and the edit that mends it.

Planted faults and pictures that an editor really made are judged by the same rule, from the scene that the picture shows
(for real ones: as `judge.read` finds it). The words compare the picture with the target description only, because a
single-image reflector sees nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dialogue.replies import cap_score
from . import words
from .edits import Edit, edits_between
from .judge import quality, read
from .kinds import CELLS
from .wordings import canonical, together
from .world import Scene

MOST_REPAIRS = 3
"""Edits that a second instruction may ask for."""

LEAST_QUALITY = 4.0
"""Quality below which a picture counts as spoiled beyond repair."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """What reflection on a picture ought to bring out.

    verdict: success, reflection or failed. instruction: the second instruction, with a reflection and nothing else; repair:
    the edits that it asks for, which turn what is shown into the target (there whatever the verdict, empty when nothing is to
    be mended). findings and score: of the consistency question (keys of `Findings` of a record, without its reason);
    scorer: the scorer's words; reason: what the verdict rests on.
    """

    verdict: str
    reason: str
    instruction: str | None
    repair: tuple[Edit, ...]
    findings: dict[str, Any]
    score: float
    scorer: str


def assess(
    source: Scene,
    target: Scene,
    shown: Scene,
    language: str,
    *,
    spoiled: Collection[int] = (),
    cleanness: float = 10.0,
) -> Assessment:
    """Reflect on a picture that shows `shown` where `source` was to become `target`.

    spoiled: cells in which nothing can be made out (`Reading.readable`); cleanness: the quality of the pixels, 0..10.
    Verdict: success when all is as wanted; failed when the picture is spoiled, or unchanged, or needs more than three edits,
    so that a new start is better; reflection for the rest.
    """
    faults = _faults(target, shown, language, spoiled)
    asked = [cell for cell in CELLS if source.look(cell) != target.look(cell)]
    done = [cell for cell in asked if cell not in spoiled and shown.look(cell) == target.look(cell)]
    parts, right = len(asked), len(done)
    if source.background != target.background:
        parts, right = parts + 1, right + (shown.background == target.background)
    repair = edits_between(shown, target)
    unchanged = (shown.background, shown.objects) == (source.background, source.objects)
    ruined = bool(spoiled) or cleanness < LEAST_QUALITY
    if ruined:
        verdict = "failed"
    elif not faults:
        verdict = "success"
    else:
        verdict = "failed" if unchanged or len(repair) > MOST_REPAIRS or not right and len(faults) > 2 else "reflection"
    meets = "yes" if right == parts else "partial" if right or not unchanged and verdict != "failed" else "no"
    missing = sum(shown.at(each.cell) is None for each in target.objects if each.cell not in spoiled)
    wrong = len(faults) - missing
    extra = sum(target.at(each.cell) is None for each in shown.objects)
    claims = len(target.objects) + 2 + extra  # the background counts as two: it is most of the picture
    raw = 10 * max(0, claims - len(faults)) / claims * min(1.0, cleanness / LEAST_QUALITY)
    told = faults[:2] if verdict == "failed" else faults  # what cannot be mended need not be listed
    findings = {"meets_instruction": meets, "major_conflicts": wrong, "minor_conflicts": 0, "omissions": missing}
    return Assessment(
        verdict=verdict,
        reason=together([*_opening(verdict, unchanged, ruined, language), *told], language),
        instruction=together(canonical(repair, shown, language), language) if verdict == "reflection" else None,
        repair=repair,
        findings=findings,
        score=cap_score(round(raw, 1), meets, wrong, missing)[0],
        scorer=together([_met(meets, language), *(faults[:1] or _opening("success", False, False, language))], language),
    )


def assess_picture(source: Scene, target: Scene, pixels: np.ndarray, language: str) -> Assessment:
    """`assess` for a picture (H, W, 3) that an editor made: uint8, or float 0..1. What it shows is read from the pixels."""
    reading = read(pixels)
    spoiled = [cell for cell in CELLS if not reading.readable[cell]]
    return assess(source, target, reading.scene, language, spoiled=spoiled, cleanness=quality(reading))


# ---- words ---------------------------------------------------------------------------------------------------------------


def _faults(target: Scene, shown: Scene, language: str, spoiled: Collection[int]) -> list[str]:
    """One sentence for each claim of the description that the picture refutes, and for each thing that it does not hold."""
    zh = language == "zh"
    said = []
    if target.background != shown.background:
        wanted, found = (words.background_name(scene.background, language) for scene in (target, shown))
        said.append(f"背景应该是{wanted}，却是{found}。" if zh else f"The background should be {wanted}, but it is {found}.")
    for cell in CELLS:
        wanted, found = target.look(cell), shown.look(cell)
        where, there = words.at_place(cell, language), words.place_name(cell, language)
        if cell in spoiled:
            said.append(f"{where}的东西看不清。" if zh else f"What is {where} cannot be made out.")
        elif wanted == found:
            continue
        elif wanted is None:
            a = words.a_look(found, language)
            said.append(f"{where}不该有{a}。" if zh else f"There should be nothing {where}, but there is {a}.")
        elif found is None:
            a = words.a_look(wanted, language)
            said.append(f"{where}应该有{a}，却是空的。" if zh else f"There should be {a} {where}, but {there} is empty.")
        else:
            a, b = words.a_look(wanted, language), words.a_look(found, language)
            said.append(f"{where}应该是{a}，却是{b}。" if zh else f"There should be {a} {where}, but there is {b}.")
    return said


def _opening(verdict: str, unchanged: bool, spoiled: bool, language: str) -> list[str]:
    zh = language == "zh"
    if verdict == "success":
        return ["画面与描述完全一致。" if zh else "The picture agrees with the description in every point."]
    if spoiled:
        return ["画面已经损坏。" if zh else "The picture is spoiled."]
    if unchanged:
        return ["要求的修改没有做。" if zh else "Nothing of what was asked for has been done."]
    if verdict == "failed":
        return ["这几乎是另一幅画面。" if zh else "This is almost another scene."]
    return []


def _met(meets: str, language: str) -> str:
    zh = language == "zh"
    return {
        "yes": "指令已完成。" if zh else "The instruction was met.",
        "partial": "指令只完成了一部分。" if zh else "The instruction was met in part.",
        "no": "指令没有完成。" if zh else "The instruction was not met.",
    }[meets]
