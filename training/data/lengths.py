"""Lengths of documents, kept between runs: measuring takes a few milliseconds a document, which adds up over a large set.

One JSON file per voice. A key is a hash of what a length follows from, so nothing stale is read, and the file may be deleted.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_whole

log = logging.getLogger(__name__)

Length = tuple[int, int]
"""Tokens in the text stream and in the image stream."""


class Lengths:
    """What was measured with one voice. root: folder of the files; fingerprint: that of the voice."""

    def __init__(self, root: str | Path, fingerprint: str) -> None:
        self.path = Path(root) / f"{fingerprint[:32]}.json"
        self._known: dict[str, Length] = {}
        self._new = False
        if self.path.is_file():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                self._known = {str(key): (int(text), int(image)) for key, (text, image) in found.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                log.warning("%s cannot be read (%s); documents are measured again", self.path, error)

    def get(self, key: str) -> Length | None:
        """A length measured before."""
        return self._known.get(key)

    def put(self, key: str, length: Length) -> None:
        """Note a length."""
        self._known[key] = length
        self._new = True

    def save(self) -> None:
        """Write what is new. A place that cannot be written is no fault of the data: it is logged, and measuring repeats."""
        if not self._new:
            return
        try:
            write_whole(self.path, json.dumps(self._known, separators=(",", ":")).encode())
            self._new = False
        except ConfigError as error:
            log.warning("lengths of documents are not kept: %s", error)
