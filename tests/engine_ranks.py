"""What test_training_distributed.py runs on two gloo ranks: `main()` with the arguments SCENARIO FOLDER, once per rank.

Every scenario leaves its findings as FOLDER/rank{r}.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from reasonedit.reasonedit_core.errors import ReasonEditError
from reasonedit.tests.engine_toys import ToySource, digest_of, toy_groups, toy_models, toy_settings, toy_step
from reasonedit.training.checkpoint import find
from reasonedit.training.distributed import ParallelSettings, gathered, open_ranks
from reasonedit.training.log import read_log
from reasonedit.training.loop import Hook, train
from reasonedit.training.optim import OptimSettings
from reasonedit.training.types import ParamGroup

CPU = ParallelSettings(device="cpu")
FSDP = ParallelSettings(device="cpu", parallel="fsdp2")
EMA = OptimSettings(schedule="cosine", warmup=2, ema=0.9)


def flat(models):
    out = {}
    for unit, module in models.units().items():
        for name, one in module.named_parameters():
            whole = one.full_tensor() if hasattr(one, "full_tensor") else one
            out[f"{unit}.{name}"] = whole.detach().double().flatten().tolist()
    return out


def toy_run(folder, ranks, steps=3, stop=None, models=None, source=None, step=toy_step, hooks=(), groups=None, **changes):
    models = models or toy_models()
    source = source or ToySource(total=4, rank=ranks.rank, world=ranks.world, **changes.pop("toys", {}))
    done = []

    def counting(models, micro):
        if stop is not None and len(done) == len(source.load(0, 0)) * stop:
            raise KeyboardInterrupt
        done.append(micro)
        return step(models, micro)

    settings = toy_settings(steps, parallel=changes.pop("parallel", CPU), **changes)
    return train(models, groups or toy_groups(models), source, counting, settings, folder, hooks), models


def caught(function):
    try:
        function()
    except (ReasonEditError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def ddp(folder, ranks):
    """2 ranks x 2 micro-steps, resume on 2 ranks, errors and requests that one rank alone meets."""
    found = {"world": ranks.world}
    # what is drawn anew may differ between ranks until it is sent around
    _, models = toy_run(folder / "plain", ranks, models=toy_models(ranks.rank), toys={"uneven": True, "quotes": True})
    found["weights"] = flat(models)
    found["losses"] = [line["losses"] for line in read_log(folder / "plain") if line["event"] == "step"]
    dist.barrier()

    dropped = lambda seed: toy_models(seed, dropout=0.3)  # noqa: E731
    toy_run(folder / "whole", ranks, 7, models=dropped(0), optim=EMA)
    caught(lambda: toy_run(folder / "cut", ranks, 7, stop=5, models=dropped(0), optim=EMA, save_every=4, workers=1))
    toy_run(folder / "cut", ranks, 7, models=dropped(3), optim=EMA, resume="latest")
    found["whole"], found["resumed"] = digest_of(find(folder / "whole")), digest_of(find(folder / "cut"))
    found["dropout differs by rank"] = len({str(one) for one in ranks.agree(torch.rand(3).tolist())}) == ranks.world

    poison = {"poison": (0, 1), "victim": 1}
    found["poison"] = caught(lambda: toy_run(folder / "poison", ranks, toys=poison))
    broken = {"broken": (0, 1), "victim": 1}
    found["broken"] = caught(lambda: toy_run(folder / "broken", ranks, toys=broken))

    def asking(models, micro):
        if ranks.rank == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return toy_step(models, micro)

    outcome, _ = toy_run(folder / "asked", ranks, step=asking)
    found["asked"] = [outcome.step, outcome.cause, outcome.exit_code, outcome.checkpoint.name]
    return found


def adapted(models):
    """peft LoRA on the linear layers of the blocks; frozen weights in bf16 beside float32 adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    for unit in models.units().values():
        unit.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False), unit)
    with torch.no_grad():
        for name, one in [pair for unit in models.units().values() for pair in unit.named_parameters()]:
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name) + one.shape[0])
                one.copy_(0.3 * torch.randn(one.shape, generator=generator))
    return models


def lora_groups(models):
    return [
        ParamGroup(f"{unit}_lora", tuple(pair for pair in module.named_parameters() if pair[1].requires_grad), 0.01)
        for unit, module in models.units().items()
    ]


def lora_models(dtype=torch.float32):
    models = adapted(toy_models())
    for unit in models.units().values():
        for one in unit.parameters():
            if not one.requires_grad:
                one.data = one.data.to(dtype)
    return models


def fsdp(folder, ranks):
    """Cut weights, the same numbers as one rank, checkpoints, LoRA, hooks, and windows that do not match."""
    from torch.distributed.tensor import DTensor

    found = {"world": ranks.world}
    outcome, models = toy_run(folder / "plain", ranks, parallel=FSDP)
    named = [one for unit in models.units().values() for _, one in unit.named_parameters()]
    found["all cut"] = all(isinstance(one, DTensor) for one in named)
    found["local"] = {name: list(one._local_tensor.shape) for name, one in models.dit.named_parameters()}
    found["classes"] = sorted({type(module).__name__ for unit in models.units().values() for module in unit.modules()
                               if type(module).__name__.startswith("FSDP")})  # fmt: skip
    found["weights"] = flat(models)
    found["losses"] = [line["losses"] for line in read_log(folder / "plain") if line["event"] == "step"]
    found["norms"] = [line["grad_norm"] for line in read_log(folder / "plain") if line["event"] == "step"]

    one_graph = lambda models, micro: toy_step(models, micro, two_phase=False)  # noqa: E731
    _, models = toy_run(folder / "graph", ranks, parallel=FSDP, step=one_graph)
    found["one graph"] = flat(models)

    _, models = toy_run(folder / "lora", ranks, models=(lora := lora_models()), groups=lora_groups(lora), parallel=FSDP)
    found["lora"] = {name: value for name, value in flat(models).items() if "lora_" in name}
    found["lora cut"] = all(isinstance(one, DTensor) for unit in models.units().values() for one in unit.parameters())
    half = lora_models(torch.bfloat16)
    bf16 = ParallelSettings(device="cpu", parallel="fsdp2", precision="bfloat16")
    _, models = toy_run(folder / "half", ranks, models=half, groups=lora_groups(half), parallel=bf16)
    found["half"] = {name: value for name, value in flat(models).items() if "lora_" in name}
    every = [one for unit in half.units().values() for one in unit.parameters()]
    found["half dtypes"] = sorted({f"{one.dtype} {one.requires_grad}" for one in every})

    _, models = toy_run(folder / "quotes", ranks, parallel=FSDP, toys={"quotes": True})
    found["quotes"] = flat(models)

    looked = []

    def look(moment):
        """Forwards with the averages in place, whose gathered weights must not be used for training; also piece by piece."""
        mllm, micro = moment.models.mllm, ToySource().load(0, 0)[0]
        with moment.averaged(), gathered(moment.models):
            pieces = mllm.layers[1](mllm.layers[0](mllm.embed(micro.text.ids)))
            states, _ = mllm(micro.text)
            same = torch.equal(pieces, states) and torch.equal(mllm.head(pieces), mllm.head(states))
        moment.models.dit(micro.image, mllm(micro.text)[0])
        looked.append([moment.step, same, torch.equal(states, mllm(micro.text)[0])])

    hooks = [Hook("look", look, every=1, at_start=True)]
    dropped = lambda seed: toy_models(seed, dropout=0.3)  # noqa: E731
    toy_run(folder / "whole", ranks, 7, models=dropped(0), optim=EMA, parallel=FSDP)
    toy_run(folder / "hooked", ranks, 7, models=dropped(0), optim=EMA, parallel=FSDP, hooks=hooks)
    caught(lambda: toy_run(folder / "cut", ranks, 7, stop=5, models=dropped(0), optim=EMA, save_every=4, parallel=FSDP))
    toy_run(folder / "cut", ranks, 7, models=dropped(3), optim=EMA, resume="latest", parallel=FSDP)
    for name in ("whole", "hooked", "cut"):
        found[name] = digest_of(find(folder / name))
    found["looked"] = looked

    # a checkpoint of cut weights goes on uncut, and the other way round
    allowed = {"resume": "latest", "save_every": 0, "allow_changed": ("parallel",)}
    toy_run(folder / "cut3", ranks, 3, optim=OptimSettings(), parallel=FSDP)
    toy_run(folder / "cut3", ranks, 6, optim=OptimSettings(), **allowed)
    toy_run(folder / "uncut3", ranks, 3, optim=OptimSettings())
    _, models = toy_run(folder / "uncut3", ranks, 6, optim=OptimSettings(), parallel=FSDP, **allowed)
    found["there and back"] = flat(models)

    class Lopsided(ToySource):
        def load(self, epoch, cursor):
            return super().load(epoch, cursor)[: 1 + (self.rank == 0)]

    lopsided = Lopsided(total=4, rank=ranks.rank, world=ranks.world)
    found["lopsided"] = caught(lambda: toy_run(folder / "lopsided", ranks, source=lopsided, parallel=FSDP))
    return found


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks = open_ranks(CPU)
    found = {"ddp": ddp, "fsdp": fsdp}[scenario](folder, ranks)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    ranks.wait()
    ranks.close()
