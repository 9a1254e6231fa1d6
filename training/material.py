"""What the stages of a run learn from: records, their manifest, how the checkpoint speaks and sees, and the cache.

Everything is made from the recipe and the checkpoint alone; what costs time (drawn data, manifest, cache) is on the disk and
is made once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reasonedit_core import flow
from ..reasonedit_core.detect import STEP1X
from ..reasonedit_core.errors import ConfigError, DataError
from ..reasonedit_core.files import write_json
from ..reasonedit_core.parts import read_schedule
from .adapters import Trained
from .config import Config, Stage
from .data.manifest import Manifest, index
from .data.records import Record, read_records
from .data.transcripts import Shown
from .models import Base, fingerprint
from .presets import MLLM
from .stages import REASONBRAIN, Plan
from .timesteps import Timesteps
from .types import FM

if TYPE_CHECKING:
    from ..reasonedit_core.mllm.qwen25vl import QwenVL
    from .data.cache import Cache, Report, StatesOf
    from .data.documents import Documents, Voice
    from .data.packs import Source
    from .distributed import Ranks

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True, eq=False)
class Material:
    """records: all of the recipe, of every kind and split. manifest: of them."""

    config: Config
    base: Base
    records: tuple[Record, ...]
    manifest: Manifest

    def of(self, plan: Plan, split: str) -> list[Record]:
        """The records of a split that a stage can use."""
        kinds = plan.stage.mixture.kinds or plan.kind.kinds
        return [record for record in self.records if record.split == split and record.kind in kinds]


# ---- made when absent ----------------------------------------------------------------------------------------------------


def draw_missing(config: Config) -> None:
    """Make the tiny checkpoint and the drawn records that a recipe asks for, where nothing is there yet."""
    drawn, weights = config.model.drawn, config.place(config.model.weights)
    if drawn is not None and not weights.exists():
        log.info("building a tiny checkpoint in %s", weights)
        building = weights.with_name(f"{weights.name}.part")
        if config.model.system == REASONBRAIN:
            from .mini.brain_blank import write_bases

            write_bases(building, kind=drawn.system, seed=drawn.seed, config=drawn.config)
        else:
            from ..reasonedit_core.mini.builder import build_checkpoint

            build_checkpoint(drawn.system, building, seed=drawn.seed, std=drawn.std, config=drawn.config)
        building.rename(weights)
    if config.data.drawn is None:
        return
    from .data.drawn import write_drawn
    from .data.records import FILE_NAME

    wanted, folder = config.data.drawn, config.place(config.data.records[0])
    if not (folder / FILE_NAME).is_file():
        log.info("drawing records in %s", folder)
        write_drawn(folder, wanted.counts, wanted.seed, wanted.size, held_out=wanted.held_out, languages=wanted.languages)


def open_material(config: Config, base: Base, ranks: Ranks | None = None) -> Material:
    """Read the records and bring the manifest up to date. Rank 0 writes; every rank must call it.

    Raises DataError naming file, line and record.
    """
    paths = [config.place(path) for path in config.data.records]
    records = read_records(paths)
    place = config.out / MANIFEST
    if ranks is None or ranks.main:
        manifest = index(paths, place, records=records)
    if ranks is not None:
        ranks.wait()
        if not ranks.main:
            manifest = Manifest.load(place)
    return Material(config, base, tuple(records), manifest)


# ---- how the checkpoint speaks -------------------------------------------------------------------------------------------


def make_voice(base: Base, mllm: QwenVL) -> Voice:
    """The checkpoint's side of every document. mllm: may be `Base.shell()`."""
    from ..reasonedit_core.generator import Step1XGeometry
    from ..reasonedit_core.geometry import QwenGeometry
    from .data.documents import Voice

    settings, patch = base.settings(), base.codec(shell=True).patch
    if base.system == STEP1X:
        geometry: Any = Step1XGeometry(base.variant, settings.multiple, patch)
    else:
        geometry = QwenGeometry(base.plus, settings.condition_area, settings.multiple, patch)
    low, high = settings.reasoner_pixels
    return Voice(
        mllm,
        base.dialogue().pack,
        base.conditioner(mllm),
        geometry,
        settings.size_level,
        negative="" if base.system == STEP1X else " ",
        shown=Shown(low, high, settings.reasoner_max_side),
        reflection=base.config.data.reflection,
    )


def make_documents(material: Material, mllm: QwenVL) -> Documents:
    """What makes documents of records."""
    from .data.documents import USUAL, Documents

    tasks = material.config.data.tasks or USUAL
    return Documents(make_voice(material.base, mllm), manifest=material.manifest, tasks=tasks)


def make_source(
    material: Material, plan: Plan, documents: Documents, cache: Cache, *, split: str = TRAIN, world: int = 1, rank: int = 0
) -> Source:
    """What a stage works on: the plan and the packs of a split. The held-out split is every record once.

    Raises DataError where the split has no record that the stage can use.
    """
    from .data.packs import Counted, Draws, Mix, Source
    from .data.planner import Budgets

    stage = plan.stage
    records = material.of(plan, split)
    if not records:
        kinds = ", ".join(stage.mixture.kinds or plan.kind.kinds)
        raise DataError(
            f"stage.{stage.name}: expected records of kinds {kinds} with split {split}, found none. Add some, or change "
            "mixture.kinds."
        )
    budgets = Budgets(text=stage.packs.text, image=stage.packs.image)
    mix = Mix(budgets)
    if split == TRAIN:
        mix = Mix(
            budgets,
            stage.packs.accumulation,
            stage.packs.window,
            stage.mixture.mandatory,
            stage.mixture.kinds or None,
            stage.mixture.shortest,
        )
    balance, pad = stage.loss.balance, stage.packs.pad
    return Source(
        records,
        documents,
        seed=material.config.run.seed,
        mix=mix,
        draws=Draws(make_timesteps(material.base, stage), stage.dropout.text, stage.dropout.reference),
        counted=Counted(balance, balance, pad, pad),
        losses=plan.kind.losses,
        world=world,
        rank=rank,
        cache=cache,
        codec=material.base.codec(shell=True) if FM in plan.kind.losses else None,
        states="cache" if stage.cached.states else "pack",
        data_hash=material.manifest.hash,
    )


def make_timesteps(base: Base, stage: Stage) -> Timesteps:
    """How sigma is drawn; the dynamic shift is that of the checkpoint's own schedule."""
    said = stage.timesteps
    default = flow.STEP1X if base.system == STEP1X else flow.QWEN
    return Timesteps(said.kind, said.shift, said.mean, said.std, said.steps, read_schedule(base.parts, default))


# ---- cache ---------------------------------------------------------------------------------------------------------------


def open_cache(material: Material, plan: Plan, carried: Trained | None) -> Cache:
    """The cache with the hashes of the weights whose outputs it keeps. carried: what earlier stages trained of the MLLM."""
    from .data.cache import Cache

    base, root = material.base, material.config.place(material.config.data.cache)
    vae = file_hash(base.parts.vae, root)
    mllm = ""
    if plan.stage.cached.states:
        mllm = states_hash(base, root, carried)
    return Cache(root, vae=vae, mllm=mllm)


def fill_cache(
    material: Material, plan: Plan, cache: Cache, carried: Trained | None, ranks: Ranks | None = None
) -> list[Report]:
    """Make what the cache lacks for a stage: latents with the VAE, states with the frozen MLLM, each loaded for that alone.

    Ranks share the records between them. Every rank must call it.
    """
    from .data.cache import fill, missing

    if FM not in plan.kind.losses:
        return []
    documents = make_documents(material, material.base.shell())
    records = [*material.of(plan, TRAIN), *material.of(plan, HELD_OUT)]
    records = records[ranks.rank :: ranks.world] if ranks is not None else records
    drops = plan.stage.dropout.text > 0
    reports = []
    if missing(cache, documents, records, moments=True):
        log.info("caching latents in %s", cache.root)
        codec = material.base.codec()
        reports.append(fill(cache, documents, records, codec=codec, on_progress=progress()))
    if plan.stage.cached.states and missing(cache, documents, records, moments=False, states=True, drops_text=drops):
        log.info("caching the MLLM's states in %s", cache.root)
        states_of = _states_of(material.base, carried)
        reports.append(
            fill(
                cache,
                documents,
                records,
                states_of=states_of,
                trainable=bool(plan.of(MLLM)),
                drops_text=drops,
                on_progress=progress(),
            )
        )
    material.base.release()
    for report in reports:
        for refused in report.failed:
            log.warning("left out: %s", refused)
    if ranks is not None:
        ranks.wait()
    return reports


def _states_of(base: Base, carried: Trained | None) -> StatesOf:
    from ..reasonedit_core.mllm.packed import PackedMLLM
    from .adapters import restore
    from .data.cache import run_mllm

    base.release()  # the one of another stage may have other LoRAs, or be cut over the ranks
    mllm = base.mllm(need_lm_head=False)
    if carried is not None:
        restore(mllm.model, carried, trainable=False)
    return run_mllm(PackedMLLM(mllm, backend=base.config.model.attention).eval())


def states_hash(base: Base, memo: Path, carried: Trained | None) -> str:
    """A hash of everything that the MLLM's states follow from: weights, their form, precision, what was trained of it."""
    said = (file_hash(base.parts.mllm, memo), base.config.model.mllm_weights, str(base.dtype), trained_hash(carried))
    return hashlib.sha256(repr(said).encode()).hexdigest()


def trained_hash(trained: Any) -> str:
    """sha256 over names and values of what was trained, "" for nothing."""
    if trained is None:
        return ""
    if not isinstance(trained, Trained):  # of another objective, which knows its own
        return trained.digest
    digest = hashlib.sha256(repr(sorted(trained.config.items())).encode())
    for name, tensor in sorted({**trained.lora, **trained.whole}.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(_bytes()).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path, memo: Path) -> str:
    """sha256 of the weights at `path`; remembered in `memo` by size and time, as reading 16 GB takes a minute."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stamp = hashlib.sha256(repr([(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode())
    place = memo / "hashes" / f"{stamp.hexdigest()[:32]}.json"
    if place.is_file():
        try:
            return str(json.loads(place.read_text(encoding="utf-8"))["sha256"])
        except (OSError, ValueError, KeyError):
            log.info("%s cannot be read and is made anew", place)
    value = fingerprint(path)
    try:
        write_json(place, {"weights": path.name, "sha256": value})
    except ConfigError as error:  # a cache that cannot be written will say so itself
        log.debug("%s", error)
    return value


def _bytes():
    import torch

    return torch.uint8


def progress() -> Callable[[str, int, int], None]:
    """A line every tenth of the way, where there is much to do."""
    told = 0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal told
        if total >= 200 and done * 10 // total > told:
            told = done * 10 // total
            log.info("%s: %d of %d", what, done, total)

    return tell


def refused_lines(refused: Sequence[Any], most: int = 10) -> list[str]:
    """Documents that are left out, for people."""
    more = [f"... and {len(refused) - most} more"] if len(refused) > most else []
    return [*(str(one) for one in refused[:most]), *more]
