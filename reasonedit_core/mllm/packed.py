"""Qwen2.5-VL over a pack: many documents in one sequence, none of which sees another, states and losses in one pass.

L tokens of the pack, D width of the states, P patches, n tokens of a picture.

The model is the one that also reasons and conditions. Its attention modules are told to call `_attend`, registered under a
name of our own: it takes a call that carries a pack to our kernels, and every other call to the function that was there
before. So nothing is switched to and fro, a recomputation in backward finds what the forward found, and other models of the
process never meet it. (transformers 5 refuses its own FlexAttention for this model; 4.55 reads jumps in 3-D positions as
borders of documents. Neither is asked.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, PackingError
from ..kernels import attention, head_cross_entropy, linear_cross_entropy
from ..packing import IGNORED, PADDING, PackMask, TextPack, check_documents
from .qwen25vl import QwenVL, language_model

ATTENTION = "reasonedit_packed"
"""The name under which transformers knows `_attend`."""

PLAIN = "sdpa"
"""What `_attend` hands every call to that carries no pack; the attention that `load.make_config` asks for."""

HEAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of an lm_head that is a plain matrix; others (fp8, 4 bit) go through their module."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pack:
    """What stands in the place of an attention mask: who sees whom, and the backend that was asked for."""

    mask: PackMask
    backend: str


class PackedMLLM(nn.Module):
    """The MLLM as a unit of training. mllm: its model becomes the submodule `model`, and is used as it is from now on.

    checkpointing: keep only the inputs of layers (and of the vision tower, where it is trained) and compute the rest again
    in backward. backend: of `kernels.attention`. Dropout and the like follow `train()` and `eval()` as in any module.
    """

    def __init__(self, mllm: QwenVL, *, checkpointing: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.model = mllm.model
        self.mllm = mllm
        self.checkpointing = checkpointing
        self.backend = backend
        _take_packs(language_model(self.model))

    @property
    def device(self) -> torch.device:
        """Where the weights are now; packs are brought there."""
        return self.mllm.device

    def forward(self, pack: TextPack, *, features: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """States (L, D) after the final norm, and the cross entropy (answers,) float32 of every labelled row, in row order.

        A row with a label is predicted from the row before it. features: per picture its tokens (n, D) from the vision
        tower, in the order of the placeholders, in place of pack.patches. States of padding mean nothing. Raises
        PackingError where ids, pictures and labels do not belong together.
        """
        _check(pack)
        layers = _Pack(PackMask(pack.doc_id.to(self.device), causal=True), self.backend)
        states = self._decode(self._embed(pack, features), pack.positions.to(self.device)[:, None], layers)
        return states, self._cross_entropy(states, pack)

    @torch.no_grad()
    def input_embeddings(self, ids: Tensor) -> Tensor:
        """Rows (n, D) of the embedding table for token ids (n,), without a graph. A second way in, beside `forward`: FSDP2
        must be told of it (`register_fsdp_forward_method`), as the table is cut over the ranks."""
        return self.model.get_input_embeddings()(ids.to(self.device))

    def _embed(self, pack: TextPack, features: Sequence[Tensor] | None) -> Tensor:
        """Input embeddings (1, L, D), pictures at their placeholders."""
        ids = pack.ids.to(self.device)[None]
        embeds = self.model.get_input_embeddings()(ids)
        shown = ids == self.mllm.image_token_id
        if features is not None:
            tokens = torch.cat([embeds.new_empty(0, embeds.shape[-1]), *(feature.to(embeds) for feature in features)])
        elif pack.grids:
            tokens = self._see(pack).to(embeds)
        else:
            tokens = embeds.new_empty(0, embeds.shape[-1])
        if int(shown.sum()) != len(tokens):
            raise PackingError(
                f"expected as many placeholders as vision tokens in a pack, found {int(shown.sum())} of token "
                f"{self.mllm.image_token_id} and {len(tokens)} tokens of pictures. Expand the placeholders (QwenVL.expand)."
            )
        return embeds.masked_scatter(shown[..., None], tokens) if len(tokens) else embeds

    def _see(self, pack: TextPack) -> Tensor:
        """Tokens of all pictures of the pack, (sum n, D), in one call. Without a graph where the tower is frozen."""
        tower = self.model.model.visual
        values = pack.patches.to(self.device, tower.dtype)
        grids = torch.tensor([(1, *grid) for grid in pack.grids], dtype=torch.long, device=self.device)

        def look(patches: Tensor) -> Tensor:
            output = tower(patches, grid_thw=grids)
            return output if isinstance(output, Tensor) else output.pooler_output  # transformers 4.55 | 5

        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
        if trained and self.checkpointing:
            return checkpoint(look, values, use_reentrant=False)
        with torch.set_grad_enabled(trained):
            return look(values)

    def _decode(self, states: Tensor, positions: Tensor, layers: _Pack) -> Tensor:
        """Embeddings (1, L, D), positions (3, 1, L) -> states (L, D).

        Layers are entered one by one: a mask that is prepared leaves transformers nothing to guess, and recomputation
        needs no flag in the model, which would forbid the cache while a training model speaks.
        """
        model = language_model(self.model)
        options = {"attention_mask": layers, "position_embeddings": model.rotary_emb(states, positions), "use_cache": False}
        for layer in model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                output = checkpoint(layer, states, use_reentrant=False, **options)
            else:
                output = layer(states, **options)
            states = output[0] if isinstance(output, tuple) else output  # transformers 4.55 | 5
        return model.norm(states[0])  # the index first: FSDP2 hangs its backward on outputs, which had better be no views

    def _cross_entropy(self, states: Tensor, pack: TextPack) -> Tensor:
        rows = (pack.labels != IGNORED).nonzero()[:, 0]
        if not len(rows):
            return states.new_empty(0, dtype=torch.promote_types(states.dtype, torch.float32))
        self.mllm.require_lm_head()
        before, targets = states[(rows - 1).to(self.device)], pack.labels[rows].to(self.device)
        head = self.model.lm_head
        if isinstance(head, nn.Linear) and head.bias is None and head.weight.dtype in HEAD_DTYPES:
            return linear_cross_entropy(before, head.weight, targets)
        return head_cross_entropy(head, before, targets, columns=self.model.config.get_text_config().vocab_size)


def _check(pack: TextPack) -> None:
    """Raise PackingError where the rows of a pack do not belong together."""
    length = len(pack.ids)
    found = {name: tuple(getattr(pack, name).shape) for name in ("ids", "positions", "doc_id", "labels")}
    if found != {"ids": (length,), "positions": (3, length), "doc_id": (length,), "labels": (length,)}:
        raise PackingError(f"expected ids, doc_id, labels (L,) and positions (3, L) in a pack, found {found}.")
    patches = sum(height * width for height, width in pack.grids)
    if patches != len(pack.patches):
        raise PackingError(
            f"expected {patches} patches for pictures of {list(pack.grids)} (height, width in patches), found "
            f"{len(pack.patches)}."
        )
    check_documents(pack.doc_id)
    rows = (pack.labels != IGNORED).nonzero()[:, 0]
    lost = (rows == 0) | (pack.doc_id[rows - 1] != pack.doc_id[rows]) | (pack.doc_id[rows] == PADDING)
    if bool(lost.any()):
        raise PackingError(
            f"expected labels on tokens that stand behind another one of their document, found one at row "
            f"{int(rows[lost][0])}, at the head of a document or in padding. Label answers only."
        )


def _take_packs(model: Any) -> None:
    """Make the attention modules of a decoder take packs. Doing it again changes nothing.

    Each module gets a config of its own to read the choice from: the model's own, which masks are made by and which is
    saved with it, stays as it was.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    for layer in model.layers:
        found = layer.self_attn.config._attn_implementation
        if found == ATTENTION:
            continue
        if found != PLAIN:
            raise ConfigError(f"expected an MLLM with attention {PLAIN!r}, found {found!r}. Load it by load_mllm.")
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation = ATTENTION


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Pack | Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: query (B, H, L, d), key and value (B, Hk, L, d) -> (B, L, H, d), None."""
    if not isinstance(attention_mask, _Pack):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        plain = ALL_ATTENTION_FUNCTIONS[PLAIN]
        return plain(module, query, key, value, attention_mask, dropout=dropout, **options)
    if dropout:
        raise ConfigError(f"attention_dropout of the MLLM: expected 0 for packed documents, found {dropout}.")
    # Under autocast the rotation leaves queries and keys in float32; values tell in what the attention shall run.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    return attention(q, k, v, attention_mask.mask, backend=attention_mask.backend), None
