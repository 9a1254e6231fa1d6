"""The values and seams between the rooms of training. Nothing here does work.

A stage is (step, trainable set, mixture of records). A `PackSource` hands out what one optimizer step of one rank works on;
a `Step` turns one micro-step of it into loss sums; the engine (`loop.py`) divides by counts that are reduced over all ranks
and the whole accumulation window, so that 2 ranks x n micro-steps give the gradient of 1 rank x 2n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from ..reasonedit_core.packing import ImagePack, TextPack

NTP, FM = "ntp", "fm"
"""Names of the losses: next-token prediction of the MLLM, flow matching of the DiT."""


@dataclass(frozen=True, eq=False)
class MicroStep:
    """What one forward and backward works on: a pack of each stream, or of one of them. Tensors are on the CPU.

    counts: per loss name, what its sum is divided by (answer tokens, target tokens; weighted where the recipe weights),
    known before any forward.
    """

    text: TextPack | None
    image: ImagePack | None
    counts: Mapping[str, float]

    @property
    def records(self) -> tuple[str, ...]:
        """Ids of the records in here, for logs and for the resume tests."""
        return (*(self.text.records if self.text else ()), *(self.image.records if self.image else ()))


@dataclass(frozen=True, eq=False)
class Handover:
    """The seam of the two-phase backward: the MLLM's states, and the leaf that the DiT was given in their place."""

    states: Tensor
    leaf: Tensor


@dataclass(frozen=True, eq=False)
class Losses:
    """Sums with their graphs, by loss name; `losses.backward` takes them back through the models.

    parts: detached figures for the log, as (sum, count) by name.
    """

    sums: Mapping[str, Tensor]
    handover: Handover | None = None
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Models:
    """What the steps run. Units are modules whose forward takes a pack, so that DDP and FSDP2 can wrap them.

    mllm: `PackedMLLM`, forward(TextPack) -> (states (L, D), cross entropy (answers,)). dit: `PackedStep1X` or
    `PackedQwenImage`, forward(ImagePack, states (S, D)) -> velocity (N, C). Either is None where the stage has no use for it.
    """

    mllm: nn.Module | None = None
    dit: nn.Module | None = None

    def units(self) -> dict[str, nn.Module]:
        """The units that exist, by name."""
        return {name: unit for name, unit in (("mllm", self.mllm), ("dit", self.dit)) if unit is not None}


Step = Callable[[Models, MicroStep], Losses]
"""One forward. `reasoning_step`, `editing_step`, `joint_step`; ReasonBrain adds its own."""


class PackSource(Protocol):
    """The plan of a stage, seen from one rank. A pure function of the cursor: nothing is remembered between calls.

    fingerprint: hash of the manifest, the plan and everything else that decides what is handed out; a checkpoint holds it.
    """

    fingerprint: str

    def __len__(self) -> int:
        """Optimizer steps of one epoch; equal on all ranks."""
        ...

    def load(self, epoch: int, cursor: int) -> Sequence[MicroStep]:
        """The micro-steps of this rank at optimizer step `cursor` of `epoch`. Draws only from counter-based generators."""
        ...


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share a learning rate. name: mllm_lora, mllm, connector, dit, dit_lora, ..."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    lr: float
    weight_decay: float = 0.01
