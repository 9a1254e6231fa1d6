"""The side of a checkpoint that speaks and asks: tokenizer, dialogue pack, conditioner, geometry. No weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ...reasonedit_core.dialogue.answers import say_consistency
from ...reasonedit_core.errors import BackendUnavailable
from ...reasonedit_core.generator import Geometry
from ...reasonedit_core.reasoners.reasoner import PackReasoner
from ...reasonedit_core.reasoners.scripted import ScriptedSpeaker
from ...reasonedit_core.reasoners.verdict import DUAL_IMAGE, MULTI_ROUND, VerdictReasoner
from .transcripts import Shown

if TYPE_CHECKING:
    from ...reasonedit_core.dialogue.pack import Pack
    from ...reasonedit_core.mllm.qwen25vl import QwenVL

NO_MARKS = '{"score": [0, 0], "reasoning": "-"}'
"""What is answered in place of marks that a record does not hold, where a question is asked for the sake of others."""


@dataclass(frozen=True, eq=False)
class Voice:
    """The side of a checkpoint that speaks and asks, without its weights.

    mllm: tokenizer and config are used (its model may be on the meta device). pack: the dialogue pack. conditioner: makes
    documents (`conditioner.document`). geometry: sizes and resizes of the system. level: square root of the generated area.
    negative: the instruction that stands where text is left out, as guidance has it. shown: how the reasoner is shown
    pictures. paired: whether it sees the source beside the result, as released. reflection: the form that it reflects in, one
    of `verdict.FORMS`.
    """

    mllm: QwenVL
    pack: Pack
    conditioner: Any
    geometry: Geometry
    level: int
    negative: str = ""
    shown: Shown = Shown()
    paired: bool = False
    reflection: str = MULTI_ROUND

    def reasoner(self, replies: Mapping[str, Sequence[str]]) -> tuple[PackReasoner, ScriptedSpeaker]:
        """The reasoner of inference, answered by `replies`."""
        speaker = ScriptedSpeaker(replies)
        if self.reflection != MULTI_ROUND:
            return VerdictReasoner(self.pack, speaker, paired=self.reflection == DUAL_IMAGE, attempts=1), speaker
        return PackReasoner(self.pack, speaker, paired=self.paired, attempts=1), speaker

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over a few documents that every part has a say in: tokenizer, template, wording, sizes, positions."""
        rules = (self.level, self.geometry, self.negative, self.shown, self.paired, self.reflection)
        digest = hashlib.sha256(repr(rules).encode())
        grey = torch.full((1, 3, 64, 96), 0.5)
        said = {"think": ["Paint it."], "describe": ["It."], "score": [say_consistency(7.5, "Seen.")]}
        said |= {"edit_score": [NO_MARKS], "quality_score": [NO_MARKS], "reflect": ["<#Think> Seen. <#Success>"]}
        for words in ('Write "go" here.', "写“走”字。"):
            reasoner, speaker = self.reasoner(said)
            reasoner.think(grey, words)
            reasoner.describe(grey, words, original="Other words.")
            reasoner.reflect(grey, grey, words, "A picture.", original="Other words.")
            for query in speaker.asked:
                digest.update(repr((query.system, query.parts, query.form, query.max_new_tokens)).encode())
                text = self.mllm.render(query.system, query.parts, n_images=len(query.images))
                digest.update(repr(self.mllm.tokenize(text)).encode())
            document = self.conditioner.document(grey, words)
            digest.update(repr((document.ids.tolist(), document.positions.tolist(), document.kept, document.fillers)).encode())
            if document.place is not None:
                digest.update(repr((document.place.tolist(), document.quoted.tolist())).encode())
        try:
            digest.update(repr(self.conditioner.document(None, "A kite.").ids.tolist()).encode())
        except BackendUnavailable:  # without the wording of text to image there are no such documents either
            digest.update(b"no text to image")
        return digest.hexdigest()
