"""Weights under ComfyUI's memory management: one patcher per component, loaded right before it is used.

The core asks a mover to bring a component (`mllm`, `dit`, `vae`) to the device. Here that is ComfyUI's model manager: it makes
room by unloading what was used longest ago, ours or another pack's, so flags such as --lowvram or --reserve-vram and the
/free route work on these weights by themselves. The Linears of MLLM and DiT, which are nearly all of their weights, can stay
behind where a component does not fit, and are then brought over call by call (`streaming.py`).

The estimates say what a component needs beside its weights. They are upper bounds from the shapes of the networks, so that
two components stay side by side when they fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..reasonedit_core.errors import ConfigError

if TYPE_CHECKING:
    from ..reasonedit_core.brain.generator import BrainGenerator
    from ..reasonedit_core.generator import Plan
    from ..reasonedit_core.mllm.qwen25vl import QwenVL
    from ..reasonedit_core.types import EditRequest
    from .sockets import EditorHandle

UNKNOWN = 1 << 30
"""Bytes asked for when nobody said what a component will need."""

# Bytes per pixel and byte of the type that the two autoencoders take at their widest layer, as ComfyUI reckons with them.
VAE_PER_PIXEL = {"reasonedit-s": 2178, "reasonedit-q": 7000, "reasonbrain": 2178}

UNET_PER_LATENT = 10486
"""Bytes per latent and byte of the type that a UNet of SD's size takes, as ComfyUI reckons with them."""

PASSES = 3
"""Passes of three-pass guidance, made as one batch."""

BLOCK_WIDTHS = 20
"""Widths of the network that one token takes while a DiT block runs: q, k, v, the feed-forward's four, twice, and copies."""

TEXT_TOKENS = 512
REPLY_TOKENS = 1024
ROWS = 4
"""Most replies that are decoded together."""

CELL = 28 * 28
"""Pixels of one vision token of the MLLM."""


class Holder(nn.Module):
    """Wraps a network so that ComfyUI can note its device on it: transformers' and diffusers' `device` cannot be set."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))


# ComfyUI's log names a model by its class.
HOLDERS = {name: type(f"ReasonEdit{name}", (Holder,), {"__doc__": Holder.__doc__}) for name in ("MLLM", "DiT", "VAE")}


def hold(component: str, module: nn.Module) -> Holder:
    """The holder of a component, of a class with its name."""
    holders = {name.lower(): holder for name, holder in HOLDERS.items()}
    return holders[component](module)


class ComfyMover:
    """The core's `offload.Mover` over ComfyUI's model manager. Keeps the patchers alive: the manager holds them weakly."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        from . import host

        self.device = device
        self._needs: dict[str, int] = {}
        self._patchers = {name: host.make_patcher(name, hold(name, module), device) for name, module in modules.items()}

    def need(self, component: str, nbytes: int) -> None:
        """Say what the next use of `component` takes beside its weights."""
        self._needs[component] = nbytes

    def on_unload(self, component: str, release: Any) -> None:
        """Call `release()` whenever ComfyUI takes `component` off the device."""
        self._patcher(component).on_unload = release

    @contextmanager
    def __call__(self, component: str) -> Iterator[None]:
        """The component is on the device when the context opens. It stays until ComfyUI wants the room."""
        from . import host

        host.load(self._patcher(component), self._needs.get(component, UNKNOWN))
        yield

    def release(self) -> None:
        """Take every component off the device."""
        for patcher in self._patchers.values():
            patcher.detach()

    def _patcher(self, component: str) -> Any:
        if component not in self._patchers:
            raise ConfigError(f"expected one of the components {', '.join(self._patchers)}, found {component!r}.")
        return self._patchers[component]


# ---- estimates -----------------------------------------------------------------------------------------------------------


def dit_bytes(tokens: int, width: int, itemsize: int) -> int:
    """Activations of one forward of a DiT over `tokens` (text, picture and references)."""
    return BLOCK_WIDTHS * tokens * width * itemsize


def vae_bytes(system: str, pixels: int, itemsize: int) -> int:
    """Activations of one pass of the autoencoder over `pixels`."""
    return VAE_PER_PIXEL[system] * pixels * itemsize


def mllm_bytes(tokens: int, config: Any, itemsize: int, *, rows: int = 1, cached: int = 0) -> int:
    """Activations of a prefill of `tokens`, and the KV of `rows` replies of `cached` tokens each. config: of the text model."""
    kv_heads = config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * kv_heads * head * itemsize * rows * cached
    return tokens * (3 * config.intermediate_size + 8 * config.hidden_size) * itemsize + kv + 4 * rows * config.vocab_size


def reasoner_bytes(mllm: QwenVL, pixels: int = 1024 * 1024) -> int:
    """What a question about two pictures of `pixels` needs, replies included."""
    tokens = 2 * (pixels // CELL) + TEXT_TOKENS
    config = mllm.config.get_text_config()
    return mllm_bytes(tokens, config, mllm.dtype.itemsize, rows=ROWS, cached=tokens + REPLY_TOKENS)


def editor_bytes(editor: EditorHandle, plan: Plan, request: EditRequest | None = None) -> dict[str, int]:
    """What one edit of the sizes of `plan` needs, by component. request: whether it has a region, whose keys are kept, and
    whether it has guidance, whose passes may be one batch."""
    generator, mllm = editor.generator, editor.mllm
    transformer = generator.denoiser.transformer
    seen = sum(width * height for width, height in plan.mllm) // CELL + TEXT_TOKENS
    encoded = [width * height for width, height in plan.vae]
    output = plan.output[0] * plan.output[1]
    tokens = (output + sum(encoded)) // 256 + seen
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    vae = generator.codec.vae
    passes = 1 if request is not None and request.guidance <= 1 else 2
    kept = 0
    if request is not None and request.region is not None:
        layers = transformer.config.num_layers + transformer.config.get("num_single_layers", 0)
        kept = 2 * layers * tokens * width * mllm.dtype.itemsize * passes
    at_once = tokens * passes if generator.batched_cfg else tokens
    return {
        "mllm": mllm_bytes(seen, mllm.config.get_text_config(), mllm.dtype.itemsize),
        "dit": dit_bytes(at_once, width, mllm.dtype.itemsize) + kept,
        "vae": vae_bytes(editor.system, max(output, *encoded), vae.dtype.itemsize),
    }


def brain_bytes(generator: BrainGenerator, plan: Plan) -> dict[str, int]:
    """What one edit of ReasonBrain of the sizes of `plan` needs, by component."""
    conditioner, codec = generator.conditioner, generator.codec
    llava, spec = conditioner.llava.model, conditioner.brain.spec
    seen = 2 * spec.grid**2 + spec.img_tokens + TEXT_TOKENS  # the picture's tokens, and as many cues
    itemsize = llava.dtype.itemsize
    height, width = plan.grid
    if generator.sampler.kind == "sd":
        denoising = PASSES * height * width * itemsize * UNET_PER_LATENT
    else:
        config = generator.sampler.denoiser.transformer.config
        tokens = height * width + 2 * spec.queries
        denoising = dit_bytes(tokens, config.num_attention_heads * config.attention_head_dim, itemsize)
    return {
        "mllm": mllm_bytes(seen, llava.config.text_config, itemsize),
        "dit": denoising,
        "vae": vae_bytes("reasonbrain", plan.output[0] * plan.output[1], codec.vae.dtype.itemsize),
    }
