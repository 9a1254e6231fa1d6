"""Two-phase backward of a LoRA and of all weights where FSDP2 has cut both units over two processes (gloo, CPU)."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.packed import PackedMLLM
from reasonedit.reasonedit_core.mllm.qwen25vl import language_model
from reasonedit.tests.packed import document, lora, pack, picture
from reasonedit.tests.test_training_steps import ToyDiT, counted, images
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.losses import backward
from reasonedit.training.steps import joint_step
from reasonedit.training.types import FM, NTP, Models

RANKS = 2


def step(full, checkpointing, cut):
    """Gradients by name after one joint step. cut: what is done to the units before it."""
    mllm = load_mllm(tiny_checkpoint("qwen2.5-vl", std=0.2), dtype=torch.float32)
    if full:
        mllm.model.requires_grad_(True)
    else:
        lora(mllm.model)
    documents = [document(mllm, "what first?", "the sky", [picture(0)]), document(mllm, "make it red", images=[picture(1)])]
    first, second = (len(d.ids) for d in documents)
    micro = counted(pack(documents, 3), images([(first, first + second)], references=(4,)))
    models = Models(PackedMLLM(mllm, checkpointing=checkpointing).train(), ToyDiT(torch.float32))
    cut(models)
    backward(joint_step(models, micro), {NTP: 0.1, FM: 1.0})
    named = ((f"{unit}.{name}", p.grad) for unit, m in models.units().items() for name, p in m.named_parameters())
    return {name: grad for name, grad in named if grad is not None}


def shard(models):
    from torch.distributed.fsdp import fully_shard

    for unit in (*language_model(models.mllm.model).layers, models.mllm, models.dit):
        fully_shard(unit)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has sums only


def work(rank, port, failures):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.distributed.init_process_group("gloo")
    try:
        for full, checkpointing in ((False, False), (False, True), (True, True)):
            expected = step(full, checkpointing, lambda models: None)
            got = step(full, checkpointing, shard)
            assert set(got) == set(expected)
            for name, grad in got.items():
                assert grad.to_local().numel() < grad.numel() or grad.shape[0] < RANKS, f"{name} is whole"
                torch.testing.assert_close(grad.full_tensor() / RANKS, expected[name], rtol=1e-5, atol=1e-6)
    except BaseException as error:
        failures.put(f"rank {rank}: {error!r}")
        raise
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_gradients_of_cut_units_equal_those_of_whole_ones():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    processes = [context.Process(target=work, args=(rank, port, failures)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert failures.empty() and [p.exitcode for p in processes] == [0] * RANKS, failures.empty() or failures.get()
