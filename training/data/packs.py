"""What one rank works on at one optimizer step: the plan's documents made, drawn for, and laid into packs.

`Source.load` is a pure function of (epoch, cursor): the plan is one of the epoch, every draw is counter-based, and nothing is
remembered but the plans themselves. So it can run in any number of loader processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ...reasonedit_core import latents as latent
from ...reasonedit_core.errors import ConfigError, DataError
from .. import noise
from ..timesteps import Timesteps
from ..types import FM, NTP, MicroStep
from .cache import Cache, CachedStates, StatesOf
from .documents import TASKS, Documents, Layout
from .lengths import Lengths
from .packing import Balance, ImageDocument, image_pack, text_pack
from .planner import Budgets, Item, Plan, plan
from .records import Record
from .transcripts import TextDocument

if TYPE_CHECKING:
    from ...reasonedit_core.interfaces import Codec

_PLANS_KEPT = 2


@dataclass(frozen=True, slots=True)
class Mix:
    """How an epoch is put together; the fields are arguments of `planner.plan`."""

    budgets: Budgets = field(default_factory=Budgets)
    accumulation: int = 1
    window: int = 64
    mandatory: tuple[str, ...] = ()
    mixture: Mapping[str, float] | None = None
    shortest: bool = False


@dataclass(frozen=True, slots=True)
class Draws:
    """What is drawn for a document. drop_text, drop_reference: shares of documents whose condition is left out (its text is
    then the unconditional prompt; its reference latents are not shown)."""

    timesteps: Timesteps = field(default_factory=Timesteps)
    drop_text: float = 0.1
    drop_reference: float = 0.0


@dataclass(frozen=True, slots=True)
class Counted:
    """How documents are counted and padded. answers, targets: what a document weighs in the NTP and in the FM loss.
    pad_text, pad_image: multiples that packs are padded to, so that compiled code sees few lengths; 0: not at all."""

    answers: Balance = "token"
    targets: Balance = "token"
    pad_text: int = 0
    pad_image: int = 0


class Source:
    """Implements `types.PackSource` over records.

    losses: which documents are used. states: `pack`: what conditions a picture goes along in the text pack (the MLLM runs, be
    it trained or frozen); `cache`: its states are read from the cache; or a function that computes them here, with a frozen
    MLLM and without loader processes. codec: reads moments as samples; its VAE needs no weights. data_hash: of the manifest.
    A document that cannot be made is in `refused`, with what is wrong with it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        documents: Documents,
        *,
        seed: int,
        mix: Mix = Mix(),
        draws: Draws = Draws(),
        counted: Counted = Counted(),
        losses: Sequence[str] = (NTP, FM),
        world: int = 1,
        rank: int = 0,
        cache: Cache | None = None,
        codec: Codec | None = None,
        states: Literal["pack", "cache"] | StatesOf = "pack",
        data_hash: str = "",
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"expected a rank below the world size {world}, found {rank}.")
        self.documents, self.seed, self.world, self.rank = documents, seed, world, rank
        self.mix, self.draws, self.counted = mix, draws, counted
        self.cache, self.codec, self.states = cache, codec, states
        lengths = Lengths(cache.root / "lengths", documents.voice.fingerprint) if cache is not None else None
        self.sources, self.items, self.unmade = documents.items(
            records, losses=losses, states_cached=states != "pack", lengths=lengths
        )
        self._plans: dict[int, Plan] = {}
        self._by_id = {item.id: item for item in self.items}
        needs_moments = any(item.loss == FM for item in self.items)
        if needs_moments and (cache is None or codec is None):
            raise ConfigError("pictures: expected a cache of moments and a codec to read them by, found none. Cache latents.")
        self._steps = self.plan(0).steps
        self.refused = (*self.unmade, *self.plan(0).refused)
        self.fingerprint = self._fingerprint(data_hash)

    def __len__(self) -> int:
        """Optimizer steps of an epoch, the same in every epoch and on every rank."""
        return self._steps

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch, which is the same on all ranks."""
        if epoch not in self._plans:
            mix = self.mix
            made = plan(
                self.items,
                seed=self.seed,
                epoch=epoch,
                world=self.world,
                budgets=mix.budgets,
                accumulation=mix.accumulation,
                window=mix.window,
                mandatory=mix.mandatory,
                mixture=mix.mixture,
                shortest=mix.shortest,
                steps=None if epoch == 0 else self._steps,
            )
            while len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = made
        return self._plans[epoch]

    def load(self, epoch: int, cursor: int) -> list[MicroStep]:
        """The micro-steps of this rank at an optimizer step. Raises DataError naming the record where one cannot be loaded."""
        packs = self.plan(epoch).packs(cursor, self.rank)
        return [self.micro([(self.items[index], number) for index, number in pack], epoch) for pack in packs]

    def micro(
        self, uses: Sequence[tuple[Item, int]], epoch: int, *, sigma: float | None = None, drops: bool = True
    ) -> MicroStep:
        """One micro-step of chosen documents, each with how often it has come in this epoch before.

        sigma: in place of a drawn one, and drops=False: nothing left out; so validation sees the same thing every time.
        """
        texts: list[tuple[TextDocument, float]] = []
        images: list[ImageDocument] = []
        for item, number in uses:
            record, task = self.sources[item.id]
            if TASKS[task] == NTP:
                texts.append((self.documents.text(record, task), record.weight))
                continue
            name = noise.occurrence(item.id, number)
            dropped = drops and noise.dropped(self.draws.drop_text, self.seed, epoch, name, noise.TEXT)
            layout = self.documents.layout(record, task)
            given = self._given(record, task, layout, dropped)
            if isinstance(given, TextDocument):
                texts.append((given, 0.0))
            images.append(self._image(record, layout, given, name, epoch, sigma, drops))
        return self._packed(texts, images)

    def validation(self, items: Sequence[Item], sigma: float | None = None) -> MicroStep:
        """Chosen documents as validation sees them: draws of no epoch, a given sigma, every condition shown."""
        return self.micro([(item, 0) for item in items], -1, sigma=sigma, drops=False)

    def item(self, name: str) -> Item:
        """The document called `name` (record id, slash, task)."""
        return self._by_id[name]

    # one document of the picture stream

    def _given(self, record: Record, task: str, layout: Layout, dropped: bool) -> TextDocument | CachedStates:
        """What conditions a document: to be computed by the step, or already as states."""
        if self.states == "cache":
            return self.cache.states(self.documents, record, task, layout, dropped)
        document = self.documents.condition(record, task, dropped=dropped)
        return document if self.states == "pack" else self.states([document])[0]

    def _image(
        self,
        record: Record,
        layout: Layout,
        given: TextDocument | CachedStates,
        name: str,
        epoch: int,
        sigma: float | None,
        drops: bool,
    ) -> ImageDocument:
        seed = self.seed
        alone = drops and noise.dropped(self.draws.drop_reference, seed, epoch, name, noise.REFERENCE)
        shown = 1 if alone else len(layout.names)
        pictures = []
        for picture, size, grid in list(zip(layout.names, layout.sizes, layout.grids, strict=True))[:shown]:
            moments = self.cache.moments(self.documents, record, picture, size)
            expected = (1, self.codec.channels, 2 * grid[0], 2 * grid[1])
            if tuple(moments[0].shape) != expected:
                raise DataError(
                    f"{record.source}: record {record.id!r}: images.{picture}: expected moments of shape {expected} in the "
                    f"cache, found {tuple(moments[0].shape)}. Delete the cache and make it again."
                )
            sample = noise.posterior(self.codec, moments, seed, epoch, name, picture)
            pictures.append(latent.pack(sample)[0].float())
        target = pictures[0]
        if sigma is None:
            sigma = noise.sigma(self.draws.timesteps, len(target), seed, epoch, name)
        states, embeds = None, None
        if isinstance(given, CachedStates):
            kept, states, embeds = len(given.states), given.states, given.quoted_embeds
        else:
            kept = given.kept.stop - given.kept.start
        return ImageDocument(
            record=record.id,
            pictures=tuple(pictures),
            grids=layout.grids[:shown],
            noise=noise.normal(tuple(target.shape), seed, epoch, name),
            sigma=sigma,
            kept=kept,
            fillers=given.fillers,
            weight=record.weight,
            states=states,
            place=given.place,
            quoted=given.quoted,
            quoted_embeds=embeds,
        )

    def _packed(self, texts: Sequence[tuple[TextDocument, float]], images: Sequence[ImageDocument]) -> MicroStep:
        counted = self.counted
        text = image = None
        counts: dict[str, float] = {}
        if texts:
            documents, weights = zip(*texts, strict=True)
            text = text_pack(documents, weights, balance=counted.answers, pad=counted.pad_text)
            if text.n_answers:
                counts[NTP] = float(text.weights.double().sum())
        if images:
            exports = text.exports if self.states == "pack" else None
            image = image_pack(images, exports=exports, balance=counted.targets, pad=counted.pad_image)
            counts[FM] = float(image.loss_weight.double().sum())
        return MicroStep(text, image, counts)

    def _fingerprint(self, data_hash: str) -> str:
        """Hash of everything that decides what is handed out, but for world and rank, which the engine compares by itself."""
        cache = (self.cache.vae, self.cache.mllm) if self.cache is not None else ()
        states = self.states if isinstance(self.states, str) else "computed"
        mix = replace(self.mix, mixture=None if self.mix.mixture is None else dict(sorted(self.mix.mixture.items())))
        rules = (mix, self.draws, self.counted, states, cache, self.documents.tasks)
        rows = [part for item in self.items for part in (item.id, item.kind, item.text, item.image)]
        weights = [self.sources[item.id][0].weight for item in self.items]
        return noise.digest(self.seed, data_hash, self.documents.voice.fingerprint, repr(rules), *rows, *weights).hex()
