"""The demonstration: three held-out scenes, the loop on a miniature, and the exact judge beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core import demo
from reasonedit.reasonedit_core.cli import main
from reasonedit.reasonedit_core.load import load_system
from reasonedit.reasonedit_core.mini.judge import judge
from reasonedit.reasonedit_core.mini.models import PLACE, has_mini
from reasonedit.reasonedit_core.mini.scenes import draw, shown_items
from reasonedit.reasonedit_core.types import Decision, Edited, Reflection, Scores, Thought
from reasonedit.tests.minis import NOTICE, STATED, write_minis


@pytest.fixture
def minis(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(PLACE, str(write_minis(tmp_path / "minis")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


class Pleased:
    """A reasoner that is pleased with the second round. (The tiny MLLM would babble for a minute.)"""

    def __init__(self, rounds=0):
        self.rounds = rounds

    def bound(self, **run):
        return Pleased()

    def think(self, image, instruction, *, feedback=None):
        return Thought(instruction, "Paint\x1b[2J it.")

    def describe(self, image, goal, *, original=None):
        return "painted"

    def reflect(self, *pictures_and_texts, original=None):
        self.rounds += 1
        verdict = (Decision.REFINE, "Not yet.", "Go on.") if self.rounds < 2 else (Decision.SUCCESS, "Well.", None)
        return Reflection(*verdict, Scores(consistency=7.0))


def load_with(reasoner, generator=None):
    def load(spec, *, on_progress=None):
        system = load_system(replace(spec, reasoner="none"), on_progress=on_progress)
        return replace(system, reasoner=reasoner, generator=generator or system.generator)

    return load


def test_the_demo_runs_the_loop_and_the_judge_marks_every_round(minis, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_system", load_with(Pleased()))
    assert main(["demo", "--quiet"]) == 0
    said, out = capsys.readouterr(), minis / "reasonedit-demo"
    assert sorted(path.name for path in out.iterdir()) == ["1", "2", "3", "sheet.png", "trace.json"]
    lines, record, items = said.out.splitlines(), saved(out / "trace.json"), shown_items(demo.SEED)
    assert lines[0] == f"mini-s: {NOTICE}" and record["system"] == "mini-s" and len(record["scenes"]) == 3
    for number, (item, told) in enumerate(zip(items, record["scenes"], strict=True), start=1):
        folder = out / str(number)
        assert f"scene {number} ({item.knowledge}): {item.instruction}" in lines and f"  wanted: {item.concrete}" in lines
        trace = saved(folder / "trace.json")
        assert trace["request"]["instruction"] == told["instruction"] == item.instruction
        assert trace["counts"]["denoiser_forwards"] == STATED["steps"] * len(trace["rounds"]), "of this scene alone"
        assert len(told["judge"]) == len(trace["rounds"]) == 2
        for made, mark in zip(trace["rounds"], told["judge"], strict=True):
            again = judge(item.source, item.target, pixels(folder / made["image"]))
            assert mark == {name: round(getattr(again, name), 3) for name in mark}
        assert (pixels(folder / "source.png") == np.asarray(demo.to_pil(draw(item.source)))).all()
    marks = [line for line in lines if line.startswith("    judge ")]
    assert len(marks) == sum(len(told["judge"]) for told in record["scenes"])
    assert lines.count("  thought: Paint [2J it.") == 3, "what a model wrote cannot move the cursor"
    assert Image.open(out / "sheet.png").width > 700 and not said.err


class Right:
    """A reasoner and a generator that know what is wanted; in the first round the edit is forgotten."""

    def __init__(self, items):
        self.items = {item.instruction: item for item in items}

    def bound(self, **run):
        return self

    def think(self, image, instruction, *, feedback=None):
        return Thought(instruction, self.items[instruction].canonical)

    def describe(self, image, goal, *, original=None):
        return "as wanted"

    def reflect(self, source, edited, goal, target, *, original=None):
        good = torch.equal(edited, draw(self.items[original].target))
        verdict = (Decision.SUCCESS, "All is there.", None) if good else (Decision.REFINE, "Nothing was done.", "Do it now.")
        return Reflection(*verdict, Scores(consistency=10.0 if good else 2.0))

    def edit(self, request, picture, instruction, rng, **how):
        made = draw(self.items[request.instruction].target) if instruction == "Do it now." else request.image
        return Edited(made, made, None)


def test_the_judge_sees_what_the_edit_made(minis, monkeypatch):
    items, lines = shown_items(4), []

    monkeypatch.setattr(demo, "load_system", load_with(Right(items), Right(items)))
    shown = demo.demo(minis / "out", seed=4, quiet=True, tell=lines.append, say=print)
    for each in shown:
        assert [round(mark.overall, 3) for mark in each.marks] == [0.0, 10.0] and each.trace.best == 1
        assert each.marks[0].exact and not each.marks[0].done and each.marks[1].exact and each.marks[1].done
    changes = [len(mark.asked) for each in shown for mark in each.marks]
    told = [line for line in lines if line.startswith("    judge ")]
    for line, count, done in zip(told, changes, [0, 1] * 3, strict=True):
        assert line.startswith(f"    judge {10.0 * done:.1f} of 10: {count * done} of {count} changes made, ")
    assert sum("result: round 2 of 2 (stopped: success)" in line for line in lines) == 3


def test_a_wrong_call_is_told_before_anything_is_loaded(minis, capsys):
    (minis / "file").write_text("")
    assert main(["demo", "--out", "file"]) == 2
    assert "--out: expected a folder" in capsys.readouterr().err
    assert main(["demo", "--seed", "some"]) == 2
    assert "--seed: expected a whole number" in capsys.readouterr().err


def test_without_a_miniature_the_wiring_is_shown(minis, monkeypatch, capsys):
    from reasonedit.reasonedit_core import demo_random
    from reasonedit.reasonedit_core.mini import models

    monkeypatch.setattr(models, "mini_places", lambda name: [])
    monkeypatch.setattr(demo_random, "demo", lambda *args, **more: print("wiring"))
    assert main(["demo"]) == 0 and capsys.readouterr().out == "wiring\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini-s", "mini-q"])
def test_the_packaged_miniature_truly_edits(tmp_path, monkeypatch, name):
    monkeypatch.delenv(PLACE, raising=False)
    if not has_mini(name):
        pytest.skip(f"NOT TESTED: the package holds no trained {name} yet")
    shown = demo.demo(tmp_path, system=name, quiet=True, tell=print, say=print)
    finals = [0.0 if each.trace.best is None else each.marks[each.trace.best].overall for each in shown]
    assert sum(final > 9 for final in finals) >= 2, finals
