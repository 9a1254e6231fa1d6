"""Think: alone, inside a loop, thinking again; and recorded replies that a graph asks for by their place."""

from __future__ import annotations

import json

import pytest
import torch

from reasonedit.reasonedit_core.dialogue.prompts import default_pack
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted, ReasonerError
from reasonedit.reasonedit_core.types import Decision, Edited, Reflection
from reasonedit.tests.graph_runner import install_host

install_host()

from reasonedit.nodes import models, sockets, think  # noqa: E402

IMAGE = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(1))
SOURCE = torch.zeros(1, 3, 16, 16)
RUN = {"seed": 1, "policy": "reasonedit", "on_text": None, "should_stop": None}


class Recording:
    """A speaker that remembers its queries."""

    def __init__(self, reply="Paint the sky red."):
        self.reply, self.queries = reply, []

    def answer(self, queries, *, on_text=None, should_stop=None):
        if should_stop is not None and should_stop():
            raise Interrupted("stopped")
        self.queries += queries
        if on_text:
            on_text(queries[0].task, self.reply)
        return [self.reply for _ in queries]


def handle(speaker) -> sockets.ReasonerHandle:
    return sockets.ReasonerHandle("test", default_pack("en"), speaker)


def history(*rethinks: str | None) -> sockets.History:
    verdict = sockets.Verdict(Reflection(Decision.FAILED, "wrong"), "the goal", "my words", "target", SOURCE)
    return tuple(sockets.HistoryRound("i", None, Edited(SOURCE, SOURCE, None), verdict, rethink) for rethink in rethinks)


def words(query) -> str:
    return " ".join(part for part in query.parts if isinstance(part, str))


def test_the_first_round_thinks_about_the_picture_it_is_given():
    speaker = Recording()
    thought = think.think_again(handle(speaker), IMAGE, "red sky please", (), **RUN)
    assert thought.original == "red sky please" and thought.instruction == "Paint the sky red."
    (query,) = speaker.queries
    assert "red sky please" in words(query) and torch.equal(query.images[0], sockets.to_picture(IMAGE))


def test_later_rounds_hand_the_instruction_through_without_asking():
    speaker = Recording()
    assert think.think_again(handle(speaker), IMAGE, "now the clouds", history(None), **RUN) is None
    assert think.think_again(None, IMAGE, "now the clouds", history(None), **RUN) is None, "no reasoner is needed for that"
    assert not speaker.queries


def test_thinking_again_is_about_the_source_and_the_users_words():
    speaker = Recording()
    thought = think.think_again(handle(speaker), IMAGE, "ignored", history(None, "the sky stayed blue"), **RUN)
    (query,) = speaker.queries
    assert thought.original == "my words"
    assert "my words" in words(query) and "the sky stayed blue" in words(query) and "ignored" not in words(query)
    assert torch.equal(query.images[0], SOURCE)


def test_text_is_streamed_and_cancelling_stops():
    heard = []
    think.think_again(handle(Recording()), IMAGE, "x", (), **{**RUN, "on_text": lambda *a: heard.append(a)})
    assert heard == [("think", "Paint the sky red.")]
    with pytest.raises(Interrupted):
        think.think_again(handle(Recording()), IMAGE, "x", (), **{**RUN, "should_stop": lambda: True})


def test_a_checkpoint_that_cannot_speak_says_what_to_do():
    with pytest.raises(ConfigError, match="no lm_head. Wire a Load Reasoner"):
        think.think_again(None, IMAGE, "x", (), **RUN)


def test_a_batch_is_refused():
    with pytest.raises(ConfigError, match="batch of 2"):
        think.think_again(handle(Recording()), IMAGE.expand(2, -1, -1, -1), "x", (), **RUN)


@pytest.mark.parametrize("text, refused", [("", True), (" \n", True), ("x", False), (None, False)])
def test_an_empty_instruction_is_refused_before_the_run(text, refused):
    answer = think.Think.validate_inputs(text)
    assert (isinstance(answer, str) and "Write it" in answer) if refused else answer is True


# ---- recorded replies ----------------------------------------------------------------------------------------------------


def test_recorded_replies_are_asked_for_by_their_place_in_the_history():
    script = models.read_script(json.dumps({"think": ["first", "second"], "describe": ["a", "b"]}))
    reasoner = handle(script)
    for _ in range(2):  # nothing is used up
        assert think.think_again(reasoner, IMAGE, "x", (), **RUN).instruction == "first"
        assert think.think_again(reasoner, IMAGE, "x", history("why"), **RUN).instruction == "second"
    assert reasoner.under("reasonedit", history(None, None)).describe(SOURCE, "g") == "a", "described once per thought"
    with pytest.raises(ReasonerError, match="another reply"):
        think.think_again(reasoner, IMAGE, "x", history("why", "why"), **RUN)


@pytest.mark.parametrize("text", ["{", "[]", '{"thunk": []}', '{"think": "one"}', '{"think": [1]}'])
def test_faults_in_recorded_replies_are_named_before_the_run(text):
    with pytest.raises(ConfigError, match="replies"):
        models.read_script(text)


def test_the_policy_chooses_the_form_of_the_questions():
    reasoner = handle(Recording())
    assert reasoner.under("released").paired and reasoner.under("released").released
    assert not reasoner.under("reasonedit").paired and not reasoner.under("reasonedit").released
