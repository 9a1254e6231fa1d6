"""`reasonedit-train`: quick to answer, whole sentences for errors, exit codes; and the benchmark's arithmetic."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasonedit.tests.launch import BOOT, program
from reasonedit.training import bench
from reasonedit.training.cli import EXIT_ERROR, build_parser, main
from reasonedit.training.config_file import load_config, recipe_names

COMMANDS = ("init", "check", "convert", "index", "cache", "plan", "run", "resume", "validate", "sample", "export")
TINY = ("data.drawn.counts={think = 3, reflect = 4, edit = 3, t2i = 3}", "every_stage.validation.records=0")


def sets(out: Path, *more: str) -> list[str]:
    return [word for one in (f"run.out={out}", *TINY, *more) for word in ("--set", one)]


@pytest.fixture(autouse=True)
def own_variables(monkeypatch, tmp_path_factory):
    scratch = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("MPLCONFIGDIR", str(scratch / "matplotlib"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(scratch / "torch"))


# ---- quick


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["init"], ["run", "tiny_cpo"], ["check", "tiny_cpu", "--set", "x=1"]]
)
def test_help_lists_and_faulty_recipes_are_answered_without_torch(arguments):
    code = (
        f"{BOOT}\nfrom reasonedit.training.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers', 'peft', 'accelerate', 'PIL'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), 'code:', code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    code = 2 if "tiny_cpo" in arguments or "x=1" in arguments else 0
    assert done.stdout.splitlines()[-1] == f"heavy: [] code: {code}", done.stdout + done.stderr


def test_every_command_of_the_issue_is_there():
    text = build_parser().format_help()
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command, "--help"])
        assert stop.value.code == 0
    assert all(command in text for command in COMMANDS)


# ---- errors are sentences


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "the following arguments are required: RECIPE"),
        (["run", "tiny_cpu", "--sett", "a=b"], "unrecognized arguments"),
        (["run", "tiny_cpu", "--set", "run.ot=x"], "did you mean 'out'"),
        (["run", "tiny_cpu", "--set", "stage.editing.step=edti"], "stage.editing.step: expected one of reasoning"),
        (["export", "nowhere", "--format", "comfyui"], "expected the folder of a run"),
        (["export", "nowhere", "--format", "safetensors"], "invalid choice"),
        (["resume", "nowhere"], "expected the folder of a run"),
        (["convert", "musubi"], "expected FROM DIR --to OUT"),
        (["plan", "tiny_cpu", "--world", "0"], "expected a whole number from 1"),
    ],
)
def test_errors_are_told_in_a_sentence_with_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == EXIT_ERROR
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("reasonedit.training.cli.run_init", stop)
    assert main(["init"]) == 130 and "stopped" in capsys.readouterr().err


def test_text_of_records_cannot_move_the_cursor(capsys):
    from reasonedit.training.cli import say

    say("a\x1b[2Jb")
    assert "\x1b" not in capsys.readouterr().err


def test_no_memory_left_is_told_with_what_helps(monkeypatch, capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    def full(args):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("reasonedit.training.cli.run_init", full)
    assert main(["init"]) == EXIT_ERROR
    said = capsys.readouterr().err
    assert "swap_blocks" in said and "checkpointing" in said and "--size" not in said


# ---- commands


def test_init_lists_and_writes_recipes_and_overwrites_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(["init", "reasonedit_s_lora_24gb", "--to", "mine.toml"]) == 0
    assert load_config("mine.toml") == load_config("reasonedit_s_lora_24gb")
    assert main(["init", "tiny_cpu", "--to", "mine.toml"]) == EXIT_ERROR
    assert "expected no file at mine.toml" in capsys.readouterr().err


def test_convert_writes_records_and_prints_what_it_could_not_use(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(data / f"{name}.png")
    with open(data / "metadata.csv", "w", newline="") as file:
        lines = [["image", "prompt", "edit_image"], ["a.png", "make it red", "b.png"], ["gone.png", "make it blue", "b.png"]]
        csv.writer(file).writerows(lines)
    assert main(["convert", "list"]) == 0 and "diffsynth" in capsys.readouterr().out
    assert main(["convert", "diffsynth", str(data), "--to", str(tmp_path / "records")]) == 0
    said = capsys.readouterr().out
    assert "1 records" in said and "not used: 1" in said
    record = json.loads((tmp_path / "records" / "records.jsonl").read_text())
    assert record["schema"] == "reasonedit.record/1" and record["kind"] == "edit"
    assert main(["convert", "diffsynth", str(data), "--to", str(tmp_path / "records")]) == EXIT_ERROR
    assert main(["convert", "diffsynth", str(data), "--to", str(tmp_path / "records"), "--overwrite"]) == 0


def test_index_plan_and_cache_prepare_a_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["index", "tiny_cpu", *sets(out)]) == 0
    assert "13 records" in capsys.readouterr().out and (out / "manifest.jsonl").is_file()
    assert main(["plan", "tiny_cpu", *sets(out)]) == 0
    said = capsys.readouterr().out
    assert all(f"stage {name}" in said for name in ("reasoning", "editing", "unified")) and "fill" in said
    assert main(["cache", "tiny_cpu", *sets(out, "stage.editing.start=base")]) == 0
    said = capsys.readouterr().out
    assert "moments:" in said and "states:" in said and "stage unified: starts from a stage that is not trained yet" in said
    files = sorted((out / "cache").rglob("*.safetensors"))
    assert files
    assert main(["cache", "tiny_cpu", *sets(out, "stage.editing.start=base")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert sorted((out / "cache").rglob("*.safetensors")) == files


def test_check_exits_with_2_where_something_stands_in_the_way(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["check", "tiny_cpu", "--no-pictures", *sets(out)]) == 0
    assert "nothing stands in the way of a run" in capsys.readouterr().out
    for picture in (out / "records" / "images").iterdir():
        picture.unlink()
    assert main(["check", "tiny_cpu", *sets(out)]) == EXIT_ERROR
    assert "missing-picture" in capsys.readouterr().out


def test_the_module_is_a_program(tmp_path):
    done = subprocess.run(program("init", "nothing"), capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == EXIT_ERROR and done.stderr.startswith("reasonedit-train: error: expected a recipe file")


# ---- the benchmark's arithmetic


def case(stream="dit", mode="packed", **more):
    return bench.Case(stream, mode, "small", "cpu", **({"budget": 512, "documents": 10} | more))


@pytest.mark.parametrize("stream", bench.STREAMS)
def test_packed_and_padded_work_on_the_same_documents(stream):
    documents = bench.draw_documents(case(stream))
    assert documents == bench.draw_documents(case(stream)) != bench.draw_documents(case(stream, seed=1))
    packed = bench.group(case(stream), documents)
    assert sorted(d for pack in packed for d in pack) == sorted(documents)
    assert all(sum(map(bench.length_of, pack)) <= max(512, *map(bench.length_of, documents)) for pack in packed)
    padded = bench.group(case(stream, "padded", batch=4), documents)
    assert [len(batch) for batch in padded] == [4, 4, 2] and all(len(set(batch)) == 1 for batch in padded)
    assert sum(bench.length_of(d) for batch in padded for d in batch) > sum(map(bench.length_of, documents))


def test_the_planner_fills_packs_of_8k_to_99_in_100():
    fill = float(bench.planner_line().split("fill ")[1].split(",")[0])
    assert fill >= 0.99


@pytest.mark.parametrize("stream", bench.STREAMS)
def test_a_small_case_is_measured(stream):
    found = bench.measure(case(stream, documents=3, budget=128, steps=1, rank=2))
    assert found["backend"] == "batched" and found["dtype"] == "float32" and 0 < found["fill"] <= 1
    assert min(found[name] for name in ("step_s", "tokens_per_s", "peak_gib", "tera")) > 0
    line = bench.line(case(stream), found)
    for words in ("tokens/s", "fill", "mask", "peak", "step"):
        assert words in line
    assert "TFLOP" not in line


def test_on_a_known_device_the_floor_is_told():
    figures = {"dtype": "bfloat16", "backend": "varlen", "step_s": 1.2, "tokens_per_s": 7e3, "fill": 1.0, "mask_ms": 0.1}
    figures |= {"peak_gib": 60.0, "tflops": 450.0, "tera": 561.0, "device": "NVIDIA H200"}
    line = bench.line(case(lengths="edit"), figures)
    assert "450 TFLOP/s counted (45 % of 990; floor 567 ms)" in line and "dit one edit" in line


def test_full_size_cases_hold_the_targets_of_the_design(monkeypatch):
    monkeypatch.setattr("reasonedit.reasonedit_core.load.choose_device", lambda name: __import__("torch").device("cuda"))
    parser_args = {"stream": None, "size": "auto", "device": "auto", "budget": 0, "documents": 24, "batch": 4, "steps": 2}
    args = __import__("argparse").Namespace(**parser_args, rank=64, backend="auto")
    found = bench.cases(args)
    assert {one.size for one in found} == {"full"} and {one.rank for one in found} == {64}
    edits = [one for one in found if one.lengths == "edit" and one.stream == "dit"]
    assert [one.checkpointing for one in edits] == [True, False]
    assert bench.draw_documents(edits[0]) == [(640, ((64, 64), (64, 64)))]
