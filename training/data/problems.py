"""What is wrong with a data set, said so that it can be put right: file, line, record, field, what was expected, what to do.

Every problem has a code that stays the same while its words may change, so that scripts and tests can hold on to it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ...reasonedit_core.errors import DataError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

CODES: dict[str, tuple[Severity, str]] = {
    # the file
    "no-records": ("error", "there is nothing to read: no file, or no line with a record"),
    "not-utf8": ("error", "a line is not UTF-8"),
    "not-json": ("error", "a line is not one JSON object"),
    "duplicate-key": ("error", "a JSON object names a key twice"),
    "duplicate-id": ("error", "two records have the same id"),
    # one value
    "unknown-key": ("error", "a key that the schema does not have"),
    "missing-field": ("error", "a value that this kind of record needs is not there"),
    "wrong-type": ("error", "a value of another JSON type than the field's"),
    "bad-value": ("error", "a value that is none of those allowed"),
    "out-of-range": ("error", "a number outside its bounds"),
    "empty-text": ("error", "text without a visible character"),
    "too-long": ("error", "text longer than a reply may be"),
    "special-token": ("error", "text with a mark that belongs to the dialogue or to the tokenizer"),
    # values that do not go together
    "instruction-changed": ("error", "a clear instruction whose one step is not the instruction"),
    "unexpected-field": ("error", "a value that contradicts the rest of the record"),
    "reference-gap": ("error", "numbered reference pictures that leave a number out"),
    "instruction-unchanged": ("warning", "an abstract instruction whose thought is the instruction itself"),
    "score-above-findings": ("error", "a consistency score higher than its findings allow"),
    "score-disagrees": ("warning", "a consistency score that does not go with the verdict"),
    # pictures
    "bad-path": ("error", "a picture path that is not relative, with forward slashes"),
    "tar-member": ("error", "a picture inside an archive"),
    "missing-picture": ("error", "a picture file that is not there"),
    "unreadable-picture": ("error", "a picture file that cannot be decoded"),
    "picture-size": ("error", "a picture that is empty, too large or too long to be taken"),
    "size-mismatch": ("error", "a stated size that is not the picture's"),
    "hash-mismatch": ("error", "a stated sha256 that is not the file's"),
    "aspect-mismatch": ("error", "two pictures of a pair with different shapes"),
    "aspect-near": ("warning", "two pictures of a pair whose shapes differ by a little"),
    "misaligned-pair": ("warning", "a pair whose unchanged parts do not lie on each other"),
    "identical-pair": ("warning", "a pair of one and the same picture where a change is expected"),
    "split-leak": ("warning", "the same picture in more than one split"),
    "exif-turned": ("note", "a picture that its EXIF tag turns upright"),
    "transparency": ("note", "a picture with transparency, which is laid on white"),
    "several-frames": ("note", "a picture with several frames, of which the first is taken"),
}
"""Code -> how grave it is, and what it means. Errors keep a run from starting; warnings and notes do not."""


class Place(NamedTuple):
    """Where a record stands: the file's path as it was given, and the line (the first is 1)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. place is None where it concerns the whole set; record None where the line has no readable id."""

    code: str
    place: Place | None
    record: str | None
    field: str | None
    expected: str
    found: str
    fix: str

    @property
    def severity(self) -> Severity:
        """error, warning or note, by the code."""
        return CODES[self.code][0]

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        record = f"record {self.record!r}: " if self.record is not None else ""
        where = f"field {self.field}: " if self.field else ""
        return f"{place}{record}{where}expected {self.expected}, found {self.found}. Fix: {self.fix} [{self.code}]"


def shown(value: Any, limit: int = 80) -> str:
    """`value` as JSON, cut to `limit` characters, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, or None when none is like it."""
    known = list(known)
    lower = {name.lower().replace("-", "_"): name for name in known}
    same = lower.get(word.lower().replace("-", "_").replace(" ", "_"))
    close = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)
    return same or (lower[close[0]] if close else None)


def raise_problems(problems: Sequence[Problem], shown_at_most: int = 5) -> None:
    """Raise DataError with the first errors among `problems`; return when there is none."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if not errors:
        return
    lines = [str(problem) for problem in errors[:shown_at_most]]
    if len(errors) > len(lines):
        lines.append(f"... and {len(errors) - len(lines)} more; `reasonedit-train check` lists them all.")
    raise DataError("\n".join(lines))
