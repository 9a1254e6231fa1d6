"""The DiTs on packs: one forward over several documents, each as it would be predicted alone.

Units that a training step calls with an `ImagePack`; they hold the same transformers that the denoisers hold, and agree with
them document by document. D width of the MLLM's states, S their number, T text tokens, N picture tokens, C channels of a
packed latent token, R documents.

Attention, the connector's mean, modulation and positions are per document. Blocks are entered through their own call, so
`fully_shard(block)`, checkpointing and weights that come and go with a block's call all work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, PackingError
from ..kernels import attention
from ..packing import PADDING, ImagePack, check_documents, document_lengths
from ..types import Conditioning
from .dit import TIMESTEPS, VARIANTS, image_positions
from .qwen_image import POSITIONS, check_config

if TYPE_CHECKING:
    from ..models.step1x_transformer import Rope, Step1XEditTransformer2DModel
    from ..models.streams import Packed

FILLER = -1
"""text_index of a token that is no state but zeros: the padding that Step1X-Edit v1.0 and v1.1 show to their DiT."""


@dataclass(frozen=True, slots=True)
class Documents:
    """How many tokens each document has. texts: (states, fillers behind them); pictures: target and references.

    padding: tokens of text and of pictures behind the last document.
    """

    texts: tuple[tuple[int, int], ...]
    pictures: tuple[int, ...]
    padding: tuple[int, int]

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Text tokens of each document."""
        return tuple(map(sum, self.texts))


class PackedStep1X(nn.Module):
    """The Step1X-Edit DiT with its connector.

    variant: v1.0, v1.1 or v1.2. checkpointing: blocks are run again in the backward pass. backend: of attention.
    """

    def __init__(
        self,
        transformer: Step1XEditTransformer2DModel,
        variant: str,
        *,
        checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ConfigError(f"expected a Step1X-Edit variant out of {', '.join(VARIANTS)}, found {variant!r}")
        self.transformer = transformer
        self.variant = VARIANTS[variant]
        self.checkpointing, self.backend = checkpointing, backend

    @property
    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one. The connector's blocks are not among them: they are called piece by piece."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def forward(self, pack: ImagePack, states: Tensor | None = None) -> Tensor:
        """Velocity (N, C) of every picture token, those of references and padding included, in the pack's order.

        states (S, D): what text_index counts in; None takes the pack's own. Raises PackingError where the parts of the pack
        do not fit together.
        """
        from ..models.streams import last_norm, pack_layout

        net, (device, dtype) = self.transformer, _working(self.transformer.x_embedder.weight)
        pack, states, documents = _read(pack, states, device, dtype, fillers=self.variant.pads_seen)
        layout = pack_layout(documents.text_lengths, documents.pictures, padding=documents.padding, device=device)
        attend = partial(attention, backend=self.backend)
        sigma = pack.sigma.float()
        # Rounded as in `Step1XDenoiser`, so that the network is trained at the timesteps that it is sampled at.
        t = (sigma * TIMESTEPS).to(dtype) / TIMESTEPS if self.variant.rounds else sigma.to(dtype)

        state = net.connector.prepare_pack(states[None], documents.texts, attend)
        tokens = net.connector.refine(state, t, attend)
        tokens = self._add_quoted(tokens, pack)
        temb = net.time_embed(net.time_proj(t * TIMESTEPS).to(dtype)) + net.vec_embed(state.pooled)
        image = net.x_embedder(pack.noisy().to(dtype)[None])
        text = net.context_embedder(tokens)
        rope = self._rope(pack, layout)
        for block in net.transformer_blocks:
            image, text = _enter(block, self.checkpointing, image, text, temb, rope, layout.mask, attend, layout=layout)
        joint = layout.join(text, image)
        for block in net.single_transformer_blocks:
            joint = _enter(block, self.checkpointing, joint, temb, rope, layout.mask, attend, layout=layout)
        image = layout.part(joint, text.shape[1])[1]
        return net.proj_out(last_norm(net.norm_out, image, temb, layout.image)[0])

    def _add_quoted(self, tokens: Tensor, pack: ImagePack) -> Tensor:
        """tokens (1, T, C) with the mapped embeddings of quoted characters added, in checkpoints that map them."""
        mapping = self.transformer.text_token_mapping
        if mapping is None:
            return tokens
        places = tokens.new_zeros(0, dtype=torch.long) if pack.quoted is None else pack.quoted.nonzero()[:, 0]
        embeds = pack.quoted_embeds
        if embeds is None:
            embeds = tokens.new_zeros(0, mapping.in_features)
        if len(embeds) != len(places):
            raise PackingError(
                f"quoted_embeds: expected the input embedding of each of {len(places)} quoted characters, found {len(embeds)}. "
                "Take them from the MLLM's embedding table; this checkpoint of Step1X-Edit maps them."
            )
        # Without quoted characters too: the mapping then gets zeros for a gradient, on every rank alike, instead of none.
        return tokens.index_add(1, places, mapping(embeds.to(mapping.weight.dtype))[None].to(tokens.dtype))

    def _rope(self, pack: ImagePack, layout: Packed) -> Rope:
        place, device = pack.text_place, pack.clean.device
        n_text = sum(layout.text_lengths)
        if place is None:
            if not self.variant.pads_seen:
                raise PackingError("text_place: expected positions of the text tokens, as Step1X-Edit v1.2 needs, found none.")
            place = torch.zeros(n_text, 3)
        if place.shape != (n_text, 3):
            raise PackingError(f"text_place: expected ({n_text}, 3), found {tuple(place.shape)}.")
        pictures = [image_positions(grids, self.variant.reference) for grids in pack.grids]
        image = torch.cat([*pictures, torch.zeros(layout.image_lengths[-1], 3)])
        return self.transformer.rope(layout.join(place[None].to(device, torch.float32), image[None].to(device))[0])


class PackedQwenImage(nn.Module):
    """A `QwenImageTransformer2DModel` of an editing checkpoint. checkpointing, backend: as in `PackedStep1X`."""

    def __init__(self, transformer: nn.Module, *, checkpointing: bool = False, backend: str = "auto") -> None:
        from ..models.qwen_packed import enable_packs

        super().__init__()
        check_config(transformer.config)
        enable_packs(transformer)
        self.transformer = transformer
        self.clean_references = bool(transformer.config.get("zero_cond_t"))
        self.checkpointing, self.backend = checkpointing, backend

    @property
    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return list(self.transformer.transformer_blocks)

    def forward(self, pack: ImagePack, states: Tensor | None = None) -> Tensor:
        """See `PackedStep1X.forward`. Positions of the text follow from the grids, so text_place is not read."""
        from ..models.qwen_packed import image_spans, pack_rope
        from ..models.streams import last_norm, pack_layout

        net, (device, dtype) = self.transformer, _working(self.transformer.img_in.weight)
        pack, states, documents = _read(pack, states, device, dtype, fillers=False)
        _check_positions(pack, documents)
        spans = image_spans(pack.grids, documents.padding[1], clean_references=self.clean_references)
        layout = pack_layout(documents.text_lengths, documents.pictures, padding=documents.padding, image=spans, device=device)
        attend = partial(attention, backend=self.backend)

        image = net.img_in(pack.noisy().to(dtype)[None])
        text = net.txt_in(net.txt_norm(states[None]))
        # Rounded as in `QwenImageDenoiser`, so that the network is trained at the timesteps that it is sampled at.
        t = (pack.sigma.float() * TIMESTEPS).to(dtype) / TIMESTEPS
        temb = net.time_text_embed(torch.cat([t, t * 0]) if self.clean_references else t, image)
        rope = pack_rope(net.pos_embed, pack.grids, documents.text_lengths, layout, device)
        for block in net.transformer_blocks:
            image, text = _enter(block, self.checkpointing, image, text, temb, rope, layout.mask, attend, layout=layout)
        velocity = net.proj_out(last_norm(net.norm_out, image, temb[: layout.n_documents], layout.image_documents)[0])
        # Nothing reads the text that leaves the last block, but DDP waits for a gradient of every parameter on its way.
        return velocity + 0 * text.mean() if torch.is_grad_enabled() else velocity


def text_half(conditionings: Sequence[Conditioning]) -> dict[str, Tensor | None]:
    """The text fields of an ImagePack of these documents, out of conditionings of batch 1 in their order.

    Tokens that a conditioning masks are left out, or, where it has positions for them (Step1X-Edit v1.0 and v1.1, whose DiT
    sees them), become fillers. Use: `ImagePack(**text_half(conditionings), clean=..., ...)`.
    """
    texts = [_text_of(conditioning, number) for number, conditioning in enumerate(conditionings)]
    if not texts:
        raise PackingError("expected at least one conditioning for a pack, found none.")
    index, start = [], 0
    for states, fillers, _ in texts:
        index += [*range(start, start + len(states)), *[FILLER] * fillers]
        start += len(states)
    lengths = torch.tensor([len(states) + fillers for states, fillers, _ in texts])
    places = _same_for_all([c.positions for c in conditionings], "positions")
    quoted = [torch.zeros(len(s) + f, dtype=torch.bool) if q is None else q for s, f, q in texts]
    embeds = [c.text_embeds[0].cpu()[q] for c, q in zip(conditionings, quoted, strict=True) if q.any()]
    return {
        "text_index": torch.tensor(index, dtype=torch.long),
        "text_doc": torch.arange(len(texts)).repeat_interleave(lengths),
        "states": torch.cat([states for states, _, _ in texts]),
        "text_place": None if places is None else torch.cat(places),
        "quoted": torch.cat(quoted) if embeds else None,
        "quoted_embeds": torch.cat(embeds) if embeds else None,
    }


def _text_of(conditioning: Conditioning, number: int) -> tuple[Tensor, int, Tensor | None]:
    """Valid states (t, D), number of fillers, quoted (t + fillers,) on the CPU or None."""
    if conditioning.tokens.shape[0] != 1:
        raise PackingError(f"conditioning {number}: expected a batch of 1, found {conditioning.tokens.shape[0]}.")
    states, mask, quoted = conditioning.tokens[0], conditioning.mask, conditioning.text_mask
    quoted = None if quoted is None or conditioning.text_embeds is None else quoted[0].cpu().bool()
    if mask is None:
        return states, 0, quoted
    valid = int(mask.sum())
    if not valid or not bool(mask[0, :valid].all()):
        raise PackingError(f"conditioning {number}: expected valid tokens first and padding behind them, found another mask.")
    fillers = 0 if conditioning.positions is None else len(states) - valid
    return states[:valid], fillers, None if quoted is None else quoted[: valid + fillers]


def _same_for_all(values: list[Tensor | None], name: str) -> list[Tensor] | None:
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        raise PackingError(f"expected {name} in all conditionings or in none, found them in {len(present)} of {len(values)}.")
    return present or None


def _enter(block: nn.Module, checkpointing: bool, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, Tensor]:
    """Call a block, now or, under checkpointing, now and once more in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return block(*args, **kwargs)


def _working(weight: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype the network computes, told by its first weight and by autocast."""
    device = weight.device
    lowered = torch.is_autocast_enabled(device.type)
    return device, torch.get_autocast_dtype(device.type) if lowered else weight.dtype


def _read(
    pack: ImagePack, states: Tensor | None, device: torch.device, dtype: torch.dtype, *, fillers: bool
) -> tuple[ImagePack, Tensor, Documents]:
    """The checked pack on `device`, its text states (T, D) in `dtype`, its lengths."""
    states = pack.states if states is None else states
    if states is None:
        raise PackingError("expected the MLLM's states, given with the call or kept in the pack, found neither.")
    texts, text_padding = _texts(pack, len(states), fillers)
    pictures, image_padding = _pictures(pack)
    if len(texts) != len(pictures):
        raise PackingError(f"expected a text for each of {len(pictures)} documents (grids), found {len(texts)} (text_doc).")
    if pack.sigma.shape != (len(pictures),):
        raise PackingError(f"sigma: expected ({len(pictures)},), one per document, found {tuple(pack.sigma.shape)}.")
    moved = {
        field.name: value.to(device)
        for field in fields(pack)
        if field.name != "states" and isinstance(value := getattr(pack, field.name), Tensor)
    }
    pack = replace(pack, **moved, states=None)
    rows = states.to(device).index_select(0, pack.text_index.clamp(min=0)).to(dtype)
    if text_padding or any(filled for _, filled in texts):
        rows = torch.where((pack.text_index >= 0)[:, None], rows, torch.zeros_like(rows))
    return pack, rows, Documents(texts, pictures, (text_padding, image_padding))


def _texts(pack: ImagePack, n_states: int, fillers: bool) -> tuple[tuple[tuple[int, int], ...], int]:
    """Per document (states, fillers behind them); tokens of padding."""
    check_documents(pack.text_doc)
    index, doc = pack.text_index, pack.text_doc
    if index.shape != doc.shape:
        raise PackingError(f"text_index and text_doc: expected one length, found {tuple(index.shape)} and {tuple(doc.shape)}.")
    if len(index) and int(index.max()) >= n_states:
        raise PackingError(f"text_index counts up to {int(index.max())}, but there are {n_states} states.")
    lengths = document_lengths(doc)
    is_state = (index >= 0) & (doc != PADDING)
    valid = torch.bincount(doc[is_state], minlength=len(lengths)).tolist()
    texts = tuple((states, length - states) for states, length in zip(valid, lengths, strict=True))
    expected = torch.tensor([flag for states, filled in texts for flag in [True] * states + [False] * filled], dtype=torch.bool)
    if 0 in valid or not torch.equal(is_state[: sum(lengths)].cpu(), expected):
        raise PackingError("expected every document's text to be states, and fillers (text_index -1) only behind them.")
    if not fillers and valid != list(lengths):
        raise PackingError("found fillers (text_index -1), but only Step1X-Edit v1.0 and v1.1 show padding to their DiT.")
    return texts, len(doc) - sum(lengths)


def _pictures(pack: ImagePack) -> tuple[tuple[int, ...], int]:
    """Picture tokens of each document, and of padding; image_doc and role must say what grids says."""
    if not pack.grids:
        raise PackingError("expected at least one document in the pack, found none.")
    sizes = [[height * width for height, width in grids] for grids in pack.grids]
    lengths = tuple(map(sum, sizes))
    padding = len(pack.clean) - sum(lengths)
    for name in ("noise", "image_doc", "role"):
        if len(getattr(pack, name)) != len(pack.clean):
            raise PackingError(f"{name}: expected {len(pack.clean)} tokens as in clean, found {len(getattr(pack, name))}.")
    if padding < 0:
        raise PackingError(f"the grids have {sum(lengths)} picture tokens, clean has {len(pack.clean)}.")
    runs = [(number, role, n) for number, counts in enumerate(sizes) for role, n in enumerate(counts)]
    runs.append((PADDING, PADDING, padding))
    found = torch.stack([pack.image_doc, pack.role]).cpu()
    expected = torch.tensor([run[:2] for run in runs]).repeat_interleave(torch.tensor([run[2] for run in runs]), dim=0).T
    if not torch.equal(found, expected):
        at = int((found != expected).any(dim=0).nonzero()[0, 0])
        raise PackingError(
            f"image_doc and role: token {at} has {found[:, at].tolist()}, by the grids it has {expected[:, at].tolist()} (each "
            "document's target, then its references; behind the last document -1 and -1)."
        )
    return lengths, padding


def _check_positions(pack: ImagePack, documents: Documents) -> None:
    for number, (grids, n_text) in enumerate(zip(pack.grids, documents.text_lengths, strict=True)):
        start = max(max(height // 2, width // 2) for height, width in grids)
        if start + n_text > POSITIONS:
            raise PackingError(
                f"document {number}: the transformer has {POSITIONS} text positions; {n_text} text tokens that start at "
                f"{start} do not fit. Shorten the instruction, use fewer references, or lower the size."
            )
