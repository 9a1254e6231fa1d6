"""Every random decision about training data, drawn from counters: H(run seed, epoch, record, purpose).

Nothing is remembered between draws and nobody else's draws are disturbed, so data workers, the number of ranks, validation,
sampling and resuming cannot change what a record is trained with. `record` is the id of the record, with `#n` behind it when
it comes for the n-th further time in one epoch (`occurrence`), so that repeats are not the same sample again.

Bits: single numbers and decisions have 53 of their own. A torch generator of the CPU is seeded with 32, so among many millions
of records a few share their noise, which does no harm.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from ..reasonedit_core.errors import ConfigError

if TYPE_CHECKING:
    from ..reasonedit_core.interfaces import Codec
    from ..reasonedit_core.latents import Moments
    from .timesteps import Timesteps

NOISE, SIGMA, TEXT, REFERENCE, POSTERIOR, ORDER = "noise", "sigma", "text", "reference", "posterior", "order"
"""Purposes that the data rooms draw for."""

_SPAN = 1 << 53


def digest(*words: str | int) -> bytes:
    """32 bytes that follow from the words and from nothing else. Different lists of words never run together."""
    hasher = hashlib.sha256()
    for word in words:
        data = str(word).encode("utf-8", "surrogatepass")
        hasher.update(len(data).to_bytes(8, "big"))
        hasher.update(data)
    return hasher.digest()


def occurrence(record: str, number: int) -> str:
    """The name under which a record draws when it comes for the `number`-th further time in an epoch (0: the first)."""
    return f"{record}#{number}" if number else record


def generator(seed: int, epoch: int, record: str, purpose: str) -> torch.Generator:
    """A CPU generator for the draws of one record in one epoch for one purpose."""
    return torch.Generator().manual_seed(int.from_bytes(digest(seed, epoch, record, purpose)[:4], "big"))


def uniform(seed: int, epoch: int, record: str, purpose: str) -> float:
    """One number strictly between 0 and 1."""
    return ((int.from_bytes(digest(seed, epoch, record, purpose)[:8], "big") >> 11) + 0.5) / _SPAN


def normal(shape: tuple[int, ...], seed: int, epoch: int, record: str, purpose: str = NOISE) -> torch.Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(shape, generator=generator(seed, epoch, record, purpose), dtype=torch.float32)


def sigma(timesteps: Timesteps, n_tokens: int, seed: int, epoch: int, record: str) -> float:
    """The sigma of a target of `n_tokens` tokens."""
    return timesteps.sigma(uniform(seed, epoch, record, SIGMA), n_tokens)


def dropped(share: float, seed: int, epoch: int, record: str, purpose: str) -> bool:
    """Whether a condition is left out: true for `share` of all draws. purpose: TEXT or REFERENCE."""
    if not 0 <= share <= 1:
        raise ConfigError(f"dropout.{purpose}: expected a share from 0 to 1, found {share}. Correct the recipe.")
    return uniform(seed, epoch, record, purpose) < share


def posterior(codec: Codec, moments: Moments, seed: int, epoch: int, record: str, picture: str) -> torch.Tensor:
    """Normalised latents (1, C, h, w) of the picture called `picture` in its record, drawn anew every epoch where the system
    samples its VAE's posterior. Read as the codec reads them at inference."""
    return codec.sample(moments, generator(seed, epoch, record, f"{POSTERIOR}:{picture}"))
