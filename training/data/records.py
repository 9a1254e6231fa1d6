"""Records: one line of JSON is one training unit, `reasonedit.record/1`. Real, drawn and converted data all have this form.

A record has a kind, which says what it is for and what it must hold (`rules.NEEDS`), and pictures named by paths relative to
its file. It may hold more than its kind needs: a `think` record with a target picture is also an editing pair. The planner
derives documents from records; nothing here knows of prompts, templates or tokens, so that a change of wording never
invalidates data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, PrivateAttr, StringConstraints

from ...reasonedit_core.errors import DataError
from .problems import Place, Problem, raise_problems

SCHEMA = "reasonedit.record/1"
FILE_NAME = "records.jsonl"

Kind = Literal["think", "reflect", "edit", "t2i", "understand", "hypothetical"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
RecordVerdict = Literal["success", "reflection", "failed"]
VERDICTS: tuple[RecordVerdict, ...] = get_args(RecordVerdict)
SCENARIOS = ("physical", "temporal", "causal", "story")

REFERENCES = tuple(f"reference_{number}" for number in range(2, 7))
"""Further pictures of an edit; `input` is the first. The systems that take several were made for two or three."""


def _marks(value: Any) -> float | tuple[float, float]:
    """A mark 0..10, or the two marks of the scoring questions."""
    pair = value if isinstance(value, list | tuple) else [value]
    good = all(isinstance(mark, int | float) and not isinstance(mark, bool) for mark in pair) and len(pair) in (1, 2)
    if not good or not all(math.isfinite(mark) and 0 <= mark <= 10 for mark in pair):
        raise ValueError("a number from 0 to 10, or two of them in brackets")
    return float(pair[0]) if len(pair) == 1 else (float(pair[0]), float(pair[1]))


Text = Annotated[str, StringConstraints(pattern=r"\S")]
Mark = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Marks = Annotated[float | tuple[float, float], PlainValidator(_marks), PlainSerializer(lambda marks: marks)]
Count = Annotated[int, Field(ge=0, le=99)]  # the largest number that a reply may state
Side = Annotated[int, Field(ge=1)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    """Unknown keys are errors, nothing is converted (no number from text), and a record once read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PictureFile(_Part):
    """A picture: path relative to the folder of the JSONL file; size (width, height) as seen, after any EXIF turn."""

    path: Text
    sha256: Digest | None = None
    size: tuple[Side, Side] | None = None


class Pictures(_Part):
    """input: what is edited; generated: what an editor made of it; target: what should have come out; references."""

    input: PictureFile | None = None
    generated: PictureFile | None = None
    target: PictureFile | None = None
    reference_2: PictureFile | None = None
    reference_3: PictureFile | None = None
    reference_4: PictureFile | None = None
    reference_5: PictureFile | None = None
    reference_6: PictureFile | None = None


class Instruction(_Part):
    """raw: what the user wrote. class: `clear` when it can be painted as it stands, else `abstract`."""

    raw: Text
    clarity: Literal["clear", "abstract"] | None = Field(None, alias="class")
    lang: Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")] = "en"
    category: Text | None = None


class Think(_Part):
    """What thinking makes of an instruction: single actions, and optionally the running text made of them."""

    steps: tuple[Text, ...] = Field(min_length=1)
    text: Text | None = None


class ReflectScores(_Part):
    """Marks 0..10. consistency: agreement with the target description, after the caps; edit and quality: VIEScore's, each
    one mark or the pair of the scoring question (followed / restrained; coherent / clean)."""

    consistency: Mark
    quality: Marks | None = None
    edit: Marks | None = None


class Findings(_Part):
    """What the consistency score rests on; reason: the scorer's words, which are not the words of the verdict."""

    meets_instruction: Literal["yes", "partial", "no"]
    major_conflicts: Count = 0
    minor_conflicts: Count = 0
    omissions: Count = 0
    reason: Text | None = None


class Reflect(_Part):
    """A verdict on `images.generated`. second_instruction: there when, and only when, the verdict is `reflection`."""

    round: Annotated[int, Field(ge=1)] = 1
    target_description: Text
    scores: ReflectScores
    findings: Findings | None = None
    reason: Text
    verdict: RecordVerdict
    second_instruction: Text | None = None


class Edit(_Part):
    """instruction_used: what the editor gets when it is not the thought; mask: picture of the area the edit concerns (kept,
    not trained on); allow_resize: the pair's shapes differ on purpose."""

    instruction_used: Text | None = None
    mask: PictureFile | None = None
    allow_resize: bool = False


class Reason50K(_Part):
    """A hypothetical instruction in the sense of Reason50K, with what its benchmark measures by.

    initial_instruction: the scene or instruction that the pair was made of, which stands in `origin`; scores: what was
    measured of the input picture as the one before (`z`: the mean of the standardised measures that `scorers` names).
    """

    scenario: Literal["physical", "temporal", "causal", "story"]
    hypothetical: Text
    objects: tuple[Text, ...] = ()
    source_caption: Text | None = None
    target_caption: Text | None = None
    initial_instruction: Text | None = None
    origin: Literal["inverse", "editworld", "user"] | None = None
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    scorers: tuple[Text, ...] = ()


class Turn(_Part):
    """One question and its answer."""

    question: Text
    answer: Text


class Understand(_Part):
    """Questions about a picture (or about none), in the order of the conversation."""

    turns: tuple[Turn, ...] = Field(min_length=1)


class Provenance(_Part):
    """One step that made or judged the record. key: the labelling runner's; everything but `step` is optional."""

    step: Text
    model: str | None = None
    endpoint: str | None = None
    prompt: str | None = None
    seed: int | None = None
    temperature: float | None = None
    time: str | None = None
    accepted: bool | None = None
    score: float | None = None
    key: str | None = None
    note: str | None = None


class Record(_Part):
    """One training unit. The JSON key `source` (where the data came from) is `origin` here; `source` is file and line."""

    schema_id: Literal["reasonedit.record/1"] = Field(alias="schema")
    id: Annotated[str, StringConstraints(pattern=r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$", max_length=200)]
    kind: Kind
    images: Pictures = Pictures()
    instruction: Instruction | None = None
    think: Think | None = None
    reflect: Reflect | None = None
    edit: Edit | None = None
    caption: Text | None = None
    reason50k: Reason50K | None = None
    understand: Understand | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    split: Split = "train"
    provenance: tuple[Provenance, ...] = ()
    license: str | None = None
    origin: str | None = Field(None, alias="source")

    _place: Place = PrivateAttr(default=Place("<memory>", 0))

    @property
    def source(self) -> Place:
        """(file, line) that the record was read from."""
        return self._place

    @property
    def folder(self) -> Path:
        """What picture paths are relative to: the folder of the record's file."""
        return Path(self._place.file).parent

    @property
    def files(self) -> dict[str, PictureFile]:
        """The pictures that are there, by name: those of `images`, and `mask`."""
        found = {name: getattr(self.images, name) for name in Pictures.model_fields}
        found["mask"] = self.edit.mask if self.edit else None
        return {name: file for name, file in found.items() if file is not None}

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the further pictures, in order."""
        return tuple(name for name in REFERENCES if getattr(self.images, name) is not None)

    def picture(self, name: str) -> Path:
        """Path of the picture `name` (input, generated, target, reference_2.., mask). DataError when there is none."""
        files = self.files
        if name not in files:
            raise self.error(
                "missing-field", f"images.{name}", "a picture", f"only {', '.join(files) or 'none'}", "add it to the record."
            )
        return self.folder / files[name].path

    @property
    def editor_instruction(self) -> str | None:
        """What the editor is told: `edit.instruction_used`, else the thought, else the user's words; else None."""
        if self.edit and self.edit.instruction_used:
            return self.edit.instruction_used
        if self.think:
            return self.think.text or join_steps(self.think.steps)
        if self.instruction:
            return self.instruction.raw
        return self.reason50k.hypothetical if self.reason50k else None

    @property
    def lang(self) -> str:
        """The instruction's language; without an instruction, zh or en by the letters of the record's text."""
        if self.instruction:
            return self.instruction.lang
        turns = self.understand.turns if self.understand else ()
        words = [self.caption, self.reason50k.hypothetical if self.reason50k else None, *(turn.question for turn in turns)]
        return guess_language(" ".join(word for word in words if word))

    @property
    def may_resize(self) -> bool:
        """The shapes of the pair differ on purpose."""
        return self.edit is not None and self.edit.allow_resize

    def error(self, code: str, field: str, expected: str, found: str, fix: str) -> DataError:
        """A DataError about this record in the form of all of them, for whoever meets a fault later."""
        return DataError(str(Problem(code, self._place, self.id, field, expected, found, fix)))

    def to_json(self) -> str:
        """One line of JSON without what is not there or is as by default; reading it gives the same record."""
        return self.model_dump_json(by_alias=True, exclude_none=True, exclude_defaults=True)


_CJK = re.compile(r"[\u3400-\u9fff]")


def guess_language(text: str) -> str:
    """zh for text with Chinese characters, else en: the two languages that the package speaks itself."""
    return "zh" if _CJK.search(text) else "en"


def join_steps(steps: Sequence[str]) -> str:
    """Single actions -> running text; a step without an end mark gets the one of its script."""
    ended = [step if step[-1] in ".。!！?？;；" else step + ("。" if _CJK.search(step) else ".") for step in steps]
    if len(steps) == 1:
        return steps[0]
    return "".join(ended) if all(_CJK.search(step) for step in steps) else " ".join(ended)


# ---- files ---------------------------------------------------------------------------------------------------------------


def record_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The JSONL files that `path` means: itself, a folder's records.jsonl, or else the folder's only *.jsonl; or several paths.

    DataError when there is no such file, or a choice.
    """
    if isinstance(path, Sequence) and not isinstance(path, str):
        return [file for one in path for file in record_files(one)]
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: expected a JSONL file of records or a folder with one, found nothing. Check the path.")
    if (path / FILE_NAME).is_file():
        return [path / FILE_NAME]
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "no *.jsonl"
        raise DataError(
            f"{path}: expected {FILE_NAME} or a single *.jsonl, found {names}. "
            "Name the file itself; data in another layout first goes through `reasonedit-train convert`."
        )
    return found


def lines_of(file: Path) -> Iterator[tuple[Place, bytes]]:
    """The lines that are not blank, with their places. A byte order mark is left out."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Place(str(file), number), line.strip()


def read_records(
    path: str | Path | Sequence[str | Path],
    *,
    splits: Collection[str] | None = None,
    kinds: Collection[str] | None = None,
) -> list[Record]:
    """All records of `path` (see `record_files`), in file order; only the named splits and kinds if given.

    Every line is read and checked whatever the filter. Pictures are not opened; `check.check_records` does that.
    Raises DataError naming file, line, record, field and fix of the first faults.
    """
    from .rules import parse_record  # the rules speak of records, so they come after them

    records: list[Record] = []
    problems: list[Problem] = []
    seen: dict[str, Place] = {}
    for file in record_files(path):
        for place, line in lines_of(file):
            record, found = parse_record(line, place, seen)
            problems += found
            if record is not None and (splits is None or record.split in splits) and (kinds is None or record.kind in kinds):
                records.append(record)
    raise_problems(problems)
    if not seen:
        raise DataError(f"{path}: expected records, one JSON object per line, found no line with one. Check the path.")
    return records
