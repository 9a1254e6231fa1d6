"""The tables of mini-brain: what each part of ReasonBrain is worth (the paper's Tabs. 4, A9, A12), measured live.

components and enhancers compare models that were trained with a part left out; components_switched turns parts of the full
model off as it edits, which is another question. All rows edit the same held-out items of Reason50K's four categories with the
same noise, through the production loader and generator.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...reasonedit_core.conditioners.brain_weights import FILE, LORA
from ...reasonedit_core.errors import CheckpointError, ConfigError, ReasonEditError
from ...reasonedit_core.mini.dice import digest
from ...reasonedit_core.mini.items import CATEGORIES, item
from ...reasonedit_core.mini.judge import warm_up
from ...reasonedit_core.mini.models import BRAINS, mini_folder
from ...reasonedit_core.mini.scenes import SPLIT, draw
from ...reasonedit_core.types import EditRequest
from ..mini.brain_rows import COMPONENTS, ENHANCERS, FULL, PLACE, Off
from .arms import Outcome, judged
from .drawing import ALL, Task
from .measure import figures
from .report import Measured, write_report
from .statistics import paired
from .store import Store
from .tables import Pair, Table

log = logging.getLogger(__name__)

LANGUAGE = "en"
GROUPS = (ALL, *CATEGORIES)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BrainTable:
    """what: one line above the table. rows: what each leaves out. trained: whether each is a model of its own."""

    name: str
    what: str
    rows: Mapping[str, Off]
    trained: bool = True
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> Table:
        """In the form that `report` writes. The paper has the full model above every other row."""
        pairs = tuple(Pair(FULL, row, group, True) for row in self.rows if row != FULL for group in GROUPS)
        return Table(self.name, self.what, {}, {}, pairs, self.notes)


_ALIKE = "Every row is a model of its own, trained from the same start with the same steps, data order and seed."

TABLES = {
    table.name: table
    for table in (
        BrainTable(
            "components",
            "Parts of ReasonBrain (the paper's Table 4): models that were trained without them.",
            COMPONENTS,
            notes=(f"{_ALIKE} plain has neither cues nor enhancers: LLaVA, its [IMG] tokens and the QFormer.",),
        ),
        BrainTable(
            "components_switched",
            "The full model with parts turned off as it edits. This is not the paper's question; see the table components.",
            COMPONENTS,
            trained=False,
            notes=("What was trained together is taken apart: a low row says that the others rely on the part.",),
        ),
        BrainTable(
            "enhancers",
            "Forms of the cross-modal enhancer (the paper's Tables A9 and A12): models that were trained with each.",
            ENHANCERS,
            notes=(
                f"{_ALIKE} simple_ca: image features that attend to the translated states, and nothing else; one_way: the "
                "enhanced context does not look at the details; no_enhancer: the cues reach the language model only.",
            ),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class BrainTask:
    """One item. It has what `arms.judged` needs of a `drawing.Task`."""

    key: str
    category: str
    item: Any
    seed: int

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that it counts in."""
        return (ALL, self.category)


def draw_brain_tasks(n: int, seed: int) -> list[BrainTask]:
    """n held-out items, the four categories in equal parts; more of one seed are the same and some others. English."""
    if n < 1:
        raise ConfigError(f"n: expected at least 1 item, found {n}.")
    tasks = []
    for at, category in enumerate(CATEGORIES):
        for number in range(n // len(CATEGORIES) + (at < n % len(CATEGORIES))):
            drawn = item(digest("brain evaluation", int(seed), category, number), category, SPLIT, LANGUAGE)
            noise = digest("brain evaluation noise", int(seed), category, number) >> 2
            tasks.append(BrainTask(f"{category}-{number}", category, drawn, noise))
    return tasks


def brain_folder(system: str) -> Path | None:
    """The folder of a mini-brain that `system` means (its name, or a folder with its trained tensors); None for another."""
    if system in BRAINS:
        return mini_folder(system)
    return Path(system) if (Path(system) / FILE).is_file() else None


def make_brain_table(request: Any, folder: Path, say: Say) -> Measured:
    """Measure and write a table; goes on where an earlier run of the same request stopped. request: a `miniature.Request`.

    Raises ConfigError and CheckpointError for values and weights, before anything is run.
    """
    if request.table not in TABLES:
        raise ConfigError(f"--table: expected one of {', '.join(TABLES)} for {folder.name}, found {request.table!r}.")
    table = TABLES[request.table]
    if request.group != ALL:
        raise ConfigError(f"--group: expected {ALL} for mini-brain, whose tables show every category, found {request.group}.")
    places = {row: _place(folder, row, table.trained) for row in table.rows}
    tasks = draw_brain_tasks(request.n, request.seed)
    head = {
        "table": table.name,
        "system": folder.name,
        "seed": request.seed,
        "weights": _fingerprint([folder, *places.values()]),
        "dtype": request.dtype,
    }
    store = Store(request.out / f"{table.name}.items.jsonl", head)
    clock, made = time.monotonic(), 0
    warm_up()
    for row, place in places.items():
        missing = [task for task in tasks if not store.has(row, task.key)]
        if not missing:
            continue
        edit = open_row(place, {} if table.trained else table.rows[row], device=request.device, dtype=request.dtype)
        for number, task in enumerate(missing, start=1):
            store.add(row, edit(task))
            made += 1
            if number % 20 == 0 or number == len(missing):
                say(f"{table.name}: {row}, {number} of {len(missing)} items")
    measured = measure_brain(table, store.records, tasks, folder.name, request.seed)
    words = f"`reasonedit-eval miniature --system {folder.name} --table {table.name} --n {request.n} --seed {request.seed}`."
    files = write_report(measured, table.shown, weigh(measured), request.out, words)
    say(f"{table.name}: {made} edits in {time.monotonic() - clock:.0f} s; written: {', '.join(map(str, files))}")
    return measured


def open_row(place: Path, off: Off, *, device: str = "auto", dtype: str = "auto") -> Callable[[BrainTask], dict[str, Any]]:
    """Load a row; -> what edits an item with it and judges the picture. A record holds key, marks, seconds and error."""
    from ...reasonedit_core.load import SystemSpec, load_system

    brain = {"switches": dict(off)} if off else {}
    system = load_system(SystemSpec("reasonbrain", place, "none", device=device, dtype=dtype, brain=brain))

    def edit(task: BrainTask) -> dict[str, Any]:
        source = draw(task.item.source)
        request = EditRequest(source, task.item.instruction, task.seed, **system.defaults)
        clock, picture, error = time.perf_counter(), source, None
        try:
            rng = torch.Generator().manual_seed(task.seed)
            picture = system.generator.edit(request, source, task.item.instruction, rng).image
        except ReasonEditError as fault:  # the untouched picture counts then, as in the other tables
            error = str(fault)
        seconds = time.perf_counter() - clock
        return {"key": task.key, "marks": judged(_judged_as(task), picture), "seconds": round(seconds, 5), "error": error}

    return edit


def _judged_as(task: BrainTask) -> Task:
    return Task(task.key, task.category, task.item, task.seed)


def measure_brain(
    table: BrainTable, records: Mapping[tuple[str, str], Any], tasks: Sequence[BrainTask], system: str, seed: int
) -> Measured:
    """The table over `tasks`, of each of which every row has a record. paired: full minus every other row."""
    groups = {group: [task.key for task in tasks if group in task.groups] for group in GROUPS}
    rows, pairs = [], []

    def of(row: str, keys: Sequence[str]) -> list[Outcome]:
        return [Outcome(records[row, key]["marks"], records[row, key]["seconds"]) for key in keys]

    for row in table.rows:
        rows += [figures(row, group, of(row, keys), seed) for group, keys in groups.items() if keys]
    for row in table.rows:
        for group, keys in groups.items():
            if row == FULL or not keys:
                continue
            values = ([one.marks["overall"] for one in of(name, keys)] for name in (FULL, row))
            difference, low, high = (round(value, 4) for value in paired(*values, seed, group))
            pairs.append({"a": FULL, "b": row, "group": group, "difference": difference, "low": low, "high": high})
    return {"table": table.name, "system": system, "n": len(tasks), "seed": seed, "rows": rows, "paired": pairs}


def weigh(measured: Measured) -> list[str]:
    """A sentence for every row: whether the full model was found above it."""
    words = []
    for pair in measured["paired"]:
        if pair["group"] == ALL:
            found = "found" if pair["low"] > 0 else "the opposite was found" if pair["high"] < 0 else "not shown"
            span = f"{pair['difference']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}]"
            words.append(f"{pair['a']} above {pair['b']}: {found}, {span}.")
    return words


def _place(folder: Path, row: str, trained: bool) -> Path:
    place = folder if row == FULL or not trained else folder / PLACE / row
    if not (place / FILE).is_file():
        raise CheckpointError(
            f"{place}: expected the trained row {row} ({FILE}), found none. Let `reasonedit-train mini --system mini-brain` "
            "run to its end, or name the folder that it has finished."
        )
    return place


def _fingerprint(places: Sequence[Path]) -> str:
    """Names the weights and settings of all rows and of the parts that they share."""
    whole = hashlib.sha256()
    shared = [file for file in sorted(places[0].glob("*/*")) if file.suffix in (".safetensors", ".json", ".txt")]
    lora = Path(LORA) / "adapter_model.safetensors"
    own = [file for place in places for file in (place / FILE, place / lora, *sorted(place.glob("*.json")))]
    for file in dict.fromkeys([*shared, *own]):
        if file.is_file():
            whole.update(f"{file.relative_to(places[0]).as_posix()}\0".encode())
            whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:32]
