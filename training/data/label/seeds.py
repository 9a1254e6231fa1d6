"""Where a pipeline begins: pictures with instructions, as any file of records holds them (see `reasonedit-train convert`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ....reasonedit_core.errors import DataError
from ..pictures import PictureFault
from ..records import Record, guess_language, read_records
from .annotators import Shown, shown
from .pace import Rejected


@dataclass(frozen=True, slots=True)
class Seed:
    """A record to begin with, and what of it is used. raw: the user's words; goal: what an editor is told."""

    record: Record
    raw: str
    goal: str

    @property
    def id(self) -> str:
        """The record's."""
        return self.record.id

    @property
    def lang(self) -> str:
        """The language of the user's words."""
        return self.record.instruction.lang if self.record.instruction else guess_language(self.raw)

    def picture(self, name: str) -> Shown:
        """The picture `name` (input, target). Rejected where the file is none."""
        try:
            return shown(self.record.picture(name))
        except PictureFault as fault:
            raise Rejected("seed", fault.code, f"images.{name}: {fault.found}") from None


def read_seeds(path: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Seed]:
    """The records of `path` that have an input picture and an instruction, in file order, `limit` at most.

    DataError for faulty records, and where none can be used.
    """
    seeds = [seed for record in read_records(path) if (seed := _seed(record)) is not None]
    if not seeds:
        raise DataError(
            f"{path}: expected records with images.input and instruction.raw, found none. Data in another layout first goes "
            "through `reasonedit-train convert`."
        )
    return seeds[:limit]


def _seed(record: Record) -> Seed | None:
    goal = record.editor_instruction
    if record.images.input is None or goal is None:
        return None
    return Seed(record, record.instruction.raw if record.instruction else goal, goal)
