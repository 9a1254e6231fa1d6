"""One line of a record file -> a record, or everything that is wrong with it.

Two nets: the schema (pydantic, value by value) and the rules of the kinds, which look at the raw JSON, so that a line with a
fault in one place still gets its other faults named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from ...reasonedit_core.dialogue.replies import MAX_INSTRUCTION, cap_score
from .problems import Place, Problem, nearest, shown
from .records import REFERENCES, Record


class Fault(NamedTuple):
    """A problem before it has a place."""

    code: str
    field: str
    expected: str
    found: str
    fix: str


class Need(NamedTuple):
    """A value that a kind must hold: dotted path, what it is, what to do when it is absent."""

    field: str
    what: str
    fix: str


_INPUT = Need("images.input", "the picture that is edited", "name it, or choose another kind")
_TARGET = Need("images.target", "the picture that should come out", "name it, or choose another kind")
_RAW = Need("instruction.raw", "the user's words", "write them down")

NEEDS: dict[str, tuple[Need, ...]] = {
    "think": (
        _INPUT,
        _RAW,
        Need("think.steps", "a list of single actions", "add the concrete steps; a clear instruction is its own single step"),
    ),
    "reflect": (
        _INPUT,
        Need("images.generated", "the picture that is judged", "name the edited picture"),
        _RAW,
        Need("reflect.target_description", "a description of the wanted picture", "describe the target"),
        Need("reflect.scores.consistency", "a mark from 0 to 10", "add the score of the generated picture"),
        Need("reflect.reason", "what the judge observed", "add the sentences that lead to the verdict"),
        Need("reflect.verdict", "success, reflection or failed", "add the verdict; without it there is no answer to learn"),
    ),
    "edit": (
        _INPUT,
        _TARGET,
        Need("instruction.raw|edit.instruction_used|think.steps", "an instruction", "write down what the edit does"),
    ),
    "t2i": (_TARGET, Need("caption", "text that describes the target", "add the caption")),
    "understand": (Need("understand.turns", "a list of questions with answers", "add at least one turn"),),
    "hypothetical": (
        _INPUT,
        _TARGET,
        Need("reason50k.scenario", "physical, temporal, causal or story", "add the scenario"),
        Need("reason50k.hypothetical", "the hypothetical instruction", "add it"),
    ),
}
"""What each kind must hold; `a|b` means one of them."""

_MARKS = ("<#", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
"""What the templates and the tokenizer put around text: inside text they would end it early or call for a picture."""

_SPOKEN = ("think.text", "reflect.target_description", "reflect.second_instruction", "edit.instruction_used")
_EXACT = 1e-6


def parse_record(line: bytes, place: Place, seen: MutableMapping[str, Place]) -> tuple[Record | None, list[Problem]]:
    """Read one line. seen: ids met so far and where; the line's own is added. A record comes with warnings at most."""
    value, faults = _load(line)
    if value is None:
        return None, [Problem(fault.code, place, None, *fault[1:]) for fault in faults]
    record: Record | None = None
    faults += list(kind_faults(value))
    try:
        record = Record.model_validate_json(json.dumps(value))
    except ValidationError as error:
        faults += _schema_faults(error)
    name = value.get("id")
    name = name if isinstance(name, str) else None
    if name is not None and name in seen:
        faults.append(Fault("duplicate-id", "id", "an id of its own", f"that of {seen[name]}", "rename one of the two."))
    elif name is not None:
        seen[name] = place
    problems, met = [], set()
    for fault in faults:
        if (fault.code, fault.field) not in met:
            met.add((fault.code, fault.field))
            problems.append(Problem(fault.code, place, name, *fault[1:]))
    if record is None or any(problem.severity == "error" for problem in problems):
        return None, problems
    record._place = place
    return record, problems


def check_record(value: Mapping[str, Any], place: Place) -> tuple[Record | None, list[Problem]]:
    """`parse_record` for a value made in Python, as converters do."""
    return parse_record(json.dumps(value, ensure_ascii=False).encode(), place, {})


# ---- JSON ----------------------------------------------------------------------------------------------------------------


def _load(line: bytes) -> tuple[dict[str, Any] | None, list[Fault]]:
    faults: list[Fault] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) < len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            faults.append(Fault("duplicate-key", twice, "each key once", f"{twice!r} twice", "keep one of the two."))
        return value

    def constant(name: str) -> Any:
        faults.append(Fault("not-json", "", "numbers that JSON has", name, "write a number or leave the key out."))
        return None

    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        bad = f"byte {line[error.start]:#04x} at column {error.start + 1}"
        return None, [Fault("not-utf8", "", "text in UTF-8", bad, "save the file as UTF-8.")]
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        fix = "write every record on one line, without comments or trailing commas."
        return None, [Fault("not-json", "", "one JSON object", f"{shown(text)} ({error})", fix)]
    if not isinstance(value, dict):
        return None, [Fault("not-json", "", "one JSON object", shown(value), "write every record on one line, in braces.")]
    return value, faults


# ---- the schema ----------------------------------------------------------------------------------------------------------

_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "an object in braces",
    "dict_type": "an object in braces",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
}
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "eval", "heldout", "held-out")
_PATTERNS = {
    r"\S": "text with a visible character",
    r"^[0-9a-f]{64}$": "64 lower-case hexadecimal digits",
    r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$": "a language code such as en or zh",
}


def _schema_faults(error: ValidationError) -> list[Fault]:
    # A list whose entries are all faulty also counts as too short: that is said by the entries.
    found = [each for each in error.errors(include_url=False) if each["type"] != "too_short" or not each["input"]]
    return [_fault(each) for each in found]


def _fault(error: Mapping[str, Any]) -> Fault:
    """pydantic's finding in our words."""
    kind, found, context = error["type"], shown(error.get("input")), error.get("ctx", {})
    field = ".".join(str(part) for part in error["loc"])
    if kind == "extra_forbidden":
        return _unknown_key(error["loc"], field)
    if kind == "missing":
        return Fault("missing-field", field, "a value", "nothing", "add it.")
    if kind == "literal_error":
        expected = context["expected"].replace("'", "")
        word = str(error["input"])
        close = "held_out" if word in _HELD_OUT else nearest(word, expected.replace(" or ", ", ").split(", "))
        fix = f"did you mean {close}?" if close else "choose one of them."
        return Fault("bad-value", field, expected, found, fix)
    if kind in _TYPES:
        return Fault("wrong-type", field, _TYPES[kind], found, "correct the value; numbers stand without quotes, text in them.")
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return Fault("out-of-range", field, f"{words} {context[key]:g}", found, "correct the value.")
    if kind == "string_pattern_mismatch":
        expected = _PATTERNS.get(context["pattern"], "an id: visible characters, spaces only between them")
        code = "empty-text" if context["pattern"] == r"\S" else "bad-value"
        return Fault(code, field, expected, found, "correct the value or leave the key out.")
    if kind in ("too_short", "too_long"):
        low, high = context.get("min_length"), context.get("max_length")
        expected = f"at most {high} entries" if kind == "too_long" else f"at least {low} entry"
        return Fault("bad-value", field, expected, f"{context.get('actual_length')}", "correct the list.")
    expected = str(context.get("error") or error["msg"])
    return Fault("bad-value", field, expected, found, "correct the value.")


def _unknown_key(loc: tuple[Any, ...], field: str) -> Fault:
    """The model that `loc` ends in is found by walking down the schema, to name the key that was probably meant."""
    model: type[BaseModel] = Record
    for part in loc[:-1]:
        inner = None if isinstance(part, int) else _model_of(model, part)
        model = inner or model
    known = [entry.alias or name for name, entry in model.model_fields.items()]
    close = nearest(str(loc[-1]), known)
    fix = f"did you mean {close}?" if close else "remove it."
    return Fault("unknown-key", field, f"one of {', '.join(known)}", shown(loc[-1]), fix)


def _model_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    for field, entry in model.model_fields.items():
        if name in (field, entry.alias):
            stack = [entry.annotation]
            while stack:
                kind = stack.pop()
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    return kind
                stack += getattr(kind, "__args__", ())
    return None


# ---- the kinds -----------------------------------------------------------------------------------------------------------


def kind_faults(value: Mapping[str, Any]) -> Iterator[Fault]:
    """What the kind of a record asks for and what does not go together, on raw JSON of whatever quality."""
    kind = value.get("kind")
    for need in NEEDS.get(kind, ()) if isinstance(kind, str) else ():
        if all(_get(value, field) in (None, "", []) for field in need.field.split("|")):
            field = need.field.partition("|")[0]
            yield Fault("missing-field", field, f"{need.what} in a record of kind {kind}", "nothing", f"{need.fix}.")
    yield from _text_faults(value)
    yield from _path_faults(value)
    yield from _think_faults(value)
    yield from _reflect_faults(value)
    numbers = [name for name in REFERENCES if _get(value, f"images.{name}") is not None]
    if numbers and numbers != list(REFERENCES[: len(numbers)]):
        missing = next(name for name in REFERENCES if name not in numbers)
        fix = "number the references from 2 on, without gaps."
        yield Fault("reference-gap", f"images.{missing}", f"a picture before {numbers[-1]}", "nothing", fix)
    if numbers and _get(value, "images.input") is None:
        yield Fault("reference-gap", "images.input", f"a first picture before {numbers[0]}", "nothing", "name it as input.")


def _get(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text_faults(value: Mapping[str, Any]) -> Iterator[Fault]:
    for field, text in _texts(value, ""):
        mark = next((mark for mark in _MARKS if mark in text), None)
        if mark:
            found, fix = f"{mark} in {shown(text)}", "remove it; the templates add the marks."
            yield Fault("special-token", field, "plain text", found, fix)
    for field in _SPOKEN:
        text = _get(value, field)
        if isinstance(text, str) and len(text) > MAX_INSTRUCTION:
            yield Fault("too-long", field, f"at most {MAX_INSTRUCTION} characters", f"{len(text)}", "shorten it.")


def _texts(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """All text that may come before a model, with its field. Paths, provenance, license and source do not."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if field or key not in ("provenance", "license", "source", "id", "schema", "images"):
                yield from _texts(inner, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{field}.{index}")


_ARCHIVE = re.compile(r"\.(tar|tar\.\w+|tgz|zip)([/:#!].|$)", re.IGNORECASE)


def picture_paths(value: Mapping[str, Any]) -> dict[str, str]:
    """The picture paths of a raw record by field, whatever else is wrong with it."""
    images = _get(value, "images")
    named = {f"images.{name}": entry for name, entry in images.items()} if isinstance(images, Mapping) else {}
    paths = {field: _get(entry, "path") for field, entry in {**named, "edit.mask": _get(value, "edit.mask")}.items()}
    return {f"{field}.path": path for field, path in paths.items() if isinstance(path, str)}


def _path_faults(value: Mapping[str, Any]) -> Iterator[Fault]:
    for field, path in picture_paths(value).items():
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", path):
            yield Fault("bad-path", field, "a file", shown(path), "download the picture and name the file.")
        elif path.startswith("/") or re.match(r"[A-Za-z]:", path):
            fix = "name the picture relative to the folder of the JSONL file."
            yield Fault("bad-path", field, "a relative path", shown(path), fix)
        elif "\\" in path:
            yield Fault("bad-path", field, "forward slashes", shown(path), f"write {path.replace(chr(92), '/')}.")
        elif _ARCHIVE.search(path):
            fix = "unpack the archive; pictures are read from plain files only."
            yield Fault("tar-member", field, "a picture file of its own", shown(path), fix)


def _think_faults(value: Mapping[str, Any]) -> Iterator[Fault]:
    raw, steps, clarity = (_get(value, path) for path in ("instruction.raw", "think.steps", "instruction.class"))
    if not isinstance(raw, str) or not isinstance(steps, list) or not steps:
        return
    if clarity == "clear" and steps != [raw]:
        fix = "make the instruction its only step, or set instruction.class to abstract."
        yield Fault("instruction-changed", "think.steps", f"{shown([raw])} for a clear instruction", shown(steps), fix)
    if clarity == "abstract" and steps == [raw]:
        fix = "set instruction.class to clear, or write down what thinking adds."
        yield Fault("instruction-unchanged", "think.steps", "steps other than the instruction", shown(steps), fix)


def _reflect_faults(value: Mapping[str, Any]) -> Iterator[Fault]:
    verdict, second = _get(value, "reflect.verdict"), _get(value, "reflect.second_instruction")
    if verdict == "reflection" and (not isinstance(second, str) or not any(char.isalnum() for char in second)):
        fix = "write the instruction that repairs the generated picture, or change the verdict."
        yield Fault("missing-field", "reflect.second_instruction", "an instruction after a reflection", shown(second), fix)
    if verdict in ("success", "failed") and second is not None:
        fix = "remove it, or set the verdict to reflection."
        field = "reflect.second_instruction"
        yield Fault("unexpected-field", field, f"none after {verdict}", shown(second), fix)
    score = _get(value, "reflect.scores.consistency")
    if isinstance(score, bool) or not isinstance(score, int | float):
        return
    if (verdict == "success" and score < 5) or (verdict == "failed" and score > 7):
        expected = "a score that goes with the verdict"
        yield Fault("score-disagrees", "reflect.scores.consistency", expected, f"{score:g} with {verdict}", "look at it again.")
    counts = [_get(value, f"reflect.findings.{name}") or 0 for name in ("major_conflicts", "omissions")]
    meets = _get(value, "reflect.findings.meets_instruction")
    if isinstance(meets, str) and all(isinstance(count, int) for count in counts):
        most = cap_score(10.0, meets, *counts)[0]
        if score > most + _EXACT:
            fix = "lower the score or correct the findings."
            expected = f"at most {most:g} by the findings"
            yield Fault("score-above-findings", "reflect.scores.consistency", expected, f"{score:g}", fix)
