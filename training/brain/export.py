"""A trained ReasonBrain for other programs, and as a folder that needs no other.

comfyui   NAME_unet.safetensors: the trained UNet with its LoRA merged, 8 input channels, under the names of the original
          latent-diffusion code. ComfyUI's "Load Diffusion Model" takes it where it is of SD 1.5's widths.
peft      NAME_reasonbrain/: brain.safetensors, lora/ (a PEFT folder) and reasonbrain.json, to go on training from
merged    NAME_merged/: the same with all parts, the UNet merged; `reasonedit edit --system reasonbrain` runs it
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...reasonedit_core.brain.generator import sd_schedule
from ...reasonedit_core.brain.layout import DIFFUSION, SECOND, find_brain_parts, write_brain_settings
from ...reasonedit_core.conditioners.brain_weights import FILE, save_brain
from ...reasonedit_core.errors import ConfigError
from ..adapters import write_tensors
from ..export import FORMATS, Exported

if TYPE_CHECKING:
    from torch import nn

    from ...reasonedit_core.brain.layout import BrainParts
    from ...reasonedit_core.brain.model import BrainModel

PREFIX = "model.diffusion_model."
SD15 = {"cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
"""What ComfyUI knows an 8-channel UNet by; of SD 2.x it knows none."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ALONE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def export(folder: Path, format: str, out: Path, name: str) -> Exported:
    """Write the trained system in `folder` in one of FORMATS. ConfigError for what a format has no place for."""
    if format not in FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}.")
    parts = find_brain_parts(folder)
    if format == "peft":
        place = out / f"{name}_reasonbrain"
        shutil.copytree(folder, place, dirs_exist_ok=True)
        write_brain_settings(place, parts, **parts.settings.model_dump(exclude={"parts"}))
        return Exported((place,), (f"{place}: what was trained, for training on and for `--system reasonbrain`.",))
    from ...reasonedit_core.brain.model import load_brain_model

    if format == "comfyui" and parts.kind != "sd":
        raise ConfigError(
            "format comfyui: expected a UNet of Stable Diffusion, found FLUX, whose widened transformer ComfyUI reads only "
            "through our nodes. Use the format merged, or peft."
        )
    model = load_brain_model(parts)
    merge_denoiser(model.network)
    if format == "merged":
        place = _write_whole(model, parts, out / f"{name}_merged")
        return Exported((place,), (f"{place}: a whole system; `reasonedit edit --system reasonbrain` takes the folder.",))
    path = write_comfyui(model.network, out / f"{name}_unet.safetensors")
    config = model.network.config
    known = all(tuple(_listed(config[key])) == tuple(_listed(value)) for key, value in SD15.items())
    where = "ComfyUI's Load Diffusion Model (models/diffusion_models) and the node ReasonBrain_Apply take it"
    if not known:
        where = "not of SD 1.5's widths, so ComfyUI itself does not know it; ReasonBrain_Edit runs the trained folder instead"
    if sd_schedule(model.scheduler).config.prediction_type == "v_prediction":
        zero = ", zsnr on" if model.scheduler.get("rescale_betas_zero_snr") else ""
        where += (
            f". It predicts v, which the file cannot say: put the node ModelSamplingDiscrete (sampling v_prediction{zero}) "
            "behind the loader, or its pictures are noise"
        )
    return Exported((path,), (f"{path}: the UNet with 8 input channels; {where}.",))


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def merge_denoiser(network: nn.Module) -> None:
    """Put a LoRA of the denoiser into its weights, in place; without one nothing happens."""
    if getattr(network, "peft_config", None):
        network.fuse_lora()
        network.unload_lora()


def write_comfyui(unet: nn.Module, path: Path) -> Path:
    """The UNet (merged) as one file under the original names."""
    state = ldm_names(unet.state_dict(), unet.config.layers_per_block)
    tensors = {f"{PREFIX}{key}": tensor.detach().cpu() for key, tensor in state.items()}
    return write_tensors(path, tensors, {"reasonedit.system": "reasonbrain", "reasonedit.part": "unet"})


def ldm_names(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A UNet's tensors under diffusers' names -> under those of the original latent-diffusion code. layers: resnets of a block
    on the way down (layers_per_block). ConfigError for a name that such a UNet does not have."""
    attentive = {match[2] for key in state if (match := _BLOCK.match(key)) and match[1] == "up" and match[3] == "attentions"}
    return {_ldm_name(key, layers, attentive): tensor for key, tensor in state.items()}


def _ldm_name(key: str, layers: int, attentive: set[str]) -> str:
    for name, other in _ALONE.items():
        if key.startswith(f"{name}."):
            rest = key.removeprefix(f"{name}.")
            return f"{other}.{_inner(rest) if '.resnets.' in name else rest}"
    match = _BLOCK.match(key)
    if match is None:
        raise ConfigError(f"expected the UNet of Stable Diffusion 1.x or 2.x, found one with {key}. Use the format merged.")
    way, block, kind, number, rest = match.groups()
    place = int(block) * (layers + 1) + int(number)  # both ways have layers + 1 places a block
    if way == "down":
        if kind == "downsamplers":
            return f"input_blocks.{int(block) * (layers + 1) + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{place + 1}.{_part(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{1 + (block in attentive)}.{rest}"
    return f"output_blocks.{place}.{_part(kind, rest)}"


def _part(kind: str, rest: str) -> str:
    return f"0.{_inner(rest)}" if kind == "resnets" else f"1.{rest}"


def _inner(rest: str) -> str:
    name, _, leaf = rest.partition(".")
    return f"{_RESNET[name]}.{leaf}"


def _write_whole(model: BrainModel, parts: BrainParts, place: Path) -> Path:
    if (place / FILE).is_file():
        raise ConfigError(f"expected no {FILE} in {place}, found one. Name another folder with --to, or remove it.")
    place.mkdir(parents=True, exist_ok=True)
    for name in ("llava", *DIFFUSION, *SECOND, "segmenter"):
        folder = getattr(parts, name)
        if folder is not None:
            shutil.copytree(folder, place / name, dirs_exist_ok=True)
    model.network.save_pretrained(place / ("unet" if parts.kind == "sd" else "transformer"))
    settings = parts.root / "reasonedit.json"
    if settings.is_file():
        shutil.copy2(settings, place / settings.name)
    write_brain_settings(place, {}, **parts.settings.model_dump(exclude={"parts"}))
    around = {"llava": place / "llava", "denoiser": place / ("unet" if parts.kind == "sd" else "transformer")}
    save_brain(place, model.brain, model.llava, around=around)  # last: where it is, all is there
    return place
