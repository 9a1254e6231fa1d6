"""Loss sums, and their way back through the models.

A answer tokens, N picture tokens, C channels. Losses are sums here: the engine divides by counts over all ranks and the whole
accumulation window, which it passes to `backward` as factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.packing import IGNORED, ImagePack, TextPack
from .types import NTP, Losses


def next_token(ce: Tensor, pack: TextPack) -> Tensor:
    """NTP loss: the cross entropies (A,) of the labelled rows of a pack, times their weights, summed."""
    return (ce * pack.weights[pack.labels != IGNORED].to(ce)).sum()


def flow_matching(velocity: Tensor, pack: ImagePack) -> Tensor:
    """FM loss: over target tokens, loss_weight times the squared error of the velocity, mean over channels, summed.

    velocity (N, C) as predicted; in float32 at least, whatever the model runs in. Rows without weight (references, padding)
    are left out and not multiplied by zero: what they hold does not matter.
    """
    rows = pack.loss_weight.nonzero()[:, 0].to(velocity.device)
    wide = torch.promote_types(velocity.dtype, torch.float32)
    target = pack.velocity().to(velocity.device)[rows].to(wide)
    weight = pack.loss_weight.to(velocity.device)[rows].to(wide)
    return (weight * (velocity[rows].to(wide) - target).square().mean(dim=-1)).sum()


def backward(losses: Losses, scale: Mapping[str, float]) -> None:
    """Add the gradients of sum(scale[name] * losses.sums[name]) to the parameters. Once per `Losses`: the graphs are freed.

    With a handover in two phases: first what lies behind the seam, down to the leaf (the graph of the DiT is free before
    the MLLM's is entered), then the MLLM with what arrived there and with its own loss (NTP) at once.
    """
    missing = [name for name in losses.sums if name not in scale]
    if missing:
        raise ConfigError(f"expected a scale for every loss ({', '.join(losses.sums)}), found none for {', '.join(missing)}.")
    idle = [name for name, total in losses.sums.items() if not total.requires_grad]
    if idle:
        raise ConfigError(f"no weight that is trained has a part in the loss {', '.join(idle)}. Train one, or leave it out.")
    scaled = {name: total * scale[name] for name, total in losses.sums.items()}
    seam = losses.handover
    if seam is None:
        torch.autograd.backward(list(scaled.values()))
        return
    torch.autograd.backward([total for name, total in scaled.items() if name != NTP])
    roots: list[Tensor] = []
    arrived: list[Tensor | None] = []
    if seam.leaf.grad is not None:
        roots, arrived = [seam.states], [seam.leaf.grad]
    if NTP in scaled:
        roots, arrived = [*roots, scaled[NTP]], [*arrived, None]
    seam.leaf.grad = None
    torch.autograd.backward(roots, arrived)
