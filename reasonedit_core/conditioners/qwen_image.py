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

from ..errors import BackendUnavailable, CheckpointError, ConfigError
from ..types import Conditioning

if TYPE_CHECKING:
    import torch

    from ..mllm.qwen25vl import QwenVL

log = logging.getLogger(__name__)

VISION_START, IMAGE_PAD = "<|vision_start|>", "<|image_pad|>"
RESERVED = (VISION_START, "<|vision_end|>", IMAGE_PAD, "<|video_pad|>", "<|im_start|>", "<|im_end|>")

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 16384
"""The released processor's bounds on the picture the MLLM sees; a checkpoint's own processor config overrides them."""


@dataclass(frozen=True, slots=True)
class QwenTemplate:
    """The prompt of a Qwen-Image editing pipeline.

    dialogue: the whole text with `{}` where the instruction goes. picture: the text that stands for one of several
    pictures, `{}` being its number; None when `dialogue` itself holds the one vision block.
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
        """What comes before the first picture; the states of these tokens are dropped."""
        return self.dialogue.partition("{}")[0].partition(VISION_START)[0]


class QwenImageConditioner:
    """Pictures + instruction -> Conditioning of a Qwen-Image editing transformer.

    plus: the EditPlus prompt (2509, 2511), which names each of several pictures; otherwise Edit, which takes one picture.
    min_pixels, max_pixels: bounds of the MLLM's own resize, from the checkpoint's processor config.
    template: read from the installed diffusers when None. drop: number of leading tokens dropped, if the checkpoint states
    one; otherwise counted.
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
    ) -> None:
        self.mllm = mllm
        self.plus = plus
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.template = template or read_template(plus=plus)
        self._head_ids = mllm.tokenize(self.template.head) if drop is None else []
        self.drop = len(self._head_ids) if drop is None else drop

    def condition(
        self,
        image: torch.Tensor,
        instruction: str,
        *,
        grid: tuple[int, int] | None = None,
        references: Sequence[torch.Tensor] = (),
        released: bool = False,
    ) -> Conditioning:
        """Tokens (1, T, D) for the picture being edited and, behind it, the references in their order.

        Each picture is (1, 3, h, w) in 0..1 at the size that `QwenGeometry` plans for the MLLM. Neither grid nor released
        changes the result: this system has no weak point here that the default policy would mend.
        """
        pictures = (image, *references)
        if len(pictures) > 1 and not self.plus:
            raise ConfigError(
                f"expected one picture, found {len(pictures)}: this is an original Qwen-Image-Edit checkpoint; "
                "references need an EditPlus checkpoint (2509 or 2511)"
            )
        for token in RESERVED:
            if token in instruction:
                raise ConfigError(f"the instruction contains the control token {token}; remove it")
        ids = self.mllm.tokenize(self.template.prompt(instruction, len(pictures)))
        if ids[: len(self._head_ids)] != self._head_ids:
            raise CheckpointError(
                "the tokenizer joins the end of the prompt's head with what follows, so the number of dropped tokens "
                "cannot be counted; state it as dropped_tokens in reasonedit.json"
            )
        features = [
            self.mllm.vision(picture, min_pixels=self.min_pixels, max_pixels=self.max_pixels) for picture in pictures
        ]
        embeds = self.mllm.embed(ids, features)
        states = self.mllm.states(embeds, self.mllm.positions(ids, features))
        return Conditioning(tokens=states[:, self.drop :])


def read_template(*, plus: bool, folder: Path | None = None) -> QwenTemplate:
    """The prompt of the Edit or EditPlus pipeline, out of the source text of the installed diffusers.

    Nothing of that source is run or imported. folder: a diffusers package folder to read in its place.
    """
    root = folder or _diffusers_folder()
    path = root / "pipelines" / "qwenimage" / f"pipeline_qwenimage_edit{'_plus' if plus else ''}.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise BackendUnavailable(
            f"expected the prompt of Qwen-Image-Edit in the source of diffusers, but {path.name} cannot be read "
            f"({error}); reinstall diffusers >= 0.37 with its .py files"
        ) from error
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
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


def _diffusers_folder() -> Path:
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("diffusers is not installed, but Qwen-Image needs it: pip install 'diffusers>=0.37'")
    return Path(next(iter(spec.submodule_search_locations)))
