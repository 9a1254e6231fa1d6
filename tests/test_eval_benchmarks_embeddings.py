"""CLIP and DINO metrics: what is held against what, and the real classes on tiny random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import CheckpointError
from reasonedit.tests.benchmark_tools import damaged_png, prepared
from reasonedit.training.eval.benchmarks.embeddings import Scorers, features_of, measure_features
from reasonedit.training.eval.benchmarks.outputs import find_output, keep_output
from reasonedit.training.eval.encoders import Clip, Dino, digest_of


class Colours:
    """The mean colour of a picture, and the colours that words name, as unit rows."""

    name, sha256 = "colours", "0" * 64
    WORDS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}

    def __init__(self):
        self.calls = 0

    def pictures(self, paths):
        self.calls += 1
        rows = np.array([np.asarray(Image.open(path).convert("RGB"), float).mean((0, 1)) for path in paths])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def words(self, texts):
        return np.array([self.WORDS[text] for text in texts], float)


def plain(folder, name, colour):
    Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    return f"{name}.png"


@pytest.fixture
def world(tmp_path):
    """Reason50K with a red source, a green target, and words that say so."""
    root = tmp_path / "official"
    root.mkdir()
    row = {"id": "a", "category": "Story", "instruction": "x", "image": plain(root, "source", "red")}
    row |= {"target": plain(root, "target", (0, 255, 0)), "input_text": "red", "output_text": "green"}
    (root / "reason50k.jsonl").write_text(json.dumps(row))
    from reasonedit.training.eval.benchmarks.items import read_manifest
    from reasonedit.training.eval.benchmarks.prepare import prepare

    prepare("reason50k", root, tmp_path / "prepared")
    return read_manifest(tmp_path / "prepared")


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((0, 255, 0), {"clip_t": 1, "clip_i": 1, "clip_source": 0, "clip_dir": 1, "dino": 1, "dino_source": 0}),
        ((255, 0, 0), {"clip_t": 0, "clip_i": 0, "clip_source": 1, "clip_dir": None, "dino": 0, "dino_source": 1}),
        ((0, 0, 255), {"clip_t": 0, "clip_i": 0, "clip_source": 0, "clip_dir": 0.5, "dino": 0, "dino_source": 0}),
    ],
)
def test_each_metric_holds_the_right_two_together(colour, expected, world, tmp_path):
    edited = tmp_path / plain(tmp_path, "edited", colour)
    found = features_of(world, world.items[0], edited, Scorers(Colours(), Colours()))
    assert found == {name: value if value is None else pytest.approx(value, abs=1e-9) for name, value in expected.items()}


def test_what_a_benchmark_does_not_have_is_no_metric(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    found = features_of(manifest, manifest.items[0], manifest.sources(manifest.items[1])[0], Scorers(Colours()))
    assert found.keys() == {"clip_source", "clip_i"} and found["clip_i"] is None


def test_means_say_their_n_and_their_backbone_and_nothing_is_encoded_twice(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    for item in manifest.items[:3]:
        keep_output(tmp_path / "run", item, manifest.sources(item)[0].read_bytes())
    clip = Colours()
    told = measure_features(manifest, tmp_path / "run", manifest.items, Scorers(clip))
    assert told["clip_source"] == {
        "n": 5, "n_scored": 3, "mean": pytest.approx(1), "at_least": pytest.approx(0.2), "at_most": pytest.approx(1),
    }  # fmt: skip
    assert "clip_i" not in told and "dino" not in told
    assert told["backbones"] == {"clip": {"name": "colours", "sha256": "0" * 64}}
    assert told["anchors"].keys() == {"no-edit"} and told["anchors"]["no-edit"]["clip_source"]["n_scored"] == 3
    assert clip.calls == 3, "here the edited pictures are the sources, so that the anchor is known"
    assert measure_features(manifest, tmp_path / "run", manifest.items, Scorers(clip)) == told and clip.calls == 3
    other = manifest.sources(manifest.items[4])[0].read_bytes()
    find_output(tmp_path / "run" / "outputs", manifest.items[0]).write_bytes(other)
    measure_features(manifest, tmp_path / "run", manifest.items, Scorers(clip))
    assert clip.calls == 4
    clip.sha256 = "1" * 64  # other weights
    measure_features(manifest, tmp_path / "run", manifest.items, Scorers(clip))
    assert clip.calls == 8  # three pictures, and the source of the one that is another now


class Fixed:
    """A distance and a score that say which pictures they were asked of."""

    name, sha256 = "fixed", "2" * 64

    def distance(self, a, b):
        return 0.0 if a.read_bytes() == b.read_bytes() else 0.5

    def score(self, path):
        return float(Image.open(path).size[0])


def test_lpips_and_a_users_measure_stand_beside_with_their_anchors(world, tmp_path):
    keep_output(tmp_path / "run", world.items[0], world.sources(world.items[0])[0].read_bytes())
    told = measure_features(world, tmp_path / "run", world.items, Scorers(lpips=Fixed(), aesthetics=Fixed()))
    assert {name: told[name]["mean"] for name in ("lpips", "lpips_source", "aesthetics")} == {
        "lpips": 0.5, "lpips_source": 0.0, "aesthetics": 16.0,
    }  # fmt: skip
    assert told["anchors"]["no-edit"]["lpips_source"]["mean"] == 0.0 == told["anchors"]["ground-truth"]["lpips"]["mean"]
    assert set(told["backbones"]) == {"lpips", "aesthetics"} and "clip_t" not in told


def test_inside_and_outside_a_mask_are_told_apart(world, tmp_path):
    """Red source, green target. The left half may change; edited: green there, and blue on the right, where nothing may."""
    item, mask = world.items[0], tmp_path / "mask.png"
    edited = Image.new("RGB", (16, 16), (0, 0, 255))
    edited.paste((0, 255, 0), (0, 0, 8, 16))
    edited.save(tmp_path / "edited.png")
    keep_output(tmp_path / "run", item, (tmp_path / "edited.png").read_bytes())
    white = Image.new("L", (16, 16), 0)
    white.paste(255, (0, 0, 8, 16))
    white.save(mask)
    scorers = Scorers(Colours(), Colours(), Fixed())
    told = measure_features(world, tmp_path / "run", world.items, scorers, {item.id: mask})
    means = {name: told[name]["mean"] for name in ("clip_t_inside", "clip_i_inside", "dino_inside")}
    assert means == {name: pytest.approx(1) for name in means}
    half = pytest.approx(np.cos(np.pi / 4))  # half red, half blue, against red
    assert told["clip_outside"]["mean"] == half == told["dino_outside"]["mean"] and told["lpips_outside"]["mean"] == 0.5
    assert told["anchors"]["no-edit"]["clip_outside"]["mean"] == pytest.approx(1)
    assert told["anchors"]["no-edit"]["lpips_outside"]["mean"] == 0 and told["clip_outside"]["n"] == 1
    assert "clip_outside" not in measure_features(world, tmp_path / "run", world.items, scorers)


def test_a_damaged_picture_is_named_and_no_network_sees_it(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    for item in manifest.items:
        keep_output(tmp_path / "run", item, manifest.sources(item)[0].read_bytes())
    damaged_png(find_output(tmp_path / "run" / "outputs", manifest.items[1]))
    told = measure_features(manifest, tmp_path / "run", manifest.items, Scorers(Colours()))
    assert told["damaged"].keys() == {manifest.items[1].id} and told["clip_source"]["n_scored"] == 4
    assert told["anchors"]["no-edit"]["clip_source"]["n"] == 4


def test_a_folder_is_known_by_its_weights_not_by_its_name(tmp_path):
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    a, b, c = (digest_of(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(CheckpointError, match="with weights"):
        digest_of(tmp_path)


@pytest.mark.slow
def test_the_real_classes_on_tiny_random_weights(tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [chr(code) for code in range(97, 123)]
    tokens = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=12)
    text = {**small, "vocab_size": len(tokens), "max_position_embeddings": 12, "eos_token_id": len(tokens) - 1}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(tmp_path / "clip")
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino")
    paths = [tmp_path / plain(tmp_path, name, name) for name in ("red", "blue")]
    clip, eyes = Clip(tmp_path / "clip"), Dino(tmp_path / "dino")
    for rows, width in ((clip.pictures(paths), 8), (clip.words(["a", "b c d " * 9]), 8), (eyes.pictures(paths), 16)):
        assert (
            rows.shape == (2, width) and np.linalg.norm(rows, axis=1) == pytest.approx(1) and abs(rows[0] @ rows[1]) < 1 - 1e-6
        )
    with pytest.raises(CheckpointError):
        Clip(tmp_path)
