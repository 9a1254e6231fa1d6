"""What a path holds: which system, which part of it, which version, under which key names.

Folders are known by their model_index.json or config.json, single files by the names of their tensors; no tensor is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from .errors import CheckpointError
from .weightfiles import find_prefix, read_json, read_shapes

logger = logging.getLogger(__name__)

Kind = Literal["pipeline", "transformer", "text_encoder", "vae", "lora"]

STEP1X = "reasonedit-s"
QWEN = "reasonedit-q"

ZERO_COND_T = "__index_timestep_zero__"
"""Empty buffer by which ComfyUI files of Qwen-Image-Edit-2511 say that references are modulated with t = 0."""
LAYERED = "time_text_embed.addition_t_embedding.weight"

PIPELINES = {
    "Step1XEditPipelineV1P2": (STEP1X, "v1.2"),
    "Step1XEditPipeline": (STEP1X, "v1.1"),
    "QwenImageEditPipeline": (QWEN, "edit"),
    "QwenImageEditPlusPipeline": (QWEN, "edit-plus"),
}
_COMPONENTS = ("transformer", "text_encoder", "vae")
_MORE_COMPONENTS = ("tokenizer", "processor", "scheduler")
_COMPONENT_CLASSES = {
    "Step1XEditTransformer2DModel": ("transformer", STEP1X),
    "QwenImageTransformer2DModel": ("transformer", QWEN),
    "AutoencoderKL": ("vae", STEP1X),
    "AutoencoderKLQwenImage": ("vae", QWEN),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """What was found at `path`.

    system: reasonedit-s | reasonedit-q | "" for a part that serves both (the MLLM, most LoRAs). kind: pipeline (several
    parts), transformer, text_encoder, vae, lora. variant: v1.0 | v1.1 | v1.2 for S; edit | edit-plus for Q where a
    model_index.json or zero_cond_t says so; else "" (keys do not tell). names: key names of the transformer or part:
    original | diffusers | bfl | wan | hf | lora. zero_cond_t: Qwen-Image-Edit-2511. components: name -> file or folder.
    """

    path: Path
    kind: Kind
    system: str = ""
    variant: str = ""
    names: str = ""
    zero_cond_t: bool = False
    components: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))


def detect(path: str | Path) -> Layout:
    """The layout of a checkpoint folder or single file; CheckpointError where it is none that this package runs."""
    path = Path(path)
    if not path.is_dir():
        return detect_keys(read_shapes(path), path)
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    if (path / "adapter_config.json").is_file():
        return Layout(path, "lora", names="lora")
    if (path / "config.json").is_file():
        return _component(path)
    if any(path.glob("*.safetensors.index*.json")):
        return detect_keys(read_shapes(path), path)
    # Clones of ComfyUI's own weight repositories hold their folders below this one.
    return _loose_files(path / "split_files" if (path / "split_files").is_dir() else path)


def detect_keys(keys: Iterable[str], path: Path = Path()) -> Layout:
    """The layout of a state with these keys. A host's prefix before them is seen through."""
    keys = set(keys)

    def has(*markers: str) -> bool:
        return any(find_prefix(keys, marker) is not None for marker in markers)

    if has("double_blocks.0.img_attn.qkv.weight"):
        if not has("connector.S.input_embedder.weight"):
            raise CheckpointError(
                f"{path}: expected a Step1X-Edit transformer, found FLUX keys without `connector.*`: this is a FLUX model "
                "or a part of Step1X-Edit. Name the Step1X-Edit file."
            )
        return Layout(path, "transformer", STEP1X, step1x_variant(keys), "original")
    if has("connector.S.input_embedder.weight") and has("transformer_blocks.0.attn.add_q_proj.weight"):
        return Layout(path, "transformer", STEP1X, step1x_variant(keys), "diffusers")
    if has("transformer_blocks.0.img_mod.1.weight") and has("txt_norm.weight"):
        if has(LAYERED):
            raise CheckpointError(
                f"{path}: expected Qwen-Image-Edit, found Qwen-Image-Layered (`{LAYERED}`), which splits pictures into "
                "layers and does not edit them. Use Qwen-Image-Edit, -2509 or -2511."
            )
        zero = has(ZERO_COND_T)
        return Layout(path, "transformer", QWEN, "edit-plus" if zero else "", "diffusers", zero)
    if any(".lora_" in key or "lora_unet_" in key or ".lokr_" in key or ".hada_" in key for key in keys):
        return Layout(path, "lora", names="lora")
    if has("visual.patch_embed.proj.weight"):
        return Layout(path, "text_encoder", names="hf")
    if has("encoder.downsamples.0.residual.0.gamma"):
        return Layout(path, "vae", QWEN, names="wan")
    if has("encoder.mid_block.resnets.0.norm1.gamma"):
        return Layout(path, "vae", QWEN, names="diffusers")
    if has("encoder.down.0.block.0.conv1.weight"):
        return Layout(path, "vae", STEP1X, names="bfl")
    if has("encoder.down_blocks.0.resnets.0.conv1.weight"):
        return Layout(path, "vae", STEP1X, names="diffusers")
    sample = ", ".join(sorted(keys)[:3]) or "no tensors"
    raise CheckpointError(
        f"{path}: expected weights of Step1X-Edit, Qwen-Image-Edit, Qwen2.5-VL, the FLUX or Qwen-Image VAE, or a LoRA; "
        f"found {len(keys)} keys such as {sample}. Name one of these files."
    )


def step1x_variant(keys: Iterable[str]) -> str:
    """v1.0 | v1.1 | v1.2 as far as keys tell: v1.2 without text mapping looks like v1.1."""
    keys = set(keys)
    if find_prefix(keys, "connector.scale_factor") is not None:
        return "v1.0"
    return "v1.2" if find_prefix(keys, "text_token_mapping.weight") is not None else "v1.1"


def find_component(path: str | Path, name: str) -> Path:
    """Where the part `name` (transformer, vae, text_encoder) of `path` lies: a file or folder, or `path` itself."""
    path = Path(path)
    if path.is_dir():
        if (path / name).is_dir():
            return path / name
        if not (path / "config.json").is_file():
            layout = detect(path)
            if layout.kind != name and name not in layout.components:
                raise CheckpointError(f"{path}: expected a {name} in it, found {_parts(layout)}. Name its file.")
            return layout.path if layout.kind == name else layout.components[name]
    return path


def pipeline_variant(path: Path) -> str:
    """The variant that a model_index.json in `path`, or in the folder above it, states; "" without one."""
    for folder in (path, path.parent):
        index = folder / "model_index.json"
        if index.is_file():
            return PIPELINES.get(read_json(index).get("_class_name", ""), ("", ""))[1]
    return ""


def _pipeline(path: Path) -> Layout:
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise CheckpointError(
            f"{path / 'model_index.json'}: expected one of {', '.join(PIPELINES)}, found {name!r}. "
            "Name the folder of Step1X-Edit or Qwen-Image-Edit weights."
        )
    absent = [one for one in _COMPONENTS if not (path / one).is_dir()]
    if absent:
        raise CheckpointError(
            f"{path}: expected the folders {', '.join(_COMPONENTS)} beside model_index.json, missing: {', '.join(absent)}. "
            "Resume the download."
        )
    components = {one: path / one for one in (*_COMPONENTS, *_MORE_COMPONENTS) if (path / one).is_dir()}
    system, variant = PIPELINES[name]
    zero = system == QWEN and bool(_config(path / "transformer").get("zero_cond_t"))
    return Layout(path, "pipeline", system, variant, "diffusers", zero, MappingProxyType(components))


def _component(path: Path) -> Layout:
    config = _config(path)
    name = config.get("_class_name")
    if name in _COMPONENT_CLASSES:
        kind, system = _COMPONENT_CLASSES[name]
        variant = pipeline_variant(path) if kind == "transformer" else ""
        zero = bool(config.get("zero_cond_t")) and system == QWEN
        return Layout(path, kind, system, variant or ("edit-plus" if zero else ""), "diffusers", zero)
    if config.get("model_type") == "qwen2_5_vl":
        return Layout(path, "text_encoder", names="hf")
    found = name or config.get("model_type")
    raise CheckpointError(
        f"{path / 'config.json'}: expected {', '.join(_COMPONENT_CLASSES)} or the model type qwen2_5_vl, found {found!r}. "
        "Name the folder of Step1X-Edit, Qwen-Image-Edit or Qwen2.5-VL weights."
    )


def _loose_files(path: Path) -> Layout:
    """Single files in a folder, or in the sub-folders that ComfyUI has; folders of components count as well."""
    found: dict[str, list[Layout]] = {}
    for place in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        if place is not path and (place / "config.json").is_file():
            candidates = [place]
        else:
            candidates = sorted(place.glob("*.safetensors"))
        for candidate in candidates:
            layout = _known(candidate)
            if layout:
                found.setdefault(layout.kind, []).append(layout)
    if not found:
        raise CheckpointError(
            f"{path}: expected model_index.json, config.json or safetensors files of a known model, found "
            f"{', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'an empty folder'}. Name the weights' folder."
        )
    for kind in _COMPONENTS:
        if len(found.get(kind, ())) > 1:
            names = ", ".join(str(layout.path.relative_to(path)) for layout in found[kind])
            raise CheckpointError(f"{path}: expected one {kind}, found {names}. Name the file, or keep one of them here.")
    components = {kind: layouts[0].path for kind, layouts in found.items() if kind in _COMPONENTS}
    lead = next((found[kind][0] for kind in _COMPONENTS if kind in found), found[next(iter(found))][0])
    if len(components) < 2:
        return lead
    vae = found["vae"][0] if "vae" in found else lead
    if lead.system and vae.system and vae.system != lead.system:
        raise CheckpointError(
            f"{path}: expected one system, found the transformer of {lead.system} and the VAE of {vae.system}. Keep one "
            "system's files in a folder."
        )
    return Layout(path, "pipeline", lead.system, lead.variant, lead.names, lead.zero_cond_t, MappingProxyType(components))


def _known(path: Path) -> Layout | None:
    """The layout of a file or component folder; None for another model's. A damaged file still raises."""
    if not path.is_dir():
        keys = read_shapes(path)
    try:
        return detect(path) if path.is_dir() else detect_keys(keys, path)
    except CheckpointError as error:
        logger.info("left out: %s", error)
        return None


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _parts(layout: Layout) -> str:
    return ", ".join(layout.components) or f"a {layout.kind}"
