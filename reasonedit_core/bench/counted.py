"""The counted part: full-size forwards on the meta device, and one loop on tiny weights. The same on every machine.

A forward is one call of our denoiser for one step: 1024 x 1024 pixels with one reference (2 x 4096 picture tokens) and 640
text tokens. Nothing is kept from an earlier call, so what a run prepares once per prompt counts in full; `later` is the same
call once more, as all but the first steps of a run make it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..counting import Work, count
from ..types import Conditioning, EditRequest, LatentImage
from .clock import Budget
from .peers import Peers, Place
from .script import Listening, three_rounds
from .small import INSTRUCTION, SEED, picture
from .weights import TEXT, WIDTH, random_words
from .worker import LOAD_SECONDS, ArmFailed, Worker

GRID, CHANNELS = (64, 64), 64
"""Latent tokens of a picture, channels of a latent token."""

RELEASED = {"elementwise_bytes": 388e9, "kernels": 3204, "flops": 169.25e12}
"""The released transformer of Step1X-Edit v1p2, counted in the same way. It is not part of any diffusers release; with
`--peers` it is counted anew."""

RELEASED_LOOP = {"vision_passes": 34, "sequential_calls": 5}
"""The released loop over the same three rounds, counted with its own code."""


def measure(peers: Peers | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """All counts, as the JSON's `counted`. `step1x_released` only where the released code is at hand. budget: of the command;
    the released code has no more of it than is left, our own counts take what they take."""
    found: dict[str, Any] = {name: forward(name) for name in ("step1x", "qwen_image")}
    found["qwen_image_diffusers"] = stock_qwen().record()
    place = (peers or Peers()).step1x()
    if place.missing is None:
        found["step1x_released"] = released_step1x(place, budget or Budget())
    found["loop"] = loop()
    return found


def released_step1x(place: Place, budget: Budget) -> dict[str, Any]:
    """Counts of the released transformer, made in its own interpreter; `missing` where that failed."""
    job = {"arm": "count", "size": "full"}
    worker = Worker("reasonedit_core.bench.peer_step1x", job, python=place.python, paths=place.paths)
    try:
        return worker.ready(min(LOAD_SECONDS, budget.left))
    except ArmFailed as error:
        return {"missing": str(error)}
    finally:
        worker.close()


def forward(system: str) -> dict[str, Any]:
    """Counts of our forward of `step1x` or `qwen_image`, and of a later one."""
    call = {"step1x": step1x_call, "qwen_image": qwen_call}[system]()
    first = count(call).record()
    later = count(call).record()
    return {**first, "later": {name: later[name] for name in ("flops", "elementwise_bytes", "kernels")}}


def step1x_call() -> Callable[[], torch.Tensor]:
    """One call of our Step1X denoiser at full size."""
    from ..denoisers.dit import Step1XDenoiser
    from ..models.step1x_transformer import Step1XEditTransformer2DModel

    with torch.device("meta"):
        network = Step1XEditTransformer2DModel(enable_text_token_mapping=True)
    return _call(Step1XDenoiser(_bf16(network), "v1.2"), random_words("meta", torch.bfloat16))


def qwen_call() -> Callable[[], torch.Tensor]:
    """One call of our Qwen-Image denoiser at full size."""
    from ..denoisers.qwen_image import QwenImageDenoiser

    return _call(QwenImageDenoiser(_stock_transformer()), Conditioning(_meta(1, TEXT, WIDTH)))


def stock_qwen() -> Work:
    """Diffusers' own Qwen-Image transformer, its own attention, as the installed version has them."""
    network = _stock_transformer()
    inputs = {
        "hidden_states": _meta(1, 2 * GRID[0] * GRID[1], CHANNELS),
        "timestep": _meta(1),
        "encoder_hidden_states": _meta(1, TEXT, WIDTH),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, *GRID)] * 2],
        "return_dict": False,
    }
    return count(lambda: network(**inputs))


def loop() -> dict[str, int]:
    """One run with thinking and three rounds (refine, refine, success) on a tiny checkpoint.

    vision_passes: pictures that enter the vision tower; generate_calls: questions asked; sequential_calls: the longest chain
    of dependent calls in a round; retries: answers that the MLLM gave and that could not be read.
    """
    from ..load import SystemSpec, load_system
    from ..loop import POLICIES, think_edit_reflect
    from ..mini.builder import build_checkpoint
    from ..reasoners.qwen import QwenSpeaker
    from ..reasoners.reasoner import PackReasoner
    from ..reasoners.scripted import ScriptedSpeaker

    with tempfile.TemporaryDirectory(prefix="reasonedit-bench-") as folder:
        weights = build_checkpoint("step1x-v1p2", Path(folder), seed=SEED)
        spec = SystemSpec(system="reasonedit-s", weights=weights, dtype="float32", device="cpu", seed=SEED)
        system = load_system(spec)
        low, high = system.settings.reasoner_pixels
        speaker = QwenSpeaker(system.mllm, min_pixels=low, max_pixels=high, max_side=system.settings.reasoner_max_side)
        listening = Listening(system.mllm, speaker, ScriptedSpeaker(three_rounds()))
        request = EditRequest(picture(SEED, (97, 61)), INSTRUCTION, seed=SEED, steps=1, size_level=64)
        reasoner = PackReasoner(system.reasoner.pack, listening, seed=SEED)
        try:
            trace = think_edit_reflect(
                request,
                reasoner=reasoner,
                generator=system.generator,
                policy=POLICIES["reasonedit"],
                on_round=listening.note,
            )
        finally:
            listening.close()
    heard = listening.heard
    return {
        "rounds": len(trace.rounds),
        "vision_passes": heard.vision_passes,
        "generate_calls": heard.queries,
        "sequential_calls": max(heard.chains),
        "prefill_tokens": heard.prefill_tokens,
        "condition_tokens": heard.condition_tokens,
        "decode_steps": heard.decode_steps,
        "retries": heard.unreadable,
    }


def _call(denoiser: Any, conditioning: Conditioning) -> Callable[[], torch.Tensor]:
    tokens = GRID[0] * GRID[1]
    latents, t = _meta(1, tokens, CHANNELS), torch.empty(1, device="meta")
    reference = LatentImage(_meta(1, tokens, CHANNELS), *GRID)
    return lambda: denoiser(latents, t, conditioning, grid=GRID, references=(reference,))


def _stock_transformer() -> torch.nn.Module:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        return _bf16(QwenImageTransformer2DModel())


def _bf16(network: torch.nn.Module) -> torch.nn.Module:
    # Not `network.to`, at which diffusers warns of a loss that meta tensors cannot have.
    return torch.nn.Module.to(network, torch.bfloat16).eval()


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")
