"""Steps and losses: sums by hand, two phases against one graph, gradients from the DiT into the MLLM."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.packed import PackedMLLM
from reasonedit.reasonedit_core.packing import IGNORED, ImagePack
from reasonedit.tests.packed import document, lora, pack, picture
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.losses import backward, flow_matching, next_token
from reasonedit.training.steps import device_of, editing_step, joint_step, moved, reasoning_step
from reasonedit.training.types import FM, NTP, Losses, MicroStep, Models

WIDTH, CHANNELS = 64, 4


class ToyDiT(nn.Module):
    """Velocity of a token from itself, sigma, and the mean of its document's text states, with no way between documents."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.connector = nn.Linear(WIDTH, CHANNELS, dtype=dtype)
        self.out = nn.Linear(CHANNELS, CHANNELS, dtype=dtype)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.3, generator=rng)
        self.kept = []

    def forward(self, pack, states=None):
        states = pack.states if states is None else states
        text = self.connector(states[pack.text_index].to(self.out.weight)).tanh()
        count = torch.zeros(pack.n_documents, 1).index_add(0, pack.text_doc, torch.ones(len(text), 1))
        mean = torch.zeros(pack.n_documents, CHANNELS).to(text).index_add(0, pack.text_doc, text) / count.to(text)
        hidden = (pack.noisy().to(text) * mean[pack.image_doc] + pack.sigma[pack.image_doc, None].to(text)).sin()
        self.kept.append(weakref.ref(hidden))
        return self.out(hidden)


def images(text_rows, references=(0, 4), tokens=6, states=None, seed=0):
    """A pack of one document per entry of text_rows (start, stop), each with 6 target tokens and some of a reference."""
    rng = torch.Generator().manual_seed(seed)
    owner = [n for n, extra in enumerate(references) for _ in range(tokens + extra)]
    role = torch.tensor([r for extra in references for r in [0] * tokens + [1] * extra])
    noise = torch.randn(len(owner), CHANNELS, generator=rng) * (role == 0)[:, None]
    return ImagePack(
        text_index=torch.cat([torch.arange(*rows) for rows in text_rows]),
        text_doc=torch.tensor([n for n, rows in enumerate(text_rows) for _ in range(*rows)]),
        clean=torch.randn(len(owner), CHANNELS, generator=rng),
        noise=noise,
        sigma=torch.rand(len(references), generator=rng),
        image_doc=torch.tensor(owner),
        role=role,
        loss_weight=torch.rand(len(owner), generator=rng) * (role == 0),
        grids=tuple(((2, 3), *([(2, 2)] if extra else [])) for extra in references),
        states=states,
        records=tuple(f"e{n}" for n in range(len(references))),
    )


@pytest.fixture
def mllm():
    return load_mllm(tiny_checkpoint("qwen2.5-vl", std=0.2), dtype=torch.float64)


@pytest.fixture
def documents(mllm):
    return [
        document(mllm, "what first?", "the sky", [picture(0)]),
        document(mllm, "make it red", images=[picture(1, 84, 60)]),
        document(mllm, "a red house"),
    ]


def counted(text, image):
    counts = {}
    if text is not None:
        counts[NTP] = float(text.weights[text.labels != IGNORED].sum())
    if image is not None:
        counts[FM] = float(image.n_targets)
    return MicroStep(text, image, counts)


@pytest.fixture
def micro(documents):
    """The first document answers; the states of the other two, without their first five rows, condition two pictures."""
    first, second, third = (len(d.ids) for d in documents)
    exports = ((first + 5, first + second), (first + second + 5, first + second + third))
    return counted(pack(documents, 3, exports), images(exports))


def gradients(models, micro, scale, *, two_phase=True):
    """All gradients by name after one step."""
    for unit in models.units().values():
        unit.zero_grad()
    losses = joint_step(models, micro, two_phase)
    backward(losses, scale)
    named = {f"{name}.{key}": p.grad for name, unit in models.units().items() for key, p in unit.named_parameters()}
    return {name: grad.clone() for name, grad in named.items() if grad is not None}, losses


# sums


def test_the_sum_of_next_tokens_counts_each_row_by_its_weight(mllm, documents):
    text = pack(documents, 2)
    micro = counted(text, None)
    losses = reasoning_step(Models(mllm=PackedMLLM(mllm)), micro)
    _, ce = PackedMLLM(mllm)(text)
    rows = [i for i, label in enumerate(text.labels.tolist()) if label != IGNORED]
    expected = sum(float(text.weights[row]) * float(ce[n]) for n, row in enumerate(rows))
    assert len(rows) == text.n_answers > 2
    assert losses.sums[NTP].item() == pytest.approx(expected, rel=1e-6) and losses.handover is None
    assert losses.parts == {NTP: (pytest.approx(expected, rel=1e-6), micro.counts[NTP])}


def test_the_sum_of_flow_matching_is_over_targets_and_a_mean_over_channels():
    image = images([(0, 3), (3, 5)])
    velocity = torch.randn(image.clean.shape, generator=torch.Generator().manual_seed(3))
    expected = 0.0
    for n in range(len(image.role)):
        if image.role[n] == 0:
            error = [(float(velocity[n, c]) - float(image.noise[n, c] - image.clean[n, c])) ** 2 for c in range(CHANNELS)]
            expected += float(image.loss_weight[n]) * sum(error) / CHANNELS
    assert flow_matching(velocity, image).item() == pytest.approx(expected, rel=1e-5)
    velocity[image.role != 0] = float("nan")
    leaf = velocity.requires_grad_()
    loss = flow_matching(leaf, image)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (leaf.grad[image.role != 0] == 0).all() and torch.isfinite(leaf.grad).all()


def test_losses_of_16_bit_models_are_summed_in_float32():
    image = images([(0, 3), (3, 5)])
    velocity = torch.randn(image.clean.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    loss = flow_matching(velocity, image)
    assert loss.dtype == torch.float32 and torch.equal(loss, flow_matching(velocity.float(), image))


def test_cached_states_and_those_of_the_frozen_mllm_give_the_same_loss(mllm, micro):
    mllm.model.requires_grad_(True)
    dit = ToyDiT()
    fresh = editing_step(Models(PackedMLLM(mllm), dit), micro)
    assert set(fresh.sums) == {FM} and fresh.handover is None
    backward(fresh, {FM: 1.0})
    assert all(p.grad is None for p in mllm.model.parameters()) and all(p.grad is not None for p in dit.parameters())
    with torch.no_grad():
        states, _ = PackedMLLM(mllm)(micro.text)
    cached = editing_step(Models(None, dit), counted(None, replace(micro.image, states=states)))
    torch.testing.assert_close(cached.sums[FM], fresh.sums[FM], rtol=1e-12, atol=0)


# two phases


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_two_phases_equal_one_graph(mllm, micro, checkpointing):
    weights = lora(mllm.model)
    models = Models(PackedMLLM(mllm, checkpointing=checkpointing).train(), ToyDiT())
    scale = {NTP: 0.1 / 7, FM: 1 / 12}
    ours, losses = gradients(models, micro, scale)
    oracle, one = gradients(models, micro, scale, two_phase=False)
    assert losses.handover is not None and one.handover is None and losses.handover.leaf.grad is None
    assert {name.removeprefix("mllm.model.") for name in ours if name.startswith("mllm")} == set(weights)
    assert set(ours) == set(oracle)
    for name in ours:
        assert oracle[name].abs().max() > 0
        torch.testing.assert_close(ours[name], oracle[name], rtol=1e-12, atol=1e-15)
    assert losses.parts == one.parts


def test_the_dit_teaches_the_mllm_where_next_tokens_count_nothing(mllm, micro):
    weights = lora(mllm.model)
    models = Models(PackedMLLM(mllm), ToyDiT())
    ours, _ = gradients(models, micro, {NTP: 0.0, FM: 1.0})
    taught = {name.removeprefix("mllm.model."): grad for name, grad in ours.items() if name.startswith("mllm")}
    assert set(taught) == set(weights) and all(grad.abs().max() > 0 for grad in taught.values())
    silent = replace(micro.text, labels=torch.full_like(micro.text.labels, IGNORED))
    alone, losses = gradients(models, replace(micro, text=silent), {FM: 1.0})
    assert set(losses.sums) == {FM}
    for name, grad in ours.items():
        torch.testing.assert_close(grad, alone[name], rtol=1e-12, atol=1e-15)


def test_the_graph_of_the_dit_is_free_before_the_mllm_is_entered(mllm, micro):
    weights = lora(mllm.model)
    models = Models(PackedMLLM(mllm), ToyDiT())
    events = []
    for name, parameter in models.dit.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: events.append(("dit", None)))
    for parameter in weights.values():
        parameter.register_post_accumulate_grad_hook(
            lambda p: events.append(("mllm", [reference() for reference in models.dit.kept]))
        )
    backward(joint_step(models, micro), {NTP: 1.0, FM: 1.0})
    order = [who for who, _ in events]
    assert order == ["dit"] * 4 + ["mllm"] * len(weights)
    assert all(kept == [None] for who, kept in events if who == "mllm")


@pytest.mark.parametrize("step", [joint_step, editing_step])
def test_quoted_characters_get_their_input_embeddings(mllm, micro, step):
    """A mapping of quoted characters reads the table of the MLLM, of which documents know the ids alone."""
    seen = {}

    class Reader(ToyDiT):
        def forward(self, pack, states=None):
            seen["embeds"] = pack.quoted_embeds
            return super().forward(pack, states)

    quoted = torch.zeros(len(micro.image.text_index), dtype=torch.bool)
    quoted[[1, 4]] = True
    step(Models(PackedMLLM(mllm), Reader()), replace(micro, image=replace(micro.image, quoted=quoted)))
    ids = micro.text.ids[micro.image.text_index[[1, 4]]]
    assert torch.equal(seen["embeds"], mllm.model.get_input_embeddings().weight[ids])
    assert not seen["embeds"].requires_grad


def test_gradients_add_up_over_micro_steps(mllm, micro):
    lora(mllm.model)
    models = Models(PackedMLLM(mllm), ToyDiT())
    once, _ = gradients(models, micro, {NTP: 0.5, FM: 2.0})
    for _ in range(2):
        backward(joint_step(models, micro), {NTP: 0.5, FM: 2.0})
    for name, parameter in models.dit.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * once[f"dit.{name}"])


def test_a_pack_has_the_losses_and_gradients_of_its_documents_apart(mllm, documents, micro):
    weights = lora(mllm.model)
    models = Models(PackedMLLM(mllm), ToyDiT())
    scale = {NTP: 0.1, FM: 1.0}
    together, losses = gradients(models, micro, scale)
    whole, at, shown, sums = micro.text, 0, 0, {}
    for unit in models.units().values():
        unit.zero_grad()
    for n, d in enumerate(documents):
        rows = slice(at, at + len(d.ids))
        at += len(d.ids)
        text = replace(pack([d]), weights=whole.weights[rows])
        image = None
        if n:
            mine = micro.image.image_doc == n - 1
            image = replace(
                images([(5, len(d.ids))], references=(int(mine.sum()) - 6,)),
                **{key: getattr(micro.image, key)[mine] for key in ("clean", "noise", "role", "loss_weight")},
                sigma=micro.image.sigma[n - 1 : n],
            )
            shown += len(image.role)
        apart = joint_step(models, counted(text, image))
        backward(apart, scale)
        for name, total in apart.sums.items():
            sums[name] = sums.get(name, 0) + total.item()
    assert shown == len(micro.image.role)
    assert sums == {name: pytest.approx(total.item(), rel=1e-9) for name, total in losses.sums.items()}
    for name, parameter in (*weights.items(), *models.dit.named_parameters()):
        theirs = together.get(f"mllm.model.{name}", together.get(f"dit.{name}"))
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-6, atol=1e-9)


def test_without_gradients_the_values_are_the_same(mllm, micro):
    lora(mllm.model)
    models = Models(PackedMLLM(mllm), ToyDiT())
    expected = joint_step(models, micro)
    with torch.no_grad():
        got = joint_step(models, micro)
    assert got.handover is None and got.parts == expected.parts


# what a step refuses


def test_steps_name_what_is_missing(mllm, documents, micro):
    unit, dit = PackedMLLM(mllm), ToyDiT()
    quiet = counted(pack(documents[1:]), None)
    with pytest.raises(DataError, match="answers to learn from, found none in record 'r0', record 'r1'"):
        reasoning_step(Models(unit), quiet)
    with pytest.raises(DataError, match="found neither in record 'r0'"):
        joint_step(Models(unit, dit), quiet)
    with pytest.raises(DataError, match="needs a picture pack"):
        editing_step(Models(unit, dit), quiet)
    for step in (editing_step, joint_step):
        with pytest.raises(DataError, match="text pack or cached states, found neither for record 'e0'"):
            step(Models(unit, dit), replace(micro, text=None))
    with pytest.raises(ConfigError, match="needs the MLLM"):
        joint_step(Models(None, dit), micro)
    with pytest.raises(ConfigError, match="needs a DiT"):
        joint_step(Models(unit, None), micro)


def test_a_micro_step_of_one_stream_gives_its_loss(mllm, micro):
    models = Models(PackedMLLM(mllm), ToyDiT())
    assert set(joint_step(models, replace(micro, image=None)).sums) == {NTP}
    states = torch.randn(len(micro.text.ids), WIDTH, generator=torch.Generator().manual_seed(0))
    assert set(joint_step(models, counted(None, replace(micro.image, states=states))).sums) == {FM}


def test_backward_refuses_a_loss_without_scale_or_weights(mllm, micro):
    models = Models(PackedMLLM(mllm), ToyDiT())
    with pytest.raises(ConfigError, match="scale for every loss.*none for fm"):
        backward(joint_step(models, micro), {NTP: 1.0})
    with pytest.raises(ConfigError, match="no weight that is trained has a part in the loss ntp"):
        backward(joint_step(models, micro), {NTP: 1.0, FM: 1.0})
    assert all(p.grad is None for p in models.dit.parameters())
    with pytest.raises(ConfigError, match="none for other"):
        backward(Losses({"other": torch.ones((), requires_grad=True)}), {})


def test_next_token_keeps_to_the_labelled_rows(documents):
    text = replace(pack(documents), weights=torch.arange(sum(len(d.ids) for d in documents)).float())
    ce = torch.ones(text.n_answers)
    assert next_token(ce, text).item() == sum(row for row, label in enumerate(text.labels.tolist()) if label != IGNORED)


def test_packs_go_where_the_unit_is():
    unit = ToyDiT()
    assert device_of(unit) == torch.device("cpu") == device_of(nn.Identity())
    there = moved(images([(0, 3), (3, 5)]), torch.device("meta"))
    assert there.clean.is_meta and there.text_index.is_meta and there.states is None and there.records == ("e0", "e1")
    unit.out.to("meta")
    assert device_of(unit).type == "meta"
