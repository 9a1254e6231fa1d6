"""The arithmetic of the tables, proven on an editor and a reasoner whose every act is planned."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch

from reasonedit.reasonedit_core.errors import MalformedReply
from reasonedit.reasonedit_core.mini.faults import plant
from reasonedit.reasonedit_core.mini.scenes import draw, pixels
from reasonedit.reasonedit_core.types import Decision, Edited, Reflection, Scores, Thought
from reasonedit.training.eval import measure, reflecting, report, tables
from reasonedit.training.eval.arms import Body, best_of, first_edit, loop_of
from reasonedit.training.eval.drawing import GROUPS, draw_tasks
from reasonedit.training.eval.miniature import run_table
from reasonedit.training.eval.store import Store
from reasonedit.training.eval.strands import Answer, ask_one, run_strands

TASKS = draw_tasks(14, 3)
SECONDS = {"think": 1.0, "describe": 2.0, "edit": 10.0, "score": 0.5, "reflect": 4.0}
SERVE = {"work": lambda labels: [Answer(None, SECONDS[label]) for label in labels]}
MEND = "Mend what is wrong."


def work(label):
    ask_one("work", label, label)


class Oracle:
    """Editor and reasoner in one.

    The editor does what clear words say, but for a task in `clumsy` only with its second noise or when told to mend; words
    that are not clear leave the picture as it is. The reasoner thinks rightly and sees everything.
    """

    def __init__(self, clumsy=(), mute=(), blind=False):
        self.tasks = {pixels(draw(task.item.source)).tobytes(): task for task in TASKS}
        self.clumsy, self.mute, self.blind = set(clumsy), set(mute), blind
        self.edits = []

    def task(self, request_or_image):
        return self.tasks[pixels(getattr(request_or_image, "image", request_or_image)).tobytes()]

    # the editor

    def edit(self, request, picture, instruction, rng, *, latents=None, **_):
        work("edit")
        task = self.task(request)
        self.edits.append((task.key, instruction))
        clear = instruction in (task.item.concrete, MEND) or (task.item.clear and instruction == task.item.instruction)
        bad_luck = task.key in self.clumsy and rng.initial_seed() == task.seed and instruction != MEND
        done = clear and not bad_luck
        image = draw(task.item.target if done else plant(task.item, 0, "extra").shown) if clear else picture
        return Edited(image, image, torch.zeros(1, 36, 64))

    # the reasoner

    def bound(self, **_):
        return self

    def think(self, image, instruction, *, feedback=None):
        work("think")
        task = self.task(image)
        if task.key in self.mute:
            raise MalformedReply("no words", "")
        return Thought(instruction, task.item.concrete)

    def describe(self, image, goal, *, original=None):
        work("describe")
        return "as it should be"

    def reflect(self, source, edited, goal, target, *, original=None):
        work("score")
        work("reflect")
        task = self.task(source)
        right = np.array_equal(pixels(edited), pixels(draw(task.item.target)))
        if right or self.blind:
            return Reflection(Decision.SUCCESS, "good", None, Scores(consistency=10.0))
        if torch.equal(edited, source):
            return Reflection(Decision.FAILED, "nothing was done", None, Scores(consistency=0.0))
        return Reflection(Decision.REFINE, "not yet", MEND, Scores(consistency=4.0))


class PlainCodec:
    """A VAE that loses nothing."""

    def encode(self, values):
        return values, None

    def sample(self, moments, rng):
        return moments[0]

    def decode(self, latents):
        return latents


def run(table, tmp_path, oracle, *, batch=4, choose=None, tasks=TASKS, store=None):
    choose = choose or (lambda choice: oracle)

    def opener(choice):
        one = choose(choice)
        reasoner = one if choice.reasoner or choice.reflector else None
        return Body(one, reasoner, MappingProxyType({"steps": 1, "guidance": 1.0}), codec=PlainCodec()), SERVE

    store = store or Store(tmp_path / f"{table.name}.items.jsonl", {"seed": 3})
    made = run_table(table, tasks, store, opener, batch=batch, say=lambda text: None)
    return store, measure.measure(table, store.records, tasks, "oracle", 3), made


def row(measured, system, group):
    return next(one for one in measured["rows"] if (one["system"], one["group"]) == (system, group))


def pair(measured, a, b, group="all"):
    return next(one for one in measured["paired"] if (one["a"], one["b"], one["group"]) == (a, b, group))


CLUMSY = [task.key for task in TASKS if not task.item.clear][:3]


# ---- items ---------------------------------------------------------------------------------------------------------------


def test_items_are_half_concrete_and_spread_over_knowledge():
    counts = {group: sum(group in task.groups for task in draw_tasks(120, 5)) for group in GROUPS}
    assert counts == {"all": 120, "concrete": 60, "abstract": 60, "factual": 20, "conceptual": 20, "procedural": 20}
    counts = {group: sum(group in task.groups for task in draw_tasks(20, 5, "abstract")) for group in GROUPS}
    assert counts == {"all": 20, "concrete": 0, "abstract": 20, "factual": 7, "conceptual": 7, "procedural": 6}


def test_items_follow_from_the_seed_and_more_are_the_same_and_others():
    few, many, other = draw_tasks(8, -1), draw_tasks(20, -1), draw_tasks(8, 2**70)
    assert {task.key for task in few} < {task.key for task in many}
    assert [task for task in many if task.key in {one.key for one in few}] == few
    assert not {task.item for task in few} & {task.item for task in other}
    assert all(task.item.split == "held_out" for task in many)
    assert len({task.seed for task in many}) == 20 and all(0 <= task.seed < 2**62 for task in many)


# ---- loop ----------------------------------------------------------------------------------------------------------------


def test_table_loop(tmp_path):
    """Seven clear items and seven abstract ones, three of which the editor botches with its first noise."""
    store, measured, made = run(tables.LOOP, tmp_path, Oracle(CLUMSY))
    assert made == 3 * 14
    assert set(measured) == {"table", "system", "n", "seed", "rows", "paired"}
    expected = {"table": "loop", "system": "oracle", "n": 14, "seed": 3}
    assert {name: measured[name] for name in expected} == expected
    keys = {"system", "group", "n", "overall", "success", "preservation", "quality", "low", "high", "seconds"}
    assert all(set(one) == keys | {"success_rate", "preservation_rate"} for one in measured["rows"])
    for system in ("base", "think", "reflect", "think+reflect", "concrete-oracle"):
        found = row(measured, system, "concrete")
        assert (found["n"], found["overall"], found["success_rate"], found["preservation_rate"]) == (7, 10, 1, 1)
        assert (found["low"], found["high"]) == (10, 10)
    assert row(measured, "base", "abstract")["success_rate"] == 0
    assert row(measured, "base", "abstract")["overall"] == 0
    assert row(measured, "reflect", "abstract")["overall"] == 0
    thought = row(measured, "think", "abstract")
    assert thought["preservation_rate"] == pytest.approx(4 / 7, abs=1e-4)
    assert thought["success_rate"] == 1  # the botched ones do what is asked and something else too
    overall = [0.0 if task.item.clear else store.records["loop", task.key]["rounds"][0]["judged"]["overall"] for task in TASKS]
    assert thought["overall"] == pytest.approx(sum(overall) / 7, abs=1e-4)
    assert row(measured, "concrete-oracle", "abstract")["overall"] == thought["overall"]
    assert row(measured, "think+reflect", "abstract")["overall"] == 10
    found = pair(measured, "think+reflect", "think", "abstract")
    assert found["difference"] == pytest.approx(10 - thought["overall"], abs=1e-3)
    assert found["low"] <= found["difference"] <= found["high"]
    groups = {one["group"]: one["n"] for one in measured["rows"]}
    assert groups == {"all": 14, "concrete": 7, "abstract": 7, "factual": 3, "conceptual": 2, "procedural": 2}


def test_seconds_are_those_of_the_row_not_of_the_run_it_is_read_from(tmp_path):
    measured = run(tables.LOOP, tmp_path, Oracle(CLUMSY))[1]
    assert row(measured, "base", "concrete")["seconds"] == 10
    assert row(measured, "think", "concrete")["seconds"] == 11
    assert row(measured, "concrete-oracle", "concrete")["seconds"] == 10
    assert row(measured, "think+reflect", "concrete")["seconds"] == 1 + 2 + 10 + 4.5
    # three of seven need a second edit with its reflection
    assert row(measured, "think+reflect", "abstract")["seconds"] == pytest.approx(17.5 + 14.5 * 3 / 7, abs=1e-3)


def test_claims_are_weighed(tmp_path):
    measured = run(tables.LOOP, tmp_path, Oracle(CLUMSY))[1]
    claims = measure.weigh_claims(tables.LOOP, measured)
    assert any(one.startswith("think above base (abstract): found") for one in claims)
    assert any(one.startswith("reflect above base (all): not shown") for one in claims)
    assert claims[-1].startswith("abstract: think+reflect closes")
    worse = {**measured, "paired": [{**one, "low": -3.0, "high": -1.0} for one in measured["paired"]]}
    assert "the opposite was found" in measure.weigh_claims(tables.LOOP, worse)[0]


def test_a_reasoner_that_cannot_speak_returns_the_source(tmp_path):
    mute = [TASKS[0].key]
    store, measured, _ = run(tables.LOOP, tmp_path, Oracle(mute=mute))
    record = store.records["loop", mute[0]]
    assert record["rounds"] == [] and "no words" in record["error"]
    assert row(measured, "think", "concrete")["overall"] == pytest.approx(10 * 6 / 7, abs=1e-3)
    assert row(measured, "base", "concrete")["overall"] == 10


# ---- rounds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_head_of_a_long_run_is_the_short_run(rounds):
    def made(most):
        oracle = Oracle(CLUMSY, blind=False)
        body = Body(oracle, oracle, {"steps": 1, "guidance": 1.0})
        works = [lambda task=task: loop_of(most)(body, task) for task in TASKS]
        return [record for _, record in sorted(run_strands(works, SERVE, width=3), key=lambda one: one[0])]

    for long, short in zip(made(5), made(rounds), strict=True):
        assert best_of(rounds)(long) == best_of()(short)
        assert first_edit(long) == first_edit(short)


def test_table_rounds(tmp_path):
    """Re-rolling helps the clumsy editor too, with its second seed; it pays every roll, the loop only what it needs."""
    measured = run(tables.ROUNDS_TABLE, tmp_path, Oracle(CLUMSY))[1]
    assert row(measured, "rounds-0", "abstract")["overall"] == row(measured, "reroll-0", "abstract")["overall"] < 10
    for number in range(1, 5):
        assert row(measured, f"rounds-{number}", "abstract")["overall"] == 10
        assert row(measured, f"reroll-{number}", "abstract")["overall"] == 10
        # the verdict is not asked of a blind re-roll, the score is
        assert row(measured, f"reroll-{number}", "all")["seconds"] == pytest.approx(3 + 10.5 * (number + 1))
    assert row(measured, "rounds-4", "all")["seconds"] == pytest.approx(17.5 + 14.5 * 3 / 14, abs=1e-3)
    equal = [one for one in measured["paired"] if one["a"] == "rounds-4" and one["group"] == "all"]
    assert [one["b"] for one in equal] == ["rounds-3", "reroll-4", "reroll-1"]
    assert any("rounds-4 above reroll-1 (all, at equal time)" in one for one in _claims(tables.ROUNDS_TABLE, measured))


def _claims(table, measured):
    return measure.weigh_claims(table, measured)


def test_a_blind_reroll_takes_the_highest_score_and_the_earlier_of_equals(tmp_path):
    store = run(tables.ROUNDS_TABLE, tmp_path, Oracle(CLUMSY))[0]
    assert store.records["reroll", CLUMSY[0]]["best"] == [0, 1, 1, 1, 1]
    assert store.records["reroll", TASKS[0].key]["best"] == [0, 0, 0, 0, 0]


# ---- reflector -----------------------------------------------------------------------------------------------------------


def test_table_reflector(tmp_path):
    store, measured, _ = run(tables.REFLECTOR, tmp_path, Oracle())
    right, planted = row(measured, "mended", "right"), row(measured, "mended", "planted")
    assert (right["n"], planted["n"]) == (14, 14)
    assert (right["rejected"], planted["caught"]) == (0, 1)
    assert "caught" not in right and "rejected" not in planted
    assert row(measured, "shown", "right")["overall"] == 10
    wrong = [store.records["planted", task.key] for task in TASKS]
    assert row(measured, "shown", "planted")["overall"] == pytest.approx(
        np.mean([record["shown"]["overall"] for record in wrong]), abs=1e-3
    )
    mended = [10.0 if record["decision"] == "refine" else record["shown"]["overall"] for record in wrong]
    assert planted["overall"] == pytest.approx(np.mean(mended), abs=1e-3)
    assert pair(measured, "mended", "shown", "planted")["difference"] > 0
    kinds = {record["fault"] for record in wrong}
    assert len(kinds) >= 5
    for kind in kinds:
        assert row(measured, "shown", kind)["n"] == sum(record["fault"] == kind for record in wrong)
    assert {"caught", "rejected", "verdicts"} <= set(row(measured, "mended", "all"))


def test_a_blind_reflector_catches_nothing(tmp_path):
    measured = run(tables.REFLECTOR, tmp_path, Oracle(blind=True))[1]
    assert row(measured, "mended", "planted")["caught"] == 0
    assert row(measured, "mended", "right")["rejected"] == 0
    assert row(measured, "mended", "planted")["overall"] == row(measured, "shown", "planted")["overall"]


def test_second_instructions_are_held_against_the_exact_ones():
    wrong = {"expected": "reflection", "decision": "refine", "believed": False, "wanted": "Make it red."}
    found = reflecting.rates([{**wrong, "second": "make it red"}, {**wrong, "second": "Make it blue."}])
    assert found == {"caught": 1, "verdicts": 1, "instructions": 0.5}


# ---- stages and reflection -----------------------------------------------------------------------------------------------


def test_table_stages_asks_for_every_pair_of_editor_and_reasoner(tmp_path):
    seen = []
    good, clumsy, dull = Oracle(), Oracle(CLUMSY), Oracle(mute=[task.key for task in TASKS])

    def choose(choice):
        seen.append((choice.editor, choice.reasoner))
        return dull if choice.reasoner == "base" else good if choice.editor == "shipped" else clumsy

    measured = run(tables.STAGES, tmp_path, None, choose=choose)[1]
    wanted = [("base", None), ("base", "base"), ("base", "reason"), ("edit", None), ("edit", "reason"), ("shipped", "shipped")]
    assert seen == wanted
    assert row(measured, "base+untuned", "all")["overall"] == 0  # it returns every source
    assert row(measured, "base", "concrete")["overall"] == 10
    assert row(measured, "unified", "all")["overall"] == 10


def test_table_reflection_compares_reflectors_on_one_editor(tmp_path):
    seen = []

    def choose(choice):
        seen.append((choice.editor, choice.reasoner, choice.reflector, choice.form))
        return Oracle(CLUMSY, blind=choice.reflector == "dual-image")

    measured = run(tables.REFLECTION, tmp_path, None, choose=choose)[1]
    assert seen[0] == ("shipped", "shipped", None, "multi-round")
    assert [one[2:] for one in seen[1:]] == [(name, name) for name in ("dual-image", "single-image", "multi-round")]
    assert row(measured, "dual-image", "all")["overall"] == row(measured, "think", "all")["overall"]
    assert row(measured, "multi-round", "all")["overall"] == 10


# ---- records -------------------------------------------------------------------------------------------------------------


def test_a_broken_run_goes_on_with_what_is_missing(tmp_path):
    oracle = Oracle(CLUMSY)
    whole = run(tables.LOOP, tmp_path / "whole", oracle)[1]
    broken = Oracle(CLUMSY)
    broken.edit, inner, left = None, broken.edit, [20]

    def edit(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    broken.edit = edit
    with pytest.raises(KeyboardInterrupt):
        run(tables.LOOP, tmp_path, broken)
    path = tmp_path / "loop.items.jsonl"
    before = len(path.read_text().splitlines()) - 1
    assert 0 < before < 42
    path.write_text(path.read_text() + '{"run": "loop", "key": "conc')  # a process that was killed while it wrote
    _, measured, made = run(tables.LOOP, tmp_path, Oracle(CLUMSY))
    assert made == 42 - before
    assert measured == whole
    assert run(tables.LOOP, tmp_path, Oracle(CLUMSY))[2] == 0


def test_more_items_are_added_to_those_that_are_there(tmp_path):
    run(tables.LOOP, tmp_path, Oracle(), tasks=TASKS[:5])
    assert run(tables.LOOP, tmp_path, Oracle())[2] == 3 * 9


def test_records_of_something_else_are_refused(tmp_path):
    from reasonedit.reasonedit_core.errors import ConfigError

    run(tables.LOOP, tmp_path, Oracle(), tasks=TASKS[:2])
    with pytest.raises(ConfigError, match="expected records of seed 4, found such of 3"):
        Store(tmp_path / "loop.items.jsonl", {"seed": 4})


def test_the_width_changes_nothing(tmp_path):
    found = [run(tables.LOOP, tmp_path / str(width), Oracle(CLUMSY), batch=width)[1] for width in (1, 5, 64)]
    assert found[0] == found[1] == found[2]


# ---- report --------------------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_json_says(tmp_path):
    import json

    measured = run(tables.LOOP, tmp_path, Oracle(CLUMSY))[1]
    claims = measure.weigh_claims(tables.LOOP, measured)
    files = report.write_report(measured, tables.LOOP, claims, tmp_path, "Made by hand.")
    assert json.loads((tmp_path / "loop.json").read_text()) == measured
    text = (tmp_path / "loop.md").read_text()
    found = row(measured, "think", "abstract")
    assert f"{found['overall']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" in text
    assert "abstract (7)" in text and "Made by hand." in text and claims[0] in text
    assert all(line.count("|") > 2 for line in text.splitlines() if line.startswith("|"))
    pytest.importorskip("matplotlib")
    assert files[-1].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("table", [tables.ROUNDS_TABLE, tables.REFLECTOR])
def test_every_table_can_be_drawn(tmp_path, table):
    pytest.importorskip("matplotlib")
    measured = run(table, tmp_path, Oracle(CLUMSY))[1]
    assert report.draw(measured, tmp_path / "a.png").stat().st_size > 5000
    assert report.markdown(measured, table, []).startswith(f"### oracle: {table.name}")


def test_one_group_alone(tmp_path):
    tasks = [task for task in TASKS if not task.item.clear]
    measured = run(tables.LOOP, tmp_path, Oracle(CLUMSY), tasks=tasks)[1]
    assert {one["group"] for one in measured["rows"]} == set(GROUPS) - {"concrete"}
    assert measured["n"] == 7


def test_a_task_is_a_value():
    assert replace(TASKS[0]) == TASKS[0]
