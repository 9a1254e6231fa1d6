"""Rules of the world: what an abstract or hypothetical instruction means for the things of a scene.

A rule is a function scene -> concrete edits, with what it needs to be staged and how it is asked for. Its truth is computed
from the whole scene, so it can be checked against any scene. Categories are those of Reason50K, knowledge types those of
KRIS. The rules themselves stand in `rules_life.py` (states, times, backgrounds) and `rules_logic.py` (colours, sizes, places,
counts); their words in `rule_words_en.py` and `rule_words_zh.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ..errors import DataError
from . import words
from .dice import Dice
from .edits import Edit, disjoint
from .kinds import KINDS
from .splits import held_out_of
from .wordings import FRAMES, Wording, join
from .world import LOOKS, Look, Scene

CATEGORIES = ("physical", "temporal", "causal", "story")
KNOWLEDGE = ("factual", "conceptual", "procedural")
MOST_EDITS = 3
"""Concrete edits that one abstract instruction may mean."""

SUPPOSE: Mapping[str, tuple[str, ...]] = {
    "en": (
        "What if {v}?",
        "Imagine that {v}.",
        "Suppose {v}.",
        "Show what happens when {v}.",
        "What would this look like if {v}?",
    ),
    "zh": ("如果{v}，会怎么样？", "想象一下{v}。", "假设{v}。", "画出{v}之后的样子。", "要是{v}呢？"),
}
"""Ways of supposing something; `wordings.FRAMES` are the ways of asking for it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a rule needs to see before it can be applied.

    objects: (cell, or None for any, look); background: None for any; slots: what its words speak of, in canonical names, from
    which words are made by the name of the slot: `the`, `the_a` refer to an object (here its number in `objects`; in a scene
    its cell), `colour_a` is a colour, `kind_a` a kind, `kinds_a` its plural, `like` something that has this colour; others
    stay as they are.
    """

    objects: tuple[tuple[int | None, Look], ...] = ()
    background: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """subjects: names of all that the rule can be applied to, which are split between training and test. stage: a setting for
    a subject, by dice. act: the edits that the rule means in a scene, () where it does not apply; slots as in the setting,
    references as cells. avoid: kinds that may not stand by, as the instruction could mean them too."""

    name: str
    category: str
    knowledge: str
    subjects: tuple[str, ...]
    stage: Callable[[str, Dice], Setting]
    act: Callable[[Scene, Mapping[str, str]], tuple[Edit, ...]]
    avoid: frozenset[str] = frozenset()

    def pairs(self, split: str) -> tuple[str, ...]:
        """The subjects that belong to a split."""
        held = held_out_of(self.subjects, self.name)
        return tuple(name for name in self.subjects if (name in held) == (split == "held_out"))

    def bystanders(self) -> tuple[Look, ...]:
        """Looks that may stand by without taking part."""
        return tuple(look for look in LOOKS if look.kind not in self.avoid)

    def wordings(self, language: str) -> tuple[Wording, ...]:
        """All wordings: what is supposed, and what is asked for, each joined with the ways of saying so."""
        return rule_wordings(self.name, language)

    def meaning(self, scene: Scene, slots: Mapping[str, str]) -> tuple[Edit, ...]:
        """The concrete edits that the rule means in a scene, at most three; () where it does not apply."""
        edits = self.act(scene, slots)
        return edits if len(edits) <= MOST_EDITS and disjoint(edits) else ()


@cache
def rules() -> Mapping[str, Rule]:
    """All rules by name."""
    from . import rules_life, rules_logic

    return {rule.name: rule for rule in (*rules_life.RULES, *rules_logic.RULES)}


def rules_of(label: str) -> tuple[Rule, ...]:
    """The rules of a category, or of a knowledge type, or all of them ("abstract"). DataError for another label."""
    found = tuple(rule for rule in rules().values() if label in (rule.category, rule.knowledge, "abstract"))
    if not found:
        names = ", ".join(("abstract", *CATEGORIES, *KNOWLEDGE))
        raise DataError(f"rules: expected one of {names}, found {label!r}. Correct the label.")
    return found


@cache
def rule_wordings(name: str, language: str) -> tuple[Wording, ...]:
    """The wordings of a rule. Fields: those of its slots."""
    from . import rule_words_en, rule_words_zh

    words.tables(language)
    supposed, asked = (rule_words_zh if language == "zh" else rule_words_en).RULES[name]
    found = []
    for actions, frames, key in ((supposed, SUPPOSE[language], "suppose"), (asked, FRAMES[language], "ask")):
        found += join(actions, frames, f"{language}:{name}:{key}") if actions else ()
    return tuple(found)


def phrase(wording: Wording, scene: Scene, slots: Mapping[str, str], language: str, dice: Dice | None = None) -> str:
    """The instruction in a wording, its slots filled with words."""
    return wording.pattern.format(**{name: _filled(name, value, scene, language, dice) for name, value in slots.items()})


def _filled(name: str, value: str, scene: Scene, language: str, dice: Dice | None) -> str:
    from . import rule_words_en, rule_words_zh

    zh = language == "zh"
    if name.startswith("the"):
        return words.refer(scene, int(value), language, dice)
    if name.startswith("colour"):
        return words.colour_name(value, language, dice)
    if name.startswith("kinds"):
        return words.some(value, language)
    if name.startswith("kind"):
        return words.tables(language).NOUNS[value][0]
    if name == "like":
        return words.one_of((rule_words_zh if zh else rule_words_en).LIKE[value], dice)
    return value


# ---- for the rules -------------------------------------------------------------------------------------------------------


def key(*parts: object) -> str:
    """A subject's name."""
    return "/".join(map(str, parts))


def unkey(subject: str) -> list[str]:
    """The parts of a subject's name."""
    return subject.split("/")


def any_look(kind: str, dice: Dice, *, colour: str = "", size: str = "", state: str = "") -> Look:
    """A look of a kind with what is given, the rest by dice."""
    of = KINDS[kind]
    return Look(kind, colour or dice.pick(of.colours), size or dice.pick(of.sizes), state or dice.pick(of.states))


def other(names: Sequence[str], dice: Dice, *without: str) -> str:
    """One of `names` by dice, but none of `without`."""
    return dice.pick([name for name in names if name not in without])
