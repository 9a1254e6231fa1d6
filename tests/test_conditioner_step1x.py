"""Text encoding of Step1X-Edit: equal to the released code token by token, and what the default policy mends."""

from __future__ import annotations

import logging
import random
import types
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from reasonedit.reasonedit_core.conditioners import step1x
from reasonedit.reasonedit_core.conditioners.step1x import Step1XConditioner, quotes_v1x, quotes_v12, split_at
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.tests.peer import cases
from reasonedit.tests.tiny import tiny_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "step1x_pipeline.safetensors"
ALL_TEXTS = [(version, name) for version, texts in cases.TEXTS.items() for name in texts]


@cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@cache
def mllm(version: str = "v1.2"):
    folder = tiny_checkpoint(cases.SYSTEMS[version], std=cases.STD)
    return load_mllm(folder, dtype=torch.float32, need_lm_head=False)


def conditioner(version: str = "v1.2", **options) -> Step1XConditioner:
    low, high = cases.BOUNDS["v1.2" if version == "v1.2" else "v1.1"]
    options = {"min_pixels": low, "max_pixels": high, "dropped_tokens": cases.DROPPED.get(version, 217)} | options
    prefix = cases.PREFIX["v1.2" if version == "v1.2" else "v1.1"]
    return Step1XConditioner(mllm("v1.2" if version == "v1.2" else "v1.1"), prefix=prefix, variant=version, **options)


def features_of(maker: Step1XConditioner, size: tuple[int, int]):
    return maker.mllm.vision(
        cases.generated_picture(size),
        min_pixels=maker.min_pixels,
        max_pixels=maker.max_pixels,
        snap=maker.variant != "v1.2",
    )


@pytest.mark.parametrize(("version", "name"), ALL_TEXTS)
@torch.no_grad()
def test_released_text_encoding(version, name, monkeypatch):
    case = cases.TEXTS[version][name]
    if case.strip:
        monkeypatch.setattr(step1x, "QUOTE_IDS", cases.STRIP_IDS)
    maker = conditioner(version)
    expected = {key.rpartition("/")[2]: value for key, value in golden().items() if key.startswith(f"text/{version}/{name}/")}
    ids, _ = maker.token_ids(case.instruction, released=True)
    assert maker.mllm.expand(ids, [features_of(maker, case.size)]) == expected["ids"].tolist()

    found = maker.condition(cases.generated_picture(case.size), case.instruction, released=True)
    torch.testing.assert_close(found.tokens[:, :: cases.STRIDE], expected["tokens"], atol=1e-5, rtol=1e-5)
    if version == "v1.2":
        assert torch.equal(found.text_mask, expected["text_mask"]) and found.mask is None
        assert torch.equal(found.positions[:, 0], expected["positions"][:, 0])
        torch.testing.assert_close(found.positions, expected["positions"], atol=2e-5, rtol=1e-6)
        embeds = found.text_embeds[:, :: cases.STRIDE]
        torch.testing.assert_close(embeds, expected["text_embeds"], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found.mask, expected["mask"]) and found.positions.shape == (640, 3) and not found.positions.any()


def test_golden_cases_cover_the_quirks():
    """Without these the comparison above could pass with the quirk missing on both sides."""
    positions = golden()["text/v1.2/bang/positions"][:, 0]
    assert (positions.diff() < -100).any(), "a lone ! falls back to position 1"
    assert golden()["text/v1.2/straight/text_mask"].sum() == len("Open 24h")
    assert golden()["text/v1.2/curly/text_mask"].sum() == len("Grüße".encode())
    assert not golden()["text/v1.2/unclosed/text_mask"].any()
    picture = golden()["text/v1.2/wide/positions"]
    assert (picture[:, 1:] != picture[:, 1:].round()).any()
    long = golden()["text/v1.1/long/mask"]
    assert long.all() and not golden()["text/v1.1/plain/mask"].all()


@torch.no_grad()
def test_default_gives_every_token_its_place():
    maker = conditioner()
    picture = cases.generated_picture((64, 64))
    ours, released = (maker.condition(picture, "Stop! Now!", released=flag) for flag in (False, True))
    # Text advances one by one up to the picture, which holds its place; nothing falls back.
    assert (ours.positions[:, 0].diff() >= 0).all() and (released.positions[:, 0].diff() < 0).any()
    assert not torch.allclose(ours.tokens, released.tokens, atol=1e-3)
    quiet = [maker.condition(picture, "Stop, now", released=flag).tokens for flag in (False, True)]
    assert torch.equal(*quiet)


@torch.no_grad()
def test_default_v1x_shows_a_lone_bang_and_keeps_apostrophes():
    maker = conditioner("v1.1")
    picture = cases.generated_picture((64, 64))
    for words in ("Stop! Now!", "paint the girl's hat"):
        ours, released = (maker.condition(picture, words, released=flag) for flag in (False, True))
        assert not torch.allclose(ours.tokens, released.tokens, atol=1e-3)
    plain, _ = maker.token_ids("paint the girl's hat")
    assert plain == maker.mllm.tokenize(maker._render("paint the girl's hat"))
    broken, _ = maker.token_ids("paint the girl's hat", released=True)
    # The release even cuts the control token at the end into characters.
    assert plain[-2] != broken[-2] and maker.mllm.tokenize("<|im_end|>")[0] not in broken[-40:]
    quoted, _ = maker.token_ids("write 'hé' on it")
    assert quoted == maker.mllm.tokenize(maker._render('write "hé" on it'))  # bytes: a character alone is the same bytes


@torch.no_grad()
def test_vision_features_are_shared_by_the_prompts():
    maker = conditioner()
    before = maker.mllm.counts.vision_passes
    picture = cases.picture((80, 48))
    for words in ("one", "", "two"):
        maker.condition(picture, words)
    assert maker.mllm.counts.vision_passes == before + 1


@torch.no_grad()
def test_v10_is_v11_and_pads_are_zero():
    picture = cases.generated_picture((64, 64))
    old, new = (conditioner(v, dropped_tokens=217).condition(picture, 'a "b"') for v in ("v1.0", "v1.1"))
    assert torch.equal(old.tokens, new.tokens) and torch.equal(old.mask, new.mask)
    assert not new.tokens[~new.mask].any() and new.tokens[new.mask].any(dim=-1).all()


def test_dropped_tokens_default_to_head_and_prefix():
    for version in ("v1.1", "v1.2"):
        maker = conditioner(version, dropped_tokens=None)
        ids, _ = maker.token_ids("red")
        text = maker.mllm.tokenizer.decode(ids[: maker.drop])
        assert text.endswith(maker.prefix) and text.startswith("<|im_start|>system")


def test_head_of_another_length_is_a_warning(caplog, monkeypatch):
    n_head = conditioner(dropped_tokens=None).drop
    with caplog.at_level(logging.WARNING):
        conditioner(dropped_tokens=91)  # a pack of its own
        rules = replace(step1x.RULES["v1.2"], head=n_head)
        monkeypatch.setitem(step1x.RULES, "v1.2", rules)
        conditioner(dropped_tokens=90)
        assert not caplog.records
        monkeypatch.undo()
        conditioner(dropped_tokens=90)
    assert f"have 91 tokens; here they have {n_head}" in caplog.text


def test_quotes_in_the_prefix_that_swallow_the_picture():
    maker = Step1XConditioner(mllm("v1.1"), prefix=f"{cases.PREFIX['v1.1']} Don't.", variant="v1.1")
    assert maker.token_ids("red")[0]
    with pytest.raises(ConfigError, match="unclosed quote mark behind character 155"):
        maker.token_ids("red", released=True)


def test_budget(caplog):
    picture = cases.generated_picture((64, 64))
    whole = conditioner().condition(picture, "red")
    cut = conditioner(budget=40).condition(picture, "red")
    assert torch.equal(cut.tokens, whole.tokens[:, :40]) and cut.positions[:, 0].max() == -1
    assert "its end is cut" in caplog.text
    with pytest.raises(ConfigError, match="dropped_tokens"):
        conditioner(dropped_tokens=5000).condition(picture, "red")


@pytest.mark.parametrize("token", step1x.RESERVED)
def test_control_tokens_in_the_instruction_are_refused(token):
    with pytest.raises(ConfigError, match="control token"):
        conditioner().condition(cases.generated_picture((64, 64)), f"add {token}")


def test_references_and_unknown_variants_are_refused():
    picture = cases.generated_picture((64, 64))
    with pytest.raises(ConfigError, match="no reference pictures, found 1"):
        conditioner().condition(picture, "red", references=[picture])
    with pytest.raises(ConfigError, match=r"v1\.0, v1\.1, v1\.2, found 'v2'"):
        Step1XConditioner(mllm(), prefix="x", variant="v2")


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("plain", []),
        ('say "ab" now', ["ab"]),
        ("say “ab” now", ["ab"]),
        ('say "a“b”" now', ["a“b”"]),
        ('"one""two"', ["one", "two"]),
        ('""', [""]),
        ('no "end', []),
        ('an "end" and "none', ["end"]),
        ('open “ then "ab"', []),
    ],
)
def test_quotes_v12(text, quoted):
    assert [text[a + 1 : b] for a, b in quotes_v12(text)] == quoted


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("the girl's hat and the boy's", []),
        ("write 'SALE' here", ["SALE"]),
        ("write 'it's on' here", ["it's on"]),
        ("the dogs' toys and the cats' beds", []),
        ('write ‘ab’ and “cd” and "ef"', ["ab", "cd", "ef"]),
        ('5" wide, say “ab”', ["ab"]),
        ("'90s car that isn't new", []),
    ],
)
def test_quotes_v1x(text, quoted):
    assert [text[a + 1 : b] for a, b in quotes_v1x(text)] == quoted


def released_split(text: str, skip: int) -> list[tuple[str, bool]]:
    """The released rule for one part of the prompt, restated as a machine of three states that walks over the characters."""
    pieces: list[tuple[str, bool]] = []
    outside, inside, closer = "", [], None
    for place, char in enumerate(text):
        if closer is None and place >= skip and char in '"“':
            if outside or char == '"':
                pieces.append((outside + char, False))
            outside, inside, closer = "", [], '"' if char == '"' else "”"
        elif closer is None:
            outside += char
        elif char == closer:
            pieces += [(c, True) for c in inside]
            outside, inside, closer = char, [], None
        else:
            inside.append(char)
    if closer is not None:
        rest = "".join(inside) + outside
        if pieces and not pieces[-1][1]:
            pieces[-1] = (pieces[-1][0] + rest, False)
        else:
            pieces.append((rest, False))
    elif outside:
        pieces.append((outside, False))
    return [piece for piece in pieces if piece[0]]


@settings(max_examples=400, derandomize=True)
@given(st.text(alphabet='ab"“” \n', max_size=24), st.integers(0, 6))
def test_pieces_follow_the_released_machine(text, skip):
    maker = types.SimpleNamespace(_specials=step1x.re.compile(r"<\|x\|>"))
    found = Step1XConditioner._pieces_v12(maker, text, skip, True)
    assert found == released_split(text, skip)
    mended = Step1XConditioner._pieces_v12(maker, text, skip, False)
    assert "".join(piece for piece, _ in mended) == text
    assert all(len(piece) == 1 for piece, is_quoted in mended if is_quoted)


def test_special_tokens_separate_quotes():
    maker = types.SimpleNamespace(_specials=step1x.re.compile(r"<\|x\|>"))
    text = 'a "b<|x|>c" d<|x|>“e”'
    parts = ['a "b', "<|x|>", 'c" d', "<|x|>", "“e”"]
    expected = [piece for part in parts for piece in released_split(part, 0)]
    assert Step1XConditioner._pieces_v12(maker, text, 0, True) == expected
    assert expected[-2:] == [("e", True), ("”", False)]


def test_split_at_loses_nothing():
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice("xy ") for _ in range(12))
        marks = sorted(rng.sample(range(12), 4))
        pieces = split_at(text, [(marks[0], marks[1]), (marks[2], marks[3])])
        assert "".join(piece for piece, _ in pieces) == text
