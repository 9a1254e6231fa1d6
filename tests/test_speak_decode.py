"""How replies are decoded: guesses that change no token, a cache of fixed addresses, graphs that fall back with a reason."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.mllm import decode, steps
from reasonedit.reasonedit_core.mllm.cache import KVCache
from reasonedit.reasonedit_core.mllm.decode import generate, pick
from reasonedit.reasonedit_core.mllm.lean import lean_refusal
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.lookup import GRAMS, WIDEST, Lookup
from reasonedit.reasonedit_core.mllm.qwen25vl import language_model
from reasonedit.reasonedit_core.types import Counts
from reasonedit.tests.tiny import tiny_checkpoint

BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 40}
FORMS = ("free", "consistency", "verdict", "pair")


@pytest.fixture(scope="module")
def loaded():
    return load_mllm(tiny_checkpoint("qwen2.5-vl"), dtype=torch.float32)


@pytest.fixture
def mllm(loaded):
    yield fresh(loaded)
    fresh(loaded)


def fresh(mllm, *, mode="auto", guesses=True, penalty=1.05):
    """As newly loaded, with the given settings."""
    mllm.release()
    mllm.counts, mllm.guesses, mllm.repetition_penalty = Counts(), guesses, penalty
    mllm.stepping().mode = mode
    return mllm


def picture(seed=0, height=70, width=90):
    values = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.float() / 255


def query(text="what is it?", form="free", images=1, tokens=24, **more):
    shown = tuple(picture(i) for i in range(images))
    return Query("think", "You judge pictures.", (*range(images), text), shown, form, tokens, **more)


@contextmanager
def watched(mllm):
    """(rows, tokens) of every pass of the language model."""
    passes = []
    hook = language_model(mllm.model).register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        yield passes
    finally:
        hook.remove()


def say(mllm, *queries, record=None, **more):
    """(replies, tokens chosen in order, passes that came after the prompts)."""
    chosen, real = [], decode.pick
    first = []

    def noting(logits, **how):
        first or first.append(len(passes))
        if record is not None:
            record.append(logits.clone())
        chosen.append(pick(logits, **how))
        return chosen[-1]

    decode.pick = noting
    try:
        with watched(mllm) as passes:
            replies = generate(mllm, queries, **BOUNDS, **more)
    finally:
        decode.pick = real
    return replies, chosen, passes[first[0] :]


# ---- guesses -------------------------------------------------------------------------------------------------------------


WORDS = st.lists(st.sampled_from(["red ", "the cube ", "on ", "a table ", "! ", "yes "]), min_size=1, max_size=8)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(WORDS, st.integers(1, 4), st.sampled_from(FORMS), st.sampled_from([1.0, 1.05]), st.integers(20, 40))
def test_a_guessed_reply_is_the_greedy_one(loaded, words, repeats, form, penalty, tokens):
    """Without a penalty the tiny model repeats itself; prompts repeat their words."""
    asked = query("".join(words) * repeats, form, images=0, tokens=tokens)
    plain = say(fresh(loaded, guesses=False, penalty=penalty), asked)
    guessed = say(fresh(loaded, penalty=penalty), asked)
    assert guessed[:2] == plain[:2], "the same text, of the same tokens in the same order"
    assert len(guessed[2]) <= len(plain[2]), "a guess never costs a pass"
    assert loaded.counts.new_tokens >= len(plain[1])


def test_a_reply_that_repeats_itself_takes_few_passes(mllm):
    asked = query("say it again, and again, and again", images=1, tokens=64)
    _, chosen, plain = say(fresh(mllm, guesses=False, penalty=1.0), asked)
    _, same, guessed = say(fresh(mllm, penalty=1.0), asked)
    assert chosen == same and len(plain) == len(chosen) - 1
    assert all(tokens == 1 for _, tokens in plain) and all(tokens <= 1 + WIDEST for _, tokens in guessed)
    period = next((p for p in range(1, 9) if chosen[-2 * p :] == [*chosen[-p:], *chosen[-p:]]), None)
    assert period is not None, "the tiny model is expected to fall into a repetition"
    assert len(guessed) < 0.7 * len(plain)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.lists(st.tuples(WORDS, st.sampled_from(FORMS), st.integers(20, 40)), min_size=2, max_size=4))
def test_rows_of_a_batch_are_guessed_each_for_itself(loaded, rows):
    queries = [query("".join(words), form, images=n % 2, tokens=tokens) for n, (words, form, tokens) in enumerate(rows)]
    plain, _, steps_plain = say(fresh(loaded, guesses=False, penalty=1.0), *queries)
    guessed, _, steps_guessed = say(fresh(loaded, penalty=1.0), *queries)
    assert guessed == plain and len(steps_guessed) <= len(steps_plain)


def test_what_is_drawn_by_chance_is_not_guessed(mllm):
    asked = query(tokens=40, temperature=1.0, seed=5)
    plain, guessed = say(fresh(mllm, guesses=False, penalty=1.0), asked), say(fresh(mllm, penalty=1.0), asked)
    assert plain == guessed and all(tokens == 1 for _, tokens in guessed[2])


def test_every_accepted_token_is_told_and_may_be_the_last(mllm):
    asked = query("again and again and again", tokens=48)
    told = []
    fresh(mllm, penalty=1.0)
    (reply,), chosen, passes = say(mllm, asked, on_text=lambda task, text: told.append(text))
    assert len(told) == len(chosen) > len(passes) + 1 and told[-1].strip() == reply

    def stopped_after(most):
        seen = []
        with pytest.raises(decode.Interrupted):
            tell = {"on_text": lambda task, text: seen.append(text), "should_stop": lambda: len(seen) >= most}
            generate(mllm, [asked], **BOUNDS, **tell)
        return seen

    for most in range(0, len(told), 5):
        assert stopped_after(most) == told[:most], "stopped between two tokens, accepted guesses included"


TOKENS = st.integers(0, 5)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(TOKENS, max_size=30), st.lists(TOKENS, max_size=12), st.sets(TOKENS, max_size=2))
def test_a_guess_is_what_followed_the_longest_tail_when_it_last_occurred(prompt, said, never):
    lookup = Lookup(prompt, never)
    lookup.extend(said)
    ids, expected = [*prompt, *said], []
    for n in GRAMS:
        earlier = [at for at in range(n, len(ids)) if len(ids) > n and ids[at - n : at] == ids[-n:]]
        if earlier:
            line = list(ids)
            for at in range(earlier[-1], earlier[-1] + WIDEST // 2):
                expected.append(line[at])
                line.append(line[at])
            break
    cut = next((at for at, token in enumerate(expected) if token in never), len(expected))
    assert lookup.guess() == expected[:cut]


def test_guesses_grow_with_success_and_shrink_with_failure():
    lookup = Lookup([1] * 9, ())
    lengths = []
    for held in (3, 7, 7, 2, 0, 0, 1, 3):
        lengths.append(len(lookup.guess()))
        lookup.learn(lengths[-1], min(held, lengths[-1]))
    assert lengths == [3, 7, 7, 7, 5, 1, 1, 3]
    lookup.learn(0, 0)
    assert len(lookup.guess()) == 7, "no guess teaches nothing"


# ---- forced text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["consistency", "verdict", "pair"])
def test_forced_text_costs_no_pass(mllm, form):
    """One pass per choice of the model, whatever stands between; the last choice is followed by none."""
    for guesses in (False, True):
        (reply,), chosen, passes = say(fresh(mllm, guesses=guesses), query(form=form, tokens=30))
        assert len(passes) <= len(chosen) - 1 and (guesses or len(passes) >= len(chosen) - 2)
        assert mllm.counts.new_tokens > len(chosen), "literals are fed"
        assert len(mllm.tokenize(reply)) > len(chosen)


def test_the_head_sees_only_what_is_chosen_from(mllm):
    """`lm_head` is run behind the prompt once, and in a step for the due token and those guessed."""
    states = []
    hook = mllm.model.lm_head.register_forward_pre_hook(lambda module, args: states.append(args[0].shape[0]))
    try:
        _, _, passes = say(fresh(mllm, penalty=1.0), query("again and again", tokens=30))
    finally:
        hook.remove()
    assert states[0] == 1 and len(states) == 1 + len(passes)
    assert all(count == tokens for count, (_, tokens) in zip(states[1:], passes, strict=True))


# ---- fixed addresses -----------------------------------------------------------------------------------------------------


MIXED = [
    query("rewrite!", tokens=30),
    query("agree?", "consistency", tokens=30),
    query("and the verdict?", "verdict", images=2, tokens=40),
    query("text only", "pair", images=0, tokens=20),
    query("another", tokens=5),
]


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_fixed_addresses_say_the_same(mllm, guesses, temperature):
    queries = [replace(asked, temperature=temperature, seed=7 + n) for n, asked in enumerate(MIXED)]
    loose, fixed = [], []
    plain = say(fresh(mllm, mode="plain", guesses=guesses), *queries, record=loose)
    static = say(fresh(mllm, mode="static", guesses=guesses), *queries, record=fixed)
    assert static[:2] == plain[:2]
    shown = [(a, b) for a, b in zip(loose, fixed, strict=True)]
    assert all(torch.equal(a.isinf(), b.isinf()) for a, b in shown)
    assert max(float((a - b)[~a.isinf()].abs().max()) for a, b in shown) < 1e-4


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_lean_steps_say_the_same(mllm, guesses, temperature):
    queries = [replace(asked, temperature=temperature, seed=7 + n) for n, asked in enumerate(MIXED)]
    loose, tight = [], []
    plain = say(fresh(mllm, mode="plain", guesses=guesses), *queries, record=loose)
    lean = say(fresh(mllm, mode="lean", guesses=guesses), *queries, record=tight)
    assert lean == plain, "the same passes too: hooks on the whole model see them"
    shown = [(a, b) for a, b in zip(loose, tight, strict=True)]
    assert max(float((a - b)[~a.isinf()].abs().max()) for a, b in shown) < 1e-4


def test_lean_steps_are_left_to_transformers_where_they_might_differ(mllm):
    model = language_model(mllm.model)
    assert lean_refusal(model, torch.device("cpu")) is None
    assert "on cuda" in lean_refusal(model, torch.device("cuda"))
    hook = model.layers[1].register_forward_pre_hook(lambda *given: None)
    try:
        assert lean_refusal(model, torch.device("cpu")) == "layers.1 has hooks"
        say(fresh(mllm), MIXED[0])
        assert mllm.stepping().reason.endswith("; not lean: layers.1 has hooks")
    finally:
        hook.remove()
    attention = model.layers[0].self_attn
    attention.q_norm = torch.nn.LayerNorm(4)
    try:
        assert lean_refusal(model, torch.device("cpu")) == "layer 0 is built in another way"
    finally:
        del attention.q_norm
    attention.sliding_window = 7
    try:
        assert lean_refusal(model, torch.device("cpu")) == "layer 0 sees a window only"
    finally:
        attention.sliding_window = None


def test_the_cache_stays_where_it_is(mllm):
    fresh(mllm, mode="static")
    stepping = mllm.stepping()
    say(mllm, *MIXED)
    kept = stepping._kept
    places = [store.data_ptr() for store in (*kept.cache.keys, *kept.cache.values)]
    say(mllm, query("quite another prompt", tokens=30))
    say(mllm, *MIXED[:2])
    assert stepping._kept is kept and places == [store.data_ptr() for store in (*kept.cache.keys, *kept.cache.values)]
    assert kept.cache.size % steps.SIZE_STEP == 0
    say(mllm, query("long " * 400, images=0, tokens=30))
    assert stepping._kept is not kept and stepping._kept.cache.size > kept.cache.size, "a longer prompt needs another"
    mllm.release()
    assert stepping._kept is None


def test_passes_over_fixed_addresses_have_few_widths(mllm):
    _, _, passes = say(fresh(mllm, mode="static"), *MIXED[:4])
    widths = {tokens for _, tokens in passes}
    assert {width for width in widths if width <= steps.WIDTHS[-1]} <= set(steps.WIDTHS)
    assert max(widths) > steps.WIDTHS[-1], "a long literal (here each token is a byte) is fed in one plain pass"


def test_a_pass_that_is_too_wide_is_made_plainly(mllm):
    model = language_model(mllm.model)
    cache = KVCache(mllm.config.get_text_config(), 2, 40, dtype=torch.float32, device=mllm.device)
    fixed = steps.FixedSteps(model, cache, record=False)
    feeds = [list(range(20)), list(range(18))]
    with torch.no_grad():
        hidden = fixed.step(feeds, [0, 0], [20, 18])
        assert hidden.shape[:2] == (2, 20) and cache.lengths == [20, 18]
        cache.restart(2)
        narrow = [fixed.step([[a], [b]], [n, n], [1, 1]) for n, (a, b) in enumerate(zip(*feeds, strict=False))]
    assert torch.allclose(hidden[:, :18], torch.cat(narrow, dim=1), atol=1e-4)


# ---- graphs --------------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for CUDA graphs: what is recorded is the pass that runs meanwhile, and a replay makes it again."""

    def __init__(self, fixed, monkeypatch, error=None, spoil=0.0):
        self.recorded, self.replayed, self.error, self.spoil = [], [], error, spoil
        recorder, real = self, fixed._pass

        class Graph:
            def pool(self):
                return "pool"

            def replay(self):
                recorder.replayed.append(self.key)
                self.out.copy_(real(*self.key) + recorder.spoil)

        @contextmanager
        def recording(graph, pool=None):
            if recorder.error:
                raise RuntimeError(recorder.error)

            def passing(rows, width):
                graph.key, graph.out = (rows, width), real(rows, width)
                recorder.recorded.append(graph.key)
                return graph.out

            fixed._pass = passing
            yield
            fixed._pass = real

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", recording)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def recording(mllm, monkeypatch, **how):
    """The MLLM with a cache whose passes are recorded by a stand-in."""
    fresh(mllm, mode="static")
    say(mllm, *MIXED[:4])
    kept = mllm.stepping()._kept
    kept.record = True
    return kept, Recorder(kept, monkeypatch, **how)


def test_each_shape_is_recorded_once_and_replayed_after_that(mllm, monkeypatch):
    plain = say(fresh(mllm, mode="plain"), *MIXED)
    kept, recorder = recording(mllm, monkeypatch)
    mllm.prefixes()
    for _ in range(2):
        assert say(mllm, *MIXED)[:2] == plain[:2]
    assert len(set(recorder.recorded)) == len(recorder.recorded) > 2
    assert len(recorder.replayed) > 2 * len(recorder.recorded) and set(recorder.replayed) == set(recorder.recorded)
    assert kept.fallback == "" and not kept.stale


@pytest.mark.parametrize(
    ("how", "words"),
    [({"error": "operation not permitted when stream is capturing\nmore"}, "recording failed: operation not permitted"),
     ({"spoil": 1e6}, "differs from the plain one"), ({"spoil": float("nan")}, "differs from the plain one by nan")],
)  # fmt: skip
def test_a_graph_that_fails_is_not_used_and_says_why(mllm, monkeypatch, caplog, how, words):
    plain = say(fresh(mllm, mode="plain"), *MIXED)
    kept, recorder = recording(mllm, monkeypatch, **how)
    assert say(mllm, *MIXED)[:2] == plain[:2], "the reply is made all the same"
    assert words in kept.fallback and words in caplog.text
    assert len(recorder.replayed) <= 1, "it is not tried again"
    say(mllm, MIXED[0])
    assert len(recorder.replayed) <= 1 and words in mllm.stepping().reason


def test_graphs_are_made_anew_when_the_cache_has_grown(mllm, monkeypatch):
    """They would write where it lay before."""
    model = language_model(mllm.model)
    cache = KVCache(mllm.config.get_text_config(), 1, 6, dtype=torch.float32, device=mllm.device)
    fixed = steps.FixedSteps(model, cache, record=True)
    recorder = Recorder(fixed, monkeypatch)
    roomy = KVCache(mllm.config.get_text_config(), 1, 40, dtype=torch.float32, device=mllm.device)
    with torch.no_grad():
        found = [fixed.step([[n]], [n], [1]).clone() for n in range(12)]
        plain = [steps.plain_step(model, roomy, [[n]], [n], [1]) for n in range(12)]
    assert cache.grown >= 1 and len(recorder.recorded) >= 2 and not fixed.stale
    assert torch.allclose(torch.cat(found), torch.cat(plain), atol=1e-4)


def test_weights_that_moved_make_graphs_anew(mllm):
    fresh(mllm, mode="static")
    say(mllm, MIXED[0])
    kept = mllm.stepping()._kept
    weight = language_model(mllm.model).layers[0].self_attn.q_proj.weight
    before = weight.data
    try:
        weight.data = before.clone()
        assert kept.stale
        say(mllm, MIXED[0])
        assert mllm.stepping()._kept is not kept
    finally:
        weight.data = before


def test_where_there_is_no_graph_a_reason_is_given(mllm, monkeypatch):
    fresh(mllm)
    say(mllm, MIXED[0])
    assert mllm.stepping().reason == "lean steps: no CUDA device: the weights are on cpu"
    say(fresh(mllm, mode="graph"), MIXED[0])
    assert mllm.stepping().reason == "static steps: no CUDA device: the weights are on cpu"
    model = language_model(mllm.model)
    assert steps.refusal(model, torch.device("cuda:0")).startswith("not all weights are on cuda:0: ")
    fresh(mllm)
    monkeypatch.setattr(steps, "refusal", lambda model, device: None)  # as on a card
    mllm.stepping().declined = "the weights are moved between calls"
    try:
        say(mllm, MIXED[0])
        assert mllm.stepping().reason == "lean steps: the weights are moved between calls" and mllm.stepping()._kept is None
    finally:
        mllm.stepping().declined = ""
    monkeypatch.undo()
    layer = torch.nn.Sequential(torch.nn.Identity())
    assert steps.refusal(layer, torch.device("cuda")) is None
    layer[0].register_forward_pre_hook(lambda *given: None)
    assert "0 has hooks" in steps.refusal(layer, torch.device("cuda"))


# ---- pictures ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_prepared_once_however_often_it_is_shown(mllm, monkeypatch):
    from reasonedit.reasonedit_core.mllm import qwen25vl

    prepared = []
    real = qwen25vl.prepare
    monkeypatch.setattr(qwen25vl, "prepare", lambda image, **how: prepared.append(how) or real(image, **how))
    image = picture(40)
    first = mllm.vision(image, **BOUNDS)
    assert mllm.vision(image, **BOUNDS) is first and len(prepared) == 1
    assert mllm.vision(image.clone(), **BOUNDS) is first and len(prepared) == 2, "another tensor of equal pixels"
    mllm.vision(image, **BOUNDS, snap=True)
    assert len(prepared) == 3, "prepared otherwise"
    image[..., :35, :] = 0
    assert mllm.vision(image, **BOUNDS).key != first.key and len(prepared) == 4, "it was written to"
    mllm.release()
    assert mllm.vision(image, **BOUNDS).tokens.shape == first.tokens.shape and mllm.counts.vision_passes == 4
    with torch.inference_mode():
        silent = picture(41)
    before = len(prepared)
    assert mllm.vision(silent, **BOUNDS) is mllm.vision(silent, **BOUNDS) and len(prepared) == before + 2
    for seed in range(42, 42 + qwen25vl.FEATURES_KEPT + 1):
        mllm.vision(picture(seed), **BOUNDS)
    assert len(mllm._shown._keys) <= qwen25vl.FEATURES_KEPT
