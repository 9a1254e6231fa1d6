"""Scores asked for only where rounds are compared: the run is the one that asks for all, in fewer questions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.dialogue.answers import say_consistency, say_description, say_pair, say_thought, say_verdict
from reasonedit.reasonedit_core.dialogue.pack import fitted
from reasonedit.reasonedit_core.dialogue.prompts import load_pack
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.loop import POLICIES, best_round, think_edit_reflect, wanted_scores
from reasonedit.reasonedit_core.reasoners.reasoner import PackReasoner
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker
from reasonedit.reasonedit_core.report import trace_record
from reasonedit.reasonedit_core.run import round_line
from reasonedit.reasonedit_core.sheet import _score_cells
from reasonedit.reasonedit_core.types import Counts, Decision, Edited, EditRequest, Scores

LAZY, RELEASED = POLICIES["reasonedit"], POLICIES["released"]
EAGER = replace(LAZY, lazy_scores=False)
PAIRS = ("edit_score", "quality_score")


class Painter:
    """Every edit is another flat picture, told by its instruction, its input and its seed; none is like another."""

    def __init__(self):
        self.calls = []

    def edit(self, request, picture, instruction, rng, *, latents=None, **more):
        self.calls.append((float(picture.mean()), instruction))
        image = torch.rand((1, 3, 4, 4), generator=rng)
        return Edited(image, image, torch.full((1, 1, 64), float(len(self.calls))))


class ByPicture:
    """A speaker whose scores belong to a picture, however often and whenever it is asked about it."""

    def __init__(self, rounds, thoughts):
        self.rounds, self.thoughts, self.asked, self.calls = rounds, list(thoughts), [], []
        self._seen = []

    def answer(self, queries: list[Query], *, on_text=None, should_stop=None):
        self.calls.append([query.task for query in queries])
        self.asked += queries
        return [self._reply(query) for query in queries]

    def _round(self, image):
        key = float(image.sum())
        if key not in self._seen:
            self._seen.append(key)
        return self.rounds[self._seen.index(key)]

    def _reply(self, query):
        if query.task == "think":
            return say_thought(self.thoughts.pop(0))
        if query.task == "describe":
            return say_description("What it is to look like.")
        decision, edit, quality, consistency, second = self._round(query.images[-1])
        if query.task == "score":
            return say_consistency(consistency, "so it looks")
        if query.task == "reflect":
            return say_verdict(Decision(decision), "why", second if decision == "refine" else None)
        return say_pair(edit if query.task == "edit_score" else quality, "so it looks")

    def count(self, *tasks):
        return sum(query.task in tasks for query in self.asked)


def run(rounds, policy, max_rounds=4):
    speaker = ByPicture(rounds, ["goal", "another goal", "a third"])
    generator, told = Painter(), []
    request = EditRequest(torch.zeros(1, 3, 4, 4), "user words", max_rounds=max_rounds, seed=3)
    reasoner = PackReasoner(load_pack("en"), speaker, paired=policy.released)
    trace = think_edit_reflect(request, reasoner=reasoner, generator=generator, policy=policy, on_round=told.append)
    return trace, speaker, generator, told


MARK = st.sampled_from([0.0, 2.0, 5.0, 5.5, 8.0, 10.0])
ROUND = st.tuples(
    st.sampled_from(["success", "refine", "refine", "failed"]),
    st.tuples(MARK, MARK),
    st.tuples(MARK, MARK),
    st.sampled_from([0.0, 2.0, 4.0, 7.0, 9.5]),
    st.sampled_from(["more", "less", "other"]),
)


@settings(max_examples=250, derandomize=True, deadline=None)
@given(
    st.lists(ROUND, min_size=5, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["rethink", "restart", "stop"]),
    st.sampled_from(["chain", "merge"]),
    st.sampled_from([-1.0, 3.0, 8.0]),
)
def test_lazy_scores_change_no_decision_and_no_picture(rounds, limit, on_failed, revise, doubt):
    options = {"on_failed": on_failed, "revise": revise, "doubt": doubt}
    eager, asked, edits, _ = run(rounds, replace(EAGER, **options), limit)
    lazy, fewer, same, told = run(rounds, replace(LAZY, **options), limit)
    assert (lazy.stop_reason, lazy.best, lazy.goal) == (eager.stop_reason, eager.best, eager.goal)
    assert same.calls == edits.calls
    for ours, theirs in zip(lazy.rounds, eager.rounds, strict=True):
        assert torch.equal(ours.image, theirs.image) and ours.input_index == theirs.input_index
        assert (ours.instruction, ours.reflection.decision) == (theirs.instruction, theirs.reflection.decision)
        known, full = ours.reflection.scores, theirs.reflection.scores
        assert full.asked and (known.consistency, known.consistency_reason) == (full.consistency, full.consistency_reason)
        assert (known.edit, known.quality) == ((full.edit, full.quality) if known.asked else (None, None))
    assert torch.equal(lazy.image, eager.image)
    assert asked.count(*PAIRS) == 2 * len(eager.rounds), "all at once asks every round"
    graded = sum(made.reflection.scores.asked for made in lazy.rounds)
    assert fewer.count(*PAIRS) == 2 * graded <= asked.count(*PAIRS), "no score is asked for twice"
    assert fewer.count("score", "reflect", "describe", "think") == asked.count("score", "reflect", "describe", "think")
    words = [(query.task, query.parts, query.seed) for query in asked.asked]
    assert all((query.task, query.parts, query.seed) in words for query in fewer.asked), "the same questions, later"
    assert told[-1].rounds == lazy.rounds, "the last that is told holds the scores"


def test_a_round_accepted_at_once_is_not_scored():
    trace, speaker, _, _ = run([("success", (9.0, 9.0), (9.0, 9.0), 9.0, "")], LAZY)
    assert speaker.calls == [["think"], ["describe"], ["score"], ["reflect"]]
    record = json.loads(json.dumps(trace_record(trace, Counts())))
    scores = record["rounds"][0]["scores"]
    assert (scores["edit"], scores["quality"], scores["consistency"]) == (None, None, 9.0)
    assert record["best"] == 0 and record["stop_reason"] == "success"


def test_earlier_rounds_are_scored_when_there_is_something_to_compare():
    refine = ("refine", (6.0, 6.0), (6.0, 6.0), 5.0, "more")
    worse = ("refine", (2.0, 6.0), (6.0, 6.0), 5.0, "less")
    good = ("success", (9.0, 9.0), (9.0, 9.0), 9.0, "")
    trace, speaker, _, _ = run([refine, worse, good], LAZY)
    first, second, third = ["score"], ["reflect"], [*PAIRS, *PAIRS]
    assert speaker.calls == [["think"], ["describe"], first, second, first, second, third, first, second]
    assert trace.rounds[2].input_index is None, "the worse round is not built upon"
    assert [made.reflection.scores.asked for made in trace.rounds] == [True, True, False]
    assert (trace.best, trace.stop_reason) == (2, "success")


def test_a_lone_round_that_was_not_accepted_is_weighed_against_the_source():
    for edit, best in (((6.0, 6.0), 0), ((0.0, 6.0), None)):
        trace, speaker, _, _ = run([("refine", edit, (6.0, 6.0), 5.0, "more")], LAZY, max_rounds=1)
        assert trace.best == best and speaker.calls[-1] == list(PAIRS)


def test_failed_rounds_are_never_scored():
    failed = ("failed", (6.0, 6.0), (6.0, 6.0), 1.0, "")
    trace, speaker, _, _ = run([failed] * 4, replace(LAZY, on_failed="restart"))
    assert len(trace.rounds) == 4 and speaker.count(*PAIRS) == 0 and trace.best is None


def test_a_round_is_graded_against_the_goal_it_was_made_for():
    doubted = ("success", (5.0, 5.0), (5.0, 5.0), 2.0, "")
    trace, speaker, _, _ = run([doubted, ("failed", (1.0, 1.0), (1.0, 1.0), 1.0, "")], LAZY)
    assert trace.goal == "another goal" and trace.best == 0
    graded = [query for query in speaker.asked if query.task in PAIRS]
    shown = ["".join(map(str, query.parts)) for query in graded]
    assert len(shown) == 2 and "another goal" not in shown[0] and "goal" in shown[0]


def test_the_released_policy_scores_every_round():
    trace, speaker, _, _ = run([("success", (9.0, 9.0), (9.0, 9.0), 9.0, "")], RELEASED)
    assert speaker.calls[2:] == [["score", *PAIRS], ["reflect"]]
    assert wanted_scores(trace, RELEASED, ending=True) == ()


def test_a_pack_without_the_questions_leaves_nothing_to_ask():
    bare = fitted(load_pack("en"), scores=())
    picture = torch.zeros(1, 3, 4, 4)
    reasoner = PackReasoner(bare, ByPicture([("success", (), (), 9.0, "")], []))
    seen = reasoner.reflect(picture, picture, "goal", "target", scores=False)
    assert seen.scores.asked and reasoner.grade(picture, [(picture, "goal", "target")]) == [(None, None)]


def test_recorded_replies_are_asked_for_round_by_round():
    """They belong to rounds by their order: one that is skipped would move all later ones."""
    pairs = {task: [say_pair((6.0, 7.0), "so")] for task in PAIRS}
    verdict = {"score": [say_consistency(9.0, "so")], "reflect": [say_verdict(Decision.SUCCESS, "why")]}
    picture = torch.zeros(1, 3, 4, 4)
    seen = PackReasoner(load_pack("en"), ScriptedSpeaker(pairs | verdict)).reflect(picture, picture, "g", "t", scores=False)
    assert seen.scores.asked and seen.scores.edit == seen.scores.quality == (6.0, 7.0)


def test_not_asked_is_told_apart_from_no_score():
    unasked, none = Scores(None, None, 8.0, "so", asked=False), Scores(None, None, 8.0, "so")
    assert dict(_score_cells(unasked)) == {"edit": "not asked", "quality": "not asked", "consistency": "8"}
    assert dict(_score_cells(none)) == {"consistency": "8"}
    trace, _, _, _ = run([("success", (9.0, 9.0), (9.0, 9.0), 9.0, "")], LAZY)
    assert "edit and quality not asked for" in round_line(trace.rounds[0])


@pytest.mark.parametrize("ending", [False, True])
def test_wanted_scores_is_pure_and_asks_for_nothing_known(ending):
    trace, _, _, _ = run([("refine", (6.0, 6.0), (6.0, 6.0), 5.0, f"more {n}") for n in range(4)], EAGER)
    assert wanted_scores(trace, EAGER, ending=ending) == ()
    assert best_round(trace, LAZY) == best_round(trace, EAGER)
