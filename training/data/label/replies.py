"""What the annotator may answer: one model per question, which is both the JSON schema that is sent and the local check.

Endpoints may ignore a schema without a word, so every reply is checked here. Nothing is converted, filled in or guessed.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ....reasonedit_core.dialogue.replies import MAX_INSTRUCTION, MAX_REPLY
from ....reasonedit_core.errors import MalformedReply
from .hypothetical import unfit

Text = Annotated[str, StringConstraints(pattern=r"\S", max_length=MAX_INSTRUCTION)]
Count = Annotated[int, Field(ge=0, le=99)]
Mark = Annotated[float, Field(ge=0, le=10)]


class Reply(BaseModel):
    """All keys are needed, others are errors, no number is made from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def unfit(self) -> tuple[str, str] | None:
        """Why an answer of the right form is still none, as a code for reports and words for the annotator; mostly None."""
        return None


class Classified(Reply):
    """`class`: whether the instruction can be painted as it stands."""

    clarity: Literal["clear", "abstract"] = Field(alias="class")
    category: Text
    why: Text


class Simplified(Reply):
    """The single actions that an abstract instruction means, in order."""

    steps: list[Text] = Field(min_length=1, max_length=6)


class Abstracted(Reply):
    """An abstract instruction that means a clear one; null where there is none that means just this."""

    instruction: Text | None


class Verified(Reply):
    """The four things that a label must be."""

    faithful: bool
    executable: bool
    nothing_added: bool
    visible: bool
    why: Text


class Described(Reply):
    """The picture that should come out."""

    description: Text


class Scored(Reply):
    """A picture held against a description: the findings, and the mark 0..10 before its caps."""

    meets_instruction: Literal["yes", "partial", "no"]
    major_conflicts: Count
    minor_conflicts: Count
    omissions: Count
    raw_score: Mark
    reason: Text


class Decided(Reply):
    """A verdict. second_instruction: with a reflection and nothing else."""

    reason: Text
    verdict: Literal["success", "reflection", "failed"]
    second_instruction: Text | None

    @model_validator(mode="after")
    def _goes_together(self) -> Decided:
        if (self.verdict == "reflection") == (self.second_instruction is None):
            raise ValueError("second_instruction must be text when verdict is reflection, and null otherwise")
        return self


class Audited(Reply):
    """The second judge's verdict."""

    verdict: Literal["success", "reflection", "failed"]
    why: Text


class Expanded(Reply):
    """A further scene in which a law of the world has had its effect."""

    scene: Text


class Graded(Reply):
    """A picture held against a scene and a law, by PhyBench's marks: scene 0..2, law 0..3."""

    scene: Annotated[int, Field(ge=0, le=2)]
    law: Annotated[int, Field(ge=0, le=3)]
    why: Text


class Rewritten(Reply):
    """What the picture shows, what it would have shown before, and what somebody asks who has seen only that."""

    instruction: Text
    source_caption: Text
    target_caption: Text
    objects: list[Text] = Field(min_length=1, max_length=16)

    def unfit(self) -> tuple[str, str] | None:
        """It must suppose something, shortly, and not give the outcome away."""
        return unfit(self.instruction, self.source_caption, self.target_caption)


class Compared(Reply):
    """A candidate for the picture before, beside the picture after: three marks 0..10."""

    identity: Mark
    plausible_before: Mark
    quality: Mark
    why: Text


class UnfitReply(MalformedReply):
    """An answer of the right form that cannot be used. reason: the code that stands in reports."""

    def __init__(self, reason: str, message: str, raw: str) -> None:
        super().__init__(f"{message}.", raw)
        self.reason = reason


def schema_of(reply: type[Reply]) -> dict[str, Any]:
    """The JSON schema of a reply, as endpoints take it: without the titles that only people read."""
    return _plain(reply.model_json_schema(by_alias=True))


def read_reply(text: str, reply: type[Reply]) -> Reply:
    """The one JSON object in a reply, checked. Around it there may be thoughts in `<think>` and a code fence.

    MalformedReply says what was expected and what was found, so that it can be told to the annotator; UnfitReply likewise
    where the form is right and the answer is not.
    """
    found = _object_in(text)
    try:
        made = reply.model_validate_json(json.dumps(found))
    except ValidationError as error:
        faults = "; ".join(f"{_where(each)}: {each['msg']}" for each in error.errors(include_url=False)[:5])
        raise MalformedReply(f"expected JSON of the stated schema, found faults in it: {faults}.", text) from error
    if (why := made.unfit()) is not None:
        raise UnfitReply(*why, text)
    return made


def _where(fault: Any) -> str:
    return ".".join(map(str, fault["loc"])) or "the object"


_THOUGHTS = re.compile(r"\A.*</think>", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\Z", re.DOTALL)


def _object_in(text: str) -> dict[str, Any]:
    if len(text) > MAX_REPLY:
        raise MalformedReply(f"expected a reply of at most {MAX_REPLY} characters, found {len(text)}.", text)
    body = _THOUGHTS.sub("", text, count=1).strip()
    fenced = _FENCE.match(body)
    body = fenced[1] if fenced else body
    try:
        found = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        shown = f"text that is none ({error}): {body[:120]!r}" if body else "nothing"
        raise MalformedReply(f"expected one JSON object and nothing else, found {shown}.", text) from error
    if not isinstance(found, dict):
        raise MalformedReply(f"expected one JSON object, found another value: {body[:120]!r}.", text)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _plain(schema: Any) -> Any:
    if isinstance(schema, dict):
        # "title" and "description" are also names of values, which have an object under them
        return {k: _plain(v) for k, v in schema.items() if not (k in ("title", "description") and isinstance(v, str))}
    return [_plain(each) for each in schema] if isinstance(schema, list) else schema
