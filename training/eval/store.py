"""Records on the disk as they are made, so that a broken run goes on where it stopped.

One file of JSON lines per table: a head that says what was measured, then a record per run and item, in the order in which
they ended. What a killed process was writing is left out when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...reasonedit_core.errors import ConfigError
from .arms import Record

FORMAT = "reasonedit.miniature/1"


class Store:
    """The records of one table. head: what must be equal for records to be taken over (system, seed, weights, settings)."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self._head = {"format": FORMAT, **head}
        self.records: dict[tuple[str, str], Record] = {}
        """By run and key of the item."""
        if path.is_file():
            self._read()

    def has(self, run: str, key: str) -> bool:
        """Whether a record is there."""
        return (run, key) in self.records

    def add(self, run: str, record: Record) -> None:
        """Write a record. Raises ConfigError where that is not possible."""
        self.records[run, record["key"]] = record
        try:
            if not self.path.is_file():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._append(self._head)
            self._append({"run": run, **record})
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path}: {error.strerror or error}; choose a folder that can be written and has room"
            ) from error

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole, _, torn = text.rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()] if whole else []
        if not lines:
            self.path.unlink()
            return
        if torn:
            with open(self.path, "rb+") as file:
                file.truncate(len(text[: len(whole) + 1].encode("utf-8")))
        head, *records = lines
        different = [name for name, value in self._head.items() if head.get(name) != value]
        if different:
            name = different[0]
            raise ConfigError(
                f"{self.path}: expected records of {name} {self._head[name]!r}, found such of {head.get(name)!r}. Name another "
                "folder with --out, or remove this file."
            )
        for record in records:
            self.records[record.pop("run"), record["key"]] = record
