"""Look through a whole data set before a run: every line, every picture, every pair. Nothing stops at the first problem."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .alignment import align
from .pictures import PictureFault, Probe, absent, exists, probe
from .problems import SEVERITIES, Place, Problem, Severity
from .records import PictureFile, Record, lines_of, record_files
from .rules import parse_record, picture_paths

ASPECT_TOLERANCE = 0.01
"""A pair whose shapes differ by more is refused: at 1024 pixels the picture would be squeezed by ten."""

DRIFT_TOLERANCE = 0.003
"""Part of the long side by which the unchanged parts of a pair may be displaced: three pixels at 1024."""

_LEAST_DRIFT = 1.0  # pixels; less cannot be told from rounding
_BATCH = 256  # records in work at a time, so that a set of millions needs no more memory than a small one
_ASPECTS = {"1:1": 1, "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2, "21:9": 21 / 9}


@dataclass(slots=True)
class Summary:
    """What a data set consists of. sizes, aspects: of what is generated or seen (target, else generated, else input)."""

    records: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    scenarios: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    aspects: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    pairs: int = 0

    def add(self, record: Record) -> None:
        """Count a sound record."""
        self.records += 1
        self.kinds[record.kind] += 1
        self.splits[record.split] += 1
        self.languages[record.lang] += 1
        if record.instruction and record.instruction.clarity:
            self.classes[record.instruction.clarity] += 1
        if record.reflect:
            self.verdicts[record.reflect.verdict] += 1
        if record.reason50k:
            self.scenarios[record.reason50k.scenario] += 1

    def add_size(self, size: tuple[int, int]) -> None:
        """Count the picture that a record is about."""
        self.sizes[size] += 1
        self.aspects[aspect_name(*size)] += 1

    def lines(self) -> list[str]:
        """The summary as text, one table after the other; empty tables are left out."""
        out = [f"{self.records} records, {self.pictures} pictures and {self.pairs} pairs looked at"]
        for name in ("kinds", "splits", "languages", "classes", "verdicts", "scenarios", "aspects"):
            table: Counter[str] = getattr(self, name)
            if table:
                out.append(f"{name}: " + ", ".join(f"{key} {count}" for key, count in table.most_common()))
        if self.sizes:
            shown = [f"{width}x{height} {count}" for (width, height), count in self.sizes.most_common(12)]
            more = len(self.sizes) - len(shown)
            out.append("sizes: " + ", ".join(shown) + (f" and {more} more" if more else ""))
        return out


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Every problem, in file order, and the summary of the sound records."""

    problems: tuple[Problem, ...]
    summary: Summary

    def of(self, severity: Severity) -> tuple[Problem, ...]:
        """The problems of one severity."""
        return tuple(problem for problem in self.problems if problem.severity == severity)

    @property
    def ok(self) -> bool:
        """There is no error; warnings do not keep a run from starting."""
        return not self.of("error")

    def lines(self) -> list[str]:
        """All errors and warnings, notes counted by code, then the summary: what `reasonedit-train check` prints."""
        out = [f"{problem.severity}: {problem}" for problem in self.problems if problem.severity != "note"]
        notes = Counter(problem.code for problem in self.of("note"))
        out += [f"note: {count} pictures: {_NOTES[code]} [{code}]" for code, count in notes.items()]
        out += self.summary.lines()
        counts = ", ".join(f"{len(self.of(severity))} {severity}s" for severity in SEVERITIES)
        return [*out, counts]


_NOTES = {
    "exif-turned": "turned upright by their EXIF tag",
    "transparency": "transparent parts are laid on white",
    "several-frames": "only the first frame is taken",
}


def check_records(
    path: str | Path | Sequence[str | Path],
    *,
    pictures: bool = True,
    geometry: bool = True,
    allow_resize: bool = False,
    aspect_tolerance: float = ASPECT_TOLERANCE,
    drift_tolerance: float = DRIFT_TOLERANCE,
    sample: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Check the records of `path` (see `records.record_files`) and find every problem.

    pictures: open and decode every picture, compare stated sizes and hashes; geometry: compare the pictures of each pair.
    allow_resize: pairs of different shapes are meant. sample: look at the pictures of about that many records only, evenly
    chosen (all lines are read all the same). on_progress: told the number of records done.

    Raises DataError only when there is no file to read.
    """
    summary, problems = Summary(), []
    leaks, looked = _Leaks(), set()
    look = _Look(lru_cache(maxsize=256)(_probe), allow_resize, aspect_tolerance, drift_tolerance, geometry)
    files = record_files(path)
    every = _stride(files, sample) if pictures else 0
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for batch in _batches(files, problems, pictures):
            chosen = [record for number, record in enumerate(batch, summary.records) if every and number % every == 0]
            for record in batch:
                summary.add(record)
            for record, seen in zip(chosen, pool.map(look, chosen), strict=True):
                problems += seen.problems
                problems += leaks.add(record, seen.probes)
                looked.update(each.sha256 for each in seen.probes.values())
                summary.pairs += seen.pairs
                main = next((seen.probes[name] for name in ("target", "generated", "input") if name in seen.probes), None)
                if main is not None:
                    summary.add_size(main.size)
            if on_progress:
                on_progress(summary.records)
    summary.pictures = len(looked)
    if not summary.records and not problems:
        fix = "check the path; data in another layout first goes through `reasonedit-train convert`."
        problems.append(Problem("no-records", Place(str(files[0]), 1), None, None, "a record", "no line with one", fix))
    order = {str(file): index for index, file in enumerate(files)}
    problems.sort(key=lambda problem: (order.get(problem.place.file, 0), problem.place.line) if problem.place else (-1, 0))
    return CheckReport(tuple(problems), summary)


def _batches(files: Sequence[Path], problems: list[Problem], pictures: bool) -> Iterator[list[Record]]:
    """The sound records by the batch; what is wrong with the others is added to `problems`."""
    seen: dict[str, Place] = {}
    batch: list[Record] = []
    for file in files:
        for place, line in lines_of(file):
            record, found = parse_record(line, place, seen)
            problems += found
            if record is not None:
                batch.append(record)
            elif pictures:
                problems += _absent(line, place, found)
            if len(batch) == _BATCH:
                yield batch
                batch = []
    yield batch


def _absent(line: bytes, place: Place, found: Sequence[Problem]) -> Iterator[Problem]:
    """Pictures that an unsound record names and that are not there, so that one look finds these faults too."""
    try:
        value = json.loads(line)
        paths = picture_paths(value)
    except (ValueError, AttributeError, RecursionError):  # no JSON object: that is said already
        return
    faulty = {problem.field for problem in found}
    name = value.get("id") if isinstance(value.get("id"), str) else None
    for field_name, path in paths.items():
        file = Path(place.file).parent / path
        if field_name not in faulty and not exists(file):
            fault = absent(file)
            where = field_name.removesuffix(".path")
            yield Problem(fault.code, place, name, where, "a picture that can be decoded", fault.found, fault.fix)


def _stride(files: Sequence[Path], sample: int | None) -> int:
    """Every how many records the pictures are looked at."""
    if sample is None:
        return 1
    lines = sum(1 for file in files for _ in lines_of(file))
    return max(1, -(-lines // max(1, sample)))


# ---- pictures ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What was found out about the pictures of one record."""

    problems: list[Problem]
    probes: dict[str, Probe]
    pairs: int = 0


def _probe(path: Path) -> Probe | PictureFault:
    try:
        return probe(path)
    except PictureFault as fault:
        return fault


@dataclass(frozen=True, slots=True)
class _Look:
    """Looks at the pictures of one record. probe: decodes a file, once for all the neighbouring records that name it."""

    probe: Callable[[Path], Probe | PictureFault]

    allow_resize: bool
    aspect_tolerance: float
    drift_tolerance: float
    geometry: bool

    def __call__(self, record: Record) -> _Seen:
        seen = _Seen([], {})
        for name, file in record.files.items():
            where = "edit.mask" if name == "mask" else f"images.{name}"
            found = self.probe(record.picture(name))
            if isinstance(found, PictureFault):
                expected = "a picture that can be decoded"
                seen.problems.append(_problem(record, found.code, where, expected, found.found, found.fix))
                continue
            seen.problems += _about(record, where, file, found)
            if name != "mask":
                seen.probes[name] = found
        for one, two, differ in _pairs(record) if self.geometry else ():
            if one in seen.probes and two in seen.probes:
                seen.pairs += 1
                seen.problems += self._pair(record, one, two, differ, seen.probes)
        return seen

    def _pair(self, record: Record, one: str, two: str, differ: bool, probes: dict[str, Probe]) -> Iterator[Problem]:
        first, second = probes[one], probes[two]
        where = f"images.{two}"
        if differ and first.size == second.size and np.array_equal(first.grey, second.grey) and _same(record, one, two, probes):
            fix = "leave the record out, or name the right pictures."
            yield _problem(record, "identical-pair", where, f"a picture other than {one}", "the same one", fix)
            return
        off, exact = _shape_gap(first.size, second.size)
        if not exact:
            allowed = record.may_resize or self.allow_resize
            if off > self.aspect_tolerance and allowed:
                return
            expected, found = f"the shape of {one}, {_size(first.size)}", f"{_size(second.size)}, {off:.1%} off"
            fix = "crop both pictures alike, or set edit.allow_resize to true where the shapes differ on purpose."
            if off > self.aspect_tolerance:
                yield _problem(record, "aspect-mismatch", where, expected, found, fix)
                return
            if not allowed:
                yield _problem(record, "aspect-near", where, expected, found, fix)
        yield from self._drift(record, one, two, first, second)

    def _drift(self, record: Record, one: str, two: str, first: Probe, second: Probe) -> Iterator[Problem]:
        shape = min(first.grey.shape, second.grey.shape, key=np.prod)
        lie = align(_resized(first.grey, shape), _resized(second.grey, shape))
        width, height = second.size
        if lie is None or lie.drift(width, height) <= max(_LEAST_DRIFT, self.drift_tolerance * max(width, height)):
            return
        (dx, dy), (zoom_x, zoom_y) = lie.pixels(width, height), lie.zoom
        found = (
            f"them shifted by ({dx:+.1f}, {dy:+.1f}) px and zoomed by ({zoom_x:+.2%}, {zoom_y:+.2%}), up to "
            f"{lie.drift(width, height):.1f} px off at {_size(second.size)} ({lie.agreeing} of {lie.textured} parts agree)"
        )
        fix = "crop and resize both pictures in the same way, or leave the pair out; the model would learn the shift."
        yield _problem(record, "misaligned-pair", f"images.{two}", f"unchanged parts to lie as in {one}", found, fix)


def _pairs(record: Record) -> Iterator[tuple[str, str, bool]]:
    """(from, to, whether they must differ): the pictures that an editor learns to make from each other."""
    if record.kind in ("edit", "hypothetical", "think"):
        yield "input", "target", record.kind != "think"
    elif record.kind == "reflect":
        yield "input", "target", False
        if record.reflect and record.reflect.verdict == "reflection":
            yield "generated", "target", True


def _about(record: Record, where: str, file: PictureFile, found: Probe) -> Iterator[Problem]:
    """What is to be said of one decoded picture."""
    if file.size is not None and tuple(file.size) != found.size:
        turned = found.turned and tuple(file.size) == found.size[::-1]
        fix = "state the size after the EXIF turn." if turned else "correct the size or leave it out."
        yield _problem(record, "size-mismatch", f"{where}.size", _size(found.size), _size(file.size), fix)
    if file.sha256 is not None and file.sha256 != found.sha256:
        fix = "the file is not the one that was labelled: put that one back, or label this one."
        yield _problem(record, "hash-mismatch", f"{where}.sha256", file.sha256, found.sha256, fix)
    if found.turned:
        fix = "nothing needs to be done."
        yield _problem(record, "exif-turned", where, "an upright picture", "one turned by its EXIF tag", fix)
    if found.alpha:
        fix = "lay it on the wanted background where white is not right."
        yield _problem(record, "transparency", where, "an opaque picture", "transparent parts, laid on white", fix)
    if found.frames > 1:
        fix = "export the wanted frame where it is not the first."
        yield _problem(record, "several-frames", where, "one frame", f"{found.frames}", fix)


def _problem(record: Record, code: str, where: str, expected: str, found: str, fix: str) -> Problem:
    return Problem(code, record.source, record.id, where, expected, found, fix)


def _same(record: Record, one: str, two: str, probes: dict[str, Probe]) -> bool:
    """Equal files, or equal pixels: the grey pictures alone would take a change of colour for none."""
    if probes[one].sha256 == probes[two].sha256:
        return True
    with Image.open(record.picture(one)) as first, Image.open(record.picture(two)) as second:
        return np.array_equal(np.asarray(first.convert("RGB")), np.asarray(second.convert("RGB")))


def _shape_gap(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, bool]:
    """By how much the aspects differ, and whether they are equal to a pixel of rounding."""
    (w1, h1), (w2, h2) = first, second
    ratio = (w1 * h2) / (w2 * h1)
    exact = abs(h2 - w2 * h1 / w1) <= 1 or abs(w2 - h2 * w1 / h1) <= 1
    return max(ratio, 1 / ratio) - 1, exact


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _resized(grey: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if grey.shape == shape:
        return grey
    return np.asarray(Image.fromarray(grey).resize(shape[::-1], Image.Resampling.BOX))


def aspect_name(width: int, height: int) -> str:
    """The nearest of the usual aspects, as 3:2 or 2:3; numbers where none is within 3 %."""
    ratio = max(width, height) / min(width, height)
    name, value = min(_ASPECTS.items(), key=lambda entry: abs(entry[1] / ratio - 1))
    if abs(value / ratio - 1) > 0.03:
        return f"{width / height:.2f}"
    return name if width >= height else ":".join(reversed(name.split(":")))


class _Leaks:
    """Finds the same picture file in two splits. Eight bytes of each hash are kept."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str]] = {}

    def add(self, record: Record, probes: dict[str, Probe]) -> Iterator[Problem]:
        for name, found in probes.items():
            split, other = self._first.setdefault(found.sha256[:16], (record.split, record.id))
            if split != record.split:
                fix = "keep all records of a picture in one split, or the held-out figures mean nothing."
                seen = f"that of record {other!r}, which is in {split}"
                yield _problem(record, "split-leak", f"images.{name}", f"a picture only of {record.split}", seen, fix)
