"""Draws that follow from a key alone: the same key gives the same draws on every machine, in every Python.

The world is generated from integers, and a held-out item must stay the same for years; the random module promises that for
few of its methods only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

_One = TypeVar("_One")


def digest(*key: object) -> int:
    """A 64-bit number that follows from the key."""
    text = "\x1f".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Dice:
    """A stream of draws. Two streams of different keys have nothing to do with each other."""

    def __init__(self, *key: object) -> None:
        self._seed = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
        self._count = 0

    def below(self, number: int) -> int:
        """0 .. number - 1, each as likely as the next."""
        self._count += 1
        drawn = hashlib.blake2b(self._count.to_bytes(8, "big"), key=self._seed, digest_size=8).digest()
        return int.from_bytes(drawn, "big") * number >> 64

    def chance(self, share: float) -> bool:
        """True in this share of the draws."""
        return self.below(1 << 30) < share * (1 << 30)

    def pick(self, choices: Sequence[_One]) -> _One:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def sample(self, choices: Iterable[_One], number: int) -> list[_One]:
        """`number` of the choices in a drawn order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(number)]

    def shuffle(self, choices: Iterable[_One]) -> list[_One]:
        """The choices in a drawn order."""
        left = list(choices)
        return self.sample(left, len(left))
