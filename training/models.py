"""The parts of the checkpoint that a run starts from: through the core's loaders, at most one MLLM, in full or low-bit."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..reasonedit_core.detect import QWEN, STEP1X, detect
from ..reasonedit_core.errors import BackendUnavailable, ConfigError
from ..reasonedit_core.fp8 import DIT_SKIP, is_skipped, quantize_linears
from ..reasonedit_core.load import DTYPES, choose_device, choose_dtype
from ..reasonedit_core.parts import Parts, assemble_parts, find_parts
from ..reasonedit_core.settings import Settings, read_settings
from ..reasonedit_core.weightfiles import read_json, read_shapes, read_state
from .config import Config
from .stages import REASONBRAIN

if TYPE_CHECKING:
    from ..reasonedit_core.conditioners.qwen_image import QwenImageConditioner
    from ..reasonedit_core.conditioners.step1x import Step1XConditioner
    from ..reasonedit_core.dialogue.prompts import PackChoice
    from ..reasonedit_core.latents import KLCodec, QwenCodec
    from ..reasonedit_core.mllm.qwen25vl import QwenVL

log = logging.getLogger(__name__)

MLLM_SKIP = ("model.visual", "lm_head")
"""Left in full where the MLLM is quantised: the tower runs once per picture, and lm_head's rows are read one by one."""


class Base:
    """The checkpoint that a run starts from. Parts are loaded when asked for, once, and stay until `release`."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        self.config = config
        self.system = config.model.system
        self.device = device or choose_device(config.run.device)
        self.dtype = DTYPES[choose_dtype(config.run.precision, self.device)]
        self.parts = _parts(config)
        self.variant = self._find_variant()
        self._mllm: QwenVL | None = None
        self._choice: PackChoice | None = None
        self._reader: KLCodec | QwenCodec | None = None

    @property
    def plus(self) -> bool:
        """Whether a Qwen-Image-Edit is of the Plus family (2509, 2511), which takes several pictures."""
        return self.parts.layout.variant != "edit"

    def settings(self) -> Settings:
        """Pixel bounds and sizes: the checkpoint's own, with the recipe's in their place where it states them."""
        from ..reasonedit_core.mllm.load import read_bounds

        if self.system == STEP1X:
            found = read_settings(self.parts.root, f"step1x-{self.variant}")
        else:
            bounds = read_bounds(self.parts.mllm if self.parts.mllm.is_dir() else None, self.parts.tokenizer)
            found = read_settings(self.parts.root, "qwen-edit-plus" if self.plus else "qwen-edit", bounds)
        data = self.config.data
        own = {"conditioner_pixels": data.conditioner_pixels, "reasoner_pixels": data.reasoner_pixels}
        own = {name: value for name, value in own.items() if value is not None}
        return Settings.model_validate({**found.model_dump(), **own, "size_level": data.size_level})

    def dialogue(self) -> PackChoice:
        """The dialogue pack: the recipe's, else the checkpoint's own, else ours."""
        from ..reasonedit_core.dialogue.prompts import find_pack

        if self._choice is None:
            own = self.config.model.dialogue
            ours = self.settings().dialogue == "own"  # they know our wording
            variant = self.variant if self.system == STEP1X and not ours else None
            explicit = self.config.place(own) if own else None
            self._choice = find_pack(explicit=explicit, weights=self.parts.root, variant=variant)
        return self._choice

    def mllm(self, *, need_lm_head: bool, device: torch.device | None = None) -> QwenVL:
        """The one MLLM of this process, frozen, on the device or on another that is named. A later call that needs lm_head of
        one that was loaded without loads anew."""
        from ..reasonedit_core.mllm.load import load_mllm

        if self._mllm is not None and (self._mllm.can_generate or not need_lm_head):
            return self._mllm
        self._mllm = None
        mllm = load_mllm(
            self.parts.mllm,
            dtype=self.dtype,
            device=device or self.device,
            need_lm_head=need_lm_head,
            tokenizer_path=self.parts.tokenizer,
        )
        _quantise(mllm.model, self.config.model.mllm_weights, MLLM_SKIP, self.dtype, device or self.device)
        self._mllm = mllm
        return mllm

    def shell(self) -> QwenVL:
        """The MLLM without weights (on the meta device): its tokenizer and sizes, for documents and for counting."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        from ..reasonedit_core.mllm import load
        from ..reasonedit_core.mllm.qwen25vl import QwenVL

        path = self.parts.mllm
        folder = path if (path / "config.json").is_file() else path / "text_encoder" if path.is_dir() else None
        tokenizer_folder = load.find_tokenizer(folder, self.parts.tokenizer, path)
        tokenizer = load.load_tokenizer(tokenizer_folder)
        raw = (
            read_json(folder / "config.json")
            if folder
            else load.infer_config(load.rename_keys(read_state(path)), tokenizer_folder, path)
        )
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(load.make_config(raw, tokenizer)).to(self.dtype)
        _quantise_shape(model, self.config.model.mllm_weights, MLLM_SKIP)
        return QwenVL(model, tokenizer, bounds=load.read_bounds(folder, tokenizer_folder))

    def dit_shell(self) -> nn.Module:
        """The DiT without weights, for counting. No tensor is read."""
        from ..reasonedit_core.weights import load_qwen_transformer, load_step1x_transformer

        how = {"dtype": self.dtype, "device": "meta", "weights_dtype": "full"}
        if self.system == STEP1X:
            module, _, _ = load_step1x_transformer(self.parts.transformer, variant=self.variant, **how)
        else:
            module, _ = load_qwen_transformer(self.parts.transformer, **how)
        _quantise_shape(module, self.config.model.dit_weights, DIT_SKIP)
        return module.requires_grad_(False)

    @property
    def identity(self) -> str:
        """A hash of what the parts are: names, shapes and types of all tensors, and the sizes of the files. Contents are not
        read, as that takes minutes."""
        digest = hashlib.sha256()
        for place in (self.parts.transformer, self.parts.mllm, self.parts.vae):
            files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
            sizes = [(file.name, file.stat().st_size) for file in files]
            digest.update(repr((sorted(read_shapes(place).items()), sizes)).encode())
        return digest.hexdigest()

    def dit(self) -> nn.Module:
        """The DiT, frozen; on the device, but for blocks that are swapped, which `swap.swap_blocks` moves later."""
        from ..reasonedit_core.weights import load_qwen_transformer, load_step1x_transformer

        wanted = self.config.model
        home = torch.device("cpu") if wanted.swap_blocks or wanted.dit_weights == "nf4" else self.device
        how = {"dtype": self.dtype, "device": home, "weights_dtype": "fp8" if wanted.dit_weights == "fp8" else "full"}
        if self.system == STEP1X:
            module, _, _ = load_step1x_transformer(self.parts.transformer, variant=self.variant, **how)
        else:
            module, _ = load_qwen_transformer(self.parts.transformer, **how)
        module.requires_grad_(False)
        if wanted.dit_weights == "nf4":
            _quantise(module, "nf4", DIT_SKIP, self.dtype, self.device)
        return module

    def codec(self, *, shell: bool = False) -> KLCodec | QwenCodec:
        """The VAE, in float32: latents are encoded once and kept, so its speed does not matter and its precision does.

        shell: without weights, to read kept moments by.
        """
        from ..reasonedit_core.latents import KLCodec, QwenCodec
        from ..reasonedit_core.weights import load_flux_vae, load_qwen_vae

        if shell and self._reader is not None:
            return self._reader
        load, wrap = (load_flux_vae, KLCodec) if self.system == STEP1X else (load_qwen_vae, QwenCodec)
        vae, _ = load(self.parts.vae, dtype=torch.float32, device="meta" if shell else self.device)
        codec = wrap(vae.requires_grad_(False))
        self._reader = codec if shell else self._reader
        return codec

    def conditioner(self, mllm: QwenVL) -> Step1XConditioner | QwenImageConditioner:
        """What turns picture and instruction into documents for the DiT."""
        from ..reasonedit_core.conditioners.qwen_image import QwenImageConditioner
        from ..reasonedit_core.conditioners.step1x import Step1XConditioner

        settings = self.settings()
        low, high = settings.conditioner_pixels
        if self.system == QWEN:
            return QwenImageConditioner(mllm, plus=self.plus, min_pixels=low, max_pixels=high, drop=settings.dropped_tokens)
        prompt = self.dialogue().pack.conditioning_for(self.variant)
        dropped = prompt.dropped_tokens if settings.dropped_tokens is None else settings.dropped_tokens
        return Step1XConditioner(
            mllm,
            prefix=prompt.prefix,
            dropped_tokens=dropped,
            variant=self.variant,
            min_pixels=low,
            max_pixels=high,
            blank=settings.size_level,  # the release has 1024, and trains and paints at that size
        )

    def release(self) -> None:
        """Forget the MLLM, so that its memory is free for the next stage."""
        self._mllm = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _find_variant(self) -> str:
        wanted, found = self.config.model.variant, self.parts.layout.variant
        if self.system != STEP1X:
            return found
        return wanted if wanted != "auto" else found or detect(self.parts.transformer).variant or "v1.1"


def open_base(config: Config, device: torch.device | None = None) -> Any:
    """The checkpoint that a run starts from: a `Base`, or ReasonBrain's."""
    if config.model.system == REASONBRAIN:
        from .brain.base import BrainBase

        return BrainBase(config, device)
    return Base(config, device)


def pieces(config: Config) -> dict[str, Path]:
    """The parts that lie elsewhere than `model.weights`, by name."""
    own = {name: getattr(config.model, name) for name in ("text_encoder", "vae", "tokenizer")}
    return {name: config.place(path) for name, path in own.items() if path is not None}


def _parts(config: Config) -> Parts:
    weights, own = config.place(config.model.weights), pieces(config)
    if not own:
        return find_parts(weights, config.model.system)
    parts = assemble_parts(weights, **own)
    if parts.layout.system != config.model.system:
        raise ConfigError(f"model.weights: expected a DiT of {config.model.system}, found one of {parts.layout.system}.")
    return parts


# ---- low-bit bases -------------------------------------------------------------------------------------------------------


def _quantise(module: nn.Module, form: str, skip: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
    if form == "fp8":
        quantize_linears(module, skip=skip)
    elif form == "nf4":
        quantise_nf4(module, skip=skip, dtype=dtype)
        module.to(device)


def _quantise_shape(module: nn.Module, form: str, skip: Sequence[str]) -> None:
    """On the meta device. nf4 is counted as fp8 here; `cost` halves it."""
    if form != "full":
        quantize_linears(module, skip=skip)


def quantise_nf4(module: nn.Module, *, skip: Sequence[str], dtype: torch.dtype) -> tuple[str, ...]:
    """Replace the Linears below `module` by bitsandbytes' nf4 ones (quantised when moved to a device); returns their names."""
    bnb = _bitsandbytes()
    chosen = [name for name, child in module.named_modules() if type(child) is nn.Linear and not is_skipped(name, tuple(skip))]
    for name in chosen:
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = getattr(owner, leaf)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        setattr(owner, leaf, new)
    return tuple(chosen)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise BackendUnavailable(
            "nf4 weights: expected bitsandbytes, found none. Install it (pip install bitsandbytes), or choose fp8, which "
            "needs nothing more (mllm_weights, dit_weights)."
        ) from error
    return bitsandbytes


def fingerprint(path: Path) -> str:
    """sha256 over the names, sizes and contents of the weights at `path` (a file or folder), in hex."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json"))
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
