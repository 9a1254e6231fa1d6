"""Weights with what was trained merged in: a folder in the released layout that `load_system` reads, or one single file.

Merging is done on the weights of the base on the disk, shard by shard and in float32, whatever the training run held them
in; tensors that were not trained keep their bits. Files keep their names and keys. Where that is not possible (fused original
names of Step1X, low-bit weights) the part is written as one file under the names that it has in memory, low-bit weights as
bfloat16.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..reasonedit_core.detect import ZERO_COND_T
from ..reasonedit_core.errors import CheckpointError, ConfigError
from ..reasonedit_core.files import write_json
from ..reasonedit_core.keymaps import SCALE_FACTOR
from ..reasonedit_core.lora import merged_weight
from ..reasonedit_core.lora_keys import Pair
from ..reasonedit_core.parts import Parts
from ..reasonedit_core.weightfiles import read_metadata, read_shapes, read_state, weight_files
from .adapters import Adapters, Trained, write_tensors
from .base import hub_name, is_low_bit, names_in_file, place_of, read_base
from .presets import DIT, MLLM

MARK = "reasonedit_export.json"
"""In a merged folder: what it was made of. A folder with it may be written anew."""

_FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
"""Where single files go, as ComfyUI has them."""


def write_merged(adapters: Adapters, parts: Parts, folder: Path) -> list[Path]:
    """Write `folder`, whole or not at all. Returns it and its weight files. ConfigError where something else is there."""
    if folder.exists() and not (folder / MARK).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"expected nothing at {folder}, found something that is no merged export. Name another place.")
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        places = _copy(parts, building, {one.part for one in adapters.trained})
        files = []
        for one in adapters.trained:
            files += write_part(one, parts, places[one.part])
        about = {"system": adapters.system, "base": str(adapters.base), "parts": [one.part for one in adapters.trained]}
        write_json(building / MARK, {**about, "about": dict(adapters.about)})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(building, folder)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error}; choose a folder that can be written and has room") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return [folder, *(folder / file.relative_to(building) for file in files)]


def merge(trained: Trained, name: str, tensor: Tensor) -> Tensor | None:
    """A parameter with what was trained, in its own dtype; None where nothing of it was."""
    if name in trained.whole:
        return trained.whole[name].to(tensor.dtype)
    module = name.removesuffix(".weight")
    if not name.endswith(".weight") or f"{module}.lora_A" not in trained.lora:
        return None
    return merged_weight(tensor, pair_of(trained, module)).to(tensor.dtype)


def pair_of(trained: Trained, module: str) -> Pair:
    """The core's form of one module's LoRA or DoRA, in float32."""
    down, up = (trained.lora[f"{module}.{half}"].float() for half in ("lora_A", "lora_B"))
    magnitude = trained.lora.get(f"{module}.lora_magnitude_vector")
    return Pair(down, up, trained.gain(module), None if magnitude is None else magnitude.float()[:, None])


def targets(trained: Trained) -> set[str]:
    """Names of the parameters that merging changes."""
    return {*(f"{module}.weight" for module in trained.modules), *trained.whole}


def merged_state(trained: Trained, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name in memory: tensor} of a whole part with what was trained. CheckpointError where a name is not in it."""
    _require(targets(trained) - set(state), trained.part)
    return {name: value if (new := merge(trained, name, value)) is None else new for name, value in state.items()}


def keeps_files(parts: Parts, part: str) -> bool:
    """Whether the files of a part can keep their names and keys."""
    place = place_of(parts, part)
    names = names_in_file(read_shapes(place), part)
    return names is not None and SCALE_FACTOR not in names.values() and not is_low_bit(place)


def write_part(trained: Trained, parts: Parts, target: Path) -> list[Path]:
    """Write the weights of one part. target: where its file or folder is in the new place."""
    place = place_of(parts, trained.part)
    if not keeps_files(parts, trained.part):
        name = "diffusion_pytorch_model.safetensors" if trained.part == DIT else "model.safetensors"
        return [write_single(trained, parts, target / name if place.is_dir() else target)]
    names = names_in_file(read_shapes(place), trained.part) or {}
    _require(targets(trained) - set(names.values()), trained.part)
    written = []
    for file in weight_files(place):
        state = read_state(file)
        for key, tensor in state.items():
            new = merge(trained, names[key], tensor) if key in names else None
            state[key] = tensor if new is None else new
        metadata = {key: value for key, value in read_metadata(file).items() if key != "format"}
        written.append(write_tensors(target / file.name if place.is_dir() else target, state, metadata))
    return written


def write_single(trained: Trained, parts: Parts, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """One file with the whole part, what was trained in it; the names in memory (DiT) or those of the hub (MLLM)."""
    state = merged_state(trained, read_base(parts, trained.part))
    if trained.part != DIT:
        state = {hub_name(name): tensor for name, tensor in state.items()}
    elif parts.layout.zero_cond_t:
        state[ZERO_COND_T] = torch.empty(0)  # in a file without a config.json only this tells
    return write_tensors(path, state, metadata)


def _require(missing: set[str], part: str) -> None:
    if missing:
        raise CheckpointError(
            f"expected the weights that the {part} was trained from, found some without {min(missing)} ({len(missing)} names "
            "are missing). Name the weights of the run."
        )


def _copy(parts: Parts, building: Path, changed: set[str]) -> dict[str, Path]:
    """Copy everything that is not written anew. Returns where the weights of each part belong."""
    own = {part: place_of(parts, part) for part in (DIT, MLLM)}
    left = {path.resolve() for part in changed for path in weight_files(own[part])}

    def leave(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if (Path(folder) / name).resolve() in left}

    if (parts.root / "model_index.json").is_file() and all(path.is_relative_to(parts.root) for path in _all(parts).values()):
        shutil.copytree(parts.root, building, ignore=leave)
        places = {part: building / path.relative_to(parts.root) for part, path in own.items()}
        _drop_indices(parts, places, changed)
        return places
    building.mkdir(parents=True)
    for name in ("reasonedit.json", "dialogue.toml"):
        if (parts.root / name).is_file():
            shutil.copy2(parts.root / name, building / name)
    places = {}
    for name, path in _all(parts).items():
        path = own[MLLM] if name == "text_encoder" else path
        places[name] = building / name if path.is_dir() else building / _FOLDERS[name] / path.name
        if path.is_dir():
            shutil.copytree(path, places[name], ignore=leave)
        elif path.resolve() not in left:
            places[name].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, places[name])
    places = {DIT: places["transformer"], MLLM: places["text_encoder"]}
    _drop_indices(parts, places, changed)
    return places


def _all(parts: Parts) -> dict[str, Path]:
    found = {"transformer": parts.transformer, "text_encoder": parts.mllm, "vae": parts.vae, "tokenizer": parts.tokenizer}
    return {name: path for name, path in found.items() if path is not None}


def _drop_indices(parts: Parts, places: Mapping[str, Path], changed: set[str]) -> None:
    """Where shards become one file their index goes."""
    for part in changed:
        if places[part].is_dir() and not keeps_files(parts, part):
            for index in places[part].glob("*.safetensors.index*.json"):
                index.unlink()
