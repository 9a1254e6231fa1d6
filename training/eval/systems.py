"""The systems that a table compares, loaded and put into strands.

The shipped one is a name (`mini-s`, `mini-q`) or a folder in a released layout. Others are checkpoints of the run that made
it: folders in the same layout below the run folder, at the places named here.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...reasonedit_core.detect import detect
from ...reasonedit_core.errors import CheckpointError, ConfigError
from ...reasonedit_core.mini.models import MINIS, mini_folder
from .arms import Body

if TYPE_CHECKING:
    from ...reasonedit_core.interfaces import Reasoner
    from ...reasonedit_core.load import System
    from .batching import Eyes
    from .strands import Serve

SHIPPED = "shipped"

COMPARE = "compare"
"""Folder below the run folder, with one for each system, in which the places lie."""

PLACES: Mapping[str, str] = {
    "base": "stages/base",
    "reason": "stages/reason",
    "edit": "stages/edit",
    "dual-image": "reflection/dual-image",
    "single-image": "reflection/single-image",
    "multi-round": "reflection/multi-round",
}
"""Where `reasonedit-train mini` leaves checkpoints, below COMPARE/NAME of its run folder. base: before the three stages;
reason, edit: after the first and the second; the others: the base with one of the three reflectors."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Whose weights edit and whose reason: `shipped` or a name of PLACES. reasoner: None for none. reflector: who reflects
    where that is not the reasoner; form: in which it reflects, one of `verdict.FORMS`."""

    editor: str = SHIPPED
    reasoner: str | None = SHIPPED
    reflector: str | None = None
    form: str = "multi-round"

    @property
    def names(self) -> tuple[str, ...]:
        """All that are needed."""
        return tuple(dict.fromkeys(name for name in (self.editor, self.reasoner, self.reflector) if name))


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the weights lie. name: of the shipped system, as tables show it. runs: the run folder, or None."""

    name: str
    shipped: Path
    runs: Path | None = None

    @classmethod
    def find(cls, system: str, runs: Path | None = None) -> Folders:
        """system: a mini's name or a folder. Raises CheckpointError where it is not there."""
        if system in MINIS:
            return cls(system, mini_folder(system), runs)
        folder = Path(system)
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(
                f"--system {system}: expected {', '.join(MINIS)} or a folder with model_index.json, found neither. Correct it."
            )
        return cls(folder.resolve().name, folder, runs)

    def place(self, name: str) -> Path:
        """The folder of a name. Raises ConfigError, naming the file that is missing, where the run does not hold it."""
        if name == SHIPPED:
            return self.shipped
        place = Path(COMPARE) / self.name / PLACES[name]
        wanted = (place / "model_index.json").as_posix()
        if self.runs is None:
            raise ConfigError(
                f"expected the folder that `reasonedit-train mini --system {self.name} --out DIR` leaves, for {wanted} in it, "
                "found none. Name it with --runs DIR."
            )
        if not (self.runs / wanted).is_file():
            raise ConfigError(
                f"--runs {self.runs}: expected {wanted} in it, found none. Let `reasonedit-train mini` run to its end, or name "
                "another folder."
            )
        return self.runs / place

    def check(self, choices: Iterable[Choice]) -> None:
        """Raise ConfigError unless all that the choices need is there."""
        for choice in choices:
            for name in choice.names:
                self.place(name)

    def fingerprint(self, choices: Iterable[Choice]) -> str:
        """Names the weights and settings of everything that the choices need."""
        names = sorted({name for choice in choices for name in choice.names})
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}:{_digest(self.place(name))}\n".encode())
        return digest.hexdigest()[:32]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".toml", ".txt"):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def open_body(folders: Folders, choice: Choice, *, device: str = "auto", dtype: str = "auto") -> tuple[Body, dict[str, Serve]]:
    """Load what a choice needs. Returns the body that arms run in strands, and what answers their requests."""
    from .batching import Eyes, batch_generator

    system = _load(folders.place(choice.editor), choice.reasoner == choice.editor, device, dtype)
    eyes = Eyes(system.mllm)
    generator, serve = batch_generator(system.generator, system.mllm, eyes)
    made: dict[str, Reasoner] = {}

    def speak(name: str) -> Reasoner:
        if name not in made:
            one = system if name == choice.editor == choice.reasoner else _load(folders.place(name), True, device, dtype)
            seen = eyes if one is system else Eyes(one.mllm)
            made[name] = _ask_in_batches(one, seen, f"speak {name}", serve)
        return made[name]

    reasoner = None if choice.reasoner is None else speak(choice.reasoner)
    if choice.reflector is not None:
        reasoner = _with_reflector(reasoner, speak(choice.reflector), choice.form)
    policy = replace(system.policy, lazy_scores=False)
    return Body(generator, reasoner, system.defaults, policy, generator.codec), serve


def _load(folder: Path, speaks: bool, device: str, dtype: str) -> System:
    from ...reasonedit_core.load import SystemSpec, load_system

    layout = detect(folder)
    if layout.kind != "pipeline" or not layout.system:
        raise CheckpointError(f"{folder}: expected a whole system in a released layout, found a {layout.kind}. Name another.")
    reasoner = "qwen" if speaks else "none"
    return load_system(SystemSpec(layout.system, folder, reasoner, device=device, dtype=dtype))


def _ask_in_batches(system: System, eyes: Eyes, kind: str, serve: dict[str, Serve]) -> Reasoner:
    """The reasoner of a system, its MLLM answering in batches under the name `kind`."""
    from .speaking import AskingSpeaker, BatchSpeaker

    low, high = system.settings.reasoner_pixels
    speaker = BatchSpeaker(system.mllm, eyes, min_pixels=low, max_pixels=high, max_side=system.settings.reasoner_max_side)
    serve[kind] = speaker.serve
    asking = copy.copy(system.reasoner)
    asking.speaker = AskingSpeaker(kind)
    return asking


def _with_reflector(thinker: Reasoner | None, reflector: Reasoner, form: str) -> Reasoner:
    from ...reasonedit_core.reasoners.verdict import DUAL_IMAGE, MULTI_ROUND, VerdictReasoner
    from .reflecting import TwoReasoners

    if form != MULTI_ROUND:
        reflector = VerdictReasoner(reflector.pack, reflector.speaker, paired=form == DUAL_IMAGE)
    return reflector if thinker is None else TwoReasoners(thinker, reflector)
