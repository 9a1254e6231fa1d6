"""Widths of ReasonBrain and the switches of its ablations.

What the paper leaves open (the two widths `frce` and `cme`) is chosen so that the parameter counts of Tab. A4 come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError

Enhancer = Literal["full", "simple_ca", "none"]
ENHANCERS = ("full", "simple_ca", "none")
GEOMETRY = 8
"""Numbers beside a region's mean feature: centre x, y, width, height, area (all 0..1), predicted IoU, stability, background."""

IMG_TOKENS = 32
"""r of eq. 3: [IMG_1] .. [IMG_r]."""


@dataclass(frozen=True, slots=True)
class BrainSpec:
    """Widths, in the paper's letters: vision d_v, grid g, language d_l, text (of E_T), context d_c, channels c_in.

    frce, cme: inner widths of the two modules, with their heads. taps: layers of the vision tower that are concatenated for the
    patches, as fractions of its depth (1.0: the one LLaVA itself reads). merge: patches merged on each side.
    """

    vision: int = 1024
    grid: int = 24
    language: int = 4096
    text: int = 1024
    context: int = 1024
    channels: int = 320
    frce: int = 1024
    frce_heads: int = 16
    cme: int = 1024
    cme_heads: int = 16
    taps: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    merge: int = 1
    patch_blocks: int = 3
    region_blocks: int = 2
    img_tokens: int = IMG_TOKENS
    queries: int = 77
    qformer: int = 768
    qformer_layers: int = 6
    qformer_heads: int = 12

    def __post_init__(self) -> None:
        pairs = (("frce", self.frce, self.frce_heads), ("cme", self.cme, self.cme_heads))
        for name, width, heads in (*pairs, ("qformer", self.qformer, self.qformer_heads)):
            if width < 1 or heads < 1 or width % heads:
                raise ConfigError(f"{name}: expected a width that its heads divide, found {width} and {heads}. Change one.")
        if self.frce % 4:
            raise ConfigError(f"frce: expected a multiple of 4 (positions of two axes), found {self.frce}.")
        if self.merge < 1 or self.grid % self.merge:
            raise ConfigError(f"merge: expected a divisor of the grid of {self.grid}, found {self.merge}.")
        if not self.taps or not all(0 < tap <= 1 for tap in self.taps):
            raise ConfigError(f"taps: expected fractions over 0 and up to 1, found {self.taps}.")


PRESETS = {
    "7b": BrainSpec(),
    "3b": BrainSpec(language=3072, text=768, context=768, frce=720, frce_heads=9, cme=704, cme_heads=11),
    "flux": BrainSpec(text=768, context=4096, channels=3072),
}
"""7b: LLaVA-1.5-7B with SD 2.1; 3b: a LLaVA of 3-4B (Phi-3-mini) with SD 1.5; flux: LLaVA-1.5-7B with FLUX.1-dev."""


@dataclass(frozen=True, slots=True)
class Switches:
    """The parts that an ablation leaves out (Tabs. 4, A1, A9, A12). A part that is off is not built and has no weights.

    patch_branch, region_branch: their tokens leave R_V; both off: no cues at all, and the enhancers must be off too.
    id_controller off: R_T = Linear(O). vision_enhancer, text_enhancer off: its ē and R̄ vanish; both off: the context is V̂.
    cme: full; simple_ca, image features attending V̂ and nothing else (A9, row 2); none, the same as both enhancers off.
    cme_bidirectional off: V̄ does not look at the details (no CA3), the one-way row of A12.
    """

    patch_branch: bool = True
    region_branch: bool = True
    id_controller: bool = True
    vision_enhancer: bool = True
    text_enhancer: bool = True
    cme: Enhancer = "full"
    cme_bidirectional: bool = True

    def __post_init__(self) -> None:
        if self.cme not in ENHANCERS:
            raise ConfigError(f"cme: expected one of {', '.join(ENHANCERS)}, found {self.cme!r}.")
        if not self.cues and self.enhancers:
            raise ConfigError(
                "expected a patch branch or a region branch for the enhancers to read, found both off. Turn vision_enhancer "
                "and text_enhancer off too (the paper's plain model), or leave one branch on."
            )

    @property
    def cues(self) -> bool:
        """Whether there are any fine-grained cues."""
        return self.patch_branch or self.region_branch

    @property
    def enhancers(self) -> tuple[str, ...]:
        """The enhancers of eq. A2 that are built, in the order of their tokens in the context."""
        if self.cme != "full":
            return ()
        return tuple(n for n, on in (("visual", self.vision_enhancer), ("textual", self.text_enhancer)) if on)


PLAIN = Switches(patch_branch=False, region_branch=False, id_controller=False, cme="none")
"""No cues and no enhancer: image, instruction and [IMG] tokens through LLaVA and the QFormer (Tab. 4, first row)."""
