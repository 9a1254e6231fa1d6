"""The denoiser of ReasonEdit-Q: diffusers' `QwenImageTransformer2DModel` behind the `Denoiser` seam.

The transformer reads one sequence [text, target, reference 1, reference 2, ...]; a picture's place in that list is its
frame index in the rotary positions, so the order of the references carries meaning ("Picture 1" is the first). The
checkpoint's own config decides whether references are modulated as clean pictures (`zero_cond_t`, the 2511 release).

The transformer's modules are used, its forward is ours: on the fused ops of `kernels` where there is a kernel, else with the
roundings of diffusers. Blocks are entered through their own call, so adapters, hooks and weights that come and go with a block
work as they do there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..kernels import attend_with
from ..kernels.dispatch import Run
from ..models.keyvalues import KeyValues
from ..models.qwen_packed import enable_packs
from ..models.streams import BATCH, SAMPLES, Batch, Samples, last_norm
from ..types import Conditioning, Counts, LatentImage
from .dit import check_tokens

POSITIONS = 4096
"""Rows of the transformer's table of positive positions; text starts behind the largest half side and must end in it."""

TIMESTEPS = 1000

_KEPT = 3
"""Prepared conditionings kept: the conditional, the unconditional and their joint batch."""

Grids = tuple[tuple[int, int], ...]
"""(height, width) of the target, then of each reference."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What depends on a conditioning and the sizes alone, not on the weights or the timestep.

    rope (T + N, D / 2) complex, of text, target and references. mask (B, 1, 1, T + N) bool or None: which keys every query may
    see. layout: which row of modulation a token takes.
    """

    conditioning: Conditioning
    grids: Grids
    batch: int
    device: torch.device
    rope: torch.Tensor
    mask: torch.Tensor | None
    layout: Batch


class QwenImageDenoiser:
    """One velocity prediction of a Qwen-Image transformer.

    transformer: a `QwenImageTransformer2DModel` of an editing checkpoint; its modules are used, its forward is ours.
    host: attention function of a host application, if it shall be used. backend: "auto", or the kernel backend that computes
    every attention in its place (`kernels.attend_with`).
    """

    kind: Literal["velocity"] = "velocity"

    def __init__(
        self, transformer: nn.Module, *, counts: Counts | None = None, host: Run | None = None, backend: str = "auto"
    ) -> None:
        check_config(transformer.config)
        enable_packs(transformer)
        self.transformer = transformer
        self.counts = counts or Counts()
        self.host, self.backend = host, backend
        self._prepared: list[_Prepared] = []

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        *,
        grid: tuple[int, int],
        references: Sequence[LatentImage] = (),
        keep: KeyValues | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """latents (B, N, C) packed, N = grid height x width; t (B,) in 0..1, 1 = noise -> velocity (B, N, C).

        A batch shares its references: two passes of guidance are one call with conditioning of batch 2 (shorter text
        padded at its end and masked) or two calls with batch 1; the results are the same. keep, rows: see
        `interfaces.Denoiser`.
        """
        batch, n_target = latents.shape[:2]
        grids = (tuple(grid), *((image.height, image.width) for image in references))
        check_tokens(latents, grids, references, rows)
        _check_text(conditioning, grids)
        sequence = latents
        if rows is None:
            sequence = torch.cat([latents, *(image.tokens.to(latents).expand(batch, -1, -1) for image in references)], dim=1)
        # The released pipelines round the timestep in 0..1000 to the latents' type before they scale it down again.
        timestep = (t * TIMESTEPS).to(latents.dtype) / TIMESTEPS
        self.counts.denoiser_forwards += 1
        prepared = self._prepare(conditioning, grids, sequence)
        return self._velocity(sequence, timestep, conditioning.tokens, prepared, keep, rows)[:, :n_target]

    def _velocity(
        self,
        sequence: torch.Tensor,
        timestep: torch.Tensor,
        tokens: torch.Tensor,
        prepared: _Prepared,
        keep: KeyValues | None,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """sequence (B, N, C) of target and references, timestep (B,) in 0..1, tokens (B, T, D) -> velocity (B, N, C).

        rows (n,): sequence (B, n, C) is these rows of the target alone, all of them modulated by the timestep.
        """
        # A host's attention is only promised as many queries as keys.
        net, attend = self.transformer, attend_with(self.host if rows is None else None, self.backend)
        layout, rope = prepared.layout if rows is None else BATCH, prepared.rope
        image = net.img_in(sequence)
        text = net.txt_in(net.txt_norm(tokens))
        if keep is not None:
            attend, rope = keep.enter(attend, rope, text.shape[1], rows)
        if layout.n_documents is not None:
            timestep = torch.cat([timestep, timestep * 0])
        temb = net.time_text_embed(timestep, image)
        for block in net.transformer_blocks:
            image, text = block(image, text, temb, rope, prepared.mask, attend, layout=layout)
        return net.proj_out(last_norm(net.norm_out, image, temb[: layout.n_documents], SAMPLES))

    def _prepare(self, conditioning: Conditioning, grids: Grids, sequence: torch.Tensor) -> _Prepared:
        batch, device = len(sequence), sequence.device
        n_image = sum(height * width for height, width in grids)
        for kept in self._prepared:
            if kept.conditioning is conditioning and (kept.grids, kept.batch, kept.device) == (grids, batch, device):
                return kept
        made = _Prepared(
            conditioning,
            grids,
            batch,
            device,
            _rope(self.transformer.pos_embed, grids, conditioning.tokens.shape[1], device),
            _joint_mask(conditioning.mask, n_image, device),
            _clean_references(grids, batch, device) if self.transformer.config.get("zero_cond_t") else BATCH,
        )
        self._prepared = [*self._prepared, made][-_KEPT:]
        return made


def _rope(pos_embed: nn.Module, grids: Grids, n_text: int, device: torch.device) -> torch.Tensor:
    """(T + N, D / 2) complex64: text, target, references."""
    shapes = [[(1, height, width) for height, width in grids]]
    # By keywords: the order of the arguments differs between the versions of diffusers.
    image, text = pos_embed(shapes, max_txt_seq_len=n_text, device=device)
    return torch.cat([text, image])


def _joint_mask(mask: torch.Tensor | None, n_image: int, device: torch.device) -> torch.Tensor | None:
    """(B, T) valid text tokens -> (B, 1, 1, T + N): every query sees valid text and all of the pictures."""
    if mask is None or bool(mask.all()):
        return None
    mask = mask.to(device, torch.bool)
    return torch.nn.functional.pad(mask, (0, n_image), value=True)[:, None, None]


def _clean_references(grids: Grids, batch: int, device: torch.device) -> Batch:
    """Modulation rows: of sample b the target takes row b, its references row B + b, which is that of t = 0."""
    target, *references = (height * width for height, width in grids)
    reference = torch.arange(target + sum(references), device=device) >= target
    rows = torch.arange(batch, device=device)[:, None] + batch * reference
    return Batch(n_documents=batch, image=Samples(rows.int()))


def check_config(config) -> None:
    """Refuse transformers of the same class that are no editing models, with the reason."""
    wrong = [name for name in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope") if config.get(name)]
    if wrong:
        raise CheckpointError(
            f"expected the transformer of a Qwen-Image-Edit checkpoint, found one whose config sets {', '.join(wrong)} "
            "(a Layered or guidance-distilled variant); point to a Qwen-Image-Edit, -2509 or -2511 checkpoint"
        )


def _check_text(conditioning: Conditioning, grids: Grids) -> None:
    start = max(max(height // 2, width // 2) for height, width in grids)
    n_text = conditioning.tokens.shape[1]
    if start + n_text > POSITIONS:
        raise ConfigError(
            f"the transformer has {POSITIONS} text positions; {n_text} text tokens that start at {start} do not fit. "
            "Shorten the instruction, use fewer references, or lower the size"
        )
