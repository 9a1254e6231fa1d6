"""What the tests of a chosen attention share: forwards of both DiTs with every mask that an edit makes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from reasonedit.reasonedit_core.denoisers import join_conditionings
from reasonedit.reasonedit_core.denoisers.dit import Step1XDenoiser
from reasonedit.reasonedit_core.denoisers.qwen_image import QwenImageDenoiser
from reasonedit.reasonedit_core.models.keyvalues import KeyValues
from reasonedit.reasonedit_core.types import Conditioning
from reasonedit.tests import regions

SYSTEMS = ("s", "s-v1.1", "q")
"""v1.1 pads its text: its connector has a mask without guidance too, its blocks have none."""

ROWS = regions.corner().flatten().nonzero()[:, 0]


def make(system: str, backend: str, dtype: torch.dtype = torch.float32, host=None):
    """A denoiser of the tiny checkpoint."""
    net = regions.shared(system[0])
    net = net if dtype == torch.float32 else copy.deepcopy(net).to(dtype)
    if system == "q":
        return QwenImageDenoiser(net, backend=backend, host=host)
    return Step1XDenoiser(net, "v1.1" if system == "s-v1.1" else "v1.2", backend=backend, host=host)


def texts(system: str, denoiser) -> dict[str, Conditioning]:
    """One text, and two of different lengths for guidance in one batch."""
    pair = [regions.conditioning(denoiser, length, seed) for seed, length in enumerate(regions.LENGTHS)]
    if system == "s-v1.1":
        pair = [padded(text) for text in pair]
    return {"one": pair[0], "joint": join_conditionings(*pair)}


def padded(text: Conditioning, length: int = 12) -> Conditioning:
    """The text with padding at its end, as v1.0 and v1.1 have it."""
    n = text.tokens.shape[1]
    tokens = torch.nn.functional.pad(text.tokens, (0, 0, 0, length - n))
    return replace(text, tokens=tokens, mask=torch.arange(length)[None] < n, positions=torch.zeros(length, 3))


def velocities(system: str, backend: str, dtype: torch.dtype = torch.float32, host=None) -> dict[str, torch.Tensor]:
    """Velocities (B, N, C) of full steps and (B, n, C) of partial ones, by name of the case."""
    denoiser, found = make(system, backend, dtype, host), {}
    picture, latents = regions.source(denoiser), regions.noise(denoiser).to(dtype)
    for name, text in texts(system, denoiser).items():
        batch, keep = len(text.tokens), KeyValues()
        both, t = latents.expand(batch, -1, -1), torch.full((batch,), 0.7)
        call = {"grid": regions.GRID, "references": (picture,), "keep": keep}
        found[name] = denoiser(both, t, text, **call)
        found[f"{name} partial"] = denoiser(both[:, ROWS], t, text, rows=ROWS, **call)
    return found


def calls(system: str) -> dict[str, int]:
    """Attention calls of each part of a DiT: of the connector before and in a step, and of the blocks."""
    config = regions.shared(system[0]).config
    if system == "q":
        return {"before": 0, "connector": 0, "blocks": config.num_layers}
    return {"before": 1, "connector": config.connector_depth - 1, "blocks": config.num_layers + config.num_single_layers}
