"""`reasonedit download` against a small hub on this machine, through HF_ENDPOINT, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from reasonedit.reasonedit_core import download as module
from reasonedit.reasonedit_core.dialogue.prompts import find_pack
from reasonedit.reasonedit_core.download import File
from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError, ReasonEditError

CONFTEST = Path(__file__).with_name("conftest.py")
COMMIT = "c0ffee" * 6 + "c0ff"
SMALL = json.dumps({"_class_name": "Step1XEditPipelineV1P2"}).encode()
BIG = bytes(range(256)) * (96 * 1024)  # 24 MiB: huggingface_hub writes in steps of 10 MB
FILES = {
    "model_index.json": SMALL,
    "transformer/diffusion_pytorch_model.safetensors": BIG,
    "text_encoder/merges.txt": b"#version: 0.2\n",
    "text_encoder/chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"Apache",
    "pytorch_model.bin": b"pickled",
    "preview.png": b"png",
}
FETCHED = set(FILES) - {"pytorch_model.bin", "preview.png"}


class Hub(ThreadingHTTPServer):
    """The few answers of the Hugging Face hub that a download needs. cut: bytes after which big files break off for good."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.cut, self.ranges, self.sent = dict(FILES), None, [], 0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        owner = "/api/models/stepfun-ai/Step1X-Edit-v1p2/"
        if path.startswith(owner + "revision/"):
            revision = path.removeprefix(owner + "revision/")
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            files = [entry(name, data) for name, data in self.server.files.items()]
            name = "stepfun-ai/Step1X-Edit-v1p2"
            return self.json({"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "private": False, "tags": []})
        prefix = f"/stepfun-ai/Step1X-Edit-v1p2/resolve/{COMMIT}/"
        if path.startswith(prefix):
            return self.file(self.server.files[path.removeprefix(prefix)])
        if path == "/raw/src/diffusers/pipelines/step1x_edit/pipeline_step1x_edit_v1p2.py":
            return self.body(b'EDIT_PREFIX = "Look, then edit: "\nPREFIX_LEN = 90\n', {"Content-Type": "text/plain"})
        if path.startswith("/api/models/gated/"):
            return self.refuse(403, "GatedRepo")
        return self.refuse(404, "RepoNotFound")

    def refuse(self, code: int, name: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("X-Error-Message", name)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, value) -> None:
        self.body(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, data: bytes) -> None:
        headers = {"ETag": f'"{tag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None or self.command == "HEAD":
            return self.body(data, headers)
        self.server.ranges.append(wanted)
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        last = min(int(end), len(data) - 1) if end else len(data) - 1
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        self.body(data[int(start) : last + 1], headers, 206)

    def body(self, data: bytes, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut if self.server.cut is not None and len(data) > 1_000_000 else None
        self.server.sent += len(data[:cut])
        self.wfile.write(data[:cut])
        if cut is not None:
            self.server.cut, self.close_connection = 0, True


def tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def entry(name: str, data: bytes) -> dict:
    """A file as the hub lists it; large ones lie in LFS and state their sha256."""
    row = {"rfilename": name, "size": len(data), "blobId": tag(data)}
    if len(data) > 1_000_000:
        row["lfs"] = {"size": len(data), "sha256": hashlib.sha256(BIG).hexdigest(), "pointerSize": 134}
    return row


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def reasonedit(hub: Hub, *args: str, seconds: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process whose hub is ours."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "from reasonedit.reasonedit_core.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "TOKEN" not in k}
    return subprocess.run(
        [sys.executable, "-c", code, str(CONFTEST), *args],
        capture_output=True, text=True, timeout=seconds, env={**kept, **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_weights_arrive_whole_without_pickles_and_a_missing_pack_is_told(hub, tmp_path):
    done = reasonedit(hub, "download", "reasonedit-s", "--to", str(tmp_path / "w"), "--dialogue-from", str(tmp_path / "nope"))
    assert done.returncode == 3, done.stderr
    for name in FETCHED:
        assert (tmp_path / "w" / name).read_bytes() == FILES[name]
    assert not (tmp_path / "w/pytorch_model.bin").exists() and not (tmp_path / "w/preview.png").exists()
    assert not (tmp_path / "w/dialogue.toml").exists()
    assert "5 files" in done.stdout and COMMIT[:12] in done.stdout
    assert "the dialogue pack is missing" in done.stderr and "reasonedit dialogue import" in done.stderr
    assert "Traceback" not in done.stderr
    before = hub.sent
    again = reasonedit(hub, "download", "reasonedit-s", "--to", str(tmp_path / "w"), "--dialogue-from", str(tmp_path / "nope"))
    assert again.returncode == 3 and hub.sent - before < 10_000, "a second run fetches no weights again"


def test_the_dialogue_pack_comes_in_the_same_go(hub, tmp_path):
    done = reasonedit(hub, "download", "reasonedit-s", "--to", str(tmp_path), "--dialogue-from", f"{hub.url}/raw")
    assert done.returncode == 0, done.stderr
    assert f"dialogue pack: {tmp_path / 'dialogue.toml'}" in done.stdout
    choice = find_pack(weights=tmp_path, variant="v1p2")
    prompt = choice.pack.conditioning_for("v1p2")
    assert choice.origin == "weights" and (prompt.prefix, prompt.dropped_tokens) == ("Look, then edit: ", 90)
    assert "task.think" in done.stderr, "what the source lacks is named"


def test_a_cut_download_fails_aloud_and_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut = 14_000_000
    args = ("download", "reasonedit-s", "--to", str(tmp_path), "--dialogue-from", str(tmp_path / "nope"))
    cut = reasonedit(hub, *args)
    assert cut.returncode == 2 and "goes on where it stopped" in cut.stderr and "Traceback" not in cut.stderr
    assert not (tmp_path / "transformer/diffusion_pytorch_model.safetensors").exists(), "a part must not look like a whole"
    (part,) = tmp_path.rglob("*.part")
    have = part.stat().st_size
    assert 10_000_000 <= have <= 14_000_000
    hub.cut, hub.sent, hub.ranges = None, 0, []
    whole = reasonedit(hub, *args)
    assert whole.returncode == 3, whole.stderr
    assert (tmp_path / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == BIG
    assert hub.ranges == [f"bytes={have}-"] and hub.sent < len(BIG) - have + 10_000, "bytes were fetched twice"
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_with_other_contents_than_published_is_not_put_in_its_place(hub, tmp_path):
    hub.files["transformer/diffusion_pytorch_model.safetensors"] = BIG[::-1]
    done = reasonedit(hub, "download", "reasonedit-s", "--to", str(tmp_path))
    assert done.returncode == 2 and "this file starts anew" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--revision", "v9"), "found no revision 'v9'"),
        (("--repo", "nobody/nothing"), "found none called 'nobody/nothing'"),
        (("--repo", "gated/one"), "accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_sentence(hub, tmp_path, args, words):
    done = reasonedit(hub, "download", "reasonedit-s", "--to", str(tmp_path), *args)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert os.listdir(tmp_path) == []


def test_no_hub_is_an_error_even_where_a_part_of_the_files_lies(hub, tmp_path):
    (tmp_path / "model_index.json").write_bytes(SMALL)
    args = ("download", "reasonedit-s", "--to", str(tmp_path))
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        done = reasonedit(hub, *args, **environment)
        assert done.returncode == 2 and "expected an answer of the Hugging Face hub" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


class Usage:
    free = 10**9


def test_too_small_a_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: Usage)
    with pytest.raises(ConfigError, match=r"expected 25\.\d GB of free space, found 1\.0 GB"):
        module._check_space(tmp_path / "not" / "there", [File("a.safetensors", 25 * 10**9)])
    module._check_space(tmp_path, [File("a.safetensors", 10**8)])


def test_files_and_parts_that_are_there_need_no_space(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: Usage)
    big = File("b.safetensors", 25 * 10**9)
    part = module._part(tmp_path, big)
    part.parent.mkdir(parents=True)
    with open(part, "wb") as file:
        file.truncate(24 * 10**9 + 5 * 10**8)  # sparse: takes no room here
    module._check_space(tmp_path, [big])
    part.replace(tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="free space"):
        module._check_space(tmp_path, [big])
    os.truncate(tmp_path / "b.safetensors", 25 * 10**9)
    module._check_space(tmp_path, [big])


@pytest.mark.parametrize(
    ("name", "is_wanted"),
    [
        ("transformer/diffusion_pytorch_model-00001-of-00003.safetensors", True),
        ("text_encoder/model.safetensors.index.json", True),
        ("LICENSE.md", True),
        ("text_encoder/pytorch_model.bin", False),
        ("scheduler.pt", False),
        (".gitattributes", False),
        ("../evil.json", False),
        ("/etc/evil.json", False),
    ],
)
def test_what_is_fetched(name, is_wanted):
    assert module.wanted(name) is is_wanted


def test_a_pack_that_comes_is_written_beside_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "list_files", lambda repo, revision: (COMMIT, []))
    monkeypatch.setattr(module, "_fetch", lambda *args: None)
    asked = []

    def put(source, variant, target):
        asked.append((source, variant, target))
        return target, ""

    monkeypatch.setattr(module, "_import_pack", put)
    done = module.download("reasonedit-s", tmp_path)
    assert asked == [(None, "step1x-v1p2", tmp_path / "dialogue.toml")]
    assert done.pack == tmp_path / "dialogue.toml" and not done.pack_problem
    assert module.download("reasonedit-q", tmp_path).pack is None and len(asked) == 1, "Qwen-Image needs no pack"


def test_unknown_system_and_a_file_as_folder(tmp_path):
    with pytest.raises(ConfigError, match="reasonedit-s, reasonedit-q.*'sdxl'"):
        module.download("sdxl", tmp_path)
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="--to: expected a folder, found the file"):
        module.download("reasonedit-s", tmp_path / "f")


def test_network_errors_belong_to_our_tree():
    assert issubclass(BackendUnavailable, ReasonEditError)
    assert "ConnectionError: no route" in str(module._unreachable("a/b", ConnectionError("no route\nmore")))
