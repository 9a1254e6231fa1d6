"""Several processes as one training: launch, what they agree on, gradients, and FSDP2.

One machine, 8 GPUs (`accelerate launch --num_processes 8 -m reasonedit.training.cli run ...` does the same):

    torchrun --standalone --nproc_per_node 8 -m reasonedit.training.cli run RECIPE.toml

4 machines of 8 GPUs: the same line on every machine; the run folder and the data lie on a file system that all of them see.

    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_id RUN --rdzv_endpoint FIRST_MACHINE:29500 \\
        -m reasonedit.training.cli run RECIPE.toml --set run.parallel=fsdp2

CPU processes, to try things out (`accelerate launch --cpu` starts one process without a word, so use torchrun):

    torchrun --standalone --nproc_per_node 2 -m reasonedit.training.cli run tiny_cpu --set run.device=cpu

Two ways of sharing the work. `ddp`: every process holds all weights; choose it where they fit, it is the faster one for LoRA.
`fsdp2`: weights, gradients and optimizer state are cut over the processes by torch's fully_shard, called here and not through
accelerate, which on CPU ignores its FSDP plugin and uses DDP without a word.

Why ddp is an explicit all-reduce at the optimizer boundary and not torch's DistributedDataParallel: its reducer runs during
the last backward of the window and waits there for every rank to have called every unit in that very micro-step. Our windows
do not promise that: a micro-step may hold text only, a mapping may be used by one rank's documents only, and the two-phase
backward takes each unit back on its own. One sum over the accumulated gradients is exact in all of these cases, costs one
communication per optimizer step, as no_sync over the window does, and needs no wrapper around the units.

Context parallelism (several ranks share one sequence) is an option that has not been tested, as no machine with several GPUs
was at hand: see `context_parallel`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..reasonedit_core.errors import BackendUnavailable, ConfigError
from .types import Models, ParamGroup, Step

log = logging.getLogger(__name__)

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
BUCKET = 1 << 24
"""Numbers of one all-reduce: 64 MiB of float32."""

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another: the first one may be sampling or writing a large checkpoint."""


@dataclass(frozen=True, slots=True)
class ParallelSettings:
    """device: auto, cpu or cuda. precision: what forward and backward compute in (autocast; trained weights stay float32).
    parallel: ddp or fsdp2. blocks: class names of the modules that fsdp2 cuts one by one; none: the members of the
    outermost nn.ModuleLists, which is what transformers keep their blocks in. forward_methods: methods beside `forward` that
    units and blocks are entered through. context_parallel: ranks that share one sequence (untested)."""

    device: str = "auto"
    precision: str = "float32"
    parallel: str = "ddp"
    blocks: tuple[str, ...] = ()
    forward_methods: tuple[str, ...] = ("input_embeddings",)
    context_parallel: int = 1

    def __post_init__(self) -> None:
        for name, known in (("device", ("auto", "cpu", "cuda")), ("precision", PRECISIONS), ("parallel", ("ddp", "fsdp2"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"expected {name} of {', '.join(known)}, found {getattr(self, name)!r}; choose one of them.")
        if self.parallel == "fsdp2" and self.precision == "float16":
            raise ConfigError("float16 needs loss scaling, which is not done for fsdp2; use bfloat16, or parallel = ddp.")


class Ranks:
    """The processes of this training, seen from one of them. Made by `open_ranks`.

    rank, world: this process and how many there are. scaler: loss scaling of float16, else None.
    """

    def __init__(self, accelerator: Any, settings: ParallelSettings) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler
        self.sharded = settings.parallel == "fsdp2" and self.world > 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        """What forwards run in."""
        return self._accelerator.autocast()

    def agree(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks, on every rank. Every rank must call it."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when every rank has come here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group; for the end of the program."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def open_ranks(settings: ParallelSettings) -> Ranks:
    """Join the processes that torchrun or `accelerate launch` has started, or be the only one.

    Raises BackendUnavailable where the device or the precision is not there, and see `context_parallel`.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device cuda was asked for and torch sees none; use device = cpu, or install a CUDA build.")
    precision = PRECISIONS[settings.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # accelerate keeps one precision per process, while a stage in bfloat16 may follow one in float32
        AcceleratorState._reset_state()
    use_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    try:
        accelerator = Accelerator(
            mixed_precision=precision, cpu=use_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
    except ValueError as error:
        message = f"precision {settings.precision} cannot run here ({error}); use float32 or bfloat16."
        raise BackendUnavailable(message) from error
    ranks = Ranks(accelerator, settings)
    if settings.precision == "float16" and ranks.scaler is None:
        raise BackendUnavailable(f"precision float16 needs loss scaling, which {ranks.device.type} lacks here; use bfloat16.")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != ranks.world:
        raise BackendUnavailable(
            f"WORLD_SIZE says {started} processes, {ranks.world} joined; start with torchrun --nproc_per_node {started}."
        )
    if settings.parallel == "fsdp2" and ranks.world == 1:
        log.info("fsdp2 with one process: nothing to cut, weights stay whole")
    require_context_parallel(settings.context_parallel, ranks.device)
    return ranks


def broadcast_weights(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Give every rank the weights of rank 0: what is drawn anew (LoRA, random weights) may differ until here."""
    if ranks.world > 1:
        with torch.no_grad():
            for parameter in parameters:
                values = parameter.detach().to(ranks.device, copy=True).contiguous()
                dist.broadcast(values, src=0)
                parameter.copy_(values)


@torch.no_grad()
def complete_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Sum gradients over ranks (ddp; fsdp2 has done so in backward), missing ones counted as zero.

    Missing gradients become zeros on one rank too: a weight that no document of a window used is treated alike (its moments
    decay) however many ranks there are.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.world == 1 or ranks.sharded:
        return
    for bucket in _buckets([parameter.grad for parameter in parameters]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def shard(models: Models, settings: ParallelSettings, ranks: Ranks) -> None:
    """Cut the weights of every unit over the ranks (FSDP2), block by block, then the rest of the unit.

    Gradients are sums over ranks, not means: the engine divides by counts of all ranks. Every group of weights is freed after
    its forward, also a unit's own: else weights gathered for validation would still be there when training goes on. Weights
    that are not ordinary floating point (fp8, 4 bit; all frozen) stay whole on every rank. Inputs of blocks are not cast:
    positions and modulation are float32 for a reason, and autocast casts where it is due. A weight that one rank's documents
    alone use is reduced as well: by torch where it can, else see `_touch`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    compute = {"float32": None, "bfloat16": torch.bfloat16}[settings.precision]
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
    )
    for name, unit in models.units().items():
        whole = {one for one in unit.parameters() if not _ordinary(one)}
        blocks = list(blocks_of(unit, settings.blocks))
        if not blocks:
            log.warning("%s has no blocks that could be cut one by one: all its weights are gathered at once", name)
        for module in (*blocks, unit):
            if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
                inner = {id(one) for block in blocks if module is unit for one in block.parameters()}
                _touch(module, [one for one in module.parameters() if one.requires_grad and id(one) not in inner])
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)
            for method in settings.forward_methods:
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)
        for module in unit.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                if ranks.device.type == "cpu":  # gloo has plain sums only
                    module.set_force_sum_reduction_for_comms(True)
                if hasattr(module, "set_reduce_scatter_unused_params"):
                    module.set_reduce_scatter_unused_params(True)


@contextmanager
def gathered(models: Models) -> Iterator[None]:
    """Under FSDP2: a block in which units may be entered otherwise than by calling them (to generate, to paint).

    What of a unit is in no block (embeddings, head, connector) is whole inside; blocks gather themselves as they are called.
    Every rank must do the same inside. Averages that are to stand in must do so around this, not within. Without FSDP2
    nothing happens.
    """
    from torch.distributed.fsdp import FSDPModule

    cut = [unit for unit in models.units().values() if isinstance(unit, FSDPModule)]
    for unit in cut:
        unit._get_fsdp_state()._lazy_init()  # else the first block that is called would take itself for the whole
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in cut:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def blocks_of(unit: nn.Module, classes: Sequence[str] = ()) -> Iterator[nn.Module]:
    """The modules of `unit` to cut one by one: those of the named classes, else the members of its outermost ModuleLists."""
    for child in unit.children():
        if classes and type(child).__name__ in classes:
            yield child
        elif not classes and isinstance(child, nn.ModuleList):
            yield from (member for member in child if any(True for _ in member.parameters()))
        else:
            yield from blocks_of(child, classes)


def name_weights(models: Models, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """The groups with the weights as they are registered now, called by unit and place (mllm.model.layers.0...).

    Call it before `shard` (parameters are looked up by identity); see `find_again` for afterwards. Raises ConfigError where
    the groups and the trainable weights of the units are not the same set, naming the weights.
    """
    known = [(f"{unit}.{name}", one) for unit, module in models.units().items() for name, one in module.named_parameters()]
    names = {id(parameter): name for name, parameter in known}
    wanted = {name for name, parameter in known if parameter.requires_grad}
    named, seen = [], set()
    for group in groups:
        members = []
        for given, parameter in group.parameters:
            name = names.get(id(parameter))
            if name is None:
                units = ", ".join(models.units())
                raise ConfigError(f"group {group.name}: {given} is in no unit; give only weights of {units}.")
            if name in seen:
                raise ConfigError(f"{name} stands twice in the groups, again in {group.name}; a weight has one group.")
            if name not in wanted:
                raise ConfigError(f"group {group.name}: {name} is frozen (requires_grad is off); unfreeze it or leave it out.")
            seen.add(name)
            members.append((name, parameter))
        named.append(ParamGroup(group.name, tuple(members), group.lr, group.weight_decay))
    if not seen:
        raise ConfigError("expected weights to train, found none in any group; name a trainable set.")
    if wanted - seen:
        shown = ", ".join(sorted(wanted - seen)[:5])
        raise ConfigError(f"{len(wanted - seen)} weights are trainable and in no group ({shown}, ...); freeze or group them.")
    return named


def find_again(models: Models, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """The groups of `name_weights` with the parameters that now stand under their names (fully_shard puts new ones there)."""
    now = {f"{unit}.{name}": one for unit, module in models.units().items() for name, one in module.named_parameters()}
    return [
        ParamGroup(group.name, tuple((name, now[name]) for name, _ in group.parameters), group.lr, group.weight_decay)
        for group in groups
    ]


def require_context_parallel(size: int, device: torch.device, step: Step | None = None) -> None:
    """Raise BackendUnavailable unless `size` ranks can share one sequence here: CUDA, torch's API, a step that takes part."""
    if size == 1:
        return
    if size < 1:
        raise ConfigError(f"expected context_parallel >= 1, found {size}; 1 turns it off.")
    if device.type != "cuda":
        raise BackendUnavailable(f"context_parallel = {size} needs CUDA, found {device.type}; set it to 1.")
    if find_spec("torch.distributed.tensor.experimental") is None:
        raise BackendUnavailable(f"context_parallel = {size} needs torch's context_parallel; take a newer torch, or set 1.")
    if step is not None and not getattr(step, "context_parallel", False):
        raise BackendUnavailable(
            f"context_parallel = {size}: {getattr(step, '__name__', step)} does not cut its sequences. The MLLM's states are "
            "gathered by row, so a step must say by an attribute `context_parallel = True` that it enters "
            "distributed.context_parallel itself; set it to 1, or use fsdp2 and smaller packs."
        )


@contextmanager
def context_parallel(ranks: Ranks, size: int, tensors: Sequence[Tensor], dims: Sequence[int]) -> Iterator[None]:
    """UNTESTED. Torch's context parallel API over groups of `size` neighbouring ranks, for a step to run its forward in.

    tensors: everything with the sequence in it, cut along `dims` inside the block. Attention must be torch's own without a
    mask, as its ring knows no documents: one document per pack. Raises BackendUnavailable, see `require_context_parallel`.
    """
    require_context_parallel(size, ranks.device)
    if size == 1:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel

    mesh = init_device_mesh(ranks.device.type, (ranks.world // size, size), mesh_dim_names=("data", "sequence"))
    with torch_context_parallel(mesh["sequence"], buffers=list(tensors), buffer_seq_dims=list(dims)):
        yield


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in their order, in lists of one dtype and at most BUCKET numbers (a larger gradient has its own list)."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(one.numel() for one in bucket) + gradient.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _touch(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Make every one of `parameters` have a part in the module's output, times zero.

    Before torch can count missing gradients as zero, ranks that used different weights send gradients of different sizes,
    and the reduction fails or never ends. Call it before fully_shard, whose hooks then go around this one.
    """

    def add_nothing(module: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple)
        first = output[0] if several else output
        if not torch.is_grad_enabled() or not parameters or not isinstance(first, Tensor):
            return output
        own = dict(module.named_parameters())
        first = first + sum(0.0 * own[name].flatten()[:1].sum() for name in names).to(first.dtype)
        return (first, *output[1:]) if several else first

    wanted = {id(one) for one in parameters}
    names = [name for name, one in module.named_parameters() if id(one) in wanted]
    module.register_forward_hook(add_nothing)


def _ordinary(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
