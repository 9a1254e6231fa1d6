"""Scores that the Reflect node asks for only when told to be lazy, and what becomes of them in words and files."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from reasonedit.reasonedit_core.dialogue.prompts import default_pack
from reasonedit.reasonedit_core.types import Scores
from reasonedit.tests.graph_runner import install_host

install_host()

from reasonedit.nodes import auto_loop, outcome, reflect, sockets, tracefile  # noqa: E402

SOURCE, RESULT = torch.zeros(1, 16, 16, 3), torch.ones(1, 16, 16, 3)
PAIR = json.dumps({"score": [7, 8], "reasoning": "fine"})
SCORE = {"meets_instruction": "yes", "major_conflicts": 0, "minor_conflicts": 0, "omissions": 0, "reason": "fits"}
VERDICTS = {
    "success": "<#Think>Good.<#Success>",
    "refine": "<#Think>More.<#Reflection>make it whiter",
    "failed": "<#Think>Wrong.<#Failed>",
}


class Speaker:
    """Answers every task, and remembers the calls."""

    def __init__(self, verdict, consistency=8):
        score = json.dumps({**SCORE, "raw_score": consistency})
        self.replies = {"describe": "a white picture", "score": score, "edit_score": PAIR, "quality_score": PAIR}
        self.replies["reflect"], self.calls = VERDICTS[verdict], []

    def answer(self, queries, *, on_text=None, should_stop=None):
        self.calls.append([query.task for query in queries])
        return [self.replies[query.task] for query in queries]


def judge(speaker, **options):
    handle = sockets.ReasonerHandle("test", default_pack("en"), speaker)
    return reflect.judge(handle, SOURCE, RESULT, "make it white", target="a white picture", **options)


PAIRS = ["edit_score", "quality_score"]


@pytest.mark.parametrize(
    ("verdict", "consistency", "calls"),
    [
        ("success", 8, [["score"], ["reflect"]]),
        ("success", 2, [["score"], ["reflect"], PAIRS]),
        ("refine", 8, [["score"], ["reflect"], PAIRS]),
        ("failed", 8, [["score"], ["reflect"]]),
    ],
)
def test_a_lazy_reflect_asks_where_rounds_are_compared(verdict, consistency, calls):
    """A success that is not believed is compared, one that is and a failure are not."""
    lazy, eager = Speaker(verdict, consistency), Speaker(verdict, consistency)
    found, full = judge(lazy, lazy=True).reflection, judge(eager).reflection
    assert lazy.calls == calls and eager.calls == [["score", *PAIRS], ["reflect"]], "asked at once unless told otherwise"
    assert full.scores.edit == full.scores.quality == (7.0, 8.0)
    assert found.scores.asked == (calls[-1] == PAIRS)
    assert (found.decision, found.instruction) == (full.decision, full.instruction)
    assert found.scores == full.scores or (found.scores.edit, found.scores.quality) == (None, None)


def test_the_released_policy_is_never_lazy():
    speaker = Speaker("success")
    judge(speaker, lazy=True, policy="released")
    assert speaker.calls[0][0] == "score" and len(speaker.calls[0]) == 3


def test_a_score_that_was_not_asked_for_is_told_and_kept_in_a_file():
    verdict = judge(Speaker("success"), lazy=True)
    assert "edit and quality not asked for" in reflect.words(verdict.reflection, True)
    edited = sockets.foreign(sockets.to_picture(RESULT))
    history = (sockets.HistoryRound("i", None, edited, verdict),)
    record, tensors = tracefile.to_record(history)
    scores = record["rounds"][0]["reflection"]["scores"]
    assert (scores["edit"], scores["quality"], scores["asked"]) == (None, None, False)
    assert tracefile.from_record(json.loads(json.dumps(record)), tensors)[0].verdict.reflection == verdict.reflection
    known = judge(Speaker("success")).reflection
    full = sockets.Verdict(known, "g", "o", "t", edited.image)
    record, tensors = tracefile.to_record((sockets.HistoryRound("i", None, edited, full),))
    assert "asked" not in record["rounds"][0]["reflection"]["scores"], "older versions of the pack read it"
    assert (
        tracefile.from_record(record, tensors)[0].verdict.reflection.scores
        == known.scores
        == Scores((7.0, 8.0), (7.0, 8.0), known.scores.consistency, "fits")
    )


def test_nodes_ask_for_all_scores_by_default():
    assert not outcome.policy_of("reasonedit", "rethink", "chain", 9.0, 3.0).lazy_scores
    for node in (reflect.Reflect, auto_loop.AutoLoop):
        assert "scores" in [one.id for one in node.GET_SCHEMA().inputs]
        assert inspect.signature(node.execute).parameters["scores"].default == "always"
