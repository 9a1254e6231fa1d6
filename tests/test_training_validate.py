"""Measurements on held-out records: by hand on toys, and with the reasoner's own question on tiny weights."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from reasonedit.reasonedit_core.conditioners.step1x import Step1XConditioner
from reasonedit.reasonedit_core.dialogue.prompts import default_pack
from reasonedit.reasonedit_core.errors import ConfigError, ReasonerError
from reasonedit.reasonedit_core.generator import Step1XGeometry
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.packing import IGNORED, ImagePack, TextPack
from reasonedit.reasonedit_core.reasoners.qwen import QwenSpeaker
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.data.documents import Documents, Voice
from reasonedit.training.data.drawn import write_drawn
from reasonedit.training.data.records import read_records
from reasonedit.training.data.transcripts import Shown
from reasonedit.training.types import MicroStep, Models
from reasonedit.training.validate import Verdicts, flow_losses, ntp_loss, verdict_accuracy, verdict_query

TEXT, TARGET, REFERENCE = 3, 4, 2


def image_pack(seed: int, weight: float = 1.0, states: bool = True) -> ImagePack:
    draw = torch.Generator().manual_seed(seed)
    role = torch.tensor([0] * TARGET + [1] * REFERENCE)
    return ImagePack(
        text_index=torch.arange(TEXT),
        text_doc=torch.zeros(TEXT, dtype=torch.long),
        clean=torch.randn(len(role), 5, generator=draw),
        noise=torch.randn(len(role), 5, generator=draw) * (role == 0)[:, None],
        sigma=torch.rand(1, generator=draw),
        image_doc=torch.zeros(len(role), dtype=torch.long),
        role=role,
        loss_weight=(role == 0).float() * weight,
        grids=(((2, 2), (1, 2)),),
        states=torch.randn(TEXT, 4, generator=draw) if states else None,
    )


def text_pack(labels: list[int], weight: float = 1.0) -> TextPack:
    found = torch.tensor(labels)
    weights = torch.where(found == IGNORED, 0.0, weight)
    place, count = torch.zeros(3, len(labels), dtype=torch.long), torch.zeros(len(labels), dtype=torch.long)
    return TextPack(count, place, count, found, weights, torch.empty(0, 1176))


class ToyDiT(nn.Module):
    """Predicts a share of the noisy picture, moved by the states; draws from the global generator, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.share, self.inner = nn.Parameter(torch.tensor(0.5)), nn.Dropout(0.5)
        self.seen: list[float] = []

    def forward(self, pack: ImagePack, states: torch.Tensor | None = None) -> torch.Tensor:
        torch.rand(3)
        random.random()
        np.random.rand()
        assert not torch.is_grad_enabled() and not self.training and not self.inner.training
        self.seen.append(float(pack.sigma[0]))
        states = pack.states if states is None else states
        return self.share * pack.noisy() + states.mean()


class ToyMLLM(nn.Module):
    """States of ones; a cross entropy of its label for every answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.inner = 0, nn.Dropout(0.5)

    def forward(self, pack: TextPack) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return torch.ones(len(pack.ids), 4), pack.labels[pack.labels != IGNORED].float()


def by_hand(packs: list[ImagePack], sigma: float, states: float | None = None) -> float:
    total = count = 0.0
    for pack in packs:
        for row in range(TARGET):
            noisy = (1 - sigma) * pack.clean[row] + sigma * pack.noise[row]
            shift = pack.states.mean() if states is None else states
            error = (0.5 * noisy + shift - (pack.noise[row] - pack.clean[row])).square().mean()
            total += float(pack.loss_weight[row] * error)
            count += float(pack.loss_weight[row])
    return total / count


def test_the_fm_loss_at_each_sigma_is_a_mean_over_target_tokens():
    packs = [image_pack(0), image_pack(1, weight=3.0)]
    dit = ToyDiT()
    found = flow_losses(Models(dit=dit), [MicroStep(None, pack, {}) for pack in packs], (0.25, 1.0))
    assert [sigma for sigma, _ in found.rows] == [0.25, 1.0]
    assert [loss for _, loss in found.rows] == pytest.approx([by_hand(packs, 0.25), by_hand(packs, 1.0)], rel=1e-5)
    assert found.targets == TARGET + 3 * TARGET
    assert dit.seen == [0.25, 1.0, 0.25, 1.0]


def test_sigmas_are_never_averaged():
    found = flow_losses(Models(dit=ToyDiT()), [MicroStep(None, image_pack(0), {})])
    assert len(found.rows) == 9 and [sigma for sigma, _ in found.rows] == pytest.approx([0.1 * n for n in range(1, 10)])
    assert list(found.figures()) == [f"fm at {n / 10:g}" for n in range(1, 10)], "one figure per sigma and no other"
    assert str(found).count("\n") == 9


def test_the_mllm_runs_once_per_pack_where_states_are_not_cached():
    mllm, dit = ToyMLLM(), ToyDiT()
    pack = image_pack(0, states=False)
    micro = MicroStep(text_pack([IGNORED] * TEXT), pack, {})
    found = flow_losses(Models(mllm, dit), [micro, micro], (0.2, 0.4, 0.6))
    assert mllm.calls == 2 and len(dit.seen) == 6
    assert found.rows[0][1] == pytest.approx(by_hand([pack], 0.2, states=1.0), rel=1e-5)


def test_the_ntp_loss_is_a_mean_over_answers_by_weight():
    micro = [MicroStep(text_pack([IGNORED, 2, 4]), None, {}), MicroStep(text_pack([6, IGNORED], 3.0), None, {})]
    found = ntp_loss(Models(ToyMLLM()), [*micro, MicroStep(None, image_pack(0), {})])
    assert (found.loss, found.answers) == (pytest.approx((2 + 4 + 3 * 6) / 5), 5)
    assert found.figures() == {"ntp": found.loss}


class Planned:
    """A source of two optimizer steps."""

    fingerprint = ""

    def __len__(self) -> int:
        return 2

    def load(self, epoch: int, cursor: int) -> list[MicroStep]:
        assert epoch == 0
        return [MicroStep(None, image_pack(cursor), {}), MicroStep(None, image_pack(cursor + 7), {})]


def test_a_source_is_read_from_its_beginning_to_its_end():
    dit = ToyDiT()
    found = flow_losses(Models(dit=dit), Planned(), (0.5,))
    packs = [image_pack(seed) for seed in (0, 7, 1, 8)]
    assert found.rows[0][1] == pytest.approx(by_hand(packs, 0.5), rel=1e-5)


def test_ranks_are_summed_before_anything_is_divided():
    one, two = ([MicroStep(None, pack, {})] for pack in (image_pack(0), image_pack(1, weight=2.0)))
    sums: list[torch.Tensor] = []
    flow_losses(Models(dit=ToyDiT()), one, (0.5,), reduce=lambda values: sums.append(values) or values)
    found = flow_losses(Models(dit=ToyDiT()), two, (0.5,), reduce=lambda values: values + sums[0])
    whole = flow_losses(Models(dit=ToyDiT()), [*one, *two], (0.5,))
    assert found.rows[0][1] == pytest.approx(whole.rows[0][1]) and found.targets == whole.targets


def test_training_goes_on_as_if_nothing_had_been_measured():
    dit = ToyDiT().train()
    dit.inner.eval()  # a frozen part may be in eval mode while the rest trains
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = (torch.rand(2), random.random(), np.random.rand())
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    flow_losses(Models(dit=dit), [MicroStep(None, image_pack(0), {})], (0.5,))
    assert dit.training and not dit.inner.training and torch.is_grad_enabled()
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flow_losses(Models(dit=ToyDiT()), [], (0.5,)), "records with a target picture, found none"),
        (lambda: flow_losses(Models(), [MicroStep(None, image_pack(0), {})], (0.5,)), "expected the DiT of the stage"),
        (lambda: flow_losses(Models(dit=ToyDiT()), [], (0.0, 0.5)), r"found \[0.0, 0.5\]"),
        (lambda: flow_losses(Models(dit=ToyDiT()), [], ()), "numbers above 0"),
        (lambda: ntp_loss(Models(ToyMLLM()), []), "records with answers, found none"),
        (lambda: verdict_accuracy(None, None, []), "records of the kind reflect, found none"),
    ],
)
def test_what_cannot_be_measured_is_told(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


# ---- verdicts ------------------------------------------------------------------------------------------------------------

REPLIES = {
    "success": "<#Think> As wished. <#Success>",
    "reflection": "<#Think> Not yet. <#Reflection> Paint it red.",
    "failed": "<#Think> Broken. <#Failed>",
}


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(tiny_checkpoint("step1x-v1p2", std=0.2), dtype=torch.float32)


@pytest.fixture(scope="module")
def documents(mllm) -> Documents:
    return make_documents(mllm, 24)


def make_documents(mllm, tokens: int) -> Documents:
    pack = default_pack()
    tasks = {name: replace(prompt, max_new_tokens=tokens, temperature=0.7) for name, prompt in pack.tasks.items()}
    pack = replace(pack, tasks=tasks, translations={})
    conditioner = Step1XConditioner(mllm, prefix="Edit:", variant="v1.2", min_pixels=56 * 56, max_pixels=56 * 112)
    shown = Shown(min_pixels=56 * 56, max_pixels=56 * 112)
    return Documents(Voice(mllm, pack, conditioner, Step1XGeometry("v1.2"), 64, shown=shown))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = write_drawn(tmp_path_factory.mktemp("drawn"), {"reflect": 8, "edit": 2}, seed=1, size=56, languages=["en"])
    return read_records(path)


class Fixed:
    """A speaker that answers every question for the verdict by a rule."""

    def __init__(self, answer) -> None:
        self.answer_one, self.batches = answer, []

    def answer(self, queries, *, on_text=None, should_stop=None):
        self.batches.append(len(queries))
        return [self.answer_one(query) for query in queries]


def test_right_and_wrong_decisions_are_counted(documents, records):
    found = verdict_accuracy(documents, Fixed(lambda query: REPLIES["success"]), records)
    asked = [record.reflect.verdict for record in records if record.kind == "reflect"]
    assert found.total == len(asked) == 8
    assert found.accuracy == pytest.approx(asked.count("success") / 8) and 0 < found.accuracy < 1
    assert {wanted for wanted, made in found.counts if made == "success"} == set(asked)
    assert found.figures() == {"verdict accuracy": found.accuracy}
    assert "8 right" in str(found) and all(name in str(found) for name in REPLIES)


def test_every_verdict_of_the_records_can_be_right(documents, records):
    wanted = iter([record.reflect.verdict for record in records if record.kind == "reflect"])
    assert verdict_accuracy(documents, Fixed(lambda query: REPLIES[next(wanted)]), records).accuracy == 1.0


def test_replies_that_cannot_be_read_are_wrong_and_not_made_up(documents, records):
    found = verdict_accuracy(documents, Fixed(lambda query: "I like it."), records, batch=3)
    assert found.accuracy == 0 and {made for _, made in found.counts} == {"unread"} and "unread" in str(found)


def test_one_question_that_fails_does_not_take_the_others_along(documents, records):
    reflects = [record for record in records if record.kind == "reflect"]
    bad = verdict_query(documents, reflects[1])

    def answer(query):
        if query.parts == bad.parts and all(map(torch.equal, query.images, bad.images)):
            raise ReasonerError("no room")
        return REPLIES["failed"]

    found = verdict_accuracy(documents, Fixed(answer), reflects)
    assert sum(count for (_, made), count in found.counts.items() if made == "unread") == 1 and found.total == 8


def test_the_question_is_that_of_the_training_documents_asked_greedily(mllm, records):
    """The prompt of what is trained on is the prompt of what is asked."""
    documents = make_documents(mllm, 400)
    record = next(record for record in records if record.kind == "reflect")
    lines = record.reflect.model_copy(update={"target_description": "A red\n\nball."})
    for one in (record, record.model_copy(update={"reflect": lines})):
        query = verdict_query(documents, one)
        assert query.form == "verdict" and query.temperature == 0.0
        asked = mllm.tokenize(mllm.render(query.system, query.parts, n_images=len(query.images)))
        ids, image = documents.text(one, "reflect").ids.tolist(), mllm.image_token_id
        once = [token for n, token in enumerate(ids) if token != image or ids[n - 1] != image]
        assert once[: len(asked)] == asked


def test_a_model_that_learnt_is_seen_and_nothing_is_kept(documents, records, mllm):
    """Greedy and constrained, so every reply can be read; what the MLLM kept from older weights must not be used."""
    speaker = QwenSpeaker(mllm, min_pixels=56 * 56, max_pixels=56 * 112)
    some = [record for record in records if record.kind == "reflect"][:3]
    before = verdict_accuracy(documents, speaker, some, batch=2)
    assert sum(before.counts.values()) == 3 and not any(made == "unread" for _, made in before.counts)
    assert not mllm._features and mllm._prefixes is None
    queries = [verdict_query(documents, record) for record in some]
    stale = speaker.answer(queries)
    tower = mllm.model.model.visual.patch_embed.proj.weight
    original = tower.detach().clone()
    try:
        tower.data = original.flip(0) * 3
        assert speaker.answer(queries) == stale, "kept features hide the new weights, which is why they are forgotten"
        seen = []
        verdict_accuracy(documents, Recording(speaker, seen), some, batch=2)
        mllm.release()
        assert seen == [reply for query in (queries[:2], queries[2:]) for reply in speaker.answer(query)]
        assert seen != stale
    finally:
        tower.data = original
        mllm.release()


class Recording:
    """Passes questions on and notes the replies."""

    def __init__(self, inner: QwenSpeaker, seen: list[str]) -> None:
        self.inner, self.mllm, self.seen = inner, inner.mllm, seen

    def answer(self, queries, **options):
        replies = self.inner.answer(queries, **options)
        self.seen += replies
        return replies


def test_accuracy_of_a_table():
    table = Verdicts({("success", "success"): 3, ("failed", "success"): 1})
    assert (table.total, table.accuracy) == (4, 0.75)


def test_the_mllm_speaks_and_the_dit_paints_only_while_their_weights_are_whole(monkeypatch):
    """Under FSDP2 a unit that is entered otherwise than by calling it has only its own part of the weights."""
    from contextlib import contextmanager, nullcontext
    from types import SimpleNamespace

    from reasonedit.training import sample, seeing

    whole, seen = [], []

    @contextmanager
    def gathered(models):
        whole.append(models)
        yield
        whole.pop()

    def entered(name):
        return lambda *_, **__: seen.append((name, list(whole))) or {}

    stage = SimpleNamespace(samples=SimpleNamespace(records=1, steps=1, guidance=1.0, seed=0))
    record = SimpleNamespace(split="held_out")
    plan = SimpleNamespace(stage=stage, mllm=True)
    base = SimpleNamespace(settings=lambda: SimpleNamespace(size_level=64))
    look = SimpleNamespace(
        plan=plan,
        material=SimpleNamespace(records=[record], base=base),
        loaded=SimpleNamespace(models="units", modules={"dit": None}),
        ranks=SimpleNamespace(autocast=nullcontext, main=False),
    )
    for name, value in {
        "gathered": gathered,
        "held_out": lambda *_: [record],
        "_micro_steps": lambda *_: [],
        "_losses": entered("losses"),
        "_verdicts": entered("verdicts"),
        "_generator": lambda _: None,
    }.items():
        monkeypatch.setattr(seeing, name, value)
    monkeypatch.setattr(sample, "choose_records", lambda records, n: records)
    monkeypatch.setattr(sample, "sample_edits", entered("samples"))
    seeing.measure(look)
    seeing.write_samples(look, None, "")
    assert seen == [("losses", []), ("verdicts", ["units"]), ("samples", ["units"])]
