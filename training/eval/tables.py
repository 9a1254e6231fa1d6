"""The tables: which runs each of them needs, which rows are read from these, and what the paper claims of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...reasonedit_core.mini.rules import KNOWLEDGE
from .arms import View, Work, best_of, edit_plainly, edit_truly, first_edit, loop_of, reroll_of
from .drawing import ABSTRACT, ALL, CONCRETE
from .reflecting import mended, reflect_on, shown
from .systems import Choice

ROUNDS = 3
"""Edits of a loop at most, as `reasonedit edit` has it."""

REFLECTIONS = 4
"""Reflection rounds of table `rounds` at most."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is run for every item: one arm of one system."""

    work: Work
    choice: Choice = Choice()


@dataclass(frozen=True, slots=True)
class Row:
    """A system of a table: the run it is read from, and how."""

    run: str
    view: View


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows that are compared item by item. claim: the paper has a above b in this group."""

    a: str
    b: str
    group: str = ALL
    claim: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """One table. what: one line above it; notes: sentences below it."""

    name: str
    what: str
    runs: Mapping[str, Run]
    rows: Mapping[str, Row]
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All systems that it needs."""
        return tuple(dict.fromkeys(run.choice for run in self.runs.values()))


def _pairs(a: str, b: str, *claimed: str) -> tuple[Pair, ...]:
    return tuple(Pair(a, b, group, group in claimed) for group in (ALL, CONCRETE, ABSTRACT, *KNOWLEDGE))


_PLAIN = Choice(reasoner=None)

LOOP = Table(
    "loop",
    "Thinking and reflection (the paper's Tables 1 and 3): the same editor with and without them.",
    runs={
        "loop": Run(loop_of(ROUNDS)),
        "reflect": Run(loop_of(ROUNDS, think=False)),
        "concrete-oracle": Run(edit_truly, _PLAIN),
    },
    rows={
        "base": Row("reflect", first_edit),
        "think": Row("loop", first_edit),
        "reflect": Row("reflect", best_of()),
        "think+reflect": Row("loop", best_of()),
        "concrete-oracle": Row("concrete-oracle", first_edit),
    },
    pairs=(
        *_pairs("think", "base", ALL, ABSTRACT, *KNOWLEDGE),
        *_pairs("reflect", "base", ALL),
        *_pairs("think+reflect", "think", ALL, ABSTRACT),
        *_pairs("think+reflect", "base", ALL, ABSTRACT),
        *_pairs("concrete-oracle", "think+reflect"),
    ),
    notes=(
        "base is the editor with the user's words and no reasoner; concrete-oracle the same editor with the true concrete "
        "instruction. base is read from the first edit of the run that only reflects, and think from that of the whole loop: "
        "they are the same edits with the same noise.",
    ),
)

_BASE, _TUNED = Choice("base", None), Choice("base", "reason")

STAGES = Table(
    "stages",
    "Stages of training (the paper's Table 2): editors and reasoners before and after each.",
    runs={
        "base": Run(edit_plainly, _BASE),
        "base+untuned": Run(loop_of(ROUNDS), Choice("base", "base")),
        "base+tuned": Run(loop_of(ROUNDS), _TUNED),
        "edit-stage": Run(edit_plainly, Choice("edit", None)),
        "edit-stage+tuned": Run(loop_of(ROUNDS), Choice("edit", "reason")),
        "unified": Run(loop_of(ROUNDS)),
    },
    rows={
        "base": Row("base", first_edit),
        "base+untuned": Row("base+untuned", best_of()),
        "base+tuned": Row("base+tuned", best_of()),
        "edit-stage": Row("edit-stage", first_edit),
        "edit-stage+tuned": Row("edit-stage+tuned", best_of()),
        "unified": Row("unified", best_of()),
    },
    pairs=(
        *_pairs("base+untuned", "base", ALL),
        *_pairs("base+tuned", "base+untuned", ALL),
        *_pairs("edit-stage", "base", ALL),
        *_pairs("edit-stage+tuned", "edit-stage", ALL),
        *_pairs("unified", "edit-stage+tuned", ALL),
    ),
    notes=(
        "+untuned and +tuned add a reasoner that thinks and reflects, from before and after the reasoning stage; the editor's "
        "own MLLM conditions it in every row. unified is the shipped system.",
    ),
)

REFLECTION = Table(
    "reflection",
    "Forms of reflection (the paper's Table 4): the same editor and thoughts, reflectors trained on the same triples.",
    runs={
        "think": Run(loop_of(1)),
        "dual-image": Run(loop_of(ROUNDS), Choice(reflector="dual-image", form="dual-image")),
        "single-image": Run(loop_of(ROUNDS), Choice(reflector="single-image", form="single-image")),
        "multi-round": Run(loop_of(ROUNDS), Choice(reflector="multi-round")),
    },
    rows={
        "think": Row("think", first_edit),
        "dual-image": Row("dual-image", best_of()),
        "single-image": Row("single-image", best_of()),
        "multi-round": Row("multi-round", best_of()),
    },
    pairs=(
        *_pairs("dual-image", "think"),
        *_pairs("single-image", "dual-image", ALL),
        *_pairs("multi-round", "single-image", ALL),
        *_pairs("multi-round", "think", ALL),
    ),
    notes=(
        "dual-image sees source and result and decides at once; single-image sees the result and decides at once; multi-round "
        "writes the target description, scores the result against it and then decides (single-image as well).",
    ),
)

ROUNDS_TABLE = Table(
    "rounds",
    "Rounds (the paper's Tables 5 and 6): 0 to 4 reflection rounds beside as many blind re-rolls.",
    runs={"loop": Run(loop_of(REFLECTIONS + 1)), "reroll": Run(reroll_of(REFLECTIONS + 1))},
    rows={
        "rounds-0": Row("loop", first_edit),
        **{f"rounds-{n}": Row("loop", best_of(n + 1)) for n in range(1, REFLECTIONS + 1)},
        "reroll-0": Row("reroll", first_edit),
        **{f"reroll-{n}": Row("reroll", best_of(n + 1)) for n in range(1, REFLECTIONS + 1)},
    },
    pairs=(
        *(Pair(f"rounds-{n}", f"rounds-{n - 1}", ALL, n == 1) for n in range(1, REFLECTIONS + 1)),
        *(
            Pair(f"rounds-{n}", f"reroll-{n}", group, group == ALL)
            for n in range(1, REFLECTIONS + 1)
            for group in (ALL, ABSTRACT)
        ),
    ),
    notes=(
        "rounds-n: at most n + 1 edits with n reflections between and one after; the best round is kept. reroll-n: the best of "
        "n + 1 seeds by the same self-score. Both think first; n = 0 is thinking alone. At equal time: the pair of a rounds "
        "row with the fewest re-rolls that took at least as long.",
    ),
)

REFLECTOR = Table(
    "reflector",
    "The reflector: planted faults, right pictures, and what one more edit as it asks for makes of them.",
    runs={"right": Run(reflect_on(planted=False)), "planted": Run(reflect_on(planted=True))},
    rows={"shown": Row("", shown), "mended": Row("", mended)},
    notes=(
        "shown: the pictures that are reflected on; mended: after the edit that the reflector asks for, where it asks for one. "
        "caught: wrong pictures that it does not accept; rejected: right pictures that it does not; verdicts: those that "
        "agree with the exact ones; instructions: second instructions that are the exact ones word for word.",
    ),
)

TABLES = {table.name: table for table in (LOOP, STAGES, REFLECTION, ROUNDS_TABLE, REFLECTOR)}
