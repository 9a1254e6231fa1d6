"""Reflect: what is asked, what a run keeps, and what its verdict says in words."""

from __future__ import annotations

import json

import pytest
import torch

from reasonedit.reasonedit_core.dialogue.prompts import default_pack
from reasonedit.reasonedit_core.errors import ConfigError, MalformedReply
from reasonedit.reasonedit_core.types import Decision, Edited, Reflection, Scores
from reasonedit.tests.graph_runner import install_host

install_host()

from reasonedit.nodes import reflect, sockets  # noqa: E402

SOURCE, RESULT = torch.zeros(1, 16, 16, 3), torch.ones(1, 16, 16, 3)
SCORE = {
    "meets_instruction": "yes",
    "major_conflicts": 0,
    "minor_conflicts": 0,
    "omissions": 0,
    "raw_score": 8,
    "reason": "fits",
}
PAIR = json.dumps({"score": [7, 8], "reasoning": "fine"})
REPLIES = {
    "describe": "a white picture",
    "score": json.dumps(SCORE),
    "edit_score": PAIR,
    "quality_score": PAIR,
    "reflect": "<#Think>Good.<#Success>",
}


class Speaker:
    """Answers every task, and remembers what was asked."""

    def __init__(self, **replies):
        self.replies, self.asked = {**REPLIES, **replies}, []

    def answer(self, queries, *, on_text=None, should_stop=None):
        self.asked += queries
        return [self.replies[query.task] for query in queries]

    def tasks(self):
        return [query.task for query in self.asked]

    def words(self, task):
        (query,) = [query for query in self.asked if query.task == task]
        return " ".join(part for part in query.parts if isinstance(part, str))


def judge(speaker, **values):
    handle = sockets.ReasonerHandle("test", default_pack("en"), speaker)
    return reflect.judge(handle, SOURCE, RESULT, values.pop("goal", "make it white"), **values)


def earlier(rethink=None) -> sockets.History:
    still = torch.zeros(1, 3, 16, 16)
    verdict = sockets.Verdict(Reflection(Decision.REFINE, "r", "s"), "the goal", "my words", "the target", still)
    return (sockets.HistoryRound("i", None, Edited(still, still, None), verdict, rethink),)


def test_any_two_pictures_can_be_judged():
    speaker = Speaker()
    verdict = judge(speaker)
    assert speaker.tasks() == ["describe", "score", "edit_score", "quality_score", "reflect"]
    assert verdict.reflection.decision is Decision.SUCCESS and verdict.reflection.scores.consistency == 8
    assert (verdict.goal, verdict.original, verdict.target) == ("make it white", "make it white", "a white picture")
    assert torch.equal(verdict.source, sockets.to_picture(SOURCE)) and verdict.seconds > 0


def test_a_given_target_is_not_described_again():
    speaker = Speaker()
    assert judge(speaker, target="snow everywhere").target == "snow everywhere"
    assert "describe" not in speaker.tasks() and "snow everywhere" in speaker.words("score")


def test_the_users_own_words_stand_beside_the_goal():
    speaker = Speaker()
    assert judge(speaker, original="winter!").original == "winter!"
    assert "winter!" in speaker.words("reflect") and "make it white" in speaker.words("reflect")


def test_a_run_keeps_goal_words_and_target():
    speaker = Speaker()
    verdict = judge(speaker, goal="the second instruction", history=earlier())
    assert (verdict.goal, verdict.original, verdict.target) == ("the goal", "my words", "the target")
    assert "describe" not in speaker.tasks() and "the second instruction" not in speaker.words("reflect")


def test_a_new_thought_is_a_new_goal_with_its_own_target():
    verdict = judge(Speaker(), goal="a new goal", history=earlier("it failed"))
    assert (verdict.goal, verdict.original, verdict.target) == ("a new goal", "my words", "a white picture")


def test_released_shows_both_pictures_and_ours_the_result_alone():
    own, released = Speaker(), Speaker()
    judge(own)
    judge(released, policy="released")
    assert [len(q.images) for q in own.asked if q.task == "reflect"] == [1]
    assert [len(q.images) for q in released.asked if q.task == "reflect"] == [2]


def test_an_unreadable_reply_ends_a_run_with_its_rounds_and_a_single_question_with_an_error():
    with pytest.raises(MalformedReply, match="no readable reply"):
        judge(Speaker(reflect="no tag"))
    verdict = judge(Speaker(reflect="no tag"), history=())
    assert verdict.reflection is None and verdict.target == "a white picture"
    assert "no readable reply" in reflect.words(verdict.reflection, False, verdict.problem)


def test_batches_and_missing_reasoners_are_refused_by_name():
    handle = sockets.ReasonerHandle("test", default_pack("en"), Speaker())
    with pytest.raises(ConfigError, match="edited: expected one picture, found a batch of 2"):
        reflect.judge(handle, SOURCE, RESULT.expand(2, -1, -1, -1), "g")
    with pytest.raises(ConfigError, match="Load Reasoner"):
        reflect.judge(None, SOURCE, RESULT, "g")


def test_a_verdict_in_words():
    scores = Scores((7.0, 8.0), (5.5, 6.0), 0.0)
    text = reflect.words(Reflection(Decision.REFINE, "too dark", "brighten it", scores), False)
    assert text == "refine\nedit 7 and 8, quality 5.5 and 6, consistency 0\ntoo dark\nNext: brighten it"
    doubted = reflect.words(Reflection(Decision.SUCCESS, "", None, Scores(consistency=1.0)), False)
    assert doubted == "success (not believed)\nconsistency 1"
    assert reflect.words(Reflection(Decision.SUCCESS, ""), True) == "success"
