"""What a stage is: its step, the parts that the step runs, and whether a recipe's tables go together. No torch here.

Another objective adds a row with `register_step` and its trainable sets with `presets.register_preset`; the engine, the
recipes and the command line then know it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..reasonedit_core.errors import ConfigError
from .config import BASE, PREVIOUS, BrainStage, Config, Stage
from .presets import BRAIN, DENOISER, DIT, FULL, LLAVA, LORA, MLLM, Chosen, choose

NTP, FM = "ntp", "fm"
"""As in `types`, which needs torch."""

L_MLLM, L_DM, ALIGN = "mllm", "dm", "align"
"""The losses of ReasonBrain's steps, as a recipe weighs them in [stage.brain]."""

REASONBRAIN = "reasonbrain"
"""The system of that name, and its step."""

SPOKEN = ("think", "reflect", "understand")
PAINTED = ("edit", "t2i")


@dataclass(frozen=True, slots=True)
class StepKind:
    """A row of the table of steps.

    function: the step, or `module:name` relative to this package (imported when it is first run). runs: parts whose models
    the step calls. trains: parts that may have trainable sets. losses: what it returns sums of. kinds: of records it can use.
    options: names of fields of [stage.loss] that are handed to the function. models, source: what loads the models and makes
    the PackSource of such a stage, called as `assemble.load_stage` and `material.make_source` are; an objective with networks
    or documents of its own brings its own. system: the only one whose recipes may name it, "" for those of ReasonEdit. room: a
    module whose functions stand in for those of the same name around a stage (`own`).
    """

    function: str | Callable[..., Any]
    runs: tuple[str, ...]
    trains: tuple[str, ...]
    losses: tuple[str, ...]
    kinds: tuple[str, ...]
    options: tuple[str, ...] = ()
    models: str | Callable[..., Any] = ".assemble:load_stage"
    source: str | Callable[..., Any] = ".material:make_source"
    system: str = ""
    room: str = ""

    def own(self, usual: Callable[..., Any]) -> Callable[..., Any]:
        """What does the work of `usual` for this step: the function of that name in its room, else `usual` itself."""
        return _found(f"{self.room}:{usual.__name__}") if self.room else usual

    def fits(self, system: str) -> bool:
        """Whether recipes of a system may name it."""
        return self.system == system or not self.system and system != REASONBRAIN

    def load(self, stage: Stage) -> Callable[..., Any]:
        """The step, with the stage's options bound."""
        bound = {name: getattr(stage.loss, name) for name in self.options}
        return partial(_found(self.function), **bound) if bound else _found(self.function)

    def load_models(self, *args: Any, **kwargs: Any) -> Any:
        """See `assemble.load_stage`."""
        return _found(self.models)(*args, **kwargs)

    def make_source(self, *args: Any, **kwargs: Any) -> Any:
        """See `material.make_source`."""
        return _found(self.source)(*args, **kwargs)


def _found(made: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(made, str):
        return made
    module, _, name = made.partition(":")
    return getattr(importlib.import_module(module, __package__), name)


STEPS: dict[str, StepKind] = {
    "reasoning": StepKind(".steps:reasoning_step", (MLLM,), (MLLM,), (NTP,), SPOKEN),
    "editing": StepKind(".steps:editing_step", (MLLM, DIT), (DIT,), (FM,), (*PAINTED, "think", "reflect", "hypothetical")),
    "joint": StepKind(
        ".steps:joint_step", (MLLM, DIT), (MLLM, DIT), (NTP, FM), (*SPOKEN, *PAINTED, "hypothetical"), ("two_phase",)
    ),
}


def _of_brain(step: str, losses: tuple[str, ...]) -> StepKind:
    return StepKind(
        f".brain.unit:{step}",
        (),
        (BRAIN, LLAVA, DENOISER),
        losses,
        ("hypothetical", "edit", "think"),
        models=".brain.assemble:load_stage",
        source=".brain.source:make_source",
        system=REASONBRAIN,
        room=".brain.room",
    )


STEPS |= {
    REASONBRAIN: _of_brain("reasonbrain_step", (L_MLLM, L_DM)),
    "reasonbrain_align": _of_brain("align_step", (L_MLLM, ALIGN)),
}


def register_step(name: str, kind: StepKind) -> None:
    """Add a step; recipes may name it from then on."""
    if name in STEPS:
        raise ConfigError(f"expected a new name for a step, found {name!r}, which is taken: choose another")
    STEPS[name] = kind


@dataclass(frozen=True, slots=True)
class Plan:
    """A stage with its step and sets looked up. mllm, dit: whether the steps need that part loaded."""

    index: int
    stage: Stage
    kind: StepKind
    sets: tuple[Chosen, ...]

    @property
    def folder(self) -> str:
        """Name of its folder in the run folder."""
        return f"{self.index + 1}-{self.stage.name}"

    def of(self, part: str) -> tuple[Chosen, ...]:
        """The sets of one part."""
        return tuple(one for one in self.sets if one.part == part)

    @property
    def mllm(self) -> bool:
        """Not where its states are cached."""
        return MLLM in self.kind.runs and not self.stage.cached.states

    @property
    def dit(self) -> bool:
        """Whether the DiT is loaded."""
        return DIT in self.kind.runs

    @property
    def paints(self) -> bool:
        """Whether pictures can be edited with what it trains."""
        return self.dit or L_DM in self.kind.losses

    @property
    def speaks(self) -> bool:
        """Whether the MLLM needs its lm_head."""
        return NTP in self.kind.losses

    @property
    def weights(self) -> dict[str, float]:
        """What each loss is multiplied by."""
        brain = self.stage.brain or BrainStage()
        stated = {NTP: self.stage.loss.ntp, FM: self.stage.loss.fm}
        stated |= {name: getattr(brain, name) for name in (L_MLLM, L_DM, ALIGN)}
        return {name: stated.get(name, 1.0) for name in self.kind.losses}


def plan_stages(config: Config) -> tuple[Plan, ...]:
    """Every stage of a recipe, checked. Raises ConfigError naming stage and key."""
    return tuple(_plan(config, index, stage) for index, stage in enumerate(config.stage))


def _plan(config: Config, index: int, stage: Stage) -> Plan:
    where = f"stage.{stage.name}"
    kind, system = STEPS.get(stage.step), config.model.system
    if kind is None or not kind.fits(system):
        fit = ", ".join(name for name, one in STEPS.items() if one.fits(system))
        raise ConfigError(f"{where}.step: expected one of {fit}, found {stage.step!r}. Choose a step of {system}.")
    try:
        sets = tuple(choose(name, table, config.model.system) for name, table in stage.train.items())
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None
    plan = Plan(index, stage, kind, sets)
    _check_sets(config, plan, where)
    _check_mixture(plan, where)
    _check_start(plan, where)
    return plan


def _check_sets(config: Config, plan: Plan, where: str) -> None:
    kind, model = plan.kind, config.model
    for one in plan.sets:
        if one.part not in kind.trains:
            raise ConfigError(
                f"{where}.train.{one.name}: expected a set of the {' or '.join(kind.trains)}, as the step {plan.stage.step!r} "
                f"trains it, found one of the {one.part}. Take it away, or choose the step joint."
            )
        low = getattr(model, f"{one.part}_weights", "full")
        if one.mode == FULL and low != "full" and one.name != "connector":
            raise ConfigError(
                f'{where}.train.{one.name}: expected model.{one.part}_weights = "full", as all weights are trained, found '
                f"{low!r}. Train a LoRA beside low-bit weights."
            )
        if one.mode == LORA and one.table.dora and low != "full":
            raise ConfigError(
                f'{where}.train.{one.name}.dora: expected model.{one.part}_weights = "full", as DoRA needs the norms of the '
                f"weights, found {low!r}. Take dora away."
            )
    for part in kind.trains:
        loras = [one.name for one in plan.of(part) if one.mode == LORA]
        if len(loras) > 1:
            raise ConfigError(f"{where}.train: expected one LoRA per part, found {' and '.join(loras)}. Join their include.")
    if plan.stage.cached.states and (plan.of(MLLM) or NTP in kind.losses):
        raise ConfigError(
            f"{where}.cached.states: expected false, as this stage trains the MLLM or makes it speak and its states change, "
            "found true. Set it to false."
        )
    if model.swap_blocks and plan.dit and (model.dit_weights == "nf4" or not plan.stage.checkpointing):
        other = 'dit_weights "nf4"' if model.dit_weights == "nf4" else f"{where}.checkpointing = false"
        raise ConfigError(
            f"model.swap_blocks: expected checkpointing and full or fp8 weights, without which swapping saves nothing, found "
            f"{other}. Change it, or set swap_blocks to 0."
        )


def _check_mixture(plan: Plan, where: str) -> None:
    kinds = plan.stage.mixture.kinds
    unfit = [name for name in kinds if name not in plan.kind.kinds]
    if unfit:
        raise ConfigError(
            f"{where}.mixture.kinds: expected kinds of records that the step {plan.stage.step!r} can use "
            f"({', '.join(plan.kind.kinds)}), found {', '.join(unfit)}."
        )
    missing = [name for name in plan.stage.mixture.mandatory if name not in plan.kind.losses]
    if missing:
        raise ConfigError(
            f"{where}.mixture.mandatory: expected losses of the step {plan.stage.step!r} ({', '.join(plan.kind.losses)}), "
            f"found {', '.join(missing)}."
        )


def _check_start(plan: Plan, where: str) -> None:
    start = plan.stage.start
    if len(start) > 1 and {PREVIOUS, BASE} & set(start):
        raise ConfigError(f"{where}.start: expected folders only where there are several, found {', '.join(start)}.")
