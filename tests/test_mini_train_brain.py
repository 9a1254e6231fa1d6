"""mini-brain: its vocabularies, records, pretrained parts, rows from one start, the finished folder, and its tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reasonedit.reasonedit_core.brain.layout import find_brain_parts
from reasonedit.reasonedit_core.brain.model import load_brain_model
from reasonedit.reasonedit_core.conditioners.text_states import load_text_states
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.latents import SDCodec
from reasonedit.reasonedit_core.mini.items import CATEGORIES
from reasonedit.training.brain.base import BrainBase
from reasonedit.training.cli import main as train_command
from reasonedit.training.config_file import make_config, read_recipe
from reasonedit.training.data.records import read_records
from reasonedit.training.eval import brain as tables
from reasonedit.training.eval.cli import main as evaluate
from reasonedit.training.mini import brain_chain
from reasonedit.training.mini.books import write_book
from reasonedit.training.mini.brain_blank import MINI, text_vocabulary, write_bases
from reasonedit.training.mini.brain_card import write_brain_card
from reasonedit.training.mini.brain_chain import BrainChain, vae_settings, write_finished_brain
from reasonedit.training.mini.brain_parts import Conversations, PartSettings, train_editor, train_llava
from reasonedit.training.mini.brain_rows import COMPONENTS, LIMIT, ROWS
from reasonedit.training.mini.brain_tokens import learn_merges
from reasonedit.training.mini.chain import RECIPES
from reasonedit.training.mini.vae import train_vae
from reasonedit.training.run import run
from reasonedit.training.stages import plan_stages

PARTS = ("llava", "unet", "text_encoder", "vae")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The blank parts of mini-brain, with vocabularies of few texts."""
    place = tmp_path_factory.mktemp("mini") / "start" / "mini-brain"
    merges = {kind: learn_merges(kind, size=300, texts=60) for kind in ("llava", "text")}
    return write_bases(place, sizes=MINI, dtype=torch.bfloat16, merges=merges)


def recipe(out: Path, *sets: str, **switches):
    raw = read_recipe(RECIPES / "brain.toml")
    raw["run"] |= {"out": str(out), "threads": 1}
    raw["model"]["brain"]["switches"] = switches
    return make_config(raw, "mini_brain", sets)


def test_the_text_vocabulary_is_read_by_clips_tokenizer(parts):
    text = load_text_states(parts / "text_encoder", parts / "tokenizer")
    ids = text.tokenizer("What if the ice cube melts?").input_ids
    tokens = text.tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "<|startoftext|>" and tokens[-1] == "<|endoftext|>" and "the</w>" in tokens and len(tokens) < 14
    assert len(text_vocabulary([])) == 514 and text.length == MINI["text_encoder"]["max_position_embeddings"]


def test_records_are_of_the_four_categories_and_their_objects_come_from_the_words(tmp_path):
    records = read_records(write_book("suppositions", tmp_path, 8, 1, held_out=4))
    assert [record.split for record in records] == ["train"] * 8 + ["held_out"] * 4
    assert {record.reason50k.scenario for record in records} == set(CATEGORIES)
    assert all(record.kind == "hypothetical" and record.lang == "en" and not record.reason50k.objects for record in records)
    assert all(record.reason50k.source_caption != record.reason50k.target_caption for record in records)


def test_the_recipe_is_sound_and_its_rows_begin_alike(parts, tmp_path):
    config = recipe(tmp_path / "runs" / "row", f"model.weights={parts}")
    (plan,) = plan_stages(config)
    assert plan.stage.step == "reasonbrain" and {"brain", "llava_lora", "denoiser_first"} <= set(plan.stage.train)
    whole = BrainBase(config).model().brain.state_dict()
    for row in ("no_patch", "simple_ca", "plain"):
        off = ROWS[row]
        other = BrainBase(recipe(tmp_path / row, f"model.weights={parts}", **off)).model().brain
        state = other.state_dict()
        shared = [name for name in state if name in whole]
        assert all(torch.equal(state[name], whole[name]) for name in shared) and len(shared) > 40, row
        assert set(state) != set(whole)


def test_a_conversation_teaches_the_answers_alone(parts):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(parts / "llava"))
    source = Conversations(AutoConfig.from_pretrained(str(parts / "llava")), tokenizer, PartSettings(steps=1), "x")
    ids, labels = source.row([("What is it?", "A tree."), ("Which colour?", "Green.")])
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 36
    learnt = tokenizer.decode([label for label in labels if label >= 0])
    assert learnt.replace(" ", "") == "Atree.</s>Green.</s>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("part", ["llava", "editor"])
def test_a_part_learns_its_first_batch_and_loads_again(parts, tmp_path, part):
    settings = PartSettings(steps=6, batch=4, warmup=0, save_every=0)
    make, folder = (train_llava, parts / "llava") if part == "llava" else (train_editor, parts)
    out = make(settings, folder, tmp_path / "out", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert len(losses) == 6 and losses[-1] < losses[0]
    put = tmp_path / "put"
    shutil.copytree(parts, put)
    for name in ("llava",) if part == "llava" else ("unet", "text_encoder"):
        shutil.rmtree(put / name)
        shutil.copytree(out if part == "llava" else out / name, put / name)
    config = recipe(tmp_path / "row", f"model.weights={put}")
    model = BrainBase(config).model()
    assert model.network.conv_in.in_channels == 8 and len(model.llava.img_names) == 12


def test_the_autoencoder_has_the_channels_of_stable_diffusion(tmp_path, monkeypatch):
    monkeypatch.setattr("reasonedit.training.mini.vae.COUNTED", 8)
    settings = vae_settings(steps=1, batch=4, warmup=0, checked=2, check_every=0)
    train_vae(settings, tmp_path / "vae", tmp_path / "run")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(tmp_path / "vae"), local_files_only=True)
    codec = SDCodec(vae)
    mean, _ = codec.encode(torch.zeros(1, 3, 96, 96))
    assert mean.shape == (1, 4, 12, 12) and codec.decode(mean).shape == (1, 3, 96, 96)


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """A finished folder of two rows, each trained for two steps."""
    out = parts.parent.parent
    write_book("suppositions", out / "records" / "suppositions", 8, 0, held_out=2)
    sets = ("stage.0.steps=2", "stage.0.brain.batch=2", "stage.0.validation.records=0", "stage.0.samples.every=0")
    trained = {}
    for row in ("full", "plain"):
        config = recipe(out / "runs" / row, *sets, f"model.weights={parts}", **ROWS[row])
        assert run(config, quiet=True) == 0
        trained[row] = config.out / "1-reason" / "trained"
    return write_finished_brain(parts, trained, out / "mini-brain")


def test_the_finished_folder_holds_parts_once_and_each_row_loads(finished, parts):
    assert {path.name for path in (finished / "rows" / "plain").iterdir()} == {
        "brain.safetensors", "lora", "reasonbrain.json", "reasonedit.json",
    }  # fmt: skip
    whole, plain = (load_brain_model(find_brain_parts(place)) for place in (finished, finished / "rows" / "plain"))
    assert whole.brain.switches.cues and not plain.brain.switches.cues
    rows = {place.name: load_file(place / "brain.safetensors") for place in (finished, finished / "rows" / "plain")}
    assert all(tensor.dtype == torch.bfloat16 for state in rows.values() for tensor in state.values())
    assert len(rows["plain"]) < len(rows["mini-brain"])
    shared = sum(file.stat().st_size for name in PARTS for file in (finished / name).rglob("*") if file.is_file())
    one = sum(file.stat().st_size for file in (finished / "brain.safetensors", *(finished / "lora").iterdir()))
    # Every row is about as large as the full one; the tokenizers hold a little more than those of few texts.
    assert shared + len(ROWS) * one + 200_000 < LIMIT, (shared, one)


def test_the_card_holds_records_tables_and_the_words_that_lie_beside_them(finished):
    out = finished.parent
    tables_of = out / "tables" / "mini-brain"
    shutil.rmtree(tables_of, ignore_errors=True)
    (out / "runs" / "llava-mini-brain").mkdir(parents=True, exist_ok=True)
    step = json.dumps({"event": "step", "step": 1, "step_s": 6.0})
    (out / "runs" / "llava-mini-brain" / "log.jsonl").write_text(f"{step}\n")
    card = write_brain_card(out).read_text(encoding="utf-8")
    assert "--system mini-brain --out out" in card and "No table has been measured" in card
    assert "| conversations about scenes, drawn as llava learns | 32 |" in card
    assert "| suppositions, of every row | 8 | 2 | 0 |" in card
    tables_of.mkdir(parents=True)
    (tables_of / "notes.md").write_text("`no_id` does not help here: names are in the words.\n")
    assert "names are in the words" not in write_brain_card(out).read_text(encoding="utf-8"), "words about no table"
    (tables_of / "components.md").write_text("| full | 6.00 |\n")
    (tables_of / "components.json").write_text("{}")
    card = write_brain_card(out).read_text(encoding="utf-8")
    assert card.index("| full | 6.00 |") < card.index("names are in the words")
    assert (finished / "tables" / "components.json").read_text() == "{}"
    (finished / "README.md").unlink()
    shutil.rmtree(finished / "tables")


def test_switched_table_from_the_command_line(finished, tmp_path, capsys, monkeypatch):
    few = {row: COMPONENTS[row] for row in ("full", "no_id")}
    table = tables.TABLES["components_switched"]
    monkeypatch.setitem(tables.TABLES, table.name, tables.BrainTable(table.name, table.what, few, trained=False))
    options = ["--out", str(tmp_path), "--device", "cpu", "--n", "4", "--quiet"]
    assert evaluate(["miniature", "--system", str(finished), "--table", table.name, *options]) == 0
    measured = json.loads((tmp_path / "components_switched.json").read_text())
    assert {row["system"] for row in measured["rows"]} == set(few)
    assert {(pair["a"], pair["b"]) for pair in measured["paired"]} == {("full", "no_id")}
    assert {pair["group"] for pair in measured["paired"]} == {"all", *CATEGORIES} and measured["n"] == 4
    assert all(row["low"] <= row["overall"] <= row["high"] for row in measured["rows"])
    assert "full above no_id" in capsys.readouterr().out
    kept = (tmp_path / "components_switched.items.jsonl").read_text()
    assert evaluate(["miniature", "--system", str(finished), "--table", table.name, *options]) == 0  # nothing is left to do
    assert (tmp_path / "components_switched.items.jsonl").read_text() == kept


def test_the_tables_have_the_rows_that_the_paper_compares(finished, tmp_path):
    components = tables.TABLES["components"]
    assert list(components.rows) == ["full", "no_patch", "no_region", "no_id", "no_vision", "no_text", "plain"]
    tasks = tables.draw_brain_tasks(8, 0)
    assert [task.category for task in tasks] == [category for category in CATEGORIES for _ in range(2)]
    assert [task.key for task in tables.draw_brain_tasks(12, 0) if task in tasks] == [task.key for task in tasks]
    marks = {"overall": 5.0, "success": 5.0, "preservation": 5.0, "quality": 5.0, "done": False, "exact": False}
    records = {
        (row, task.key): {"key": task.key, "seconds": 1.0, "marks": {**marks, "overall": 6.0 if row == "full" else 4.0}}
        for row in components.rows
        for task in tasks
    }
    measured = tables.measure_brain(components, records, tasks, "mini-brain", 0)
    assert len(measured["rows"]) == 7 * 5 and len(measured["paired"]) == 6 * 5
    assert all((pair["difference"], pair["low"], pair["high"]) == (2.0, 2.0, 2.0) for pair in measured["paired"])
    assert tables.weigh(measured)[0] == "full above no_patch: found, +2.00 [+2.00, +2.00]."
    with pytest.raises(CheckpointError, match="expected the trained row no_patch"):
        evaluate_strictly(finished, tmp_path)


def evaluate_strictly(folder: Path, out: Path):
    from reasonedit.training.eval.miniature import Request, make_table

    with pytest.raises(ConfigError, match="expected one of components"):
        make_table(Request(str(folder), "loop", out), print)
    make_table(Request(str(folder), "components", out, n=4), print)


def test_values_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--until: expected one of tokens, records, vae, llava, editor, start, full"):
        BrainChain(tmp_path).make("everything")
    with pytest.raises(ConfigError, match="rows: expected some of full"):
        BrainChain(tmp_path, rows=("best",))
    with pytest.raises(ConfigError, match="above 0 and up to 1, found 0"):
        BrainChain(tmp_path, share=0.0)
    with pytest.raises(ConfigError, match="expected links of a miniature, brain-tokens"):
        BrainChain(tmp_path, links=tmp_path).make()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_way_in_very_small(tmp_path, monkeypatch):
    """The command from nothing to a finished folder with its card, and once more without work to do."""
    quick = PartSettings(steps=2, batch=2, warmup=0, save_every=0)
    monkeypatch.setattr("reasonedit.training.mini.brain_parts.WORDS", quick)
    monkeypatch.setattr("reasonedit.training.mini.brain_parts.EDITOR", quick)
    monkeypatch.setattr("reasonedit.training.mini.vae.COUNTED", 8)
    short = {"steps": 1, "batch": 4, "warmup": 0, "checked": 2, "check_every": 0}
    monkeypatch.setattr(brain_chain, "vae_settings", lambda **changes: vae_settings(**{**changes, **short}))
    rows = {row: ROWS[row] for row in ("full", "plain")}
    monkeypatch.setattr(brain_chain, "ROWS", rows)
    command = ["mini", "--system", "mini-brain", "--out", str(tmp_path), "--share", "0.0004", "--threads", "1"]
    command += ["--set", "stage.0.brain.batch=2", "--quiet"]
    assert train_command(command) == 0
    folder = tmp_path / "mini-brain"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| row plain |" in card and "| full | 1 |" in card and "No table has been measured" in card
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    assert train_command(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
