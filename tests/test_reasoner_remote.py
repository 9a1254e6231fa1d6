"""The remote speaker against a local endpoint that misbehaves on purpose."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core.dialogue.prompts import default_pack
from reasonedit.reasonedit_core.dialogue.replies import SCHEMAS
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted, ReasonerError
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.reasoners import endpoint
from reasonedit.reasonedit_core.reasoners.reasoner import PackReasoner
from reasonedit.reasonedit_core.reasoners.remote import MAX_SIDE, RemoteSpeaker, data_url

KEY = "sk-secret-123"


def completion(text="ok", **choice) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop", **choice}]}).encode()


def answer(body=None, code=200, **headers):
    """A behaviour: send one response. Underscores in header names stand for dashes."""
    body = completion() if body is None else body

    def behave(handler, request):
        handler.send_response(code)
        for name, value in {"Content_Length": len(body), "Content_Type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def close(handler, request):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def hang(handler, request):
    handler.server.released.wait(5)


def events(*texts, end=True, code=200):
    lines = [b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n" for text in texts]
    body = b": comment\n\n" + b"".join(lines) + (b"data: [DONE]\n\n" if end else b"")
    return answer(body, code, Content_Type="text/event-stream")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.seen.append((self.path, None, dict(self.headers)))
        self.server.models(self, None)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, request, dict(self.headers)))
            behave = self.server.script.pop(0) if self.server.script else answer()
        behave(self, request)


@pytest.fixture
def server(monkeypatch):
    for name in ("REASONEDIT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.seen, server.lock, server.released = [], [], threading.Lock(), threading.Event()
    server.models = answer(b'{"data": [{"id": "first"}, {"id": "second"}]}')
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def speaker(server, **options) -> RemoteSpeaker:
    return RemoteSpeaker(server.url, **{"model": "m", "pause": 0.0, "timeout": 5.0, **options})


def ask(*parts, task="think", form="free", images=(), **options) -> Query:
    return Query(task, "SYSTEM", parts or ("hello",), images, form, **options)


# ---- the question --------------------------------------------------------------------------------------------------------


def test_the_question_as_it_is_sent(server):
    image = torch.rand(1, 3, 6, 8)
    query = ask(0, "before", 0, images=(image,), max_new_tokens=33, temperature=0.5, top_p=0.8, seed=7)
    assert speaker(server).answer([query]) == ["ok"]
    ((path, sent, headers),) = server.seen
    assert path == "/v1/chat/completions"
    user = sent.pop("messages")[1]["content"]
    assert sent == {"model": "m", "max_tokens": 33, "temperature": 0.5, "top_p": 0.8, "seed": 7, "stream": False}
    assert [item["type"] for item in user] == ["image_url", "text", "image_url"]
    assert "Authorization" not in headers
    kind, _, data = user[0]["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (shown.size, shown.mode) == ((8, 6), "RGB")
    assert shown.getpixel((7, 5)) == tuple((image[0, :, 5, 7] * 255).round().int().tolist())


def test_large_pictures_are_shrunk():
    shown = Image.open(io.BytesIO(base64.b64decode(data_url(torch.rand(1, 3, 20, 3 * MAX_SIDE)).partition(",")[2])))
    assert shown.size == (MAX_SIDE, 7)


def test_schema_goes_with_forms_that_have_one(server):
    asked = [ask(form=form, task="score") for form in ("consistency", "pair", "verdict", "free")]
    remote = speaker(server)
    for query in asked:
        remote.answer([query])
    formats = [request.get("response_format") for _, request, _ in server.seen]
    assert [sent and sent["json_schema"]["schema"] for sent in formats] == [SCHEMAS["consistency"], SCHEMAS["pair"], None, None]
    server.seen.clear()
    speaker(server, schema=False).answer([asked[0]])
    assert "response_format" not in server.seen[0][1]


@pytest.mark.parametrize("code", [400, 422])
def test_a_refused_schema_is_left_out_and_remembered(server, code):
    server.script[:] = [answer(b'{"error": "response_format is not supported"}', code)]
    remote = speaker(server)
    for _ in range(2):
        assert remote.answer([ask(form="pair")]) == ["ok"]
    assert ["response_format" in request for _, request, _ in server.seen] == [True, False, False]


def test_the_first_model_is_used_when_none_is_named(server):
    remote = speaker(server, model=None)
    remote.answer([ask(), ask()])
    remote.answer([ask()])
    assert [path for path, _, _ in server.seen].count("/v1/models") == 1
    assert {request["model"] for _, request, _ in server.seen if request} == {"first"}
    server.models = answer(b'{"data": []}')
    with pytest.raises(ReasonerError, match="at least one model"):
        speaker(server, model=None).answer([ask()])


def test_independent_questions_are_asked_at_the_same_time_in_order(server):
    together = threading.Barrier(4, timeout=5)

    def behave(handler, request):
        together.wait()
        answer(completion(request["messages"][1]["content"][0]["text"]))(handler, request)

    server.script[:] = [behave] * 8
    texts = [f"q{index}" for index in range(8)]
    assert speaker(server).answer([ask(text) for text in texts]) == texts


# ---- what may heal -------------------------------------------------------------------------------------------------------

HALF = completion("a long text that is cut")[:25]
PASSING = {
    "429": answer(b"slow down", 429, Retry_After="0"),
    "500": answer(b"oops", 500),
    "503 empty": answer(b"", 503),
    "nothing": close,
    "empty body": answer(b""),
    "half a json, wrong length": answer(HALF, Content_Length=500),
    "half a json": answer(HALF),
    "not json": answer(b"<html>hello</html>", Content_Type="text/html"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_one_retry_then_a_clear_error(server, fault):
    server.script[:] = [PASSING[fault]]
    assert speaker(server).answer([ask()]) == ["ok"]
    assert len(server.seen) == 2
    server.seen.clear()
    server.script[:] = [PASSING[fault]] * 3
    with pytest.raises(ReasonerError) as caught:
        speaker(server).answer([ask()])
    assert len(server.seen) == 2
    message = str(caught.value)
    assert message.startswith(f"{server.url}/chat/completions: expected") and "twice" in message
    assert message.endswith(".") and message.count(". ") >= 1  # what was found, then what to do
    assert ("bytes short" in message) == (fault == "half a json, wrong length")
    if fault[:3].isdigit():
        assert f"HTTP {fault[:3]}" in message


def test_retry_after_is_honoured_and_capped(server):
    waits = []

    class Dropped(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    asked = endpoint.Endpoint(server.url, api_key=None, timeout=5, pause=0.25, refused=set())
    for headers in ({"Retry_After": "0.3"}, {"Retry_After": "3600"}, {}):
        server.script[:] = [answer(b"", 429, **headers)]
        asked.ask("/chat/completions", {}, lambda reply: reply.read(), Dropped())
    assert waits == [0.3, endpoint.MAX_PAUSE, 0.25]
    for value in ("Fri, 31 Dec 2100 23:59:59 GMT", "nan", "-5"):
        server.script[:] = [answer(b"", 429, Retry_After=value)]
        assert speaker(server).answer([ask()]) == ["ok"]


# ---- what will not -------------------------------------------------------------------------------------------------------

FATAL = {
    "401": (answer(b"bad key", 401), "REASONEDIT_API_KEY"),
    "404": (answer(b"no model", 404), "named model"),
    "400": (answer(b"images are not supported", 400), "takes pictures"),
    "302": (answer(b"", 302, Location="http://127.0.0.1:9/"), "Give that address"),
    "no choices": (answer(b'{"error": {"message": "model crashed"}}'), "model crashed"),
    "empty choices": (answer(b'{"choices": []}'), "choices"),
    "choices of another kind": (answer(b'{"choices": "none"}'), "choices"),
    "a list": (answer(b"[1]"), "without an object"),
    "no text": (answer(completion(None, finish_reason="length")), "max_new_tokens"),
}


@pytest.mark.parametrize("fault", FATAL)
def test_lasting_faults_are_not_repeated(server, fault):
    behave, message = FATAL[fault]
    server.script[:] = [behave] * 2
    with pytest.raises(ReasonerError, match=message) as caught:
        speaker(server).answer([ask()])
    assert len(server.seen) == 1
    assert server.url in str(caught.value)


def test_timeout(server):
    server.script[:] = [hang]
    with pytest.raises(ReasonerError, match=r"no answer within 0.2 s. Raise the timeout"):
        speaker(server, timeout=0.2).answer([ask()])


def test_a_dead_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ReasonerError, match=f"127.0.0.1:{port}.*refused.*Start the endpoint"):
        RemoteSpeaker(f"http://127.0.0.1:{port}", model="m").answer([ask()])


def test_one_failure_drops_the_others(server):
    server.script[:] = [answer(b"no", 404), hang, hang, hang]
    with pytest.raises(ReasonerError, match="404"):
        speaker(server).answer([ask(str(index)) for index in range(6)])
    server.released.set()
    time.sleep(0.1)
    assert len(server.seen) <= 4  # those not yet asked were dropped


def test_text_in_parts_is_joined(server):
    server.script[:] = [answer(completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))]
    assert speaker(server).answer([ask()]) == ["ab"]


# ---- streaming and stopping ----------------------------------------------------------------------------------------------


def test_streams_only_when_somebody_listens(server):
    told = []
    server.script[:] = [events("a", "b红", "")]
    assert speaker(server).answer([ask()], on_text=lambda *text: told.append((*text, threading.current_thread()))) == ["ab红"]
    here = threading.current_thread()
    assert told == [("think", "a", here), ("think", "ab红", here)]
    assert server.seen[0][1]["stream"] is True


def test_endpoints_that_do_not_stream_are_heard_too(server):
    told = []
    assert speaker(server).answer([ask()], on_text=lambda *text: told.append(text)) == ["ok"]
    assert told == [("think", "ok")]


@pytest.mark.parametrize(
    "broken", [events("a", end=False), answer(b'data: {"choices": [{"del', Content_Type="text/event-stream")]
)
def test_half_a_stream_is_asked_for_again(server, broken):
    server.script[:] = [broken, events("whole")]
    assert speaker(server).answer([ask()], on_text=lambda *_: None) == ["whole"]
    server.script[:] = [broken] * 2
    with pytest.raises(ReasonerError, match="stream|event"):
        speaker(server).answer([ask()], on_text=lambda *_: None)


def test_an_error_inside_a_stream(server):
    server.script[:] = [answer(b'data: {"error": "out of memory"}\n\n', Content_Type="text/event-stream")]
    with pytest.raises(ReasonerError, match="out of memory"):
        speaker(server).answer([ask()], on_text=lambda *_: None)


def test_a_waiting_question_is_stopped_at_once(server):
    server.script[:] = [hang]
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        speaker(server).answer([ask()], should_stop=lambda: time.monotonic() - begun > 0.2)
    assert not server.released.is_set(), "it was not waited for"


def test_stopping_between_tries(server):
    server.script[:] = [answer(b"", 503, Retry_After="20")] * 2
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        speaker(server).answer([ask()], should_stop=lambda: bool(server.seen) and time.monotonic() - begun > 0.2)
    assert len(server.seen) == 1


# ---- addresses and keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        (" http://h/v1/ ", "http://h/v1"),
        ("https://h/api/v3/chat/completions", "https://h/api/v3"),
        ("http://[::1]:1/v1", "http://[::1]:1/v1"),
    ],
)
def test_addresses(url, base):
    assert RemoteSpeaker(url).base == base


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://", "", "http://user:pass@h/v1", "file:///etc/passwd"])
def test_other_addresses_are_refused(url):
    with pytest.raises(ConfigError) as caught:
        RemoteSpeaker(url)
    assert "pass@" not in str(caught.value)


def test_keys_come_from_the_environment_and_stay_hidden(server, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("REASONEDIT_API_KEY", f" {KEY}\n")
    remote = speaker(server)
    server.script[:] = [answer(f"echo {KEY}".encode(), 500), answer(f"wrong key {KEY}".encode(), 401)]
    with caplog.at_level(logging.DEBUG), pytest.raises(ReasonerError) as caught:
        remote.answer([ask()])
    assert server.seen[0][2]["Authorization"] == f"Bearer {KEY}"
    shown = f"{caplog.text} {caught.value!r} {caught.value} {remote!r} {caught.value.__cause__!r}"
    assert "wrong key ***" in shown and KEY not in shown
    server.script[:] = [answer(f"echo {KEY}".encode(), 500)] * 2
    with pytest.raises(ReasonerError, match=r"echo \*\*\*") as caught:
        remote.answer([ask()])
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    monkeypatch.delenv("REASONEDIT_API_KEY")
    speaker(server).answer([ask()])
    assert server.seen[-1][2]["Authorization"] == "Bearer other"
    speaker(server, api_key="mine").answer([ask()])
    assert server.seen[-1][2]["Authorization"] == "Bearer mine"
    # The key of another service does not leave the machine unencrypted.
    assert endpoint._key("http://judge.example/v1", None) == ""
    assert endpoint._key("https://judge.example/v1", None) == "other"
    with pytest.raises(ConfigError, match="plain characters"):
        RemoteSpeaker("http://h", api_key="two words")


# ---- with the reasoner ---------------------------------------------------------------------------------------------------


def test_an_unreadable_reply_is_answered_with_what_was_wrong(server):
    server.script[:] = [answer(completion("<think> on and on")), answer(completion("Paint it red."))]
    thought = PackReasoner(default_pack(), speaker(server)).think(torch.zeros(1, 3, 4, 4), "festive")
    assert thought.instruction == "Paint it red."
    first, second = (request["messages"][1]["content"] for _, request, _ in server.seen)
    assert second[:-1] == first and "thoughts without an end" in second[-1]["text"]
