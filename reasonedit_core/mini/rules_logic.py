"""Rules about colours, sizes, places and counts: what has to be compared, worked out or known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

from .dice import Dice
from .edits import Edit, Move, Recolour, Remove, Resize, SetLabel, SetState
from .kinds import COLOURS, KINDS, SHAPES, SIZES, TEXTS
from .rules import Rule, Setting, any_look, key, other, unkey
from .world import Look, Scene

_RAINBOW = tuple(COLOURS)
_OPPOSITE = {"red": "green", "green": "red", "blue": "orange", "orange": "blue", "yellow": "purple", "purple": "yellow"}
_MIXED = {"orange": ("red", "yellow"), "green": ("blue", "yellow"), "purple": ("red", "blue")}
_ANGULAR = ("square", "triangle", "star")
_PAINTED = (*SHAPES, "car", "balloon", "cup", "umbrella")
"""Kinds whose colour a riddle may be about."""

_NOT_SHAPES = frozenset(KINDS) - set(SHAPES)
_KINDS_AND_COLOURS = tuple(key(kind, colour) for kind in _PAINTED for colour in _RAINBOW)
Slots = Mapping[str, str]


# ---- one object, named in the instruction --------------------------------------------------------------------------------


def _stage_named(subject: str, dice: Dice) -> Setting:
    """An object of the kind and colour, somewhere; the item names it."""
    kind, colour = unkey(subject)
    return Setting(((None, any_look(kind, dice, colour=colour)),), slots={"the": "0"})


def _stage_painted(subject: str, dice: Dice) -> Setting:
    """An object of the kind in another colour than the subject's, which it is to get."""
    kind, colour = unkey(subject)
    look = any_look(kind, dice, colour=other(_RAINBOW, dice, colour))
    slots = {"the": "0", "like": colour}
    if colour in _MIXED:
        first, second = dice.shuffle(_MIXED[colour])
        slots |= {"colour_a": first, "colour_b": second}
    return Setting(((None, look),), slots=slots)


def _paint(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    return _recoloured(scene, int(slots["the"]), slots["like"])


def _recoloured(scene: Scene, cell: int, colour: str) -> tuple[Edit, ...]:
    found = scene.at(cell)
    return (Recolour(cell, colour),) if found and found.colour not in ("", colour) else ()


def _opposite(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    found = scene.at(int(slots["the"]))
    return (Recolour(found.cell, _OPPOSITE[found.colour]),) if found and found.colour else ()


def _next_colour(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    found = scene.at(int(slots["the"]))
    if found is None or found.colour in ("", _RAINBOW[-1]):
        return ()
    return (Recolour(found.cell, _RAINBOW[_RAINBOW.index(found.colour) + 1]),)


def _moved(scene: Scene, slots: Slots, to: int) -> tuple[Edit, ...]:
    cell = int(slots["the"])
    return (Move(cell, to),) if scene.at(cell) and to != cell and scene.at(to) is None else ()


def _mirror(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    row, column = divmod(int(slots["the"]), 3)
    return _moved(scene, slots, row * 3 + 2 - column)


def _centre(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    return _moved(scene, slots, 4)


def _across(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    cell = int(slots["the"])
    return _moved(scene, slots, 8 - cell) if cell in (0, 2, 6, 8) else ()


def _alone(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    return tuple(Remove(each.cell) for each in scene.objects if each.cell != int(slots["the"]))


def _named(
    name: str,
    category: str,
    knowledge: str,
    act: Callable[[Scene, Slots], tuple[Edit, ...]],
    cells: Sequence[int | None] = (None,),
) -> Rule:
    """A rule about one object that the instruction names, in one of `cells`."""

    def stage(subject: str, dice: Dice) -> Setting:
        setting = _stage_named(subject, dice)
        return Setting(((dice.pick(cells), setting.objects[0][1]),), slots=setting.slots)

    subjects = _KINDS_AND_COLOURS
    if act is _next_colour:
        subjects = tuple(each for each in subjects if unkey(each)[1] != _RAINBOW[-1])
    return Rule(name, category, knowledge, subjects, stage, act)


# ---- several shapes ------------------------------------------------------------------------------------------------------


def _stage_like_largest(subject: str, dice: Dice) -> Setting:
    """One or two of a kind, and a large and a small one of another kind whose colour counts."""
    a, b = unkey(subject)
    colour = dice.pick(_RAINBOW)
    many = [any_look(a, dice, colour=other(_RAINBOW, dice, colour)) for _ in range(dice.pick((1, 2)))]
    large = Look(b, colour, "large")
    small = Look(b, other(_RAINBOW, dice, colour), "small")
    return Setting(tuple((None, look) for look in (*many, large, small)), slots={"kinds_a": a, "kind_b": b})


def _like_largest(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    large = [each for each in scene.of(slots["kind_b"]) if each.size == "large"]
    if len(large) != 1:
        return ()
    colour = large[0].colour
    return tuple(Recolour(each.cell, colour) for each in scene.of(slots["kinds_a"]) if each.colour != colour)


def _stage_odd_colour(subject: str, dice: Dice) -> Setting:
    kind, colour = unkey(subject)
    odd = Look(kind, other(_RAINBOW, dice, colour), size := dice.pick(SIZES))
    return Setting(((None, odd), (None, same := Look(kind, colour, size)), (None, same)))


def _odd_colour(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    odd = _odd_one(scene, [(each.cell, each.kind, each.colour) for each in scene.objects])
    return (Recolour(*odd),) if odd else ()


def _stage_odd_size(subject: str, dice: Dice) -> Setting:
    kind, colour, size = unkey(subject)
    odd = Look(kind, colour, other(SIZES, dice, size))
    return Setting(((None, odd), (None, same := Look(kind, colour, size)), (None, same)))


def _odd_size(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    odd = _odd_one(scene, [(each.cell, each.kind, each.size) for each in scene.objects])
    return (Resize(*odd),) if odd else ()


def _odd_one(scene: Scene, traits: Sequence[tuple[int, str, str]]) -> tuple[int, str] | None:
    """Of three of a kind, the cell of the one that differs from the other two, and what these have."""
    for shape in SHAPES:
        three = [(cell, trait) for cell, kind, trait in traits if kind == shape]
        for cell, trait in three:
            rest = [each for at, each in three if at != cell]
            if len(rest) == 2 and rest[0] == rest[1] != trait:
                return cell, rest[0]
    return None


def _stage_two(subject: str, dice: Dice) -> Setting:
    """Two objects of different kinds that differ in colour and size."""
    a, b = unkey(subject)
    colour, size = dice.pick(_RAINBOW), dice.pick(SIZES)
    first, second = Look(a, colour, size), Look(b, other(_RAINBOW, dice, colour), other(SIZES, dice, size))
    return Setting(((None, first), (None, second)), slots={"the_a": "0", "the_b": "1"})


def _swap_colours(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    a, b = (scene.at(int(slots[name])) for name in ("the_a", "the_b"))
    return (Recolour(a.cell, b.colour), Recolour(b.cell, a.colour)) if a and b and a.colour != b.colour else ()


def _swap_sizes(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    a, b = (scene.at(int(slots[name])) for name in ("the_a", "the_b"))
    return (Resize(a.cell, b.size), Resize(b.cell, a.size)) if a and b and a.size != b.size else ()


def _stage_corners(subject: str, dice: Dice) -> Setting:
    kind, colour = unkey(subject)
    rounds = [any_look(dice.pick(("circle", "heart")), dice) for _ in range(dice.pick((1, 2)))]
    return Setting(tuple((None, look) for look in (any_look(kind, dice, colour=colour), *rounds)))


def _corners(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    return tuple(Remove(each.cell) for each in scene.objects if each.kind in _ANGULAR)


def _stage_growing(subject: str, dice: Dice) -> Setting:
    kind, colour = unkey(subject)
    plant = any_look(dice.pick(("tree", "flower", "leaf")), dice)
    return Setting(((None, plant), (None, any_look(kind, dice, colour=colour))))


def _growing(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    return tuple(Remove(each.cell) for each in scene.objects if each.kind not in ("tree", "flower", "leaf"))


def _stage_more(subject: str, dice: Dice) -> Setting:
    """Two of a kind and one of another, or one and one, and a third kind with which something is to happen."""
    a, b = unkey(subject)
    third = other(SHAPES, dice, a, b)
    colour = dice.pick(_RAINBOW)
    many = [any_look(a, dice) for _ in range(dice.pick((1, 2)))]
    looks = (any_look(third, dice, colour=other(_RAINBOW, dice, colour)), *many, any_look(b, dice))
    slots = {"kinds_a": a, "kinds_b": b, "the": "0", "colour_c": colour}
    return Setting(tuple((None, look) for look in looks), slots=slots)


def _more(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    """More of a than of b: the object goes; else it gets the colour."""
    cell = int(slots["the"])
    if len(scene.of(slots["kinds_a"])) > len(scene.of(slots["kinds_b"])):
        return (Remove(cell),)
    return _recoloured(scene, cell, slots["colour_c"])


# ---- signs ---------------------------------------------------------------------------------------------------------------


def _stage_count(subject: str, dice: Dice) -> Setting:
    kind, number = unkey(subject)
    sign = Look("sign", "", "large", other(TEXTS, dice, number))
    counted = [any_look(kind, dice) for _ in range(int(number))]
    return Setting(tuple((None, look) for look in (sign, *counted)), slots={"kinds_a": kind})


def _count(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    return _label(scene, str(len(scene.of(slots["kinds_a"]))))


def _stage_sum(subject: str, dice: Dice) -> Setting:
    a, b = unkey(subject)
    sign = Look("sign", "", "large", other(TEXTS, dice, str(int(a) + int(b))))
    return Setting(((None, sign),), slots={"a": a, "b": b})


def _sum(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    return _label(scene, str(int(slots["a"]) + int(slots["b"])))


def _label(scene: Scene, text: str) -> tuple[Edit, ...]:
    found = scene.of("sign")
    return (SetLabel(found[0].cell, text),) if len(found) == 1 and found[0].state != text and text in TEXTS else ()


# ---- weight --------------------------------------------------------------------------------------------------------------


def _fall(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    """Shapes one a column, so that nothing lands on another."""
    if len({each.cell % 3 for each in scene.objects}) < len(scene.objects):
        return ()
    return tuple(Move(each.cell, 6 + each.cell % 3) for each in scene.objects if each.cell < 6 and each.kind in SHAPES)


def _stage_fall(subject: str, dice: Dice) -> Setting:
    kind, colour = unkey(subject)
    columns = dice.shuffle(range(3))
    first = (columns[0] + 3 * dice.below(2), any_look(kind, dice, colour=colour))
    more = [(column + 3 * dice.below(3), any_look(dice.pick(SHAPES), dice)) for column in columns[1 : 1 + dice.below(3)]]
    return Setting((first, *more))


def _stage_seesaw(subject: str, dice: Dice) -> Setting:
    heavy, side = unkey(subject)
    cell = 3 * dice.below(3) + 1
    weights = [Look(heavy, dice.pick(_RAINBOW), "large"), any_look(dice.pick(SHAPES), dice, size="small")]
    seats = (cell - 1, cell + 1) if side == "left" else (cell + 1, cell - 1)
    saw = Look("seesaw", "", "large", other(KINDS["seesaw"].states, dice, side))
    return Setting(((cell, saw), *zip(seats, weights, strict=True)))


def _tip(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    """The side of the larger of the two neighbours goes down."""
    found = scene.of("seesaw")
    if len(found) != 1 or found[0].cell % 3 != 1:
        return ()
    left, right = (scene.at(found[0].cell + step) for step in (-1, 1))
    if left is None or right is None or left.size == right.size:
        return ()
    side = "left" if left.size == "large" else "right"
    return (SetState(found[0].cell, side),) if found[0].state != side else ()


def _stage_heavier(subject: str, dice: Dice) -> Setting:
    heavy, light = unkey(subject)
    cell = 3 * dice.below(3) + 1
    rest = dice.sample([at for at in range(9) if at // 3 != cell // 3], 2)
    looks = (any_look(heavy, dice, size="large"), any_look(light, dice, size="small"))
    saw = Look("seesaw", "", "large", dice.pick(("level", "right")))
    return Setting(((cell, saw), *zip(rest, looks, strict=True)))


def _heavier_left(scene: Scene, slots: Slots) -> tuple[Edit, ...]:
    """The larger of two shapes goes to the left seat, the smaller to the right one, and the seesaw tips."""
    saw, shapes = scene.of("seesaw"), [each for each in scene.objects if each.kind in SHAPES]
    if len(saw) != 1 or saw[0].cell % 3 != 1 or sorted(each.size for each in shapes) != ["large", "small"]:
        return ()
    cell, (heavy, light) = saw[0].cell, sorted(shapes, key=lambda each: each.size)
    if scene.at(cell - 1) or scene.at(cell + 1) or saw[0].state == "left":
        return ()
    return (Move(heavy.cell, cell - 1), Move(light.cell, cell + 1), SetState(cell, "left"))


_TWO = tuple(key(a, b) for a, b in permutations(SHAPES, 2))
_SHAPES_AND_COLOURS = tuple(key(kind, colour) for kind in SHAPES for colour in _RAINBOW)
_MIXES = tuple(key(kind, colour) for kind in _PAINTED for colour in _MIXED)
_SUMS = tuple(key(a, b) for a in range(1, 6) for b in range(1, 5))
_ALL = frozenset(KINDS)

RULES: tuple[Rule, ...] = (
    Rule("likeness", "story", "conceptual", _KINDS_AND_COLOURS, _stage_painted, _paint),
    Rule("mixture", "physical", "conceptual", _MIXES, _stage_painted, _paint),
    _named("opposite_colour", "physical", "conceptual", _opposite),
    _named("next_colour", "story", "procedural", _next_colour),
    _named("mirror", "physical", "factual", _mirror, (0, 2, 3, 5, 6, 8)),
    _named("centre", "story", "factual", _centre, (0, 1, 2, 3, 5, 6, 7, 8)),
    _named("across", "physical", "factual", _across, (0, 2, 6, 8)),
    _named("alone", "story", "procedural", _alone),
    Rule("like_largest", "story", "procedural", _TWO, _stage_like_largest, _like_largest, frozenset(SHAPES)),
    Rule("odd_colour", "story", "factual", _SHAPES_AND_COLOURS, _stage_odd_colour, _odd_colour, frozenset(SHAPES)),
    Rule(
        "odd_size", "physical", "factual", tuple(key(each, size) for each in _SHAPES_AND_COLOURS for size in SIZES),
        _stage_odd_size, _odd_size, frozenset(SHAPES),
    ),
    Rule("swap_colours", "story", "procedural", _TWO, _stage_two, _swap_colours, frozenset(SHAPES)),
    Rule("swap_sizes", "physical", "procedural", _TWO, _stage_two, _swap_sizes, frozenset(SHAPES)),
    Rule(
        "corners", "physical", "procedural", tuple(key(kind, colour) for kind in _ANGULAR for colour in _RAINBOW),
        _stage_corners, _corners, _NOT_SHAPES,
    ),
    Rule("growing", "story", "conceptual", _KINDS_AND_COLOURS, _stage_growing, _growing, frozenset({"egg"})),
    Rule("more_than", "causal", "procedural", _TWO, _stage_more, _more, frozenset(SHAPES)),
    Rule(
        "count", "story", "factual", tuple(key(kind, number) for kind in SHAPES for number in (1, 2, 3)),
        _stage_count, _count, frozenset({*SHAPES, "sign"}),
    ),
    Rule("sum", "story", "procedural", _SUMS, _stage_sum, _sum, frozenset({"sign"})),
    Rule("gravity", "physical", "conceptual", _SHAPES_AND_COLOURS, _stage_fall, _fall, _ALL),
    Rule(
        "seesaw_tips", "physical", "conceptual", tuple(key(kind, side) for kind in SHAPES for side in ("left", "right")),
        _stage_seesaw, _tip, frozenset({"seesaw"}),
    ),
    Rule(
        "heavier_left", "causal", "procedural", tuple(key(a, b) for a in SHAPES for b in SHAPES),
        _stage_heavier, _heavier_left, frozenset({*SHAPES, "seesaw"}),
    ),
)  # fmt: skip
