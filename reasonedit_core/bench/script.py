"""The scripted verdicts of a benchmark's loop, and a speaker that lets the MLLM answer before its words are replaced.

The answers are really computed, then dropped: random weights talk nonsense, and a loop that listened to them would take
another course on every machine. How many steps an answer takes still follows from the weights, so it is cut to a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..dialogue.answers import say_consistency, say_description, say_pair, say_thought, say_verdict
from ..dialogue.replies import parse_consistency, parse_description, parse_pair, parse_thought, parse_verdict
from ..errors import MalformedReply
from ..mllm.qwen25vl import QwenVL, language_model
from ..reasoners.scripted import ScriptedSpeaker
from ..types import Decision, EditTrace

if TYPE_CHECKING:
    from ..interfaces import Query, Speaker
    from ..types import OnText, ShouldStop

REPLY_TOKENS = 24
"""Budget of an answer that is dropped; the smallest that every form fits into, with some free text."""

_READERS: dict[str, Callable[[str], Any]] = {
    "think": parse_thought,
    "describe": parse_description,
    "score": parse_consistency,
    "reflect": parse_verdict,
    "edit_score": parse_pair,
    "quality_score": parse_pair,
}


def three_rounds() -> dict[str, list[str]]:
    """Replies of a run with thinking and three rounds: refine, refine, success; each round better than the one before."""
    verdicts = [
        say_verdict(Decision.REFINE, "The red is too light.", "make the red of the cube darker"),
        say_verdict(Decision.REFINE, "The edges are gone.", "give the cube its edges back"),
        say_verdict(Decision.SUCCESS, "All that was asked for is there."),
    ]
    return {
        "think": [say_thought("Colour the cube on the table red.")],
        "describe": [say_description("A red cube stands on a table.")],
        "score": [say_consistency(mark, "so it looks") for mark in (4.0, 5.0, 8.0)],
        "reflect": verdicts,
        "edit_score": [say_pair((mark, mark), "so it looks") for mark in (5.0, 6.0, 8.0)],
        "quality_score": [say_pair((mark, mark), "so it looks") for mark in (5.0, 6.0, 8.0)],
    }


def one_round(runs: int) -> dict[str, list[str]]:
    """Replies of `runs` single reflections."""
    return {task: [texts[-1]] * runs for task, texts in three_rounds().items()}


@dataclass(slots=True)
class Heard:
    """What the MLLM did. vision_passes: pictures that entered the vision tower. queries: rows it was asked. chain: dependent
    calls since the last verdict; chains: of the rounds. prefill_tokens: read for answers; condition_tokens: read to
    condition the denoiser. decode_steps: forward passes that came after an answer's first token. unreadable: answers, as the
    MLLM gave them, that would have to be asked for again."""

    vision_passes: int = 0
    queries: int = 0
    chain: int = 0
    chains: list[int] = field(default_factory=list)
    prefill_tokens: int = 0
    condition_tokens: int = 0
    decode_steps: int = 0
    unreadable: int = 0


class Listening:
    """A speaker that asks `speaker`, counts what that costs, and answers from `script`. Call `close` when done."""

    def __init__(self, mllm: QwenVL, speaker: Speaker, script: ScriptedSpeaker, *, tokens: int = REPLY_TOKENS) -> None:
        self.speaker, self.script, self.tokens, self.heard = speaker, script, tokens, Heard()
        self._asking = self._speaking = False
        tower, text = mllm.model.model.visual, language_model(mllm.model)
        self._hooks = [
            tower.register_forward_pre_hook(self._see, with_kwargs=True),
            text.register_forward_pre_hook(self._read, with_kwargs=True),
        ]

    def answer(
        self, queries: Sequence[Query], *, on_text: OnText | None = None, should_stop: ShouldStop | None = None
    ) -> list[str]:
        """The scripted replies, after the MLLM's own."""

        def told(task: str, text: str) -> None:
            self._speaking = True
            if on_text is not None:
                on_text(task, text)

        self.heard.queries += len(queries)
        self.heard.chain += queries[0].task != "think"  # thinking comes before the rounds
        self._asking, self._speaking = True, False
        short = [replace(query, max_new_tokens=min(query.max_new_tokens, self.tokens)) for query in queries]
        try:
            said = self.speaker.answer(short, on_text=told, should_stop=should_stop)
        finally:
            self._asking = False
        self.heard.unreadable += sum(not _readable(query.task, text) for query, text in zip(queries, said, strict=True))
        return self.script.answer(queries)

    def note(self, trace: EditTrace) -> None:
        """To be called after every edit and every reflection (`on_round` of the loop): a verdict ends a chain."""
        # Told once more when scores of rounds came in later: these calls count to the round that follows.
        if sum(done.reflection is not None for done in trace.rounds) > len(self.heard.chains):
            self.heard.chains.append(self.heard.chain)
            self.heard.chain = 0

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.heard.vision_passes += len(kwargs["grid_thw"])

    def _read(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        batch, length = kwargs["inputs_embeds"].shape[:2]
        if not self._asking:
            self.heard.condition_tokens += batch * length
        elif self._speaking:
            self.heard.decode_steps += 1
        else:
            self.heard.prefill_tokens += batch * length


def _readable(task: str, text: str) -> bool:
    try:
        # Random weights write bytes that are no characters where a trained model writes words. Asked here is the form alone.
        _READERS[task](text.replace("\ufffd", "x"))
    except MalformedReply:
        return False
    return True
