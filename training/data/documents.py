"""From records to documents: which tasks a record holds, what is asked and answered in each, and which pictures go where.

Nothing here needs weights. A question is asked by the very reasoner that asks it at inference (`PackReasoner`), with a script
in the place of the MLLM that gives the record's answer; the reasoner's own reader then says whether the answer can be read
back. What conditions an edit is the conditioner's own document. Pictures have the sizes that `Geometry.plan` gives them.

    MLLM stream     think  describe  score  edit_score  quality_score  reflect  understand      (learnt: answers)
    picture stream  edit (input -> target)  refine (generated -> target)  t2i (caption -> target), each with the document of
                    the MLLM stream that conditions it (nothing learnt there)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...reasonedit_core.dialogue.answers import say_consistency, say_description, say_pair, say_thought, say_verdict
from ...reasonedit_core.errors import ConfigError, DataError, MalformedReply, ReasonEditError
from ...reasonedit_core.generator import PATCH, token_grid
from ...reasonedit_core.images import load_image
from ...reasonedit_core.interfaces import Query
from ...reasonedit_core.packing import IGNORED, Grid
from ...reasonedit_core.reasoners.verdict import MULTI_ROUND
from ...reasonedit_core.types import Decision
from ..noise import digest
from ..types import FM, NTP
from .lengths import Lengths
from .manifest import record_digest
from .pictures import PictureFault, upright_size
from .planner import Item, Refused
from .records import Record, join_steps
from .transcripts import Size, TextDocument, ask_and_answer, converse
from .voice import NO_MARKS, Voice

if TYPE_CHECKING:
    from ...reasonedit_core.conditioners.document import CondDocument
    from .manifest import Manifest

__all__ = ["TASKS", "USUAL", "Documents", "Layout", "Voice", "from_conditioner", "item_id", "open_file", "reflect_replies"]

TASKS: dict[str, str] = {
    "think": NTP,
    "describe": NTP,
    "score": NTP,
    "edit_score": NTP,
    "quality_score": NTP,
    "reflect": NTP,
    "understand": NTP,
    "edit": FM,
    "refine": FM,
    "t2i": FM,
}
"""Every task and the loss it has."""

USUAL = tuple(task for task in TASKS if task not in ("edit_score", "quality_score"))
"""The tasks of the paper. The two marks are learnt on request only: records hold no words of their own for them."""

_DECISIONS = {"success": Decision.SUCCESS, "reflection": Decision.REFINE, "failed": Decision.FAILED}


@dataclass(frozen=True, slots=True)
class Layout:
    """The pictures of a document of the picture stream. names, sizes: the target, then the references, with (width, height)
    at which the VAE sees them; seen: the same of the pictures that the MLLM is shown; instruction: what conditions; patch:
    pixels of a latent token on each side."""

    instruction: str
    names: tuple[str, ...]
    sizes: tuple[Size, ...]
    seen: tuple[tuple[str, Size], ...]
    patch: int = PATCH

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(height, width) in latent tokens of each picture."""
        return tuple(token_grid(size, self.patch) for size in self.sizes)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Latent tokens of each picture."""
        return tuple(height * width for height, width in self.grids)


class Documents:
    """Makes documents of records.

    voice: of the checkpoint. manifest: sizes and hashes of the pictures; without it they are read from the files. tasks: which
    are learnt. open_picture: (record, name) -> (1, 3, H, W) in 0..1.
    """

    def __init__(
        self,
        voice: Voice,
        *,
        manifest: Manifest | None = None,
        tasks: Sequence[str] = USUAL,
        open_picture: Callable[[Record, str], Tensor] | None = None,
    ) -> None:
        unknown = sorted(set(tasks) - set(TASKS))
        if unknown:
            raise ConfigError(f"tasks: expected some of {', '.join(TASKS)}, found {', '.join(unknown)}. Correct the recipe.")
        self.voice, self.manifest, self.tasks = voice, manifest, tuple(tasks)
        self.open = open_picture or open_file
        self._examples: dict[tuple[Size, ...], CondDocument] = {}
        self._negatives: dict[tuple[Size, ...], int] = {}

    # what a record holds

    def tasks_of(self, record: Record) -> tuple[str, ...]:
        """The tasks that a record can be used for, of those that are learnt."""
        has = record.files
        pair = "target" in has and record.kind in ("edit", "hypothetical", "think", "reflect")
        reflects = record.kind == "reflect" and record.reflect is not None
        scores = reflects and self.voice.reflection == MULTI_ROUND  # the other forms neither describe nor score
        marks = record.reflect.scores if scores else None
        holds = {
            "think": record.kind == "think",
            "describe": scores,
            "score": scores,
            "edit_score": marks is not None and isinstance(marks.edit, tuple),
            "quality_score": marks is not None and isinstance(marks.quality, tuple),
            "reflect": reflects,
            "understand": record.kind == "understand",
            "edit": pair and "input" in has and record.editor_instruction is not None,
            "refine": pair and reflects and "generated" in has and record.reflect.second_instruction is not None,
            "t2i": record.kind == "t2i",
        }
        return tuple(task for task in self.tasks if holds[task])

    def size(self, record: Record, name: str) -> Size:
        """(width, height) of a picture as seen."""
        entry = self.manifest.by_id.get(record.id) if self.manifest is not None else None
        if entry is not None and name in entry.pictures:
            return entry.pictures[name].size
        try:
            return upright_size(record.picture(name))
        except PictureFault as fault:
            raise record.error(fault.code, f"images.{name}", "a picture that can be read", fault.found, fault.fix) from fault

    def sha(self, record: Record, name: str) -> str:
        """sha256 of a picture file."""
        entry = self.manifest.by_id.get(record.id) if self.manifest is not None else None
        if entry is not None and name in entry.pictures:
            return entry.pictures[name].sha256
        return _sha(str(record.picture(name)))

    # the MLLM stream

    def text(self, record: Record, task: str, *, pixels: bool = True) -> TextDocument:
        """A document with answers. pixels=False leaves its patches empty and opens no file: only to be counted.

        Raises DataError naming file, line and record.
        """
        return _told(record, task, lambda: self._text(record, task, pixels))

    def _text(self, record: Record, task: str, pixels: bool) -> TextDocument:
        voice = self.voice
        if task == "understand":
            turns = [(turn.question, turn.answer) for turn in record.understand.turns]
            names = [name for name in ("input", *record.references) if name in record.files]
            pictures = [self._picture(record, name, pixels) for name in names]
            return converse(voice.mllm, turns, pictures, record=record.id, shown=voice.shown)
        query, answer = self._exchange(record, task, pixels)
        return ask_and_answer(voice.mllm, query, answer, record=record.id, shown=voice.shown, task=task)

    def _exchange(self, record: Record, task: str, pixels: bool) -> tuple[Query, str]:
        """The question of a task as inference asks it, and what the record answers."""
        if task == "think":
            answer = say_thought(record.think.text or join_steps(record.think.steps))
            reasoner, speaker = self.voice.reasoner({"think": [answer]})
            reasoner.think(self._picture(record, "input", pixels), record.instruction.raw)
            return speaker.asked[0], answer
        goal, original = record.editor_instruction, record.instruction.raw if record.instruction else None
        if task == "describe":
            answer = say_description(record.reflect.target_description)
            reasoner, speaker = self.voice.reasoner({"describe": [answer]})
            reasoner.describe(self._picture(record, "input", pixels), goal, original=original)
            return speaker.asked[0], answer
        replies = reflect_replies(record)
        reasoner, speaker = self.voice.reasoner({name: [reply] for name, reply in replies.items()})
        pictures = [self._picture(record, name, pixels) for name in ("input", "generated")]
        described = self.voice.reflection == MULTI_ROUND
        description = say_description(record.reflect.target_description) if described else ""
        reasoner.reflect(*pictures, goal, description, original=original)
        return next(query for query in speaker.asked if query.task == task), replies[task]

    def _picture(self, record: Record, name: str, pixels: bool) -> Tensor:
        if pixels:
            return self.open(record, name)
        width, height = self.size(record, name)
        return torch.empty(1, 3, height, width, device="meta")

    # the picture stream

    def layout(self, record: Record, task: str) -> Layout:
        """Sizes of the pictures of an edit, a refinement or a text to image document. Raises DataError as `text` does."""
        return _told(record, task, lambda: self._layout(record, task))

    def _layout(self, record: Record, task: str) -> Layout:
        plan, level = self.voice.geometry.plan, self.voice.level
        if task == "t2i":
            drawn = plan([self.size(record, "target")], level)
            return Layout(record.caption, ("target",), (drawn.output,), (), drawn.patch)
        names = ("generated",) if task == "refine" else ("input", *record.references)
        instruction = record.reflect.second_instruction if task == "refine" else record.editor_instruction
        sizes = plan([self.size(record, name) for name in names], level)
        seen = tuple(zip(names, sizes.mllm, strict=True))
        return Layout(instruction, ("target", *names), (sizes.output, *sizes.vae), seen, sizes.patch)

    def condition(self, record: Record, task: str, *, dropped: bool = False) -> TextDocument:
        """The document that conditions an edit. dropped: with the instruction that stands where text is left out."""
        return _told(record, task, lambda: self._condition(record, task, dropped))

    def _condition(self, record: Record, task: str, dropped: bool) -> TextDocument:
        layout = self.layout(record, task)
        pictures = [self.voice.geometry.to_mllm(self.open(record, name), size) for name, size in layout.seen]
        words = self.voice.negative if dropped else layout.instruction
        image, references = (pictures[0], tuple(pictures[1:])) if pictures else (None, ())
        return from_conditioner(record.id, self.voice.conditioner.document(image, words, references=references))

    # lengths

    def measure(self, record: Record, task: str) -> tuple[int, int]:
        """Tokens of a task's document in the text and in the image stream, without opening a picture.

        An edit is as long as its longer form, with or without its text.
        """
        if TASKS[task] == NTP:
            return len(self.text(record, task, pixels=False)), 0
        layout = self.layout(record, task)
        whole, kept = _told(record, task, lambda: self._text_lengths(layout))
        return whole, kept + sum(layout.tokens)

    def _text_lengths(self, layout: Layout) -> tuple[int, int]:
        """(tokens of the conditioning document, text tokens that the DiT is given), of the longer of its two forms.

        One document is made for every set of sizes, of flat pictures; other words change it by their tokens.
        """
        voice, sizes = self.voice, tuple(size for _, size in layout.seen)
        if sizes not in self._examples:
            pictures = [torch.zeros(1, 3, 1, 1).expand(1, 3, height, width) for width, height in sizes]
            image, references = (pictures[0], tuple(pictures[1:])) if pictures else (None, ())
            self._examples[sizes] = voice.conditioner.document(image, voice.negative, references=references)
        example = self._examples[sizes]
        if sizes not in self._negatives:
            self._negatives[sizes] = self._prompt_length(voice.negative, len(sizes))
        more = self._prompt_length(layout.instruction, len(sizes)) - self._negatives[sizes]
        whole = max(len(example.ids), len(example.ids) + more)
        needed, most = whole - example.kept.start, getattr(voice.conditioner, "budget", None)
        if most is not None and needed > most:
            raise DataError(
                f"expected at most {most} tokens that condition the edit, found {needed}: {layout.instruction[:60]!r}. Shorten "
                "the instruction; its end would be cut."
            )
        return whole, example.n_text if example.fillers else needed

    def _prompt_length(self, words: str, n_images: int) -> int:
        """Tokens of a conditioning prompt with one placeholder for each picture."""
        conditioner = self.voice.conditioner
        if hasattr(conditioner, "token_ids"):  # Step1X-Edit
            return len(conditioner.token_ids(words)[0])
        template = conditioner.template if n_images else conditioner.text_template
        return len(self.voice.mllm.tokenize(template.prompt(words, n_images)))

    def items(
        self,
        records: Sequence[Record],
        *,
        losses: Sequence[str] = (NTP, FM),
        states_cached: bool = False,
        lengths: Lengths | None = None,
    ) -> tuple[dict[str, tuple[Record, str]], list[Item], list[Refused]]:
        """All documents of the records that have one of the losses: (record and task by item id, items, refused ones).

        A document that cannot be made is refused by name with what is wrong, and the others go on. lengths: measured before.
        """
        sources: dict[str, tuple[Record, str]] = {}
        items: list[Item] = []
        refused: list[Refused] = []
        for record in records:
            for task in self.tasks_of(record):
                if TASKS[task] not in losses:
                    continue
                name = item_id(record, task)
                try:
                    text, image = self._known_lengths(record, task, lengths)
                except ReasonEditError as error:
                    refused.append(Refused(name, str(error)))
                    continue
                loss = TASKS[task]
                text = 0 if states_cached and loss == FM else text
                sources[name] = (record, task)
                items.append(Item(name, record.id, record.kind, loss, text=text, image=image))
        if lengths is not None:
            lengths.save()
        return sources, items, refused

    def _known_lengths(self, record: Record, task: str, lengths: Lengths | None) -> tuple[int, int]:
        if lengths is None:
            return self.measure(record, task)
        sizes = [part for name in record.files if name != "mask" for part in (name, *self.size(record, name))]
        key = digest(self.voice.fingerprint, task, record_digest(record), *sizes).hex()[:40]
        found = lengths.get(key)
        if found is None:
            found = self.measure(record, task)
            lengths.put(key, found)
        return found


def open_file(record: Record, name: str) -> Tensor:
    """A picture of a record, (1, 3, H, W) in 0..1."""
    return load_image(record.picture(name)).rgb


def item_id(record: Record, task: str) -> str:
    """The name of a document of a record."""
    return f"{record.id}/{task}"


def from_conditioner(record: str, document: CondDocument) -> TextDocument:
    """A conditioner's document as one of the MLLM stream: nothing in it is learnt."""
    return TextDocument(
        record,
        document.ids,
        document.positions,
        torch.full_like(document.ids, IGNORED),
        document.patches,
        document.kept,
        document.fillers,
        document.place,
        document.quoted,
    )


def reflect_replies(record: Record) -> dict[str, str]:
    """What a reasoner that does well says to the questions about a generated picture; marks that are absent are dummies."""
    reflect = record.reflect
    findings = reflect.findings.model_dump() if reflect.findings else None
    seen = (reflect.findings.reason if reflect.findings else None) or reflect.reason

    def marks(pair: Any) -> str:
        return say_pair(pair, seen) if isinstance(pair, tuple) else NO_MARKS

    return {
        "score": say_consistency(reflect.scores.consistency, seen, findings),
        "edit_score": marks(reflect.scores.edit),
        "quality_score": marks(reflect.scores.quality),
        "reflect": say_verdict(_DECISIONS[reflect.verdict], reflect.reason, reflect.second_instruction),
    }


def _told(record: Record, task: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; an error is told with the record's place."""
    try:
        return make()
    except MalformedReply as error:
        raise DataError(f"{record.source}: record {record.id!r}: {task}: the answer cannot be read back: {error}") from error
    except DataError as error:
        if str(error).startswith(f"{record.source}:"):
            raise
        raise DataError(f"{record.source}: record {record.id!r}: {task}: {error}") from error
    except ConfigError as error:
        raise DataError(f"{record.source}: record {record.id!r}: {task}: {error}") from error


def _sha(path: str) -> str:
    with open(Path(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
