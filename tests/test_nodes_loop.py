"""The loop nodes over a body of stand-ins: cases A to J on our graph runner, and on a real ComfyUI when there is one.

The cases are those of the loop's design: early stop, reuse of finished rounds, changed limits and seeds, interrupt, errors.
Numbers of node runs count the body only (Think, Edit, Reflect), not the nodes that show results.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.tests.comfy_server import ComfyServer
from reasonedit.tests.graph_runner import GraphRunner, RunError, install_host

TESTS = Path(__file__).resolve().parent
CLASSES = install_host()

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

for kind in (loop.LoopOpen, loop.LoopClose, loop.Advance, *fakes.NODES):
    CLASSES[kind.GET_SCHEMA().node_id] = kind


# ---- two ways to run a prompt --------------------------------------------------------------------------------------------


class Outcome:
    """What a run did. runs: body classes in order; ids: their node ids; error: (artist's node, message) or None."""

    def __init__(self, runs, shown=None, error=None, interrupted=False, seconds=0.0, run=None):
        self.runs = [name for name, _ in runs if name != "Show"]
        self.ids = [node for name, node in runs if name != "Show"]
        self.shown, self.error, self.interrupted, self.seconds, self.run = shown or {}, error, interrupted, seconds, run


class Double:
    """Prompts on our runner."""

    real = False

    def __init__(self, mode):
        self.runner = GraphRunner(CLASSES, mode)

    def queue(self, prompt, interrupt_after=None) -> Outcome:
        """interrupt_after: number of steps after which the user cancels."""
        fakes.RUNS.clear()
        steps = 0

        def step():
            nonlocal steps
            if steps == interrupt_after:
                raise KeyboardInterrupt
            steps += 1

        fakes.ON_STEP[:] = [step]
        try:
            shown = self.runner.run(prompt)
            return Outcome(fakes.RUNS[:], shown)
        except RunError as error:
            return Outcome(fakes.RUNS[:], error=(error.node, str(error.cause)))
        except KeyboardInterrupt:
            return Outcome(fakes.RUNS[:], interrupted=True)


class Real:
    """Prompts on a server."""

    real = True

    def __init__(self, server):
        self.server = server

    def queue(self, prompt, interrupt_after=None) -> Outcome:
        """interrupt_after: number of previews after which the user cancels."""
        self.server.get("/reasonedit_test/runs")
        cancelled = []

        def watch(run):
            previews = [e for e in run.of("binary") if e["kind"] in (1, 4)]
            if interrupt_after is not None and not cancelled and len(previews) >= interrupt_after:
                cancelled.append(time.monotonic())
                self.server.post("/interrupt")

        started = time.monotonic()
        run = self.server.run(prompt, on_event=watch)
        seconds = time.monotonic() - (cancelled[0] if cancelled else started)
        runs = self.server.get("/reasonedit_test/runs")
        error = (run.told["node_id"], run.told["exception_message"]) if run.end == "execution_error" else None
        if run.status != 200 or (run.reply or {}).get("node_errors"):
            error = ("", str(run.reply))
        return Outcome(runs, run.outputs, error, run.end == "execution_interrupted", seconds, run)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Servers by cache mode, started when first asked for and ended with the module."""
    started = {}

    def get(*flags):
        if flags not in started:
            server = ComfyServer(tmp_path_factory.mktemp("comfy"), *flags, packs={"fake_body": TESTS / "fake_body.py"})
            started[flags] = server.__enter__()
        return started[flags]

    yield get
    for server in started.values():
        server.__exit__()


@pytest.fixture(params=["double-classic", "double-lru", "comfy-classic", "comfy-lru"])
def engine(request, servers):
    """One of the ways to run a prompt, with an empty cache of its own (a server's cache is emptied)."""
    which, mode = request.param.split("-")
    if which == "double":
        return Double(mode)
    server = servers(*(["--cache-lru", "50"] if mode == "lru" else []))
    server.post("/free", {"free_memory": True})
    time.sleep(1.2)  # the flag is read once a second
    return Real(server)


def prompt_of(*, close=None, edit=None, reflect=None, start=None, think=None, history=False) -> dict[str, dict]:
    """The test graph of the design: Think, Edit and Reflect in a loop, a preview on Edit, and what came out."""
    prompt = {
        "1": {"class_type": "Test_Paint", "inputs": {"value": 0.0, "count": 1, "channels": 3}},
        "2": {"class_type": "ReasonEdit_LoopOpen", "inputs": {"image": ["1", 0], "instruction": "words", "seed": 5}},
        "3": {"class_type": "Test_Think", "inputs": {"image": ["2", 1], "instruction": ["2", 2]}},
        "4": {"class_type": "Test_Edit", "inputs": {"image": ["2", 1], "instruction": ["3", 0], "seed": 1, "step_s": 0.0}},
        "5": {
            "class_type": "Test_Reflect",
            "inputs": {"source": ["1", 0], "edited": ["4", 0], "instruction": ["3", 0], "target": 0.7},
        },
        "6": {
            "class_type": "ReasonEdit_LoopClose",
            "inputs": {"flow": ["2", 0], "image": ["4", 0], "verdict": ["5", 0], "history": ["2", 3], **SETTINGS},
        },
        "7": {"class_type": "Test_Show", "inputs": {"image": ["4", 0]}},
        "8": {"class_type": "Test_Show", "inputs": {"image": ["6", 1], "text": ["6", 3], "number": ["6", 2]}},
        "9": {"class_type": "Test_Show", "inputs": {"image": ["6", 0]}},
    }
    if history:
        prompt["3"]["inputs"]["history"], prompt["6"]["inputs"]["goal"] = ["2", 3], ["3", 1]
        prompt["5"]["inputs"]["instruction"] = ["3", 1]
    for node, more in (("2", start), ("3", think), ("4", edit), ("5", reflect), ("6", close)):
        prompt[node]["inputs"].update(more or {})
    return prompt


SETTINGS = {
    "max_rounds": 8,
    "policy": "reasonedit",
    "pick": "best",
    "on_failed": "rethink",
    "revise": "chain",
    "accept": 9.0,
    "doubt": 3.0,
    "max_seconds": 0.0,
}
ROUND = ["Think", "Edit", "Reflect"]


def shown(outcome, node="8"):
    """(means, number, text) of a Show node."""
    told = outcome.shown[node]
    return told["means"], told["number"][0], told["text"][0]


# ---- cases A to J --------------------------------------------------------------------------------------------------------


def test_a_and_b_stop_early_and_find_everything_again(engine):
    a = engine.queue(prompt_of())
    means, rounds, report = shown(a)
    assert a.runs == ROUND * 3 and means == [0.25, 0.5, 0.75] and rounds == 3
    assert [line.split(" -> ")[1].split(" ")[0] for line in report.splitlines()[:3]] == ["refine", "refine", "success"]
    assert shown(a, "9")[0] == [0.75] and report.splitlines()[3] == "result: round 3 of 3 (stopped: success)"
    assert [i for n, i in zip(a.runs, a.ids, strict=True) if n == "Edit"] == ["4", "6.round2.4", "6.round3.4"]
    b = engine.queue(prompt_of())
    assert b.runs == [] and shown(b) == shown(a)


def test_a_shows_previews_texts_and_side_branches_on_the_artists_nodes(engine):
    if not engine.real:
        engine.queue(prompt_of())
        assert [shows for node, shows in engine.runner.executed if node.endswith("7")] == ["7"] * 3
        return
    run = engine.queue(prompt_of(edit={"seed": 77})).run
    previews = [e for e in run.of("binary") if e["kind"] == 4]
    assert len(previews) == 12 and {e["display_node_id"] for e in previews} == {"4"}
    assert len([e for e in run.of("binary") if e["kind"] == 3]) == 3
    assert len([e for e in run.of("executed") if e["display_node"] == "7"]) == 3


def test_c_a_lower_limit_repeats_nothing(engine):
    engine.queue(prompt_of())
    c = engine.queue(prompt_of(close={"max_rounds": 2}))
    assert c.runs == [] and shown(c)[:2] == ([0.25, 0.5], 2)


def test_d_and_e_a_higher_limit_repeats_no_finished_round(engine):
    target = {"target": 0.9}
    assert engine.queue(prompt_of(close={"max_rounds": 2}, reflect=target)).runs == ROUND * 2
    e = engine.queue(prompt_of(close={"max_rounds": 4}, reflect=target))
    assert e.runs == ROUND * 2 and shown(e)[0] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("changed", [{"pick": "last"}, {"accept": 8.0}, {"doubt": 1.0}, {"max_seconds": 999.0}])
def test_a_changed_setting_that_changes_no_decision_repeats_nothing(engine, changed):
    engine.queue(prompt_of())
    assert engine.queue(prompt_of(close=changed)).runs == []


def test_f_a_new_seed_keeps_the_first_thought(engine):
    settings = {"close": {"max_rounds": 4}, "reflect": {"target": 0.9}}
    engine.queue(prompt_of(**settings))
    f = engine.queue(prompt_of(edit={"seed": 2}, **settings))
    assert f.runs == ["Edit", "Reflect", *ROUND * 3]


def test_g_and_h_an_interrupt_keeps_what_was_finished(engine):
    slow = prompt_of(edit={"seed": 3, "step_s": 0.3 if engine.real else 0.0})
    g = engine.queue(slow, interrupt_after=6)
    assert g.interrupted and g.runs == [*ROUND, "Think", "Edit"] and g.seconds < 1
    h = engine.queue(prompt_of(edit={"seed": 3, "step_s": 0.3 if engine.real else 0.0}))
    assert h.runs == ["Edit", "Reflect", *ROUND] and shown(h)[0] == [0.25, 0.5, 0.75]


def test_j_an_error_in_round_two_is_reported_against_the_loop(engine):
    j = engine.queue(prompt_of(edit={"seed": 666}))
    assert j.error[0] == "6" and "made to fail" in j.error[1] and j.runs == [*ROUND, "Think", "Edit"]


def test_i_a_limit_out_of_range_is_refused_before_the_run(engine):
    i = engine.queue(prompt_of(close={"max_rounds": 99}))
    assert "value_bigger_than_max" in i.error[1] and "Reflect" not in i.runs  # a host still runs what hangs on other outputs


# ---- rounds that depend on the decision ----------------------------------------------------------------------------------


def judged(verdicts, **more) -> dict[str, dict]:
    """The test graph with Think inside the loop, seeds from Loop Open, and verdicts from a list."""
    prompt = prompt_of(history=True, edit={"noisy": True, "seed": ["2", 5], "previous": ["2", 6]}, **more)
    prompt["5"] = {
        "class_type": "Test_Judge",
        "inputs": {"source": ["1", 0], "edited": ["4", 0], "goal": ["3", 1], "history": ["2", 3], "verdicts": verdicts},
    }
    prompt["6"]["inputs"]["edited"] = ["4", 1]
    return prompt


def brightness(*seeds):
    """What a chain of noisy edits of a black picture comes to."""
    total = sum(float(torch.rand((), generator=torch.Generator().manual_seed(seed))) / 2 for seed in seeds)
    return pytest.approx(min(total, 1.0), abs=2e-4)


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


# ---- what is refused -----------------------------------------------------------------------------------------------------


def test_a_batch_is_refused_before_anything_runs(engine):
    prompt = prompt_of()
    prompt["1"]["inputs"]["count"] = 2
    outcome = engine.queue(prompt)
    assert outcome.runs == [] and outcome.error[0] == "2" and "found a batch of 2" in outcome.error[1]


def test_a_body_that_ignores_the_loop_is_refused_in_round_one(engine):
    prompt = prompt_of()
    prompt["4"]["inputs"].update(image=["1", 0], instruction="the same")
    outcome = engine.queue(prompt)
    assert "Reflect" not in outcome.runs and "every round would make the same picture" in outcome.error[1]


def test_history_of_another_loop_is_refused(engine):
    prompt = prompt_of()
    prompt["22"] = {"class_type": "ReasonEdit_LoopOpen", "inputs": {"image": ["1", 0], "instruction": "x", "seed": 0}}
    prompt["6"]["inputs"]["history"] = ["22", 3]
    outcome = engine.queue(prompt)
    assert outcome.runs == [] and "Connect the history output of the same Loop Open" in outcome.error[1]


def test_an_empty_instruction_is_refused_before_the_run():
    assert loop.LoopOpen.validate_inputs(instruction=None) is True and loop.LoopOpen.validate_inputs(instruction="x") is True
    assert "found an empty text" in loop.LoopOpen.validate_inputs(instruction=" ")


def test_flow_from_elsewhere_is_refused():
    prompt = prompt_of()
    prompt["6"]["inputs"]["flow"] = ["3", 0]
    outcome = Double("classic").queue(prompt)
    assert "expected `flow` to come from the flow output of a Loop Open node, found node 3 (Test_Think)" in outcome.error[1]


def test_a_history_that_has_ended_cannot_be_continued(engine):
    prompt = judged("success 9 9")
    prompt["22"] = {
        "class_type": "ReasonEdit_LoopOpen",
        "inputs": {"image": ["1", 0], "instruction": "x", "seed": 0, "history": ["6", 4]},
    }
    prompt["23"] = {**prompt["6"], "inputs": {**prompt["6"]["inputs"], "flow": ["22", 0], "history": ["22", 3]}}
    prompt["23"]["inputs"].update(image=["22", 1], verdict=["5", 0])
    del prompt["23"]["inputs"]["edited"], prompt["23"]["inputs"]["goal"]
    prompt["24"] = {"class_type": "Test_Show", "inputs": {"image": ["23", 0]}}
    outcome = engine.queue(prompt)
    assert "ended with success" in outcome.error[1] and outcome.error[0] == "22"


def test_without_a_cache_the_auto_loop_is_recommended(monkeypatch, caplog):
    monkeypatch.setattr(host, "caches_nothing", lambda: True)
    monkeypatch.setattr(loop, "_warned", False)
    outcomes = [Double("classic").queue(prompt_of()) for _ in range(2)]
    assert all(o.error is None for o in outcomes) and caplog.text.count("Auto Loop") == 1
    monkeypatch.setattr(host, "expansion_needs_cache", lambda: True)
    outcome = Double("classic").queue(prompt_of())
    assert outcome.runs == [] and "Auto Loop" in outcome.error[1]


def test_an_error_names_the_round_and_the_inner_node():
    error = ConfigError("too dark")
    expand.name_round(error, "6.round2.4", "Edit")
    assert str(error) == "round 2, node 4 (Edit): too dark" and type(error) is ConfigError
    expand.name_round(first := ConfigError("too dark"), "4", "Edit")
    assert str(first) == "too dark"
    expand.name_round(inner := ConfigError("too dark"), "60.round2.6.round3.4", "Edit")
    assert str(inner) == "round 3, node 4 (Edit): too dark"


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

    system, device, generator = "reasonedit-s", torch.device("cpu"), Painter()

    def request(self, image, instruction, *, seed, steps, guidance, size, negative, references, **rest):
        """The core's request."""
        return EditRequest(image, instruction, seed=seed, steps=4, **rest)

    def expect(self, *_, **__):
        """Sizes."""
        return PLAN


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


# ---- a real host only ----------------------------------------------------------------------------------------------------


def test_memory_stays_flat_over_twenty_runs(engine):
    if not engine.real:
        pytest.skip("the double has no process of its own")
    sizes = []
    for seed in range(26):
        assert engine.queue(prompt_of(edit={"seed": 1000 + seed})).runs
        sizes.append(engine.server.rss())
    assert sizes[-1] - sizes[5] < 20e6, [s // 1_000_000 for s in sizes]


def test_a_server_that_caches_nothing_says_which_node_to_use(servers):
    server = servers("--cache-none")
    runs = [server.run(prompt_of()) for _ in range(2)]
    if runs[0].end == "execution_error":  # engines that cannot expand without a cache
        assert "Auto Loop" in runs[0].told["exception_message"] and runs[0].told["node_id"] == "2"
    else:
        assert runs[1].outputs["8"]["means"] == [0.25, 0.5, 0.75] and server.text().count("Use the node Auto Loop") == 1
