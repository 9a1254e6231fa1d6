"""The engine: optimizer steps over a plan, with everything around them. It knows neither MLLMs nor DiTs.

An optimizer step is one window: the micro-steps that every rank gets from its PackSource for one cursor. What each loss is
divided by is counted over the whole window and all ranks before the first forward, so gradients of sums simply add up and
2 ranks x n micro-steps are 1 rank x 2n. Then, at the boundary: gradients are summed, clipped and stepped; the moving average,
the log, hooks, checkpoints and requests to stop follow. A run that goes on from a checkpoint does what the uninterrupted
one would have done, to the bit on CPU, whatever number of loader workers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..reasonedit_core.errors import ConfigError, ReasonEditError
from . import checkpoint, rng
from .checkpoint import Contents, Position
from .distributed import (
    ParallelSettings,
    Ranks,
    broadcast_weights,
    complete_gradients,
    find_again,
    name_weights,
    open_ranks,
    require_context_parallel,
    shard,
)
from .loader import cursors, load_ahead
from .log import RunLog, device_name
from .optim import Average, OptimSettings, build_optimizer, clip, rate, set_rate, to_masters
from .optimizer_state import check_savable
from .resume import DATA, WORLD, accept, same_as_json
from .signals import EXIT_STOPPED, Request, Requests, strongest
from .types import MicroStep, Models, PackSource, ParamGroup, Step
from .window import Window, count_over_ranks, figures, gather, shown

log = logging.getLogger(__name__)


class NonFinite(ReasonEditError, ArithmeticError):
    """A loss or a gradient is NaN or infinite. No weight was changed by it and nothing was saved."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """steps: optimizer steps of the whole run. weights: what each loss is multiplied by, by name; all that may occur.

    workers: loader processes. save_every: steps between checkpoints, 0: at the end only; keep, keep_every: see
    `checkpoint.save`. log_every: steps between progress lines. tensorboard, curves: see `RunLog`. budgets: tokens of a full
    pack by stream, for `fill`. identity: what must be the same when the run goes on, beside data and world size: values by
    dotted key; None: everything of these settings that changes numbers. resume: None (a fresh run), or what
    `checkpoint.find` takes. allow_changed: keys of the identity that may differ on resume; `a` allows `a.b` too.
    """

    steps: int
    weights: Mapping[str, float]
    seed: int = 0
    workers: int = 0
    optim: OptimSettings = OptimSettings()
    parallel: ParallelSettings = ParallelSettings()
    save_every: int = 500
    keep: int = 2
    keep_every: int = 0
    log_every: int = 10
    tensorboard: bool = True
    curves: bool = True
    deterministic: bool = False
    budgets: Mapping[str, int] = field(default_factory=dict)
    identity: Mapping[str, Any] | None = None
    resume: str | int | Path | None = None
    allow_changed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("workers", 0), ("save_every", 0), ("keep", 1), ("keep_every", 0), ("log_every", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"expected {name} >= {low}, found {getattr(self, name)}; correct it.")


@dataclass(frozen=True, slots=True)
class Moment:
    """What a hook sees: a boundary after `step` optimizer steps. averaged: a block in which the moving averages stand in for
    the weights (where there are any). Every rank calls the hook; under FSDP2 every rank must run the same forwards, and enter
    a unit otherwise than by calling it only within `distributed.gathered`."""

    step: int
    models: Models
    run_dir: Path
    ranks: Ranks
    averaged: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Hook:
    """Something done at boundaries: validation, sample edits. Its figures go to the log.

    every: steps between two calls, 0: none. at_start: before the first step of a fresh run. at_end: after the last step.
    Runs without gradients, with the units in eval mode and with isolated generators: training goes on as if it had not been.
    """

    name: str
    run: Callable[[Moment], Mapping[str, Any] | None]
    every: int = 0
    at_start: bool = False
    at_end: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """step: optimizer steps done. finished: whether these were all. cause: what asked the run to stop, if anything did (in the
    last step, a finished one too). checkpoint: the last one. exit_code: 0, or EXIT_STOPPED when the run was asked to stop."""

    step: int
    finished: bool
    cause: str | None
    checkpoint: Path | None
    exit_code: int


def train(
    models: Models,
    groups: Sequence[ParamGroup],
    source: PackSource,
    step: Step,
    settings: TrainSettings,
    run_dir: str | Path,
    hooks: Sequence[Hook] = (),
) -> Outcome:
    """Train the groups' weights in place. Every rank calls it, each with its own source.

    Under fsdp2 the units are cut in place and stay so: make models anew for a next stage (`checkpoint.apply_weights`).
    Raises ConfigError, CheckpointError (resume, save), NonFinite, PackingError, DataError (from the source),
    BackendUnavailable; what was saved before stays valid.
    """
    engine = _Engine(models, groups, source, step, settings, Path(run_dir), hooks)
    with rng.deterministic(settings.deterministic), engine.requests.listening():
        return engine.run()


class _Engine:
    def __init__(
        self,
        models: Models,
        groups: Sequence[ParamGroup],
        source: PackSource,
        step: Step,
        settings: TrainSettings,
        run_dir: Path,
        hooks: Sequence[Hook],
    ) -> None:
        from .losses import backward

        self.backward = backward
        self.models, self.source, self.step, self.settings = models, source, step, settings
        self.run_dir, self.hooks = run_dir.absolute(), tuple(hooks)
        self.ranks = open_ranks(settings.parallel)
        require_context_parallel(settings.parallel.context_parallel, self.ranks.device, step)
        self.groups = self._prepare(name_weights(models, groups))
        self.parameters = dict(one for group in self.groups for one in group.parameters)
        self.optimizer = build_optimizer(self.groups, settings.optim)
        self.average = Average(self.groups, settings.optim)
        self.requests = Requests(self.run_dir)
        self.identity = _identity(settings, self.groups, source, self.ranks)
        self.position = Position()
        self.saved: Path | None = None
        self.checked = False

    def _prepare(self, groups: list[ParamGroup]) -> list[ParamGroup]:
        """float32 masters, equal on all ranks, cut if that was asked for."""
        to_masters(groups, self.settings.optim)
        broadcast_weights([one for group in groups for _, one in group.parameters], self.ranks)
        if self.ranks.sharded:
            shard(self.models, self.settings.parallel, self.ranks)
            groups = find_again(self.models, groups)
        for unit in self.models.units().values():
            unit.train(any(one.requires_grad for one in unit.parameters()))
        return groups

    def run(self) -> Outcome:
        """Start or go on, do the steps that are left, and say how it ended."""
        self._start()
        begun, settings = self.position.step, self.settings
        self.log = RunLog(
            self.run_dir,
            write=self.ranks.main,
            steps=settings.steps,
            start=begun,
            line_every=settings.log_every,
            tensorboard=settings.tensorboard,
            curves=settings.curves,
        )
        try:
            machine = device_name(self.ranks.device)
            about = {"world": self.ranks.world, "steps": settings.steps, "device": machine}
            self.log.event("resume" if begun else "start", step=begun, **about)
            if not begun:
                self._call_hooks([hook for hook in self.hooks if hook.at_start])
            outcome = self._steps()
            self.log.event("end", step=outcome.step, finished=outcome.finished, cause=outcome.cause)
            return outcome
        except BaseException as error:
            self.log.event("error", step=self.position.step, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.log.close()

    def _start(self) -> None:
        """A fresh run in a folder without checkpoints, or one that goes on from a checkpoint."""
        rng.seed_rank(self.settings.seed, self.ranks.rank)
        if self.settings.resume is None:
            there = checkpoint.complete(self.run_dir / "checkpoints")
            if there:
                raise ConfigError(
                    f"expected a folder without a run, found {there[-1].name} in {self.run_dir}; resume that run, or choose "
                    "another folder."
                )
            self.ranks.wait()
            return
        self.saved = checkpoint.find(self.run_dir, self.settings.resume)
        self.position, extra = checkpoint.load(self.saved, self._contents(), self.ranks, self._accept)
        if self.ranks.scaler is not None and "scaler" in extra:
            self.ranks.scaler.load_state_dict(extra["scaler"])
        log.info("going on from %s: step %d of %d", self.saved, self.position.step, self.settings.steps)

    def _accept(self, state: Mapping[str, Any]) -> Position:
        return accept(state, self.identity, self.settings.allow_changed, self.source, self.ranks.world)

    def _steps(self) -> Outcome:
        settings = self.settings
        left = settings.steps - self.position.step
        order = list(cursors(self.source, self.position.epoch, self.position.cursor, left)) if left > 0 else []
        ahead = load_ahead(self.source, order, settings.workers)
        cause = None
        for _ in order:
            begun = time.perf_counter()
            (epoch, cursor), loaded = next(ahead)
            request = self._advance(epoch, cursor, loaded, begun, time.perf_counter() - begun)
            last = self.position.step == settings.steps
            if not (request and request.stop):
                self._call_hooks([hook for hook in self.hooks if self._due(hook, last)])
            every = settings.save_every
            if last or request or (every and self.position.step % every == 0):
                self._save()
            if request:
                self.requests.done()
                log.info("saved %s because of %s", self.saved, request.cause)
            cause = request.cause if request and request.stop else None
            if cause and not last:
                log.warning(
                    "stopped after step %d of %d because of %s; resume the run in %s to go on",
                    self.position.step, settings.steps, cause, self.run_dir,
                )  # fmt: skip
                return Outcome(self.position.step, False, cause, self.saved, EXIT_STOPPED)
        return Outcome(self.position.step, True, cause, self.saved, EXIT_STOPPED if cause else 0)

    def _advance(self, epoch: int, cursor: int, loaded: Any, begun: float, data_s: float) -> Request | None:
        """One optimizer step; returns what was asked for meanwhile, the same on all ranks."""
        settings = self.settings
        where = f"optimizer step {self.position.step + 1} (epoch {epoch}, cursor {cursor})"
        counts = count_over_ranks(loaded, list(settings.weights), self.ranks, where)
        rates = set_rate(self.optimizer, rate(settings.optim, self.position.step, settings.steps))
        self.optimizer.zero_grad(set_to_none=True)
        window = self._window(loaded, self._scale(counts), where)
        window.data_s, window.request = data_s, self.requests.look(files=self.ranks.main)
        windows: list[Window] = self.ranks.agree(window)
        bad = [line for one in windows for line in one.bad]
        if bad:
            raise NonFinite(self._non_finite(f"expected finite losses, found {'; '.join(bad[:4])}"))
        complete_gradients(list(self.parameters.values()), self.ranks)
        norms = self._apply(where, windows)
        self.average.update(self.position.step)
        self.position = Position(self.position.step + 1, *divmod(epoch * len(self.source) + cursor + 1, len(self.source)))
        line = {"step": self.position.step, "epoch": epoch, "cursor": cursor}
        line |= figures(windows, counts, settings.weights, settings.budgets, time.perf_counter() - begun)
        line |= {"grad_norm": norms, "lr": rates}
        if self.ranks.device.type == "cuda":
            line["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.log.step(line)
        return strongest([one.request for one in windows if one.request])

    def _scale(self, counts: Mapping[str, float]) -> dict[str, float]:
        """What each loss sum is multiplied by. A loss that nothing was counted for does not count."""
        loss_scale = 1.0
        scaler = self.ranks.scaler
        if scaler is not None:
            loss_scale = float(scaler.scale(torch.ones((), device=self.ranks.device)))
        return {name: self.settings.weights[name] * loss_scale / count if count else 0.0 for name, count in counts.items()}

    def _window(self, micros: Sequence[MicroStep], scale: Mapping[str, float], where: str) -> Window:
        """Forward and backward of every micro-step. Losses are looked at in the end only: a rank that stopped at one that is
        not finite would leave the others waiting, and reading each at once would make the device wait."""
        sums: list[dict[str, Tensor]] = []
        parts = []
        for micro in micros:
            with self.ranks.autocast():
                losses = self.step(self.models, micro)
            sums.append({name: value.detach() for name, value in losses.sums.items()})
            parts.append(losses.parts)
            self.backward(losses, scale)
            del losses
        values = [{name: float(value) for name, value in one.items()} for one in sums]
        return gather(micros, values, parts, f"{where}, rank {self.ranks.rank}")

    def _apply(self, where: str, windows: Sequence[Window]) -> dict[str, float]:
        """Clip and step; returns gradient norms by group."""
        scaler = self.ranks.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norms = clip(self.groups, self.settings.optim.clip)
        wrong = [f"{value} in {name}" for name, value in norms.items() if not math.isfinite(value)]
        if wrong and scaler is None:
            records = shown([record for window in windows for record in window.records])
            raise NonFinite(
                self._non_finite(f"expected finite gradients, found norms {', '.join(wrong)} at {where} of records {records}")
            )
        if scaler is None:
            self.optimizer.step()
        else:  # skips the step where float16 overflowed, and scales less from then on
            scaler.step(self.optimizer)
            scaler.update()
        if not self.checked:
            check_savable(self.optimizer, self.parameters)
            self.checked = True
        return norms

    def _due(self, hook: Hook, last: bool) -> bool:
        return bool((last and hook.at_end) or (hook.every and self.position.step % hook.every == 0))

    def _call_hooks(self, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            with rng.isolated(), _eval_mode(self.models), torch.no_grad():
                moment = Moment(self.position.step, self.models, self.run_dir, self.ranks, self._averaged)
                figures = hook.run(moment)
            self.ranks.wait()
            if figures:
                self.log.event("hook", name=hook.name, step=self.position.step, figures=figures)
                self.log.scalars(self.position.step, {hook.name: figures})

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.in_place() if self.average.weights else nullcontext()

    def _contents(self) -> Contents:
        scaler = self.ranks.scaler
        extra = {"scaler": scaler.state_dict()} if scaler is not None else {}
        given = tuple(self.settings.optim.options)
        return Contents(self.parameters, self.optimizer, self.average.weights, self.identity, extra, given)

    def _save(self) -> None:
        settings = self.settings
        self.saved = checkpoint.save(
            self.run_dir, self.position, self._contents(), self.ranks, keep=settings.keep, every=settings.keep_every
        )
        self.log.event("save", step=self.position.step, checkpoint=self.saved.name)

    def _non_finite(self, what: str) -> str:
        last = f"the last checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
        return (
            f"{what}. No weight was changed by it and nothing was saved; {last}. Look at these records (reasonedit-train "
            "check), then lower the learning rate or use a wider precision, and resume."
        )


def _identity(settings: TrainSettings, groups: Sequence[ParamGroup], source: PackSource, ranks: Ranks) -> dict[str, Any]:
    """What must be the same on resume: data and world always, and what the caller named, or all that changes numbers."""
    if settings.identity is None:
        own: dict[str, Any] = {f"loss.{name}": weight for name, weight in settings.weights.items()}
        own |= {f"optim.{name}": value for name, value in asdict(settings.optim).items()}
        own |= {f"group.{group.name}.lr": group.lr for group in groups}
        own |= {f"group.{group.name}.weight_decay": group.weight_decay for group in groups}
        own |= {"seed": settings.seed, "precision": settings.parallel.precision, "parallel": settings.parallel.parallel}
        if not settings.optim.schedule.startswith("constant"):  # else the length of the run changes nothing before its end
            own["steps"] = settings.steps
    else:
        own = dict(settings.identity)
    return same_as_json({**own, WORLD: ranks.world, DATA: source.fingerprint})


@contextmanager
def _eval_mode(models: Models) -> Iterator[None]:
    """Every module in eval mode inside the block, and then in the mode it was in."""
    before = [(module, module.training) for unit in models.units().values() for module in unit.modules()]
    for unit in models.units().values():
        unit.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
