"""The cross-modal enhancer (CME): five cross-attentions for each modality, and the ways of their outputs into the denoiser.

Per modality m: E is E_I(I) or E_T(H), R is R_V or R_T, V̂ the QFormer's output. Block by block, as the text wires them:

    F1 = CA1(Q_m, V̂)    F2 = CA2(E, R)    V̄ = LN(F1 + CA3(F1, F2))    Y = CA4(F2, V̄)    R̄ = CA5(Y, R)

CA(a, b): a attends to b. A residual stands only where the text says so, in V̄. Then ē = LN(Linear(V̄)) goes into the context and
R̄, through a projection that starts at zero, is added behind the denoiser's first layer (eq. A2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attend import CrossAttention
from .frce import Cues, Features
from .spec import BrainSpec, Switches


class Enhancer(nn.Module):
    """One modality of the CME. element: width of E, detail: width of R."""

    def __init__(self, spec: BrainSpec, element: int, bidirectional: bool) -> None:
        super().__init__()
        width, heads, detail = spec.cme, spec.cme_heads, spec.frce
        self.queries = nn.Parameter(torch.randn(1, spec.queries, width) * 0.02)
        self.ca1 = CrossAttention(width, heads, width, spec.context)
        self.ca2 = CrossAttention(width, heads, element, detail)
        self.ca3 = CrossAttention(width, heads, width, width) if bidirectional else None
        self.norm = nn.LayerNorm(width)
        self.ca4 = CrossAttention(width, heads, width, width)
        self.ca5 = CrossAttention(width, heads, width, detail)
        self.context = ContextHead(width, spec.context)
        self.latent_norm = nn.LayerNorm(width)
        self.latent = nn.Linear(width, spec.channels)
        # At zero the denoiser starts as it was; CA4 and CA5 get their first gradient after the first step.
        nn.init.zeros_(self.latent.weight)
        nn.init.zeros_(self.latent.bias)

    def forward(
        self, v: Tensor, element: Tensor, element_keep: Tensor | None, detail: Tensor, detail_keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """v V̂ (B, Q, d_c), element E (B, T, .), detail R (B, S, D), masks (B, T) or None and (B, S).

        -> ē (B, Q, d_c) and the projected R̄ (B, T, c_in).
        """
        f1 = self.ca1(self.queries.expand(v.shape[0], -1, -1), v)
        f2 = self.ca2(element, detail, detail_keep)
        enhanced = self.norm(f1 if self.ca3 is None else f1 + self.ca3(f1, f2, element_keep))
        details = self.ca5(self.ca4(f2, enhanced), detail, detail_keep)
        return self.context(enhanced), self.latent(self.latent_norm(details))


class ContextHead(nn.Module):
    """ē = LN(Linear(x)): into the denoiser's context width."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, context)
        self.norm = nn.LayerNorm(context)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_m) -> (B, T, d_c)."""
        return self.norm(self.project(x))


class SimpleEnhancer(nn.Module):
    """Tab. A9, row 2: one attention of CA1's kind, in which the image features, not learned queries, attend to V̂."""

    def __init__(self, spec: BrainSpec) -> None:
        super().__init__()
        self.ca1 = CrossAttention(spec.cme, spec.cme_heads, spec.vision, spec.context)
        self.context = ContextHead(spec.cme, spec.context)

    def forward(self, v: Tensor, image: Tensor) -> Tensor:
        """v V̂ (B, Q, d_c), image E_I(I) (B, N, d_v) -> (B, N, d_c)."""
        return self.context(self.ca1(image, v))


@dataclass(frozen=True, slots=True)
class Enhanced:
    """What reaches the denoiser (eq. A2).

    context: [ē_visual ; ē_textual] (B, 154, d_c), fewer where an enhancer is off. map: R̄_visual (B, c_in, g, g), added behind
    the first layer after resizing. vector: mean of R̄_textual over valid tokens (B, c_in), added everywhere: instruction tokens
    have no place in the picture. None where the enhancer is off.
    """

    context: Tensor
    map: Tensor | None = None
    vector: Tensor | None = None


class CME(nn.Module):
    """Both enhancers: 45M parameters in the 7B preset, 22M in the 3B preset (Tab. A4)."""

    def __init__(self, spec: BrainSpec, switches: Switches | None = None) -> None:
        super().__init__()
        switches = switches or Switches()
        self.grid = spec.grid
        self.simple = SimpleEnhancer(spec) if switches.cme == "simple_ca" else None
        for name, element in (("visual", spec.vision), ("textual", spec.text)):
            on = name in switches.enhancers
            setattr(self, name, Enhancer(spec, element, switches.cme_bidirectional) if on else None)

    def forward(self, v: Tensor, features: Features, cues: Cues | None) -> Enhanced:
        """v V̂ (B, Q, d_c). cues may be None only where no enhancer is on. With all off the context is V̂ itself."""
        if self.simple is not None:
            return Enhanced(self.simple(v, features.image))
        contexts, spread, vector = [], None, None
        if self.visual is not None:
            context, latent = self.visual(v, features.image, None, cues.visual, cues.visual_keep)
            contexts.append(context)
            spread = latent.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.textual is not None:
            context, latent = self.textual(v, features.text, features.text_keep, cues.textual, cues.textual_keep)
            contexts.append(context)
            weights = features.text_keep.to(latent)[..., None]
            vector = (latent * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return Enhanced(torch.cat(contexts, dim=1) if contexts else v, spread, vector)
