"""The records of all four pipelines train: one epoch of stage 1 and one of stage 2 on tiny weights lowers the held-out loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reasonedit.tests.trace_tools import a_run, save_folder
from reasonedit.training.config_file import load_config
from reasonedit.training.data.cache import Cache
from reasonedit.training.data.check import check_records
from reasonedit.training.data.label.cli import main
from reasonedit.training.data.label.traces import RoundFeedback, write_feedback
from reasonedit.training.data.records import read_records
from reasonedit.training.material import draw_missing, make_documents, make_source, open_material
from reasonedit.training.models import Base
from reasonedit.training.run import EXIT_DONE, run, validations
from reasonedit.training.stages import plan_stages

ENOUGH = "0.25"
"""Share of the pictures that is held out, so that the held-out loss is of more than one or two."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """A folder of records of each pipeline, as its command leaves it."""
    root = tmp_path_factory.mktemp("made")
    seeds, ideas = root / "seeds", root / "ideas"
    assert main(["mini-seeds", "--out", str(seeds), "--count", "16", "--seed", "2", "--language", "en"]) == 0
    assert main(["mini-seeds", "--for", "reason50k", "--out", str(ideas), "--count", "12", "--language", "en"]) == 0
    (root / "traces").mkdir()
    for number in range(4):
        trace = a_run(number)[1]
        folder = save_folder(trace, root / f"traces/{number}")
        mended = trace.rounds[0].reflection.instruction
        write_feedback(folder, RoundFeedback(round=1, verdict="correct", instruction=mended), None)
        write_feedback(folder, RoundFeedback(round=2, verdict="accept"), None)
    world, common = ["--world", str(seeds), "--held-out", ENOUGH], ["--quiet"]
    commands = {
        "thinking-pairs": [str(seeds), *world],
        "reflection-triples": [str(seeds), *world, "--edits", "1", "--ratio", "all"],
        "from-traces": [str(root / "traces"), "--held-out", ENOUGH],
        "reason50k": [str(ideas / "seeds.jsonl"), "--world", str(ideas), "--candidates", "3", "--most-ssim", "0.9995",
                      "--held-out-share", "0.5"],
    }  # fmt: skip
    for name, arguments in commands.items():
        assert main([name, *arguments, "--out", str(root / name), *common]) == 0
    return [root / name for name in commands]


STAGES = {
    "reasoning": '{name="reasoning", step="reasoning", train={mllm_lora={lr=1e-2, rank=8}}, '
    "mixture={kinds={think=1, reflect=1}}, steps=%d}",
    "editing": '{name="editing", step="editing", cached={latents=true, states=true}, '
    "train={dit_lora={lr=1e-2, rank=16, include=['(single_)?transformer_blocks\\..+', 'x_embedder', 'proj_out']}, "
    "connector={lr=1e-3}}, mixture={kinds={think=1, reflect=1, hypothetical=1}}, steps=%d}",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_an_epoch_on_the_records_of_all_pipelines_lowers_the_held_out_loss(stage, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert all(check_records(folder).ok for folder in made)
    kinds = {record.kind for folder in made for record in read_records(folder, splits=("train",))}
    assert {"think", "reflect", "hypothetical"} <= kinds
    out = tmp_path / "run"
    sets = [f"run.out={out}", f"data.records={json.dumps([str(folder) for folder in made])}"]
    sets += [f"every_stage.{each}" for each in ("save_every=0", "optim.warmup=3", "packs.text=2048", "packs.image=256")]
    sets.append("run.threads=1")
    steps = packs_of_an_epoch(load_config("tiny_cpu", [*sets, f"stage=[{STAGES[stage] % 1}]"]))
    assert run(load_config("tiny_cpu", [*sets, f"stage=[{STAGES[stage] % steps}]"]), quiet=True) == EXIT_DONE
    (log,) = out.glob("1-*/log.jsonl")
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {event["epoch"] for event in events if event["event"] == "step"} == {0}
    looks = validations(log.parent)
    assert looks[-1]["loss"] < looks[0]["loss"]


def packs_of_an_epoch(config) -> int:
    """So many steps are one epoch of the first stage."""
    draw_missing(config)
    base = Base(config)
    material = open_material(config, base)
    (plan,) = plan_stages(config)
    documents = make_documents(material, base.shell())
    source = make_source(material, plan, documents, Cache(config.place(config.data.cache)), world=1)
    return len(source)
