"""A chat endpoint on this machine that answers truly or misbehaves as told, and kills at chosen points.

Use: `from reasonedit.tests.label_tools import FakeServer, Killer, ...`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from reasonedit.reasonedit_core import files
from reasonedit.reasonedit_core.reasoners.endpoint import Endpoint
from reasonedit.training.data.label import journal
from reasonedit.training.data.label.annotators import Question, Refused, shown
from reasonedit.training.data.label.prompts import Prompt, load_prompts
from reasonedit.training.data.label.runner import Limits

PIPELINES = ("thinking_pairs", "reflection_triples", "reason50k")
PROMPTS = {step: prompt for name in PIPELINES for step, prompt in load_prompts(name).items()}
QUICK = Limits(concurrency=3, timeout=60.0, attempts=4, pause=0.001)  # a busy machine is no fault of the endpoint
_VALUE = re.compile(r"<(\w+)>\n(.*?)\n</\1>", re.DOTALL)


class FakeServer:
    """annotator: answers the questions; behave: (number of the request, its question) -> what goes wrong, None for nothing.

    asked: the questions that came, in order. Pictures that came are kept in `folder`. prompts: of which it is asked, by step.
    """

    def __init__(
        self,
        annotator: Any,
        folder: Path,
        behave: Callable[[int, Question], str | None] | None = None,
        prompts: Mapping[str, Prompt] = PROMPTS,
    ) -> None:
        self.annotator, self.folder, self.behave = annotator, folder, behave or (lambda number, question: None)
        self.prompts = prompts
        self.asked: list[Question] = []
        self.payloads: list[dict] = []
        self.headers: list[dict] = []
        self.released = threading.Event()
        self.errors: list[str] = []
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> FakeServer:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.fake = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        assert self.errors == []

    def take(self, payload: dict, headers: dict) -> tuple[int, Question]:
        question = self._question(payload)
        with self._lock:
            self.asked.append(question)
            self.payloads.append(payload)
            self.headers.append(headers)
            return len(self.asked), question

    def counts(self) -> Counter[tuple]:
        """How often each question came."""
        return Counter(
            (each.prompt.id, *sorted(each.inputs.items()), *(picture.sha256 for picture in each.pictures))
            for each in self.asked
        )

    def _question(self, payload: dict) -> Question:
        prompt = self.prompts[payload["response_format"]["json_schema"]["name"]]
        content = payload["messages"][1]["content"]
        told = dict(_VALUE.findall(content[-1]["text"]))
        pictures = []
        for part in content[:-1]:
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            path = self.folder / f"{hashlib.sha256(data).hexdigest()}.png"
            if not path.exists():
                _put(path, data)
            pictures.append(shown(path))
        return Question(prompt, {name: told[name] for name in prompt.tells}, tuple(pictures), payload["seed"])


def _put(path: Path, data: bytes) -> None:
    """Not by `write_whole`, whose renames are counted."""
    part = path.with_suffix(f".{threading.get_ident()}")
    part.write_bytes(data)
    part.rename(path)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: Any, address: Any) -> None:
        self.fake.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        fake: FakeServer = self.server.fake
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number, question = fake.take(payload, dict(self.headers))
        try:
            self._misbehave(fake.behave(number, question), fake, question)
        except (BrokenPipeError, ConnectionResetError):  # who asked is gone
            pass

    def _misbehave(self, fault: str | None, fake: FakeServer, question: Question) -> None:
        name, _, value = (fault or "").partition(":")
        match name:
            case "status":
                after = {"Retry-After": value.split(",")[1]} if "," in value else {}
                body = json.dumps({"error": "as told", "you said": self.headers.get("Authorization")}).encode()
                self._send(int(value.split(",")[0]), body, after)
            case "slow":
                fake.released.wait(float(value))
            case "truncated":
                body = self._body(fake, question)
                self._send(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
            case "raw":
                self._send(200, value.encode())
            case "text":
                self._send(200, _message({"content": value}))
            case "refusal":
                self._send(200, _message({"content": None, "refusal": "I would rather not."}))
            case "cut":
                self._send(200, _message({"content": '{"class": "cl'}, "length"))
            case "filtered":
                self._send(200, _message({"content": ""}, "content_filter"))
            case _:
                self._send(200, self._body(fake, question))

    def _body(self, fake: FakeServer, question: Question) -> bytes:
        try:
            answer = fake.annotator.answer(question, threading.Event())
        except Refused as refused:
            return _message({"content": None, "refusal": str(refused)})
        usage = {"prompt_tokens": answer.tokens_in, "completion_tokens": answer.tokens_out}
        return _message({"content": answer.text}, usage=usage)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _message(message: dict, reason: str = "stop", **more: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": reason}], **more}).encode()


# ---- kills ---------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill is in these tests: nothing of ours catches it, and nothing is written after it."""


class Killer:
    """Counts the points at which a run may be killed, and kills at the one with a number (from 1), if any.

    Points: a request about to go out; its answer come back and not yet noted; a journal line half written; one written and not
    yet flushed; a file about to be renamed; one just renamed. After a kill every further point kills as well.
    """

    def __init__(self, monkeypatch: Any, number: int | None = None) -> None:
        self.number, self.kinds = number, []
        self._lock = threading.Lock()
        once, append, replace = Endpoint.once, journal._append, os.replace

        def killing_once(endpoint: Endpoint, *args: Any) -> Any:
            self.point("request-out")
            answer = once(endpoint, *args)
            self.point("request-back")
            return answer

        def killing_append(file: int, data: bytes) -> None:
            if self.dies("write-torn"):
                os.write(file, data[: len(data) // 2])
                raise Killed("write-torn")
            if self.dies("write-unflushed"):
                os.write(file, data)
                raise Killed("write-unflushed")
            append(file, data)

        def killing_replace(part: Any, path: Any) -> None:
            self.point("rename-before")
            replace(part, path)
            self.point("rename-after")

        monkeypatch.setattr(Endpoint, "once", killing_once)
        monkeypatch.setattr(journal, "_append", killing_append)
        monkeypatch.setattr(files.os, "replace", killing_replace)

    @property
    def killed(self) -> bool:
        return self.number is not None and len(self.kinds) >= self.number

    def check(self) -> None:
        """What begins after a kill dies at once: in one process with the test, threads that wait outlive it."""
        if self.killed:
            raise Killed("already")

    def dies(self, kind: str) -> bool:
        with self._lock:
            if self.killed:
                raise Killed(f"already, before {kind}")
            self.kinds.append(kind)
            return self.killed

    def point(self, kind: str) -> None:
        if self.dies(kind):
            raise Killed(kind)


def join_requests() -> None:
    """Wait for the threads of a killed run, while the killer is still there: in one process with the test they outlive it."""
    for thread in threading.enumerate():
        if thread.name == "reasonedit-data":
            thread.join(30)
            assert not thread.is_alive()


def chosen_points(kinds: Sequence[str], number: int, seed: int) -> list[int]:
    """`number` points (from 1) of a run that passed `kinds`, every kind among them."""
    dice = random.Random(seed)
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds, 1):
        places.setdefault(kind, []).append(place)
    for each in places.values():
        dice.shuffle(each)
    chosen: list[int] = []
    while len(chosen) < number:
        chosen += [each.pop() for each in places.values() if each]
    return chosen[:number]


def without_times(lines: str) -> list[dict]:
    """Records without the times at which their questions were answered, which differ from run to run."""
    found = [json.loads(line) for line in lines.splitlines()]
    for record in found:
        for step in record["provenance"]:
            step.pop("time", None)
    return found
