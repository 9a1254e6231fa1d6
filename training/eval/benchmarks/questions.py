"""A judge's question as the runner of `reasonedit-data` asks it, and how marks are read out of what is answered.

Read, in this order: one JSON object (bare, fenced, or the only one with marks among other words), a list `score` in it as
VIEScore's form has it, numbers in brackets between two `||V^=^V||`, labelled lines (`Success: 4`, `**Success**: 4/5`). Where
one mark is asked for, also a number alone and one after `Answer:` or `Score:`; and with `first_token`, where nothing else is
read, the first 0 or 1 that stands by itself, as Reason50K's MLLM score is read. A mark that is missing, out of its scale or not
whole makes the answer unreadable. Nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....reasonedit_core.errors import MalformedReply
from ...data.label.prompts import Prompt
from ...data.label.replies import MAX_REPLY, Reply

DELIMITER = "||V^=^V||"
"""Around the answer in VIEScore's text form."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One number of an answer: low..high, whole. Ours and the benchmarks' scales have whole marks only."""

    name: str
    low: int
    high: int


class Marked(Reply):
    """What is kept of an answer. marks: by name; raw: the whole text."""

    marks: dict[str, int]
    reason: str
    raw: str


@dataclass(frozen=True, slots=True)
class JudgeQuestion(Prompt):
    """A question that is answered with marks. max_side: long side of its pictures as they are sent. in_order: labelled lines
    count by their order, for texts of others whose labels are not ours; placeholders: the text has the values inside, and no
    schema is sent with it; first_token: of one mark of 0 or 1, see the head of the file."""

    marks: tuple[Mark, ...]
    max_side: int
    in_order: bool = False
    placeholders: bool = False
    first_token: bool = False

    @property
    def reply(self) -> type[Reply]:
        """What is kept."""
        return Marked

    @property
    def digest(self) -> str:
        """Changes with anything an answer depends on."""
        marks = [(mark.name, mark.low, mark.high) for mark in self.marks]
        told = [Prompt.digest.fget(self), marks, self.max_side, self.in_order, self.placeholders]
        told += ["first token"] if self.first_token else []  # only then: what other questions were answered stays known
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the answer."""
        marks = {mark.name: {"type": "integer", "minimum": mark.low, "maximum": mark.high} for mark in self.marks}
        properties = {"reason": {"type": "string"}, **marks}
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    def words(self, inputs: Mapping[str, str], fault: str | None = None) -> str:
        """The question about `inputs`."""
        if not self.placeholders:
            # spelled out: zero-argument super() does not find its class in one with slots
            return Prompt.words(self, inputs, fault)
        text = self.text
        for name in self.tells:
            for form in PLACEHOLDERS.get(name, (f"<{name}>",)):
                text = text.replace(form, inputs[name])
        return text + ("\n\n" + self.correction.strip().format(error=fault) if fault else "")

    def read(self, text: str) -> Marked:
        """The marks in an answer. Raises MalformedReply, whose words can be told to the judge."""
        if len(text) > MAX_REPLY:
            raise MalformedReply(f"expected a reply of at most {MAX_REPLY} characters, found {len(text)}.", text)
        body = text.rpartition("</think>")[2].strip()
        names = [mark.name for mark in self.marks]
        found = _object_in(body) or _object_among(body, names)
        if found is not None:
            values = found.get("score") if isinstance(found.get("score"), list) else [found.get(name) for name in names]
            reason = found.get("reason", found.get("reasoning", ""))
        else:
            values, reason = _delimited(body) or self._labelled(body) or self._single(body), body
        if values is None or len(values) != len(names):
            number = "none" if values is None else str(len(values))
            raise MalformedReply(
                f"expected the marks {', '.join(names)} in one JSON object, found {number}: {body[:120]!r}.", text
            )
        marks = {mark.name: _checked(mark, value, text) for mark, value in zip(self.marks, values, strict=True)}
        return Marked(marks=marks, reason=reason.strip()[:2000] if isinstance(reason, str) else "", raw=text)

    def _labelled(self, body: str) -> list[Any] | None:
        """Numbers after labels: ours by name, each once; with `in_order` all lines that end so."""
        found = [match for line in body.splitlines() if (match := _LABELLED.match(line.strip()))]
        if self.in_order:
            return [self._out_of(at, match) for at, match in enumerate(found)] or None
        named = [(match["name"].strip().casefold().replace(" ", "_"), match) for match in found]
        values = []
        for at, mark in enumerate(self.marks):
            own = [match for name, match in named if name == mark.name.casefold()]
            if len(own) != 1:
                return None
            values.append(self._out_of(at, own[0]))
        return values

    def _single(self, body: str) -> list[Any] | None:
        """The number of an answer to a question of one mark: alone, after `Answer:` or `Score:`, or its first token."""
        if len(self.marks) != 1:
            return None
        if (alone := _ALONE.match(body)) is not None:
            return [self._out_of(0, alone)]
        found = [match for line in body.splitlines() if (match := _LABELLED.match(line.strip()))]
        answers = [match for match in found if match["name"].strip().casefold() in _ANSWER]
        if answers:
            return [self._out_of(0, answers[0])] if len(answers) == 1 else None
        first = _TOKEN.search(body) if self.first_token else None
        return None if first is None else [int(first[0])]

    def _out_of(self, at: int, match: re.Match[str]) -> Any:
        """The number of a line; None where it is out of another scale (8/10 where 5 is the best)."""
        if match["most"] and (at >= len(self.marks) or int(match["most"]) != self.marks[at].high):
            return None
        return float(match["value"])


PLACEHOLDERS: Mapping[str, Sequence[str]] = {
    "instruction": ("<edit_prompt>", "<instruction>", "{instruction}", "{instruct}"),
    "explanation": ("<explanation>", "{explanation}", "{explain}"),
    "reference": ("<reference>", "{reference}"),
}
"""Forms in which the texts of others name a value."""

_LABELLED = re.compile(
    r"\A[-*#\s\d.)]*(?P<name>[A-Za-z][\w &/-]*?)[\s*]*:[\s*]*(?P<value>-?\d+(?:\.\d+)?)(?:\s*/\s*(?P<most>\d+))?[\s*.]*\Z"
)
_ALONE = re.compile(r"\A[\s*\"'`]*(?P<value>-?\d+(?:\.\d+)?)(?:\s*/\s*(?P<most>\d+))?[\s*.\"'`]*\Z")
_ANSWER = frozenset(("answer", "score", "final answer", "final score", "mark"))
_TOKEN = re.compile(r"(?<![\w.,-])[01](?![\w%]|[.,/-]\d)")
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


def _object_in(body: str) -> dict[str, Any] | None:
    """The JSON object that a reply is, or the one in its only fence."""
    fences = _FENCED.findall(body)
    for text in (body, *(fences if len(fences) == 1 else ())):
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _object_among(body: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The only JSON object with marks that stands among other words; None for several, of which none is the answer."""
    reader, found, at = json.JSONDecoder(object_pairs_hook=_once), [], body.find("{")
    while at >= 0:
        end = at + 1
        try:
            value, end = reader.raw_decode(body, at)
        except (ValueError, RecursionError):
            pass
        else:
            if isinstance(value.get("score"), list) or set(names) <= value.keys():
                found.append(value)
        at = body.find("{", end)
    return found[0] if len(found) == 1 else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _delimited(body: str) -> list[Any] | None:
    parts = body.split(DELIMITER)
    if len(parts) != 3:
        return None
    found = _object_in(parts[1].strip())
    if found is not None and isinstance(found.get("score"), list):
        return found["score"]
    try:
        values = json.loads(parts[1].strip())
    except ValueError:
        return None
    return values if isinstance(values, list) else None


def _checked(mark: Mark, value: Any, text: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise MalformedReply(f"{mark.name}: expected a whole number, found {value!r}.", text)
    if not mark.low <= value <= mark.high:
        raise MalformedReply(f"{mark.name}: expected {mark.low} to {mark.high}, found {value:g}.", text)
    return int(value)
