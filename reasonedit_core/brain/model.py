"""The networks of a ReasonBrain, loaded from their folders: for the generator, and for training to begin with or to go on.

parts = find_brain_parts(DIR)                   where everything lies
model = load_brain_model(parts)                 a trained one, strictly
model = new_brain_model(parts, "3b")            one to be trained: base models as they are, new modules from a seed
save_brain_model(DIR, model, parts)             what was trained, and where its parts lie
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..conditioners.brain_weights import FILE, add_denoiser_lora, load_brain, read_note, save_brain, warn_of_other_parts
from ..conditioners.reasonbrain import ReasonBrainConditioner
from ..conditioners.text_states import TextStates, load_text_states
from ..errors import CheckpointError, ConfigError
from ..models.reasonbrain.spec import PRESETS, BrainSpec, Switches
from ..weightfiles import read_json, read_shapes, weight_files
from .layout import BrainParts, Kind, encoder_width, write_brain_settings

if TYPE_CHECKING:
    from ..latents import FluxCodec, SDCodec
    from ..mllm.llava import Llava
    from ..models.reasonbrain.brain import ReasonBrain

log = logging.getLogger(__name__)

FIRST = {"sd": "conv_in", "flux": "x_embedder"}
"""The layer of the denoiser that is widened to see the source."""

OnPart = Callable[[str], None]
"""Called with the name of a part before it is loaded."""


@dataclass(frozen=True, slots=True)
class BrainModel:
    """A ReasonBrain in memory. conditioner: has the modules (`brain`), LLaVA (`llava`) and the text encoder (`text`).

    network: the widened UNet or FLUX transformer. scheduler: the base model's scheduler configuration, {} where it has none.
    report: tensors that a checkpoint filled, by part; {} before training.
    """

    conditioner: ReasonBrainConditioner
    network: nn.Module
    codec: SDCodec | FluxCodec
    kind: Kind
    scheduler: Mapping[str, Any]
    report: Mapping[str, int]

    @property
    def brain(self) -> ReasonBrain:
        """FRCE, assembler, QFormer and CME."""
        return self.conditioner.brain

    @property
    def llava(self) -> Llava:
        """LLaVA with its [IMG] tokens."""
        return self.conditioner.llava

    def switched(self, changes: Mapping[str, bool | str]) -> BrainModel:
        """The same model with parts of its modules left out; this one stays as it is. changes: fields of `Switches`.

        Raises ConfigError for names that are none, and for parts that the checkpoint has no weights for.
        """
        from ..models.reasonbrain.brain import ReasonBrain

        try:
            switches = replace(self.brain.switches, **changes)
        except TypeError as error:
            known = ", ".join(Switches.__dataclass_fields__)
            raise ConfigError(f"switches: expected names out of {known}, found {', '.join(changes)}.") from error
        own, less = self.brain.state_dict(), ReasonBrain(self.brain.spec, switches)
        absent = [key for key in less.state_dict() if key not in own]
        if absent:
            raise ConfigError(
                f"switches: expected parts that this checkpoint was trained with, found {len(absent)} tensors that it does not "
                f"have ({absent[0]}, ...). Switch parts off, and not on."
            )
        one = next(iter(own.values()))
        less.to(one.device, one.dtype).load_state_dict({key: own[key] for key in less.state_dict()})
        conditioner = copy.copy(self.conditioner)
        conditioner.brain = less.train(self.brain.training).requires_grad_(False)
        return replace(self, conditioner=conditioner)

    def stack(self, *more: nn.Module) -> nn.Module:
        """Everything that conditions, as one module for a mover. more: such as the network of a segmenter."""
        encoders = [text.model for text in (self.conditioner.text, self.conditioner.pooler) if text is not None]
        return Stack([self.llava.model, self.brain, *encoders, *more])


class Stack(nn.Module):
    """Networks that are moved together. Its blocks, where they are streamed, are those of the first."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(dict.fromkeys(networks))
        language = getattr(getattr(networks[0], "model", None), "language_model", None)
        self._no_split_modules = list(getattr(language, "_no_split_modules", None) or ())


def load_brain_model(
    parts: BrainParts,
    *,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    switches: Mapping[str, bool | str] | None = None,
    on_part: OnPart = lambda part: None,
) -> BrainModel:
    """A trained ReasonBrain, frozen and in eval mode. switches: parts to leave out, beside those that training left out.

    Raises CheckpointError for a folder without trained tensors, for any tensor that is missing, unknown or of another shape,
    and for parts that do not fit each other; ConfigError for switches that the checkpoint has no weights for.
    """
    if parts.trained is None:
        raise CheckpointError(f"{parts.root}: expected {FILE}, found none. Train one, or name a folder that training wrote.")
    from ..models.reasonbrain.brain import ReasonBrain

    note = read_note(parts.trained)
    llava, text, pooler, network, codec = _load_parts(parts, note.spec, dtype, vae_dtype or dtype, device, on_part)
    on_part("ReasonBrain")
    network.requires_grad_(False)
    if note.denoiser_lora is not None:
        add_denoiser_lora(network, **note.denoiser_lora)
    brain = ReasonBrain(note.spec, note.switches).to(device, dtype)
    conditioner = ReasonBrainConditioner(brain, llava, text, pooler=pooler)  # widths are checked before shapes
    _check_widths(note.spec, parts.kind, network, parts.root)
    narrow = read_json(parts.network / "config.json").get("in_channels") == _channels(parts.kind, network) // 2
    report = load_brain(parts.trained, brain, llava, network)
    if narrow and f"denoiser.{FIRST[parts.kind]}.weight" not in read_shapes(parts.trained / FILE):
        raise CheckpointError(
            f"{parts.trained / FILE}: expected the denoiser's trained {FIRST[parts.kind]}, found none, and "
            f"{parts.network} is a base model that does not see the source. Save with the denoiser, or name the trained one."
        )
    warn_of_other_parts(parts.trained, parts.around)
    log.info("%s: %s", parts.trained, ", ".join(f"{count} tensors of {part}" for part, count in report.items()))
    for module in (brain, llava.model, network):
        module.eval().requires_grad_(False)
    model = BrainModel(conditioner, network, codec, parts.kind, _scheduler(parts), report)
    return model.switched(switches) if switches else model


def new_brain_model(
    parts: BrainParts,
    preset: str | BrainSpec,
    *,
    switches: Switches | None = None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_part: OnPart = lambda part: None,
) -> BrainModel:
    """A ReasonBrain to be trained: base models as they are, new modules in float32 from `seed`. All are frozen but the new.

    preset: a name of PRESETS, or widths of one's own; what the parts decide (widths of LLaVA, text encoder and denoiser) is
    taken from them. LLaVA's LoRA is not there yet (`Llava.add_lora`).
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {preset!r}.")
    from ..models.reasonbrain.brain import ReasonBrain

    spec = PRESETS[preset] if isinstance(preset, str) else preset
    llava, text, pooler, network, codec = _load_parts(parts, spec, dtype, vae_dtype or dtype, device, on_part, seed)
    network.requires_grad_(False)
    context, channels = _denoiser_widths(parts.kind, network)
    spec = replace(spec, **llava.widths, text=text.width, context=context, channels=channels, img_tokens=len(llava.img_names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        brain = ReasonBrain(spec, switches).to(device)
    conditioner = ReasonBrainConditioner(brain, llava, text, pooler=pooler)
    return BrainModel(conditioner, network, codec, parts.kind, _scheduler(parts), {})


def save_brain_model(folder: str | Path, model: BrainModel, parts: BrainParts) -> Path:
    """Write what was trained (of the denoiser: what requires a gradient) and reasonbrain.json; -> the folder.

    `load_brain_model(find_brain_parts(folder))` gives the same model. Settings of the folder that `parts` came from stay.
    """
    folder = Path(folder)
    save_brain(folder, model.brain, model.llava, model.network, parts.around)
    write_brain_settings(folder, parts, **parts.settings.model_dump(exclude={"parts"}))
    return folder


def _load_parts(
    parts: BrainParts,
    spec: BrainSpec,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    device: torch.device | str,
    on_part: OnPart,
    seed: int = 0,
) -> tuple[Llava, TextStates, TextStates | None, nn.Module, SDCodec | FluxCodec]:
    """LLaVA, the encoder of E_T, the one of FLUX's pooled vector, the widened denoiser, the VAE."""
    from ..denoisers.flux import load_flux
    from ..denoisers.unet import load_unet
    from ..latents import FluxCodec, SDCodec
    from ..mllm.llava import load_llava

    place = {"dtype": dtype, "device": device}
    on_part("LLaVA")
    llava = load_llava(parts.llava, img_tokens=spec.img_tokens, seed=seed, **place)
    on_part("text encoder")
    encoder, tokenizer = parts.text_encoder, parts.tokenizer
    second = parts.text_encoder_2 is not None and parts.tokenizer_2 is not None
    if second and encoder_width(encoder) != spec.text == encoder_width(parts.text_encoder_2):
        encoder, tokenizer = parts.text_encoder_2, parts.tokenizer_2
    text, pooler = load_text_states(encoder, tokenizer, **place), None
    if parts.kind == "flux":
        pooler = text if encoder is parts.text_encoder else load_text_states(parts.text_encoder, parts.tokenizer, **place)
    on_part("denoiser")
    network = (load_unet if parts.kind == "sd" else load_flux)(parts.network, **place).eval()
    on_part("VAE")
    codec = (SDCodec if parts.kind == "sd" else FluxCodec)(_load_vae(parts.vae, vae_dtype, device))
    return llava, text, pooler, network, codec


def _load_vae(path: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    from diffusers import AutoencoderKL

    found = read_json(path / "config.json").get("_class_name") if (path / "config.json").is_file() else None
    if found != "AutoencoderKL":
        raise CheckpointError(f"{path}: expected an AutoencoderKL, found {found or 'no config.json'}. Name the vae folder.")
    weight_files(path)
    vae = AutoencoderKL.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
    return vae.to(device).eval().requires_grad_(False)


def _scheduler(parts: BrainParts) -> dict[str, Any]:
    file = parts.scheduler / "scheduler_config.json" if parts.scheduler else None
    return read_json(file) if file is not None and file.is_file() else {}


def _channels(kind: Kind, network: Any) -> int:
    first = getattr(network, FIRST[kind])
    return first.in_channels if kind == "sd" else first.in_features


def _denoiser_widths(kind: Kind, network: Any) -> tuple[int, int]:
    """Width of the context, and channels behind the first layer."""
    if kind == "sd":
        return network.config.cross_attention_dim, network.conv_in.out_channels
    return network.config.joint_attention_dim, network.x_embedder.out_features


def _check_widths(spec: BrainSpec, kind: Kind, network: Any, root: Path) -> None:
    wanted = _denoiser_widths(kind, network)
    if (spec.context, spec.channels) != wanted:
        raise CheckpointError(
            f"{root}: expected a ReasonBrain for this denoiser (context {wanted[0]}, {wanted[1]} channels), found one for a "
            f"context of {spec.context} and {spec.channels} channels. Load it with the denoiser it was trained on."
        )
