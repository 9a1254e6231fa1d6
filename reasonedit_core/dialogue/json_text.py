"""JSON objects inside the text of a reply: read strictly, read the released code's way, and read when the end is missing."""

from __future__ import annotations

import json
import re
from typing import Any


def objects_in(text: str, needed: tuple[str, ...], free: str) -> list[dict]:
    """Every object with the needed keys, wherever it stands; failing that, one that was cut off with them intact.

    free: the key whose text may be incomplete. An object that states a key twice is not read, as it would mean two things.
    """
    found: list[dict] = []
    start, tries = text.find("{"), 0
    while start >= 0 and tries < _TRIES:
        tries += 1
        try:
            value, after = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            after = start + 1
        else:
            if all(key in value for key in needed):
                found.append(value)
        start = text.find("{", after)
    opened = None if found else _OPENING.search(text)
    value = salvaged(text[opened.start() :], free) if opened else None
    return [value] if value is not None and all(key in value for key in needed) else found


def greedy_object(text: str) -> Any:
    """The released reading of the consistency reply: from the first opening brace to the last closing one, or None."""
    begin, end = text.find("{"), text.rfind("}")
    return _loads(text[begin : end + 1]) if 0 <= begin < end else None


def fenced_object(text: str) -> Any:
    """The released reading of the marks: the whole reply, or a code fence, both of whose ends it drops unseen; or None."""
    body = text.strip()
    if body.startswith("```"):
        body = body[7 if body.startswith("```json") else 3 : -3].strip()
    return _loads(body)


def salvaged(text: str, free: str) -> dict | None:
    """Read an object whose end is missing: close the free text it broke off in, or leave out the member that is incomplete.

    A number at the very end is incomplete (more digits may have followed), so it is left out with its member.
    """
    closers: list[str] = []
    in_string = escaped = False
    last_comma = -1
    for index, char in enumerate(text):
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in _PAIRS:
            closers.append(_PAIRS[char])
        elif char in "]}":
            if not closers or closers.pop() != char or not closers:
                return None  # crossed brackets, or an end: not cut off but wrong
        elif char == "," and len(closers) == 1:
            last_comma = index
    whole = text.rstrip()
    if in_string and len(closers) == 1:
        # Half an escape cannot be closed; drop it. Other cut-off words are no values: "no" may have become "not sure".
        value = _loads_once((text[:-1] if escaped else _HALF_ESCAPE.sub("", text)) + '"}')
        if value is not None and next(reversed(value)) == free:
            return value
    elif not in_string and len(closers) == 1 and whole.endswith(("]", '"')):
        value = _loads_once(whole + "}")
        if value is not None:
            return value
    return _loads_once(text[:last_comma] + "}") if last_comma >= 0 else None


def _once(pairs: list[tuple[str, Any]]) -> dict:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_TRIES = 32  # bounds the work on a reply of nothing but braces
_OPENING = re.compile(r'\{\s{0,100}"')
_PAIRS = {"{": "}", "[": "]"}
_HALF_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{0,3}$")


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _loads_once(text: str) -> dict | None:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
