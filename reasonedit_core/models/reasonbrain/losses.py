"""The two losses, eqs. A1 and A2. Their sum is the paper's; the weights are the caller's.

`denoising_loss` is of the prediction alone, so that it serves a UNet and a DiT.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ConfigError

Reduction = Literal["mean", "sum", "rows"]
Target = Literal["epsilon", "v_prediction", "velocity"]


def mllm_loss(logits: Tensor, ids: Tensor, reduction: Reduction = "mean") -> Tensor:
    """L_MLLM of eq. A1: logits (B, r, vocabulary) at the places before each [IMG] token, ids (r,) of these tokens -> scalar.

    Eq. A1 sums over the r tokens ("sum", then a mean over the batch). Of 32 tokens the sum starts above 160 and would drown
    L_DM, which starts about 1, so the mean is the default. "rows": the mean over the r tokens of each row, (B,).
    """
    if logits.shape[1] != ids.shape[0]:
        raise ConfigError(f"expected logits at {ids.shape[0]} places, one per [IMG] token, found {logits.shape[1]}.")
    targets = ids.to(logits.device).expand(logits.shape[0], -1)
    rows = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(1)
    return rows if reduction == "rows" else rows.mean() * (1 if reduction == "mean" else ids.shape[0])


def denoising_loss(prediction: Tensor, target: Tensor, reduction: Literal["mean", "rows"] = "mean") -> Tensor:
    """L_DM of eq. A2: mean squared error in fp32; prediction and target of one shape (B, ...) -> scalar, or (B,) with rows."""
    if prediction.shape != target.shape:
        raise ConfigError(f"expected prediction and target of one shape, found {(*prediction.shape,)} and {(*target.shape,)}.")
    rows = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return rows if reduction == "rows" else rows.mean()


def noised(clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, kind: Target) -> tuple[Tensor, Tensor]:
    """z_t and the target of a diffusion model: clean, noise (B, C, h, w), timesteps (B,) int64 into alphas_cumprod (T,).

    kind: epsilon (target: the noise) or v_prediction (SD 2.1 at 768 pixels), as the scheduler's `prediction_type` says.
    """
    alpha = alphas_cumprod.to(clean.device, torch.float32)[timesteps].view(-1, *[1] * (clean.dim() - 1))
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(f"prediction_type: expected epsilon or v_prediction, found {kind!r}.")
    target = noise if kind == "epsilon" else (signal * noise - spread * clean).to(noise.dtype)
    return (signal * clean + spread * noise).to(clean.dtype), target


def flow_noised(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a velocity model (FLUX): t (B,) in 0..1, 1 = noise -> latents on the line, and noise - clean."""
    t = t.to(torch.float32).view(-1, *[1] * (clean.dim() - 1))
    return ((1 - t) * clean + t * noise).to(clean.dtype), noise - clean
