"""The reasoner: thinks, describes and reflects by asking a speaker the questions of a dialogue pack.

Scores that do not depend on each other are asked for in one call. A reply that cannot be read is asked for again, a bounded
number of times, with another seed and with sampling on; then MalformedReply is raised. No verdict or score is made up.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..dialogue.pack import TASKS, Pack, fill, language_of
from ..dialogue.prompts import render
from ..dialogue.replies import parse_consistency, parse_description, parse_pair, parse_thought, parse_verdict
from ..errors import ConfigError, MalformedReply
from ..interfaces import Pair, Query, Speaker
from ..types import OnText, Reflection, Scores, ShouldStop, Thought

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# How a question is repeated that was answered greedily the first time: the same greedy answer would come again.
_RETRY_TEMPERATURE, _RETRY_TOP_P = 0.7, 0.9

_PARSERS: dict[str, Callable[..., Any]] = {
    "think": parse_thought,
    "describe": parse_description,
    "score": parse_consistency,
    "reflect": parse_verdict,
    "edit_score": parse_pair,
    "quality_score": parse_pair,
}


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any
    raw: str


class PackReasoner:
    """A `Reasoner` made of a dialogue pack and a speaker.

    paired: show the source beside the result where the pack has such a prompt (the released form); else the result alone.
    A pack with only one of the two forms is used as it is, which is logged. released: read replies by the released gates.
    attempts: how often one question is asked at most. Seeds follow from `seed`, the task and the question's words, so the
    same question gets the same seed whatever was asked before.
    """

    def __init__(
        self,
        pack: Pack,
        speaker: Speaker,
        *,
        paired: bool = False,
        released: bool = False,
        attempts: int = 3,
        seed: int = 0,
        on_text: OnText | None = None,
        should_stop: ShouldStop | None = None,
    ) -> None:
        if attempts < 1:
            raise ConfigError(f"expected at least 1 attempt per question, found {attempts}.")
        self.pack, self.speaker = pack, speaker
        self.paired, self.released, self.attempts = paired, released, attempts
        self.seed, self.on_text, self.should_stop = seed, on_text, should_stop
        self._forms = {task: _form(pack, task, paired) for task in ("reflect", "edit_score")}

    def bound(self, *, seed: int = 0, on_text: OnText | None = None, should_stop: ShouldStop | None = None) -> PackReasoner:
        """The same reasoner for one run."""
        bound = copy.copy(self)
        bound.seed, bound.on_text, bound.should_stop = seed, on_text, should_stop
        return bound

    def think(self, image: torch.Tensor, instruction: str, *, feedback: str | None = None) -> Thought:
        """Rewrite the user's words into an instruction that says what shall be seen."""
        values = {"instruction": instruction, "feedback": feedback}
        (answer,) = self._ask([self._question("think", {"source": image}, values)])
        return Thought(instruction, answer.value.instruction, answer.value.steps, answer.raw)

    def describe(self, image: torch.Tensor, goal: str, *, original: str | None = None) -> str:
        """The target description."""
        values = {"instruction": goal, "original": _other(original, goal)}
        (answer,) = self._ask([self._question("describe", {"source": image}, values)])
        return answer.value

    def reflect(
        self,
        source: torch.Tensor,
        edited: torch.Tensor,
        goal: str,
        target: str,
        *,
        original: str | None = None,
        scores: bool = True,
    ) -> Reflection:
        """Score the edited picture, then decide in the light of its consistency score.

        scores: ask for the edit's and the picture's quality as well, where the pack has these questions. They are asked with
        the same words and seeds as `grade` asks them later. A speaker whose replies are `in_order` is always asked.
        """
        scores = scores or getattr(self.speaker, "in_order", False)
        images = {"source": source, "result": edited}
        values = {"instruction": goal, "original": _other(original, goal), "target": target}
        graders = self._graders()
        asked = graders if scores else []
        consistency, *more = self._ask([self._question(task, images, values) for task in ("score", *asked)])
        given = {TASKS[task].name: answer.value for task, answer in zip(asked, more, strict=True)}
        score, reason = consistency.value.score, consistency.value.reason
        values = {**values, "score": score, "reason": reason}
        (verdict,) = self._ask([self._question(self._forms["reflect"], images, values)])
        pairs = (given.get("edit_score"), given.get("quality_score"))
        decision, why, second = verdict.value
        return Reflection(decision, why, second, Scores(*pairs, score, reason, scores or not graders), verdict.raw)

    def grade(
        self, source: torch.Tensor, pictures: Sequence[tuple[torch.Tensor, str, str]], *, original: str | None = None
    ) -> list[tuple[Pair, Pair]]:
        """See `Reasoner`."""
        graders = self._graders()
        questions = []
        for edited, goal, target in pictures:
            values = {"instruction": goal, "original": _other(original, goal), "target": target}
            images = {"source": source, "result": edited}
            questions += [self._question(task, images, values) for task in graders]
        answers = iter(self._ask(questions) if questions else [])
        found = [{TASKS[task].name: next(answers).value for task in graders} for _ in pictures]
        return [(given.get("edit_score"), given.get("quality_score")) for given in found]

    def _graders(self) -> list[str]:
        """The pack's questions for the edit and for the picture's quality, those it has."""
        return [task for task in (self._forms["edit_score"], "quality_score") if task in self.pack.tasks]

    def _question(self, task: str, images: dict[str, torch.Tensor], values: dict[str, Any]) -> tuple[Query, str]:
        """The query, and the language it is asked in."""
        language = language_of(values["instruction"])
        query = render(self.pack, task, language, images, values)
        return replace(query, seed=_seed(self.seed, query)), language

    def _ask(self, questions: Sequence[tuple[Query, str]]) -> list[_Answer]:
        """Ask independent questions together; ask those again whose replies cannot be read."""
        answers: dict[int, _Answer] = {}
        errors: dict[int, MalformedReply] = {}
        for attempt in range(self.attempts):
            open_ones = [index for index in range(len(questions)) if index not in answers]
            queries = [self._again(*questions[index], attempt, errors.get(index)) for index in open_ones]
            replies = self.speaker.answer(queries, on_text=self.on_text, should_stop=self.should_stop)
            for index, query, raw in zip(open_ones, queries, replies, strict=True):
                try:
                    answers[index] = _Answer(_PARSERS[query.task](raw, released=self.released), raw)
                except MalformedReply as error:
                    errors[index] = error
                    log.warning("%s: reply %d of %d cannot be read: %s", query.task, attempt + 1, self.attempts, error)
            if len(answers) == len(questions):
                return [answers[index] for index in range(len(questions))]
        index = min(set(range(len(questions))) - answers.keys())
        task = questions[index][0].task
        raise MalformedReply(
            f"{task}: no readable reply in {self.attempts} attempts. The last: {errors[index]} Use the MLLM that belongs to "
            "the weights or a stronger one, or a dialogue pack written for it.",
            errors[index].raw,
        ) from errors[index]

    def _again(self, query: Query, language: str, attempt: int, error: MalformedReply | None) -> Query:
        """The query of one attempt: the first as it is, later ones with another seed, sampled, and corrected if wanted."""
        if error is None:
            return query
        parts = query.parts
        correction = self.pack.in_language(language).correction
        if getattr(self.speaker, "takes_correction", False) and correction:
            parts = (*parts, fill(correction, {"error": str(error)}))
        sampled = query.temperature > 0
        return replace(
            query,
            parts=parts,
            seed=query.seed + attempt,
            temperature=query.temperature if sampled else _RETRY_TEMPERATURE,
            top_p=query.top_p if sampled else _RETRY_TOP_P,
        )


def _form(pack: Pack, task: str, paired: bool) -> str:
    """Which of a task's two forms the pack can speak, the wanted one if possible."""
    wanted, other = (f"{task}_paired", task) if paired else (task, f"{task}_paired")
    if wanted in pack.tasks or other not in pack.tasks:
        return wanted
    shown = " and ".join(TASKS[other].images)
    log.info("dialogue pack %r has no %s: %s is used, which shows %s", pack.name, wanted, other, shown)
    return other


def _other(original: str | None, goal: str) -> str | None:
    """The user's own words where they say something else than the goal."""
    return original if original and original.strip() != goal.strip() else None


def _seed(seed: int, query: Query) -> int:
    words = "\0".join([str(seed), query.task, query.system, *map(str, query.parts)])
    # 30 bits: a few attempts may be added and every backend's seed still holds it.
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 2
