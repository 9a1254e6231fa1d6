"""What is done around a stage of ReasonBrain: functions of the names in `run.py` and `seeing.py` that stand in for those."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...reasonedit_core.conditioners.brain_weights import FILE
from ...reasonedit_core.errors import CheckpointError, ConfigError
from ...reasonedit_core.files import write_json
from ...reasonedit_core.images import load_image
from ...reasonedit_core.mllm.focus import Focus
from ...reasonedit_core.types import EditRequest
from .. import adapters, rng
from ..checkpoint import apply_weights
from ..config import BASE, PREVIOUS, BrainStage, Config
from ..config_file import SNAPSHOT, read_snapshot
from ..distributed import Ranks, gathered
from ..material import HELD_OUT, TRAIN, Material, file_hash, open_material, progress
from ..presets import BRAIN
from ..run import TRAINED, before, is_done, need_done
from ..sample import Sample, choose_records, write_sheet
from ..seeing import LOSS, Seen, held_out
from ..stages import L_DM, Plan, plan_stages
from ..trainable import trainable_table
from ..validate import evaluating
from .assemble import BrainLoaded, Carried, load_stage
from .base import BrainBase
from .examples import Examples, told
from .export import export
from .source import FILLING, make_source

if TYPE_CHECKING:
    from ..data.cache import Cache
    from ..export import Exported
    from ..loop import Outcome

log = logging.getLogger(__name__)


# ---- what a stage starts from -------------------------------------------------------------------------------------------


def starting_point(config: Config, plan: Plan) -> dict[str, Carried]:
    """What has been trained before a stage, under the name `brain`. CheckpointError where a folder holds nothing of that."""
    start = plan.stage.start
    if start == (BASE,) or (start == (PREVIOUS,) and plan.index == 0):
        return {}
    if len(start) > 1:
        raise ConfigError(f"stage.{plan.stage.name}.start: expected one folder for ReasonBrain, found {', '.join(start)}.")
    folder = before(config, plan) if start == (PREVIOUS,) else _trained_folder(config.place(Path(start[0])))
    return {BRAIN: Carried(folder)}


def _trained_folder(folder: Path) -> Path:
    """The folder with trained tensors that a path means: itself, of a stage, or of the last finished stage of a run."""
    if (folder / SNAPSHOT).is_file():
        other = read_snapshot(folder)
        done = [plan for plan in plan_stages(other) if is_done(other, plan)]
        folder = other.out / done[-1].folder if done else folder
    for place in (folder, folder / TRAINED):
        if (place / FILE).is_file():
            return place
    raise CheckpointError(f"{folder}: expected {FILE} of a trained ReasonBrain, found none. Name a run, a stage or a system.")


def documents_of(material: Material) -> Examples:
    """What makes examples of records."""
    from ..data.cache import Cache

    base: BrainBase = material.base
    root = material.config.place(material.config.data.cache)
    cache = Cache(root, vae=file_hash(base.parts.vae, root))
    seen = {name: file_hash(place, root) for name, place in base.places.items() if name not in ("vae", "network")}
    return Examples(base, cache, material.manifest, repr(sorted(seen.items())), base.reader().patch)


def filled_cache(material: Material, plan: Plan, carried: Mapping[str, Carried], ranks: Ranks | None = None) -> Cache:
    """The cache with everything that a stage reads. Ranks share the work; every rank must call it."""
    examples, base = documents_of(material), material.base
    stage = plan.stage.brain or BrainStage()
    records = [one for split in (TRAIN, HELD_OUT) for one in material.of(plan, split) if {"input", "target"} <= set(one.files)]
    if ranks is not None:
        records = records[ranks.rank :: ranks.world]
    lacking = examples.missing(records, features=stage.features)
    if lacking:
        log.info("caching what the frozen encoders see of %d records in %s", len(lacking), examples.cache.root)
        finder = base.finder() if stage.features else None
        failed = examples.fill(lacking, base.model(), finder, features=stage.features, on_progress=progress())
        if failed:
            raise CheckpointError(f"expected pictures that can be used, found {len(failed)} that cannot: {failed[0]}")
    if ranks is not None:
        ranks.wait()
    return examples.cache


# ---- what a stage leaves ------------------------------------------------------------------------------------------------


def keep(config: Config, plan: Plan, loaded: BrainLoaded, outcome: Outcome, ranks: Ranks) -> None:
    """Write the trained folder, which is a system that `reasonedit edit --system reasonbrain` runs; trained.json comes last."""
    if not ranks.main:
        return
    base = BrainBase(config, device=torch.device("cpu") if ranks.sharded else ranks.device)
    if ranks.sharded:  # what is cut over the ranks is read back whole from the checkpoint
        loaded = load_stage(base, plan, starting_point(config, plan))
        apply_weights(outcome.checkpoint, loaded.models, average=True)
    from ...reasonedit_core.brain.model import save_brain_model

    folder = config.out / plan.folder / TRAINED
    (folder / adapters.FILE_NAME).unlink(missing_ok=True)
    names = dict(loaded.model.network.named_parameters())
    for name in loaded.kept:  # trained by an earlier stage: still part of what was trained
        names[name].requires_grad_(True)
    save_brain_model(folder, loaded.model, base.parts)
    about = {"run": config.run.name, "stage": plan.stage.name, "steps": str(outcome.step)}
    write_json(folder / adapters.FILE_NAME, {"schema": adapters.SCHEMA, "system": config.model.system, "about": about})


def take_kept(config: Config, plan: Plan, loaded: BrainLoaded) -> None:
    """Put what `keep` has written into the models of that stage."""
    from ...reasonedit_core.conditioners.brain_weights import load_brain

    load_brain(config.out / plan.folder / TRAINED, loaded.model.brain, loaded.model.llava, loaded.model.network)


def export_stage(config: Config, plan: Plan, format: str, out: Path) -> Exported:
    """What a finished stage has trained, in one format: comfyui, peft or merged (see `export`)."""
    need_done(config, plan)
    return export(config.out / plan.folder / TRAINED, format, out, config.run.name)


# ---- what a stage is looked at by ---------------------------------------------------------------------------------------


def measure(seen: Seen, weights: AbstractContextManager[Any] | None = None) -> dict[str, float]:
    """L_MLLM, L_DM at each fixed sigma of the recipe (or the distance of V̂), and `loss`, on held-out records. Empty without."""
    chosen = held_out(seen.material, seen.plan)
    if not chosen:
        return {}
    plan, unit = seen.plan, seen.loaded.models.brain
    source = make_source(_only(seen.material, chosen), plan, seen.documents, seen.cache, split=HELD_OUT)
    sigmas = plan.stage.validation.sigmas if plan.paints else (0.5,)
    batches = source.batches(0)
    sums: dict[str, float] = {}
    count = 0.0
    with weights or nullcontext(), ExitStack() as stack:
        stack.enter_context(rng.isolated())
        stack.enter_context(torch.no_grad())
        stack.enter_context(seen.ranks.autocast())
        stack.enter_context(evaluating(unit))
        for uses in batches:
            fresh = [(record, number) for record, number in uses if number < FILLING]  # what only fills a batch counts once
            for sigma in sigmas:
                batch = source.validation(fresh, sigma)
                for name, rows in unit(batch, plan.kind.losses).items():
                    value = float((rows.double() * batch.weight.to(rows.device)).sum())
                    sums[name] = sums.get(name, 0.0) + value / len(sigmas)
                    if name == L_DM:
                        sums[f"{name}_{sigma:g}"] = sums.get(f"{name}_{sigma:g}", 0.0) + value
            count += float(batch.weight.double().sum())
    figures = {name: value / count for name, value in sums.items()}
    return {**figures, LOSS: sum(plan.weights[name] * figures[name] for name in plan.kind.losses)}


def _only(material: Material, records: list) -> Material:
    ids = {record.id for record in records}
    return replace(material, records=tuple(record for record in material.records if record.id in ids))


def write_samples(seen: Seen, path: Path, title: str, weights: AbstractContextManager[Any] | None = None) -> Path | None:
    """Edit held-out pictures with the weights as they are now and write the contact sheet; None where there is nothing to edit.
    Every rank must call it; the first one writes."""
    from ...reasonedit_core.brain.generator import make_generator

    stage, base, model = seen.plan.stage, seen.material.base, seen.loaded.model
    records = choose_records((r for r in seen.material.of(seen.plan, HELD_OUT) if "target" in r.files), stage.samples.records)
    if not records:
        return None
    table, settings = stage.brain or BrainStage(), base.settings()
    chain = model.conditioner.with_cues(base.finder())
    generator = make_generator(model, chain, multiple=settings.multiple, image_scale=table.image_guidance)
    samples = []
    with weights or nullcontext(), seen.ranks.autocast(), gathered(seen.loaded.models), ExitStack() as stack:
        # Token selection and TAME are of training alone; a sheet shows what an edit will be.
        stack.callback(model.llava.set_focus, model.llava.focus)
        model.llava.set_focus(Focus())
        stack.enter_context(rng.isolated())
        stack.enter_context(evaluating(seen.loaded.models.brain))
        for record in records:
            source, words = load_image(record.picture("input")).rgb, told(record)
            how = {"steps": stage.samples.steps, "guidance": stage.samples.guidance, "seed": stage.samples.seed}
            request = EditRequest(source, words.instruction, size_level=settings.size_level, **how)
            generator.use_cues(extractor=_Named(words.objects))
            draws = torch.Generator().manual_seed(stage.samples.seed)
            made = generator.edit(request, source, words.instruction, draws)
            samples.append(Sample(record.id, words.instruction, source, made.image, load_image(record.picture("target")).rgb))
    return write_sheet(path, samples, title) if seen.ranks.main else None


class _Named:
    """An extractor that answers with the names a record gives."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def extract(self, instruction: str, image: torch.Tensor | None = None) -> list[str]:
        """The names, whatever the instruction."""
        return list(self.names)


# ---- the dry run --------------------------------------------------------------------------------------------------------


def check_stages(config: Config, data: bool) -> list[str]:
    """What `reasonedit-train check` says of the stages: parts, batches, and what would be trained. data: records can be read.

    Networks are loaded, as ReasonBrain's own folders are strict only then; nothing is trained. Raises ConfigError,
    CheckpointError and DataError for what stands in the way of a run.
    """
    base = BrainBase(config)
    lines = [f"weights: reasonbrain ({base.parts.kind}), {base.parts.root}; device {base.device}"]
    material = open_material(config, base) if data else None
    for plan in plan_stages(config):
        lines += ["", f"stage {plan.stage.name}: {plan.stage.steps:,} steps of {plan.stage.step}"]
        carried = {} if plan.stage.start == (PREVIOUS,) else starting_point(config, plan)
        loaded = load_stage(base, plan, carried)
        lines.append(trainable_table(loaded.groups, loaded.modules))
        if material is not None:
            lines.append(make_source(material, plan, documents_of(material), None).table())
        del loaded
        base.release()
    return [*lines, ""]
