"""Who makes edited pictures: a loaded system in one of four ways, or a command of the user's."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....reasonedit_core.errors import ConfigError
from .generate import Made, MakerFault
from .outputs import as_png

if TYPE_CHECKING:
    from ....reasonedit_core.load import System, SystemSpec
    from ....reasonedit_core.types import EditRequest, EditTrace

KINDS = ("base", "think", "loop", "reroll")
"""base: the editor with the user's words; think: one edit of what thinking made of them; loop: with reflection, `rounds`
edits at most; reroll: `rounds` edits of the same goal with other noise, the one that the reasoner scores highest."""


@dataclass(frozen=True, slots=True)
class Settings:
    """None: the checkpoint's own. rounds: of loop and reroll."""

    rounds: int = 3
    steps: int | None = None
    guidance: float | None = None
    size_level: int | None = None


class SystemMaker:
    """A system of the project. load: called when the first picture is asked for; name: of weights and settings."""

    def __init__(self, kind: str, load: Callable[[], System], name: str, settings: Settings = Settings()) -> None:
        if kind not in KINDS:
            raise ConfigError(f"--system: expected {', '.join(KINDS)} or cmd:COMMAND, found {kind!r}. Correct it.")
        self.kind, self._load, self._settings = kind, load, settings
        self._system: System | None = None
        self._lock = threading.Lock()
        several = f"@{settings.rounds} rounds" if kind in ("loop", "reroll") else ""
        own = [f"{key} {value}" for key in ("steps", "guidance", "size_level") if (value := getattr(settings, key)) is not None]
        self.name = f"{kind}:{name}{several}" + (f" ({', '.join(own)})" if own else "")

    def make(self, source: Path, instruction: str, seed: int, folder: Path) -> Made:
        """Edit, and keep rounds and trace in `folder` as they are made."""
        from ....reasonedit_core.images import load_image
        from ....reasonedit_core.report import RunFolder, encode_png, with_alpha

        with self._lock:
            if self._system is None:
                self._system = self._load()
        system, picture = self._system, load_image(source)
        if self.kind != "base" and system.reasoner is None:
            raise ConfigError(f"{self.kind}: expected a system that reasons, found {system.name} without a reasoner. Name one.")
        request = self._request(system, picture.rgb, instruction, seed)
        kept = RunFolder(folder, alpha=picture.alpha, run={"image": source.name, "system": self.name})
        begun = time.monotonic()
        if self.kind == "reroll":
            trace, apart = _reroll(system, request)
        else:
            from ....reasonedit_core.loop import think_edit_reflect

            apart = 0.0
            trace = think_edit_reflect(
                request, reasoner=system.reasoner, generator=system.generator, policy=system.policy, on_round=kept.write_round
            )
        seconds = time.monotonic() - begun - apart
        kept.write_round(trace)
        facts = {"seconds": round(seconds, 3), "rounds": len(trace.rounds), "stop": trace.stop_reason, "best": trace.best}
        return Made(encode_png(with_alpha(trace.image, picture.alpha), {}), facts)

    def _request(self, system: System, image: Any, instruction: str, seed: int) -> EditRequest:
        from ....reasonedit_core.types import EditRequest

        values = {name: system.defaults[name] for name in ("steps", "guidance", "size_level", "negative")}
        own = self._settings
        values |= {key: value for key in ("steps", "guidance", "size_level") if (value := getattr(own, key)) is not None}
        thinks, loops = self.kind != "base", self.kind in ("loop", "reroll")
        return EditRequest(
            image, instruction, seed=seed, think=thinks, reflect=loops, max_rounds=own.rounds if loops else 1, **values
        )


def _reroll(system: System, request: EditRequest) -> tuple[EditTrace, float]:
    """Blind re-rolls of one goal, and the seconds of scoring them, which the arm is not charged with: it is what reflection is
    held against, and the scores only choose."""
    import torch

    from ....reasonedit_core.loop import score
    from ....reasonedit_core.types import EditTrace, Round

    assert system.reasoner is not None
    reasoner = system.reasoner.bound(seed=request.seed)
    trace = EditTrace(request, thought=reasoner.think(request.image, request.instruction))
    begun = time.monotonic()
    target = reasoner.describe(request.image, trace.goal, original=request.instruction)
    apart = time.monotonic() - begun
    trace = replace(trace, target=target)
    for number in range(request.max_rounds):
        rng, begun = torch.Generator().manual_seed(request.seed + number), time.monotonic()
        edited = system.generator.edit(request, request.image, trace.goal, rng)
        made = Round(number, trace.goal, None, edited, seconds=time.monotonic() - begun)
        begun = time.monotonic()
        found = reasoner.reflect(request.image, edited.image, trace.goal, target, original=request.instruction)
        apart += time.monotonic() - begun
        trace = replace(trace, rounds=(*trace.rounds, replace(made, reflection=found)))
    scores = [score(made.reflection) for made in trace.rounds]
    best = max(range(len(scores)), key=lambda at: (scores[at], -at))
    return replace(trace, best=best, stop_reason="max_rounds"), apart


def load_with(spec: SystemSpec) -> Callable[[], System]:
    """A loader for a SystemMaker."""

    def load() -> System:
        from ....reasonedit_core.load import load_system

        return load_system(spec)

    return load


class CommandMaker:
    """Any program: {source}, {instruction}, {seed} and {out} (the PNG or JPEG that it shall write) are put into its arguments.

    It is started without a shell, so an instruction cannot become a command. timeout: seconds for one picture.
    """

    kind = "command"

    def __init__(self, command: str, timeout: float = 3600.0) -> None:
        self.name, self._timeout = f"cmd:{command}", timeout
        try:
            self._parts = shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"--system cmd: expected a command, found {command!r} ({error}). Correct its quotes.") from error
        if not self._parts or "{out}" not in command or "{source}" not in command:
            raise ConfigError(
                f"--system cmd: expected a command with {{source}} and {{out}} in it, found {command!r}. Add them."
            )

    def make(self, source: Path, instruction: str, seed: int, folder: Path) -> Made:
        """Run the program once. MakerFault where it leaves no picture."""
        with tempfile.TemporaryDirectory() as made:
            out = Path(made) / "out.png"
            values = {"{source}": str(source), "{instruction}": instruction, "{seed}": str(seed), "{out}": str(out)}
            parts = [_filled(part, values) for part in self._parts]
            begun = time.monotonic()
            try:
                done = subprocess.run(parts, capture_output=True, timeout=self._timeout, check=False)
            except FileNotFoundError as error:
                raise ConfigError(f"--system cmd: expected a program {parts[0]!r}, found none. Correct it.") from error
            except subprocess.TimeoutExpired:
                raise MakerFault(f"the command took more than {self._timeout:g} s") from None
            seconds = time.monotonic() - begun
            if done.returncode or not out.is_file():
                said = done.stderr.decode("utf-8", "replace").strip()[-300:]
                raise MakerFault(
                    f"the command ended with {done.returncode} and {'a' if out.is_file() else 'no'} picture: {said}"
                )
            return Made(as_png(out), {"seconds": round(seconds, 3), "rounds": None, "stop": None})


def _filled(part: str, values: dict[str, str]) -> str:
    """Placeholders of one argument; what is put in is not looked through again."""
    out, rest = "", part
    while rest:
        at, name = min(((rest.find(name), name) for name in values if name in rest), default=(-1, ""))
        if at < 0:
            return out + rest
        out, rest = out + rest[:at] + values[name], rest[at + len(name) :]
    return out
