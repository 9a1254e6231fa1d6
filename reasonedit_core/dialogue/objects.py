"""What an MLLM is asked to name the objects of an instruction, and how its reply is read (ReasonBrain's ID controller)."""

from __future__ import annotations

import json
import re

from ..errors import MalformedReply

LIMIT = 16
"""Most objects of one instruction."""

QUESTION = (
    "Here is an instruction for editing the picture: {instruction}\n"
    "Which things in the picture does it act on or depend on? Name each with one to three words, the most important first, "
    "without articles. Reply with a JSON array of texts and with nothing else."
)

_ARRAY = re.compile(r"\[[^\[\]]*\]")
_SHOWN = 200


def ask_objects(instruction: str) -> str:
    """The question about one instruction."""
    return QUESTION.format(instruction=instruction.strip())


def parse_objects(reply: str) -> list[str]:
    """The names in a reply: its last JSON array of texts, wherever it stands; at most 16, none twice.

    An array that was cut off gives the names that are whole. Raises MalformedReply where there is none; an empty array is an
    answer.
    """
    arrays = [found for found in map(_texts, _ARRAY.findall(reply)) if found is not None]
    if not arrays and "[" in reply:
        whole = re.findall(r'"(?:[^"\\]|\\.)*"', reply[reply.rfind("[") :])
        arrays = [found for found in [_texts(f"[{', '.join(whole)}]")] if found]
    if not arrays:
        raise MalformedReply(f"expected a JSON array of names, found {reply[:_SHOWN]!r}. Name the objects yourself.", reply)
    return tidy(arrays[-1])


def tidy(names: list[str]) -> list[str]:
    """Names without surrounding space, empty ones and repetitions, at most 16."""
    plain = [" ".join(name.split()).strip(" .,;:") for name in names]
    first = {name.casefold(): name for name in reversed(plain) if name}
    return [name for name in dict.fromkeys(plain) if name and first[name.casefold()] is name][:LIMIT]


def _texts(array: str) -> list[str] | None:
    try:
        value = json.loads(array)
    except ValueError:
        return None
    return value if all(isinstance(name, str) for name in value) else None
