"""The blocks of diffusers' `QwenImageTransformer2DModel` on the fused ops of `kernels`, and on packed documents.

The block's submodules are used, not its forward: that makes many passes over its tensors, differs between the versions of
diffusers, takes one set of grids for the whole batch and one modulation per sample. `enable_packs` gives every block a second
way in behind its own call, so that whatever wraps a block's call (FSDP2, checkpointing, streamed weights, hooks) wraps ours
as well.
Legend: B batch, T text tokens, N picture tokens, L = T + N, C width, D head width, R rows of modulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..kernels import Mask
from ..packing import Grid
from .connector import Attend
from .halves import feed_forward
from .qwen_attention import joint_attention
from .streams import Layout, Packed, Spans


class PackedBlock:
    """Mixin for a block of diffusers: with a `layout` it is entered by `run_block`, without one as diffusers calls it."""

    def forward(self, *args: object, layout: Layout | None = None, **kwargs: object) -> tuple[Tensor, Tensor]:
        """With a layout, the arguments and the result of `run_block`."""
        if layout is None:
            return super().forward(*args, **kwargs)
        return run_block(self, *args, layout=layout, **kwargs)


def enable_packs(transformer: nn.Module) -> None:
    """Let the blocks of a `QwenImageTransformer2DModel` take a layout too. Nothing else about them changes."""
    for block in transformer.transformer_blocks:
        if not isinstance(block, PackedBlock):
            block.__class__ = _packed(type(block))


@lru_cache(maxsize=8)
def _packed(cls: type) -> type:
    # Under the same name: diffusers and our offloading know blocks by the names of their classes.
    return type(cls.__name__, (PackedBlock, cls), {})


def run_block(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, rope: Tensor, mask: Mask, attend: Attend, *, layout: Layout
) -> tuple[Tensor, Tensor]:
    """image (B, N, C), text (B, T, C) -> the same after this block; B is 1 in a pack.

    temb (R, C): a row per document (of a batch, per sample), then, for checkpoints that modulate references as clean pictures,
    a row per document at t = 0; `layout.image` says which one a token takes. rope (L, D / 2) complex, in the order of
    `layout.join`.
    """
    shift, scale, gate, shift2, scale2, gate2 = block.img_mod(temb).chunk(6, dim=1)
    text_parameters = block.txt_mod(temb[: layout.n_documents])
    text_shift, text_scale, text_gate, text_shift2, text_scale2, text_gate2 = text_parameters.chunk(6, dim=1)
    image_in = layout.image.normed(block.img_norm1, image, scale, shift)
    text_in = layout.text.normed(block.txt_norm1, text, text_scale, text_shift)
    image_out, text_out = joint_attention(block.attn, image_in, text_in, rope, mask, attend, layout)

    image, inner = layout.image.gated_normed(block.img_norm2, image, gate, image_out, scale2, shift2)
    image = layout.image.gated(image, gate2, feed_forward(block.img_mlp, inner), clamp=True)

    text, inner = layout.text.gated_normed(block.txt_norm2, text, text_gate, text_out, text_scale2, text_shift2)
    return image, layout.text.gated(text, text_gate2, feed_forward(block.txt_mlp, inner), clamp=True)


def pack_rope(
    pos_embed: nn.Module, grids: Sequence[Sequence[Grid]], text_lengths: Sequence[int], layout: Packed, device: torch.device
) -> Tensor:
    """Rotation table (L, D / 2) complex64 in the order of `layout.join`, each document's own as in a forward of its own."""
    tables: tuple[list[Tensor], list[Tensor]] = ([], [])
    for sizes, n_text in zip(grids, text_lengths, strict=True):
        shapes = [[(1, height, width) for height, width in sizes]]
        # By keywords: the order of the arguments differs between the versions of diffusers.
        image, text = pos_embed(shapes, max_txt_seq_len=n_text, device=device)
        tables[0].append(text)
        tables[1].append(image)
    padding = (layout.text_lengths[-1], layout.image_lengths[-1])
    streams = []
    for parts, n_padding in zip(tables, padding, strict=True):
        streams.append(torch.cat([*parts, parts[0].new_ones(n_padding, parts[0].shape[1])])[None])
    return layout.join(*streams)[0]


def image_spans(grids: Sequence[Sequence[Grid]], padding: int, *, clean_references: bool) -> Spans:
    """Which row of modulation each picture token takes: its document's, or for references, if they are modulated as clean
    pictures, its document's at t = 0, which stands behind those of all documents."""
    lengths: list[int] = []
    rows: list[int | None] = []
    for number, sizes in enumerate(grids):
        target, *references = (height * width for height, width in sizes)
        lengths += [target, sum(references)]
        rows += [number, number + len(grids) if clean_references else number]
    return Spans((*lengths, padding), (*rows, None))
