"""Many items at a time, requests spread over time, blocking calls in threads: what the runner is made of."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

_One = TypeVar("_One")
_Made = TypeVar("_Made")


class Rejected(Exception):
    """An item that becomes no record. step: where; reason: a code; note: in words."""

    def __init__(self, step: str, reason: str, note: str = "") -> None:
        super().__init__(f"{step}: {reason}" + (f" ({note})" if note else ""))
        self.step, self.reason, self.note = step, reason, note


class Pace:
    """Spreads requests over time. per_minute: requests begun in a minute, None for any number."""

    def __init__(self, per_minute: float | None, wait: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = self._held = 0.0
        self._wait = wait

    async def slot(self) -> None:
        """Wait for the next turn."""
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._gap
        while (left := max(turn, self._held) - time.monotonic()) > 0:
            await self._wait(left)

    def hold(self, seconds: float) -> None:
        """No turn before `seconds` have passed."""
        self._held = max(self._held, time.monotonic() + seconds)


async def for_all(
    items: Iterable[_One],
    label: Callable[[_One], Awaitable[_Made]],
    *,
    at_once: int,
    on_done: Callable[[int], None] | None = None,
) -> list[_Made | Rejected]:
    """What `label` makes of every item, in order; a Rejected in the place of one that it rejects.

    at_once: items in work at a time. The first other error stops all and is raised. on_done: told how many are finished.
    """
    found: dict[int, _Made | Rejected] = {}
    numbered = enumerate(items)

    async def work() -> None:
        for number, item in numbered:
            try:
                found[number] = await label(item)
            except Rejected as rejected:
                found[number] = rejected
            if on_done is not None:
                on_done(len(found))

    workers = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [found[number] for number in sorted(found)]


async def in_thread(work: Callable[[], _Made]) -> _Made:
    """`work` in a daemon thread: one that hangs in a socket does not keep the program alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Made] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(value)

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except BaseException as raised:  # raised again where it is awaited
            error = raised
        try:
            loop.call_soon_threadsafe(settle, value, error)
        except RuntimeError:  # the loop has ended; nobody waits
            pass

    threading.Thread(target=run, daemon=True, name="reasonedit-data").start()
    return await future
