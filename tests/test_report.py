"""trace.json, the pictures of a run and the sheet: contents, wholeness, and what happens to files that lie there already."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonedit.reasonedit_core import sheet
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.files import write_json, write_whole
from reasonedit.reasonedit_core.report import RunFolder, picture_name, trace_record, with_alpha
from reasonedit.reasonedit_core.types import (
    Counts,
    Decision,
    Edited,
    EditRequest,
    EditTrace,
    Reflection,
    Round,
    Scores,
    Thought,
)


def picture(value: float, height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.full((1, 3, height, width), value)


def make_round(index: int, decision: str | None = "refine", **more) -> Round:
    image = picture((index + 1) / 10)
    seen = decision and Reflection(
        Decision(decision),
        f"reason {index}",
        "do more" if decision == "refine" else None,
        Scores((6.0, 7.0), (8.0, 5.5), 7.25, "fits"),
    )
    instruction = more.pop("instruction", f"step {index}")
    return Round(
        index, instruction, more.pop("input_index", index - 1 if index else None), Edited(image, image, image), seen, 1.25
    )


def make_trace(*decisions: str | None, best: int | None = 0, **more) -> EditTrace:
    request = EditRequest(picture(0.9), "make it snow", seed=3, steps=4, guidance=2.0, size_level=64)
    rounds = tuple(make_round(i, d) for i, d in enumerate(decisions))
    thought = Thought("make it snow", "cover the ground with snow")
    return replace(EditTrace(request, thought, "a snowy field", rounds, best, "success"), **more)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_trace_holds_exactly_the_keys_of_the_contract():
    record = trace_record(make_trace("refine", None), Counts(1, 2, 3, 4, 5, 6), {"image": "cat.png", "dialogue": None})
    assert list(record) == ["version", "request", "thought", "target", "rounds", "best", "stop_reason", "counts"]
    assert record["version"] == 1 and record["best"] == 0 and record["stop_reason"] == "success"
    assert record["thought"] == {"original": "make it snow", "instruction": "cover the ground with snow"}
    assert record["rounds"][0] == {
        "index": 0,
        "instruction": "step 0",
        "input_index": None,
        "image": "rounds/00.png",
        "decision": "refine",
        "reason": "reason 0",
        "next_instruction": "do more",
        "scores": {"edit": [6.0, 7.0], "quality": [8.0, 5.5], "consistency": 7.25, "consistency_reason": "fits"},
        "seconds": 1.25,
    }
    second = record["rounds"][1]
    assert second["input_index"] == 0
    assert [second[key] for key in ("decision", "reason", "next_instruction", "scores")] == [None] * 4
    assert record["counts"] == {
        "vision_passes": 1,
        "generate_calls": 2,
        "new_tokens": 3,
        "denoiser_forwards": 4,
        "vae_encodes": 5,
        "vae_decodes": 6,
    }
    assert record["request"]["image"] == "cat.png" and record["request"]["seed"] == 3
    assert json.loads(json.dumps(record)) == record


def test_thought_is_null_without_thinking():
    assert trace_record(make_trace("success", thought=None), Counts())["thought"] is None


def test_every_round_is_on_the_disk_when_it_is_reported(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a run that fails before its first round leaves nothing"
    folder.write_round(make_trace(None, best=None, stop_reason=""))
    record = json.loads((tmp_path / "run/trace.json").read_text())
    assert record["stop_reason"] == "running" and record["rounds"][0]["decision"] is None
    folder.write_round(make_trace("refine", best=None, stop_reason=""))
    folder.write_round(make_trace("refine", None, best=None, stop_reason=""))
    record = json.loads((tmp_path / "run/trace.json").read_text())
    for done, value in zip(record["rounds"], (0.1, 0.2), strict=True):
        assert (pixels(tmp_path / "run" / done["image"]) == round(value * 255)).all()
    assert sorted(os.listdir(tmp_path / "run")) == ["rounds", "trace.json"]


@pytest.mark.parametrize(("best", "value"), [(0, 0.1), (1, 0.2), (None, 0.9)])
def test_result_is_the_picture_of_best(tmp_path, best, value):
    folder = RunFolder(tmp_path)
    result = folder.finish(make_trace("refine", "success", best=best))
    assert (pixels(result) == np.uint8(np.round(value * 255))).all()
    if best is not None:
        assert result.read_bytes() == (tmp_path / picture_name(best)).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["result.png", "rounds", "sheet.png", "trace.json"]


def test_alpha_of_the_source_comes_back_on_every_picture(tmp_path):
    alpha = torch.linspace(0, 1, 30).expand(1, 1, 20, 30)
    folder = RunFolder(tmp_path, alpha=alpha)
    folder.finish(make_trace("success"))
    result = pixels(tmp_path / "result.png")
    assert result.shape == (20, 30, 4)
    assert (result[..., 3] == np.round(np.linspace(0, 1, 30) * 255)).all() and (result[..., :3] == 26).all()
    resized = with_alpha(picture(0.5, 40, 60), alpha)
    assert resized.size == (60, 40) and resized.mode == "RGBA"


def test_a_second_run_replaces_the_first_and_touches_nothing_else(tmp_path):
    RunFolder(tmp_path).finish(make_trace("refine", "refine", "success", best=2))
    (tmp_path / "rounds/notes.txt").write_text("mine")
    (tmp_path / "rounds/07.png").write_bytes(b"mine")
    again = RunFolder(tmp_path)
    assert (tmp_path / "rounds/02.png").exists(), "nothing is removed before the new run has something to show"
    again.write_round(make_trace(None))
    assert sorted(os.listdir(tmp_path / "rounds")) == ["00.png", "07.png", "notes.txt"]
    assert not (tmp_path / "result.png").exists(), "a result of another run must not stand beside this trace"
    again.finish(make_trace("success"))
    assert (tmp_path / "rounds/07.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"version": 1, "rounds": [1, 2]}',
        '{"version": 1}',
        '["a"]',
        '{"version": 99, "stop_reason": "", "rounds": [1, 2]}',
    ],
)
def test_a_trace_that_is_not_ours_makes_us_remove_nothing(tmp_path, text):
    (tmp_path / "trace.json").write_text(text)
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds/01.png").write_bytes(b"mine")
    (tmp_path / "result.png").write_bytes(b"mine")
    RunFolder(tmp_path).write_round(make_trace(None))
    assert (tmp_path / "rounds/01.png").read_bytes() == b"mine" and (tmp_path / "result.png").read_bytes() == b"mine"


def test_out_may_not_be_a_file_or_locked(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ConfigError, match="--out: expected a folder, found the file"):
        RunFolder(tmp_path / "out")
    with pytest.raises(ConfigError, match="--out: expected a folder, found the file .*out; choose another name"):
        RunFolder(tmp_path / "out" / "deeper" / "still")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="--out: expected a folder that can be written"):
        RunFolder(tmp_path / "new")
    with pytest.raises(ConfigError, match="cannot write"):
        write_whole(tmp_path / "out" / "trace.json", b"")


def test_a_write_that_fails_keeps_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    write_json(path, {"a": 1})

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["trace.json"]


def test_json_is_utf8_and_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"words": "下雪"})
    assert "下雪" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"score": float("nan")})
    assert not (tmp_path / "b.json").exists()


def decode(trace: EditTrace, size: tuple[int, int] = (30, 20)) -> Image.Image:
    return sheet.draw_sheet(trace, [Image.new("RGB", size, "#406080")] * (len(trace.rounds) + 1))


@pytest.mark.parametrize("rounds", range(9))
def test_the_sheet_has_a_card_per_picture(rounds):
    page = decode(make_trace(*["refine"] * rounds, best=rounds - 1 if rounds else None))
    inside = (np.asarray(page) == (0x40, 0x60, 0x80)).all(-1)
    columns, rows = inside.any(0), inside.any(1)
    across = int(np.diff(columns.astype(int), prepend=0).clip(min=0).sum())
    down = int(np.diff(rows.astype(int), prepend=0).clip(min=0).sum())
    assert across <= 4 and (across * down >= rounds + 1 > across * (down - 1))
    width = sheet.CARD - 2 * sheet.PAD
    assert inside.sum() >= (rounds + 1) * width * 200 * 0.98


@pytest.mark.parametrize("size", [(1, 1), (4000, 3), (3, 2000), (17, 33), (640, 480)])
def test_the_sheet_takes_odd_sizes_and_modes(size):
    trace = make_trace("success")
    for mode in ("RGB", "RGBA", "L"):
        page = sheet.draw_sheet(trace, [Image.new(mode, size, 100), Image.new("RGB", (30, 20), 200)])
        assert page.width == 2 * sheet.MARGIN + 2 * sheet.CARD + sheet.GAP and page.height < 1200


def accent_columns(trace: EditTrace) -> np.ndarray:
    page = np.asarray(decode(trace))
    accent = tuple(int(sheet.ACCENT[i : i + 2], 16) for i in (1, 3, 5))
    return np.flatnonzero((page == accent).all(-1).sum(0) > 100)


def test_the_best_card_is_marked_and_only_that():
    for best, card in ((None, 0), (0, 1), (1, 2)):
        marked = accent_columns(make_trace("refine", "refine", best=best))
        left = sheet.MARGIN + card * (sheet.CARD + sheet.GAP)
        assert left - 4 <= marked.min() <= left and left + sheet.CARD <= marked.max() + 1 <= left + sheet.CARD + 4


def test_words_verdict_and_scores_change_the_sheet():
    base = make_trace("refine", best=None)
    same = np.asarray(decode(base))
    for changed in (
        make_trace("failed", best=None),
        replace(base, rounds=(make_round(0, instruction="something else"),)),
        replace(base, thought=Thought("make it snow", "another goal")),
        replace(base, target="another picture"),
        replace(base, stop_reason="max_rounds"),
        replace(base, rounds=(replace(base.rounds[0], reflection=replace(base.rounds[0].reflection, scores=Scores())),)),
    ):
        other = np.asarray(decode(changed))
        assert other.shape != same.shape or (other != same).any()


def test_a_note_stands_at_the_foot(tmp_path):
    trace = make_trace("success")
    RunFolder(tmp_path / "a").finish(trace)
    RunFolder(tmp_path / "b", note="random weights").finish(trace)
    assert pixels(tmp_path / "b/sheet.png").shape[0] > pixels(tmp_path / "a/sheet.png").shape[0]


def test_lines_fit_and_lose_no_words():
    text = 'Remove the second cup from the left and write "Grüße" on it; donaudampfschifffahrtsgesellschaftskapitaenspatent.'
    lines = sheet.wrap(text, 16, 150, 99)
    assert len(lines) > 3 and all(sheet._measure(line, 16) <= 150 for line in lines)
    assert "".join("".join(lines).split()) == "".join(sheet.legible(text).split())
    cut = sheet.wrap(text, 16, 150, 2)
    assert len(cut) == 2 and cut[-1].endswith(" ...") and sheet._measure(cut[-1], 16) <= 150


def test_a_reply_of_megabytes_does_not_hold_up_the_sheet(monkeypatch):
    """What is measured follows what is shown, not what was said."""
    measured, real = [], sheet._measure
    monkeypatch.setattr(sheet, "_measure", lambda text, *how: measured.append(len(text)) or real(text, *how))
    lines = sheet.wrap("word " * 2_000_000, 14, 300, 7)
    assert len(lines) == 7 and lines[-1].endswith(" ...")
    assert sum(measured) < 100_000


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.text(max_size=80), st.integers(1, 6))
def test_wrapping_takes_any_text(text, most):
    lines = sheet.wrap(text, 14, 120, most)
    assert len(lines) <= most
    for line in lines:
        for character in line:
            assert character == " " or sheet._font_index(character) is not None


@pytest.fixture
def no_chinese(monkeypatch):
    monkeypatch.setattr(sheet, "CJK_FONTS", ("no such font.ttf",))
    monkeypatch.setattr(sheet, "WIDE_FONTS", ())
    for cached in (sheet.fonts, sheet._font_index):
        cached.cache_clear()
    yield
    for cached in (sheet.fonts, sheet._font_index):
        cached.cache_clear()


def test_without_a_chinese_font_words_say_so_instead_of_boxes(no_chinese):
    assert not sheet.has_chinese_font()
    assert sheet.legible("把天空变成黄昏。") == "[7 characters without a font]. "
    assert sheet.legible("写上“Winter”字样") == "[2 characters without a font]“Winter”[2 characters without a font]"
    assert sheet.legible("图") == "[1 character without a font]"
    assert sheet.legible("naïve — café\n\ttwo") == "naive - cafe two"
    said = make_trace("refine", best=None)
    chinese = replace(said, request=replace(said.request, instruction="下雪"))
    assert decode(chinese).height > decode(said).height, "a note at the foot says where the words are"
