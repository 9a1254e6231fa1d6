"""What a drawn record of each kind says: a scene, what happens to it, and words that are true of both.

A maker draws once and returns None where the scene does not suit; the caller draws again. lot, in 0..1, is drawn once a
record and decides what kind of change it is about, so that changes which suit few scenes are as frequent as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

from ...reasonedit_core.dialogue.replies import cap_score
from . import drawn_words as words
from .drawn_scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Add,
    Background,
    Change,
    Move,
    Recolour,
    Remove,
    Scene,
    Thing,
    apply,
    compare,
    only_one,
    touched,
)
from .records import SCENARIOS, join_steps

VERDICT_CYCLE = ("success", "reflection", "success", "failed", "success")
"""3 : 1 : 1, in every five records in a row."""

_CHANGES = ("recolour", "add", "remove", "move")
_RIDDLES = ("like", "vanish", "heart", "all", "night")
_One = TypeVar("_One")


class Lot(NamedTuple):
    """What is fixed before a record is drawn. index: its number within kind and split; second_picture: an edit with two."""

    index: int
    lang: str
    lot: float
    second_picture: bool = False

    def pick(self, choices: Sequence[_One]) -> _One:
        """One of `choices` by lot."""
        return choices[int(self.lot * len(choices))]


def random_scene(rng: Random, least: int = 1, most: int = 4) -> Scene:
    """Some things of different kinds of shape and colour in cells of their own."""
    cells = rng.sample(range(9), rng.randint(least, most))
    things = (Thing(cell, rng.choice(SHAPES), rng.choice(list(COLOURS))) for cell in sorted(cells))
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(things))


def random_change(scene: Scene, kind: str, rng: Random) -> Change:
    """A change of the kind `recolour`, `add`, `remove` or `move`, which the scene must have a thing and an empty cell for."""
    thing, free = rng.choice(scene.things), rng.choice(scene.empty())
    match kind:
        case "recolour":
            return Recolour(thing.cell, _other(COLOURS, thing.colour, rng))
        case "add":
            return Add(Thing(free, rng.choice(SHAPES), rng.choice(list(COLOURS))))
        case "remove":
            return Remove(thing.cell)
    return Move(thing.cell, free)


def _other(names: Mapping[str, Any], name: str, rng: Random) -> str:
    return rng.choice([each for each in names if each != name])


# ---- the kinds -----------------------------------------------------------------------------------------------------------


def _instruction(raw: str, lang: str, clarity: str, category: str) -> dict[str, str]:
    return {"raw": raw, "class": clarity, "lang": lang, "category": category}


def _edit(rng: Random, lot: Lot) -> dict[str, Any]:
    scene = random_scene(rng)
    if lot.second_picture:
        return _edit_by_reference(scene, rng, lot.lang)
    change = random_change(scene, lot.pick(_CHANGES), rng)
    raw = words.tell(scene, change, lot.lang, rng)
    images = {"input": scene, "target": apply(scene, change)}
    return {"images": images, "instruction": _instruction(raw, lot.lang, "clear", lot.pick(_CHANGES))}


def _edit_by_reference(scene: Scene, rng: Random, lang: str) -> dict[str, Any]:
    """The colour comes from a second picture, which shows a single thing."""
    thing = rng.choice(scene.things)
    sample = Thing(4, rng.choice(SHAPES), _other(COLOURS, thing.colour, rng))
    the = words.the(scene, thing, lang)
    raw = f"把{the}变成第二张图中图形的颜色。" if lang == "zh" else f"Give {the} the colour of the shape in the second picture."
    target = apply(scene, Recolour(thing.cell, sample.colour))
    images = {"input": scene, "target": target, "reference_2": Scene(rng.choice(list(BACKGROUNDS)), (sample,))}
    return {"images": images, "instruction": _instruction(raw, lang, "clear", "reference")}


def _t2i(rng: Random, lot: Lot) -> dict[str, Any]:
    scene = random_scene(rng)
    return {"images": {"target": scene}, "caption": words.describe(scene, lot.lang)}


def _understand(rng: Random, lot: Lot) -> dict[str, Any]:
    scene = random_scene(rng, least=0)
    turns = [{"question": question, "answer": answer} for question, answer in words.questions(scene, lot.lang, rng)]
    return {"images": {"input": scene}, "understand": {"turns": turns}}


def _think(rng: Random, lot: Lot) -> dict[str, Any] | None:
    """Three abstract instructions to one clear one, which stays as it is."""
    scene, lang = random_scene(rng), lot.lang
    changes: tuple[Change, ...]
    if lot.index % 4 == 3:
        changes = (random_change(scene, lot.pick(_CHANGES), rng),)
        raw, clarity, category = words.tell(scene, changes[0], lang, rng), "clear", lot.pick(_CHANGES)
        steps = [raw]
    else:
        found = _riddle(scene, lot.pick(_RIDDLES), rng, lang)
        if found is None:
            return None
        (raw, changes), clarity, category = found, "abstract", lot.pick(_RIDDLES)
        steps = _steps(scene, changes, lang)
    return {
        "images": {"input": scene, "target": apply(scene, *changes)},
        "instruction": _instruction(raw, lang, clarity, category),
        "think": {"steps": steps, "text": join_steps(steps)},
    }


def _steps(scene: Scene, changes: Sequence[Change], lang: str) -> list[str]:
    """One sentence a change, each about the scene that the earlier ones have left."""
    steps = []
    for change in changes:
        steps.append(words.tell(scene, change, lang))
        scene = apply(scene, change)
    return steps


def _riddle(scene: Scene, kind: str, rng: Random, lang: str) -> tuple[str, tuple[Change, ...]] | None:
    """An instruction that has to be thought about, and the changes that it means."""
    zh, shape, colour = lang == "zh", rng.choice(SHAPES), rng.choice(list(COLOURS))
    named, like = words.RIDDLE_SHAPES[lang][shape], words.RIDDLE_COLOURS[lang][colour]
    thing = only_one(scene, shape)
    match kind:
        case "like" if thing and thing.colour != colour:
            raw = f"让{named}像{like}一样。" if zh else f"Let {named} look like {like}."
            return raw, (Recolour(thing.cell, colour),)
        case "vanish" if thing:
            return (f"不想再看到{named}。" if zh else f"I never want to see {named} again."), (Remove(thing.cell),)
        case "heart" if thing and scene.at(4) is None:
            raw = f"让{named}成为画面的中心。" if zh else f"Give {named} the place of honour in the middle of it all."
            return raw, (Move(thing.cell, 4),)
        case "all":
            changes = tuple(Recolour(each.cell, colour) for each in scene.things if each.colour != colour)
            raw = f"让所有图形都像{like}。" if zh else f"Let everything take after {like}."
            return (raw, changes) if 1 <= len(changes) <= 3 and len(scene.things) > 1 else None
        case "night" if scene.background != "dark blue":
            return ("让夜幕降临。" if zh else "Let night fall over this."), (Background("dark blue"),)
    return None


def _hypothetical(rng: Random, lot: Lot) -> dict[str, Any] | None:
    scene, lang = random_scene(rng, least=2), lot.lang
    scenario = lot.pick(SCENARIOS)
    raw, changes = _supposition(scene, scenario, rng, lang)
    if not 1 <= len(changes) <= 3:
        return None
    target = apply(scene, *changes)
    reason = {
        "scenario": scenario,
        "hypothetical": raw,
        "objects": sorted({words.plain(thing, lang) for thing in scene.things}),
        "source_caption": words.describe(scene, lang),
        "target_caption": words.describe(target, lang),
    }
    steps = _steps(scene, changes, lang)
    return {
        "images": {"input": scene, "target": target},
        "instruction": _instruction(raw, lang, "abstract", scenario),
        "think": {"steps": steps, "text": join_steps(steps)},
        "reason50k": reason,
    }


def _supposition(scene: Scene, scenario: str, rng: Random, lang: str) -> tuple[str, tuple[Change, ...]]:
    """A question of the scenario, and what would follow from it; no changes where the scene does not suit."""
    things = scene.things
    changes: tuple[Change, ...]
    match scenario:
        case "physical":  # everything falls; one thing a column, so that nothing lands on another
            apart = len({thing.cell % 3 for thing in things}) == len(things)
            changes = tuple(Move(thing.cell, 6 + thing.cell % 3) for thing in things if thing.cell < 6 and apart)
        case "temporal":
            changes = (Background("dark blue"),) if scene.background != "dark blue" else ()
        case "causal":
            thing = rng.choice(things)
            colour = _other(COLOURS, thing.colour, rng)
            changes = (Recolour(thing.cell, colour),) if only_one(scene, thing.shape) else ()
            return words.suppose(scenario, lang, thing.shape, colour), changes
        case _:
            changes = tuple(Recolour(each.cell, "red") for each in things if each.colour != "red")
    return words.suppose(scenario, lang), changes


# ---- reflection ----------------------------------------------------------------------------------------------------------


def _reflect(rng: Random, lot: Lot) -> dict[str, Any] | None:
    """Success: the target itself. Reflection: a planted fault and the change that mends it. Failed: unchanged, or a scene of
    something else."""
    scene, index, lang = random_scene(rng), lot.index, lot.lang
    change = random_change(scene, lot.pick(_CHANGES), rng)
    target, verdict = apply(scene, change), VERDICT_CYCLE[index % len(VERDICT_CYCLE)]
    shown, second, unrelated = target, None, False
    if verdict == "reflection":
        planted = plant_fault(scene, change, target, rng)
        if planted is None:
            return None
        shown, second = planted
    elif verdict == "failed":
        unrelated = index // len(VERDICT_CYCLE) % 2 == 1
        shown = random_scene(rng) if unrelated else scene
        if unrelated and set(shown.things) & set(target.things):
            return None
    found = findings(scene, change, target, shown, lang)
    if verdict == "failed" and found["meets_instruction"] != "no":  # another scene that by chance has what was asked for
        return None
    score = found.pop("score")
    reflect = {
        "target_description": words.describe(target, lang, touched(change)),
        "scores": {"consistency": score, "quality": 10.0},
        "findings": found,
        "reason": words.judge(target, shown, compare(target, shown), verdict, unrelated, lang),
        "verdict": verdict,
        **({"second_instruction": words.tell(shown, second, lang, rng)} if second else {}),
    }
    raw = words.tell(scene, change, lang, rng)
    images = {"input": scene, "generated": shown, "target": target}
    return {"images": images, "instruction": _instruction(raw, lang, "clear", lot.pick(_CHANGES)), "reflect": reflect}


def plant_fault(scene: Scene, change: Change, target: Scene, rng: Random) -> tuple[Scene, Change] | None:
    """A picture that one more change turns into `target`, and that change: `apply(shown, second) == target`.

    Faults: the wrong colour or the wrong place of what was asked for, another thing recoloured on the way, a thing too many.
    None where the fault chosen by lot does not fit.
    """
    free = target.empty()
    match rng.choice(("colour", "place", "bystander", "extra")):
        case "colour" if isinstance(change, Recolour | Add):
            thing = target.at(touched(change)[0])
            before = scene.at(thing.cell)
            wrong = [each for each in COLOURS if each not in (thing.colour, before.colour if before else None)]
            return apply(target, Recolour(thing.cell, rng.choice(wrong))), Recolour(thing.cell, thing.colour)
        case "place" if isinstance(change, Move | Add):
            right = touched(change)[0]
            wrong = rng.choice([cell for cell in free if cell not in touched(change)])
            return apply(target, Move(right, wrong)), Move(wrong, right)
        case "bystander":
            others = [thing for thing in target.things if thing.cell not in touched(change)]
            if others:
                thing = rng.choice(others)
                wrong = _other(COLOURS, thing.colour, rng)
                return apply(target, Recolour(thing.cell, wrong)), Recolour(thing.cell, thing.colour)
        case "extra":
            cells = [cell for cell in free if cell not in touched(change)]
            extra = Thing(rng.choice(cells), rng.choice(SHAPES), rng.choice(list(COLOURS)))
            return apply(target, Add(extra)), Remove(extra.cell)
    return None


def findings(scene: Scene, change: Change, target: Scene, shown: Scene, lang: str) -> dict[str, Any]:
    """What a faultless scorer reports of `shown`, and the score that the released caps make of it (key `score`)."""
    difference = compare(target, shown)
    cells = touched(change)
    done = all(shown.at(cell) == target.at(cell) for cell in cells)
    begun = any(shown.at(cell) != scene.at(cell) for cell in cells) and shown.background == target.background
    related = bool(set(shown.things) & set(target.things)) or not target.things
    meets = "yes" if done else "partial" if begun and related else "no"
    claims = max(1, len(target.things)) + 1  # the background, and each thing or that there is none
    right = max(0, claims - difference.conflicts - len(difference.missing))
    major, omissions = difference.conflicts, len(difference.missing)
    return {
        "meets_instruction": meets,
        "major_conflicts": major,
        "minor_conflicts": 0,
        "omissions": omissions,
        "reason": words.observe(target, shown, difference, lang),
        "score": cap_score(round(10 * right / claims, 1), meets, major, omissions)[0],
    }


Maker = Callable[[Random, Lot], "dict[str, Any] | None"]

MAKERS: dict[str, Maker] = {
    "think": _think,
    "reflect": _reflect,
    "edit": _edit,
    "t2i": _t2i,
    "understand": _understand,
    "hypothetical": _hypothetical,
}
