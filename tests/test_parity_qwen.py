"""ReasonEdit-Q against the installed diffusers, live, on tiny checkpoints in the released layout (fp32).

What is compared: prompt embeddings, one transformer call, and pictures from end to end for the same seed. The stock
pipelines are given the token types that they forget under transformers 5 (`truthful_positions`); nothing else is changed
but the areas 1024^2 and 384^2, which are replaced by small ones on both sides.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import shutil
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from reasonedit.reasonedit_core import flow, images
from reasonedit.reasonedit_core.conditioners.qwen_image import QwenImageConditioner
from reasonedit.reasonedit_core.denoisers.qwen_image import QwenImageDenoiser
from reasonedit.reasonedit_core.generator import FlowGenerator
from reasonedit.reasonedit_core.geometry import QwenGeometry
from reasonedit.reasonedit_core.latents import QwenCodec, draw_normal, pack, pack_image
from reasonedit.reasonedit_core.mllm.qwen25vl import QwenVL
from reasonedit.reasonedit_core.types import Conditioning, Counts, EditRequest
from reasonedit.tests.tiny import tiny_checkpoint

LEVEL, CONDITION_AREA = 96, 64 * 64
BOUNDS = (56 * 56, 28 * 28 * 16384)  # what the tiny checkpoints' processor config states
STD = 0.2  # with the builder's 0.05 the text has no visible effect, see test_pictures_depend_on_what_they_should
SIZES = [(97, 61), (50, 83), (64, 64)]  # (width, height)

ENGLISH = "Make the \"left\" cube 'blue'!"
CHINESE = "把天空变成“星夜”！"


def load_stock(system, dtype=torch.float32):
    return _load_stock(system, dtype)


@functools.cache
def _load_stock(system, dtype):
    import diffusers
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = "QwenImageEditPipeline" if system == "qwen-edit" else "QwenImageEditPlusPipeline"
    pipe = getattr(diffusers, name).from_pretrained(tiny_checkpoint(system, std=STD), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    head = pipe.prompt_template_encode.partition("{}")[0].partition("<|vision_start|>")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(head)["input_ids"])
    return pipe


def make_ours(system, dtype=torch.float32):
    """Our generator around the modules of the stock pipeline; the transformer is a copy, as we replace its attention."""
    return _make_ours(system, dtype)


@functools.cache
def _make_ours(system, dtype):
    pipe, counts, plus = load_stock(system, dtype), Counts(), system != "qwen-edit"
    mllm = QwenVL(pipe.text_encoder, pipe.tokenizer, counts=counts)
    return FlowGenerator(
        QwenImageConditioner(mllm, plus=plus, min_pixels=BOUNDS[0], max_pixels=BOUNDS[1]),
        QwenImageDenoiser(copy.deepcopy(pipe.transformer), counts=counts),
        QwenCodec(pipe.vae),
        flow.FlowSchedule.from_config(pipe.scheduler.config),
        geometry=QwenGeometry(plus, condition_area=CONDITION_AREA),
        combine=flow.combine_qwen,
        default_negative=" ",
        counts=counts,
    )


def make_picture(size, seed):
    """A smooth random picture (1, 3, H, W) with values k / 255."""
    rng = np.random.default_rng(seed)
    image = images.to_pil(torch.from_numpy(rng.random((1, 3, 6, 6), dtype=np.float32)))
    return images.from_pil(image.resize(size, 3))


def needs_types(text_encoder):
    """Whether this transformers places pictures by token types, which the pipelines do not pass on."""
    return "mm_token_type_ids" in inspect.signature(type(text_encoder.model).get_rope_index).parameters


@contextmanager
def truthful_positions(text_encoder):
    """Give the token types that the pipelines drop; transformers before 5 needs none."""
    stock = text_encoder.forward
    if not needs_types(text_encoder):
        yield
        return

    def forward(input_ids=None, **kwargs):
        types = (input_ids == text_encoder.config.image_token_id).int()
        return stock(input_ids=input_ids, mm_token_type_ids=types, **kwargs)

    text_encoder.forward = forward
    try:
        yield
    finally:
        del text_encoder.forward


@pytest.fixture
def small_areas(monkeypatch):
    """Replace the released areas, which are constants of the pipelines' modules, by small ones."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        stock = module.calculate_dimensions
        monkeypatch.setattr(
            module,
            "calculate_dimensions",
            lambda area, ratio, stock=stock: stock(LEVEL * LEVEL if area == 1024 * 1024 else area, ratio),
        )
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", CONDITION_AREA)


def stock_picture(system, pictures, instruction, *, steps, guidance, seed, negative=" ", dtype=torch.float32):
    pipe = load_stock(system, dtype)
    shown = [images.to_pil(picture) for picture in pictures]
    with truthful_positions(pipe.text_encoder):
        made = pipe(
            image=shown if system != "qwen-edit" else shown[0],
            prompt=instruction,
            negative_prompt=negative if guidance > 1 else None,
            true_cfg_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    return images.from_pil(made)


def our_picture(system, pictures, instruction, *, steps, guidance, seed, negative=None, batched=False, dtype=torch.float32):
    generator = copy.copy(make_ours(system, dtype))
    generator.batched_cfg = batched
    request = EditRequest(
        pictures[0],
        instruction,
        steps=steps,
        guidance=guidance,
        size_level=LEVEL,
        negative=negative,
        references=tuple(pictures[1:]),
    )
    rng = torch.Generator().manual_seed(seed)
    return generator.edit(request, pictures[0], instruction, rng, released=True).image


def difference(one, other):
    """(mean, max) in levels of 255."""
    assert one.shape == other.shape
    gap = (one - other).abs() * 255
    return gap.mean().item(), gap.max().item()


CASES = {
    "edit, guidance": ("qwen-edit", 1, ENGLISH, 4.0),
    "edit, Chinese, no guidance": ("qwen-edit", 1, CHINESE, 1.0),
    "plus, one picture, guidance": ("qwen-edit-plus", 1, ENGLISH, 4.0),
    "plus, two pictures, guidance": ("qwen-edit-plus", 2, CHINESE, 4.0),
    "plus, three pictures, no guidance": ("qwen-edit-plus", 3, "!", 1.0),
    "2511, two pictures, guidance": ("qwen-edit-2511", 2, ENGLISH, 4.0),
}


def make_pictures(n):
    return [make_picture(size, seed) for seed, size in enumerate(SIZES[:n])]


@pytest.mark.parametrize("name", CASES)
def test_picture_equals_the_pipeline(name, small_areas):
    system, n, instruction, guidance = CASES[name]
    pictures = make_pictures(n)
    run = dict(steps=3, guidance=guidance, seed=7)
    expected = stock_picture(system, pictures, instruction, **run)
    mean, largest = difference(our_picture(system, pictures, instruction, **run), expected)
    assert mean < 0.05 and largest <= 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [(97, 61), (33, 200), (500, 40), (28, 28), (1, 1)], ids=str)
@pytest.mark.parametrize("system", ["qwen-edit", "qwen-edit-plus", "qwen-edit-2511"])
def test_picture_equals_the_pipeline_at_odd_sizes(system, size, small_areas):
    pictures = [make_picture(size, 3)] + ([] if system == "qwen-edit" else [make_picture((61, 97), 4)])
    for instruction, guidance in ((ENGLISH, 4.0), (CHINESE, 2.5), ("!", 1.0)):
        run = dict(steps=3, guidance=guidance, seed=11)
        expected = stock_picture(system, pictures, instruction, **run)
        mean, largest = difference(our_picture(system, pictures, instruction, **run), expected)
        assert mean < 0.05 and largest <= 2


def test_batched_guidance_and_a_stated_negative_prompt(small_areas):
    """Both passes as one padded batch of two; the negative prompt is much shorter than the instruction."""
    system, pictures = "qwen-edit-2511", make_pictures(1)
    run = dict(steps=2, guidance=3.0, seed=1, negative="blurred")
    expected = stock_picture(system, pictures, ENGLISH, **run)
    mean, largest = difference(our_picture(system, pictures, ENGLISH, batched=True, **run), expected)
    assert mean < 0.05 and largest <= 2


def test_lightning_schedule(small_areas, monkeypatch):
    """A scheduler_config.json of the distilled kind: one shift, no stretched end, four steps, no guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    system, pictures = "qwen-edit-plus", make_pictures(1)
    changed = {"base_shift": 1.0986122886681098, "max_shift": 1.0986122886681098, "shift_terminal": None}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(load_stock(system).scheduler.config) | changed)
    monkeypatch.setattr(load_stock(system), "scheduler", scheduler)
    schedule = flow.FlowSchedule.from_config(scheduler.config)
    monkeypatch.setattr(make_ours(system), "schedule", schedule)
    assert schedule == flow.LIGHTNING
    run = dict(steps=4, guidance=1.0, seed=2)
    expected = stock_picture(system, pictures, ENGLISH, **run)
    mean, largest = difference(our_picture(system, pictures, ENGLISH, **run), expected)
    assert mean < 0.05 and largest <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_rounds_where_the_pipeline_rounds(dtype, small_areas):
    """Noise, timestep, latents between steps and guidance are rounded at the same places, so the pictures still agree."""
    run = dict(steps=3, guidance=4.0, seed=7, dtype=dtype)
    expected = stock_picture("qwen-edit-2511", make_pictures(1), ENGLISH, **run)
    mean, largest = difference(our_picture("qwen-edit-2511", make_pictures(1), ENGLISH, **run), expected)
    assert mean < 0.05 and largest <= 2


def test_one_step_gives_a_picture():
    """The released schedule divides 0 by 0 at one step; ours must not."""
    made = our_picture("qwen-edit", make_pictures(1), ENGLISH, steps=1, guidance=1.0, seed=0)
    assert torch.isfinite(made).all() and made.std() > 0.01


def test_pictures_depend_on_what_they_should(monkeypatch):
    """Were the text or a reference without effect at these sizes, the comparisons above would prove nothing."""
    system, pictures = "qwen-edit-plus", make_pictures(2)
    run = dict(steps=3, guidance=4.0, seed=7)
    base = our_picture(system, pictures, ENGLISH, **run)
    assert difference(base, our_picture(system, pictures, CHINESE, **run))[0] > 1
    assert difference(base, our_picture(system, pictures, ENGLISH, steps=3, guidance=1.0, seed=7))[0] > 1
    assert difference(base, our_picture(system, [pictures[0], make_picture(SIZES[1], 9)], ENGLISH, **run))[0] > 1
    mllm = make_ours(system).conditioner.mllm
    flat = lambda ids, features: torch.arange(len(mllm.expand(ids, features))).expand(3, 1, -1)  # noqa: E731
    monkeypatch.setattr(mllm, "positions", flat)
    assert difference(base, our_picture(system, pictures, ENGLISH, **run))[0] > 1


def encode_stock(pipe, pictures, text, *, truthful=True):
    shown = [images.to_pil(picture) for picture in pictures]
    with truthful_positions(pipe.text_encoder) if truthful else nullcontext():
        with torch.no_grad():
            tokens, mask = pipe.encode_prompt(text, image=shown if len(shown) > 1 else shown[0])
    return tokens, mask


TEXTS = {"en": ENGLISH, "zh": CHINESE, "space": " ", "empty": "", "!": "!", "lines": "a\n\nb  c"}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("system", "n"), [("qwen-edit", 1), ("qwen-edit-plus", 1), ("qwen-edit-plus", 3)])
def test_embeddings_equal_the_pipeline(system, n, text):
    pipe, conditioner, pictures = load_stock(system), make_ours(system).conditioner, make_pictures(n)
    expected, mask = encode_stock(pipe, pictures, text)
    with torch.no_grad():
        made = conditioner.condition(pictures[0], text, grid=(2, 2), references=pictures[1:])
    assert mask is None and made.mask is None
    assert made.tokens.shape == expected.shape
    assert (made.tokens - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert conditioner.drop == pipe.prompt_template_encode_start_idx == 320


def test_positions_are_three_dimensional_whatever_the_pipeline_does():
    """The stock pipelines lose the pictures' 3-D positions under transformers 5, silently; our embeddings keep them."""
    system = "qwen-edit-plus"
    pipe, conditioner, pictures = load_stock(system), make_ours(system).conditioner, make_pictures(1)
    stock, _ = encode_stock(pipe, pictures, ENGLISH, truthful=False)
    right, _ = encode_stock(pipe, pictures, ENGLISH)
    with torch.no_grad():
        made = conditioner.condition(pictures[0], ENGLISH, grid=(2, 2)).tokens
        ids = conditioner.mllm.tokenize(conditioner.template.prompt(ENGLISH, 1))
        features = [conditioner.mllm.vision(pictures[0], min_pixels=BOUNDS[0], max_pixels=BOUNDS[1])]
        embeds = conditioner.mllm.embed(ids, features)
        flat = torch.arange(embeds.shape[1]).expand(3, 1, -1)
        flat_states = conditioner.mllm.states(embeds, flat)[:, conditioner.drop :]
    assert (made - right).abs().max() < 1e-4
    assert (made - flat_states).abs().max() > 0.1
    lost = needs_types(pipe.text_encoder)
    assert (stock - (flat_states if lost else right)).abs().max() < 1e-4


@pytest.mark.parametrize(("system", "n"), [("qwen-edit", 1), ("qwen-edit-plus", 2), ("qwen-edit-2511", 2)])
def test_prediction_equals_the_transformer_of_the_checkpoint(system, n):
    """One call on real conditioning, real reference latents and the pipeline's own noise."""
    pipe, ours, pictures = load_stock(system), make_ours(system), make_pictures(n)
    plan = ours.geometry.plan([(p.shape[-1], p.shape[-2]) for p in pictures], LEVEL)
    resized = [images.resize_lanczos_pil(p, *size) for p, size in zip(pictures, plan.vae, strict=True)]
    pixels = [(p * 2 - 1)[:, :, None] for p in resized]
    with torch.no_grad():
        noise, stock_references = pipe.prepare_latents(
            pixels if n > 1 else pixels[0],
            1,
            ours.codec.channels,
            plan.output[1],
            plan.output[0],
            torch.float32,
            "cpu",
            torch.Generator().manual_seed(3),
        )
        grid = (plan.output[1] // 16, plan.output[0] // 16)
        rng = torch.Generator().manual_seed(3)
        references = [pack_image(ours.codec.sample(ours.codec.encode(p[:, :, 0]), rng)) for p in pixels]
        shape = (1, ours.codec.channels, 2 * grid[0], 2 * grid[1])
        drawn = pack(draw_normal(shape, rng, dtype=torch.float32, device="cpu"))
        assert torch.equal(drawn, noise)  # nothing is drawn for the references
        found = torch.cat([r.tokens for r in references], 1)
        assert torch.allclose(found, stock_references, rtol=1e-4, atol=1e-5)  # two-dimensional convolutions
        tokens = ours.conditioner.condition(resized[0], ENGLISH, grid=grid, references=resized[1:]).tokens
        expected = pipe.transformer(
            hidden_states=torch.cat([noise, stock_references], 1),
            timestep=torch.tensor([0.58]),
            encoder_hidden_states=tokens,
            img_shapes=[[(1, *grid), *((1, r.height, r.width) for r in references)]],
            return_dict=False,
        )[0][:, : noise.shape[1]]
        found = ours.denoiser(drawn, torch.tensor([0.58]), Conditioning(tokens), grid=grid, references=references)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def test_calls_are_counted():
    """Two rounds on one picture with guidance: the picture is seen once by each encoder."""
    generator, picture = make_ours("qwen-edit-plus"), make_picture((90, 70), 21)
    counts, before = generator.counts, copy.copy(generator.counts)
    for seed in (1, 2):
        our_picture("qwen-edit-plus", [picture], ENGLISH, steps=3, guidance=4.0, seed=seed)
    assert counts.vision_passes - before.vision_passes == 1
    assert counts.vae_encodes - before.vae_encodes == 1
    assert counts.vae_decodes - before.vae_decodes == 2
    assert counts.denoiser_forwards - before.denoiser_forwards == 12


def test_default_policy_keeps_the_shape_of_the_source_and_chains_by_latents():
    generator, pictures = make_ours("qwen-edit-plus"), make_pictures(3)
    request = EditRequest(pictures[0], ENGLISH, steps=2, guidance=1.0, size_level=LEVEL, references=tuple(pictures[1:]))
    first = generator.edit(request, pictures[0], ENGLISH, torch.Generator().manual_seed(0))
    assert first.image.shape == pictures[0].shape
    assert first.generated.shape == (1, 3, 64, 128)  # the edited picture's own shape, not that of the last reference
    before = generator.counts.vae_encodes
    second = generator.edit(request, first.generated, CHINESE, torch.Generator().manual_seed(1), latents=first.latents)
    assert generator.counts.vae_encodes == before
    assert second.generated.shape == first.generated.shape and second.image.shape == pictures[0].shape


@pytest.mark.parametrize("system", ["qwen-edit", "qwen-edit-plus", "qwen-edit-2511"])
def test_picture_of_a_folder_loaded_by_us_equals_the_pipeline(system, small_areas, tmp_path):
    """Nothing is shared with the pipeline but the files: our loaders, and the condition area out of reasonedit.json."""
    from reasonedit.reasonedit_core.load import SystemSpec, load_system

    folder = tmp_path / system
    shutil.copytree(tiny_checkpoint(system, std=STD), folder)
    (folder / "reasonedit.json").write_text(json.dumps({"condition_area": CONDITION_AREA}))
    spec = SystemSpec("reasonedit-q", folder, reasoner="none", policy="released", dtype="float32", device="cpu")
    generator = load_system(spec).generator
    pictures = make_pictures(1 if system == "qwen-edit" else 2)
    request = EditRequest(pictures[0], CHINESE, steps=3, guidance=4.0, size_level=LEVEL, references=tuple(pictures[1:]))
    made = generator.edit(request, pictures[0], CHINESE, torch.Generator().manual_seed(5), released=True).image
    mean, largest = difference(made, stock_picture(system, pictures, CHINESE, steps=3, guidance=4.0, seed=5))
    assert mean < 0.05 and largest <= 2
