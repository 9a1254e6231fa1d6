"""The command line as a user meets it: options, errors, runs on tiny checkpoints, Ctrl-C, memory moved about."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core import cli, load, loop, offload, run, weight_options
from reasonedit.reasonedit_core.cli import main
from reasonedit.reasonedit_core.dialogue.pack import Pack, fitted
from reasonedit.reasonedit_core.dialogue.packfile import format_pack
from reasonedit.reasonedit_core.dialogue.prompts import load_pack
from reasonedit.reasonedit_core.weights import WEIGHTS_DTYPES
from reasonedit.tests.tiny import tiny_checkpoint

SMALL = {"steps": 2, "guidance": 2.0, "size_level": 64, "conditioner_pixels": [3136, 6272], "reasoner_pixels": [3136, 6272]}


def short_pack() -> Pack:
    """Our own wording with short replies: random weights never come to an end by themselves."""
    return replace(fitted(load_pack("en"), reply_tokens=40), name="short")


def consistency(score: float, meets: str = "yes") -> str:
    keys = {"meets_instruction": meets, "major_conflicts": 0, "minor_conflicts": 0, "omissions": 0}
    return json.dumps({**keys, "raw_score": score, "reason": "because"})


def pair(*scores: float) -> str:
    return json.dumps({"score": list(scores), "reasoning": "because"})


REPLIES = {
    "think": ["Cover the ground with snow."],
    "describe": ["A snowy field."],
    "score": [consistency(4, "partial"), consistency(9.5)],
    "reflect": ["<#Think>Too thin.<#Reflection>Add more snow.", "<#Think>Fine.<#Success>"],
    "edit_score": [pair(5, 6), pair(8, 8)],
    "quality_score": [pair(7, 6), pair(8, 9)],
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Tiny checkpoints whose settings keep pictures small; the files themselves are linked, not copied."""
    folders = {}
    for system, name in (("reasonedit-s", "step1x-v1p2"), ("reasonedit-q", "qwen-edit-plus")):
        folder = tmp_path_factory.mktemp(system)
        for path in tiny_checkpoint(name).iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "reasonedit.json").write_text(json.dumps(SMALL))
        folders[system] = folder
    return folders


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a picture and scripted replies; the machine's own settings do not reach the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REASONEDIT_DEBUG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (37, 53, 3), dtype=np.uint8)).save("cat.png")
    Path("replies.json").write_text(json.dumps(REPLIES))
    return tmp_path


def edit(weights: dict[str, Path], *more: str, system: str = "reasonedit-s", image: str = "cat.png") -> int:
    base = ["edit", image, "Let it snow", "--system", system, "--weights", str(weights[system]), "--out", "out"]
    return main([*base, *more])


def trace(folder: str = "out") -> dict:
    return json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def told(capsys) -> str:
    """The one line of an error, checked for form."""
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    lines = [line for line in said.err.splitlines() if "error:" in line or "stopped" in line]
    assert len(lines) == 1, said.err
    return lines[0]


BASE = ["edit", "cat.png", "x", "--system", "reasonedit-s", "--weights", ".", "--out", "o"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*BASE, "--steps", "0"], "--steps: expected a whole number from 1 to 1000, found '0'"),
        ([*BASE, "--steps", "2.5"], "--steps: expected a whole number from 1 to 1000, found '2.5'"),
        ([*BASE, "--rounds", "0"], "--rounds: expected a whole number from 1 to 100, found '0'"),
        ([*BASE, "--size", "8"], "--size: expected a whole number from 16 to 8192, found '8'"),
        ([*BASE, "--seed", "-1"], "--seed: expected a whole number from 0"),
        ([*BASE, "--guidance", "nan"], "--guidance: expected a number from 0 to 100, found 'nan'"),
        ([*BASE, "--guidance", "-1"], "--guidance: expected a number from 0 to 100, found '-1'"),
        ([*BASE, "--max-seconds", "soon"], "--max-seconds: expected a number from 0"),
        ([*BASE, "--policy", "bold"], "--policy: invalid choice: 'bold'"),
        ([*BASE, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ([*BASE, "--reasoner", "gpt"], "--reasoner: expected qwen, qwen:DIR, none, remote:http(s)://HOST... or scripted:"),
        ([*BASE, "--reasoner", "gpt"], "found 'gpt'"),
        ([*BASE, "--reasoner", "remote:localhost:8000"], "found 'remote:localhost:8000'"),
        ([*BASE, "--reasoner", "scripted:nope.json"], "found nothing at 'nope.json'"),
        ([*BASE, "--reasoner", "none:x"], "found 'none:x'"),
        ([*BASE, "--lora", "no:0.5"], "--lora: expected FILE[:SCALE] with a file that exists, found nothing at 'no'"),
        ([*BASE, "--lora", "cat.png:much"], "--lora: expected a number from -100 to 100, found 'much'"),
        ([*BASE, "--dialogue", "nope.toml"], "--dialogue: expected a path that exists, found nothing at 'nope.toml'"),
        ([*BASE, "--step", "3"], "unrecognized arguments: --step 3"),
        (["edit", "cat.png"], "required: INSTRUCTION, --system, --out"),
        (["edit", "cat.png", "  ", *BASE[3:]], "INSTRUCTION: expected words that say what to change, found none"),
        (["edit", "nope.png", "x", *BASE[3:]], "Expected a picture file at nope.png, found nothing"),
        (["edit", "replies.json", "x", *BASE[3:]], "expected a picture"),
        ([*BASE, "--reference", "nope.png"], "Expected a picture file at nope.png"),
        ([*BASE, "--device", "cuda"], "--device cuda: expected a CUDA device that torch can use, found none"),
        ([*BASE[:5], "--weights", "away", "--out", "o"], "expected a folder of weights at away, found nothing"),
        (["edit", "cat.png", "x", *BASE[3:7], "--out", "cat.png"], "--out: expected a folder, found the file cat.png"),
        (["download", "sdxl", "--to", "o"], "invalid choice: 'sdxl'"),
        (["dialogue", "import", "nowhere", "--out", "o/x.toml"], "nowhere"),
        (["demo", "--system", "reasonedit-s"], "--system: invalid choice: 'reasonedit-s'"),
        (["edit", "cat.png", "x", "--system", "reasonedit-s", "--out", "o"], "--weights: expected a folder or file"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_call_is_told_in_a_sentence_and_leaves_nothing(here, capsys, args, words):
    before = sorted(os.listdir(here))
    assert main(args) == 2
    assert words in told(capsys)
    assert sorted(os.listdir(here)) == before


def test_lora_and_number_options_read_what_they_should(here):
    Path("a:b.safetensors").touch()
    Path("l.safetensors").touch()
    assert cli.lora("l.safetensors") == (Path("l.safetensors"), 1.0)
    assert cli.lora("l.safetensors:-0.5") == (Path("l.safetensors"), -0.5)
    assert cli.lora("a:b.safetensors") == (Path("a:b.safetensors"), 1.0)
    assert cli.whole(1, 3)("3") == 3 and cli.real(0, 1)("1e-3") == 0.001
    assert cli.reasoner("remote:https://h/v1") == "remote:https://h/v1" and cli.reasoner("qwen:.") == "qwen:."


def test_option_tables_are_those_of_the_loader_and_the_loop():
    assert set(cli.SYSTEMS) == set(load.SYSTEMS)
    assert set(cli.POLICIES) == set(loop.POLICIES)
    assert set(weight_options.DTYPES) == {"auto", *load.DTYPES}
    assert set(weight_options.WEIGHTS) == set(WEIGHTS_DTYPES) - {"full"}


def test_auto_dtype(monkeypatch):
    assert load.choose_dtype("auto", torch.device("cpu")) == "float32"
    assert load.choose_dtype("float16", torch.device("cpu")) == "float16"
    for capability, dtype in (((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, c=capability: c)
        assert load.choose_dtype("auto", torch.device("cuda")) == dtype


def test_both_guidance_passes_as_one_forward_make_the_same_picture(here, weights):
    how = ("--reasoner", "none", "--no-think", "--no-reflect", "--seed", "7")
    assert edit(weights, *how) == 0
    apart, told = pixels("out/result.png"), trace()
    assert edit(weights, *how, "--batched-cfg", "--out", "joined") == 0
    joined = trace("joined")
    assert (told["request"]["batched_cfg"], joined["request"]["batched_cfg"]) == (False, True)
    assert told["counts"]["denoiser_forwards"] == 2 * joined["counts"]["denoiser_forwards"]
    assert abs(apart.astype(int) - pixels("joined/result.png")).max() <= 1


def test_a_scripted_run_writes_what_the_contract_says(here, weights, capsys):
    assert edit(weights, "--reasoner", "scripted:replies.json", "--seed", "7") == 0
    said = capsys.readouterr()
    record = trace()
    assert [done["decision"] for done in record["rounds"]] == ["refine", "success"]
    assert [done["instruction"] for done in record["rounds"]] == ["Cover the ground with snow.", "Add more snow."]
    assert [done["input_index"] for done in record["rounds"]] == [None, 0]
    assert record["rounds"][0]["next_instruction"] == "Add more snow."
    assert record["rounds"][1]["scores"] | {"consistency_reason": ""} == {
        "edit": [8, 8], "quality": [8, 9], "consistency": 9.5, "consistency_reason": "",
    }  # fmt: skip
    assert record["best"] == 1 and record["stop_reason"] == "success" and record["target"] == "A snowy field."
    assert record["thought"] == {"original": "Let it snow", "instruction": "Cover the ground with snow."}
    asked = record["request"]
    assert (asked["seed"], asked["steps"], asked["guidance"], asked["size_level"]) == (7, 2, 2.0, 64)
    assert asked["dialogue"]["origin"] == "own" and asked["image"] == "cat.png" and asked["dtype"] == "float32"
    assert record["counts"]["denoiser_forwards"] == 2 * 2 * 2 and record["counts"]["vae_encodes"] == 1
    assert Path("out/result.png").read_bytes() == Path("out/rounds/01.png").read_bytes()
    assert pixels("out/result.png").shape == (37, 53, 3), "the source's size comes back"
    assert sorted(os.listdir("out")) == ["result.png", "rounds", "sheet.png", "trace.json"]
    assert "round 2: Add more snow. -> success (edit 8/8, quality 8/9, consistency 9.5" in said.out
    assert "result: round 2 of 2 (stopped: success)" in said.out
    assert said.err.count("reasonedit dialogue import") == 1, "the warning about the wording comes once"


def test_the_same_seed_gives_the_same_picture_and_options_reach_the_run(here, weights):
    plain = ("--no-think", "--no-reflect", "--reasoner", "none")
    assert edit(weights, *plain, "--seed", "1") == 0
    first = pixels("out/result.png")
    assert edit(weights, *plain, "--seed", "1") == 0
    assert (pixels("out/result.png") == first).all()
    assert edit(weights, *plain, "--seed", "2") == 0
    assert (pixels("out/result.png") != first).any()
    options = (
        "--steps",
        "3",
        "--guidance",
        "1",
        "--size",
        "96",
        "--negative",
        "blurred",
        "--max-seconds",
        "9",
        "--rounds",
        "1",
    )
    assert edit(weights, *plain, *options) == 0
    asked, counts = trace()["request"], trace()["counts"]
    assert (asked["steps"], asked["guidance"], asked["size_level"], asked["negative"]) == (3, 1.0, 96, "blurred")
    assert (asked["max_seconds"], asked["max_rounds"], asked["think"], asked["reflect"]) == (9.0, 1, False, False)
    assert counts["denoiser_forwards"] == 3, "guidance 1 skips the negative pass"
    assert trace()["thought"] is None and trace()["stop_reason"] == "one_edit"


def test_thinking_and_reflecting_are_switched_off_each_on_its_own(here, weights):
    assert edit(weights, "--reasoner", "scripted:replies.json", "--no-think") == 0
    assert trace()["thought"] is None and [done["decision"] for done in trace()["rounds"]] == ["refine", "success"]
    assert edit(weights, "--reasoner", "scripted:replies.json", "--no-reflect") == 0
    assert trace()["thought"] is not None and [done["decision"] for done in trace()["rounds"]] == [None]
    assert sorted(os.listdir("out/rounds")) == ["00.png"], "the second round of the run before is gone"


def test_the_trace_keeps_which_pack_spoke(here, weights):
    Path("short.toml").write_text(format_pack(short_pack()), encoding="utf-8")
    assert edit(weights, "--reasoner", "none", "--dialogue", "short.toml") == 0
    said = trace()["request"]["dialogue"]
    assert (said["origin"], said["name"]) == ("explicit", "short")
    assert said["sha256"] == hashlib.sha256(Path("short.toml").read_bytes()).hexdigest()


def test_qwen_image_takes_references_and_names_them(here, weights):
    more = ("--reasoner", "none", "--reference", "cat.png", "cat.png", "--quiet")
    assert edit(weights, *more, system="reasonedit-q") == 0
    assert trace()["request"]["references"] == ["cat.png", "cat.png"] and trace()["request"]["system"] == "reasonedit-q"
    assert pixels("out/result.png").shape == (37, 53, 3)


def test_alpha_comes_back_on_every_picture(here, weights):
    picture = np.asarray(Image.open("cat.png"))
    alpha = np.linspace(0, 255, 53).astype(np.uint8)[None].repeat(37, 0)
    Image.fromarray(np.dstack([picture, alpha])).save("cut.png")
    assert edit(weights, "--reasoner", "none", image="cut.png") == 0
    for path in ("out/result.png", "out/rounds/00.png"):
        assert pixels(path).shape == (37, 53, 4) and (pixels(path)[..., 3] == alpha).all()


def test_a_list_of_replies_that_runs_out_keeps_the_rounds_made(here, weights, capsys):
    Path("replies.json").write_text(json.dumps({**REPLIES, "reflect": REPLIES["reflect"][:1]}))
    assert edit(weights, "--reasoner", "scripted:replies.json") == 2
    line = told(capsys)
    assert "'reflect'" in line and "The 2 rounds made before are kept in out." in line
    record = trace()
    assert [done["decision"] for done in record["rounds"]] == ["refine", None]
    assert record["stop_reason"] not in ("", "running", "success")
    assert {"result.png", "sheet.png"} <= set(os.listdir("out"))
    best = record["rounds"][record["best"]]["image"]
    assert Path("out/result.png").read_bytes() == Path("out", best).read_bytes()


def test_an_error_before_the_first_round_leaves_no_folder(here, weights, capsys):
    Path("replies.json").write_text("{}")
    assert edit(weights, "--reasoner", "scripted:replies.json") == 2
    assert "think" in told(capsys) and not Path("out").exists()


def interrupt_at(monkeypatch, method: str, when) -> None:
    """Press Ctrl-C once, inside a callback of the progress bars, as soon as `when` agrees."""
    original, presses = getattr(run.Bars, method), iter([signal.SIGINT])

    def pressed(self, *args):
        original(self, *args)
        if when(*args):
            for number in presses:
                signal.raise_signal(number)

    monkeypatch.setattr(run.Bars, method, pressed)


def test_ctrl_c_stops_at_the_next_step_and_keeps_the_finished_rounds(here, weights, capsys, monkeypatch):
    interrupt_at(monkeypatch, "step", lambda index, count, latents: index == 1 and Path("out/rounds/00.png").exists())
    handler = signal.getsignal(signal.SIGINT)
    assert edit(weights, "--reasoner", "scripted:replies.json") == 130
    assert "kept in out" in [line for line in capsys.readouterr().err.splitlines() if "stopped:" in line][0]
    record = trace()
    assert [done["decision"] for done in record["rounds"]] == ["refine"] and record["stop_reason"] == "interrupted"
    assert os.listdir("out/rounds") == ["00.png"] and pixels("out/rounds/00.png").shape == (37, 53, 3)
    assert record["counts"]["denoiser_forwards"] < 2 * 2 * 2, "the second edit was not finished"
    assert signal.getsignal(signal.SIGINT) == handler


def test_ctrl_c_stops_at_the_next_token(here, weights, monkeypatch):
    seen = []
    interrupt_at(monkeypatch, "text", lambda task, text: seen.append(task) or (task != "think" and Path("out").exists()))
    assert edit(weights) == 130
    record = trace()
    assert len(record["rounds"]) == 1 and record["rounds"][0]["decision"] is None
    assert (pixels("out/result.png") == pixels("out/rounds/00.png")).all() or record["best"] is None
    assert {"think", "describe"} <= set(seen)


def test_a_second_ctrl_c_ends_the_run_at_once(here, weights, capsys, monkeypatch):
    def twice(self, *args):
        if Path("out/rounds/00.png").exists():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.Bars, "step", twice)
    assert edit(weights, "--reasoner", "scripted:replies.json") == 130
    assert "press Ctrl-C again" in capsys.readouterr().err
    assert trace()["stop_reason"] == "interrupted" and trace()["best"] == 0
    assert Path("out/result.png").read_bytes() == Path("out/rounds/00.png").read_bytes()


def test_running_out_of_memory_in_the_second_round_keeps_the_first(here, weights, capsys, monkeypatch):
    def full(self, *args):
        if Path("out/rounds/00.png").exists():
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run.Bars, "step", full)
    assert edit(weights, "--reasoner", "scripted:replies.json") == 2
    assert "--offload component" in capsys.readouterr().err
    assert len(trace()["rounds"]) == 1 and Path("out/result.png").exists() and Path("out/sheet.png").exists()


class Poisoned:
    """Stands in for the copy to a device: true weights exist only there, what is parked on the CPU is NaN.

    memory: of the device in bytes; 1 makes every component too large for it, so that all are streamed.
    """

    def __init__(self, memory: int | None) -> None:
        self.true: dict[int, torch.Tensor] = {}
        self.count, self.memory = 0, memory

    def make(self, mode, modules, device):
        if mode == "none":
            return offload.Resident(modules, torch.device(device))
        for parameter in {p for module in modules.values() for p in module.parameters()}:
            parameter.data = parameter.data.clone()  # weights are mapped from a file that is read-only
            self.true[parameter.data_ptr()] = parameter.data.clone()
            parameter.data.fill_(float("nan"))
        return ORIGINAL_MAKE(mode, modules, device, transfer=self, memory=self.memory)

    def __call__(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.count += 1
        return self.true.get(tensor.data_ptr(), tensor).clone()


ORIGINAL_MAKE = offload.make_mover


@pytest.mark.parametrize("system", ["reasonedit-s", "reasonedit-q"])
def test_offloaded_runs_are_equal_bit_for_bit(here, weights, monkeypatch, system):
    more = ("--reasoner", "qwen", "--no-think", "--rounds", "1", "--quiet", "--dialogue", "short.toml")
    Path("short.toml").write_text(format_pack(short_pack()), encoding="utf-8")
    pictures, traces = [], []
    for mode, memory in (("none", None), ("component", None), ("block", None), ("block", 1)):
        device = Poisoned(memory)
        monkeypatch.setattr(offload, "make_mover", device.make)
        assert edit(weights, *more, "--offload", mode, system=system) == 0
        assert (device.count > 0) == (mode != "none")
        pictures.append(pixels("out/rounds/00.png"))
        traces.append([trace()["target"], [done["scores"] for done in trace()["rounds"]]])
    assert all((picture == pictures[0]).all() for picture in pictures)
    assert all(told == traces[0] for told in traces), "the MLLM used a weight that was not on the device"


def test_running_out_of_memory_is_told_with_what_helps(here, capsys, monkeypatch):
    class Fails:
        def __call__(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(load, "load_system", Fails())
    assert main(BASE) == 2
    line = told(capsys)
    assert "--offload component" in line and "Tried to allocate 2 GiB" in line


def test_a_torchaudio_that_breaks_transformers_is_named(here, capsys, monkeypatch):
    def fails(*args, **kwargs):
        try:
            raise OSError("libtorchaudio.so: undefined symbol")
        except OSError as error:
            raise RuntimeError("Could not import module 'Qwen2_5_VLForConditionalGeneration'") from error

    monkeypatch.setattr(load, "load_system", fails)
    assert main(BASE) == 2
    assert "pip uninstall torchaudio" in told(capsys)


def test_other_errors_of_libraries_are_not_dressed_up(here, monkeypatch):
    def fails(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(load, "load_system", fails)
    with pytest.raises(KeyError, match="a bug"):
        main(BASE)


def test_debug_shows_the_traceback(here, monkeypatch):
    with pytest.raises(Exception, match="expected a folder of weights"):
        main([*BASE[:5], "--weights", "away", "--out", "o", "--debug"])
    monkeypatch.setenv("REASONEDIT_DEBUG", "1")
    with pytest.raises(Exception, match="--steps"):
        main([*BASE, "--steps", "0"])


def test_what_a_model_writes_cannot_move_the_cursor(capsys):
    cli.say("read \x1b[2J and 下雪")
    assert capsys.readouterr().err == "reasonedit: read \\x1b[2J and 下雪\n"
    assert run.short("a\x1b[2Jb\r\nc\x07") == "a [2Jb c"
    assert run.short("x" * 99) == "x" * 67 + "..."


def test_bars_show_progress_where_somebody_watches(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bars = run.Bars()
    with bars.loading() as on_progress:
        on_progress("DiT", 1, 3)
    with bars.running(3):
        for index in (1, 2, 1, 2):
            bars.step(index, 2, None)
        bars.text("think", "some words")
    shown = capsys.readouterr().err
    assert "loading" in shown and "steps" in shown and "some words" in shown
    with run.Bars(quiet=True).running(3) as silent:
        silent.step(1, 2, None)
        silent.text("think", "x")
    assert capsys.readouterr().err == ""
