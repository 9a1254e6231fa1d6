"""What is planned and what a plan is: documents with their lengths, budgets, costs, and the packs of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...reasonedit_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Item:
    """A document to plan: one task of a record, with its tokens in both streams (0 where it has none).

    id: unique in the run. record: whose document it is. kind: the record's kind, which the mixture counts by. loss: ntp or fm.
    text: tokens in the MLLM stream. image: tokens in the DiT stream, its text tokens counted.
    """

    id: str
    record: str
    kind: str
    loss: str
    text: int = 0
    image: int = 0


@dataclass(frozen=True, slots=True)
class Budgets:
    """Most tokens of a pack, by stream."""

    text: int = 8192
    image: int = 8832

    def __post_init__(self) -> None:
        for name in ("text", "image"):
            if getattr(self, name) < 1:
                raise ConfigError(f"packs.{name}: expected at least 1 token, found {getattr(self, name)}. Correct the recipe.")


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of a document of n tokens: linear * n + square * n^2."""

    linear: float
    square: float

    def __call__(self, n: int) -> float:
        return self.linear * n + self.square * n * n


TEXT_COST = Cost(13.06e9, 2.0e5)
"""Forward FLOPs of Qwen2.5-VL-7B: 2 per weight of its language model, and causal attention in 28 layers of width 3584."""

IMAGE_COST = Cost(12.9e9, 7.0e5)
"""Forward FLOPs of the Step1X-Edit DiT: 19 double and 38 single blocks of width 3072. Qwen-Image's ratio is alike."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A document that is in no pack, and why."""

    id: str
    why: str

    def __str__(self) -> str:
        return f"{self.id!r}: {self.why}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The packs of one epoch. Pack p of step s, rank r, micro-step m: p = (s * world + r) * accumulation + m.

    order (n,) int64: indices into the planned items, pack after pack. numbers (n,) int32: the how manieth time the item comes
    in this epoch, from 0. starts (P + 1,) int64: where each pack begins. cost (P,) float64. tokens (P, 2) int64: text, image.
    counts: documents by kind. refused: documents that no pack can hold. unused: documents by kind that the mixture leaves
    out. left_out: repeats that had no room. hash: of what is in which pack.
    """

    world: int
    accumulation: int
    budgets: Budgets
    order: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray
    cost: np.ndarray
    tokens: np.ndarray
    counts: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[Refused, ...] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    left_out: int = 0
    hash: str = ""

    @property
    def n_packs(self) -> int:
        """P, over all ranks."""
        return len(self.starts) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.n_packs // (self.world * self.accumulation)

    def pack(self, number: int) -> tuple[tuple[int, int], ...]:
        """(index of the item, how manieth time) of each document of pack `number`."""
        span = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return tuple(zip(self.order[span].tolist(), self.numbers[span].tolist(), strict=True))

    def packs(self, step: int, rank: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The packs of one rank in one optimizer step, in the order of its micro-steps."""
        if not (0 <= step < self.steps and 0 <= rank < self.world):
            raise ConfigError(
                f"expected a step below {self.steps} and a rank below {self.world}, found step {step} and rank {rank}. "
                "The plan belongs to another world size, or the cursor to another plan."
            )
        first = (step * self.world + rank) * self.accumulation
        return tuple(self.pack(first + micro) for micro in range(self.accumulation))

    @property
    def fill(self) -> dict[str, float]:
        """Tokens over budget, by stream; streams without a token are left out."""
        room = (self.budgets.text, self.budgets.image)
        used = self.tokens.sum(0) if self.n_packs else (0, 0)
        return {
            name: float(total) / (self.n_packs * most)
            for name, total, most in zip(("text", "image"), used, room, strict=True)
            if total
        }

    @property
    def spread(self) -> tuple[float, float]:
        """Cost of the busiest rank over the mean of the ranks: (mean over the steps, worst step). 1 is even."""
        ranks = self.cost.reshape(self.steps, self.world, self.accumulation).sum(2)
        ratio = ranks.max(1) / ranks.mean(1)
        return float(ratio.mean()), float(ratio.max())

    def table(self) -> str:
        """The plan in a few lines for people."""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.counts.items()))
        lines = [
            f"packs      {self.n_packs:,} = {self.steps:,} optimizer steps x {self.world} ranks x {self.accumulation}",
            f"documents  {len(self.order):,} ({kinds})",
        ]
        for name, column in (("text", 0), ("image", 1)):
            if name in self.fill:
                used, most = int(self.tokens[:, column].sum()), self.n_packs * getattr(self.budgets, name)
                lines.append(f"{name:<10} {used:,} of {most:,} tokens, fill {self.fill[name]:.4f}")
        mean, worst = self.spread
        lines.append(f"cost       busiest rank over mean rank: {mean:.4f} on average, {worst:.4f} at worst")
        if self.left_out:
            lines.append(f"left out   {self.left_out:,} repeats for which this epoch had no room")
        if self.unused:
            lines.append("unused     " + ", ".join(f"{kind} {n:,}" for kind, n in sorted(self.unused.items())) + " (mixture)")
        lines.append(f"refused    {len(self.refused):,}")
        lines += [f"           {each}" for each in self.refused[:10]]
        if len(self.refused) > 10:
            lines.append(f"           ... and {len(self.refused) - 10:,} more")
        return "\n".join(lines)


def item_cost(item: Item) -> float:
    """What an item costs in both streams, in forward FLOPs at full size."""
    return TEXT_COST(item.text) + IMAGE_COST(item.image)
