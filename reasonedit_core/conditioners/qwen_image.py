"""The conditioner of ReasonEdit-Q: pictures and instruction through Qwen2.5-VL, its last states handed to the transformer.

The wording around the instruction belongs to the trained system. It is not part of this repository: it is read from the
source text of the installed diffusers, whose Qwen-Image pipelines carry it. The states of the part before the pictures are
dropped; how many tokens that is follows from tokenising that part.

Positions are always explicit and three-dimensional. The stock pipelines leave them to transformers, which since version 5
silently falls back to one-dimensional positions there; the released weights were trained with three.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import BackendUnavailable, CheckpointError, ConfigError
from ..mllm.vision import preprocess
from ..types import Conditioning
from .document import CondDocument, unseen

if TYPE_CHECKING:
    from ..mllm.qwen25vl import QwenVL

log = logging.getLogger(__name__)

VISION_START, IMAGE_PAD = "<|vision_start|>", "<|image_pad|>"
RESERVED = (VISION_START, "<|vision_end|>", IMAGE_PAD, "<|video_pad|>", "<|im_start|>", "<|im_end|>")

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 16384
"""The released processor's bounds on the picture the MLLM sees; a checkpoint's own processor config overrides them."""


@dataclass(frozen=True, slots=True)
class QwenTemplate:
    """The prompt of a Qwen-Image pipeline.

    dialogue: the whole text with `{}` where the instruction goes. picture: the text that stands for one of several
    pictures, `{}` being its number; None when `dialogue` itself holds the one vision block, or none (text to image).
    """

    dialogue: str
    picture: str | None = None

    def prompt(self, instruction: str, n_images: int) -> str:
        """The text for `n_images` pictures, each shown by one image placeholder token."""
        head, tail = self.dialogue.split("{}")
        if self.picture is None:
            return head + instruction + tail
        pictures = "".join(self.picture.replace("{}", str(number)) for number in range(1, n_images + 1))
        return head + pictures + instruction + tail

    @property
    def head(self) -> str:
        """What comes before the first picture, or before the text where there is none; the states of it are dropped."""
        return self.dialogue.partition("{}")[0].partition(VISION_START)[0]


class QwenImageConditioner:
    """Pictures + instruction -> Conditioning of a Qwen-Image editing transformer.

    plus: the EditPlus prompt (2509, 2511), which names each of several pictures; otherwise Edit, which takes one picture.
    min_pixels, max_pixels: bounds of the MLLM's own resize, from the checkpoint's processor config.
    template: read from the installed diffusers when None. drop: number of leading tokens dropped, if the checkpoint states
    one; otherwise counted. text_template: the prompt of text to image, by default that of the Qwen-Image pipeline of the
    installed diffusers, read when it is first needed.
    """

    def __init__(
        self,
        mllm: QwenVL,
        *,
        plus: bool,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        template: QwenTemplate | None = None,
        drop: int | None = None,
        text_template: QwenTemplate | None = None,
    ) -> None:
        self.mllm = mllm
        self.plus = plus
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.template = template or read_template(plus=plus)
        self._text_template = text_template
        self._head_ids = mllm.tokenize(self.template.head) if drop is None else []
        self.drop = len(self._head_ids) if drop is None else drop

    @property
    def text_template(self) -> QwenTemplate:
        """The prompt of text to image."""
        if self._text_template is None:
            self._text_template = read_text_template()
        return self._text_template

    def condition(
        self,
        image: torch.Tensor | None,
        instruction: str,
        *,
        grid: tuple[int, int] | None = None,
        references: Sequence[torch.Tensor] = (),
        released: bool = False,
    ) -> Conditioning:
        """Tokens (1, T, D) for the picture being edited and, behind it, the references in their order.

        Each picture is (1, 3, h, w) in 0..1 at the size that `QwenGeometry` plans for the MLLM. image None: text to image,
        instruction being the caption. Neither grid nor released changes the result: this system has no weak point here that
        the default policy would mend.
        """
        pictures = self._pictures(image, references)
        ids, drop = self._prompt(instruction, len(pictures))
        features = [self.mllm.vision(picture, **self._bounds()) for picture in pictures]
        embeds = self.mllm.embed(ids, features)
        states = self.mllm.states(embeds, self.mllm.positions(ids, features))
        return Conditioning(tokens=states[:, drop:])

    def document(
        self,
        image: torch.Tensor | None,
        instruction: str,
        *,
        references: Sequence[torch.Tensor] = (),
        released: bool = False,
    ) -> CondDocument:
        """What `condition` hands to the MLLM, for the same arguments. Runs no network and needs no weights."""
        pictures = self._pictures(image, references)
        ids, drop = self._prompt(instruction, len(pictures))
        patches = tuple(preprocess(picture, **self._bounds()) for picture in pictures)
        features = [unseen(one) for one in patches]
        whole = torch.tensor(self.mllm.expand(ids, features))
        return CondDocument(whole, self.mllm.positions(ids, features)[:, 0], patches, slice(drop, len(whole)))

    def _pictures(self, image: torch.Tensor | None, references: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if image is None and references:
            raise ConfigError(f"expected no references without a picture to edit, found {len(references)}")
        pictures = () if image is None else (image, *references)
        if len(pictures) > 1 and not self.plus:
            raise ConfigError(
                f"expected one picture, found {len(pictures)}: this is an original Qwen-Image-Edit checkpoint; "
                "references need an EditPlus checkpoint (2509 or 2511)"
            )
        return pictures

    def _bounds(self) -> dict[str, int]:
        return {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}

    def _prompt(self, instruction: str, n_images: int) -> tuple[list[int], int]:
        """Ids with one placeholder per picture, and how many leading tokens are dropped."""
        for token in RESERVED:
            if token in instruction:
                raise ConfigError(f"the instruction contains the control token {token}; remove it")
        if n_images:
            ids, head, drop = self.mllm.tokenize(self.template.prompt(instruction, n_images)), self._head_ids, self.drop
            if ids[: len(head)] != head:
                raise CheckpointError(
                    "the tokenizer joins the end of the prompt's head with what follows, so the number of dropped tokens "
                    "cannot be counted; state it as dropped_tokens in reasonedit.json"
                )
            return ids, drop
        ids, head = (self.mllm.tokenize(text) for text in (self.text_template.prompt(instruction, 0), self.text_template.head))
        if ids[: len(head)] != head:
            raise ConfigError(
                f"the caption {instruction[:40]!r} begins with characters that the tokenizer joins with the prompt before it; "
                "remove the blanks or line breaks at its start"
            )
        return ids, len(head)


def read_template(*, plus: bool, folder: Path | None = None) -> QwenTemplate:
    """The prompt of the Edit or EditPlus pipeline, out of the source text of the installed diffusers.

    Nothing of that source is run or imported. folder: a diffusers package folder to read in its place.
    """
    path = _pipeline_file(f"pipeline_qwenimage_edit{'_plus' if plus else ''}.py", folder)
    texts = _texts_of(path)
    # Told apart by what they must contain rather than by variable names, which diffusers may change.
    dialogues = [text for text in texts if text.count("{}") == 1 and text.startswith("<|im_start|>")]
    pictures = [text for text in texts if IMAGE_PAD in text and "<|im_start|>" not in text]
    found = (len(dialogues), len(pictures)) if plus else len(dialogues)
    if found != ((1, 1) if plus else 1) or (IMAGE_PAD in dialogues[0]) == plus:
        raise BackendUnavailable(
            f"expected one prompt{' and one picture label' if plus else ''} in diffusers' {path.name}, found {found}; "
            "this version of diffusers is not known to work, install a tested one (README)"
        )
    log.debug("prompt read from %s", path)
    return QwenTemplate(dialogues[0], pictures[0] if plus else None)


def read_text_template(*, folder: Path | None = None) -> QwenTemplate:
    """The prompt of the text to image pipeline, read like `read_template`."""
    path = _pipeline_file("pipeline_qwenimage.py", folder)
    dialogues = [text for text in _texts_of(path) if text.count("{}") == 1 and text.startswith("<|im_start|>")]
    if len(dialogues) != 1 or IMAGE_PAD in dialogues[0]:
        raise BackendUnavailable(
            f"expected one prompt without a picture in diffusers' {path.name}, found {len(dialogues)}; this version of "
            "diffusers is not known to work, install a tested one (README)"
        )
    return QwenTemplate(dialogues[0])


def _pipeline_file(name: str, folder: Path | None) -> Path:
    return (folder or _diffusers_folder()) / "pipelines" / "qwenimage" / name


def _texts_of(path: Path) -> set[str]:
    """Every string in a source file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise BackendUnavailable(
            f"expected the prompt of Qwen-Image in the source of diffusers, but {path.name} cannot be read ({error}); "
            "reinstall diffusers >= 0.37 with its .py files"
        ) from error
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _diffusers_folder() -> Path:
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("diffusers is not installed, but Qwen-Image needs it: pip install 'diffusers>=0.37'")
    return Path(next(iter(spec.submodule_search_locations)))
