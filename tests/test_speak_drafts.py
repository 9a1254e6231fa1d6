"""Draft rounds: reflection on few steps, and one full run of what led to the chosen draft."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from reasonedit.reasonedit_core.cli import _check_draft, build_parser
from reasonedit.reasonedit_core.drafter import Drafter
from reasonedit.reasonedit_core.drafts import draft_request, drafts, full_run, left_to_make
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted
from reasonedit.reasonedit_core.load_lora import draft_adapter
from reasonedit.reasonedit_core.loop import POLICIES, Stop, next_step, think_edit_reflect
from reasonedit.reasonedit_core.report import RunFolder, trace_record
from reasonedit.reasonedit_core.run import round_line
from reasonedit.reasonedit_core.types import Counts, Decision, Draft, Edited, EditRequest, Reflection, Scores, Thought

MENDED = POLICIES["reasonedit"]


class Painter:
    """A picture follows from noise, input, instruction and number of steps; steps are counted."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    @property
    def steps(self):
        return sum(steps for steps, *_ in self.calls)

    def edit(self, request, picture, instruction, rng, *, latents=None, **more):
        if len(self.calls) == self.stop_at:
            raise Interrupted("stopped")
        self.calls.append((request.steps, request.guidance, instruction, None if latents is None else float(latents.mean())))
        value = torch.rand((), generator=rng) + picture.mean() + len(instruction) / 100 + request.steps / 1000
        image = torch.full((1, 3, 8, 8), float(value) % 1)
        return Edited(image, image, image)


class Scripted:
    """A reasoner that hands out prepared verdicts; a simple one, which scores at once."""

    def __init__(self, verdicts):
        self.verdicts, self.thoughts = list(verdicts), 0

    def bound(self, **run):
        return self

    def think(self, image, instruction, *, feedback=None):
        self.thoughts += 1
        return Thought(instruction, f"goal {self.thoughts}")

    def describe(self, image, goal, *, original=None):
        return f"picture of {goal}"

    def reflect(self, source, edited, goal, target, *, original=None):
        return self.verdicts.pop(0)


def verdict(decision, mark=5.0, instruction="more"):
    second = instruction if decision == "refine" else None
    return Reflection(Decision(decision), "why", second, Scores((mark, mark), (mark, mark), min(mark, 8.5)))


def run(verdicts, draft=None, drafter=None, painter=None, on_round=None, **options):
    painter = painter or Painter()
    request = EditRequest(torch.zeros(1, 3, 8, 8), "words", seed=5, steps=28, guidance=6.0, draft=draft, **options)
    trace = think_edit_reflect(
        request, reasoner=Scripted(verdicts), generator=painter, policy=MENDED, drafter=drafter, on_round=on_round
    )
    return trace, painter


VERDICT = st.builds(
    verdict, st.sampled_from(["success", "refine", "refine", "failed"]), st.sampled_from([0.0, 2.0, 5.0, 8.0]),
    st.sampled_from(["more", "less", "other", "x y"]),
)  # fmt: skip


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(VERDICT, min_size=6, max_size=6), st.integers(1, 6), st.integers(1, 8))
def test_drafts_take_the_course_of_the_run_and_end_in_its_result(verdicts, limit, steps):
    """Judged alike, the drafts lead where full rounds lead, and the full runs are the very pictures of these."""
    whole, painter = run(verdicts, max_rounds=limit)
    made, sketcher = run(verdicts, Draft(steps), max_rounds=limit)
    judged = drafts(made).rounds
    assert [(r.instruction, r.input_index) for r in judged] == [(r.instruction, r.input_index) for r in whole.rounds]
    assert made.stop_reason == whole.stop_reason and (made.best is None) == (whole.best is None)
    assert torch.equal(made.image, whole.image)
    full = made.rounds[len(judged) :]
    assert sketcher.steps == steps * len(judged) + 28 * len(full) and painter.steps == 28 * len(judged)
    assert all(r.reflection is None and r.full_of is not None for r in full)
    chain, at = [], whole.best
    while at is not None:
        chain.insert(0, at)
        at = whole.rounds[at].input_index
    assert [r.full_of for r in full] == chain, "only what led to the chosen draft is made in full"
    assert all(torch.equal(r.image, whole.rounds[r.full_of].image) for r in full)
    assert left_to_make(made, made.best) == [] and full_run(made, whole.best) == made.best
    assert isinstance(next_step(made), Stop), "a finished trace goes nowhere"


def test_one_accepted_draft_costs_its_steps_and_one_full_run():
    told = []
    made, painter = run([verdict("refine"), verdict("success", 8.0)], Draft(4, 1.0), on_round=told.append)
    assert [call[:2] for call in painter.calls] == [(4, 1.0), (4, 1.0), (28, 6.0), (28, 6.0)]
    latents = [call[3] for call in painter.calls]
    assert latents[1] == pytest.approx(float(made.rounds[0].image.mean()))
    assert latents[3] == pytest.approx(float(made.rounds[2].image.mean())), "a full run builds on a full run"
    assert made.best == 3 and len(told) == 6, "each full run is told, so that it is on the disk"


def test_forwards_of_a_real_editor_are_those_of_drafts_and_one_full_run():
    """Two drafts of 1 step without a second pass; then two full runs of 3 steps with it."""
    from reasonedit.reasonedit_core.load import SystemSpec, load_system
    from reasonedit.tests.tiny import tiny_checkpoint

    system = load_system(SystemSpec("reasonedit-s", tiny_checkpoint("step1x-v1p2"), reasoner="none", device="cpu"))
    request = EditRequest(torch.rand(1, 3, 64, 64), "words", steps=3, guidance=4.0, size_level=64, draft=Draft(1, 1.0))
    reasoner = Scripted([verdict("refine"), verdict("success", 8.0)])
    trace = think_edit_reflect(request, reasoner=reasoner, generator=system.generator, policy=MENDED)
    assert system.counts.denoiser_forwards == 2 * 1 * 1 + 2 * 3 * 2
    assert system.counts.vae_decodes == 4 and system.counts.vae_encodes == 1, "latents are passed on, drafts' and full ones"
    assert (trace.best, [made.full_of for made in trace.rounds]) == (3, [None, None, 0, 1])


def test_off_by_default_and_without_reflection():
    made, painter = run([verdict("success", 8.0)])
    assert painter.steps == 28 and made.rounds[0].full_of is None
    alone, painter = run([], Draft(4), reflect=False, think=False)
    assert painter.steps == 28 and len(alone.rounds) == 1, "one edit that nobody judges is the result, so it is no draft"


def test_when_no_draft_is_good_enough_nothing_is_made_in_full():
    made, painter = run([verdict("failed"), verdict("failed")], Draft(4))
    assert made.best is None and painter.steps == 8


def test_a_drafter_makes_the_drafts_and_nothing_else():
    sketcher = Painter()
    made, painter = run([verdict("refine"), verdict("success", 8.0)], Draft(4), drafter=sketcher)
    assert [call[0] for call in sketcher.calls] == [4, 4] and [call[0] for call in painter.calls] == [28, 28]
    _, painter = run([verdict("success", 8.0)], drafter=(unused := Painter()))
    assert unused.calls == [] and painter.steps == 28


def test_interrupted_in_the_full_run_the_draft_is_kept():
    with pytest.raises(Interrupted) as caught:
        run([verdict("success", 8.0)], Draft(4), painter=Painter(stop_at=1))
    trace = caught.value.trace
    assert (trace.best, trace.stop_reason, len(trace.rounds)) == (0, "interrupted", 1)


def test_the_released_policy_has_no_drafts():
    request = EditRequest(torch.zeros(1, 3, 8, 8), "words", draft=Draft(4))
    with pytest.raises(ConfigError, match="released policy"):
        think_edit_reflect(request, reasoner=Scripted([]), generator=Painter(), policy=POLICIES["released"])


def test_the_trace_tells_drafts_from_full_runs(tmp_path):
    made, _ = run([verdict("refine"), verdict("success", 8.0)], Draft(4))
    record = json.loads(json.dumps(trace_record(made, Counts())))
    assert record["request"]["draft"] == {"steps": 4, "guidance": None}
    told = [(r["steps"], r["full_of"], r["input_index"], r["decision"]) for r in record["rounds"]]
    assert told == [(4, None, None, "refine"), (4, None, 0, "success"), (28, 0, None, None), (28, 1, 2, None)]
    assert "round 2 in full" in round_line(made.rounds[3])
    plain, _ = run([verdict("success", 8.0)])
    record = trace_record(plain, Counts())
    assert "draft" not in record["request"] and not {"steps", "full_of"} & set(record["rounds"][0])
    result = RunFolder(tmp_path).finish(made)
    assert result.read_bytes() == (tmp_path / "rounds" / "03.png").read_bytes()


# ---- a LoRA for drafts ---------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.other(self.proj(x))


def write_lora(path, name="proj", **more):
    rng = torch.Generator().manual_seed(1)
    halves = {"A": torch.randn(2, 4, generator=rng), "B": torch.randn(4, 2, generator=rng)}
    state = {f"{name}.lora_{half}.weight": matrix for half, matrix in halves.items()}
    save_file(state | more, path)
    return state


def test_a_draft_lora_counts_in_drafts_alone(tmp_path):
    from reasonedit.reasonedit_core.lora import apply_lora

    network, x = Network(), torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    write_lora(tmp_path / "main.safetensors", "other")
    apply_lora(network, tmp_path / "main.safetensors", 0.5)
    base = network(x)
    state = write_lora(tmp_path / "fast.safetensors")
    name = draft_adapter(((tmp_path / "fast.safetensors", 2.0),), network)
    assert torch.equal(network(x), base), "off until a draft is made"

    class Generator:
        schedule = "own"

        def edit(self, fail=False):
            if fail:
                raise Interrupted("stopped")
            return self.schedule, network(x)

    generator = Generator()
    drafter = Drafter(generator, network, name, "few steps")
    schedule, drafted = drafter.edit()
    weight = network.proj.base_layer.weight + 2.0 * state["proj.lora_B.weight"] @ state["proj.lora_A.weight"]
    expected = network.other(nn.functional.linear(x, weight, network.proj.base_layer.bias))
    assert schedule == "few steps" and torch.allclose(drafted, expected, atol=1e-5)
    assert generator.edit()[0] == "own" and torch.equal(generator.edit()[1], base)
    with pytest.raises(Interrupted):
        drafter.edit(fail=True)
    assert torch.equal(network(x), base) and not any(p.requires_grad for n, p in network.named_parameters() if "lora" in n)


@pytest.mark.parametrize("key", ["proj.lora_magnitude_vector.weight", "proj.dora_scale", "proj.bias.set_weight"])
def test_a_draft_lora_must_be_one_that_can_be_switched_off(tmp_path, key):
    write_lora(tmp_path / "fast.safetensors", **{key: torch.ones(4)})
    with pytest.raises(ConfigError, match="can be switched off"):
        draft_adapter(((tmp_path / "fast.safetensors", 1.0),), Network())
    with pytest.raises(ConfigError, match="expected one, found 2"):
        draft_adapter(((tmp_path / "fast.safetensors", 1.0),) * 2, Network())
    assert draft_adapter((), Network()) == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--draft-guidance", "1"], "--draft-guidance: expected --draft-steps"),
        (["--draft-steps", "4", "--policy", "released"], "found released"),
        (["--draft-steps", "4", "--no-reflect"], "a run that reflects"),
        (["--draft-steps", "4", "--reasoner", "none"], "a run that reflects"),
        (["--draft-steps", "4", "--draft-guidance", "1"], None),
        ([], None),
    ],
)
def test_options_of_drafts(given, words):
    args = build_parser().parse_args(["edit", "cat.png", "x", "--system", "mini-s", "--out", "o", *given])
    if words is None:
        _check_draft(args)
        assert args.draft_steps == (4 if given else None)
        return
    with pytest.raises(ConfigError, match=words):
        _check_draft(args)


def test_guidance_of_a_draft_is_that_of_the_request_unless_told():
    request = EditRequest(torch.zeros(1, 3, 8, 8), "words", steps=28, guidance=6.0)
    assert draft_request(request) is request
    asked = draft_request(replace(request, draft=Draft(4)))
    assert (asked.steps, asked.guidance) == (4, 6.0)
