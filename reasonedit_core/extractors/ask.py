"""Objects that an MLLM names, asked with the picture before it."""

from __future__ import annotations

import torch

from ..dialogue.objects import ask_objects, parse_objects
from ..interfaces import Query, Speaker

REPLY_TOKENS = 128


class AskingExtractor:
    """An `ObjectExtractor` that asks a speaker, greedily. Raises MalformedReply for a reply without a list of names."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker

    def extract(self, instruction: str, image: torch.Tensor | None = None) -> list[str]:
        """image (1, 3, H, W) in 0..1, or None to ask about the words alone."""
        images = () if image is None else (image,)
        parts = (*range(len(images)), ask_objects(instruction))
        (reply,) = self.speaker.answer([Query("objects", "", parts, images, max_new_tokens=REPLY_TOKENS)])
        return parse_objects(reply)
