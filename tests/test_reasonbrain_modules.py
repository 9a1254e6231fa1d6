"""FRCE, token assembler, QFormer and CME alone: shapes, sizes, masks, order, zero start, and every switch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.models.reasonbrain.assembler import assemble
from reasonedit.reasonedit_core.models.reasonbrain.cme import CME
from reasonedit.reasonedit_core.models.reasonbrain.frce import FRCE
from reasonedit.reasonedit_core.models.reasonbrain.qformer import QFormer
from reasonedit.reasonedit_core.models.reasonbrain.spec import PLAIN, PRESETS, BrainSpec, Switches
from reasonedit.tests.brains import TINY, padded, random_features, tiny_brain

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def unzeroed(brain):
    """The zero-initialised projections given values, so that what passes them can be seen."""
    with torch.no_grad():
        for name, p in brain.named_parameters():
            if ".latent." in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return brain


@pytest.mark.parametrize(("preset", "frce", "cme"), [("7b", 82, 45), ("3b", 41, 22)])
def test_sizes_of_table_a4(preset, frce, cme):
    with torch.device("meta"):
        modules = FRCE(PRESETS[preset]), CME(PRESETS[preset])
    assert [round(count(module) / 1e6) for module in modules] == [frce, cme]


def test_sizes_of_the_qformer():
    with torch.device("meta"):
        model = QFormer(PRESETS["7b"]).model
    assert round(count(model) / 1e6, 2) == 64.96


def test_shapes_of_every_row():
    brain, features, b = tiny_brain(), random_features(batch=2), 2
    cues = brain.cues(features)
    assert cues.visual.shape == (b, 16 + 5, 32) and cues.textual.shape == (b, 3, 32)
    assert [part.shape for part, _ in brain.parts(cues)] == [(b, 21, 48), (b, 3, 48)]
    states = torch.randn(b, 32, 48)
    assert brain.qformer(states).shape == (b, 77, 24)
    out = brain.enhance(states, features, cues)
    assert out.context.shape == (b, 154, 24) and out.map.shape == (b, 32, 4, 4) and out.vector.shape == (b, 32)


def test_patches_can_be_merged():
    spec = replace(TINY, merge=2)
    brain = tiny_brain(spec=spec, region_branch=False)
    features = random_features(spec)
    assert brain.cues(features).visual.shape == (1, 4, 32)
    # The first merged patch is made of tokens 0, 1, 4, 5 of the 4 x 4 grid and of no other.
    taps = features.taps.clone().requires_grad_()
    brain.frce.visual.patches.blocks = torch.nn.ModuleList()
    brain.frce.visual.patches(taps)[0, 0].square().sum().backward()
    assert taps.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_padding_changes_nothing():
    brain, features = unzeroed(tiny_brain()), random_features()
    states = torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(1))
    plain, more = brain.cues(features), brain.cues(padded(features))
    assert torch.allclose(more.visual[:, :21], plain.visual, **CLOSE)
    assert torch.allclose(more.textual[:, :3], plain.textual, **CLOSE)
    a, b = brain.enhance(states, features, plain), brain.enhance(states, padded(features), more)
    for name in ("context", "map", "vector"):
        assert torch.allclose(getattr(a, name), getattr(b, name), **CLOSE), name


def test_the_order_of_regions_says_nothing_and_their_geometry_does():
    brain, features = unzeroed(tiny_brain()), random_features()
    states, order = torch.randn(1, 32, 48), torch.tensor([3, 0, 4, 1, 2])
    moved = replace(features, masks=features.masks[:, order], geometry=features.geometry[:, order])
    alone = replace(features, masks=features.masks[:, order])
    one, two, three = (brain.enhance(states, f, brain.cues(f)) for f in (features, moved, alone))
    assert torch.allclose(one.map, two.map, atol=1e-5) and torch.allclose(one.context, two.context, atol=1e-5)
    assert not torch.allclose(one.map, three.map, atol=1e-4)


def test_the_map_lies_as_the_picture_does():
    """Row by row: what one ViT token alone changes is strongest at its own place of the map."""
    brain, features = unzeroed(tiny_brain()), random_features()
    states = torch.randn(1, 32, 48)
    cues = brain.cues(features)
    image = features.image.clone()
    image[:, 4 * 2 + 3] += 5 * torch.randn(32, generator=torch.Generator().manual_seed(2))  # row 2, column 3
    brain.cme.visual.ca3 = None  # otherwise one token changes all places, through V̄
    moved = brain.enhance(states, replace(features, image=image), cues).map - brain.enhance(states, features, cues).map
    assert moved[0].abs().sum(0).nonzero().tolist() == [[2, 3]]


def test_the_denoiser_is_left_alone_at_the_start():
    brain, features = tiny_brain(), random_features()
    out = brain.enhance(torch.randn(1, 32, 48), features, brain.cues(features))
    assert not out.map.any() and not out.vector.any() and out.context.std() > 0.5


def test_everything_moves_from_the_first_step_on():
    """At step 0 only the zero projections bar the way to CA4 and CA5; from step 1 on every parameter has a gradient."""
    brain, features = tiny_brain().train(), random_features(batch=2)
    states = torch.randn(2, 32, 48)
    optimizer = torch.optim.SGD(brain.parameters(), lr=0.1)

    def backward():
        optimizer.zero_grad()
        cues = brain.cues(features)
        out = brain.enhance(states, features, cues)
        parts = sum((part * torch.arange(part.shape[-1])).sin().sum() for part, _ in brain.parts(cues))
        (out.context.sin().sum() + out.map.sin().sum() * 3 + (out.vector - 1).square().sum() + parts).backward()

    backward()
    assert not brain.cme.visual.ca5.attention.q.weight.grad.any() and not brain.cme.textual.ca4.attention.q.weight.grad.any()
    optimizer.step()
    backward()
    still = [name for name, p in brain.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_without_a_region_nothing_is_invented():
    brain, features = tiny_brain(), random_features(batch=2)
    none = replace(features, region_keep=torch.tensor([[True] * 5, [False] * 5]))
    with pytest.raises(ConfigError, match="at least one valid region.*number 1 of the batch.*grid"):
        brain.cues(none)
    with pytest.raises(ConfigError, match="at least one object.*number 0"):
        brain.cues(replace(features, objects=features.objects[:, :0], object_keep=features.object_keep[:, :0]))
    with pytest.raises(ConfigError, match="Segment the picture first"):
        brain.cues(replace(features, masks=None))
    cues = tiny_brain(region_branch=False).cues(none)  # does not look at regions
    assert cues.visual.isfinite().all()


def test_an_empty_mask_gives_numbers_not_nan():
    features = random_features()
    features.masks[0, 2] = 0
    assert tiny_brain().cues(features).visual.isfinite().all()


SHAPES = {  # switch -> tokens of R_V, tokens of the context, map?, vector?
    "patch_branch": (5, 154, True, True),
    "region_branch": (16, 154, True, True),
    "id_controller": (21, 154, True, True),
    "vision_enhancer": (21, 77, False, True),
    "text_enhancer": (21, 77, True, False),
    "cme_bidirectional": (21, 154, True, True),
}


@pytest.mark.parametrize("switch", SHAPES)
def test_each_switch_takes_its_part_out(switch):
    full, off, features = tiny_brain(), tiny_brain(**{switch: False}), random_features()
    tokens, context, spread, vector = SHAPES[switch]
    cues = off.cues(features)
    out = off.enhance(torch.randn(1, 32, 48), features, cues)
    assert cues.visual.shape[1] == tokens and out.context.shape[1] == context
    assert (out.map is not None, out.vector is not None) == (spread, vector)
    assert set(off.state_dict()) < set(full.state_dict()), "a part that is off has no weights, and no others come in"


def test_without_id_controller_the_picture_is_not_looked_at():
    features = random_features()
    other = replace(features, taps=features.taps + 1, image=features.image - 1)
    off, full = tiny_brain(id_controller=False), tiny_brain()
    assert torch.equal(off.cues(features).textual, off.cues(other).textual)
    assert not torch.allclose(full.cues(features).textual, full.cues(other).textual, atol=1e-4)


def test_one_way_enhancer_gives_the_context_no_details():
    states, features = torch.randn(1, 32, 48), random_features()
    other = random_features(seed=1)
    for both, same in ((True, False), (False, True)):
        brain = tiny_brain(cme_bidirectional=both)
        a, b = (brain.enhance(states, f, brain.cues(f)).context for f in (features, other))
        assert torch.allclose(a, b, **CLOSE) is same


def test_plain_and_simple():
    features, states = random_features(), torch.randn(1, 32, 48)
    plain = tiny_brain(**{name: getattr(PLAIN, name) for name in ("patch_branch", "region_branch", "id_controller", "cme")})
    assert plain.cues(features) is None and plain.parts(None) == () and not list(plain.cme.parameters())
    out = plain.enhance(states, features, None)
    assert torch.equal(out.context, plain.qformer(states)) and out.map is None and out.vector is None
    simple = tiny_brain(cme="simple_ca")
    out = simple.enhance(states, features, simple.cues(features))
    assert out.context.shape == (1, 16, 24) and out.map is None
    off = tiny_brain(vision_enhancer=False, text_enhancer=False)
    assert torch.equal(off.enhance(states, features, off.cues(features)).context, off.qformer(states))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Switches(patch_branch=False, region_branch=False), "found both off.*plain model"),
        (lambda: Switches(cme="half"), "full, simple_ca, none, found 'half'"),
        (lambda: BrainSpec(frce=100, frce_heads=3), "frce: expected a width that its heads divide, found 100 and 3"),
        (lambda: BrainSpec(merge=5), "divisor of the grid of 24, found 5"),
        (lambda: BrainSpec(taps=(0.5, 1.5)), "fractions"),
    ],
)
def test_what_cannot_be_built_is_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_rows_are_closed_up_and_end_together():
    a, b = torch.arange(1.0, 4.0).view(1, 3, 1), torch.arange(4.0, 8.0).view(1, 4, 1)
    keep_a, keep_b = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False, True]])
    tokens, keep, positions = assemble([(a, keep_a), (b, keep_b)])
    assert tokens.flatten().tolist() == [1, 3, 4, 5, 7] and keep.all() and positions.tolist() == [[0, 1, 2, 3, 4]]
    none = torch.full_like(a, float("nan"))
    two = [(torch.cat([a, none]), torch.cat([keep_a, keep_a & False])), (b.repeat(2, 1, 1), keep_b.repeat(2, 1))]
    tokens, keep, positions = assemble(two)
    assert tokens[0].flatten().tolist() == [1, 3, 4, 5, 7]
    assert tokens[1].flatten().tolist() == [0, 0, 4, 5, 7] and keep[1].tolist() == [False, False, True, True, True]
    assert positions[1].tolist() == [0, 0, 0, 1, 2]


def test_a_blip2_checkpoint_gives_what_fits(tmp_path):
    donor, own = tiny_brain(seed=1).qformer, tiny_brain(seed=2).qformer
    state = {f"qformer.{key}": value.clone() for key, value in donor.model.state_dict().items()}
    wide = "qformer.encoder.layer.0.crossattention.attention.key.weight"
    wide = wide if wide in state else next(k for k in state if "cross" in k and state[k].shape[-1] == 48)
    state[wide] = torch.zeros(24, 1408)
    del state["qformer.layernorm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    taken = own.init_from_blip2(tmp_path)
    assert taken.differing == (wide.removeprefix("qformer."),) and taken.missing == ("layernorm.bias",)
    assert len(taken.copied) == len(state) - 1
    assert all(torch.equal(own.model.state_dict()[name], donor.model.state_dict()[name]) for name in taken.copied)
    save_file({"vision.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected BLIP-2 weights"):
        own.init_from_blip2(tmp_path)
