"""The closed loop through `reasonedit edit`: equal to the released loop round by round, its costs, and how it is stopped.

The expected pictures and decisions come from the released pipeline (tests/peer/golden_loop.py, where the cases stand).
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from reasonedit.reasonedit_core import load
from reasonedit.reasonedit_core.latents import KLCodec
from reasonedit.reasonedit_core.reasoners.qwen import QwenSpeaker
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker
from reasonedit.reasonedit_core.run import Bars
from reasonedit.tests.peer import golden_loop, ours
from reasonedit.tests.peer.golden_loop import FAILED, LOOPS, SUCCESS, Loop, pair, refine, replies, score
from reasonedit.tests.tiny import tiny_checkpoint

TRACE_KEYS = {"version", "request", "thought", "target", "rounds", "best", "stop_reason", "counts"}
ROUND_KEYS = {*("index", "instruction", "input_index", "image", "decision", "reason", "next_instruction", "scores", "seconds")}
COUNT_KEYS = {"vision_passes", "generate_calls", "new_tokens", "denoiser_forwards", "vae_encodes", "vae_decodes"}


@functools.cache
def golden() -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """(pictures by CASE/ROUND, records by case)"""
    with safe_open(golden_loop.ROUNDS, "pt") as file:
        return load_file(golden_loop.ROUNDS), json.loads(file.metadata()["records"])


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return ours.write_pack(tmp_path_factory.mktemp("pack"))


def run(case: Loop, folder, pack, *more: object, policy: str = "released") -> ours.Run:
    chosen = ours.options(case, folder, policy=policy)
    weights = tiny_checkpoint(golden_loop.SYSTEM, std=case.std)
    return ours.edit(folder, golden_loop.source(case.size), case.instruction, weights, "--dialogue", pack, *chosen, *more)


# ---- the released loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPS)
def test_released_loop(name, tmp_path, pack):
    case, (pictures, records) = LOOPS[name], golden()
    expected = records[name]
    done = run(case, tmp_path, pack)
    trace = done.trace
    rounds = trace["rounds"]
    assert done.code == 0
    assert [made["decision"] for made in rounds] == (expected["decisions"] if case.reflect else [None])
    assert [made["instruction"] for made in rounds] == expected["instructions"]
    assert [made["input_index"] for made in rounds] == expected["inputs"]
    judged = [made for made in rounds if made["scores"]]
    assert [made["scores"]["consistency"] for made in judged] == expected["consistency"]
    for made, marks in zip(judged, expected["marks"], strict=True):
        assert made["scores"]["edit"] == marks["score1"]["score"] and made["scores"]["quality"] == marks["score2"]["score"]
    assert trace["best"] == expected["best"]
    assert (trace["thought"] or {}).get("instruction") == expected["thought"]
    for index, picture in enumerate(done.rounds):
        ours.assert_same_picture(picture, pictures[f"{name}/{index}"])

    assert_contract(done, case)
    ended = "success" if "success" in expected["decisions"] else "max_rounds"
    assert trace["stop_reason"] == (ended if case.reflect else "one_edit")
    edited = {made["input_index"] for made in rounds}
    counts = trace["counts"]
    assert counts["vae_encodes"] == counts["vision_passes"] == len(edited), "one of each per picture that was edited"
    assert counts["denoiser_forwards"] == len(rounds) * case.steps * (2 if case.guidance > 1 else 1)
    assert counts["vae_decodes"] == len(rounds)


def assert_contract(done: ours.Run, case: Loop) -> None:
    """The folder holds what the command promises, and trace.json has its agreed form."""
    trace = done.trace
    assert trace.keys() == TRACE_KEYS and trace["counts"].keys() == COUNT_KEYS and trace["version"] == 1
    asked = trace["request"]
    assert (asked["instruction"], asked["seed"], asked["steps"]) == (case.instruction, case.seed, case.steps)
    assert (asked["guidance"], asked["size_level"], asked["max_rounds"]) == (case.guidance, case.level, case.rounds)
    assert trace["thought"] is None or trace["thought"].keys() == {"original", "instruction"}
    for index, made in enumerate(trace["rounds"]):
        assert made.keys() == ROUND_KEYS
        assert made["index"] == index and made["image"] == f"rounds/{index:02d}.png" and made["seconds"] > 0
        assert made["input_index"] is None or 0 <= made["input_index"] < index
        assert (made["decision"] == "refine") == (made["next_instruction"] is not None)
    stored = sorted(path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file())
    assert stored == sorted([*(made["image"] for made in trace["rounds"]), "result.png", "sheet.png", "trace.json"])
    best = trace["rounds"][trace["best"]]["image"]
    assert (done.folder / "result.png").read_bytes() == (done.folder / best).read_bytes()


def test_golden_cases_cover_the_loop():
    """Without these a comparison above could pass with the behaviour missing on both sides."""
    pictures, records = golden()
    assert {len(record["decisions"]) for record in records.values()} == {0, 1, 2, 3}
    assert {d for record in records.values() for d in record["decisions"]} == {"success", "refine", "failed"}
    assert records["refine_failed_restart"]["inputs"] == [None, 0, None]
    assert records["refine_refine_success"]["inputs"] == [None, 0, 1]
    assert "<#Others>" in records["others"]["verdicts"][0] and records["others"]["decisions"] == ["success"]
    assert records["thinking"]["thought"] == records["thinking"]["instructions"][2] != LOOPS["thinking"].instruction

    def products(name):
        return [min(m["score1"]["score"]) * min(m["score2"]["score"]) for m in records[name]["marks"]]

    assert products("later_of_equals") == [42, 28, 42] and records["later_of_equals"]["best"] == 2
    assert products("success_wins_tie") == [24, 24] and records["success_wins_tie"]["best"] == 1
    assert products("refine_failed_restart") == [25, 16, 18] and records["refine_failed_restart"]["best"] == 0
    assert products("success_loses") == [48, 42, 36] and records["success_loses"]["best"] == 0

    def far(a, b):
        return (pictures[a].int() - pictures[b].int()).abs().float().mean() > 1

    # A restart has new noise, a chained round another source: neither repeats a picture that came before.
    for name, record in records.items():
        for index in range(1, len(record["decisions"])):
            assert far(f"{name}/{index}", f"{name}/{index - 1}"), name


def test_released_picture_depends_on_words_and_source(tmp_path, pack):
    """The weights of the chained cases show what is compared: other words or another source fail the comparison."""
    case = replace(LOOPS["success_at_once"], std=golden_loop.STD_CHAINED)
    first = run(case, tmp_path / "a", pack).picture()
    words = run(replace(case, instruction="paint the lamp in blue"), tmp_path / "b", pack).picture()
    again = run(case, tmp_path / "c", pack).picture()
    other = ours.edit(
        *(tmp_path / "d", golden_loop.source(case.size).rotate(90), case.instruction),
        *(tiny_checkpoint(golden_loop.SYSTEM, std=case.std), "--dialogue", pack, *ours.options(case, tmp_path / "d")),
    ).picture()
    assert torch.equal(first, again)
    for changed in (words, other):
        with pytest.raises(AssertionError):
            ours.assert_same_picture(changed, first)


# ---- what a run costs ----------------------------------------------------------------------------------------------------

VERDICTS = [refine("make it darker"), refine("keep the edges"), SUCCESS]
CHAIN = replies(VERDICTS, [pair(5, 5), pair(6, 6), pair(7, 7)], [pair(6, 7)] * 3)
WORSE = replies(VERDICTS, [pair(6, 6), pair(5, 5), pair(7, 7)], [pair(6, 7)] * 3)
RESTART = replies([FAILED, FAILED, SUCCESS], [pair(6, 6)] * 3, [pair(6, 7)] * 3)
THOUGHT = {"think": ["Make the cube red."]}


@pytest.fixture
def speaking(monkeypatch):
    """`--reasoner qwen` whose replies come from a script. The MLLM really answers first, in few tokens.

    The speaker that is returned has in `asked` the questions that were answered to the end.
    """
    real = QwenSpeaker.answer

    def use(script: dict[str, list[str]]) -> ScriptedSpeaker:
        speaker = ScriptedSpeaker(script)

        def answer(self, queries, *, on_text=None, should_stop=None):
            short = [replace(query, max_new_tokens=16) for query in queries]
            said = real(self, short, on_text=on_text, should_stop=should_stop)
            assert len(said) == len(queries) and all(said)
            return speaker.answer(queries)

        monkeypatch.setattr(QwenSpeaker, "answer", answer)
        return speaker

    return use


@pytest.fixture
def passes(monkeypatch):
    """What was really computed: digests of the pictures that the vision encoder and the VAE encoder were given."""
    seen: dict[str, list[str]] = {"vision": [], "vae": []}
    real_load, real_encode = load.load_system, KLCodec.encode

    def digest(tensor):
        return hashlib.sha256(tensor.float().contiguous().numpy().tobytes() + str(tuple(tensor.shape)).encode()).hexdigest()

    def load_system(*args, **kwargs):
        system = real_load(*args, **kwargs)
        visual = next(module for name, module in system.mllm.model.named_modules() if name.split(".")[-1] == "visual")
        visual.register_forward_pre_hook(lambda module, args, kwargs: seen["vision"].append(digest(args[0])), with_kwargs=True)
        return system

    def encode(self, pixels):
        seen["vae"].append(digest(pixels))
        return real_encode(self, pixels)

    monkeypatch.setattr(load, "load_system", load_system)
    monkeypatch.setattr(KLCodec, "encode", encode)
    return seen


@pytest.mark.parametrize(
    ("policy", "script", "vision", "encodes"),
    [
        # The source and two results, each as the editor and as the reasoner sees it, and the last result.
        ("reasonedit", CHAIN, 7, 1),
        ("reasonedit", WORSE, 6, 1),
        ("released", CHAIN, 7, 3),
        ("released", RESTART, 5, 1),
    ],
)
def test_three_rounds_encode_each_picture_once(policy, script, vision, encodes, tmp_path, pack, speaking, passes):
    speaker = speaking(script | THOUGHT)
    case = Loop("make the cube red", script | THOUGHT, think=True)
    done = run(case, tmp_path, pack, "--reasoner", "qwen", policy=policy)
    counts = done.trace["counts"]
    assert done.code == 0 and len(done.trace["rounds"]) == 3
    assert counts["vision_passes"] == len(passes["vision"]) == len(set(passes["vision"])) == vision <= 7
    assert counts["vae_encodes"] == len(passes["vae"]) == len(set(passes["vae"])) == encodes
    tasks = [query.task for query in speaker.asked]
    assert tasks.count("describe") == tasks.count("think") == 1
    # Edit and quality of the accepted round would be compared with nothing; only the released policy asks for them.
    assert counts["generate_calls"] == len(tasks) == 2 + 3 * 4 - (2 if policy == "reasonedit" else 0)
    assert counts["new_tokens"] > 0 and counts["vae_decodes"] == 3
    assert counts["denoiser_forwards"] == 3 * case.steps * 2


def test_the_reasoner_itself_always_answers_readably(tmp_path, pack, monkeypatch):
    """Random weights talk nonsense, but the forms keep it readable: no error, no made-up verdict, no second attempt."""
    real, asked = QwenSpeaker.answer, []

    def answer(self, queries, **kwargs):
        asked.extend(query.task for query in queries)
        return real(self, [replace(query, max_new_tokens=min(query.max_new_tokens, 24)) for query in queries], **kwargs)

    monkeypatch.setattr(QwenSpeaker, "answer", answer)
    case = Loop("make the cube red", {}, think=True, rounds=2, guidance=1.0)
    done = run(case, tmp_path, pack, "--reasoner", "qwen", policy="reasonedit")
    assert done.code == 0
    trace = done.trace
    assert trace["thought"]["instruction"] and trace["target"]
    rounds = trace["rounds"]
    assert rounds and all(made["decision"] in ("success", "refine", "failed") for made in rounds)
    assert all(0 <= mark <= 10 for made in rounds for mark in (*made["scores"]["edit"], *made["scores"]["quality"]))
    assert asked.count("reflect") == asked.count("score") == asked.count("edit_score") == len(rounds)


# ---- stopping ------------------------------------------------------------------------------------------------------------

STOPPED = Loop("make the cube red", CHAIN)


def assert_kept(done: ours.Run, decisions: list[str | None], stop_reason: str = "interrupted") -> None:
    """The rounds that were made are on the disk and whole, nothing else is, and the trace says so."""
    trace = done.trace
    assert trace["stop_reason"] == stop_reason
    assert [made["decision"] for made in trace["rounds"]] == decisions
    assert_contract(done, STOPPED)
    for path in done.folder.rglob("*.png"):
        Image.open(path).load()


def test_interrupt_by_step_keeps_the_rounds_made(tmp_path, pack, monkeypatch, capsys):
    """Ctrl-C at the first denoising step of the second round."""
    steps = []

    def step(self, index, count, latents):
        steps.append(index)
        if steps == [1, 2, 1]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bars, "step", step)
    handler = signal.getsignal(signal.SIGINT)
    done = run(STOPPED, tmp_path, pack)
    assert done.code == 130 and steps == [1, 2, 1], "no step was made after the signal"
    assert signal.getsignal(signal.SIGINT) is handler
    assert_kept(done, ["refine"])
    assert "1 round made before is kept" in capsys.readouterr().err
    ours.assert_same_picture(done.picture(), run(replace(STOPPED, rounds=1), tmp_path / "whole", pack).picture())


def test_interrupt_by_token_keeps_the_rounds_made(tmp_path, pack, monkeypatch, speaking):
    """Ctrl-C at the second token of the second round's verdict: its picture is kept, without a verdict."""
    speaker, tokens = speaking(CHAIN), []

    def text(self, task, so_far):
        if task == "reflect" and [query.task for query in speaker.asked].count("reflect") == 1:
            tokens.append(so_far)
            if len(tokens) == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bars, "text", text)
    done = run(STOPPED, tmp_path, pack, "--reasoner", "qwen")
    assert done.code == 130 and len(tokens) == 2
    assert_kept(done, ["refine", None])
    assert done.trace["best"] == 0, "a picture without a verdict is not preferred"


def test_interrupt_while_thinking_leaves_nothing(tmp_path, pack, monkeypatch, speaking):
    speaking(CHAIN | THOUGHT)
    monkeypatch.setattr(Bars, "text", lambda self, task, so_far: signal.raise_signal(signal.SIGINT))
    done = run(replace(STOPPED, think=True), tmp_path, pack, "--reasoner", "qwen")
    assert done.code == 130 and not done.folder.exists()


def test_a_script_that_runs_out_keeps_the_rounds_made(tmp_path, pack, capsys):
    short = CHAIN | {"score": [score()]}
    done = run(replace(STOPPED, replies=short), tmp_path, pack)
    assert done.code == 2
    error = capsys.readouterr().err
    assert "'score'" in error and "replies.json" in error and "kept" in error
    assert_kept(done, ["refine", None], "error")
