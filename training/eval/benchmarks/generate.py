"""Edited pictures for a benchmark: by a system of the project, or by any command. Resumable to the item, in shards.

In the run's folder: `outputs/` in the official layout, `items/` with rounds and trace of every item that a system of the
project made, and one journal per shard (`generated-I-of-N.jsonl`), in which each finished item is noted.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ....reasonedit_core.errors import ConfigError, DataError, Interrupted, MalformedReply, ReasonEditError
from ....reasonedit_core.files import write_json
from ...data.label.annotators import shown
from ...data.label.journal import Entry, Journal, read_journal
from ...data.label.pace import Rejected, for_all
from ...data.label.runner import Limits, Runner
from ...data.pictures import PictureFault
from .items import Item, Manifest
from .outputs import OUTPUTS, damage, find_output, keep_output, official_name

ABOUT, STEP = "run.json", "generate"

SEVERAL = ("skip", "first", "concat")
"""What a maker of one source does with an item of several (149 of KRIS): none, the first, or all side by side."""


@dataclass(frozen=True, slots=True)
class Made:
    """An edited picture. facts: rounds, stop, best, and seconds of work where they are not all that passed."""

    png: bytes
    facts: Mapping[str, Any]


class Maker(Protocol):
    """name: stands in every record, and tells weights and settings apart; kind: base, think, loop, reroll or command."""

    name: str
    kind: str

    def make(self, source: Path, instruction: str, seed: int, folder: Path) -> Made:
        """Edit. folder: for what is kept beside the picture. Called in a thread, one call at a time."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """What is made. shard: (i, n), i from 1: every n-th item; seed: every item's follows from it and the item's id."""

    run: Path
    shard: tuple[int, int] = (1, 1)
    seed: int = 0
    several: str = "skip"
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Generated:
    """What came of it. made: of this call; known: made before; failed: item -> why there is no picture."""

    made: int
    known: int
    failed: Mapping[str, str]


def generate(
    manifest: Manifest, items: Sequence[Item], maker: Maker, job: Job, on_done: Callable[[int, int], None] | None = None
) -> Generated:
    """Make what is not made. Raises ConfigError where the folder is another maker's, and what the maker raises that is no fault
    of one item. What was made stays."""
    number, shards = job.shard
    own = [item for at, item in enumerate(items) if at % shards == number - 1]
    _claim(job.run, manifest, maker, job)
    with Journal(job.run / f"generated-{number}-of-{shards}.jsonl") as kept:
        for entry in journals(job.run).values():  # another division into shards must not make anything twice
            kept.entries.setdefault(entry.key, entry)
        runner = Runner(kept, Limits(concurrency=1), retry=job.retry)
        made: list[str] = []

        async def one(item: Item) -> Entry:
            return await _item(runner, manifest, item, maker, job, made)

        done = None if on_done is None else (lambda count: on_done(count, len(own)))
        found = asyncio.run(for_all(own, one, at_once=1, on_done=done))
    failed = {
        item.id: f"{each.reason}: {each.note}" for item, each in zip(own, found, strict=True) if isinstance(each, Rejected)
    }
    return Generated(len(made), len(own) - len(failed) - len(made), failed)


async def _item(runner: Runner, manifest: Manifest, item: Item, maker: Maker, job: Job, made_now: list[str]) -> Entry:
    seed = int(hashlib.sha256(f"{job.seed}\x1f{item.id}".encode()).hexdigest()[:8], 16)
    try:
        pictures = [shown(path) for path in manifest.sources(item)]
    except PictureFault as fault:
        raise Rejected(STEP, fault.code, str(fault)) from None
    policy = job.several if len(pictures) > 1 else "one"

    def work() -> dict[str, Any]:
        if policy == "skip":
            raise Rejected(STEP, "several-sources", f"{len(pictures)} sources, and the editor takes one (--several)")
        folder = job.run / "items" / official_name(item)
        for each in pictures:
            if (why := damage(each.path)) is not None:  # a maker would end the whole run
                raise Rejected(STEP, "unreadable-picture", why[:500])
        source = pictures[0].path if policy != "concat" else _side_by_side([each.path for each in pictures], folder)
        try:
            made = maker.make(source, item.instruction, seed, folder)
        except (Interrupted, ConfigError):
            raise
        except MalformedReply as error:
            raise Rejected(STEP, "malformed", str(error)[:500]) from error
        except MakerFault as error:
            raise Rejected(STEP, "maker", str(error)[:500]) from error
        path = keep_output(job.run, item, made.png)
        made_now.append(item.id)
        told = {"output": path.relative_to(job.run).as_posix(), "sha256": hashlib.sha256(made.png).hexdigest()}
        return {**told, "kind": maker.kind, **made.facts}

    inputs = {"instruction": item.instruction, "several": policy, "output": official_name(item)}
    return await runner.do(
        item.id, STEP, maker.kind, maker.name, inputs, pictures, work, seed=seed, holds=lambda entry: _holds(job.run, entry)
    )


class MakerFault(ReasonEditError):
    """A maker has no picture for one item; the others may go on."""


def _holds(run: Path, entry: Entry) -> bool:
    path = run / entry.value["output"]
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry.value["sha256"]


def _claim(run: Path, manifest: Manifest, maker: Maker, job: Job) -> None:
    """Pictures of two makers in one folder would be judged as one system's."""
    about = {"bench": manifest.bench, "manifest": manifest.sha256, "system": maker.name, "kind": maker.kind, "seed": job.seed}
    about["several"] = job.several
    path = run / ABOUT
    if path.is_file():
        found = read_about(run)
        other = [name for name, value in about.items() if found.get(name) != value]
        if other:
            told = ", ".join(f"{name} {found.get(name)!r} in place of {about[name]!r}" for name in other)
            raise ConfigError(f"{run}: expected the folder of this run, found {told}. Choose another --out.")
        return
    write_json(path, about)


def read_about(run: Path) -> dict[str, Any]:
    """run.json. ConfigError where there is none."""
    try:
        return json.loads((run / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run}: expected a run with {ABOUT}, found none ({error}). `generate` or `import` makes one."
        ) from error


def journals(run: Path) -> dict[str, Entry]:
    """All that is noted as made, of every shard."""
    found: dict[str, Entry] = {}
    for path in sorted(run.glob("generated-*-of-*.jsonl")):
        for key, entry in read_journal(path).entries.items():
            if entry.done or key not in found:
                found[key] = entry
    return found


def run_facts(run: Path, items: Sequence[str]) -> dict[str, Any]:
    """What is known of how a run's pictures were made: who, mean seconds and rounds per item, why runs stopped, and failures.

    Means are over the items that have the figure, and say how many these are.
    """
    wanted = set(items)
    entries = [entry for entry in journals(run).values() if entry.item in wanted]
    values = [entry.value for entry in entries if entry.done]
    told: dict[str, Any] = {
        key: value for key, value in read_about(run).items() if key in ("system", "kind", "seed", "several")
    }
    for name in ("seconds", "rounds"):
        own = [value[name] for value in values if value.get(name) is not None]
        told[name] = {"n": len(own), "mean": sum(own) / len(own)} if own else None
    told["stops"] = dict(Counter(value["stop"] for value in values if value.get("stop")).most_common())
    told["failed"] = dict(Counter(entry.reason for entry in entries if not entry.done).most_common())
    return told


def take_in(manifest: Manifest, folder: Path, run: Path, name: str) -> Generated:
    """Somebody else's pictures in the official layout, as a run of the system `name`. One that cannot be decoded is not taken,
    and told among the failed. Raises ConfigError where none is found."""
    from .outputs import as_png, find_all

    taken = find_all(folder, manifest.items)

    class Importer:
        kind = "import"

        def __init__(self) -> None:
            self.name = name

    _claim(run, manifest, Importer(), Job(run))  # type: ignore[arg-type]
    failed = dict.fromkeys(taken.missing, "missing: no picture in the folder")
    for item in manifest.items:
        if item.id not in taken.found:
            continue
        there = find_output(run / OUTPUTS, item)
        try:
            png = as_png(taken.found[item.id])
        except DataError as error:
            kept = "" if there is None else " What was taken in before stays."
            failed[item.id] = f"damaged: {error}{kept}"
            continue
        if there is None or there.read_bytes() != png:
            keep_output(run, item, png)
    return Generated(sum(find_output(run / OUTPUTS, item) is not None for item in manifest.items), 0, failed)


def _side_by_side(paths: Sequence[Path], folder: Path) -> Path:
    """All pictures in a row, at the height of the first."""
    from PIL import Image, ImageOps

    from ....reasonedit_core.files import write_whole

    opened = []
    for path in paths:
        with Image.open(path) as image:
            opened.append(ImageOps.exif_transpose(image).convert("RGB"))
    height = opened[0].height
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in opened]
    row = Image.new("RGB", (sum(image.width for image in scaled), height))
    at = 0
    for image in scaled:
        row.paste(image, (at, 0))
        at += image.width
    buffer = io.BytesIO()
    row.save(buffer, format="PNG")
    return write_whole(folder / "sources.png", buffer.getvalue())
