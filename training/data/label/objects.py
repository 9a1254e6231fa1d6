"""Which things a caption speaks of: the annotator's list, and what an extractor finds beside it.

The paper takes spaCy's entities, whose labels miss plain things ("ice cube"); noun chunks do not. Records without the names of
their objects cost its model half of its score (Table A7), so both lists are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....reasonedit_core.dialogue.objects import LIMIT

if TYPE_CHECKING:
    from ....reasonedit_core.interfaces import ObjectExtractor


def joined(named: Sequence[str], extractor: ObjectExtractor | None, caption: str) -> list[str]:
    """The annotator's names, then those of the extractor that none of them says already; as many as the conditioner takes."""
    found = list(dict.fromkeys(name.strip() for name in named))
    for name in extractor.extract(caption) if extractor is not None else ():
        if not any(name.casefold() in each.casefold() or each.casefold() in name.casefold() for each in found):
            found.append(name)
    return found[:LIMIT]
