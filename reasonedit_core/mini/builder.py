"""Builds tiny random checkpoints in exactly the released layouts, the same bits under every version of the libraries.

Each system is a folder (or a set of single files) of hand-written JSON and safetensors. All weights are random, so that
no zero-initialised gate hides an error. Every tensor has its own generator: it keeps its values when others change
size, and the same tensor in two layouts of one system (folder, single file) has the same values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import ConfigError
from . import originals
from .configs import Component, components
from .tokenizer import write_json, write_processor, write_tokenizer

State = dict[str, torch.Tensor]

STD = 0.05
SCALE_FACTOR = -0.91  # where the released v1.0 initialises the connector's learned scalar
STOCK_PIXELS = (56 * 56, 28 * 28 * 16384)
STEP1X_PIXELS = (256 * 28 * 28, 400 * 28 * 28)


@dataclass(frozen=True, slots=True)
class _Build:
    """What every part of a build needs. parts: the components with the overrides applied."""

    system: str
    parts: Mapping[str, Component]
    seed: int
    dtype: torch.dtype
    std: float

    def config(self, component: str) -> dict[str, Any]:
        """The config file of one component."""
        return self.parts[component].config

    def state(self, component: str) -> State:
        """Random tensors of one component, in its diffusers (or hub) names."""
        shapes = self.parts[component].shapes(self.parts[component].config)
        return {key: self.tensor(key, shape) for key, shape in shapes.items()}

    def tensor(self, key: str, shape: tuple[int, ...], *, mean: float = 0.0) -> torch.Tensor:
        """One random tensor of this build, about `mean`."""
        return (random_tensor(key, shape, self.seed, self.std) + mean).to(self.dtype)


def build_checkpoint(
    system: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    std: float = STD,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the checkpoint of `system` (a name of SYSTEMS) into `folder` and return the folder.

    config: overrides of the tiny sizes, by component (`transformer`, `text_encoder`, `vae`, `scheduler`) and then by
    the field names of that component's config.json; nested dicts (vision_config) are merged.
    std: deviation of matrices and kernels. With the default the instruction moves the latents by about 1e-3 only, which
    a bf16 comparison cannot see; with 0.2 by about 0.3.
    """
    if system not in SYSTEMS:
        raise ConfigError(f"expected a system out of {', '.join(SYSTEMS)}; found {system!r}: choose one of them")
    build = _Build(system, components(system, dtype, config or {}), seed, dtype, std)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    SYSTEMS[system](build, folder)
    return folder


def random_tensor(key: str, shape: tuple[int, ...], seed: int, std: float = STD) -> torch.Tensor:
    """float32 values of one tensor: about 1 for the weights of norms, about 0 for all others.

    The deviation is `std` for matrices and kernels and 0.05 for norms and biases. Drawn in float64: the float32
    generator takes another path on CPUs with AVX2 and need not give the same bits elsewhere.
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    values = torch.randn(shape, generator=rng, dtype=torch.float64)
    if key.endswith(".gamma") or (key.endswith(".weight") and len(shape) == 1):
        return (1 + STD * values).float()
    return (values * (STD if len(shape) == 1 else std)).float()


def write_sharded(folder: Path, stem: str, state: State, *, shards: int = 2) -> None:
    """Write `state` as `stem-0000i-of-0000n.safetensors` with its index, as the hub shards large models."""
    keys, weight_map = list(state), {}
    per_shard = -(-len(keys) // shards)
    for n in range(shards):
        name = f"{stem}-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: state[key] for key in keys[n * per_shard : (n + 1) * per_shard]}
        write_single(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_single(path: Path, state: State) -> None:
    """Write one safetensors file, with the metadata that transformers asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata={"format": "pt"})


def _write_mllm(build: _Build, folder: Path) -> None:
    write_json(folder / "config.json", build.config("text_encoder"))
    write_json(folder / "generation_config.json", build.config("generation"))
    write_sharded(folder, "model", build.state("text_encoder"))


def _write_stock_mllm(build: _Build, folder: Path, *, pixels: tuple[int, int] = STOCK_PIXELS) -> None:
    """Weights, tokenizer and processor in one folder, as on the hub."""
    _write_mllm(build, folder)
    write_tokenizer(folder)
    _write_processor(folder, pixels)


def _write_processor(folder: Path, pixels: tuple[int, int], processor_class: str = "Qwen2_5_VLProcessor") -> None:
    write_processor(folder, min_pixels=pixels[0], max_pixels=pixels[1], processor_class=processor_class)


def _write_diffusers_part(build: _Build, folder: Path, component: str, *, sharded: bool) -> None:
    write_json(folder / component / "config.json", build.config(component))
    if sharded:
        write_sharded(folder / component, "diffusion_pytorch_model", build.state(component))
    else:
        write_single(folder / component / "diffusion_pytorch_model.safetensors", build.state(component))


def _write_step1x_folder(build: _Build, folder: Path) -> None:
    write_json(folder / "model_index.json", build.config("model_index"))
    write_json(folder / "scheduler" / "scheduler_config.json", build.config("scheduler"))
    _write_diffusers_part(build, folder, "transformer", sharded=True)
    _write_diffusers_part(build, folder, "vae", sharded=False)
    if build.system == "step1x-v1p2":  # its text encoder's folder is a complete Qwen2.5-VL folder, the reasoner
        _write_stock_mllm(build, folder / "text_encoder", pixels=STEP1X_PIXELS)
    else:
        _write_mllm(build, folder / "text_encoder")
    write_tokenizer(folder / "processor")
    _write_processor(folder / "processor", STEP1X_PIXELS)


def _write_step1x_files(build: _Build, folder: Path) -> None:
    """The v1.0 release: two single files in the original layout beside a stock Qwen2.5-VL folder."""
    transformer = originals.step1x_original(build.state("transformer"))
    transformer["connector.scale_factor"] = build.tensor("connector.scale_factor", (1,), mean=SCALE_FACTOR)
    write_single(folder / "step1x-edit-i1258.safetensors", transformer)
    write_single(folder / "vae.safetensors", originals.flux_vae_original(build.state("vae")))
    _write_stock_mllm(build, folder / "Qwen2.5-VL-7B-Instruct")


def _write_qwen_folder(build: _Build, folder: Path) -> None:
    write_json(folder / "model_index.json", build.config("model_index"))
    write_json(folder / "scheduler" / "scheduler_config.json", build.config("scheduler"))
    _write_diffusers_part(build, folder, "transformer", sharded=True)
    _write_diffusers_part(build, folder, "vae", sharded=False)
    _write_mllm(build, folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", fast_file=False)
    write_tokenizer(folder / "processor")
    _write_processor(folder / "processor", STOCK_PIXELS, "Qwen2VLProcessor")


def _write_comfy_files(build: _Build, folder: Path) -> None:
    """ComfyUI's three model folders. The text encoder comes without config and tokenizer, as there."""
    transformer = {f"model.diffusion_model.{key}": tensor for key, tensor in build.state("transformer").items()}
    vae = originals.wan_vae_original(build.state("vae"), num_res_blocks=build.config("vae")["num_res_blocks"])
    write_single(folder / "diffusion_models" / "qwen_image_edit_2509.safetensors", transformer)
    write_single(folder / "text_encoders" / "qwen_2.5_vl.safetensors", build.state("text_encoder"))
    write_single(folder / "vae" / "qwen_image_vae.safetensors", vae)


SYSTEMS: dict[str, Callable[[_Build, Path], None]] = {
    "step1x-v1p2": _write_step1x_folder,
    "step1x-v1p1": _write_step1x_folder,
    "step1x-v1p0-files": _write_step1x_files,
    "qwen-edit": _write_qwen_folder,
    "qwen-edit-plus": _write_qwen_folder,
    "qwen-edit-2511": _write_qwen_folder,
    "qwen2.5-vl": _write_stock_mllm,
    "comfy-qwen-files": _write_comfy_files,
}
"""The systems by name. step1x-v1p0-files and comfy-qwen-files are sets of single files, the others are folders."""
