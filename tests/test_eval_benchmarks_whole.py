"""Every official layout from its files to its report: mini-s makes the pictures, a scripted judge marks them."""

from __future__ import annotations

import csv
import json

import pytest

from reasonedit.reasonedit_core.mini.models import PLACE
from reasonedit.tests.benchmark_tools import LAYOUTS
from reasonedit.tests.minis import write_minis
from reasonedit.training.eval.benchmarks.items import read_manifest
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, find_output
from reasonedit.training.eval.benchmarks.protocols import load_protocol
from reasonedit.training.eval.cli import main

HEADS = {"gedit": "G_O", "imgedit": "overall", "kris": "overall", "rise": "accuracy", "reason50k": "MLLM"}


def script(path, bench: str):
    """The middle mark of every scale, whatever is asked."""
    lines = []
    for name, question in load_protocol(f"{bench}-re").calls.items():
        marks = {mark.name: (mark.low + mark.high) // 2 for mark in question.marks}
        lines += ["[[answer]]", f"call = {json.dumps(name)}", f"text = {json.dumps(json.dumps({'reason': 'r', **marks}))}"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("bench", list(LAYOUTS))
def test_five_items_from_prepare_to_report(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(PLACE, str(write_minis(tmp_path / "minis")))  # tiny random weights in the place of trained ones
    LAYOUTS[bench](tmp_path / "official")
    manifest, run = tmp_path / "prepared", tmp_path / "run"
    assert main(["prepare", bench, "--src", str(tmp_path / "official"), "--out", str(manifest)]) == 0
    some = ["--lang", "en"] if bench == "gedit" else []
    made = ["generate", "--manifest", str(manifest), "--out", str(run), "--system", "mini-s:base", "--steps", "1"]
    assert main([*made, "--several", "first", "--device", "cpu", "--quiet", *some]) == 0
    assert f"{4 if some else 5} made" in capsys.readouterr().out
    items = [item for item in read_manifest(manifest).items if not some or item.lang == "en"]
    assert all(find_output(run / OUTPUTS, item) is not None for item in items)
    judge = f"scripted:{script(tmp_path / 'judge.toml', bench)}"
    base = ["--manifest", str(manifest), "--run", str(run), "--quiet"]
    assert main(["judge", *base, "--judge", judge, "--anchors", "1", *some]) == 0
    assert main(["score", *base, *some]) == 0
    report = ["report", "--runs", f"mini={run}", "--manifest", str(manifest), "--out", str(tmp_path / "report"), "--quiet"]
    assert main(report) == 0
    with open(tmp_path / "report/table.csv", newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream))
    assert row["system"] == "mini" and row["n"] == f"{len(items)}/{len(items)}" and row[HEADS[bench]]
    page = (tmp_path / "report/page.html").read_text(encoding="utf-8")
    assert page.count("<article>") == len(items) and page.count("data:image/jpeg") >= 2 * len(items)
