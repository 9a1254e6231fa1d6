"""JSONL, TensorBoard, progress and loss curves."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.packing import PADDING
from reasonedit.tests.engine_toys import ToySource, draw_micro, toy_groups, toy_models, toy_settings, toy_step
from reasonedit.training.loader import places
from reasonedit.training.log import CURVES, LOG, RunLog, draw_curves, read_log, record_hash, smoothed, summary
from reasonedit.training.loop import Hook, train
from reasonedit.training.types import FM, NTP
from reasonedit.training.window import Window, figures, gather


def line(step, **changes):
    return {
        "step": step, "epoch": 0, "cursor": step, "loss": 3 / step, "losses": {"fm": 2 / step, "ntp": 1 / step},
        "grad_norm": {"dit": 1.0 + step, "mllm": 0.1}, "lr": {"dit": 1e-4}, "samples_per_s": 2.0, "tokens_per_s": 100.0,
        "step_s": 2.0, "data_s": 0.5, "fill": {"text": 0.99}, "records": "abc", **changes,
    }  # fmt: skip


def write(folder, *steps, start=0, **options):
    log = RunLog(folder, write=True, steps=100, start=start, **{"tensorboard": False, "curves": False, **options})
    log.event("resume" if start else "start", step=start)
    for step in steps:
        log.step(line(step))
    return log.close()


def test_a_line_of_the_log_says_everything(tmp_path):
    models, source = toy_models(), ToySource()
    train(models, toy_groups(models), source, toy_step, toy_settings(2, budgets={"text": 20}), tmp_path)
    first = read_log(tmp_path)[1]
    micros = source.load(0, 0)
    assert set(first) == {
        "event", "step", "epoch", "cursor", "loss", "losses", "parts", "counts", "grad_norm", "lr", "samples_per_s",
        "tokens_per_s", "step_s", "data_s", "fill", "records",
    }  # fmt: skip
    assert first["loss"] == pytest.approx(first["losses"][FM] + 0.1 * first["losses"][NTP])
    assert first["counts"] == {name: sum(micro.counts[name] for micro in micros) for name in (NTP, FM)}
    assert first["records"] == record_hash([record for micro in micros for record in micro.records])
    assert first["samples_per_s"] * first["step_s"] == pytest.approx(8) and 0 <= first["data_s"] <= first["step_s"]
    text = sum(len(micro.text.ids) for micro in micros)
    image = sum(len(micro.image.image_doc) + len(micro.image.text_doc) for micro in micros)
    assert first["tokens_per_s"] * first["step_s"] == pytest.approx(text + image)
    assert first["fill"] == {"text": text / 40, "image": 1.0}
    assert [one["event"] for one in read_log(tmp_path)] == ["start", "step", "step", "save", "end"]


def test_padding_does_not_count_as_filled():
    micro = draw_micro("x")
    doc = torch.cat([micro.text.doc_id, torch.full((5,), PADDING)])
    padded = replace(micro, text=replace(micro.text, doc_id=doc), image=None)
    length = len(micro.text.ids)
    assert places([padded, micro])["text"] == (2 * length, 2 * length + 5, 2)
    window = gather([padded], [{NTP: 2.0}], [{}], "here")
    assert figures([window], {NTP: 4.0}, {NTP: 1.0}, {}, 1.0)["fill"] == {"text": length / (length + 5)}


def test_figures_are_those_of_all_ranks():
    one = Window({NTP: 2.0}, {"verdict": (1.0, 2.0)}, records=["a", "b"], places={"text": (8, 8, 1)}, data_s=0.1)
    two = Window({NTP: 4.0, FM: 9.0}, {"verdict": (3.0, 6.0)}, records=["b", "c"], places={"text": (4, 8, 1)}, data_s=0.2)
    found = figures([one, two], {NTP: 3.0, FM: 3.0}, {NTP: 0.5, FM: 2.0}, {}, 2.0)
    assert found["losses"] == {NTP: 2.0, FM: 3.0} and found["loss"] == 7.0
    assert found["parts"] == {"verdict": 0.5} and found["data_s"] == 0.2
    assert found["samples_per_s"] == 1.5 and found["tokens_per_s"] == 6.0 and found["fill"] == {"text": 0.75}
    assert found["records"] == record_hash(["a", "b", "b", "c"]) != record_hash(["b", "c", "a", "b"])


def test_steps_done_twice_count_once_and_torn_lines_not_at_all(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    with open(tmp_path / LOG, "a") as file:
        file.write('{"event": "step", "step": 5, "lo')
    write(tmp_path, 3, 4, 5, start=2)
    lines = read_log(tmp_path)
    assert [(one["event"], one["step"]) for one in lines] == [
        ("start", 0), ("step", 1), ("step", 2), ("resume", 2), ("step", 3), ("step", 4), ("step", 5)
    ]  # fmt: skip
    assert len((tmp_path / LOG).read_text().splitlines()) == 10


def test_numbers_that_json_lacks_are_null(tmp_path):
    log = RunLog(tmp_path, write=True, steps=1, tensorboard=False, curves=False)
    log.event("hook", name="x", step=1, figures={"a": math.nan, "b": [math.inf, 1.0]})
    log.close()
    assert json.loads((tmp_path / LOG).read_text())["figures"] == {"a": None, "b": [None, 1.0]}


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path, write=False, steps=3)
    log.event("start", step=0)
    log.step(line(1))
    assert log.close() is None and list(tmp_path.iterdir()) == []


def test_a_folder_without_log_and_one_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="expected a log at"):
        read_log(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write .*choose another run folder"):
        RunLog(tmp_path / "file/run", write=True, steps=1)


def test_a_log_that_cannot_go_on_does_not_stop_training(tmp_path, caplog):
    log = RunLog(tmp_path, write=True, steps=3, tensorboard=False, curves=False)
    log._file.close()
    log._file = open("/dev/full", "w") if sys.platform == "linux" else pytest.skip("needs /dev/full")
    log.step(line(1))
    log.step(line(2))
    assert caplog.text.count("training goes on without it") == 1
    log.close()


def test_plain_lines_where_there_is_no_terminal(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        write(tmp_path, *range(1, 6), line_every=2)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert len(lines) == 2 and "\r" not in "".join(lines)
    assert lines[1] == (
        "step 4/100  loss 0.7500 (fm 0.5000 ntp 0.2500)  grad 5  2 samples/s 100 tokens/s  data 25%  left 00:03:12"
    )


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO):
        write(tmp_path, 1, 2)
    shown = capsys.readouterr().err
    assert "2/100" in shown and "loss 1.5000" in shown and "samples/s" in shown
    assert not [record for record in caplog.records if record.getMessage().startswith("step ")]


def test_summary_of_a_single_loss():
    assert summary({"loss": 1.0, "losses": {"ntp": 1.0}, "grad_norm": {"a": 2.0}}) == "loss 1.0000  grad 2"


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    models = toy_models()
    hook = Hook("validate", lambda moment: {"fm": {"0.5": 1.5}}, at_end=True)
    train(models, toy_groups(models), ToySource(), toy_step, toy_settings(3, tensorboard=True), tmp_path, [hook])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    wanted = {"loss", "losses/ntp", "losses/fm", "grad_norm/dit", "lr/mllm", "step_s", "validate/fm/0.5"}
    assert wanted <= set(board.Tags()["scalars"])
    logged = [one["loss"] for one in read_log(tmp_path) if one["event"] == "step"]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(logged)


def test_without_tensorboard_and_matplotlib_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    models = toy_models()
    settings = toy_settings(2, tensorboard=True, curves=True)
    assert train(models, toy_groups(models), ToySource(), toy_step, settings, tmp_path).finished
    assert not (tmp_path / CURVES).exists() and len(read_log(tmp_path)) == 5


def test_curves_are_drawn_at_the_end(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = write(tmp_path, *range(1, 30), curves=True)
    assert path == tmp_path / CURVES
    with Image.open(path) as picture:
        assert picture.size == (1920, 720) and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_no_curves_without_steps(tmp_path):
    assert write(tmp_path, curves=True) is None
    assert draw_curves(tmp_path) is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50))
def test_smoothing_stays_within_the_values_and_keeps_constants(values):
    found = smoothed(values)
    assert len(found) == len(values) and found[0] == pytest.approx(values[0], abs=1e-9)
    assert min(values) - 1e-6 <= min(found) and max(found) <= max(values) + 1e-6
