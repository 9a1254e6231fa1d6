"""The speaker in process: what it shows to the MLLM, and that it keeps to the Speaker protocol."""

from __future__ import annotations

import json

import pytest
import torch

from reasonedit.reasonedit_core.errors import CheckpointError, Interrupted
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.vision import preprocess
from reasonedit.reasonedit_core.reasoners.qwen import QwenSpeaker
from reasonedit.reasonedit_core.types import Counts
from reasonedit.tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(tiny_checkpoint("step1x-v1p2") / "text_encoder", dtype=torch.float32)


def picture(height, width, seed=0):
    values = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.float() / 255


def asked(*images, form="free"):
    return Query("score", "s", (*range(len(images)), "?"), images, form=form, max_new_tokens=16)


def test_answers_in_order_and_streams(mllm):
    speaker = QwenSpeaker(mllm, min_pixels=3136, max_pixels=30000)
    shown = []
    image = picture(60, 80)
    replies = speaker.answer([asked(image, form="pair"), asked(image)], on_text=lambda task, text: shown.append((task, text)))
    assert len(json.loads(replies[0])["score"]) == 2 and replies[1]
    assert ("score", replies[0]) in shown


def test_shows_pictures_as_the_released_client_does(mllm):
    """Bounds, thumbnail and first resize of the released reasoner are the defaults."""
    mllm.release()
    mllm.counts = Counts()
    image = picture(700, 1300)
    QwenSpeaker(mllm).answer([asked(image)])
    expected = preprocess(image, min_pixels=262144, max_pixels=802816, max_side=1024, snap=True)
    assert [key for key, _ in mllm._features] == [expected.key]
    mllm.vision(image, min_pixels=262144, max_pixels=802816, max_side=1024, snap=True)
    assert mllm.counts.vision_passes == 1


def test_stops(mllm):
    with pytest.raises(Interrupted):
        QwenSpeaker(mllm, min_pixels=3136, max_pixels=30000).answer([asked(picture(60, 80))], should_stop=lambda: True)


def test_needs_an_lm_head():
    silent = load_mllm(tiny_checkpoint("qwen2.5-vl"), dtype=torch.float32, need_lm_head=False)
    with pytest.raises(CheckpointError, match="lm_head"):
        QwenSpeaker(silent)
