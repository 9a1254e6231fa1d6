"""What is computed once and kept: the VAE's moments of pictures, and the states of a frozen MLLM.

Content-addressed: a file's name is a hash of all that its content follows from (the picture's bytes, the size and the
transform, the model), so nothing stale is ever read, runs share a cache, and deleting any file costs no more than making it
again. Files are written whole. Moments are kept and not samples: what the posterior gives is drawn anew every epoch.

T text tokens that condition a document, D width of the states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...reasonedit_core.errors import ConfigError, DataError
from ...reasonedit_core.files import write_many
from ..noise import digest
from ..types import FM
from .documents import TASKS, Documents, Layout, item_id
from .packing import text_pack
from .planner import Refused
from .records import Record
from .transcripts import Size, TextDocument

if TYPE_CHECKING:
    from ...reasonedit_core.interfaces import Codec
    from ...reasonedit_core.latents import Moments
    from ...reasonedit_core.mllm.packed import PackedMLLM

log = logging.getLogger(__name__)

MOMENTS, STATES = "moments", "states"
VERSION = "1"
"""Part of every name: raised when the content of files changes its meaning."""

OnProgress = Callable[[str, int, int], None]
"""(what is being made, records done, records in all)."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedStates:
    """What conditions one document. states (T, D); fillers, place (T, 3) and quoted (T,): see `CondDocument`;
    quoted_embeds (n, D): input embeddings of the quoted characters, where there are any."""

    states: Tensor
    fillers: int = 0
    place: Tensor | None = None
    quoted: Tensor | None = None
    quoted_embeds: Tensor | None = None


class Cache:
    """A folder of safetensors files. vae, mllm: hashes of the weights whose outputs are kept in it."""

    def __init__(self, root: str | Path, *, vae: str = "", mllm: str = "") -> None:
        self.root, self.vae, self.mllm = Path(root), vae, mllm

    def path(self, kind: str, key: str) -> Path:
        """Where an entry lies, or would."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether an entry is there."""
        return self.path(kind, key).is_file()

    def write(self, kind: str, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep tensors by key, those of each whole or not at all."""
        from safetensors.torch import save

        def packed(tensors: Mapping[str, Tensor]) -> bytes:
            return save({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()})

        write_many((self.path(kind, key), packed(tensors)) for key, tensors in entries.items())

    def read(self, kind: str, key: str, *, what: str) -> dict[str, Tensor]:
        """The tensors of an entry. what: whose they are, for the DataError where they are missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(kind, key)
        try:
            return load(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"{what}: expected its {kind} in the cache ({path}), found nothing there. Run `reasonedit-train cache` with "
                "this recipe: the data, the sizes or the weights are others than those that were cached."
            ) from error
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{what}: expected its {kind} in {path}, found a file that cannot be read ({error}). Delete it and run "
                "`reasonedit-train cache` again."
            ) from error

    # moments

    def moments_key(self, documents: Documents, record: Record, name: str, size: Size) -> str:
        """The name of a picture's moments at a size."""
        return digest(VERSION, MOMENTS, self.vae, documents.voice.geometry, documents.sha(record, name), *size).hex()

    def moments(self, documents: Documents, record: Record, name: str, size: Size) -> Moments:
        """Mean and log variance (1, C, h, w) of a picture at a size; the second is None where the mode is used."""
        key = self.moments_key(documents, record, name, size)
        found = self.read(MOMENTS, key, what=f"{record.source}: record {record.id!r}: images.{name}")
        return found["mean"], found.get("logvar")

    # states

    def states_key(self, documents: Documents, record: Record, layout: Layout, dropped: bool) -> str:
        """The name of the states that condition a document."""
        voice = documents.voice
        words = voice.negative if dropped else layout.instruction
        pictures = [part for name, size in layout.seen for part in (documents.sha(record, name), *size)]
        return digest(VERSION, STATES, self.mllm, voice.fingerprint, len(layout.seen), *pictures, words).hex()

    def states(self, documents: Documents, record: Record, task: str, layout: Layout, dropped: bool) -> CachedStates:
        """The states that condition a document, with or without its text."""
        key = self.states_key(documents, record, layout, dropped)
        found = self.read(STATES, key, what=f"{record.source}: record {record.id!r}: {task}")
        quoted = found.get("quoted")
        return CachedStates(
            found["states"],
            int(found["fillers"]),
            found.get("place"),
            None if quoted is None else quoted.bool(),
            found.get("quoted_embeds"),
        )


def _tensors(states: CachedStates) -> dict[str, Tensor]:
    tensors = {"states": states.states, "fillers": torch.tensor(states.fillers)}
    for name in ("place", "quoted", "quoted_embeds"):
        value = getattr(states, name)
        if value is not None:
            tensors[name] = value.to(torch.uint8) if name == "quoted" else value
    return tensors


# ---- filling -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """What a pass over the records did. made, found: files by kind; failed: documents whose pictures cannot be used."""

    made: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    failed: list[Refused] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        kinds = sorted({*self.made, *self.found})
        counts = [f"{kind}: {self.made.get(kind, 0):,} made, {self.found.get(kind, 0):,} were there" for kind in kinds]
        return [*(counts or ["nothing to cache"]), *(f"left out: {each}" for each in self.failed)]


StatesOf = Callable[[Sequence[TextDocument]], list[CachedStates]]
"""Computes the states of conditioning documents with a frozen MLLM (`run_mllm`)."""

BATCH_PIXELS, BATCH_TOKENS = 400 * 400, 4096
"""How much is computed at once: small pictures and short documents would leave the machine waiting otherwise."""

HELD_FILES, HELD_BYTES = 1024, 64 << 20
"""How much is made before it is written: the disk is waited for once for all of it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An entry that a run reads. take: opens what it is computed from, the picture (1, 3, H, W) in -1..1 or the document."""

    kind: str
    key: str
    document: str
    take: Callable[[], Tensor | TextDocument]


class _Maker:
    """Collects entries that are missing and makes them several at a time: pictures of one size, documents as a pack.

    What is computed together differs in the last bits from what is computed alone, so a cache that was filled in two
    sittings may differ so from one that was filled in one; what a run reads does not change any more.
    """

    def __init__(self, cache: Cache, codec: Codec | None, states_of: StatesOf | None, report: Report) -> None:
        self.cache, self.codec, self.states_of, self.report = cache, codec, states_of, report
        self._pictures: dict[tuple[int, ...], list[tuple[Wanted, Tensor]]] = {}
        self._documents: list[tuple[Wanted, TextDocument]] = []
        self._held: dict[str, dict[str, Mapping[str, Tensor]]] = {MOMENTS: {}, STATES: {}}
        self._bytes = 0

    def add(self, wanted: Wanted) -> None:
        """Make an entry, now or with others of its like."""
        report = self.report
        if self.cache.has(wanted.kind, wanted.key):
            report.found[wanted.kind] = report.found.get(wanted.kind, 0) + 1
            return
        try:
            taken = wanted.take()
        except DataError as error:
            report.failed.append(Refused(wanted.document, str(error)))
            return
        if isinstance(taken, Tensor):
            waiting = self._pictures.setdefault(tuple(taken.shape), [])
            waiting.append((wanted, taken))
            if len(waiting) * taken.shape[-1] * taken.shape[-2] >= BATCH_PIXELS:
                self._encode(self._pictures.pop(tuple(taken.shape)))
        else:
            if sum(len(document) for _, document in self._documents) + len(taken) > BATCH_TOKENS:
                self._condition()
            self._documents.append((wanted, taken))

    def finish(self) -> None:
        """Make what still waits."""
        for waiting in self._pictures.values():
            self._encode(waiting)
        self._pictures.clear()
        self._condition()

    @torch.no_grad()
    def _encode(self, waiting: list[tuple[Wanted, Tensor]]) -> None:
        mean, logvar = self.codec.encode(torch.cat([pixels for _, pixels in waiting]))
        for at, (wanted, _) in enumerate(waiting):
            tensors = {"mean": mean[at : at + 1]}
            if logvar is not None:
                tensors["logvar"] = logvar[at : at + 1]
            self._hold(wanted, tensors)

    @torch.no_grad()
    def _condition(self) -> None:
        waiting, self._documents = self._documents, []
        if waiting:
            states = self.states_of([document for _, document in waiting])
            for (wanted, _), one in zip(waiting, states, strict=True):
                self._hold(wanted, _tensors(one))

    def _hold(self, wanted: Wanted, tensors: Mapping[str, Tensor]) -> None:
        self._held[wanted.kind][wanted.key] = tensors
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        self.report.made[wanted.kind] = self.report.made.get(wanted.kind, 0) + 1
        if self._bytes >= HELD_BYTES or sum(map(len, self._held.values())) >= HELD_FILES:
            self.write()

    def write(self) -> None:
        """Write what is held."""
        for kind, entries in self._held.items():
            self.cache.write(kind, entries)
            entries.clear()
        self._bytes = 0


def fill(
    cache: Cache,
    documents: Documents,
    records: Sequence[Record],
    *,
    codec: Codec | None = None,
    states_of: StatesOf | None = None,
    trainable: bool = False,
    drops_text: bool = True,
    shard: tuple[int, int] = (0, 1),
    on_progress: OnProgress | None = None,
) -> Report:
    """Make what is missing: moments with `codec`, states with `states_of` (`run_mllm`). The body of `reasonedit-train cache`.

    trainable: whether the stage trains the MLLM; its states then change with every step and ConfigError is raised. drops_text:
    states without text are needed as well. shard: (which, of how many) processes this is; each makes entries of its own.
    Pictures that cannot be used are in the report, the others are cached. Stopping and starting again loses at most what was
    in the making; a kill, what was held (HELD_FILES, HELD_BYTES).
    """
    if states_of is not None:
        refuse_trainable(trainable)
    report = Report()
    maker = _Maker(cache, codec, states_of, report)
    seen: set[tuple[str, str]] = set()
    try:
        for number, record in enumerate(records):
            for each in _wanted(cache, documents, record, codec, states_of, drops_text, report):
                if (each.kind, each.key) in seen or int(each.key[:12], 16) % shard[1] != shard[0]:
                    continue
                seen.add((each.kind, each.key))
                if on_progress is not None:
                    on_progress(each.kind, number, len(records))
                maker.add(each)
        maker.finish()
    finally:  # what was made is kept, also where something stops this
        maker.write()
    if on_progress is not None:
        on_progress("done", len(records), len(records))
    return report


def refuse_trainable(trainable: bool) -> None:
    """Raise ConfigError where states of an MLLM would be kept that is trained."""
    if trainable:
        raise ConfigError(
            "cached.states: expected a frozen MLLM, found a stage that trains it: its states change with every step. Set "
            "cached.states to false (cached.latents may stay)."
        )


def _wanted(
    cache: Cache,
    documents: Documents,
    record: Record,
    codec: Codec | None,
    states_of: StatesOf | None,
    drops_text: bool,
    report: Report,
) -> Iterator[Wanted]:
    """The entries that a record needs: moments where there is a codec, states where there is something to compute them."""
    for task in documents.tasks_of(record):
        if TASKS[task] != FM:
            continue
        name = item_id(record, task)
        try:
            layout = documents.layout(record, task)
            if codec is not None:
                yield from _wanted_moments(cache, documents, record, layout, name)
            if states_of is not None:
                for dropped in (False, True)[: 1 + drops_text]:
                    yield _wanted_states(cache, documents, record, task, layout, dropped)
        except DataError as error:
            report.failed.append(Refused(name, str(error)))


def _wanted_moments(cache: Cache, documents: Documents, record: Record, layout: Layout, document: str) -> Iterator[Wanted]:
    for name, size in zip(layout.names, layout.sizes, strict=True):

        def take(name: str = name, size: Size = size) -> Tensor:
            return documents.voice.geometry.to_vae(documents.open(record, name), size) * 2 - 1

        yield Wanted(MOMENTS, cache.moments_key(documents, record, name, size), document, take)


def _wanted_states(cache: Cache, documents: Documents, record: Record, task: str, layout: Layout, dropped: bool) -> Wanted:
    def take() -> TextDocument:
        return documents.condition(record, task, dropped=dropped)

    return Wanted(STATES, cache.states_key(documents, record, layout, dropped), item_id(record, task), take)


def missing(
    cache: Cache,
    documents: Documents,
    records: Sequence[Record],
    *,
    moments: bool = True,
    states: bool = False,
    drops_text: bool = True,
) -> list[str]:
    """Documents of which the cache lacks something, for a check before the run."""
    nothing: object = object()
    how = (nothing if moments else None, nothing if states else None, drops_text, Report())
    found = (each for record in records for each in _wanted(cache, documents, record, *how))
    return list(dict.fromkeys(each.document for each in found if not cache.has(each.kind, each.key)))


def run_mllm(unit: PackedMLLM) -> StatesOf:
    """What computes the states of documents: the frozen MLLM, through the very unit that stage 3 trains, as one pack."""

    def states_of(documents: Sequence[TextDocument]) -> list[CachedStates]:
        with torch.no_grad():
            states, _ = unit(text_pack(documents, [0.0] * len(documents)))
            whole = states.split([len(document) for document in documents])
            return [_cached(unit, document, rows) for document, rows in zip(documents, whole, strict=True)]

    return states_of


def _cached(unit: PackedMLLM, document: TextDocument, states: Tensor) -> CachedStates:
    embeds = None
    if document.quoted is not None and bool(document.quoted.any()):
        embeds = unit.input_embeddings(document.ids[document.kept][document.quoted])
    return CachedStates(states[document.kept], document.fillers, document.place, document.quoted, embeds)
