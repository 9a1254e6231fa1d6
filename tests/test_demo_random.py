"""The demonstration while the package has no trained miniature: the whole loop on weights made on the spot."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core import demo_random as demo
from reasonedit.reasonedit_core.cli import main
from reasonedit.reasonedit_core.dialogue.packfile import format_pack, parse_pack
from reasonedit.reasonedit_core.mini import models


@pytest.fixture
def no_photographs(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "mini_places", lambda name: [])


def test_the_demo_runs_the_loop_and_says_what_it_is(tmp_path, monkeypatch, capsys, no_photographs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert main(["demo"]) == 0
    said = capsys.readouterr()
    out = tmp_path / "reasonedit-demo"
    assert sorted(path.name for path in out.iterdir()) == ["result.png", "rounds", "sheet.png", "trace.json"]
    record = json.loads((out / "trace.json").read_text(encoding="utf-8"))
    rounds = record["rounds"]
    assert rounds and all(done["decision"] and done["scores"] for done in rounds), "the MLLM judged every round"
    assert record["thought"]["original"] == demo.INSTRUCTION and record["target"]
    assert record["counts"]["denoiser_forwards"] == 2 * demo.SETTINGS["steps"] * len(rounds)
    assert record["counts"]["new_tokens"] > 0 and record["counts"]["vision_passes"] >= 2
    best = "result.png" if record["best"] is None else rounds[record["best"]]["image"]
    assert (out / "result.png").read_bytes() == (out / best).read_bytes()
    assert Image.open(out / "sheet.png").width > 700
    lines = said.out.splitlines()
    assert lines[0].startswith("picture: drawn by the demo") and "tiny and random" in lines[1] and "wiring only" in lines[1]
    assert [line.startswith(f"round {i + 1}: ") for i, line in enumerate(lines[2:-2])] == [True] * len(rounds)
    assert not said.err, "warnings about wording are for real weights"
    assert not list((tmp_path / "temporary").glob("reasonedit-demo-*")), "the weights are gone again"


def test_a_picture_of_ones_own(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "mine.png")
    picture, origin = demo.choose_picture(tmp_path / "mine.png")
    assert picture.rgb.shape == (1, 3, 30, 40) and origin.endswith("mine.png")


def test_the_photograph_comes_from_scikit_image_where_it_is():
    pytest.importorskip("skimage")
    picture, origin = demo.choose_picture(None)
    assert "chelsea" in origin and picture.rgb.shape == (1, 3, 300, 451)


def test_without_scikit_image_a_picture_is_drawn(no_photographs):
    picture, origin = demo.choose_picture(None)
    assert "not installed" in origin and picture.rgb.shape == (1, 3, 320, 480)
    again, _ = demo.choose_picture(None)
    assert (picture.rgb == again.rgb).all() and picture.rgb.std() > 0.1


def test_a_scikit_image_without_the_photograph_is_no_obstacle(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    picture, origin = demo.choose_picture(None)
    assert "could not give one" in origin and picture.rgb.shape[-1] == 480


@pytest.mark.parametrize("size", [(480, 320), (64, 48), (7, 5)])
def test_the_drawn_picture_has_the_size_asked_for(size):
    assert np.asarray(demo.draw_picture(*size)).shape == (size[1], size[0], 3)


def test_the_short_pack_is_ours_with_short_replies():
    pack = parse_pack(format_pack(demo.short_pack()), "short")
    assert {prompt.max_new_tokens for prompt in pack.tasks.values()} == {demo.REPLY_TOKENS}


def test_demo_names_a_folder_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file"), "--quiet"]) == 2
    assert "--out: expected a folder" in capsys.readouterr().err
    assert Path(tmp_path / "file").read_text() == ""
