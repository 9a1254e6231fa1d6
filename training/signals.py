"""How a running training is asked to save, or to save and stop.

SIGTERM and a file `save_quit` in the run folder ask for both; SIGUSR1 and a file `save` ask for a checkpoint only. A request
is noted at once and honoured at the next optimizer boundary, where nothing is half done. torchrun passes SIGTERM on to its
processes and kills what is left after 30 s; where a step and a save take longer, ask earlier (SIGUSR1, or Slurm's
`--signal=USR1@300`) or write the file.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop and has saved (sysexits' EX_TEMPFAIL: call again to go on)."""

SAVE, SAVE_QUIT = "save", "save_quit"


@dataclass(frozen=True, slots=True)
class Request:
    """cause: what asked (SIGTERM, SIGUSR1, the file `save`, ...). stop: whether to stop after the save."""

    cause: str
    stop: bool


class Requests:
    """Requests noted since the last look. Signals are heard while `listening`, files are looked for in run_dir."""

    def __init__(self, run_dir: str | Path) -> None:
        self._files = {Path(run_dir) / SAVE: False, Path(run_dir) / SAVE_QUIT: True}
        self._noted: list[Request] = []
        self._seen: list[Path] = []

    @contextmanager
    def listening(self) -> Iterator[Requests]:
        """Hear signals inside the block, then put the previous handlers back. Old request files are removed first, as they
        were meant for a run that is over. Signals need the main thread; in another one only files are honoured."""
        for path in self._files:
            if path.exists():
                path.unlink(missing_ok=True)  # several ranks look for it
                log.info("removed %s, which was left by an earlier run", path)
        wanted = {"SIGTERM": True, "SIGUSR1": False}
        known = {getattr(signal, name): stop for name, stop in wanted.items() if hasattr(signal, name)}
        if threading.current_thread() is not threading.main_thread():
            known = {}

        def note(number: int, frame: object) -> None:
            self._noted.append(Request(signal.Signals(number).name, known[signal.Signals(number)]))

        before = {number: signal.signal(number, note) for number in known}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def look(self, files: bool = True) -> Request | None:
        """The most demanding request since the last look, or None. files: whether this process looks for request files.

        Signals are taken off the list here and not after the save: one that arrives while saving is for the next look.
        """
        noted, self._noted = self._noted, []
        self._seen = [path for path in self._files if files and path.exists()]
        return strongest([*noted, *(Request(f"the file {path.name}", self._files[path]) for path in self._seen)])

    def done(self) -> None:
        """What the last look found has been honoured: its request files go."""
        for path in self._seen:
            path.unlink(missing_ok=True)


def strongest(requests: list[Request]) -> Request | None:
    """The first request to stop, else the first request to save, else None."""
    return next((one for one in requests if one.stop), requests[0] if requests else None)


def ignore_in_worker(worker: int) -> None:
    """For loader workers: a signal sent to the whole process group must not end them before their parent has saved."""
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
