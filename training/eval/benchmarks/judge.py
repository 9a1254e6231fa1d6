"""Judging a run: every call of every item through the runner of `reasonedit-data`, and the table of what was answered.

In the folder of one judge and protocol: `journal.jsonl`, where each answer is noted once and for good as it comes, and made out
of it `judgements.jsonl` (one row per item and role) and `judge.json`. The journal's keys hold the wording, the judge, the
values and the pictures' content: a run that is stopped or moved asks nothing twice, and what changes is asked again.

Anchors say what the judge's numbers mean: the source itself as the result ("no-edit"), and the benchmark's target picture where
it has one ("ground-truth"), on items that follow from their hashes.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError
from ....reasonedit_core.files import write_json, write_whole
from ...data.label.annotators import Annotator, Shown, shown
from ...data.label.journal import FILE_NAME, Entry, Journal, read_journal
from ...data.label.output import Prices, keep_picture, report
from ...data.label.pace import Rejected, for_all
from ...data.label.runner import Limits, Runner, key_of
from ...data.pictures import PictureFault
from .items import Item, Manifest, chosen
from .outputs import OUTPUTS, damage, damaged_outputs, find_output
from .protocols import Protocol, inputs_of, roles_of, shown_names

JUDGEMENTS, ABOUT = "judgements.jsonl", "judge.json"

NO_EDIT, GROUND_TRUTH = ANCHORS = ("no-edit", "ground-truth")

FREE = Prices()

STATUS = {"malformed": "unparsed", "refused": "refused"}
"""Why the runner rejected a question -> status of the row; all else is `error`."""


@dataclass(frozen=True, slots=True)
class Task:
    """One call. edited: the picture that is judged; anchor: None for the run's own picture."""

    item: Item
    role: str
    call: str
    edited: Path
    anchor: str | None = None


def folder_of(run: Path, protocol: Protocol, judge: str) -> Path:
    """Where the judgements of a run by one judge lie."""
    named = f"{protocol.name}-{protocol.prompts[:8]}" if protocol.prompts else protocol.name
    named += "-resized" if protocol.resized else ""
    return run / "judged" / f"{named}--{re.sub(r'[^A-Za-z0-9._-]+', '_', judge)}"


def tasks_of(
    manifest: Manifest,
    run: Path | None,
    protocol: Protocol,
    anchors: int,
    items: Sequence[Item],
    damaged: Collection[str] = (),
) -> list[Task]:
    """Every call: of the items that have a picture in the run and are not `damaged`, and of `anchors` items. ConfigError for a
    group that the protocol has no call for."""
    tasks = []
    for item in items:
        edited = find_output(run / OUTPUTS, item) if run and item.id not in damaged else None
        tasks += [Task(item, role, call, edited) for role, call in roles_of(item, protocol).items() if edited]
    for name, able in ((NO_EDIT, list(items)), (GROUND_TRUTH, [item for item in items if "gt_img" in item.refs])):
        for item in chosen(able, anchors, "anchor"):
            edited = manifest.picture(item, "gt_img") if name == GROUND_TRUTH else manifest.sources(item)[0]
            tasks += [Task(item, role, call, edited, name) for role, call in roles_of(item, protocol).items()]
    for task in tasks:
        if task.call not in protocol.calls:
            raise ConfigError(
                f"{task.item.id}: expected a call out of {', '.join(protocol.calls)}, found {task.call!r}. {_GROUP}"
            )
    return tasks


_GROUP = "Correct the item's group in the manifest."


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of judging. counts: of rows by status; told: what judge.json says; requests: of this run."""

    folder: Path
    counts: Mapping[str, int]
    told: Mapping[str, Any]
    requests: int


def judge_run(
    manifest: Manifest,
    run: Path,
    protocol: Protocol,
    annotator: Annotator,
    *,
    items: Sequence[Item],
    anchors: int = 0,
    limits: Limits,
    prices: Prices = FREE,
    retry: bool = False,
    on_done: Callable[[int, int], None] | None = None,
) -> Asked:
    """Ask everything that is not known, and write the rows. Raises ConfigError (folder), DataError (journal), ReasonerError (a
    judge that cannot be used); what was answered before stays."""
    _check_bench(manifest, protocol)
    folder = folder_of(run, protocol, annotator.name)
    damaged = damaged_outputs(run, items)
    tasks = tasks_of(manifest, run, protocol, anchors, items, damaged)
    with Journal(folder / FILE_NAME) as kept:
        runner = Runner(kept, limits, retry=retry)

        async def one(task: Task) -> dict[str, Any]:
            return await _row(runner, manifest, protocol, annotator, task, folder)

        done = None if on_done is None else (lambda count: on_done(count, len(tasks)))
        found = asyncio.run(for_all(tasks, one, at_once=2 * limits.concurrency, on_done=done))
        rows = [{**each, "protocol": protocol.name, "judge": annotator.name} for each in found]
        judged = {task.item.id for task in tasks if task.anchor is None}
        rows += [_unseen(item, protocol, annotator, damaged.get(item.id)) for item in items if item.id not in judged]
        spent = report(kept.entries.values(), prices)
    told = {
        "bench": manifest.bench,
        "protocol": protocol.name,
        "aggregate": protocol.aggregate,
        "questions": protocol.digest,
        "prompts": protocol.prompts,
        "judge": annotator.name,
        "endpoint": annotator.endpoint,
        "manifest": manifest.sha256,
        "items": len(items),
        "max_side": protocol.max_side,
        "resized": protocol.resized,
        **spent,
    }
    write_whole(folder / JUDGEMENTS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    write_json(folder / ABOUT, told)
    return Asked(folder, Counter(row["status"] for row in rows), told, runner.tally.asked)


def _check_bench(manifest: Manifest, protocol: Protocol) -> None:
    if manifest.bench != protocol.bench:
        raise ConfigError(
            f"--protocol: expected one for {manifest.bench}, as the manifest is, found {protocol.name}. Use "
            f"{manifest.bench}-re."
        )


async def _row(
    runner: Runner, manifest: Manifest, protocol: Protocol, annotator: Annotator, task: Task, folder: Path
) -> dict[str, Any]:
    question = protocol.calls[task.call]
    inputs = inputs_of(task.item, question)
    row: dict[str, Any] = {"item": task.item.id, "role": task.role, "call": task.call, "anchor": task.anchor}
    try:
        row["edited"] = shown(task.edited).sha256
        pictures = pictures_of(manifest, protocol, task, folder)
        key = key_of(question.step, f"{question.id}+{question.digest}", annotator.name, inputs, pictures)
        for each in pictures:  # an endpoint would be sent half a picture
            if (why := _damage(each.path, each.sha256)) is not None:
                raise PictureFault("unreadable-picture", why, "export it again.")
        reply, entry = await runner.ask(task.item.id, question, inputs, pictures, annotator)
    except PictureFault as fault:
        return {**row, "status": "error", "marks": None, "note": f"picture: {fault}"}
    except Rejected as rejected:
        status = STATUS.get(rejected.reason, "error")
        found = runner.journal.entries.get(key)
        raw = {"raw": found.raw} if found is not None and found.raw is not None else {}
        return {**row, "key": key, "status": status, "marks": None, "note": rejected.note, **raw, **_spent(found)}
    return {**row, "key": key, "status": "ok", "marks": reply.marks, "reason": reply.reason, "raw": reply.raw, **_spent(entry)}


def _spent(entry: Entry | None) -> dict[str, Any]:
    names = ("prompt", "endpoint", "temperature", "seed", "attempts", "seconds", "tokens_in", "tokens_out", "time")
    return {} if entry is None else {name: getattr(entry, name) for name in names}


@lru_cache(maxsize=4096)
def _damage(path: Path, sha256: str) -> str | None:
    return damage(path)


def _unseen(item: Item, protocol: Protocol, annotator: Annotator, damaged: str | None) -> dict[str, Any]:
    """The row of an item without a picture that can be judged."""
    told = {"status": "missing"} if damaged is None else {"status": "damaged", "note": damaged}
    row = {"item": item.id, "role": None, "call": None, "anchor": None, **told, "marks": None}
    return {**row, "protocol": protocol.name, "judge": annotator.name}


def pictures_of(manifest: Manifest, protocol: Protocol, task: Task, folder: Path | None) -> list[Shown]:
    """The pictures of a call, in order. folder: where resized ones are kept; None resizes none. Raises PictureFault for one
    that is none."""
    resized = protocol.resized and folder is not None
    edited = _resized(task.edited, manifest.sources(task.item)[0], folder) if resized else task.edited
    refs = {name: [path] for name in ("gt_img", "reference_img") if (path := manifest.picture(task.item, name)) is not None}
    named = {"sources": manifest.sources(task.item), "edited": [edited], **refs}
    return [shown(path) for path in shown_names(protocol.calls[task.call], named)]


def _resized(edited: Path, source: Path, folder: Path) -> Path:
    """The edited picture at the size of its source, stretched where the shapes differ; itself where it has it."""
    from PIL import Image, ImageOps

    size = shown(source).size
    if shown(edited).size == size:
        return edited
    if (why := damage(edited)) is not None:
        raise PictureFault("unreadable-picture", why, "export it again.")
    with Image.open(edited) as image:
        made = ImageOps.exif_transpose(image).convert("RGB").resize(size)  # Pillow's default filter, as their script has it
    buffer = io.BytesIO()
    made.save(buffer, format="PNG")
    return keep_picture(buffer.getvalue(), size, folder).path


# ---- before any money is spent ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """What judging would take. calls: all; known: of them in the journal; tokens_in, tokens_out, cost: of those still to ask,
    at most (every answer takes all its room); cost is None without prices. damaged: item -> why one of its pictures cannot be
    decoded; calls that would show it are not among the calls."""

    calls: int
    known: int
    items: int
    missing: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    by_call: Mapping[str, int]
    damaged: Mapping[str, str] = field(default_factory=dict)


def estimate(
    manifest: Manifest,
    run: Path | None,
    protocol: Protocol,
    judge: str,
    *,
    items: Sequence[Item],
    anchors: int,
    prices: Prices,
    per_picture: int,
    extra_tokens: int = 0,
) -> Estimate:
    """Count without asking. run: None counts as if every item had a picture. per_picture: tokens of one picture."""
    _check_bench(manifest, protocol)
    damaged = damaged_outputs(run, items) if run else {}
    tasks = tasks_of(manifest, run, protocol, anchors, items, damaged)
    if run is None:
        tasks += [
            Task(item, role, call, manifest.sources(item)[0])
            for item in items
            for role, call in roles_of(item, protocol).items()
        ]
    entries = read_journal(folder_of(run, protocol, judge) / FILE_NAME).entries if run else {}
    asked, known, tokens_in, tokens_out = [], 0, 0, 0
    for task in tasks:
        question, inputs = protocol.calls[task.call], inputs_of(task.item, protocol.calls[task.call])
        try:
            pictures = pictures_of(manifest, protocol, task, folder_of(run, protocol, judge) if entries else None)
        except PictureFault as fault:
            damaged.setdefault(task.item.id, str(fault))
            continue
        asked.append(task)
        if entries and key_of(question.step, f"{question.id}+{question.digest}", judge, inputs, pictures) in entries:
            known += 1
            continue
        tokens_in += len(pictures) * per_picture + (len(question.system) + len(question.words(inputs))) // 4
        tokens_out += question.max_tokens + extra_tokens
    cost = (tokens_in * prices.tokens_in + tokens_out * prices.tokens_out) / 1e6 if prices != Prices() else None
    pictured = sum(find_output(run / OUTPUTS, item) is not None for item in items) if run else len(items)
    by_call = dict(sorted(Counter(task.call for task in asked).items()))
    missing = len(items) - pictured
    return Estimate(len(asked), known, len(items), missing, tokens_in, tokens_out, cost, by_call, damaged)


def trial(annotator: Annotator, protocol: Protocol, picture: Path, limits: Limits) -> tuple[bool, str]:
    """Ask one question about a picture outside any run: (whether marks came of it, in words). Nothing is kept."""
    call, question = next(iter(protocol.calls.items()))

    class _Nowhere:
        entries: dict[str, Entry] = {}

        def add(self, entry: Entry) -> None:
            self.entries = {entry.key: entry}

    runner = Runner(_Nowhere(), replace(limits, attempts=min(limits.attempts, 2)))  # type: ignore[arg-type]
    inputs = {name: "make no change" for name in question.tells}
    if (why := damage(picture)) is not None:
        return False, f"{call}: {why}"
    one = shown(picture)
    try:
        reply, _ = asyncio.run(runner.ask("trial", question, inputs, [one] * max(1, len(question.shows)), annotator))
    except Rejected as rejected:
        return False, f"{call}: {rejected.reason}: {rejected.note}"
    return True, f"{call}: {json.dumps(reply.marks)}"
