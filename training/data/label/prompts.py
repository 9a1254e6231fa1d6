"""The questions of a pipeline, read from its prompt file (`prompts/*.toml`). Words are data; their version is in every record.

A prompt's text says what to do. What it is about follows it, each value under its name:

    <instruction>
    show the sandcastle after high tide
    </instruction>
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ....reasonedit_core.errors import ConfigError
from . import replies
from .replies import Reply, read_reply, schema_of

FORMAT = "reasonedit.label/1"

REPLIES: Mapping[str, type[Reply]] = {
    "classify": replies.Classified,
    "simplify": replies.Simplified,
    "abstract": replies.Abstracted,
    "verify": replies.Verified,
    "describe": replies.Described,
    "score": replies.Scored,
    "decide": replies.Decided,
    "audit": replies.Audited,
    "expand": replies.Expanded,
    "grade": replies.Graded,
    "rewrite": replies.Rewritten,
    "rewrite_pair": replies.Rewritten,
    "compare": replies.Compared,
}
"""Question -> what is answered."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. shows: names of its pictures in order; tells: names of its values in order.

    version: raised with every change of the words.
    """

    step: str
    version: int
    system: str
    text: str
    shows: tuple[str, ...]
    tells: tuple[str, ...]
    max_tokens: int
    temperature: float
    correction: str

    @property
    def id(self) -> str:
        """Name and version, as records state it: `classify@1`."""
        return f"{self.step}@{self.version}"

    @property
    def reply(self) -> type[Reply]:
        """What is answered."""
        return REPLIES[self.step]

    @property
    def digest(self) -> str:
        """16 hex digits that change with anything an answer depends on, so that a forgotten version mixes nothing up."""
        asked = [self.id, self.system, self.text, self.shows, self.tells, self.max_tokens, self.temperature]
        told = json.dumps([*asked, self.schema], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the answer."""
        return schema_of(self.reply)

    def words(self, inputs: Mapping[str, str], fault: str | None = None) -> str:
        """The question about `inputs`. fault: what was wrong with the last answer."""
        told = [f"<{name}>\n{inputs[name]}\n</{name}>" for name in self.tells]
        again = [self.correction.strip().format(error=fault)] if fault else []
        return "\n\n".join([self.text.strip(), *told, *again])

    def read(self, text: str) -> Reply:
        """The answer in a reply's text. Raises MalformedReply."""
        return read_reply(text, self.reply)


@cache
def load_prompts(name: str) -> Mapping[str, Prompt]:
    """The questions of a pipeline by name. ConfigError for a file that is none of ours."""
    path = files(__package__) / "prompts" / f"{name}.toml"
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a prompt file, found none ({error}). Install the package anew.") from error
    if told.get("format") != FORMAT:
        raise ConfigError(f"{path}: expected format {FORMAT}, found {told.get('format')!r}. Install the package anew.")
    shared = {"system": told["system"].strip(), "correction": told["correction"]}
    return {step: _prompt(step, entry, shared) for step, entry in told["ask"].items()}


def _prompt(step: str, entry: Mapping[str, Any], shared: Mapping[str, str]) -> Prompt:
    return Prompt(
        step=step,
        version=entry["version"],
        text=entry["text"],
        shows=tuple(entry["shows"]),
        tells=tuple(entry["tells"]),
        max_tokens=entry["max_tokens"],
        temperature=float(entry["temperature"]),
        **shared,
    )
