"""`reasonedit bench`: taking turns, arms as processes, what is missing, the counted loop, and what is printed and written."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from reasonedit.reasonedit_core.bench import (
    arms,
    ceilings,
    command,
    counted,
    full,
    options,
    peer_editplus,
    peer_reflect,
    report,
    timed,
    weights,
)
from reasonedit.reasonedit_core.bench.clock import Budget, deviation, interleave, summary
from reasonedit.reasonedit_core.bench.peers import EDITPLUS, REGIONE, STEP1X, Peers, Place
from reasonedit.reasonedit_core.bench.script import Listening, one_round, three_rounds
from reasonedit.reasonedit_core.bench.small import write_pictures
from reasonedit.reasonedit_core.bench.split import PARTS, TRANSFORMER, Inside, Split
from reasonedit.reasonedit_core.bench.timed import Arm, Found, Group, Options, lacking, run_group
from reasonedit.reasonedit_core.bench.worker import ArmFailed, TooSlow, Worker, forced, steps_of
from reasonedit.reasonedit_core.cli import main
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.kernels import select
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker

posix = pytest.mark.skipif(os.name == "nt", reason="the arm of these tests is a shell script")


# ---- taking turns --------------------------------------------------------------------------------------------------------


def test_arms_take_turns_and_every_second_round_goes_backwards():
    calls = []

    def arm(name):
        return lambda number: calls.append((name, number)) or {"total": float(number)}

    found = interleave({"a": arm("a"), "b": arm("b")}, rounds=3, warmup=1)
    assert calls[:2] == [("a", 0), ("b", 0)], "warm-up"
    assert calls[2:] == [("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 3)]
    assert found["a"] == found["b"] == [{"total": 1.0}, {"total": 2.0}, {"total": 3.0}], "the warm-up is not counted"


def test_ratios_are_medians_over_rounds():
    """A machine that halves its speed from round to round moves both medians and no ratio."""
    ours = [{"total": t, "part": 1.0} for t in (1.0, 2.0, 4.0)]
    theirs = [{"total": 3 * t} for t in (1.0, 2.0, 4.0)]
    found = summary({"ours": ours, "theirs": theirs}, "theirs")
    assert found["ours", "total"].ratio == 3 and found["theirs", "total"].ratio == 1
    assert (found["ours", "total"].median, found["ours", "total"].spread) == (2.0, 1.0)
    assert found["ours", "part"].ratio is None, "the baseline has no such part"
    assert summary({"ours": ours})["ours", "total"].ratio is None
    assert summary({"ours": [{"total": 0.0}]}, "ours")["ours", "total"].ratio is None
    assert deviation([1, 1, 9, 2]) == 0.5


def test_a_budget_ends_the_rounds_but_never_the_first():
    """No round begins that by the longest so far would not end in time; a comparison without any round says nothing."""
    calls = []
    taking_turns = {"a": lambda number: calls.append(number) or {"total": 1.0}}
    assert len(interleave(taking_turns, 5, budget=Budget(0))["a"]) == 1 and calls == [0, 1]
    assert len(interleave(taking_turns, 5, budget=Budget())["a"]) == 5
    spent = Budget(10.0, start=time.monotonic() - 4)
    assert (
        spent.spent >= 4 and spent.left <= 6 and Budget(1.0, start=time.monotonic() - 4).left == 0 and Budget().left == math.inf
    )


# ---- arms as processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def speaker(tmp_path):
    """name -> an interpreter that is a shell script: it ignores what it shall run and follows the protocol as told."""

    def make(name: str, *, seconds: str = "0.5", load: str = "", run: str = "", about: str = '{"about": 1}') -> Place:
        path = tmp_path / name
        lines = ["#!/bin/sh", "echo chatter >&2", load, f"echo '{about}'", "while read number; do", run]
        lines += [f"""echo "{{\\"total\\": {seconds}, \\"number\\": $number}}";""", "done"]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)
        return Place(str(path))

    return make


@posix
def test_a_worker_loads_runs_and_ends(speaker):
    worker = Worker("any.module", {}, python=speaker("arm").python)
    assert worker.ready(20) == {"about": 1}
    assert worker.run(7, 20) == {"total": 0.5, "number": 7}
    worker.close()
    with pytest.raises((ArmFailed, ValueError)):
        worker.run(8, 1)


@posix
def test_a_worker_that_fails_says_why(speaker):
    broken = Worker("any.module", {}, python=speaker("broken", load="echo 'ImportError: no peer' >&2; exit 1").python)
    with pytest.raises(ArmFailed, match="could not load: ImportError: no peer"):
        broken.ready(20)
    broken.close()
    silent = Worker("any.module", {}, python=speaker("silent", load="sleep 60").python)
    with pytest.raises(TooSlow, match="did not load within 0 s"):
        silent.ready(0.2)
    silent._process.kill()
    silent.close()


@posix
def test_a_group_runs_what_it_can_and_names_what_it_cannot(speaker):
    dies = speaker("dies", run='[ "$number" = 2 ] && { echo "out of memory" >&2; exit 1; }')
    contenders = (
        Arm("peer", place=speaker("peer", seconds="3.0")),
        Arm("ours", place=speaker("ours", seconds="1.5")),
        Arm("unable", place=speaker("unable", load="exit 3")),
        Arm("dies", place=dies),
        lacking("absent", "a checkout"),
    )
    found = run_group(Group("g", contenders, ("absent", "peer")), Options(rounds=3))
    entries = {entry["arm"]: entry for entry in found.timed if entry["part"] == "total"}
    assert entries.keys() == {"peer", "ours"}
    assert entries["ours"]["ratio"] == 2.0 and entries["ours"]["baseline"] == "peer"
    assert entries["ours"]["median"] == 1.5 and entries["ours"]["spread"] == 0 and len(entries["ours"]["times"]) == 3
    why = {one["arm"]: one["missing"] for one in found.not_run}
    assert why.keys() == {"unable", "dies", "absent"}
    assert why["absent"] == "a checkout" and "out of memory" in why["dies"] and "could not load" in why["unable"]


@posix
def test_a_part_that_cannot_run_is_named_and_a_total_of_parts_left_out(speaker):
    place = speaker("parts", about='{"left_out": {"flex": "no Triton"}}')
    found = run_group(Group("g", (Arm("parts", job={"apart": True}, place=place),), ()), Options(rounds=1))
    assert found.not_run == ({"group": "g", "arm": "parts, flex", "missing": "no Triton"},)
    assert [entry["part"] for entry in found.timed] == ["number"], "all that it said beside the total"


@pytest.fixture
def clockless(monkeypatch):
    """Workers without processes and a budget without a clock. An arm whose job has `stuck_in` never ends that run, or with
    "load" never loads, whatever time it is given, which is then over."""
    budget = types.SimpleNamespace(left=90.0)
    limits = []

    class Stand:
        def __init__(self, module, job, **place):
            self.job = job

        def work(self, what, limit):
            limits.append(limit)
            if self.job.get("stuck_in") == what:
                budget.left -= limit
                raise TooSlow(f"it did not end within {limit:.0f} s")

        def ready(self, limit):
            self.work("load", limit)
            return {}

        def run(self, number, limit):
            self.work(number, limit)
            return {"total": 1.0}

        def dismiss(self):
            pass

        def close(self, seconds):
            pass

    monkeypatch.setattr(timed, "Worker", Stand)
    return budget, limits


@pytest.mark.parametrize(("stuck_in", "rounds"), [("load", 3), (0, 0), (1, 0), (3, 2)])
def test_what_the_time_is_not_enough_for_is_out_of_time(clockless, stuck_in, rounds):
    """A group's share bounds loading, the budget of the command bounds runs. Rounds that all arms had ended count."""
    budget, limits = clockless
    group = Group("g", (Arm("stuck", job={"stuck_in": stuck_in}), Arm("quick")), ("quick",))
    found = run_group(group, Options(rounds=3), budget=budget, share=Budget(60.0))
    assert all(limit <= 60.0 for limit in limits[:2]) and all(limit == 90.0 for limit in limits[2:] if stuck_in != "load")
    left_out = {"stuck"} if stuck_in == "load" else set() if rounds else {"stuck", "quick"}
    assert {one["arm"] for one in found.not_run} == left_out
    assert all(one["missing"].startswith("out of time") for one in found.not_run)
    assert {entry["arm"]: len(entry["times"]) for entry in found.timed} == (
        {name: rounds for name in ("stuck", "quick") if name not in left_out} if rounds else {}
    )


def test_without_a_budget_an_arm_that_takes_too_long_is_its_own_fault(clockless):
    """The usual limits hold, the others go on, and time is not what there was too little of."""
    _, limits = clockless
    found = run_group(Group("g", (Arm("stuck", job={"stuck_in": 2}), Arm("quick")), ()), Options(rounds=2), budget=Budget())
    assert found.not_run == ({"group": "g", "arm": "stuck", "missing": "it did not end within 600 s"},)
    assert {entry["arm"]: len(entry["times"]) for entry in found.timed} == {"quick": 2} and set(limits) == {600.0}


@pytest.mark.parametrize("backend", [None, "cudnn", "flash", "efficient", "math"])
def test_a_forced_attention_answers_what_torch_answers(backend):
    q = torch.randn(1, 2, 5, 8)
    with forced(backend):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert [steps_of({"steps": 28, "warm_steps": 4}, number) for number in (0, 1)] == [4, 28]
    assert steps_of({"steps": 28}, 0) == 28


def test_a_group_without_arms_that_run():
    found = run_group(Group("g", (lacking("a", "all"),), ("a",)), Options())
    assert found == Found((), ({"group": "g", "arm": "a", "missing": "all"},))


@pytest.mark.slow
def test_our_arm_and_diffusers_make_the_same_picture(tmp_path):
    """The processes as they are: one round of ReasonEdit-Q beside the installed diffusers, on equal weights."""
    options = Options(rounds=1, warmup=1, steps=2)
    group = timed.small_groups(tmp_path, Peers(), options)[1]
    found = run_group(group, options)
    assert found.not_run == ()
    entries = {entry["arm"]: entry for entry in found.timed if entry["part"] == "total"}
    assert entries.keys() == {EDITPLUS, timed.OURS} and entries[timed.OURS]["difference"] < 0.1
    assert all(0 < entry["median"] for entry in found.timed)


# ---- peers ---------------------------------------------------------------------------------------------------------------


def test_missing_peers_are_named(tmp_path):
    assert "--peers DIR" in Peers().step1x().missing and "DIR/step1x" in Peers().step1x().missing
    assert "pipeline_step1x_edit_v1p2.py" in Peers(tmp_path).step1x().missing
    assert Peers(tmp_path).regione().missing == Peers(tmp_path).step1x().missing
    assert Peers().editplus() == Place(sys.executable), "diffusers is installed"


@pytest.mark.parametrize("inner", ["step1x/src", "step1x"])
def test_peers_are_found_in_a_checkout_or_unpacked(tmp_path, inner):
    file = tmp_path / inner / "diffusers/pipelines/step1x_edit/pipeline_step1x_edit_v1p2.py"
    file.parent.mkdir(parents=True)
    file.touch()
    place = Peers(tmp_path, Path(sys.executable)).step1x()
    assert place == Place(sys.executable, (str((tmp_path / inner).resolve()),))
    assert "RegionE/Step1XEditV1P2/inplace.py" in Peers(tmp_path).regione().missing
    assert "--peer-python" in Peers(tmp_path, tmp_path / "nothing").step1x().missing
    region = tmp_path / "RegionE/RegionE/Step1XEditV1P2/inplace.py"
    region.parent.mkdir(parents=True)
    region.touch()
    found = Peers(tmp_path).regione()
    assert found.missing is None and found.paths == (*place.paths, str((tmp_path / "RegionE").resolve()))


def test_small_groups_name_every_arm_of_the_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr("reasonedit.reasonedit_core.bench.small.write_checkpoint", lambda system, folder: folder)
    s, q, *regions, reflection = timed.small_groups(tmp_path, Peers(), Options(rounds=1))
    assert s.baselines[0] == STEP1X and {arm.name for arm in s.arms if arm.missing is None} == {timed.OURS}
    for group in regions:
        ours = [arm for arm in group.arms if arm.name != REGIONE]
        assert [arm.name for arm in ours] == [timed.OURS, *timed.REGION_ARMS] and group.baselines == (timed.OURS,)
        assert all(arm.missing is None for arm in ours) and all(arm.job["steps"] == 28 for arm in group.arms)
    theirs = [arm for group in regions for arm in group.arms if arm.name == REGIONE]
    assert len(theirs) == 1 and "--peers DIR" in theirs[0].missing, "beside our arms of ReasonEdit-S"
    assert (theirs[0].job["words"], theirs[0].job["edited"]) == (timed.REGION_WORDS, timed.REGION_SHARE)
    assert all(arm.missing is None for arm in q.arms)
    assert {arm.name for arm in reflection.arms} == {"released reasoner", timed.STOCK, "ours", timed.ACCEPTED, timed.GUESSED}
    jobs = [arm.job for group in (s, q, *regions, reflection) for arm in group.arms if arm.job]
    json.dumps(jobs)  # they go to the processes as JSON
    assert {job["sdpa"] for job in jobs} == {"flash"}, "one backend in all arms"
    assert len({job["out"] for job in jobs if "out" in job}) == sum("out" in job for job in jobs), "a folder for each arm"
    questions = timed.questions()
    assert list(questions) == ["describe", "score", "reflect", "edit_score", "quality_score"]
    assert [len(questions[task]["images"]) for task in questions] == [1, 1, 2, 2, 1], "as the released reasoner shows them"


def test_regione_runs_beside_our_regions_where_there_is_a_card(monkeypatch):
    monkeypatch.setattr(Peers, "regione", lambda self: Place("their python"))
    for device, missing in (("cpu", "no CUDA device (RegionE's linear layers are Triton kernels)"), ("cuda", None)):
        group = timed.region_group(lambda name, device=device, **more: {"device": device, **more}, "any", Peers())
        theirs = group.arms[-1]
        assert theirs.name == REGIONE and theirs.missing == missing
        assert theirs.job["regione"] and theirs.job["steps"] == theirs.job["warm_steps"] == 28, "it knows no other number"
    assert REGIONE not in {arm.name for arm in timed.region_group(lambda name, **more: dict(more), "any").arms}


def test_a_cpu_has_no_choice_of_attention():
    """Why small groups have no arm of our own choice: it would be the same arm again."""
    q, k, v = (torch.randn(1, 40, 2, 32) for _ in range(3))
    assert select("auto", q, k, v).name == "sdpa"
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    free = torch._fused_sdp_choice(*heads)
    with forced(timed.SDPA["cpu"]):
        assert torch._fused_sdp_choice(*heads) == free


# ---- where time goes -----------------------------------------------------------------------------------------------------


class Body(torch.nn.Module):
    """What hooks look for in a Qwen2.5-VL."""

    class Text(torch.nn.Module):
        def forward(self, inputs_embeds):
            return inputs_embeds

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.visual, self.model.language_model = torch.nn.Identity(), Body.Text()


def test_the_parts_of_a_reflection(monkeypatch):
    """Every look at the clock takes one second, so that parts count what happened between."""
    from reasonedit.reasonedit_core.bench import split as module

    seconds = iter(range(1000))
    monkeypatch.setattr(module, "now", lambda device: float(next(seconds)))
    model = Body()
    watch = Split(model)
    watch.reset()
    model.model.visual(torch.ones(1))
    with watch.speaking():
        model.model.language_model(inputs_embeds=torch.ones(1, 5, 2))
        for _ in range(3):
            model.model.language_model(inputs_embeds=torch.ones(1, 1, 2))
    model.model.language_model(inputs_embeds=torch.ones(1, 1, 2))  # outside an answer
    parts = watch.parts()
    assert parts["vision"] == 1 and parts["prefill"] == 1
    assert parts["decode"] == 4, "from the end of the prefill to the end of the answer: three looks, and the last one"
    assert parts["prefill + decode"] == 5 and parts["images"] > 0
    watch.close()
    model.model.visual(torch.ones(1))
    assert watch.parts()["vision"] == 1, "the hooks are gone"


def test_seconds_inside_a_module():
    layer = torch.nn.Identity()
    inside = Inside(layer)
    layer(torch.ones(1))
    assert inside.seconds > 0
    inside.reset()
    assert inside.seconds == 0
    other = Inside()
    assert other.around(lambda x, y: x + y)(1, y=2) == 3 and other.seconds > 0


# ---- the counted loop ----------------------------------------------------------------------------------------------------


def test_the_counted_loop_meets_the_bar():
    loop = counted.loop()
    assert loop["rounds"] == 3
    assert loop["vision_passes"] <= 7, "the source and two results in both roles, and the last result (released: 34)"
    assert loop["sequential_calls"] <= 3, "describe, the scores in one batch, the verdict (released: 5)"
    assert loop["generate_calls"] == 2 + 3 * 2 + 2 * 2 and loop["retries"] == 0, "the accepted round is not graded"
    assert 0 < loop["decode_steps"] <= (2 + 3 * 2 + 1) * 24, "rows of a batch share their steps"
    assert loop["prefill_tokens"] > 0 and loop["condition_tokens"] > 0


class Tower(torch.nn.Module):
    def forward(self, x, grid_thw):
        return x


def test_listening_counts_what_the_mllm_does():
    """With a fake speaker: two pictures in one batch count two, an unreadable answer is noticed, a verdict ends a chain."""
    model = Body()
    model.model.visual = Tower()
    text = model.model.language_model

    class Speaker:
        def answer(self, queries, *, on_text=None, should_stop=None):
            assert all(query.max_new_tokens == 24 for query in queries)
            model.model.visual(torch.ones(1), grid_thw=torch.ones(2, 3))
            text(inputs_embeds=torch.ones(1, 30, 2))
            for query in queries:
                on_text(query.task, "a")
            text(inputs_embeds=torch.ones(len(queries), 1, 2))
            said = {"score": "{", "quality_score": three_rounds()["quality_score"][0]}
            return [said.get(query.task, "a reply") for query in queries]

    listening = Listening(types.SimpleNamespace(model=model), Speaker(), ScriptedSpeaker(three_rounds()))
    query = Query("describe", "", (), ())
    text(inputs_embeds=torch.ones(1, 9, 2))
    listening.answer([Query("think", "", (), ())])
    listening.answer([query])
    pair = [Query("score", "", (), ()), Query("quality_score", "", (), ())]
    assert listening.answer(pair)[0] == three_rounds()["score"][0]
    heard = listening.heard
    listening.note(types.SimpleNamespace(rounds=[types.SimpleNamespace(reflection=None)]))
    assert (heard.chain, heard.chains) == (2, []), "thinking is no part of a round, an edit does not end it"
    listening.note(types.SimpleNamespace(rounds=[types.SimpleNamespace(reflection=object())]))
    assert (heard.chain, heard.chains) == (0, [2])
    assert (heard.vision_passes, heard.queries, heard.unreadable) == (6, 4, 1)
    assert (heard.prefill_tokens, heard.condition_tokens, heard.decode_steps) == (90, 9, 3)
    listening.close()
    model.model.visual(torch.ones(1), grid_thw=torch.ones(2, 3))
    assert heard.vision_passes == 6


def test_scripts_hold_enough_replies():
    assert {task: len(texts) for task, texts in one_round(4).items()} == dict.fromkeys(three_rounds(), 4)


# ---- report and command --------------------------------------------------------------------------------------------------


def work(gb: float, kernels: int, flops: float = 169.25e12) -> dict:
    return {"flops": flops, "elementwise_bytes": int(gb * 1e9), "kernels": kernels, "custom_ops": ["reasonedit::x"]}


COUNTED = {
    "step1x": {**work(38.8, 801), "later": work(38.8, 800)},
    "qwen_image": {**work(59, 500), "later": work(59, 500)},
    "qwen_image_diffusers": work(295, 4534),
    "loop": {
        "rounds": 3,
        "vision_passes": 7,
        "generate_calls": 14,
        "sequential_calls": 3,
        "prefill_tokens": 100,
        "condition_tokens": 50,
        "decode_steps": 20,
        "retries": 0,
    },
}
ENTRY = {"group": "g", "arm": "ours", "part": "total", "median": 0.5, "spread": 0.01, "ratio": 2.0, "baseline": "peer"}
ENTRY |= {"times": [0.5, 0.5]}
NOT_RUN = {"group": "g", "arm": "region", "missing": "a checkout"}


def test_the_report_puts_the_ratio_first():
    lines = report.counted_lines(COUNTED)
    assert lines[1].split()[:4] == ["0.100x", "bytes", "0.250x", "ops"] and lines[1].endswith("step1x")
    assert any(line.split()[0] == "0.200x" and line.endswith("qwen_image") for line in lines)
    assert "      7  pictures through the vision tower (released 34)" in "\n".join(lines)
    lines = report.timed_lines([ENTRY], [NOT_RUN])
    assert lines[0] == "timed, g (runs in turn: 2; ratio to: peer)"
    assert lines[1].split()[0] == "2.00x" and lines[1].endswith("ours")
    assert lines[2] == "  not run: a checkout  [region]"


def test_counts_of_the_released_code_replace_the_figures_where_it_was_at_hand():
    here = {**COUNTED, "step1x_released": work(77.6, 1602)}
    assert report.counted_lines(here)[1].split()[:3] == ["0.500x", "bytes", "0.500x"]
    failed = {**COUNTED, "step1x_released": {"missing": "no module"}}
    assert report.counted_lines(failed)[1].split()[0] == "0.100x"
    assert "not counted here: no module" in "\n".join(report.counted_lines(failed))


def test_the_plot(tmp_path, monkeypatch):
    assert report.plot([], tmp_path / "a.png") == "arms that ran"
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in report.plot([ENTRY], tmp_path / "a.png") and not (tmp_path / "a.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    parts = [{**ENTRY, "group": "without a total", "part": part} for part in ("one", "two")]
    assert report.plot([ENTRY, {**ENTRY, "group": "other", "ratio": None}, *parts], tmp_path / "new" / "a.png") is None
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(counted, "measure", lambda peers, budget: COUNTED)


def test_counted_alone_prints_and_writes(tmp_path, monkeypatch, capsys, no_work):
    monkeypatch.setattr(command, "small_groups", lambda *args: pytest.fail("--counted times nothing"))
    assert main(["bench", "--counted", "--json", str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("machine: ") and out[-1] == f"written: {tmp_path / 'b.json'}"
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["machine"]["cores"] >= 1 and found["machine"]["torch"] == torch.__version__
    for system in ("step1x", "qwen_image"):
        assert {"flops", "elementwise_bytes", "kernels"} <= found["counted"][system].keys()
    promised = "vision_passes generate_calls sequential_calls prefill_tokens decode_steps retries"
    assert set(promised.split()) <= found["counted"]["loop"].keys()
    assert found["timed"] == found["not_run"] == [] and not (tmp_path / "b.png").exists()


def test_timed_arms_are_printed_written_and_drawn(tmp_path, monkeypatch, capsys, no_work):
    seen = {}

    def groups(folder, peers, options):
        seen.update(peers=peers, options=options)
        return ["one", "two"]

    monkeypatch.setattr(command, "small_groups", groups)
    monkeypatch.setattr(command, "run_group", lambda group, options, say: Found(({**ENTRY, "group": group},), (NOT_RUN,)))
    options = ["--rounds", "3", "--steps", "2", "--threads", "2", "--peers", str(tmp_path), "--quiet"]
    assert main(["bench", *options, "--json", str(tmp_path / "b.json")]) == 0
    assert seen["options"] == Options(rounds=3, steps=2, threads=2) and seen["peers"] == Peers(tmp_path)
    found = json.loads((tmp_path / "b.json").read_text())
    assert [entry["group"] for entry in found["timed"]] == ["one", "two"] and found["not_run"] == [NOT_RUN] * 2
    assert {"arm", "median", "spread", "ratio"} <= found["timed"][0].keys()
    said = capsys.readouterr()
    assert said.out.count("not run: a checkout") == 2 and f"plot: {tmp_path / 'b.png'}" in said.out
    assert not said.err


def test_full_size_needs_its_option_and_a_card(monkeypatch, capsys, no_work):
    assert main(["bench", "--size", "full"]) == 2
    assert "--random-weights" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--size", "full", "--random-weights"]) == 0
    out = capsys.readouterr().out
    assert out.count("not run: no CUDA device") == len(full.NAMES)


def test_full_size_groups_are_planned_within_ten_minutes(tmp_path):
    plan = full.plan(tmp_path, Peers())
    assert [group.name for group, _, _ in plan] == list(full.NAMES)
    assert sum(about for _, _, about in plan) + full.COUNTING + options.RESERVE <= options.SECONDS == 600
    json.dumps([arm.job for group, _, _ in plan for arm in group.arms])
    edits = next(group for group, _, _ in plan if group.name.startswith("edit, ReasonEdit-S"))
    jobs = {arm.name: arm.job for arm in edits.arms if arm.job}
    assert {job["steps"] for job in jobs.values()} == {28} and {job["level"] for job in jobs.values()} == {1024}
    assert jobs[timed.OURS]["sdpa"] == jobs[STEP1X]["sdpa"] == "cudnn" and jobs[full.OWN_CHOICE]["sdpa"] is None
    regions = next(group for group, _, _ in plan if group.name.startswith("edit with a region"))
    asked = [(arm.job.get("region"), arm.job.get("reuse")) for arm in regions.arms]
    assert asked == [(None, None), (0.25, False), (0.25, True), (None, None)] and regions.arms[-1].name == REGIONE
    assert len({arm.job["out"] for arm in (*edits.arms, *regions.arms)}) == len((*edits.arms, *regions.arms))
    edits_q = next(group for group, _, _ in plan if group.name.startswith("edit, ReasonEdit-Q"))
    assert [arm.name for arm in edits_q.arms] == [EDITPLUS, timed.OURS, full.OWN_CHOICE]
    assert [arm.job["sdpa"] for arm in edits_q.arms] == ["cudnn", "cudnn", None]
    assert all(arm.missing is None and arm.job["tidy"] for arm in edits_q.arms), "diffusers is installed"
    attention = next(group for group, _, _ in plan if group.name.startswith("ceilings"))
    assert attention.baselines == (ceilings.FLEX,) and {arm.job["kind"] for arm in attention.arms} == {"card", *ceilings.KINDS}


def test_the_time_of_full_size_is_that_of_the_whole_command(monkeypatch):
    seen = {}
    monkeypatch.setattr(counted, "measure", lambda peers, budget: seen.update(counting=budget) or COUNTED)
    monkeypatch.setattr(full, "run_full", lambda folder, peers, tell, say, within: seen.update(timing=within) or Found())
    assert main(["bench", "--size", "full", "--random-weights"]) == 0
    assert seen["counting"] is seen["timing"] and seen["timing"].seconds == options.SECONDS - options.RESERVE
    monkeypatch.setattr(command, "small_groups", lambda *args: [])
    assert main(["bench"]) == 0
    assert seen["counting"].seconds == math.inf


TINY_S = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "connector_depth": 1}
TINY_S |= {"axes_dims_rope": (4, 6, 6), "joint_attention_dim": 64, "connector_hidden_size": 64, "connector_heads_num": 4}
TINY_Q = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
TINY_VAE_Q = {"base_dim": 16, "num_res_blocks": 1}
TINY_VAE = {**weights.FLUX_VAE, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture
def small_networks(monkeypatch):
    """The arms of the full size as they are, around networks that a processor can run; bfloat16, random weights."""
    from reasonedit.reasonedit_core.models import step1x_transformer

    monkeypatch.setattr(
        step1x_transformer,
        "Step1XEditTransformer2DModel",
        partial(step1x_transformer.Step1XEditTransformer2DModel, **TINY_S),
    )
    monkeypatch.setattr(weights, "QWEN_DIT", TINY_Q)
    monkeypatch.setattr(weights, "QWEN_VAE", TINY_VAE_Q)
    monkeypatch.setattr(weights, "FLUX_VAE", TINY_VAE)
    monkeypatch.setattr(weights, "MLLM_7B", {})
    monkeypatch.setattr(weights, "VISION_7B", {})
    monkeypatch.setattr(counted, "GRID", (4, 4))


@pytest.mark.parametrize(("system", "stock"), [("reasonedit-s", False), ("reasonedit-q", False), ("reasonedit-q", True)])
def test_forward_arms_of_the_full_size(system, stock, small_networks):
    run = arms.forward({"system": system, "device": "cpu", "stock": stock})
    with torch.no_grad():
        assert run(0) is None


@pytest.mark.parametrize("system", ["reasonedit-s", "reasonedit-q"])
def test_a_forced_backend_of_sdpa_leaves_our_arm_no_other_attention(system, small_networks):
    job = {"system": system, "device": "cpu"}
    assert [arms._denoiser({**job, "sdpa": sdpa}).backend for sdpa in ("cudnn", None)] == ["sdpa", "auto"]


def test_the_edit_arm_of_the_full_size(tmp_path, small_networks):
    from PIL import Image

    pictures = write_pictures(tmp_path, 1, (64, 48))
    job = {"system": "reasonedit-s", "size": "full", "device": "cpu", "steps": 2, "level": 64, "guidance": 6.0}
    run = arms.edit({**job, "pictures": pictures, "out": str(tmp_path)})
    assert run(0)[TRANSFORMER] > 0
    assert Image.open(tmp_path / "000.png").size == (64, 48)


def test_the_full_size_of_editplus_makes_the_picture_of_our_arm(tmp_path, small_networks, monkeypatch):
    """Both as they are at full size but for the networks: equal weights, words, draws and steps, no MLLM on either side."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    for name in ("calculate_dimensions", "VAE_IMAGE_SIZE"):
        monkeypatch.setattr(module, name, getattr(module, name))  # what the arm changes is put back
    pictures = write_pictures(tmp_path, 1, (64, 64))
    job = {"system": "reasonedit-q", "size": "full", "device": "cpu", "steps": 3, "level": 64, "guidance": 4.0}
    outs = [tmp_path / name for name in ("peer", "ours")]
    for out in outs:
        out.mkdir()
    job |= {"pictures": pictures, "instruction": "make the cube red"}
    pipe = peer_editplus.full_pipeline(job)
    assert pipe.text_encoder is None and pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert peer_editplus.edit(pipe, {**job, "out": str(outs[0])})(0)[TRANSFORMER] > 0
    with torch.no_grad():
        assert arms.edit({**job, "out": str(outs[1])})(0)[TRANSFORMER] > 0
    assert timed.picture_difference(*map(str, outs)) < 1.0, "of 255; bfloat16 rounds at other places"


def test_the_defaults_of_diffusers_are_the_released_sizes():
    """What an empty QWEN_DIT and QWEN_VAE stand for."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    with torch.device("meta"):
        dit, vae = QwenImageTransformer2DModel(**weights.QWEN_DIT), AutoencoderKLQwenImage(**weights.QWEN_VAE)
    assert (dit.config.num_layers, dit.config.num_attention_heads, dit.config.attention_head_dim) == (60, 24, 128)
    assert round(sum(x.numel() for x in dit.parameters()) / 1e9, 2) == 20.43 and dit.config.joint_attention_dim == weights.WIDTH
    assert (vae.config.base_dim, vae.config.z_dim, list(vae.config.dim_mult)) == (96, 16, [1, 2, 4, 4])


def test_the_reflection_arm_of_the_full_size(tmp_path, small_networks):
    from reasonedit.reasonedit_core.mini.builder import build_checkpoint

    pictures = write_pictures(tmp_path, 2, (64, 48))
    folder = build_checkpoint("qwen2.5-vl", tmp_path / "mllm")
    run = arms.reflect({"size": "full", "device": "cpu", "folder": str(folder), "pictures": pictures, "tokens": 3})
    with torch.no_grad():
        parts = run(0)
    assert set(parts) == set(PARTS) and all(seconds > 0 for seconds in parts.values())


def test_answers_of_the_peer_are_short_in_its_warm_up_only(monkeypatch):
    asked = []
    model = Body()
    model.generate = lambda **options: asked.append((options["max_new_tokens"], options["min_new_tokens"]))
    monkeypatch.setattr(peer_reflect, "load", lambda job: (model, None))
    monkeypatch.setattr(peer_reflect, "stock", lambda model, processor, job: lambda number: model.generate(max_new_tokens=1))
    monkeypatch.setattr(peer_reflect, "start", json.loads)
    monkeypatch.setattr(peer_reflect, "serve", lambda job, run, about: [run(number) for number in (0, 1)])
    job = {"device": "cpu", "arm": "stock", "tokens": 128}
    peer_reflect.main(json.dumps(job | {"warm_tokens": 8}))
    peer_reflect.main(json.dumps(job))
    assert asked == [(8, 8), (128, 128), (128, 128), (128, 128)]


@pytest.fixture
def tiny_ceilings(monkeypatch):
    """The calls of the ceilings on shapes for a processor, FlexAttention uncompiled."""
    sizes = {"SIDE": 16, "COPIED": 64, "TOKENS": 40, "PARTIAL": 8, "HEADS": 2, "DIM": 16, "REPEATS": 2}
    sizes["PACKS"] = {"packed, equal": (12, 12), "packed, unequal": (5, 19, 16)}
    for name, value in sizes.items():
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr(ceilings, "compiled", lambda call: call)


def dense_attention(q, k, v, lengths):
    """(1, L, H, D) in float32. lengths: of the documents of a pack, or None."""
    mask = None
    if lengths is not None:
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = documents[:, None] == documents[None]
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("kind", ceilings.KINDS)
def test_the_arms_of_attention_compute_attention(kind, tiny_ceilings):
    """Each part against plain torch in float32; what this machine lacks is named, never dropped."""
    parts, left_out, _ = ceilings.usable(ceilings.calls(kind, "cpu"), "cpu")
    dense = {f"{name}, {ceilings.FORWARD}" for name in (ceilings.DENSE_PART, ceilings.PARTIAL_PART)}
    forward, both = ({f"{name}, {what}" for name in ceilings.PACKS} for what in (ceilings.FORWARD, ceilings.BOTH))
    assert {**parts, **left_out}.keys() == (dense if kind != "varlen" else set()) | forward | both <= ceilings.work().keys()
    assert all(left_out.values())
    runs_here = {"flex": dense | forward, "flash": dense | forward | both, "auto": dense | forward | both}
    assert parts.keys() == runs_here.get(kind, set()), "FlexAttention has no backward on a CPU, the others need a card"
    for name, call in parts.items():
        _, q, k, v, *grads = call.args
        lengths = next((lengths for pack, lengths in ceilings.PACKS.items() if name.startswith(pack)), None)
        q, k, v = (x.float().requires_grad_() for x in (q, k, v))
        want = dense_attention(q, k, v, lengths)
        got, want = (call(), torch.autograd.grad(want, (q, k, v), grads[0].float())) if grads else ((call(),), (want,))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.float(), other.detach(), atol=3e-2, rtol=3e-2)


def test_the_process_of_a_ceiling(tiny_ceilings, monkeypatch):
    said = {}
    monkeypatch.setattr(ceilings, "start", json.loads)
    monkeypatch.setattr(ceilings, "serve", lambda job, run, about: said.update(parts=run(0), **about))
    ceilings.main(json.dumps({"kind": "card", "device": "cpu"}))
    assert said["parts"].keys() == {"matmul 8192", "copy 1 GiB", ceilings.FIRST} and said["left_out"] == {}
    ceilings.main(json.dumps({"kind": "varlen", "device": "cpu"}))
    assert said["parts"] == {} and all("CUDA" in why for why in said["left_out"].values()), "not even its first calls"


def test_rates_are_told_by_arm():
    entries = [{**ENTRY, "arm": arm, "part": "matmul 8192", "median": 2.0} for arm in ("one", "two")]
    lines = full.rates(Found((*entries, ENTRY)))
    assert [line.split()[1:] for line in lines] == [["TFLOP/s", f"{arm},", "matmul", "8192"] for arm in ("one", "two")]


def test_packs_hold_what_their_names_say():
    assert [sum(lengths) for lengths in ceilings.PACKS.values()] == [16384, 32768]
    assert all(name.split()[1].rstrip(",") == str(sum(lengths)) for name, lengths in ceilings.PACKS.items())


def test_random_weights_are_no_zeros_and_have_one_seed():
    one, two = (weights.random_network(lambda: torch.nn.Linear(4, 5), "cpu", torch.bfloat16) for _ in range(2))
    assert torch.equal(one.weight, two.weight) and one.weight.dtype == torch.bfloat16 and bool(one.weight.any())
    assert torch.get_default_dtype() == torch.float32
    words = weights.random_words("cpu", torch.bfloat16)
    assert words.tokens.shape == (1, 640, 3584) and int(words.text_mask.sum()) == 32 and words.positions.shape == (640, 3)


def test_full_size_stops_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    abouts = {"first": 5.0, "second": 50.0, "third": 4.0}
    groups = [(Group(name, (), ()), Options(), about) for name, about in abouts.items()]
    shares = {}

    def run(group, options, say, *, budget, share):
        shares[group.name] = (budget, share.seconds)
        return Found(({**ENTRY, "group": group.name},))

    monkeypatch.setattr(full, "plan", lambda folder, peers: groups)
    monkeypatch.setattr(full, "run_group", run)
    told, within = [], Budget(20)
    found = full.run_full(tmp_path, Peers(), told.append, lambda text: None, within)
    assert [entry["group"] for entry in found.timed] == ["first", "third"], "what still fits runs"
    assert [one["group"] for one in found.not_run] == ["second"] and found.not_run[0]["missing"].startswith("out of time (")
    assert any("not run: out of time" in line for line in told)
    assert all(budget is within for budget, _ in shares.values())
    assert shares["first"][1] == 5.0, "no more than its own while the others' would be missing"
    assert 4.0 < shares["third"][1] <= 20.0, "the last has all that is left"
