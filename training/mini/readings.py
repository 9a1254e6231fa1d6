"""What a pretrained MLLM is taken to know of the drawn world: to look at a scene, and to read a clear instruction.

Conversations as lists of (question, answer). None of them asks what something abstract would mean, what a finished picture
would show, or how good a picture is: what stage 1 has to teach is not taught here. The exceptions, `read_meaning` and
`read_copies`, are of stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...reasonedit_core.mini import words
from ...reasonedit_core.mini.dice import Dice
from ...reasonedit_core.mini.edits import EDIT_KINDS, Edit, apply, edit_kind
from ...reasonedit_core.mini.items import Item, draw_edit
from ...reasonedit_core.mini.kinds import CELLS, MOST_OBJECTS
from ...reasonedit_core.mini.splits import split_of_scene
from ...reasonedit_core.mini.texts import caption, questions
from ...reasonedit_core.mini.wordings import canonical, describe, draw_wording
from ...reasonedit_core.mini.world import Object, Scene

Turns = list[tuple[str, str]]

_PLAINLY = {
    "en": ('Say this in plain words: "{said}"', 'Put "{said}" plainly.', "Write this as a plain instruction: {said}"),
    "zh": ("用平实的话说：“{said}”", "把“{said}”说得明白些。", "把这句话写成平实的指令：{said}"),
}
_MEANT = {
    "en": ('Which object does "{said}" speak of?', "{said} Which object is meant?"),
    "zh": ("“{said}”说的是哪个东西？", "{said}指的是哪个东西？"),
}
_CELL = {"en": ("Where is {the}?", "Which place does {the} name?"), "zh": ("{the}在哪里？", "{the}指的是哪个位置？")}
_CHANGE = {
    "en": ('What kind of change is "{said}"?', "{said} What kind of change is that?"),
    "zh": ("“{said}”是哪一种修改？", "{said}这是哪一种修改？"),
}
_KINDS = {
    "en": {
        "recolour": "Another colour.", "add": "A new object.", "remove": "An object less.", "replace": "Another object.",
        "move": "Another place.", "resize": "Another size.", "state": "Another state.", "background": "Another background.",
        "label": "Another text.",
    },
    "zh": {
        "recolour": "换颜色。", "add": "多一个东西。", "remove": "少一个东西。", "replace": "换成别的东西。",
        "move": "换位置。", "resize": "换大小。", "state": "换状态。", "background": "换背景。", "label": "换文字。",
    },
}  # fmt: skip
_MEANING = {
    "en": ('What does "{said}" ask for here?', "{said} What is to be done?"),
    "zh": ("“{said}”在这里要求做什么？", "{said}要怎么做？"),
}
_COPY = {
    "en": ('Say this again word for word: "{said}"', "Copy: {said}", '"{said}" Repeat that.'),
    "zh": ("一字不差地重复：“{said}”", "照抄：{said}", "“{said}”请重复一遍。"),
}
_ALL = {
    "en": ("Describe the picture.", "What do you see?", "What is there in the picture?"),
    "zh": ("请描述这幅画。", "你看到了什么？", "画面里有什么？"),
}
_CELLS = {
    "en": ("Go through the places one by one.", "Name what is in each place, row by row."),
    "zh": ("请一格一格地说。", "请逐行说出每个位置有什么。"),
}
_TEXT = {"en": ("{text} {question}", "A picture: {text} {question}"), "zh": ("{text}{question}", "有一幅画：{text}{question}")}


def read_scene(scene: Scene, language: str, dice: Dice) -> Turns:
    """A description of a scene in canonical words, and questions about it."""
    turns = [(dice.pick(_ALL[language]), caption(scene, language))]
    asked = [pair for pair in questions(scene, language, dice, 4) if pair[1] != turns[0][1]]
    return turns + asked[:3] if dice.chance(0.5) else asked + turns


def read_cells(scene: Scene, language: str, dice: Dice) -> Turns:
    """What is in each of the nine places, row by row, and a question or two. To find a place is what is learnt last; told in
    the order in which the picture is seen, it is learnt first."""
    zh = language == "zh"
    said = []
    for cell in CELLS:
        look, place = scene.look(cell), words.place_name(cell, language)
        there = words.name_look(look, language) if look else ("空" if zh else "empty")
        said.append(f"{place}：{there}" if zh else f"{place}: {there}")
    told = "；".join(said) + "。" if zh else "; ".join(said)[:1].upper() + "; ".join(said)[1:] + "."
    return [(dice.pick(_CELLS[language]), told), *questions(scene, language, dice, 2)]


def read_text(scene: Scene, language: str, dice: Dice) -> Turns:
    """Questions about a scene that is told and not shown."""
    told = caption(scene, language, dice)
    turns = [pair for pair in questions(scene, language, dice, 4) if pair[1] != caption(scene, language)][:3]
    first, answer = turns[0]
    return [(dice.pick(_TEXT[language]).format(text=told, question=first), answer), *turns[1:]]


def read_instructions(scene: Scene, language: str, dice: Dice, number: int = 3) -> Turns:
    """Clear instructions about a scene: which object each speaks of and where it is, what kind of change it is, and the same
    in plain words. Empty where nothing can be changed."""
    turns: Turns = []
    for edit in _some_edits(scene, dice, number):
        said = describe(edit, scene, language, draw_wording(edit, scene, language, "train", dice), dice)
        turns.append((dice.pick(_PLAINLY[language]).format(said=said), canonical([edit], scene, language)[0]))
        one = scene.at(edit.cell) if hasattr(edit, "cell") else None
        if one is not None:
            where = words.at_place(one.cell, language)
            turns.append((dice.pick(_MEANT[language]).format(said=said), _object_at(one, language)))
            the = words.refer(scene, one.cell, language, dice, among=("kind", "colour", "size", "state"))
            turns.append((dice.pick(_CELL[language]).format(the=the), _sentence(where, language)))
        if dice.chance(0.3):
            turns.append((dice.pick(_CHANGE[language]).format(said=said), _KINDS[language][edit_kind(edit)]))
    return list(dict(dice.sample(turns, min(len(turns), 5))).items())


def read_places(scene: Scene, language: str, dice: Dice) -> Turns:
    """Where each object is that can be named without its place, and two questions more. To go from what a thing looks like to
    where it is, in one word, is harder than to tell all places in turn, and it is what every instruction asks for."""
    turns: Turns = []
    for one in dice.sample(scene.objects, len(scene.objects)):
        if words.forms(scene, one.cell) != ("place", "full"):
            the = words.refer(scene, one.cell, language, dice, among=("kind", "colour", "size", "state"))
            turns.append((dice.pick(_CELL[language]).format(the=the), _sentence(words.at_place(one.cell, language), language)))
    return list(dict([*turns, *questions(scene, language, dice, 2)]).items())


def read_meant(scene: Scene, language: str, dice: Dice, number: int = 3) -> Turns:
    """Which object each of some clear instructions speaks of. Empty where nothing can be changed."""
    turns: Turns = []
    for edit in _some_edits(scene, dice, number):
        one = scene.at(edit.cell) if hasattr(edit, "cell") else None
        if one is not None:
            said = describe(edit, scene, language, draw_wording(edit, scene, language, "train", dice), dice)
            turns.append((dice.pick(_MEANT[language]).format(said=said), _object_at(one, language)))
    return list(dict(turns).items())


def read_meaning(item: Item, dice: Dice) -> tuple[str, str]:
    """What an abstract instruction means, in the words of a thought. In the thinker's own prompt of 480 tokens a thought has
    13: the rules of the world are learnt from six times as many of these, and where to say them from that prompt."""
    return dice.pick(_MEANING[item.language]).format(said=item.instruction), item.concrete


def read_copies(item: Item, dice: Dice) -> Turns:
    """A clear instruction said again, and asked for its meaning, which it says itself. What was pretrained can copy; this MLLM
    writes other things of the same kind (0 of 40 thoughts about clear instructions were copies)."""
    copied = dice.pick(_COPY[item.language]).format(said=item.instruction), item.instruction
    return [copied, read_meaning(item, dice)] if dice.chance(0.5) else [read_meaning(item, dice)]


def _some_edits(scene: Scene, dice: Dice, number: int) -> Sequence[Edit]:
    """Edits that the scene allows and that stay in the training split."""
    found: list[Edit] = []
    for kind in dice.sample(EDIT_KINDS, len(EDIT_KINDS)):
        edit = draw_edit(scene, kind, dice)
        if edit is None or kind == "add" and len(scene.objects) >= MOST_OBJECTS:
            continue
        if split_of_scene(apply(scene, [edit])) == "train":
            found.append(edit)
        if len(found) >= number:
            break
    return found


def _object_at(one: Object, language: str) -> str:
    where, look = words.at_place(one.cell, language), words.name_look(one.look, language)
    return f"{where}的{look}。" if language == "zh" else f"The {look} {where}."


def _sentence(text: str, language: str) -> str:
    return f"{text}。" if language == "zh" else f"{text[:1].upper()}{text[1:]}."
