"""What a reasoner that does well would say: values -> the replies that `replies.py` reads and that constrained decoding allows.

The training documents take their answers from here, so that what is learnt is what inference can say and read. Each function
reads its own answer back and raises DataError when it would not come back the same: an answer is never bent to fit, except in
white space, which is stated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DataError, MalformedReply
from ..types import Decision
from .replies import (
    TAGS,
    THINK,
    Consistency,
    Verdict,
    cap_score,
    parse_consistency,
    parse_description,
    parse_pair,
    parse_thought,
    parse_verdict,
)

MEETS = ("yes", "partial", "no")
MOST_COUNTED = 99
"""Largest number of conflicts or omissions that a reply may state."""

_TAG = {Decision.SUCCESS: "<#Success>", Decision.REFINE: "<#Reflection>", Decision.FAILED: "<#Failed>"}
_FINDINGS = ("meets_instruction", "major_conflicts", "minor_conflicts", "omissions")


def say_thought(instruction: str) -> str:
    """The rewritten instruction, in one line. Read back by `parse_thought`."""
    said = one_line(instruction)
    return _checked(said, lambda: parse_thought(said).instruction, said, "an instruction in running text")


def say_description(description: str) -> str:
    """The target description, in one paragraph. Read back by `parse_description`."""
    said = one_line(description)
    return _checked(said, lambda: parse_description(said), said, "a description in running text")


def say_consistency(score: float, reason: str, findings: Mapping[str, Any] | None = None) -> str:
    """The consistency JSON that is read as `score` (0..10), stating `findings` where given, else `findings_of(score)`.

    The score is said with one decimal, as replies have it; between 0 and 1 it is rounded to one of them, as a fraction would
    be read as one of 1. Raises DataError where the findings do not allow the score.
    """
    mark = said_mark(score)
    stated = findings_of(mark) if findings is None else {key: findings[key] for key in _FINDINGS}
    for key in _FINDINGS[1:]:
        if not 0 <= stated[key] <= MOST_COUNTED:
            raise DataError(f"findings.{key}: expected a number from 0 to {MOST_COUNTED}, found {stated[key]}. Correct it.")
    if stated["meets_instruction"] not in MEETS:
        found = stated["meets_instruction"]
        raise DataError(f"findings.meets_instruction: expected one of {', '.join(MEETS)}, found {found!r}. Correct it.")
    most, why = cap_score(10.0, stated["meets_instruction"], stated["major_conflicts"], stated["omissions"])
    if mark > most:
        raise DataError(
            f"expected a consistency score that its findings allow (at most {most:g}; {'; '.join(why)}), found {score:g}. "
            "Lower the score, correct the findings, or leave them out."
        )
    words = _words(reason, "the reason of a consistency score")
    return _object({**stated, "raw_score": _number(mark), "reason": words}, parse_consistency, (mark, words))


def say_pair(marks: Sequence[float], reason: str) -> str:
    """The JSON of two marks 0..10, each with one decimal. Read back by `parse_pair`."""
    if len(marks) != 2:
        raise DataError(f"expected two marks, found {list(marks)}. State both: [8, 7.5].")
    said = [_rounded(mark, "a mark") for mark in marks]
    words = _words(reason, "the reasoning of two marks")
    return _object({"score": [_number(mark) for mark in said], "reasoning": words}, parse_pair, tuple(said))


def say_verdict(decision: Decision, reason: str, instruction: str | None = None) -> str:
    """`<#Think>` reason, the decision's tag, after `<#Reflection>` the second instruction. Read back by `parse_verdict`."""
    reason = _words(reason, "the reason of a verdict")
    second = None if instruction is None else one_line(instruction)
    if (second is None) == (decision is Decision.REFINE):
        found = "none" if second is None else f"{second[:60]!r}"
        raise DataError(
            f"expected a second instruction with a reflection and with nothing else, found {found} with {decision.name}. "
            "Correct the verdict or the instruction."
        )
    for text, name in ((reason, "the reason"), (second or "", "the second instruction")):
        mark = next((mark for mark in (THINK, *TAGS, "<#") if mark in text), None)
        if mark:
            raise DataError(f"{name}: expected text without {mark}, which ends it; found {text[:80]!r}. Take the mark out.")
    said = f"{THINK} {reason} {_TAG[decision]}" + (f" {second}" if second is not None else "")
    return _checked(said, lambda: parse_verdict(said), Verdict(decision, reason, second), "a verdict")


# ---- marks and findings --------------------------------------------------------------------------------------------------


def said_mark(score: float) -> float:
    """A consistency score as a reply can state it: one decimal, and 0 or 1 for what lies between."""
    mark = _rounded(score, "a consistency score")
    return float(round(mark)) if 0 < mark < 1 else mark


def findings_of(mark: float) -> dict[str, Any]:
    """Findings that stand for a bare mark 0..10: the mildest kind that goes with it under the caps of `cap_score`.

    A record that says what was found is better; this keeps one that holds only a mark from teaching that a bad picture has
    no faults.
    """
    meets = "yes" if mark > 5 else "partial" if mark > 2 else "no"
    return {
        "meets_instruction": meets,
        "major_conflicts": int(mark <= 5) + int(mark <= 2),
        "minor_conflicts": int(7 < mark < 9),
        "omissions": int(5 < mark <= 7),
    }


def _rounded(value: float, what: str) -> float:
    if not 0 <= value <= 10:  # refuses nan as well
        raise DataError(f"{what}: expected a number from 0 to 10, found {value}. Correct it.")
    return round(float(value), 1)


def _number(mark: float) -> int | float:
    return int(mark) if mark == int(mark) else mark


# ---- text ----------------------------------------------------------------------------------------------------------------

_BREAK = re.compile(r"[\x00-\x20\x7f\x85\u2028\u2029]*[\x00-\x1f\x7f\x85\u2028\u2029][\x00-\x20\x7f\x85\u2028\u2029]*")


def one_line(text: str) -> str:
    """Stripped, and every stretch of white space with a line break or control character in it made one blank."""
    return _BREAK.sub(" ", text).strip()


def _words(text: str, what: str) -> str:
    """One line of text that is not empty: constrained decoding cannot say nothing."""
    words = one_line(text)
    if not words:
        raise DataError(f"{what}: expected at least one sentence, found no text. Write down what was observed.")
    return words


def _object(value: Mapping[str, Any], parse: Callable[[str], Any], expected: Any) -> str:
    """One JSON object on one line, in the order of its keys, as the constrained decoder writes it."""
    said = json.dumps(value, ensure_ascii=False)
    return _checked(said, lambda: _compared(parse(said)), expected, "a JSON reply")


def _compared(value: Any) -> Any:
    return (value.score, value.reason) if isinstance(value, Consistency) else value


def _checked(said: str, read: Callable[[], Any], expected: Any, what: str) -> str:
    """`said` when it is read back as `expected`."""
    try:
        found = read()
    except MalformedReply as error:
        raise DataError(f"expected {what} that can be read back; {error} Reword it.") from error
    if found != expected:
        raise DataError(
            f"expected {what} that is read back as it was written; {_short(expected)} would be read as {_short(found)}. Write "
            "running text: no list numbers, code fences, thoughts in <think>, or quotes around the whole."
        )
    return said


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
