"""ReasonBrain in the training engine: both losses, freeze sets, kept features, resume to the bit, exports, drops."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reasonedit.reasonedit_core.brain.generator import sd_schedule
from reasonedit.reasonedit_core.brain.layout import find_brain_parts
from reasonedit.reasonedit_core.brain.model import load_brain_model
from reasonedit.reasonedit_core.conditioners.brain_weights import trained_tensors
from reasonedit.reasonedit_core.denoisers.unet import widen_unet
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.mllm.focus import Focus
from reasonedit.reasonedit_core.models.reasonbrain.losses import noised
from reasonedit.reasonedit_core.weightfiles import read_metadata
from reasonedit.tests.brains import write_llava, write_system
from reasonedit.tests.launch import script
from reasonedit.tests.test_reasonbrain_denoisers import tiny_unet
from reasonedit.training import commands
from reasonedit.training.brain.assemble import load_stage
from reasonedit.training.brain.export import export, ldm_names, merge_denoiser
from reasonedit.training.brain.room import documents_of, export_stage, filled_cache, starting_point
from reasonedit.training.brain.source import drops, make_source
from reasonedit.training.brain.unit import BrainModels, BrainUnit, reasonbrain_step
from reasonedit.training.check import check
from reasonedit.training.config import BrainStage
from reasonedit.training.config_file import decisive, load_config, read_snapshot
from reasonedit.training.losses import backward
from reasonedit.training.material import draw_missing, open_material
from reasonedit.training.models import open_base
from reasonedit.training.run import run, validate_run, validations
from reasonedit.training.signals import EXIT_STOPPED
from reasonedit.training.stages import STEPS, plan_stages

SMALL = ("data.drawn.counts={hypothetical = 6}", "stage.0.brain.batch=2", "run.threads=1", "stage.0.save_every=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Parts, records and cache that all tests share."""
    out = tmp_path_factory.mktemp("brain")
    config = recipe(out)
    draw_missing(config)
    return out


def recipe(out: Path, *sets: str, shared: Path | None = None):
    own = (f"run.out={out}", *SMALL, *sets)
    if shared is not None:
        places = {"model.weights": "parts", "data.cache": "cache"}
        own += tuple(f"{key}={shared / name}" for key, name in places.items())
        own += (f'data.records=["{shared / "records"}"]',)
    return load_config("tiny_brain_cpu", own)


class Room:
    """One stage with its models and one batch of fixed t and noise, nothing dropped."""

    def __init__(self, out: Path, *sets: str, fill: bool = True):
        self.config = recipe(out, *sets)
        draw_missing(self.config)
        self.plan = plan_stages(self.config)[0]
        self.base = open_base(self.config)
        self.material = open_material(self.config, self.base)
        if fill:
            filled_cache(self.material, self.plan, {})
        self.source = make_source(self.material, self.plan, documents_of(self.material), None)
        self.loaded = load_stage(self.base, self.plan, {})
        self.batch = self.source.validation(self.source.batches(0)[0], 0.6)

    def optimizer(self, kind=torch.optim.AdamW, **how):
        return kind([p for group in self.loaded.groups for _, p in group.parameters], **how)

    def step(self, weights) -> dict[str, float]:
        losses = reasonbrain_step(self.loaded.models, self.batch)
        backward(losses, {name: weights[name] / self.batch.counts[name] for name in losses.sums})
        return {name: float(total.detach()) / self.batch.counts[name] for name, total in losses.sums.items()}


# ---- the two losses


def test_thirty_steps_on_one_batch_lower_both_losses(place):
    room = Room(place)
    optimizer = room.optimizer(lr=5e-3)
    seen = []
    for _ in range(31):
        optimizer.zero_grad()
        seen.append(room.step(room.plan.weights))
        optimizer.step()
    assert room.plan.weights == {"mllm": 1.0, "dm": 1.0}
    assert seen[30]["mllm"] < seen[0]["mllm"] / 2, (seen[0], seen[30])
    assert seen[30]["dm"] < 0.8 * seen[0]["dm"], (seen[0], seen[30])


def test_the_denoising_loss_alone_moves_every_part_from_the_first_step(place):
    room = Room(place, "stage.0.brain.mllm=0", "stage.0.train.llava_lora.dropout=0")
    optimizer = room.optimizer(torch.optim.SGD, lr=0.1)
    named = {name: p for group in room.loaded.groups for name, p in group.parameters}
    start = {name: p.detach().clone() for name, p in named.items()}

    def reached(part: str) -> bool:
        mine = [p.grad for name, p in named.items() if part in name]
        assert mine, part
        return any(grad is not None and bool(grad.any()) for grad in mine)

    room.step(room.plan.weights)
    # A is behind B, and CA4, CA5 are behind the projection: both are zero in the beginning, so they follow after one step.
    first = ("lora_B", "trainable_tokens", "brain.frce.visual", "brain.frce.textual", "assembler", "qformer", "projector")
    for part in (*first, "cme.visual.latent", "cme.textual.latent", "cme.visual.ca1", "cme.textual.ca1"):
        assert reached(part), part
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        room.step(room.plan.weights)
    for part in ("lora_A", "cme.visual.ca4", "cme.visual.ca5", "cme.textual.ca4", "cme.textual.ca5"):
        assert reached(part), part
    optimizer.step()
    for part in (*first, "lora_A", "cme.visual", "cme.textual"):
        assert any(not torch.equal(p, start[name]) for name, p in named.items() if part in name), part


# ---- what is trained


def test_a_stage_frees_what_its_sets_name_and_nothing_else(place):
    room = Room(place, "stage.0.train={brain = {lr = 1e-3}, denoiser_first = {lr = 1e-3}}")
    free = {name for name, p in room.loaded.models.brain.named_parameters() if p.requires_grad}
    assert {name for name in free if not name.startswith("brain.")} == {"denoiser.conv_in.weight", "denoiser.conv_in.bias"}
    assert {f"brain.{name}" for name, _ in room.loaded.model.brain.named_parameters()} <= free


def test_faulty_sets_are_sentences(place):
    with pytest.raises(ConfigError, match="denoiser_first, as .* does not see the source"):
        Room(place, "stage.0.train={brain = {lr = 1e-3}}")
    with pytest.raises(ConfigError, match="expected every weight in one set, found down_blocks.* in denoiser and denoiser_att"):
        Room(place, "stage.0.train.denoiser_attention.lr=1e-3")
    with pytest.raises(ConfigError, match="found 'editing'"):
        plan_stages(recipe(place, "stage.0.step=editing"))
    with pytest.raises(ConfigError, match="fields out of .*, found wide"):
        open_base(recipe(place, "model.brain.spec={wide = 3}"))
    with pytest.raises(ConfigError, match="drop_both"):
        recipe(place, "stage.0.brain.drop_both=0.3")
    with pytest.raises(ConfigError, match="expected one of reasoning, editing, joint, found .* Choose a step of reasonedit-s"):
        plan_stages(load_config("tiny_cpu", ["stage.0.step=reasonbrain", "stage.0.mixture.kinds={}"]))


def test_runs_of_the_other_systems_do_not_know_the_new_tables():
    config = load_config("tiny_cpu", [])
    assert not [key for key in decisive(config, config.stage[0]) if "brain" in key]
    assert STEPS["joint"].own(run) is run


def test_check_cache_and_plan_know_the_recipe(place, capsys):
    report = check(recipe(place))
    assert report.good and "llava_lora" in report.text and "batches of 2" in report.text, report.text
    assert commands.cache(recipe(place)) == 0 and commands.plan(recipe(place), 1) == 0
    assert "steps an epoch" in capsys.readouterr().out
    faulty = check(recipe(place, "stage.0.train={brain = {lr = 1e-3}}"))
    assert not faulty.good and "denoiser_first" in faulty.text


# ---- batches


def test_kept_features_are_what_the_chain_sees(place):
    room = Room(place)
    kept = reasonbrain_step(room.loaded.models, room.batch).sums
    live_room = Room(place, "stage.0.brain.features=false")
    assert live_room.batch.features is None
    live = reasonbrain_step(BrainModels(brain=live_room.loaded.models.brain), live_room.batch).sums
    for name in kept:
        assert kept[name].item() == pytest.approx(live[name].item(), rel=1e-4), name


def test_an_epoch_holds_every_record_and_its_draws_follow_from_counters(place):
    room = Room(place)
    source = room.source
    names = [record.id for batch in source.batches(0) for record, _ in batch]
    assert set(names) == {record.id for record in source.records} and len(source) == len(source.batches(0))
    assert source.batches(0) != source.batches(1) and len(source.batches(0)) == len(source.batches(1))
    one, two = (source.load(1, 0)[0] for _ in range(2))
    assert torch.equal(one.noise, two.noise) and torch.equal(one.t, two.t) and torch.equal(one.clean, two.clean)
    other = source.load(2, 0)[0]
    assert not torch.equal(one.t, other.t)
    halves = [make_source(room.material, room.plan, documents_of(room.material), None, world=2, rank=n) for n in range(2)]
    shared = [record for half in halves for record in half.load(0, 0)[0].records]
    assert shared == [record.id for batch in source.batches(0)[:2] for record, _ in batch]


def test_conditions_are_dropped_in_the_stated_shares():
    u = torch.arange(0.0005, 1, 0.001).tolist()
    text, image = drops(u, BrainStage())
    assert (text.sum().item(), image.sum().item(), (text & image).sum().item()) == (100, 100, 50)
    none = drops(u, BrainStage(drop_text=0, drop_image=0, drop_both=0))
    assert not none[0].any() and not none[1].any()


# ---- runs


def test_a_run_that_was_killed_goes_on_to_the_same_bits(place, tmp_path):
    sets = ("stage.0.steps=4", "stage.0.save_every=2", "stage.0.validation.records=2", "export.formats=[]")
    sets += ("stage.0.samples={every = 4, steps = 1, records = 1}",)
    whole = recipe(tmp_path / "whole", *sets, shared=place)
    assert run(whole, quiet=True) == 0
    cut = recipe(tmp_path / "cut", *sets, shared=place)
    cut.out.mkdir()
    real = torch.optim.AdamW.step
    calls = []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(cut, quiet=True)
    assert run(cut, quiet=True, resume=True) == 0 != EXIT_STOPPED
    for name in ("brain.safetensors", "lora/adapter_model.safetensors"):
        one, two = (load_file(config.out / "1-reason" / "trained" / name) for config in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    looks = validations(whole.out / "1-reason")
    assert len(looks) == 2 and looks[-1]["loss"] == pytest.approx(looks[-1]["mllm"] + looks[-1]["dm"])
    assert [path.name for path in (whole.out / "1-reason" / "samples").iterdir()] == ["step-00000004.png"]
    assert validate_run(read_snapshot(whole.out)) == 0  # of the finished stage, put back from its folder
    check_exports(whole)


def check_exports(config):
    """The trained folder as a whole system, and as an 8-channel UNet under the original names."""
    plan = plan_stages(config)[0]
    trained = config.out / "1-reason" / "trained"
    before = load_brain_model(find_brain_parts(trained))
    (merged,) = export_stage(config, plan, "merged", config.out).files
    (peft,) = export_stage(config, plan, "peft", config.out).files
    for folder in (merged, peft):
        after = load_brain_model(find_brain_parts(folder))
        own, theirs = ({**trained_tensors(m.brain, m.llava, None), **m.llava.trainable()} for m in (before, after))
        assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
        unets = [m.network.state_dict() for m in (before, after)]
        assert all(torch.equal(unets[0][key], unets[1][key]) for key in unets[0])
    assert not json.loads((merged / "reasonbrain.json").read_text()).get("parts")
    exported = export_stage(config, plan, "comfyui", config.out)
    assert "does not know it" in exported.notes[0]  # of SD 1.5's kind, not of its widths
    check_names(load_file(exported.files[0]), before.network)
    with pytest.raises(ConfigError, match="format: expected one of"):
        export(trained, "zip", config.out, "x")
    with pytest.raises(ConfigError, match="expected no brain.safetensors"):
        export_stage(config, plan, "merged", config.out)


def check_names(state, unet):
    """diffusers' own reader of such files gives back the UNet's tensors."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    assert state["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 8
    back = convert_ldm_unet_checkpoint(dict(state), config=dict(unet.config))
    own = unet.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)


def test_names_of_a_unet_of_sd_depth_are_the_original_ones():
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=8, block_out_channels=(8, 16, 16, 16), down_block_types=down, up_block_types=up, norm_num_groups=4,
            attention_head_dim=4, cross_attention_dim=8,
        )  # fmt: skip
    own = unet.state_dict()
    back = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{key}": value for key, value in ldm_names(own, 2).items()}, config=dict(unet.config)
    )
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in own.items()}
    with pytest.raises(ConfigError, match="Stable Diffusion 1.x"):
        ldm_names({"add_embedding.linear_1.weight": torch.zeros(1)}, 2)


def test_a_second_stage_goes_on_and_loras_of_the_unet_are_kept_and_merged(place, tmp_path):
    sets = ("stage.0.steps=2", "stage.0.validation.records=0", "export.formats=[]", "stage.0.brain.mllm=0.5")
    sets += ("stage.0.train.denoiser_lora={lr = 1e-2, rank = 2}",)
    first = recipe(tmp_path / "first", *sets, shared=place)
    raw = first.model_dump(mode="json")
    del raw["stage"][0]["train"]["denoiser"]
    first = type(first).model_validate(raw)
    assert run(first, quiet=True) == 0
    raw["run"]["out"] = str(tmp_path / "second")
    raw["stage"][0] |= {"name": "align", "step": "reasonbrain_align", "start": [str(first.out)]}
    raw["stage"][0]["train"] = {"qformer": {"lr": 1e-3}}
    second = type(first).model_validate(raw)
    assert run(second, quiet=True) == 0
    one, two = (load_file(out / name / "trained" / "brain.safetensors") for out, name in
                ((first.out, "1-reason"), (second.out, "1-align")))  # fmt: skip
    assert one.keys() == two.keys() and any("lora_A" in key for key in one)
    changed = {key.split(".")[1] for key in one if not torch.equal(one[key], two[key])}
    assert changed == {"qformer"}
    model = load_brain_model(find_brain_parts(second.out / "1-align" / "trained"))
    latents, t, context = torch.randn(1, 8, 8, 8), torch.tensor([5]), torch.randn(1, 7, 24)
    before = model.network(latents, t, context).sample
    merge_denoiser(model.network)
    assert not any("lora" in name for name in model.network.state_dict())
    torch.testing.assert_close(model.network(latents, t, context).sample, before, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="expected brain.safetensors"):
        starting_point(replaced(second, start=[str(place)]), plan_stages(replaced(second, start=[str(place)]))[0])


def replaced(config, **changes):
    raw = config.model_dump(mode="json")
    raw["stage"][0] |= changes
    return type(config).model_validate(raw)


FLUX = ("model.drawn.system=flux", "model.brain.preset=flux", "data.drawn.counts={hypothetical = 4}")
FLUX += ("stage.0.brain.drop_text=0", "stage.0.brain.drop_both=0", "stage.0.train.llava_lora.dropout=0")
WIDER = "model.drawn.config={transformer = {joint_attention_dim = 40}}"
"""As FLUX.1-dev is: its context (4096) is not of the width of CLIP's states (768)."""


def test_flux_trains_by_velocity_at_a_context_wider_than_clip(tmp_path):
    room = Room(tmp_path, *FLUX, WIDER)
    assert room.loaded.model.brain.spec.context == 40 != room.loaded.model.brain.spec.text
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        seeing = room.loaded.model.network.x_embedder.weight
        seeing.add_(0.1 * torch.randn(seeing.shape, generator=rng))  # its weights for the source were zero
    blind = replace(room.batch, no_image=torch.tensor([True, False]))
    rows = [room.loaded.models.brain(batch, ("dm",))["dm"].detach() for batch in (room.batch, blind)]
    assert rows[0].isfinite().all() and rows[0][0] != rows[1][0] and rows[0][1] == rows[1][1]
    losses = room.step(room.plan.weights)
    assert room.loaded.models.brain.kind == "flux" and room.batch.pooled.shape == (2, 24)
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    grads = {group.name: any(p.grad is not None and p.grad.any() for _, p in group.parameters) for group in room.loaded.groups}
    assert all(grads.values()), grads
    with pytest.raises(ConfigError, match="brain.drop_text: expected 0 with FLUX"):
        load_stage(room.base, plan_stages(replaced(room.config, brain={"batch": 2}))[0], {})
    with pytest.raises(ConfigError, match="without a null context"):
        room.loaded.models.brain(replace(room.batch, no_text=torch.tensor([True, False])), ("dm",))


def test_the_recipe_of_flux_leaves_out_the_picture_alone():
    table = load_config("reasonbrain_flux", []).stage[0].brain
    assert table.drop_text == table.drop_both == 0 < table.drop_image


# ---- the noise schedule


def test_training_takes_the_schedule_that_sampling_takes_from_a_folder_that_states_a_part_of_it():
    part = SimpleNamespace(model=nn.Linear(1, 1))
    for scheduler in ({}, {"prediction_type": "v_prediction"}, {"beta_end": 0.02, "num_train_timesteps": 500}):
        model = SimpleNamespace(
            brain=part.model, llava=part, network=widen_unet(tiny_unet()), conditioner=None, codec=None, kind="sd",
            scheduler=scheduler,
        )  # fmt: skip
        unit, sampled = BrainUnit(model), sd_schedule(scheduler)
        assert torch.equal(unit.alphas, sampled.alphas_cumprod) and unit.target == sampled.config.prediction_type
        assert unit.predictor.timesteps == len(sampled.alphas_cumprod) == scheduler.get("num_train_timesteps", 1000)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    assert torch.allclose(sd_schedule({}).alphas_cumprod, (1 - betas).cumprod(0), atol=1e-6), "SD's, not those of DDPM"


def test_v_prediction_is_that_of_diffusers():
    rng = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 8, 8, generator=rng) for _ in range(2))
    steps = torch.tensor([0, 420, 999])
    scheduler = sd_schedule({"prediction_type": "v_prediction"})
    latents, target = noised(clean, noise, scheduler.alphas_cumprod, steps, "v_prediction")
    assert torch.allclose(latents, scheduler.add_noise(clean, noise, steps), atol=1e-5)
    assert torch.allclose(target, scheduler.get_velocity(clean, noise, steps), atol=1e-5)
    assert not torch.allclose(target, noise, atol=0.1)
    # The way back, by which DDIM reads a prediction: x_0 = sqrt(a) z - sqrt(1 - a) v.
    signal = scheduler.alphas_cumprod[steps].sqrt().view(-1, 1, 1, 1)
    assert torch.allclose(signal * latents - (1 - signal**2).sqrt() * target, clean, atol=1e-4)


def test_an_export_says_how_comfyui_runs_a_unet_that_predicts_v(tmp_path):
    folder = write_system(tmp_path / "system")
    file = folder / "scheduler" / "scheduler_config.json"
    assert "predicts v" not in export(folder, "comfyui", tmp_path / "a", "x").notes[0]
    stated = {**json.loads(file.read_text()), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(stated))
    (note,) = export(folder, "comfyui", tmp_path / "b", "x").notes
    assert "ModelSamplingDiscrete (sampling v_prediction, zsnr on)" in note


# ---- what a training starts from


def test_a_qformer_starts_from_a_blip2_that_the_recipe_names(place, tmp_path):
    plain = open_base(recipe(place))
    donor = {
        f"qformer.{key}": torch.full_like(value, 0.25) for key, value in plain.model().brain.qformer.model.state_dict().items()
    }
    for key in donor:
        if "crossattention" in key and donor[key].shape[-1] == 48:
            donor[key] = torch.zeros(24, 1408)  # of the width of BLIP-2's vision tower
    (tmp_path / "blip2").mkdir()
    save_file(donor, tmp_path / "blip2" / "model.safetensors")
    for off in ("", "model.brain.switches={region_branch = false}"):
        base = open_base(recipe(place, f"model.brain.blip2={tmp_path / 'blip2'}", *([off] if off else [])))
        state = base.model().brain.qformer.model.state_dict()
        fits = [key for key in state if donor[f"qformer.{key}"].shape == state[key].shape]
        assert all(state[key].eq(0.25).all() for key in fits) and len(state) > len(fits) > len(state) / 2
        drawn = plain.model().brain.qformer.model.state_dict()
        assert all(torch.equal(state[key], drawn[key]) for key in state if key not in fits)
    assert open_base(recipe(place, f"model.brain.blip2={tmp_path / 'blip2'}")).identity != plain.identity
    save_file({"qformer.layernorm.weight": torch.zeros(7)}, tmp_path / "blip2" / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a QFormer of width 24, found none of whose 1 tensors fits"):
        base = open_base(recipe(place, f"model.brain.blip2={tmp_path / 'blip2'}"))
        base.model()


def test_a_checkpoint_knows_the_parts_and_the_tokens_it_was_trained_with(tmp_path, caplog):
    folder = write_system(tmp_path / "system")
    load_brain_model(find_brain_parts(folder))
    assert not caplog.records
    write_llava(tmp_path / "other", seed=1)
    shutil.copy2(tmp_path / "other" / "model.safetensors", folder / "llava")
    load_brain_model(find_brain_parts(folder))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "expected the parts it was trained around, found other weights: llava (" in line and "denoiser" not in line
    file = folder / "brain.safetensors"
    state, note = load_file(file), json.loads(read_metadata(file)["reasonbrain"])
    assert note["img_tokens"][0] == "[IMG_1]" and len(note["around"]["denoiser"]) == 32
    note["img_tokens"] = [name.replace("IMG", "img") for name in note["img_tokens"]]
    save_file(state, file, metadata={"format": "pt", "reasonbrain": json.dumps(note)})
    with pytest.raises(CheckpointError, match="to .IMG_32.., found rows trained for 32, .img_1."):
        load_brain_model(find_brain_parts(folder))


def test_options_of_the_recipe_reach_llava(place):
    room = Room(place, "stage.0.brain.tame_gamma=0.8")
    losses = room.step(room.plan.weights)
    assert room.loaded.model.llava.focus == Focus(tame_gamma=0.8) and all(map(math.isfinite, losses.values()))
    assert Room(place).loaded.model.llava.focus == Focus()
    with pytest.raises(ConfigError, match="expected a LLaVA of more than 2 layers, found 2"):
        Room(place, "stage.0.brain.token_select=0.5")


# ---- several processes


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(place, tmp_path, parallel):
    """The same batches, two a step: on one rank one after the other, on two ranks one each. Plain gradient descent, since Adam
    would make whole steps of the rounding of gradients that are zero."""
    rates = {"brain": 0.2, "projector": 0.2, "denoiser_first": 0.2, "denoiser": 0.05, "llava_lora": 0.5}
    sets = ["stage.0.steps=3", "stage.0.validation.records=2", "stage.0.samples.every=0", "export.formats=[]"]
    sets += [f"stage.0.train.{name}.lr={rate}" for name, rate in rates.items()]
    sets += ["stage.0.optim.name=torch.optim.SGD", "stage.0.optim.warmup=0", "stage.0.train.llava_lora.dropout=0"]
    # A gradient of another scale must show, so none is clipped.
    sets += ["stage.0.optim.clip=0", "stage.0.log_every=1", "stage.0.checkpointing=true", f"run.parallel={parallel}"]
    one = recipe(tmp_path / "one", *sets, "stage.0.packs.accumulation=2", shared=place)
    assert run(one, quiet=True) == 0
    two = recipe(tmp_path / "two", *sets, shared=place)
    words = [*(f"run.out={two.out}", *SMALL, *sets), f"model.weights={place / 'parts'}", f"data.cache={place / 'cache'}"]
    words += [f'data.records=["{place / "records"}"]']
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script(tmp_path))]
    command += ["run", "tiny_brain_cpu", *(word for one_set in words for word in ("--set", one_set))]
    ran = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    start = trained_tensors_of(open_base(one).model())
    for name in ("brain.safetensors", "lora/adapter_model.safetensors"):
        alone, both = (load_file(config.out / "1-reason" / "trained" / name) for config in (one, two))
        assert alone.keys() == both.keys()
        apart = sum(float((alone[key] - both[key]).square().sum()) for key in alone)
        moved = sum(float((alone[key] - start[key]).square().sum()) for key in alone if key in start)
        assert apart < 1e-6 * moved if name.startswith("brain") else apart < 1e-8, (name, apart, moved)
    looks = [validations(config.out / "1-reason") for config in (one, two)]
    assert [look["loss"] for look in looks[0]] == pytest.approx([look["loss"] for look in looks[1]], rel=1e-3)
    assert load_brain_model(find_brain_parts(two.out / "1-reason" / "trained")).report["brain"] > 40


def trained_tensors_of(model):
    tensors = trained_tensors(model.brain, model.llava, model.network)
    return {**tensors, **{f"denoiser.{name}": p for name, p in model.network.named_parameters()}}
