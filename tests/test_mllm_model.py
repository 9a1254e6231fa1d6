"""QwenVL against the stock transformers model and processor: prompts, embeddings, states; what is kept and what is not."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.qwen25vl import FEATURES_KEPT, VISION_BLOCK
from reasonedit.reasonedit_core.types import Counts
from reasonedit.tests.tiny import tiny_checkpoint

MODERN = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 40}


@pytest.fixture(scope="module")
def folder():
    return tiny_checkpoint("qwen2.5-vl")


@pytest.fixture
def mllm(folder):
    return load_mllm(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def stock(folder):
    """(model, processor) as transformers loads them."""
    pytest.importorskip("torchvision", reason="the HF processor needs torchvision")
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, local_files_only=True).float().eval()
    bounds = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40}} if MODERN else BOUNDS
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True, **bounds)


def picture(seed=0, height=90, width=140):
    values = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.float() / 255


def pil(image):
    return Image.fromarray((image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def as_content(parts, images):
    return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": images[p]} for p in parts]


@pytest.mark.parametrize("add_vision_id", [False, True])
@pytest.mark.parametrize("system", [None, "You judge."])
@pytest.mark.parametrize("parts", [("just text",), (0, " make it red!"), ("from ", 0, "to", 1, "\nok?")])
def test_prompt_equals_that_of_the_template_with_a_list(mllm, parts, system, add_vision_id):
    messages = [{"role": "user", "content": as_content(parts, ["a", "b"])}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    expected = mllm.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, add_vision_id=add_vision_id
    )
    assert mllm.render(system, parts, n_images=2, add_vision_id=add_vision_id) == expected


def test_prompt_without_a_template_is_the_plain_dialogue_format(mllm):
    mllm.tokenizer.chat_template = None
    assert mllm.render("S", ["a", 0], n_images=1) == (
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na{VISION_BLOCK}<|im_end|>\n<|im_start|>assistant\n"
    )
    silent = mllm.render(None, ["a"], n_images=0, generation_prompt=False)
    assert silent.startswith("<|im_start|>system\n") and silent.endswith("a<|im_end|>\n")


def test_picture_index_out_of_range_is_named(mllm):
    with pytest.raises(ConfigError, match=r"0\.\.0, found 1"):
        mllm.render(None, [1], n_images=1)


@pytest.mark.parametrize("n_images", [1, 2])
def test_states_equal_the_stock_model(mllm, stock, n_images):
    """Ids, embeddings and states of processor and model, which under transformers 5 take token types along."""
    model, processor = stock
    images = [picture(0), picture(1, 70, 60)][:n_images]
    parts = ["Look! ", *range(n_images), ' write "OPEN" on it']
    text = mllm.render("Be brief.", parts, n_images=n_images)
    inputs = processor(text=[text], images=[pil(image) for image in images], return_tensors="pt")
    assert ("mm_token_type_ids" in inputs) == MODERN
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
    features = [mllm.vision(image, **BOUNDS) for image in images]
    ids = mllm.tokenize(text)
    assert mllm.expand(ids, features) == inputs["input_ids"][0].tolist()
    embeds = mllm.embed(ids, features)
    assert torch.allclose(embeds, expected.hidden_states[0], atol=1e-5)
    states = mllm.states(embeds, mllm.positions(ids, features))
    assert states.shape == expected.hidden_states[-1].shape
    assert (states - expected.hidden_states[-1]).abs().max() < 1e-5
    assert (mllm.model.lm_head(states) - expected.logits).abs().max() < 1e-5


def test_states_do_not_depend_on_the_use_cache_default(mllm):
    """Jumps in 3-D positions must not be read as borders of packed documents (transformers 4.55 without a cache)."""
    features = [mllm.vision(picture(), **BOUNDS)]
    ids = mllm.tokenize(mllm.render(None, [0, "abc"], n_images=1))
    embeds, positions = mllm.embed(ids, features), mllm.positions(ids, features)
    changed = embeds.clone()
    changed[:, 0] += 1
    difference = mllm.states(changed, positions) - mllm.states(embeds, positions)
    assert (difference.abs().amax(-1) > 1e-6).all(), "the last token must still see the first one"


def test_tokens_that_are_not_shown_are_not_seen(mllm):
    ids = mllm.tokenize(mllm.render(None, ["what a! day"], n_images=0))
    shown = torch.tensor(ids) != 0
    embeds, positions = mllm.embed(ids), mllm.positions(ids)
    changed = embeds.clone()
    changed[:, ~shown] += 1
    plain, hidden = (mllm.states(e, positions, shown=shown) for e in (embeds, changed))
    assert torch.equal(plain[:, shown], hidden[:, shown])
    assert not torch.allclose(plain[:, -1], mllm.states(embeds, positions)[:, -1], atol=1e-5)
    expected = mllm.model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=shown[None].long()
    ).last_hidden_state
    assert torch.allclose(plain[:, shown], expected[:, shown], atol=1e-6)
    assert torch.equal(mllm.states(embeds, positions, shown=torch.ones_like(shown)), mllm.states(embeds, positions))


def test_expanded_and_compact_ids_give_the_same(mllm):
    features = [mllm.vision(picture(), **BOUNDS), mllm.vision(picture(1), **BOUNDS)]
    ids = mllm.tokenize(mllm.render(None, [0, "! and ", 1], n_images=2))
    masked = [token == 0 for token in ids]
    full = mllm.expand(ids, features)
    assert mllm.expand(full, features) == full and len(full) == len(ids) - 2 + sum(len(f.tokens) for f in features)
    assert torch.equal(mllm.embed(ids, features), mllm.embed(full, features))
    full_masked = [token == 0 for token in full]
    assert sum(full_masked) == 1
    assert torch.equal(mllm.positions(ids, features, masked), mllm.positions(full, features, full_masked))
    assert not torch.equal(mllm.positions(ids, features, masked), mllm.positions(ids, features))


def test_a_control_token_in_the_text_is_named(mllm):
    features = [mllm.vision(picture(), **BOUNDS)]
    ids = mllm.tokenize(mllm.render(None, [0, "put an <|image_pad|> here"], n_images=1))
    with pytest.raises(ConfigError, match=r"one <\|image_pad\|> per picture"):
        mllm.embed(ids, features)


def test_a_picture_is_encoded_once_per_size(mllm):
    mllm.counts = counts = Counts()
    first = mllm.vision(picture(), **BOUNDS)
    assert mllm.vision(picture(), **BOUNDS).tokens is first.tokens
    assert mllm.vision(picture(), min_pixels=28 * 28 * 30, max_pixels=28 * 28 * 40).grid != first.grid
    mllm.vision(picture(1), **BOUNDS)
    assert counts.vision_passes == 3
    mllm.release()
    mllm.vision(picture(), **BOUNDS)
    assert counts.vision_passes == 4


def test_kept_features_are_bounded(mllm):
    for seed in range(FEATURES_KEPT + 1):
        mllm.vision(picture(seed, 56, 56), **BOUNDS)
    passes = mllm.counts.vision_passes
    mllm.vision(picture(FEATURES_KEPT, 56, 56), **BOUNDS)
    assert mllm.counts.vision_passes == passes == FEATURES_KEPT + 1
    mllm.vision(picture(0, 56, 56), **BOUNDS)  # the oldest was let go
    assert mllm.counts.vision_passes == passes + 1


def test_the_model_keeps_no_state(mllm):
    features = [mllm.vision(picture(), **BOUNDS)]
    ids = mllm.tokenize(mllm.render(None, [0, "x"], n_images=1))
    mllm.states(mllm.embed(ids, features), mllm.positions(ids, features))
    assert mllm.model.model.rope_deltas is None


def test_widths(mllm):
    assert (mllm.hidden_size, mllm.dtype, mllm.device.type) == (64, torch.float32, "cpu")
    assert mllm.bounds == (56 * 56, 28 * 28 * 16384) and mllm.can_generate
