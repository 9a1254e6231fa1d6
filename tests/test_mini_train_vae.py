"""The VAEs of the miniature: flat units are the models, runs resume to the bit, the core loads what is written."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.mini.configs import components
from reasonedit.reasonedit_core.mini.dice import Dice
from reasonedit.reasonedit_core.mini.splits import split_of_scene
from reasonedit.reasonedit_core.mini.world import render
from reasonedit.tests.engine_toys import digest_of, numbers
from reasonedit.training import checkpoint
from reasonedit.training.log import read_log
from reasonedit.training.mini import vae as room
from reasonedit.training.mini.muon import Muon, orthogonal
from reasonedit.training.mini.vae import (
    BUILDS,
    DEVIATION,
    REPORT,
    WEIGHTS,
    VaeModels,
    default_settings,
    new_vae,
    open_codec,
    picture_step,
    read_back,
    run_steps,
    train_vae,
)
from reasonedit.training.mini.vae_scenes import Crops, Pictures, as_pixels, as_tensor, crowded_scene, plain_scenes
from reasonedit.training.signals import SAVE_QUIT

SYSTEMS = ("mini-s", "mini-q")
SMALL = {
    "mini-s": {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2},
    "mini-q": {"base_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
}


@pytest.fixture(autouse=True)
def few_checks(monkeypatch):
    """Statistics over a few scenes."""
    monkeypatch.setattr(room, "COUNTED", 32)


def small(system, **changes):
    values = {"widths": SMALL[system], "steps": 6, "batch": 4, "crop": 16, "save_every": 2, "check_every": 0, "checked": 4}
    return default_settings(system, **{**values, "device": "cpu", **changes})


def random_vae(system):
    """A unit in float64 without a zero anywhere: nothing may hide behind an initial value."""
    unit = new_vae(small(system)).eval().double()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in unit.named_parameters():
            one.copy_(
                0.1 * torch.randn(one.shape, generator=rng, dtype=torch.float64)
                + (1 if "norm" in name and "bias" not in name else 0)
            )
    return unit


def drawn_crops(**changes):
    values = {"seed": 1, "steps": 10, "batch": 8, "crop": 48, "whole_from": 8, "noise": 0.3, "factor": 8, "fingerprint": "x"}
    return Crops(**{**values, **changes})


# ---- the flat units ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_flat_units_are_the_models(system):
    unit = random_vae(system)
    pixels = 2 * torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    frames = pixels if system == "mini-s" else pixels[:, :, None]
    with torch.no_grad():
        mean = unit.vae.encode(frames).latent_dist.mean
        decoded = unit.vae.decode(mean).sample
        flat = unit.encode(pixels)
        shown = unit.decode(flat)
    if system == "mini-q":  # the model clamps what it decodes
        mean, decoded, shown = mean[:, :, 0], decoded[:, :, 0], shown.clamp(-1, 1)
    assert flat.std() > 0.02 and decoded.std() > 0.02
    torch.testing.assert_close(flat, mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shown, decoded, rtol=1e-5, atol=1e-6)


def test_gradients_of_single_frames_stay_in_the_last_slice_of_time():
    unit = random_vae("mini-q")
    pixels = 0.5 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit.decode(unit.encode(pixels)).square().sum().backward()
    flat = {name: one.grad for name, one in unit.named_parameters()}
    unit.zero_grad()
    mean = unit.vae.encode(pixels[:, :, None]).latent_dist.mean
    unit.vae.decoder(unit.vae.post_quant_conv(mean), feat_cache=[None] * 99, feat_idx=[0]).square().sum().backward()
    for name, one in unit.named_parameters():
        if one.grad is None:
            assert flat[name] is None or not flat[name].any(), name
        else:
            torch.testing.assert_close(flat[name], one.grad, rtol=1e-3, atol=1e-4, msg=name)
            if one.ndim == 5 and one.shape[2] == 3 and "time_conv" not in name:
                assert not one.grad[:, :, :2].any() and one.grad[:, :, 2].any(), name


def test_new_vaes_start_without_memory_of_earlier_frames():
    for name, module in new_vae(small("mini-q")).vae.named_modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            assert not module.weight[:, :, :2].any()
            assert bool(module.weight[:, :, 2].any()) != name.endswith("time_conv")


@pytest.mark.parametrize("system", SYSTEMS)
def test_shipped_sizes(system):
    settings = default_settings(system)
    part = components(BUILDS[system], torch.bfloat16, {"vae": settings.widths})["vae"]
    assert sum(2 * math.prod(shape) for shape in part.shapes(part.config).values()) <= 8e6
    unit = new_vae(settings)
    assert unit.encode(torch.zeros(1, 3, 96, 96)).shape == (1, 16, 6, 6)
    assert {name: tuple(one.shape) for name, one in unit.vae.state_dict().items()} == {
        name: tuple(shape) for name, shape in part.shapes(part.config).items()
    }


# ---- what is trained on --------------------------------------------------------------------------------------------------


def test_crops_follow_from_the_cursor():
    first, again, other = drawn_crops().load(0, 3)[0], drawn_crops().load(0, 3)[0], drawn_crops().load(0, 4)[0]
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.noise, again.noise)
    assert not torch.equal(first.pixels, other.pixels) and not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.pixels, drawn_crops(seed=2).load(0, 3)[0].pixels)
    assert first.records == again.records and not {*first.records} & {*other.records}
    assert first.counts == {"picture": 8.0}


def test_crops_and_whole_pictures_have_as_many_pixels():
    crops, whole = (drawn_crops(batch=16).load(0, cursor)[0] for cursor in (7, 8))
    assert crops.pixels.shape == (16, 3, 48, 48) and crops.noise.shape == (16, 16, 6, 6)
    assert whole.pixels.shape == (4, 3, 96, 96) and whole.noise.shape == (4, 16, 12, 12)
    assert crops.pixels.min() >= -1 and crops.pixels.max() <= 1


def test_noise_is_of_many_strengths():
    noise = torch.cat([drawn_crops(noise=0.5, batch=32).load(0, cursor)[0].noise for cursor in range(4)])
    strengths = noise.flatten(1).std(dim=1)
    assert strengths.max() <= 0.5 * 1.15 and strengths.min() < 0.05 and strengths.max() > 0.4


def test_training_sees_scenes_of_its_own_split(monkeypatch):
    seen = []
    monkeypatch.setattr("reasonedit.training.mini.vae_scenes.as_tensor", lambda one: seen.append(one) or as_tensor(one))
    for cursor in range(10):
        drawn_crops(batch=16).load(0, cursor)
    crowded = [crowded_scene(Dice("test", number)) for number in range(30)]
    assert len(seen) > 100 and {split_of_scene(one) for one in [*seen, *crowded]} == {"train"}
    assert {one.style for one in seen} == {0, 1, 2, 3} and len({one.background for one in seen}) > 5
    assert {len(one.objects) for one in seen} >= {0, 4, 6, 7}


def test_pixels_of_objects_are_marked():
    (micro,) = drawn_crops().load(0, 9)
    bare, covered = micro.covered == 0, micro.covered == 1
    assert micro.covered.shape == (4, 1, 96, 96) and bool((bare | covered).all()) and 0.01 < covered.float().mean() < 0.5


def test_objects_count_more_than_ground():
    """The same error costs more where an object is, and the whole weighs as much as without."""
    settings, pixels = small("mini-s", moments=0.0, square=0.0, objects=3.0), torch.zeros(1, 3, 16, 16)
    covered = torch.zeros(1, 1, 16, 16)
    covered[..., :4] = 1

    class Wrong(torch.nn.Module):
        def __init__(self, where):
            super().__init__()
            self.where, self.weight = where, torch.nn.Parameter(torch.zeros(1))

        def encode(self, pixels):
            return torch.zeros(1, 16, 2, 2)

        def decode(self, latents):
            return self.where.expand(1, 3, 16, 16)

    micro = Pictures(None, None, {}, pixels, torch.zeros(1, 16, 2, 2), covered, ("one",))
    found = [
        float(picture_step(settings)(VaeModels(vae=Wrong(where)), micro).sums["picture"])
        for where in (covered, 1 - covered, torch.ones_like(covered))
    ]
    assert found == pytest.approx([0.25 * 4 / 1.75, 0.75 / 1.75, 1.0])


def test_checked_scenes_are_held_out_and_others_than_trained_on():
    held_out = plain_scenes(30, "held_out", 0)
    assert {split_of_scene(one) for one in held_out} == {"held_out"} and len({*held_out}) == 30
    assert plain_scenes(30, "held_out", 1) != held_out


def test_pixels_survive_the_way_to_tensors_and_back():
    scenes = plain_scenes(3, "train", 0)
    for scene, picture in zip(scenes, as_pixels(torch.stack([as_tensor(one) for one in scenes])), strict=True):
        assert picture.dtype == np.uint8 and np.array_equal(picture, render(scene))


# ---- runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_that_was_killed_goes_on_to_the_bit(system, tmp_path, monkeypatch):
    settings = small(system, whole=0.4)
    whole = VaeModels(vae=new_vae(settings))
    run_steps(settings, whole, tmp_path / "whole")
    steps = []

    def dying(settings):
        real = picture_step(settings)

        def step(models, micro):
            steps.append(micro.records)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return real(models, micro)

        return step

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room, "picture_step", dying)
        run_steps(settings, VaeModels(vae=new_vae(settings)), tmp_path / "broken")
    assert checkpoint.find(tmp_path / "broken").name == "step-00000002"
    outcome = run_steps(settings, VaeModels(vae=new_vae(settings)), tmp_path / "broken")
    assert outcome.finished and outcome.step == 6
    assert digest_of(checkpoint.find(tmp_path / "broken")) == digest_of(checkpoint.find(tmp_path / "whole"))
    assert numbers(read_log(tmp_path / "broken")) == numbers(read_log(tmp_path / "whole"))


def test_a_run_with_other_settings_does_not_go_on(tmp_path):
    settings = small("mini-s", steps=2)
    run_steps(settings, VaeModels(vae=new_vae(settings)), tmp_path)
    for changes in ({"lr": 1e-3}, {"noise": 0.1}, {"seed": 1}, {"crop": 32}, {"objects": 1.0}):
        other = small("mini-s", steps=2, **changes)
        with pytest.raises(CheckpointError, match="would not go on as it began"):
            run_steps(other, VaeModels(vae=new_vae(other)), tmp_path)


def test_a_run_that_is_asked_to_stop_writes_no_vae(tmp_path, monkeypatch):
    settings, run = small("mini-s"), tmp_path / "run"

    def stopping(settings):
        real = picture_step(settings)

        def step(models, micro):
            (run / SAVE_QUIT).touch()
            return real(models, micro)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(room, "picture_step", stopping)
        assert train_vae(settings, tmp_path / "vae", run) is None
    assert not (tmp_path / "vae").exists() and checkpoint.find(run).name == "step-00000001"
    assert train_vae(settings, tmp_path / "vae", run) == tmp_path / "vae"


@pytest.mark.parametrize("system", SYSTEMS)
def test_training_brings_pictures_and_latents_into_place(system, tmp_path):
    settings = small(system, steps=60, batch=8, lr=1e-2, warmup=5, whole=0.0, save_every=0, objects=0.0)
    run_steps(settings, VaeModels(vae=new_vae(settings)), tmp_path)
    lines = [line["parts"] for line in read_log(tmp_path) if line["event"] == "step"]
    first, last = ({key: np.mean([line[key] for line in some]) for key in lines[0]} for some in (lines[:5], lines[-5:]))
    assert last["absolute"] < 0.93 * first["absolute"]
    assert last["moments"] < 0.5 * first["moments"]


# ---- the optimizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (16, 40), (40, 16), (1, 9)])
def test_orthogonal_brings_singular_values_together(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix) / (0.2 * max(shape) ** 0.5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3
    inner = left.T @ found @ right.T  # the directions stay
    torch.testing.assert_close(inner, torch.diag(inner.diag()), rtol=0, atol=1e-4)
    torch.testing.assert_close(orthogonal(1000 * matrix), orthogonal(matrix), rtol=1e-3, atol=1e-4)
    assert not orthogonal(torch.zeros(shape)).any()


def test_muon_moves_kernels_and_vectors_by_the_same_measure():
    kernel, vector, idle = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((16, 4, 3, 3), (64,), (3,)))
    optimizer = Muon([kernel, vector, idle], lr=0.1)
    rng = torch.Generator().manual_seed(0)
    kernel.grad, vector.grad = torch.randn(kernel.shape, generator=rng), 7 * torch.randn(vector.shape, generator=rng)
    optimizer.step()
    torch.testing.assert_close(vector.detach(), -0.1 * vector.grad.sign(), rtol=1e-4, atol=1e-5)
    assert 0.1 * 0.2 * 0.5 < kernel.detach().square().mean().sqrt() < 0.1 * 0.2 * 1.2
    assert (kernel.detach() * kernel.grad).sum() < 0 and not idle.detach().any()


def test_groups_named_adam_are_adams_whole():
    table, kernel = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    groups = [{"params": [one], "name": name} for one, name in ((table, "embeddings"), (kernel, "rest"))]
    optimizer = Muon(groups, lr=0.1, adam=["embeddings"])
    for one in (table, kernel):
        one.grad = torch.tensor([[1.0, -2.0], [0.0, 0.0], [0.0, 3.0]])
    optimizer.step()
    torch.testing.assert_close(table.detach(), -0.1 * table.grad.sign(), rtol=1e-4, atol=1e-5)
    assert "momentum" in optimizer.state[kernel] and "momentum" not in optimizer.state[table]
    assert not torch.allclose(kernel, table, atol=1e-2)


def test_muon_decays_and_forgets():
    kernel = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([kernel], lr=0.1, weight_decay=0.5, momentum=0.5)
    kernel.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(kernel.detach(), torch.full((2, 2), 0.95))
    kernel.grad = torch.eye(2)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[kernel]["momentum"], 0.5 * torch.eye(2))


# ---- what is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_folder_is_a_released_vae(system, tmp_path):
    out = train_vae(small(system), tmp_path / "vae")
    part = components(BUILDS[system], torch.bfloat16, {"vae": SMALL[system]})["vae"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", WEIGHTS, REPORT]
    from safetensors.torch import load_file

    state = load_file(out / WEIGHTS)
    assert {name: tuple(one.shape) for name, one in state.items()} == {k: tuple(v) for k, v in part.shapes(part.config).items()}
    assert {one.dtype for one in state.values()} == {torch.bfloat16}
    config = json.loads((out / "config.json").read_text())
    own = {"scaling_factor", "shift_factor"} if system == "mini-s" else {"latents_mean", "latents_std"}
    assert {key for key in config if config[key] != part.config[key]} == own
    report = json.loads((out / REPORT).read_text())
    assert report["steps"] == 6 and 0 <= report["exact"] <= 1 and report["bytes"] == (out / WEIGHTS).stat().st_size


@pytest.mark.parametrize("system", SYSTEMS)
def test_latents_are_normalised_and_sampled_with_a_constant_deviation(system, tmp_path):
    codec = open_codec(system, train_vae(small(system, moments=0.0), tmp_path / "vae"))
    pictures = [as_tensor(one)[None] for one in plain_scenes(32, "train", 0)]
    moments = [codec.encode(one) for one in pictures]
    rng = torch.Generator().manual_seed(0)
    if system == "mini-s":
        latents = torch.cat([(mean - codec.vae.config.shift_factor) * codec.vae.config.scaling_factor for mean, _ in moments])
        assert abs(latents.mean()) < 0.02 and abs(latents.std() - 1) < 0.02
        spread = torch.cat([(0.5 * logvar).exp() for _, logvar in moments])
        torch.testing.assert_close(spread, torch.full_like(spread, DEVIATION), rtol=2e-2, atol=0)  # bf16 holds the logarithm
    else:
        latents = torch.cat([codec.sample(one, rng) for one in moments])
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
        assert mean.abs().max() < 0.02 and (deviation - 1).abs().max() < 0.02


def test_reading_back_counts_exact_scenes_only():
    scenes = plain_scenes(6, "held_out", 0)
    assert read_back(scenes, lambda pixels: pixels) == {"exact": 1.0, "quality": 10.0}
    swapped = read_back(scenes, lambda pixels: pixels.flip(0))
    assert swapped["exact"] == 0.0 and swapped["quality"] == 10.0
    noisy = read_back(
        scenes, lambda pixels: pixels + 0.4 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    )
    assert noisy["quality"] < 4 and noisy["exact"] < 0.5


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(ConfigError, match="widht"):
        default_settings("mini-s", widht=3)
    with pytest.raises(ConfigError, match="multiple of 16"):
        default_settings("mini-s", crop=50)
    with pytest.raises(ConfigError, match="base_dimm"):
        new_vae(default_settings("mini-q", widths={"base_dimm": 8}))
    with pytest.raises(ConfigError, match="mini-s, mini-q"):
        default_settings("mini-x")
