"""Faults planted into edits: pictures that an editor could have made of an item, with what reflection ought to say of them.

Faults of content are scenes, so what is wrong is known exactly; faults of the pixels are made by `spoil`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import DataError
from .dice import Dice, digest
from .edits import Add, Edit, Move, Recolour, Replace, SetBackground, SetLabel, SetState, apply, edit_kind, possible, touched
from .items import Item, draw_edit, draw_look, scene
from .kinds import BACKGROUNDS, COLOURS, KINDS, MOST_OBJECTS, TEXTS
from .splits import split_of_scene
from .verdicts import Assessment, assess
from .world import Scene

FAULTS = ("none", "half", "wrong_object", "wrong_colour", "wrong_state", "wrong_place", "extra", "unrelated")
"""Nothing done; only part of several edits; the right edit of another object; the right object in a wrong colour, in a wrong
state, at a wrong place; something else changed too; another scene altogether."""

SPOILERS = ("noise", "blur", "shift", "tear")

_TRIES, _MISSES = 300, 24


@dataclass(frozen=True, slots=True)
class Fault:
    """kind: one of `FAULTS`, or "right" for the target itself; shown: the scene that came out."""

    kind: str
    shown: Scene
    assessment: Assessment


def plant(item: Item, seed: int, kind: str | None = None) -> Fault | None:
    """An edit of `item` gone wrong in one way; kind: by dice of the seed if not given, "right" for no fault.

    None where the kind of fault does not fit the item (half of a single edit, a wrong colour of a removal). Scenes stay in
    the item's split. A fault of content can be mended by one more instruction or is a failure; `assessment` tells.
    """
    if kind is not None and kind not in (*FAULTS, "right"):
        raise DataError(f"fault: expected one of right, {', '.join(FAULTS)}, found {kind!r}. Correct the kind.")
    dice = Dice("fault", item.split, item.kind, item.language, item.seed, int(seed), kind or "any")
    kinds: Sequence[str] = (kind,) if kind else dice.shuffle(FAULTS)
    for name in kinds:
        shown = item.target if name == "right" else _planted(item, name, dice)
        if shown is not None:
            return Fault(name, shown, reflect(item, shown))
    return None


def fitting(item: Item, seed: int = 0) -> tuple[str, ...]:
    """The kinds of fault that can be planted in an item."""
    return tuple(kind for kind in FAULTS if plant(item, seed, kind) is not None)


def reflect(item: Item, shown: Scene) -> Assessment:
    """What reflection ought to say of a scene that came out of an item's edit."""
    return assess(item.source, item.target, shown, item.language)


def _planted(item: Item, kind: str, dice: Dice) -> Scene | None:
    misses = 0
    for _ in range(_TRIES):
        shown = _PLANTERS[kind](item, dice)
        misses += shown is None
        if misses > _MISSES:
            return None
        if shown is None or (shown != item.source and shown == item.target):
            continue
        if split_of_scene(shown) == item.split and _fits(item, kind, shown):
            return shown
    return None


def _fits(item: Item, kind: str, shown: Scene) -> bool:
    found = reflect(item, shown)
    if kind == "unrelated":
        return found.verdict == "failed" and found.findings["meets_instruction"] == "no"
    return found.verdict == ("failed" if kind == "none" else "reflection")


# ---- the faults ----------------------------------------------------------------------------------------------------------


def _none(item: Item, dice: Dice) -> Scene | None:
    return item.source


def _half(item: Item, dice: Dice) -> Scene | None:
    if len(item.edits) < 2:
        return None
    return apply(item.source, dice.sample(item.edits, 1 + dice.below(len(item.edits) - 1)))


def _wrong_object(item: Item, dice: Dice) -> Scene | None:
    """One of the edits meets another object that allows it."""
    edit = dice.pick(item.edits)
    if isinstance(edit, Add | SetBackground):
        return None
    asked = {cell for each in item.edits for cell in touched(each)}
    able = [each for each in possible(item.source, edit_kind(edit)) if touched(each)[0] not in asked and _same(edit, each)]
    if not able:
        return None
    return apply(item.source, [other for other in item.edits if other != edit] + [dice.pick(able)])


def _same(edit: Edit, another: Edit) -> bool:
    """The same change of another object."""
    if isinstance(edit, Move):
        return edit.to == another.to
    return replace(another, cell=edit.cell) == edit


def _wrong_colour(item: Item, dice: Dice) -> Scene | None:
    """What gets a colour gets another one."""
    edit = dice.pick(item.edits)
    match edit:
        case Recolour(cell, colour):
            before = item.source.at(cell).colour
            return _instead(item, edit, Recolour(cell, _other(COLOURS, dice, colour, before)))
        case Add(_, look) | Replace(_, look) if look.colour:
            wrong = replace(look, colour=_other(COLOURS, dice, look.colour))
            return _instead(item, edit, replace(edit, look=wrong))
        case SetBackground(name):
            return _instead(item, edit, SetBackground(_other(BACKGROUNDS, dice, name, item.source.background)))
    return None


def _wrong_state(item: Item, dice: Dice) -> Scene | None:
    """What gets a state, a text or a size gets another one."""
    edit = dice.pick(item.edits)
    match edit:
        case SetState(cell, state):
            look = item.source.look(cell)
            names = [name for name in KINDS[look.kind].states if name not in (state, look.state)]
            return _instead(item, edit, SetState(cell, dice.pick(names))) if names else None
        case SetLabel(cell, text):
            return _instead(item, edit, SetLabel(cell, _other(TEXTS, dice, text, item.source.look(cell).state)))
        case Add(_, look) | Replace(_, look):
            kind = KINDS[look.kind]
            names = [name for name in kind.states if name != look.state]
            if names:
                return _instead(item, edit, replace(edit, look=replace(look, state=dice.pick(names))))
            return _instead(item, edit, replace(edit, look=replace(look, size=_other(kind.sizes, dice, look.size))))
    return None


def _wrong_place(item: Item, dice: Dice) -> Scene | None:
    edit = dice.pick(item.edits)
    taken = {cell for each in item.edits for cell in touched(each)}
    free = [cell for cell in item.source.empty() if cell not in taken]
    match edit:
        case Move(cell, _) if free:
            return _instead(item, edit, Move(cell, dice.pick(free)))
        case Add(_, look) if free:
            return _instead(item, edit, Add(dice.pick(free), look))
    return None


def _extra(item: Item, dice: Dice) -> Scene | None:
    """All that was asked for, and one more change of something else."""
    kinds = ("recolour", "add", "remove", "resize", "state", "move", "background")
    asked = {cell for each in item.edits for cell in touched(each)}
    edit = draw_edit(item.target, dice.pick(kinds), dice)
    if edit is None or asked & set(touched(edit)) or len(item.target.objects) > MOST_OBJECTS:
        return None
    if isinstance(edit, SetBackground) and item.source.background != item.target.background:
        return None
    return apply(item.target, edit)


def _unrelated(item: Item, dice: Dice) -> Scene | None:
    """Another scene. What should have been emptied is not empty in it, which would by chance be what was asked for."""
    shown = scene(dice.below(1 << 40), item.split, least=1)
    for each in item.source.objects:
        if item.target.at(each.cell) is None and shown.at(each.cell) is None:
            spare = [other.cell for other in shown.objects if item.source.at(other.cell) is None]
            if len(shown.objects) == MOST_OBJECTS and spare:
                shown = shown.put(dice.pick(spare), None)
            shown = shown.put(each.cell, draw_look(dice))
    return shown


def _instead(item: Item, edit: Edit, wrong: Edit) -> Scene:
    return apply(item.source, [wrong if each == edit else each for each in item.edits])


def _other(names: Sequence[str], dice: Dice, *without: str) -> str:
    return dice.pick([name for name in names if name not in without])


_PLANTERS: dict[str, Callable[[Item, Dice], Scene | None]] = {
    "none": _none,
    "half": _half,
    "wrong_object": _wrong_object,
    "wrong_colour": _wrong_colour,
    "wrong_state": _wrong_state,
    "wrong_place": _wrong_place,
    "extra": _extra,
    "unrelated": _unrelated,
}


# ---- pixels --------------------------------------------------------------------------------------------------------------


def spoil(pixels: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """A picture (size, size, 3), uint8, gone bad: heavy noise, a strong blur, a shift of the canvas, or torn into strips."""
    rng = np.random.Generator(np.random.PCG64(digest("spoil", kind, int(seed))))
    size = pixels.shape[0]
    match kind:
        case "noise":
            noisy = pixels + rng.normal(0, rng.uniform(50, 80), pixels.shape)
            return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        case "blur":
            from PIL import Image, ImageFilter

            return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(size / 96 * rng.uniform(3, 6))))
        case "shift":
            step = size // 12 * int(rng.integers(1, 4)) * (1 if rng.random() < 0.5 else -1)
            return np.roll(pixels, step, axis=int(rng.integers(2)))
        case "tear":
            torn, height = pixels.copy(), size // 12
            for top in range(0, size, 2 * height):
                torn[top : top + height] = np.roll(torn[top : top + height], int(rng.integers(height, size // 2)), axis=1)
            return torn
    raise DataError(f"spoil: expected one of {', '.join(SPOILERS)}, found {kind!r}. Correct the kind.")
