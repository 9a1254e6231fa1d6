"""What ranks are handed: packs that equal their documents, draws that follow from counters, nothing else."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch

from reasonedit.reasonedit_core.denoisers.packed import PackedQwenImage, PackedStep1X
from reasonedit.reasonedit_core.errors import ConfigError, DataError, PackingError
from reasonedit.reasonedit_core.latents import KLCodec, QwenCodec
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.packed import PackedMLLM
from reasonedit.reasonedit_core.packing import IGNORED, PADDING
from reasonedit.reasonedit_core.weights import load_flux_vae, load_qwen_transformer, load_qwen_vae, load_step1x_transformer
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.tests.voices import VARIANTS, drawn_records, make_voice
from reasonedit.training import noise
from reasonedit.training.data import packs
from reasonedit.training.data.cache import Cache, fill, run_mllm
from reasonedit.training.data.documents import Documents
from reasonedit.training.data.packing import ImageDocument, image_pack, text_pack, token_weight
from reasonedit.training.data.packs import Counted, Draws, Mix, Source
from reasonedit.training.data.planner import Budgets
from reasonedit.training.steps import editing_step, joint_step
from reasonedit.training.timesteps import Timesteps
from reasonedit.training.types import FM, NTP, Models

MIX = Mix(Budgets(text=5000, image=3000))


class Bench:
    """A tiny checkpoint with everything a run has, and a filled cache."""

    def __init__(self, name: str, folder) -> None:
        weights = tiny_checkpoint(name, std=0.2)
        self.name, variant = name, VARIANTS[name]
        self.unit = PackedMLLM(load_mllm(weights / "text_encoder", dtype=torch.float32))
        if variant is None:
            self.dit = PackedQwenImage(load_qwen_transformer(weights / "transformer", dtype=torch.float32, device="cpu")[0])
            self.codec = QwenCodec(load_qwen_vae(weights / "vae", dtype=torch.float32, device="cpu")[0])
        else:
            transformer, variant, _ = load_step1x_transformer(
                weights / "transformer", dtype=torch.float32, device="cpu", variant=variant
            )
            self.dit = PackedStep1X(transformer, variant)
            self.codec = KLCodec(load_flux_vae(weights / "vae", dtype=torch.float32, device="cpu")[0])
        self.voice = make_voice(name)
        self.documents = Documents(self.voice)
        self.cache = Cache(folder / name, vae="vae", mllm="mllm")
        self.records = [record for record in drawn_records(48) if not record.references]
        fill(self.cache, self.documents, self.records, codec=self.codec)

    def source(self, **options) -> Source:
        options = {"seed": 0, "mix": MIX, "cache": self.cache, "codec": self.codec, **options}
        return Source(options.pop("records", self.records), options.pop("documents", self.documents), **options)


@pytest.fixture(scope="module")
def q(tmp_path_factory):
    return Bench("qwen-edit-plus", tmp_path_factory.mktemp("cache"))


def same(left, right):
    """Equality to the bit of micro-steps, packs, or lists of them."""
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if is_dataclass(left):
        return type(left) is type(right) and all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


# ---- the source ----------------------------------------------------------------------------------------------------------


def test_load_is_a_pure_function_of_epoch_and_cursor(q):
    source = q.source(mix=replace(MIX, accumulation=2))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    order = [(1, 1), (0, 0), (1, 0), (0, 1)]
    forward = {key: source.load(*key) for key in order}
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    fresh = pickle.loads(pickle.dumps(q.source(mix=replace(MIX, accumulation=2))))  # noqa: S301 (our own)
    for key in reversed(order):
        assert same(fresh.load(*key), forward[key])
    assert not same(forward[0, 0], forward[1, 0])


def test_every_document_is_handed_out_once_in_an_epoch_over_all_ranks(q):
    world = [q.source(world=2, rank=rank) for rank in range(2)]
    assert len(world[0]) == len(world[1]) and world[0].fingerprint == world[1].fingerprint
    for epoch in range(2):
        micros = [micro for source in world for cursor in range(len(source)) for micro in source.load(epoch, cursor)]
        found = Counter(name for micro in micros for name in micro.text.records if micro.text)
        expected = Counter(item.record for item in world[0].items)
        assert found == expected  # what conditions an edit stands in the text pack as well
        images = Counter(name for micro in micros if micro.image for name in micro.image.records)
        assert images == Counter(item.record for item in world[0].items if item.loss == FM)


def test_all_epochs_have_as_many_steps(q, monkeypatch):
    source = q.source()
    assert {source.plan(epoch).steps for epoch in range(6)} == {len(source)}
    asked = []
    monkeypatch.setattr(packs, "plan", lambda items, **options: asked.append(options["steps"]))
    source.plan(9)
    assert asked == [len(source)]


def test_fingerprint_changes_with_what_is_handed_out(q):
    base = q.source().fingerprint
    assert q.source().fingerprint == base == q.source(world=2, rank=1).fingerprint
    heavier = q.records[0].model_copy(update={"weight": 2.0})
    heavier._place = q.records[0].source
    others = [
        q.source(seed=1),
        q.source(mix=replace(MIX, budgets=Budgets(5001, 3000))),
        q.source(draws=Draws(Timesteps("shift"))),
        q.source(draws=Draws(drop_text=0.2)),
        q.source(counted=Counted(answers="sample")),
        q.source(losses=(FM,)),
        q.source(records=q.records[1:]),
        q.source(records=[heavier, *q.records[1:]]),
        q.source(data_hash="other"),
        q.source(documents=Documents(make_voice("qwen-edit-plus", level=96))),
    ]
    assert len({base, *(source.fingerprint for source in others)}) == 1 + len(others)
    shares = [("think", 1.0), ("reflect", 2.0), ("edit", 1.0)]
    orders = [q.source(mix=replace(MIX, mixture=dict(order))).fingerprint for order in (shares, shares[::-1])]
    assert orders[0] == orders[1] != base


def test_pictures_need_a_cache(q):
    with pytest.raises(ConfigError, match="cache of moments"):
        q.source(cache=None)
    assert len(q.source(cache=None, codec=None, losses=(NTP,))) > 0
    with pytest.raises(ConfigError, match="rank below the world size"):
        q.source(rank=1)


def test_what_is_too_long_is_refused_by_name(q):
    lengths = {item.id: item.text for item in q.source().items}
    most = sorted(lengths.values())[-3]
    small = q.source(mix=Mix(Budgets(text=most, image=3000)))
    assert {each.id for each in small.refused} == {name for name, n in lengths.items() if n > most} != set()
    handed = {name for cursor in range(len(small)) for micro in small.load(0, cursor) for name in micro.records}
    assert handed == {name.rpartition("/")[0] for name, n in lengths.items() if n <= most}


def test_what_cannot_be_made_is_refused_by_name_and_the_others_go_on(q):
    record = next(record for record in q.records if record.kind == "reflect")
    torn = record.model_copy(update={"reflect": record.reflect.model_copy(update={"reason": "<#Failed>"})})
    torn._place = record.source
    source = q.source(records=[torn, *(other for other in q.records if other.id != record.id)])
    assert f"{record.id}/reflect" in {each.id for each in source.refused}
    assert f"{record.id}/reflect" not in {item.id for item in source.items} and len(source) > 0


def test_latents_of_another_size_are_refused(q, tmp_path):
    cache = Cache(tmp_path, vae="vae")
    item = next(item for item in q.source(losses=(FM,)).items if item.id.startswith("edit"))
    record, task = q.source(losses=(FM,)).sources[item.id]
    layout = q.documents.layout(record, task)
    for name, size in zip(layout.names, layout.sizes, strict=True):
        cache.write("moments", {cache.moments_key(q.documents, record, name, size): {"mean": torch.zeros(1, 4, 2, 2)}})
    source = q.source(cache=cache, records=[record], losses=(FM,))
    with pytest.raises(DataError, match=rf"record {record.id!r}: images.target: expected moments of shape"):
        source.load(0, 0)


# ---- the text half -------------------------------------------------------------------------------------------------------


def test_text_packs_are_their_documents_behind_each_other(q):
    source = q.source(draws=Draws(drop_text=0.0))
    (micro,) = source.load(0, 0)
    pack, at, exported = micro.text, 0, []
    uses = [source.items[index] for index, _ in source.plan(0).packs(0, 0)[0]]
    patches = torch.cat([patch.values for item in uses for patch in document_of(source, item).patches])
    assert torch.equal(pack.patches, patches)
    for number, item in enumerate(uses):
        document = document_of(source, item)
        rows = slice(at, at + len(document))
        assert torch.equal(pack.ids[rows], document.ids) and torch.equal(pack.labels[rows], document.labels)
        assert torch.equal(pack.positions[:, rows], document.positions)
        assert pack.doc_id[rows].unique().tolist() == [number] and pack.records[number] == item.record
        if document.kept is not None:
            exported.append((at + document.kept.start, at + document.kept.stop))
        at = rows.stop
    assert at == len(pack.ids) and pack.exports == tuple(exported)
    assert micro.counts[NTP] == float(pack.n_answers) == float((pack.labels != IGNORED).sum())
    assert bool((pack.weights[pack.labels == IGNORED] == 0).all())


def document_of(source, item):
    record, task = source.sources[item.id]
    documents = source.documents
    return documents.text(record, task) if item.loss == NTP else documents.condition(record, task)


def test_pictures_point_at_the_rows_of_what_conditions_them(q):
    source = q.source(draws=Draws(drop_text=0.0))
    micro = next(m for cursor in range(len(source)) for m in source.load(0, cursor) if m.image and m.image.n_documents > 1)
    image = micro.image
    assert image.states is None and image.text_index.max() < len(micro.text.ids)
    for number, (start, stop) in enumerate(micro.text.exports):
        assert image.text_index[image.text_doc == number].tolist() == list(range(start, stop))
        where = micro.text.doc_id[start].item()
        assert micro.text.records[where] == image.records[number]


@pytest.mark.parametrize(("balance", "per_document"), [("token", None), ("sample", 1.0), ("sqrt", 0.5)])
def test_answers_are_counted_as_told(q, balance, per_document):
    source = q.source(counted=Counted(answers=balance), losses=(NTP,))
    (micro,) = source.load(0, 0)
    for number in range(len(micro.text.records)):
        rows = (micro.text.doc_id == number) & (micro.text.labels != IGNORED)
        n = int(rows.sum())
        total = float(micro.text.weights[rows].sum())
        assert total == pytest.approx(n if per_document is None else n ** (1 - per_document), rel=1e-5)
    assert micro.counts[NTP] == pytest.approx(float(micro.text.weights.sum()), rel=1e-6)


def test_the_weight_of_a_record_counts(q):
    heavy = [record.model_copy(update={"weight": 3.0}) for record in q.records]
    for new, old in zip(heavy, q.records, strict=True):
        new._place = old.source
    plain, weighted = q.source(), q.source(records=heavy)
    for left, right in zip(plain.load(0, 0), weighted.load(0, 0), strict=True):
        assert {name: 3 * count for name, count in left.counts.items()} == right.counts
        assert torch.equal(3 * left.text.weights, right.text.weights)


def test_padding_brings_packs_to_a_multiple(q):
    source = q.source(counted=Counted(pad_text=256, pad_image=64))
    plain = q.source()
    padded, bare = (next(m for c in range(len(s)) for m in s.load(0, c) if m.image) for s in (source, plain))
    n, m = len(bare.text.ids), len(bare.image.clean)
    assert len(padded.text.ids) == -(-n // 256) * 256 and len(padded.image.clean) == -(-m // 64) * 64
    assert padded.counts == bare.counts and padded.text.exports == bare.text.exports
    assert torch.equal(padded.text.ids[:n], bare.text.ids) and bool((padded.text.doc_id[n:] == PADDING).all())
    assert bool((padded.text.labels[n:] == IGNORED).all()) and torch.equal(padded.image.clean[:m], bare.image.clean)
    for name, value in (("image_doc", PADDING), ("role", PADDING), ("loss_weight", 0)):
        assert bool((getattr(padded.image, name)[m:] == value).all())
    assert padded.image.n_targets == bare.image.n_targets
    # What is predicted does not change; states of a longer text pack are those of the shorter one.
    models = Models(q.unit, q.dit)
    with torch.no_grad():
        assert torch.allclose(editing_step(models, padded).sums[FM], editing_step(models, bare).sums[FM], rtol=1e-4)


# ---- the picture half ----------------------------------------------------------------------------------------------------


def test_image_packs_are_target_then_references(q):
    source = q.source(losses=(FM,), draws=Draws(Timesteps("logit_normal"), drop_text=0.0))
    micro = next(m for cursor in range(len(source)) for m in source.load(0, cursor) if m.image.n_documents > 1)
    uses = [each for p in range(source.plan(0).n_packs) for each in [source.plan(0).pack(p)]]
    pack = micro.image
    drawn = next(use for use in uses if tuple(source.items[i].record for i, _ in use) == pack.records)
    at = 0
    for number, (index, again) in enumerate(drawn):
        item = source.items[index]
        record, task = source.sources[item.id]
        layout = source.documents.layout(record, task)
        assert pack.grids[number] == layout.grids
        name = noise.occurrence(item.id, again)
        for role, (picture, size) in enumerate(zip(layout.names, layout.sizes, strict=True)):
            rows = slice(at, at + layout.tokens[role])
            moments = q.cache.moments(q.documents, record, picture, size)
            latents = noise.posterior(q.codec, moments, 0, 0, name, picture)
            packed = latents[0].reshape(-1, latents.shape[2] // 2, 2, latents.shape[3] // 2, 2).permute(1, 3, 0, 2, 4)
            assert torch.equal(pack.clean[rows], packed.reshape(layout.tokens[role], -1))
            expected = noise.normal((layout.tokens[0], pack.clean.shape[1]), 0, 0, name) if role == 0 else 0
            assert bool((pack.noise[rows] == expected).all())
            assert bool((pack.role[rows] == role).all()) and bool((pack.image_doc[rows] == number).all())
            assert bool((pack.loss_weight[rows] == (1.0 if role == 0 else 0.0)).all())
            at = rows.stop
        sigma = noise.sigma(Timesteps("logit_normal"), layout.tokens[0], 0, 0, name)
        assert pack.sigma[number].item() == pytest.approx(sigma, rel=1e-6)
    assert at == len(pack.clean) and micro.counts[FM] == float(pack.n_targets)


def test_noise_and_sigma_change_with_the_epoch_and_with_repeats(q):
    source = q.source(losses=(FM,))
    item = source.items[0]
    packs = [source.micro([(item, number)], epoch).image for epoch, number in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(packs[0].noise, packs[1].noise) and torch.equal(packs[0].sigma, packs[1].sigma)
    for other in packs[2:]:
        assert not torch.equal(packs[0].noise, other.noise) and packs[0].sigma != other.sigma


def test_text_is_left_out_for_the_unconditional_prompt(q):
    source = q.source(draws=Draws(drop_text=0.5))
    out = Counter()
    edits = [item for item in source.items if item.loss == FM]
    for epoch in range(12):
        for item in edits:
            record, task = source.sources[item.id]
            (micro_ids,) = [source.micro([(item, 0)], epoch).text.ids]
            dropped = noise.dropped(0.5, 0, epoch, item.id, noise.TEXT)
            assert torch.equal(micro_ids, q.documents.condition(record, task, dropped=dropped).ids)
            out[dropped] += 1
    assert min(out.values()) > 0.35 * sum(out.values())


def test_references_are_left_out_of_the_latents_alone(q):
    always, never = q.source(draws=Draws(drop_text=0.0, drop_reference=1.0)), q.source(draws=Draws(drop_text=0.0))
    item = next(item for item in never.items if item.id.startswith("edit"))
    without, with_them = always.micro([(item, 0)], 0), never.micro([(item, 0)], 0)
    assert len(without.image.grids[0]) == 1 and len(with_them.image.grids[0]) == 2
    assert torch.equal(without.text.patches, with_them.text.patches)
    assert torch.equal(without.image.noise, with_them.image.noise[: len(without.image.noise)])


def test_validation_sees_the_same_every_time(q):
    source, other = q.source(draws=Draws(drop_text=1.0, drop_reference=1.0)), q.source(draws=Draws(Timesteps("shift")))
    items = source.items[:6]
    first, second = source.validation(items, 0.3), other.validation([other.item(item.id) for item in items], 0.3)
    assert same(first, second)
    if first.image is not None:
        assert bool((first.image.sigma == torch.tensor(0.3)).all())


# ---- states: from the MLLM, from the cache, computed here ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["step1x-v1p2", "step1x-v1p1", "qwen-edit-plus"])
def test_cached_states_condition_as_computed_ones(name, tmp_path, q):
    """The same loss whether the MLLM runs with the step, ran before, or runs while loading; with and without text."""
    bench = q if name == q.name else Bench(name, tmp_path)
    records = [next(r for r in bench.records if r.kind == kind) for kind in ("edit", "t2i")]
    cache = Cache(tmp_path, vae="vae", mllm="mllm")
    states_of = run_mllm(bench.unit)
    fill(cache, bench.documents, records, codec=bench.codec, states_of=states_of)
    sources = {
        how: bench.source(records=records, losses=(FM,), cache=cache, states=how, draws=Draws(drop_text=0.5))
        for how in ("pack", "cache", states_of)
    }
    models = Models(bench.unit, bench.dit)
    for epoch in range(2):
        uses = {how: [(item, 0) for item in source.items] for how, source in sources.items()}
        micros = {how: source.micro(uses[how], epoch) for how, source in sources.items()}
        with torch.no_grad():
            losses = [float(editing_step(models, micro).sums[FM]) for micro in micros.values()]
        assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)
        assert micros["cache"].text is None and micros["pack"].image.states is None
        kept, computed = (micros[how].image for how in ("cache", states_of))
        # the cache computed them in packs of many documents, where matrix products round another way
        torch.testing.assert_close(kept.states, computed.states, rtol=1e-4, atol=1e-5)
        assert same(replace(kept, states=None), replace(computed, states=None))


def test_cached_states_take_no_room_in_text_packs(q):
    plain, cached = q.source(losses=(FM,)), q.source(losses=(FM,), states="cache")
    assert {item.text for item in cached.items} == {0} and min(item.text for item in plain.items) > 0
    assert [item.image for item in cached.items] == [item.image for item in plain.items]
    assert "text" not in cached.plan(0).fill


def test_a_joint_step_runs_on_what_is_handed_out(q):
    source = q.source(mix=replace(MIX, mandatory=(NTP, FM), mixture={"think": 1, "reflect": 1, "edit": 2, "t2i": 1}))
    models = Models(q.unit, q.dit)
    for cursor in range(2):
        (micro,) = source.load(0, cursor)
        assert set(micro.counts) == {NTP, FM}
        with torch.no_grad():
            losses = joint_step(models, micro)
        assert set(losses.sums) == {NTP, FM} and all(bool(torch.isfinite(total)) for total in losses.sums.values())


# ---- laying documents behind each other ----------------------------------------------------------------------------------


def plain(record="r", kept=3, **options):
    values = dict(pictures=(torch.ones(4, 2),), grids=((2, 2),), noise=torch.zeros(4, 2), sigma=0.5, kept=kept)
    return ImageDocument(record=record, **{**values, **options})


def test_fillers_stand_behind_the_states():
    pack = image_pack([plain(kept=2, fillers=1), plain("s", kept=1)], exports=[(5, 7), (9, 10)])
    assert pack.text_index.tolist() == [5, 6, -1, 9] and pack.text_doc.tolist() == [0, 0, 0, 1]


def test_states_are_counted_from_the_first_document_on():
    pack = image_pack([plain(kept=2, states=torch.ones(2, 5)), plain("s", kept=1, states=torch.zeros(1, 5))])
    assert pack.text_index.tolist() == [0, 1, 2] and pack.states.sum(1).tolist() == [5, 5, 0]


def test_quoted_characters_keep_their_places():
    marks = torch.tensor([False, True])
    spelt = plain(kept=2, states=torch.ones(2, 5), quoted=marks, quoted_embeds=torch.ones(1, 5))
    pack = image_pack([plain(kept=1, states=torch.ones(1, 5)), spelt])
    assert pack.quoted.tolist() == [False, False, True] and len(pack.quoted_embeds) == 1
    unspelt = image_pack([plain(kept=2, quoted=torch.zeros(2, dtype=torch.bool))], exports=[(0, 2)])
    assert unspelt.quoted.tolist() == [False, False]  # every rank asks for embeddings, or none does
    assert image_pack([plain(kept=2)], exports=[(0, 2)]).quoted is None


@pytest.mark.parametrize(
    ("documents", "exports", "match"),
    [
        ([], None, "at least one document"),
        ([plain()], [], "states for each of 1 documents"),
        ([plain()], [(0, 2)], "states for each"),
        ([plain()], None, "states for each"),
        ([plain(place=torch.zeros(3, 3)), plain()], [(0, 3), (3, 6)], "positions of the text"),
    ],
)
def test_documents_that_do_not_go_together(documents, exports, match):
    with pytest.raises(PackingError, match=match):
        image_pack(documents, exports=exports)


def test_documents_without_pixels_are_refused(q):
    record = next(record for record in q.records if record.kind == "think")
    with pytest.raises(PackingError, match="made to be counted"):
        text_pack([q.documents.text(record, "think", pixels=False)], [1.0])
    with pytest.raises(PackingError, match="at least one document"):
        text_pack([], [])


def test_token_weights():
    assert [token_weight(4, 2.0, balance) for balance in ("token", "sample", "sqrt")] == [2.0, 0.5, 1.0]
