"""Numbers that belong to a checkpoint: pixel bounds, sizes, steps, guidance.

They are read from the weights folder, so that a checkpoint trained at another size runs without a flag: first
`reasonedit.json` (beside model_index.json), then, for Qwen-Image, the processor's own configuration, then the released
values of `RELEASED`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError

FILE_NAME = "reasonedit.json"
_CELL = 28 * 28  # one vision token covers 28 x 28 pixels


class Settings(BaseModel):
    """What `reasonedit.json` may state. Pixel bounds are (min, max) areas in pixels.

    conditioner_pixels: pictures that condition the denoiser; reasoner_pixels, reasoner_max_side: pictures that the reasoner
    looks at (long side shrunk first); condition_area: area of a Qwen-Image EditPlus condition picture; size_level: square
    root of the generated area; multiple: what a generated side is a multiple of; dropped_tokens: leading tokens cut from
    the conditioning (None: what the dialogue pack says). schedule: `lightning` for a Qwen-Image checkpoint that a Lightning
    LoRA distilled (guidance 1, 4 or 8 steps); `checkpoint` for the scheduler's own configuration.

    What a checkpoint of one's own may differ in. dialogue: `own` when it was trained with this package's wording, which is
    then spoken unless the user names a pack. reply_tokens: most tokens that its MLLM writes in one reply (None: what the
    dialogue pack says). scores: what its MLLM learnt to score beside consistency; it is asked for nothing else. latents: `own`
    when its VAE is not the released one. pictures: what it can edit; `miniature`: only the drawn scenes of `mini.world`.
    notice: a sentence for everybody who loads it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(28, ge=1, le=1000)
    guidance: float = Field(6.0, ge=0.0, le=100.0)
    size_level: int = Field(1024, ge=16, le=8192)
    multiple: int = Field(16, ge=16)
    conditioner_pixels: tuple[int, int] = (256 * _CELL, 400 * _CELL)
    reasoner_pixels: tuple[int, int] = (262144, 802816)
    reasoner_max_side: int | None = Field(1024, ge=28)
    condition_area: int = Field(384 * 384, ge=_CELL)
    dropped_tokens: int | None = Field(None, ge=0)
    schedule: Literal["checkpoint", "lightning"] = "checkpoint"
    dialogue: Literal["released", "own"] = "released"
    reply_tokens: int | None = Field(None, ge=32, le=32768)
    scores: tuple[Literal["edit", "quality"], ...] = ("edit", "quality")
    latents: Literal["released", "own"] = "released"
    pictures: Literal["any", "miniature"] = "any"
    notice: str = Field("", max_length=500)

    @model_validator(mode="after")
    def _check(self) -> Settings:
        for name in ("conditioner_pixels", "reasoner_pixels"):
            low, high = getattr(self, name)
            if not _CELL <= low <= high:
                raise ValueError(f"{name} must be two areas with {_CELL} <= min <= max, found {[low, high]}")
        if self.multiple % 16:
            raise ValueError(f"multiple must be a multiple of 16 (8x VAE, 2x2 packing), found {self.multiple}")
        return self


# The values of the released pipelines: Step1X-Edit v1.0/v1.1 and v1p2 (their code overrides the processor's bounds), and
# diffusers' two Qwen-Image-Edit pipelines (which use the processor's bounds; these are the released processor's).
RELEASED: dict[str, Settings] = {
    "step1x-v1.0": Settings(conditioner_pixels=(256 * _CELL, 324 * _CELL)),
    "step1x-v1.1": Settings(conditioner_pixels=(256 * _CELL, 324 * _CELL)),
    "step1x-v1.2": Settings(),
    "qwen-edit": Settings(steps=50, guidance=4.0, multiple=32, conditioner_pixels=(3136, 12845056)),
    "qwen-edit-plus": Settings(steps=50, guidance=4.0, multiple=32, conditioner_pixels=(3136, 12845056)),
    # Not released: what ReasonBrain's base models are used with. 64: the UNet halves its latents three times.
    "reasonbrain-sd": Settings(steps=50, guidance=7.5, size_level=512, multiple=64),
    "reasonbrain-flux": Settings(steps=28, guidance=3.5),
}


def read_settings(folder: Path, kind: str, processor_pixels: tuple[int, int] | None = None) -> Settings:
    """Settings of the checkpoint in `folder`; `kind` names the row of RELEASED that fills the gaps.

    processor_pixels: the bounds in the folder's processor config. The Qwen-Image pipelines condition with them; the
    Step1X-Edit pipelines replace them by constants.

    Raises ConfigError naming file, key, what was expected and what was found.
    """
    values: dict = {}
    if kind.startswith("qwen") and processor_pixels:
        values["conditioner_pixels"] = processor_pixels
    path = Path(folder) / FILE_NAME
    if path.is_file():
        try:
            stated = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: expected a JSON object of settings, found unreadable text ({error}).") from error
        if not isinstance(stated, dict):
            raise ConfigError(f"{path}: expected a JSON object of settings, found {type(stated).__name__}.")
        values.update(stated)
    try:
        return Settings.model_validate({**RELEASED[kind].model_dump(), **values})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        known = ", ".join(Settings.model_fields)
        raise ConfigError(
            f"{path}: {key}: {first['msg']}; found {first.get('input')!r}. Correct or remove the entry; known keys: {known}."
        ) from error
