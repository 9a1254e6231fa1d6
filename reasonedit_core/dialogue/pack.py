"""The values a dialogue pack is made of, and its templates.

Texts are templates: `{name}` is a placeholder, `{{` and `}}` are braces. Values are put in as they are and are never looked
at again, so an instruction may hold braces, quotes or tags.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError
from ..interfaces import Form

FORMAT = "reasonedit.dialogue/1"
OWN_LANGUAGES = ("en", "zh")
VARIANTS = ("step1x-v1p2", "step1x-v1p1")


@dataclass(frozen=True, slots=True)
class TaskRule:
    """What a task's prompt may show and must use. name: the task as the Query states it."""

    name: str
    form: Form
    images: tuple[str, ...]
    allowed: tuple[str, ...]
    required: tuple[str, ...]


_WORDS = ("instruction", "original", "language")
_JUDGED = (*_WORDS, "target")

# `*_paired` tasks see the source as well as the result, as the released code does; the plain ones follow the paper and see
# the result alone. Both are the same task to whoever answers.
TASKS: dict[str, TaskRule] = {
    "think": TaskRule("think", "free", ("source",), (*_WORDS, "feedback"), ("instruction",)),
    "describe": TaskRule("describe", "free", ("source",), _WORDS, ("instruction",)),
    "score": TaskRule("score", "consistency", ("result",), _JUDGED, ("target",)),
    "reflect": TaskRule("reflect", "verdict", ("result",), (*_JUDGED, "score", "reason"), ("instruction",)),
    "reflect_paired": TaskRule("reflect", "verdict", ("source", "result"), (*_JUDGED, "score", "reason"), ("instruction",)),
    "edit_score": TaskRule("edit_score", "pair", ("result",), _JUDGED, ("instruction",)),
    "edit_score_paired": TaskRule("edit_score", "pair", ("source", "result"), _JUDGED, ("instruction",)),
    "quality_score": TaskRule("quality_score", "pair", ("result",), _JUDGED, ()),
}


@dataclass(frozen=True, slots=True)
class Slot:
    """A placeholder inside a template."""

    name: str


Template = tuple[str | Slot, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a user turn: a picture (`source` or `result`) or a template. when: left out while that value is absent."""

    image: str | None = None
    text: Template = ()
    when: str | None = None


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """The prompt of one task."""

    system: Template
    user: tuple[Part, ...]
    form: Form
    max_new_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class ConditioningPrompt:
    """The text in front of the instruction when the MLLM's states condition the denoiser.

    dropped_tokens: leading states that are cut off; None ("auto" in the file) means the whole rendered chat up to the end of
    `prefix`, counted with the checkpoint's own tokenizer. It is a constant of trained weights, not a length, so an imported
    pack states a number. text_to_image_negative: the negative prompt where no picture is given.
    """

    prefix: str
    dropped_tokens: int | None = None
    text_to_image_negative: str | None = None


@dataclass(frozen=True, slots=True)
class Pack:
    """One dialogue pack. language: en, zh, another code, or `any` when one wording serves every language.

    languages: how each language is called inside the prompts. correction: what is added to a question whose first answer
    could not be read. sources: (file, sha256) of what it was imported from. path: where it was read.
    translations: packs by language that `in_language` may answer with instead.
    """

    name: str
    language: str
    version: int
    tasks: Mapping[str, TaskPrompt] = field(repr=False)
    conditioning: Mapping[str, ConditioningPrompt] = field(repr=False)
    languages: Mapping[str, str] = field(repr=False)
    correction: Template = field(default=(), repr=False)
    imported: bool = False
    sources: tuple[tuple[str, str], ...] = ()
    path: str = ""
    translations: Mapping[str, Pack] = field(default_factory=dict, repr=False)

    def in_language(self, language: str) -> Pack:
        """The wording for an instruction in `language`."""
        return self.translations.get(language, self)

    def task(self, name: str) -> TaskPrompt:
        """The prompt of one task; ConfigError when the pack has none."""
        if name not in self.tasks:
            raise ConfigError(
                f"{self.path}: expected a prompt for the task {name!r}, found only {', '.join(self.tasks) or 'none'}. "
                f"Add [task.{name}] to the file, or import the pack again."
            )
        return self.tasks[name]

    def conditioning_for(self, variant: str) -> ConditioningPrompt:
        """The conditioning prompt of `v1p2`, `v1p1` or `v1p0` (also `step1x-v1.2` and so on; v1.0 shares that of v1.1)."""
        key = variant_key(variant)
        if key not in self.conditioning:
            raise ConfigError(
                f"{self.path}: expected [conditioning.{key}], found only {', '.join(self.conditioning) or 'none'}. "
                "Add the section, or import the pack again."
            )
        return self.conditioning[key]


def fitted(pack: Pack, *, reply_tokens: int | None = None, scores: Collection[str] = ("edit", "quality")) -> Pack:
    """The pack as an MLLM can follow it, in each of its languages: no reply longer than `reply_tokens`, and no question for a
    score (`edit`, `quality`) that it has not learnt to give."""
    tasks = {}
    for name, task in pack.tasks.items():
        kind = TASKS[name].name
        if not kind.endswith("_score") or kind.removesuffix("_score") in scores:
            most = task.max_new_tokens if reply_tokens is None else min(task.max_new_tokens, reply_tokens)
            tasks[name] = replace(task, max_new_tokens=most)
    others = {code: fitted(other, reply_tokens=reply_tokens, scores=scores) for code, other in pack.translations.items()}
    return replace(pack, tasks=tasks, translations=others)


def variant_key(variant: str) -> str:
    """The name of a variant's section in a pack."""
    short = variant.removeprefix("step1x-").removeprefix("v").replace(".", "p")
    keys = {"1p2": "step1x-v1p2", "1p1": "step1x-v1p1", "1p0": "step1x-v1p1"}
    if short not in keys:
        raise ConfigError(f"expected a Step1X variant (v1p0, v1p1 or v1p2), found {variant!r}.")
    return keys[short]


def language_of(text: str) -> str:
    """`zh` when the text holds more than one Chinese character, else `en` (the released code's rule)."""
    return "zh" if sum("\u4e00" <= char <= "\u9fff" for char in text) > 1 else "en"


# ---- templates -----------------------------------------------------------------------------------------------------------

_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


def parse_template(text: str) -> Template:
    """Split a template into text and slots. Raises ValueError on a brace that is neither doubled nor around a name."""
    pieces: list[str | Slot] = []
    end = 0
    for match in _PIECE.finditer(text):
        pieces.append(text[end : match.start()])
        if match[1]:
            pieces.append(Slot(match[1]))
        elif match[0] in ("{{", "}}"):
            pieces.append(match[0][0])
        else:
            near = text[max(0, match.start() - 20) : match.end() + 20]
            raise ValueError(f"a lone {match[0]!r} near {near!r}; write {match[0] * 2} for a brace")
        end = match.end()
    pieces.append(text[end:])
    return joined(pieces)


def joined(pieces: list[str | Slot]) -> Template:
    """The same template with neighbouring texts made one and empty ones left out."""
    merged: list[str | Slot] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif piece != "":
            merged.append(piece)
    return tuple(merged)


def format_template(template: Template) -> str:
    """The text that `parse_template` reads back as `template`."""
    return "".join(
        "{" + piece.name + "}" if isinstance(piece, Slot) else piece.replace("{", "{{").replace("}", "}}") for piece in template
    )


def fill(template: Template, values: Mapping[str, Any]) -> str:
    """Put the values in, literally."""
    return "".join(str(values[piece.name]) if isinstance(piece, Slot) else piece for piece in template)
