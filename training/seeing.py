"""What a stage is looked at by while it trains: losses on held-out records, verdicts, and sample edits.

The engine calls the hooks made here without gradients and with isolated generators. What is measured depends on the held-out
records, the seed and the weights alone, so that the figures before, during and after a stage compare.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..reasonedit_core import flow
from ..reasonedit_core.detect import STEP1X
from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.parts import read_schedule
from .adapters import restore
from .assemble import Loaded
from .data.records import Record
from .distributed import gathered
from .material import HELD_OUT, Material, make_voice
from .presets import DIT, MLLM
from .stages import Plan
from .types import FM, NTP, MicroStep

if TYPE_CHECKING:
    from ..reasonedit_core.types import Conditioning
    from .data.cache import Cache
    from .data.documents import Documents
    from .distributed import Ranks

log = logging.getLogger(__name__)

LOSS = "loss"
"""The figure that a stage shall lower: the held-out losses, weighted as the stage weights them."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What looking at a stage needs."""

    material: Material
    plan: Plan
    loaded: Loaded
    documents: Documents
    cache: Cache
    ranks: Ranks


# ---- losses --------------------------------------------------------------------------------------------------------------


def held_out(material: Material, plan: Plan) -> list[Record]:
    """The records that a stage is measured on, at most `validation.records`: the kinds by turns, in order of ids."""
    kinds: dict[str, list[Record]] = {}
    for record in sorted(material.of(plan, HELD_OUT), key=lambda record: record.id):
        kinds.setdefault(record.kind, []).append(record)
    turns = max((len(records) for records in kinds.values()), default=0)
    ordered = [records[turn] for turn in range(turns) for _, records in sorted(kinds.items()) if turn < len(records)]
    return ordered[: plan.stage.validation.records]


def measure(seen: Seen, weights: AbstractContextManager[Any] | None = None) -> dict[str, float]:
    """The figures of one look: FM loss at each fixed sigma, NTP loss, verdict accuracy, and `loss`. Empty without held-out
    records. weights: a block in which the moving averages stand in for the weights."""
    chosen = held_out(seen.material, seen.plan)
    if not chosen:
        return {}
    figures: dict[str, float] = {}
    with weights or nullcontext(), seen.ranks.autocast():
        micros = list(_micro_steps(seen, chosen))
        figures |= _losses(seen, micros)
        with gathered(seen.loaded.models):
            figures |= _verdicts(seen, chosen)
    return figures


def _micro_steps(seen: Seen, chosen: Sequence[Record]) -> Iterator[MicroStep]:
    """The packs of this rank: every held-out document once, nothing left out. Under FSDP2 every rank has all of them, as all
    must run the same forwards."""
    ids = {record.id for record in chosen}
    material = replace(seen.material, records=tuple(r for r in seen.material.records if r.id in ids))
    source = seen.plan.kind.make_source(material, seen.plan, seen.documents, seen.cache, split=HELD_OUT)
    if not hasattr(source, "validation"):  # an objective whose source has nothing of the kind
        return
    made = source.plan(0)
    ranks = seen.ranks
    first, step = (0, 1) if ranks.sharded else (ranks.rank, ranks.world)
    for number in range(first, made.n_packs, step):
        yield source.validation([source.items[index] for index, _ in made.pack(number)])


def _losses(seen: Seen, micros: Sequence[MicroStep]) -> dict[str, float]:
    from .validate import flow_losses, ntp_loss

    plan, models = seen.plan, seen.loaded.models
    reduce = None if seen.ranks.world == 1 or seen.ranks.sharded else _over(seen.ranks)
    present = _present(seen.ranks, micros)
    figures: dict[str, float] = {}
    total = 0.0
    if FM in plan.kind.losses and FM in present:
        found = flow_losses(models, micros, plan.stage.validation.sigmas, reduce=reduce)
        figures |= found.figures()
        total += plan.weights[FM] * sum(loss for _, loss in found.rows) / len(found.rows)
    if NTP in plan.kind.losses and NTP in present:
        loss = ntp_loss(models, micros, reduce=reduce)
        figures |= loss.figures()
        total += plan.weights[NTP] * loss.loss
    return {**figures, LOSS: total} if figures else {}


def _present(ranks: Ranks, micros: Sequence[MicroStep]) -> set[str]:
    return {name for names in ranks.agree(sorted({name for micro in micros for name in micro.counts})) for name in names}


def _over(ranks: Ranks):
    def reduce(sums: torch.Tensor) -> torch.Tensor:
        return torch.tensor(ranks.agree(sums.tolist()), dtype=torch.float64).sum(0)

    return reduce


def _verdicts(seen: Seen, chosen: Sequence[Record]) -> dict[str, float]:
    """How often the MLLM decides as the record does, where it is loaded and can speak."""
    count, mllm = seen.plan.stage.validation.verdicts, seen.loaded.mllm
    asked = [record for record in chosen if record.kind == "reflect"][:count]
    if not asked or mllm is None or not seen.plan.speaks:
        return {}
    from ..reasonedit_core.reasoners.qwen import QwenSpeaker
    from .validate import verdict_accuracy

    settings = seen.material.base.settings()
    low, high = settings.reasoner_pixels
    speaker = QwenSpeaker(mllm, min_pixels=low, max_pixels=high, max_side=settings.reasoner_max_side)
    return verdict_accuracy(seen.documents, speaker, asked).figures()


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Figures before and after a stage, a line each, the weighted loss first."""
    names = [name for name in (LOSS, *(n for n in after if n != LOSS)) if name in after and name in before]
    return [f"  held-out {name:<18} {before[name]:>10.5f} -> {after[name]:>10.5f}" for name in names]


# ---- sample edits --------------------------------------------------------------------------------------------------------


class _Conditions:
    """A conditioner whose results are brought to another device: the MLLM may have stayed on the CPU."""

    def __init__(self, conditioner: Any, device: torch.device) -> None:
        self._conditioner, self._device = conditioner, device
        self.mllm = conditioner.mllm

    def condition(self, *args: Any, **kwargs: Any) -> Conditioning:
        """See the conditioner."""
        made = self._conditioner.condition(*args, **kwargs)
        tensors = {name: getattr(made, name) for name in made.__dataclass_fields__}
        moved = {name: value.to(self._device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(made, **moved)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conditioner, name)


def write_samples(seen: Seen, path: Path, title: str, weights: AbstractContextManager[Any] | None = None) -> Path | None:
    """Edit held-out pictures with the weights as they are now and write the contact sheet; None where there is nothing to
    edit. Every rank must call it; the first one writes.

    VAE and, where its states are cached, the MLLM are loaded for this alone.
    """
    from .sample import choose_records, sample_edits, write_sheet

    plan, stage, base = seen.plan, seen.plan.stage, seen.material.base
    records = choose_records([r for r in seen.material.records if r.split == HELD_OUT], stage.samples.records)
    if not records or DIT not in seen.loaded.modules:
        return None
    with weights or nullcontext(), seen.ranks.autocast(), gathered(seen.loaded.models):
        generator = _generator(seen)
        samples = sample_edits(
            generator,
            records,
            steps=stage.samples.steps,
            guidance=stage.samples.guidance,
            size_level=base.settings().size_level,
            seed=stage.samples.seed,
        )
    if not plan.mllm:
        base.release()
    return write_sheet(path, samples, title) if seen.ranks.main else None


def _generator(seen: Seen) -> Any:
    from .sample import make_generator

    base, loaded = seen.material.base, seen.loaded
    mllm = loaded.mllm or _spare_mllm(seen)
    default = flow.STEP1X if base.system == STEP1X else flow.QWEN
    return make_generator(
        base.system,
        base.variant,
        conditioner=_Conditions(make_voice(base, mllm).conditioner, base.device),
        transformer=loaded.modules[DIT],
        codec=base.codec(),
        settings=base.settings(),
        schedule=read_schedule(base.parts, default),
        plus=base.plus,
    )


def _spare_mllm(seen: Seen) -> Any:
    """The MLLM for the time of the samples: beside the DiT where the device has room for it, else on the CPU."""
    base = seen.material.base
    device = base.device
    if device.type == "cuda":
        size = sum(file.stat().st_size for file in _files(base.parts.mllm))
        device = device if torch.cuda.mem_get_info()[0] > 1.2 * size else torch.device("cpu")
    mllm = base.mllm(need_lm_head=False, device=device)
    carried = seen.loaded.carried.get(MLLM)
    if carried is not None:
        restore(mllm.model, carried, trainable=False)
    return mllm


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


# ---- hooks ---------------------------------------------------------------------------------------------------------------


def make_hooks(seen: Seen) -> list[Any]:
    """What the engine calls at the boundaries of a stage."""
    from .loop import Hook

    stage = seen.plan.stage
    hooks = []
    if stage.validation.records:
        if not held_out(seen.material, seen.plan):
            log.warning(
                "stage %s: no held-out records (split held_out) of its kinds: nothing will tell whether it learns or memorises",
                stage.name,
            )
        hooks.append(
            Hook(
                "validation",
                lambda moment: seen.plan.kind.own(measure)(seen, moment.averaged()),
                every=stage.validation.every,
                at_start=True,
                at_end=True,
            )
        )
    if stage.samples.every and seen.plan.paints:

        def sample(moment: Any) -> None:
            path = moment.run_dir / "samples" / f"step-{moment.step:08d}.png"
            seen.plan.kind.own(write_samples)(seen, path, f"{stage.name}, step {moment.step}", moment.averaged())

        hooks.append(Hook("samples", sample, every=stage.samples.every, at_end=True))
    return hooks


def need_held_out(figures: Mapping[str, float], plan: Plan) -> Mapping[str, float]:
    """The figures, or ConfigError where there were no records to measure on."""
    if not figures:
        raise ConfigError(
            f"stage {plan.stage.name}: expected held-out records (split held_out) of its kinds, found none to measure on. Add "
            "some, or mark some of those there are."
        )
    return figures
