"""The batches of a ReasonBrain stage. There is no packing: rows of a batch are padded, as they are nearly of one length.

Implements `types.PackSource`. An epoch is every record once (or as the mixture says), in an order that is drawn from counters;
pictures of one latent size make a batch together, and the last batch of a size is filled up with records of that size again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...reasonedit_core.errors import ConfigError, DataError
from ...reasonedit_core.images import load_image
from ...reasonedit_core.models.reasonbrain.frce import Features
from .. import noise
from ..config import BrainStage, Stage
from .examples import Example, Examples, batch_features, told

if TYPE_CHECKING:
    from ...reasonedit_core.latents import FluxCodec, SDCodec
    from ..data.records import Record
    from ..timesteps import Timesteps

HELD_BYTES = 2 << 30
"""Of examples that a source keeps in memory once they were read: small files are slow to open."""

FILLING = 1000
"""From this number on a use of a record only fills up the last batch of its size."""

_DROPS = "condition"
_FIXED = -1
"""The epoch that validation draws noise of."""

Use = tuple["Record", int]
"""A record, and how often it has come before in the epoch."""


@dataclass(frozen=True, eq=False)
class BrainBatch:
    """One micro-step, on the CPU. B records.

    features: what the frozen encoders see, None where the step looks itself (`pictures` (3, H, W) in 0..1 each, with
    `objects` and, with a region branch, `regions` = masks and geometry). pooled (B, P) for FLUX. source, clean, noise
    (B, C, h, w): latents as the denoiser sees the source, of the target, and of the noise. t (B,) in 0..1, 1 = noise.
    no_text, no_image (B,) bool: conditions left out. weight (B,). counts: by loss, the sum of weights.
    """

    records: tuple[str, ...]
    instructions: tuple[str, ...]
    features: Features | None
    source: Tensor
    clean: Tensor
    noise: Tensor
    t: Tensor
    no_text: Tensor
    no_image: Tensor
    weight: Tensor
    counts: Mapping[str, float]
    pooled: Tensor | None = None
    pictures: tuple[Tensor, ...] = ()
    objects: tuple[tuple[str, ...], ...] = ()
    text: None = None
    image: None = None


class BrainSource:
    """Batches of `records`. losses: names whose counts a batch states. codec: reads moments; its VAE needs no weights.

    Raises DataError without records.
    """

    def __init__(
        self,
        records: Sequence[Record],
        examples: Examples,
        codec: SDCodec | FluxCodec,
        *,
        seed: int,
        stage: Stage,
        timesteps: Timesteps,
        losses: Sequence[str],
        mixed: bool = True,
        world: int = 1,
        rank: int = 0,
        data_hash: str = "",
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"expected a rank below the world size {world}, found {rank}.")
        self.records, self.examples, self.codec = tuple(records), examples, codec
        self.seed, self.world, self.rank = seed, world, rank
        self.stage, self.brain = stage, stage.brain or BrainStage()
        self.timesteps, self.losses = timesteps, tuple(losses)
        self.kinds = dict(stage.mixture.kinds) if mixed else {}
        self._sizes = {record.id: examples.size(record) for record in self.records}
        self._held: dict[str, Any] = {}
        self._bytes = 0
        self._kept: tuple[int, list[list[Use]]] | None = None
        self._steps = max(1, len(self.batches(0)) // (world * stage.packs.accumulation))
        self.fingerprint = self._fingerprint(data_hash)

    def __len__(self) -> int:
        """Optimizer steps of an epoch, the same in every epoch and on every rank."""
        return self._steps

    def batches(self, epoch: int) -> list[list[Use]]:
        """The batches of an epoch over all ranks; equally many in every epoch but where a mixture leaves records out."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, self._plan(epoch))
        return self._kept[1]

    def _plan(self, epoch: int) -> list[list[Use]]:
        def order(name: str) -> float:
            return noise.uniform(self.seed, epoch, name, noise.ORDER)

        uses = sorted(self._mixed(epoch), key=lambda use: order(noise.occurrence(use[0].id, use[1])))
        by_size: dict[tuple[int, int], list[Use]] = {}
        for use in uses:
            by_size.setdefault(self._sizes[use[0].id], []).append(use)
        size = self.brain.batch
        made = []
        for own in by_size.values():
            short = -len(own) % size
            again = (own * size)[:short]  # under numbers that no other use has
            full = own + [(record, number + FILLING * (1 + at // len(own))) for at, (record, number) in enumerate(again)]
            made += [full[at : at + size] for at in range(0, len(full), size)]
        made.sort(key=lambda batch: order("batch of " + noise.occurrence(batch[0][0].id, batch[0][1])))
        window = self.world * self.stage.packs.accumulation
        made += (made * window)[: -len(made) % window]
        return made

    def _mixed(self, epoch: int) -> list[Use]:
        """Every record once, or so many of each kind as its share says."""
        if not self.kinds:
            return [(record, 0) for record in self.records]
        by_kind = {kind: [one for one in self.records if one.kind == kind] for kind in self.kinds}
        empty = [kind for kind, own in by_kind.items() if not own]
        if empty:
            raise DataError(f"mixture.kinds: expected records of every kind, found none of {', '.join(empty)}. Add some.")
        totals = [len(own) / self.kinds[kind] for kind, own in by_kind.items()]
        total = min(totals) if self.stage.mixture.shortest else max(totals)
        uses = []
        for kind, own in by_kind.items():
            wanted = max(1, round(total * self.kinds[kind]))
            own = sorted(own, key=lambda one: noise.uniform(self.seed, epoch, one.id, "mixture"))
            uses += [(own[n % len(own)], n // len(own)) for n in range(wanted)]
        return uses

    def table(self) -> str:
        """How the first epoch is cut into batches, as text."""
        sizes: dict[tuple[int, int], int] = {}
        for batch in self.batches(0):
            size = self._sizes[batch[0][0].id]
            sizes[size] = sizes.get(size, 0) + 1
        rows = [f"{width}x{height}: {count} batches of {self.brain.batch}" for (width, height), count in sorted(sizes.items())]
        return "\n".join([f"{len(self.records)} records, {len(self)} steps an epoch", *rows])

    def load(self, epoch: int, cursor: int) -> list[BrainBatch]:
        """The micro-steps of this rank at an optimizer step. DataError naming the record where one cannot be loaded."""
        share = self.stage.packs.accumulation
        first = (cursor * self.world + self.rank) * share
        made = self.batches(epoch)  # in an epoch of other sizes there may be fewer
        return [self.batch(made[(first + n) % len(made)], epoch) for n in range(share)]

    def validation(self, uses: Sequence[Use], t: float) -> BrainBatch:
        """Chosen records of one size at one t, with nothing left out and noise of no epoch."""
        return self.batch(uses, _FIXED, t=t)

    def batch(self, uses: Sequence[Use], epoch: int, *, t: float | None = None) -> BrainBatch:
        """One micro-step of chosen records. t: in place of drawn ones; then nothing is left out."""
        names = [noise.occurrence(record.id, number) for record, number in uses]
        records = [record for record, _ in uses]
        clean, source = [], []
        for record, name in zip(records, names, strict=True):
            moments = self._moments(record)
            source.append(self.codec.source(moments["input"]))
            draws = noise.generator(self.seed, epoch, name, noise.POSTERIOR)
            clean.append(self.codec.sample(moments["target"], draws))
        latents = torch.cat(clean).float()
        tokens = self.codec.pack(latents).shape[1]
        times = [noise.sigma(self.timesteps, tokens, self.seed, epoch, name) if t is None else t for name in names]
        u = [noise.uniform(self.seed, epoch, name, _DROPS) if t is None else 1.0 for name in names]
        weight = torch.tensor([record.weight for record in records], dtype=torch.float32)
        return BrainBatch(
            records=tuple(record.id for record in records),
            instructions=tuple(told(record).instruction for record in records),
            source=torch.cat(source).float(),
            clean=latents,
            noise=torch.cat([noise.normal((1, *latents.shape[1:]), self.seed, epoch, name) for name in names]),
            t=torch.tensor(times, dtype=torch.float32),
            **dict(zip(("no_text", "no_image"), drops(u, self.brain), strict=True)),
            weight=weight,
            counts={name: float(weight.double().sum()) for name in self.losses},
            **self._seen(records),
        )

    def _seen(self, records: Sequence[Record]) -> dict[str, Any]:
        if not self.brain.features:
            pictures = tuple(load_image(record.picture("input")).rgb[0] for record in records)
            return {"features": None, "pictures": pictures, "objects": tuple(told(record).objects for record in records)}
        examples: list[Example] = [
            self._hold(f"features {record.id}", lambda record=record: self.examples.features(record)) for record in records
        ]
        pooled = torch.stack([one["pooled"] for one in examples]) if "pooled" in examples[0] else None
        return {"features": batch_features(examples), "pooled": pooled}

    def _moments(self, record: Record) -> dict[str, Any]:
        names = ("input", "target")
        return {
            name: self._hold(f"{name} {record.id}", lambda name=name: self.examples.moments(record, name)) for name in names
        }

    def _hold(self, key: str, read: Any) -> Any:
        """What `read` gives, kept in memory as long as there is room."""
        if key in self._held:
            return self._held[key]
        found = read()
        tensors = found.values() if isinstance(found, dict) else found
        self._bytes += sum(one.nbytes for one in tensors)
        if self._bytes < HELD_BYTES:
            self._held[key] = found
        return found

    def _fingerprint(self, data_hash: str) -> str:
        """Hash of everything that decides what is handed out, but for world and rank."""
        stage = self.stage
        rules = (sorted(self.kinds.items()), stage.mixture.shortest, stage.packs.accumulation, self.brain, self.timesteps)
        known = (self.examples.weights, self.examples.cache.vae, self.examples.segmenter, self.examples.level)
        ids = [part for record in self.records for part in (record.id, str(record.weight))]
        return noise.digest(self.seed, data_hash, repr(rules), repr(known), *self.losses, *ids).hex()


def drops(u: Sequence[float], table: BrainStage) -> tuple[Tensor, Tensor]:
    """Which records lose their text and which their picture, from numbers u in 0..1: two (B,) bool.

    One number decides both, so that the share of those that lose both is exact (reasonbrain.md 3.8; 5 % each alone and 5 %
    both by default).
    """
    drawn = torch.tensor(list(u), dtype=torch.float64)
    start = table.drop_text - table.drop_both
    return drawn < table.drop_text, (start <= drawn) & (drawn < start + table.drop_image)


def make_source(
    material: Any, plan: Any, documents: Examples, cache: Any, *, split: str = "train", world: int = 1, rank: int = 0
) -> BrainSource:
    """The batches of a stage. documents: the stage's examples. DataError where the split has no record that it can use."""
    from ..material import TRAIN
    from ..timesteps import Timesteps

    stage, base = plan.stage, material.base
    records = [record for record in material.of(plan, split) if {"input", "target"} <= set(record.files)]
    if not records:
        kinds = ", ".join(stage.mixture.kinds or plan.kind.kinds)
        raise DataError(
            f"stage.{stage.name}: expected records of kinds {kinds} with split {split} that have pictures input and target, "
            "found none. Add some, or change mixture.kinds."
        )
    said = stage.timesteps
    timesteps = Timesteps(said.kind, said.shift, said.mean, said.std, said.steps, base.schedule())
    return BrainSource(
        records,
        documents,
        base.reader(),
        seed=material.config.run.seed,
        stage=stage,
        timesteps=timesteps,
        losses=plan.kind.losses,
        mixed=split == TRAIN,
        world=world,
        rank=rank,
        data_hash=material.manifest.hash,
    )
