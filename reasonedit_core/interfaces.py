"""The seams between the rooms, as Protocols. Nothing here does work; `load.py` puts concrete parts together.

A `Speaker` answers one rendered query (in process, over HTTP, or from a script). A `Reasoner` is a role made of a dialogue
pack and a speaker. A `Conditioner` turns picture and instruction into `Conditioning`; a `Denoiser` predicts a velocity (or
noise) under it; a `Codec` is the VAE with its normalisation. A `Generator` owns the last three. A `Segmenter` and an
`ObjectExtractor` find what the cues of ReasonBrain are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .types import (
    Conditioning,
    Edited,
    EditRequest,
    FoundMasks,
    LatentImage,
    OnStep,
    OnText,
    Reflection,
    Regions,
    ShouldStop,
    Thought,
)

if TYPE_CHECKING:
    import torch

Form = Literal["free", "consistency", "verdict", "pair"]
"""The grammar of a reply: free text; the JSON of the consistency score; `<#Think>` text then one tag; JSON with two scores."""

Pair = tuple[float, ...] | None
"""Two scores of one kind, each 0..10."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question to the MLLM, rendered from a dialogue pack.

    task: think | describe | score | reflect | edit_score | quality_score. parts: the user turn in order; a str is text, an
    int is an index into `images` (each (1, 3, H, W) in 0..1). temperature 0 means greedy.
    """

    task: str
    system: str
    parts: tuple[str | int, ...]
    images: tuple[torch.Tensor, ...]
    form: Form = "free"
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Speaker(Protocol):
    """Answers queries with raw text. Raises ReasonerError (never returns a made-up reply) and Interrupted."""

    def answer(
        self, queries: Sequence[Query], *, on_text: OnText | None = None, should_stop: ShouldStop | None = None
    ) -> list[str]:
        """Raw replies, one per query, in order. Queries of one call do not depend on each other."""
        ...


class Reasoner(Protocol):
    """The role that thinks and reflects. Pictures are (1, 3, H, W) in 0..1."""

    def bound(self, *, seed: int = 0, on_text: OnText | None = None, should_stop: ShouldStop | None = None) -> Reasoner:
        """The same reasoner for one run: its seed, where its words are streamed to, and how it is stopped."""
        ...

    def think(self, image: torch.Tensor, instruction: str, *, feedback: str | None = None) -> Thought:
        """Rewrite the user's words into what shall be seen. feedback: why an earlier thought failed."""
        ...

    def describe(self, image: torch.Tensor, goal: str, *, original: str | None = None) -> str:
        """The target description: the picture that should result."""
        ...

    def reflect(
        self,
        source: torch.Tensor,
        edited: torch.Tensor,
        goal: str,
        target: str,
        *,
        original: str | None = None,
        scores: bool = True,
    ) -> Reflection:
        """Score the edited picture against the target description and decide. Raises MalformedReply.

        scores: also ask for the edit and quality scores, which the decision does not look at. A reasoner without `grade` is
        never given this argument.
        """
        ...

    def grade(
        self, source: torch.Tensor, pictures: Sequence[tuple[torch.Tensor, str, str]], *, original: str | None = None
    ) -> list[tuple[Pair, Pair]]:
        """The (edit, quality) scores that `reflect(scores=False)` left out, of several pictures in one call.

        pictures: (edited (1, 3, H, W), goal, target) of each. None in place of a score that the dialogue has no question for.
        Raises MalformedReply.
        """
        ...


class Conditioner(Protocol):
    """Picture + instruction -> Conditioning."""

    def condition(
        self,
        image: torch.Tensor | None,
        instruction: str,
        *,
        grid: tuple[int, int],
        references: Sequence[torch.Tensor] = (),
        released: bool = False,
    ) -> Conditioning:
        """image: (1, 3, h, w) at the generated size, None for a picture from text alone; grid: (height, width) of the latent
        token grid; batch is always 1."""
        ...


class Denoiser(Protocol):
    """One network evaluation."""

    kind: Literal["velocity", "epsilon"]

    def __call__(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        *,
        grid: tuple[int, int],
        references: Sequence[LatentImage] = (),
        keep: Any = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """latents (B, N, C) packed; t (B,) in 0..1, 1 = noise -> prediction (B, N, C).

        keep (a `models.keyvalues.KeyValues`) and rows are for region-aware denoising, which asks them of a DiT alone. keep
        without rows: the whole forward, whose keys and values replace those in `keep`. With rows (n,) int64 of the target:
        latents and prediction (B, n, C) are of these tokens; all others, references included, take part as `keep` holds them,
        and the rows' own are renewed in it.
        """
        ...


class Codec(Protocol):
    """The VAE with its normalisation. Pixels are (1, 3, h, w) in -1..1, latents (1, C, 2 h / patch, 2 w / patch) normalised.

    patch: pixels of a latent token on each side, 16 in the released systems.
    """

    patch: int

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and logarithm of the variance of the posterior, un-normalised; None where the mode is used."""
        ...

    def sample(self, moments: tuple[torch.Tensor, torch.Tensor | None], rng: torch.Generator) -> torch.Tensor:
        """Normalised latents. Draws from `rng` exactly when the system samples its posterior."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (1, 3, h, w) in -1..1 (not clamped)."""
        ...


class Segmenter(Protocol):
    """Masks of what is in a picture, for the region branch of ReasonBrain."""

    name: str
    """Which provider and weights: part of the key under which masks are kept."""

    def segment(self, image: torch.Tensor) -> FoundMasks:
        """image: (1, 3, H, W) in 0..1."""
        ...


class RegionFinder(Protocol):
    """The regions of a picture that ReasonBrain's region branch sees: of a segmenter, from a cache, or the user's own."""

    def regions(self, image: torch.Tensor, grid: int) -> Regions:
        """image: (1, 3, H, W) in 0..1. grid: side of the vision tower's token grid."""
        ...


class ObjectExtractor(Protocol):
    """The names of what an instruction is about, for the ID controller of ReasonBrain."""

    def extract(self, instruction: str, image: torch.Tensor | None = None) -> list[str]:
        """Names in order of appearance, none twice; empty where nothing was found."""
        ...


class Generator(Protocol):
    """Conditioner + denoiser + codec + sampler."""

    def edit(
        self,
        request: EditRequest,
        picture: torch.Tensor,
        instruction: str,
        rng: torch.Generator,
        *,
        latents: torch.Tensor | None = None,
        released: bool = False,
        source_size: bool = True,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Edited:
        """Edit `picture` with `instruction`.

        latents (1, T, C), when given, are the packed latents of `picture` (already at the generated size) and are used as
        reference in place of a VAE pass. Draws from `rng` in the released order: posterior sample, then noise.
        """
        ...
