"""Tiny ReasonBrains and features for tests: the classes of the real ones, a few numbers wide."""

from __future__ import annotations

from dataclasses import replace

import torch

from reasonedit.reasonedit_core.models.reasonbrain.brain import ReasonBrain
from reasonedit.reasonedit_core.models.reasonbrain.frce import Features
from reasonedit.reasonedit_core.models.reasonbrain.spec import BrainSpec, Switches

TINY = BrainSpec(
    vision=32,
    grid=4,
    language=48,
    text=24,
    context=24,
    channels=32,
    frce=32,
    frce_heads=4,
    cme=32,
    cme_heads=4,
    qformer=24,
    qformer_layers=2,
    qformer_heads=2,
)


def tiny_brain(seed: int = 0, spec: BrainSpec = TINY, **off) -> ReasonBrain:
    """A tiny ReasonBrain from `seed`; `off` are the fields of Switches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ReasonBrain(spec, Switches(**off)).eval()


def random_features(spec: BrainSpec = TINY, batch: int = 1, regions: int = 5, objects: int = 3, text: int = 9, seed: int = 0):
    """Features of the right shapes, everything valid."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng)

    n = spec.grid**2
    return Features(
        image=draw(batch, n, spec.vision),
        taps=draw(batch, n, len(spec.taps) * spec.vision),
        text=draw(batch, text, spec.text),
        text_keep=torch.ones(batch, text, dtype=torch.bool),
        objects=draw(batch, objects, spec.text),
        object_keep=torch.ones(batch, objects, dtype=torch.bool),
        masks=(draw(batch, regions, spec.grid, spec.grid) > 0).float(),
        geometry=draw(batch, regions, 8),
        region_keep=torch.ones(batch, regions, dtype=torch.bool),
    )


def padded(features: Features, regions: int = 2, objects: int = 2, text: int = 3, value: float = 7.0) -> Features:
    """The same features with invalid regions, objects and text tokens of `value` behind the valid ones."""

    def longer(x: torch.Tensor, n: int) -> torch.Tensor:
        fill = False if x.dtype == torch.bool else value
        return torch.cat([x, torch.full((x.shape[0], n, *x.shape[2:]), fill, dtype=x.dtype)], dim=1)

    return replace(
        features,
        text=longer(features.text, text),
        text_keep=longer(features.text_keep, text),
        objects=longer(features.objects, objects),
        object_keep=longer(features.object_keep, objects),
        masks=longer(features.masks, regions),
        geometry=longer(features.geometry, regions),
        region_keep=longer(features.region_keep, regions),
    )
