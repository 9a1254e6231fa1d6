"""Beyond one machine: the same pipelines in workers of Ray Data, the same keys, the same journal.

A worker is started with the command line of the run, and makes of it what the command itself would. It asks about its share of
the items and gives back rows, one per answer; the one process that was started by hand writes them into the journal. What is
left, which is to put the records together out of the journal, is an ordinary run, which finds every answer there. Workers put
painted pictures below --out themselves, so they must see the same disk.

Two workers may ask the same question when two items share it; the later answer counts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError, ReasonEditError, ReasonerError
from . import journal
from .journal import Entry, Journal, entry_of, read_journal
from .pace import for_all
from .runner import Limits, Runner

SHARE = 16
"""Items that a worker takes at a time at most; what it has answered is written when it has done with them."""


@dataclass(frozen=True, slots=True)
class Spread:
    """answered: rows that were written."""

    answered: int


def spread(args: argparse.Namespace, items: int, say: Callable[[str], None] | None = None) -> Spread:
    """Let the workers of `args.ray` answer all that `items` items ask and the journal does not hold.

    Raises ConfigError where Ray is absent or another run holds the folder, ReasonerError for what ended a worker; the answers
    that were given before are in the journal.
    """
    ray = _started(args)
    try:
        with Journal(args.out / journal.FILE_NAME) as kept:
            return Spread(_collect(ray, args, items, kept, say))
    finally:
        ray.shutdown()


def _started(args: argparse.Namespace) -> Any:
    # Ray would tell its makers of every start.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"--ray: expected the package ray with its data part, found none ({error}). pip install 'comfyui-reasonedit[ray]'."
        ) from error
    own = {} if args.ray_address else {"num_cpus": args.ray + 1, "include_dashboard": False}  # one for what feeds them
    try:
        ray.init(address=args.ray_address, logging_level="ERROR", log_to_driver=False, **own)
    except Exception as error:  # it raises whatever went wrong below it, bare exceptions too
        where = args.ray_address or "this machine"
        raise ConfigError(
            f"--ray: expected a Ray on {where} within its own time, found none ({_first(error)}). Look at its log, give the "
            "machine some quiet, or do without --ray."
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _collect(ray: Any, args: argparse.Namespace, items: int, kept: Journal, say: Callable[[str], None] | None) -> int:
    size = max(1, min(SHARE, -(-items // args.ray)))
    data = ray.data.range(items, override_num_blocks=-(-items // size))
    rows = data.map_batches(
        Worker,
        fn_constructor_args=(dict(vars(args)), os.getcwd()),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=args.ray),
        num_cpus=1,
        num_gpus=args.ray_gpus or None,
    )
    answered, faults = 0, []
    for row in _until_lost(ray, rows, faults):
        if row["fault"]:
            faults.append(row["fault"])
            continue
        kept.add(entry_of(row["line"]))
        answered += 1
        if say is not None and answered % 100 == 0:
            say(f"{answered} answers")
    if faults:
        raise ReasonerError(f"{faults[0]} ({len(faults)} of the workers' shares ended so; {answered} answers are kept.)")
    return answered


def _until_lost(ray: Any, rows: Any, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The rows, up to where a worker is lost for good (it died, or could not begin); that is then the last of the faults."""
    try:
        yield from rows.iter_rows()
    except ray.exceptions.RayError as error:
        faults.append(_first(error))


def _first(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).strip()[:300]


class Worker:
    """Answers what a share of the items asks. told: the command line as `argparse` read it; folder: where it was given."""

    def __init__(self, told: dict[str, Any], folder: str) -> None:
        from .commands import JOBS, session_of

        os.chdir(folder)  # paths of the command line may be relative
        args = argparse.Namespace(**told)
        self._make, self._items = JOBS[args.command](args)
        session = session_of(args)
        self._limits, self._retry = shared(session.limits, args.ray), session.retry
        self._known = read_journal(Path(args.out) / journal.FILE_NAME).entries

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Numbers of items (`id`) -> rows: `line`, an entry as the journal has it, or `fault`, what ended the share."""
        kept = _Given(self._known)
        runner = Runner(kept, self._limits, retry=self._retry)  # type: ignore[arg-type]
        items = [self._items[int(number)] for number in batch["id"]]
        faults = []
        try:
            asyncio.run(for_all(items, self._make(runner).label, at_once=2 * self._limits.concurrency))
        except ReasonEditError as error:  # as text: exceptions of ours need not survive pickling
            faults.append(str(error))
        lines = [entry.line().decode() for entry in kept.given]
        return {"line": [*lines, *([""] * len(faults))], "fault": [*([""] * len(lines)), *faults]}


class _Given:
    """In the place of a journal: what is known, and what is answered now."""

    def __init__(self, known: dict[str, Entry]) -> None:
        self.entries, self.given = dict(known), []

    def add(self, entry: Entry) -> None:
        self.entries[entry.key] = entry
        self.given.append(entry)


def shared(limits: Limits, workers: int) -> Limits:
    """The limits of one of several workers: together they begin as many requests in a minute as one run would."""
    return limits if limits.per_minute is None else replace(limits, per_minute=limits.per_minute / workers)
