"""`reasonedit-train mini`: the recipes, and the whole way from nothing to a folder that loads, in very small."""

import json
from pathlib import Path

import pytest

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mini.models import MINIS
from reasonedit.training.config_file import make_config, read_recipe
from reasonedit.training.mini import chain, finish
from reasonedit.training.mini.card import write_card
from reasonedit.training.mini.chain import (
    BETWEEN,
    BOOKS,
    EDITOR_LEGS,
    FINDING,
    FIRST_STAGE,
    MLLM_LEGS,
    MLLM_RUN,
    RECIPES,
    Chain,
)
from reasonedit.training.mini.finish import write_finished
from reasonedit.training.stages import plan_stages


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_recipes_are_sound(recipe, tmp_path):
    config = make_config(read_recipe(RECIPES / f"{recipe}.toml"), recipe, [f"run.out={tmp_path}"])
    plans = plan_stages(config)
    assert config.place(config.model.weights).resolve().is_relative_to(tmp_path.parent.parent.resolve())
    if recipe in FIRST_STAGE:
        assert [(plan.stage.step, sorted(plan.stage.train)) for plan in plans] == [("reasoning", ["embeddings", "mllm_lora"])]
    if recipe.startswith("mini_"):
        assert [plan.stage.name for plan in plans] == ["editing", "unified"]
        assert list(BETWEEN) == [plan.stage.name for plan in plans[:-1]]
        assert [sorted(plan.stage.train) for plan in plans] == [["connector", "dit"], ["connector", "dit", "mllm_lora"]]
        assert [config.place(Path(one)).resolve() for one in plans[0].stage.start] == [tmp_path.parent / FIRST_STAGE[-1]]


def test_the_lora_of_the_unified_stage_goes_on_with_that_of_the_first():
    reasoning, *rest = (read_recipe(RECIPES / f"{name}.toml") for name in (*FIRST_STAGE, "mini_s", "mini_q"))
    first = reasoning["stage"][0]["train"]["mllm_lora"]
    for recipe in rest:
        assert {**recipe["stage"][-1]["train"]["mllm_lora"], "lr": first["lr"]} == first


def test_both_miniatures_are_trained_alike():
    """What the tables say of one against the other is then of the architectures."""
    one, other = (read_recipe(RECIPES / f"mini_{letter}.toml") for letter in "sq")
    assert (one["run"].pop("name"), other["run"].pop("name")) == ("mini-s", "mini-q")
    assert (one["model"].pop("system"), other["model"].pop("system")) == ("reasonedit-s", "reasonedit-q")
    assert one["run"].pop("out") != other["run"].pop("out") and one["model"].pop("weights") != other["model"].pop("weights")
    assert one == other


@pytest.mark.parametrize(
    "wrong,words",
    [
        (dict(system="mini-x"), "expected one of mini-s, mini-q, found 'mini-x'"),
        (dict(share=0.0), "above 0 and up to 1, found 0.0"),
        (dict(share=1.5), "above 0 and up to 1, found 1.5"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, wrong, words):
    with pytest.raises(ConfigError, match=words):
        Chain(**{"system": "mini-s", "out": tmp_path, **wrong})


def test_an_unknown_link_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="expected one of tokens, records, vae"):
        Chain("mini-s", tmp_path / "out").make("nonsense")
    assert not (tmp_path / "out").exists()


def test_links_that_were_made_elsewhere_are_taken_where_none_are(tmp_path, monkeypatch):
    links, out = tmp_path / "links", tmp_path / "out"
    for name, text in (("tokenizer/vocab.json", "theirs"), ("vae/mini-s/config.json", "{}"), ("vae/mini-s/weights", "theirs")):
        (links / name).parent.mkdir(parents=True, exist_ok=True)
        (links / name).write_text(text)
    (links / "README.md").write_text("about the links")
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer/vocab.json").write_text("ours")
    made = Chain("mini-s", out, links=links)
    for link in ("_tokens", "_records"):
        monkeypatch.setattr(Chain, link, lambda self: 0)
    monkeypatch.setattr("reasonedit.training.mini.vae.train_vae", lambda *args: pytest.fail("the link is there"))
    assert made.make("vae") == 0
    assert (out / "tokenizer/vocab.json").read_text() == "ours" and (out / "vae/mini-s/weights").read_text() == "theirs"
    assert not (out / "README.md").exists()
    with pytest.raises(ConfigError, match="expected links of a miniature"):
        Chain("mini-s", out, links=tmp_path / "nothing").make("vae")


@pytest.mark.parametrize(
    "known,chosen", [({"avx2": True}, "auto"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")]
)
def test_bfloat16_is_taken_where_the_processor_has_it(monkeypatch, known, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known, raising=False)
    assert chain._precision() == chosen


@pytest.mark.parametrize("system", MINIS)
def test_every_leg_begins_with_what_one_before_it_leaves(system):
    legs = {leg.run: leg for leg in (*MLLM_LEGS, *EDITOR_LEGS[system])}
    seen = []
    for leg in legs.values():
        assert (RECIPES / f"{leg.recipe}.toml").is_file() and (leg.run == leg.recipe or leg.run.startswith(f"{leg.system}-"))
        assert {leg.mllm, leg.dit} - {None} <= set(seen)
        assert leg.dit is None or legs[leg.dit].system == leg.system, "a DiT goes on as the same DiT"
        seen.append(leg.run)
    assert [leg.run for leg in legs.values() if leg.recipe == FINDING] == [MLLM_RUN] == [MLLM_LEGS[-1].run]
    last = legs[Chain(system, Path("out"))._editor]
    assert last.system == system and MLLM_RUN in (last.run, last.mllm), "the base editor is of the base MLLM's states"


def test_runs_that_only_later_ones_needed_are_left_out(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(Chain, "_recipe_run", lambda self, recipe, name, *more: ran.append(name) or 0)
    made = Chain("mini-q", tmp_path)
    legs = (*MLLM_LEGS, *EDITOR_LEGS["mini-q"])
    assert [made._leg(leg) for leg in legs] == [0] * len(legs) and ran == [leg.run for leg in legs]
    for run, left in (("mini-s-edits", 7), (MLLM_RUN, 3), ("mini-q-edits", 2)):
        (tmp_path / "runs" / run / f"{run}_merged").mkdir(parents=True)
        ran.clear()
        assert [made._leg(leg) for leg in legs] == [0] * len(legs) and len(ran) == left, run
    assert ran == [MLLM_RUN, "mini-q-edits"]  # these two see for themselves that they have ended
    for ended in range(len(FIRST_STAGE)):
        if ended:
            (tmp_path / "runs" / FIRST_STAGE[ended] / f"{FIRST_STAGE[ended]}_merged").mkdir(parents=True)
        ran.clear()
        assert [made._first_stage(run) for run in FIRST_STAGE] == [0] * len(FIRST_STAGE) and ran == [*FIRST_STAGE[ended:]]


def test_a_run_without_weights_is_no_part_of_a_checkpoint(tmp_path):
    (tmp_path / "blank/mini-s/text_encoder").mkdir(parents=True)
    (tmp_path / "blank/mini-s/text_encoder/old.safetensors").write_bytes(b"old")
    with pytest.raises(ConfigError, match="expected the weights of a run in .*scenes_merged"):
        Chain("mini-s", tmp_path)._checkpoint("mllm", "mini-s", mllm="scenes")
    assert not (tmp_path / "mllm").exists()


def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    merged = tmp_path / "merged"
    merged.mkdir()
    with pytest.raises(ConfigError, match="expected a merged export"):
        write_finished(merged, tmp_path / "out")
    (merged / finish.MARK).write_text('{"base": "/somewhere/private"}')
    (merged / "weights.bin").write_bytes(b"123")
    monkeypatch.setattr(finish, "FILE_LIMIT", 2)
    with pytest.raises(ConfigError, match="weights.bin: expected at most 2 bytes, found 3"):
        chain._whole(tmp_path / "place", lambda part: write_finished(merged, part))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    monkeypatch.setattr(finish, "FILE_LIMIT", 3)
    chain._whole(tmp_path / "place", lambda part: write_finished(merged, part))
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["weights.bin"]


def test_a_card_needs_a_finished_miniature(tmp_path):
    with pytest.raises(ConfigError, match="expected a finished miniature"):
        write_card(tmp_path, "mini-s")


@pytest.mark.slow
def test_from_nothing_to_a_miniature_that_edits(tmp_path, monkeypatch):
    """With a few records and steps: the weights know nothing, but everything is made, loads and runs, and is made once."""
    from PIL import Image

    from reasonedit.reasonedit_core.cli import main
    from reasonedit.reasonedit_core.mini.items import scene
    from reasonedit.reasonedit_core.mini.world import render

    made = Chain("mini-q", tmp_path, share=0.0004, threads=1, quiet=True)
    assert made.make("records") == 0 and not (tmp_path / "vae").exists()
    books = {path.parent.name: json.loads(path.read_text())["count"] for path in tmp_path.glob("records/*/book.json")}
    assert books == {name: round(0.0004 * count) for name, count in BOOKS.items()}
    assert made.make() == 0
    assert sorted(path.relative_to(tmp_path / "compare/mini-q").as_posix() for path in tmp_path.glob("compare/mini-q/*/*")) == [
        *(f"reflection/{form}" for form in ("dual-image", "multi-round", "single-image")),
        *(f"stages/{name}" for name in ("base", "edit", "reason")),
    ]
    folder = tmp_path / "mini-q"
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.rglob("*.json"))
    card = (folder / "README.md").read_text()
    assert "| base editor |" in card and "| base MLLM |" in card and "No table has been measured" in card
    assert str(tmp_path) not in card

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert made.make() == 0  # everything is there
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before

    Image.fromarray(render(scene(1))).save(tmp_path / "scene.png")
    monkeypatch.setenv("REASONEDIT_MINIS", str(tmp_path))
    words = ["edit", str(tmp_path / "scene.png"), "Remove the circle.", "--out", str(tmp_path / "edit")]
    assert main([*words, "--system", "mini-q", "--rounds", "1", "--quiet"]) == 0
    assert Image.open(tmp_path / "edit/result.png").size == (96, 96)
