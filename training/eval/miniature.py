"""`reasonedit-eval miniature`: a table of the miniature world, from loaded weights to files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.mini.judge import warm_up
from .arms import Body
from .drawing import ALL, Task, draw_tasks
from .measure import measure, weigh_claims
from .report import Measured, write_report
from .store import Store
from .strands import Serve, run_strands
from .systems import Choice, Folders, open_body
from .tables import TABLES, Table

log = logging.getLogger(__name__)

BATCH = 64

Say = Callable[[str], None]
Open = Callable[[Choice], "tuple[Body, dict[str, Serve]]"]
"""Loads what a choice needs."""


@dataclass(frozen=True, slots=True)
class Request:
    """A table that is asked for. batch: items at a time; group: only items of this one."""

    system: str
    table: str
    out: Path
    n: int = 120
    seed: int = 0
    runs: Path | None = None
    batch: int = BATCH
    group: str = ALL
    device: str = "auto"
    dtype: str = "auto"


def make_table(request: Request, say: Say) -> Measured:
    """Measure and write a table; goes on where an earlier run of the same request stopped.

    Raises ConfigError and CheckpointError for values and weights, before anything is run.
    """
    from .brain import brain_folder, make_brain_table

    folder = brain_folder(request.system)
    if folder is not None:
        return make_brain_table(request, folder, say)
    if request.table not in TABLES:
        raise ConfigError(f"--table: expected one of {', '.join(TABLES)}, found {request.table!r}.")
    table = TABLES[request.table]
    tasks = draw_tasks(request.n, request.seed, request.group)
    folders = Folders.find(request.system, request.runs)
    folders.check(table.choices)
    head = {
        "table": table.name,
        "system": folders.name,
        "seed": request.seed,
        "weights": folders.fingerprint(table.choices),
        "dtype": request.dtype,
    }
    store = Store(request.out / f"{table.name}.items.jsonl", head)
    opener = partial(open_body, folders, device=request.device, dtype=request.dtype)
    clock = time.monotonic()
    made = run_table(table, tasks, store, opener, batch=request.batch, say=say)
    measured = measure(table, store.records, tasks, folders.name, request.seed)
    claims = weigh_claims(table, measured)
    took = f"{made} runs in {time.monotonic() - clock:.0f} s"
    words = f"`reasonedit-eval miniature --system {folders.name} --table {table.name} --n {request.n} --seed {request.seed}`."
    files = write_report(measured, table, claims, request.out, words)
    say(f"{table.name}: {took}; written: {', '.join(str(file) for file in files)}")
    return measured


def run_table(
    table: Table, tasks: Sequence[Task], store: Store, opener: Open, *, batch: int = BATCH, say: Say = log.info
) -> int:
    """Make the records that are missing, one system after the other; returns their number."""
    missing = {name: [task for task in tasks if not store.has(name, task.key)] for name in table.runs}
    total = sum(map(len, missing.values()))
    progress = _Progress(table.name, total, len(table.runs) * len(tasks) - total, say)
    if total:
        warm_up()
    for choice in table.choices:
        works = [
            (name, partial(run.work, task=task))
            for name, run in table.runs.items()
            if run.choice == choice
            for task in missing[name]
        ]
        if not works:
            continue
        body, serve = opener(choice)
        bound = [partial(work, body) for _, work in works]
        for number, record in run_strands(bound, serve, width=batch):
            store.add(works[number][0], record)
            progress.step()
    return total


class _Progress:
    """A line now and then: how many are done, how fast, how long it will take."""

    def __init__(self, name: str, total: int, before: int, say: Say, every: float = 5.0) -> None:
        self._name, self._total, self._say, self._every = name, total, say, every
        self._done, self._start, self._told = 0, time.monotonic(), time.monotonic()
        if total:
            taken = f", {before} taken over" if before else ""
            say(f"{name}: {total} runs to make{taken}")

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._told < self._every and self._done < self._total:
            return
        self._told = now
        rate = self._done / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate
        self._say(f"{self._name}: {self._done}/{self._total} runs, {rate:.2f} a second, {left:.0f} s left")
