"""LLaVA with its [IMG] tokens, the text encoder, and the chain from picture and words to what the denoiser is given."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from reasonedit.reasonedit_core.conditioners.reasonbrain import ReasonBrainConditioner
from reasonedit.reasonedit_core.conditioners.text_states import load_text_states
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.mllm.llava import load_llava
from reasonedit.reasonedit_core.models.reasonbrain.losses import mllm_loss
from reasonedit.reasonedit_core.segmenters.regions import Regions
from reasonedit.tests.brains import tiny_brain, write_llava, write_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava(folder):
    return load_llava(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return load_text_states(*write_text_encoder(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def chain(llava, text):
    return ReasonBrainConditioner(tiny_brain(), llava, text)


def picture(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 40, 64, generator=torch.Generator().manual_seed(seed))


def regions(count: int, seed: int = 0) -> Regions:
    rng = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 256, (count, 4, 4), generator=rng, dtype=torch.uint8)
    return Regions(masks, torch.rand(count, 8, generator=rng))


def test_llava_gets_its_tokens_and_nothing_trains_yet(folder, llava):
    rows = llava.model.get_input_embeddings().weight
    assert llava.img_ids == tuple(range(260, 292)) and rows.shape[0] == llava.model.lm_head.weight.shape[0] == 292
    assert llava.tokenizer("a[IMG_7]b").input_ids[-2] == llava.img_ids[6], "one token, not the letters of its name"
    assert torch.allclose(rows[260:].mean(0), rows[:260].mean(0), atol=0.02), "rows start at the mean of the table"
    assert len({tuple(row.tolist()) for row in rows[260:]}) == 32, "and are told apart"
    assert torch.equal(load_llava(folder).model.lm_head.weight, llava.model.lm_head.weight)
    assert not any(p.requires_grad for p in llava.model.parameters())
    assert llava.widths == {"vision": 32, "grid": 4, "language": 48} and llava.std == (0.25, 0.25, 0.25)


def test_vision_features_are_those_that_llava_reads(llava):
    look = llava.look(picture(), (0.4, 1.0))
    pixels = torch.nn.functional.interpolate(picture(), (56, 56), mode="bicubic", antialias=True).clamp(0, 1)
    theirs = llava.model.get_image_features(pixel_values=(pixels - 0.5) / 0.25).pooler_output[0]
    assert torch.allclose(llava.projector(look.image)[0], theirs, atol=1e-5)
    assert look.taps.shape == (1, 16, 64) and torch.equal(look.taps[..., 32:], look.image)


def test_states_are_those_of_a_plain_forward(llava, chain):
    """Without cues the row is LLaVA's own prompt with the [IMG] tokens behind it."""
    plain = ReasonBrainConditioner(tiny_brain(patch_branch=False, region_branch=False, cme="none"), llava, chain.text)
    features = plain.features(picture(), ["make it snow"])
    out = plain.run(features, ["make it snow"], logits=True)
    ids = llava.tokenizer("USER: " + "<image>" * 16 + "\nmake it snow ASSISTANT:", add_special_tokens=False).input_ids
    pixels = torch.nn.functional.interpolate(picture(), (56, 56), mode="bicubic", antialias=True).clamp(0, 1)
    theirs = llava.model(
        input_ids=torch.tensor([[*ids, *llava.img_ids]]), pixel_values=(pixels - 0.5) / 0.25, output_hidden_states=True
    )
    assert torch.allclose(out.logits[0], theirs.logits[0, -33:-1], atol=1e-4)
    assert torch.allclose(out.enhanced.context, plain.brain.qformer(theirs.hidden_states[-1][:, -32:]), atol=1e-4)
    shifted = torch.nn.functional.cross_entropy(theirs.logits[0, -33:-1], torch.tensor(llava.img_ids))
    assert torch.allclose(mllm_loss(out.logits, torch.tensor(llava.img_ids)), shifted, atol=1e-4)
    assert torch.allclose(mllm_loss(out.logits, torch.tensor(llava.img_ids), "sum"), 32 * shifted, atol=1e-2)


def test_only_the_img_places_count(llava, chain):
    """Eq. A1 reads 32 places. Other tokens of the prompt change it only through what they say, not as labels."""
    words = "make it snow"
    said = chain.run(chain.features(picture(), [words], objects=[["ice"]], regions=[regions(3)]), [words], logits=True)
    ids = torch.tensor(llava.img_ids)
    assert said.logits.shape == (1, 32, 292)
    moved = said.logits.clone()
    moved[..., :260] -= 50  # all that is no [IMG] token made unlikely
    assert mllm_loss(moved, ids) < mllm_loss(said.logits, ids)
    with pytest.raises(ConfigError, match="32 places, one per"):
        mllm_loss(said.logits[:, :30], ids)


def test_a_batch_gives_what_each_gives_alone(chain):
    words = ["make it snow", "what would this look like after a long and very cold winter?"]
    names, masks = [["ice"], ["tree", "red house", "sky"]], [regions(2), regions(5, 1)]
    both = chain.run(chain.features(picture(batch=2), words, objects=names, regions=masks), words, logits=True)
    for n in range(2):
        args = {"objects": names[n : n + 1], "regions": masks[n : n + 1]}
        alone = chain.run(chain.features(picture(batch=2)[n : n + 1], words[n : n + 1], **args), words[n : n + 1], logits=True)
        assert torch.allclose(both.logits[n], alone.logits[0], atol=1e-4)
        assert torch.allclose(both.enhanced.context[n], alone.enhanced.context[0], atol=1e-4)


def test_conditioning_of_one_picture(chain):
    made = chain.condition(picture(), "make it snow", objects=["snow"], regions=regions(4))
    assert made.tokens.shape == (1, 154, 24) and [r.shape for r in made.residual] == [(1, 32, 4, 4), (1, 32)]
    other = chain.condition(picture(), "make it snow", objects=["fire"], regions=regions(4))
    assert made.tokens.isfinite().all() and not torch.allclose(made.tokens, other.tokens, atol=1e-4)


def test_the_whole_instruction_is_the_object_where_none_is_found(chain):
    assert chain.objects_of(" make it snow ") == ["make it snow"]
    with pytest.raises(ConfigError, match="found an empty one"):
        chain.objects_of("  ")
    with pytest.raises(ConfigError, match="objects of picture 0, found \\[\\]"):
        chain.condition(picture(), "make it snow", objects=[], regions=regions(2))
    with pytest.raises(ConfigError, match="expected a segmenter or regions"):
        chain.condition(picture(), "make it snow")
    with pytest.raises(ConfigError, match="expected one picture to edit, found 0"):
        chain.condition(None, "make it snow")


def test_text_states_are_those_of_the_encoder(text):
    states, keep = text.states(["an ice cube", ""])
    ids = text.tokenizer(["an ice cube", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.allclose(states, text.model(input_ids=ids).last_hidden_state, atol=1e-5)
    assert states.shape == (2, 77, 24) and keep.sum(1).tolist()[1] == 2 and torch.allclose(text.null(), states[1:], atol=1e-5)
    vectors, valid = text.names([["ice"], ["an ice cube", "sun"]])
    assert torch.allclose(vectors[1, 0], states[0, keep[0].sum() - 1], atol=1e-5), "the state of the end token"
    assert valid.tolist() == [[True, False], [True, True]] and not vectors[0, 1].any()


def test_parts_that_do_not_fit_are_refused(llava, text):
    from dataclasses import replace

    from reasonedit.tests.brains import TINY

    with pytest.raises(CheckpointError, match="language is 96 and not 48.*text is 32 and not 24"):
        ReasonBrainConditioner(tiny_brain(spec=replace(TINY, language=96, text=32)), llava, text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava_next"}, "found model_type 'llava_next'. Its tiles"),
        ({"model_type": "llava_phi", "auto_map": {}}, "found model_type 'llava_phi'"),
        ({"vision_feature_layer": [-2, -5]}, "expected one vision_feature_layer"),
        ({"text_config": None}, "found no vision_config and text_config"),
    ],
)
def test_another_layout_is_a_sentence(folder, tmp_path, change, words):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        load_llava(tmp_path / "copy")
    with pytest.raises(CheckpointError, match="with a config.json, found none"):
        load_llava(tmp_path)


def test_missing_weights_are_a_sentence(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/model.safetensors"
    state = load_file(file)
    state.pop(next(key for key in state if "q_proj" in key))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="found 1 missing: .*q_proj"):
        load_llava(tmp_path / "copy")


def test_lora_touches_the_language_model_and_the_new_rows_alone(folder, tmp_path):
    llava = load_llava(folder)
    llava.projector.requires_grad_(True)
    llava.add_lora(rank=2, alpha=4, dropout=0.0)
    names = llava.trainable()
    assert not any("vision" in name for name in names) and all(p.requires_grad for p in llava.projector.parameters())
    assert sum("lora_" in name for name in names) == 2 * 4 * 2, "two matrices, four projections, two layers"
    assert sorted(tuple(p.shape) for n, p in names.items() if "trainable_tokens" in n) == [(32, 48), (32, 48)]
    with torch.no_grad():
        for n, p in names.items():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    llava.save_lora(tmp_path / "lora")
    assert sum(file.stat().st_size for file in (tmp_path / "lora").iterdir()) < 60_000, "no whole tables"
    other = load_llava(folder, seed=5)
    other.load_lora(tmp_path / "lora")
    assert all(torch.equal(p, names[n]) for n, p in other.trainable().items()) and len(other.trainable()) == len(names)
    row = (torch.randn(1, 40, 48), torch.ones(1, 40, dtype=torch.bool), torch.arange(40)[None])
    with torch.no_grad():
        ours, theirs = llava.run(*row, logits=True), other.run(*row, logits=True)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    tables = [x.embed([x.img_ids])[0] for x in (llava, other)]
    assert torch.equal(*tables)


def test_a_lora_that_does_not_fit_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    llava = load_llava(folder)
    with pytest.raises(ConfigError, match="Call add_lora first"):
        llava.save_lora(tmp_path)
    llava.add_lora(rank=2)
    llava.save_lora(tmp_path / "lora")
    file = tmp_path / "lora/adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if "lora_A" in key)
    state["stray"] = state.pop(key).clone()
    save_file(state, file)
    with pytest.raises(CheckpointError, match=f"{key} is missing; stray is unknown"):
        load_llava(folder).load_lora(tmp_path / "lora")
    file.unlink()
    with pytest.raises(CheckpointError, match="found no adapter_model.safetensors"):
        load_llava(folder).load_lora(tmp_path / "lora")


# ---- chat templates

ADDING = (
    "{{ bos_token }}{% for turn in messages %}{{ '<|' + turn['role'] + '|>\\n' + turn['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""As the language models of some LLaVAs (Phi-3) have it: strings added up, which a list of parts makes fail."""

LISTING = (
    "{% for turn in messages %}{% for part in turn['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else '\\n' + part['text'] }}{% endfor %}{% endfor %} ASSISTANT:"
)


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (ADDING, "<s><|user|>\n", "\nmake it snow<|end|>\n<|assistant|>\n"),
        (LISTING, "", "\nmake it snow ASSISTANT:"),
        ("{% for turn in messages %}[{{ turn['content'] }}]{% endfor %}", "[", "\nmake it snow]"),  # prints a list
    ],
)
def test_templates_of_both_forms_are_filled_in(folder, template, before, after):
    llava = load_llava(folder)
    llava.tokenizer.chat_template = template
    prompt = llava.prompt("make it snow")
    assert tuple(llava.tokenizer.decode(ids) for ids in prompt) == (before, after)


@pytest.mark.parametrize(
    ("template", "found"),
    [("{{ raise_exception('no pictures') }}", "no pictures"), ("hello", "'hello'"), (ADDING * 2, "<image>")],
)
def test_a_template_that_takes_neither_form_is_a_sentence(folder, template, found):
    llava = load_llava(folder)
    llava.tokenizer.chat_template = template
    with pytest.raises(ConfigError, match="once and the instruction behind it, found .*" + found):
        llava.prompt("make it snow")
