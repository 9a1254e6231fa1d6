"""The denoiser of ReasonEdit-Q: diffusers' `QwenImageTransformer2DModel` behind the `Denoiser` seam.

The transformer reads one sequence [text, target, reference 1, reference 2, ...]; a picture's place in that list is its
frame index in the rotary positions, so the order of the references carries meaning ("Picture 1" is the first). The
checkpoint's own config decides whether references are modulated as clean pictures (`zero_cond_t`, the 2511 release).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..kernels.dispatch import Run
from ..models.qwen_attention import QwenAttention
from ..types import Conditioning, Counts, LatentImage

POSITIONS = 4096
"""Rows of the transformer's table of positive positions; text starts behind the largest half side and must end in it."""

TIMESTEPS = 1000


class QwenImageDenoiser:
    """One velocity prediction of a Qwen-Image transformer.

    transformer: a `QwenImageTransformer2DModel` of an editing checkpoint; its attention is replaced by ours.
    host: attention function of a host application, if it shall be used.
    """

    kind: Literal["velocity"] = "velocity"

    def __init__(self, transformer: nn.Module, *, counts: Counts | None = None, host: Run | None = None) -> None:
        check_config(transformer.config)
        transformer.set_attn_processor(QwenAttention(host))
        self.transformer = transformer
        self.counts = counts or Counts()

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        *,
        grid: tuple[int, int],
        references: Sequence[LatentImage] = (),
    ) -> torch.Tensor:
        """latents (B, N, C) packed, N = grid height x width; t (B,) in 0..1, 1 = noise -> velocity (B, N, C).

        A batch shares its references: two passes of guidance are one call with conditioning of batch 2 (shorter text
        padded at its end and masked) or two calls with batch 1; the results are the same.
        """
        batch, n_target = latents.shape[:2]
        grids = [tuple(grid), *((image.height, image.width) for image in references)]
        _check_call(latents, conditioning, grids, references)
        sequence = torch.cat([latents, *(image.tokens.to(latents).expand(batch, -1, -1) for image in references)], dim=1)
        # The released pipelines round the timestep in 0..1000 to the latents' type before they scale it down again.
        timestep = (t * TIMESTEPS).to(latents.dtype) / TIMESTEPS
        self.counts.denoiser_forwards += 1
        velocity = self.transformer(
            hidden_states=sequence,
            timestep=timestep,
            encoder_hidden_states=conditioning.tokens,
            encoder_hidden_states_mask=conditioning.mask,
            img_shapes=[[(1, height, width) for height, width in grids]] * batch,
            return_dict=False,
        )[0]
        return velocity[:, :n_target]


def check_config(config) -> None:
    """Refuse transformers of the same class that are no editing models, with the reason."""
    wrong = [name for name in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope") if config.get(name)]
    if wrong:
        raise CheckpointError(
            f"expected the transformer of a Qwen-Image-Edit checkpoint, found one whose config sets {', '.join(wrong)} "
            "(a Layered or guidance-distilled variant); point to a Qwen-Image-Edit, -2509 or -2511 checkpoint"
        )


def _check_call(latents, conditioning: Conditioning, grids, references: Sequence[LatentImage]) -> None:
    counted = [latents.shape[1], *(image.tokens.shape[1] for image in references)]
    for number, ((height, width), tokens) in enumerate(zip(grids, counted, strict=True)):
        if height * width != tokens:
            what = "target" if number == 0 else f"reference {number}"
            raise ConfigError(f"{what}: expected {height} x {width} = {height * width} packed tokens, found {tokens}")
    start = max(max(height // 2, width // 2) for height, width in grids)
    n_text = conditioning.tokens.shape[1]
    if start + n_text > POSITIONS:
        raise ConfigError(
            f"the transformer has {POSITIONS} text positions; {n_text} text tokens that start at {start} do not fit. "
            "Shorten the instruction, use fewer references, or lower the size"
        )
