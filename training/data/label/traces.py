"""Saved runs as the pipeline sees them, and what the artist has said of them.

A run is a folder that `reasonedit edit` wrote (trace.json and rounds/), or a PNG of the node Save Trace. What was said of it
lies beside it, as `feedback.json` in the folder or NAME.feedback.json beside NAME.png:

    {"schema": "reasonedit.feedback/1",
     "thought": "what thinking should have said",
     "rounds": [{"round": 1, "verdict": "correct", "instruction": "Lower the left arm.", "reason": "It is raised."},
                {"round": 2, "verdict": "accept", "score": 9}]}

Rounds are counted from 1, as everywhere they are shown. Only `schema` is needed; `reason` and `score` (0..10) take the place
of what the reflector said.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ....reasonedit_core.errors import DataError
from ....reasonedit_core.files import write_json
from .pace import Rejected
from .replies import Text

TRACE, FEEDBACK = "trace.json", "feedback.json"
SCHEMA = "reasonedit.feedback/1"


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RoundFeedback(_Said):
    """What the artist says of one round. instruction: with `correct` and nothing else, what is still to be done."""

    round: Annotated[int, Field(ge=1)]
    verdict: Literal["accept", "reject", "correct"]
    instruction: Text | None = None
    reason: Text | None = None
    score: Annotated[float, Field(ge=0, le=10)] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> RoundFeedback:
        if (self.verdict == "correct") == (self.instruction is None):
            raise ValueError("an instruction stands with the verdict correct, and with no other")
        return self


class Feedback(_Said):
    """What the artist says of a run. thought: what thinking should have made of the words."""

    schema_id: Literal["reasonedit.feedback/1"] = Field(alias="schema")
    thought: Text | None = None
    rounds: tuple[RoundFeedback, ...] = Field((), strict=False)

    @model_validator(mode="after")
    def _once_each(self) -> Feedback:
        numbers = [each.round for each in self.rounds]
        if len(set(numbers)) < len(numbers):
            raise ValueError("every round stands there once")
        return self

    def of(self, number: int) -> RoundFeedback | None:
        """What is said of a round, counted from 1."""
        return next((each for each in self.rounds if each.round == number), None)


@dataclass(frozen=True, slots=True)
class SavedRound:
    """One round. goal, target: what it was judged against, None where that is not known; scores: as the trace has them."""

    instruction: str
    input_index: int | None
    picture: bytes
    goal: str | None
    target: str | None
    decision: str | None
    reason: str | None
    second: str | None
    scores: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SavedTrace:
    """A run. source and the rounds' pictures: PNG or whatever file they were; model: of the editor, where it is known."""

    original: str
    source: bytes
    rounds: tuple[SavedRound, ...]
    model: str | None = None
    seed: int | None = None


def find_traces(paths: Iterable[Path]) -> list[Path]:
    """The runs below the paths, each a folder with a trace.json or a PNG file, sorted. Of PNG files in folders those count
    beside which feedback lies. DataError for a path that holds none."""
    found: set[Path] = set()
    for path in paths:
        here = {path} if path.is_file() and path.suffix.lower() == ".png" else set(_below(path)) if path.is_dir() else set()
        if not here:
            raise DataError(
                f"{path}: expected a folder that `reasonedit edit` wrote, a PNG of Save Trace, or a folder of such, found "
                "none. Check the path."
            )
        found |= here
    return sorted(found)


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob(TRACE):
        yield path.parent
    for path in folder.rglob("*.png"):
        if feedback_path(path).is_file():
            yield path


def feedback_path(trace: Path) -> Path:
    """Where what is said of a run lies."""
    return trace / FEEDBACK if trace.is_dir() else trace.with_name(f"{trace.stem}.{FEEDBACK}")


def read_feedback(trace: Path) -> Feedback | None:
    """What is said of a run; None where nothing is. DataError for a file of another form."""
    path = feedback_path(trace)
    if not path.is_file():
        return None
    try:
        return Feedback.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        words = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the object'}: {each['msg']}" for each in _faults(error))
        raise DataError(f"{path}: expected feedback ({SCHEMA}), found faults in it: {words or error}. Correct them.") from error


def _faults(error: Exception) -> list[Any]:
    return error.errors(include_url=False)[:3] if isinstance(error, ValidationError) else []


def write_feedback(trace: Path, said: RoundFeedback | None, thought: str | None) -> Path:
    """Add to what is said of a run; what was said of the same round before is replaced."""
    before = read_feedback(trace) or Feedback(schema=SCHEMA)
    rounds = {each.round: each for each in (*before.rounds, *((said,) if said else ()))}
    told = {"schema": SCHEMA, "thought": thought or before.thought}
    told["rounds"] = [rounds[number].model_dump(exclude_none=True) for number in sorted(rounds)]
    return write_json(feedback_path(trace), {key: value for key, value in told.items() if value})


def trace_files(trace: Path) -> list[Path]:
    """The files that a run consists of, its feedback among them; what becomes of it follows from these and the source."""
    files = [trace] if trace.is_file() else [trace / TRACE, *sorted((trace / "rounds").glob("*.png"))]
    return [*files, *([feedback_path(trace)] if feedback_path(trace).is_file() else [])]


def read_trace(trace: Path) -> SavedTrace:
    """Read a run. Rejected (step `read`) where it is damaged or its source is gone."""
    try:
        return _read_folder(trace) if trace.is_dir() else _read_png(trace)
    except DataError as error:
        raise Rejected("read", "damaged", str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Rejected("read", "damaged", f"{trace}: expected a whole trace, found {error!r}") from None


def _read_folder(folder: Path) -> SavedTrace:
    told = json.loads((folder / TRACE).read_text(encoding="utf-8"))
    request, thought = told["request"], told["thought"]
    original = request["instruction"]
    goal = thought["instruction"] if thought else original
    goals: list[str | None] = []
    rounds = []
    for entry in told["rounds"]:
        before = entry["input_index"]
        # Of a run that thought again only the last thought is kept: what earlier rounds were judged against is then unknown.
        follows = entry["instruction"].startswith(goal.strip().rstrip(".。;；"))
        goals.append((goal if follows else None) if before is None else goals[before])
        known = goals[-1] is not None
        rounds.append(
            SavedRound(
                entry["instruction"],
                before,
                (folder / entry["image"]).read_bytes(),
                goals[-1],
                told["target"] if known else None,
                entry["decision"],
                entry["reason"],
                entry["next_instruction"],
                entry["scores"] or {},
            )
        )
    return SavedTrace(
        original, _source(folder, request.get("image")), tuple(rounds), request.get("system"), request.get("seed")
    )


def _source(folder: Path, named: Any) -> bytes:
    places = [folder / "source.png"]
    places += [Path(named), folder / Path(named).name] if isinstance(named, str) and named else []
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        told = " or ".join(map(str, places))
        raise Rejected("read", "no-source", f"expected the picture before the edits at {told}; put it there as source.png")
    return path.read_bytes()


def _read_png(path: Path) -> SavedTrace:
    from ....reasonedit_core.tracefile import unpack

    record, tensors = unpack(path)
    rounds = []
    for number, entry in enumerate(record["rounds"]):
        seen = entry["reflection"] or {}
        rounds.append(
            SavedRound(
                entry["instruction"],
                entry["input_index"],
                _png(tensors[f"{number}.image"]),
                entry["goal"],
                entry["target"],
                seen.get("decision"),
                seen.get("reason"),
                seen.get("instruction"),
                seen.get("scores") or {},
            )
        )
    return SavedTrace(record["rounds"][-1]["original"], _png(tensors["source"]), tuple(rounds))


def _png(stored: Any) -> bytes:
    from ....reasonedit_core.images import to_pil
    from ....reasonedit_core.tracefile import unpacked

    buffer = io.BytesIO()
    to_pil(unpacked(stored)).save(buffer, format="PNG")
    return buffer.getvalue()
