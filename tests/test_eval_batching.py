"""Batches: as the core does one by one, and the same to the bit whatever stands beside."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core.dialogue.packfile import parse_pack
from reasonedit.reasonedit_core.errors import MalformedReply
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.loop import think_edit_reflect
from reasonedit.reasonedit_core.mini.items import scene
from reasonedit.reasonedit_core.mini.scenes import draw
from reasonedit.reasonedit_core.reasoners.qwen import QwenSpeaker
from reasonedit.reasonedit_core.types import Conditioning, EditRequest
from reasonedit.tests.eval_tools import dialogue
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.eval import batching, speaking
from reasonedit.training.eval.strands import run_strands

SYSTEMS = {"step1x-v1p2": "reasonedit-s", "qwen-edit-plus": "reasonedit-q"}
WORDS = ("Make it red.", "Remove the tree at the top left and paint the sky green.", "把圆圈变成蓝色。", 'Put "GO" on it.')
REPLY = 40


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    return load(request.param)


@pytest.fixture(scope="module", params=SYSTEMS)
def exact(request):
    """In float64, where random weights do not blow a rounding up."""
    loaded = load(request.param)
    for module in (loaded.mllm.model, loaded.generator.denoiser.transformer, loaded.generator.codec.vae):
        module.double()
    return loaded


def load(name):
    loaded = load_system(SystemSpec(SYSTEMS[name], tiny_checkpoint(name, std=0.2), device="cpu"))
    loaded.generator.conditioner.min_pixels = loaded.generator.conditioner.max_pixels = 84 * 84
    return loaded


def request_of(number: int, **options) -> EditRequest:
    defaults = {"steps": 2, "guidance": 1.0, "size_level": 96} | options
    return EditRequest(draw(scene(number)), WORDS[number % len(WORDS)], seed=number, **defaults)


def query(number: int, form: str = "free", **options) -> Query:
    said = {"free": "What is there?", "consistency": "Score it.", "verdict": "Decide.", "pair": "Give two marks."}[form]
    images = (draw(scene(number)),)
    return Query("think", "Look closely.", (0, said + " " + "Say more. " * number), images, form, REPLY, **options)


def batched(loaded):
    eyes = batching.Eyes(loaded.mllm)
    generator, serve = batching.batch_generator(loaded.generator, loaded.mllm, eyes)
    speaker = speaking.BatchSpeaker(loaded.mllm, eyes, min_pixels=84 * 84, max_pixels=84 * 84)
    return generator, serve | {"speak": speaker.serve}, speaker


# ---- edits ---------------------------------------------------------------------------------------------------------------


def run_edits(loaded, numbers, width, **options):
    generator, serve, _ = batched(loaded)

    def edit(number):
        wanted = request_of(number, **options)
        rng = torch.Generator().manual_seed(number)
        first = generator.edit(wanted, wanted.image, wanted.instruction, rng)
        return first, generator.edit(wanted, first.generated, "Now make it larger.", rng, latents=first.latents)

    return dict(run_strands([lambda n=n: edit(n) for n in numbers], serve, width=width))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_edits_equal_those_of_the_core(exact, guidance):
    """Source, chained latents, one and two guidance passes: what the core's own generator makes."""
    made = run_edits(exact, range(3), 3, guidance=guidance)
    for number in range(3):
        wanted = request_of(number, guidance=guidance)
        exact.generator._moments = OrderedDict()
        rng = torch.Generator().manual_seed(number)
        first = exact.generator.edit(wanted, wanted.image, wanted.instruction, rng)
        second = exact.generator.edit(wanted, first.generated, "Now make it larger.", rng, latents=first.latents)
        for own, core in zip(made[number], (first, second), strict=True):
            torch.testing.assert_close(own.latents, core.latents, rtol=1e-10, atol=1e-10)
            assert torch.equal(own.image, core.image)


def test_edits_do_not_depend_on_their_neighbours(system):
    alone = run_edits(system, range(5), 1)
    for width, numbers in ((5, range(5)), (3, (4, 0, 2, 1, 3))):
        together = run_edits(system, numbers, width)
        for at, number in enumerate(numbers):
            for own, other in zip(alone[number], together[at], strict=True):
                assert torch.equal(own.latents, other.latents)
                assert torch.equal(own.image, other.image)


def test_more_rows_than_a_slab(system):
    """Nine rows are several slabs of everything; every one gets its own answer."""
    made = run_edits(system, [0, 1, 2, 3, 0, 1, 2, 3, 0], 9)
    for at in range(4, 9):
        assert torch.equal(made[at][1].latents, made[at % 4][1].latents)
    assert not torch.equal(made[0][0].latents, made[1][0].latents)


def test_padded_texts_are_masked():
    """What stands behind a shorter text is not seen."""
    rows = [Conditioning(torch.ones(1, length, 4)) for length in (3, 5)]
    joined = batching.join(rows, 8)
    assert joined.tokens.shape == (2, 8, 4)
    assert joined.mask.tolist() == [[True] * 3 + [False] * 5, [True] * 5 + [False] * 3]
    assert joined.positions is None


# ---- replies -------------------------------------------------------------------------------------------------------------

FORMS = ("free", "consistency", "verdict", "pair")


def run_replies(speaker, queries):
    answers = speaker.serve(queries)
    assert all(answer.error is None and answer.seconds > 0 for answer in answers)
    return [answer.value for answer in answers]


def test_replies_equal_those_of_the_core(system):
    """Every form, prompts of several lengths, greedy and drawn."""
    speaker = batched(system)[2]
    queries = [query(n, form) for n in range(2) for form in FORMS]
    queries += [query(1, form, temperature=0.8, top_p=0.9, seed=5) for form in FORMS]
    core = QwenSpeaker(system.mllm, min_pixels=84 * 84, max_pixels=84 * 84, max_side=None)
    assert run_replies(speaker, queries) == core.answer(queries)


def test_a_penalty_is_applied(system, monkeypatch):
    monkeypatch.setattr(system.mllm, "repetition_penalty", 1.4)
    speaker = batched(system)[2]
    core = QwenSpeaker(system.mllm, min_pixels=84 * 84, max_pixels=84 * 84, max_side=None)
    found = run_replies(speaker, [query(0)])
    assert found == core.answer([query(0)])
    monkeypatch.setattr(system.mllm, "repetition_penalty", 1.0)
    assert found != run_replies(speaker, [query(0)])


def test_replies_do_not_depend_on_their_neighbours(system, monkeypatch):
    """To the bit: the logits of a row are the same alone and among others, also after some of these have ended."""
    seen: dict[str, list[torch.Tensor]] = {}
    inner = speaking.BatchSpeaker._next

    def note(self, row, logits):
        if not row.reply.done and not row.fed:
            seen.setdefault(str(row.query.parts), []).append(logits.clone())
        return inner(self, row, logits)

    monkeypatch.setattr(speaking.BatchSpeaker, "_next", note)
    queries = [query(n % 6) for n in range(12)]
    queries = [replace(one, parts=(0, f"{one.parts[1]} {n}"), max_new_tokens=4 + 3 * n) for n, one in enumerate(queries)]
    speaker = batched(system)[2]
    together = run_replies(speaker, queries)
    first, seen = dict(seen), {}
    alone = [run_replies(speaker, [one])[0] for one in queries]
    assert alone == together
    assert len(seen) == len(queries)
    for key, logits in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(first[key], logits, strict=True))


def test_a_prompt_that_does_not_fit_is_the_error_of_its_own_run(system):
    speaker = batched(system)[2]
    good, bad = speaker.serve([query(0), replace(query(0), max_new_tokens=10**6)])
    assert good.value and good.error is None
    assert "leaves room for" in str(bad.error)


# ---- the loop ------------------------------------------------------------------------------------------------------------


def test_the_whole_loop_equals_the_core_and_any_width(system):
    """Thoughts, verdicts, rounds and pictures of `think_edit_reflect` as it stands; where random weights say nothing that can
    be read, the same error."""
    wanted = [request_of(number, max_rounds=2) for number in range(4)]
    core = QwenSpeaker(system.mllm, min_pixels=84 * 84, max_pixels=84 * 84, max_side=None)
    reasoner = system.reasoner.bound()
    reasoner.pack = parse_pack(dialogue(), "short")

    def run(width):
        generator, serve, _ = batched(system)
        asking = reasoner.bound()
        asking.speaker = speaking.AskingSpeaker()
        works = [lambda r=r: _words(r, reasoner=asking, generator=generator) for r in wanted]
        return [value for _, value in sorted(run_strands(works, serve, width=width))]

    together = run(4)
    assert any(isinstance(told, tuple) for told in together)
    assert run(1) == together
    reasoner.speaker = core
    assert [_words(r, reasoner=reasoner, generator=system.generator) for r in wanted] == together


def _words(request, **parts):
    try:
        trace = think_edit_reflect(request, **parts)
    except MalformedReply as error:
        return str(error)
    rounds = [(made.instruction, made.input_index, made.reflection.raw, made.reflection.scores) for made in trace.rounds]
    return trace.thought.raw, trace.target, rounds, trace.best, trace.stop_reason
