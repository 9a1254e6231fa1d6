"""The core's generator with its networks run in batches: seams that ask (`strands.ask`), and what answers them.

B rows of a batch, T text tokens, N picture tokens, D width.

What a row comes to must not depend on the rows beside it, nor on how many there are. So every forward has one of few fixed
shapes that follow from the row alone: its lengths rounded up to `TEXT` tokens, and always the same number of rows, of which
some repeat the first where fewer are asked for. Padding is masked or causally behind, rows never mix, and a matrix product of
one shape treats all rows alike.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ...reasonedit_core.errors import ReasonEditError
from ...reasonedit_core.mllm.qwen25vl import MASKS, language_model
from ...reasonedit_core.types import Conditioning, LatentImage
from .strands import Answer, Serve, ask_one

if TYPE_CHECKING:
    from ...reasonedit_core.generator import FlowGenerator
    from ...reasonedit_core.interfaces import Codec, Denoiser
    from ...reasonedit_core.mllm.qwen25vl import QwenVL, VisionFeatures

EDIT = "edit"
"""The label under which the time of everything that an edit asks for is counted."""

TEXT = 16
"""Lengths of texts are rounded up to a multiple of this."""

ROWS = {"states": 4, "velocity": 4, "encode": 2, "decode": 2}
"""Rows of a forward, by kind of request."""

KEPT = 4096
"""Pictures whose features, and whose moments, are kept."""


def slabs(keys: Sequence[Hashable], rows: int) -> Iterable[list[int]]:
    """Indices of requests with equal keys, at most `rows` at a time, in order."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for group in groups.values():
        for first in range(0, len(group), rows):
            yield group[first : first + rows]


def serve_in_slabs(key: Callable[[Any], Hashable], run: Callable[[list[Any]], Sequence[Any]], rows: int) -> Serve:
    """What answers requests by `run`, which is given exactly `rows` of equal keys and answers each."""

    def serve(requests: Sequence[Any]) -> list[Answer]:
        answers: list[Answer] = [Answer()] * len(requests)
        for slab in slabs([key(request) for request in requests], rows):
            full = [requests[index] for index in slab]
            clock = time.perf_counter()
            with torch.no_grad():
                values = run(full + full[:1] * (rows - len(full)))
            seconds = (time.perf_counter() - clock) / len(slab)
            for index, value in zip(slab, values, strict=False):
                answers[index] = Answer(value, seconds)
        return answers

    return serve


def serve_singly(run: Callable[[Any], Any]) -> Serve:
    """What answers requests one by one. An error of ours is raised in the run that asked."""

    def serve(requests: Sequence[Any]) -> list[Answer]:
        answers = []
        for request in requests:
            clock = time.perf_counter()
            try:
                with torch.no_grad():
                    value, error = run(request), None
            except ReasonEditError as fault:
                value, error = None, fault
            answers.append(Answer(value, time.perf_counter() - clock, error))
        return answers

    return serve


def roof(length: int, step: int = TEXT) -> int:
    """`length` rounded up to a multiple of `step`."""
    return -(-length // step) * step


def padded(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """The tensor with zeros (False in a mask) behind it in one dimension."""
    if tensor.shape[dim] == length:
        return tensor
    after = tensor.ndim - 1 - dim % tensor.ndim
    return functional.pad(tensor, (*(0, 0) * after, 0, length - tensor.shape[dim]))


def content(picture: torch.Tensor) -> bytes:
    """A name for what a picture shows: equal pixels, equal names."""
    pixels = picture.detach().to("cpu", torch.float32).contiguous()
    return hashlib.blake2b(pixels.numpy(), key=repr(tuple(pixels.shape)).encode(), digest_size=16).digest()


# ---- the MLLM ------------------------------------------------------------------------------------------------------------


class Eyes:
    """The features of pictures, each computed once and alone."""

    def __init__(self, mllm: QwenVL) -> None:
        self._mllm = mllm
        self._kept: OrderedDict[Hashable, VisionFeatures] = OrderedDict()

    def look(self, image: torch.Tensor, **bounds: Any) -> VisionFeatures:
        """`QwenVL.vision`, with a longer memory."""
        slot = (content(image), tuple(sorted(bounds.items())))
        if slot not in self._kept:
            self._kept[slot] = self._mllm.vision(image, **bounds)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[slot]


class AskingMLLM:
    """A `QwenVL` for conditioners in strands: what costs is asked for, all else is the model's own."""

    def __init__(self, mllm: QwenVL) -> None:
        self._mllm = mllm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mllm, name)

    def vision(self, image: torch.Tensor, **bounds: Any) -> VisionFeatures:
        """See `QwenVL.vision`."""
        return ask_one("vision", (image, bounds), EDIT)

    def states(self, embeds: torch.Tensor, positions: torch.Tensor, *, shown: torch.Tensor | None = None) -> torch.Tensor:
        """See `QwenVL.states`."""
        if shown is not None and not bool(shown.all()):  # only where released quirks are asked for
            return ask_one("call", lambda: self._mllm.states(embeds, positions, shown=shown), EDIT)
        return ask_one("states", (embeds, positions), EDIT)


def run_states(mllm: QwenVL) -> Callable[[list[Any]], list[torch.Tensor]]:
    """Answers (embeds (1, T, D), positions (3, 1, T)) with states (1, T, D)."""

    def run(rows: list[Any]) -> list[torch.Tensor]:
        length = roof(max(embeds.shape[1] for embeds, _ in rows))
        output = language_model(mllm.model)(
            inputs_embeds=torch.cat([padded(embeds, length, 1) for embeds, _ in rows]),
            position_ids=torch.cat([padded(positions, length, 2) for _, positions in rows], dim=1).to(mllm.device),
            attention_mask=dict.fromkeys(MASKS),
            use_cache=False,
        )
        states = output.last_hidden_state
        return [states[at : at + 1, : embeds.shape[1]].clone() for at, (embeds, _) in enumerate(rows)]

    return run


# ---- the denoiser --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One velocity that is asked for: latents (1, N, C), t (1,), conditioning of batch 1."""

    latents: torch.Tensor
    t: torch.Tensor
    conditioning: Conditioning
    grid: tuple[int, int]
    references: tuple[LatentImage, ...]

    @property
    def key(self) -> Hashable:
        """What must be equal within a batch."""
        held = self.conditioning
        fields = tuple(getattr(held, name) is None for name in ("mask", "positions", "text_embeds", "text_mask"))
        sizes = tuple((image.height, image.width) for image in self.references)
        return (self.grid, sizes, roof(held.tokens.shape[1]), fields, self.latents.dtype)


class AskingDenoiser:
    """A `Denoiser` in strands."""

    kind = "velocity"

    def __call__(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        *,
        grid: tuple[int, int],
        references: Sequence[LatentImage] = (),
    ) -> torch.Tensor:
        """See `interfaces.Denoiser`; latents of batch 1."""
        return ask_one("velocity", _Step(latents, t, conditioning, tuple(grid), tuple(references)), EDIT)


class _Joiner:
    """Conditionings of batch 1 as one of batch B. The last ones are kept, as the denoiser prepares each only once."""

    def __init__(self, kept: int = 2) -> None:
        self._kept = kept
        self._made: list[tuple[list[Conditioning], Conditioning]] = []

    def __call__(self, rows: list[Conditioning]) -> Conditioning:
        for parts, joined in self._made:
            if len(parts) == len(rows) and all(a is b for a, b in zip(parts, rows, strict=True)):
                return joined
        joined = join(rows, roof(rows[0].tokens.shape[1]))
        self._made = [*self._made, (rows, joined)][-self._kept :]
        return joined


def join(rows: Sequence[Conditioning], length: int) -> Conditioning:
    """Conditionings of batch 1 as one of batch B, their texts padded to `length` and masked."""

    def batch(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        if any(tensor is None for tensor in tensors):
            return None
        return torch.cat([padded(tensor, length, 1) for tensor in tensors])

    masks = [torch.ones(c.tokens.shape[:2], dtype=torch.bool) if c.mask is None else c.mask.bool() for c in rows]
    return Conditioning(
        tokens=batch([c.tokens for c in rows]),
        mask=batch([mask.to(rows[0].tokens.device) for mask in masks]),
        positions=batch([None if c.positions is None else c.positions[None] for c in rows]),
        text_embeds=batch([c.text_embeds for c in rows]),
        text_mask=batch([c.text_mask for c in rows]),
    )


def run_velocity(denoiser: Denoiser) -> Callable[[list[_Step]], list[torch.Tensor]]:
    """Answers steps with velocities (1, N, C)."""
    joined = _Joiner()

    def run(rows: list[_Step]) -> list[torch.Tensor]:
        first = rows[0]
        references = [
            LatentImage(torch.cat([row.references[at].tokens for row in rows]), image.height, image.width)
            for at, image in enumerate(first.references)
        ]
        velocity = denoiser(
            torch.cat([row.latents for row in rows]),
            torch.cat([row.t for row in rows]),
            joined([row.conditioning for row in rows]),
            grid=first.grid,
            references=references,
        )
        return list(velocity.split(1))

    return run


# ---- the VAE -------------------------------------------------------------------------------------------------------------


class AskingCodec:
    """A `Codec` in strands; samples are drawn where the generator of the run is."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._moments: OrderedDict[bytes, Any] = OrderedDict()
        self.channels: int = codec.channels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `interfaces.Codec`. A picture already seen costs no pass."""
        name = content(pixels)
        if name not in self._moments:
            self._moments[name] = ask_one("encode", pixels, EDIT)
            if len(self._moments) > KEPT:
                self._moments.popitem(last=False)
        return self._moments[name]

    def sample(self, moments: tuple[torch.Tensor, torch.Tensor | None], rng: torch.Generator) -> torch.Tensor:
        """See `interfaces.Codec`."""
        return self._codec.sample(moments, rng)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `interfaces.Codec`."""
        return ask_one("decode", latents, EDIT)


def run_encode(codec: Codec) -> Callable[[list[torch.Tensor]], list[Any]]:
    """Answers pixels (1, 3, H, W) with moments."""

    def run(rows: list[torch.Tensor]) -> list[Any]:
        mean, logvar = codec.encode(torch.cat(rows))
        logvars = [None] * len(rows) if logvar is None else logvar.split(1)
        return list(zip(mean.split(1), logvars, strict=True))

    return run


def run_decode(codec: Codec) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Answers latents (1, C, h, w) with pixels."""
    return lambda rows: list(codec.decode(torch.cat(rows)).split(1))


# ---- together ------------------------------------------------------------------------------------------------------------


def batch_generator(generator: FlowGenerator, mllm: QwenVL, eyes: Eyes) -> tuple[FlowGenerator, dict[str, Serve]]:
    """The core's generator for strands, and what answers it. mllm: the one that conditions."""
    asking = copy.copy(generator)
    asking.conditioner = copy.copy(generator.conditioner)
    asking.conditioner.mllm = AskingMLLM(mllm)
    asking.denoiser, asking.codec = AskingDenoiser(), AskingCodec(generator.codec)
    asking._moments = OrderedDict()
    codec = generator.codec
    serve = {
        "call": serve_singly(lambda call: call()),
        "vision": serve_singly(lambda request: eyes.look(request[0], **request[1])),
        "states": serve_in_slabs(lambda row: roof(row[0].shape[1]), run_states(mllm), ROWS["states"]),
        "encode": serve_in_slabs(lambda row: tuple(row.shape), run_encode(codec), ROWS["encode"]),
        "velocity": serve_in_slabs(lambda row: row.key, run_velocity(generator.denoiser), ROWS["velocity"]),
        "decode": serve_in_slabs(lambda row: tuple(row.shape), run_decode(codec), ROWS["decode"]),
    }
    return asking, serve
