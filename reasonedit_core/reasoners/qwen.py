"""The speaker in process: a Qwen2.5-VL that is loaded here, usually the one that conditions the denoiser as well."""

from __future__ import annotations

from collections.abc import Sequence

from ..interfaces import Query
from ..mllm.decode import generate
from ..mllm.qwen25vl import QwenVL
from ..types import OnText, ShouldStop


class QwenSpeaker:
    """Answers queries with `mllm`. Pictures are shown as the released reasoner shows them.

    min_pixels, max_pixels: bounds of the picture's area. max_side: a longer side is shrunk to this first. snap: resize to
    multiples of 28 before the bounds are looked at, as the released client does (`vision.prepare`).
    """

    def __init__(
        self,
        mllm: QwenVL,
        *,
        min_pixels: int = 262144,
        max_pixels: int = 802816,
        max_side: int | None = 1024,
        snap: bool = True,
    ) -> None:
        mllm.require_lm_head()
        self.mllm = mllm
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.max_side, self.snap = max_side, snap

    def answer(
        self, queries: Sequence[Query], *, on_text: OnText | None = None, should_stop: ShouldStop | None = None
    ) -> list[str]:
        """Raw replies, one per query, in order. Raises ReasonerError and Interrupted."""
        return generate(
            self.mllm,
            queries,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            max_side=self.max_side,
            snap=self.snap,
            on_text=on_text,
            should_stop=should_stop,
        )
