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
from reasonedit.reasonedit_core import generator as module
from reasonedit.reasonedit_core import latents as latent
from reasonedit.reasonedit_core.conditioners.step1x import Step1XConditioner
from reasonedit.reasonedit_core.denoisers.dit import Step1XDenoiser
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted, ReasonEditError
from reasonedit.reasonedit_core.generator import FlowGenerator, Step1XGeometry
from reasonedit.reasonedit_core.kernels import dispatch
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
    """A denoiser whose velocities are all `value`, but by a backend out of `right`. which: of the calls that a fresh backend
    computes, those that break (None: all). sample: the one of a batch that breaks (None: all). shown: what a call says has
    computed attention."""

    kind = "velocity"

    def __init__(self, inner, value, right=(), which=None, sample=None, backend="auto", shown=()):
        self.inner, self.value, self.right, self.which, self.sample = inner, value, right, which, sample
        self.backend, self.shown, self.calls = backend, shown, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, latents, t, conditioning, **options):
        self.calls.append((self.backend, conditioning))
        velocity = self.inner(latents, t, conditioning, **options)
        for name in self.shown:
            dispatch._RAN.add(name)
        breaks = self.backend not in self.right and (self.which is None or len(self.calls) - 1 in self.which)
        if breaks:
            velocity = velocity.clone()
            velocity[slice(None) if self.sample is None else self.sample] = self.value
        return velocity

    @property
    def took(self):
        return [backend for backend, _ in self.calls]


def lately(generator, seed=0, **options):
    asked = request((40, 30), guidance=4.0, size_level=64, **options)
    dispatch._RAN.clear(), dispatch._TRACED.clear()
    return run(generator, asked, seed).image


NAN = float("nan")
FAULTS = [(NAN, "NaN or infinity"), (float("inf"), "NaN or infinity"), (0.0, "one value everywhere")]


@pytest.mark.parametrize(("value", "words"), FAULTS)
def test_a_first_step_of_nothing_goes_on_with_sdpa_and_stays_there(caplog, value, words):
    generator = make()
    wanted = lately(generator)
    broken = generator.denoiser = _Broken(generator.denoiser, value, ("sdpa", "reference"), shown=("interval",))
    assert torch.equal(lately(generator), wanted)
    assert broken.took == ["auto", *["sdpa"] * 4], "one forward was made again"
    assert f"came out as {words} with attention auto: trying sdpa" in caplog.text and "attention sdpa gave a" in caplog.text
    assert torch.equal(lately(generator), wanted) and broken.took[5:] == ["sdpa"] * 4, "and no other later"


@pytest.mark.parametrize(
    ("backend", "shown", "tried"),
    [
        ("auto", (), ("reference",)),  # `auto` was sdpa here, which is not tried again
        ("auto", ("host",), ("sdpa", "reference")),
        ("auto", ("interval",), ("sdpa", "reference")),
        ("flash", (), ("sdpa", "reference")),
        ("sage", (), ("sdpa", "reference")),
        ("kitchen", (), ("sdpa", "reference")),
        ("interval", (), ("sdpa", "reference")),
        ("sdpa", (), ("reference",)),
        ("reference", (), ()),
    ],
)
def test_attention_is_changed_step_by_step_and_not_for_itself(caplog, backend, shown, tried):
    generator = make()
    broken = generator.denoiser = _Broken(generator.denoiser, NAN, backend=backend, shown=shown)
    with pytest.raises(ReasonEditError, match="first step came out as NaN or infinity.*also with plain attention"):
        lately(generator)
    assert broken.took == [backend, *tried]
    assert broken.backend == backend, "the attention was not the reason"
    assert ("which is slow and takes much memory" in caplog.text) == ("reference" in tried)


@pytest.mark.parametrize("right", ["sdpa", "reference"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("value", [NAN, 0.0])
def test_the_pass_without_the_instruction_is_looked_at_too(value, batched, right):
    """A NaN in it alone would be seen after the step only, where nothing can be made again."""
    generator = make(batched_cfg=batched)
    wanted = lately(generator)
    which = {"sample": 1} if batched else {"which": (1, 2)}
    broken = generator.denoiser = _Broken(generator.denoiser, value, (right,), shown=("interval",), **which)
    torch.testing.assert_close(lately(generator), wanted)
    again = ["sdpa"] if right == "sdpa" else ["sdpa", "reference"]
    first, rest = (["auto"], [right]) if batched else (["auto", "auto"], [right, right])
    assert broken.took == [*first, *again, *rest]


def test_the_device_is_waited_for_once_per_pass(monkeypatch):
    generator, looks = make(), []
    true = module._fault
    monkeypatch.setattr(module, "_fault", lambda velocity: looks.append(1) or true(velocity))
    for guidance, passes in ((1.0, 1), (4.0, 2)):
        looks.clear()
        run(generator, request(steps=3, guidance=guidance))
        assert len(looks) == passes
    generator.batched_cfg = True
    looks.clear()
    run(generator, request(steps=3))
    assert len(looks) == 1
    reads = []
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__float__"):
            read = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda self, read=read, name=name: reads.append(name) or read(self))
        true(torch.randn(2, 3, 4))
    assert reads == ["tolist"]


def test_an_untrained_network_keeps_its_attention():
    generator = make()
    broken = generator.denoiser = _Broken(generator.denoiser, 0.0, shown=("interval",))
    assert lately(generator).isfinite().all() and broken.backend == "auto"


def test_a_host_is_gone_past_and_what_it_prepared_is_forgotten(caplog):
    """The host's attention is set on the denoiser; a text is prepared by it before the first step."""
    generator = make()
    wanted, calls = lately(generator), []

    def host(q, k, v, mask):
        calls.append(1)
        return torch.full_like(q, NAN)

    generator.denoiser.host = host
    generator.denoiser.forget()
    torch.testing.assert_close(lately(generator), wanted)
    assert "with attention auto: trying sdpa" in caplog.text and generator.denoiser.backend == "sdpa"
    asked = len(calls)
    torch.testing.assert_close(lately(generator), wanted)
    assert calls and len(calls) == asked, "the host is not asked again"


def test_plain_attention_that_does_not_fit_says_what_was_wrong():
    generator = make()
    broken = generator.denoiser = _Broken(generator.denoiser, NAN, backend="sdpa")
    forward = broken.inner.__call__

    def inner(*call, **options):
        if broken.backend == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*call, **options)

    broken.inner = inner
    with pytest.raises(ReasonEditError, match="first step came out as NaN or infinity"):
        lately(generator)


def test_large_values_of_half_precision_are_no_fault():
    """Their distance is beyond what float16 can say."""
    assert module._fault(torch.tensor([[[-6e4], [6e4]]], dtype=torch.float16)) is None
    assert module._fault(torch.tensor([[[1.0], [2.0]], [[3.0], [3.0]]])) == "one value everywhere"
    assert module._fault(torch.tensor([[[1.0], [2.0]], [[3.0], [-NAN]]])) == "NaN or infinity"
