"""Decoding: equal to transformers' greedy search, batched equal to one by one, prefixes reused bit for bit, stoppable."""

from __future__ import annotations

import importlib.metadata
import json
import re

import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, Interrupted, ReasonerError
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.mllm import cache, decode
from reasonedit.reasonedit_core.mllm.cache import KVCache
from reasonedit.reasonedit_core.mllm.decode import generate, penalise, pick
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.steps import cache_argument
from reasonedit.reasonedit_core.types import Counts
from reasonedit.tests.tiny import tiny_checkpoint

MODERN = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 40}


@pytest.fixture(scope="module")
def loaded():
    return load_mllm(tiny_checkpoint("qwen2.5-vl"), dtype=torch.float32)


@pytest.fixture
def mllm(loaded):
    loaded.release()
    loaded.counts = Counts()
    return loaded


def picture(seed=0, height=70, width=90):
    values = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.float() / 255


def query(task="think", parts=(0, "what is it?"), images=1, **kwargs):
    kwargs = {"max_new_tokens": 24, "temperature": 0.0, "top_p": 0.9} | kwargs
    return Query(task, "You judge pictures.", parts, tuple(picture(i) for i in range(images)), **kwargs)


def say(mllm, *queries, **kwargs):
    return generate(mllm, queries, **BOUNDS, **kwargs)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_greedy_equals_transformers(mllm, images, monkeypatch):
    """Same tokens as `model.generate` on the processor's full output; its generation config (with a penalty) holds for both."""
    pytest.importorskip("torchvision", reason="the HF processor needs torchvision")
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = tiny_checkpoint("qwen2.5-vl")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, local_files_only=True).float().eval()
    bounds = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40}} if MODERN else BOUNDS
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, **bounds)
    parts = ("look ", *range(images), " and say ! what it is")
    asked = query(parts=parts, images=images, max_new_tokens=40)
    text = mllm.render(asked.system, parts, n_images=images)
    shown = [Image.fromarray((image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for image in asked.images]
    inputs = processor(text=[text], images=shown or None, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, length:]
    assert mllm.repetition_penalty == model.generation_config.repetition_penalty == 1.05
    chosen = []
    monkeypatch.setattr(decode, "pick", lambda logits, **kw: chosen.append(pick(logits, **kw)) or chosen[-1])
    reply = say(mllm, asked)[0]
    assert chosen == expected.tolist() and len(set(chosen)) > 5
    decoded = processor.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert reply == decoded.removesuffix("\ufffd").strip()  # ours leaves an incomplete last character out
    assert mllm.counts.new_tokens == len(expected)


MIXED = [
    query("think", (0, "rewrite!")),
    query("score", (0, "agree?"), form="consistency", max_new_tokens=30),
    query("reflect", (0, "and", 1, "verdict?"), images=2, form="verdict", max_new_tokens=40),
    query("edit_score", (1, "good?"), images=2, form="pair", max_new_tokens=20),
    query("think", ("text only",), images=0, max_new_tokens=5),
]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_batched_equals_one_by_one(mllm, temperature):
    from dataclasses import replace

    queries = [replace(q, temperature=temperature, seed=7 + i) for i, q in enumerate(MIXED)]
    together = say(mllm, *queries, max_batch=len(queries))
    assert mllm.counts.vision_passes == 2 and mllm.counts.generate_calls == len(queries)
    alone = []
    for asked in queries:
        mllm.release()
        alone += say(mllm, asked)
    assert together == alone
    assert say(mllm, *queries, max_batch=2) == alone


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [12, 32, 90])
def test_replies_of_a_random_model_parse(mllm, seed, budget):
    forms = ("consistency", "verdict", "pair", "free")
    queries = [query(form=form, max_new_tokens=budget, temperature=1.5, top_p=1.0, seed=seed) for form in forms]
    consistency, verdict, pair, free = say(mllm, *queries)
    assert json.loads(consistency)["meets_instruction"] in ("yes", "partial", "no")
    assert re.fullmatch(r"<#Think>[^<]?.*?<#(Success|Failed|Others|Reflection)>.*", verdict, re.S)
    assert len(re.findall(r"<#\w+>", verdict)) == 2
    assert len(json.loads(pair)["score"]) == 2
    assert free


def test_a_seed_means_the_same_reply_and_another_seed_another(mllm):
    replies = [say(mllm, query(temperature=1.0, seed=seed))[0] for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]


def record_logits(monkeypatch):
    seen = []

    def recording(logits, **kwargs):
        seen.append(logits.clone())
        return pick(logits, **kwargs)

    monkeypatch.setattr(decode, "pick", recording)
    return seen


def test_a_shared_prefix_is_computed_once_and_changes_no_bit(mllm, monkeypatch):
    seen = record_logits(monkeypatch)
    first, second = query(parts=(0, "one question")), query(parts=(0, "quite another, longer one?"))
    store = mllm.prefixes()
    say(mllm, first)
    prompt = store.computed
    seen.clear()
    reused = say(mllm, second)
    added = store.computed - prompt
    with_reuse = list(seen)
    mllm.release()
    seen.clear()
    fresh = say(mllm, second)
    assert reused == fresh
    assert all(torch.equal(a, b) for a, b in zip(with_reuse, seen, strict=True))
    whole = mllm.prefixes().computed
    tokens = len(mllm.vision(picture(0), **BOUNDS).tokens)
    assert 0 < added < whole - tokens, "the picture's tokens must not be computed again"


def test_a_prefix_is_shared_inside_a_batch_and_only_with_equal_pictures(mllm):
    say(mllm, query(parts=(0, "a")))
    alone = mllm.prefixes().computed
    mllm.release()
    say(mllm, query(parts=(0, "a")), query(parts=(0, "b")))
    assert mllm.prefixes().computed < 1.5 * alone
    mllm.release()
    say(mllm, query(parts=(0, "a"), images=2), query(parts=(1, "a"), images=2))  # same size, other picture
    assert mllm.prefixes().computed == 2 * alone


def test_kept_prefixes_are_bounded(mllm, monkeypatch):
    monkeypatch.setattr(cache, "PREFIX_TOKENS", 150)
    for i in range(6):
        say(mllm, Query("think", "s", (0, "a"), (picture(i),), max_new_tokens=1))
        held = sum(sum(lengths) for lengths, _ in mllm.prefixes()._entries.values())
        assert 0 < held <= 150


def test_only_new_tokens_are_computed(mllm):
    """After the prefill every pass of the language model has one token, and lm_head sees one state per row."""
    passes, heads = [], []
    hooks = [
        mllm.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
        ),
        mllm.model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(tuple(args[0].shape))),
    ]
    try:
        say(mllm, query(max_new_tokens=9))
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(count for _, count in passes[:2]) == mllm.prefixes().computed
    assert passes[2:] == [(1, 1)] * 8
    assert set(heads) == {(1, 64)} and len(heads) == 9


def test_a_cache_that_grows_changes_nothing(mllm, monkeypatch):
    asked = query(form="consistency", max_new_tokens=30)
    grown, grow = [], KVCache._grow
    monkeypatch.setattr(KVCache, "_grow", lambda self, needed: grown.append(needed) or grow(self, needed))
    monkeypatch.setattr(decode, "LITERAL_TOKENS", 0)
    small = say(mllm, asked, asked)
    assert grown
    grown.clear()
    monkeypatch.setattr(decode, "LITERAL_TOKENS", 1000)
    assert say(mllm, asked, asked) == small and not grown


def test_streaming_shows_every_token(mllm):
    shown = []
    queries = [query("think", form="verdict", max_new_tokens=20), query("describe", max_new_tokens=6)]
    replies = say(mllm, *queries, on_text=lambda task, text: shown.append((task, text)))
    for asked, reply in zip(queries, replies, strict=True):
        texts = [text for task, text in shown if task == asked.task]
        assert texts[-1].strip() == reply and len(texts) > 3
        assert all(len(a) <= len(b) for a, b in zip(texts, texts[1:], strict=False))


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_stops_within_one_token(mllm, tokens):
    shown = []
    fresh = say(mllm, query())
    mllm.release()
    with pytest.raises(Interrupted):
        say(mllm, query(), on_text=lambda *_: shown.append(1), should_stop=lambda: len(shown) >= tokens)
    assert len(shown) == tokens
    assert say(mllm, query()) == fresh, "what an interrupted call left behind must be sound"


def test_stops_during_the_prefill(mllm):
    polls = []
    with pytest.raises(Interrupted):
        say(mllm, query(), should_stop=lambda: bool(polls.append(1)) or len(polls) > 2)
    assert mllm.counts.new_tokens == 0
    assert len(say(mllm, query())) == 1


def test_refusals(mllm):
    with pytest.raises(ReasonerError, match="max_new_tokens"):
        say(mllm, query(form="consistency", max_new_tokens=3))
    with pytest.raises(ConfigError, match="leaves room for 24 tokens of 32768"):
        say(mllm, query(parts=("a" * 33000,), images=0))
    assert say(mllm) == []


def test_counts(mllm):
    say(mllm, query(max_new_tokens=6))
    assert (mllm.counts.vision_passes, mllm.counts.generate_calls, mllm.counts.new_tokens) == (1, 1, 6)


def test_pick_keeps_to_top_p_and_follows_the_distribution():
    logits = torch.tensor([0.1, 0.5, 0.3, 0.06, 0.04]).log()
    rng = torch.Generator().manual_seed(0)
    drawn = torch.tensor([pick(logits, temperature=1.0, top_p=0.75, rng=rng) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=5) / 4000
    assert share[3:].sum() == 0 and share[0] == 0
    assert torch.allclose(share[1:3], torch.tensor([0.625, 0.375]), atol=0.03)
    everything = {pick(logits, temperature=1.0, top_p=1.0, rng=rng) for _ in range(1000)}
    assert everything == set(range(5))
    assert {pick(logits, temperature=1.0, top_p=0.01, rng=rng) for _ in range(50)} == {1}
    cold = {pick(logits, temperature=0.05, top_p=1.0, rng=rng) for _ in range(200)}
    assert cold <= {1, 2} and 1 in cold


def test_pick_never_draws_what_is_hidden():
    logits = torch.full((9,), float("-inf"))
    logits[4] = -50.0
    rng = torch.Generator().manual_seed(0)
    assert {pick(logits, temperature=t, top_p=p, rng=rng) for t in (0.0, 1.0, 9.0) for p in (0.1, 1.0)} == {4}


def test_penalise_by_hand():
    logits = torch.tensor([2.0, -2.0, 3.0, -3.0])
    seen = torch.tensor([True, True, False, False])
    assert penalise(logits, seen, 2.0).tolist() == [1.0, -4.0, 3.0, -3.0]


def test_the_cache_is_handed_over_by_the_name_that_this_transformers_gives_it():
    class Older(torch.nn.Module):
        def forward(self, inputs_embeds, past_key_values=None):
            return None

    class Newer(torch.nn.Module):
        def forward(self, inputs_embeds, cache=None):
            return None

    assert (cache_argument(Older), cache_argument(Newer)) == ("past_key_values", "cache")
