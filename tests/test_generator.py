"""One edit from end to end: equal to the released pipelines, and what the generator keeps, counts and refuses."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reasonedit.reasonedit_core import flow, images
from reasonedit.reasonedit_core import latents as latent
from reasonedit.reasonedit_core.conditioners.step1x import Step1XConditioner
from reasonedit.reasonedit_core.denoisers.dit import Step1XDenoiser
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted
from reasonedit.reasonedit_core.generator import FlowGenerator, Step1XGeometry
from reasonedit.reasonedit_core.latents import KLCodec, draw_normal, pack
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.types import Counts, EditRequest
from reasonedit.reasonedit_core.weights import load_flux_vae, load_step1x_transformer
from reasonedit.tests.peer import cases, recipe
from reasonedit.tests.test_conditioner_step1x import golden
from reasonedit.tests.tiny import tiny_checkpoint

LEVEL = 96


@cache
def parts(version: str, dtype: torch.dtype):
    folder = tiny_checkpoint(cases.SYSTEMS[version], std=cases.STD)
    transformer, variant, _ = load_step1x_transformer(folder, dtype=dtype)
    assert variant == version
    vae, _ = load_flux_vae(folder / "vae", dtype=dtype)
    return load_mllm(folder, dtype=dtype, need_lm_head=False), transformer, vae


def make(version: str = "v1.2", dtype: torch.dtype = torch.float32, **options) -> FlowGenerator:
    mllm, transformer, vae = parts(version, dtype)
    low, high = cases.BOUNDS[version]
    counts = mllm.counts = Counts()
    mllm.release()
    return FlowGenerator(
        Step1XConditioner(
            mllm,
            prefix=cases.PREFIX[version],
            dropped_tokens=cases.DROPPED[version],
            variant=version,
            min_pixels=low,
            max_pixels=high,
        ),
        Step1XDenoiser(transformer, version, counts=counts),
        KLCodec(vae),
        flow.STEP1X,
        geometry=Step1XGeometry(version),
        combine=flow.step1x_guidance(version),
        counts=counts,
        **options,
    )


def request(size=(97, 61), instruction="make it red", **options) -> EditRequest:
    options = dict(steps=2, size_level=LEVEL) | options
    return EditRequest(cases.picture(size), instruction, **options)


def rng(seed: int = cases.SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(generator: FlowGenerator, asked: EditRequest, seed: int = cases.SEED, **options):
    return generator.edit(asked, asked.image, asked.instruction, rng(seed), **options)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("version", "name"), [(version, name) for version, edits in cases.EDITS.items() for name in edits])
def test_released_edit(version, name, batched, monkeypatch):
    case = cases.EDITS[version][name]
    expected = {key: golden().get(f"edit/{version}/{name}/{key}") for key in ("latents", "picture", "draws")}
    if expected["draws"] is not None:
        # The golden run's own random numbers: torch draws others in bfloat16 from one version to the next.
        draws = iter(expected["draws"])
        monkeypatch.setattr(latent, "draw_normal", lambda shape, rng, **kw: next(draws).view(shape))
    generator = make(version, case.dtype, batched_cfg=batched)
    asked = request(case.size, case.instruction, steps=cases.STEPS, guidance=case.guidance, size_level=case.level)
    found = run(generator, asked, released=True)

    assert found.latents.dtype == case.dtype and found.image.shape == expected["picture"].shape == asked.image.shape
    gap = (found.latents.float() - expected["latents"]).abs()
    levels = (found.image * 255 - expected["picture"].float()).abs()
    if case.dtype == torch.float32:
        assert gap.max() < 1e-4
        close = levels.mean() < 0.05 and levels.max() <= 2
        if not close and not recipe.resizes_like_the_goldens():
            pytest.skip("latents equal; picture NOT COMPARED: Pillow 13, which made it, resizes this size differently")
        assert close, (levels.max(), levels.mean())
    else:
        assert gap.mean() < 2e-2 * expected["latents"].std() and levels.mean() < 3
    assert expected["picture"].float().std() > 5, "a flat picture would agree with anything"


@pytest.mark.peer
def test_golden_tensors_are_what_the_released_code_makes(tmp_path):
    source, python = (os.environ.get(f"REASONEDIT_PEER_{name}") for name in ("SRC", "PYTHON"))
    if not source or not python:
        pytest.skip("NOT COMPARED with the released code: set REASONEDIT_PEER_SRC (checkout) and REASONEDIT_PEER_PYTHON")
    script, target = Path(__file__).parent / "peer" / "golden_pipeline.py", tmp_path / "made.safetensors"
    environment = os.environ | {"PYTHONPATH": str(Path(source) / "src"), "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([python, script, target], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    made = load_file(target)
    assert made.keys() == golden().keys()
    for key, value in made.items():
        if value.dtype in (torch.int32, torch.bool):
            assert torch.equal(value, golden()[key]), key
        elif "bf16" not in key:
            torch.testing.assert_close(
                value.float(), golden()[key].float(), atol=1e-4 if "picture" not in key else 1, rtol=1e-5
            )


def test_golden_edits_depend_on_their_inputs():
    """The comparison above means nothing if the tiny weights ignore the text, the picture or the guidance."""
    generator = make()
    base = request((97, 61), 'write "Hi!" on it', guidance=6.0)
    made = run(generator, base).latents
    others = {
        "text": run(generator, replace(base, instruction='write "Ho!" on it')),
        "guidance": run(generator, replace(base, guidance=1.0)),
        "picture": run(generator, replace(base, image=1 - base.image)),
        "seed": run(generator, base, seed=1),
        "negative": run(generator, replace(base, negative="blurry")),
    }
    for name, other in others.items():
        assert (other.latents - made).abs().max() > 1e-3, name
    assert torch.equal(run(generator, base).latents, made)


def test_draws_are_the_posterior_sample_then_the_noise():
    generator, asked = make(), request()
    ours, expected = rng(), rng()
    seen = []
    generator.denoiser = lambda x, t, c, **kw: seen.append((x, kw["references"][0].tokens)) or torch.zeros_like(x)
    generator.edit(asked, asked.image, "x", ours)
    size = images.step1x_size(97, 61, LEVEL)
    moments = generator.codec.encode(images.resize_bilinear(asked.image, *size) * 2 - 1)
    reference = pack(generator.codec.sample(moments, expected))
    noise = draw_normal((1, 16, size[1] // 8, size[0] // 8), expected, dtype=torch.float32, device="cpu")
    assert torch.equal(seen[0][1], reference) and torch.equal(seen[0][0], pack(noise))
    assert torch.equal(ours.get_state(), expected.get_state())


def test_moments_are_kept_and_samples_are_not():
    generator, asked = make(), request()
    references = []
    denoiser = generator.denoiser
    generator.denoiser = lambda *args, **kw: references.append(kw["references"][0].tokens) or denoiser(*args, **kw)
    shared = rng()
    for _ in range(2):
        generator.edit(asked, asked.image.clone(), "x", shared, released=True)
    assert generator.counts.vae_encodes == 1 and generator.counts.vae_decodes == 2
    assert not torch.equal(references[0], references[-1])
    generator.edit(asked, 1 - asked.image, "x", shared)
    assert generator.counts.vae_encodes == 2
    assert generator.counts.vision_passes == 2


def test_counts_of_an_edit():
    for guidance, forwards in ((6.0, 6), (1.0, 3), (0.5, 3)):
        generator = make()
        run(generator, request(steps=3, guidance=guidance))
        counts = generator.counts
        assert (counts.denoiser_forwards, counts.vision_passes, counts.vae_encodes, counts.vae_decodes) == (forwards, 1, 1, 1)
    generator = make(batched_cfg=True)
    run(generator, request(steps=3))
    assert generator.counts.denoiser_forwards == 3


def test_sizes_and_levels_of_the_result():
    generator = make()
    asked = request((97, 61))
    ours = run(generator, asked)
    bare = run(generator, asked, source_size=False)
    released = run(generator, asked, released=True)
    width, height = images.step1x_size(97, 61, LEVEL)
    for made in (ours, bare, released):
        assert made.generated.shape == (1, 3, height, width) and made.latents.shape == (1, width * height // 256, 64)
        for picture in (made.image, made.generated):
            assert torch.equal(picture, (picture * 255).round() / 255)
    assert ours.image.shape == (1, 3, 61, 97) and torch.equal(bare.image, bare.generated)
    assert torch.equal(ours.image, images.resize_bicubic_pil(ours.generated, 97, 61))
    # The release resizes to the picture it was given, ours to the source of the request.
    other = cases.picture((50, 50))
    assert generator.edit(asked, other, "x", rng(), released=True).image.shape == (1, 3, 50, 50)
    assert generator.edit(asked, other, "x", rng()).image.shape == (1, 3, 61, 97)


def test_a_chained_edit_takes_latents_and_draws_noise_only():
    generator, asked = make(), request((97, 40))
    first = run(generator, asked)
    encodes, seen = generator.counts.vae_encodes, []
    denoiser = generator.denoiser
    generator.denoiser = lambda x, *args, **kw: seen.append((x, kw["references"][0])) or denoiser(x, *args, **kw)
    second = generator.edit(asked, first.generated, "more", rng(5), latents=first.latents)
    assert generator.counts.vae_encodes == encodes
    assert seen[0][1].tokens is first.latents
    height, width = first.generated.shape[-2:]
    noise = draw_normal((1, 16, height // 8, width // 8), rng(5), dtype=torch.float32, device="cpu")
    assert torch.equal(seen[0][0], pack(noise))
    assert second.generated.shape == first.generated.shape and second.image.shape == asked.image.shape
    # Planned anew, this generated picture would get another size.
    assert images.step1x_size(width, height, LEVEL) != (width, height)
    with pytest.raises(ConfigError, match="latent tokens for a picture of"):
        generator.edit(asked, cases.picture((64, 64)), "more", rng(), latents=first.latents)


# bfloat16 rounds the timestep, by up to 4 of 1000, as in the release; random weights answer to its fast sinusoids.
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_low_precision_is_near_fp32(dtype, share, monkeypatch):
    def draw(shape, rng, **kw):
        return torch.randn(shape, generator=rng).to(kw["dtype"])

    monkeypatch.setattr(latent, "draw_normal", draw)
    exact = run(make(), request(guidance=1.0)).latents
    low = run(make(dtype=dtype), request(guidance=1.0))
    assert low.latents.dtype == dtype and torch.isfinite(low.image).all()
    assert (low.latents.float() - exact).abs().mean() < share * exact.std()


def test_dtype_of_the_latents_may_differ_from_the_conditioning():
    generator = make(dtype=torch.float32)
    generator.dtype = torch.bfloat16
    seen = []
    generator.denoiser = lambda x, t, c, **kw: seen.append(x.dtype) or torch.zeros_like(x)
    assert run(generator, request()).latents.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16}


def test_mover_is_entered_around_every_use():
    open_now, log = [], []

    @contextmanager
    def mover(component):
        assert not open_now
        open_now.append(component)
        log.append(component)
        yield
        open_now.clear()

    generator = make(mover=mover)
    uses = []
    for owner, name, component in (
        (generator.conditioner, "condition", "mllm"),
        (generator.denoiser, "__call__", "dit"),
        (generator.codec, "encode", "vae"),
        (generator.codec, "decode", "vae"),
    ):
        method = getattr(owner, name)

        def watched(*args, _method=method, _component=component, **kw):
            uses.append((_component, list(open_now)))
            return _method(*args, **kw)

        if name == "__call__":
            generator.denoiser = watched
        else:
            setattr(owner, name, watched)
    moved = run(generator, request())
    assert log == ["mllm", "vae", "dit", "vae"]
    assert {component for component, _ in uses} == {"mllm", "dit", "vae"}
    assert all(inside == [component] for component, inside in uses)
    assert torch.equal(moved.image, run(make(), request()).image)


def test_steps_are_reported_and_can_be_stopped():
    generator, seen = make(), []
    run(generator, request(steps=3), on_step=lambda i, n, x: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(Interrupted, match="step 2 of 3"):
        run(generator, request(steps=3), should_stop=lambda: len(seen) > 3, on_step=lambda *_: seen.append(0))


def test_negative_prompt_of_the_request_replaces_the_default():
    generator = make(default_negative="plain")
    texts = []
    condition = generator.conditioner.condition
    generator.conditioner.condition = lambda image, text, **kw: texts.append(text) or condition(image, text, **kw)
    for negative, guidance in ((None, 6.0), ("", 6.0), ("ugly", 6.0), ("ugly", 1.0)):
        run(generator, request(negative=negative, guidance=guidance))
    assert texts == ["make it red", "plain", "make it red", "", "make it red", "ugly", "make it red"]


def test_wrong_requests_say_what_is_wrong():
    generator = make()
    with pytest.raises(ConfigError, match="takes no references, found 1"):
        run(generator, request(references=(cases.picture((32, 32)),)))
    with pytest.raises(ConfigError, match="at least 1"):
        run(generator, request(steps=0))
    assert generator.counts == Counts(), "a wrong request is refused before anything costly"
    long = EditRequest(torch.zeros(1, 3, 1, 300), "x", size_level=LEVEL)
    with pytest.raises(ConfigError, match="200:1"):
        run(generator, long)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2000, 16)])
def test_small_and_long_pictures(size):
    made = run(make(), request(size, steps=1, guidance=1.0))
    assert made.image.shape == (1, 3, size[1], size[0])


def test_geometries_resize_as_their_release_did():
    picture = cases.picture((97, 61))
    size = (64, 48)
    by = {version: Step1XGeometry(version) for version in ("v1.0", "v1.1", "v1.2")}
    assert torch.equal(by["v1.2"].to_vae(picture, size), images.resize_bilinear(picture, *size))
    for version, resize in (("v1.0", images.resize_bicubic_pil), ("v1.1", images.resize_lanczos_pil)):
        assert torch.equal(by[version].to_vae(picture, size), resize(picture, *size))
        assert torch.equal(by[version].to_mllm(picture, size), resize(picture, *size))
    assert torch.equal(by["v1.2"].to_mllm(picture, size), images.resize_lanczos_pil(picture, *size))
    assert by["v1.2"].plan([(1920, 1080)], 1024).output == (1360, 768)
    assert Step1XGeometry(multiple=32).plan([(1920, 1080)], 1024).vae == ((1344, 768),)
    large = Step1XGeometry(patch=32).plan([(1920, 1080)], 1024)  # an autoencoder that halves four times
    assert (large.vae, large.grid) == (((1344, 768),), (24, 42))


class _Broken:
    """A denoiser whose velocities are all `value` until the attention is plain; `never`: then too."""

    kind = "velocity"

    def __init__(self, inner, value, never):
        self.inner, self.value, self.never, self.backend, self.calls = inner, value, never, "auto", 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **options):
        self.calls += 1
        velocity = self.inner(*args, **options)
        return velocity if self.backend == "reference" and not self.never else torch.full_like(velocity, self.value)


@pytest.mark.parametrize("never", [False, True])
@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (0.0, "one value everywhere")]
)
def test_a_first_step_of_nothing_goes_on_with_plain_attention_or_ends_with_a_sentence(caplog, value, words, never):
    from reasonedit.reasonedit_core.errors import ReasonEditError
    from reasonedit.reasonedit_core.load import SystemSpec, load_system
    from reasonedit.tests.tiny import tiny_checkpoint

    generator = load_system(
        SystemSpec("reasonedit-s", tiny_checkpoint("step1x-v1p2", std=0.2), reasoner="none", dtype="float32", device="cpu")
    ).generator
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(3))
    request = EditRequest(image, "paint it", steps=2, guidance=4.0, size_level=64)

    def edit():
        return generator.edit(request, image, "paint it", torch.Generator().manual_seed(0)).image

    wanted, generator.denoiser = edit(), _Broken(generator.denoiser, value, never)
    if never and value == 0:
        assert edit().isfinite().all(), "an untrained network may say so"
        return
    if never:
        with pytest.raises(ReasonEditError, match="first step came out as NaN or infinity.*also with plain attention"):
            edit()
        return
    assert torch.equal(edit(), wanted) and generator.denoiser.calls == 5, "one forward was made again"
    assert f"came out as {words} with attention auto: going on with reference" in caplog.text
    assert torch.equal(edit(), wanted) and generator.denoiser.calls == 9, "and no other later"
