"""All modules of ReasonBrain that are trained from nothing, around a language model that the caller brings.

The order is that of eq. 3: `cues` and `parts` before the language model, `enhance` behind it.
"""

from __future__ import annotations

from torch import Tensor, nn

from .assembler import Part, TokenAssembler
from .cme import CME, Enhanced
from .frce import FRCE, Cues, Features
from .qformer import QFormer
from .spec import BrainSpec, Switches


class ReasonBrain(nn.Module):
    """FRCE, token assembler, QFormer and CME. What `switches` turn off is not built.

    frce and assembler are None without cues; cme always exists, and has no weights where it only passes V̂ on.
    """

    def __init__(self, spec: BrainSpec, switches: Switches | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.switches = switches or Switches()
        self.frce = FRCE(spec, self.switches) if self.switches.cues else None
        self.assembler = TokenAssembler(spec) if self.switches.cues else None
        self.qformer = QFormer(spec)
        self.cme = CME(spec, self.switches)

    def cues(self, features: Features) -> Cues | None:
        """R_V and R_T (eqs. 1, 2), or None without cues. ConfigError as in `FRCE.forward`."""
        return None if self.frce is None else self.frce(features)

    def parts(self, cues: Cues | None) -> tuple[Part, ...]:
        """The cues as tokens of the language model (eq. 3)."""
        return () if cues is None else self.assembler(cues)

    def enhance(self, states: Tensor, features: Features, cues: Cues | None) -> Enhanced:
        """V (B, r, d_l), the language model's states at the [IMG] tokens -> what the denoiser is given (eq. A2)."""
        return self.cme(self.qformer(states), features, cues)
