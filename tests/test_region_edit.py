"""Whole edits with a region: generator, command line, trace, the fit of a decay, and counted work."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core import counting, report, run
from reasonedit.reasonedit_core.bench import decay as bench_decay
from reasonedit.reasonedit_core.bench.decay import DecayFit, fit_edits
from reasonedit.reasonedit_core.bench.small import picture
from reasonedit.reasonedit_core.cli import main
from reasonedit.reasonedit_core.denoisers.dit import Step1XDenoiser
from reasonedit.reasonedit_core.denoisers.qwen_image import QwenImageDenoiser
from reasonedit.reasonedit_core.denoisers.region import denoise
from reasonedit.reasonedit_core.denoisers.step_cache import PredictedSteps
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.models.step1x_transformer import Step1XEditTransformer2DModel
from reasonedit.reasonedit_core.regions import GuidanceInterval, Region, RegionUse, StepCache, read_decay
from reasonedit.reasonedit_core.types import Conditioning, Counts, EditRequest, EditTrace, LatentImage, Round
from reasonedit.tests import regions
from reasonedit.tests.peer.recipe import draw
from reasonedit.tests.tiny import tiny_checkpoint

NAMES = {"s": ("reasonedit-s", "step1x-v1p2"), "q": ("reasonedit-q", "qwen-edit-plus")}
SIZE, LEVEL, STEPS = (97, 61), 96, 6
HALF = torch.zeros(1, 1, 61, 97)
HALF[..., :48] = 1.0


@cache
def system(name: str):
    kind, tiny = NAMES[name]
    weights = tiny_checkpoint(tiny, std=regions.STD)
    return load_system(SystemSpec(system=kind, weights=weights, reasoner="none", dtype="float32", device="cpu"))


def request(**options) -> EditRequest:
    options = dict(steps=STEPS, guidance=3.0, size_level=LEVEL, think=False, reflect=False) | options
    return EditRequest(picture(1, SIZE), "make it red", **options)


def edit(name: str, asked: EditRequest, **options):
    rng = torch.Generator().manual_seed(asked.seed)
    return system(name).generator.edit(asked, asked.image, asked.instruction, rng, **options)


# ---- edits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", regions.SYSTEMS)
def test_an_edit_whose_region_is_everything_is_the_plain_edit(name, released):
    plain = edit(name, request(), released=released)
    found = edit(name, request(region=Region(mask=torch.ones(1, 1, 61, 97))), released=released)
    assert torch.equal(found.latents, plain.latents) and torch.equal(found.image, plain.image)
    assert plain.region is None and found.region == RegionUse(plain.latents.shape[1], plain.latents.shape[1], 6, guided=6)


@pytest.mark.parametrize("name", regions.SYSTEMS)
def test_an_edit_of_a_masked_half(name):
    """Odd sizes; the mask is over the source, the tokens are of the generated size."""
    denoised = []
    found = edit(
        name,
        request(region=Region(mask=HALF, first=2, last=1, refresh=())),
        on_step=lambda i, n, latents: denoised.append(latents.shape),
    )
    use = found.region
    assert (use.full, use.partial, use.guided) == (3, 3, 6) and len(denoised) == 6
    assert 0.4 < use.edited / use.tokens < 0.7
    assert found.image.shape == (1, 3, 61, 97) and (found.image - edit(name, request()).image).abs().max() > 0


@pytest.mark.parametrize("name", regions.SYSTEMS)
def test_the_region_is_found_from_the_picture(name):
    """The lower the threshold, the fewer tokens count as edited; all of them at 1, none at -1."""
    counts = [
        edit(name, request(region=Region(threshold=at, erode=0, dilate=0, first=2, last=1))).region.edited
        for at in (-1.0, 0.0, 1.0)
    ]
    assert counts == sorted(counts) and counts[0] == 0 < counts[1] < counts[2]


def test_each_system_has_its_own_threshold(monkeypatch):
    seen = []
    monkeypatch.setattr("reasonedit.reasonedit_core.generator.denoise", lambda *a, **k: seen.append(k["threshold"]) or 1 / 0)
    for name in regions.SYSTEMS:
        with pytest.raises(ZeroDivisionError):
            edit(name, request(region=Region()))
    assert seen == [0.88, 0.80]


def test_a_region_in_a_chained_round():
    """The latents of the last round are what the region is found by."""
    first = edit("s", request())
    asked = request(region=Region(threshold=-1.0))
    rng = torch.Generator().manual_seed(1)
    found = system("s").generator.edit(asked, first.generated, "again", rng, latents=first.latents)
    assert found.region.edited == 0 and found.region.skipped > 0


# ---- trace and command line ----------------------------------------------------------------------------------------------


def test_the_trace_says_what_was_asked_and_what_was_done():
    asked = request(region=Region(mask=HALF, first=2, last=1, refresh=()), guidance_interval=GuidanceInterval(0.0, 0.9))
    made = edit("s", asked)
    trace = EditTrace(asked, rounds=(Round(0, "make it red", None, made),))
    record = report.trace_record(trace, Counts())
    assert json.loads(json.dumps(record)) == record, "plain values"
    assert record["request"]["guidance_interval"] == [0.0, 0.9]
    assert record["request"]["region"]["mode"] == "mask" and record["request"]["region"]["first"] == 2
    assert record["rounds"][0]["region"] == made.region.record() and made.region.guided < 6
    words = run.round_line(trace.rounds[0])
    assert f"edited {made.region.edited} of {made.region.tokens} tokens; steps: 3 full, 3 partial" in words
    plain = report.trace_record(EditTrace(request(), rounds=(Round(0, "x", None, replace(made, region=None)),)), Counts())
    assert "region" not in plain["request"] and "region" not in plain["rounds"][0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", SIZE, (90, 120, 30)).save("cat.png")
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, 48, 61))
    mask.save("mask.png")
    Image.new("L", (61, 97)).save("upright.png")
    return tmp_path


def command(*more: str) -> list[str]:
    weights = str(tiny_checkpoint("step1x-v1p2"))
    given = ["edit", "cat.png", "make it red", "--system", "reasonedit-s", "--weights", weights, "--reasoner", "none"]
    return [*given, "--size", "96", "--steps", "4", "--out", "out", "--quiet", "--device", "cpu", *more]


@pytest.mark.parametrize(
    ("options", "mode"),
    [(["--region", "mask", "mask.png", "--region-first", "1", "--region-last", "1"], "mask"), (["--region", "auto"], "auto")],
)
def test_the_command_line_takes_a_region(folder, capsys, options, mode):
    assert main(command(*options, "--region-refresh", "3", "--guidance-interval", "0", "0.99")) == 0
    trace = json.loads((folder / "out/trace.json").read_text())
    asked, used = trace["request"], trace["rounds"][0]["region"]
    assert (asked["region"]["mode"], asked["region"]["refresh"], asked["guidance_interval"]) == (mode, [3], [0, 0.99])
    assert used["full"] + used["partial"] + used["skipped"] == 4 and used["guided"] <= 3
    if mode == "mask":
        assert (used["full"], used["partial"], used["tokens"]) == (3, 1, 28) and 12 <= used["edited"] <= 21
    assert "tokens; steps:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--region", "some"], "expected auto, off or mask FILE, found 'some'"),
        (["--region", "mask"], "expected auto, off or mask FILE, found 'mask'"),
        (["--region", "auto", "mask.png"], "expected auto, off or mask FILE"),
        (["--region", "mask", "none.png"], "none.png"),
        (["--region", "mask", "upright.png"], "upright.png: expected a mask with the proportions of the picture, 97 x 61"),
        (["--region-first", "3"], "--region-first: expected with --region auto"),
        (["--region", "off", "--region-decay", "d.json"], "--region-decay: expected with --region auto"),
        (["--region", "auto", "--region-decay", "d.json"], "d.json: expected the JSON file"),
        (["--region", "auto", "--region-threshold", "2"], "--region-threshold: expected a number from -1 to 1"),
        (["--region", "auto", "--region-refresh", "9"], "expected refresh steps from 1 to 4, found 9"),
        (["--guidance-interval", "0.8", "0.2"], "expected 0 <= low <= high <= 1"),
    ],
)
def test_options_that_make_no_sense_are_told_in_a_sentence(folder, capsys, options, words):
    assert main(command(*options)) == 2
    assert words in capsys.readouterr().err


# ---- decays --------------------------------------------------------------------------------------------------------------


def test_the_fit_recovers_planted_decays():
    """v(k + 1) = gamma v(k) + drift |v(k + 1)| of something at right angles, over three edits of different strength."""
    gammas, drifts = (0.8, 1.02, 1.3, 0.97), (0.0, 0.05, 0.3, 0.01)
    sigmas = (1.0, 0.9, 0.7, 0.4, 0.1)
    fit = DecayFit()
    for number, strength in enumerate((1.0, 3.0, 0.2)):
        velocity = strength * draw(f"v{number}", (1, 30, 8)).double()
        fit.add(sigmas[0], velocity)
        for k, (gamma, drift) in enumerate(zip(gammas, drifts, strict=True)):
            other = draw(f"other {number} {k}", (1, 30, 8)).double()
            other -= velocity * (other * velocity).sum() / velocity.square().sum()
            straight = gamma * velocity
            # |rest| is `drift` of the length of both together
            other *= straight.norm() / other.norm() * drift / (1 - drift**2) ** 0.5
            velocity = straight + other
            fit.add(sigmas[k + 1], velocity)
        fit.end()
    found = fit.decay("planted")
    assert found.sigmas == sigmas and found.about == "planted"
    assert found.gammas == pytest.approx(gammas, abs=1e-9) and found.drifts == pytest.approx(drifts, abs=1e-7)


def test_a_velocity_that_turns_round_is_never_reused():
    fit, velocity = DecayFit(), draw("v", (1, 3, 4))
    for sigma, sign in ((1.0, 1), (0.5, -1)):
        fit.add(sigma, sign * velocity)
    fit.end()
    assert fit.decay().drifts == pytest.approx((1.0,), abs=1e-4) and fit.decay().gammas[0] > 0


def test_edits_of_different_schedules_are_refused():
    fit, velocity = DecayFit(), torch.ones(1, 2, 4)
    with pytest.raises(ConfigError, match="at least one edit"):
        fit.decay()
    for sigma in (1.0, 0.5):
        fit.add(sigma, velocity)
    fit.end()
    with pytest.raises(ConfigError, match=r"one schedule, found timestep 0.9000 at step 1 of edit 2"):
        fit.add(0.9, velocity)
    fit.add(1.0, velocity)
    with pytest.raises(ConfigError, match="at least 2, found 1 after 2"):
        fit.end()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", regions.SYSTEMS)
def test_a_decay_of_a_model(name, guidance):
    """Fitted to one edit of two timesteps it is, by hand, that of the velocities which the edit followed."""
    asked, seen = request(steps=3, guidance=guidance), []
    made = fit_edits(system(name).generator, [asked])
    edit(name, asked, on_step=lambda i, n, x: seen.append(x.double()), released=False)
    sigmas = [*made.sigmas, 0.0]
    second, third = ((seen[k] - seen[k - 1]) / (sigmas[k + 1] - sigmas[k]) for k in (1, 2))
    gamma = float((second * third).sum() / second.square().sum())
    assert made.gammas[1] == pytest.approx(max(gamma, 1e-6), abs=1e-3)
    assert made.drifts[1] == pytest.approx(float((third - gamma * second).norm() / third.norm()), abs=1e-3)


def test_the_tool_writes_what_the_option_takes(folder, capsys):
    weights = str(tiny_checkpoint("step1x-v1p2"))
    given = ["--system", "reasonedit-s", "--weights", weights, "--device", "cpu", "--size", "96", "--steps", "4"]
    assert bench_decay.main([*given, "--edit", "cat.png", "make it red", "--seeds", "2", "--out", "decay.json"]) == 0
    found = read_decay(folder / "decay.json")
    assert len(found.gammas) == 3 and "reasonedit-s" in found.about and "2 edits, 4 steps" in found.about
    assert "written: decay.json" in capsys.readouterr().out
    more = ["--region", "mask", "mask.png", "--region-first", "1", "--region-last", "0", "--region-tolerance", "9"]
    assert main(command(*more, "--region-decay", "decay.json", "--region-refresh", "1")) == 0
    used = json.loads((folder / "out/trace.json").read_text())["rounds"][0]["region"]
    assert (used["full"], used["partial"], used["cached"]) == (1, 0, 3)
    assert bench_decay.main([*given, "--out", "none.json"]) == 2
    assert "at least one edit" in capsys.readouterr().err


# ---- counted work --------------------------------------------------------------------------------------------------------


def at_full_width(name: str):
    """A DiT of the released widths and few layers, on the meta device in bfloat16, and 640 text tokens."""
    words, grid = torch.empty(1, 640, 3584, dtype=torch.bfloat16, device="meta"), (64, 64)
    with torch.device("meta"):
        if name == "s":
            # One block of the connector, which runs over the text at every step: both would weigh too much beside so few.
            net = Step1XEditTransformer2DModel(num_layers=1, num_single_layers=2, connector_depth=1)
        else:
            from diffusers import QwenImageTransformer2DModel

            net = QwenImageTransformer2DModel(num_layers=2)
    net = torch.nn.Module.to(net, torch.bfloat16).eval()
    image = LatentImage(torch.empty(1, 4096, 64, dtype=torch.bfloat16, device="meta"), *grid)
    denoiser = Step1XDenoiser(net, "v1.2") if name == "s" else QwenImageDenoiser(net)
    guided = regions.guided(name, denoiser, image, grid=grid)
    positions = torch.zeros(640, 3) if name == "s" else None
    pair = [Conditioning(words, positions=positions) for _ in range(2)]
    return replace(guided, predict=_on(denoiser, image, grid), cond=pair[0], uncond=pair[1]), image.tokens, grid


def _on(denoiser, image, grid):
    return lambda x, sigma, words, **part: denoiser(x, sigma, words, grid=grid, references=(image,), **part)


@pytest.mark.parametrize("name", regions.SYSTEMS)
def test_counted_work_of_a_quarter_edited(name):
    """28 steps, 9 in full, 25 % edited. A partial step has 640 + 1024 of 8832 queries and all keys: 0.19 of a full step."""
    guided, noise, grid = at_full_width(name)
    sigmas = torch.linspace(1, 0, 29)
    quarter = Region(mask=regions.mask_of(regions.corner(grid, 32, 32), cell=1))
    uses = []

    def steps(region, sigmas=sigmas):
        work = counting.count(lambda: uses.append(denoise(guided, noise, sigmas, grid=grid, region=region)[1]))
        return work.flops

    one = steps(None, sigmas[:2])
    found, exact = steps(quarter), 28 * one
    assert (uses[-1].full, uses[-1].partial, uses[-1].edited, uses[-1].tokens) == (9, 19, 1024, 4096)
    partial = (found - 9 * one) / 19
    assert 0.18 < partial / one < 0.21
    assert found / exact < 0.46, "1 / 2.17 of the full path"


# ---- step cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", regions.SYSTEMS)
def test_a_step_cache_that_computes_every_step_is_the_plain_edit(name):
    assert torch.equal(edit(name, request(step_cache=StepCache(every=1))).latents, edit(name, request()).latents)


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (3.0, 2)])
def test_a_step_cache_computes_the_steps_it_says(guidance, passes):
    """Of eight steps the first two, the last, and every third between: 0, 1, 4, 7."""
    counts, asked = system("q").counts, request(steps=8, guidance=guidance, step_cache=StepCache(every=3, first=2, last=1))
    before = counts.denoiser_forwards
    edit("q", asked)
    assert counts.denoiser_forwards - before == 4 * passes
    assert [step for step in range(8) if asked.step_cache.computes(step, 8)] == [0, 1, 4, 7]


def test_predicted_steps_go_on_in_a_straight_line():
    """A velocity that changes evenly from step to step is extrapolated exactly, each pass from its own past."""
    words, calls = [Conditioning(torch.zeros(1, 1, 1)) for _ in range(2)], []
    slopes = [draw(f"slope {n}", (1, 3, 4)) for n in range(2)]

    def predict(latents, sigma, conditioning):
        calls.append(float(sigma))
        return 1 + float(sigma) * slopes[conditioning is words[1]]

    found = PredictedSteps(predict, StepCache(every=3, first=2, last=0), 9)
    for step in range(9):
        for n in range(2):
            velocity = found(torch.zeros(1, 3, 4), torch.tensor([float(step)]), words[n])
            torch.testing.assert_close(velocity, 1 + step * slopes[n], atol=1e-5, rtol=0)
    assert calls == [0, 0, 1, 1, 4, 4, 7, 7]


def test_interleaved_edits_with_step_caches_do_not_mix():
    asked, other = (request(step_cache=StepCache(every=2, first=2)), request(seed=7, step_cache=StepCache(every=3, first=1)))
    alone = edit("q", asked).latents
    assert torch.equal(edit("q", asked, on_step=lambda i, n, x: i % 3 or edit("q", other)).latents, alone)


def test_a_step_cache_and_a_region_are_not_mixed(folder, capsys):
    with pytest.raises(ConfigError, match="expected a region or a step cache, found both"):
        edit("s", request(region=Region(), step_cache=StepCache()))
    with pytest.raises(ConfigError, match="step cache: expected a value of at least 1 for every, found 0"):
        StepCache(every=0)
    assert main(command("--region", "auto", "--step-cache", "2")) == 2
    assert "found both" in capsys.readouterr().err


def test_a_diffusers_without_taylorseer_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.hooks.taylorseer_cache", None)
    with pytest.raises(ConfigError, match="expected a diffusers with TaylorSeer"):
        edit("s", request(step_cache=StepCache()))
