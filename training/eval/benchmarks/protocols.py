"""What a judge is asked per benchmark, as versioned data (`protocols/*.toml`), and which calls an item takes.

<bench>-re is our own wording, in the package. <bench>-official is the wording of the benchmark's authors out of the user's own
copy of it (--prompts FILE: JSON, call -> text; ImgEdit's prompts.json is such a file); it is known by its sha256 and never
part of this project. Scores under our own wording are not the official ones, and no table says they are.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError
from .items import BENCHES, Item
from .questions import JudgeQuestion, Mark

FORMAT = "reasonedit.protocol/1"

KNOWLEDGE = frozenset(
    ("abstract_reasoning", "rule-based_reasoning", "humanities", "practical_knowledge", "biology", "chemistry", "geography")
) | {"medicine", "mathematics", "physics"}
"""KRIS: the ten categories that are marked for knowledge as well."""


def is_logical(item: Item) -> bool:
    """RISE: whether an item is of the category with yes-or-no marks (logical_reasoning)."""
    return item.group.startswith("logical")


@dataclass(frozen=True, slots=True)
class Protocol:
    """name: as tables show it; aggregate: the rule that its marks are counted by unless another is asked for; max_side: of
    pictures as the judge sees them; prompts: sha256 of the user's copy, None for our own wording; every: calls that are made
    of every item beside its benchmark's; resized: the edited picture is brought to its source's size before it is judged, as
    GEdit's script does, which hides a changed shape."""

    name: str
    bench: str
    aggregate: str
    max_side: int
    calls: Mapping[str, JudgeQuestion]
    prompts: str | None = None
    every: tuple[str, ...] = ()
    resized: bool = False

    @property
    def digest(self) -> str:
        """16 hex digits that change with any question."""
        told: list = [[name, question.id, question.digest] for name, question in sorted(self.calls.items())]
        told += ["resized"] if self.resized else []
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def names() -> list[str]:
    """Every protocol."""
    return [f"{bench}-{wording}" for bench in BENCHES for wording in ("re", "official")]


def load_protocol(name: str, prompts: Path | None = None) -> Protocol:
    """A protocol by its name. Raises ConfigError for an unknown one, and for one whose wording is not at hand."""
    bench, _, wording = name.rpartition("-")
    if name not in names():
        raise ConfigError(f"--protocol: expected one of {', '.join(names())}, found {name!r}. Correct it.")
    own = _read(bench)
    if wording == "re":
        if prompts is not None:
            raise ConfigError(f"--prompts: expected none with {name}, which is our own wording. Use {bench}-official.")
        return own
    if prompts is None:
        raise ConfigError(
            f"--protocol {name}: expected --prompts FILE, the benchmark's own wording out of your copy of it, as JSON from "
            "call "
            f"to text ({', '.join(own.calls)}); found none. {bench}-re has wording of our own."
        )
    return _with_prompts(own, prompts)


def calls_of(item: Item) -> dict[str, str]:
    """Role -> name of the call that fills it. The role is what scores are made of; the call may be a variant of it.

    KRIS: view changes are held against the true view, anomalies against their explanation (what the official script means to
    do, and by a misspelt name does not), frames of an event among themselves. RISE: items without a consistency mark have none.
    """
    match item.bench:
        case "gedit":
            return {"SC": "SC", "PQ": "PQ"}
        case "imgedit":
            return {"edit": item.group.lower()}
        case "kris":
            return _kris_calls(item)
        case "rise":
            if is_logical(item):
                return {"consistency": "consistency_logical", "reasoning": "reasoning_logical"}
            free = {} if item.flags.get("consistency_free") else {"consistency": "consistency"}
            return {**free, "reasoning": "reasoning", "plausibility": "plausibility"}
        case _:
            return ({"mllm": "mllm"} if item.refs.get("output_text") else {}) | {"align": "align"}


IDENTITY = "identity"
"""What the roles of identity's runs begin with: identity_1, identity_2, ..."""


def with_identity(protocol: Protocol, runs: int) -> Protocol:
    """The protocol with `runs` runs of the question for identity preservation, which differ in name and seed alone.

    Complex-Edit takes the mean of 20. Each run is a question of its own, so that all are kept and none is asked twice.
    """
    if not runs:
        return protocol
    own, shared = _identity(), next(iter(_read(protocol.bench).calls.values()))
    names = [f"{IDENTITY}_{number}" for number in range(1, runs + 1)]
    calls = {
        name: replace(own, step=f"{protocol.bench}-{name}", system=shared.system, correction=shared.correction)
        for name in names
    }
    return replace(protocol, calls={**protocol.calls, **calls}, every=tuple(names))


def roles_of(item: Item, protocol: Protocol) -> dict[str, str]:
    """`calls_of`, and the calls that the protocol makes of every item."""
    return {**calls_of(item), **{name: name for name in protocol.every}}


def _kris_calls(item: Item) -> dict[str, str]:
    instruction = "instruction"
    if item.group in KNOWLEDGE and item.refs.get("explain"):
        instruction = "dual"
    elif item.group == "anomaly_correction" and item.refs.get("explain"):
        instruction = "instruction_anomaly"
    elif item.group == "viewpoint_change" and "gt_img" in item.refs:
        instruction = "instruction_view"
    consistency = "consistency_frames" if item.group == "temporal_prediction" else "consistency"
    return {"consistency": consistency, "quality": "quality", "instruction": instruction}


def inputs_of(item: Item, question: JudgeQuestion) -> dict[str, str]:
    """The values that a question tells of an item; one that the benchmark does not have is told as `none`."""
    known = {"instruction": item.instruction, "explanation": item.refs.get("explain"), **item.refs}
    known["reference"] = item.refs.get("reference") or item.refs.get("output_text")
    return {name: known.get(name) or "none" for name in question.tells}


# ---- files ---------------------------------------------------------------------------------------------------------------


@cache
def _read(bench: str) -> Protocol:
    told = _file(bench)
    calls = {name: _question(f"{bench}-{name}", entry, told) for name, entry in told["call"].items()}
    return Protocol(f"{bench}-re", bench, told["aggregate"], told["max_side"], calls)


@cache
def _identity() -> JudgeQuestion:
    """Of no benchmark, so that its system text, correction and size are those of the one it is asked beside."""
    told = _file(IDENTITY)
    shared = {"system": "", "correction": "", "max_side": _file("gedit")["max_side"]}
    return _question(IDENTITY, told["call"][IDENTITY], {**shared, **told})


def _file(name: str) -> Mapping[str, Any]:
    path = files(__package__) / "protocols" / f"{name}.toml"
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a protocol, found none ({error}). Install the package anew.") from error
    if told.get("format") != FORMAT:
        raise ConfigError(f"{path}: expected format {FORMAT}, found {told.get('format')!r}. Install the package anew.")
    return told


def _question(step: str, entry: Mapping[str, Any], told: Mapping[str, Any]) -> JudgeQuestion:
    return JudgeQuestion(
        step=step,
        version=entry["version"],
        system=told["system"].strip(),
        text=entry["text"],
        shows=tuple(entry["shows"]),
        tells=tuple(entry["tells"]),
        max_tokens=entry["max_tokens"],
        temperature=float(told.get("temperature", 0.0)),
        correction=told["correction"],
        marks=tuple(Mark(*mark) for mark in entry["marks"]),
        max_side=told["max_side"],
        first_token=entry.get("first_token", False),
    )


def _with_prompts(own: Protocol, path: Path) -> Protocol:
    try:
        data = path.read_bytes()
        told = json.loads(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {path}: expected JSON from call to text, found none ({error}). Correct it.") from error
    missing = [name for name in own.calls if not isinstance(told, dict) or not isinstance(told.get(name), str)]
    if missing:
        raise ConfigError(
            f"--prompts {path}: expected a text for each of {', '.join(own.calls)}, found none for {', '.join(missing)}. "
            "Add them."
        )
    calls = {name: _official(question, told[name]) for name, question in own.calls.items()}
    return replace(own, name=f"{own.bench}-official", calls=calls, prompts=hashlib.sha256(data).hexdigest())


def _official(question: JudgeQuestion, text: str) -> JudgeQuestion:
    """The text stands alone, as the official scripts send it: no system text, no schema, no values after it."""
    return replace(question, step=f"{question.step}-official", text=text, system="", in_order=True, placeholders=True)


def shown_names(question: JudgeQuestion, pictures: Mapping[str, Sequence[object]]) -> list[object]:
    """The pictures of a question in order. pictures: by name, `sources` with all of them; names without any are left out."""
    return [each for name in question.shows for each in pictures.get(name, ())]
