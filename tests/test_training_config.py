"""Recipes: read, overridden, checked, written into the run folder. No torch anywhere here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.tests.launch import BOOT
from reasonedit.training.config import OUT
from reasonedit.training.config_file import (
    SNAPSHOT,
    config_hash,
    decisive,
    find_recipe,
    load_config,
    make_config,
    read_snapshot,
    recipe_names,
    write_snapshot,
)
from reasonedit.training.presets import PRESETS, Preset, choose, register_preset


def recipe(**more) -> dict:
    raw = {
        "run": {"out": "runs/a"},
        "model": {"system": "reasonedit-s", "weights": "weights"},
        "data": {"records": ["records.jsonl"]},
        "stage": [
            {"name": "think", "step": "reasoning", "steps": 9, "train": {"mllm_lora": {"lr": 1e-4}}},
            {"name": "paint", "step": "editing", "steps": 7, "train": {"dit": {"lr": 1e-5}, "connector": {"lr": 1e-5}}},
        ],
    }
    return raw | more


def test_every_bundled_recipe_is_valid_and_found_by_name_and_by_path(tmp_path, monkeypatch):
    names = recipe_names()
    wanted = {f"reasonedit_{s}_{kind}" for s in "sq" for kind in ("stage1", "stage2", "stage3", "lora_24gb", "lora_16gb")}
    wanted |= {f"reasonbrain_{kind}" for kind in ("7b", "3b", "flux")}
    assert wanted | {"tiny_cpu", "tiny_brain_cpu"} == set(names)
    monkeypatch.chdir(tmp_path)  # nothing of that name lies here
    for name in names:
        by_name = load_config(name)
        assert load_config(f"training/recipes/{name}.toml") == by_name
        assert load_config(f"{name}.toml", ["run.out=elsewhere"]).out == tmp_path / "elsewhere"


def test_a_file_of_ones_own_wins_over_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny_cpu").write_text("", encoding="utf-8")
    assert find_recipe("tiny_cpu") == Path("tiny_cpu")


def test_an_unknown_recipe_names_the_bundled_ones_and_the_nearest():
    with pytest.raises(ConfigError, match="reasonedit_q_stage1.*did you mean tiny_cpu"):
        load_config("tiny_cpo")


def test_the_papers_numbers_are_the_defaults():
    for system in "sq":
        one, two, three = (load_config(f"reasonedit_{system}_stage{n}").stage[0] for n in (1, 2, 3))
        assert (one.steps, two.steps, three.steps) == (50_000, 28_000, 12_000)
        assert {name: table.lr for name, table in one.train.items()} == {"mllm_lora": 1e-4}
        assert {name: table.lr for name, table in two.train.items()} == {"dit": 1e-5, "connector": 1e-5}
        assert {name: table.lr for name, table in three.train.items()} == dict.fromkeys(("mllm_lora", "connector", "dit"), 6e-6)
        assert (three.loss.ntp, three.loss.fm) == (0.1, 1.0)
        assert two.mixture.kinds["t2i"] / two.mixture.kinds["edit"] == 6
        assert two.timesteps.kind == three.timesteps.kind == "uniform"
        assert two.cached.states and not three.cached.states


# ---- --set


@pytest.mark.parametrize(
    ("text", "read", "value"),
    [
        ("stage.0.steps=5", lambda c: c.stage[0].steps, 5),
        ("stage.paint.steps=5", lambda c: c.stage[1].steps, 5),
        ("stage.1.train.connector.lr=2e-3", lambda c: c.stage[1].train["connector"].lr, 2e-3),
        ("stage.think.train.mine.include=['a','b']", None, None),
        ("run.name=2026", lambda c: c.run.name, "2026"),
        ("run.out=2026-01-01", lambda c: c.out.name, "2026-01-01"),
        ("run.out=7", lambda c: c.out.name, "7"),
        ("run.out='with space'", lambda c: c.out.name, "with space"),
        ("data.records=more.jsonl", lambda c: [p.name for p in c.data.records], ["more.jsonl"]),
        ("data.records=['a', 'b']", lambda c: [p.name for p in c.data.records], ["a", "b"]),
        ("stage.0.validation.sigmas=[0.2, 0.4]", lambda c: c.stage[0].validation.sigmas, (0.2, 0.4)),
        ("every_stage.optim.warmup=3", lambda c: [s.optim.warmup for s in c.stage], [3, 3]),
        ("model.dialogue=none", lambda c: c.model.dialogue, None),
        ("run.deterministic=true", lambda c: c.run.deterministic, True),
    ],
)
def test_set(text, read, value):
    if read is None:
        with pytest.raises(ConfigError, match="stage.0.train.mine.lr: expected a value, found none"):
            make_config(recipe(), "r", [text])
    else:
        assert read(make_config(recipe(), "r", [text])) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run.ot=x", "unknown key 'ot'; did you mean 'out'"),
        ("stage.0.optim.wormup=3", "unknown key 'wormup'; did you mean 'warmup'"),
        ("stag.0.steps=3", "unknown key 'stag'; did you mean 'stage'"),
        ("stage.5.steps=3", r"expected a stage by number or name \(0 \(think\), 1 \(paint\)\), found '5'"),
        ("stage.draw.steps=3", "found 'draw'"),
        ("stage.0=3", "expected a key of the stage"),
        ("run.out", "expected a.b=value"),
        ("run.out.x=3", "expected a table at run.out"),
        ("stage.0.steps=many", "stage.0.steps: .*found 'many'"),
        ("stage.0.train.mllm_lora.lr=0", "stage.0.train.mllm_lora.lr"),
        ("stage.0.train.mllm_lora.include=['(']", "expected a regular expression"),
    ],
)
def test_set_says_what_is_wrong(text, words):
    with pytest.raises(ConfigError, match=words):
        make_config(recipe(), "r", [text])


# ---- faults


def test_unknown_keys_name_the_nearest_and_all_faults_are_told_at_once():
    raw = recipe(modle={}, exprot={})
    raw["stage"][1]["train"]["dit"]["lrr"] = 1
    raw["stage"][0]["loss"] = {"balance": "tokens"}
    with pytest.raises(ConfigError) as caught:
        make_config(raw, "mine.toml")
    said = str(caught.value)
    assert said.startswith("mine.toml: ")
    for part in ("did you mean 'model'", "did you mean 'export'", "stage.1.train.dit.lrr", "did you mean 'lr'"):
        assert part in said
    assert "stage.0.loss.balance" in said and "found 'tokens'" in said


def test_a_fault_of_every_stage_is_told_as_such():
    with pytest.raises(ConfigError, match=r"stage.0.optim.bettas \(from every_stage\): unknown key.*'betas'"):
        make_config(recipe(every_stage={"optim": {"bettas": [0, 0]}}), "r")


def test_every_stage_fills_what_a_stage_leaves_out():
    raw = recipe(every_stage={"optim": {"warmup": 4, "clip": 2.0}, "steps": 1})
    raw["stage"][0]["optim"] = {"clip": 3.0}
    config = make_config(raw, "r")
    assert [stage.optim.warmup for stage in config.stage] == [4, 4]
    assert [stage.optim.clip for stage in config.stage] == [3.0, 2.0]
    assert config.stage[0].steps == 9


def test_two_stages_of_one_name_are_refused():
    raw = recipe()
    raw["stage"][1]["name"] = "think"
    with pytest.raises(ConfigError, match="several called think"):
        make_config(raw, "r")


def test_text_that_is_no_toml_is_told_with_its_line(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[run]\nout = \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="r.toml: expected TOML.*line 2"):
        load_config(path)


# ---- paths, snapshot, hash


def test_paths_become_absolute_but_those_of_the_run_folder_move_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = recipe()
    raw["model"]["weights"] = f"{OUT}/checkpoint"
    raw["stage"][1]["start"] = "runs/before"
    config = make_config(raw, "r")
    assert config.data.records == (tmp_path / "records.jsonl",)
    assert config.place(config.model.weights) == tmp_path / "runs/a/checkpoint"
    assert config.stage[1].start == (str(tmp_path / "runs/before"),)
    write_snapshot(config, "r")
    (tmp_path / "runs/a").rename(tmp_path / "moved")
    again = read_snapshot(tmp_path / "moved")
    assert again.place(again.model.weights) == tmp_path / "moved/checkpoint"
    assert again.stage == config.stage and again.data == config.data


def test_a_folder_without_snapshot_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        read_snapshot(tmp_path)
    (tmp_path / SNAPSHOT).write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected the snapshot of a run"):
        read_snapshot(tmp_path)


def test_what_decides_the_numbers_is_hashed_and_what_does_not_is_left_out():
    config = make_config(recipe(), "r")
    base = config_hash(decisive(config, config.stage[0]))
    for text in ("run.out=b", "run.workers=2", "stage.0.save_every=1", "stage.0.validation.every=5", "model.weights=w"):
        other = make_config(recipe(), "r", [text])
        assert config_hash(decisive(other, other.stage[0])) == base, text
    for text in ("run.seed=1", "stage.0.steps=8", "stage.0.packs.text=99", "stage.0.train.mllm_lora.lr=1e-3"):
        other = make_config(recipe(), "r", [text])
        assert config_hash(decisive(other, other.stage[0])) != base, text
    other = make_config(recipe(), "r", ["stage.1.steps=8"])
    assert config_hash(decisive(other, other.stage[0])) == base  # another stage's numbers


# ---- presets


def test_a_preset_fills_in_and_says_where_it_disagrees():
    config = make_config(recipe(), "r", ["stage.0.train.mllm_lora.exclude=['.*k_proj']"])
    chosen = choose("mllm_lora", config.stage[0].train["mllm_lora"], "reasonedit-s")
    assert (chosen.part, chosen.mode, chosen.random) == ("mllm", "lora", False)
    assert chosen.exclude == (".*k_proj",)
    wrong = make_config(recipe(), "r", ["stage.0.train.mllm_lora.part=dit"]).stage[0].train["mllm_lora"]
    with pytest.raises(ConfigError, match="expected mllm"):
        choose("mllm_lora", wrong, "reasonedit-s")
    with pytest.raises(ConfigError, match="expected a preset"):
        choose("mine", config.stage[0].train["mllm_lora"], "reasonedit-s")


def test_another_objective_adds_a_preset(monkeypatch):
    monkeypatch.setattr("reasonedit.training.presets.PRESETS", dict(PRESETS))
    register_preset("frce", Preset("mllm", "full", {"": ("frce.*",)}, {}))
    config = make_config(recipe(), "r", ["stage.0.train.frce.lr=1e-3"])
    assert choose("frce", config.stage[0].train["frce"], "reasonedit-q").include == ("frce.*",)
    with pytest.raises(ConfigError, match="taken"):
        register_preset("frce", PRESETS["dit"])


def test_reading_a_recipe_needs_no_torch():
    code = (
        f"{BOOT}\nfrom reasonedit.training.config_file import load_config; import reasonedit.training.stages;"
        "load_config('tiny_cpu'); print([m for m in ('torch', 'transformers', 'diffusers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
