"""ReasonBrain's nodes: cues that are seen and corrected, the same bits as the core's generator, and ComfyUI's own UNet steered
as ours is (in a real ComfyUI, when COMFYUI_PATH is set).
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reasonedit.reasonedit_core.denoisers.three_pass import null_context
from reasonedit.reasonedit_core.denoisers.unet import residual_map
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker
from reasonedit.reasonedit_core.types import Conditioning
from reasonedit.tests.brains import write_sam
from reasonedit.tests.comfy_server import comfyui_path
from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.tiny import tiny_checkpoint, tiny_reasonbrain

install_host()

from reasonedit.nodes import brain_patch, brain_values, folders, host, memory, reasonbrain, sockets  # noqa: E402
from reasonedit.tests.test_nodes_edit import Still, picture  # noqa: E402

SD = {"steps": 2, "guidance": 3.0, "image_guidance": 0.0, "size": 64, "negative": ""}
HIDDEN = SimpleNamespace(unique_id=None, dynprompt=None)


class Moved(Still):
    """A mover that remembers which components were used."""

    def __init__(self, *_args):
        super().__init__()
        self.used = []

    @contextmanager
    def __call__(self, component):
        self.used.append(component)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Models folders with a tiny ReasonBrain of each kind, SAM beside them, and an editor of another system."""
    base = tmp_path_factory.mktemp("models")
    (base / "reasonedit").mkdir()
    for kind in ("sd", "flux"):
        (base / "reasonedit" / f"brain-{kind}").symlink_to(tiny_reasonbrain(kind))
    (base / "reasonedit" / "reasonedit-s").symlink_to(tiny_checkpoint("step1x-v1p2"))
    write_sam(base / "sams" / "tiny-sam", "sam")
    return base


@pytest.fixture(autouse=True)
def hosted(place, monkeypatch):
    monkeypatch.setattr(host, "places", lambda key: [place / key])
    monkeypatch.setattr(host, "files", lambda key: [])
    monkeypatch.setattr(host, "compute_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(host, "choose_dtype", lambda name: "float32")
    monkeypatch.setattr(memory, "ComfyMover", Moved)


@pytest.fixture(scope="module")
def brains(place) -> dict:
    patch = pytest.MonkeyPatch()
    patch.setattr(host, "places", lambda key: [place / key])
    patch.setattr(host, "compute_device", lambda: torch.device("cpu"))
    patch.setattr(host, "choose_dtype", lambda name: "float32")
    patch.setattr(memory, "ComfyMover", Moved)
    made = {kind: reasonbrain.load_brain(f"reasonedit/brain-{kind}", "grid", "auto") for kind in ("sd", "flux")}
    patch.undo()
    return made


@pytest.fixture
def brain(brains):
    return brains["sd"]


def run(node, **inputs) -> tuple:
    return type(node)(node.__name__, (node,), {"hidden": HIDDEN}).execute(**inputs).result


# ---- loading -------------------------------------------------------------------------------------------------------------


def test_lists_know_a_brain_from_an_editor(place):
    assert folders.brain_names() == ["reasonedit/brain-flux", "reasonedit/brain-sd"]
    assert not any("brain" in name for name in (*folders.editor_names(), *folders.reasoner_names()))
    assert folders.sam_names() == ["sams/tiny-sam"] and folders.sam_kind("sams/tiny-sam") == "sam"
    with pytest.raises(ConfigError, match="expected SAM or SAM 2"):
        folders.sam_kind("reasonedit/reasonedit-s")


def test_the_checkpoint_decides_and_the_node_may_choose_another_segmenter(brain):
    assert (brain.kind, brain.name) == ("sd", "brain-sd") and brain.defaults["steps"] == 2
    sam = reasonbrain.load_brain("reasonedit/brain-sd", "sams/tiny-sam", "auto")
    finder = sam.generator.conditioner.finder
    assert finder.segmenter.name.startswith("sam-")
    told = [reasonbrain.Load.fingerprint_inputs("reasonedit/brain-sd", s, dtype="auto") for s in ("grid", "sams/tiny-sam")]
    assert "brain.safetensors" in told[0] and "tiny-sam" in told[1] and "tiny-sam" not in told[0]
    with pytest.raises(ConfigError, match="found nothing"):
        reasonbrain.load_brain("reasonedit/away", "grid", "auto")


# ---- cues ----------------------------------------------------------------------------------------------------------------


def test_objects_are_shown_and_corrected(monkeypatch):
    shown = []
    monkeypatch.setattr(host.Watch, "show", lambda self, text: shown.append(text))
    words = {"instruction": "What if the ice cube melted?", "names": "", "method": "auto"}
    assert run(reasonbrain.Objects, **words) == ("ice cube",)
    assert run(reasonbrain.Objects, **{**words, "names": "ice\n the sun；sky, ,"}) == ("ice, the sun, sky",)
    assert run(reasonbrain.Objects, **{**words, "method": "whole instruction"}) == ("What if the ice cube melted?",)
    assert shown == ["ice cube", "ice, the sun, sky", "What if the ice cube melted?"]
    with pytest.raises(ConfigError, match="reasoner: expected one to ask, found none"):
        run(reasonbrain.Objects, **{**words, "method": "reasoner"})
    assert "found an empty text" in reasonbrain.Objects.validate_inputs(" ")


def test_a_reasoner_is_asked_with_the_picture():
    speaker = ScriptedSpeaker({"objects": ['["sun"]']})
    for spoken in (speaker, sockets.Script({"objects": ('["sun"]',)})):
        handle = sockets.ReasonerHandle("x", None, spoken)
        words = {"instruction": "melt the ice", "names": "", "method": "reasoner", "image": picture(0), "reasoner": handle}
        assert run(reasonbrain.Objects, **words) == ("sun",)
    assert speaker.asked[0].images[0].shape == (1, 3, 48, 64)


def test_names_survive_the_wire():
    for names in (["ice cube"], ["a", "b c", "冰块"], ["red, green and blue"]):
        assert len(brain_values.read_objects(brain_values.say_objects(names))) == len(names)


def test_regions_are_seen_as_masks(brain):
    regions, masks = run(reasonbrain.Regions, brain=brain, image=picture(0, count=2))
    assert len(regions) == 2 and masks.shape == (32, 48, 64) and masks.max() == 1 and masks[:16].sum(0).eq(1).all()
    drawn = torch.zeros(1, 48, 64)
    drawn[:, :24, :32] = 1
    regions, masks = run(reasonbrain.Regions, brain=brain, image=picture(0), mask=drawn)
    assert torch.equal(masks, torch.stack([1 - drawn[0], drawn[0]])) and regions[0].geometry[:, 7].tolist() == [1, 0]
    with pytest.raises(ConfigError, match="covers something"):
        run(reasonbrain.Regions, brain=brain, image=picture(0), mask=torch.zeros(1, 48, 64))
    blind = copy.copy(brain.generator)
    blind.conditioner = copy.copy(blind.conditioner)
    blind.conditioner.brain = SimpleNamespace(switches=SimpleNamespace(region_branch=False))
    with pytest.raises(ConfigError, match="found one whose region branch is off"):
        run(reasonbrain.Regions, brain=replace(brain, generator=blind), image=picture(0))


# ---- editing -------------------------------------------------------------------------------------------------------------


def test_edit_makes_the_bits_of_the_core(brain):
    image = picture(1, 37, 53)
    out, made, names = run(reasonbrain.Edit, brain=brain, image=image, instruction="melt the ice", seed=3, objects="", **SD)
    (source,) = sockets.to_pictures(image)
    request = brain.request(source, "melt the ice", seed=3, **SD)
    theirs = brain.generator.edit(request, source, "melt the ice", torch.Generator().manual_seed(3))
    assert torch.equal(out, sockets.to_image([theirs.image])) and names == "ice" and out.shape == image.shape
    assert torch.equal(made.items[0].latents, theirs.latents)
    other = run(reasonbrain.Edit, brain=brain, image=image, instruction="melt the ice", seed=3, objects="fire", **SD)
    assert other[2] == "fire" and not torch.equal(other[0], out)
    assert {"mllm", "dit", "vae"} <= set(brain.mover.used) and min(brain.mover.needs.values()) > 0


def test_batches_alpha_chains_and_regions(brain):
    image = picture(2, channels=4, count=2)
    words = {"brain": brain, "instruction": "melt the ice", "objects": "ice", **SD}
    regions, _ = run(reasonbrain.Regions, brain=brain, image=image)
    out, made, _ = run(reasonbrain.Edit, image=image, seed=5, regions=regions, **words)
    assert out.shape == image.shape and torch.equal(out[..., 3], image[..., 3])
    second = run(reasonbrain.Edit, image=image[1:], seed=6, regions=regions[1:], **words)[0]
    assert torch.equal(out[1:], second), "seed + place in the batch"
    before = brain.generator.counts.vae_encodes
    run(reasonbrain.Edit, image=out, seed=7, previous=made, **words)
    assert brain.generator.counts.vae_encodes == before, "the latents were used"
    changed = (out * 0.5).clone()
    run(reasonbrain.Edit, image=changed, seed=7, previous=made, **words)
    assert brain.generator.counts.vae_encodes == before + 2
    with pytest.raises(ConfigError, match="regions: expected those of 1 picture or of 1, found 2"):
        run(reasonbrain.Edit, image=image[:1], seed=5, regions=regions, **words)


def test_flux_edits_and_refuses_what_it_has_not(brains):
    words = {"brain": brains["flux"], "image": picture(0), "instruction": "melt it", "seed": 0, "objects": ""}
    assert run(reasonbrain.Edit, **words, **SD)[0].shape == (1, 48, 64, 3)
    with pytest.raises(ConfigError, match="image_guidance: expected none with FLUX"):
        run(reasonbrain.Edit, **words, **{**SD, "image_guidance": 2.0})


def test_steps_are_counted_over_a_batch_and_previews_have_a_grid(brain, monkeypatch):
    seen, shown = [], []
    monkeypatch.setattr(host, "StepBar", lambda total: SimpleNamespace(update=lambda *args: seen.append((total, *args))))
    monkeypatch.setattr(host, "previewer", lambda system: lambda latents: shown.append((system, latents.shape)) or "small")
    words = {"brain": brain, "instruction": "melt it", "objects": "ice", "seed": 0, **SD}
    run(reasonbrain.Edit, image=picture(0, 64, 64, count=2), **words)
    assert seen == [(4, n, "small") for n in (1, 2, 3, 4)] and shown == [("reasonbrain-sd", (1, 4, 8, 8))] * 4


# ---- ComfyUI's own UNet --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guidance(brains):
    return brain_values.reason(brains["sd"], picture(3), "melt the ice", "ice")


def test_guidance_is_what_the_generator_would_take(brain, guidance):
    (source,) = sockets.to_pictures(picture(3))
    theirs = brain.using("ice").condition(source, "melt the ice")
    assert torch.equal(guidance.conditioning.tokens, theirs.tokens) and guidance.objects == ("ice",)
    assert all(torch.equal(a, b) for a, b in zip(guidance.conditioning.residual, theirs.residual, strict=True))
    with pytest.raises(ConfigError, match="image: expected one picture, found a batch of 2"):
        brain_values.reason(brain, picture(0, count=2), "melt", "ice")


def test_a_model_that_cannot_be_steered_is_a_sentence(guidance, brains):
    brain_values.check_model(guidance, 8, 24, 32)
    with pytest.raises(ConfigError, match="expected an SD 1.5 of 8 input channels, .*found 4. Load the UNet"):
        brain_values.check_model(guidance, 4, 24, 32)
    with pytest.raises(ConfigError, match=r"context, channels: \(24, 32\)\), found \(768, 320\)"):
        brain_values.check_model(guidance, 8, 768, 320)
    flux = brain_values.reason(brains["flux"], picture(3), "melt the ice", "ice")
    with pytest.raises(ConfigError, match="found FLUX's"):
        brain_values.check_model(flux, 8, 24, 32)


def test_the_patch_adds_to_the_rows_it_belongs_to_and_behind_the_first_layer_alone(guidance):
    source = torch.randn(1, 4, 6, 8)
    both, image, none = (row[0] for row in brain_values.as_comfy(guidance, source))
    assert torch.equal(null_context(guidance.null, 154)[0][:, :77], none[0]) and "concat_latent_image" not in none[1]
    cond = [{"uuid": n, **extra} for n, (_, extra) in enumerate((none, image, both))]
    given = []

    def executor(model, conds, x, t, options):
        given.append(options["transformer_options"])

    model_options = {"transformer_options": {"patches": {"x": []}}}
    brain_patch.note_residuals(executor, None, [[cond[0]], [cond[1]], None, [cond[2]]], None, None, model_options)
    assert "patches" in given[0] and brain_patch.KEY not in model_options["transformer_options"], "nothing stays behind"
    h = torch.randn(6, 32, 6, 8)
    options = {**given[0], "block": ("input", 0), "uuids": [2, 0, 1]}
    out = brain_patch.add_residuals(h, options)
    full = residual_map(guidance.conditioning, (6, 8), h.dtype)
    alone = residual_map(Conditioning(both[0], residual=guidance.conditioning.residual[:1]), (6, 8), h.dtype)
    assert torch.allclose(out - h, torch.cat([full, full, 0 * full, 0 * full, alone, alone]), atol=1e-5)
    assert brain_patch.add_residuals(h, {**options, "block": ("input", 1)}) is h
    assert brain_patch.add_residuals(h, {"block": ("input", 0), "uuids": [1]}) is h


LIVE = Path(__file__).with_name("comfy_unet.py")


def test_comfyuis_unet_is_steered_as_ours_is(tmp_path):
    """Guided predictions of a real ComfyUI's DualCFGGuider against three-pass guidance of the library, same tiny weights."""
    comfy = comfyui_path()
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    run = [python, str(LIVE), str(comfy), str(tiny_reasonbrain()), str(tmp_path)]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("difference", "without", "refused")))
    assert float(figures["difference"]) < 1e-4, done.stdout
    assert float(figures["without"]) > 1e-2, "the residuals are seen"
    assert figures["refused"] == "4"


def test_missing_sam_is_told_when_loading(place):
    with pytest.raises(CheckpointError, match="no folder `segmenter`|expected a segmenter"):
        from reasonedit.reasonedit_core.load import SystemSpec, load_system

        brain = {"segmenter": "auto"}
        load_system(SystemSpec("reasonbrain", place / "reasonedit/brain-sd", reasoner="none", device="cpu", brain=brain))
