"""Guesses at what comes next, looked up in what was read and said: replies repeat the words of prompts and of themselves.

A guess costs room in a forward pass that is made anyhow. Whether it holds is decided by the model's own choice at its place
(`decode`), so it changes how many passes a reply takes and never what it says. (Prompt lookup decoding, by n-grams.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

GRAMS = (3, 2)
"""Lengths of the tails that are looked up, the longest first."""

WIDEST = 7
"""Tokens guessed at most; with the token that is due they make a pass of eight."""


class Lookup:
    """The tokens of one query so far, and where its n-grams went on when they last occurred.

    ids: of the prompt. never: tokens that are not guessed (pictures, control tokens).
    """

    def __init__(self, ids: Iterable[int], never: Collection[int]) -> None:
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self._never = never
        self._width = WIDEST // 2
        self.extend(ids)

    def extend(self, tokens: Iterable[int]) -> None:
        """Tokens that were fed. An n-gram is entered when what follows it is known, so that a tail never finds itself."""
        ids = self._ids
        for token in tokens:
            for n in GRAMS:
                if len(ids) >= n:
                    self._next[tuple(ids[-n:])] = len(ids)
            ids.append(token)

    def guess(self) -> list[int]:
        """What followed the last occurrence of the present tail; [] where it never occurred before."""
        ids = self._ids
        starts = (self._next.get(tuple(ids[-n:])) for n in GRAMS if len(ids) >= n)
        start = next((found for found in starts if found is not None), None)
        guessed: list[int] = []
        while start is not None and len(guessed) < self._width:
            at = start + len(guessed)
            # Behind the end the guess goes on with itself: a repetition goes on.
            token = ids[at] if at < len(ids) else guessed[at - len(ids)]
            if token in self._never:
                break
            guessed.append(token)
        return guessed

    def learn(self, guessed: int, held: int) -> None:
        """How many of the tokens guessed have held: the next guess is about twice as long as this one was good."""
        if guessed:
            self._width = min(WIDEST, 2 * held + 1)
