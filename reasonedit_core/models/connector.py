"""The Step1X connector: MLLM states and timestep -> tokens for the DiT, and one pooled vector.

B batch (in a pack: documents), T text tokens, C connector width, M width of the MLLM's states, P pooled width.

Only two gates per block depend on the timestep, so everything else is computed once per prompt (`prepare`) and the
steps of a denoising run repeat the cheap rest (`refine`). The submodule `S` and every other name are those of the
released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import Timesteps
from einops import rearrange
from torch import Tensor, nn

from ..kernels import Mask, attention
from ..packing import PackMask
from .streams import SAMPLES, Modulated, Spans, document_numbers, glue

Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
"""(q, k, v (B, T, H, D), mask | None) -> (B, T, H, D): the dispatch with its choices bound."""

SINUSOID = 256
"""Width of the timestep's sinusoid inside the connector; a constant of the trained system."""


@dataclass(frozen=True, slots=True)
class ConnectorState:
    """What of the connector does not depend on the timestep.

    tokens (B, T, C): embedded MLLM states. attended (B, T, C): attention of the first block, which no gate precedes.
    context (B, C): embedded mean of the valid states. pooled (B, P). mask (B, 1, T, T) bool, or None when all are
    valid. In a pack tokens and attended are (1, T, C), all documents in a row; mask is of the valid tokens alone, pieces
    says where they stand (see `prepare_pack`), spans which document's gates a token takes.
    """

    tokens: Tensor
    attended: Tensor
    context: Tensor
    pooled: Tensor
    mask: Mask
    spans: Modulated = SAMPLES
    pieces: tuple[int, ...] | None = None


class TimestepEmbedder(nn.Module):
    """Sinusoid (cos first) of a number, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sinusoid = Timesteps(SINUSOID, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = nn.Sequential(nn.Linear(SINUSOID, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (B,), already times 1000 -> (B, C) in `dtype`, the dtype that the weights compute in."""
        return self.mlp(self.sinusoid(t).to(dtype))


class ContextEmbedder(nn.Module):
    """Linear, SiLU, Linear on the mean of the MLLM's states."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, mean: Tensor) -> Tensor:
        """(B, M) -> (B, C)."""
        return self.linear_2(nn.functional.silu(self.linear_1(mean)))


class RefinerMLP(nn.Module):
    """C -> 4 C -> C with SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fc2(nn.functional.silu(self.fc1(x)))


class RefinerBlock(nn.Module):
    """Self-attention and MLP whose residuals are gated by timestep and prompt; nothing is shifted or scaled."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn_qkv = nn.Linear(width, 3 * width)
        self.self_attn_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = RefinerMLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def attend(self, x: Tensor, mask: Mask, attend: Attend = attention) -> Tensor:
        """Projected self-attention of x (B, T, C) -> (B, T, C), before its gate."""
        q, k, v = rearrange(self.self_attn_qkv(self.norm1(x)), "b t (n h d) -> n b t h d", n=3, h=self.heads)
        return self.self_attn_proj(rearrange(attend(q, k, v, mask), "b t h d -> b t (h d)"))

    def forward(self, x: Tensor, attended: Tensor, condition: Tensor, spans: Modulated = SAMPLES) -> Tensor:
        """x, attended (B, T, C); condition (B', C) with B or B' possibly 1 -> (max(B, B'), T, C)."""
        gate_attention, gate_mlp = self.adaLN_modulation(condition).chunk(2, dim=-1)
        x = spans.gated(x, gate_attention, attended)
        return spans.gated(x, gate_mlp, self.mlp(self.norm2(x)))


class TokenRefiner(nn.Module):
    """The blocks, under the name that the released weights give them."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(width, heads) for _ in range(depth))


class Refiner(nn.Module):
    """Embedders and blocks: the released submodule `S`. It only holds parameters; `Step1XConnector` runs them."""

    def __init__(self, in_channels: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.c_embedder = ContextEmbedder(in_channels, width)
        self.individual_token_refiner = TokenRefiner(width, heads, depth)


class Step1XConnector(nn.Module):
    """MLLM states (B, T, M), timestep and mask -> tokens (B, T, C) and pooled vector (B, P)."""

    def __init__(
        self,
        in_channels: int = 3584,
        hidden_size: int = 4096,
        heads_num: int = 32,
        depth: int = 2,
        pooled_channels: int = 768,
    ) -> None:
        super().__init__()
        self.S = Refiner(in_channels, hidden_size, heads_num, depth)
        self.global_proj_out = nn.Linear(in_channels, pooled_channels)

    def prepare(self, x: Tensor, mask: Tensor | None = None, attend: Attend = attention) -> ConnectorState:
        """The part that one prompt needs once: x (B, T, M), mask (B, T) of valid tokens (padding right) or None."""
        mask = None if mask is None else mask.to(device=x.device, dtype=torch.bool)
        mean = masked_mean(x, mask)
        pairs = None if mask is None else pairwise(mask)
        tokens = self.S.input_embedder(x)
        return ConnectorState(
            tokens=tokens,
            attended=self.S.individual_token_refiner.blocks[0].attend(tokens, pairs, attend),
            context=self.S.c_embedder(mean),
            pooled=self.global_proj_out(mean),
            mask=pairs,
        )

    def prepare_pack(self, x: Tensor, lengths: Sequence[tuple[int, int]], attend: Attend = attention) -> ConnectorState:
        """`prepare` for documents in one row: x (1, T, M). lengths: per document its valid tokens and, behind them, its
        fillers, which are padding that the DiT sees (v1.0 and v1.1); tokens behind the last document are the pack's own
        padding.
        """
        pieces = (*(n for pair in lengths for n in pair), x.shape[1] - sum(map(sum, lengths)))
        mean = torch.cat([masked_mean(part, None) for part in x.split(pieces, dim=1)[:-1:2]])
        mask = None if len(lengths) == 1 else PackMask(document_numbers(pieces[:-1:2], x.device))
        tokens = self.S.input_embedder(x)
        return ConnectorState(
            tokens=tokens,
            attended=self.S.individual_token_refiner.blocks[0].attend(tokens, mask, _between(pieces, attend)),
            context=self.S.c_embedder(mean),
            pooled=self.global_proj_out(mean),
            mask=mask,
            spans=Spans((*map(sum, lengths), pieces[-1]), (*range(len(lengths)), None)),
            pieces=pieces,
        )

    def refine(self, state: ConnectorState, t: Tensor, attend: Attend = attention) -> Tensor:
        """Tokens at timestep t (B',) in 0..1. B' and the state's batch are equal, or one of them is 1."""
        # Times 1000 in the dtype given: a bf16 t rounds here, which is part of the released numerics.
        condition = self.S.t_embedder(t * 1000, state.tokens.dtype) + state.context
        attend = attend if state.pieces is None else _between(state.pieces, attend)
        x, attended = state.tokens, state.attended
        for index, block in enumerate(self.S.individual_token_refiner.blocks):
            if index > 0:
                attended = block.attend(x, state.mask, attend)
            x = block(x, attended, condition, state.spans)
        return x

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, M), t (B,) in 0..1, mask (B, T) or None -> tokens (B, T, C), pooled (B, P)."""
        state = self.prepare(x, mask)
        return self.refine(state, t), state.pooled


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the valid tokens of x (B, T, M) -> (B, M), in x's dtype."""
    # fp16 sums of hundreds of MLLM states overflow; bf16 and fp32 sum in their own dtype, as the released code does.
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    if mask is None:
        return (x.sum(dim=1, dtype=wide) / x.shape[1]).to(x.dtype)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return ((x * mask.unsqueeze(-1)).sum(dim=1, dtype=wide) / count).to(x.dtype)


def pairwise(mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T): a valid token sees valid tokens; every token sees the first, so that no row is empty."""
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return pairs | first


def _between(pieces: tuple[int, ...], attend: Attend) -> Attend:
    """Attention among the valid tokens of packed documents; pieces: see `prepare_pack`, in one flat row."""
    if not any(pieces[1::2]) and not pieces[-1]:
        return attend

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        values = v.split(pieces, dim=1)
        valid = attend(*(glue(x.split(pieces, dim=1)[:-1:2]) for x in (q, k, v)), mask).split(pieces[:-1:2], dim=1)
        out = []
        for document, part in enumerate(valid):
            # A filler sees its document's first token alone (`pairwise`), so its result is that token's value.
            out += [part, values[2 * document][:, :1].expand(-1, pieces[2 * document + 1], -1, -1)]
        return glue([*out, values[-1]])

    return run
