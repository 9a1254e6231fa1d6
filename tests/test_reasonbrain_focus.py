"""The options after SID and TAME: off they change no bit, on they change V; padding and what must stay are respected."""

from __future__ import annotations

import pytest
import torch

from reasonedit.reasonedit_core.conditioners.reasonbrain import ReasonBrainConditioner
from reasonedit.reasonedit_core.conditioners.text_states import load_text_states
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mllm.focus import ASKING, DROPPABLE, OTHER, Focus, focused_attention, least_attended
from reasonedit.reasonedit_core.mllm.llava import load_llava
from reasonedit.reasonedit_core.models.reasonbrain.assembler import assemble, assembled
from reasonedit.reasonedit_core.segmenters.regions import Regions
from reasonedit.tests.brains import tiny_brain, write_llava, write_text_encoder

WORDS = ["make it snow", "what would this look like after a long and very cold winter?"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    place = tmp_path_factory.mktemp("parts")
    llava = load_llava(write_llava(place / "llava", num_hidden_layers=4, num_key_value_heads=2))
    return ReasonBrainConditioner(tiny_brain(), llava, load_text_states(*write_text_encoder(place)))


@pytest.fixture(scope="module")
def features(chain):
    """Two pictures with 2 and 5 regions (the first of each is the background), 1 and 3 objects, and words of two lengths."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for count in (2, 5):
        geometry = torch.rand(count, 8, generator=rng)
        geometry[:, -1] = torch.arange(count) == 0
        found.append(Regions(torch.randint(0, 256, (count, 4, 4), generator=rng, dtype=torch.uint8), geometry))
    names = [["ice"], ["tree", "red house", "sky"]]
    return chain.features(torch.rand(2, 3, 40, 64, generator=rng), WORDS, objects=names, regions=found)


@torch.no_grad()
def run(chain, features, focus: Focus, rows=slice(None)):
    part = type(features)(**{name: getattr(features, name)[rows] for name in features.__dataclass_fields__})
    chain.llava.set_focus(focus)
    try:
        return chain.run(part, WORDS[rows], logits=True)
    finally:
        chain.llava.set_focus(Focus())


def test_off_changes_no_bit_and_the_own_loop_gives_the_same_states(chain, features):
    implementation = chain.llava.model.model.language_model.config._attn_implementation
    plain = run(chain, features, Focus())
    # So small a share hides no token, so small a gamma changes no score: only the loop and its attention are new.
    for focus in (Focus(token_select=1e-6), Focus(tame_gamma=1e-9)):
        assert torch.allclose(run(chain, features, focus).logits, plain.logits, atol=1e-4)
    again = run(chain, features, Focus())
    assert torch.equal(again.translated, plain.translated) and torch.equal(again.logits, plain.logits)
    assert chain.llava.model.model.language_model.config._attn_implementation == implementation


@pytest.mark.parametrize("focus", [Focus(token_select=0.5), Focus(tame_gamma=0.8), Focus(0.5, 0.8)])
def test_on_changes_v_and_padding_changes_nothing(chain, features, focus):
    plain, both = run(chain, features, Focus()), run(chain, features, focus)
    assert both.logits.isfinite().all() and not torch.allclose(both.logits, plain.logits, atol=1e-3)
    first = run(chain, features, focus, slice(0, 1))  # the shorter row, padded in the batch
    assert torch.allclose(both.logits[0], first.logits[0], atol=1e-4)


def test_gradients_flow_also_through_checkpointed_layers(chain, features):
    llava = chain.llava
    llava.set_focus(Focus(0.5, 0.8))
    grads = []
    try:
        for checkpointed in (False, True):
            if checkpointed:
                llava.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                llava.model.train()
            chain.brain.zero_grad()
            chain.run(features, WORDS).translated.square().sum().backward()
            grads.append(chain.brain.assembler.visual.weight.grad.clone())
    finally:
        llava.set_focus(Focus())
        llava.model.gradient_checkpointing_disable()
        llava.model.eval()
        chain.brain.zero_grad()
    assert grads[0].any() and torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_the_least_attended_are_hidden_and_nothing_that_must_stay():
    roles = torch.tensor([[OTHER, DROPPABLE, DROPPABLE, DROPPABLE, DROPPABLE, OTHER, ASKING, ASKING]] * 2)
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, :2] = False  # padding: three tokens are left that may be hidden
    attention = torch.zeros(2, 8, 8)
    attention[:, 6:] = torch.tensor([0.0, 0.3, 0.1, 0.4, 0.2, 0.0, 0.0, 0.0])
    attention[:, 2] = 9.0  # what the picture attends to does not count
    hidden = least_attended(attention, roles, keep, 0.5)
    assert hidden.nonzero().tolist() == [[0, 2], [0, 4], [1, 2]]
    assert torch.equal(least_attended(attention, roles, keep, 1.0), (roles == DROPPABLE) & keep)
    assert not least_attended(attention, roles, keep, 0.2).any()


def test_regions_of_objects_and_their_names_stay(chain, features):
    """Roles follow their tokens through the closing of gaps."""
    cues = chain.brain.cues(features)
    side = (torch.zeros(2, 3, 48), torch.ones(2, 3, dtype=torch.bool))
    image = (torch.zeros(2, 16, 48), torch.ones(2, 16, dtype=torch.bool))
    parts = [side, image, *chain.brain.parts(cues), side, side]
    roles = chain._roles(parts, features)
    assert roles[2][:, :16].eq(DROPPABLE).all() and roles[2][0, 16:18].tolist() == [DROPPABLE, OTHER]
    assert roles[2][1, 16:].tolist() == [DROPPABLE, *[OTHER] * 4] and roles[3].eq(OTHER).all()
    row, keep = assembled(roles, parts), assemble(parts)[1]
    assert row.shape == keep.shape and ((row == DROPPABLE) & keep).sum(1).tolist() == [33, 33]
    assert ((row == OTHER) & keep).sum(1).tolist() == [3 + 1 + 1, 3 + 4 + 3] and row[:, -6:].eq(ASKING).all()


def test_tame_sharpens_every_score_by_both_traces():
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=rng) for _ in range(3))
    grow = [1 + 0.8 / x.square().sum((2, 3)).log()[..., None, None] for x in (query, key)]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    scores = (query @ key.transpose(2, 3) * 8**-0.5 * grow[0] * grow[1]).masked_fill(~mask, float("-inf"))
    wanted = (scores.softmax(-1) @ value).transpose(1, 2)
    attended: list = []
    out, _ = focused_attention(None, query, key, value, None, 8**-0.5, tame_gamma=0.8, attended=attended)
    assert torch.allclose(out, wanted, atol=1e-5) and torch.allclose(attended[0], scores.softmax(-1).mean(1), atol=1e-5)
    both = [torch.cat([torch.full((1, 2, 3, 8), 5.0), x], dim=2) for x in (query, key, value)]
    allowed = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    allowed[..., 3:, 3:] = mask
    allowed |= torch.eye(8, dtype=torch.bool)
    assert torch.allclose(focused_attention(None, *both, allowed, 8**-0.5, tame_gamma=0.8)[0][:, 3:], out, atol=1e-5)


def test_values_out_of_range_are_sentences(chain, features):
    with pytest.raises(ConfigError, match="token_select in 0..1"):
        Focus(token_select=1.5)
    chain.llava.set_focus(Focus(0.5))
    try:
        with pytest.raises(ConfigError, match="expected roles"):
            chain.llava.run(torch.zeros(1, 40, 48), torch.ones(1, 40, dtype=torch.bool), torch.arange(40)[None])
    finally:
        chain.llava.set_focus(Focus())
