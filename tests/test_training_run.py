"""Whole runs on tiny weights and drawn records: stage after stage, interrupted and resumed, frozen by name, and the seam."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.tests.launch import program, script
from reasonedit.training import adapters, stages
from reasonedit.training import run as runs
from reasonedit.training.assemble import load_stage
from reasonedit.training.check import check
from reasonedit.training.config import Mixture
from reasonedit.training.config_file import load_config, read_snapshot
from reasonedit.training.data.records import Edit
from reasonedit.training.distributed import open_ranks
from reasonedit.training.losses import backward
from reasonedit.training.material import make_documents, open_cache, open_material, states_hash, trained_hash
from reasonedit.training.models import Base
from reasonedit.training.presets import DIT, MLLM, PRESETS, Preset, register_preset
from reasonedit.training.run import EXIT_DONE, finish, is_done, run, starting_point, validations
from reasonedit.training.signals import EXIT_STOPPED
from reasonedit.training.stages import STEPS, StepKind, plan_stages, register_step
from reasonedit.training.steps import editing_step
from reasonedit.training.types import Losses, MicroStep, ParamGroup

SMALL = (
    "data.drawn.counts={think = 4, reflect = 5, edit = 4, t2i = 4}",
    "stage.reasoning.steps=3",
    "stage.editing.steps=3",
    "stage.unified.steps=3",
    "every_stage.save_every=0",
    "every_stage.validation.records=2",
    "every_stage.validation.sigmas=[0.5]",
    "run.threads=1",
)


def tiny(out: Path, *sets: str):
    return load_config("tiny_cpu", [f"run.out={out}", *SMALL, *sets])


def tree(folder: Path, pattern: str = "**/*.safetensors") -> dict[str, str]:
    """Hash of the tensors of every file; the order of a file's metadata is left to chance by safetensors."""

    def sha(path: Path) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    return {str(path.relative_to(folder)): sha(path) for path in sorted(folder.glob(pattern))}


@pytest.fixture(scope="module", autouse=True)
def contained(tmp_path_factory):
    """Variables that a run sets where the user has not must not reach other tests."""
    with pytest.MonkeyPatch.context() as patch:
        scratch = tmp_path_factory.mktemp("scratch")
        patch.setenv("MPLCONFIGDIR", str(scratch / "matplotlib"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(scratch / "torch"))
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run of all three stages."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(tiny(out), source="tiny_cpu", quiet=True) == EXIT_DONE
    return out


# ---- a whole run


def test_a_run_trains_every_stage_and_exports_both_parts(done):
    config = read_snapshot(done)
    for plan in plan_stages(config):
        folder = done / plan.folder
        assert is_done(config, plan)
        events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, plan.stage.steps + 1))
        looks = validations(folder)
        assert len(looks) == 2 and looks[0]["loss"] != looks[-1]["loss"]
    assert {path.name for path in done.glob("*.safetensors")} == {"tiny_dit.safetensors", "tiny_mllm.safetensors"}


def test_each_stage_keeps_what_came_before_and_goes_on_from_it(done):
    config = read_snapshot(done)
    folders = [done / plan.folder / "trained" for plan in plan_stages(config)]
    first, second, third = ({one.part: one for one in adapters.load(folder).trained} for folder in folders)
    assert set(first) == {MLLM} and set(second) == set(third) == {DIT, MLLM}
    assert trained_hash(second[MLLM]) == trained_hash(first[MLLM])  # frozen in stage 2, carried through
    assert set(third[MLLM].lora) == set(first[MLLM].lora) and trained_hash(third[MLLM]) != trained_hash(first[MLLM])
    assert set(third[DIT].whole) == set(second[DIT].whole) != set()
    assert all(not torch.equal(third[DIT].lora[name], value) for name, value in second[DIT].lora.items())


def test_the_mllm_is_not_loaded_where_its_states_are_cached_and_the_dit_not_where_it_is_not_run(done, monkeypatch):
    from reasonedit.reasonedit_core import weights
    from reasonedit.reasonedit_core.mllm import load

    config = read_snapshot(done)
    base, plans = Base(config), plan_stages(config)
    monkeypatch.setattr(weights, "load_step1x_transformer", lambda *a, **k: pytest.fail("the DiT was loaded"))
    assert load_stage(base, plans[0], {}).models.dit is None
    monkeypatch.undo()
    monkeypatch.setattr(load, "load_mllm", lambda *a, **k: pytest.fail("the MLLM was loaded"))
    loaded = load_stage(base, plans[1], starting_point(config, plans[1]))
    assert loaded.models.mllm is None and loaded.mllm is None
    assert {one.part for one in loaded.trained()} == {DIT, MLLM}


# ---- freeze sets, name by name


def wanted_names(stage: str) -> set[str]:
    mllm = {
        f"mllm.model.model.language_model.layers.{layer}.self_attn.{one}_proj.lora_{half}.default.weight"
        for layer in range(2)
        for one in "qkvo"
        for half in "AB"
    }
    attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    double = [f"attn.{one}" for one in attention]
    double += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear"]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear"]
    linears = ["x_embedder", "proj_out"]
    linears += [f"transformer_blocks.{n}.{one}" for n in range(2) for one in double]
    linears += [f"single_transformer_blocks.{n}.{one}" for n in range(2) for one in single]
    dit = {f"dit.transformer.{one}.lora_{half}.default.weight" for one in linears for half in "AB"}
    layers = ["S.input_embedder", "S.c_embedder.linear_1", "S.c_embedder.linear_2", "S.t_embedder.mlp.0", "S.t_embedder.mlp.2"]
    layers += ["global_proj_out"]
    for n in range(2):
        block = f"S.individual_token_refiner.blocks.{n}"
        layers += [f"{block}.{one}" for one in ("norm1", "self_attn_qkv", "self_attn_proj", "norm2", "mlp.fc1", "mlp.fc2")]
        layers += [f"{block}.adaLN_modulation.1"]
    connector = {f"dit.transformer.connector.{layer}.{one}" for layer in layers for one in ("weight", "bias")}
    connector |= {"dit.transformer.text_token_mapping.weight", "dit.transformer.text_token_mapping.bias"}
    return {"reasoning": mllm, "editing": dit | connector, "unified": mllm | dit | connector}[stage]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_exactly_the_named_weights_have_gradients_and_all_others_stay_as_they_are(done, index):
    config = read_snapshot(done)
    plan = plan_stages(config)[index]
    base = Base(config)
    material = open_material(config, base)
    carried = starting_point(config, plan)
    loaded = load_stage(base, plan, carried)
    cache = open_cache(material, plan, carried.get(MLLM))
    source = plan.kind.make_source(material, plan, make_documents(material, base.shell()), cache)
    units = loaded.models.units()
    named = {f"{unit}.{name}": p for unit, module in units.items() for name, p in module.named_parameters()}

    def shas():
        state = {f"{unit}.{name}": t for unit, module in units.items() for name, t in module.state_dict().items()}
        return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in state.items()}

    before = shas()
    assert {id(p) for group in loaded.groups for _, p in group.parameters} == {id(p) for p in named.values() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in named.values() if p.requires_grad], lr=1.0)
    for epoch in range(2):  # two steps, as the A of a LoRA has no gradient while B is zero
        optimizer.zero_grad(set_to_none=True)
        for micro in source.load(epoch, 0):
            losses = plan.kind.load(plan.stage)(loaded.models, micro)
            backward(losses, {name: 1 / count for name, count in micro.counts.items()})
        optimizer.step()
    assert {name for name, p in named.items() if p.grad is not None} == wanted_names(plan.stage.name)
    changed = {name for name, sha in shas().items() if sha != before[name]}
    assert changed <= wanted_names(plan.stage.name)
    groups = {"reasoning": {"mllm_lora"}, "editing": {"dit_lora", "connector"}}
    assert {group.name for group in loaded.groups} == groups.get(plan.stage.name, {"mllm_lora", "dit_lora", "connector"})
    for group in loaded.groups:  # something of every set has moved
        assert {id(p) for _, p in group.parameters} & {id(named[name]) for name in changed}


def test_the_flow_loss_alone_reaches_the_mllm_through_the_connector(done):
    config = read_snapshot(done)
    plan = plan_stages(config)[2]
    base = Base(config)
    material = open_material(config, base)
    carried = starting_point(config, plan)
    loaded = load_stage(base, plan, carried)
    cache = open_cache(material, plan, carried.get(MLLM))
    source = plan.kind.make_source(material, plan, make_documents(material, base.shell()), cache)
    for micro in source.load(0, 0):
        losses = plan.kind.load(plan.stage)(loaded.models, micro)
        backward(losses, {"fm": 1.0, "ntp": 0.0})
    lora = {name: p.grad for name, p in loaded.modules[MLLM].named_parameters() if p.requires_grad}
    assert lora and all(float(grad.abs().sum()) > 0 for grad in lora.values())


def test_words_in_quotes_are_trained_on_and_measured(done):
    """Step1X-Edit v1.2 maps quoted characters into the DiT; their embeddings are the MLLM's, which documents do not hold."""
    from reasonedit.training.seeing import Seen, measure

    config = read_snapshot(done)
    plan = plan_stages(config)[2]
    base = Base(config)
    material = open_material(config, base)
    edits, words = [r for r in material.records if r.kind == "edit"], Edit(instruction_used='Write "go" on it.')
    said = [record.model_copy(update={"edit": words}) for record in edits]
    material = replace(material, records=tuple(said))
    plan = replace(plan, stage=plan.stage.model_copy(update={"mixture": Mixture(kinds={"edit": 1.0})}))
    carried = starting_point(config, plan)
    loaded = load_stage(base, plan, carried)
    cache = open_cache(material, plan, carried.get(MLLM))
    documents = make_documents(material, base.shell())
    source = plan.kind.make_source(material, plan, documents, cache)
    (micro,) = source.load(0, 0)
    assert micro.image.quoted is not None and micro.image.quoted_embeds is None
    backward(plan.kind.load(plan.stage)(loaded.models, micro), {"fm": 1.0})
    assert float(loaded.modules[DIT].text_token_mapping.weight.grad.abs().sum()) > 0
    seen = Seen(material, plan, loaded, documents, cache, open_ranks(runs.parallel_settings(config)))
    with torch.no_grad():
        assert measure(seen)["loss"] > 0


# ---- interrupted and resumed


def stop_at(stage: str, step: int):
    """make_hooks with one more hook, which asks that stage to save and stop at its step."""
    plain = runs.make_hooks

    def make(seen):
        from reasonedit.training.loop import Hook

        def ask(moment):
            if seen.plan.stage.name == stage and moment.step == step:
                (moment.run_dir / "save_quit").touch()

        return [*plain(seen), Hook("stop", ask, every=1)]

    return make


@pytest.mark.parametrize(("stage", "step"), [("editing", 1), pytest.param("unified", 1, marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_ends_as_the_one_that_was_not(done, tmp_path, monkeypatch, stage, step):
    out = tmp_path / "stopped"
    monkeypatch.setattr(runs, "make_hooks", stop_at(stage, step))
    assert run(tiny(out), source="tiny_cpu", quiet=True) == EXIT_STOPPED
    assert not (out / "tiny_dit.safetensors").exists()
    monkeypatch.undo()
    moved = tmp_path / "moved"
    out.rename(moved)  # nothing in a run folder depends on where it lies
    monkeypatch.chdir(tmp_path)
    assert run(read_snapshot(Path("moved")), quiet=True, resume=True) == EXIT_DONE
    for pattern in ("*.safetensors", "*/trained/**/*.safetensors", "*/checkpoints/*/*.safetensors"):
        both = tree(moved, pattern), tree(done, pattern)
        common = both[0].keys() & both[1].keys()
        assert common and {name: both[0][name] for name in common} == {name: both[1][name] for name in common}
    assert tree(moved, "*.safetensors") == tree(done, "*.safetensors")


def test_a_folder_with_a_run_is_not_run_anew_and_a_finished_one_resumes_to_the_same(done):
    with pytest.raises(ConfigError, match=r"found one that has begun \(stage unified\).*resume"):
        run(tiny(done), quiet=True)
    before = tree(done, "*.safetensors")
    assert run(read_snapshot(done), quiet=True, resume=True) == EXIT_DONE
    assert tree(done, "*.safetensors") == before


def test_a_changed_number_is_refused_on_resume_unless_it_is_allowed_by_name(tmp_path, monkeypatch):
    out = tmp_path / "changed"
    monkeypatch.setattr(runs, "make_hooks", stop_at("reasoning", 1))
    assert run(tiny(out), quiet=True) == EXIT_STOPPED
    monkeypatch.undo()
    changed = read_snapshot(out, ["stage.reasoning.train.mllm_lora.lr=5e-3"])
    with pytest.raises(CheckpointError, match=r"stage.train.mllm_lora.lr: 0.01 in the checkpoint, 0.005 now"):
        run(changed, quiet=True, resume=True)
    assert read_snapshot(out).stage[0].train["mllm_lora"].lr == 0.01  # what was refused is not remembered
    plan = plan_stages(changed)[0]
    base = Base(changed)
    ranks = open_ranks(runs.parallel_settings(changed))
    outcome = runs.run_stage(open_material(changed, base), plan, ranks, ("stage.train.mllm_lora.lr",))
    assert outcome.finished and is_done(changed, plan)


# ---- what a stage starts from


def test_a_stage_starts_from_other_runs_part_by_part(done, tmp_path):
    config = read_snapshot(done)
    plans = plan_stages(config)
    one, two = done / plans[0].folder / "trained", done / plans[1].folder
    apart = tiny(tmp_path / "a", f"stage.unified.start=['{one}', '{two}']")
    found = starting_point(apart, plan_stages(apart)[2])
    assert set(found) == {DIT, MLLM}
    whole = tiny(tmp_path / "b", f"stage.unified.start={done}")
    last = {t.part: trained_hash(t) for t in adapters.load(done / plans[2].folder / "trained").trained}
    assert {part: trained_hash(t) for part, t in starting_point(whole, plan_stages(whole)[2]).items()} == last
    wrong = tiny(tmp_path / "c", f"stage.unified.start={done}")
    wrong = wrong.model_copy(update={"model": wrong.model.model_copy(update={"system": "reasonedit-q"})})
    with pytest.raises(ConfigError, match="expected something trained of reasonedit-q"):
        starting_point(wrong, plan_stages(config)[2].__class__(2, wrong.stage[2], STEPS["joint"], ()))
    with pytest.raises((CheckpointError, ConfigError), match="expected"):
        nowhere = tiny(tmp_path / "d", f"stage.unified.start={tmp_path / 'nowhere'}")
        starting_point(nowhere, plan_stages(nowhere)[2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage.unified.train.mllm_lora.rank=4", r"stage.unified.train.mllm_lora.rank: expected 8.*found 4"),
        ("stage.unified.train.dit_lora.include=['proj_out']", "dit_lora.include: expected the 42 modules"),
    ],
)
def test_a_lora_goes_on_as_it_began(done, text, words):
    config = read_snapshot(done, [text])
    plan = plan_stages(config)[2]
    with pytest.raises(ConfigError, match=words):
        load_stage(Base(config), plan, starting_point(config, plan))


def test_all_weights_are_not_trained_beneath_a_lora(done):
    config = read_snapshot(done)
    raw = config.model_dump(mode="json")
    raw["stage"][2]["train"] = {"dit": {"lr": 1e-4}}
    from reasonedit.training.config_file import make_config

    config = make_config(raw, "test")
    plan = plan_stages(config)[2]
    with pytest.raises(ConfigError, match="expected weights without a LoRA beside them.*merged"):
        load_stage(Base(config), plan, starting_point(config, plan))


def test_random_sets_begin_from_drawn_weights_and_go_on_from_trained_ones(done, tmp_path):
    config = tiny(tmp_path / "new", "run.seed=3")
    raw = config.model_dump(mode="json")
    raw["model"]["weights"] = str(done / "checkpoint")
    raw["stage"] = [{**raw["stage"][1], "train": {"dit_base": {"lr": 1e-3}}, "name": n} for n in ("one", "two")]
    from reasonedit.training.config_file import make_config

    config = make_config(raw, "test")
    first, second = plan_stages(config)
    loaded = load_stage(Base(config), first, {})
    drawn = {name: p.detach().clone() for name, p in loaded.modules[DIT].named_parameters()}
    assert all(p.requires_grad for p in loaded.modules[DIT].parameters()) and not drawn["proj_out.weight"].any()
    with torch.no_grad():
        loaded.modules[DIT].proj_out.weight.add_(1.0)
    (trained,) = loaded.trained()
    again = load_stage(Base(config), second, {DIT: trained}).modules[DIT]
    assert torch.equal(again.proj_out.weight, loaded.modules[DIT].proj_out.weight)
    assert torch.equal(again.x_embedder.weight, drawn["x_embedder.weight"])


# ---- the cache knows whose states it keeps


def test_states_are_named_by_the_weights_and_by_what_was_trained_of_them(done, tmp_path):
    config = read_snapshot(done)
    base = Base(config)
    one = adapters.load(done / "1-reasoning" / "trained").trained[0]
    three = next(t for t in adapters.load(done / "3-unified" / "trained").trained if t.part == MLLM)
    hashes = {states_hash(base, tmp_path, trained) for trained in (None, one, three)}
    assert len(hashes) == 3
    low = Base(read_snapshot(done, ["model.mllm_weights=fp8"]))
    assert states_hash(low, tmp_path, one) not in hashes
    assert states_hash(base, tmp_path, one) in hashes


# ---- check


def test_check_finds_nothing_wrong_with_the_recipe_and_says_what_would_happen(done):
    found = check(read_snapshot(done))
    assert found.good, found.text
    for words in ("mllm_lora", "optimizer steps", "together (an estimate)", "nothing stands in the way of a run"):
        assert words in found.text
    assert "dit: not loaded" in found.text and "mllm: not loaded" in found.text
    # the same number of weights as the run itself trained, whatever the order of the sets
    config = read_snapshot(done)
    plan = plan_stages(config)[2]
    loaded = load_stage(Base(config), plan, starting_point(config, plan))
    trained = sum(p.numel() for p in loaded.modules[DIT].parameters() if p.requires_grad)
    assert found.text.count(f"dit: {trained:,} of ") == 2


def test_check_names_every_fault_of_the_data(tmp_path):
    out = tmp_path / "broken"
    config = tiny(out)
    from reasonedit.training.material import draw_missing

    draw_missing(config)
    file = out / "records" / "records.jsonl"
    lines = file.read_text().splitlines()
    first, second, third = (json.loads(line) for line in lines[:3])
    (out / "records" / first["images"]["input"]["path"]).unlink()
    second["kind"] = "reflect"
    third["instrution"] = third.pop("instruction")
    file.write_text("\n".join([lines[0], json.dumps(second), json.dumps(third), *lines[3:]]) + "\n")
    found = check(config)
    assert not found.good and "stand in the way of a run" in found.text
    assert f"{file}:1" in found.text and "missing-picture" in found.text
    assert f"{file}:2" in found.text and "reflect.verdict" in found.text
    assert f"{file}:3" in found.text and "instrution" in found.text
    assert "mllm_lora" in found.text  # what can be said without the data is said all the same


def test_check_looks_at_what_a_stage_shall_start_from(done, tmp_path):
    found = check(tiny(tmp_path / "a", f"stage.unified.start={tmp_path / 'nowhere'}"), pictures=False)
    assert not found.good and "nowhere: expected" in found.text
    config = tiny(tmp_path / "b", f"stage.unified.start={done}", "stage.unified.train.mllm_lora.rank=4")
    assert "mllm_lora.rank: expected 8" in check(config, pictures=False).text


def test_check_calls_documents_that_are_longer_than_a_pack(done):
    found = check(read_snapshot(done, ["stage.reasoning.packs.text=300"]), pictures=False)
    assert not found.good and "more than the 300 of a pack" in found.text


# ---- the seam for another objective


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.frce = torch.nn.Linear(4, 1)


def test_another_objective_brings_a_step_a_preset_models_and_a_source_and_the_engine_runs_it(done, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "STEPS", dict(STEPS))
    monkeypatch.setattr("reasonedit.training.presets.PRESETS", dict(PRESETS))

    class Source:
        fingerprint = "toy"

        def __len__(self):
            return 2

        def load(self, epoch, cursor):
            return [MicroStep(None, None, {"brain": 2.0})]

    toy = Toy()

    def brain_step(models, micro):
        return Losses({"brain": models.dit.frce(torch.ones(2, 4)).square().sum()})

    def load_models(base, plan, carried):
        from reasonedit.training.assemble import Loaded
        from reasonedit.training.types import Models

        names = [one.name for one in plan.of(DIT)]
        assert names == ["frce"]
        group = ParamGroup("frce", tuple(toy.named_parameters()), plan.sets[0].table.lr)
        return Loaded(Models(dit=toy), (group,), {DIT: toy}, None, carried)

    register_preset("frce", Preset(DIT, "full", {"": (r"frce\..+",)}, {}))
    kind = StepKind(brain_step, (DIT,), (DIT,), ("brain",), ("hypothetical",), (), load_models, lambda *a, **k: Source())
    register_step("brain", kind)
    raw = read_snapshot(done).model_dump(mode="json")
    raw["run"]["out"] = str(tmp_path / "brain")
    raw["model"]["weights"], raw["data"]["records"] = str(done / "checkpoint"), [str(done / "records")]
    raw["stage"] = [{"name": "brain", "step": "brain", "steps": 5, "train": {"frce": {"lr": 1e-2}}}]
    raw["export"] = {"formats": []}
    from reasonedit.training.config_file import make_config

    before = toy.frce.weight.detach().clone()
    assert run(make_config(raw, "test"), quiet=True) == EXIT_DONE
    assert not torch.equal(toy.frce.weight, before)
    (trained,) = adapters.load(tmp_path / "brain" / "1-brain" / "trained").trained
    assert set(trained.whole) == {"frce.weight", "frce.bias"}
    with pytest.raises(ConfigError, match="taken"):
        register_step("brain", kind)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage.editing.step=edit", "stage.editing.step: expected one of reasoning, editing, joint, found 'edit'"),
        ("stage.reasoning.step=editing", "stage.reasoning.train.mllm_lora: expected a set of the dit"),
        ("stage.unified.cached.states=true", "stage.unified.cached.states: expected false"),
        ("stage.reasoning.mixture.kinds={t2i = 1}", "can use.*found t2i"),
        ("stage.reasoning.mixture.mandatory=['fm']", "expected losses of the step 'reasoning'"),
        ("stage.editing.start=['previous', 'runs/a']", "expected folders only"),
        ("model.swap_blocks=1", "expected checkpointing"),
    ],
)
def test_tables_that_do_not_go_together_are_named(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        plan_stages(tiny(tmp_path, text))


def test_low_bit_weights_are_trained_by_lora_only(tmp_path):
    with pytest.raises(ConfigError, match=r'model.dit_weights = "full".*found \'fp8\''):
        plan_stages(load_config("reasonedit_s_stage2", ["model.dit_weights=fp8"]))
    assert plan_stages(tiny(tmp_path, "model.dit_weights=fp8"))


def test_the_names_of_losses_are_those_of_the_engine():
    from reasonedit.training import types

    assert (stages.NTP, stages.FM) == (types.NTP, types.FM)
    assert stages.STEPS["editing"].load(load_config("tiny_cpu").stage[1]) is editing_step


# ---- the commands on a run


def test_validate_sample_and_export_of_a_finished_run(done, capsys, tmp_path):
    config = read_snapshot(done, ["stage.unified.samples.steps=2", "stage.unified.samples.records=1"])
    assert runs.validate_run(config, stage="unified") == EXIT_DONE
    said = capsys.readouterr().out
    expected = validations(done / "3-unified")[-1]
    assert f"{expected['loss']:.5f}" in said and f"{expected['ntp']:.5f}" in said
    assert runs.sample_run(config) == EXIT_DONE
    assert (done / "3-unified" / "samples" / "now.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="expected a stage that paints"):
        runs.sample_run(config, stage="reasoning")
    assert runs.export_run(config, formats=("peft",), out=tmp_path) == EXIT_DONE
    assert (tmp_path / "tiny_mllm" / "adapter_config.json").is_file()
    assert runs.export_run(config, formats=("comfyui",), stage="reasoning", out=tmp_path / "one") == EXIT_DONE
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["tiny_mllm.safetensors"]


def test_the_exported_loras_change_the_picture_and_equal_the_merged_weights(done, tmp_path):
    from reasonedit.reasonedit_core.images import load_image
    from reasonedit.reasonedit_core.load import SystemSpec, load_system
    from reasonedit.reasonedit_core.types import EditRequest

    source = load_image(next((done / "records" / "images").glob("*.png"))).rgb

    def edited(weights: Path, *loras: Path) -> torch.Tensor:
        spec = SystemSpec(
            "reasonedit-s", weights, reasoner="none", dtype="float32", device="cpu", loras=tuple((path, 1.0) for path in loras)
        )
        generator = load_system(spec).generator
        request = EditRequest(source, "make it red", seed=1, steps=2, guidance=2.0, size_level=64)
        return generator.edit(request, source, request.instruction, torch.Generator().manual_seed(1)).image

    plain = edited(done / "checkpoint")
    dit, mllm = done / "tiny_dit.safetensors", done / "tiny_mllm.safetensors"
    assert runs.export_run(read_snapshot(done), formats=("merged",), out=tmp_path) == EXIT_DONE
    both = edited(done / "checkpoint", dit, mllm)
    assert float((both - plain).abs().max()) > 4 / 255
    assert float((edited(done / "checkpoint", mllm) - plain).abs().max()) > 0  # the MLLM conditions the picture
    merged = edited(tmp_path / "tiny_merged")
    assert float((merged - both).abs().max()) < 1.5 / 255  # pictures have 8 bits
    assert float((merged - both).abs().mean()) < 0.05 * float((merged - plain).abs().mean())


def test_a_stage_without_held_out_records_says_so(done, tmp_path, caplog):
    out = tmp_path / "alone"
    config = tiny(out, "data.drawn.held_out=0")
    raw = config.model_dump(mode="json")
    raw["stage"] = raw["stage"][:1]
    from reasonedit.training.config_file import make_config

    with caplog.at_level(logging.WARNING):
        assert run(make_config(raw, "test", ["stage.0.steps=1"]), quiet=True) == EXIT_DONE
    assert "no held-out records" in caplog.text
    assert validations(out / "1-reasoning") == []


@pytest.mark.slow
def test_a_stage_is_done_only_when_all_of_it_is_written(done, tmp_path, monkeypatch):
    """Killed while it writes what it has trained, a stage is taken up again at its last checkpoint."""
    out = tmp_path / "killed"
    plain = adapters.save

    def killed(made, folder):
        plain(made, folder)
        (Path(folder) / adapters.FILE_NAME).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(out), quiet=True)
    monkeypatch.undo()
    assert not is_done(read_snapshot(out), plan_stages(read_snapshot(out))[0])
    monkeypatch.setattr(runs, "make_hooks", stop_at("editing", 1))
    assert run(read_snapshot(out), quiet=True, resume=True) == EXIT_STOPPED
    assert tree(out / "1-reasoning" / "trained") == tree(done / "1-reasoning" / "trained")
    assert finish is runs.finish


# ---- from outside


@pytest.mark.slow
def test_the_recipe_from_the_command_line_writes_nothing_outside_its_folder_and_every_stage_learns(tmp_path):
    home, scratch, cwd, out = (tmp_path / name for name in ("home", "scratch", "cwd", "out"))
    for folder in (home, scratch, cwd):
        folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")}
    environment |= {"HOME": str(home), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(home / "cache")}
    command = program("run", "training/recipes/tiny_cpu.toml", "--set", f"run.out={out}")
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [path for folder in (home, scratch, cwd) for path in folder.rglob("*")] == []
    assert len(list(out.glob("*_dit.safetensors"))) == len(list(out.glob("*_mllm.safetensors"))) == 1
    for plan in plan_stages(read_snapshot(out)):
        looks = validations(out / plan.folder)
        assert looks[-1]["loss"] < looks[0]["loss"], plan.stage.name
        assert f"held-out loss               {looks[0]['loss']:>10.5f}" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_run_all_stages_and_agree(tmp_path, parallel):
    out = tmp_path / "two"
    more = "data.drawn.counts={think = 8, reflect = 8, edit = 8, t2i = 8}"
    sets = [f"run.out={out}", *SMALL, f"run.parallel={parallel}", more]
    arguments = [word for one in sets for word in ("--set", one)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script(tmp_path)), "run", "tiny_cpu", *arguments]
    ran = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert {path.name for path in out.glob("*.safetensors")} == {"tiny_dit.safetensors", "tiny_mllm.safetensors"}
    assert all(is_done(read_snapshot(out), plan) for plan in plan_stages(read_snapshot(out)))
