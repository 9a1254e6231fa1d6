"""Chat transcripts of the MLLM stream: a question as inference asks it, the answer in the tokens that inference feeds.

What the model chooses while it speaks under `mllm.constrain` is learnt in exactly those pieces: literals are tokens of their
own, so that no token of the answer reaches over a border that the decoder would not have crossed.

L tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ...reasonedit_core.conditioners.document import unseen
from ...reasonedit_core.errors import DataError
from ...reasonedit_core.interfaces import Form, Query
from ...reasonedit_core.mllm.constrain import FORMS, Choice, Literal, Part, Text
from ...reasonedit_core.mllm.qwen25vl import QwenVL
from ...reasonedit_core.mllm.vision import PATCH, SNAP_PIXELS, Patches, preprocess, smart_resize
from ...reasonedit_core.packing import IGNORED

Size = tuple[int, int]
"""(width, height) in pixels."""

END = "<|im_end|>"
NEXT_TURN = "\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
"""Between two answers of one conversation, in the chat format of Qwen."""

_CLOSING = {"json": '"', "tagged": "<#"}


@dataclass(frozen=True, slots=True)
class Shown:
    """How the reasoner is shown pictures: the arguments of `vision.prepare`, those of `QwenSpeaker` by default."""

    min_pixels: int = 262144
    max_pixels: int = 802816
    max_side: int | None = 1024
    snap: bool = True

    def patches(self, picture: Tensor) -> Patches:
        """(1, 3, H, W) in 0..1 as the vision tower reads it; of one on the meta device, which has only a size, `hollow`."""
        if picture.device.type == "meta":
            return self.hollow((picture.shape[-1], picture.shape[-2]))
        return preprocess(
            picture, min_pixels=self.min_pixels, max_pixels=self.max_pixels, max_side=self.max_side, snap=self.snap
        )

    def hollow(self, size: Size) -> Patches:
        """Patches without values of a picture of this size: to count and to place its tokens without opening it."""
        height, width = shown_size(size, self)
        return Patches(torch.empty(0, 0), (height // PATCH, width // PATCH), (height, width), "")


@dataclass(frozen=True, slots=True, eq=False)
class TextDocument:
    """One document of the MLLM stream before it is packed.

    ids, labels (L,) int64; positions (3, L) int64; labels as in `packing.TextPack`. patches: of its pictures. kept: rows
    whose states condition a document of the picture stream, None where none do; fillers, place, quoted: see `CondDocument`.
    """

    record: str
    ids: Tensor
    positions: Tensor
    labels: Tensor
    patches: tuple[Patches, ...] = ()
    kept: slice | None = None
    fillers: int = 0
    place: Tensor | None = None
    quoted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_answers(self) -> int:
        """Tokens that a loss is asked of."""
        return int((self.labels != IGNORED).sum())


def ask_and_answer(mllm: QwenVL, query: Query, answer: str, *, record: str, shown: Shown, task: str) -> TextDocument:
    """The question as the MLLM is asked it, and the answer. Pictures on the meta device leave the document without patches.

    Raises DataError for an answer that the constrained decoder could not give: not of the query's form, or longer than the
    question allows.
    """
    patches = tuple(shown.patches(query.images[part]) for part in query.parts if not isinstance(part, str))
    features = [unseen(each) for each in patches]
    prompt = mllm.expand(mllm.tokenize(mllm.render(query.system, query.parts, n_images=len(query.images))), features)
    pieces = [(mllm.tokenize(piece), chosen) for piece, chosen in segments(query.form, answer)]
    n_chosen = sum(len(tokens) for tokens, chosen in pieces if chosen)
    if n_chosen > query.max_new_tokens:
        raise DataError(
            f"expected an answer of at most {query.max_new_tokens} tokens (task.{task}.max_new_tokens of the dialogue pack), "
            f"found one of {n_chosen}: {answer[:60]!r}. Shorten it, or raise the number in the pack."
        )
    said = [*(token for tokens, _ in pieces for token in tokens), *mllm.tokenize(END)]
    return _document(mllm, record, [(prompt, False), (said, True)], patches)


def converse(
    mllm: QwenVL, turns: Sequence[tuple[str, str]], pictures: Sequence[Tensor], *, record: str, shown: Shown
) -> TextDocument:
    """A conversation about pictures, which stand before the first of the (question, answer) turns. All answers are learnt."""
    patches = tuple(shown.patches(picture) for picture in pictures)
    first = mllm.render(None, [*range(len(pictures)), turns[0][0]], n_images=len(pictures))
    stretches = [(mllm.expand(mllm.tokenize(first), [unseen(each) for each in patches]), False)]
    for number, (question, answer) in enumerate(turns):
        if number:
            stretches.append((mllm.tokenize(NEXT_TURN.format(question=question)), False))
        stretches.append((mllm.tokenize(answer.strip()) + mllm.tokenize(END), True))
    return _document(mllm, record, stretches, patches)


def _document(
    mllm: QwenVL, record: str, stretches: Sequence[tuple[Sequence[int], bool]], patches: tuple[Patches, ...]
) -> TextDocument:
    """Stretches of expanded ids, each learnt or not, as one document."""
    ids = [token for tokens, _ in stretches for token in tokens]
    labels = [token if learnt else IGNORED for tokens, learnt in stretches for token in tokens]
    positions = mllm.positions(ids, [unseen(each) for each in patches])[:, 0]
    return TextDocument(record, torch.tensor(ids), positions, torch.tensor(labels), patches)


# ---- the pieces of an answer ---------------------------------------------------------------------------------------------


def segments(form: Form, answer: str) -> list[tuple[str, bool]]:
    """The answer in the pieces that the constrained decoder feeds, and whether the model chooses the tokens of a piece.

    A closing mark belongs to the text before it. Raises DataError where the answer is not of the form.
    """
    pieces: list[tuple[str, bool]] = []
    parts, at, after_text = list(FORMS[form]), 0, False
    while parts:
        part = parts.pop(0)
        piece = _piece(part, parts, answer, at, form)
        if isinstance(part, Literal) and after_text:
            pieces[-1] = (pieces[-1][0] + piece, True)
        else:
            pieces.append((piece, not isinstance(part, Literal)))
        if isinstance(part, Choice):
            parts[:0] = part.branches.get(piece, ())
        at, after_text = at + len(piece), isinstance(part, Text)
    if at != len(answer):
        raise _wrong(form, "the end", answer, at)
    return pieces


def _piece(part: Part, later: Sequence[Part], answer: str, at: int, form: Form) -> str:
    """What of the answer from `at` on belongs to `part`."""
    if isinstance(part, Literal):
        if not answer.startswith(part.text, at):
            raise _wrong(form, repr(part.text), answer, at)
        return part.text
    if isinstance(part, Choice):
        follows = later[0].text if later and isinstance(later[0], Literal) else ""
        fitting = next((option for option in part.options if answer.startswith(option + follows, at)), None)
        if fitting is None:
            raise _wrong(form, f"one of {', '.join(part.options[:12])}", answer, at)
        return fitting
    end = len(answer) if part.ends else _closing(part.kind, answer, at)
    text = answer[at:end]
    if not text.strip() or (part.kind == "tagged" and _CLOSING["tagged"] in text):
        raise _wrong(form, "free text", answer, at)
    return text


def _closing(kind: str, answer: str, at: int) -> int:
    """Where a free text ends: before an unescaped quote, or before `<#`."""
    end = answer.find(_CLOSING[kind], at)
    while kind == "json" and end > at and (end - len(answer[at:end].rstrip("\\")) - at) % 2:
        end = answer.find(_CLOSING[kind], end + 1)
    return len(answer) if end < 0 else end


def _wrong(form: Form, expected: str, answer: str, at: int) -> DataError:
    return DataError(
        f"an answer of the form {form!r}: expected {expected} at character {at}, found {answer[at : at + 40]!r}. Make answers "
        "with dialogue.answers."
    )


# ---- sizes ---------------------------------------------------------------------------------------------------------------


def shown_size(size: Size, shown: Shown) -> Size:
    """(height, width) in pixels at which the vision tower sees a picture of `size` (width, height): that of `vision.prepare`,
    without the picture."""
    width, height = size
    if shown.max_side is not None and max(size) > shown.max_side:
        blank = Image.new("1", size)  # Pillow itself says to what it shrinks; one bit deep costs next to nothing
        blank.thumbnail((shown.max_side, shown.max_side), Image.Resampling.NEAREST, reducing_gap=None)
        width, height = blank.size
    if shown.snap:
        low, high = SNAP_PIXELS
        height, width = smart_resize(height, width, min_pixels=low, max_pixels=high, at_least_one=True)
    return smart_resize(height, width, min_pixels=shown.min_pixels, max_pixels=shown.max_pixels)
