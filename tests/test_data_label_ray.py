"""The pipelines in two workers of a Ray on this machine: the same records, nothing asked again, faults kept apart."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from reasonedit.reasonedit_core.errors import ConfigError, ReasonerError
from reasonedit.tests.label_tools import FakeServer, without_times
from reasonedit.training.data.label import ray_workers
from reasonedit.training.data.label.cli import build_parser, main
from reasonedit.training.data.label.journal import Journal, read_journal
from reasonedit.training.data.label.ray_workers import Worker, shared, spread
from reasonedit.training.data.label.runner import Limits
from reasonedit.training.mini.labelling import World, WorldAnnotator, write_seeds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder, 6, 3)
    return folder


def command(seeds: Path, out: Path, *more: str) -> list[str]:
    return ["thinking-pairs", str(seeds), "--out", str(out), "--quiet", "--held-out", "0.3", *more]


def test_a_worker_answers_its_share_and_gives_back_rows(seeds, tmp_path):
    """Without Ray: a worker is a class that turns numbers into rows."""
    args = build_parser().parse_args(command(seeds, tmp_path / "out", "--world", str(seeds), "--ray", "2"))
    rows = Worker(dict(vars(args)), str(tmp_path))({"id": [0, 1, 2]})
    assert rows["fault"] == [""] * len(rows["line"]) and len(rows["line"]) >= 6
    assert not (tmp_path / "out/journal.jsonl").exists(), "only the one who was started by hand writes"
    with Journal(tmp_path / "out/journal.jsonl") as kept:
        for line in rows["line"]:
            kept.add(ray_workers.entry_of(line))
    again = Worker(dict(vars(args)), str(tmp_path))({"id": [0, 1, 2]})
    assert again == {"line": [], "fault": []}, "what the journal holds is not asked again"


def test_what_ends_a_worker_comes_back_as_a_row_after_its_answers(seeds, tmp_path, monkeypatch):
    args = build_parser().parse_args(
        command(seeds, tmp_path / "out", "--world", str(seeds), "--ray", "1", "--concurrency", "1")
    )

    def failing(self, question, dropped, answer=WorldAnnotator.answer, asked=[]):  # noqa: B006
        asked.append(question)
        if len(asked) > 4:
            raise ReasonerError("the endpoint is gone")
        return answer(self, question, dropped)

    monkeypatch.setattr(WorldAnnotator, "answer", failing)
    rows = Worker(dict(vars(args)), str(tmp_path))({"id": list(range(6))})
    assert rows["fault"] == ["", "", "", "", "the endpoint is gone"] and rows["line"][-1] == "" and all(rows["line"][:-1])


def fake_ray(data):
    """What of Ray the writer touches."""
    return argparse.Namespace(data=data, exceptions=argparse.Namespace(RayError=LostError))


class LostError(Exception):
    """In the place of Ray's own."""


def test_rows_are_written_before_a_fault_is_raised(tmp_path, seeds):
    args = build_parser().parse_args(command(seeds, tmp_path / "out", "--world", str(seeds), "--ray", "2"))
    made = Worker(dict(vars(args)), str(tmp_path))({"id": [0]})

    class Rows:
        def iter_rows(self):
            yield {"line": "", "fault": "the endpoint is gone"}
            yield from ({"line": line, "fault": ""} for line in made["line"])

        def map_batches(self, *args, **options):
            assert options["batch_size"] == 3 and args[0] is Worker
            return self

    class Data:
        ActorPoolStrategy = staticmethod(lambda size: size)
        range = staticmethod(lambda items, override_num_blocks: Rows())

    with Journal(tmp_path / "out/journal.jsonl") as kept, pytest.raises(ReasonerError, match="the endpoint is gone"):
        ray_workers._collect(fake_ray(Data), args, 6, kept, None)
    assert len(read_journal(tmp_path / "out/journal.jsonl").entries) == len(made["line"]) > 0


def test_a_worker_that_is_lost_takes_no_rows_with_it(tmp_path, seeds):
    args = build_parser().parse_args(command(seeds, tmp_path / "out", "--world", str(seeds), "--ray", "2"))
    made = Worker(dict(vars(args)), str(tmp_path))({"id": [0]})

    class Rows:
        def iter_rows(self):
            yield from ({"line": line, "fault": ""} for line in made["line"])
            raise LostError("a traceback\n\nthe worker died")

        def map_batches(self, *args, **options):
            return self

    class Data:
        ActorPoolStrategy = staticmethod(lambda size: size)
        range = staticmethod(lambda items, override_num_blocks: Rows())

    with Journal(tmp_path / "out/journal.jsonl") as kept, pytest.raises(ReasonerError, match="^the worker died"):
        ray_workers._collect(fake_ray(Data), args, 6, kept, None)
    assert len(read_journal(tmp_path / "out/journal.jsonl").entries) == len(made["line"]) > 0


def test_a_ray_that_does_not_start_is_told(tmp_path, seeds, monkeypatch, capsys):
    def init(**options):
        assert options["num_cpus"] == 3, "one for what feeds the two"
        raise Exception("The node timed out.\n")

    monkeypatch.setitem(sys.modules, "ray", ray := ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.data", data := ModuleType("ray.data"))
    ray.init, ray.data = init, data
    assert main(command(seeds, tmp_path / "out", "--world", str(seeds), "--ray", "2")) == 2
    assert "expected a Ray on this machine" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_ray_is_not_started_where_nothing_is_to_be_asked(tmp_path, seeds, monkeypatch, capsys):
    asked = command(seeds, tmp_path / "out", "--world", str(seeds))
    assert main(asked) == 0
    monkeypatch.setattr(ray_workers, "spread", lambda *options: pytest.fail("Ray was started"))
    assert main([*asked, "--ray", "2"]) == 0 and "(0 now)" in capsys.readouterr().out


def test_workers_share_the_pace():
    assert shared(Limits(per_minute=60), 4).per_minute == 15 and shared(Limits(), 4).per_minute is None


def test_without_ray_a_sentence_says_so(tmp_path, seeds, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="expected the package ray"):
        spread(argparse.Namespace(ray=2, ray_address=None, out=tmp_path), 3)
    assert main(command(seeds, tmp_path / "out", "--world", str(seeds), "--ray", "2")) == 2
    assert "pip install 'comfyui-reasonedit[ray]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_two_workers_make_the_records_that_one_run_makes(seeds, tmp_path, capsys):
    if subprocess.run([sys.executable, "-c", "import reasonedit"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("workers are processes of their own: the package must be installed for them")
    with FakeServer(WorldAnnotator(World(seeds)), tmp_path / "seen") as server:
        asked = ["--url", server.url, "--model", "world"]
        assert main(command(seeds, tmp_path / "alone", *asked)) == 0
        alone, _ = len(server.asked), capsys.readouterr()
        server.asked.clear()
        code, told = main(command(seeds, tmp_path / "spread", *asked, "--ray", "2")), capsys.readouterr()
        if "expected a Ray on this machine within its own time" in told.err:
            pytest.skip("this machine is too busy for Ray, which gives itself 30 s to start")
        said = told.out
        assert code == 0
        assert f"{alone} answers of 2 workers" in said and "(0 now)" in said and len(server.asked) == alone
        assert main(command(seeds, tmp_path / "spread", *asked, "--ray", "2")) == 0 and len(server.asked) == alone
    records = [without_times((tmp_path / name / "records.jsonl").read_text(encoding="utf-8")) for name in ("alone", "spread")]
    assert records[0] == records[1] != []
    report = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "spread")]
    assert report[0] == report[1]
