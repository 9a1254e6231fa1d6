"""Reading replies: raw text -> typed values, or MalformedReply. The tags and JSON keys are those of the released code.

Nothing is guessed. A reply is read when it can mean one thing only; otherwise MalformedReply says what was expected and what
was found. `released=True` follows the released code's own gates, so that its loop can be repeated decision by decision; the
canned verdict and the zero scores that the released code makes up for unreadable replies are not repeated in either mode.
All readers take time linear in the reply (very long ones are refused first).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import MalformedReply
from ..interfaces import Form
from ..types import Decision
from .json_text import fenced_object, greedy_object, objects_in

THINK = "<#Think>"
TAGS: dict[str, Decision] = {
    "<#Reflection>": Decision.REFINE,
    "<#Failed>": Decision.FAILED,
    "<#Success>": Decision.SUCCESS,
    "<#Others>": Decision.SUCCESS,
}
_OWN_TAGS = ("<#Reflection>", "<#Failed>", "<#Success>")

_COUNT = {"type": "integer", "minimum": 0}
_MARK = {"type": "number", "minimum": 0, "maximum": 10}
SCHEMAS: dict[Form, dict[str, Any]] = {
    "consistency": {
        "type": "object",
        "properties": {
            "meets_instruction": {"type": "string", "enum": ["yes", "partial", "no"]},
            "major_conflicts": _COUNT,
            "minor_conflicts": _COUNT,
            "omissions": _COUNT,
            "raw_score": _MARK,
            "reason": {"type": "string"},
        },
        "required": ["meets_instruction", "major_conflicts", "minor_conflicts", "omissions", "raw_score", "reason"],
        "additionalProperties": False,
    },
    "pair": {
        "type": "object",
        "properties": {
            "score": {"type": "array", "items": _MARK, "minItems": 2, "maxItems": 2},
            "reasoning": {"type": "string"},
        },
        "required": ["score", "reasoning"],
        "additionalProperties": False,
    },
}
"""JSON schemas of the forms that have one, for endpoints that can keep to a schema."""

# A reply has a budget of at most some thousand tokens; what is longer did not come from a question of ours.
MAX_REPLY = 100_000
# What an editor or a description can use. The MLLM's own context would be the next limit.
MAX_INSTRUCTION = 4_000
_SHOWN = 200


class Consistency(NamedTuple):
    """The consistency score after the caps. fields: the values it was made of; cap_trace: which caps applied."""

    score: float
    reason: str
    fields: Mapping[str, Any]
    cap_trace: tuple[str, ...]


class Verdict(NamedTuple):
    """A decision with its reason; instruction: the second instruction of a REFINE."""

    decision: Decision
    reason: str
    instruction: str | None


class Rewritten(NamedTuple):
    """The instruction that thinking made, and its single actions as far as they can be told apart."""

    instruction: str
    steps: tuple[str, ...]


# ---- free text -----------------------------------------------------------------------------------------------------------


def parse_thought(text: str, *, released: bool = False) -> Rewritten:
    """Read a rewritten instruction. Default: code fence, list numbers and quotes around the whole are taken off."""
    text = _bounded(text, "an instruction").strip()
    if released:
        return Rewritten(_usable(text, "an instruction", text), _steps(text))
    plain = _without_fence(_answer_of(text, "an instruction"))
    lines = [_LIST_MARK.sub("", line).strip() for line in plain.splitlines()]
    lines = [line for line in lines if line]
    if len(lines) > 1:
        stop, blank = ("。", "") if any("\u4e00" <= char <= "\u9fff" for char in plain) else (".", " ")
        plain = blank.join(line if line[-1] in ".。!！?？;；,，、:：" else line + stop for line in lines)
    else:
        plain = lines[0] if lines else ""
    if len(plain) > 2 and (plain[0], plain[-1]) in _QUOTES and not set(plain[1:-1]) & {plain[0], plain[-1]}:
        plain = plain[1:-1].strip()
    _usable(plain, "an instruction", text)
    return Rewritten(plain, tuple(lines) if len(lines) > 1 else _steps(plain))


def parse_description(text: str, *, released: bool = False) -> str:
    """Read a target description: the text, stripped."""
    text = _bounded(text, "a description").strip()
    plain = text if released else _without_fence(_answer_of(text, "a description"))
    return _usable(plain, "a description", text)


_LIST_MARK = re.compile(r"^\s*(?:\d{1,2}[.)、．]|[-*•])\s+|^\s*\d{1,2}、")
_QUOTES = {('"', '"'), ("“", "”"), ("'", "'"), ("「", "」")}
_SENTENCE_END = re.compile(r"[。！!；;]|\.(?=\s|$)")


def _steps(instruction: str) -> tuple[str, ...]:
    """The sentences of an instruction; ends of sentences inside double quotes are lettering."""
    steps, start = [], 0
    for match in _SENTENCE_END.finditer(instruction):
        before = instruction[start : match.start()]
        if before.count('"') % 2 or before.count("“") > before.count("”"):
            continue
        steps.append(instruction[start : match.end()].strip(" \n;；"))
        start = match.end()
    steps.append(instruction[start:].strip())
    return tuple(step for step in steps if step)


def _usable(plain: str, expected: str, text: str) -> str:
    if not any(char.isalnum() for char in plain):
        raise _malformed(f"{expected} in words", "none", text)
    if len(plain) > MAX_INSTRUCTION:
        raise _malformed(f"{expected} of at most {MAX_INSTRUCTION} characters", f"{len(plain)}", text)
    return plain


def _answer_of(text: str, expected: str) -> str:
    """Leave out the thoughts that some models write before the answer."""
    if not text.lstrip().startswith("<think>"):
        return text
    _, closed, answer = text.partition("</think>")
    if not closed:
        raise _malformed(f"{expected} after </think>", "thoughts without an end", text)
    return answer


def _without_fence(text: str) -> str:
    text = text.strip()
    if not text.startswith("```"):
        return text
    first, _, rest = text.partition("\n")
    return rest.removesuffix("```").strip() if rest else first.strip("`").strip()


# ---- the verdict ---------------------------------------------------------------------------------------------------------


def parse_verdict(text: str, *, released: bool = False) -> Verdict:
    """Read `<#Think>` reason, one tag and, after `<#Reflection>`, the second instruction.

    Default: whatever stands before `<#Think>` is ignored, the instruction is stripped and must have words. released: both
    gates of the released code; `<#Others>` is a success; the instruction is what follows the tag, not stripped, even empty.
    """
    tags = tuple(TAGS) if released else _OWN_TAGS
    expected = f"{THINK}, a reason, then exactly one of {', '.join(tags)}"
    whole = _bounded(text, expected)
    if not released:
        whole = _answer_of(whole, expected)
    begin = whole.find(THINK)
    if begin < 0:
        raise _malformed(expected, f"no {THINK}", text)
    body = whole[begin:].strip()
    # The released code counts the result tags of the whole reply, so one in front of <#Think> spoils it.
    counted = whole if released else body
    found = [tag for tag in TAGS for _ in range(min(counted.count(tag), 2))]
    if len(found) != 1 or found[0] not in tags:
        raise _malformed(expected, f"{', '.join(found) or 'none of them'}", text)
    if released and body.count(THINK) > 1 and found[0] in body:
        # The released code's two gates differ here: the first lets the reply pass, the second does not take it for a
        # success and finds no instruction in it. Its loop then starts over, as after a failure.
        return Verdict(Decision.FAILED, body[len(THINK) :].partition(found[0])[0].strip(), None)
    if body.count(THINK) != 1 or found[0] not in body:
        raise _malformed(expected, f"{body.count(THINK)} times {THINK}, {found[0]} first", text)
    reason, _, rest = body[len(THINK) :].partition(found[0])
    decision = TAGS[found[0]]
    if decision is not Decision.REFINE:
        return Verdict(decision, reason.strip(), None)
    if not released:
        rest = rest.removesuffix("```").strip()
        _usable(rest, f"an instruction after {found[0]}", text)
    return Verdict(decision, reason.strip(), rest)


# ---- the consistency score -----------------------------------------------------------------------------------------------

_COUNTS = ("major_conflicts", "minor_conflicts", "omissions")


def parse_consistency(text: str, *, released: bool = False) -> Consistency:
    """Read the consistency JSON and apply the caps.

    Default: every key but `reason` must be there with a value of its kind and range; JSON that was cut off inside or before
    `reason` is still read. released: from the first brace to the last; counts that are absent are 0, numbers may be strings,
    and a raw score out of range is clamped.
    """
    expected = "one JSON object with meets_instruction (yes, partial or no), " + ", ".join(_COUNTS) + " and raw_score"
    _bounded(text, expected)
    needed = ("raw_score",) if released else ("meets_instruction", *_COUNTS, "raw_score")
    found = _released_object(greedy_object(text), needed, expected, text) if released else None
    found = found or _object_in(text, needed, "reason", expected)
    try:
        meets = str(found.get("meets_instruction", "")).strip().lower()
        read = _loose_count if released else _count
        counts = {key: read(found.get(key, 0), key) for key in (*_COUNTS, "hallucinations")}
        raw = float(found["raw_score"]) if released else _number(found["raw_score"], "raw_score")
        if not math.isfinite(raw) or not (released or 0 <= raw <= 10):
            raise ValueError(f"raw_score is {raw}")
        if not released and meets not in ("yes", "partial", "no"):
            raise ValueError(f"meets_instruction is {meets[:50]!r}")
    except (ValueError, TypeError, OverflowError) as error:
        raise _malformed(expected, str(error), text) from error
    # The released code takes every score up to 1 for one on a scale from 0 to 1, a plain 1 out of 10 included. A fraction is
    # one; a 1 means what was asked for. The margin is the released code's.
    scaled = raw * 10 if (0 <= raw <= 1.0000001 if released else 0 < raw < 1) else raw
    score, trace = cap_score(scaled, meets, counts["major_conflicts"], counts["omissions"], counts["hallucinations"])
    fields = {"meets_instruction": meets, **counts, "raw_score": raw}
    return Consistency(score, str(found.get("reason", "")).strip(), fields, trace)


def cap_score(raw: float, meets: str, major: int, omissions: int, hallucinations: int = 0) -> tuple[float, tuple[str, ...]]:
    """The released rules that keep a raw score from exceeding what its own findings allow: (score 0..10, caps applied)."""
    clean = meets == "yes" and not (major > 0 or omissions > 0 or hallucinations > 0)
    rules = (
        (meets == "no", 2.0, "instruction not met"),
        (meets == "partial", 5.0, "instruction met in part"),
        (major >= 2, 5.0, f"{major} major conflicts"),
        (major == 1, 8.0, "1 major conflict"),
        (hallucinations > 0 or omissions > 0, 7.0, f"{omissions} omissions, {hallucinations} hallucinations"),
        (not clean, 8.99, "not without fault"),
    )
    caps = [(cap, why) for applies, cap, why in rules if applies]
    score = min(max(0.0, min(10.0, raw)), *(cap for cap, _ in caps), 10.0)
    return float(f"{score:.4f}"), tuple(f"at most {cap:g}: {why}" for cap, why in caps)


def _count(value: Any, key: str) -> int:
    number = _number(value, key)
    if number < 0 or number != int(number):
        raise ValueError(f"{key} is {value!r}")
    return int(number)


def _loose_count(value: Any, key: str) -> int:
    return int(value or 0)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {str(value)[:50]!r}")
    return value


# ---- the two marks -------------------------------------------------------------------------------------------------------


def parse_pair(text: str, *, released: bool = False) -> tuple[float, ...]:
    """Read the two marks, each 0..10. released: any list with at least one number, since only its least one counts there."""
    expected = 'one JSON object with "score": [a, b], two numbers from 0 to 10'
    _bounded(text, expected)
    found = _released_object(fenced_object(text), ("score", "reasoning"), expected, text) if released else None
    found = found or _object_in(text, ("score",), "reasoning", expected)
    marks = found["score"]
    try:
        if not isinstance(marks, list) or not marks:
            raise ValueError(f"score is {str(marks)[:50]!r}")
        values = tuple(float(_number(mark, "a mark")) for mark in marks)
        if not released and (len(values) != 2 or not all(0 <= value <= 10 for value in values)):
            raise ValueError(f"score is {str(marks)[:50]}")
    except (ValueError, OverflowError) as error:
        raise _malformed(expected, str(error), text) from error
    return values


def _released_object(value: object, needed: tuple[str, ...], expected: str, text: str) -> dict:
    """What the released code read, provided that it is an object with the needed keys."""
    if not isinstance(value, dict) or not all(key in value for key in needed):
        raise _malformed(f"{expected}, and {', '.join(needed)} in it", "no such object", text)
    return value


def _object_in(text: str, needed: tuple[str, ...], free: str, expected: str) -> dict:
    """The one object with the needed keys; several are refused unless they are equal."""
    found = objects_in(text, needed, free)
    if not found or any(value != found[0] for value in found):
        raise _malformed(expected, f"{len(found) or 'no'} such objects", text)
    return found[0]


# ---- messages ------------------------------------------------------------------------------------------------------------


def _bounded(text: Any, expected: str) -> str:
    if not isinstance(text, str):
        raise _malformed(expected, f"a {type(text).__name__} instead of text", "")
    if not text.strip():
        raise _malformed(expected, "an empty reply", text)
    if len(text) > MAX_REPLY:
        raise _malformed(f"{expected} in at most {MAX_REPLY} characters", f"{len(text)} characters", text)
    return text


def _malformed(expected: str, found: str, text: str) -> MalformedReply:
    begins = f" The reply begins: {text[:_SHOWN]!r}." if text else ""
    return MalformedReply(f"expected {expected}; found {found}.{begins}", text[:MAX_REPLY])
