"""ComfyUI's attention under our networks: which calls it gets, which it refuses, and (in a real ComfyUI) what it computes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from reasonedit.nodes import memory
from reasonedit.reasonedit_core.kernels import Refused, attention, reference
from reasonedit.tests import attention_cases as cases
from reasonedit.tests.comfy_server import ROOT, comfyui_path
from reasonedit.tests.graph_runner import attention_pytorch, install_host
from reasonedit.tests.tiny import tiny_checkpoint

install_host()

import comfy.ldm.modules.attention as theirs  # noqa: E402

from reasonedit.nodes import edit, folders, host, models, sockets  # noqa: E402
from reasonedit.tests.test_nodes_edit import Still, picture  # noqa: E402

CHECKPOINTS = {"S": "step1x-v1p2", "Q": "qwen-edit-plus"}
HOW = {"dialogue": "auto", "dtype": "auto", "weights_dtype": "auto", "variant": "auto"}
STEPS = {"steps": 4, "guidance": 3.0, "size": 64}
LEFT = torch.zeros(1, 48, 64)
LEFT[..., :32] = 1.0


class Mover(Still):
    """A mover that is told what to call when a component leaves."""

    def on_unload(self, component, release):
        """Nothing leaves."""


@pytest.fixture
def asked(monkeypatch) -> list[torch.Tensor | None]:
    """The mask of every call that ComfyUI's attention, PyTorch's here, was given."""
    seen = []

    def counted(q, k, v, heads, mask=None):
        seen.append(mask)
        return attention_pytorch(q, k, v, heads, mask)

    for name in ("attention_pytorch", "optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(theirs, name, counted)
    return seen


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load Editor's work on tiny checkpoints, on a device that ComfyUI calls no CPU unless `cpu` is set."""
    for name, tiny in CHECKPOINTS.items():
        shutil.copytree(tiny_checkpoint(tiny, std=0.2), tmp_path / "reasonedit" / name)
    monkeypatch.setattr(host, "places", lambda key: [tmp_path / key])
    monkeypatch.setattr(host, "files", lambda key: [])
    monkeypatch.setattr(host, "models_dir", lambda: tmp_path)
    monkeypatch.setattr(host, "choose_dtype", lambda name: "float32")
    monkeypatch.setattr(host, "compute_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory, "ComfyMover", Mover)

    def run(name: str, cpu: bool = False, **more) -> sockets.EditorHandle:
        monkeypatch.setattr(host.mm, "is_device_cpu", lambda device: cpu)
        return models.load_editor(f"reasonedit/{name}", *[folders.FROM_CHECKPOINT] * 2, **HOW, **more)[0]

    return run


def draw(heads: int = 2, key_heads: int = 2, batch: int = 2) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 12, n, 16, generator=rng) for n in (heads, key_heads, key_heads)]


def padding() -> torch.Tensor:
    """(B, 1, 1, S) for `draw`: the last keys of the first sample are hidden."""
    return (torch.arange(12) < torch.tensor([[9], [12]]))[:, None, None]


# ---- which calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_load_editor_takes_it_for_auto_off_the_cpu_alone(name, load):
    assert load(name).generator.denoiser.host is host.attend
    assert load(name, cpu=True).generator.denoiser.host is None
    named = load(name, attention="reference").generator.denoiser
    assert named.host is None and named.backend == "reference"
    assert [load(name, **more).generator.batched_cfg for more in ({}, {"batched_cfg": True})] == [False, True]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_edit_asks_it_once_per_layer_on_full_steps(name, load, asked):
    editor, image = load(name), picture(3)
    config = editor.generator.denoiser.transformer.config
    layers = config.num_layers + config.get("num_single_layers", 0)
    connector = config.get("connector_depth", 0)  # its first layer once per text, the others once per forward
    each, once = layers + max(connector - 1, 0), min(connector, 1)
    edit.edit_all(editor, image, "make it red", seed=5, **STEPS)
    assert len(asked) == 2 * (once + STEPS["steps"] * each), "two passes of guidance"
    asked.clear()
    made = edit.edit_all(editor, image, "make it red", seed=5, region="mask", region_mask=LEFT, **STEPS)
    use = made.items[0].region
    assert use.partial > 0 and len(asked) == 2 * (once + use.full * each)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_named_attention_goes_past_it(name, load, asked):
    edit.edit_all(load(name, attention="reference"), picture(3), "make it red", seed=5, **STEPS)
    assert asked == []


@pytest.mark.parametrize("system", cases.SYSTEMS)
def test_every_mask_of_an_edit_is_read_as_our_own_attention_reads_it(system, asked):
    found, wanted = cases.velocities(system, "auto", host=host.attend), cases.velocities(system, "reference")
    assert any(mask is not None for mask in asked) and any(mask is None for mask in asked)
    for case in wanted:
        torch.testing.assert_close(found[case], wanted[case], atol=2e-5, rtol=0, msg=case)


# ---- what it is given ------------------------------------------------------------------------------------------------------


def test_three_axes_of_a_mask_are_heads_and_not_the_batch(asked):
    q, k, v = draw()
    mask = torch.stack([torch.ones(12, 12, dtype=torch.bool), torch.ones(12, 12, dtype=torch.bool).tril()])
    torch.testing.assert_close(host.attend(q, k, v, mask), reference.run(q, k, v, mask), atol=1e-5, rtol=0)
    assert asked[0].shape == (1, 2, 12, 12)


def test_the_function_is_looked_up_at_every_call(monkeypatch, asked):
    """Other packs put theirs in its place when their node runs."""
    q, k, v = draw()
    host.attend(q, k, v)
    monkeypatch.setattr(theirs, "optimized_attention", lambda q, k, v, heads, mask=None: q * 0)
    assert not host.attend(q, k, v).any() and len(asked) == 1


def test_keys_are_kept_from_a_function_that_writes_into_them(monkeypatch):
    def attention_sage(q, k, v, heads, mask=None):
        k -= k.mean(dim=1, keepdim=True)
        return attention_pytorch(q, k, v, heads, mask)

    monkeypatch.setattr(theirs, "optimized_attention", attention_sage)
    q, k, v = draw()
    kept = k.clone()
    torch.testing.assert_close(host.attend(q, k, v), reference.run(q, k, v), atol=1e-5, rtol=0)
    assert torch.equal(k, kept)


# ---- refusals --------------------------------------------------------------------------------------------------------------


def test_fewer_key_heads_are_refused(asked):
    with pytest.raises(Refused, match="as many key heads as query heads, found 2 and 4"):
        host.attend(*draw(heads=4))
    assert asked == []


def test_masks_are_for_pytorchs_attention_alone_and_our_own_takes_the_rest(monkeypatch, asked, caplog):
    def attention_foreign(q, k, v, heads, mask=None):
        raise AssertionError("it would have dropped the mask")

    monkeypatch.setattr(theirs, "optimized_attention_masked", attention_foreign)
    (q, k, v), mask = draw(), padding()
    with pytest.raises(Refused, match="only attention_pytorch is known to take a bool mask, found attention_foreign"):
        host.attend(q, k, v, mask)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert torch.equal(attention(q, k, v, mask, host=host.attend), attention(q, k, v, mask))
    assert sum("found attention_foreign" in line for line in caplog.messages) == 1
    attention(q, k, v, host=host.attend)
    assert asked == [None]


# ---- a real ComfyUI --------------------------------------------------------------------------------------------------------

REAL = """
import importlib.util, sys
sys.argv = ["main.py", "--cpu", *sys.argv[1:]]
sys.path.insert(0, {comfy!r})
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.ldm.modules.attention as theirs
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from pack.nodes import host
from pack.reasonedit_core.kernels import Refused
assert host.attention() is None, "on the CPU a graph makes the bits of a script"
rng = torch.Generator().manual_seed(1)
q, k, v = (torch.randn(2, 300, 4, 32, generator=rng) for _ in range(3))
padding = (torch.arange(300) < torch.tensor([[250], [300]]))[:, None, None]
print("FUNCTION", theirs.optimized_attention.__name__)
for name, mask in (("none", None), ("padding", padding)):
    try:
        found = host.attend(q, k, v, mask)
    except Refused as refusal:
        print(name, "refused:", refusal)
        continue
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(found, wanted.transpose(1, 2), atol=1e-5, rtol=0)
    print(name, "agrees")
"""


@pytest.mark.parametrize(
    ("flag", "name", "padded"),
    [
        ("--use-pytorch-cross-attention", "attention_pytorch", "agrees"),
        ("--use-quad-cross-attention", "attention_sub_quad", "refused: "),
        ("--use-split-cross-attention", "attention_split", "refused: "),
    ],
)
def test_the_real_function_is_torchs_attention(flag, name, padded):
    comfy = str(comfyui_path())
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    script = REAL.format(comfy=comfy, root=str(ROOT))
    done = subprocess.run([python, "-c", script, flag], cwd=comfy, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("FUNCTION", "none", "padding")))
    assert told["FUNCTION"] == name and told["none"] == "agrees" and told["padding"].startswith(padded)
