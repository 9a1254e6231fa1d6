"""How a concrete edit is put into words: what is asked for, joined with a way of asking.

A wording is such a joining. `describe` writes an instruction that names its object so that no other can be meant. The
canonical wording is what a well-behaved reasoner writes: plain, and always with the place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ..errors import DataError
from . import words
from .dice import Dice
from .edits import Add, Edit, Move, Recolour, Remove, Replace, Resize, SetBackground, SetLabel, SetState, edit_kind
from .kinds import KINDS
from .splits import check_split, held_out_joinings
from .world import Look, Scene


@dataclass(frozen=True, slots=True)
class Wording:
    """pattern: a sentence with the fields of its group; split: whom it is for."""

    id: str
    pattern: str
    split: str


FRAMES: Mapping[str, tuple[str, ...]] = {
    "en": ("{V}.", "Please {v}.", "Could you {v}?", "I want you to {v}.", "Now {v}."),
    "zh": ("{v}。", "请{v}。", "能不能{v}？", "我想{v}。", "现在{v}。"),
}
"""Ways of asking. {v}: what is asked for; {V}: the same with a capital letter."""

_ACTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {
        "recolour": (
            "change the colour of {the} to {colour}", "make {the} {colour}", "paint {the} {colour}", "turn {the} {colour}",
            "give {the} the colour {colour}", "let {the} be {colour}", "recolour {the} in {colour}",
        ),
        "add": (
            "add {a} {at}", "put {a} {at}", "place {a} {at}", "draw {a} {at}", "let there be {a} {at}", "insert {a} {at}",
        ),
        "remove": (
            "remove {the}", "take {the} away", "delete {the}", "erase {the}", "get rid of {the}", "make {the} disappear",
        ),
        "replace": (
            "replace {the} with {a}", "exchange {the} for {a}", "put {a} in place of {the}", "swap {the} for {a}",
            "remove {the} and put {a} there", "let {a} take the place of {the}",
        ),
        "move": (
            "move {the} to {place}", "shift {the} to {place}", "bring {the} to {place}", "take {the} to {place}",
            "slide {the} over to {place}", "let {the} go to {place}",
        ),
        "resize": (
            "make {the} {size}", "change {the} so that it is {size}", "resize {the} so that it is {size}", "turn {the} {size}",
            "let {the} be {size}", "draw {the} {size}",
        ),
        "state": (
            "change {the} so that it is {state}", "make {the} {state}", "draw {the} so that it is {state}",
            "let {the} be {state}", "turn {the} into one that is {state}", "show {the} {state}",
        ),
        "background": (
            "change the background to {ground}", "make the background {ground}", "replace the background with {ground}",
            "use {ground} as the background", "let the background be {ground}", "turn the background into {ground}",
        ),
        "label": (
            'change the text on {the} to "{text}"', 'write "{text}" on {the}', 'make {the} say "{text}"',
            'let {the} say "{text}"', 'put "{text}" on {the}', 'replace the text on {the} with "{text}"',
        ),
    },
    "zh": {
        "recolour": (
            "把{the}的颜色改成{colour}", "把{the}变成{colour}", "把{the}涂成{colour}", "将{the}改为{colour}",
            "让{the}变成{colour}", "给{the}换上{colour}",
        ),
        "add": (
            "在{place}添加{a}", "在{place}放{a}", "在{place}画{a}", "把{a}放到{place}", "给{place}加上{a}", "让{place}多出{a}",
        ),
        "remove": ("移除{the}", "把{the}去掉", "把{the}拿走", "删除{the}", "擦掉{the}", "让{the}消失"),
        "replace": (
            "把{the}替换成{a}", "把{the}换成{a}", "用{a}代替{the}", "将{the}换为{a}", "拿走{the}换上{a}", "让{a}代替{the}",
        ),
        "move": (
            "把{the}移动到{place}", "把{the}移到{place}", "将{the}挪到{place}", "把{the}放到{place}", "让{the}去到{place}",
            "把{the}拿到{place}",
        ),
        "resize": (
            "把{the}变{size}", "让{the}变{size}", "把{the}改得{size}", "将{the}变{size}", "把{the}画得{size}",
            "让{the}变得{size}",
        ),
        "state": (
            "把{the}变成{state}", "让{the}变成{state}", "将{the}改为{state}", "把{the}画成{state}", "把{the}改成{state}",
            "让{the}变为{state}",
        ),
        "background": (
            "把背景换成{ground}", "把背景改成{ground}", "将背景改为{ground}", "让背景变成{ground}", "用{ground}代替背景",
            "给画面换上{ground}的背景",
        ),
        "label": (
            "把{the}上的字改成“{text}”", "在{the}上写“{text}”", "让{the}写着“{text}”", "将{the}上的字换成“{text}”",
            "把{the}上的字换为“{text}”", "给{the}写上“{text}”",
        ),
    },
}  # fmt: skip
"""What is asked for, by kind of edit. The first is canonical."""

_VERBS: Mapping[str, Mapping[tuple[str, str], tuple[str, ...]]] = {
    "en": {
        ("candle", "burning"): ("light {the}",), ("candle", "burnt down"): ("let {the} burn down",),
        ("flower", "open"): ("let {the} bloom",), ("flower", "wilted"): ("let {the} wilt",),
        ("balloon", "burst"): ("burst {the}",), ("balloon", "full"): ("inflate {the}",),
        ("cup", "full"): ("fill {the}",), ("cup", "empty"): ("empty {the}",),
        ("umbrella", "open"): ("open {the}",), ("umbrella", "closed"): ("close {the}",),
        ("ice cube", "puddle"): ("melt {the} into a puddle",), ("ice cube", "solid"): ("freeze {the}",),
        ("egg", "broken"): ("break {the}",), ("lamp", "on"): ("switch {the} on",), ("lamp", "off"): ("switch {the} off",),
    },
    "zh": {
        ("candle", "burning"): ("点燃{the}",), ("candle", "burnt down"): ("让{the}烧尽",),
        ("flower", "open"): ("让{the}盛开",), ("flower", "wilted"): ("让{the}枯萎",),
        ("balloon", "burst"): ("让{the}爆掉",), ("balloon", "full"): ("给{the}充满气",),
        ("cup", "full"): ("把{the}装满",), ("cup", "empty"): ("把{the}倒空",),
        ("umbrella", "open"): ("撑开{the}",), ("umbrella", "closed"): ("收起{the}",),
        ("ice cube", "puddle"): ("让{the}融化成一滩水",), ("ice cube", "solid"): ("冻住{the}",),
        ("egg", "broken"): ("打碎{the}",), ("lamp", "on"): ("打开{the}",), ("lamp", "off"): ("关掉{the}",),
    },
}  # fmt: skip
"""Verbs of a single change of state, beside the general ones."""


def frame(pattern: str, action: str) -> str:
    """An action in a way of asking."""
    return pattern.replace("{V}", action[0].upper() + action[1:]).replace("{v}", action)


def join(actions: Sequence[str], frames: Sequence[str], key: str) -> tuple[Wording, ...]:
    """All joinings of actions and ways of asking, with their splits. key: under which the split is drawn."""
    held = held_out_joinings(len(actions), len(frames), key)
    return tuple(
        Wording(f"{key}:{a}:{f}", frame(pattern, action), "held_out" if (a, f) in held else "train")
        for a, action in enumerate(actions)
        for f, pattern in enumerate(frames)
    )


@cache
def wordings(kind: str, language: str) -> tuple[Wording, ...]:
    """The wordings of a kind of edit; the first is canonical. Of the general ones in the case of `state`."""
    words.tables(language)
    return join(_ACTIONS[language][kind], FRAMES[language], f"{language}:{kind}")


@cache
def state_wordings(kind: str, state: str, language: str) -> tuple[Wording, ...]:
    """The wordings for an object of `kind` that passes into `state`: the general ones, and those of its own verb."""
    own = _VERBS[language].get((kind, state), ())
    return (*wordings("state", language), *join(own, FRAMES[language], f"{language}:{kind}:{state}"))


def wordings_of(edit: Edit, scene: Scene, language: str) -> tuple[Wording, ...]:
    """All wordings that an edit of this scene can be given in."""
    if isinstance(edit, SetState):
        return state_wordings(words.object_at(scene, edit.cell).kind, edit.state, language)
    return wordings(edit_kind(edit), language)


# ---- instructions --------------------------------------------------------------------------------------------------------


def describe(edit: Edit, scene: Scene, language: str, wording: Wording | None = None, dice: Dice | None = None) -> str:
    """An instruction for `edit` that fits the scene as it is before the edit.

    wording: one of `wordings_of`, by default the canonical one. dice: draws the words; without them the canonical ones are
    taken, and objects are named by colour, kind and place.
    """
    chosen = wording or wordings_of(edit, scene, language)[0]
    return chosen.pattern.format(**_fields(edit, scene, language, dice))


def draw_wording(edit: Edit, scene: Scene, language: str, split: str, dice: Dice) -> Wording:
    """One of the wordings of the split; an edit that has verbs of its own is often told by one."""
    check_split(split)
    fits = [each for each in wordings_of(edit, scene, language) if each.split == split]
    own = [each for each in fits if not each.id.startswith(f"{language}:{edit_kind(edit)}:")]
    return dice.pick(own if own and dice.chance(0.4) else fits)


def canonical(edits: Sequence[Edit], scene: Scene, language: str) -> tuple[str, ...]:
    """One canonical sentence an edit, all about the scene before any of them: what a faultless thought says."""
    return tuple(describe(edit, scene, language) for edit in edits)


def together(sentences: Sequence[str], language: str) -> str:
    """Sentences as running text."""
    return ("" if language == "zh" else " ").join(sentences)


def _fields(edit: Edit, scene: Scene, language: str, dice: Dice | None) -> dict[str, str]:
    match edit:
        case Add(cell, look):
            return {
                "a": words.a_look(look, language, dice),
                "at": words.at_place(cell, language, dice),
                "place": words.place_name(cell, language, dice),
            }
        case SetBackground(name):
            return {"ground": words.background_name(name, language, dice)}
    the = {"the": words.refer(scene, edit.cell, language, dice)}
    look = words.object_at(scene, edit.cell).look
    match edit:
        case Remove():
            return the
        case Recolour(_, colour):
            return {**the, "colour": words.colour_name(colour, language, dice)}
        case Replace(_, other):
            return {**the, "a": words.a_look(other, language, dice)}
        case Move(_, to):
            return {**the, "place": words.place_name(to, language, dice)}
        case Resize(_, size):
            return {**the, "size": words.one_of(words.tables(language).LARGER[size], dice)}
        case SetState(_, state):
            return {**the, "state": words.becomes(Look(look.kind, look.colour, look.size, state), language)}
        case SetLabel(_, text) if text in KINDS["sign"].states:
            return {**the, "text": text}
    raise DataError(f"{edit}: expected an edit of this world, found one that it does not have. Correct it.")
