"""PackedMLLM against the same documents one at a time: states, losses and gradients; and what it leaves of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core.errors import BackendUnavailable, CheckpointError, ConfigError, PackingError
from reasonedit.reasonedit_core.fp8 import Fp8Linear
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.mllm import packed
from reasonedit.reasonedit_core.mllm.decode import generate
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.packed import PackedMLLM
from reasonedit.reasonedit_core.mllm.qwen25vl import language_model
from reasonedit.reasonedit_core.packing import IGNORED, PADDING
from reasonedit.tests.packed import BOUNDS, Document, document, lora, pack, picture
from reasonedit.tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def folder():
    return tiny_checkpoint("qwen2.5-vl", std=0.2)


@pytest.fixture
def mllm(folder):
    return load_mllm(folder, dtype=torch.float32)


@pytest.fixture
def documents(mllm):
    return [
        document(mllm, "make it red", "the sky is red", [picture(0)]),
        document(mllm, "no picture here"),
        document(mllm, "and this", "ok", [picture(1, 84, 60), picture(2, 56, 56)]),
    ]


def spans(documents):
    at = 0
    for d in documents:
        yield slice(at, at + len(d.ids))
        at += len(d.ids)


def alone(mllm, d: Document):
    """States (L, D) and losses of one document, by the stock model: its own attention, all logits."""
    model = mllm.model
    embeds = model.get_input_embeddings()(torch.tensor([d.ids]))
    if d.patches:
        values = torch.cat([p.values for p in d.patches]).to(embeds)
        grids = torch.tensor([(1, *p.grid) for p in d.patches])
        seen = model.model.visual(values, grid_thw=grids)
        seen = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
        embeds = embeds.masked_scatter(torch.tensor(d.ids)[None, :, None] == mllm.image_token_id, seen.to(embeds))
    states = mllm.states(embeds, d.positions[:, None])[0]
    rows = [i for i, label in enumerate(d.labels) if label != IGNORED]
    logits = model.lm_head(states[[i - 1 for i in rows]])
    targets = torch.tensor([d.labels[i] for i in rows], dtype=torch.long)
    return states, torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def loss_of(states, ce, rows=slice(None), answers=0):
    """A number that depends on every state and every loss, each in its own way. rows, answers: where they stand in a pack."""
    spread = torch.rand(512, states.shape[1], generator=torch.Generator().manual_seed(7))[rows][: len(states)]
    return (states * spread.to(states)).sum() + (ce * torch.arange(answers + 1, answers + 1 + len(ce))).sum()


# packed == apart


@pytest.mark.parametrize("padding", [0, 5])
def test_states_and_losses_equal_those_of_the_documents_apart(mllm, documents, padding):
    with torch.no_grad():
        expected = [alone(mllm, d) for d in documents]
        states, ce = PackedMLLM(mllm)(pack(documents, padding))
    assert states.shape == (sum(len(d.ids) for d in documents) + padding, mllm.hidden_size)
    assert ce.shape == (pack(documents).n_answers,) and ce.dtype == torch.float32
    for part, (theirs, _) in zip(spans(documents), expected, strict=True):
        torch.testing.assert_close(states[part], theirs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ce, torch.cat([losses for _, losses in expected]), rtol=1e-5, atol=2e-5)
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_of_every_weight_equal_those_of_the_documents_apart(folder, documents, checkpointing):
    mllm = load_mllm(folder, dtype=torch.float64)
    mllm.model.requires_grad_(True)
    weights = dict(mllm.model.named_parameters())
    total, answers = 0.0, 0
    for part, d in zip(spans(documents), documents, strict=True):
        states, ce = alone(mllm, d)
        total, answers = total + loss_of(states, ce, part, answers), answers + len(ce)
    expected = torch.autograd.grad(total, weights.values())
    unit = PackedMLLM(mllm, checkpointing=checkpointing).train()
    states, ce = unit(pack(documents, padding=3))
    got = torch.autograd.grad(loss_of(states[:-3], ce), weights.values())
    for name, ours, theirs in zip(weights, got, expected, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


# nothing between documents


def with_embeddings(unit, text):
    """(states, ce, the input embeddings as a leaf)."""
    leaves = []

    def take(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    handle = unit.model.get_input_embeddings().register_forward_hook(take)
    states, ce = unit(text)
    handle.remove()
    return states, ce, leaves[0]


def test_no_gradient_crosses_into_another_document(mllm, documents):
    documents = [document(mllm, "one", "two"), *documents[1:2], document(mllm, "three", "four")]
    text = pack(documents, 4)
    states, ce, embeds = with_embeddings(PackedMLLM(mllm), text)
    owner = text.doc_id[(text.labels != IGNORED).nonzero()[:, 0]]
    for number, part in enumerate(spans(documents)):
        (grad,) = torch.autograd.grad(states[part].square().sum() + ce[owner == number].sum(), embeds, retain_graph=True)
        touched = grad[0].abs().amax(-1) > 0
        assert torch.equal(touched, text.doc_id == number)


def test_another_document_may_change_and_the_rest_stays_to_the_bit(mllm, documents):
    unit = PackedMLLM(mllm)
    text = pack(documents)
    others = text.doc_id != 0
    ids = torch.where(others | (text.ids == mllm.image_token_id), text.ids, (text.ids * 7 + 3) % 200)
    patches = text.patches.clone()
    patches[: len(documents[0].patches[0].values)] *= -1
    with torch.no_grad():
        before, ce = unit(text)
        after, ce_after = unit(replace(text, ids=ids, patches=patches))
    answers = sum(label != IGNORED for label in documents[0].labels)
    assert torch.equal(before[others], after[others]) and torch.equal(ce[answers:], ce_after[answers:])
    assert not torch.isclose(before[~others], after[~others]).all(dim=-1).any()


def test_padding_reaches_nobody(mllm, documents):
    unit = PackedMLLM(mllm)
    text = pack(documents, 6)
    with torch.no_grad():
        states, ce = unit(text)
        other, ce_other = unit(replace(text, ids=torch.where(text.doc_id == PADDING, 5, text.ids)))
    real = text.doc_id != PADDING
    assert torch.equal(states[real], other[real]) and torch.equal(ce, ce_other)


# pictures


def test_all_pictures_take_one_pass_without_a_graph(mllm, documents, monkeypatch):
    calls = []
    tower = mllm.model.model.visual
    real = tower.forward

    def count(values, grid_thw, **options):
        calls.append((len(values), grid_thw.tolist(), torch.is_grad_enabled()))
        return real(values, grid_thw=grid_thw, **options)

    monkeypatch.setattr(tower, "forward", count)
    text = pack(documents)
    unit = PackedMLLM(mllm)
    unit(text)
    assert calls == [(len(text.patches), [[1, *grid] for grid in text.grids], False)]
    tower.merger.requires_grad_(True)
    states, _ = unit(text)
    assert calls[1][2] and states.requires_grad
    with torch.no_grad():
        unit(text)
    assert not calls[2][2]
    unit(pack(documents[1:2]))
    assert len(calls) == 3


def test_cached_features_stand_in_for_patches(mllm, documents):
    text = pack(documents)
    unit = PackedMLLM(mllm)
    images = [picture(0), picture(1, 84, 60), picture(2, 56, 56)]
    features = [mllm.vision(image, **BOUNDS).tokens for image in images]
    with torch.no_grad():
        expected = unit(text)
        mllm.model.model.visual = None
        got = unit(text, features=features)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(PackingError, match="as many placeholders as vision tokens"):
        unit(text, features=features[:2])


# the model stays what it was


def prompts(mllm):
    features = [mllm.vision(picture(), **BOUNDS)]
    ids = mllm.tokenize(mllm.render(None, [0, "what a! day"], n_images=1))
    shown = torch.tensor(mllm.expand(ids, features)) != 0
    embeds, positions = mllm.embed(ids, features), mllm.positions(ids, features)
    with torch.no_grad():
        yield mllm.states(embeds, positions)
        yield mllm.states(embeds, positions, shown=shown)
        yield mllm.model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state


def reply(mllm):
    query = Query("think", None, (0, "say something"), (picture(),), max_new_tokens=6, seed=3)
    return generate(mllm, [query], **BOUNDS)


def test_the_mllm_conditions_and_reasons_as_before(mllm, documents):
    before, said = list(prompts(mllm)), reply(mllm)
    choice = mllm.model.config.get_text_config()._attn_implementation
    unit = PackedMLLM(mllm, checkpointing=True).train()
    lm = language_model(mllm.model)
    mllm.release()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(prompts(mllm), before, strict=True))
        assert reply(mllm) == said
        mllm.model.requires_grad_(True)
        loss_of(*unit(pack(documents))).backward()
        mllm.model.requires_grad_(False)
    assert mllm.model.config.get_text_config()._attn_implementation == choice == lm.config._attn_implementation == "sdpa"


def test_other_models_of_the_process_are_not_touched(folder, mllm, documents, monkeypatch):
    calls = []
    real = packed._attend
    monkeypatch.setattr(packed, "_attend", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    unit = PackedMLLM(mllm)
    PackedMLLM(mllm)
    other = load_mllm(folder, dtype=torch.float32)
    list(prompts(other))
    assert not calls
    unit(pack(documents))
    layers = mllm.model.config.get_text_config().num_hidden_layers
    assert len(calls) == layers
    list(prompts(mllm))
    assert len(calls) == 4 * layers, "calls without a pack come through the same door, and go on to sdpa"


def test_a_model_with_another_attention_is_refused(mllm):
    for layer in language_model(mllm.model).layers:
        layer.self_attn.config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match="attention 'sdpa', found 'eager'"):
        PackedMLLM(mllm)


# LoRA, checkpointing, dropout


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients_with_a_lora(mllm, documents, dropout):
    weights = lora(mllm.model, dropout)
    assert len(weights) == 8 * mllm.model.config.get_text_config().num_hidden_layers
    found = []
    for checkpointing in (False, True):
        unit = PackedMLLM(mllm, checkpointing=checkpointing).train()
        torch.manual_seed(5)
        states, ce = unit(pack(documents))
        found.append([states.detach(), ce.detach(), *torch.autograd.grad(loss_of(states, ce), weights.values())])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept, recomputed) and kept.abs().max() > 0
    torch.manual_seed(6)
    assert torch.equal(unit(pack(documents))[0], found[0][0]) == (dropout == 0)
    unit.eval()
    with torch.no_grad():
        assert torch.equal(unit(pack(documents))[0], unit(pack(documents))[0])


def test_recomputation_keeps_only_the_inputs_of_layers(mllm, documents):
    lora(mllm.model)
    kept = {}
    for checkpointing in (False, True):
        unit = PackedMLLM(mllm, checkpointing=checkpointing).train()
        sizes, head = [], unit.model.lm_head.weight.data_ptr()

        def keep(x, sizes=sizes, head=head):
            sizes.append(0 if x.data_ptr() == head else x.numel())  # a weight that is named costs nothing
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            states, _ = unit(pack(documents))
        kept[checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 8


def test_a_lora_is_also_what_the_conditioner_sees(mllm, documents):
    lora(mllm.model)
    with torch.no_grad():
        states, _ = PackedMLLM(mllm)(pack(documents[1:2]))
        torch.testing.assert_close(states, alone(mllm, documents[1])[0], rtol=1e-5, atol=2e-5)


# losses and their rows


def test_a_pack_without_answers_needs_no_lm_head(folder):
    mllm = load_mllm(folder, dtype=torch.float32, need_lm_head=False)
    unit = PackedMLLM(mllm)
    states, ce = unit(pack([document(mllm, "quiet")]))
    assert ce.shape == (0,) and ce.dtype == torch.float32 and len(states)
    with pytest.raises(CheckpointError, match="lm_head"):
        unit(pack([document(mllm, "a", "loud answer")]))


def test_a_head_that_is_no_plain_matrix_goes_through_its_module(mllm, documents):
    text = pack(documents)
    expected = PackedMLLM(mllm)(text)[1]
    mllm.model.lm_head = Fp8Linear.from_linear(mllm.model.lm_head)
    got = PackedMLLM(mllm)(text)[1]
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: {"labels": mark(t, 0)}, "label.*row 0"),
        (lambda t: {"labels": mark(t, int((t.doc_id == 1).nonzero()[0]))}, "label"),
        (lambda t: {"labels": mark(t, len(t.ids) - 1)}, "padding"),
        (lambda t: {"positions": t.positions[:, :-1]}, r"positions \(3, L\)"),
        (lambda t: {"labels": t.labels[:-1]}, "labels"),
        (lambda t: {"grids": t.grids[:-1]}, "expected .* patches"),
        (lambda t: {"grids": (), "patches": t.patches[:0]}, "as many placeholders as vision tokens"),
        (lambda t: {"doc_id": t.doc_id.flip(0)}, "in order"),
    ],
    ids=["first row", "head of a document", "padding", "positions", "labels", "grids", "no pictures", "order"],
)
def test_rows_that_do_not_belong_together_are_named(mllm, documents, change, words):
    text = pack(documents, 2)
    with pytest.raises(PackingError, match=words):
        PackedMLLM(mllm)(replace(text, **change(text)))


def mark(text, row):
    labels = text.labels.clone()
    labels[row] = 3
    return labels


# backends and dtypes


def test_the_backend_is_the_one_that_was_named(mllm, documents):
    text = pack(documents, 1)
    with torch.no_grad():
        states, ce = PackedMLLM(mllm, backend="reference")(text)
        expected = PackedMLLM(mllm)(text)
        torch.testing.assert_close(states, expected[0], rtol=1e-5, atol=2e-5)
        assert not torch.equal(states, expected[0])
        for name in ("varlen", "flex"):
            with pytest.raises(BackendUnavailable, match=f"'{name}' cannot run"):
                PackedMLLM(mllm, backend=name)(text)


def test_attention_dropout_is_refused_in_training(mllm, documents):
    unit = PackedMLLM(mllm)
    for layer in language_model(mllm.model).layers:
        layer.self_attn.attention_dropout = 0.1
    unit.eval()(pack(documents))
    with pytest.raises(ConfigError, match="attention_dropout.*0.1"):
        unit.train()(pack(documents))


def test_autocast_runs_attention_in_16_bits(mllm, documents, monkeypatch):
    seen = set()
    real = packed.attention

    def watch(q, k, v, *args, **options):
        seen.add((q.dtype, k.dtype, v.dtype))
        return real(q, k, v, *args, **options)

    monkeypatch.setattr(packed, "attention", watch)
    expected = PackedMLLM(mllm)(pack(documents))
    assert seen == {(torch.float32,) * 3}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, ce = PackedMLLM(mllm)(pack(documents))
    assert (torch.bfloat16,) * 3 in seen and len(seen) == 2 and ce.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(states.float(), expected[0], dim=-1).min() > 0.98
