"""Pack files: strict reading and exact writing of the TOML that holds a dialogue pack.

Reading refuses what it does not know: a misspelt key in a prompt would otherwise change what the MLLM is told, unnoticed.
Writing keeps every character (trailing blanks, carriage returns, control characters): parity with the released prompts is
parity of characters.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import ConfigError
from .pack import (
    FORMAT,
    OWN_LANGUAGES,
    TASKS,
    VARIANTS,
    ConditioningPrompt,
    Pack,
    Part,
    Slot,
    TaskPrompt,
    TaskRule,
    Template,
    format_template,
    parse_template,
)


def parse_pack(text: str, path: str) -> Pack:
    """Read a pack from its TOML text; `path` is only for messages."""
    try:
        top = _Table(tomllib.loads(text), path, "")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: expected TOML, found a fault: {error}. Correct it in a text editor.") from error
    found = top.take("format", str)
    if found != FORMAT:
        top.refuse("format", f'"{FORMAT}"', found, "This version reads that format only.")
    system, correction = top.take("system", str, ""), top.take("correction", str, "")
    tasks = {name: _task(section, name, system) for name, section in top.sections("task", TASKS)}
    conditioning = {name: _conditioning(section) for name, section in top.sections("conditioning", VARIANTS)}
    if not tasks and not conditioning:
        top.refuse("task", "at least one [task.NAME] or [conditioning.NAME]", None, "An empty pack says nothing.")
    names = top.table("languages")
    pack = Pack(
        name=top.take("name", str),
        language=top.take("language", str),
        version=top.take("version", int),
        tasks=tasks,
        conditioning=conditioning,
        languages={code: names.take(code, str) for code in OWN_LANGUAGES},
        correction=top.template("correction", correction, ("error",)),
        imported=top.take("imported", bool, False),
        sources=tuple((entry.take("file", str), entry.take("sha256", str)) for entry in top.tables("source")),
        path=path,
    )
    names.end()
    top.end()
    return pack


def _task(table: _Table, name: str, default_system: str) -> TaskPrompt:
    rule = TASKS[name]
    form = table.take("form", str)
    if form != rule.form:
        table.refuse("form", f'"{rule.form}" (the replies to this task are read that way)', form)
    system = table.template("system", table.take("system", str, default_system), rule.allowed)
    user = tuple(_part(entry, rule) for entry in table.tables("user"))
    shown = tuple(part.image for part in user if part.image)
    if sorted(shown) != sorted(rule.images):
        table.refuse("user", f"the pictures {list(rule.images)}, each once", list(shown))
    used = {piece.name for text in (system, *(part.text for part in user)) for piece in text if isinstance(piece, Slot)}
    for placeholder in rule.required:
        if placeholder not in used:
            table.refuse("user", f"a text that holds {{{placeholder}}}", sorted(used), "Without it nobody is told.")
    prompt = TaskPrompt(
        system,
        user,
        rule.form,
        table.number("max_new_tokens", int, 1, 32768),
        table.number("temperature", float, 0.0, 5.0),
        table.number("top_p", float, 1e-6, 1.0),
    )
    table.end()
    return prompt


def _part(table: _Table, rule: TaskRule) -> Part:
    image, text, when = table.take("image", str, None), table.take("text", str, None), table.take("when", str, None)
    table.end()
    if (image is None) == (text is None):
        table.refuse("", "either `image` or `text` in each part", {"image": image, "text": text})
    if image is not None and image not in rule.images:
        table.refuse("image", f"one of {list(rule.images)}", image)
    optional = [name for name in ("original", "feedback") if name in rule.allowed]
    if when is not None and when not in optional:
        table.refuse("when", f"one of {optional}", when)
    template = table.template("text", text or "", rule.allowed)
    if Slot("feedback") in template and when != "feedback":
        table.refuse("when", '"feedback", because the text holds {feedback}, which is not always given', when)
    return Part(image, template, when)


def _conditioning(table: _Table) -> ConditioningPrompt:
    prefix, dropped = table.take("prefix", str), table.take("dropped_tokens", (int, str))
    negative = table.take("text_to_image_negative", str, None)
    table.end()
    if dropped != "auto" and (isinstance(dropped, str) or dropped < 0):
        table.refuse("dropped_tokens", 'a number of tokens, or "auto"', dropped)
    if not prefix.strip():
        table.refuse("prefix", "a text", prefix)
    return ConditioningPrompt(prefix, None if dropped == "auto" else dropped, negative)


_NEEDED = object()


class _Table:
    """A TOML table whose keys are taken one by one; what is left at the end was not expected."""

    def __init__(self, values: dict, path: str, where: str) -> None:
        self.values, self.path, self.where = dict(values), path, where

    def refuse(self, key: str, expected: str, found: Any, advice: str = "Correct the entry.") -> NoReturn:
        where = ".".join(name for name in (self.where, key) if name)
        shown = "nothing" if found is None or found is _NEEDED else repr(found)
        raise ConfigError(f"{self.path}: {where}: expected {expected}, found {shown[:200]}. {advice}")

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _NEEDED) -> Any:
        value = self.values.pop(key, default)
        if value is default and default is not _NEEDED:
            return value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:  # not isinstance: true and false are no numbers
            self.refuse(key, " or ".join(k.__name__ for k in kinds), value)
        return value

    def number(self, key: str, kind: type, low: float, high: float) -> Any:
        value = self.take(key, (int, float) if kind is float else int)
        if not low <= value <= high:  # refuses nan as well
            self.refuse(key, f"a number from {low} to {high}", value)
        return kind(value)

    def table(self, key: str) -> _Table:
        return _Table(self.take(key, dict), self.path, key)

    def tables(self, key: str) -> list[_Table]:
        entries = self.take(key, list, [])
        for entry in entries:
            if not isinstance(entry, dict):
                self.refuse(key, "tables ([[...]])", entry)
        prefix = f"{self.where}." if self.where else ""
        return [_Table(entry, self.path, f"{prefix}{key}[{index}]") for index, entry in enumerate(entries)]

    def sections(self, key: str, known) -> list[tuple[str, _Table]]:
        found = self.take(key, dict, {})
        for name, section in found.items():
            if name not in known or not isinstance(section, dict):
                self.refuse(f"{key}.{name}", f"a section with one of the names {_listed(known)}", section)
        return [(name, _Table(section, self.path, f"{key}.{name}")) for name, section in found.items()]

    def template(self, key: str, text: str, allowed: tuple[str, ...]) -> Template:
        try:
            template = parse_template(text)
        except ValueError as error:
            self.refuse(key, "text with {placeholders}", str(error))
        for piece in template:
            if isinstance(piece, Slot) and piece.name not in allowed:
                self.refuse(key, f"only the placeholders {_listed(allowed)}", piece.name)
        return template

    def end(self) -> None:
        if self.values:
            key = next(iter(self.values))
            self.refuse(key, "no such key", self.values[key], "Remove it or correct its spelling.")


# ---- writing -------------------------------------------------------------------------------------------------------------


def format_pack(pack: Pack, comment: Iterable[str] = ()) -> str:
    """The TOML text that `parse_pack` reads back as `pack` (without its path and translations)."""
    lines = [f"# {line}".rstrip() for line in comment]
    lines += [f'format = "{FORMAT}"', f"name = {_quoted(pack.name)}", f"language = {_quoted(pack.language)}"]
    lines += [f"version = {pack.version}", f"imported = {str(pack.imported).lower()}"]
    if pack.correction:
        lines.append(f"correction = {_quoted(format_template(pack.correction))}")
    lines += ["", "[languages]", *(f"{code} = {_quoted(name)}" for code, name in pack.languages.items())]
    for name, prompt in pack.tasks.items():
        lines += ["", f"[task.{name}]", f"system = {_quoted(format_template(prompt.system))}", f'form = "{prompt.form}"']
        lines += [f"max_new_tokens = {prompt.max_new_tokens}"]
        lines += [f"temperature = {prompt.temperature}", f"top_p = {prompt.top_p}"]
        for part in prompt.user:
            lines += ["", f"[[task.{name}.user]]"]
            lines += [f'when = "{part.when}"'] if part.when else []
            lines += [f'image = "{part.image}"' if part.image else f"text = {_quoted(format_template(part.text))}"]
    for name, prompt in pack.conditioning.items():
        dropped = '"auto"' if prompt.dropped_tokens is None else prompt.dropped_tokens
        lines += ["", f"[conditioning.{name}]", f"prefix = {_quoted(prompt.prefix)}", f"dropped_tokens = {dropped}"]
        if prompt.text_to_image_negative is not None:
            lines.append(f"text_to_image_negative = {_quoted(prompt.text_to_image_negative)}")
    for file, digest in pack.sources:
        lines += ["", "[[source]]", f"file = {_quoted(file)}", f"sha256 = {_quoted(digest)}"]
    return "\n".join(lines) + "\n"


# What a TOML string cannot hold as it is. A blank at the end of a line is escaped too: editors like to remove it.
_ESCAPED = re.compile(r"[\\\x00-\x08\x0b-\x1f\x7f]|[ \t](?=\n)")


def _quoted(text: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError("expected text that UTF-8 can hold, found half of a surrogate pair. Correct the source.")
    several = "\n" in text
    body = _ESCAPED.sub(lambda match: "\\\\" if match[0] == "\\" else f"\\u{ord(match[0]):04x}", text)
    if not several:
        return '"' + body.replace('"', '\\"') + '"'
    # Three quotes in a row, and one before the closing three, would end the string early.
    body = re.sub(r'"(?=""|\Z)', '\\\\"', body)
    return '"""\n' + body + '"""'


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
