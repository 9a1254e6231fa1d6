"""Rules about things with a life: what time, weather, warmth and people do to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .dice import Dice
from .edits import Edit, Move, Replace, Resize, SetBackground, SetState
from .kinds import BACKGROUNDS, KINDS, SHAPES, SIZES, SKIES
from .rules import Rule, Setting, any_look, key, unkey
from .world import LOOKS, Look, Scene

_GROWING = frozenset({"flower", "tree", "leaf"})
_PASSING = _GROWING | {"candle", "ice cube", "clock", "sun", "moon", "lamp"}
"""What looks different some time later."""

_FEW = 10
"""A subject with fewer looks than this is told apart by the background too."""


def _state_rule(
    name: str, category: str, knowledge: str, kind: str, changes: Mapping[str, str], avoid: Iterable[str] = ()
) -> Rule:
    """The one object of `kind` passes from a state to the next of `changes`."""
    looks = [look for look in LOOKS if look.kind == kind and look.state in changes]
    grounds: tuple[str, ...] = BACKGROUNDS if len(looks) < _FEW else ("",)
    subjects = tuple(key(look.colour, look.size, look.state, ground) for look in looks for ground in grounds)

    def stage(subject: str, dice: Dice) -> Setting:
        colour, size, state, ground = unkey(subject)
        return Setting(((None, Look(kind, colour, size, state)),), ground or None)

    def act(scene: Scene, slots: Mapping[str, str]) -> tuple[Edit, ...]:
        found = scene.of(kind)
        if len(found) != 1 or found[0].state not in changes:
            return ()
        return (SetState(found[0].cell, changes[found[0].state]),)

    return Rule(name, category, knowledge, subjects, stage, act, frozenset({kind, *avoid}))


def _size_rule(name: str, category: str, knowledge: str, kind: str, size: str, avoid: Iterable[str] = ()) -> Rule:
    """The one object of `kind` becomes `size`."""
    before = next(each for each in SIZES if each != size)
    looks = [look for look in LOOKS if look.kind == kind and look.size == before]
    subjects = tuple(key(look.colour, look.state, ground) for look in looks for ground in BACKGROUNDS)

    def stage(subject: str, dice: Dice) -> Setting:
        colour, state, ground = unkey(subject)
        return Setting(((None, Look(kind, colour, before, state)),), ground)

    def act(scene: Scene, slots: Mapping[str, str]) -> tuple[Edit, ...]:
        found = scene.of(kind)
        return (Resize(found[0].cell, size),) if len(found) == 1 and found[0].size != size else ()

    return Rule(name, category, knowledge, subjects, stage, act, frozenset({kind, *avoid}))


def _ground_rule(name: str, category: str, knowledge: str, changes: Mapping[str, str], avoid: Iterable[str] = ()) -> Rule:
    """The background passes on by `changes`; a shape stands before it, so that no change is held out altogether."""

    def stage(subject: str, dice: Dice) -> Setting:
        ground, kind = unkey(subject)
        return Setting(((None, any_look(kind, dice)),), ground)

    def act(scene: Scene, slots: Mapping[str, str]) -> tuple[Edit, ...]:
        return (SetBackground(changes[scene.background]),) if scene.background in changes else ()

    subjects = tuple(key(ground, kind) for ground in changes for kind in SHAPES)
    return Rule(name, category, knowledge, subjects, stage, act, frozenset(avoid))


def _to_ground(name: str) -> dict[str, str]:
    return {ground: name for ground in BACKGROUNDS if ground != name}


# ---- day and night -------------------------------------------------------------------------------------------------------


def _exchange(kind: str, grounds: Iterable[str], look: Look, ground: str, name: str) -> Rule:
    """The one object of `kind` gives its place to `look` in its own size, and the background becomes `ground`."""
    subjects = tuple(key(size, state, g) for size in SIZES for state in KINDS[kind].states for g in grounds)

    def stage(subject: str, dice: Dice) -> Setting:
        size, state, before = unkey(subject)
        return Setting(((None, Look(kind, "", size, state)),), before)

    def act(scene: Scene, slots: Mapping[str, str]) -> tuple[Edit, ...]:
        found = scene.of(kind)
        if len(found) != 1 or scene.background == ground:
            return ()
        return (Replace(found[0].cell, replace(look, size=found[0].size)), SetBackground(ground))

    return Rule(name, "temporal", "conceptual", subjects, stage, act, frozenset({"sun", "moon", "lamp", "clock"}))


# ---- rising --------------------------------------------------------------------------------------------------------------


def _stage_balloon(subject: str, dice: Dice) -> Setting:
    colour, size = unkey(subject)
    return Setting(((dice.pick(range(3, 9)), Look("balloon", colour, size, "full")),))


def _rise(scene: Scene, slots: Mapping[str, str]) -> tuple[Edit, ...]:
    found = scene.of("balloon")
    if len(found) != 1 or found[0].state != "full" or found[0].cell < 3:
        return ()
    cell = found[0].cell
    way = range(cell % 3, cell, 3)
    return (Move(cell, cell % 3),) if all(scene.at(above) is None for above in way) else ()


_BALLOONS = tuple(key(colour, size) for colour in KINDS["balloon"].colours for size in SIZES)

RULES: tuple[Rule, ...] = (
    _state_rule(
        "next_season", "temporal", "factual", "tree",
        {"spring": "summer", "summer": "autumn", "autumn": "winter", "winter": "spring"}, _PASSING,
    ),
    _state_rule("burns_down", "temporal", "factual", "candle", {"burning": "burnt down"}, _PASSING),
    _state_rule("bud_opens", "temporal", "factual", "flower", {"bud": "open"}, _PASSING),
    _state_rule("half_melted", "temporal", "factual", "ice cube", {"solid": "melting"}, _PASSING),
    _state_rule("three_hours", "temporal", "factual", "clock", {"12": "3", "3": "6", "6": "9", "9": "12"}, _PASSING),
    _state_rule("half_a_day", "temporal", "procedural", "clock", {"12": "6", "3": "9", "6": "12", "9": "3"}, _PASSING),
    _ground_rule("hours_pass", "temporal", "factual", dict(zip(SKIES, (*SKIES[1:], SKIES[0]), strict=True)), _PASSING),
    _state_rule("no_water", "causal", "conceptual", "flower", {"open": "wilted"}, _GROWING),
    _state_rule("drought", "physical", "conceptual", "leaf", {"healthy": "dry", "deficient": "dry"}, _GROWING),
    _state_rule("potassium", "causal", "conceptual", "leaf", {"healthy": "deficient"}, _GROWING),
    _state_rule("fertiliser", "causal", "conceptual", "leaf", {"deficient": "healthy"}, _GROWING),
    _state_rule("sun_melts", "physical", "conceptual", "ice cube", {"solid": "puddle", "melting": "puddle"}, _PASSING),
    _state_rule(
        "frost", "physical", "conceptual", "ice cube", {"puddle": "solid", "melting": "solid"}, {*_PASSING, "cup", "egg"}
    ),
    _state_rule("egg_falls", "physical", "conceptual", "egg", {"whole": "broken"}, ("cup", "lamp", "clock", "balloon")),
    _state_rule("needle", "physical", "conceptual", "balloon", {"full": "burst"}),
    Rule("let_go", "physical", "conceptual", _BALLOONS, _stage_balloon, _rise, frozenset({"balloon"})),
    _state_rule("drunk_up", "causal", "conceptual", "cup", {"full": "empty"}),
    _state_rule("refill", "story", "conceptual", "cup", {"empty": "full"}),
    _state_rule("rain", "causal", "conceptual", "umbrella", {"closed": "open"}, {"sun", "flower", "car"}),
    _state_rule("rain_stops", "causal", "conceptual", "umbrella", {"open": "closed"}, {"sun", "flower", "car"}),
    _state_rule("power_cut", "causal", "conceptual", "lamp", {"on": "off"}, {"traffic light", "clock"}),
    _state_rule("too_dark", "story", "conceptual", "lamp", {"off": "on"}, {"candle", "sun", "moon"}),
    _state_rule("birthday", "story", "conceptual", "candle", {"new": "burning"}, {"lamp"}),
    _state_rule("cars_go", "causal", "conceptual", "traffic light", {"red": "green"}),
    _state_rule("child_crosses", "story", "conceptual", "traffic light", {"green": "red"}),
    _state_rule(
        "lights_change", "temporal", "procedural", "traffic light", {"green": "amber", "amber": "red", "red": "green"}, {"lamp"}
    ),
    _state_rule("moon_wanes", "temporal", "conceptual", "moon", {"full": "crescent"}, _PASSING),
    _size_rule("grown_up", "temporal", "conceptual", "tree", "large", _PASSING),
    _size_rule("drives_off", "physical", "factual", "car", "small"),
    _size_rule("comes_near", "physical", "factual", "car", "large"),
    _exchange("sun", [g for g in BACKGROUNDS if g != "night"], Look("moon", "", "large", "full"), "night", "night_falls"),
    _exchange("moon", ("night", "dusk", "grey", "grass"), Look("sun"), "day", "sun_rises"),
    _ground_rule("picnic", "story", "conceptual", _to_ground("grass")),
    _ground_rule("dinner", "story", "conceptual", _to_ground("table")),
)  # fmt: skip
