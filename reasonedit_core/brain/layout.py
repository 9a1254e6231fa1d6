"""The folder of a ReasonBrain system: what was trained, and where the networks lie that it was trained around.

    DIR/brain.safetensors   every trained tensor, with widths and switches in its metadata (`conditioners.brain_weights`)
    DIR/lora/               LLaVA's LoRA and the rows of its [IMG] tokens, a PEFT folder
    DIR/llava/              LLaVA, in transformers' layout
    DIR/unet/ or transformer/, vae/, text_encoder/, tokenizer/, scheduler/
                            the diffusion model, in diffusers' layout: SD 1.5, SD 2.1, or FLUX.1-dev
    DIR/segmenter/          SAM or SAM 2, in transformers' layout, where the region branch shall use one
    DIR/reasonbrain.json    optional: where the parts lie instead, and how they are used (`BrainSettings`)
    DIR/reasonedit.json     optional: steps, guidance, size (`settings.Settings`)

Parts are large and shared by several checkpoints, so each may lie elsewhere: `{"parts": {"llava": "../llava-1.5-7b-hf"}}`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..conditioners.brain_weights import FILE as TRAINED
from ..errors import CheckpointError, ConfigError
from ..files import write_json
from ..weightfiles import read_json

SETTINGS = "reasonbrain.json"
DIFFUSION = ("vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")
NETWORKS = {"unet": "sd", "transformer": "flux"}
PARTS = ("llava", "diffusion", "segmenter", *NETWORKS, *DIFFUSION, *SECOND)
"""What `parts` of reasonbrain.json may name. diffusion: a folder that holds all parts of the diffusion model."""

Kind = Literal["sd", "flux"]


class BrainSettings(BaseModel):
    """What `reasonbrain.json` may state. Paths are relative to its folder.

    parts: where a part lies that is not in the folder; `PARTS` are the names. segmenter: auto (SAM or SAM 2 of the part
    `segmenter`), grid or grid:SIDE (fixed boxes, 4 or SIDE on each side, no network), cached:DIR (masks that were found
    before), none (the user's masks alone).
    extractor: who names the objects where the user does not: auto, mllm (the reasoner's), spacy:DIR, rules, whole (the
    instruction is the one object). switches: parts of the model to leave out, fields of `models.reasonbrain.spec.Switches`.
    image_guidance: how far the source is followed (three-pass guidance of SD; FLUX has none).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: dict[Literal[PARTS], str] = Field(default_factory=dict)
    segmenter: str = "auto"
    extractor: str = "auto"
    switches: dict[str, bool | str] = Field(default_factory=dict)
    image_guidance: float = Field(1.5, ge=0.0, le=100.0)


@dataclass(frozen=True, slots=True)
class BrainParts:
    """The folders of one system.

    root: where reasonedit.json is looked for. trained: the folder of brain.safetensors, None before any training. kind: sd or
    flux, after the network that is there. text_encoder_2, tokenizer_2: FLUX's T5. segmenter: None where there is none.
    """

    root: Path
    trained: Path | None
    kind: Kind
    llava: Path
    network: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    scheduler: Path | None
    text_encoder_2: Path | None = None
    tokenizer_2: Path | None = None
    segmenter: Path | None = None
    settings: BrainSettings = BrainSettings()

    @property
    def around(self) -> dict[str, Path]:
        """The networks whose states and latents the trained tensors are made for; a checkpoint notes which they were."""
        return {"llava": self.llava, "denoiser": self.network}


def read_brain_settings(folder: Path) -> BrainSettings:
    """Settings of the system in `folder`, the defaults without a file. Raises ConfigError naming file and key."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return BrainSettings()
    try:
        return BrainSettings.model_validate(read_json(path))
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        known = ", ".join(BrainSettings.model_fields)
        raise ConfigError(
            f"{path}: {key}: {first['msg']}; found {first.get('input')!r}. Correct or remove the entry; known keys: {known}, "
            f"and as parts {', '.join(PARTS)}."
        ) from error


def change_settings(settings: BrainSettings, changes: Mapping[str, Any]) -> BrainSettings:
    """The settings with some fields replaced. Raises ConfigError for unknown names and bad values."""
    try:
        return BrainSettings.model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{key}: {first['msg']}; found {first.get('input')!r}. Correct or leave it out.") from error


def find_brain_parts(weights: str | Path, *, trained: bool = True) -> BrainParts:
    """Find the parts of a ReasonBrain. trained: whether brain.safetensors must be there (training begins without).

    Raises CheckpointError, which names what is missing, and ConfigError for reasonbrain.json.
    """
    root = Path(weights)
    if not root.is_dir():
        raise CheckpointError(
            f"expected a folder of a ReasonBrain at {root}, found {'a file' if root.is_file() else 'nothing'}. Name the folder "
            f"that holds {TRAINED}."
        )
    settings = read_brain_settings(root)
    has = (root / TRAINED).is_file()
    if trained and not has:
        raise CheckpointError(
            f"{root}: expected {TRAINED}, found none. Name a folder that training has written; no weights of ReasonBrain are "
            "published."
        )

    def place(name: str) -> Path | None:
        if name in settings.parts:
            named = root / settings.parts[name]
            if not named.is_dir():
                raise CheckpointError(
                    f"{root / SETTINGS}: parts.{name}: expected a folder at {named}, found none. Correct the path."
                )
            return named
        inside = (diffusion if name in (*NETWORKS, *DIFFUSION, *SECOND) else root) / name
        return inside if inside.is_dir() else None

    diffusion = root
    if "diffusion" in settings.parts:
        diffusion = place("diffusion")
    elif (root / "diffusion").is_dir():
        diffusion = root / "diffusion"
    found = {name: place(name) for name in PARTS if name != "diffusion"}
    networks = [name for name in NETWORKS if found[name]]
    missing = [name for name in ("llava", "vae", "text_encoder", "tokenizer") if not found[name]]
    if len(networks) != 1 or missing:
        absent = [*([] if len(networks) == 1 else ["single unet (SD) or transformer (FLUX)"]), *missing]
        both = " (there are both)" if len(networks) == 2 else ""
        raise CheckpointError(
            f"{root}: expected the parts of a ReasonBrain, found no {', no '.join(absent)}{both}. Put the folders here, or "
            f"name their places in {SETTINGS} (parts)."
        )
    network = networks[0]
    return BrainParts(
        root,
        root if has else None,
        NETWORKS[network],
        network=found[network],
        settings=settings,
        **{name: found[name] for name in ("llava", *DIFFUSION, *SECOND, "segmenter")},
    )


def write_brain_settings(folder: str | Path, parts: BrainParts | Mapping[str, Path], **values: Any) -> Path:
    """Write reasonbrain.json, by which a folder of trained tensors finds its parts. values: other fields of BrainSettings.

    parts: those it was trained around, or by name; those inside `folder` go without saying. Paths are written relative to it
    where they have a common root.
    """
    folder = Path(folder).resolve()
    if isinstance(parts, BrainParts):
        names = [*DIFFUSION, *SECOND, "llava", "segmenter"]
        network = next(name for name, kind in NETWORKS.items() if kind == parts.kind)
        parts = {network: parts.network, **{name: getattr(parts, name) for name in names if getattr(parts, name)}}
    told = {name: _relative(Path(path), folder) for name, path in parts.items() if Path(path).resolve() != folder / name}
    settings = BrainSettings.model_validate({**values, "parts": told})
    stated = settings.model_dump(exclude_defaults=True)
    return write_json(folder / SETTINGS, stated)


def _relative(path: Path, folder: Path) -> str:
    path = path.resolve()
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return path.as_posix()


def encoder_width(folder: Path) -> int:
    """Width of a text encoder, from its config.json (CLIP: hidden_size, T5: d_model). Raises CheckpointError."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    width = config.get("hidden_size") or config.get("d_model")
    if not isinstance(width, int):
        raise CheckpointError(f"{folder}: expected a text encoder whose config.json states its width, found none.")
    return width
