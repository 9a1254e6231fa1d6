"""A real ComfyUI for tests: started from COMFYUI_PATH on a free port of this machine, driven over HTTP and a websocket.

The interpreter is COMFYUI_PYTHON, or the one that runs the tests. Everything the server writes lies in a folder of the test.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest

from reasonedit.reasonedit_core.mini.models import PLACE
from reasonedit.tests.minis import stand_ins
from reasonedit.tests.pictures import draw_picture
from reasonedit.tests.tiny import tiny_checkpoint, tiny_reasonbrain

ROOT = Path(__file__).resolve().parent.parent
START_S = 120
RUN_S = 120


def comfyui_path() -> Path:
    """The ComfyUI to test against; skips the test, aloud, when there is none."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("NOT TESTED against a real ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON) to do so")
    if not (Path(path) / "main.py").is_file():
        pytest.fail(f"COMFYUI_PATH: expected a ComfyUI checkout with main.py, found none at {path}")
    return Path(path)


SMALL = {"conditioner_pixels": [3136, 6272], "reasoner_pixels": [3136, 6272], "size_level": 64, "steps": 2}
"""Settings that keep the pictures of a tiny checkpoint small."""


def fill(base: Path) -> None:
    """Put tiny checkpoints and a picture below `base`, under the names that our workflows use."""
    _copy(tiny_checkpoint("step1x-v1p2", std=0.2), base / "models" / "reasonedit" / "reasonedit-s")
    _copy(tiny_checkpoint("qwen-edit-plus", std=0.2), base / "models" / "reasonedit" / "reasonedit-q")
    shutil.copytree(tiny_reasonbrain(), base / "models" / "reasonedit" / "reasonbrain")
    files, mllm = tiny_checkpoint("comfy-qwen-files", std=0.2), tiny_checkpoint("qwen2.5-vl", std=0.2)
    for kind, name in (
        ("diffusion_models", "qwen_image_edit_2509_fp8_e4m3fn"),
        ("text_encoders", "qwen_2.5_vl_7b_fp8_scaled"),
        ("vae", "qwen_image_vae"),
    ):
        (source,) = (files / kind).glob("*.safetensors")
        beside = base / "models" / kind / name
        beside.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, beside.parent / f"{name}.safetensors")
        if kind == "diffusion_models":
            (beside / "reasonedit.json").write_text(json.dumps(SMALL))
        if kind == "text_encoders":  # the words of the tiny MLLM are not those that ComfyUI carries
            shutil.copytree(mllm, beside, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    (base / "input").mkdir(exist_ok=True)
    draw_picture(96, 64).save(base / "input" / "example.png")


def _copy(origin: Path, place: Path) -> None:
    shutil.copytree(origin, place)
    (place / "reasonedit.json").write_text(json.dumps(SMALL))


class ComfyServer:
    """A running server. `base` is its base directory; `log` the file with everything it said."""

    def __init__(self, base: Path, *flags: str, packs: dict[str, Path] | None = None) -> None:
        """packs: name below custom_nodes -> a folder (linked) or a Python file (copied as a package)."""
        comfyui_path()
        self.base, self.log, self.port = base, base / "server.log", _free_port()
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, origin in {"reasonedit": ROOT, **(packs or {})}.items():
            place = base / "custom_nodes" / name
            if origin.is_dir():
                place.symlink_to(origin, target_is_directory=True)
            else:
                place.mkdir()
                shutil.copy(origin, place / "__init__.py")
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", *flags]
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        # Large blocks go back to the system at once, so that resident memory says what is held.
        env |= {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
        if minis := stand_ins(base / "minis"):
            env[PLACE] = str(minis)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=comfyui_path(), env=env, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> ComfyServer:
        started = time.monotonic()
        while time.monotonic() - started < START_S:
            if self._process.poll() is not None:
                pytest.fail(f"ComfyUI ended with {self._process.returncode} at its start:\n{self.text()[-3000:]}")
            try:
                # Another test run may have taken the port between the choice and the start: it must be our own server.
                if str(self.base) in self.get("/system_stats")["system"]["argv"]:
                    return self
            except OSError:
                pass
            time.sleep(0.3)
        self.__exit__()
        pytest.fail(f"ComfyUI did not answer within {START_S} s:\n{self.text()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def text(self) -> str:
        """What the server has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def rss(self) -> int:
        """Resident memory of the server in bytes (Linux)."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def get(self, path: str) -> Any:
        """GET, JSON."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return json.load(reply)

    def post(self, path: str, value: Any = None) -> tuple[int, Any]:
        """POST JSON -> (HTTP status, JSON or None)."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(value or {}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                status, body = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        return status, json.loads(body) if body else None

    def run(self, prompt: dict[str, dict], *, on_event=None) -> Run:
        """Queue a prompt in API format and wait for its end. on_event: called with every event as it comes."""
        with Events(self.port) as events:
            status, reply = self.post("/prompt", {"prompt": prompt, "client_id": events.client})
            run = Run(status, reply)
            if status != 200:
                return run
            identity, ends = reply["prompt_id"], ("execution_success", "execution_error", "execution_interrupted")
            while not run.end:
                event = events.read(RUN_S)
                run.events.append(event)
                if on_event:
                    on_event(run)
                if event["type"] in ends and event["data"].get("prompt_id") == identity:
                    run.end, run.told = event["type"], event["data"]
        for _ in range(100):  # the history is written just after the last event
            if identity in (history := self.get(f"/history/{identity}")):
                run.outputs = history[identity]["outputs"]
                break
            time.sleep(0.02)
        return run


class Run:
    """What became of a prompt. told: the data of its last event; outputs: the `ui` of its nodes, by node."""

    def __init__(self, status: int, reply: Any) -> None:
        self.status, self.reply = status, reply
        self.events: list[dict] = []
        self.end, self.told, self.outputs = "", {}, {}

    def of(self, kind: str) -> list[dict]:
        """The data of all events of one type."""
        return [event["data"] for event in self.events if event["type"] == kind]


class Events:
    """The least of a websocket client: reads the server's text and binary frames."""

    PREVIEW, TEXT, PREVIEW_META = 1, 3, 4

    def __init__(self, port: int) -> None:
        self.client = uuid.uuid4().hex
        self._port, self._buffer = port, b""

    def __enter__(self) -> Events:
        self._socket = socket.create_connection(("127.0.0.1", self._port), 30)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET /ws?clientId={self.client} HTTP/1.1", f"Host: 127.0.0.1:{self._port}", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self._socket.recv(4096)
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        assert b" 101 " in head.split(b"\r\n")[0] + b" ", head
        self._send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}).encode())
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def read(self, timeout: float) -> dict:
        """The next event. Binary ones become {"type": "binary", "data": {"kind": ..., ...}}."""
        self._socket.settimeout(timeout)
        while True:
            code, payload = self._frame()
            if code == 1:
                return json.loads(payload)
            if code == 2:
                return {"type": "binary", "data": _binary(payload)}
            if code == 8:
                raise ConnectionError("the server closed the websocket")

    def _frame(self) -> tuple[int, bytes]:
        first, second = self._take(2)
        size = second & 127
        if size >= 126:
            size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
        return first & 15, self._take(size)

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            got = self._socket.recv(1 << 16)
            if not got:
                raise ConnectionError("the server went away")
            self._buffer += got
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _send(self, payload: bytes) -> None:
        mask = os.urandom(4)  # a client's frames are masked
        body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes([0x81, 0x80 | len(payload)]) + mask + body)


def _binary(payload: bytes) -> dict[str, Any]:
    (kind,) = struct.unpack(">I", payload[:4])
    if kind == Events.TEXT:
        size = int.from_bytes(payload[4:8], "big")
        return {"kind": kind, "node": payload[8 : 8 + size].decode(), "text": payload[8 + size :].decode()}
    if kind == Events.PREVIEW_META:
        size = int.from_bytes(payload[4:8], "big")
        return {"kind": kind, **json.loads(payload[8 : 8 + size])}
    return {"kind": kind}


def _free_port() -> int:
    """A port of 83xx that nobody listens on."""
    for port in random.SystemRandom().sample(range(8300, 8400), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    pytest.fail("no free port between 8300 and 8399")
