"""The user's choice of attention: it reaches every call of both DiTs, and is refused before weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core import cli, weight_options
from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import attend_with, chosen, dispatch, interval, reference
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.tests import attention_cases as cases
from reasonedit.tests import interpreter
from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.tests.workflow_files import facts_of_schema

install_host()

from reasonedit.nodes import host, models  # noqa: E402


def no_tensor(q, k, v, mask):
    return "it takes no bool tensor" if isinstance(mask, torch.Tensor) else None


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[int, int, int]]:
    """(batch, queries, keys) of every call of the backend `recording`; torch's own attention is broken meanwhile."""
    seen = []

    def run(q, k, v, mask=None):
        seen.append((*q.shape[:2], k.shape[1]))
        return reference.run(q, k, v, mask)

    def broken(*args, **kwargs):
        raise AssertionError("a call went past the chosen backend")

    own = dispatch.Backend("recording", lambda device: None, no_tensor, run)
    monkeypatch.setattr(dispatch, "BACKENDS", (own, *dispatch.BACKENDS))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    for name in ("sdpa", "batched"):
        monkeypatch.setattr(getattr(dispatch, name), "run", broken)
    return seen


# ---- every call ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", cases.SYSTEMS)
def test_every_call_of_full_and_partial_steps_takes_the_named_backend(system, recorded):
    """With one text and with two in a batch, whose masks the backend does not take; the host is gone past."""

    def asked(*args):
        raise AssertionError("the host was asked")

    found = cases.velocities(system, "recording", host=asked)
    n = cases.calls(system)
    each = n["connector"] + n["blocks"]
    # A batch is run apart where its mask hides anything: v1.1 lets its blocks see the padding.
    joint = 2 * n["connector"] + (n["blocks"] if system == "s-v1.1" else 2 * n["blocks"])
    assert len(recorded) == n["before"] + 2 * each + 2 * n["before"] + 2 * joint
    partial = [(queries, keys) for _, queries, keys in recorded if queries < keys]
    assert len(partial) == n["blocks"] + (joint - 2 * n["connector"])
    wanted = cases.velocities(system, "reference")
    for case in wanted:
        torch.testing.assert_close(found[case], wanted[case], atol=2e-5, rtol=0, msg=case)


def test_auto_asks_the_host_as_before():
    asked = []
    cases.velocities("q", "auto", host=lambda q, k, v, mask: asked.append(1) or reference.run(q, k, v, mask))
    assert len(asked) == 2 * cases.calls("q")["blocks"], "on full steps alone: partial ones have fewer queries than keys"


@pytest.mark.slow
def test_interval_is_sdpa_to_rounding_on_both_networks():
    interpreter.run("chosen")


# ---- masks ---------------------------------------------------------------------------------------------------------------


def draw(batch, queries, keys):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(batch, n, 2, 16, generator=rng) for n in (queries, keys, keys)]


LENGTHS = torch.tensor([5, 9])
VALID = torch.arange(9) < LENGTHS[:, None]
MASKS = {
    "keys": torch.nn.functional.pad(VALID, (0, 3), value=True)[:, None, None],
    "pairs": torch.nn.functional.pad(VALID[:, None, :, None] & VALID[:, None, None], (0, 3, 0, 3)),
    "one for all": (torch.arange(12) > 2)[None],
    "nothing": torch.zeros(2, 1, 1, 12, dtype=torch.bool),
    "nothing in one": torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 12),
    "all": torch.ones(12, 12, dtype=torch.bool),
    "causal": torch.ones(12, 12, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_run_sample_by_sample_where_a_backend_takes_none(name, recorded):
    q, k, v = draw(2, 12, 12)
    attend = attend_with(backend="recording")
    for _ in range(2):
        torch.testing.assert_close(attend(q, k, v, MASKS[name]), reference.run(q, k, v, MASKS[name]), atol=1e-6, rtol=0)
    assert {batch for batch, _, _ in recorded} == {1} and len(recorded) == 4
    assert len(attend._looked_at) == 1, "looked at once"


def test_masks_that_no_interval_says_are_refused(recorded):
    q, k, v = draw(1, 4, 4)
    attend = attend_with(backend="recording")
    gaps = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    with pytest.raises(BackendUnavailable, match="'recording': expected a mask in which each query sees one run of keys.*auto"):
        attend(q, k, v, gaps)
    with pytest.raises(BackendUnavailable, match="expected a mask that all heads share, found"):
        attend(q, k, v, gaps.expand(1, 2, 4, 4))


def test_a_backend_that_takes_masks_gets_them_whole(monkeypatch):
    masks = []
    own = dispatch.Backend("own", lambda device: None, lambda *call: None, lambda q, k, v, mask: masks.append(mask) or q)
    monkeypatch.setattr(dispatch, "BACKENDS", (own,))
    attend_with(backend="own")(*draw(2, 12, 12), MASKS["keys"])
    assert len(masks) == 1 and masks[0] is MASKS["keys"]


# ---- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("fast", ConfigError, "expected one of auto, interval, sdpa, flash, sage, kitchen, reference, found 'fast'"),
        ("varlen", BackendUnavailable, r"found 'varlen', which cannot: it takes the mask of a pack \(PackMask\) only. Choose"),
        ("batched", BackendUnavailable, "'batched', which cannot: it takes the mask of a pack"),
        ("interval", BackendUnavailable, "on cpu, found 'interval', which cannot: it takes float16 or bfloat16"),
    ],
)
def test_a_choice_that_cannot_run_is_refused_before_the_weights_are_looked_for(name, error, words, tmp_path):
    with pytest.raises(error, match=words):
        load_system(SystemSpec("reasonedit-s", tmp_path / "none", "none", dtype="float32", device="cpu", attention=name))


def test_what_the_machine_lacks_is_said():
    with pytest.raises(BackendUnavailable, match="'interval', which cannot: it needs CUDA, not cpu. Choose another of auto"):
        chosen.check("interval", torch.device("cpu"), torch.bfloat16)


def test_the_head_dims_of_the_network_count(monkeypatch):
    monkeypatch.setattr(interval, "MAX_HEAD_DIM", 8)
    with pytest.raises(BackendUnavailable, match="it takes one head dim up to 8, got 16"):
        chosen.check("interval", torch.device("cpu"), torch.bfloat16, {16})


@pytest.mark.parametrize("kind", ["reasonedit-s:step1x-v1p2", "reasonedit-q:qwen-edit-plus"])
def test_the_loader_hands_the_choice_to_the_denoiser(kind, monkeypatch):
    looked = []
    real = chosen.check
    monkeypatch.setattr(chosen, "check", lambda *call: looked.append(call[3:]) or real(*call))
    system, tiny = kind.split(":")
    for name in ("auto", "reference"):
        spec = SystemSpec(system, tiny_checkpoint(tiny), "none", dtype="float32", device="cpu", attention=name)
        assert load_system(spec).generator.denoiser.backend == name
    config = load_system(spec).generator.denoiser.transformer.config
    assert looked[0] == () and config.attention_head_dim in looked[1][0]


# ---- command line and node -----------------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_dispatch():
    assert weight_options.ATTENTION == models.ATTENTION == chosen.names()


def edit(folder: Path, name: str) -> int:
    Image.new("RGB", (64, 48), "red").save(folder / "cat.png")
    weights = tiny_checkpoint("step1x-v1p2", std=0.2)
    how = ["--reasoner", "none", "--device", "cpu", "--steps", "1", "--size", "64", "--quiet", "--attention", name]
    call = ["edit", str(folder / "cat.png"), "make it red", "--system", "reasonedit-s", "--weights", str(weights)]
    return cli.main([*call, "--out", str(folder / "out"), *how])


def test_the_command_line_takes_it_and_the_trace_says_it(tmp_path):
    for name, ran in (("reference", ["reference"]), ("auto", ["sdpa"])):
        assert edit(tmp_path, name) == 0
        asked = json.loads((tmp_path / "out" / "trace.json").read_text())["request"]
        assert (asked["attention"], asked["attention_ran"]) == (name, ran)


@pytest.mark.parametrize(
    ("name", "words"), [("interval", "expected a backend that can run the DiT on cpu"), ("flex", "invalid choice: 'flex'")]
)
def test_the_command_line_refuses_before_anything_is_written(tmp_path, capsys, name, words):
    assert edit(tmp_path, name) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_node_has_it_and_old_graphs_do_without(monkeypatch):
    monkeypatch.setattr(host, "places", lambda key: [])
    monkeypatch.setattr(host, "files", lambda key: [])
    schema = models.LoadEditor.define_schema()
    found = facts_of_schema(schema)["attention"]
    assert found.optional
    assert found.options == models.ATTENTION and found.default == "auto"
