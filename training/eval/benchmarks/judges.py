"""Who judges: `openai:MODEL@URL`, `local:DIR`, `replay:FILE`, `scripted:FILE`. Each is an annotator of `reasonedit-data`."""

from __future__ import annotations

import json
import threading
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError, DataError
from ...data.label.annotators import Annotator, Answer, EndpointAnnotator, Question, Refused
from ...data.label.runner import key_of
from .protocols import Protocol

OPENAI = "https://api.openai.com/v1"

KINDS = ("openai:MODEL", "openai:MODEL@URL", "local:DIR", "replay:FILE", "scripted:FILE")


def make_judge(
    text: str, protocol: Protocol, *, api_key: str | None = None, timeout: float = 120.0, extra_tokens: int = 0
) -> Annotator:
    """The judge that `text` names (KINDS). ConfigError for another text, and for files that are not there."""
    kind, _, value = text.partition(":")
    if not value or kind not in ("openai", "local", "replay", "scripted"):
        raise ConfigError(f"--judge: expected {', '.join(KINDS)}, found {text!r}. Correct it.")
    if kind == "openai":
        model, at, url = value.rpartition("@")
        if not at or "://" not in url:  # names of models may hold an @
            model, url = value, OPENAI
        options = {"timeout": timeout, "extra_tokens": extra_tokens, "max_side": protocol.max_side}
        return EndpointJudge(url, model, api_key=api_key, **options)
    if kind == "local":
        return _local(Path(value))
    return ReplayJudge(Path(value)) if kind == "replay" else ScriptedJudge(Path(value))


class EndpointJudge(EndpointAnnotator):
    """An endpoint. Texts of others are sent alone, without a system text and a schema, as their scripts send them."""

    def payload(self, question: Question) -> dict[str, Any]:
        """What is sent."""
        told = super().payload(question)
        if getattr(question.prompt, "placeholders", False):
            del told["response_format"]
            told["messages"] = [each for each in told["messages"] if each["role"] != "system"]
        return told


class ReplayJudge:
    """Answers as another run's judge did, out of its judgements.jsonl: by the key of the question, so wherever files lie.

    Its name is that judge's. What was refused is refused again; what could not be read cannot be read again.
    """

    endpoint = "replay"

    def __init__(self, path: Path) -> None:
        self._rows = {row["key"]: row for row in read_rows(path) if row.get("key")}
        names = sorted({row["judge"] for row in self._rows.values()})
        if len(names) != 1:
            raise ConfigError(f"replay:{path}: expected judgements of one judge, found {', '.join(names) or 'none'}. Split it.")
        (self.name,) = names

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        """The answer that was given to just this question."""
        prompt = question.prompt
        row = self._rows.get(
            key_of(prompt.step, f"{prompt.id}+{prompt.digest}", self.name, dict(question.inputs), question.pictures)
        )
        if row is None:
            raise Refused("the replayed file holds no answer to this question")
        if row["status"] in ("refused", "error"):
            raise Refused(row.get("note") or row["status"])
        return Answer(row.get("raw") or "", row.get("tokens_in", 0), row.get("tokens_out", 0))


class ScriptedJudge:
    """Answers out of a TOML file, for tests and for showing a pipeline. In order, the first that fits is taken:

        [[answer]]
        call = "SC"                      # of the protocol; left out: any
        instruction = "make it red"      # left out: any
        text = '{"reason": "", "success": 8, "restraint": 9}'

    A question that none fits is refused.
    """

    endpoint = "scripted"

    def __init__(self, path: Path) -> None:
        self.name = f"scripted-{path.stem}"
        try:
            self._answers = tomllib.loads(path.read_text(encoding="utf-8"))["answer"]
            good = all(isinstance(each.get("text"), str) for each in self._answers)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"scripted:{path}: expected TOML with [[answer]] tables, found none ({error}). Correct it."
            ) from error
        if not good:
            raise ConfigError(f"scripted:{path}: expected `text` in every [[answer]], found one without. Add it.")

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        """The first answer that fits."""
        call = question.prompt.step.partition("-")[2].removesuffix("-official")
        for each in self._answers:
            fits = each.get("call") in (None, call)
            if fits and each.get("instruction") in (None, question.inputs.get("instruction")):
                return Answer(each["text"])
        raise Refused(f"the script holds no answer for {call}")


def _local(folder: Path) -> Annotator:
    if not folder.is_dir():
        raise ConfigError(f"local:{folder}: expected a folder with a Qwen2.5-VL, found none. Correct the path.")
    from ....reasonedit_core.load import SystemSpec, load_reasoner
    from ...data.label.annotators import SpeakerAnnotator

    loaded = load_reasoner(SystemSpec("reasonedit-s", reasoner=f"qwen:{folder}"))
    return SpeakerAnnotator(loaded.reasoner.speaker, folder.resolve().name)


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a judgements.jsonl. ConfigError where there is none, DataError for a line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected judgements, found none ({error}). `reasonedit-eval judge` writes them.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not {"item", "role", "status", "marks"} <= row.keys():
                raise ValueError("keys are missing")
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: expected a judgement, found {line[:60]!r} ({error}). Run `judge` again; what was "
                "answered is kept."
            ) from error
        rows.append(row)
    return rows
