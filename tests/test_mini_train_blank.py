"""A miniature before training: it loads and runs like any checkpoint, fits the package, and states what differs."""

from __future__ import annotations

import json

import pytest
import torch

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.loop import think_edit_reflect
from reasonedit.reasonedit_core.mini.items import item
from reasonedit.reasonedit_core.mini.models import MINIS
from reasonedit.reasonedit_core.mini.tokenizer import byte_tokens, byte_vocabulary
from reasonedit.reasonedit_core.mini.world import render
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.reasonedit_core.weightfiles import read_shapes
from reasonedit.training.mini import blank, tokens

PACKAGE = 64_000_000
LARGEST_FILE = 30_000_000
VAE = 6_000_000  # what each trained VAE may take
SYSTEMS = list(MINIS)


@pytest.fixture(scope="module")
def learnt():
    """As many ids as the miniatures have, of merges that mean nothing."""
    parts = byte_tokens()[:50]
    merges = tuple((left, right) for left in parts for right in parts)[: tokens.SIZE - 264]
    return tokens.Vocabulary({**byte_vocabulary(), **{a + b: 256 + n for n, (a, b) in enumerate(merges)}}, merges)


@pytest.fixture(scope="module")
def folders(learnt, tmp_path_factory):
    place = tmp_path_factory.mktemp("blank")
    return {name: blank.write_blank(name, place / name, vocab=learnt.vocab, merges=learnt.merges) for name in SYSTEMS}


@pytest.fixture(scope="module")
def systems(folders):
    return {name: load_system(SystemSpec(MINIS[name], folder, device="cpu")) for name, folder in folders.items()}


def test_both_fit_the_package(folders):
    sizes = [path.stat().st_size for folder in folders.values() for path in folder.rglob("*") if path.is_file()]
    vaes = [path.stat().st_size for folder in folders.values() for path in (folder / "vae").glob("*.safetensors")]
    assert sum(sizes) - sum(vaes) + 2 * VAE < PACKAGE - 400_000  # cards and pictures
    assert max(sizes) < LARGEST_FILE


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_has_the_sizes_that_were_agreed(name, folders, systems):
    counts = blank.count_parameters(folders[name])
    assert 4.4e6 < counts["text_encoder"] < 4.8e6
    assert counts["transformer"] == sum(each.numel() for each in systems[name].generator.denoiser.transformer.parameters())
    assert 6e6 < counts["transformer"] < 11.5e6
    assert blank.count_bytes(folders[name]) > 2 * sum(counts.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_vocabulary_is_that_of_the_tokenizer(name, folders, systems, learnt):
    """In every folder that has a tokenizer, and in the ids that the config names."""
    from transformers import AutoTokenizer

    found = [path.parent for path in folders[name].rglob("vocab.json")]
    assert len(found) == 2
    config = json.loads((folders[name] / "text_encoder" / "config.json").read_text())
    rows = read_shapes(folders[name] / "text_encoder")["model.embed_tokens.weight"][0]
    for place in found:
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert len(tokenizer) == rows == config["vocab_size"] == tokens.SIZE
        for field, token in (("image_token_id", "<|image_pad|>"), ("eos_token_id", "<|im_end|>")):
            assert tokenizer.convert_tokens_to_ids(token) == config[field]
    assert systems[name].mllm.tokenize("<|im_start|>!") == [tokens.SIZE - 7, 0]


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_embeddings_are_the_head(name, folders, systems):
    assert "lm_head.weight" not in read_shapes(folders[name] / "text_encoder")
    mllm = systems[name].mllm
    assert mllm.can_generate and mllm.model.lm_head.weight is mllm.model.get_input_embeddings().weight


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_whole_loop_runs_on_a_scene(name, systems):
    system, one = systems[name], item(3, "abstract")
    picture = torch.from_numpy(render(one.source)).permute(2, 0, 1)[None] / 255
    (patches,) = system.generator.conditioner.document(picture, "Paint it.").patches
    assert patches.grid == (6, 6)  # patches of 14: three vision tokens a side, one for each cell
    known = {key: system.defaults[key] for key in ("guidance", "size_level", "negative")}
    assert known == {"guidance": 1.0, "size_level": 96, "negative": None} and system.defaults["steps"] == 8
    known |= {"think": False, "reflect": False, "max_rounds": 0}
    request = EditRequest(image=picture, instruction="Paint it.", seed=1, steps=2, **known)
    trace = think_edit_reflect(request, reasoner=None, generator=system.generator, policy=system.policy)
    assert trace.rounds[0].image.shape == picture.shape
    assert any("miniature" in note for note in system.notes)


@pytest.mark.parametrize("name", SYSTEMS)
def test_sizes_can_be_stated_otherwise(name, learnt, tmp_path):
    small = {"text_encoder": {"num_hidden_layers": 1, "vision_config": {"depth": 1}}, "transformer": {"num_layers": 1}}
    folder = blank.write_blank(name, tmp_path, vocab=learnt.vocab, merges=learnt.merges, overrides=small)
    shapes = read_shapes(folder / "text_encoder")
    assert "model.layers.0.mlp.up_proj.weight" in shapes and "model.layers.1.mlp.up_proj.weight" not in shapes
    assert shapes["visual.blocks.0.attn.qkv.weight"] == (384, 128) and "visual.blocks.1.attn.qkv.weight" not in shapes


def test_another_system_is_refused(learnt, tmp_path):
    with pytest.raises(ConfigError, match="expected one of mini-s, mini-q, found 'mini-x'"):
        blank.write_blank("mini-x", tmp_path, vocab=learnt.vocab, merges=learnt.merges)
