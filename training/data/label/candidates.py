"""Which of several candidates is the picture before: what is measured of each, hard gates, then the mean of z-scores.

The ReasonBrain paper scores with an MLLM, colour aesthetics, PSNR / SSIM and LPIPS together, and finds that one measure alone
loses (its Table A7); how it joins them it does not say. Here every measure is standardised among the candidates of one target,
and a measure that is not at hand drops out for all of them, which the record says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....reasonedit_core.errors import ConfigError
from ...eval.benchmarks.pixels import read_picture, ssim
from ...eval.encoders import PairScorer, Scorer, TextEncoder
from .annotators import Shown

MEASURE = "measure@1"
"""Version of what is measured, in the place of a prompt's."""

HASH_SIDE = 8
"""A difference hash has this many rows and columns of bits."""

MEASURES = {
    "identity": ("identity",),
    "plausible_before": ("plausible_before",),
    "quality": ("quality",),
    "aesthetics": ("aesthetics",),
    "ssim": ("ssim",),
    "likeness": ("lpips",),
    "clip_gap": ("clip_source", "clip_target"),
}
"""What is standardised -> the numbers that it takes. likeness: 1 - LPIPS; clip_gap: CLIP with the source's caption less CLIP
with the target's. More is better in all of them."""

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Gates:
    """What no candidate may fail. lpips: least and most distance to the target (the published band); clip: least cosine with
    the source's caption; ssim: most likeness to the target; near: bits of 64 by which two candidates must differ; mark: least
    of each of the three marks, 0 for any."""

    lpips: tuple[float, float] = (0.20, 0.55)
    clip: float = 0.22
    ssim: float = 0.95
    near: int = 3
    mark: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.lpips
        if not 0 <= low < high:
            raise ConfigError(f"lpips: expected two rising numbers from 0, found {low:g} and {high:g}. Correct them.")
        for name, least, most in (("clip", -1, 1), ("ssim", -1, 1), ("near", 0, HASH_SIDE**2), ("mark", 0, 10)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected {least} to {most}, found {getattr(self, name)}. Correct it.")

    def fault(self, numbers: Numbers) -> str | None:
        """Code of the first gate that a candidate fails; a number that was not measured fails none."""
        if numbers.get("ssim", -1.0) > self.ssim:
            return "too-alike"
        if "lpips" in numbers and not self.lpips[0] <= numbers["lpips"] <= self.lpips[1]:
            return "outside-lpips"
        if "clip_source" in numbers and numbers["clip_source"] < self.clip:
            return "not-the-caption"
        return None

    def marked_down(self, numbers: Numbers) -> str | None:
        """As `fault`, of the judge's marks, which come later because they cost more."""
        return "low-mark" if min(numbers[name] for name in ("identity", "plausible_before", "quality")) < self.mark else None


@dataclass(frozen=True, slots=True)
class Measures:
    """What is measured beside SSIM, as far as it is at hand."""

    clip: TextEncoder | None = None
    lpips: PairScorer | None = None
    aesthetics: Scorer | None = None

    @property
    def name(self) -> str:
        """Tells one set from another, for keys and records."""
        named = [each for each in (self.clip, self.lpips, self.aesthetics) if each is not None]
        return " ".join(["ssim", *(f"{each.name}+{each.sha256[:8]}" for each in named)])

    def of(self, candidate: Path, target: Path, before: str, after: str) -> dict[str, Any]:
        """The numbers of a candidate, and its hash (`dhash`, hex). before, after: captions of source and target."""
        a, size = read_picture(target), Image.open(target).size
        found: dict[str, Any] = {"ssim": round(ssim(a, read_picture(candidate, size)), 6), "dhash": dhash(candidate)}
        if self.lpips is not None:
            found["lpips"] = round(self.lpips.distance(target, candidate), 6)
        if self.clip is not None:
            seen, words = self.clip.pictures([candidate])[0], self.clip.words([before, after])
            source, goal = (round(float(seen @ row), 6) for row in words)
            found |= {"clip_source": source, "clip_target": goal}
        if self.aesthetics is not None:
            found["aesthetics"] = self.aesthetics.score(candidate)
        return found


def dhash(path: Path) -> str:
    """Difference hash: 8 x 8 bits, whether the grey picture, scaled to 9 x 8, rises to the right. 16 hex digits."""
    with Image.open(path) as image:
        small = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()


def distance(a: str, b: str) -> int:
    """Bits in which two hashes differ."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def is_near(hash_: str, others: Sequence[str], least: int) -> bool:
    """It differs from one of them by fewer than `least` bits."""
    return any(distance(hash_, other) < least for other in others)


def standardised(rows: Sequence[Numbers]) -> tuple[list[float], tuple[str, ...]]:
    """(per candidate the mean of its z-scores, the measures that count).

    A measure counts where every candidate has it. z = (x - mean) / spread among the candidates, 0 where all are alike.
    """
    counted = tuple(name for name, needs in MEASURES.items() if all(need in row for row in rows for need in needs))
    if not rows or not counted:
        return [0.0] * len(rows), counted
    values = np.asarray([[_value(name, row) for name in counted] for row in rows])  # (N, M)
    spread = values.std(axis=0)
    centred = values - values.mean(axis=0)
    z = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 1e-9)
    return z.mean(axis=1).tolist(), counted


def _value(name: str, row: Numbers) -> float:
    if name == "likeness":
        return 1 - row["lpips"]
    return row["clip_source"] - row["clip_target"] if name == "clip_gap" else row[name]


def best(candidates: Sequence[Shown], scores: Sequence[float], number: int) -> list[int]:
    """Places of the `number` best; of equals the one whose content comes first by hash, so that no order decides."""

    def order(at: int) -> tuple[float, str]:
        # sha256 again: content hashes themselves are compared elsewhere, and no two orders should go together
        return -round(scores[at], 9), hashlib.sha256(candidates[at].sha256.encode()).hexdigest()

    return sorted(range(len(candidates)), key=order)[:number]
