"""Conditioners up to the MLLM: the document that training packs gives the states that inference conditions with."""

from __future__ import annotations

import ast
import types
from functools import cache
from pathlib import Path

import pytest
import torch

from reasonedit.reasonedit_core.conditioners.document import CondDocument, unseen
from reasonedit.reasonedit_core.conditioners.qwen_image import (
    QwenImageConditioner,
    QwenTemplate,
    read_template,
    read_text_template,
)
from reasonedit.reasonedit_core.conditioners.step1x import BLANK, Step1XConditioner
from reasonedit.reasonedit_core.denoisers.packed import text_half
from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.qwen25vl import QwenVL, VisionFeatures, _vision_tower
from reasonedit.reasonedit_core.types import Conditioning
from reasonedit.tests.peer import cases
from reasonedit.tests.tiny import tiny_checkpoint

SYSTEMS = ("v1.1", "v1.2", "edit", "plus")
TEXTS = ('write "Stop!" on it', "a! plain one")


@cache
def mllm(system: str) -> QwenVL:
    folder = tiny_checkpoint(cases.SYSTEMS[system] if system in cases.SYSTEMS else "qwen-edit", std=cases.STD)
    return load_mllm(folder, dtype=torch.float32, need_lm_head=False)


def make(system: str, weights: QwenVL | None = None, **options):
    weights = weights or mllm(system)
    if system in ("edit", "plus"):
        return QwenImageConditioner(weights, plus=system == "plus", **options)
    return Step1XConditioner(weights, prefix=cases.PREFIX[system], variant=system, **options)


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 96 - 16 * seed, 64, generator=torch.Generator().manual_seed(seed))


def references_of(system: str) -> tuple[torch.Tensor, ...]:
    return (picture(1), picture(2)) if system == "plus" else ()


def run(weights: QwenVL, document: CondDocument) -> torch.Tensor:
    """What a packed MLLM does with a document: patches, ids and positions in, states of the kept rows out."""
    features = []
    for patches in document.patches:
        height, width = patches.grid
        tokens = _vision_tower(weights.model, patches.values, patches.grid)
        features.append(VisionFeatures(tokens, (height // 2, width // 2), patches.resized))
    embeds = weights.embed(document.ids.tolist(), features)
    return weights.states(embeds, document.positions[:, None], shown=document.shown)[:, document.kept]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_a_document_gives_the_states_that_condition(system, text, released):
    maker = make(system)
    asked = dict(references=references_of(system), released=released)
    document, found = maker.document(picture(), text, **asked), maker.condition(picture(), text, **asked)
    states = run(maker.mllm, document)
    n_kept = states.shape[1]
    assert len(document.ids) == document.positions.shape[1] and document.positions.shape[0] == 3
    assert len(document.patches) == 1 + len(references_of(system)) == len(document.grids)
    assert torch.equal(found.tokens[:, :n_kept], states) and not found.tokens[:, n_kept:].any()
    assert document.n_text == found.tokens.shape[1] and document.fillers == found.tokens.shape[1] - n_kept
    assert (document.fillers > 0) == (system == "v1.1")
    if system == "v1.2":
        assert torch.equal(document.place, found.positions) and torch.equal(document.quoted, found.text_mask[0])
        assert document.quoted.any() == ('"' in text)
    else:
        assert document.place is None and document.quoted is None
    assert (document.shown is not None) == (system == "v1.1" and released)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_a_document_packs_like_its_conditioning(system):
    """Rows of the MLLM's stream, cached states: the text half of a pack is the same."""
    maker = make(system)
    documents = [maker.document(picture(), text) for text in TEXTS]
    half = text_half([maker.condition(picture(), text) for text in TEXTS])
    rows, doc, start = [], [], 0
    for number, document in enumerate(documents):
        kept = range(len(document.ids))[document.kept]
        rows += [*range(start, start + len(kept)), *[-1] * document.fillers]
        doc += [number] * document.n_text
        start += len(kept)
    assert half["text_index"].tolist() == rows and half["text_doc"].tolist() == doc
    assert torch.equal(half["states"], torch.cat([run(maker.mllm, document)[0] for document in documents]))
    if system == "v1.2":
        assert torch.equal(half["text_place"], torch.cat([document.place for document in documents]))
        assert torch.equal(half["quoted"], torch.cat([document.quoted for document in documents]))
        quoted = torch.cat([document.ids[document.kept][document.quoted] for document in documents])
        assert torch.equal(half["quoted_embeds"], maker.mllm.model.get_input_embeddings()(quoted))


@pytest.mark.parametrize("system", SYSTEMS)
def test_documents_need_no_weights(system):
    """A data loader's worker has the tokenizer and the config, nothing else."""
    bare = QwenVL(types.SimpleNamespace(config=mllm(system).config), mllm(system).tokenizer)
    for image in (picture(), None):
        found, expected = (make(system, weights).document(image, TEXTS[0]) for weights in (bare, mllm(system)))
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.positions, expected.positions)
        assert found.kept == expected.kept and found.grids == expected.grids


def test_positions_are_exact_where_training_computes_in_bfloat16():
    maker = make("v1.2")
    expected = maker.document(picture(), "turn it red").place
    with torch.autocast("cpu", torch.bfloat16):
        found = maker.document(picture(), "turn it red").place
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_unseen_features_count_and_place_a_picture():
    maker = make("v1.2")
    patches = maker.document(picture(), "red").patches[0]
    blank, real = unseen(patches), maker.mllm.vision(picture(), min_pixels=maker.min_pixels, max_pixels=maker.max_pixels)
    assert len(blank.tokens) == len(real.tokens) and blank.grid == real.grid and blank.resized == real.resized
    assert blank.key == real.key


# ---------------------------------------------------------------- text to image


@pytest.mark.parametrize("system", ["v1.1", "v1.2"])
@torch.no_grad()
def test_step1x_is_shown_black_where_there_is_no_picture(system):
    maker = make(system, blank=64)
    black = torch.zeros(1, 3, 64, 64)
    found, expected = maker.document(None, "a red house"), maker.document(black, "a red house")
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.patches[0].values, expected.patches[0].values)
    assert torch.equal(maker.condition(None, "a red house").tokens, maker.condition(black, "a red house").tokens)
    released = make(system).document(None, "a red house")
    assert make(system).blank == BLANK == 1024
    assert released.grids[0] == {"v1.1": (36, 36), "v1.2": (40, 40)}[system]


@pytest.mark.parametrize("system", ["edit", "plus"])
@torch.no_grad()
def test_qwen_reads_the_caption_alone(system):
    maker = make(system)
    document, found = maker.document(None, "a red house"), maker.condition(None, "a red house")
    text = maker.mllm.tokenizer.decode(document.ids)
    assert text == read_text_template().prompt("a red house", 0) and text.count("a red house") == 1
    assert document.patches == () and torch.equal(document.positions, torch.arange(len(document.ids)).expand(3, -1))
    assert maker.mllm.tokenizer.decode(document.ids[document.kept]).startswith("a red house")
    assert torch.equal(found.tokens, run(maker.mllm, document))
    edit = maker.document(picture(), "a red house")
    assert edit.kept.start != document.kept.start and len(edit.patches) == 1


def test_dropped_head_of_text_to_image_is_the_pipelines_constant():
    """Counted like the words of the real vocabulary (see test_conditioner_qwen): what diffusers hard-codes."""
    import diffusers

    from reasonedit.tests.test_conditioner_qwen import WordMllm

    path = Path(diffusers.__file__).parent / "pipelines" / "qwenimage" / "pipeline_qwenimage.py"
    constants = [
        node.value.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.prompt_template_encode_start_idx"
    ]
    conditioner = QwenImageConditioner(WordMllm(), plus=True)
    assert constants == [conditioner._prompt("a house", 0)[1]]


def test_text_template_is_a_value_and_not_in_the_repository(tmp_path):
    own = QwenTemplate("<|im_start|>draw: {}<|im_end|>")
    maker = make("plus", text_template=own)
    assert maker.mllm.tokenizer.decode(maker.document(None, "a cat").ids) == "<|im_start|>draw: a cat<|im_end|>"
    assert maker.document(None, "a cat").kept.start == len(maker.mllm.tokenize("<|im_start|>draw: "))
    root = Path(__file__).resolve().parent.parent
    sentence = read_text_template().head.split("\n")[1][:40]
    rooms = ("reasonedit_core", "nodes", "training", "tests", "workflows")
    files = [p for room in rooms for p in (root / room).rglob("*.*") if p.suffix in (".py", ".toml", ".json", ".md")]
    assert len(sentence) == 40 and not [p for p in files if sentence in p.read_text(encoding="utf-8", errors="ignore")]
    assert read_text_template() != read_template(plus=True)

    folder = tmp_path / "pipelines" / "qwenimage"
    folder.mkdir(parents=True)
    with pytest.raises(BackendUnavailable, match="pipeline_qwenimage.py cannot be read"):
        read_text_template(folder=tmp_path)
    for source in ("x = 1", "a = '<|im_start|>{}'\nb = '<|im_start|>b {}'", "a = '<|im_start|><|image_pad|>{}'"):
        (folder / "pipeline_qwenimage.py").write_text(source)
        with pytest.raises(BackendUnavailable, match="expected one prompt without a picture"):
            read_text_template(folder=tmp_path)


def test_refusals():
    with pytest.raises(ConfigError, match="no references without a picture to edit, found 1"):
        make("plus").document(None, "x", references=(picture(),))
    with pytest.raises(ConfigError, match="expected one picture, found 2"):
        make("edit").document(picture(), "x", references=(picture(),))
    with pytest.raises(ConfigError, match="takes no reference pictures, found 1"):
        make("v1.2").document(None, "x", references=(picture(),))
    for system in SYSTEMS:
        for image in (None, picture()):
            with pytest.raises(ConfigError, match="control token"):
                make(system).document(image, "add <|image_pad|>")


def test_a_caption_that_melts_into_the_prompt_is_refused():
    from reasonedit.tests.test_conditioner_qwen import PLUS, WordMllm

    maker = QwenImageConditioner(WordMllm(), plus=True, template=PLUS, text_template=QwenTemplate("<|im_start|>user\n{}"))
    assert maker._prompt("a cat", 0)[1] == 3
    with pytest.raises(ConfigError, match="blanks or line breaks at its start"):
        maker._prompt("\n\na cat", 0)
    assert isinstance(maker.condition(None, "a cat"), Conditioning)
