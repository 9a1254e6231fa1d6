"""The hand-written tokenizer, chat template and processor files, as transformers reads them."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.tests.tiny import tiny_checkpoint


def _place(path: str) -> Path:
    system, _, inside = path.partition("/")
    return tiny_checkpoint(system) / inside


@pytest.mark.parametrize("folder", ["step1x-v1p2/text_encoder", "step1x-v1p2/processor", "qwen-edit/tokenizer", "qwen2.5-vl"])
def test_tokenizer_is_byte_level(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_place(folder))
    assert tokenizer.is_fast and len(tokenizer) == 264
    assert tokenizer("!").input_ids == [0]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256)
    ids = tokenizer("é <|vision_start|><|image_pad|><|vision_end|>\n").input_ids
    assert ids == [127, 102, 220, 259, 262, 260, 198]


@cache
def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint("qwen2.5-vl"))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<")))
def test_one_token_per_byte(text):
    text = unicodedata.normalize("NFC", text)
    ids = _tokenizer()(text).input_ids
    assert len(ids) == len(text.encode())
    assert _tokenizer().decode(ids) == text


def test_chat_template():
    tokenizer = _tokenizer()
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    parts = [{"type": "image"}, {"type": "text", "text": "swap"}, {"type": "image", "image": "file"}]
    turn = {"role": "user", "content": parts}
    plain = tokenizer.apply_chat_template([{"role": "system", "content": "S"}, turn], tokenize=False)
    assert plain == f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{picture}swap{picture}<|im_end|>\n"
    full = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True, add_vision_id=True)
    head, _, tail = full.partition("<|im_start|>user\n")
    assert head.startswith("<|im_start|>system\n") and len(head) > len("<|im_start|>system\n<|im_end|>\n")
    assert tail == f"Picture 1: {picture}swapPicture 2: {picture}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("folder", "tokens"), [("step1x-v1p2/processor", 280), ("qwen-edit/processor", 6), ("qwen2.5-vl", 6)])
def test_processor_expands_the_picture(folder, tokens):
    """A 64 x 96 picture: the pixel bounds of Step1X enlarge it to at least 256 tokens, those of Qwen leave it small."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(_place(folder))
    text = "<|vision_start|><|image_pad|><|vision_end|>x"
    out = processor(text=[text], images=[Image.new("RGB", (64, 96))], return_tensors="pt")
    assert (out["input_ids"] == 262).sum() == tokens
    assert out["pixel_values"].shape == (4 * tokens, 1176)
