"""`reasonedit-data from-traces`: what the artist said of saved runs becomes records, and nothing else does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from reasonedit.nodes import sockets, tracefile
from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.images import to_pil
from reasonedit.reasonedit_core.types import (
    EditTrace,
    Scores,
)
from reasonedit.tests.label_tools import Killed, Killer, chosen_points, join_requests, without_times
from reasonedit.tests.trace_tools import a_run, save_folder
from reasonedit.training.data.label import session
from reasonedit.training.data.label.cli import main
from reasonedit.training.data.label.from_traces import FromTraces, Options
from reasonedit.training.data.label.journal import read_journal
from reasonedit.training.data.label.traces import RoundFeedback, find_traces, read_feedback, read_trace, write_feedback
from reasonedit.training.data.records import read_records


def save_png(trace: EditTrace, path: Path) -> Path:
    rounds = [
        sockets.HistoryRound(
            made.instruction,
            made.input_index,
            replace(made.edited, latents=torch.randn(1, 4, 64).to(torch.bfloat16)),
            sockets.Verdict(made.reflection, trace.goal, trace.request.instruction, trace.target, trace.request.image, 1.0),
        )
        for made in trace.rounds
    ]
    path.write_bytes(tracefile.encode(to_pil(trace.image), tuple(rounds), {}))
    return path


def collect(out: Path, *paths: Path, options: Options | None = None, **more) -> session.Result:
    made = lambda runner: FromTraces(runner, out, options or Options())  # noqa: E731
    return session.run(session.Session(out, **more), made, find_traces(paths), name="from-traces")


def rejects(out: Path) -> dict[str, str]:
    told = [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    return {each["item"].rpartition("/")[2]: each["reason"] for each in told}


CORRECT = RoundFeedback(round=1, verdict="correct", instruction="Mend it.")
ACCEPT = RoundFeedback(round=2, verdict="accept")


# ---- what becomes of a run


@pytest.mark.parametrize("form", ["folder", "png"])
def test_correct_and_accept_make_a_thought_a_pair_and_two_reflections(tmp_path, form):
    one, trace = a_run(1)
    path = save_folder(trace, tmp_path / "run") if form == "folder" else save_png(trace, tmp_path / "run.png")
    for said in (CORRECT, ACCEPT):
        write_feedback(path, said, None)
    result = collect(tmp_path / "out", path, options=Options(license="mine"))
    assert (result.records, result.rejected, result.asked) == (4, 0, 0) and result.check.ok and not result.check.of("warning")
    found = {record.reflect.verdict if record.reflect else record.kind: record for record in read_records(tmp_path / "out")}
    assert set(found) == {"think", "edit", "reflection", "success"}
    assert all(record.license == "mine" and record.instruction.raw == one.instruction for record in found.values())
    assert found["think"].think.text == one.concrete and found["think"].instruction.clarity == "abstract"
    assert found["edit"].editor_instruction == one.concrete

    def pixels(record, name: str):
        with Image.open(record.picture(name)) as image:
            return image.convert("RGB").tobytes()

    source, first, second = (to_pil(picture).tobytes() for picture in (trace.request.image, *(r.image for r in trace.rounds)))
    assert (pixels(found["edit"], "input"), pixels(found["edit"], "target")) == (source, second)
    mended, good = found["reflection"], found["success"]
    assert [pixels(mended, name) for name in ("input", "generated", "target")] == [source, first, second]
    assert (mended.reflect.second_instruction, mended.reflect.reason) == ("Mend it.", trace.rounds[0].reflection.reason)
    assert (pixels(good, "generated"), good.images.target, good.reflect.second_instruction) == (second, None, None)
    assert good.reflect.scores.consistency == 10.0 and good.reflect.scores.quality == (7.0, 7.5)
    assert good.reflect.target_description == mended.reflect.target_description == trace.target
    assert good.reflect.round == 2 and good.provenance[1].note == "round 2: accept"


def test_both_forms_of_one_run_make_the_same_records(tmp_path):
    _, trace = a_run(2)
    for name, path in (("a", save_folder(trace, tmp_path / "run")), ("b", save_png(trace, tmp_path / "run.png"))):
        for said in (CORRECT, ACCEPT):
            write_feedback(path, said, None)
        collect(tmp_path / name, path)
    found = [without_times((tmp_path / name / "records.jsonl").read_text(encoding="utf-8")) for name in ("a", "b")]
    for records in found:
        for record in records:
            record.pop("provenance")
    assert found[0] == found[1] and len(found[0]) == 4


def test_the_artists_words_and_score_take_the_place_of_the_reflectors(tmp_path):
    _, trace = a_run(3)
    path = save_folder(trace, tmp_path / "run")
    write_feedback(path, RoundFeedback(round=2, verdict="reject", reason="The colours are wrong.", score=2), "Paint it blue.")
    result = collect(tmp_path / "out", path)
    think, reflect = read_records(tmp_path / "out")
    assert result.check.ok and think.think.steps == ("Paint it blue.",) and think.provenance[1].note == "the artist's own words"
    said = reflect.reflect
    assert (said.verdict, said.reason, said.scores.consistency) == ("failed", "The colours are wrong.", 2.0)
    assert said.scores.quality is None and reflect.provenance[1].score == 2.0  # marks that went with another score do not stay


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (RoundFeedback(round=2, verdict="reject"), "no-reason"),
        (RoundFeedback(round=1, verdict="accept"), "no-reason"),
        (RoundFeedback(round=2, verdict="reject", reason="No."), "score-disagrees"),
    ],
)
def test_what_neither_trace_nor_artist_says_is_not_made_up(tmp_path, said, reason):
    _, trace = a_run(4)
    path = save_folder(trace, tmp_path / "run")
    write_feedback(path, said, None)
    collect(tmp_path / "out", path)
    assert rejects(tmp_path / "out") == {f"run~round {said.round}": reason}
    kinds = [record.kind for record in read_records(tmp_path / "out")] if said.verdict == "accept" else []
    assert kinds == (["think", "edit"] if said.verdict == "accept" else [])


def test_without_scores_or_description_there_is_no_reflection(tmp_path):
    _, trace = a_run(5)
    bare = replace(trace.rounds[1], reflection=replace(trace.rounds[1].reflection, scores=Scores()))
    for name, changed, reason in (
        ("a", replace(trace, rounds=(trace.rounds[0], bare)), "no-score"),
        ("b", replace(trace, target=None), "no-target"),
    ):
        write_feedback(save_folder(changed, tmp_path / name), ACCEPT, None)
        collect(tmp_path / f"out-{name}", tmp_path / name)
        assert rejects(tmp_path / f"out-{name}") == {f"{name}~round 2": reason}
        assert [record.kind for record in read_records(tmp_path / f"out-{name}")] == ["think", "edit"]


def test_rounds_before_a_second_thought_have_no_known_goal(tmp_path):
    """trace.json keeps the last thought only."""
    _, trace = a_run(6)
    first = replace(trace.rounds[0], instruction="What was thought first.")
    over = replace(first, index=1, input_index=0)
    again = replace(trace.rounds[1], index=2, input_index=None, instruction=trace.goal)
    path = save_folder(replace(trace, rounds=(first, over, again), best=2), tmp_path / "run")
    for number in (1, 2):
        write_feedback(path, RoundFeedback(round=number, verdict="reject", reason="No.", score=1), None)
    write_feedback(path, RoundFeedback(round=3, verdict="accept"), None)
    collect(tmp_path / "out", path)
    assert rejects(tmp_path / "out") == {"run~round 1": "no-goal", "run~round 2": "no-goal"}
    assert [record.kind for record in read_records(tmp_path / "out")] == ["think", "edit", "reflect"]


def test_a_correction_gets_its_target_over_several_rounds_and_from_no_other_branch(tmp_path):
    _, trace = a_run(7)
    first, second = trace.rounds
    middle = replace(first, index=1, input_index=0)
    end, other = replace(second, index=2, input_index=1), replace(second, index=2, input_index=None, instruction=trace.goal)
    for name, last, targets in (("a", end, 1), ("b", other, 0)):
        path = save_folder(replace(trace, rounds=(first, middle, last), best=2), tmp_path / name)
        write_feedback(path, CORRECT, None)
        write_feedback(path, RoundFeedback(round=3, verdict="accept"), None)
        collect(tmp_path / f"out-{name}", path)
        found = [record for record in read_records(tmp_path / f"out-{name}") if record.reflect]
        mended = next(record for record in found if record.reflect.verdict == "reflection")
        assert (mended.images.target is not None) == bool(targets)


def test_users_words_as_the_goal_teach_no_thought_unless_the_artist_says_so(tmp_path):
    one, trace = a_run(8)
    plain = replace(trace, request=replace(trace.request, instruction=one.concrete), thought=None)
    path = save_folder(plain, tmp_path / "run")
    write_feedback(path, ACCEPT, None)
    collect(tmp_path / "a", path)
    assert [record.kind for record in read_records(tmp_path / "a")] == ["edit", "reflect"]
    write_feedback(path, None, one.concrete)
    collect(tmp_path / "b", path)
    think = read_records(tmp_path / "b")[0]
    assert think.instruction.clarity == "clear" and think.think.steps == (one.concrete,)


# ---- what cannot be used


def test_what_cannot_be_read_costs_its_run_only_and_can_be_put_right(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for number, name in enumerate(("good", "silent", "sourceless", "broken", "beyond", "odd")):
        save_folder(a_run(20 + number)[1], runs / name)
        if name != "silent":
            write_feedback(runs / name, ACCEPT, None)
    (runs / "sourceless-source.png").rename(tmp_path / "kept.png")
    (runs / "broken/trace.json").write_text('{"version": 1, "request"')
    write_feedback(runs / "beyond", RoundFeedback(round=9, verdict="accept"), None)
    (runs / "odd/feedback.json").write_text('{"schema": "reasonedit.feedback/1", "rounds": [{"round": 1, "verdict": "nice"}]}')
    save_png(a_run(40)[1], runs / "unsaid.png")
    result = collect(tmp_path / "out", runs)
    wanted = {"silent": "no-feedback", "sourceless": "no-source", "broken": "damaged", "beyond": "bad-feedback"}
    assert rejects(tmp_path / "out") == {**wanted, "odd": "bad-feedback"} and result.records == 3
    shutil.copy(tmp_path / "kept.png", runs / "sourceless" / "source.png")
    assert collect(tmp_path / "out", runs).records == 3  # what was rejected stays so
    assert collect(tmp_path / "out", runs, retry=True).records == 6
    assert "sourceless" not in rejects(tmp_path / "out")


def test_damaged_pngs_are_told(tmp_path):
    path = save_png(a_run(9)[1], tmp_path / "run.png")
    write_feedback(path, ACCEPT, None)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    collect(tmp_path / "out", path)
    assert list(rejects(tmp_path / "out").values()) == ["damaged"]


def test_new_words_about_a_run_are_read_again_and_lost_pictures_stored_again(tmp_path):
    path = save_folder(a_run(10)[1], tmp_path / "run")
    write_feedback(path, ACCEPT, None)
    assert collect(tmp_path / "out", path).records == 3
    write_feedback(path, CORRECT, None)
    assert collect(tmp_path / "out", path).records == 4
    assert len(read_journal(tmp_path / "out/journal.jsonl").entries) == 2
    lost = sorted((tmp_path / "out/pictures").rglob("*.png"))[0]
    lost.unlink()
    assert collect(tmp_path / "out", path).check.ok and lost.is_file()


def test_feedback_is_kept_by_round_and_checked(tmp_path):
    path = save_folder(a_run(11)[1], tmp_path / "run")
    write_feedback(path, CORRECT, "Thought.")
    write_feedback(path, ACCEPT, None)
    write_feedback(path, RoundFeedback(round=1, verdict="reject", reason="No."), None)
    said = read_feedback(path)
    assert said.thought == "Thought." and [each.verdict for each in said.rounds] == ["reject", "accept"]
    for bad in (
        {"round": 1, "verdict": "accept", "instruction": "x"},
        {"round": 1, "verdict": "correct"},
        {"round": 0, "verdict": "accept"},
        {"round": 1, "verdict": "accept", "score": 11},
    ):
        told = {"schema": "reasonedit.feedback/1", "rounds": [bad]}
        (path / "feedback.json").write_text(json.dumps(told))
        with pytest.raises(DataError, match=r"feedback\.json: expected feedback .*rounds\.0.*Correct"):
            read_feedback(path)
    with pytest.raises(DataError, match="found none"):
        find_traces([tmp_path / "nothing"])


# ---- kills


def test_killed_anywhere_nothing_is_lost_and_nothing_done_twice(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    runs.mkdir()
    for number in range(4):
        path = save_folder(a_run(50 + 7 * number)[1], runs / f"run-{number}")
        for said in (CORRECT, ACCEPT):
            write_feedback(path, said, None)
    reads = []

    def counted(trace: Path):
        reads.append(trace)
        return read_trace(trace)

    monkeypatch.setattr("reasonedit.training.data.label.from_traces.read_trace", counted)
    with monkeypatch.context() as patch:
        uncut = Killer(patch)
        assert collect(tmp_path / "whole", runs).records == 16
    assert len(reads) == 4 and set(uncut.kinds) == {"write-torn", "write-unflushed", "rename-before", "rename-after"}
    wanted = without_times((tmp_path / "whole/records.jsonl").read_text(encoding="utf-8"))
    for point in chosen_points(uncut.kinds, 20, seed=6):
        out = tmp_path / f"killed-{point}"
        with monkeypatch.context() as patch:
            Killer(patch, point)
            with pytest.raises(Killed):
                collect(out, runs)
            join_requests()
        finished = read_journal(out / "journal.jsonl").entries
        reads.clear()
        result = collect(out, runs)
        assert len(reads) == 4 - len(finished), point
        assert set(finished) <= set(read_journal(out / "journal.jsonl").entries), point
        assert without_times((out / "records.jsonl").read_text(encoding="utf-8")) == wanted, point
        assert result.check.ok and not list(out.glob(".*.part")), point


# ---- the commands


def test_feedback_and_from_traces_on_the_command_line(tmp_path, capsys):
    path = save_folder(a_run(12)[1], tmp_path / "run")
    assert main(["feedback", str(path), "--round", "1", "--correct", "Mend it.", "--reason", "It is not."]) == 0
    assert main(["feedback", str(path), "--round", "2", "--accept"]) == 0
    command = ["from-traces", str(path), "--out", str(tmp_path / "out"), "--quiet", "--sample", "9"]
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert json.loads(capsys.readouterr().out) == {"item": str(path), "work": "read", "by": "from-traces"}
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 records, 0 rejected" in said and "0 errors" in said
    assert (tmp_path / "out/sample.html").read_text(encoding="utf-8").count("<article>") == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --round N with one of"),
        (["--round", "1"], "expected --round N with one of"),
        (["--round", "1", "--accept", "--reject"], "accept, reject"),
        (["--accept"], "expected --round N with one of"),
        (["--round", "3", "--accept"], "expected 1 to 2"),
        (["--round", "1", "--correct", " "], "expected words to say"),
    ],
)
def test_feedback_that_says_nothing_clear_is_refused(tmp_path, capsys, arguments, words):
    path = save_folder(a_run(12)[1], tmp_path / "run")
    assert main(["feedback", str(path), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not (path / "feedback.json").exists()
