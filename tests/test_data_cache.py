"""The cache: found by content, written whole, never stale, refused where states change."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.reasonedit_core.latents import KLCodec
from reasonedit.tests.voices import drawn_records, make_voice
from reasonedit.training.data.cache import MOMENTS, STATES, Cache, CachedStates, fill, missing
from reasonedit.training.data.documents import Documents


class CountingCodec(KLCodec):
    """A codec without a VAE: its mean is the picture's own mean, and it counts."""

    def __init__(self):
        config = SimpleNamespace(latent_channels=4, block_out_channels=[1, 1], shift_factor=0.5, scaling_factor=2.0)
        super().__init__(SimpleNamespace(config=config))
        self.sizes, self.calls = [], 0

    def encode(self, pixels):
        self.sizes += [tuple(pixels.shape[1:])] * len(pixels)
        self.calls += 1
        mean = pixels.mean(1, keepdim=True)[:, :, ::8, ::8].expand(-1, 4, -1, -1)
        return mean, torch.full_like(mean, -20.0)


def count_states(made):
    """A stand-in for the MLLM: states that tell the document, and a list of those asked for."""

    def states_of(documents):
        made.extend(documents)
        kept = [document.ids[document.kept][:, None].float().repeat(1, 3) for document in documents]
        return [CachedStates(rows, d.fillers, d.place, d.quoted) for rows, d in zip(kept, documents, strict=True)]

    return states_of


@pytest.fixture(scope="module")
def records():
    return [r for r in drawn_records() if r.kind in ("edit", "t2i") and not r.references]


@pytest.fixture(scope="module")
def documents():
    return Documents(make_voice("step1x-v1p2"))


def pictures_of(documents, records):
    """Distinct (file content, size) of the records' pictures."""
    return {
        (documents.sha(record, name), size)
        for record in records
        for task in documents.tasks_of(record)
        for name, size in zip(documents.layout(record, task).names, documents.layout(record, task).sizes, strict=True)
    }


def test_each_picture_is_encoded_once_and_never_again(tmp_path, documents, records):
    codec, cache = CountingCodec(), Cache(tmp_path, vae="a")
    report = fill(cache, documents, [*records, *records], codec=codec)
    assert report.made == {MOMENTS: len(pictures_of(documents, records))} and not report.failed and not report.found
    assert len(codec.sizes) == report.made[MOMENTS] < 2 * len(records)
    assert codec.calls == len(set(codec.sizes))  # pictures of one size together
    again = fill(cache, documents, records, codec=codec)
    assert again.found == report.made and not again.made and len(codec.sizes) == report.made[MOMENTS]
    assert again.lines() == [f"moments: 0 made, {report.made[MOMENTS]} were there"]


def test_moments_are_those_of_the_codec_at_the_size_of_the_plan(tmp_path, documents, records):
    codec, cache = CountingCodec(), Cache(tmp_path, vae="a")
    fill(cache, documents, records[:1], codec=codec)
    layout = documents.layout(records[0], "edit")
    for name, size in zip(layout.names, layout.sizes, strict=True):
        pixels = documents.voice.geometry.to_vae(documents.open(records[0], name), size) * 2 - 1
        expected = codec.encode(pixels)
        found = cache.moments(documents, records[0], name, size)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_nothing_stale_is_read(tmp_path, documents, records):
    """Another picture, size, transform or model: another name."""
    cache, record = Cache(tmp_path, vae="a", mllm="m"), records[0]
    layout = documents.layout(record, "edit")
    other = make_voice("step1x-v1p1")
    keys = {
        cache.moments_key(documents, record, "input", (64, 64)),
        cache.moments_key(documents, record, "target", (64, 64)),
        cache.moments_key(documents, record, "input", (64, 80)),
        cache.moments_key(Documents(other), record, "input", (64, 64)),
        Cache(tmp_path, vae="b").moments_key(documents, record, "input", (64, 64)),
        cache.states_key(documents, record, layout, False),
        cache.states_key(documents, record, layout, True),
        cache.states_key(documents, record, replace(layout, instruction="Paint it."), False),
        cache.states_key(documents, record, replace(layout, seen=(("input", (64, 80)),)), False),
        cache.states_key(documents, record, replace(layout, seen=(("target", (64, 64)),)), False),
        cache.states_key(Documents(other), record, layout, False),
        Cache(tmp_path, vae="a", mllm="n").states_key(documents, record, layout, False),
    }
    assert len(keys) == 12
    assert cache.moments_key(documents, record, "input", (64, 64)) in keys


def test_states_come_back_as_they_were(tmp_path, documents, records):
    made, cache = [], Cache(tmp_path, mllm="m")
    report = fill(cache, documents, records, states_of=count_states(made))
    assert report.made[STATES] == len(made) and not report.failed
    record = next(record for record in records if record.kind == "edit")
    layout = documents.layout(record, "edit")
    for dropped in (False, True):
        document = documents.condition(record, "edit", dropped=dropped)
        found = cache.states(documents, record, "edit", layout, dropped)
        assert torch.equal(found.states[:, 0], document.ids[document.kept].float())
        assert torch.equal(found.place, document.place) and torch.equal(found.quoted, document.quoted)
        assert found.quoted.dtype == torch.bool and found.fillers == 0 and found.quoted_embeds is None


def test_states_without_text_only_where_text_is_left_out(tmp_path, documents, records):
    with_both, one = [], []
    fill(Cache(tmp_path / "a"), documents, records, states_of=count_states(with_both))
    fill(Cache(tmp_path / "b"), documents, records, states_of=count_states(one), drops_text=False)
    assert len(one) < len(with_both) <= 2 * len(one)


def test_states_of_a_trained_mllm_are_refused(tmp_path, documents, records):
    made = []
    with pytest.raises(ConfigError, match="cached.states: expected a frozen MLLM"):
        fill(Cache(tmp_path), documents, records, states_of=count_states(made), trainable=True)
    assert not made and not list(tmp_path.iterdir())
    fill(Cache(tmp_path), documents, records[:1], codec=CountingCodec(), trainable=True)


def test_processes_share_the_work(tmp_path, documents, records):
    cache = Cache(tmp_path, vae="a")
    reports = [fill(cache, documents, records, codec=CountingCodec(), shard=(rank, 2)) for rank in range(2)]
    made = [report.made.get(MOMENTS, 0) for report in reports]
    assert sum(made) == len(pictures_of(documents, records)) and min(made) > 0
    assert not missing(cache, documents, records)


def test_what_is_missing_is_told_before_the_run(tmp_path, documents, records):
    cache = Cache(tmp_path, vae="a", mllm="m")
    names = [f"{record.id}/{'t2i' if record.kind == 't2i' else 'edit'}" for record in records]
    assert missing(cache, documents, records) == names
    fill(cache, documents, records[1:], codec=CountingCodec())
    assert missing(cache, documents, records) == names[:1]
    assert missing(cache, documents, records, moments=False, states=True) == names


def test_a_missing_entry_says_what_to_do(tmp_path, documents, records):
    record = records[0]
    with pytest.raises(DataError, match=rf"record {record.id!r}: images.target: .*found nothing there. Run `reasonedit-train"):
        Cache(tmp_path).moments(documents, record, "target", (64, 64))
    with pytest.raises(DataError, match=rf"record {record.id!r}: edit: expected its states in the cache"):
        Cache(tmp_path).states(documents, record, "edit", documents.layout(record, "edit"), False)


def test_a_damaged_entry_says_what_to_do(tmp_path, documents, records):
    cache, record = Cache(tmp_path, vae="a"), records[0]
    fill(cache, documents, [record], codec=CountingCodec())
    size = documents.layout(record, "edit").sizes[0]
    path = cache.path(MOMENTS, cache.moments_key(documents, record, "target", size))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read .* Delete it"):
        cache.moments(documents, record, "target", size)


def test_an_unreadable_picture_is_left_out_by_name(tmp_path, documents, records):
    def opened(record, name):
        if record.id == records[0].id:
            raise DataError(f"{name} is cut short")
        return documents.open(record, name)

    report = fill(Cache(tmp_path, vae="a"), Documents(documents.voice, open_picture=opened), records, codec=CountingCodec())
    assert {each.id for each in report.failed} == {f"{records[0].id}/edit"} and report.made
    assert any("cut short" in line for line in report.lines())


def test_a_stopped_pass_goes_on_where_it_was(tmp_path, documents, records, monkeypatch):
    cache, codec = Cache(tmp_path, vae="a"), CountingCodec()
    monkeypatch.setattr("reasonedit.training.data.cache.BATCH_PIXELS", 1)

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        fill(cache, documents, records, codec=codec, on_progress=stop)
    before = len(codec.sizes)
    report = fill(cache, documents, records, codec=codec)
    assert 0 < before and report.found[MOMENTS] == before
    assert report.made[MOMENTS] == len(pictures_of(documents, records)) - before


def test_a_write_that_fails_leaves_nothing(tmp_path, documents, records, monkeypatch):
    cache = Cache(tmp_path, vae="a")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space left"):
        fill(cache, documents, records[:1], codec=CountingCodec())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_progress_counts_records(tmp_path, documents, records):
    told = []
    fill(Cache(tmp_path), documents, records, codec=CountingCodec(), on_progress=lambda *args: told.append(args))
    assert told[-1] == ("done", len(records), len(records)) and {what for what, _, _ in told} == {MOMENTS, "done"}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
