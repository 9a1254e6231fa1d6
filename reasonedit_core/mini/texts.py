"""True sentences about scenes: captions, questions with their answers, and the description of a wanted picture.

Every description is a list of claims, one sentence each, that can be checked one by one against a picture.
"""

from __future__ import annotations

from collections.abc import Callable

from . import words
from .dice import Dice
from .kinds import CELLS, KINDS
from .wordings import together
from .world import Object, Scene

_GROUND = {
    "en": ("The background is {ground}.", "Behind everything is {ground}.", "It is set against {ground}."),
    "zh": ("背景是{ground}。", "后面是{ground}。", "画面的背景是{ground}。"),
}
_THERE = {
    "en": ("{A} is {at}.", "There is {a} {at}.", "{At} there is {a}."),
    "zh": ("{at}是{a}。", "{at}有{a}。", "在{at}有{a}。"),
}
_BARE = {"en": "{The} is empty.", "zh": "{the}是空的。"}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def ground_claim(scene: Scene, language: str, dice: Dice | None = None) -> str:
    """What the background is."""
    return words.one_of(_GROUND[language], dice).format(ground=words.background_name(scene.background, language, dice))


def object_claim(found: Object, language: str, dice: Dice | None = None) -> str:
    """What an object is, in full, and where."""
    a, at = words.a_look(found.look, language, dice), words.at_place(found.cell, language, dice)
    return words.one_of(_THERE[language], dice).format(a=a, A=_capital(a), at=at, At=_capital(at))


def empty_claim(cell: int, language: str) -> str:
    """That there is nothing in a cell."""
    the = words.place_name(cell, language)
    return _BARE[language].format(the=the, The=_capital(the))


def caption(scene: Scene, language: str, dice: Dice | None = None) -> str:
    """All that a scene holds: the background, then each object. Without dice in canonical words, by rows."""
    words.tables(language)
    objects = scene.objects if dice is None else dice.shuffle(scene.objects)
    claims = [ground_claim(scene, language, dice), *(object_claim(each, language, dice) for each in objects)]
    if not scene.objects:
        claims.append("上面什么都没有。" if language == "zh" else "Nothing is on it.")
    return together(claims, language)


def target_description(source: Scene, target: Scene, language: str) -> str:
    """What the picture ought to show once `source` has become `target`; no other picture need be seen to check it.

    It begins with what changes (a background, then cells by rows, an emptied one as empty) and goes on with the rest.
    """
    words.tables(language)
    changed = [cell for cell in CELLS if source.look(cell) != target.look(cell)]
    ground = ground_claim(target, language)
    new = [ground] if source.background != target.background else []
    for cell in changed:
        found = target.at(cell)
        new.append(object_claim(found, language) if found else empty_claim(cell, language))
    old = [object_claim(each, language) for each in target.objects if each.cell not in changed]
    return together([*new, *old, *([ground] if ground not in new else [])], language)


# ---- questions -----------------------------------------------------------------------------------------------------------


def questions(scene: Scene, language: str, dice: Dice, number: int = 3) -> list[tuple[str, str]]:
    """Up to `number` different questions about a scene with their answers, which a look at it decides."""
    words.tables(language)
    found: dict[str, str] = {}
    for ask in dice.sample(_QUESTIONS, len(_QUESTIONS)):
        pair = ask(scene, language, dice)
        if pair is not None:
            found.setdefault(*pair)
        if len(found) >= number:
            break
    return list(found.items())


def _say(language: str, en: str, zh: str) -> str:
    return zh if language == "zh" else en


def _full(name: str, language: str) -> str:
    """A name as an answer."""
    return f"{name}。" if language == "zh" else f"{_capital(name)}."


def _pick(scene: Scene, dice: Dice, fits: Callable[[Object], bool]) -> Object | None:
    able = [each for each in scene.objects if fits(each)]
    return dice.pick(able) if able else None


def _ask_colour(scene: Scene, language: str, dice: Dice) -> tuple[str, str] | None:
    one = _pick(scene, dice, lambda each: bool(each.colour))
    if one is None:
        return None
    the = words.refer(scene, one.cell, language, dice, among=("place", "kind", "size", "state"))
    question = _say(language, f"What colour is {the}?", f"{the}是什么颜色？")
    return question, _full(words.colour_name(one.colour, language), language)


def _ask_place(scene: Scene, language: str, dice: Dice) -> tuple[str, str] | None:
    one = _pick(scene, dice, lambda each: words.forms(scene, each.cell) != ("place", "full"))
    if one is None:
        return None
    the = words.refer(scene, one.cell, language, dice, among=("kind", "colour", "size", "state"))
    answer = _full(words.at_place(one.cell, language), language)
    return _say(language, f"Where is {the}?", f"{the}在哪里？"), answer


def _ask_what(scene: Scene, language: str, dice: Dice) -> tuple[str, str]:
    cell = dice.pick(CELLS) if dice.chance(0.3) or not scene.objects else dice.pick(scene.objects).cell
    look = scene.look(cell)
    where = words.at_place(cell, language, dice)
    answer = words.a_look(look, language) if look else _say(language, "nothing", "什么都没有")
    return _say(language, f"What is {where}?", f"{where}是什么？"), _full(answer, language)


def _ask_count(scene: Scene, language: str, dice: Dice) -> tuple[str, str]:
    kind = dice.pick(scene.objects).kind if scene.objects and dice.chance(0.5) else None
    number = len(scene.of(kind)) if kind else len(scene.objects)
    name = words.some(kind, language) if kind else _say(language, "objects", "东西")
    return _say(language, f"How many {name} are there?", f"有几个{name}？"), _full(str(number), language)


def _ask_there(scene: Scene, language: str, dice: Dice) -> tuple[str, str]:
    kind = dice.pick(scene.objects).kind if scene.objects and dice.chance(0.5) else dice.pick(tuple(KINDS))
    name = words.one_of(words.tables(language).NOUNS[kind], dice)
    article = "an" if name[0] in "aeiou" else "a"
    question = _say(language, f"Is there {article} {name}?", f"有没有{name}？")
    return question, _full(_say(language, "yes", "有") if scene.of(kind) else _say(language, "no", "没有"), language)


def _ask_state(scene: Scene, language: str, dice: Dice) -> tuple[str, str] | None:
    one = _pick(scene, dice, lambda each: bool(each.state) and each.kind != "sign")
    if one is None:
        return None
    the = words.refer(scene, one.cell, language, dice, among=("place",))
    return _say(language, f"What state is {the} in?", f"{the}是什么状态？"), _full(words.becomes(one.look, language), language)


def _ask_size(scene: Scene, language: str, dice: Dice) -> tuple[str, str] | None:
    one = _pick(scene, dice, lambda each: KINDS[each.kind].sized)
    if one is None:
        return None
    the = words.refer(scene, one.cell, language, dice, among=("place", "colour", "kind"))
    size = words.tables(language).SIZES[one.size][0]
    return _say(language, f"How large is {the}?", f"{the}是大还是小？"), _full(size, language)


def _ask_text(scene: Scene, language: str, dice: Dice) -> tuple[str, str] | None:
    if scene.label is None:
        return None
    return _say(language, "What does the sign say?", "牌子上写着什么？"), _full(f'"{scene.label}"', language)


def _ask_ground(scene: Scene, language: str, dice: Dice) -> tuple[str, str]:
    answer = _full(words.background_name(scene.background, language), language)
    return _say(language, "What is the background?", "背景是什么？"), answer


def _ask_all(scene: Scene, language: str, dice: Dice) -> tuple[str, str]:
    question = dice.pick(_say(language, "Describe the picture.|What do you see?", "请描述这幅画。|你看到了什么？").split("|"))
    return question, caption(scene, language)


_QUESTIONS = (
    _ask_colour, _ask_place, _ask_what, _ask_count, _ask_there, _ask_state, _ask_size, _ask_text, _ask_ground, _ask_all,
)  # fmt: skip
