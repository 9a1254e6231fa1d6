"""Objects by a grammar: the noun chunks of spaCy, which is optional, and the extractors one after another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..dialogue.objects import tidy
from ..errors import BackendUnavailable, CheckpointError, ReasonerError
from ..interfaces import ObjectExtractor

log = logging.getLogger(__name__)


class SpacyExtractor:
    """An `ObjectExtractor` of noun chunks and named entities. pipeline: a loaded spaCy pipeline with a parser."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def extract(self, instruction: str, image: torch.Tensor | None = None) -> list[str]:
        """Chunks without determiners and pronouns, then entities that are in none of them, in order of appearance."""
        document = self.pipeline(instruction)
        chunks = [[t for t in chunk if t.pos_ not in ("DET", "PRON", "PUNCT")] for chunk in document.noun_chunks]
        found = {words[0].idx: " ".join(t.text for t in words) for words in chunks if words}
        for entity in document.ents:
            if not any(entity.text in name for name in found.values()):
                found.setdefault(entity.start_char, entity.text)
        return tidy([found[place] for place in sorted(found)])


def load_spacy(path: str | Path) -> SpacyExtractor:
    """The extractor of a spaCy model folder. Raises BackendUnavailable without spaCy, CheckpointError for the folder."""
    try:
        import spacy
    except ImportError as error:
        raise BackendUnavailable(
            "extractor spacy: expected spaCy, found it not installed. Install it (pip install spacy), or take the extractor "
            "rules, which needs nothing."
        ) from error
    if not Path(path).is_dir():
        raise CheckpointError(f"extractor spacy: expected a model folder at {path}, found none. Name one with a parser.")
    try:
        return SpacyExtractor(spacy.load(str(path)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a spaCy model, found one that does not load ({error}).") from error


class FirstOf:
    """An `ObjectExtractor` that asks several in turn, until one finds something."""

    def __init__(self, extractors: Sequence[ObjectExtractor]) -> None:
        self.extractors = tuple(extractors)

    def extract(self, instruction: str, image: torch.Tensor | None = None) -> list[str]:
        """The first list that is not empty. A reasoner that cannot answer is told of and passed over."""
        for extractor in self.extractors:
            try:
                found = extractor.extract(instruction, image)
            except ReasonerError as error:
                log.warning("objects: %s", error)
                continue
            if found:
                return found
        return []
