"""What a pipeline leaves: records.jsonl, rejects.jsonl and report.json, each whole, made anew from the journal by every run."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError
from ....reasonedit_core.files import write_json, write_whole
from ..problems import Place
from ..records import FILE_NAME, SCHEMA
from ..rules import check_record
from .annotators import Shown
from .journal import Entry
from .pace import Rejected

REJECTS, REPORT = "rejects.jsonl", "report.json"

Draft = dict[str, Any]
"""A record as JSON has it, before it is checked."""


@dataclass(slots=True)
class Harvest:
    """Drafts in the order of their items, and what was rejected on the way: (item, why)."""

    drafts: list[Draft] = field(default_factory=list)
    rejects: list[tuple[str, Rejected]] = field(default_factory=list)

    def reject(self, item: str, step: str, reason: str, note: str = "") -> None:
        """Note an item that becomes no record."""
        self.rejects.append((item, Rejected(step, reason, note)))


def picture_entry(picture: Shown, folder: Path) -> Draft:
    """A picture as a record in `folder` names it. Rejected where the two lie on different drives."""
    try:
        path = Path(os.path.relpath(picture.path.resolve(), folder.resolve())).as_posix()
    except ValueError as error:
        raise Rejected("picture", "bad-path", f"{picture.path} lies on another drive than {folder}") from error
    return {"path": path, "sha256": picture.sha256, "size": list(picture.size)}


def keep_picture(png: bytes, size: tuple[int, int], folder: Path) -> Shown:
    """Store the bytes of a picture below `folder`, once, under a name that follows from them."""
    sha = hashlib.sha256(png).hexdigest()
    path = folder / "pictures" / sha[:2] / f"{sha[:24]}.png"
    try:
        there = path.stat().st_size == len(png)  # it was written whole or not at all
    except OSError:
        there = False
    if not there:
        write_whole(path, png)
    return Shown(path, sha, size)


def head(kind: str, name: str, seed_of: str, entries: Iterable[Entry], **more: Any) -> Draft:
    """The part of a draft that all kinds have. seed_of: where its item came from."""
    return {
        "schema": SCHEMA,
        "id": name,
        "kind": kind,
        "provenance": [provenance(entry) for entry in entries],
        "source": seed_of,
        **more,
    }


def provenance(entry: Entry) -> Draft:
    """What a record tells of one step."""
    names = ("step", "model", "endpoint", "prompt", "seed", "temperature", "time", "key")
    told = {name: getattr(entry, name) for name in names if getattr(entry, name) is not None}
    score = entry.value.get("score", entry.value.get("raw_score")) if entry.value else None
    return {**told, "accepted": True, **({"score": float(score)} if isinstance(score, int | float) else {})}


def share_of(*parts: str) -> float:
    """A number 0 <= x < 1 that follows from the parts: how many things are decided alike on every machine, in any order."""
    return int(hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 16**13


def write(folder: Path, harvest: Harvest) -> tuple[int, list[Draft]]:
    """Check every draft, write the sound ones as records and all rejects; (records, the rejects as written).

    A draft that is no sound record is rejected with the first fault (step `record`).
    """
    lines: list[str] = []
    seen: set[str] = set()
    rejects = list(harvest.rejects)
    for draft in harvest.drafts:
        record, problems = check_record(draft, Place(str(folder / FILE_NAME), len(lines) + 1))
        if record is None or draft["id"] in seen:
            fault = next((each for each in problems if each.severity == "error"), None)
            note = f"{fault.field}: expected {fault.expected}, found {fault.found}" if fault else "an id twice"
            rejects.append((draft["id"], Rejected("record", fault.code if fault else "duplicate-id", note)))
            continue
        seen.add(draft["id"])
        lines.append(record.to_json())
    told = [{"item": item, "step": why.step, "reason": why.reason, "note": why.note} for item, why in rejects]
    write_whole(folder / REJECTS, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in told).encode())
    # Last, so that where records are, the rejects that go with them are too.
    write_whole(folder / FILE_NAME, "".join(line + "\n" for line in lines).encode())
    return len(lines), told


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a million tokens, in any currency."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Prices:
        """IN,OUT. ConfigError for anything else."""
        try:
            tokens_in, tokens_out = (float(part) for part in text.split(","))
            if not (0 <= tokens_in < float("inf") and 0 <= tokens_out < float("inf")):
                raise ValueError
        except ValueError:
            raise ConfigError(f"--price: expected IN,OUT per million tokens, such as 0.15,0.6, found {text!r}.") from None
        return cls(tokens_in, tokens_out)


def report(entries: Iterable[Entry], prices: Prices) -> dict[str, Any]:
    """What all questions of a journal took, in all and by step. cost: None where nothing is said of prices."""
    steps: dict[str, Counter[str]] = {}
    for entry in entries:
        count = steps.setdefault(f"{entry.prompt or entry.step} {entry.model}", Counter())
        count["done" if entry.done else "rejected"] += 1
        if entry.endpoint is not None:  # work of our own takes no requests
            count += Counter(attempts=entry.attempts, tokens_in=entry.tokens_in, tokens_out=entry.tokens_out)
        steps[f"{entry.prompt or entry.step} {entry.model}"] = count
    total = sum(steps.values(), Counter())
    cost = (total["tokens_in"] * prices.tokens_in + total["tokens_out"] * prices.tokens_out) / 1e6
    return {
        "requests": total["attempts"],
        "tokens_in": total["tokens_in"],
        "tokens_out": total["tokens_out"],
        "cost": round(cost, 6) if prices != Prices() else None,
        "steps": {name: dict(count) for name, count in sorted(steps.items())},
    }


def write_report(folder: Path, told: Mapping[str, Any]) -> None:
    """Write report.json."""
    write_json(folder / REPORT, dict(told))


def reasons(rejects: Sequence[Draft]) -> dict[str, int]:
    """How many were rejected, by step and reason, the most frequent first."""
    return dict(Counter(f"{each['step']}: {each['reason']}" for each in rejects).most_common())


def clear_parts(folder: Path) -> None:
    """Remove what a run left that was killed while it renamed a file of ours. Only for the run that holds the journal."""
    for name in (FILE_NAME, REJECTS, REPORT):
        for part in folder.glob(f".{name}.*.part"):
            part.unlink(missing_ok=True)
