"""Single edits through `reasonedit edit --policy released --reasoner none`: the released picture for the same seed (fp32).

ReasonEdit-S against golden pictures of the released v1.2 pipeline under our own prefix (tests/peer/golden_loop.py), and, where
the released code is at hand, live under its own wording, which is imported for the time of the test. ReasonEdit-Q against the
installed diffusers.

The live tests need REASONEDIT_PEER_SRC, the root of a checkout of the released diffusers fork, and REASONEDIT_PEER_PYTHON, an
interpreter with transformers 4.55, megfile and qwen_vl_utils.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from reasonedit.reasonedit_core import cli, images
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker
from reasonedit.tests import test_parity_qwen as stock
from reasonedit.tests.peer import cases, golden_loop, ours
from reasonedit.tests.peer.golden_loop import LOOPS, PHOTO, SINGLE, SUCCESS, Edit, pair, refine, replies
from reasonedit.tests.test_parity_qwen import small_areas  # noqa: F401 - a fixture
from reasonedit.tests.tiny import tiny_checkpoint


@functools.cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(golden_loop.EDITS)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return ours.write_pack(tmp_path_factory.mktemp("pack"))


def run(case: Edit, folder: Path, pack: Path, *more: object) -> ours.Run:
    if case.size == PHOTO:
        pytest.importorskip("skimage", reason="the photograph comes with scikit-image (extra: demo)")
    weights = tiny_checkpoint(golden_loop.SYSTEM, std=golden_loop.STD)
    chosen = ["--dialogue", pack, *ours.options(case, folder), *more]
    return ours.edit(folder, golden_loop.source(case.size), case.instruction, weights, *chosen)


# ---- ReasonEdit-S against golden pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_picture_equals_the_released_one(name, tmp_path, pack):
    case = SINGLE[name]
    done = run(case, tmp_path, pack)
    assert done.code == 0
    assert done.picture().shape[:2] == case.size[::-1], "the released code resizes its result to the source's size"
    ours.assert_same_picture(golden_loop.stored(name, done.picture()), golden()[name])
    trace = done.trace
    assert (trace["thought"], trace["target"], trace["best"], trace["stop_reason"]) == (None, None, 0, "one_edit")
    assert trace["rounds"][0]["decision"] is trace["rounds"][0]["scores"] is None
    assert trace["counts"]["generate_calls"] == 0 and trace["counts"]["vision_passes"] == 1
    assert trace["counts"]["denoiser_forwards"] == case.steps * (2 if case.guidance > 1 else 1)


def test_golden_pictures_differ_where_they_must(tmp_path, pack):
    """Guidance, words and quirks of the text show in the picture; else the comparison above would prove little."""
    pairs = (("bang", "bang_unguided"), ("bang", "apostrophe"), ("plain", "plain_unguided"), ("photo", "photo_unguided"))
    for one, other in pairs:
        assert (golden()[one].int() - golden()[other].int()).abs().float().mean() > 1
    # With the mended text rules a lone `!` keeps its place, which the comparison must see.
    mended = run(SINGLE["bang"], tmp_path, pack, "--policy", "reasonedit")
    assert (mended.picture().int() - golden()["bang"].int()).abs().float().mean() > 0.05


def test_quotes_show_in_the_picture(tmp_path, pack):
    """Quoted characters reach the DiT by a layer of their own: the same words without quotes give another picture."""
    case = Edit('"make the cube red"', (50, 37))
    quoted = run(case, tmp_path / "a", pack).picture()
    plain = run(replace(case, instruction="make the cube red"), tmp_path / "b", pack).picture()
    assert (quoted.int() - plain.int()).abs().float().mean() > 1


@pytest.mark.parametrize("name", cases.EDITS["v1.1"])
def test_v11_picture_equals_the_released_one(name, tmp_path, pack):
    """A folder of v1.1, against golden_pipeline.py's pictures: another layout of text, positions and resizes."""
    case = cases.EDITS["v1.1"][name]
    weights = tiny_checkpoint(cases.SYSTEMS["v1.1"], std=cases.STD)
    chosen = ["--dialogue", pack, "--policy", "released", "--reasoner", "none", "--steps", cases.STEPS]
    chosen += ["--guidance", case.guidance, "--size", case.level, "--seed", cases.SEED]
    done = ours.edit(tmp_path, images.to_pil(cases.picture(case.size)), case.instruction, weights, *chosen)
    expected = load_file(golden_loop.EDITS.with_name("step1x_pipeline.safetensors"))[f"edit/v1.1/{name}/picture"]
    assert done.code == 0
    ours.assert_same_picture(done.picture(), expected[0].permute(1, 2, 0))


# ---- ReasonEdit-S live, under the released wording -----------------------------------------------------------------------

LIVE_LOOPS = ("refine_refine_success", "refine_failed_restart", "thinking", "thinking_chinese", "unreadable_then_good")
LIVE_EDITS = tuple(name for name in SINGLE if SINGLE[name].size != PHOTO)


def peer_environment() -> tuple[str, str]:
    """(checkout of the released code, its interpreter); skips without them."""
    source, python = (os.environ.get(f"REASONEDIT_PEER_{name}") for name in ("SRC", "PYTHON"))
    if not source or not python:
        pytest.skip("NOT COMPARED with the released code: set REASONEDIT_PEER_SRC (checkout) and REASONEDIT_PEER_PYTHON")
    return source, python


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(dialogue pack imported from the released code, pictures and records that the released code makes)."""
    source, python = peer_environment()
    folder = tmp_path_factory.mktemp("peer")
    pack = folder / "released.toml"
    assert cli.main(["dialogue", "import", source, "--out", str(pack)]) == 0
    jobs: dict[float, dict] = {std: {"edits": {}, "loops": {}} for std in (golden_loop.STD, golden_loop.STD_CHAINED)}
    for name in LIVE_EDITS:
        jobs[golden_loop.STD]["edits"][name] = job(folder, name, SINGLE[name])
    for name in LIVE_LOOPS:
        jobs[LOOPS[name].std]["loops"][name] = job(folder, name, LOOPS[name])
    jobs[golden_loop.STD_CHAINED]["loops"]["spoken"] = job(folder, "spoken", LOOPS["thinking"]) | {"speak": True}
    pictures: dict[str, torch.Tensor] = {}
    records: dict[str, dict] = {}
    for std, asked in jobs.items():
        made, told = released(folder, asked | {"folder": str(tiny_checkpoint(golden_loop.SYSTEM, std=std))}, source, python)
        pictures |= made
        records |= told
    return pack, pictures, records


def job(folder: Path, name: str, case) -> dict:
    golden_loop.source(case.size).save(folder / f"{name}.png")
    return {"image": str(folder / f"{name}.png"), **golden_loop.released_arguments(case)}


def released(folder: Path, jobs: dict, source: str, python: str) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Run jobs with the released code, in its own interpreter."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    run_peer("released.py", source, python, folder / "jobs.json", folder / "made.safetensors")
    with safe_open(folder / "made.safetensors", "pt") as file:
        return load_file(folder / "made.safetensors"), json.loads(file.metadata()["records"])


def run_peer(script: str, source: str, python: str, *arguments: Path) -> None:
    """Run a script of tests/peer with the released code on its path."""
    environment = os.environ | {"PYTHONPATH": str(Path(source) / "src"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, Path(golden_loop.__file__).with_name(script), *arguments]
    ran = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.peer
@pytest.mark.parametrize("name", LIVE_EDITS)
def test_live_picture_equals_the_released_one(name, tmp_path, peer):
    pack, pictures, _ = peer
    done = run(SINGLE[name], tmp_path, pack)
    assert done.code == 0 and done.trace["request"]["dialogue"]["sources"], "the imported pack is the one in use"
    ours.assert_same_picture(done.picture(), pictures[name])
    if pictures[name].shape == golden()[name].shape:
        gap = (pictures[name].int() - golden()[name].int()).abs().float().mean()
        assert gap > 0.1, "the released prefix is worded differently from ours, which must show"


@pytest.mark.peer
@pytest.mark.parametrize("name", LIVE_LOOPS)
def test_live_loop_asks_decides_and_paints_as_the_released_one(name, tmp_path, peer, monkeypatch):
    pack, pictures, records = peer
    case, expected = LOOPS[name], records[name]
    asked = []
    answer = ScriptedSpeaker.answer

    def listening(self, queries, **kwargs):
        asked.extend(queries)
        return answer(self, queries, **kwargs)

    monkeypatch.setattr(ScriptedSpeaker, "answer", listening)
    weights = tiny_checkpoint(golden_loop.SYSTEM, std=case.std)
    chosen = ["--dialogue", pack, *ours.options(case, tmp_path)]
    done = ours.edit(tmp_path, golden_loop.source(case.size), case.instruction, weights, *chosen)
    rounds = done.trace["rounds"]
    assert [made["decision"] for made in rounds] == expected["decisions"]
    assert [made["instruction"] for made in rounds] == expected["instructions"]
    assert [made["input_index"] for made in rounds] == expected["inputs"]
    assert done.trace["best"] == expected["best"]
    for index, picture in enumerate(done.rounds):
        ours.assert_same_picture(picture, pictures[f"{name}/{index}"])
    # The questions, character by character; the released code asks for the description again in every round.
    for task in ("think", "describe", "score", "reflect", "edit_score", "quality_score"):
        theirs = [[system, *parts] for kind, system, parts in expected["questions"] if kind == task]
        found = [[query.system, *(shown(query, part) for part in query.parts)] for query in asked if query.task == task]
        assert found == (theirs[:1] if task == "describe" else theirs)
        assert all(question == theirs[0] for question in theirs) or task != "describe"


def shown(query, part: str | int) -> str | list[int]:
    """A part of a question; a picture as [width, height]."""
    return part if isinstance(part, str) else [query.images[part].shape[-1], query.images[part].shape[-2]]


@pytest.mark.peer
def test_live_count_of_the_released_vision_passes(peer):
    """What the counts of test_parity_loop.py (7 passes, one description) are measured against."""
    _, _, records = peer
    spoken = records["spoken"]
    assert len(spoken["decisions"]) == 3 and spoken["vision_passes"] == 34
    assert [kind for kind, *_ in spoken["questions"]].count("describe") == 3


@pytest.mark.peer
def test_golden_files_are_what_the_released_code_makes(tmp_path):
    pytest.importorskip("skimage", reason="the photograph comes with scikit-image (extra: demo)")
    run_peer("golden_loop.py", *peer_environment(), tmp_path)
    for file in (golden_loop.ROUNDS, golden_loop.EDITS):
        made, kept = load_file(tmp_path / file.name), load_file(file)
        assert made.keys() == kept.keys()
        for name, picture in made.items():
            ours.assert_same_picture(picture, kept[name])
        with safe_open(tmp_path / file.name, "pt") as new, safe_open(file, "pt") as old:
            assert new.metadata() == old.metadata()


# ---- ReasonEdit-Q against the installed diffusers ------------------------------------------------------------------------

QWEN = {
    "edit_guided": ("qwen-edit", 1, stock.CHINESE, 4.0),
    "plus_guided": ("qwen-edit-plus", 1, stock.ENGLISH, 4.0),
    "plus_references_unguided": ("qwen-edit-plus", 3, "Stop! don't", 1.0),
}


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A copy of a tiny folder whose condition pictures have the size that the tests give the pipeline."""

    @functools.cache
    def make(system: str) -> Path:
        folder = tmp_path_factory.mktemp("weights") / system
        shutil.copytree(tiny_checkpoint(system, std=stock.STD), folder)
        (folder / "reasonedit.json").write_text(json.dumps({"condition_area": stock.CONDITION_AREA}), encoding="utf-8")
        return folder

    return make


def run_qwen(folder: Path, weights: Path, pictures, instruction: str, guidance: float, *more: object) -> ours.Run:
    """`reasonedit edit` in three steps; pictures beyond the first are references."""
    folder.mkdir(parents=True, exist_ok=True)
    references = []
    for number, picture in enumerate(pictures[1:]):
        references.append(folder / f"reference{number}.png")
        images.to_pil(picture).save(references[-1])
    chosen = ["--policy", "released", "--steps", 3, "--guidance", guidance, "--size", stock.LEVEL, "--seed", 7, *more]
    chosen += ["--reference", *references] if references else []
    return ours.edit(folder, images.to_pil(pictures[0]), instruction, weights, *chosen, system="q")


@pytest.mark.parametrize("name", QWEN)
def test_qwen_picture_equals_diffusers(name, tmp_path, qwen_folder, small_areas):  # noqa: F811
    system, count, instruction, guidance = QWEN[name]
    pictures = stock.make_pictures(count)
    done = run_qwen(tmp_path, qwen_folder(system), pictures, instruction, guidance, "--reasoner", "none")
    expected = stock.stock_picture(system, pictures, instruction, steps=3, guidance=guidance, seed=7)
    assert done.code == 0
    ours.assert_same_picture(done.picture(), as_bytes(expected))
    assert done.trace["counts"]["vae_encodes"] == done.trace["counts"]["vision_passes"] == count


def test_qwen_loop_chains_pictures_of_the_generated_size(tmp_path, qwen_folder, small_areas):  # noqa: F811
    """Two rounds: the second edits the first's picture as it was generated, with the next noise of the same generator."""
    system, (picture,) = "qwen-edit-plus", stock.make_pictures(1)
    script = replies([refine("a darker red"), SUCCESS], [pair(5, 5), pair(6, 6)], [pair(5, 5), pair(6, 6)])
    speaker = ["--reasoner", f"scripted:{ours.write_script(tmp_path, script)}", "--no-think"]
    done = run_qwen(tmp_path, qwen_folder(system), [picture], "a red cube", 4.0, *speaker)
    assert done.code == 0 and [made["input_index"] for made in done.trace["rounds"]] == [None, 0]
    pipe, rng, current = stock.load_stock(system), torch.Generator().manual_seed(7), images.to_pil(picture)
    for instruction, found in zip(("a red cube", " a darker red"), done.rounds, strict=True):
        with stock.truthful_positions(pipe.text_encoder):
            numbers = dict(true_cfg_scale=4.0, num_inference_steps=3, generator=rng)
            current = pipe(image=[current], prompt=instruction, negative_prompt=" ", **numbers).images[0]
        ours.assert_same_picture(found, as_bytes(images.from_pil(current)))


def as_bytes(picture: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) in 0..1 -> uint8 (H, W, 3)."""
    return (picture[0] * 255).round().byte().permute(1, 2, 0)
