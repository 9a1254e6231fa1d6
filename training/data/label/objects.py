"""Which things a caption speaks of: the annotator's list, and what spaCy finds where the user has it.

The paper takes spaCy's entities, whose labels miss plain things ("ice cube"); noun chunks do not. Records without the names of
their objects cost its model half of its score (Table A7), so both lists are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ....reasonedit_core.errors import ConfigError

if TYPE_CHECKING:
    from ....reasonedit_core.interfaces import ObjectExtractor

MOST = 16
"""Objects that the conditioner of ReasonBrain takes."""


class SpacyExtractor:
    """Noun chunks and entities by a spaCy pipeline, as an `ObjectExtractor`.

    nlp: its name or folder, or the loaded pipeline itself. Raises ConfigError where spaCy or the pipeline is absent, or has no
    parser to find noun chunks with.
    """

    def __init__(self, nlp: Any) -> None:
        if isinstance(nlp, str):
            try:
                import spacy

                nlp = spacy.load(nlp)
            except ImportError as error:
                raise ConfigError("--spacy: expected the package spacy, found none. pip install spacy.") from error
            except OSError as error:
                raise ConfigError(f"--spacy: expected a pipeline on this disk, found none ({error}). Name one.") from error
        self._nlp = nlp

    def extract(self, instruction: str, image: Any = None) -> list[str]:
        """In order of appearance, without articles and pronouns. The picture is not looked at."""
        document = self._nlp(instruction)
        try:
            spans = sorted([*document.noun_chunks, *document.ents], key=lambda span: (span.start, -span.end))
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"--spacy: expected a pipeline that finds noun chunks, found another ({error}).") from error
        names = [" ".join(token.text for token in span if token.pos_ not in ("DET", "PRON")) for span in spans]
        return list(dict.fromkeys(name.lower() for name in names if name.strip()))


def joined(named: Sequence[str], extractor: ObjectExtractor | None, caption: str) -> list[str]:
    """The annotator's names, then those of the extractor that none of them says already; MOST at most."""
    found = list(dict.fromkeys(name.strip() for name in named))
    for name in extractor.extract(caption) if extractor is not None else ():
        if not any(name.casefold() in each.casefold() or each.casefold() in name.casefold() for each in found):
            found.append(name)
    return found[:MOST]
