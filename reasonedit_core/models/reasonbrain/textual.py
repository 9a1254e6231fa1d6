"""The textual branch of FRCE, eq. 2: names of objects that take in what the picture shows of them."""

from __future__ import annotations

from torch import Tensor, nn

from .attend import Attention, feed_forward, require_valid
from .spec import BrainSpec, Switches


class IDController(nn.Module):
    """R_T = FF(CrossAtten(R_V, O)), eq. 2.

    The equation names no roles. The text says that the object tokens gain visual context, which makes O the query and R_V the
    keys and values.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_objects = nn.LayerNorm(width)
        self.norm_visual = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ff = feed_forward(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, objects: Tensor, visual: Tensor, visual_keep: Tensor) -> Tensor:
        """objects O (B, O, D), visual R_V (B, V, D), visual_keep (B, V) -> (B, O, D)."""
        o = objects + self.attention(self.norm_objects(objects), self.norm_visual(visual), visual_keep)
        return self.norm(o + self.ff(o))


class TextualBranch(nn.Module):
    """Embedded object names, one token each, and the ID controller. Without it R_T = Linear(O) (Tab. 4, no ID)."""

    def __init__(self, spec: BrainSpec, switches: Switches) -> None:
        super().__init__()
        self.embed = nn.Linear(spec.text, spec.frce)
        self.control = IDController(spec.frce, spec.frce_heads) if switches.id_controller else None

    def forward(self, objects: Tensor, keep: Tensor, visual: Tensor, visual_keep: Tensor) -> Tensor:
        """objects (B, O, width of E_T), keep (B, O), visual R_V (B, V, D), visual_keep (B, V) -> R_T (B, O, D).

        Raises ConfigError where a picture has no object.
        """
        require_valid(keep, "object", "Name what the instruction is about; the whole instruction can be the one object.")
        x = self.embed(objects)
        return x if self.control is None else self.control(x, visual, visual_keep)
