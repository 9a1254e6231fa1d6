"""Items: a scene, what is asked of it, and the scene that should come out. Everything follows from an integer.

The split is part of the key from which an item is drawn, so training and test never draw the same item whatever their seeds;
and what they draw from is kept apart too (`splits.py`): the wording, the combination of objects in source and target, and for
a rule what it is applied to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from . import words
from .dice import Dice
from .edits import EDIT_KINDS, Add, Edit, Replace, SetBackground, apply, disjoint, edit_kind, possible
from .kinds import BACKGROUNDS, CELLS, KINDS, MOST_OBJECTS, SHAPES, STYLES
from .rules import CATEGORIES, KNOWLEDGE, Rule, Setting, phrase, rules, rules_of
from .splits import check_split, split_of_scene
from .wordings import canonical, describe, draw_wording, together
from .world import LOOKS, Look, Object, Scene, scene_of

ITEM_KINDS = ("concrete", "compound", *EDIT_KINDS, "abstract", *KNOWLEDGE, *CATEGORIES)
"""What can be asked for: clear instructions (of any kind, two edits at once, of one kind), abstract ones (any, by knowledge
type, by category). Besides these, the name of a rule."""

COMPOUND_SHARE = 0.15
"""Share of two-edit instructions among the clear ones."""

ENGLISH_SHARE = 0.6
"""Share of English instructions where no language is asked for."""

_TRIES = 600


@dataclass(frozen=True, slots=True)
class Item:
    """One edit task.

    instruction: the user's words; clear, or abstract with `rule`, `category` and `knowledge`. edits: what they mean, disjoint,
    about the source. concrete: an instruction that says so plainly: the user's own words where they are clear, else the
    canonical steps as running text. steps: the same, one sentence an edit. wordings, pair: what is kept apart by splits.
    """

    seed: int
    kind: str
    split: str
    language: str
    source: Scene
    target: Scene
    edits: tuple[Edit, ...]
    instruction: str
    concrete: str
    steps: tuple[str, ...]
    wordings: tuple[str, ...]
    rule: str | None = None
    category: str | None = None
    knowledge: str | None = None
    pair: str | None = None

    @property
    def clear(self) -> bool:
        """The instruction can be painted as it stands."""
        return self.rule is None

    @property
    def canonical(self) -> str:
        """The edits in canonical words: what a faultless thought says, whatever the user said."""
        return together(canonical(self.edits, self.source, self.language), self.language)

    @property
    def edit_kinds(self) -> tuple[str, ...]:
        """The kinds of its edits."""
        return tuple(edit_kind(edit) for edit in self.edits)


def item(seed: int, kind: str = "concrete", split: str = "train", language: str | None = None) -> Item:
    """The item of a seed. Any integer is a seed; kind: one of `ITEM_KINDS`, or a rule's name; language: en, zh, or drawn."""
    check_split(split)
    if language is not None:
        words.tables(language)
    dice = Dice("item", split, kind, language or "any", int(seed))
    spoken = language or ("en" if dice.chance(ENGLISH_SHARE) else "zh")
    if kind in ("concrete", "compound", *EDIT_KINDS):
        return _clear(seed, kind, split, spoken, dice)
    named = rules().get(kind)
    choices = (named,) if named else rules_of(kind) if kind in ITEM_KINDS else ()
    if not choices:
        names = ", ".join(ITEM_KINDS)
        raise DataError(f"item: expected a kind of {names}, or the name of a rule, found {kind!r}. Correct the kind.")
    while True:
        found = _ruled(seed, kind, split, spoken, dice, dice.pick(choices))
        if found is not None:
            return found


def scene(seed: int, split: str = "train", least: int = 0) -> Scene:
    """A scene without a task, for captions, questions and drawing from text. least: objects that it has at least."""
    check_split(split)
    dice = Dice("scene", split, int(seed))
    while True:
        looks = [draw_look(dice) for _ in range(least + dice.below(MOST_OBJECTS + 1 - least))]
        found = _placed([(None, look) for look in looks], None, dice)
        if split_of_scene(found) == split:
            return found


# ---- clear instructions --------------------------------------------------------------------------------------------------


def _clear(seed: int, kind: str, split: str, language: str, dice: Dice) -> Item:
    if kind == "concrete":
        chosen = "compound" if dice.chance(COMPOUND_SHARE) else dice.pick(EDIT_KINDS)
    else:
        chosen = kind
    while True:
        wanted = dice.sample(EDIT_KINDS, 2) if chosen == "compound" else [chosen]
        source = _scene_for(wanted, dice)
        if split_of_scene(source) != split:
            continue
        drawn = [draw_edit(source, each, dice) for each in wanted]
        edits = tuple(edit for edit in drawn if edit is not None)
        if len(edits) < len(wanted) or not disjoint(edits) or len(source.objects) + wanted.count("add") > MOST_OBJECTS:
            continue
        target = apply(source, edits)
        if split_of_scene(target) != split:
            continue
        chosen_words = [draw_wording(edit, source, language, split, dice) for edit in edits]
        pairs = zip(edits, chosen_words, strict=True)
        steps = tuple(describe(edit, source, language, wording, dice) for edit, wording in pairs)
        said = together(steps, language)
        ids = tuple(wording.id for wording in chosen_words)
        return Item(seed, kind, split, language, source, target, edits, said, said, steps, ids)


_ABLE = {
    "recolour": tuple(name for name, kind in KINDS.items() if kind.coloured),
    "resize": tuple(name for name, kind in KINDS.items() if kind.sized),
    "state": tuple(name for name, kind in KINDS.items() if len(kind.states) > 1 and name != "sign"),
    "label": ("sign",),
}


def _scene_for(wanted: Sequence[str], dice: Dice) -> Scene:
    """A scene in which the kinds of edit may be possible. Now and then two objects are alike but for one thing, so that an
    instruction has to tell them apart."""
    needed = [draw_look(dice, _ABLE[kind]) for kind in wanted if kind in _ABLE]
    if not needed and any(kind not in ("add", "background") for kind in wanted):
        needed = [draw_look(dice)]
    most = MOST_OBJECTS - wanted.count("add")
    looks = list(needed)
    if needed and len(looks) < most and dice.chance(0.4):
        looks.append(_nearly(needed[0], dice))
    while len(looks) < most and dice.chance(0.6):
        looks.append(draw_look(dice))
    return _placed([(None, look) for look in looks], None, dice)


def draw_look(dice: Dice, kinds: Sequence[str] = ()) -> Look:
    """A look of one of the kinds; of any, with shapes more often than the rest."""
    kind = dice.pick(kinds) if kinds else dice.pick(SHAPES if dice.chance(0.25) else tuple(KINDS))
    of = KINDS[kind]
    return Look(kind, dice.pick(of.colours), dice.pick(of.sizes), dice.pick(of.states))


def _nearly(look: Look, dice: Dice) -> Look:
    """Another look of the same kind."""
    others = [each for each in LOOKS if each.kind == look.kind and each != look]
    return dice.pick(others)


def draw_edit(source: Scene, kind: str, dice: Dice) -> Edit | None:
    """An edit of a kind that is possible in a scene, or None."""
    match kind:
        case "add":
            return Add(dice.pick(source.empty()), draw_look(dice)) if len(source.objects) < MOST_OBJECTS else None
        case "background":
            return SetBackground(dice.pick([name for name in BACKGROUNDS if name != source.background]))
        case "replace":
            if not source.objects:
                return None
            old, look = dice.pick(source.objects), draw_look(dice)
            return Replace(old.cell, look) if look.kind != old.kind else None
    fits = list(possible(source, kind))
    return dice.pick(fits) if fits else None


def _placed(objects: Sequence[tuple[int | None, Look]], background: str | None, dice: Dice) -> Scene:
    """A scene of the looks, those without a cell in cells by dice."""
    taken = {cell for cell, _ in objects if cell is not None}
    free = dice.shuffle(cell for cell in CELLS if cell not in taken)
    placed = [Object(free.pop() if cell is None else cell, look) for cell, look in objects]
    return scene_of(background or dice.pick(BACKGROUNDS), placed, dice.pick(STYLES))


# ---- abstract instructions -----------------------------------------------------------------------------------------------


def _ruled(seed: int, kind: str, split: str, language: str, dice: Dice, rule: Rule) -> Item | None:
    pairs = rule.pairs(split)
    fits = [each for each in rule.wordings(language) if each.split == split]
    for _ in range(_TRIES):
        pair = dice.pick(pairs)
        source, slots = stage(rule, rule.stage(pair, dice), dice)
        if split_of_scene(source) != split:
            continue
        edits = rule.meaning(source, slots)
        if not edits:
            continue
        target = apply(source, edits)
        if split_of_scene(target) != split:
            continue
        wording = dice.pick(fits)
        steps = canonical(edits, source, language)
        return Item(
            seed=seed,
            kind=kind,
            split=split,
            language=language,
            source=source,
            target=target,
            edits=edits,
            instruction=phrase(wording, source, slots, language, dice),
            concrete=together(steps, language),
            steps=steps,
            wordings=(wording.id,),
            rule=rule.name,
            category=rule.category,
            knowledge=rule.knowledge,
            pair=f"{rule.name}:{pair}",
        )
    return None


def stage(rule: Rule, setting: Setting, dice: Dice) -> tuple[Scene, dict[str, str]]:
    """A scene with what the rule needs and some bystanders, and the slots with references as cells."""
    objects = list(setting.objects)
    needed = len(objects)
    able = rule.bystanders()
    kinds = tuple(dict.fromkeys(look.kind for look in able))
    while kinds and len(objects) < MOST_OBJECTS and dice.chance(0.55):
        objects.append((None, draw_look(dice, kinds)))
    taken = {cell for cell, _ in objects if cell is not None}
    free = dice.shuffle(cell for cell in CELLS if cell not in taken)
    cells = [free.pop() if cell is None else cell for cell, _ in objects]
    ground = setting.background or dice.pick(BACKGROUNDS)
    placed = scene_of(ground, (Object(cell, look) for cell, (_, look) in zip(cells, objects, strict=True)), dice.pick(STYLES))
    names = {name: str(cells[int(at)]) if name.startswith("the") else at for name, at in setting.slots.items()}
    assert all(int(at) < needed for name, at in setting.slots.items() if name.startswith("the"))
    return placed, names
