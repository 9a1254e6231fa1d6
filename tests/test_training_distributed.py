"""Two gloo ranks against one: gradients, resume, errors that one rank alone meets, and FSDP2. See engine_ranks.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.tests.engine_ranks import flat, lora_groups, lora_models
from reasonedit.tests.engine_toys import ToySource, toy_groups, toy_models, toy_settings, toy_step
from reasonedit.training import distributed
from reasonedit.training.distributed import ParallelSettings, blocks_of, context_parallel, open_ranks
from reasonedit.training.log import read_log
from reasonedit.training.loop import train
from reasonedit.training.optim import OptimSettings

START = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest; "
    "from reasonedit.tests.engine_ranks import main; main()"
)


def launch(scenario, folder, torchrun=False):
    """Findings of both ranks. torchrun: started by it, else as it would have: by environment variables."""
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
        command += [sys.executable, "-c", START, scenario, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", START, scenario, str(folder)],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [process.communicate(timeout=600)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], "\n".join(error[-3000:] for error in errors)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def alone(folder, models=None, groups=None, step=toy_step, steps=3, **toys):
    """The same work on one rank: twice the micro-steps per window."""
    models = models or toy_models()
    changes = {"optim": toys.pop("optim")} if "optim" in toys else {}
    changes |= {"parallel": toys.pop("parallel", ParallelSettings(device="cpu"))}
    train(models, groups or toy_groups(models), ToySource(total=4, **toys), step, toy_settings(steps, **changes), folder)
    return models


def assert_same(found, expected, tolerance=1e-6):
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert torch.tensor(found[name]).sub(torch.tensor(values)).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, launch("ddp", folder)


def test_two_ranks_with_n_micro_steps_are_one_rank_with_2n(ddp, tmp_path):
    """With micro-steps of unequal counts, of one stream only, and a weight that one rank alone uses; rank 0's weights win."""
    _, (first, second) = ddp
    models = alone(tmp_path, uneven=True, quotes=True)
    assert first["world"] == 2
    assert first["weights"] == second["weights"]
    assert_same(first["weights"], flat(models))
    for line, losses in zip([one for one in read_log(tmp_path) if one["event"] == "step"], first["losses"], strict=True):
        assert losses == pytest.approx(line["losses"], rel=1e-6)
    start = flat(toy_models())
    assert max(abs(a - b) for name in start for a, b in zip(start[name], first["weights"][name], strict=True)) > 1e-3
    assert start["dit.quoted"] != first["weights"]["dit.quoted"]


def test_two_ranks_resume_to_the_bit_with_their_own_generators(ddp):
    folder, found = ddp
    for one in found:
        assert one["resumed"] == one["whole"]
        assert one["dropout differs by rank"]
    generators = json.loads((folder / "whole/checkpoints/step-00000007/ranks.json").read_text())
    assert len(generators) == 2 and generators[0] != generators[1]


def test_every_rank_stops_for_what_one_alone_meets(ddp):
    """Nobody is left waiting: a loss that is NaN, records that cannot be loaded, and a signal, all on rank 1 only."""
    for one in ddp[1]:
        assert one["poison"].startswith("NonFinite") and "rank 1, micro-step 0 of records toy 0 1 2-a" in one["poison"]
        assert one["broken"].startswith("DataError: optimizer step 2 (epoch 0, cursor 1), rank 1: record 'x' line 3")
        assert one["asked"] == [1, "SIGTERM", 75, "step-00000001"]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """Started by the line that distributed.py documents."""
    return launch("fsdp", tmp_path_factory.mktemp("fsdp"), torchrun=True)


@pytest.mark.slow
def test_fsdp2_cuts_every_weight_in_half(fsdp):
    whole = dict(toy_models().dit.named_parameters())
    for one in fsdp:
        assert one["all cut"] and one["classes"] == ["FSDPBlock", "FSDPToyDiT", "FSDPToyMLLM"]
        for name, shape in one["local"].items():
            assert shape == [whole[name].shape[0] // 2, *whole[name].shape[1:]]
        assert len(one["local"]) == len(whole)


@pytest.mark.slow
def test_fsdp2_has_the_weights_of_one_rank_after_three_steps(fsdp, tmp_path):
    models = alone(tmp_path)
    lines = [line for line in read_log(tmp_path) if line["event"] == "step"]
    for one in fsdp:
        assert_same(one["weights"], flat(models))
        for line, losses, norms in zip(lines, one["losses"], one["norms"], strict=True):
            assert losses == pytest.approx(line["losses"], rel=1e-5) and norms == pytest.approx(line["grad_norm"], rel=1e-5)
        assert_same(one["one graph"], flat(models))


@pytest.mark.slow
def test_fsdp2_with_lora_has_the_weights_of_one_rank(fsdp, tmp_path):
    """peft adapters, frozen weights cut as well, gradients through the DiT into the MLLM's adapters (two phases)."""
    lora = lora_models()
    alone(tmp_path / "a", lora, lora_groups(lora))
    half = lora_models(torch.bfloat16)
    alone(tmp_path / "b", half, lora_groups(half), parallel=ParallelSettings(device="cpu", precision="bfloat16"))
    for one in fsdp:
        assert one["lora cut"]
        assert_same(one["lora"], {name: value for name, value in flat(lora).items() if "lora_" in name})
        # float32 adapters beside frozen bf16 weights, computed in bf16: gathered in bf16 instead of cast per layer
        assert one["half dtypes"] == ["torch.bfloat16 False", "torch.float32 True"]
        assert_same(one["half"], {name: value for name, value in flat(half).items() if "lora_" in name}, 0.02)


@pytest.mark.slow
def test_fsdp2_reduces_a_weight_that_one_rank_alone_used(fsdp, tmp_path):
    models = alone(tmp_path, quotes=True)
    for one in fsdp:
        assert_same(one["quotes"], flat(models), 3e-6)


@pytest.mark.slow
def test_fsdp2_resumes_to_the_bit_and_hooks_change_nothing(fsdp):
    for one in fsdp:
        assert one["whole"] == one["cut"] == one["hooked"]
        # whether pieces are what the whole unit gives, and whether averages are what weights are (at the start only)
        assert one["looked"] == [[0, True, True], *([step, True, False] for step in range(1, 8))]


@pytest.mark.slow
def test_a_checkpoint_goes_on_cut_or_uncut(fsdp, tmp_path):
    models = alone(tmp_path, steps=6, optim=OptimSettings())
    for one in fsdp:
        assert_same(one["there and back"], flat(models), 1e-5)


@pytest.mark.slow
def test_fsdp2_refuses_windows_that_would_leave_ranks_waiting(fsdp):
    for one in fsdp:
        assert one["lopsided"].startswith("PackingError: optimizer step 1 (epoch 0, cursor 0): under fsdp2 every rank must run")


# ---------------------------------------------------------------------------------------------------------------- one process


def test_blocks_are_the_members_of_the_outermost_lists():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"blocks": nn.ModuleList([Inner(), Inner()])}))
            self.bare = nn.ModuleList([nn.ReLU()])

    outer = Outer()
    assert list(blocks_of(outer)) == list(outer.body[1]["blocks"])
    assert list(blocks_of(outer, ["Linear"])) == [outer.body[0], *(one.out[0] for one in outer.body[1]["blocks"])]


def test_gradients_travel_in_buckets_of_one_dtype(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    tensors = [torch.zeros(4), torch.zeros(6), torch.zeros(1), torch.zeros(20), torch.zeros(2, dtype=torch.float64)]
    buckets = [[len(one) for one in bucket] for bucket in distributed._buckets(tensors)]
    assert buckets == [[4, 6], [1], [20], [2]]
    assert list(distributed._buckets([])) == []


def test_settings_that_cannot_be_met_are_refused():
    with pytest.raises(ConfigError, match="expected parallel of ddp, fsdp2, found 'fsdp'"):
        ParallelSettings(parallel="fsdp")
    with pytest.raises(ConfigError, match="float16 needs loss scaling"):
        ParallelSettings(parallel="fsdp2", precision="float16")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="device cuda was asked for"):
            open_ranks(ParallelSettings(device="cuda"))
        with pytest.raises(BackendUnavailable, match="precision float16 (cannot run|needs loss scaling)"):
            open_ranks(ParallelSettings(device="cpu", precision="float16"))


def test_processes_that_did_not_find_each_other_are_an_error(monkeypatch):
    """accelerate starts as one process where it does not know the launcher."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    from accelerate.state import AcceleratorState, PartialState

    open_before = PartialState._shared_state
    if not open_before:
        PartialState(cpu=True)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    with pytest.raises(BackendUnavailable, match="WORLD_SIZE says 2 processes, 1 joined"):
        open_ranks(ParallelSettings(device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without CUDA")
def test_context_parallel_says_that_it_needs_cuda(tmp_path):
    models = toy_models()
    settings = toy_settings(1, parallel=ParallelSettings(context_parallel=2))
    with pytest.raises(BackendUnavailable, match="context_parallel = 2 needs CUDA, found cpu"):
        train(models, toy_groups(models), ToySource(), toy_step, settings, tmp_path)
    with pytest.raises(BackendUnavailable, match="needs CUDA"), context_parallel(open_ranks(ParallelSettings()), 2, [], []):
        pass
    with context_parallel(open_ranks(ParallelSettings()), 1, [], []):
        pass


def test_context_parallel_wants_a_step_that_takes_part():
    cuda = torch.device("cuda")
    with pytest.raises(BackendUnavailable, match="joint_step does not cut its sequences"):
        distributed.require_context_parallel(2, cuda, toy_step)

    def step(models, micro):
        return None

    step.context_parallel = True
    distributed.require_context_parallel(2, cuda, step)
    with pytest.raises(ConfigError, match="context_parallel >= 1"):
        distributed.require_context_parallel(0, cuda, step)
