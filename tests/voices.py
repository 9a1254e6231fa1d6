"""Checkpoint sides that speak and ask, without weights, and small drawn records: for tests of documents, packs and cache."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from reasonedit.reasonedit_core.conditioners.qwen_image import QwenImageConditioner
from reasonedit.reasonedit_core.conditioners.step1x import Step1XConditioner
from reasonedit.reasonedit_core.dialogue.prompts import find_pack
from reasonedit.reasonedit_core.generator import Step1XGeometry
from reasonedit.reasonedit_core.geometry import QwenGeometry
from reasonedit.reasonedit_core.mllm import load
from reasonedit.reasonedit_core.mllm.qwen25vl import QwenVL
from reasonedit.reasonedit_core.weightfiles import read_json
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.data.documents import Voice
from reasonedit.training.data.records import Record, read_records
from reasonedit.training.data.transcripts import Shown

VARIANTS = {"step1x-v1p2": "v1.2", "step1x-v1p1": "v1.1", "qwen-edit-plus": None, "qwen-edit": None}
SMALL = Shown(28 * 28, 4 * 28 * 28, 112)
"""Reasoner pictures of a few tokens, so that documents are short."""


def weightless(name: str) -> QwenVL:
    """The MLLM of a tiny checkpoint without its weights."""
    folder = tiny_checkpoint(name, std=0.2) / "text_encoder"
    tokenizer = load.load_tokenizer(load.find_tokenizer(folder, None, folder))
    config = load.make_config(read_json(folder / "config.json"), tokenizer)
    return QwenVL(SimpleNamespace(config=config, lm_head=None), tokenizer)


def make_voice(name: str, *, level: int = 64, mllm: QwenVL | None = None, shown: Shown = SMALL, paired: bool = False) -> Voice:
    """The voice of a tiny checkpoint, made of files alone unless `mllm` is given."""
    variant = VARIANTS[name]
    pack = find_pack(variant=variant).pack
    mllm = mllm or weightless(name)
    if variant is None:
        plus = name == "qwen-edit-plus"
        conditioner = QwenImageConditioner(mllm, plus=plus, min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)
        geometry, negative = QwenGeometry(plus, condition_area=56 * 56), " "
    else:
        prompt = pack.conditioning_for(variant)
        conditioner = Step1XConditioner(
            mllm, prefix=prompt.prefix, variant=variant, min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28, blank=56
        )
        geometry, negative = Step1XGeometry(variant), ""
    return Voice(mllm, pack, conditioner, geometry, level, negative, shown, paired)


@cache
def drawn_folder(size: int = 48, references: float = 0.0) -> Path:
    """A folder with a few drawn records of every kind."""
    from reasonedit.training.data.drawn import write_drawn

    folder = Path(tempfile.mkdtemp(prefix="reasonedit-drawn-"))
    counts = {"think": 3, "reflect": 5, "edit": 4, "t2i": 3, "understand": 2, "hypothetical": 2}
    write_drawn(folder, counts, seed=1, size=size, references=references)
    return folder


def drawn_records(size: int = 48, references: float = 0.0) -> list[Record]:
    """Its records, of both splits."""
    return read_records(drawn_folder(size, references))
