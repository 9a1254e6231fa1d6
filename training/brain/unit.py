"""The one unit of ReasonBrain's training, and its steps: a batch in, L_MLLM (eq. A1) and L_DM (eq. A2) out, as sums.

What the frozen encoders see comes with the batch, or is computed here without a graph. What is trained is decided by the
parameters, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...reasonedit_core.brain.generator import sd_schedule
from ...reasonedit_core.conditioners.reasonbrain import as_conditioning
from ...reasonedit_core.denoisers.flux import FluxDenoiser
from ...reasonedit_core.denoisers.three_pass import drop
from ...reasonedit_core.denoisers.unet import UNetDenoiser
from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.models.reasonbrain.frce import Features
from ...reasonedit_core.models.reasonbrain.losses import denoising_loss, flow_noised, mllm_loss, noised
from ..stages import ALIGN, L_DM, L_MLLM
from ..types import Losses, Models

if TYPE_CHECKING:
    from ...reasonedit_core.brain.model import BrainModel
    from ...reasonedit_core.interfaces import RegionFinder
    from ...reasonedit_core.types import Conditioning
    from .source import BrainBatch


class BrainUnit(nn.Module):
    """All that is trained, so that DDP and FSDP2 can wrap it: brain (FRCE, assembler, QFormer, CME), llava, denoiser.

    Frozen encoders and the VAE are not in it. finder: of regions, where batches come without features. guidance: input of
    FLUX's distilled guidance.
    """

    def __init__(self, model: BrainModel, finder: RegionFinder | None = None, guidance: float = 1.0) -> None:
        super().__init__()
        self.brain, self.llava, self.denoiser = model.brain, model.llava.model, model.network
        self.chain = model.conditioner
        self.codec, self.finder, self.kind = model.codec, finder, model.kind
        if model.kind == "flux":
            self.predictor = FluxDenoiser(model.network, guidance=guidance)
            return
        scheduler = sd_schedule(model.scheduler)
        self.alphas, self.target = scheduler.alphas_cumprod, scheduler.config.prediction_type
        self.predictor = UNetDenoiser(model.network, timesteps=len(self.alphas))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.brain.parameters()).device

    def forward(self, batch: BrainBatch, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        """The losses of `wanted` (names of stages.L_MLLM, L_DM, ALIGN) as (B,) rows, float32.

        The logits of the [IMG] tokens come from the pass that also gives V, so L_MLLM costs no further one.
        """
        features, pooled = self._features(batch)
        rows: dict[str, Tensor] = {}
        out = self.chain.run(features, batch.instructions, logits=L_MLLM in wanted)
        if L_MLLM in wanted:
            ids = torch.tensor(self.chain.llava.img_ids)
            rows[L_MLLM] = mllm_loss(out.logits, ids, "rows")
        if ALIGN in wanted:
            rows[ALIGN] = self._distance(out.translated, features)
        if L_DM in wanted:
            made = replace(as_conditioning(out.enhanced), pooled=pooled)
            rows[L_DM] = self._denoise(batch, made)
        return rows

    def _features(self, batch: BrainBatch) -> tuple[Features, Tensor | None]:
        own = next(self.brain.parameters())
        pooled = None if batch.pooled is None else batch.pooled.to(own.device)
        if batch.features is not None:
            return batch.features.to(own.device, own.dtype), pooled
        from .examples import batch_features

        seen = []
        for picture, instruction, objects in zip(batch.pictures, batch.instructions, batch.objects, strict=True):
            picture = picture[None].to(own.device)
            regions = None if self.finder is None else [self.finder.regions(picture, self.chain.llava.grid)]
            one = self.chain.features(picture, [instruction], objects=[objects], regions=regions)
            kept = {"image": one.image[0], "taps": one.taps[0], "text": one.text[0][one.text_keep[0]]}
            kept["objects"] = one.objects[0] if one.objects is not None else one.text[0, :1]
            if regions is not None:
                kept |= {"masks": regions[0].masks, "geometry": regions[0].geometry}
            seen.append({name: value.cpu() for name, value in kept.items()})
        return batch_features(seen).to(own.device, own.dtype), self.chain.pooled(batch.instructions)

    def _distance(self, translated: Tensor, features: Features) -> Tensor:
        """Mean squared distance of V̂ (B, Q, d_c) from the text encoder's states, token by token as far as both reach and over
        tokens that are text (the optional first stage; SmartEdit aligns so)."""
        if translated.shape[-1] != features.text.shape[-1]:
            raise ConfigError(
                f"reasonbrain_align: expected a text encoder as wide as the denoiser's context ({translated.shape[-1]}), found "
                f"{features.text.shape[-1]}. Leave the stage out; this denoiser reads another encoder's states."
            )
        length = min(translated.shape[1], features.text.shape[1])
        keep = features.text_keep[:, :length].to(translated.dtype)
        apart = (translated[:, :length].float() - features.text[:, :length].float()).square().mean(dim=-1)
        return (apart * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)

    def _denoise(self, batch: BrainBatch, made: Conditioning) -> Tensor:
        """L_DM of a batch under its conditioning, dropped where the batch says so -> (B,)."""
        device = self.device
        clean, noise, t = (x.to(device) for x in (batch.clean, batch.noise, batch.t))
        source, packed = batch.source.to(device), self.kind == "flux"
        # FLUX guides in one pass and never meets a null context; CLIP's states would not even fit its width.
        null = None if packed else self.chain.text.null().to(made.tokens)
        if packed:
            grid = (clean.shape[-2] // 2, clean.shape[-1] // 2)
            clean, noise, source = (self.codec.pack(x) for x in (clean, noise, source))
        made = drop(replace(made, reference=source), null, batch.no_text, batch.no_image)
        if packed:
            latents, target = flow_noised(clean, noise, t)
            return denoising_loss(self.predictor(latents, t, made, grid=grid), target, "rows")
        steps = (t * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        latents, target = noised(clean, noise, self.alphas, steps, self.target)
        return denoising_loss(self.predictor.predict(latents, steps, made), target, "rows")


@dataclass(frozen=True, eq=False)
class BrainModels(Models):
    """brain: a `BrainUnit`."""

    brain: nn.Module | None = None

    def units(self) -> dict[str, nn.Module]:
        """The one unit."""
        return {"brain": self.brain}


def reasonbrain_step(models: BrainModels, micro: BrainBatch) -> Losses:
    """L_MLLM and L_DM of a batch, each summed over records with their weights; both are means within a record."""
    return _summed(micro, models.brain(micro, (L_MLLM, L_DM)))


def align_step(models: BrainModels, micro: BrainBatch) -> Losses:
    """L_MLLM, and the distance of V̂ from the text encoder's states. No denoiser is run."""
    return _summed(micro, models.brain(micro, (L_MLLM, ALIGN)))


def _summed(micro: BrainBatch, rows: dict[str, Tensor]) -> Losses:
    sums = {name: (loss * micro.weight.to(loss)).sum() for name, loss in rows.items()}
    # With LLaVA frozen whole (aligning a QFormer alone), L_MLLM is a figure and nothing to learn from.
    sums = {name: total for name, total in sums.items() if total.requires_grad} or sums
    return Losses(sums, parts={name: (float(total.detach()), micro.counts[name]) for name, total in sums.items()})
