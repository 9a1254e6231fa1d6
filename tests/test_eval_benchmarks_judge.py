"""Judging: what is asked and read, and an endpoint that misbehaves: nothing lost, nothing guessed, nothing asked twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from reasonedit.reasonedit_core.errors import ConfigError, MalformedReply, ReasonerError
from reasonedit.tests.benchmark_tools import LAYOUTS, DrawnJudge, by_item, damaged_png, prepared, save
from reasonedit.tests.label_tools import QUICK, FakeServer
from reasonedit.training.data.label.annotators import Answer, Refused
from reasonedit.training.data.label.journal import read_journal
from reasonedit.training.data.label.output import Prices
from reasonedit.training.eval.benchmarks.judge import JUDGEMENTS, NO_EDIT, estimate, folder_of, judge_run, tasks_of, trial
from reasonedit.training.eval.benchmarks.judges import EndpointJudge, ReplayJudge, ScriptedJudge, make_judge, read_rows
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, find_output, keep_output
from reasonedit.training.eval.benchmarks.protocols import calls_of, inputs_of, load_protocol, names

RE = {bench: load_protocol(f"{bench}-re") for bench in LAYOUTS}
PROMPTS = {question.step: question for protocol in RE.values() for question in protocol.calls.values()}
SC = RE["gedit"].calls["SC"]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("REASONEDIT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def run_of(bench, folder, without=()):
    """(manifest, run with a picture for every item but those `without`)."""
    manifest = prepared(bench, folder)
    for at, item in enumerate(manifest.items):
        if at not in without:
            save(folder / "edited.png", 200 + at)
            keep_output(folder / "run", item, (folder / "edited.png").read_bytes())
    return manifest, folder / "run"


def judged(manifest, run, judge, protocol=None, **more):
    options = {"items": manifest.items, "limits": QUICK, **more}
    done = judge_run(manifest, run, protocol or RE[manifest.bench], judge, **options)
    return done, read_rows(done.folder / JUDGEMENTS)


# ---- questions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"reason": "so", "success": 8, "restraint": 9}',
        '```json\n{"reason": "so", "success": 8, "restraint": 9}\n```',
        'I looked.\n```json\n{"success": 8, "restraint": 9.0}\n```\nThat is all.',
        "<think>{}</think>\n" + '{"success": 8, "restraint": 9, "reason": "so"}',
        '{"score": [8, 9], "reasoning": "so"}',
        '||V^=^V||\n{"score": [8, 9], "reasoning": "so"}\n||V^=^V||',
        "x ||V^=^V|| [8, 9] ||V^=^V||",
        "Because of this: it is red.\nSuccess: 8\nRestraint: 9",
        "**Success**: 8/10\n- Restraint: 9 / 10",
        "1. Success: **8**\n2. Restraint: **9**.",
    ],
)
def test_marks_are_read_out_of_every_form(text):
    assert SC.read(text).marks == {"success": 8, "restraint": 9} and SC.read(text).raw == text


@pytest.mark.parametrize(
    "text",
    [
        'I looked: {"success": 8, "restraint": 9} is my answer.',
        'The scale is {0..10}. {"reason": "a {brace}", "success": 8, "restraint": 9}\nThat is all.',
        '{"seen": ["a"]} and so {"score": [8, 9]}',
    ],
)
def test_an_object_among_other_words_is_read(text):
    assert SC.read(text).marks == {"success": 8, "restraint": 9}


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("1", 1),
        ("0", 0),
        (" **1**. ", 1),
        ("Answer: 1", 1),
        ("**Final score**: 0/1", 0),
        ("It is there.\nScore: 1", 1),
        ("Yes, 1: the ruin is there, 0 would be wrong.", 1),
        ("10 windows are broken, 1.5 m of wall stands: I say 0", 0),
        ("1/5", None),
        ("yes", None),
        ("2", None),
        ("Answer: 1\nAnswer: 0", None),
        ("10 of 100", None),
    ],
)
def test_the_mllm_score_is_read_as_a_bare_number_a_labelled_one_or_the_first_token(text, mark):
    question = RE["reason50k"].calls["mllm"]
    if mark is None:
        with pytest.raises(MalformedReply):
            question.read(text)
    else:
        assert question.read(text).marks == {"mllm": mark}


@pytest.mark.parametrize(("text", "mark"), [("4", 4), ("Score: 4/5", 4), ("4 of them are gone", None), ("I say 4.", None)])
def test_a_mark_of_a_longer_scale_is_read_alone_or_labelled_and_never_guessed(text, mark):
    question = RE["kris"].calls["quality"]
    assert not question.first_token
    if mark is None:
        with pytest.raises(MalformedReply):
            question.read(text)
    else:
        assert question.read(text).marks == {"quality": mark}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"success": 8, "restraint": 9} or {"success": 7, "restraint": 9}',
        'So {"success": 8, "success": 7, "restraint": 9}.',
        'So {"success": 8}.',
        "I cannot tell.",
        "8 9",
        '{"success": 8}',
        '{"success": 8, "restraint": "9"}',
        '{"success": 8, "restraint": true}',
        '{"success": 8, "restraint": 9.5}',
        '{"success": 8, "restraint": 11}',
        '{"success": -1, "restraint": 9}',
        '{"success": 8, "restraint": null}',
        '{"success": 8, "success": 7, "restraint": 9}',
        '{"success": NaN, "restraint": 9}',
        '{"score": [8]}',
        '{"score": [8, 9, 7]}',
        "Success: 8/5\nRestraint: 9",
        "Success: 8\nSuccess: 7\nRestraint: 9",
        "Success: 8",
        "||V^=^V|| [8, 9]",
        "x" * 200_000,
    ],
)
def test_what_is_no_answer_is_none(text):
    with pytest.raises(MalformedReply):
        SC.read(text)


def test_a_question_is_known_by_all_that_its_answer_depends_on():
    changed = [
        replace(SC, text=SC.text + " "),
        replace(SC, max_side=512),
        replace(SC, in_order=True),
        replace(SC, first_token=True),
        replace(SC, marks=(replace(SC.marks[0], high=5), SC.marks[1])),
        replace(SC, version=2),
    ]
    assert len({each.digest for each in (SC, *changed)}) == 7


def test_every_protocol_has_the_calls_its_items_take_and_asks_for_the_keys_it_reads(tmp_path):
    for bench, protocol in RE.items():
        for item in prepared(bench, tmp_path / bench).items:
            for call in calls_of(item).values():
                question = protocol.calls[call]
                words = question.words(inputs_of(item, question))
                assert all(f'"{mark.name}"' in words for mark in question.marks), call
                assert ("instruction" not in question.tells) or item.instruction in words


def test_kris_is_asked_with_the_variants_that_its_official_script_means_to_use(tmp_path):
    calls = {item.group: calls_of(item) for item in prepared("kris", tmp_path).items}
    assert calls["anomaly_correction"]["instruction"] == "instruction_anomaly"  # there it is never used, for a misspelt name
    assert calls["viewpoint_change"]["instruction"] == "instruction_view" and calls["biology"]["instruction"] == "dual"
    assert calls["temporal_prediction"]["consistency"] == "consistency_frames"


# ---- a run -----------------------------------------------------------------------------------------------------------------

CALLS = {"gedit": 10, "imgedit": 5, "kris": 15, "rise": 13, "reason50k": 10}


@pytest.mark.parametrize("bench", LAYOUTS)
def test_every_call_of_every_item_is_asked_once_and_a_restart_asks_none(bench, tmp_path):
    manifest, run = run_of(bench, tmp_path)
    judge = DrawnJudge()
    done, rows = judged(manifest, run, judge)
    assert done.counts == {"ok": CALLS[bench]} and len(judge.asked) == CALLS[bench] == len(by_item(rows))
    shown = {question.prompt.step: len(question.pictures) for question in judge.asked}
    if bench == "kris":
        assert shown["kris-consistency_frames"] == 3 and shown["kris-instruction_view"] == 3 and shown["kris-quality"] == 1
    again, same = judged(manifest, run, judge)
    assert again.requests == 0 and same == rows


def test_a_moved_run_asks_nothing_and_another_picture_only_its_own_calls(tmp_path):
    manifest, run = run_of("gedit", tmp_path)
    judge = DrawnJudge()
    judged(manifest, run, judge)
    run = run.rename(tmp_path / "elsewhere")
    assert judged(manifest, run, judge)[0].requests == 0
    keep_output(run, manifest.items[0], manifest.sources(manifest.items[0])[0].read_bytes())
    assert judged(manifest, run, judge)[0].requests == 2


def test_a_missing_picture_is_a_row_and_no_question(tmp_path):
    manifest, run = run_of("imgedit", tmp_path, without=(2,))
    done, rows = judged(manifest, run, DrawnJudge())
    assert done.counts == {"ok": 4, "missing": 1}
    (row,) = (row for row in rows if row["status"] == "missing")
    assert row["item"] == manifest.items[2].id and row["marks"] is None


def test_a_damaged_picture_is_a_row_that_names_it_and_no_question(tmp_path):
    manifest, run = run_of("imgedit", tmp_path, without=(2,))
    damaged_png(find_output(run / OUTPUTS, manifest.items[0]))
    options = {"items": manifest.items, "prices": Prices(), "per_picture": 1000}
    told = estimate(manifest, run, RE["imgedit"], "drawn", anchors=0, **options)
    assert (told.calls, told.missing) == (3, 1) and told.damaged.keys() == {manifest.items[0].id}
    done, rows = judged(manifest, run, DrawnJudge())
    assert done.counts == {"ok": 3, "missing": 1, "damaged": 1}
    (row,) = (row for row in rows if row["status"] == "damaged")
    assert row["item"] == manifest.items[0].id and f"{row['item']}.png" in row["note"] and row["marks"] is None


def test_a_damaged_source_is_an_error_of_its_own_calls_and_known_before(tmp_path):
    manifest, run = run_of("gedit", tmp_path)
    source = manifest.sources(manifest.items[0])[0]
    damaged_png(source)
    done, rows = judged(manifest, run, DrawnJudge(), anchors=len(manifest.items))
    assert done.counts == {"ok": 17, "error": 3}  # SC of the run's picture; SC and PQ of the anchor
    assert {row["item"] for row in rows if row["status"] == "error"} == {manifest.items[0].id}
    good, words = trial(DrawnJudge(), RE["gedit"], source, QUICK)
    assert not good and source.name in words
    source.write_bytes(b"no picture")
    options = {"items": manifest.items, "prices": Prices(), "per_picture": 1000}
    told = estimate(manifest, run, RE["gedit"], "drawn", anchors=0, **options)
    assert told.calls == 9 and told.damaged.keys() == {manifest.items[0].id}


def test_anchors_are_the_source_itself_and_the_target_on_items_that_follow_from_their_hashes(tmp_path):
    manifest, run = run_of("reason50k", tmp_path)
    judge = DrawnJudge()
    done, rows = judged(manifest, run, judge, anchors=2)
    anchored = Counter((row["anchor"], row["item"]) for row in rows if row["anchor"])
    assert done.counts == {"ok": 18} and set(anchored.values()) == {2} and len(anchored) == 4
    tasks = [task for task in tasks_of(manifest, run, RE["reason50k"], 2, manifest.items) if task.anchor == NO_EDIT]
    assert all(task.edited == manifest.sources(task.item)[0] for task in tasks)
    fewer = {task.item.id for task in tasks_of(manifest, run, RE["reason50k"], 1, manifest.items) if task.anchor}
    assert fewer <= {name for _, name in anchored}


def test_faults_of_an_endpoint_cost_at_most_their_own_calls_and_a_retry_asks_only_for_those(tmp_path):
    manifest, run = run_of("kris", tmp_path)
    faults = {1: "status:429,0", 2: "status:500", 3: "truncated", 4: "text:I would say 4.", 5: "refusal", 6: "raw:{}", 7: "cut"}
    with FakeServer(DrawnJudge(), tmp_path / "sent", lambda number, question: faults.get(number), prompts=PROMPTS) as server:
        judge = EndpointJudge(server.url, "m", timeout=60.0)
        done, rows = judged(manifest, run, judge)
        assert done.counts == {"ok": 14, "refused": 1}
        (refused,) = (row for row in rows if row["status"] == "refused")
        assert refused["marks"] is None and "rather not" in refused["note"]
        asked = len(server.asked)
        again, _ = judged(manifest, run, judge)
        assert again.requests == 0 and len(server.asked) == asked
        retried, rows = judged(manifest, run, judge, retry=True)
        assert retried.counts == {"ok": 15} and len(server.asked) == asked + 1
    truth = DrawnJudge()
    judged(manifest, tmp_path / "run", truth)
    own = by_item(read_rows(folder_of(run, RE["kris"], "drawn") / JUDGEMENTS))
    assert {key: row["marks"] for key, row in by_item(rows).items()} == {key: row["marks"] for key, row in own.items()}


def test_an_answer_that_never_can_be_read_is_unparsed_and_a_slow_one_an_error(tmp_path):
    manifest, run = run_of("imgedit", tmp_path)

    def behave(number, question):
        match question.inputs["instruction"]:
            case "Make change 0.":
                return "text:Very good, 9 of 10."
            case "Make change 1.":
                return "slow:30"
            case "Make change 2.":
                return "status:400"
        return None

    with FakeServer(DrawnJudge(), tmp_path / "sent", behave, prompts=PROMPTS) as server:
        limits = replace(QUICK, timeout=2.0, attempts=2)
        done, rows = judged(manifest, run, EndpointJudge(server.url, "m", timeout=2.0), limits=limits)
        assert "could not be used" in server.payloads[-1]["messages"][1]["content"][-1]["text"] or len(server.asked) >= 7
    assert done.counts == {"ok": 2, "unparsed": 1, "error": 2}
    found = {row["item"]: row for row in rows}
    assert found["100"]["status"] == "unparsed" and found["100"]["attempts"] == 2 and found["100"]["marks"] is None
    assert found["100"]["raw"] == "Very good, 9 of 10." and all("raw" not in found[name] for name in ("101", "102"))
    assert "no answer within" in found["101"]["note"] or "time" in found["101"]["note"]


def test_a_judge_that_cannot_be_used_ends_the_run_and_what_was_answered_stays(tmp_path):
    manifest, run = run_of("kris", tmp_path)
    behave = lambda number, question: "status:401" if number > 6 else None  # noqa: E731
    with FakeServer(DrawnJudge(), tmp_path / "sent", behave, prompts=PROMPTS) as server:
        judge = EndpointJudge(server.url, "m", timeout=60.0)
        with pytest.raises(ReasonerError, match="401"):
            judged(manifest, run, judge, limits=replace(QUICK, concurrency=1))
        kept = read_journal(folder_of(run, RE["kris"], "m") / "journal.jsonl").entries
        assert len(kept) == 6
        server.behave = lambda number, question: None
        before = len(server.asked)
        done, _ = judged(manifest, run, judge, limits=replace(QUICK, concurrency=1))
        assert done.counts == {"ok": 15} and 9 <= len(server.asked) - before <= 10  # one may have been on its way
        assert server.counts().most_common(1)[0][1] <= 2  # the one that was under way, once more


# ---- judges ----------------------------------------------------------------------------------------------------------------


def test_replay_gives_the_same_rows_without_a_request(tmp_path):
    manifest, run = run_of("rise", tmp_path)

    class Moody(DrawnJudge):
        def answer(self, question, dropped):
            if question.inputs.get("instruction") == "Make change 0.":
                raise Refused("no")
            if question.inputs.get("instruction") == "Make change 1.":
                return Answer("hm")
            return super().answer(question, dropped)

    done, rows = judged(manifest, run, Moody())
    other = run.rename(tmp_path / "other")
    replay = ReplayJudge(other / "judged" / done.folder.name / JUDGEMENTS)
    (other / "judged" / done.folder.name / "journal.jsonl").unlink()
    again, replayed = judged(manifest, other, replay)
    assert again.counts == done.counts and again.counts["refused"] == again.counts["unparsed"] == 2
    told = ("item", "role", "status", "marks", "reason", "key", "raw")
    assert {row["raw"] for row in rows if row["status"] == "unparsed"} == {"hm"}
    assert [{k: row.get(k) for k in told} for row in replayed] == [{k: row.get(k) for k in told} for row in rows]


def test_a_script_answers_by_call_and_instruction_and_refuses_the_rest(tmp_path):
    manifest, run = run_of("gedit", tmp_path)
    path = tmp_path / "script.toml"
    path.write_text(
        '[[answer]]\ncall = "SC"\ninstruction = "Make change 0."\ntext = \'{"success": 1, "restraint": 2}\'\n'
        '[[answer]]\ncall = "SC"\ntext = \'{"success": 3, "restraint": 4}\'\n'
    )
    done, rows = judged(manifest, run, make_judge(f"scripted:{path}", RE["gedit"]))
    marks = {row["item"]: row["marks"] for row in rows if row["role"] == "SC"}
    assert done.counts == {"ok": 5, "refused": 5} and Counter(each["success"] for each in marks.values()) == {1: 1, 3: 4}
    assert marks[manifest.items[0].id] == {"success": 1, "restraint": 2}
    path.write_text("answer = 3")
    with pytest.raises(ConfigError, match="answer"):
        ScriptedJudge(path)


@pytest.mark.parametrize("text", ["gpt", "openai:", "other:x", "local:nowhere", "replay:nowhere", "scripted:nowhere"])
def test_a_judge_that_is_not_there_is_refused(text):
    with pytest.raises(ConfigError, match="expected"):
        make_judge(text, RE["gedit"])


def test_an_endpoint_is_named_with_its_model():
    judge = make_judge("openai:org/Qwen@72B@http://127.0.0.1:9/v1", RE["rise"])
    assert (judge.name, judge.endpoint, judge._max_side) == ("org/Qwen@72B", "http://127.0.0.1:9/v1", 768)
    assert make_judge("openai:gpt-4.1-2025-04-14", RE["rise"], api_key="k").endpoint == "https://api.openai.com/v1"


def test_official_wording_comes_from_the_users_copy_and_is_sent_alone(tmp_path):
    path = tmp_path / "prompts.json"
    texts = {name: f"Rubric for {name}: <edit_prompt>" for name in RE["imgedit"].calls}
    path.write_text(json.dumps(texts))
    protocol = load_protocol("imgedit-official", path)
    manifest, run = run_of("imgedit", tmp_path)
    payloads = []

    class Official(EndpointJudge):
        def answer(self, question, dropped):
            payloads.append(self.payload(question))
            return Answer("It is fine.\nPrompt Compliance: 4\nVisual Naturalness: 5\nPhysical & Detail Integrity: 3")

    done, rows = judged(manifest, run, Official("http://127.0.0.1:9/v1", "m"), protocol)
    assert done.counts == {"ok": 5} and set(rows[0]["marks"].values()) == {4, 5, 3}
    assert all([*each["messages"]][0]["role"] == "user" and "response_format" not in each for each in payloads)
    words = [each["messages"][0]["content"][-1]["text"] for each in payloads]
    assert any(text == "Rubric for add: Make change 0." for text in words)
    assert done.told["prompts"] == protocol.prompts and protocol.prompts[:8] in done.folder.name
    del texts["add"]
    path.write_text(json.dumps(texts))
    with pytest.raises(ConfigError, match="found none for add"):
        load_protocol("imgedit-official", path)


def test_protocols_are_named_by_their_wording():
    assert all(load_protocol(name) for name in names() if name.endswith("-re"))
    with pytest.raises(ConfigError, match="our own wording"):
        load_protocol("gedit-re", __file__)
    with pytest.raises(ConfigError, match="--prompts"):
        load_protocol("gedit-official")
    with pytest.raises(ConfigError, match="gedit-re"):
        load_protocol("gedit")


# ---- doctor ----------------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_calls_and_what_is_known(tmp_path):
    manifest, run = run_of("gedit", tmp_path, without=(4,))
    options = {"items": manifest.items, "prices": Prices(1.0, 2.0), "per_picture": 1000}
    first = estimate(manifest, run, RE["gedit"], "drawn", anchors=2, **options)
    assert (first.calls, first.known, first.missing) == (8 + 4, 0, 1)
    assert first.cost == pytest.approx((first.tokens_in + 2 * first.tokens_out) / 1e6)
    assert 6 * 3000 < first.tokens_in < 6 * 3000 + 12 * 400 and first.tokens_out == 12 * 500
    judged(manifest, run, DrawnJudge())
    second = estimate(manifest, run, RE["gedit"], "drawn", anchors=2, **options)
    assert (second.calls, second.known) == (12, 8)
    assert estimate(manifest, None, RE["gedit"], "drawn", anchors=0, **options).calls == 10


def test_a_trial_asks_one_question_and_keeps_nothing(tmp_path):
    manifest, run = run_of("gedit", tmp_path)
    judge = DrawnJudge()
    good, words = trial(judge, RE["gedit"], manifest.sources(manifest.items[0])[0], QUICK)
    assert good and "success" in words and len(judge.asked) == 1 and not (run / "judged").exists()
