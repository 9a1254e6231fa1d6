"""What follows from a verdict: rounds that build on one another, and the same rounds from script, graph and auto loop."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.tests.graph_runner import GraphRunner, install_host

install_host()

from reasonedit.nodes import expand, host, loop, outcome  # noqa: E402
from reasonedit.nodes.auto_loop import AutoLoop  # noqa: E402
from reasonedit.nodes.sockets import to_image  # noqa: E402
from reasonedit.reasonedit_core.errors import ConfigError, MalformedReply  # noqa: E402
from reasonedit.reasonedit_core.flow import STEP1X  # noqa: E402
from reasonedit.reasonedit_core.generator import Plan  # noqa: E402
from reasonedit.reasonedit_core.loop import think_edit_reflect  # noqa: E402
from reasonedit.reasonedit_core.run import outcome_line  # noqa: E402
from reasonedit.reasonedit_core.types import Edited, EditRequest, Thought  # noqa: E402
from reasonedit.tests import fake_body as fakes  # noqa: E402
from reasonedit.tests import loop_engines  # noqa: E402
from reasonedit.tests.loop_engines import CLASSES, SETTINGS, brightness, judged, prompt_of, shown  # noqa: E402

engine, servers = loop_engines.engine, loop_engines.servers


# ---- rounds that depend on the decision ----------------------------------------------------------------------------------


def test_advance_hands_on_the_picture_that_was_decided_on():
    types, sockets = fakes.ours("reasonedit_core.types"), fakes.ours("nodes.sockets")
    pictures = [torch.full((1, 3, 4, 4), value) for value in (0.25, 0.5)]
    source = torch.zeros(1, 4, 4, 3)
    verdict = sockets.Verdict(None, "goal", "words", "", pictures[0])
    rounds = [sockets.HistoryRound("a", None, types.Edited(p, p, p[:, :1]), verdict) for p in pictures]
    given = {"image": to_image(pictures[1:]), "verdict": verdict, "history": tuple(rounds[:1]), "source": source, "loop": "6"}
    decided = {"made_with": "b", "made_from": 0, "instruction": "next"}
    image, text, history, previous = loop.Advance.execute(**given, **decided, input_index=0).args
    assert torch.equal(image, to_image(pictures[:1])) and text == "next" and previous.items == (rounds[0].edited,)
    assert [(r.instruction, r.input_index) for r in history] == [("a", None), ("b", 0)]
    image, _, _, previous = loop.Advance.execute(**given, **decided, input_index=-1).args
    assert image is source and previous is None
    image, _, _, previous = loop.Advance.execute(**given, **decided, input_index=1).args
    assert torch.equal(image, given["image"]) and previous is None  # of another editor: there are no latents to hand on


def test_every_round_takes_the_next_seed(engine):
    means, _, _ = shown(engine.queue(judged("refine 4 5,refine 5 5,success 6 5")))
    assert means == [brightness(5), brightness(5, 6), brightness(5, 6, 7)]


def test_a_worse_round_is_not_built_upon_and_not_returned(engine):
    outcome = engine.queue(judged("refine 6 5,refine 1 5,refine 2 5", close={"max_rounds": 3}))
    means, _, report = shown(outcome)
    assert means == [brightness(5), brightness(5, 6), brightness(7)]  # round 3 starts over from the source
    assert shown(outcome, "9")[0] == [brightness(5)] and "result: round 1 of 3 (stopped: max_rounds)" in report


def test_failed_thinks_again_and_the_source_comes_back_when_all_fail(engine):
    outcome = engine.queue(judged("failed 1 1"))
    means, rounds, report = shown(outcome)
    assert outcome.runs == ["Think", "Edit"] * 2 and means == [brightness(5), brightness(6)] and rounds == 2
    assert "round 2: [words because why 0]" in report and report.endswith("result: the source, unchanged (stopped: failed)")
    assert shown(outcome, "9")[0] == [0.0]


def test_thinking_again_in_vain_ends_the_run_before_another_edit(engine):
    prompt = judged("failed 1 1", think={"stubborn": True})
    del prompt["7"]  # a preview of each round would ask for the edit
    outcome = engine.queue(prompt)
    assert outcome.runs == ["Think", "Edit", "Think"] and shown(outcome)[1] == 1
    prompt = judged("failed 1 1", think={"stubborn": True})
    del prompt["6"]["inputs"]["goal"]  # found out from the verdict then; Test_Think is not the pack's own Think
    assert shown(engine.queue(prompt))[1] == 1


def test_pick_last_success_and_last(engine):
    verdicts = "refine 6 5,success 5 1,refine 4 5"  # a success that its consistency contradicts is not believed
    last = engine.queue(judged(verdicts, close={"pick": "last", "max_rounds": 3, "on_failed": "restart"}))
    assert shown(last, "9")[0] == shown(last)[0][-1:] and len(shown(last)[0]) == 3
    best = engine.queue(judged(verdicts, close={"pick": "last success", "max_rounds": 3, "on_failed": "restart"}))
    assert best.runs == [] and shown(best, "9")[0] == shown(last)[0][:1]


def test_a_reply_that_cannot_be_read_ends_the_run_with_what_it_has(engine):
    outcome = engine.queue(judged("refine 6 5,unread 0 0"))
    assert shown(outcome)[1] == 2 and "not judged" in shown(outcome)[2] and "unreadable reply" in shown(outcome)[2]
    assert shown(outcome, "9")[0] == [brightness(5)]


def test_a_finished_run_is_continued_as_if_it_had_never_stopped(engine):
    verdicts = "refine 4 5,refine 5 5,refine 1 5,refine 7 5"
    whole = engine.queue(judged(verdicts, close={"max_rounds": 4}))
    prompt = judged(verdicts, close={"max_rounds": 2})
    second = {k: {**v, "inputs": dict(v["inputs"])} for k, v in judged(verdicts, close={"max_rounds": 4}).items() if k != "1"}
    for info in second.values():
        for name, value in info["inputs"].items():
            if isinstance(value, list) and value[0] != "1":
                info["inputs"][name] = ["1" + value[0], value[1]]
    second["2"]["inputs"]["history"] = ["6", 4]
    prompt.update({"1" + node: info for node, info in second.items()})
    both = engine.queue(prompt)
    assert shown(both)[1] == 2 and shown(both, "18") == shown(whole)


def test_a_fourth_channel_goes_round_and_comes_back(engine):
    prompt = judged("refine 4 5,refine 5 5,success 6 5")
    prompt["1"]["inputs"].update(channels=4, value=0.5)
    outcome = engine.queue(prompt)
    assert outcome.error is None and len(shown(outcome)[0]) == 3
    failed = judged("failed 1 1", close={"on_failed": "stop"})
    failed["1"]["inputs"].update(channels=4, value=0.5)
    assert shown(engine.queue(failed), "9")[0] == [0.5]


def test_one_loop_inside_another(engine):
    """The outer loop repeats the whole inner one; copies of the inner loop never meet each other's."""
    prompt = prompt_of(reflect={"target": 0.45})
    prompt["2"]["inputs"]["image"] = ["20", 1]
    prompt["5"]["inputs"]["source"] = ["20", 1]
    prompt["20"] = {"class_type": "ReasonEdit_LoopOpen", "inputs": {"image": ["1", 0], "instruction": "outer", "seed": 0}}
    prompt["50"] = {
        "class_type": "Test_Reflect",
        "inputs": {"source": ["1", 0], "edited": ["6", 0], "instruction": ["20", 2], "target": 0.7},
    }
    prompt["60"] = {
        "class_type": "ReasonEdit_LoopClose",
        "inputs": {"flow": ["20", 0], "image": ["6", 0], "verdict": ["50", 0], "history": ["20", 3], **SETTINGS},
    }
    prompt["80"] = {"class_type": "Test_Show", "inputs": {"image": ["60", 1], "text": ["60", 3], "number": ["60", 2]}}
    outcome = engine.queue(prompt)
    assert outcome.error is None and shown(outcome, "80")[:2] == ([0.5, 0.75], 2)
    assert len(set(outcome.ids)) == len(outcome.ids) and engine.queue(prompt).runs == []


# ---- script loop == graph loop == auto loop ------------------------------------------------------------------------------

PLAN = Plan((32, 32), ((32, 32),), ((32, 32),))


class Painter:
    """A generator that does what Test_Edit does when `noisy`."""

    schedule = STEP1X
    geometry = SimpleNamespace(plan=lambda *args, **options: PLAN)

    def edit(self, request, picture, instruction, rng, *, latents=None, **_):
        """See `Generator`."""
        image = (picture + torch.rand((), generator=rng) / 2).clamp(0, 1)
        return Edited(image, image, torch.ones(1, 1, 64) if latents is None else latents + 1)


class Scripted:
    """A reasoner that does what Test_Think and Test_Judge do."""

    def __init__(self, verdicts, stubborn):
        self.verdicts, self.stubborn, self.asked = verdicts, stubborn, 0

    def bound(self, **_):
        """See `Reasoner`."""
        return self

    def think(self, image, instruction, *, feedback=None):
        """See `Reasoner`."""
        told = f" because {feedback}" if feedback is not None and not self.stubborn else ""
        return Thought(instruction, f"[{instruction}{told}]")

    def describe(self, image, goal, *, original=None):
        """See `Reasoner`."""
        return "bright"

    def reflect(self, source, edited, goal, target, *, original=None):
        """See `Reasoner`."""
        self.asked += 1
        return fakes.verdict_of(self.verdicts, self.asked - 1, goal)


class FakeEditor:
    """The part of an EditorHandle that the auto loop uses."""

    system, device, generator, latents = "reasonedit-s", torch.device("cpu"), Painter(), "released"

    def request(self, image, instruction, *, seed, steps, guidance, size, negative, references, **rest):
        """The core's request."""
        return EditRequest(image, instruction, seed=seed, steps=4, **rest)

    def expect(self, *_, **__):
        """Sizes."""
        return PLAN

    def remark(self, image):
        """Nothing to say of any picture."""
        return ""


verdicts_of_a_run = st.lists(
    st.builds(
        "{} {} {}".format,
        st.sampled_from(["success", "refine", "refine", "failed"]),
        st.sampled_from([0, 2, 5, 8]),
        st.sampled_from([1, 5, 9.5]),
    ),
    min_size=1,
    max_size=5,
).map(",".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    verdicts=verdicts_of_a_run,
    stubborn=st.booleans(),
    more=st.fixed_dictionaries(
        {
            "max_rounds": st.integers(1, 5),
            "on_failed": st.sampled_from(["rethink", "restart", "stop"]),
            "revise": st.sampled_from(["chain", "merge"]),
            "accept": st.sampled_from([9.0, 11.0]),
            "doubt": st.sampled_from([3.0, -1.0]),
        }
    ),
    wired=st.booleans(),
)
def test_script_graph_and_auto_loop_make_the_same_rounds(verdicts, stubborn, more, wired):
    policy = outcome.policy_of("reasonedit", more["on_failed"], more["revise"], more["accept"], more["doubt"])
    request = EditRequest(torch.zeros(1, 3, 32, 32), "words", seed=5, max_rounds=more["max_rounds"])
    script = think_edit_reflect(request, reasoner=Scripted(verdicts, stubborn), generator=Painter(), policy=policy)

    prompt = judged(verdicts, close=more, think={"stubborn": stubborn})
    if not wired:  # the pack's own Think is known without Loop Close's `goal`
        del prompt["6"]["inputs"]["goal"]
        prompt["3"]["class_type"] = expand.THINK
    prompt["90"] = {"class_type": "Test_Keep", "inputs": {"image": ["6", 0], "history": ["6", 4], "report": ["6", 3]}}
    fakes.ON_STEP[:] = [lambda: None]
    with patch.dict(CLASSES, {expand.THINK: fakes.Think}):
        graph = GraphRunner(CLASSES).run(prompt)["90"]

    handle = SimpleNamespace(under=lambda policy: Scripted(verdicts, stubborn), expect=lambda: None)
    node = type(AutoLoop)("Node", (AutoLoop,), {"hidden": None})
    image = torch.zeros(1, 32, 32, 3)
    values = {"seed": 5, "steps": 0, "guidance": 0.0, "size": 0, "negative": "", "think": True, "reflect": True}
    chosen, _, rounds, report, history = node.execute(
        FakeEditor(), image, "words", reasoner=handle, **values, **{**SETTINGS, **more}
    ).args

    expected = [(r.instruction, r.input_index, r.reflection) for r in script.rounds]
    assert [(r.instruction, r.input_index, r.verdict.reflection) for r in graph["history"]] == expected
    assert [(r.instruction, r.input_index, r.verdict.reflection) for r in history] == expected and rounds == len(expected)
    for r, g, a in zip(script.rounds, graph["history"], history, strict=True):
        assert torch.equal(r.image, g.edited.image) and torch.equal(r.image, a.edited.image)
        assert torch.equal(r.edited.latents, g.edited.latents) and torch.equal(r.edited.latents, a.edited.latents)
        assert g.verdict.goal == a.verdict.goal and (g is graph["history"][-1] or g.rethink == a.rethink)
    assert torch.equal(to_image([script.image]), graph["image"]) and torch.equal(graph["image"], chosen)
    assert graph["report"].splitlines()[-1] == report.splitlines()[-1] == outcome_line(script)


def test_the_auto_loop_keeps_its_rounds_when_a_reply_cannot_be_read():
    class Mumbling(Scripted):
        def reflect(self, *args, **options):
            if self.asked == 1:
                raise MalformedReply("expected a verdict, found noise")
            return super().reflect(*args, **options)

    handle = SimpleNamespace(under=lambda policy: Mumbling("refine 5 5", False), expect=lambda: None)
    node = type(AutoLoop)("Node", (AutoLoop,), {"hidden": None})
    values = {"seed": 5, "steps": 0, "guidance": 0.0, "size": 0, "negative": "", "think": True, "reflect": True}
    _, pictures, rounds, report, history = node.execute(
        FakeEditor(), torch.zeros(1, 32, 32, 3), "words", reasoner=handle, **values, **SETTINGS
    ).args
    assert (
        rounds == len(pictures) == 2 and "expected a verdict, found noise" in report and history[1].verdict.reflection is None
    )


def test_the_auto_loop_refuses_a_batch_and_a_missing_reasoner():
    node = type(AutoLoop)("Node", (AutoLoop,), {"hidden": None})
    values = {"seed": 5, "steps": 0, "guidance": 0.0, "size": 0, "negative": "", "think": True, "reflect": True, **SETTINGS}
    with pytest.raises(ConfigError, match="found a batch of 2"):
        node.execute(FakeEditor(), torch.zeros(2, 8, 8, 3), "words", **values)
    with pytest.raises(ConfigError, match="reasoner"):
        node.execute(FakeEditor(), torch.zeros(1, 8, 8, 3), "words", **values)


@pytest.mark.parametrize("kind", [loop.LoopOpen, loop.LoopClose, loop.Advance, AutoLoop], ids=lambda k: k.__name__)
def test_schemas_are_sound_and_tell_about_every_slot(kind):
    schema = kind.GET_SCHEMA()
    assert schema.node_id.startswith("ReasonEdit_") and schema.category.startswith(host.ROOT) and schema.description
    assert [slot.id for slot in (*schema.inputs, *schema.outputs) if not slot.tooltip] == []
