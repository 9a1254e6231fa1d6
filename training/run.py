"""A run: config -> models -> source -> engine, stage after stage, each going on from what the one before has trained.

    RUN/config.json                  the recipe as it was understood
    RUN/1-reasoning/                 a stage: checkpoints/, log.jsonl, curves.png, samples/
    RUN/1-reasoning/trained/         what it has trained, of both parts, with what earlier stages trained (`adapters.save`)
    RUN/NAME_dit.safetensors, ...    what is exported at the end

A stage is done when its `trained` folder is whole; a resumed run begins at the first stage that is not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.load import choose_device, choose_dtype
from . import adapters
from .adapters import Adapters, Trained
from .assemble import BLOCKS, Loaded
from .checkpoint import apply_weights, complete, find
from .config import BASE, PREVIOUS, Config
from .config_file import SNAPSHOT, decisive, read_snapshot, write_snapshot
from .distributed import ParallelSettings, Ranks, open_ranks
from .export import Exported, export, find_trained
from .log import read_log
from .loop import Outcome, TrainSettings, train
from .material import Material, draw_missing, fill_cache, make_documents, open_cache, open_material, trained_hash
from .models import Base, open_base, pieces
from .optim import OptimSettings
from .presets import MLLM
from .seeing import LOSS, Seen, compare, make_hooks, measure, need_held_out, write_samples
from .stages import Plan, plan_stages
from .trainable import trainable_table

if TYPE_CHECKING:
    from .data.cache import Cache
    from .data.documents import Documents

log = logging.getLogger(__name__)

TRAINED = "trained"
EXIT_DONE = 0


def run(
    config: Config, *, source: str = "", quiet: bool = False, resume: bool = False, allow_changed: tuple[str, ...] = ()
) -> int:
    """Train every stage that is not done, then export. Returns the exit code: 0, or that of a run that was asked to stop.

    source: where the config is from, for the snapshot. resume: go on with the run in run.out. allow_changed: see
    `resume.accept`. Raises what `loop.train` raises, and ConfigError for a folder that already holds a run.
    """
    plans = plan_stages(config)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    _keep_inside(config)
    ranks = open_ranks(parallel_settings(config))
    if not ranks.main:  # what every rank would say in the same words is said once
        logging.getLogger(__package__.rpartition(".")[0]).setLevel(logging.WARNING)
    try:
        _open_folder(config, plans, source, ranks, resume)
        base = open_base(config, device=ranks.device)
        material = open_material(config, base, ranks)
        for plan in plans:
            if is_done(config, plan):
                log.info("stage %s is done", plan.stage.name)
                continue
            outcome = run_stage(material, plan, ranks, allow_changed)
            if ranks.main:  # only now is it sure that a resumed run may go on with what was changed
                write_snapshot(config, source)
            if outcome.exit_code:  # also in the last step of a stage: the next one was not asked for
                return outcome.exit_code
        if ranks.main:
            for format in config.export.formats:
                _tell(plans[-1].kind.own(export_stage)(config, plans[-1], format, config.out), quiet)
        ranks.wait()
        return EXIT_DONE
    finally:
        ranks.close()


def run_stage(material: Material, plan: Plan, ranks: Ranks, allow_changed: tuple[str, ...] = ()) -> Outcome:
    """Train one stage, from its last checkpoint where there is one, and write what it has trained."""
    config, base, stage = material.config, material.base, plan.stage
    folder = config.out / plan.folder
    carried = plan.kind.own(starting_point)(config, plan)
    cache = plan.kind.own(filled_cache)(material, plan, carried, ranks)
    log.info("stage %s: loading models", stage.name)
    loaded = plan.kind.load_models(base, plan, carried)
    table = trainable_table(loaded.groups, loaded.modules)
    log.info("stage %s: %d steps of %s\n%s", stage.name, stage.steps, stage.step, table)
    documents = plan.kind.own(documents_of)(material)
    source = plan.kind.make_source(material, plan, documents, cache, world=ranks.world, rank=ranks.rank)
    if ranks.main:
        for refused in getattr(source, "unmade", ())[:20]:
            log.warning("left out: %s", refused)
        if hasattr(source, "plan"):
            log.info("packs of an epoch\n%s", source.plan(0).table())
    seen = Seen(material, plan, loaded, documents, cache, ranks)
    settings = train_settings(config, base, plan, carried, allow_changed, resume=bool(complete(folder / "checkpoints")))
    outcome = train(loaded.models, loaded.groups, source, plan.kind.load(stage), settings, folder, make_hooks(seen))
    if outcome.finished:
        finish(config, plan, loaded, outcome, ranks)
    return outcome


def finish(config: Config, plan: Plan, loaded: Loaded, outcome: Outcome, ranks: Ranks) -> None:
    """Write what has been trained (the moving averages, where there are any) and say what it was good for."""
    apply_weights(outcome.checkpoint, loaded.models, average=True)
    plan.kind.own(keep)(config, plan, loaded, outcome, ranks)
    if ranks.main:
        looks = validations(config.out / plan.folder)
        log.info("stage %s is done after %d steps", plan.stage.name, outcome.step)
        if len(looks) > 1:
            log.info("%s", "\n".join(compare(looks[0], looks[-1])))
            if looks[-1].get(LOSS, 0.0) >= looks[0].get(LOSS, 0.0) > 0:
                log.warning("stage %s did not lower its held-out loss", plan.stage.name)
    ranks.wait()


def keep(config: Config, plan: Plan, loaded: Loaded, outcome: Outcome, ranks: Ranks) -> None:
    """Write the folder that later stages start from. Under FSDP2 every rank must call this."""
    trained = loaded.trained()
    if ranks.main:
        about = {"run": config.run.name, "stage": plan.stage.name, "steps": str(outcome.step)}
        whole = Adapters(config.model.system, _weights(config), trained, config.model.variant, about, pieces(config))
        adapters.save(whole, config.out / plan.folder / TRAINED)


def filled_cache(material: Material, plan: Plan, carried: Mapping[str, Trained], ranks: Ranks | None = None) -> Cache:
    """The cache of a stage with everything that the stage reads. Every rank must call it."""
    cache = open_cache(material, plan, carried.get(MLLM))
    fill_cache(material, plan, cache, carried.get(MLLM), ranks)
    return cache


def documents_of(material: Material) -> Documents:
    """What makes documents of records for the system that is trained."""
    return make_documents(material, material.base.shell())


def is_done(config: Config, plan: Plan) -> bool:
    """Whether a stage has trained to its end: trained.json is written last."""
    return (config.out / plan.folder / TRAINED / adapters.FILE_NAME).is_file()


def validations(folder: Path) -> list[Mapping[str, float]]:
    """The figures of every look at the held-out records, in order."""
    lines = [line for line in read_log(folder) if line["event"] == "hook" and line.get("name") == "validation"]
    return [line["figures"] for line in lines if line.get("figures")]


# ---- what a stage starts from --------------------------------------------------------------------------------------------


def starting_point(config: Config, plan: Plan) -> dict[str, Trained]:
    """What has been trained before a stage, by part. Raises CheckpointError where a folder holds nothing of the kind."""
    start = plan.stage.start
    if start == (BASE,) or (start == (PREVIOUS,) and plan.index == 0):
        return {}
    if start == (PREVIOUS,):
        folders = [before(config, plan)]
    else:
        folders = [_trained_folder(config.place(Path(one))) for one in start]
    parts: dict[str, Trained] = {}
    for folder in folders:
        found = adapters.load(folder, base=_weights(config), pieces=pieces(config))
        if found.system != config.model.system and any(one.part != MLLM for one in found.trained):  # both have the same MLLM
            raise ConfigError(
                f"stage.{plan.stage.name}.start: expected something trained of {config.model.system}, found {folder} of "
                f"{found.system}. Name another folder."
            )
        parts |= {one.part: one for one in found.trained}
    return parts


def before(config: Config, plan: Plan) -> Path:
    """The trained folder of the stage before."""
    return config.out / plan_stages(config)[plan.index - 1].folder / TRAINED


def _trained_folder(folder: Path) -> Path:
    """The trained folder that a path means: of a stage, or of the last finished stage of a run."""
    if (folder / SNAPSHOT).is_file():
        other = read_snapshot(folder)
        done = [plan for plan in plan_stages(other) if is_done(other, plan)]
        if done:
            return other.out / done[-1].folder / TRAINED
    return find_trained(folder)


def _weights(config: Config) -> Path:
    return config.place(config.model.weights)


# ---- settings of the engine ----------------------------------------------------------------------------------------------


def parallel_settings(config: Config) -> ParallelSettings:
    """How processes share the work, and in which precision they compute."""
    precision = choose_dtype(config.run.precision, choose_device(config.run.device))
    return ParallelSettings(
        device=config.run.device,
        precision=precision,
        parallel=config.run.parallel,
        blocks=BLOCKS,
        context_parallel=config.run.context_parallel,
    )


def train_settings(
    config: Config,
    base: Base,
    plan: Plan,
    carried: Mapping[str, Trained],
    allow_changed: tuple[str, ...] = (),
    *,
    resume: bool = False,
) -> TrainSettings:
    """What the engine is told about a stage."""
    stage, said = plan.stage, plan.stage.optim
    identity: dict[str, Any] = decisive(config, stage)
    identity |= {f"start.{part}": trained_hash(one) for part, one in sorted(carried.items())}
    identity["base"] = base.identity
    optim = OptimSettings(
        name=said.name,
        betas=said.betas,
        eps=said.eps,
        options=said.options,
        schedule=said.schedule,
        warmup=said.warmup,
        floor=said.floor,
        clip=said.clip,
        decay_vectors=said.decay_vectors,
        ema=said.ema,
        ema_lora=said.ema_lora,
        master="keep",  # `trainable` has brought every set to its own
    )
    return TrainSettings(
        steps=stage.steps,
        weights=plan.weights,
        seed=config.run.seed,
        workers=config.run.workers,
        optim=optim,
        parallel=parallel_settings(config),
        save_every=stage.save_every,
        keep=stage.keep,
        log_every=stage.log_every,
        deterministic=config.run.deterministic,
        budgets={"text": stage.packs.text, "image": stage.packs.image},
        identity=identity,
        resume="latest" if resume else None,
        allow_changed=allow_changed,
    )


# ---- the run folder ------------------------------------------------------------------------------------------------------


def _open_folder(config: Config, plans: Sequence[Plan], source: str, ranks: Ranks, resume: bool) -> None:
    """Snapshot, drawn data and tiny weights, on rank 0; refuse to begin anew where a run has begun."""
    failure = None
    if ranks.main:
        try:
            begun = [p for p in plans if is_done(config, p) or complete(config.out / p.folder / "checkpoints")]
            if begun and not resume:
                raise ConfigError(
                    f"{config.out}: expected a folder without a run, found one that has begun (stage {begun[-1].stage.name}). "
                    f"Go on with `reasonedit-train resume {config.out}`, or choose another run.out."
                )
            if not resume:
                write_snapshot(config, source)
            draw_missing(config)
        except Exception as error:
            failure = error
    told = ranks.agree(None if failure is None else str(failure))[0]
    if failure is not None:
        raise failure
    if told is not None:
        raise ConfigError(told)


def _keep_inside(config: Config) -> None:
    """Libraries that would write beside the user's files write into the run folder: matplotlib its list of fonts, and, on the
    CPU where nothing worth keeping is compiled, torch its scratch folder. What the user has set stays."""
    scratch = config.out / ".cache"
    os.environ.setdefault("MPLCONFIGDIR", str(scratch / "matplotlib"))
    if choose_device(config.run.device).type == "cpu":
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "torch"))


# ---- commands on a run ---------------------------------------------------------------------------------------------------


def validate_run(config: Config, *, stage: str | None = None) -> int:
    """Measure the losses on held-out records with what a stage has trained, and print them."""
    with_ranks = open_ranks(parallel_settings(config))
    try:
        seen = _look(config, choose_stage(config, stage), with_ranks)
        with torch.no_grad():
            figures = need_held_out(seen.plan.kind.own(measure)(seen), seen.plan)
        print(f"stage {seen.plan.stage.name}")
        for name, value in figures.items():
            print(f"  held-out {name:<18} {value:>10.5f}")
        return EXIT_DONE
    finally:
        with_ranks.close()


def sample_run(config: Config, *, stage: str | None = None) -> int:
    """Edit held-out pictures with what a stage has trained; a contact sheet in its folder."""
    with_ranks = open_ranks(parallel_settings(config))
    try:
        plan = choose_stage(config, stage)
        if not plan.paints:
            raise ConfigError(f"stage {plan.stage.name}: expected a stage that paints, found one without a DiT. Name another.")
        seen = _look(config, plan, with_ranks)
        path = config.out / plan.folder / "samples" / "now.png"
        written = plan.kind.own(write_samples)(seen, path, f"{plan.stage.name}, as trained")
        if written is None:
            raise ConfigError("expected held-out records with a picture and an instruction, found none to edit. Add some.")
        print(f"written: {written}")
        return EXIT_DONE
    finally:
        with_ranks.close()


def export_run(config: Config, *, formats: Sequence[str], stage: str | None = None, out: Path | None = None) -> int:
    """Write what a stage has trained for other programs."""
    plan = choose_stage(config, stage)
    for format in formats:
        _tell(plan.kind.own(export_stage)(config, plan, format, out or config.out), quiet=False)
    return EXIT_DONE


def export_stage(config: Config, plan: Plan, format: str, out: Path) -> Exported:
    """What a finished stage has trained, in one format."""
    need_done(config, plan)
    folder = config.out / plan.folder / TRAINED
    return export(folder, format, out, name=config.run.name, base=_weights(config), pieces=pieces(config))


def need_done(config: Config, plan: Plan) -> None:
    """ConfigError for a stage that has not been trained to its end."""
    if not is_done(config, plan):
        raise ConfigError(
            f"stage {plan.stage.name}: expected a finished stage, found one that has not been trained to its end. Go on with "
            f"`reasonedit-train resume {config.out}`."
        )


def choose_stage(config: Config, name: str | None) -> Plan:
    """The stage of that name or number, or the last one that has begun."""
    plans = plan_stages(config)
    begun = [plan for plan in plans if is_done(config, plan) or complete(config.out / plan.folder / "checkpoints")]
    if name is None:
        if not begun:
            raise ConfigError(f"{config.out}: expected a stage that has begun, found none. Run it first.")
        return begun[-1]
    for plan in plans:
        if name in (plan.stage.name, str(plan.index)):
            return plan
    raise ConfigError(f"--stage: expected one of {', '.join(plan.stage.name for plan in plans)}, found {name!r}.")


def _look(config: Config, plan: Plan, ranks: Ranks) -> Seen:
    """A stage as it stands: finished, or at its last checkpoint."""
    base = open_base(config, device=ranks.device)
    material = open_material(config, base, ranks)
    carried = plan.kind.own(starting_point)(config, plan)
    cache = plan.kind.own(filled_cache)(material, plan, carried, ranks)
    loaded = plan.kind.load_models(base, plan, carried)
    if is_done(config, plan):
        plan.kind.own(take_kept)(config, plan, loaded)
    else:
        apply_weights(find(config.out / plan.folder), loaded.models, average=True)
    return Seen(material, plan, loaded, plan.kind.own(documents_of)(material), cache, ranks)


def take_kept(config: Config, plan: Plan, loaded: Loaded) -> None:
    """Put what `keep` has written into the models of that stage."""
    found = adapters.load(config.out / plan.folder / TRAINED, base=_weights(config), pieces=pieces(config))
    for one in found.trained:
        if one.part in loaded.modules:
            adapters.restore(loaded.modules[one.part], one, trainable=False)


def _tell(exported: Exported, quiet: bool) -> None:
    if not quiet:
        print("written: " + ", ".join(str(path) for path in exported.files))
