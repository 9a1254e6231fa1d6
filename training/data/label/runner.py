"""Asks questions: many at a time, not too fast, again when it makes sense, each once in the life of its journal.

Questions are asked in threads, because a request blocks; everything that is remembered is written by the event loop's thread.
A question that is under way when another item asks the same is awaited, not asked twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ....reasonedit_core.errors import ConfigError, MalformedReply, ReasonerError
from .annotators import Annotator, Answer, NotTaken, Passing, Question, Refused, Shown
from .journal import DONE, REJECTED, Entry, Journal
from .pace import Pace, Rejected, in_thread
from .prompts import Prompt
from .replies import Reply

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 12
"""Questions in a row that the annotator did not answer at all; then the fault is not the questions'."""

MAX_RAW = 20_000
"""Characters that are kept of an answer that cannot be read."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How hard the annotator may be pressed.

    concurrency: requests at a time; per_minute: requests begun in a minute, None for any number; timeout: seconds of one
    request; attempts: per question at most; pause: seconds before the second attempt, twice as many before each further one,
    and up to a quarter more; longest_pause: the most that is waited, also where the annotator asks for more.
    """

    concurrency: int = 4
    per_minute: float | None = None
    timeout: float = 120.0
    attempts: int = 4
    pause: float = 2.0
    longest_pause: float = 300.0

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "attempts": 1, "pause": 0, "longest_pause": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: expected at least {low}, found {getattr(self, name)}. Correct it.")
        for name in ("timeout", "per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected more than 0, found {value}. Correct it.")


@dataclass(slots=True)
class Tally:
    """What this run has done. asked: requests; known: questions that the journal already held."""

    asked: int = 0
    known: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class Runner:
    """Answers questions out of the journal or from annotators. retry: ask again what was rejected before.

    wait: how a coroutine waits a number of seconds. Raises ReasonerError when an annotator cannot be used at all.
    """

    def __init__(
        self,
        journal: Journal,
        limits: Limits,
        *,
        retry: bool = False,
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.journal, self.limits, self.tally = journal, limits, Tally()
        self._retry, self._wait = retry, wait
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._worker = asyncio.Lock()
        self._pace = Pace(limits.per_minute, wait)
        self._running: dict[str, asyncio.Future[Entry]] = {}
        self._done: set[str] = set()
        self._silent = 0

    async def ask(
        self, item: str, prompt: Prompt, inputs: Mapping[str, str], pictures: Sequence[Shown], annotator: Annotator
    ) -> tuple[Reply, Entry]:
        """(the checked answer, its entry). Raises Rejected where there is none."""
        told = {name: inputs[name] for name in prompt.tells}
        key = key_of(prompt.step, f"{prompt.id}+{prompt.digest}", annotator.name, told, pictures)
        question = Question(prompt, told, tuple(pictures), seed=int(key[:7], 16))
        entry = await self._settle(key, lambda: self._attempts(key, item, question, annotator))
        return prompt.reply.model_validate_json(json.dumps(entry.value)), entry

    async def do(
        self,
        item: str,
        step: str,
        version: str,
        worker: str,
        inputs: Mapping[str, Any],
        pictures: Sequence[Shown],
        work: Callable[[], dict[str, Any]],
        *,
        seed: int | None = None,
        holds: Callable[[Entry], bool] = lambda entry: True,
    ) -> Entry:
        """The entry of a piece of work that is no question: `work` is called in a thread, one at a time, and its value (as
        JSON has it) journaled. A Rejected that it raises is journaled as well.

        worker: what does it, as `model` of a question; seed: part of the inputs, noted by itself; holds: whether what a known
        entry speaks of is still there; else the work is done again.
        """
        key = key_of(step, version, worker, inputs if seed is None else {**inputs, "seed": seed}, pictures)

        async def once() -> Entry:
            begun = time.monotonic()
            head = {"key": key, "step": step, "item": item, "model": worker, "prompt": version, "seed": seed}
            async with self._worker:
                try:
                    value = await in_thread(work)
                except Rejected as rejected:
                    told = {"status": REJECTED, "reason": rejected.reason, "note": rejected.note}
                else:
                    told = {"status": DONE, "value": value}
            return Entry(**head, **told, seconds=_since(begun), time=_now())

        return await self._settle(key, once, holds)

    # ---- one question ------------------------------------------------------------------------------------------------

    async def _settle(
        self, key: str, make: Callable[[], Awaitable[Entry]], holds: Callable[[Entry], bool] = lambda entry: True
    ) -> Entry:
        """The entry of `key`: known, or under way, or made now. Raises Rejected for one that was rejected."""
        entry = self.journal.entries.get(key)
        if entry is not None and key not in self._done:
            entry = None if (self._retry and not entry.done) or (entry.done and not holds(entry)) else entry
        if entry is not None:
            self.tally.known += key not in self._done
        elif key in self._running:
            entry = await asyncio.shield(self._running[key])
        else:
            running = self._running[key] = asyncio.get_running_loop().create_future()
            try:
                entry = await make()
                self.journal.add(entry)
                self._done.add(key)
                running.set_result(entry)
            except BaseException as error:
                running.set_exception(asyncio.CancelledError() if isinstance(error, asyncio.CancelledError) else error)
                running.exception()  # whether or not somebody waits for it, it has been seen
                raise
            finally:
                del self._running[key]
        if not entry.done:
            raise Rejected(entry.step, entry.reason or "", entry.note or "")
        return entry

    async def _attempts(self, key: str, item: str, question: Question, annotator: Annotator) -> Entry:
        head = Entry(
            key,
            question.prompt.step,
            item,
            REJECTED,
            prompt=question.prompt.id,
            model=annotator.name,
            endpoint=annotator.endpoint,
            seed=question.seed,
            temperature=question.prompt.temperature,
        )
        spent, fault, rejected, raw = _Spent(), None, ("", ""), None
        dice = random.Random(key)
        for attempt in range(1, self.limits.attempts + 1):
            spent.attempts = attempt
            answer = None
            try:
                answer = await self._once(question.again(attempt - 1, fault), annotator, spent)
                self._silent = 0
                value = question.prompt.read(answer.text)
                told = value.model_dump(mode="json", by_alias=True)
                return replace(head, status=DONE, value=told, time=_now(), **spent.told())
            except MalformedReply as error:
                more = " It was cut off: give answers more room (--extra-tokens)." if answer is not None and answer.cut else ""
                reason = getattr(error, "reason", "malformed")  # an UnfitReply has one of its own
                fault, rejected, raw = str(error), (reason, str(error)[:500] + more), answer.text[:MAX_RAW] if answer else None
                log.debug("%s of %s: attempt %d cannot be read: %s", question.prompt.id, item, attempt, error)
            except Refused as error:
                self._silent, raw = 0, None
                rejected = ("refused", str(error))
                break
            except NotTaken as error:
                rejected, raw = ("not-taken", str(error)), None
                self._count_silent(annotator, str(error))
                break
            except Passing as error:
                rejected, raw = ("no-answer", str(error)), None
                log.debug("%s of %s: attempt %d: %s", question.prompt.id, item, attempt, error)
                if attempt < self.limits.attempts:
                    await self._back_off(error, attempt, dice)
                else:
                    self._count_silent(annotator, str(error))
        reason, note = rejected
        return replace(head, reason=reason, note=note, raw=raw, time=_now(), **spent.told())

    async def _once(self, question: Question, annotator: Annotator, spent: _Spent) -> Answer:
        async with self._slots:
            await self._pace.slot()
            self.tally.asked += 1
            begun = time.monotonic()
            dropped = threading.Event()
            try:
                # The socket's own timeout ends with every byte that trickles in; this one does not.
                work = in_thread(lambda: annotator.answer(question, dropped))
                answer = await asyncio.wait_for(work, self.limits.timeout)
            except TimeoutError:
                raise Passing(f"no answer within {self.limits.timeout:g} s") from None
            finally:
                dropped.set()
                spent.seconds += _since(begun)
            spent.add(answer)
            self.tally.tokens_in += answer.tokens_in
            self.tally.tokens_out += answer.tokens_out
            return answer

    async def _back_off(self, fault: Passing, attempt: int, dice: random.Random) -> None:
        own = self.limits.pause * 2 ** (attempt - 1) * (1 + dice.random() / 4)
        seconds = min(own if fault.pause is None else max(fault.pause, 0.0), self.limits.longest_pause)
        if fault.everyone:
            self._pace.hold(seconds)
        await self._wait(seconds)

    def _count_silent(self, annotator: Annotator, found: str) -> None:
        self._silent += 1
        if self._silent >= MOST_IN_A_ROW:
            raise ReasonerError(
                f"{annotator.endpoint}: expected answers, found none to {self._silent} questions in a row, the last time "
                f"{found}. Look at the endpoint's log; then start again with --retry, which asks these questions once more."
            )


@dataclass(slots=True)
class _Spent:
    attempts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out

    def told(self) -> dict[str, Any]:
        return {
            "attempts": self.attempts,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "seconds": round(self.seconds, 3),
        }


# ---- keys ----------------------------------------------------------------------------------------------------------------


def key_of(step: str, version: str, model: str, inputs: Mapping[str, Any], pictures: Sequence[Shown]) -> str:
    """sha256, as hex, over what an answer depends on. Pictures count by their content, wherever they lie."""
    told = [step, version, model, dict(inputs), [picture.sha256 for picture in pictures]]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 3)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
