"""The QFormer, right of eq. 3: V̂ = QFormer(V), from the language model's space into the denoiser's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from ...errors import CheckpointError
from ...weightfiles import read_state
from .spec import BrainSpec


@dataclass(frozen=True, slots=True)
class Taken:
    """What a BLIP-2 checkpoint gave: names copied, names whose shapes differ, names it does not have."""

    copied: tuple[str, ...]
    differing: tuple[str, ...]
    missing: tuple[str, ...]


class QFormer(nn.Module):
    """transformers' `Blip2QFormerModel` with own queries and a projection to the denoiser's context width.

    Cross-attention in every second layer, no dropout: the drops of conditions regularise already.
    """

    def __init__(self, spec: BrainSpec) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, spec.queries, spec.qformer) * 0.02)
        self.model = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=spec.qformer,
                num_hidden_layers=spec.qformer_layers,
                num_attention_heads=spec.qformer_heads,
                intermediate_size=4 * spec.qformer,
                cross_attention_frequency=2,
                encoder_hidden_size=spec.language,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.out = nn.Identity() if spec.qformer == spec.context else nn.Linear(spec.qformer, spec.context)

    def forward(self, states: Tensor) -> Tensor:
        """V (B, r, d_l) -> V̂ (B, queries, d_c)."""
        queries = self.queries.expand(states.shape[0], -1, -1)
        out = self.model(query_embeds=queries, encoder_hidden_states=states)
        return self.out(out.last_hidden_state.to(self.queries.dtype))

    @torch.no_grad()
    def init_from_blip2(self, path: str | Path) -> Taken:
        """Copy what fits from a BLIP-2 checkpoint (a local folder or file; its `qformer.` tensors).

        The paper starts from a trained QFormer. Cross-attention keys and values of BLIP-2 are made for its vision width and do
        not fit; they stay as they are and are named in the answer. Raises CheckpointError where there is no QFormer.
        """
        state = {key.partition("qformer.")[2]: value for key, value in read_state(path).items() if "qformer." in key}
        if not state:
            raise CheckpointError(f"{path}: expected BLIP-2 weights with `qformer.` tensors, found none. Name a BLIP-2 folder.")
        own = self.model.state_dict()
        fits = {key for key in own if key in state and state[key].shape == own[key].shape}
        for key in fits:
            own[key].copy_(state[key])
        differing = {key for key in own if key in state} - fits
        return Taken(tuple(sorted(fits)), tuple(sorted(differing)), tuple(sorted(set(own) - set(state))))
