"""The loop and its two pure decisions, with a scripted reasoner and a generator that paints flat pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import Interrupted, MalformedReply
from reasonedit.reasonedit_core.loop import (
    POLICIES,
    Step,
    Stop,
    best_round,
    merge_instructions,
    next_step,
    score,
    think_edit_reflect,
)
from reasonedit.reasonedit_core.types import (
    Decision,
    Edited,
    EditRequest,
    EditTrace,
    Reflection,
    Round,
    Scores,
    Thought,
)

MENDED, RELEASED = POLICIES["reasonedit"], POLICIES["released"]
TAG = {Decision.SUCCESS: "<#Success>", Decision.REFINE: "<#Reflection>", Decision.FAILED: "<#Failed>"}


def verdict(decision="refine", edit=(5.0, 5.0), quality=(5.0, 5.0), consistency=5.0, instruction="more", reason="why"):
    decision = Decision(decision)
    second = instruction if decision is Decision.REFINE else None
    raw = f"<#Think>{reason}{TAG[decision]}{second or ''}"
    return Reflection(decision, reason, second, Scores(edit, quality, consistency, "score says so"), raw)


class Painter:
    """A generator whose round n paints the value drawn from its rng; it records what it was given."""

    def __init__(self, constant=None):
        self.calls, self.constant = [], constant

    def edit(
        self,
        request,
        picture,
        instruction,
        rng,
        *,
        latents=None,
        released=False,
        source_size=True,
        on_step=None,
        should_stop=None,
    ):
        self.calls.append((picture, instruction, latents))
        value = torch.rand((), generator=rng) if self.constant is None else torch.tensor(self.constant)
        generated = torch.full((1, 3, 16, 16), float(value))
        return Edited(generated[..., :8], generated, torch.full((1, 1, 64), float(value)))


class Scripted:
    """A reasoner that hands out prepared verdicts and records its questions."""

    def __init__(self, verdicts, thoughts=("goal",)):
        self.verdicts, self.thoughts, self.described, self.asked = list(verdicts), list(thoughts), [], []

    def bound(self, *, seed=0, on_text=None, should_stop=None):
        return self

    def think(self, image, instruction, *, feedback=None):
        self.asked.append(feedback)
        return Thought(instruction, self.thoughts.pop(0))

    def describe(self, image, goal, *, original=None):
        self.described.append((goal, original))
        return f"picture of {goal}"

    def reflect(self, source, edited, goal, target, *, original=None):
        result = self.verdicts.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def request(**options) -> EditRequest:
    return EditRequest(torch.zeros(1, 3, 8, 8), "user words", **{"max_rounds": 3, **options})


def run(verdicts, policy=MENDED, thoughts=("goal",), constant=None, on_round=None, **options):
    reasoner, generator = Scripted(verdicts, thoughts), Painter(constant)
    trace = think_edit_reflect(request(**options), reasoner=reasoner, generator=generator, policy=policy, on_round=on_round)
    return trace, reasoner, generator


def made(reflections, policy=MENDED, **options) -> EditTrace:
    rounds = tuple(
        Round(i, f"step {i}", i - 1 if i else None, Edited(*[torch.full((1, 3, 8, 8), i / 10)] * 3), r)
        for i, r in enumerate(reflections)
    )
    return EditTrace(request(**options), Thought("user words", "goal"), "target", rounds)


# ---- the run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [MENDED, RELEASED], ids=lambda p: p.name)
def test_success_stops_after_one_round(policy):
    trace, reasoner, generator = run([verdict("success", consistency=9.5)], policy)
    assert (trace.stop_reason, trace.best, len(trace.rounds)) == ("success", 0, 1)
    assert generator.calls[0][1] == "goal" and reasoner.described == [("goal", "user words")]


def test_refine_edits_the_result_with_its_latents_by_default():
    trace, _, generator = run([verdict(edit=(4.0, 5.0)), verdict("success", consistency=9.0)])
    picture, instruction, latents = generator.calls[1]
    assert instruction == "more" and trace.rounds[1].input_index == 0
    assert torch.equal(picture, trace.rounds[0].edited.generated) and latents is trace.rounds[0].edited.latents


def test_refine_edits_the_resized_picture_under_the_released_policy():
    trace, _, generator = run([verdict(instruction=" more\n"), verdict("success")], RELEASED)
    picture, instruction, latents = generator.calls[1]
    assert instruction == " more\n", "the released loop does not strip the second instruction"
    assert torch.equal(picture, trace.rounds[0].image) and latents is None


def test_failed_restarts_from_the_source_with_the_goal_under_the_released_policy():
    trace, _, generator = run([verdict("failed"), verdict("failed"), verdict("failed")], RELEASED)
    assert [c[1] for c in generator.calls] == ["goal"] * 3
    assert [r.input_index for r in trace.rounds] == [None] * 3 and trace.stop_reason == "max_rounds"
    assert len({float(r.image.mean()) for r in trace.rounds}) == 3, "the run's one generator draws new noise each round"


def test_failed_rethinks_once_with_the_reason_and_then_stops_by_default():
    trace, reasoner, generator = run(
        [verdict("failed", reason="wrong leaf"), verdict("failed")], thoughts=("goal", "new goal"), max_rounds=5
    )
    assert reasoner.asked == [None, "wrong leaf"] and [c[1] for c in generator.calls] == ["goal", "new goal"]
    assert reasoner.described == [("goal", "user words"), ("new goal", "user words")]
    assert (trace.stop_reason, trace.best) == ("failed", None)
    assert trace.goal == "new goal" and trace.earlier_thoughts[0].instruction == "goal"
    assert torch.equal(trace.image, trace.request.image), "failed rounds lose to the unchanged source"


def test_a_rethink_that_says_the_same_ends_the_run():
    trace, _, generator = run([verdict("failed")], thoughts=("goal", "Goal."), max_rounds=5)
    assert trace.stop_reason == "failed" and len(generator.calls) == 1


def test_a_worse_round_is_not_built_upon():
    good, bad = verdict(edit=(8.0, 8.0), instruction="a"), verdict(edit=(1.0, 8.0), instruction="b")
    trace, _, generator = run([good, bad, verdict(edit=(7.0, 7.0))])
    assert trace.rounds[2].input_index is None and generator.calls[2][1] == "goal. b"
    assert trace.best == 0


def test_doubted_success_is_answered_with_the_scores_reason():
    trace, reasoner, _ = run(
        [verdict("success", consistency=2.0), verdict("success", consistency=8.0)], thoughts=("goal", "other")
    )
    assert reasoner.asked == [None, "score says so"] and trace.best == 1 and trace.stop_reason == "success"


def test_equal_pictures_end_the_run():
    trace, _, _ = run([verdict(), verdict(instruction="else"), verdict()], constant=0.5, max_rounds=6)
    assert trace.stop_reason == "oscillation" and len(trace.rounds) == 2


def test_a_repeated_proposal_ends_the_run():
    merge = replace(MENDED, revise="merge")
    falling = [verdict(edit=(v, v), instruction="x") for v in (5.0, 4.0, 3.0, 2.0)]
    trace, _, generator = run(falling, merge, max_rounds=9)
    assert [c[1] for c in generator.calls] == ["goal", "goal. x"]
    assert trace.stop_reason == "oscillation"


def test_consistent_picture_stops_a_refine():
    trace, _, _ = run([verdict(consistency=9.2)])
    assert trace.stop_reason == "consistent" and trace.best == 0


def test_without_reflection_one_edit_is_made_and_returned():
    trace, reasoner, _ = run([], reflect=False, think=False)
    assert (trace.stop_reason, trace.best, trace.target, trace.thought) == ("one_edit", 0, None, None)
    assert reasoner.described == [] and trace.goal == "user words"


def test_max_seconds_starts_no_further_round():
    trace, _, _ = run([verdict()], max_seconds=0.0)
    assert trace.stop_reason == "max_seconds" and len(trace.rounds) == 1


def test_default_rounds_own_their_seeds_and_round_zero_equals_the_released_one():
    ours, _, _ = run([verdict(edit=(4, 4)), verdict("success")], seed=7)
    released, _, _ = run([verdict(), verdict("success")], RELEASED, seed=7)
    alone = torch.rand((), generator=torch.Generator().manual_seed(8))
    assert torch.equal(ours.rounds[0].image, released.rounds[0].image)
    assert float(ours.rounds[1].image.mean()) == pytest.approx(float(alone))


@pytest.mark.parametrize(
    ("error", "reason"), [(MalformedReply("no tag", "raw"), "error"), (Interrupted("stop"), "interrupted")]
)
def test_an_error_carries_the_rounds_already_made(error, reason):
    told = []
    with pytest.raises(type(error)) as caught:
        run([verdict(edit=(4, 4)), error], on_round=told.append)
    trace = caught.value.trace
    assert len(trace.rounds) == 2 and trace.rounds[1].reflection is None and trace.best == 0
    assert trace.stop_reason == reason
    assert [(len(t.rounds), t.rounds[-1].reflection is not None) for t in told] == [(1, False), (1, True), (2, False)]


# ---- best_round ----------------------------------------------------------------------------------------------------------


def test_released_choice_is_the_product_and_a_success_only_breaks_ties():
    # Products 48, 42, 36: the success of round 2 loses to the rejected round 0, as measured on the released code.
    rounds = [
        verdict(edit=(7, 6), quality=(8, 8)),
        verdict(edit=(7, 6), quality=(7, 8)),
        verdict("success", edit=(7, 6), quality=(6, 8)),
    ]
    assert best_round(made(rounds), RELEASED) == 0
    assert best_round(made(rounds), MENDED) == 2


@pytest.mark.parametrize(
    "decisions, best",
    [
        (("refine", "refine"), 1),
        (("success", "refine"), 0),
        (("refine", "success"), 1),
        (("success", "success"), 1),
        (("failed", "refine"), 1),
    ],
)
def test_released_ties(decisions, best):
    assert best_round(made([verdict(d) for d in decisions]), RELEASED) == best


def test_equal_rounds_keep_the_earlier_one_by_default():
    assert best_round(made([verdict(), verdict()]), MENDED) == 0


def test_zero_scores_lose_to_the_source():
    assert best_round(made([verdict(edit=(0.0, 9.0))]), MENDED) is None


def test_verdict_alone_is_scored_when_there_are_no_scores():
    bare = [replace(verdict(d), scores=Scores()) for d in ("failed", "refine", "success")]
    assert [score(r) for r in bare] == [0.0, 5.0, 10.0]


def test_merging_follows_the_language_of_the_goal():
    assert merge_instructions("Make it red.", " Keep the sky ") == "Make it red. Keep the sky"
    assert merge_instructions("把叶子变黄。", "叶尖变褐") == "把叶子变黄。叶尖变褐"


# ---- invariants ----------------------------------------------------------------------------------------------------------

SCORE = st.floats(0, 10).map(lambda v: round(v, 1))
VERDICT = st.builds(
    verdict,
    st.sampled_from(["success", "refine", "failed"]),
    st.tuples(SCORE, SCORE),
    st.tuples(SCORE, SCORE),
    SCORE,
    st.sampled_from(["more", "less", "goal", "x y"]),
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(VERDICT, min_size=1, max_size=8), st.sampled_from([MENDED, RELEASED]), st.integers(1, 8))
def test_the_loop_ends_within_its_limit_and_the_best_never_falls(verdicts, policy, limit):
    verdicts = (verdicts * 8)[:limit]
    told = []
    trace, _, generator = run(
        verdicts, policy, thoughts=["goal"] + [f"goal {i}" for i in range(9)], max_rounds=limit, on_round=told.append
    )
    assert 1 <= len(trace.rounds) == len(generator.calls) <= limit
    assert isinstance(next_step(trace, policy), Stop) or trace.stop_reason == "failed"
    if policy is MENDED:
        bests = [best_round(t, policy) for t in told if t.rounds[-1].reflection]
        values = [
            -1.0
            if b is None
            else score(trace.rounds[b].reflection)
            + 10
            * (
                trace.rounds[b].reflection.decision is Decision.SUCCESS
                and trace.rounds[b].reflection.scores.consistency >= policy.doubt
            )
            for b in bests
        ]
        assert values == sorted(values), "while running, a worse round never replaces the best"
        steps = [(r.instruction, r.input_index) for r in trace.rounds]
        assert len(set(steps)) == len(steps), "no edit is tried twice"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(VERDICT, min_size=1, max_size=6), st.sampled_from([MENDED, RELEASED]))
def test_decisions_are_pure(verdicts, policy):
    trace = made(verdicts, max_rounds=9)
    assert next_step(trace, policy) == next_step(trace, policy)
    assert best_round(trace, policy) == best_round(trace, policy)
    step = next_step(trace, policy)
    assert isinstance(step, Stop) or step.input_index in {None, len(verdicts) - 1}


def test_first_step_is_the_goal_on_the_source():
    assert next_step(replace(made([]), rounds=())) == Step("goal")
