"""How things are called in English and Chinese: looks, places, and an object of a scene so that no other can be meant.

Without dice the canonical words are taken, with dice one of their synonyms.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from ..errors import DataError
from . import words_en, words_zh
from .dice import Dice
from .kinds import KINDS
from .world import Look, Object, Scene

LANGUAGES = ("en", "zh")
PARTS = ("size", "colour", "state")
FORMS = ("place", "kind", "colour", "size", "state", "full")
"""Ways to refer to an object: by its place alone; by its kind, with its colour, size or state; by colour, kind and place."""


def tables(language: str) -> ModuleType:
    """The names of one language. DataError for another than `LANGUAGES`."""
    if language not in LANGUAGES:
        raise DataError(f"language: expected one of {', '.join(LANGUAGES)}, found {language!r}. Choose one of them.")
    return words_zh if language == "zh" else words_en


def one_of(names: Sequence[str], dice: Dice | None) -> str:
    """The canonical name, or one of them by dice."""
    return names[0] if dice is None else dice.pick(names)


def colour_name(colour: str, language: str, dice: Dice | None = None) -> str:
    """A colour."""
    return one_of(tables(language).COLOURS[colour], dice)


def background_name(name: str, language: str, dice: Dice | None = None) -> str:
    """A background, as what follows "change the background to"."""
    return one_of(tables(language).BACKGROUNDS[name], dice)


def place_name(cell: int, language: str, dice: Dice | None = None) -> str:
    """A cell: "the top left"."""
    return one_of(tables(language).PLACES[cell], dice)


def at_place(cell: int, language: str, dice: Dice | None = None) -> str:
    """Where a cell is: "in the top left"."""
    name = place_name(cell, language, dice)
    return name if language == "zh" else f"in {name}"


def becomes(look: Look, language: str) -> str:
    """What is said of an object after "so that it is" when it passes into this state."""
    return tables(language).BECOMES[look.kind, look.state]


def name_look(look: Look, language: str, dice: Dice | None = None, *, parts: Sequence[str] = PARTS) -> str:
    """A look without article: kind, and of size, colour and state those named in `parts`, where its kind has them."""
    words = tables(language)
    noun = one_of(words.NOUNS[look.kind], dice)
    kind = KINDS[look.kind]
    size = one_of(words.SIZES[look.size], dice) if "size" in parts and kind.sized else ""
    colour = one_of(words.COLOURS[look.colour], dice) if "colour" in parts and look.colour else ""
    if look.kind == "sign" and "state" in parts:
        return f"写着“{look.state}”的{noun}" if language == "zh" else f'{noun} saying "{look.state}"'
    own_noun = (look.kind, look.state) == ("ice cube", "puddle")  # water on the ground is not called ice
    stated = own_noun or ("state" in parts and look.state)
    pattern = one_of(words.STATES[look.kind, look.state], dice) if stated else ""
    if language == "zh":
        return (pattern or "{c}{s}{n}").format(c=colour, s=size, n=noun)
    return (pattern or "{q}{n}").format(q="".join(f"{word} " for word in (size, colour) if word), n=noun)


def a_look(look: Look, language: str, dice: Dice | None = None) -> str:
    """A look in full, with its article or measure word: "a large red circle"."""
    name = name_look(look, language, dice)
    if language == "zh":
        return f"一{words_zh.MEASURES.get(look.kind, '个')}{name}"
    return f"{'an' if name[0] in 'aeio' or name.startswith(('um', 'unl')) else 'a'} {name}"


def some(kind: str, language: str) -> str:
    """The objects of a kind in general: "circles"."""
    return words_zh.NOUNS[kind][0] if language == "zh" else words_en.PLURALS[kind]


# ---- which object is meant -----------------------------------------------------------------------------------------------


def object_at(scene: Scene, cell: int) -> Object:
    """The object in a cell. DataError when there is none."""
    found = scene.at(cell)
    if found is None:
        raise DataError(f"cell {cell}: expected an object, found none in {scene}. Name another cell.")
    return found


def forms(scene: Scene, cell: int) -> tuple[str, ...]:
    """The `FORMS` by which exactly the object in `cell` is meant, in this scene."""
    found = object_at(scene, cell)
    alike = scene.of(found.kind)
    fits = ["place"]
    if len(alike) == 1:
        fits.append("kind")
    if found.colour and [each.colour for each in alike].count(found.colour) == 1:
        fits.append("colour")
    if len(alike) > 1 and [each.size for each in alike].count(found.size) == 1:
        fits.append("size")
    if found.state and [each.state for each in alike].count(found.state) == 1:
        fits.append("state")
    return (*fits, "full")


def refer(scene: Scene, cell: int, language: str, dice: Dice | None = None, *, among: Sequence[str] = FORMS) -> str:
    """The object in `cell`, with its article, so that no other of the scene can be meant.

    Without dice: colour, kind and place. With dice: one of the forms `among` that are unique, with synonyms; by colour, kind
    and place where none of them is.
    """
    found = object_at(scene, cell)
    fits = [form for form in forms(scene, cell) if form in among]
    form = "full" if dice is None or not fits else dice.pick(fits)
    return _referred(found, form, language, dice)


def _referred(found: Object, form: str, language: str, dice: Dice | None) -> str:
    zh = language == "zh"
    where = at_place(found.cell, language, dice)
    if form == "place":
        thing = one_of(("东西", "物体") if zh else ("object", "thing"), dice)
        return f"{where}的{thing}" if zh else f"the {thing} {where}"
    parts = {"kind": (), "full": ("colour",)}.get(form, (form,))
    name = name_look(found.look, language, dice, parts=parts)
    if form == "full":
        return f"{where}的{name}" if zh else f"the {name} {where}"
    return name if zh else f"the {name}"
