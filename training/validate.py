"""How good a model is on held-out records, measured so that two measurements compare.

FM loss at fixed sigmas, each on its own: the loss at 0.1 and at 0.9 are different tasks, whose mean says nothing. NTP loss over
answers. Verdicts: the reasoner is asked the question of a REFLECT document as inference asks it (the pack's words, greedy
decoding within the grammar of a verdict), with the score and the reason of the record in it, so that one wrong score does not
spoil a verdict; compared is the decision alone.

Packs come from the counter-based draws of a `PackSource` (the same noise every time); nothing here draws from a global
generator, and what torch might draw is undone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..reasonedit_core.dialogue.answers import say_description
from ..reasonedit_core.dialogue.replies import parse_verdict
from ..reasonedit_core.errors import ConfigError, MalformedReply, ReasonerError
from ..reasonedit_core.types import Decision
from . import rng
from .losses import flow_matching, next_token
from .steps import with_quotes
from .timesteps import validation_grid
from .types import MicroStep, Models, PackSource

if TYPE_CHECKING:
    from ..reasonedit_core.interfaces import Query, Speaker
    from .data.documents import Documents
    from .data.records import Record

log = logging.getLogger(__name__)

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor (float64, on the CPU) over all ranks."""

DECISIONS = {"success": Decision.SUCCESS, "reflection": Decision.REFINE, "failed": Decision.FAILED}


@dataclass(frozen=True, slots=True)
class FlowLosses:
    """rows: (sigma, FM loss at it). targets: target tokens that each is a mean over (weighted as the packs are)."""

    rows: tuple[tuple[float, float], ...]
    targets: float

    def figures(self) -> dict[str, float]:
        """For the log: one figure per sigma."""
        return {f"fm at {sigma:g}": loss for sigma, loss in self.rows}

    def __str__(self) -> str:
        head = f"{'sigma':>7}{'FM loss':>12}   over {self.targets:g} target tokens"
        return "\n".join([head, *(f"{sigma:>7.3g}{loss:>12.6f}" for sigma, loss in self.rows)])


@dataclass(frozen=True, slots=True)
class NtpLoss:
    """loss: cross entropy per answer token (weighted as the packs are). answers: what it is a mean over."""

    loss: float
    answers: float

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {"ntp": self.loss}

    def __str__(self) -> str:
        return f"NTP loss {self.loss:.6f} over {self.answers:g} answer tokens"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """counts: {(decision of the record, decision of the model or `unread`): records}."""

    counts: Mapping[tuple[str, str], int]

    @property
    def total(self) -> int:
        """Records that were asked about."""
        return sum(self.counts.values())

    @property
    def accuracy(self) -> float:
        """Share of records with the right decision."""
        right = sum(count for (wanted, found), count in self.counts.items() if wanted == found)
        return right / self.total

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {"verdict accuracy": self.accuracy}

    def __str__(self) -> str:
        names = [*DECISIONS, *(["unread"] if any(found == "unread" for _, found in self.counts) else [])]
        head = f"verdicts: {self.accuracy:.1%} of {self.total} right\n{'record':>12}" + "".join(f"{name:>12}" for name in names)
        rows = [
            f"{wanted:>12}" + "".join(f"{self.counts.get((wanted, name), 0):>12}" for name in names) for wanted in DECISIONS
        ]
        return "\n".join([head, *rows])


# ---- losses --------------------------------------------------------------------------------------------------------------


def flow_losses(
    models: Models,
    source: PackSource | Iterable[MicroStep],
    sigmas: Sequence[float] | None = None,
    *,
    reduce: Reduce | None = None,
) -> FlowLosses:
    """FM loss at each of `sigmas` (None: the fixed grid) over all picture packs, their documents all at that sigma.

    source: epoch 0 of a plan over held-out records, or micro-steps; states come with the packs or from the MLLM, once per
    pack. reduce: over ranks, which under FSDP2 must have equally many packs.
    """
    sigmas = tuple(validation_grid() if sigmas is None else sigmas)
    if not sigmas or not all(0 < sigma <= 1 for sigma in sigmas):
        raise ConfigError(f"validation.sigmas: expected numbers above 0 and at most 1, found {list(sigmas)}. Correct them.")
    sums = torch.zeros(len(sigmas) + 1, dtype=torch.float64)
    with _measuring(models):
        for micro in _micro_steps(source):
            if micro.image is None:
                continue
            dit = _unit(models.dit, "DiT")
            image, states = micro.image, None
            if image.states is None:
                states, _ = _unit(models.mllm, "MLLM")(micro.text)
                image = with_quotes(models, image, micro.text)
            for index, sigma in enumerate(sigmas):
                pack = dataclasses.replace(image, sigma=torch.full_like(image.sigma, sigma))
                sums[index] += float(flow_matching(dit(pack, states), pack))
            sums[-1] += float(micro.image.loss_weight.double().sum())
    sums = reduce(sums) if reduce else sums
    if not sums[-1]:
        raise ConfigError("validation: expected held-out records with a target picture, found none. Add some, or leave it out.")
    return FlowLosses(tuple(zip(sigmas, (sums[:-1] / sums[-1]).tolist(), strict=True)), float(sums[-1]))


def ntp_loss(models: Models, source: PackSource | Iterable[MicroStep], *, reduce: Reduce | None = None) -> NtpLoss:
    """NTP loss over all answers of the text packs. source, reduce: see `flow_losses`."""
    sums = torch.zeros(2, dtype=torch.float64)
    with _measuring(models):
        for micro in _micro_steps(source):
            if micro.text is None or not micro.text.n_answers:
                continue
            _, ce = _unit(models.mllm, "MLLM")(micro.text)
            sums += torch.tensor([float(next_token(ce, micro.text)), float(micro.text.weights.double().sum())])
    sums = reduce(sums) if reduce else sums
    if not sums[1]:
        raise ConfigError("validation: expected held-out records with answers, found none. Add some, or leave it out.")
    return NtpLoss(float(sums[0] / sums[1]), float(sums[1]))


def _micro_steps(source: PackSource | Iterable[MicroStep]) -> Iterator[MicroStep]:
    if hasattr(source, "load"):
        for cursor in range(len(source)):
            yield from source.load(0, cursor)
    else:
        yield from source


def _unit(unit: nn.Module | None, name: str) -> nn.Module:
    if unit is None:
        raise ConfigError(f"validation: expected the {name} of the stage, found none loaded. Leave this measurement out.")
    return unit


@contextmanager
def _measuring(models: Models) -> Iterator[None]:
    """No gradients, eval mode, and the global generators as they were."""
    with ExitStack() as stack:
        stack.enter_context(rng.isolated())
        stack.enter_context(torch.no_grad())
        for unit in models.units().values():
            stack.enter_context(evaluating(unit))
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; each of its modules is put back into the mode that it was in."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


# ---- verdicts ------------------------------------------------------------------------------------------------------------


def verdict_accuracy(documents: Documents, speaker: Speaker, records: Iterable[Record], *, batch: int = 4) -> Verdicts:
    """Ask `speaker` for the verdict on the generated picture of every reflect record, and compare the decisions.

    documents: asks as inference does. speaker: `QwenSpeaker` around the trained MLLM, whose kept features and prefixes are
    forgotten before and after, as its weights have changed. A reply that cannot be read is `unread`, and wrong.
    """
    asked = [record for record in records if record.kind == "reflect" and record.reflect is not None]
    if not asked:
        raise ConfigError("validation: expected held-out records of the kind reflect, found none. Add some, or leave it out.")
    counts: Counter[tuple[str, str]] = Counter()
    with rng.isolated(), torch.no_grad(), _fresh(speaker):
        for start in range(0, len(asked), batch):
            some = asked[start : start + batch]
            replies = _answers(speaker, [verdict_query(documents, record) for record in some])
            for record, reply in zip(some, replies, strict=True):
                counts[record.reflect.verdict, _decision(reply)] += 1
    return Verdicts(dict(counts))


def verdict_query(documents: Documents, record: Record) -> Query:
    """The question for the verdict as the reasoner asks it, with the record's score in it; answered greedily."""
    from .data.documents import reflect_replies

    reasoner, speaker = documents.voice.reasoner({task: [reply] for task, reply in reflect_replies(record).items()})
    pictures = [documents.open(record, name) for name in ("input", "generated")]
    original = record.instruction.raw if record.instruction else None
    description = say_description(record.reflect.target_description)  # in one paragraph, as in the training documents
    reasoner.reflect(*pictures, record.editor_instruction, description, original=original)
    query = next(query for query in speaker.asked if query.form == "verdict")
    return dataclasses.replace(query, temperature=0.0, top_p=1.0, seed=0)


def _answers(speaker: Speaker, queries: list[Query]) -> list[str]:
    """One reply per question; where a batch fails each question alone, and "" for the one that fails."""
    try:
        return speaker.answer(queries)
    except ReasonerError as error:
        if len(queries) == 1:
            log.warning("no verdict: %s", error)
            return [""]
        return [_answers(speaker, [query])[0] for query in queries]


def _decision(reply: str) -> str:
    try:
        found = parse_verdict(reply).decision
    except MalformedReply:
        return "unread"
    return next(name for name, decision in DECISIONS.items() if decision is found)


@contextmanager
def _fresh(speaker: Any) -> Iterator[None]:
    """The speaker's MLLM in eval mode, and without anything that it computed with other weights."""
    mllm = getattr(speaker, "mllm", None)
    if mllm is None:
        yield
        return
    with fresh(mllm):
        yield


@contextmanager
def fresh(mllm: Any) -> Iterator[None]:
    """A `QwenVL` in eval mode that forgets what it keeps before and after: training changes its weights."""
    mllm.release()
    try:
        with evaluating(mllm.model):
            yield
    finally:
        mllm.release()
