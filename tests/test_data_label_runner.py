"""The runner of `reasonedit-data` against an endpoint that misbehaves: nothing lost, nothing guessed, nothing asked twice."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, MalformedReply, ReasonerError
from reasonedit.tests.label_tools import PIPELINES, PROMPTS, QUICK, FakeServer
from reasonedit.training.data.label import pace
from reasonedit.training.data.label.annotators import (
    Answer,
    EndpointAnnotator,
    NotTaken,
    Passing,
    Question,
    SpeakerAnnotator,
    data_url,
    shown,
)
from reasonedit.training.data.label.journal import Journal, read_journal
from reasonedit.training.data.label.pace import Pace, Rejected, for_all, in_thread
from reasonedit.training.data.label.prompts import REPLIES, load_prompts
from reasonedit.training.data.label.replies import Decided, read_reply, schema_of
from reasonedit.training.data.label.runner import MOST_IN_A_ROW, Limits, Runner, key_of

CLEAR = '{"class": "clear", "category": "colour", "why": "It says so."}'
CLASSIFY = PROMPTS["classify"]


class Fixed:
    """Answers every question with the same text."""

    name, endpoint = "fixed", "scripted"

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts) or [CLEAR], []

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        self.asked.append(question)
        return Answer(self.texts[min(len(self.asked), len(self.texts)) - 1], 7, 3)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 6), (200, 10, 10)).save(path)
    return shown(path)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("REASONEDIT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def ask(folder: Path, annotator, picture, *instructions: str, limits: Limits = QUICK, **more):
    """(what came of each instruction, the runner)."""
    with Journal(folder / "journal.jsonl") as kept:
        runner = Runner(kept, limits, **more)

        async def label(instruction: str):
            reply, entry = await runner.ask(instruction, CLASSIFY, {"instruction": instruction}, [picture], annotator)
            return reply.clarity

        found = asyncio.run(for_all(instructions, label, at_once=2 * limits.concurrency))
    return [f"{each.step}: {each.reason}" if isinstance(each, Rejected) else each for each in found], runner


# ---- what an endpoint does


PASSING = ["status:429", "status:429,0", "status:500", "status:503,0", "truncated", "raw:<html>", 'raw:{"choices": []}']


@pytest.mark.parametrize("fault", [*PASSING, 'raw:{"error": "busy"}', 'raw:{"choices": [{"message": null}]}'])
def test_what_may_pass_is_asked_again(tmp_path, picture, fault):
    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: fault if number < 3 else None) as server:
        found, runner = ask(tmp_path, EndpointAnnotator(server.url, "m"), picture, "red")
        (entry,) = read_journal(tmp_path / "journal.jsonl").entries.values()
    assert found == ["clear"] and len(server.asked) == 3 == entry.attempts == runner.tally.asked
    assert (entry.tokens_in, entry.tokens_out) == (7, 3)  # of the one that answered


def test_a_slow_answer_is_given_up_and_asked_for_again(tmp_path, picture):
    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: "slow:20" if number == 1 else None) as server:
        limits = Limits(timeout=0.15, pause=0.001)
        found, _ = ask(tmp_path, EndpointAnnotator(server.url, "m", timeout=30), picture, "red", limits=limits)
    assert found == ["clear"] and len(server.asked) == 2


def test_the_sockets_own_time_out_counts_as_no_answer(tmp_path, picture):
    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: "slow:20") as server:
        annotator = EndpointAnnotator(server.url, "m", timeout=0.05)
        found, _ = ask(tmp_path, annotator, picture, "red", limits=Limits(timeout=30, attempts=2, pause=0.001))
    assert found == ["classify: no-answer"] and len(server.asked) == 2


def test_retry_after_is_honoured_and_holds_back_all_others(tmp_path, picture):
    waited = []

    async def wait(seconds: float) -> None:
        waited.append(seconds)
        await asyncio.sleep(0)

    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: "status:429,7" if number == 1 else None) as server:
        limits = Limits(concurrency=1, pause=0.5, longest_pause=100)

        class Clock(Pace):
            held = 0.0

            def hold(self, seconds: float) -> None:
                Clock.held = seconds

        with Journal(tmp_path / "j") as kept:
            runner = Runner(kept, limits, wait=wait)
            runner._pace = Clock(None, wait)
            asyncio.run(runner.ask("i", CLASSIFY, {"instruction": "red"}, [picture], EndpointAnnotator(server.url, "m")))
    assert waited == [7.0] and Clock.held == 7.0


def test_pauses_grow_and_have_a_bound(tmp_path, picture):
    waited = []

    async def wait(seconds: float) -> None:
        waited.append(seconds)

    limits = Limits(pause=1.0, attempts=5, longest_pause=3.0)
    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: "status:500") as server:
        found, _ = ask(tmp_path, EndpointAnnotator(server.url, "m"), picture, "red", limits=limits, wait=wait)
    assert found == ["classify: no-answer"] and len(server.asked) == 5
    assert 1 <= waited[0] <= 1.25 and 2 <= waited[1] <= 2.5 and waited[2:] == [3.0, 3.0]


UNREADABLE = ("clear, I think", '{"class": "clear"}', '{"class": "murky", "category": "c", "why": "w"}', "")


@pytest.mark.parametrize("text", UNREADABLE)
def test_an_answer_that_cannot_be_read_is_told_what_was_wrong_and_asked_for_again(tmp_path, picture, text):
    with FakeServer(Fixed(text, CLEAR), tmp_path / "seen") as server:
        found, _ = ask(tmp_path, EndpointAnnotator(server.url, "m"), picture, "red")
    first, second = ([part["text"] for part in each["messages"][1]["content"][1:]][0] for each in server.payloads)
    assert found == ["clear"] and "could not be used" not in first
    assert "could not be used" in second and "expected" in second and second.startswith(first)
    assert server.payloads[0]["seed"] != server.payloads[1]["seed"]


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("text:I cannot help with that.", "malformed", 4),
        ('text:{"class": "clear", "category": "x", "why": "y", "sure": true}', "malformed", 4),
        ("refusal", "refused", 1),
        ("filtered", "refused", 1),
        ("status:400", "not-taken", 1),
        ("status:413", "not-taken", 1),
        ("status:502", "no-answer", 4),
    ],
)
def test_bounded_attempts_end_in_a_reject_with_its_reason_which_a_restart_keeps(tmp_path, picture, fault, reason, requests):
    behave = lambda number, question: fault if question.inputs["instruction"] == "red" else None  # noqa: E731
    with FakeServer(Fixed(), tmp_path / "seen", behave) as server:
        annotator = EndpointAnnotator(server.url, "m")
        for _ in range(2):
            found, runner = ask(tmp_path, annotator, picture, "red", "blue")
            assert found == [f"classify: {reason}", "clear"]
            assert len(server.asked) == requests + 1
        server.behave = lambda number, question: None
        found, _ = ask(tmp_path, annotator, picture, "red", "blue", retry=True)
        assert found == ["clear", "clear"] and len(server.asked) == requests + 2
    entries = read_journal(tmp_path / "journal.jsonl").entries.values()
    assert all(entry.done for entry in entries)


def test_an_answer_that_was_cut_off_says_so_and_can_have_more_room(tmp_path, picture):
    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: "cut") as server:
        found, _ = ask(tmp_path, EndpointAnnotator(server.url, "m", extra_tokens=1000), picture, "red")
    (entry,) = read_journal(tmp_path / "journal.jsonl").entries.values()
    assert found == ["classify: malformed"] and "cut off" in entry.note and "--extra-tokens" in entry.note
    assert {payload["max_tokens"] for payload in server.payloads} == {CLASSIFY.max_tokens + 1000}


@pytest.mark.parametrize(("fault", "words"), [("status:401", "valid key"), ("status:404", "Check the address")])
def test_an_endpoint_that_cannot_be_used_ends_the_run_and_rejects_nothing(tmp_path, picture, fault, words):
    behave = lambda number, question: fault if number > 2 else None  # noqa: E731
    with FakeServer(Fixed(), tmp_path / "seen", behave) as server:
        with pytest.raises(ReasonerError, match=words):
            ask(tmp_path, EndpointAnnotator(server.url, "m"), picture, *"abcdef", limits=Limits(concurrency=1))
    kept = read_journal(tmp_path / "journal.jsonl").entries.values()
    assert len(kept) == 2 and all(entry.done for entry in kept)


def test_a_port_where_nothing_listens_ends_the_run(tmp_path, picture):
    with FakeServer(Fixed(), tmp_path / "seen") as server:
        pass
    with pytest.raises(ReasonerError, match="Start the endpoint"):
        ask(tmp_path, EndpointAnnotator(server.url, "m"), picture, "red")


def test_many_questions_without_any_answer_end_the_run_and_wait_for_a_retry(tmp_path, picture):
    words = [f"word {number}" for number in range(MOST_IN_A_ROW + 5)]
    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: "status:500") as server:
        annotator, limits = EndpointAnnotator(server.url, "m"), Limits(concurrency=1, attempts=1)
        with pytest.raises(ReasonerError, match=f"found none to {MOST_IN_A_ROW} questions in a row.*--retry"):
            ask(tmp_path, annotator, picture, *words, limits=limits)
        server.behave = lambda number, question: None
        found, _ = ask(tmp_path, annotator, picture, *words, limits=limits, retry=True)
    assert found == ["clear"] * len(words)


def test_the_key_is_sent_and_shown_nowhere(tmp_path, picture):
    with FakeServer(Fixed(), tmp_path / "seen", lambda number, question: "status:403") as server:
        annotator = EndpointAnnotator(server.url, "m", api_key="sk-secret")
        with pytest.raises(ReasonerError) as error:
            ask(tmp_path, annotator, picture, "red")
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error.value) and "***" in str(error.value)  # the answer repeated it


# ---- each question once


def test_a_restart_asks_nothing_that_is_known_and_another_model_asks_all(tmp_path, picture):
    with FakeServer(Fixed(), tmp_path / "seen") as server:
        for model, requests, known in (("m", 2, 0), ("m", 2, 2), ("other", 4, 0)):
            found, runner = ask(tmp_path, EndpointAnnotator(server.url, model), picture, "red", "blue")
            assert found == ["clear", "clear"] and len(server.asked) == requests and runner.tally.known == known


def test_the_same_question_of_two_items_is_asked_once(tmp_path, picture):
    slow = Fixed()
    answer = slow.answer
    slow.answer = lambda question, dropped: (time.sleep(0.05), answer(question, dropped))[1]
    with Journal(tmp_path / "j") as kept:
        runner = Runner(kept, QUICK)

        async def label(name: str):
            return (await runner.ask(name, CLASSIFY, {"instruction": "red"}, [picture], slow))[0].clarity

        assert asyncio.run(for_all("abcd", label, at_once=4)) == ["clear"] * 4
    assert len(slow.asked) == 1 and len(read_journal(tmp_path / "j").entries) == 1


def test_requests_at_a_time_are_bounded(tmp_path, picture):
    at_work, most = set(), []

    class Watched(Fixed):
        def answer(self, question, dropped):
            at_work.add(question.seed)
            most.append(len(at_work))
            time.sleep(0.02)
            at_work.discard(question.seed)
            return Answer(CLEAR)

    limits = Limits(concurrency=3, per_minute=6000)
    found, _ = ask(tmp_path, Watched(), picture, *map(str, range(12)), limits=limits)
    assert found == ["clear"] * 12 and max(most) <= 3


def test_turns_are_spread_over_time_and_held(monkeypatch):
    """On a clock that only waiting moves."""
    now, turns = [100.0], []
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])

    async def wait(seconds):
        now[0] += seconds

    async def main():
        spread = Pace(120, wait)
        for turn in range(5):
            await spread.slot()
            turns.append(now[0])
            if turn == 2:
                spread.hold(7)

    asyncio.run(main())
    assert turns == [100, 100.5, 101, 108, 108]  # the turns that passed while all were held are not lost


def test_what_an_answer_depends_on_is_in_its_key(tmp_path, picture):
    other = tmp_path / "b.png"
    Image.new("RGB", (8, 6), (10, 10, 200)).save(other)
    moved = tmp_path / "elsewhere" / "c.png"
    moved.parent.mkdir()
    moved.write_bytes(picture.path.read_bytes())
    given = ("classify", "1", "m", {"a": "1", "b": "2"}, [picture])
    same = key_of("classify", "1", "m", {"b": "2", "a": "1"}, [shown(moved)])
    assert key_of(*given) == same
    changes = [("verify", *given[1:]), ("classify", "2", *given[2:]), ("classify", "1", "n", *given[3:])]
    changes += [(*given[:3], {"a": "1", "b": "3"}, [picture]), (*given[:4], [shown(other)]), (*given[:4], [])]
    assert len({key_of(*each) for each in (given, *changes)}) == len(changes) + 1


def test_an_error_stops_all_items_and_is_raised():
    done = []

    async def label(number: int):
        if number == 3:
            raise KeyError("three")
        await asyncio.sleep(0 if number < 3 else 60)
        done.append(number)

    with pytest.raises(KeyError):
        asyncio.run(for_all(range(100), label, at_once=5))
    assert sorted(done) == [0, 1, 2]


def test_a_thread_that_hangs_keeps_nobody_waiting():
    hung, ended = threading.Event(), []

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_thread(lambda: ended.append(hung.wait(30))), 0.05)

    asyncio.run(main())
    assert not ended
    hung.set()


@pytest.mark.parametrize("values", [{"concurrency": 0}, {"attempts": 0}, {"timeout": 0}, {"per_minute": -1}, {"pause": -1}])
def test_limits_that_are_none_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Limits(**values)


# ---- replies


GOOD = '{"reason": "r", "verdict": "failed", "second_instruction": null}'


READABLE = (GOOD, f" {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}\n```", f"<think>{{}}</think>\n{GOOD}")


@pytest.mark.parametrize("text", READABLE)
def test_one_object_is_read_bare_fenced_or_after_thoughts(text):
    assert read_reply(text, Decided).verdict == "failed"


@pytest.mark.parametrize(
    "text",
    [
        GOOD[:-1],
        GOOD[:-9],
        GOOD + GOOD,
        f"Here it is: {GOOD}",
        f"[{GOOD}]",
        GOOD.replace('"failed"', '"Failed"'),
        GOOD.replace("null", '"paint it"'),
        GOOD.replace('"failed"', '"reflection"'),
        GOOD.replace('"r"', '" "'),
        GOOD.replace('"r"', "1"),
        GOOD.replace('"r"', "NaN"),
        GOOD.replace('"reason": "r"', '"reason": "r", "reason": "s"'),
        "[" * 50_000,
        " " * 200_000,
        "",
    ],
)
def test_what_is_not_just_that_object_is_not_read(text):
    with pytest.raises(MalformedReply, match="expected"):
        read_reply(text, Decided)


@pytest.mark.parametrize("reply", REPLIES.values())
def test_schemas_ask_for_every_key_and_for_no_other(reply):
    schema = schema_of(reply)
    assert schema["additionalProperties"] is False and set(schema["required"]) == set(schema["properties"])
    assert "title" not in json.dumps(schema)


# ---- prompts


DIGESTS = {
    "classify@1": "fa642ae9706e4fa8",
    "simplify@1": "31d7c62cb16c5f15",
    "abstract@1": "41a907d7c8bf6085",
    "verify@1": "50b067c4a500ddb2",
    "describe@1": "3d0ab2908d7376e4",
    "score@1": "1137e8bb2d09be30",
    "decide@1": "e25d25c6165fffa9",
    "audit@1": "30ec3f88723af17e",
    "expand@1": "c52ad7fdc9d3478b",
    "grade@1": "ab6077e4f29b3349",
    "rewrite@1": "23594d89408cd013",
    "rewrite_pair@1": "382b90e1e09ee1f1",
    "compare@1": "d74229a645bd2b0e",
}


def test_every_prompt_has_a_reply_and_its_words_are_told(picture):
    assert set(PROMPTS) == set(REPLIES)
    for prompt in PROMPTS.values():
        words = prompt.words({name: f"the {name} {{x}}" for name in prompt.tells}, "it had {no} sense")
        assert prompt.text.strip() in words and "it had {no} sense" in words
        assert all(f"<{name}>\nthe {name} {{x}}\n</{name}>" in words for name in prompt.tells)
        for key in prompt.schema["properties"]:
            assert f'"{key}"' in prompt.text, (prompt.id, key)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_prompt_whose_words_change_gets_another_version(name):
    found = {prompt.id: prompt.digest for prompt in load_prompts(name).values()}
    assert {each: DIGESTS[each] for each in found} == found, "raise the version of what was changed, then note its digest here"


# ---- pictures and speakers


def test_small_files_are_sent_as_they_are_and_others_upright_and_smaller(tmp_path, picture):
    kind, _, data = data_url(picture.path, 8).partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == picture.path.read_bytes()
    turned = Image.new("RGB", (40, 20), (0, 200, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    for side, size in ((8, (4, 8)), (100, (20, 40))):
        sent = base64.b64decode(data_url(tmp_path / "t.jpg", side).partition(",")[2])
        assert Image.open(io.BytesIO(sent)).size == size
    assert shown(tmp_path / "t.jpg").size == (20, 40)


def test_a_speaker_of_the_project_is_asked_with_pictures_and_words(picture):
    class Speaker:
        def answer(self, queries, *, on_text=None, should_stop=None):
            self.queries, self.stopped = queries, should_stop()
            return [CLEAR]

    speaker = Speaker()
    annotator = SpeakerAnnotator(speaker, "qwen")
    answer = annotator.answer(Question(CLASSIFY, {"instruction": "red"}, (picture,), 5), threading.Event())
    (query,) = speaker.queries
    assert CLASSIFY.read(answer.text).clarity == "clear" and not speaker.stopped
    assert query.parts == (0, CLASSIFY.words({"instruction": "red"})) and query.images[0].shape == (1, 3, 6, 8)
    assert (query.system, query.seed, query.max_new_tokens) == (CLASSIFY.system, 5, CLASSIFY.max_tokens)


def test_faults_of_an_endpoint_are_told_apart(picture, tmp_path):
    question = Question(CLASSIFY, {"instruction": "red"}, (picture,))
    cases = {"status:429,3": (Passing, 3.0, True), "status:500": (Passing, None, False), "status:422": (NotTaken, None, None)}
    for fault, (kind, pause, everyone) in cases.items():
        with FakeServer(Fixed(), tmp_path / "seen", lambda number, asked, fault=fault: fault) as server:
            with pytest.raises(kind) as error:
                EndpointAnnotator(server.url, "m").answer(question, threading.Event())
        assert getattr(error.value, "pause", None) == pause and getattr(error.value, "everyone", None) == everyone
