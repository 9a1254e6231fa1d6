"""Pictures on the wires, and Edit over the core's generator: the same bits as the script loop, batches, alpha, references."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core import flow
from reasonedit.reasonedit_core.dialogue.prompts import default_pack
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted
from reasonedit.reasonedit_core.latents import pack
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.loop import POLICIES, think_edit_reflect
from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.tiny import tiny_checkpoint

install_host()

from reasonedit.nodes import edit, reflect, sockets  # noqa: E402

STEPS = {"steps": 2, "guidance": 3.0, "size": 64}


class Still:
    """A mover for weights that are where they are computed with; remembers what it was told."""

    device = torch.device("cpu")

    def __init__(self, *_args):
        self.needs = {}

    def need(self, component, nbytes):
        self.needs[component] = nbytes

    def __call__(self, component):
        return nullcontext()

    def release(self):
        """Nothing is managed."""


def handle(name: str) -> sockets.EditorHandle:
    """A tiny editor whose weights stay on the CPU."""
    folder = tiny_checkpoint({"reasonedit-s": "step1x-v1p2", "reasonedit-q": "qwen-edit-plus"}[name], std=0.2)
    system = load_system(SystemSpec(name, folder, "none"))
    cpu = torch.device("cpu")
    return sockets.EditorHandle(name, name, system.generator, system.defaults, system.mllm, Still(), cpu)


@pytest.fixture(scope="module", params=["reasonedit-s", "reasonedit-q"])
def editor(request):
    return handle(request.param)


def picture(seed: int, height: int = 48, width: int = 64, channels: int = 3, count: int = 1) -> torch.Tensor:
    """An IMAGE of 8-bit values."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, channels), generator=rng) / 255


# ---- pictures ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_images_and_pictures_are_two_forms_of_one_thing(count, height, width, seed):
    image = picture(seed, height, width, 3, count)
    pictures = sockets.to_pictures(image)
    assert [p.shape for p in pictures] == [(1, 3, height, width)] * count
    assert torch.equal(sockets.to_image(pictures), image)


def test_alpha_is_composited_on_white_and_put_back():
    image = picture(1, channels=4, count=2)
    image[0, :5, :, 3], image[0, 5:, :, 3] = 0, 1
    (first, _), alpha = sockets.to_pictures(image), sockets.alpha_of(image)
    assert torch.equal(first[0, :, :5], torch.ones(3, 5, 64))
    assert torch.equal(first[0, :, 5:].permute(1, 2, 0), image[0, 5:, :, :3])
    back = sockets.to_image(sockets.to_pictures(image), alpha)
    assert back.shape == image.shape and torch.equal(back[..., 3], image[..., 3])
    larger = sockets.to_image([torch.zeros(1, 3, 96, 128)] * 2, alpha)
    assert larger.shape == (2, 96, 128, 4) and 0 <= float(larger[..., 3].min()) <= float(larger[..., 3].max()) <= 1.0001


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(1, 3, 4), torch.zeros(1, 4, 4, 2), torch.zeros(0, 4, 4, 3), "text"],
    ids=["rank", "channels", "empty", "text"],
)
def test_what_is_no_image_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match="reference_2: expected an IMAGE"):
        sockets.to_pictures(bad, "reference_2")


def test_a_batch_is_refused_where_one_picture_is_meant():
    with pytest.raises(ConfigError, match="batch of 2"):
        sockets.to_picture(picture(1, count=2))


def test_values_outside_the_range_are_clamped():
    (seen,) = sockets.to_pictures(torch.tensor([[[[-1.0, 0.5, 2.0]]]]))
    assert seen.flatten().tolist() == [0, 0.5, 1]


# ---- requests ------------------------------------------------------------------------------------------------------------


def test_zero_and_empty_stand_for_the_checkpoints_own(editor):
    image = torch.zeros(1, 3, 32, 32)
    request = editor.request(image, "x", seed=2**64 + 3)
    assert (request.steps, request.guidance, request.size_level) == tuple(
        editor.defaults[n] for n in ("steps", "guidance", "size_level")
    )
    assert request.negative is None and request.seed == 3
    given = editor.request(image, "x", seed=1, steps=7, guidance=1.0, size=256, negative="blur")
    assert (given.steps, given.guidance, given.size_level, given.negative) == (7, 1.0, 256, "blur")


def test_an_edit_says_what_memory_each_component_needs(editor):
    request = editor.request(torch.zeros(1, 3, 64, 64), "x", seed=0, size=64)
    editor.expect(request, request.image)
    small = dict(editor.mover.needs)
    request = editor.request(torch.zeros(1, 3, 64, 64), "x", seed=0, size=1024)
    editor.expect(request, request.image)
    assert small.keys() == {"mllm", "dit", "vae"} and all(v > 0 for v in small.values())
    assert editor.mover.needs["dit"] > 5 * small["dit"] and editor.mover.needs["vae"] > 30 * small["vae"]


# ---- edits ---------------------------------------------------------------------------------------------------------------


def test_a_batch_is_edited_one_by_one_with_seed_plus_index(editor):
    image = picture(3, count=2)
    made = edit.edit_all(editor, image, "make it red", seed=5, **STEPS)
    assert made.image.shape == image.shape and len(made.items) == 2
    for n in range(2):
        alone = edit.edit_all(editor, image[n : n + 1], "make it red", seed=5 + n, **STEPS)
        assert torch.equal(alone.image[0], made.image[n])
    assert not torch.equal(edit.edit_all(editor, image[1:], "make it red", seed=5, **STEPS).image[0], made.image[1])


def test_alpha_goes_round_the_models(editor):
    image = picture(4, channels=4)
    made = edit.edit_all(editor, image, "make it red", seed=5, **STEPS)
    assert made.image.shape == image.shape and torch.equal(made.image[..., 3], image[..., 3])
    flat = sockets.to_image(sockets.to_pictures(image))
    assert torch.equal(made.image[..., :3], edit.edit_all(editor, flat, "make it red", seed=5, **STEPS).image)


def test_latents_are_handed_on_only_with_their_very_picture(editor):
    image = picture(5)
    first = edit.edit_all(editor, image, "make it red", seed=5, **STEPS)
    chained = edit.edit_all(editor, first.image, "add snow", seed=6, previous=first, **STEPS)
    copied = edit.edit_all(editor, first.image.clone(), "add snow", seed=6, previous=first, **STEPS)
    assert torch.equal(chained.image, copied.image)
    plain = edit.edit_all(editor, first.image, "add snow", seed=6, **STEPS)
    assert not torch.equal(chained.image, plain.image)
    touched = first.image * 0.5
    assert torch.equal(
        edit.edit_all(editor, touched, "add snow", seed=6, previous=first, **STEPS).image,
        edit.edit_all(editor, touched, "add snow", seed=6, **STEPS).image,
    )


def test_references_go_to_the_system_that_takes_them(editor):
    image, other = picture(6), picture(7, 32, 32)
    if editor.system == "reasonedit-s":
        with pytest.raises(ConfigError, match="reference_2, reference_3: expected none"):
            edit.edit_all(editor, image, "as in Picture 2", seed=1, references=[other], **STEPS)
        return
    with_one = edit.edit_all(editor, image, "as in Picture 2", seed=1, references=[other], **STEPS)
    assert with_one.image.shape == image.shape
    assert not torch.equal(with_one.image, edit.edit_all(editor, image, "as in Picture 2", seed=1, **STEPS).image)
    with pytest.raises(ConfigError, match="reference_3: expected 1 picture"):
        edit.edit_all(editor, image, "x", seed=1, references=[other, picture(8, count=3)], **STEPS)


def test_cancelling_ends_an_edit_at_the_next_step(editor):
    polls = iter([False, True])
    with pytest.raises(Interrupted):
        edit.edit_all(editor, picture(9), "x", seed=1, should_stop=lambda: next(polls), **STEPS)


def test_cancelling_leaves_as_comfyuis_own_exception(monkeypatch):
    from reasonedit.nodes import host

    class Cancelled(BaseException):
        """In place of ComfyUI's."""

    monkeypatch.setattr(host.mm, "InterruptProcessingException", Cancelled, raising=False)
    monkeypatch.setattr(host.mm, "throw_exception_if_processing_interrupted", lambda: None, raising=False)
    with pytest.raises(Cancelled), host.cancellable(SimpleNamespace(unique_id="6.round2.4"), "Edit"):
        raise Interrupted("stopped")


def test_errors_of_later_rounds_name_the_round_and_the_node():
    from reasonedit.nodes import host

    for node, words in (("6.round2.4", "round 2, node 4 (Edit): too dark"), ("4", "too dark")):
        with pytest.raises(ConfigError) as caught, host.cancellable(SimpleNamespace(unique_id=node), "Edit"):
            raise ConfigError("too dark")
        assert str(caught.value) == words


# ---- the loop's equal ----------------------------------------------------------------------------------------------------


def consistency(score: float, meets: str) -> str:
    keys = {"meets_instruction": meets, "major_conflicts": 0, "minor_conflicts": 0, "omissions": 0}
    return json.dumps({**keys, "raw_score": score, "reason": "seen"})


def pair(first: float, second: float) -> str:
    return json.dumps({"score": [first, second], "reasoning": "seen"})


REPLIES = {
    "describe": ["a red picture"],
    "score": [consistency(6, "partial"), consistency(8, "yes")],
    "edit_score": [pair(6, 6), pair(8, 8)],
    "quality_score": [pair(7, 7), pair(8, 9)],
    "reflect": ["<#Think>Too little.<#Reflection>Make it redder.", "<#Think>Fine.<#Success>"],
}


def reasoner() -> sockets.ReasonerHandle:
    return sockets.ReasonerHandle("script", default_pack("en"), sockets.Script({k: tuple(v) for k, v in REPLIES.items()}))


@pytest.mark.parametrize("policy", ["reasonedit", "released"])
def test_two_rounds_of_nodes_are_two_rounds_of_the_script(editor, policy):
    """Edit, Reflect, Edit on what was made, Reflect: every picture and verdict as the core's loop has them."""
    judge, image = reasoner(), picture(11)
    request = editor.request(sockets.to_picture(image), "make it red", seed=21, think=False, max_rounds=2, **STEPS)
    trace = think_edit_reflect(request, reasoner=judge.under(policy), generator=editor.generator, policy=POLICIES[policy])
    assert [made.input_index for made in trace.rounds] == [None, 0], "the scripted run refines once"

    first = edit.edit_all(editor, image, "make it red", seed=21, policy=policy, **STEPS)
    verdict = reflect.judge(judge, image, first.image, "make it red", policy=policy, seed=21)
    assert torch.equal(first.items[0].image, trace.rounds[0].image)
    assert verdict.reflection == trace.rounds[0].reflection and verdict.target == trace.target

    history = (sockets.HistoryRound("make it red", None, first.items[0], verdict),)
    second = edit.edit_all(editor, first.image, verdict.reflection.instruction, seed=22, policy=policy, previous=first, **STEPS)
    again = reflect.judge(judge, image, second.image, "make it red", history=history, policy=policy, seed=21)
    assert again.reflection == trace.rounds[1].reflection
    if policy == "reasonedit":  # released draws all rounds from one generator, which a graph cannot
        assert torch.equal(second.items[0].image, trace.rounds[1].image)


# ---- previews ------------------------------------------------------------------------------------------------------------


@dataclass
class Bar:
    """In place of ComfyUI's progress bar."""

    total: int
    seen: list = field(default_factory=list)

    def update(self, done, preview):
        self.seen.append((done, preview))


def test_previews_show_what_the_steps_head_for(editor, monkeypatch):
    """On a straight path from noise to a picture every preview is that picture, however noisy the latents are."""
    shown, bars = [], []
    monkeypatch.setattr(edit.host, "StepBar", lambda total: bars.append(Bar(total)) or bars[-1])
    monkeypatch.setattr(edit.host, "previewer", lambda system: lambda latents: shown.append(latents) or "picture")
    request = editor.request(torch.zeros(1, 3, 64, 64), "x", seed=0, size=64, steps=4)
    preview = edit.Preview(editor, 2, 4)
    for _ in range(2):
        preview.begin(request, request.image)
        height, width = preview._grid
        clean, noise = torch.randn(1, 16, 2 * height, 2 * width), torch.randn(1, 16, 2 * height, 2 * width)
        sigmas = flow.sigmas(4, height * width, editor.generator.schedule)
        for i in range(1, 5):
            preview(i, 4, pack(clean + float(sigmas[i]) * (noise - clean)))
        for latents in shown[-3:]:
            assert torch.allclose(latents, clean, atol=1e-4)
    assert bars[0].total == 8 and [done for done, _ in bars[0].seen] == list(range(1, 9))
    assert [picture is None for _, picture in bars[0].seen] == [True, False, False, False] * 2
