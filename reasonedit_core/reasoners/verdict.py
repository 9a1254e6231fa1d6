"""Reflection in one turn, without description and score: the two forms that the paper compares its own with (Table 4)."""

from __future__ import annotations

from typing import Any

import torch

from ..dialogue.pack import Pack
from ..interfaces import Speaker
from ..types import Reflection, Scores
from .reasoner import PackReasoner

MULTI_ROUND, SINGLE_IMAGE, DUAL_IMAGE = FORMS = ("multi-round", "single-image", "dual-image")
"""How a reasoner reflects: describe, score, decide, each on one picture; decide at once on the result; decide at once on
source and result side by side."""


class VerdictReasoner(PackReasoner):
    """A reasoner that reflects by its verdict alone: no target description is written and no score asked for.

    paired: it is shown the source beside the result (dual-image), else the result alone (single-image). What it is asked is
    the pack's; the loop scores its rounds by the verdicts (`loop.score`).
    """

    def __init__(self, pack: Pack, speaker: Speaker, *, paired: bool, **options: Any) -> None:
        super().__init__(pack, speaker, paired=paired, **options)

    def describe(self, image: torch.Tensor, goal: str, *, original: str | None = None) -> str:
        """Nothing: this form has no description."""
        return ""

    def reflect(
        self,
        source: torch.Tensor,
        edited: torch.Tensor,
        goal: str,
        target: str,
        *,
        original: str | None = None,
        scores: bool = True,
    ) -> Reflection:
        """Decide at once; scores: of no effect, there are none."""
        other = original if original and original.strip() != goal.strip() else None
        values = {"instruction": goal, "original": other, "target": target, "score": "", "reason": ""}
        images = {"source": source, "result": edited}
        (verdict,) = self._ask([self._question(self._forms["reflect"], images, values)])
        decision, why, second = verdict.value
        return Reflection(decision, why, second, Scores(), verdict.raw)
