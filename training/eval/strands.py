"""Many runs of the core's loop side by side, none of them changed: what they ask of the networks is answered in batches.

Each run is a function in a thread of its own, a strand. Only one thread ever runs: a strand works until it asks for something
that costs (`ask`), then waits; when all wait, the kind of request that most strands wait for is served, for all of them in one
call. The order of everything follows from the order of the runs, so a repetition is the same to the bit.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

Made = TypeVar("Made")

Serve = Callable[[Sequence[Any]], "Sequence[Answer]"]
"""Requests of one kind -> their answers, in order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request: a value, or the error to raise where it was asked. seconds: its share of the work."""

    value: Any = None
    seconds: float = 0.0
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Ask:
    kind: str
    requests: tuple[Any, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _End:
    value: Any = None
    error: BaseException | None = None


class _Dropped(BaseException):
    """Raised in a strand that nobody waits for any more."""


class _Strand:
    """One run. spent: seconds of work by label, of all that it asked for."""

    def __init__(self, number: int, work: Callable[[], Any]) -> None:
        self.number = number
        self.spent: Counter[str] = Counter()
        self.waiting: _Ask | None = None
        self._work = work
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"reasonedit-eval-{number}")

    def step(self, answers: Sequence[Answer] | None = None) -> _End | None:
        """Run until the next question (None; it is in `waiting`) or the end."""
        if answers is None:
            self._thread.start()
        else:
            self._inbox.put(answers)
        message = self._outbox.get()
        self.waiting = message if isinstance(message, _Ask) else None
        return None if self.waiting else message

    def drop(self) -> None:
        """End the run where it waits."""
        self._inbox.put(_Dropped())
        self._thread.join()

    def ask(self, question: _Ask) -> list[Any]:
        """Called in the strand's own thread."""
        self._outbox.put(question)
        answers = self._inbox.get()
        if isinstance(answers, _Dropped):
            raise answers
        for label, answer in zip(question.labels, answers, strict=True):
            self.spent[label] += answer.seconds
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [answer.value for answer in answers]

    def _run(self) -> None:
        _here.strand = self
        try:
            end = _End(self._work())
        except _Dropped:
            return
        except BaseException as error:  # raised again by `run_strands`
            end = _End(error=error)
        self._outbox.put(end)


class _Here(threading.local):
    """The strand of each thread. No slots: those would be shared by the threads."""

    strand: _Strand | None = None


_here = _Here()


def ask(kind: str, requests: Sequence[Any], labels: Sequence[str]) -> list[Any]:
    """Wait for the answers to some requests of one kind. Only in a run that `run_strands` runs.

    labels: one per request, under which its time counts in `spent`.
    """
    assert _here.strand is not None, "asked outside of a strand"
    return _here.strand.ask(_Ask(kind, tuple(requests), tuple(labels)))


def ask_one(kind: str, request: Any, label: str) -> Any:
    """The answer to one request."""
    return ask(kind, [request], [label])[0]


def spent() -> dict[str, float]:
    """Seconds of work by label that the strand at hand has asked for so far. A batch's time is shared by its requests."""
    assert _here.strand is not None, "asked outside of a strand"
    return dict(_here.strand.spent)


def run_strands(works: Sequence[Callable[[], Made]], serve: Mapping[str, Serve], *, width: int) -> Iterator[tuple[int, Made]]:
    """Run all `works`, at most `width` at a time; yields (number, what it returned) as they end.

    serve: per kind of request what answers it, in this thread. An error that leaves a work, or a `serve`, ends everything.
    """
    kinds = {kind: rank for rank, kind in enumerate(serve)}
    todo = iter([_Strand(number, work) for number, work in enumerate(works)])
    active: list[_Strand] = []
    try:
        while True:
            for strand in todo if len(active) < width else ():
                end = strand.step()
                if end is None:
                    active.append(strand)
                else:
                    yield strand.number, _value(end)
                if len(active) >= width:
                    break
            if not active:
                return
            waiting = Counter(strand.waiting.kind for strand in active)
            kind = max(waiting, key=lambda one: (waiting[one], -kinds[one]))
            served = [strand for strand in active if strand.waiting.kind == kind]
            answers = iter(serve[kind]([request for strand in served for request in strand.waiting.requests]))
            for strand in served:
                end = strand.step([next(answers) for _ in strand.waiting.requests])
                if end is not None:
                    active.remove(strand)
                    yield strand.number, _value(end)
    finally:
        for strand in active:
            if strand.waiting is not None:
                strand.drop()


def _value(end: _End) -> Any:
    if end.error is not None:
        raise end.error
    return end.value
