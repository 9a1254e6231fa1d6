"""The folder of a ReasonBrain, its strict loader, and edits from end to end, on tiny checkpoints in the released layouts."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core.brain.layout import find_brain_parts, write_brain_settings
from reasonedit.reasonedit_core.brain.model import load_brain_model, new_brain_model, save_brain_model
from reasonedit.reasonedit_core.cli import main
from reasonedit.reasonedit_core.conditioners.brain_weights import add_denoiser_lora, trained_tensors
from reasonedit.reasonedit_core.denoisers.three_pass import Scales, sample
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.loop import POLICIES, think_edit_reflect
from reasonedit.reasonedit_core.segmenters.regions import GivenRegions
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.tests.brains import TINY, tiny_brain
from reasonedit.tests.tiny import tiny_reasonbrain

SPEC = SystemSpec("reasonbrain", reasoner="none", device="cpu")


@pytest.fixture(scope="module")
def system():
    return load_system(replace(SPEC, weights=tiny_reasonbrain()))


def picture(seed: int = 0) -> torch.Tensor:
    return (torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


def request(system, **values) -> EditRequest:
    defaults = {name: system.defaults[name] for name in ("steps", "guidance", "size_level")}
    return EditRequest(picture(), "what if it snowed?", **{**defaults, "think": False, "reflect": False, **values})


def edit(system, **values) -> torch.Tensor:
    asked = request(system, **values)
    return system.generator.edit(asked, asked.image, asked.instruction, torch.Generator().manual_seed(asked.seed)).generated


def copied(tmp_path: Path, **settings) -> Path:
    """The tiny system without copies: links to its parts, and settings of one's own."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_reasonbrain().iterdir():
        (folder / path.name).symlink_to(path)
    if settings:
        (folder / "reasonbrain.json").unlink()
        (folder / "reasonbrain.json").write_text(json.dumps({"segmenter": "grid", **settings}))
    return folder


def test_an_edit_is_its_parts_put_together(system):
    """The generator against conditioner, codec and three-pass sampler called one by one."""
    from diffusers import DDIMScheduler

    asked, generator = request(system, seed=3), system.generator
    got = generator.edit(asked, asked.image, asked.instruction, torch.Generator().manual_seed(3))
    assert got.generated.shape == (1, 3, 48, 64) and got.image.shape == asked.image.shape and got.latents.shape == (1, 48, 4)
    conditioner, vae = generator.conditioner, generator.codec.vae
    cond = conditioner.condition(asked.image, asked.instruction)
    assert [part.shape for part in cond.residual] == [(1, 32, 4, 4), (1, 32)] and all(p.any() for p in cond.residual)
    pixels = generator.geometry.to_vae(asked.image, (64, 48)) * 2 - 1
    with torch.no_grad():
        source = vae.encode(pixels).latent_dist.mode()
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(3))
        latents = sample(
            generator.sampler.denoiser,
            DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            noise,
            replace(cond, reference=source),
            conditioner.text.null(),
            steps=2,
            scales=Scales(7.5, 1.5),
        )
        decoded = vae.decode(latents / 0.18215).sample
    assert torch.allclose(got.latents, latents.flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(got.generated, ((decoded / 2 + 0.5).clamp(0, 1) * 255).round() / 255, atol=1.01 / 255)


def test_every_condition_reaches_the_picture(system):
    plain = edit(system)
    assert torch.equal(plain, edit(system))
    changes = ({"seed": 1}, {"guidance": 3.0}, {"image_guidance": 3.0}, {"negative": "snow"}, {"steps": 3})
    for change in changes:
        assert not torch.equal(plain, edit(system, **change)), change
    cond = system.generator.conditioner
    base = cond.condition(picture(), "snow").tokens
    assert not torch.equal(base, cond.condition(picture(1), "snow").tokens)
    assert not torch.equal(base, cond.condition(picture(), "rain").tokens)


def test_a_chained_round_takes_the_latents_and_not_the_vae(system):
    generator, counts = system.generator, system.counts
    asked = request(system)
    first = generator.edit(asked, asked.image, "snow", torch.Generator().manual_seed(0))
    before = counts.vae_encodes
    second = generator.edit(asked, first.generated, "more", torch.Generator().manual_seed(1), latents=first.latents)
    assert counts.vae_encodes == before and second.generated.shape == first.generated.shape
    with pytest.raises(ConfigError, match="expected 6 x 8 = 48 latent tokens for this picture, found 47"):
        generator.edit(asked, first.generated, "more", torch.Generator(), latents=first.latents[:, 1:])


def test_the_loop_takes_it_for_any_generator(system):
    steps = []
    trace = think_edit_reflect(
        request(system), reasoner=None, generator=system.generator, policy=POLICIES["reasonedit"],
        on_step=lambda n, count, latents: steps.append((n, count, tuple(latents.shape))),
    )  # fmt: skip
    assert trace.stop_reason == "one_edit" and steps == [(1, 2, (1, 48, 4)), (2, 2, (1, 48, 4))]


def test_flux_edits_too():
    system = load_system(replace(SPEC, weights=tiny_reasonbrain("flux")))
    assert not torch.equal(edit(system, guidance=2.0), edit(system, guidance=5.0)), "the distilled guidance"
    first = system.generator.edit(request(system), picture(), "snow", torch.Generator().manual_seed(0))
    assert first.latents.shape == (1, 12, 16) and first.image.shape == (1, 3, 37, 53)
    cond = system.generator.conditioner.condition(picture(), "snow")
    text = system.generator.conditioner.text
    ids = text.tokenizer(["snow"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.allclose(cond.pooled, text.model(input_ids=ids).pooler_output, atol=1e-5)
    with pytest.raises(ConfigError, match="negative: expected none with FLUX"):
        edit(system, negative="rain")


def test_what_it_has_no_place_for_is_a_sentence(system):
    from reasonedit.reasonedit_core.regions import Region

    with pytest.raises(ConfigError, match="found region. Leave it out"):
        edit(system, region=Region())
    with pytest.raises(ConfigError, match="found references"):
        edit(system, references=(picture(),))
    for name, value in (("variant", "v1.1"), ("weights_dtype", "fp8"), ("batched_cfg", True)):
        with pytest.raises(ConfigError, match=f"without {name}"):
            load_system(replace(SPEC, weights=tiny_reasonbrain(), **{name: value}))
    with pytest.raises(ConfigError, match="nothing is released"):
        load_system(replace(SPEC, weights=tiny_reasonbrain(), policy="released"))


def test_a_round_trip_restores_all_that_was_trained(tmp_path):
    parts = find_brain_parts(tiny_reasonbrain())
    model = load_brain_model(parts)
    tensors = trained_tensors(model.brain, model.llava, None)
    first = model.network.conv_in.requires_grad_(True)
    assert model.report["lora"] == len(model.llava.trainable()) == 18 and model.report["denoiser"] == 2
    assert model.report["brain"] + model.report["ia"] == len(tensors)
    with torch.no_grad():
        for p in (*tensors.values(), *model.llava.trainable().values(), *first.parameters()):
            p.add_(0.1)
    save_brain_model(tmp_path / "new", model, parts)
    assert sorted(os.listdir(tmp_path / "new")) == ["brain.safetensors", "lora", "reasonbrain.json"]
    assert json.loads((tmp_path / "new/reasonbrain.json").read_text())["segmenter"] == "grid", "settings stay"
    again = load_brain_model(find_brain_parts(tmp_path / "new"))
    theirs = trained_tensors(again.brain, again.llava, None)
    assert all(torch.equal(p, theirs[key]) for key, p in tensors.items())
    assert all(torch.equal(p, again.llava.trainable()[n]) for n, p in model.llava.trainable().items())
    assert torch.equal(again.network.conv_in.weight, first.weight) and torch.equal(again.network.conv_in.bias, first.bias)
    assert not any(p.requires_grad for p in again.network.parameters()) and not again.brain.training


def test_a_lora_of_the_denoiser_comes_back(tmp_path):
    parts = find_brain_parts(tiny_reasonbrain())
    model = load_brain_model(parts)
    model.network.conv_in.requires_grad_(True)
    add_denoiser_lora(model.network, 2, 4)
    lora = {name: p for name, p in model.network.named_parameters() if "lora_" in name}
    assert lora and all(p.requires_grad for p in lora.values())
    with torch.no_grad():
        for p in lora.values():
            p.normal_()
    save_brain_model(tmp_path, model, parts)
    again = load_brain_model(find_brain_parts(tmp_path)).network
    z, context = torch.randn(1, 8, 8, 8), torch.randn(1, 77, 24)
    assert torch.equal(again(z, 5, context).sample, model.network(z, 5, context).sample)
    plain = load_brain_model(parts).network
    assert not torch.allclose(again(z, 5, context).sample, plain(z, 5, context).sample, atol=1e-4)


def test_a_new_model_takes_the_widths_of_its_parts(tmp_path):
    folder = copied(tmp_path)
    (folder / "brain.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected brain.safetensors, found none"):
        find_brain_parts(folder)
    parts = find_brain_parts(folder, trained=False)
    model = new_brain_model(parts, replace(TINY, vision=7, language=9, context=11, channels=5), seed=4)
    assert model.brain.spec == TINY and model.report == {}
    same = new_brain_model(parts, TINY, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.brain.parameters(), same.brain.parameters(), strict=True))
    with pytest.raises(ConfigError, match="preset: expected one of 7b, 3b, flux"):
        new_brain_model(parts, "13b")
    with pytest.raises(CheckpointError, match="Train one, or name a folder that training wrote"):
        load_brain_model(parts)


def test_parts_may_lie_elsewhere(tmp_path):
    bases, own = tiny_reasonbrain(), tmp_path / "own"
    own.mkdir()
    shutil.copy(bases / "brain.safetensors", own)
    shutil.copytree(bases / "lora", own / "lora")
    write_brain_settings(own, {"diffusion": bases, "llava": bases / "llava"}, segmenter="grid")
    parts = find_brain_parts(own)
    assert parts.network.resolve() == bases / "unet" and parts.trained == own and parts.kind == "sd"
    with pytest.raises(CheckpointError, match="parts.llava: expected a folder at .*nowhere"):
        (own / "reasonbrain.json").write_text('{"parts": {"llava": "nowhere"}}')
        find_brain_parts(own)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected a JSON file"),
        ('{"part": {}}', "part: Extra inputs .*known keys: parts, segmenter"),
        ('{"parts": {"clip": "x"}}', "parts.clip.*as parts llava, diffusion"),
        ('{"image_guidance": -1}', "image_guidance: .*found -1"),
    ],
)
def test_a_bad_settings_file_is_refused_by_name(tmp_path, text, words):
    folder = copied(tmp_path, segmenter="grid")
    (folder / "reasonbrain.json").write_text(text)
    with pytest.raises(ConfigError, match=f"reasonbrain.json: {words}"):
        find_brain_parts(folder)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing. Name the folder that holds brain.safetensors"):
        find_brain_parts(tmp_path / "away")
    folder = copied(tmp_path)
    for name in ("unet", "llava"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"found no single unet \(SD\) or transformer \(FLUX\), no llava. Put"):
        find_brain_parts(folder)


def test_a_checkpoint_of_other_parts_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    folder = copied(tmp_path)
    with safe_open(tiny_reasonbrain() / "brain.safetensors", "pt") as file:
        note = file.metadata()
    assert json.loads((tiny_reasonbrain() / "lora/adapter_config.json").read_text())["base_model_name_or_path"] is None
    state = load_file(tiny_reasonbrain() / "brain.safetensors")
    (folder / "brain.safetensors").unlink()
    only = {key: value for key, value in state.items() if not key.startswith("denoiser.")}
    save_file(only, folder / "brain.safetensors", metadata=note)
    with pytest.raises(CheckpointError, match="expected the denoiser's trained conv_in, found none"):
        load_brain_model(find_brain_parts(folder))
    key = next(key for key in state if key.startswith("brain.cme"))
    save_file({**state, key: state[key][:1], "brain.stray": torch.ones(1)}, folder / "brain.safetensors", metadata=note)
    with pytest.raises(CheckpointError, match=f"brain.stray is unknown; {key} is "):
        load_brain_model(find_brain_parts(folder))
    save_file(state, folder / "brain.safetensors", metadata=note)
    (folder / "lora").unlink()
    with pytest.raises(CheckpointError, match="lora: expected a PEFT folder, found no adapter_config.json"):
        load_brain_model(find_brain_parts(folder))


def test_switches_leave_parts_of_a_trained_model_out(tmp_path):
    full = load_brain_model(find_brain_parts(tiny_reasonbrain()))
    contexts = {"vision_enhancer": 77, "text_enhancer": 77, "patch_branch": 154, "region_branch": 154, "id_controller": 154}
    contexts["cme_bidirectional"] = 154
    finder = GivenRegions(torch.ones(20, 30).tril())
    whole = full.conditioner.with_cues(finder).condition(picture(), "snow")
    for name, length in contexts.items():
        less = full.switched({name: False}).conditioner.with_cues(finder).condition(picture(), "snow")
        assert less.tokens.shape == (1, length, 24) and less.tokens.isfinite().all(), name
        assert length == 77 or not torch.equal(less.tokens, whole.tokens), name
    none = full.switched({"cme": "none"}).conditioner.with_cues(finder).condition(picture(), "snow")
    assert none.tokens.shape == (1, 77, 24) and none.residual is None
    again = full.conditioner.with_cues(finder).condition(picture(), "snow")
    assert torch.equal(again.tokens, whole.tokens), "the model that was switched stays whole"
    asked = {"switches": {"vision_enhancer": False}}
    folder = copied(tmp_path, switches={"text_enhancer": False})
    assert load_system(replace(SPEC, weights=folder, brain=asked)).generator.conditioner.brain.cme.visual is None
    system = load_system(replace(SPEC, weights=folder))
    assert system.generator.conditioner.brain.cme.textual is None and edit(system).isfinite().all()
    with pytest.raises(ConfigError, match=r"found \d+ tensors that it does not have"):
        full.switched({"cme": "simple_ca"})
    with pytest.raises(ConfigError, match="expected names out of patch_branch.*found colour"):
        full.switched({"colour": False})


def test_missing_sam_is_a_sentence_before_anything_is_loaded_into_a_picture(tmp_path):
    with pytest.raises(CheckpointError, match="found no folder `segmenter`. Put one there.*`grid`, which needs none"):
        load_system(replace(SPEC, weights=tiny_reasonbrain(), brain={"segmenter": "auto"}))
    blind = load_system(replace(SPEC, weights=tiny_reasonbrain(), brain={"segmenter": "none"}))
    with pytest.raises(ConfigError, match="expected a segmenter or regions for the region branch"):
        edit(blind)
    less = {"segmenter": "auto", "switches": {"region_branch": False}}
    assert edit(load_system(replace(SPEC, weights=tiny_reasonbrain(), brain=less))).isfinite().all()


def test_a_plain_model_needs_no_cues(tmp_path):
    from reasonedit.tests.brains import write_system

    off = {"patch_branch": False, "region_branch": False, "id_controller": False, "cme": "none"}
    folder = write_system(tmp_path / "plain", **off)
    system = load_system(replace(SPEC, weights=folder, brain={"segmenter": "auto"}))
    assert tiny_brain(**off).frce is None and edit(system).isfinite().all()


def run(*more: str) -> int:
    base = ["edit", "cat.png", "Let it snow", "--system", "reasonbrain", "--weights", str(tiny_reasonbrain()), "--out", "out"]
    return main([*base, *more])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (37, 53, 3), dtype=np.uint8)).save("cat.png")
    mask = np.zeros((37, 53), dtype=np.uint8)
    mask[5:20, 5:30] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


def test_the_command_edits(here, capsys):
    assert run("--objects", "snow", "cat", "--masks", "mask.png", "--image-guidance", "2") == 0
    said = capsys.readouterr()
    assert "result: round 1 of 1 (stopped: one_edit)" in said.out and "name a reasoner to think and reflect" in said.err
    record = json.loads(Path("out/trace.json").read_text())
    assert record["request"]["reasoner"] == "none"
    assert record["request"]["image_guidance"] == 2.0 and record["request"]["system"] == "reasonbrain"
    assert record["counts"]["denoiser_forwards"] == 2 and record["counts"]["vae_encodes"] == 1
    first = np.asarray(Image.open("out/result.png"))
    assert run("--image-guidance", "2") == 0
    assert "objects: " not in said.err and "objects: Let it snow (--objects names others)" in capsys.readouterr().err
    assert first.shape == (37, 53, 3) and (first != np.asarray(Image.open("out/result.png"))).any(), "masks count"


def test_a_reasoner_wraps_it_in_the_loop(here):
    from reasonedit.tests.test_cli import REPLIES

    Path("replies.json").write_text(json.dumps(REPLIES))
    assert run("--reasoner", "scripted:replies.json") == 0
    record = json.loads(Path("out/trace.json").read_text())
    assert [done["decision"] for done in record["rounds"]] == ["refine", "success"]
    assert record["rounds"][1]["input_index"] == 0 and record["counts"]["vae_encodes"] == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--masks", "mask.png", "--segmenter", "grid"], "--masks: expected without --segmenter, found both"),
        (["--objects", " "], "--objects: expected names, found an empty one"),
        (["--masks", "cat.png", "--size", "64", "--lora", "cat.png"], "expected ReasonBrain without loras"),
        (["--segmenter", "eyes"], "segmenter: expected one of "),
    ],
)
def test_a_wrong_call_is_told_in_a_sentence(here, capsys, more, words):
    assert run(*more) == 2
    assert words in capsys.readouterr().err


def test_its_options_belong_to_it(here, capsys):
    base = ["edit", "cat.png", "x", "--system", "reasonedit-s", "--weights", ".", "--out", "o"]
    assert main([*base, "--image-guidance", "2"]) == 2
    assert "--image-guidance: expected with --system reasonbrain, found reasonedit-s" in capsys.readouterr().err
