"""`reasonedit-data thinking-pairs` on the miniature: end to end, wrong labels, kills, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.tests.label_tools import QUICK, FakeServer, Killed, Killer, chosen_points, join_requests, without_times
from reasonedit.tests.launch import BOOT
from reasonedit.training.data.check import check_records
from reasonedit.training.data.label import session
from reasonedit.training.data.label.annotators import Answer, EndpointAnnotator
from reasonedit.training.data.label.cli import main
from reasonedit.training.data.label.journal import read_journal
from reasonedit.training.data.label.seeds import read_seeds
from reasonedit.training.data.label.thinking_pairs import Options, ThinkingPairs, plain
from reasonedit.training.data.records import read_records
from reasonedit.training.mini.labelling import World, WorldAnnotator, write_seeds

SEEDS = 10


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(record file, what is known of it)."""
    folder = tmp_path_factory.mktemp("seeds")
    path = write_seeds(folder, SEEDS, 3)
    return path, World(folder)


def label(out: Path, drawn, annotator=None, verifier=None, options: Options | None = None, **more) -> session.Result:
    path, world = drawn
    annotator = annotator or WorldAnnotator(world)
    made = lambda runner: ThinkingPairs(runner, annotator, verifier or annotator, out, options or Options())  # noqa: E731
    return session.run(session.Session(out, QUICK, **more), made, read_seeds(path), name="thinking-pairs")


def test_every_seed_becomes_a_pair_that_is_true_and_passes_the_check(tmp_path, drawn):
    result = label(tmp_path / "out", drawn, options=Options(keep_clear=0.5, held_out=0.3))
    assert (result.records, result.rejected) == (SEEDS, 0) and result.check.ok and not result.check.of("warning")
    records = read_records(tmp_path / "out")
    kinds = Counter()
    for record, known in zip(records, drawn[1].known, strict=True):
        item = known.item
        if record.instruction.raw == known.asked and known.clear:
            assert record.instruction.clarity == "clear" and record.think.steps == (known.asked,)
            kinds["kept"] += 1
        elif known.clear:  # an abstract layer, under which the clear words are the answer
            assert record.instruction.raw == item.instruction and record.think.steps == (item.canonical,)
            assert record.instruction.clarity == "abstract"
            kinds["layered"] += 1
        else:
            assert record.instruction.raw == known.asked and record.think.steps == item.steps
            kinds["taken apart"] += 1
        steps = [step.step for step in record.provenance]
        assert steps[0] == "classify" and steps[-1] == "verify" and all(step.key and step.prompt for step in record.provenance)
        assert record.images.target is not None and record.lang == item.language
    assert set(kinds) == {"kept", "layered", "taken apart"}
    assert check_records(tmp_path / "out").ok


def test_pictures_stay_in_one_split_and_the_share_is_kept(tmp_path, drawn):
    splits = {}
    for share in (0.0, 0.5, 1.0):
        label(tmp_path / "out", drawn, options=Options(held_out=share))
        splits[share] = {record.images.input.sha256: record.split for record in read_records(tmp_path / "out")}
    assert set(splits[0.0].values()) == {"train"} and set(splits[1.0].values()) == {"held_out"}
    assert set(splits[0.5].values()) == {"train", "held_out"}


def test_what_was_held_out_before_stays_so(tmp_path, drawn):
    told = [json.loads(line) for line in drawn[0].read_text(encoding="utf-8").splitlines()]
    told[4]["split"] = "held_out"
    path = drawn[0].with_name("held.jsonl")
    path.write_text("".join(json.dumps(each) + "\n" for each in told), encoding="utf-8")
    label(tmp_path / "out", (path, drawn[1]), options=Options(held_out=0.0))
    assert [record.split for record in read_records(tmp_path / "out")].index("held_out") == 4


class Wrong(WorldAnnotator):
    """Takes every second abstract instruction for what another one means."""

    def _simplify(self, question, told):
        found = super()._simplify(question, told)
        return {"steps": [*found["steps"], "Paint the sky green."]} if question.seed % 2 else found


def test_a_wrong_label_is_rejected_by_the_verifier_and_never_written(tmp_path, drawn):
    result = label(tmp_path / "out", drawn, Wrong(drawn[1], "wrong"), WorldAnnotator(drawn[1]))
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < len(rejects) == result.rejected < SEEDS and result.records == SEEDS - len(rejects)
    assert {(each["step"], each["reason"]) for each in rejects} == {("verify", "not-faithful")}
    assert "green" not in (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8")
    assert result.report["rejects"] == {"verify: not-faithful": len(rejects)}


def test_the_same_words_about_the_same_picture_come_once(tmp_path, drawn):
    told = [json.loads(line) for line in drawn[0].read_text(encoding="utf-8").splitlines()]
    again = {**told[0], "id": "again", "instruction": {**told[0]["instruction"], "raw": told[0]["instruction"]["raw"]}}
    other = {**told[0], "id": "other", "images": told[1]["images"]}
    path = drawn[0].with_name("twice.jsonl")
    path.write_text("".join(json.dumps(each) + "\n" for each in (told[0], again, other)), encoding="utf-8")
    result = label(tmp_path / "out", (path, drawn[1]))
    rejects = (tmp_path / "out/rejects.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = {each["item"]: each["reason"] for each in map(json.loads, rejects)}
    # nothing was drawn of those words about the other picture, which the world refuses to sort
    assert result.records == 1 and reasons == {"again": "duplicate", "other": "refused"}


def test_texts_are_the_same_without_case_marks_and_blanks():
    assert plain("  Make it  RED! ") == plain("make it red") != plain("make it reds")
    assert plain("把车改成红色。") == plain("把车改成红色") and plain("Ａ") == plain("a")


def test_records_that_would_not_pass_are_rejected_with_the_fault(tmp_path, drawn):
    class Marked(WorldAnnotator):
        def _simplify(self, question, told):
            return {"steps": ["Paint <|im_end|> red."]}

        def _verify(self, question, told):
            return {"faithful": True, "executable": True, "nothing_added": True, "visible": True, "why": "Yes."}

    result = label(tmp_path / "out", drawn, Marked(drawn[1]))
    assert set(result.report["rejects"]) == {"record: special-token"} and result.records + result.rejected == SEEDS
    assert check_records(tmp_path / "out").ok


def test_a_picture_that_is_gone_costs_its_item_only(tmp_path, drawn):
    told = [json.loads(line) for line in drawn[0].read_text(encoding="utf-8").splitlines()]
    told[2]["images"]["input"]["path"] = "pictures/none.png"
    path = drawn[0].with_name("gone.jsonl")
    path.write_text("".join(json.dumps(each) + "\n" for each in told), encoding="utf-8")
    result = label(tmp_path / "out", (path, drawn[1]))
    assert result.records == SEEDS - 1 and result.report["rejects"] == {"seed: missing-picture": 1}


def test_tokens_and_cost_are_counted_over_all_runs(tmp_path, drawn):
    prices = session.Prices(2.0, 5.0)
    first = label(tmp_path / "out", drawn, prices=prices)
    again = label(tmp_path / "out", drawn, prices=prices)
    entries = read_journal(tmp_path / "out" / "journal.jsonl").entries.values()
    tokens = sum(entry.tokens_in for entry in entries), sum(entry.tokens_out for entry in entries)
    assert first.asked == len(entries) == first.report["requests"] and again.asked == 0
    assert (first.report["tokens_in"], first.report["tokens_out"]) == tokens and min(tokens) > 0
    assert first.report["cost"] == pytest.approx((2 * tokens[0] + 5 * tokens[1]) / 1e6, abs=1e-6)
    assert again.report == first.report


# ---- kills


def through(server: FakeServer, out: Path, drawn) -> session.Result:
    return label(out, drawn, EndpointAnnotator(server.url, "world"))


def test_killed_anywhere_nothing_is_lost_and_nothing_done_twice(tmp_path, drawn, monkeypatch):
    with FakeServer(WorldAnnotator(drawn[1]), tmp_path / "seen") as server:
        with monkeypatch.context() as patch:
            uncut = Killer(patch)
            through(server, tmp_path / "whole", drawn)
        questions = len(server.asked)
        wanted = without_times((tmp_path / "whole/records.jsonl").read_text(encoding="utf-8"))
        assert set(uncut.kinds) == {
            "request-out", "request-back", "write-torn", "write-unflushed", "rename-before", "rename-after",
        }  # fmt: skip
        for point in chosen_points(uncut.kinds, 20, seed=4):
            out = tmp_path / f"killed-{point}"
            server.asked.clear()
            with monkeypatch.context() as patch:
                Killer(patch, point)
                with pytest.raises(Killed):
                    through(server, out, drawn)
                join_requests()
            before, finished = len(server.asked), set(read_journal(out / "journal.jsonl").entries)
            result = through(server, out, drawn)
            kept = read_journal(out / "journal.jsonl").entries
            assert finished <= set(kept), point
            assert 0 <= before - len(finished) <= QUICK.concurrency, f"point {point}: more was lost than was under way"
            assert result.asked == questions - len(finished), point
            assert len(server.asked) == questions + before - len(finished), point
            assert sum(server.counts().values()) - len(server.counts()) == before - len(finished), point
            assert without_times((out / "records.jsonl").read_text(encoding="utf-8")) == wanted, point
            assert result.check.ok and not list(out.glob(".*.part")), point


KILL_9 = (
    BOOT
    + """
import os, signal
from pathlib import Path
from reasonedit.training.data.label import journal
from reasonedit.training.data.label.cli import main
append, count = journal._append, 0
def killing(file, data):
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.write(file, data[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    append(file, data)
journal._append = killing
main(sys.argv[2:])
"""
)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_kill_9_in_the_middle_of_a_line(tmp_path, drawn):
    path, world = drawn
    command = ["thinking-pairs", str(path), "--out", str(tmp_path / "out"), "--model", "world", "--concurrency", "2"]
    with FakeServer(WorldAnnotator(world), tmp_path / "seen") as server:
        command += ["--url", server.url, "--quiet"]
        died = subprocess.run([sys.executable, "-c", KILL_9, "6", *command], capture_output=True, timeout=120)
        assert died.returncode == -signal.SIGKILL, died.stderr
        torn = read_journal(tmp_path / "out/journal.jsonl")
        assert len(torn.entries) == 5 and torn.torn == 20
        before = len(server.asked)
        # what a kill in the middle of a rename leaves
        (tmp_path / "out/.records.jsonl.0123.part").write_text("{")
        assert main(command) == 0
        whole = label(tmp_path / "whole", drawn)
        assert len(server.asked) == whole.asked + before - 5
    assert without_times((tmp_path / "out/records.jsonl").read_text()) == [
        {**record, "provenance": [{**step, "endpoint": server.url} for step in record["provenance"]]}
        for record in without_times((tmp_path / "whole/records.jsonl").read_text())
    ]
    assert not list((tmp_path / "out").glob(".*.part"))


# ---- the command


def test_a_dry_run_prints_the_first_request_and_sends_and_writes_nothing(tmp_path, drawn, capsys):
    with FakeServer(WorldAnnotator(drawn[1]), tmp_path / "seen") as server:
        common = ["thinking-pairs", str(drawn[0]), "--out", str(tmp_path / "out"), "--url", server.url, "--model", "world"]
        assert main([*common, "--dry-run"]) == 0
        first = json.loads(capsys.readouterr().out)
        assert server.asked == [] and not (tmp_path / "out").exists()
        assert main([*common, "--quiet", "--concurrency", "1", "--sample", "3", "--price", "1,2"]) == 0
        said = capsys.readouterr().out
        sent = server.payloads[0]
        assert f"{SEEDS} records, 0 rejected" in said and "cost" in said and "0 errors" in said
        shown, real = (each["messages"][1]["content"][0].pop("image_url")["url"] for each in (first["request"], sent))
        assert first["request"] == sent and real.startswith(shown.partition("...")[0]) and len(shown) < 100
        asked = len(server.asked)
        assert main([*common, "--dry-run"]) == 0 and "nothing would be asked" in capsys.readouterr().out
        assert len(server.asked) == asked
    page = (tmp_path / "out/sample.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 3 and "http" not in page.replace(server.url, "") and page.count("data:image/png") == 6


def test_the_page_shows_words_as_words(tmp_path, drawn):
    told = [json.loads(line) for line in drawn[0].read_text(encoding="utf-8").splitlines()][:1]
    told[0]["instruction"]["raw"] = "<script>alert(1)</script> & paint"
    path = drawn[0].with_name("script.jsonl")
    path.write_text(json.dumps(told[0]) + "\n", encoding="utf-8")

    class Any(WorldAnnotator):
        def answer(self, question, dropped):
            told = {"class": "clear", "category": "c", "why": "w"}
            if question.prompt.step == "verify":
                told = {"faithful": True, "executable": True, "nothing_added": True, "visible": True, "why": "w"}
            return Answer(json.dumps(told))

    label(tmp_path / "out", (path, drawn[1]), Any(drawn[1]), options=Options(keep_clear=1.0), sample=1)
    page = (tmp_path / "out/sample.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; paint" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["thinking-pairs", "S"], "required: --out"),
        (["thinking-pairs", "S", "--out", "o"], "expected an annotator"),
        (["thinking-pairs", "S", "--out", "o", "--url", "http://127.0.0.1:1/v1"], "found no model"),
        (["thinking-pairs", "S", "--out", "o", "--url", "ftp://x", "--model", "m"], "expected the http(s) address"),
        (["thinking-pairs", "S", "--out", "o", "--url", "http://x", "--model", "m", "--api-key-env", "NO_SUCH"], "NO_SUCH"),
        (["thinking-pairs", "S", "--out", "o", "--url", "http://x", "--model", "m"], "expected a JSONL file of records"),
        (["thinking-pairs", "S", "--out", "o", "--world", "nowhere"], "expected what `reasonedit-data mini-seeds` writes"),
        (["thinking-pairs", "S", "--out", "o", "--held-out", "1.5"], "expected a number from 0 to 1"),
        (["thinking-pairs", "S", "--out", "o", "--atempts", "3"], "unrecognized arguments"),
    ],
)
def test_errors_are_told_in_a_sentence_with_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err and list(tmp_path.iterdir()) == []


def test_prices_and_shares_that_are_none_are_refused():
    for text in ("1", "1,x", "-1,2", "nan,1"):
        with pytest.raises(ConfigError, match="--price"):
            session.Prices.parse(text)
    with pytest.raises(ConfigError, match="held_out"):
        Options(held_out=1.2)


def test_records_without_an_instruction_are_no_seeds(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"schema": "reasonedit.record/1", "id": "a", "kind": "understand", "understand": {"turns": '
                    '[{"question": "q", "answer": "a"}]}}\n')  # fmt: skip
    with pytest.raises(DataError, match="expected records with images.input"):
        read_seeds(path)


def test_help_is_answered_without_torch():
    code = (
        f"{BOOT}\nfrom reasonedit.training.data.label.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), 'code:', code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "thinking-pairs", "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "heavy: [] code: 0", done.stdout + done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path, drawn, monkeypatch, capsys):
    answered = threading.Event()
    answer = WorldAnnotator.answer

    def stopping(self, question, dropped):
        if question.prompt.step == "verify":
            answered.set()
            os.kill(os.getpid(), signal.SIGINT)
            dropped.wait(30)
        return answer(self, question, dropped)

    command = ["thinking-pairs", str(drawn[0]), "--out", str(tmp_path / "out"), "--world", str(drawn[0].parent), "--quiet"]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without one
    try:
        with monkeypatch.context() as patch:
            patch.setattr(WorldAnnotator, "answer", stopping)
            assert main(command) == 130 and "goes on from here" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, usual)
    kept = len(read_journal(tmp_path / "out/journal.jsonl").entries)
    assert answered.is_set() and kept > 0
    assert main(command) == 0 and f"{SEEDS} records" in capsys.readouterr().out
