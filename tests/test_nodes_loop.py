"""The loop over a body of stand-ins: cases A to J on our graph runner, and on a real ComfyUI when there is one.

The cases are those of the loop's design: early stop, reuse of finished rounds, changed limits and seeds, interrupt, errors.
Numbers of node runs count the body only (Think, Edit, Reflect), not the nodes that show results.
"""

from __future__ import annotations

import pytest

from reasonedit.tests.graph_runner import install_host

install_host()

from reasonedit.nodes import expand, host, loop  # noqa: E402
from reasonedit.reasonedit_core.errors import ConfigError  # noqa: E402
from reasonedit.tests import loop_engines  # noqa: E402
from reasonedit.tests.loop_engines import ROUND, Double, judged, prompt_of, shown  # noqa: E402

engine, servers = loop_engines.engine, loop_engines.servers


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
    assert g.interrupted and g.runs == [*ROUND, "Think", "Edit"]
    h = engine.queue(prompt_of(edit={"seed": 3, "step_s": 0.3 if engine.real else 0.0}))
    assert h.runs == ["Edit", "Reflect", *ROUND] and shown(h)[0] == [0.25, 0.5, 0.75]


def test_j_an_error_in_round_two_is_reported_against_the_loop(engine):
    j = engine.queue(prompt_of(edit={"seed": 666}))
    assert j.error[0] == "6" and "made to fail" in j.error[1] and j.runs == [*ROUND, "Think", "Edit"]


def test_i_a_limit_out_of_range_is_refused_before_the_run(engine):
    i = engine.queue(prompt_of(close={"max_rounds": 99}))
    assert "value_bigger_than_max" in i.error[1] and "Reflect" not in i.runs  # a host still runs what hangs on other outputs


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
