"""Books: the named sets of records that the miniatures are trained on, one for each stage, and what each is mixed of.

    words      questions about pictures, and clear instructions read: what a pretrained MLLM would bring along. No thinking from
               abstract to concrete, no target descriptions, no verdicts: those are learnt in stage 1.
    edits      clear edits, and some pictures from captions: what a pretrained editor would bring along
    pairs      Thinking Pairs, each an editing pair too
    triples    Reflection Triples, success : reflection : failed = 3 : 1 : 1
    drawings   pictures from captions
    looks      where things are, which one an instruction means and what it says: short questions, for the base MLLM
    meanings   what an abstract instruction means for a picture, asked in a short question: for stage 1, beside the pairs
    copies     clear instructions said again word for word: what a thinker does with them
    suppositions  hypothetical instructions of Reason50K's four categories in turn, in English, for mini-brain

All are drawn from the training split of the world. Their own validation part (`split = held_out` in the record) is of that
split as well, from seeds beyond those of the training part: the world's held-out split is kept for the tables alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_json, write_whole
from ...reasonedit_core.mini import words
from ...reasonedit_core.mini.dice import Dice
from ...reasonedit_core.mini.items import CATEGORIES, ENGLISH_SHARE, Item, item, scene
from ...reasonedit_core.mini.texts import caption
from ...reasonedit_core.mini.world import SIZE
from ..data.records import FILE_NAME
from .readings import read_cells, read_copies, read_instructions, read_meaning, read_meant, read_places, read_scene, read_text
from .writers import (
    Entry,
    PictureStore,
    edit_record,
    faulty,
    hypothetical_record,
    reflect_picture_record,
    reflect_record,
    spoiled,
    t2i_record,
    think_record,
    understand_record,
)

log = logging.getLogger(__name__)

BOOK_FILE = "book.json"
"""Beside a finished book: what it was made with, so that it is not made again."""

VERSION = 2
"""Raised when the records of the same arguments change, so that an older book is written anew."""

VALIDATION = 1 << 40
"""Where the numbers of the validation part begin."""

_DOMAIN = 48
"""Bits of a number and its tries: the seeds of two books, or of one book under two seeds, never meet."""

_BATCH = 500
_TRIES = 32
_SHA = re.compile('"sha256":"([0-9a-f]{64})"')


@dataclass(frozen=True, slots=True)
class Draw:
    """What the record of a number is drawn with. name: the record's id; seed: of its item; dice: for all that is its own."""

    name: str
    seed: int
    dice: Dice
    store: PictureStore

    @property
    def language(self) -> str:
        """Drawn as items draw theirs."""
        return "en" if self.dice.chance(ENGLISH_SHARE) else "zh"


def write_book(
    name: str,
    folder: Path,
    count: int,
    seed: int = 0,
    *,
    held_out: int = 200,
    size: int = SIZE,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `count` records of the book `name`, and `held_out` for validation, into `folder`; return the record file.

    A folder that holds the finished book of the same arguments is left as it is. workers: processes; the records do not
    depend on them. on_progress: (records written, records in all). ConfigError for an unknown book or numbers out of range.
    """
    if name not in BOOKS:
        raise ConfigError(f"expected a book out of {', '.join(BOOKS)}, found {name!r}. Choose one of them.")
    if not 0 <= count < VALIDATION or not 0 <= held_out < VALIDATION or count + held_out < 1:
        raise ConfigError(f"{name}: expected at least one record and fewer than 2^40, found {count} and {held_out}.")
    if seed < 0:
        raise ConfigError(f"{name}: expected a seed of 0 or more, found {seed}. Choose another.")
    folder = Path(folder)
    made = {"book": name, "count": count, "seed": seed, "held_out": held_out, "size": size, "version": VERSION}
    if (folder / FILE_NAME).is_file() and _stated(folder / BOOK_FILE) == made:
        return folder / FILE_NAME
    parts = [_Part(name, str(folder), seed, size, start, min(start + _BATCH, count)) for start in range(0, count, _BATCH)]
    lines: list[str] = []
    for written in _run(parts, workers):
        lines += written
        if on_progress is not None:
            on_progress(len(lines), count + held_out)
    trained = frozenset(sha for line in lines for sha in _SHA.findall(line))
    numbers = range(VALIDATION, VALIDATION + held_out)
    lines += map(_line, draw_records(name, folder, numbers, seed, size=size, avoid=trained))
    if hasattr(os, "sync"):
        os.sync()  # once for all pictures, before a record names them
    path = write_whole(folder / FILE_NAME, ("\n".join(lines) + "\n").encode())
    write_json(folder / BOOK_FILE, made)
    log.info("%s: %d records, %d of them for validation", path, len(lines), held_out)
    return path


def draw_records(
    name: str,
    folder: Path,
    numbers: Sequence[int],
    seed: int = 0,
    *,
    size: int = SIZE,
    avoid: Collection[str] = (),
) -> Iterator[Entry]:
    """The records of these numbers, their pictures written below `folder`. From `VALIDATION` on they are for validation.

    avoid: sha256 of pictures that none of them may have. A scene of few objects comes twice now and then.
    """
    store = PictureStore(folder, size)
    for number in numbers:
        base = (tuple(BOOKS).index(name) << (_DOMAIN + 8)) + (seed << (_DOMAIN + 16)) + (number << 5)
        kept = number >= VALIDATION
        for attempt in range(_TRIES):  # an item may not allow what its number is to show; the next one will
            called = f"{name}-{seed}-h{number - VALIDATION:06d}" if kept else f"{name}-{seed}-{number:06d}"
            dice = Dice("book", name, seed, number, attempt)
            record = BOOKS[name](number, Draw(called, base + attempt, dice, store))
            if record is not None and not any(each["sha256"] in avoid for each in record.get("images", {}).values()):
                break
        else:
            raise ConfigError(f"{name}: found no record of number {number}, seed {seed}. Choose another seed.")
        yield {**record, "split": "held_out"} if kept else record


# ---- the books -----------------------------------------------------------------------------------------------------------

_EDITS = {"move": 4, "recolour": 4, "replace": 4, "add": 2, "remove": 2, "resize": 2, "state": 3, "background": 1, "label": 1}
"""How often each kind is drawn: what a small editor finds hard, more often."""

_COMPOUND = 0.2
_CANONICAL = 0.15
"""Share of clear edits told in canonical words, as thoughts tell them."""

_BY_CONTENT = 0.6
"""Share of instructions that name their object by its place which are drawn again: to find an object is harder than a place."""

_KNOWLEDGE = ("factual", "conceptual", "procedural")


def _words(number: int, draw: Draw) -> Entry | None:
    """Of 20 records nine about a scene, five of them place by place, nine with instructions, two read from text alone."""
    language, which = draw.language, number % 20
    shown = scene(draw.seed, "train") if which < 11 else clear_item(draw, language).source
    if which < 9:
        read = read_cells if which < 5 else read_scene
        return understand_record(shown, draw.store, draw.name, read(shown, language, draw.dice))
    if which < 11:
        return understand_record(None, draw.store, draw.name, read_text(shown, language, draw.dice))
    turns = read_instructions(shown, language, draw.dice)
    return understand_record(shown, draw.store, draw.name, turns) if turns else None


def _edits(number: int, draw: Draw) -> Entry | None:
    if number % 8 == 7:
        return _drawings(number, draw)
    one = clear_item(draw, draw.language)
    return edit_record(one, draw.store, draw.name, instruction=one.canonical if draw.dice.chance(_CANONICAL) else None)


def _pairs(number: int, draw: Draw) -> Entry | None:
    if number % 3 == 2:
        return think_record(clear_item(draw, draw.language), draw.store, draw.name)
    kind = _KNOWLEDGE[(number - number // 3) % 3]
    return think_record(item(draw.seed, kind, "train", draw.language), draw.store, draw.name)


def _triples(number: int, draw: Draw) -> Entry | None:
    verdict, language, dice = _VERDICTS[number % len(_VERDICTS)], draw.language, draw.dice
    abstract = dice.chance(0.5)
    one = item(draw.seed, dice.pick(_KNOWLEDGE), "train", language) if abstract else clear_item(draw, language)
    think = not dice.chance(0.25)
    if verdict == "failed" and dice.chance(_SPOILED):
        shown = one.target if dice.chance(0.7) else one.source
        pixels = spoiled(shown, dice.below(1 << 30), draw.store.size)
        record = reflect_picture_record(one, draw.store, draw.name, pixels, think=think)
        return record if record["reflect"]["verdict"] == verdict else None
    fault = faulty(one, dice.below(1 << 30), verdict)
    return None if fault is None else reflect_record(one, draw.store, draw.name, fault, think=think)


def _drawings(number: int, draw: Draw) -> Entry | None:
    shown = scene(draw.seed, "train")
    return t2i_record(shown, draw.store, draw.name, caption(shown, draw.language, draw.dice))


def _looks(number: int, draw: Draw) -> Entry | None:
    language, dice = draw.language, draw.dice
    if number % 2:
        shown = clear_item(draw, language).source
        turns = (read_meant if number % 4 == 1 else read_instructions)(shown, language, dice)
    else:
        shown = scene(draw.seed, "train", least=2)
        turns = read_places(shown, language, dice)
    return understand_record(shown, draw.store, draw.name, turns) if turns else None


def _meanings(number: int, draw: Draw) -> Entry | None:
    one = item(draw.seed, _KNOWLEDGE[number % len(_KNOWLEDGE)], "train", draw.language)
    return understand_record(one.source, draw.store, draw.name, [read_meaning(one, draw.dice)])


def _copies(number: int, draw: Draw) -> Entry | None:
    one = clear_item(draw, draw.language)
    return understand_record(one.source, draw.store, draw.name, read_copies(one, draw.dice))


def _suppositions(number: int, draw: Draw) -> Entry | None:
    one = item(draw.seed, CATEGORIES[number % len(CATEGORIES)], "train", "en")
    return hypothetical_record(one, draw.store, draw.name)


_VERDICTS = ("success", "reflection", "success", "failed", "success")
_SPOILED = 1 / 3

BOOKS: dict[str, Callable[[int, Draw], Entry | None]] = {
    "words": _words,
    "edits": _edits,
    "pairs": _pairs,
    "triples": _triples,
    "drawings": _drawings,
    "suppositions": _suppositions,
    "looks": _looks,
    "meanings": _meanings,
    "copies": _copies,
}
"""Book -> the record of a number, or None where what was drawn does not allow it."""


def clear_item(draw: Draw, language: str) -> Item:
    """A clear item of the training split, the hard kinds of edit and references by content more often."""
    dice = draw.dice
    kind = "compound" if dice.chance(_COMPOUND) else dice.pick([kind for kind, often in _EDITS.items() for _ in range(often)])
    found = item(draw.seed, kind, "train", language)
    if _by_place(found) and dice.chance(_BY_CONTENT):
        found = item(draw.seed + (1 << (_DOMAIN + 4)), kind, "train", language)
    return found


def _by_place(found: Item) -> bool:
    """An object of the instruction may be named by its place."""
    places = words.tables(found.language).PLACES
    cells = [edit.cell for edit in found.edits if hasattr(edit, "cell") and found.source.at(edit.cell)]
    return any(place in found.instruction for cell in cells for place in places[cell])


# ---- the run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of numbers, for one process."""

    name: str
    folder: str
    seed: int
    size: int
    start: int
    stop: int


def _run(parts: Sequence[_Part], workers: int) -> Iterator[list[str]]:
    if workers <= 1:
        yield from map(_lines, parts)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_lines, parts)


def _lines(part: _Part) -> list[str]:
    told = asdict(part)
    numbers = range(told.pop("start"), told.pop("stop"))
    records = draw_records(part.name, Path(part.folder), numbers, part.seed, size=part.size)
    return [_line(record) for record in records]


def _line(record: Entry) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def _stated(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
