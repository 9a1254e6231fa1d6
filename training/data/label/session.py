"""One run of a pipeline in its folder: journal, items, records, rejects, report, page. Started again it goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..check import CheckReport, check_records
from ..records import FILE_NAME, read_records
from . import contact_sheet, journal, output
from .annotators import Annotator, Question
from .journal import Entry, Journal, read_journal
from .output import Harvest, Prices
from .pace import for_all
from .runner import Limits, Runner


class Pipeline(Protocol):
    """What a session runs: `label` one item, then `gather` all drafts."""

    async def label(self, item: Any) -> Any:
        """What becomes of one item. Raises Rejected."""
        ...

    def gather(self, items: Sequence[Any], found: Sequence[Any]) -> Harvest:
        """What is written. found: what `label` gave for each item, or the Rejected that it raised."""
        ...


@dataclass(frozen=True, slots=True)
class Session:
    """How a run is made. sample: records on the page, 0 for no page; retry: ask again what was rejected before."""

    out: Path
    limits: Limits = Limits()
    prices: Prices = Prices()
    sample: int = 0
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run. asked: requests of this run; report: what report.json says."""

    records: int
    rejected: int
    asked: int
    report: dict[str, Any]
    check: CheckReport | None

    def lines(self) -> list[str]:
        """The result as text."""
        told = self.report
        cost = "" if told["cost"] is None else f", cost {told['cost']:g}"
        spent = f"{told['requests']} requests ({self.asked} now), {told['tokens_in']} + {told['tokens_out']} tokens{cost}"
        out = [f"{self.records} records, {self.rejected} rejected; {spent}"]
        out += [f"  rejected, {reason}: {count}" for reason, count in told["rejects"].items()]
        return out


def run(
    session: Session,
    make: Callable[[Runner], Pipeline],
    items: Sequence[Any],
    *,
    name: str,
    on_done: Callable[[int], None] | None = None,
) -> Result:
    """Run a pipeline over `items`. make: the pipeline of a runner; name: for the report.

    Raises ConfigError (folder), DataError (journal), ReasonerError (an annotator that cannot be used); all that was answered
    before stays in the journal, and the next run goes on from it.
    """
    with Journal(session.out / journal.FILE_NAME) as kept:
        output.clear_parts(session.out)
        runner = Runner(kept, session.limits, retry=session.retry)
        pipeline = make(runner)
        at_once = 2 * session.limits.concurrency  # so that there are questions while some items wait for their own work
        found = asyncio.run(for_all(items, pipeline.label, at_once=at_once, on_done=on_done))
        harvest = pipeline.gather(items, found)
        records, rejects = output.write(session.out, harvest)
        told = {
            "pipeline": name,
            "items": len(items),
            "records": records,
            "rejects": output.reasons(rejects),
            **output.report(kept.entries.values(), session.prices),
        }
        output.write_report(session.out, told)
        path, check = session.out / FILE_NAME, None
        if records:
            check = check_records(path)
            if session.sample:
                contact_sheet.write_sheet(session.out / contact_sheet.FILE_NAME, read_records(path), session.sample, rejects)
        return Result(records, len(rejects), runner.tally.asked, told, check)


# ---- a dry run -----------------------------------------------------------------------------------------------------------


class FirstRequest(Exception):
    """What would be asked first."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__("a dry run")
        self.told = told


class _Memory:
    """A journal that is only read."""

    def __init__(self, path: Path) -> None:
        self.entries = read_journal(path).entries

    def add(self, entry: Entry) -> None:
        raise AssertionError("a dry run finishes nothing")


class _DryRunner(Runner):
    """Raises FirstRequest in place of asking or working."""

    async def _attempts(self, key: str, item: str, question: Question, annotator: Annotator) -> Entry:
        payload = getattr(annotator, "payload", None)
        told = payload(question) if payload else {"system": question.prompt.system, "text": question.words}
        pictures = [str(picture.path) for picture in question.pictures]
        to = annotator.endpoint
        raise FirstRequest({"item": item, "question": question.prompt.id, "to": to, "pictures": pictures, "request": told})

    async def do(self, item: str, step: str, version: str, worker: str, *rest: Any, **more: Any) -> Entry:
        # the work itself, which comes last, is replaced
        return await super().do(item, step, version, worker, *rest[:-1], _would(item, step, worker), **more)


def _would(item: str, step: str, worker: str) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        raise FirstRequest({"item": item, "work": step, "by": worker})

    return work


def first_request(session: Session, make: Callable[[Runner], Pipeline], items: Sequence[Any]) -> dict[str, Any] | None:
    """What a run would ask first, pictures shortened; None where all is answered. Nothing is sent, made or written."""
    kept: Any = _Memory(session.out / journal.FILE_NAME)
    runner = _DryRunner(kept, replace(session.limits, concurrency=1), retry=session.retry)
    try:
        asyncio.run(for_all(items, make(runner).label, at_once=1))
    except FirstRequest as first:
        return _shortened(first.told)
    return None


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("data:image/"):
        return f"{value[:40]}... ({len(value)} characters)"
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    return [_shortened(inner) for inner in value] if isinstance(value, list) else value


def as_json(value: Any) -> str:
    """For people."""
    return json.dumps(value, ensure_ascii=False, indent=2)
