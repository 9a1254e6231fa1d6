"""An arm as a process of its own: its interpreter, its libraries, its memory. It loads, then waits until it is told to run.

Between the two: lines of JSON. The child's standard output is kept for them; what libraries print goes to standard error.
This page and what it imports work on Python 3.10 and need no library but torch, so that they run in a peer's environment.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import ReasonEditError

LOAD_SECONDS, RUN_SECONDS = 600.0, 600.0
"""How long an arm may take to load, and for one run."""

END_SECONDS = 10.0
"""How long it may take to end, before it is made to."""

ROOT = Path(__file__).resolve().parents[2]

_BOOT = """\
import importlib, importlib.util, sys
name, root, module = sys.argv[1:4]
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
package = importlib.util.module_from_spec(spec)
sys.modules[name] = package
spec.loader.exec_module(package)
importlib.import_module(name + "." + module).main(sys.argv[4])
"""
"""Makes this package known under its name in an interpreter where it is not installed, and starts a module of it."""


class ArmFailed(ReasonEditError):
    """An arm could not load or run. The message ends in the last line of what it said."""


class TooSlow(ArmFailed):
    """An arm had not done by the time that it was given."""


class Worker:
    """A started arm. module: dotted, below this package's root; its `main` gets `job` as JSON."""

    def __init__(self, module: str, job: Mapping[str, Any], *, python: str = sys.executable, paths: Sequence[str] = ()) -> None:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
        environment["PYTHONSAFEPATH"] = "1"  # files in the folder it is called from must not stand in for libraries
        environment.setdefault("HF_HUB_OFFLINE", "1")
        self._said = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [python, "-c", _BOOT, __package__.partition(".reasonedit_core")[0], str(ROOT), module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ready(self, seconds: float = LOAD_SECONDS) -> dict[str, Any]:
        """Wait until the arm has loaded; what it says of itself."""
        return self._next(seconds, "load")

    def run(self, number: int, seconds: float = RUN_SECONDS) -> dict[str, float]:
        """One run; seconds by part."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ArmFailed(f"it ended before run {number}: {self._last()}") from error
        return self._next(seconds, "run")

    def dismiss(self) -> None:
        """Tell the process to end, without waiting for it: several then do so at a time."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                pass

    def close(self, seconds: float = END_SECONDS) -> None:
        """End the process, after `seconds` by force."""
        self.dismiss()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next(self, seconds: float, what: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise TooSlow(f"it did not {what} within {seconds:.0f} s") from None
        if line is None:
            self._process.wait()
            raise ArmFailed(f"it could not {what}: {self._last()}")
        return json.loads(line)

    def _last(self) -> str:
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def serve(job: Mapping[str, Any], run: Callable[[int], Mapping[str, float] | None], about: Mapping[str, Any]) -> None:
    """The child's side, called when all is loaded: run by number until standard input ends.

    run may return seconds of parts of it; "total" is added, with the device waited for. about: what `Worker.ready` returns.
    A job that is `tidy` gives the device's memory back after each run, outside of what is timed, where the arms of a group
    would not fit side by side with what each of them keeps for its next run.
    """
    import torch

    own = job["_stream"]
    print(json.dumps(about), file=own, flush=True)
    cuda = str(job.get("device", "cpu")).startswith("cuda")
    for line in sys.stdin:
        with torch.no_grad(), forced(job.get("sdpa")):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            parts = run(int(line)) or {}
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if cuda and job.get("tidy"):
                torch.cuda.empty_cache()
        print(json.dumps({"total": seconds, **parts}), file=own, flush=True)


def start(text: str) -> dict[str, Any]:
    """The child's first call: its job, standard output put aside for `serve`, threads set."""
    import torch

    job = json.loads(text)
    job["_stream"] = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if job.get("threads"):
        torch.set_num_threads(int(job["threads"]))
    return job


def steps_of(job: Mapping[str, Any], number: int) -> int:
    """Denoising steps of a run: the warm-up, run 0, may have fewer (`warm_steps`)."""
    return int(job.get("warm_steps", job["steps"]) if number == 0 else job["steps"])


def forced(backend: str | None, *, alone: bool = False) -> AbstractContextManager[Any]:
    """A context in which torch's attention uses one backend by name (cudnn, flash, efficient, math); None: its own choice.

    Calls that the backend cannot compute (a VAE's single head of 512 channels) go to the memory-efficient or plain one;
    alone: they raise.
    """
    if not backend:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    others = () if alone else ("efficient", "math")
    order = [kinds[backend], *(kinds[name] for name in others if name != backend)]
    return sdpa_kernel(order, set_priority=True)
