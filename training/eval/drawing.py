"""Which items a table is measured on: they follow from the seed alone, and training never draws them."""

from __future__ import annotations

from dataclasses import dataclass

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.mini.dice import digest
from ...reasonedit_core.mini.items import Item, item
from ...reasonedit_core.mini.rules import KNOWLEDGE
from ...reasonedit_core.mini.scenes import SPLIT

CONCRETE, ABSTRACT, ALL = "concrete", "abstract", "all"

GROUPS = (ALL, CONCRETE, ABSTRACT, *KNOWLEDGE)
"""In the order of the tables."""


@dataclass(frozen=True, slots=True)
class Task:
    """One item of a table. key: its name, the same whatever n is; kind: concrete, or a type of knowledge; seed: of the noise
    and of all else that is drawn for it."""

    key: str
    kind: str
    item: Item
    seed: int

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that it counts in."""
        return (ALL, CONCRETE) if self.kind == CONCRETE else (ALL, ABSTRACT, self.kind)


def draw_tasks(n: int, seed: int, group: str = ALL) -> list[Task]:
    """n tasks: half of them concrete, the others abstract in equal parts over the types of knowledge.

    group: only tasks of this one, n of them. Any integer is a seed. More tasks of one seed are the same and some others.
    """
    if group not in GROUPS:
        raise ConfigError(f"group: expected one of {', '.join(GROUPS)}, found {group!r}.")
    if n < 1:
        raise ConfigError(f"n: expected at least 1 item, found {n}.")
    kinds = {CONCRETE: (CONCRETE,), ABSTRACT: KNOWLEDGE}.get(group, (group,))
    if group == ALL:
        counts = {CONCRETE: n // 2} | _shares(n - n // 2, KNOWLEDGE)
    else:
        counts = _shares(n, kinds)
    return [_task(kind, number, seed) for kind, count in counts.items() for number in range(count)]


def _shares(n: int, kinds: tuple[str, ...]) -> dict[str, int]:
    return {kind: n // len(kinds) + (at < n % len(kinds)) for at, kind in enumerate(kinds)}


def _task(kind: str, number: int, seed: int) -> Task:
    # "evaluation": a domain of its own. Besides, the split is part of the key of an item, and training asks for the other.
    drawn = item(digest("evaluation", int(seed), kind, number), kind, SPLIT)
    return Task(f"{kind}-{number}", kind, drawn, digest("evaluation noise", int(seed), kind, number) >> 2)
