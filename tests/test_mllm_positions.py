"""M-RoPE positions: equal to transformers' own index, the released `!` quirk, and the trap of transformers 5."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.positions import next_position, rope_positions
from reasonedit.tests.tiny import tiny_checkpoint

MODERN = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
START, END, PAD, BANG = 259, 260, 262, 0


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(tiny_checkpoint("qwen2.5-vl"), dtype=torch.float32)


def block(height, width):
    """Placeholders of a picture of height x width tokens."""
    return [START, *[PAD] * (height * width), END]


LAYOUTS = {
    "text": ([5, 6, 7, 8], []),
    "bang": ([5, BANG, 7, BANG, BANG, 8], []),
    "one picture": ([5, 6, *block(2, 3), 7, 8], [(4, 6)]),
    "tall picture last": ([5, *block(5, 2)], [(10, 4)]),
    "picture first": ([*block(1, 4), 9, 9, 9], [(2, 8)]),
    "two pictures": ([5, *block(2, 2), 6, *block(3, 4), 7, 8, 9], [(4, 4), (6, 8)]),
    "bangs around pictures": ([BANG, 5, BANG, *block(2, 3), BANG, 6, *block(4, 2), 7, BANG], [(4, 6), (8, 4)]),
}


def theirs(mllm, ids, grids, mask=None):
    """transformers' own index under either signature."""
    tokens = torch.tensor([ids])
    grid_thw = torch.tensor([[1, *grid] for grid in grids]) if grids else None
    kwargs = {"attention_mask": mask if mask is None else torch.tensor([mask])}
    if MODERN:
        kwargs["mm_token_type_ids"] = (tokens == PAD).int()
    return mllm.model.model.get_rope_index(tokens, image_grid_thw=grid_thw, **kwargs)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_transformers(mllm, name):
    ids, grids = LAYOUTS[name]
    ours = rope_positions(ids, grids, image_token_id=PAD)
    assert ours.shape == (3, 1, len(ids))
    assert torch.equal(ours, theirs(mllm, ids, grids).reshape(3, 1, -1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_hidden_tokens_equal_what_the_released_mask_does(mllm, name):
    ids, grids = LAYOUTS[name]
    hidden = [token == BANG for token in ids]
    ours = rope_positions(ids, grids, image_token_id=PAD, hidden=hidden)
    expected = theirs(mllm, ids, grids, mask=[int(token > 0) for token in ids]).reshape(3, 1, -1)
    shown = ~torch.tensor(hidden)
    assert torch.equal(ours[:, :, shown], expected[:, :, shown])
    assert (ours[:, :, ~shown] == 1).all()
    if not MODERN:  # transformers 5 fills with 0; the released pipeline ran on 4.55
        assert torch.equal(ours, expected)


def test_by_hand():
    ids, grids = LAYOUTS["one picture"]
    ours = rope_positions(ids, grids, image_token_id=PAD)[:, 0]
    assert ours[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8]
    assert ours[1].tolist() == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8]
    assert ours[2].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]
    assert next_position(ours) == 9


def test_merge_one_takes_grids_in_tokens():
    ids, grids = LAYOUTS["two pictures"]
    merged = [(h // 2, w // 2) for h, w in grids]
    assert torch.equal(rope_positions(ids, merged, image_token_id=PAD, merge=1), rope_positions(ids, grids, image_token_id=PAD))


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([5, *block(2, 3)], [], "further placeholder"),
        ([5, 6], [(4, 6)], "placeholders for 0"),
        ([5, *block(2, 2)], [(4, 6)], "expected 6 placeholder tokens"),
    ],
)
def test_mismatches_are_named(ids, grids, message):
    with pytest.raises(ConfigError, match=message):
        rope_positions(ids, grids, image_token_id=PAD)


def test_the_model_is_never_left_to_find_positions_itself(mllm):
    """The trap: without explicit positions (or token types) transformers 5 gives a picture 1-D positions, silently."""
    image = torch.rand(1, 3, 112, 168, generator=torch.Generator().manual_seed(0))
    features = [mllm.vision(image, min_pixels=56 * 56, max_pixels=28 * 28 * 64)]
    ids = mllm.tokenize(mllm.render(None, [0, "make it red"], n_images=1))
    embeds = mllm.embed(ids, features)
    three = mllm.positions(ids, features)
    one = torch.arange(embeds.shape[1]).expand(3, 1, -1)
    assert features[0].grid == (4, 6) and not torch.equal(three, one)

    ours = mllm.states(embeds, three)
    language = mllm.model.model.language_model

    def stock(positions):
        return language(inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones(embeds.shape[:2]))[0]

    assert torch.allclose(ours, stock(three), atol=1e-6)
    assert not torch.allclose(ours, stock(one), atol=1e-3)

    tokens = torch.tensor([mllm.expand(ids, features)])
    from reasonedit.reasonedit_core.mllm.vision import preprocess

    patches = preprocess(image, min_pixels=56 * 56, max_pixels=28 * 28 * 64)
    bare = mllm.model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=patches.values,
        image_grid_thw=torch.tensor([[1, *patches.grid]]),
        output_hidden_states=True,
    ).hidden_states[-1]
    mllm.model.model.rope_deltas = None
    assert torch.allclose(bare, stock(one) if MODERN else ours, atol=1e-5)
