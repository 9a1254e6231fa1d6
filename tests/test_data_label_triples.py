"""`reasonedit-data reflection-triples` on the miniature: true verdicts, accepted repairs, refused labels, balance, kills."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mini.judge import judge, read
from reasonedit.reasonedit_core.mini.verdicts import assess_picture
from reasonedit.reasonedit_core.types import Edited
from reasonedit.tests.label_tools import (
    PROMPTS,
    QUICK,
    FakeServer,
    Killed,
    Killer,
    chosen_points,
    join_requests,
    without_times,
)
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.data.label import session
from reasonedit.training.data.label.annotators import EndpointAnnotator, Question, shown
from reasonedit.training.data.label.cli import main
from reasonedit.training.data.label.commands import _own
from reasonedit.training.data.label.editors import LoadedSystem, SystemEditor
from reasonedit.training.data.label.journal import read_journal
from reasonedit.training.data.label.reflection_triples import Options, ReflectionTriples, attempts, balanced
from reasonedit.training.data.label.seeds import read_seeds
from reasonedit.training.data.records import read_records
from reasonedit.training.mini.labelling import PlantedEditor, World, WorldAnnotator, pixels_of, write_seeds

ALL = Options(ratio=None)
SEEDS = 8


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(record file, what is known of it)."""
    folder = tmp_path_factory.mktemp("seeds")
    return write_seeds(folder, SEEDS, 1), World(folder)


def label(out: Path, drawn, *, annotator=None, judge=None, editor=None, options: Options = ALL, limit=None, **more):
    path, world = drawn
    annotator, judge = annotator or WorldAnnotator(world), judge or WorldAnnotator(world, "judge")
    items = attempts(read_seeds(path, limit), [editor or PlantedEditor(world)], options)
    made = lambda runner: ReflectionTriples(runner, annotator, judge, out, options)  # noqa: E731
    return session.run(session.Session(out, QUICK, **more), made, items, name="reflection-triples")


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn):
    """A finished run that keeps all verdicts."""
    out = tmp_path_factory.mktemp("whole")
    return out, label(out, drawn)


# ---- what is written is true


def test_every_record_says_what_its_picture_shows(whole, drawn):
    out, result = whole
    assert result.records > SEEDS and result.check.ok and not result.check.of("warning")
    known = {(each.source, each.item.concrete): each.item for each in drawn[1].known}
    verdicts = Counter()
    for record in read_records(out):
        item = known[record.images.input.sha256, record.editor_instruction]
        found = assess_picture(item.source, item.target, pixels_of(record.picture("generated")), item.language)
        said = record.reflect
        assert (said.verdict, said.reason, said.second_instruction) == (found.verdict, found.reason, found.instruction)
        assert said.scores.consistency == pytest.approx(found.score)
        assert said.findings.model_dump(exclude={"reason"}) == found.findings
        assert read(pixels_of(record.picture("target"))).scene == item.target
        verdicts[said.verdict] += 1
        steps = [step.step for step in record.provenance]
        assert steps[:4] == ["describe", "generate", "score", "decide"] and steps[-1] == "audit"
        assert [step.model for step in record.provenance][-1] == "judge"
        if said.verdict == "reflection":
            assert steps[4:6] == ["re-edit", "score"]
            before, after = (step.score for step in record.provenance if step.step == "score")
            assert before == said.scores.consistency and after >= before + ALL.gain
    assert set(verdicts) == {"success", "reflection", "failed"}


class Right(PlantedEditor):
    """Makes no mistake, so that no result is equal to a negative."""

    def _first(self, one, dice):
        return one.target


def test_negatives_are_planted_and_all_are_failed(tmp_path, drawn):
    label(tmp_path / "out", drawn, editor=Right(drawn[1], "right"), options=replace(ALL, negatives=1.0))
    records = [record for record in read_records(tmp_path / "out") if record.provenance[1].note]
    notes = Counter(record.provenance[1].note for record in records)
    assert set(notes) == {"planted: identity", "planted: wrong"} and {each.reflect.verdict for each in records} == {"failed"}
    for record in records:
        same = record.images.generated.sha256 == record.images.input.sha256
        assert same == (record.provenance[1].note == "planted: identity")


def test_without_a_target_the_accepted_edit_is_the_target(tmp_path, drawn):
    told = [json.loads(line) for line in drawn[0].read_text(encoding="utf-8").splitlines()]
    for each in told:
        each["kind"], each["think"] = "think", {"steps": [each["edit"]["instruction_used"]]}
        del each["images"]["target"]
    path = drawn[0].with_name("targetless.jsonl")
    path.write_text("".join(json.dumps(each) + "\n" for each in told), encoding="utf-8")
    result = label(tmp_path / "out", (path, drawn[1]))
    assert result.check.ok
    known = {(each.source, each.item.concrete): each.item for each in drawn[1].known}
    targets = 0
    for record in read_records(tmp_path / "out"):
        assert (record.images.target is not None) == (record.reflect.verdict == "reflection")
        if record.images.target is not None:
            item = known[record.images.input.sha256, record.editor_instruction]
            assert judge(item.source, item.target, pixels_of(record.picture("target"))).done
            targets += 1
    assert targets > 0


# ---- what is refused


class Stubborn(PlantedEditor):
    """Carries out no second instruction: gives something else, or the same again."""

    def _second(self, pixels, instruction, dice):
        return pixels if dice.below(2) else np.roll(pixels, 8, axis=0)


def test_a_second_instruction_that_does_not_help_is_no_label(tmp_path, drawn):
    label(tmp_path / "out", drawn, editor=Stubborn(drawn[1], "stubborn"), options=replace(ALL, edits=4))
    verdicts = {record.reflect.verdict for record in read_records(tmp_path / "out")}
    assert verdicts == {"success", "failed"}
    reasons = Counter(each["reason"] for each in rejects(tmp_path / "out") if each["step"] == "re-edit")
    assert set(reasons) == {"unchanged", "no-better"}


def test_the_gain_decides(tmp_path, drawn):
    for gain, some in ((1.0, True), (9.9, False)):
        label(tmp_path / "out", drawn, options=replace(ALL, gain=gain))
        assert any(record.reflect.verdict == "reflection" for record in read_records(tmp_path / "out")) == some


class Blind(WorldAnnotator):
    """Sees a success everywhere."""

    def _decide(self, question, told):
        return {"reason": "All is well.", "verdict": "success", "second_instruction": None}


def test_a_verdict_against_the_score_or_a_planted_negative_is_rejected(tmp_path, drawn):
    label(tmp_path / "out", drawn, annotator=Blind(drawn[1], "blind"))
    assert {(each["step"], each["reason"]) for each in rejects(tmp_path / "out")} >= {
        ("decide", "score-disagrees"),
        ("decide", "negative-not-caught"),
    }
    for record in read_records(tmp_path / "out"):
        assert record.reflect.scores.consistency >= ALL.success_at and not record.provenance[1].note


class Mild(WorldAnnotator):
    """A judge that fails nothing."""

    def _audit(self, question, told):
        found = super()._audit(question, told)
        return {**found, "verdict": "success" if found["verdict"] == "failed" else found["verdict"]}


def test_where_the_second_judge_disagrees_nothing_is_written(tmp_path, drawn, whole):
    label(tmp_path / "out", drawn, judge=Mild(drawn[1], "mild"))
    expected = Counter(record.reflect.verdict for record in read_records(whole[0]))
    found = Counter(record.reflect.verdict for record in read_records(tmp_path / "out"))
    assert found == Counter(success=expected["success"], reflection=expected["reflection"])
    assert sum(each["step"] == "audit" for each in rejects(tmp_path / "out")) >= expected["failed"]


@given(
    counts=st.tuples(*[st.integers(0, 12)] * 3),
    ratio=st.tuples(*[st.integers(0, 4)] * 3).filter(any),
)
def test_what_is_written_stands_in_the_ratio_and_is_as_much_as_can_be(counts, ratio):
    verdicts = ("success", "reflection", "failed")
    drafts = [
        {"id": f"{verdict}{number}", "reflect": {"verdict": verdict}}
        for verdict, count in zip(verdicts, counts, strict=True)
        for number in range(count)
    ]
    kept = balanced(drafts, ratio)
    found = [sum(name.startswith(verdict) for name in kept) for verdict in verdicts]
    times = {count // part for count, part in zip(found, ratio, strict=True) if part}
    assert len(times) == 1 and found == [part * next(iter(times)) for part in ratio]
    assert any(count < part * (next(iter(times)) + 1) for count, part in zip(counts, ratio, strict=True) if part)
    assert balanced(list(reversed(drafts)), ratio) == kept and len(balanced(drafts, None)) == sum(counts)


def test_the_run_keeps_the_ratio_and_tells_what_was_left_over(tmp_path, drawn, whole):
    result = label(tmp_path / "out", drawn, options=Options())
    counts = Counter(record.reflect.verdict for record in read_records(tmp_path / "out"))
    assert counts["success"] == 3 * counts["reflection"] == 3 * counts["failed"] > 0
    assert result.report["rejects"]["balance: surplus"] == whole[1].records - result.records


def test_no_picture_is_in_two_splits(tmp_path, drawn):
    result = label(tmp_path / "out", drawn, options=replace(ALL, held_out=0.5, negatives=1.0))
    splits = {}
    for record in read_records(tmp_path / "out"):
        for name in ("input", "generated"):
            splits.setdefault(getattr(record.images, name).sha256, set()).add(record.split)
    assert {"train", "held_out"} == set.union(*splits.values())
    # two sources may by chance be one scene; a planted picture of the other split may not
    assert all(len(found) == 1 for found in splits.values()) and result.check.ok
    assert any(each["reason"] == "other-split" for each in rejects(tmp_path / "out"))


def test_a_picture_that_was_lost_is_made_again(tmp_path, drawn):
    label(tmp_path / "out", drawn, limit=3)
    before = (tmp_path / "out/records.jsonl").read_text(encoding="utf-8")
    made = sorted((tmp_path / "out/pictures").rglob("*.png"))
    made[0].unlink()
    result = label(tmp_path / "out", drawn, limit=3)
    assert made[0].is_file() and result.asked == 0
    assert without_times((tmp_path / "out/records.jsonl").read_text(encoding="utf-8")) == without_times(before)


# ---- kills


def test_killed_anywhere_nothing_is_lost_and_nothing_done_twice(tmp_path, drawn, monkeypatch):
    edits, killers = [], []

    class Counted(PlantedEditor):
        def edit(self, picture, instruction, seed):
            killers[-1].check()
            edits.append((picture.sha256, instruction, seed))
            return super().edit(picture, instruction, seed)

    with FakeServer(WorldAnnotator(drawn[1]), tmp_path / "seen") as server:

        def run(out: Path) -> session.Result:
            first, second = (EndpointAnnotator(server.url, name) for name in ("world", "judge"))
            editor = Counted(drawn[1])
            return label(out, drawn, annotator=first, judge=second, editor=editor, limit=3)

        with monkeypatch.context() as patch:
            killers.append(Killer(patch))
            wanted_result = run(tmp_path / "whole")
        questions, pictures = len(server.asked), Counter(edits)
        assert wanted_result.records > 3 and max(pictures.values()) == 1
        wanted = without_times((tmp_path / "whole/records.jsonl").read_text(encoding="utf-8"))
        for point in chosen_points(killers[0].kinds, 20, seed=5):
            out = tmp_path / f"killed-{point}"
            server.asked.clear()
            edits.clear()
            with monkeypatch.context() as patch:
                killers.append(Killer(patch, point))
                with pytest.raises(Killed):
                    run(out)
                join_requests()
            killers.append(killers[0])
            finished = read_journal(out / "journal.jsonl").entries
            asked = sum(entry.endpoint is not None for entry in finished.values())
            before, edited = len(server.asked), len(edits)
            result = run(out)
            kept = read_journal(out / "journal.jsonl").entries
            assert set(finished) <= set(kept) and all(kept[key] == entry for key, entry in finished.items()), point
            assert 0 <= before - asked <= QUICK.concurrency, f"point {point}: more was lost than was under way"
            assert len(server.asked) == questions + before - asked, point
            # one edit at a time: at most that one is made again
            assert len(edits) == sum(pictures.values()) + edited - (len(finished) - asked), point
            assert edited - (len(finished) - asked) in (0, 1) and set(edits) == set(pictures), point
            assert without_times((out / "records.jsonl").read_text(encoding="utf-8")) == wanted, point
            assert result.check.ok and not list(out.glob(".*.part")), point


# ---- the command and editors


def test_the_command_runs_on_drawn_seeds_and_its_page_shows_triples(tmp_path, drawn, capsys):
    command = ["reflection-triples", str(drawn[0]), "--world", str(drawn[0].parent), "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert json.loads(capsys.readouterr().out)["question"] == "describe@1"
    assert main([*command, "--quiet", "--ratio", "all", "--sample", "2", "--limit", "4"]) == 0
    said = capsys.readouterr().out
    assert "kinds: reflect" in said and "0 errors" in said
    page = (tmp_path / "out/sample.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 2 and "target" in page and "verdict" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://x", "--model", "m", "--editor", "mini-s"], "expected a second judge that is another model"),
        (["--url", "http://x", "--model", "m", "--second-model", "m", "--editor", "mini-s"], "expected a second judge"),
        (["--url", "http://x", "--model", "m", "--no-audit"], "expected editors"),
        (["--url", "http://x", "--model", "m", "--no-audit", "--editor", "a=nowhere"], "expected SYSTEM=DIR"),
        (["--url", "http://x", "--model", "m", "--no-audit", "--editor", "mini-s", "--editor", "mini-s"], "names of their own"),
        (["--ratio", "3:1"], "expected SUCCESS:REFLECTION:FAILED"),
        (["--ratio", "0:0:0"], "expected three whole numbers"),
        (["--gain", "11"], "expected a number from 0 to 10"),
    ],
)
def test_errors_are_told_in_a_sentence_with_code_2(arguments, words, capsys, tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reflection-triples", str(drawn[0]), "--out", "o", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err and list(tmp_path.iterdir()) == []


def test_options_that_are_none_are_refused():
    for values in ({"edits": 0}, {"gain": -1}, {"negatives": 2}, {"success_at": 11}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            Options(**values)


def test_a_system_edits_as_the_first_round_of_the_loop_would(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 6), (10, 20, 30)).save(path)
    calls = []

    class Generator:
        def edit(self, request, picture, instruction, rng):
            calls.append((request, instruction, rng.initial_seed()))
            made = 1 - picture
            return Edited(made, made, None)

    class System:
        defaults = {"steps": 28, "guidance": 6.0, "size_level": 1024, "negative": None}
        generator = Generator()

    loaded = LoadedSystem("mini-s", None)
    monkeypatch.setattr(LoadedSystem, "get", lambda self: System)
    png, size = SystemEditor(loaded, 8).edit(shown(path), "invert it", 5)
    assert size == (8, 6) and SystemEditor(loaded, 8).name == "mini-s:mini-s@8" != SystemEditor(loaded).name
    (tmp_path / "b.png").write_bytes(png)
    assert (pixels_of(tmp_path / "b.png") == np.array([245, 235, 225])).all()
    request, instruction, seed = calls[0]
    assert (request.seed, request.steps, request.guidance, instruction, seed) == (5, 8, 6.0, "invert it", 5)
    assert torch.equal(request.image[0, :, 0, 0], torch.tensor([10, 20, 30]) / 255)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny random weights that edit in two steps."""
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    shutil.copytree(tiny_checkpoint("step1x-v1p2"), folder)
    settings = {"steps": 2, "size_level": 64, "conditioner_pixels": [3136, 3136], "reasoner_pixels": [3136, 3136]}
    (folder / "reasonedit.json").write_text(json.dumps(settings))
    return folder


def test_a_real_system_edits_for_the_pipeline(tmp_path, drawn, weights, capsys):
    command = ["reflection-triples", str(drawn[0]), "--world", str(drawn[0].parent), "--out", str(tmp_path / "out")]
    command += ["--editor", f"reasonedit-s={weights}", "--edits", "1", "--limit", "1", "--negatives", "0", "--ratio", "all"]
    assert main([*command, "--quiet"]) == 0
    (record,) = read_records(tmp_path / "out")
    assert record.reflect.verdict == "failed"  # random weights paint noise, which the judge reads as a spoiled picture
    assert record.provenance[1].model == "reasonedit-s:weights" and record.images.generated.size == (96, 96)


def test_the_own_mllm_annotates_in_process(drawn, weights):
    annotator = _own(weights)
    prompt = replace(PROMPTS["classify"], max_tokens=4)
    picture = read_seeds(drawn[0], 1)[0].picture("input")
    answer = annotator.answer(Question(prompt, {"instruction": "Paint it."}, (picture,)), threading.Event())
    assert isinstance(answer.text, str) and (annotator.name, annotator.endpoint) == ("weights", "local")
