"""Histories: the core's trace of them, and the PNG that holds one and gives it back bit for bit."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from reasonedit.nodes import sockets, tracefile
from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.reasonedit_core.images import to_pil
from reasonedit.reasonedit_core.loop import Step, next_step
from reasonedit.reasonedit_core.types import Decision, Edited, Reflection, Scores
from reasonedit.tests.graph_runner import install_host

install_host()

from reasonedit.nodes import trace as shown  # noqa: E402


def picture(seed: int, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(seed)) / 255


SOURCE = picture(0)


def made(index: int, decision=Decision.REFINE, *, goal="make it red", source_index=None, rethink=None, latents=True):
    """One round. Its instruction and pictures tell its index."""
    edited = Edited(picture(index + 1), picture(index + 50, 32), torch.randn(1, 4, 64).to(torch.bfloat16) if latents else None)
    second = f"redder {index}" if decision is Decision.REFINE else None
    scores = Scores((6.0, 7.0), (5.0, 8.0), 4.5, "not yet")
    reflection = Reflection(decision, "too pale — zu blaß 太淡", second, scores, "<#Think>…")
    verdict = sockets.Verdict(reflection, goal, "rot!", "a red picture", SOURCE, 1.5)
    return sockets.HistoryRound(f"instruction {index}", source_index, edited, verdict, rethink)


def same(a: sockets.History, b: sockets.History) -> bool:
    def plain(made):
        return (made.instruction, made.input_index, made.rethink, made.verdict.reflection, made.verdict.goal)

    def tensors(made):
        return [
            made.edited.image,
            made.edited.generated,
            made.verdict.source,
            *filter(lambda x: x is not None, [made.edited.latents]),
        ]

    words = [plain(x) for x in a] == [plain(x) for x in b]
    pairs = [list(zip(tensors(x), tensors(y), strict=True)) for x, y in zip(a, b, strict=True)]
    return words and all(x.dtype == y.dtype and torch.equal(x, y) for row in pairs for x, y in row)


# ---- the core's trace ----------------------------------------------------------------------------------------------------


def test_the_trace_of_a_history_is_what_the_loop_would_hold():
    history = (made(0), made(1, source_index=0))
    trace = sockets.trace_of(history, max_rounds=5, max_seconds=9.0)
    assert trace.request.image is SOURCE and trace.request.instruction == "rot!"
    assert trace.request.max_rounds == 5 and trace.request.max_seconds == 9.0 and trace.request.think
    assert trace.goal == "make it red" and trace.target == "a red picture" and not trace.earlier_thoughts
    assert [(r.index, r.instruction, r.input_index) for r in trace.rounds] == [
        (0, "instruction 0", None),
        (1, "instruction 1", 0),
    ]
    assert isinstance(next_step(trace), Step) and trace.seconds == 3.0


def test_a_thought_that_was_given_up_is_remembered():
    history = (made(0, Decision.FAILED, goal="blue", rethink="wrong colour"), made(1, goal="red"))
    trace = sockets.trace_of(history)
    assert [thought.instruction for thought in trace.earlier_thoughts] == ["blue"] and trace.goal == "red"
    assert not sockets.trace_of(history[:1]).earlier_thoughts, "the last round's thought is the present one"


def test_without_a_thought_the_loop_is_told_so():
    bare = sockets.Verdict(made(0).verdict.reflection, "rot!", "rot!", "t", SOURCE)
    history = (sockets.HistoryRound("rot!", None, made(0).edited, bare),)
    assert sockets.trace_of(history).thought is None and not sockets.trace_of(history).request.think
    assert sockets.trace_of(history, think=True).request.think


def test_an_empty_history_has_no_trace():
    with pytest.raises(ConfigError, match="at least one round"):
        sockets.trace_of(())
    with pytest.raises(ConfigError, match="at least one round"):
        tracefile.to_record(())


# ---- the file ------------------------------------------------------------------------------------------------------------


@settings(max_examples=10, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.sampled_from(list(Decision)), st.booleans())
def test_a_trace_comes_back_bit_for_bit(tmp_path_factory, rounds, decision, latents):
    history = tuple(made(n, decision, source_index=None if n == 0 else n - 1, latents=latents) for n in range(rounds))
    path = tmp_path_factory.mktemp("trace") / "t.png"
    path.write_bytes(tracefile.encode(to_pil(history[-1].edited.image), history, {"prompt": "{}", "workflow": '{"a": "ü"}'}))
    assert same(tracefile.decode(path), history)
    with Image.open(path) as image:
        assert image.text["workflow"] == '{"a": "ü"}' and image.size == (16, 16)
        assert json.loads(image.text["reasonedit"])["rounds"][0]["reflection"]["reason"] == "too pale — zu blaß 太淡"


def test_a_round_without_a_verdict_is_kept_and_told(tmp_path):
    last = made(1, source_index=0)
    unread = replace(last, verdict=replace(last.verdict, reflection=None, problem="no tag"))
    history = (made(0), unread)
    (tmp_path / "t.png").write_bytes(tracefile.encode(to_pil(SOURCE), history, {}))
    found = tracefile.decode(tmp_path / "t.png")
    assert same(found, history) and found[1].verdict.problem == "no tag"
    finished = shown.finished(found, "reasonedit")
    assert finished.best == 0 and "not judged" in shown.report(finished, "reasonedit")


def test_what_is_no_8_bit_picture_is_kept_exactly_too(tmp_path):
    odd = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    verdict = sockets.Verdict(made(0).verdict.reflection, "g", "o", "t", odd)
    history = (sockets.HistoryRound("i", None, sockets.foreign(odd), verdict),)
    path = tmp_path / "t.png"
    path.write_bytes(tracefile.encode(to_pil(odd), history, {}))
    back = tracefile.decode(path)
    assert same(back, history) and back[0].edited.latents is None


def test_large_traces_do_not_stop_other_programs(tmp_path):
    """More than Pillow's limit for text entries lies in the file, and opening it as a picture still works."""
    rng = torch.Generator().manual_seed(2)
    big = torch.randint(0, 256, (1, 3, 900, 900), generator=rng) / 255
    verdict = sockets.Verdict(made(0).verdict.reflection, "g", "o", "t", big)
    history = (sockets.HistoryRound("i", None, sockets.foreign(big), verdict),)
    path = tmp_path / "t.png"
    path.write_bytes(tracefile.encode(to_pil(big), history, {}))
    assert path.stat().st_size > 4 * PngImagePlugin.MAX_TEXT_CHUNK
    with Image.open(path) as image:
        image.load()
    assert same(tracefile.decode(path), history)


def _png(path, texts=(), chunk=None):
    info = PngImagePlugin.PngInfo()
    for key, value in texts:
        info.add_itxt(key, value)
    if chunk is not None:
        info.add(tracefile.CHUNK, chunk)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_files_without_a_whole_trace_say_so(tmp_path):
    with pytest.raises(DataError, match="one without a trace"):
        tracefile.decode(_png(tmp_path / "plain.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="expected a PNG file"):
        tracefile.decode(tmp_path / "text.png")
    good, tensors = tracefile.to_record((made(0),))
    from safetensors.torch import save

    words, packed = json.dumps(good), zlib.compress(save(tensors))
    damaged = [
        ("{", packed),
        ("[]", packed),
        (words, packed[:-20]),
        (words, zlib.compress(b"nothing")),
        (json.dumps({**good, "version": 99}), packed),
        (json.dumps({**good, "rounds": [{}]}), packed),
        (words, zlib.compress(save({"source": SOURCE}))),
    ]
    for n, (text, chunk) in enumerate(damaged):
        with pytest.raises(DataError, match="damaged"):
            tracefile.decode(_png(tmp_path / f"{n}.png", [("reasonedit", text)], chunk))


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("reasonedit.reasonedit_core.tracefile.LARGEST", 1000)
    path = tmp_path / "t.png"
    path.write_bytes(tracefile.encode(to_pil(SOURCE), (made(0),), {}))
    with pytest.raises(DataError, match="more than 1000 bytes"):
        tracefile.decode(path)
