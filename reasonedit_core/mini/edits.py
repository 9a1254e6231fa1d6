"""Concrete edits: values that turn one scene into another and keep all that they do not name.

An edit names its object by the cell. `apply` makes edits, `possible` lists those that a scene allows, and `edits_between`
finds the fewest that lead from one scene to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import DataError
from .kinds import BACKGROUNDS, KINDS, MOST_OBJECTS
from .world import LOOKS, Look, Object, Scene


@dataclass(frozen=True, slots=True)
class Recolour:
    """The object in `cell` gets `colour`."""

    cell: int
    colour: str


@dataclass(frozen=True, slots=True)
class Add:
    """`look` comes into `cell`, which is empty."""

    cell: int
    look: Look


@dataclass(frozen=True, slots=True)
class Remove:
    """The object in `cell` goes."""

    cell: int


@dataclass(frozen=True, slots=True)
class Replace:
    """An object of another kind, `look`, takes the place of the one in `cell`."""

    cell: int
    look: Look


@dataclass(frozen=True, slots=True)
class Move:
    """The object in `cell` goes to the empty cell `to`."""

    cell: int
    to: int


@dataclass(frozen=True, slots=True)
class Resize:
    """The object in `cell` becomes `size`."""

    cell: int
    size: str


@dataclass(frozen=True, slots=True)
class SetState:
    """The object in `cell` passes into `state`."""

    cell: int
    state: str


@dataclass(frozen=True, slots=True)
class SetBackground:
    """The background becomes `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class SetLabel:
    """The sign in `cell` says `text`."""

    cell: int
    text: str


Edit = Recolour | Add | Remove | Replace | Move | Resize | SetState | SetBackground | SetLabel

EDIT_NAMES: dict[type, str] = {
    Recolour: "recolour",
    Add: "add",
    Remove: "remove",
    Replace: "replace",
    Move: "move",
    Resize: "resize",
    SetState: "state",
    SetBackground: "background",
    SetLabel: "label",
}
EDIT_KINDS = tuple(EDIT_NAMES.values())


def edit_kind(edit: Edit) -> str:
    """The name of an edit's kind, one of `EDIT_KINDS`."""
    return EDIT_NAMES[type(edit)]


def touched(edit: Edit) -> tuple[int, ...]:
    """The cells that an edit changes; of a move, first the one that the object leaves."""
    match edit:
        case SetBackground():
            return ()
        case Move(cell, to):
            return (cell, to)
    return (edit.cell,)


def disjoint(edits: Sequence[Edit]) -> bool:
    """No two of the edits touch the same cell or the background: they can be made, and told, in any order."""
    places = [place for edit in edits for place in (touched(edit) or ("background",))]
    return len(places) == len(set(places))


def apply(scene: Scene, edits: Edit | Sequence[Edit]) -> Scene:
    """The scene after one edit, or several in turn. DataError when one does not fit, or would change nothing."""
    for edit in edits if isinstance(edits, Sequence) else (edits,):
        after = _applied(scene, edit)
        if after is None or after == scene:
            raise DataError(f"{edit}: expected an edit that changes the scene, found that {scene} does not allow it. Drop it.")
        scene = after
    return scene


def _applied(scene: Scene, edit: Edit) -> Scene | None:
    """None when the edit does not fit."""
    if isinstance(edit, SetBackground):
        return replace(scene, background=edit.name)
    look = scene.look(edit.cell)
    if isinstance(edit, Add):
        return scene.put(edit.cell, edit.look) if look is None else None
    if look is None:
        return None
    kind = KINDS[look.kind]
    match edit:
        case Remove(cell):
            return scene.put(cell, None)
        case Replace(cell, other):
            return scene.put(cell, other) if other.kind != look.kind else None
        case Move(cell, to):
            return scene.put(cell, None).put(to, look) if scene.at(to) is None else None
        case Recolour(cell, colour) if colour in kind.colours:
            return scene.put(cell, replace(look, colour=colour))
        case Resize(cell, size) if size in kind.sizes:
            return scene.put(cell, replace(look, size=size))
        case SetState(cell, state) if state in kind.states and look.kind != "sign":
            return scene.put(cell, replace(look, state=state))
        case SetLabel(cell, text) if look.kind == "sign" and text in kind.states:
            return scene.put(cell, replace(look, state=text))
    return None


# ---- which are possible --------------------------------------------------------------------------------------------------


def possible(scene: Scene, kind: str | None = None) -> Iterator[Edit]:
    """Every edit that changes the scene, or every one of a kind; in a fixed order."""
    for name in [kind] if kind else EDIT_KINDS:
        if name not in _POSSIBLE:
            raise DataError(f"edit: expected a kind of {', '.join(EDIT_KINDS)}, found {name!r}. Correct the name.")
        if name == "background":
            yield from (SetBackground(each) for each in BACKGROUNDS if each != scene.background)
        elif name == "add":
            if len(scene.objects) < MOST_OBJECTS:
                yield from (Add(cell, look) for cell in scene.empty() for look in LOOKS)
        else:
            for each in scene.objects:
                yield from _POSSIBLE[name](scene, each)


def _states(each: Object) -> Iterator[str]:
    yield from (state for state in KINDS[each.kind].states if state != each.state)


_POSSIBLE: dict[str, Callable[[Scene, Object], Iterator[Edit]]] = {
    "recolour": lambda _, each: (Recolour(each.cell, name) for name in KINDS[each.kind].colours if name != each.colour),
    "remove": lambda _, each: iter([Remove(each.cell)]),
    "replace": lambda _, each: (Replace(each.cell, look) for look in LOOKS if look.kind != each.kind),
    "move": lambda scene, each: (Move(each.cell, to) for to in scene.empty()),
    "resize": lambda _, each: (Resize(each.cell, name) for name in KINDS[each.kind].sizes if name != each.size),
    "state": lambda _, each: (SetState(each.cell, name) for name in _states(each) if each.kind != "sign"),
    "label": lambda _, each: (SetLabel(each.cell, name) for name in _states(each) if each.kind == "sign"),
    "add": lambda *_: iter(()),  # these two are not about an object of the scene
    "background": lambda *_: iter(()),
}


# ---- the way from one scene to another -----------------------------------------------------------------------------------


def edits_between(shown: Scene, wanted: Scene) -> tuple[Edit, ...]:
    """Edits that turn `shown` into `wanted`: moves where an object is only misplaced, then the least change of each cell.

    They are disjoint except where a cell changes in two things at once. Styles are left alone, as no edit names them.
    """
    edits: list[Edit] = []
    now = shown
    for cell in shown.empty():
        look = wanted.look(cell)
        if look is None:
            continue
        at = next((each.cell for each in now.objects if each.look == look and wanted.look(each.cell) is None), None)
        if at is not None:
            edits.append(Move(at, cell))
            now = apply(now, edits[-1])
    cells = sorted({each.cell for each in (*now.objects, *wanted.objects)})
    for cell in cells:
        edits += _cell_edits(cell, now.look(cell), wanted.look(cell))
    if shown.background != wanted.background:
        edits.append(SetBackground(wanted.background))
    return tuple(edits)


def _cell_edits(cell: int, now: Look | None, wanted: Look | None) -> list[Edit]:
    if now == wanted:
        return []
    if wanted is None:
        return [Remove(cell)]
    if now is None:
        return [Add(cell, wanted)]
    if now.kind != wanted.kind:
        return [Replace(cell, wanted)]
    edits: list[Edit] = []
    if now.colour != wanted.colour:
        edits.append(Recolour(cell, wanted.colour))
    if now.size != wanted.size:
        edits.append(Resize(cell, wanted.size))
    if now.state != wanted.state:
        edits.append(SetLabel(cell, wanted.state) if now.kind == "sign" else SetState(cell, wanted.state))
    return edits
