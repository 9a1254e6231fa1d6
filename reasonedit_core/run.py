"""One run from a terminal: progress bars, Ctrl-C, and every finished round on the disk."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .loop import finish, think_edit_reflect
from .regions import RegionUse
from .report import RunFolder
from .types import EditRequest, EditTrace, Policy, Round, ShouldStop

if TYPE_CHECKING:
    from .load import System

Say = Callable[[str], None]


class Bars:
    """Progress on stderr: loading, rounds, steps. Silent when `quiet` or when nobody watches (no terminal)."""

    def __init__(self, quiet: bool = False) -> None:
        self._off = quiet or not sys.stderr.isatty()
        self._rounds: tqdm | None = None
        self._steps: tqdm | None = None

    @contextmanager
    def loading(self) -> Iterator[Callable[[str, int, int], None]]:
        """Gives the callback for `load_system`: (what is being loaded, parts done, parts in all)."""
        with tqdm(desc="loading", unit="part", leave=False, disable=self._off) as bar:

            def show(what: str, done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.set_postfix_str(what)

            yield show

    @contextmanager
    def running(self, most: int) -> Iterator[Bars]:
        """Bars for a run of at most `most` rounds; gone when the context closes."""
        self._rounds = tqdm(total=most, desc="rounds", unit="round", leave=False, disable=self._off)
        try:
            yield self
        finally:
            for bar in (self._steps, self._rounds):
                if bar is not None:
                    bar.close()
            self._rounds = self._steps = None

    def step(self, index: int, count: int, _latents: torch.Tensor) -> None:
        """The loop's `on_step`."""
        if self._steps is None or index <= self._steps.n:
            if self._steps is not None:
                self._steps.close()
            self._steps = tqdm(total=count, desc="steps", unit="step", leave=False, disable=self._off)
        self._steps.update(index - self._steps.n)

    def text(self, task: str, so_far: str) -> None:
        """The loop's `on_text`: the last words of what the reasoner writes."""
        if self._rounds is not None and not self._off:
            self._rounds.set_postfix_str(f"{task}: {short(so_far[-40:])}")

    def rounds(self, trace: EditTrace) -> None:
        """After an edit, and again after its reflection."""
        if self._rounds is not None:
            self._rounds.n = len(trace.rounds)
            self._rounds.refresh()


@contextmanager
def stop_on_interrupt(say: Say) -> Iterator[ShouldStop]:
    """Turns the first Ctrl-C into a `should_stop` that answers True; the second one raises KeyboardInterrupt at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say("stopping at the next step or token; press Ctrl-C again to stop at once")

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def run_to_folder(
    system: System, request: EditRequest, policy: Policy, folder: RunFolder, *, bars: Bars, say: Say
) -> EditTrace:
    """Think, edit, reflect; store every round as it is made and the result at the end.

    Whatever ends a run before its time (an error, no memory, Ctrl-C) leaves result and sheet of the rounds made before it.
    """
    made: EditTrace | None = None

    def store(trace: EditTrace) -> None:
        nonlocal made
        folder.write_round(trace)
        bars.rounds(trace)
        made = trace

    with bars.running(request.max_rounds), stop_on_interrupt(say) as should_stop:
        try:
            trace = think_edit_reflect(
                request,
                reasoner=system.reasoner,
                generator=system.generator,
                policy=policy,
                drafter=system.drafter,
                on_round=store,
                on_step=bars.step,
                on_text=bars.text,
                should_stop=should_stop,
            )
        except BaseException as error:
            made = getattr(error, "trace", None) or (made and finish(made, policy, "interrupted"))
            if made is not None and made.rounds:
                folder.finish(made)
            raise
    folder.finish(trace)
    return trace


def round_line(done: Round) -> str:
    """One line that says what a round did."""
    words = f"round {done.index + 1}: {short(done.instruction)}"
    if done.edited.region is not None:
        words += f" [{region_words(done.edited.region)}]"
    seen = done.reflection
    if done.full_of is not None:
        return f"{words} -> round {done.full_of + 1} in full ({done.seconds:.1f} s)"
    if seen is None:
        return f"{words} -> not judged ({done.seconds:.1f} s)"
    scores = [f"{name} {'/'.join(f'{v:.3g}' for v in pair)}" for name, pair in _pairs(seen.scores)]
    if seen.scores.consistency is not None:
        scores.append(f"consistency {seen.scores.consistency:.3g}")
    if not seen.scores.asked:
        scores.append("edit and quality not asked for")
    return f"{words} -> {seen.decision.value} ({', '.join([*scores, f'{done.seconds:.1f} s'])})"


def region_words(use: RegionUse) -> str:
    """What a region made of the steps of an edit."""
    kinds = {"full": use.full, "partial": use.partial, "cached": use.cached, "skipped": use.skipped}
    steps = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f"edited {use.edited} of {use.tokens} tokens; steps: {steps}; {use.guided} guided"


def outcome_line(trace: EditTrace) -> str:
    """One line that says which picture is the result and why the run ended."""
    if trace.best is None:
        return f"result: the source, unchanged (stopped: {trace.stop_reason})"
    return f"result: round {trace.best + 1} of {len(trace.rounds)} (stopped: {trace.stop_reason})"


def _pairs(scores) -> list[tuple[str, tuple[float, ...]]]:
    return [(name, pair) for name, pair in (("edit", scores.edit), ("quality", scores.quality)) if pair is not None]


def short(text: str, most: int = 70) -> str:
    """One printable line: what a model wrote must not move the cursor or colour the terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[: most - 3] + "..."
