"""`python -m reasonedit.training.bench`: what a training step costs here, packed against padded, in one run.

It prints step time, tokens/s of real tokens, packing fill, mask build time and peak memory; on CUDA, at full size with random
weights, also the achieved TFLOP/s against the counted floor. Weights and documents are random: nothing is downloaded, nothing
is learnt. Every case runs in a process of its own, so that its peak memory is its own.

Padded means what trainers without packing do: documents of like length in batches, each grown to the longest of its batch.
Rows of a batch do not see each other, so they run as one pack where attention skips what is not seen, and else one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from .bench_work import (
    MODES,
    SKIPPING,
    STREAMS,
    Case,
    Document,
    build_unit,
    draw_documents,
    group,
    image_pack,
    length_of,
    text_pack,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .cost import Load

PEAK = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 operations per second as their maker states them, by a part of the device's name."""


# ---- measuring -----------------------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Run one case in this process."""
    import torch

    from ..reasonedit_core.load import choose_device, choose_dtype

    device = choose_device(case.device)
    dtype = getattr(torch, choose_dtype("auto", device))
    started = time.perf_counter()
    unit, network, trained = build_unit(case, device, dtype)
    built = time.perf_counter() - started
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    documents = draw_documents(case)
    groups = group(case, documents)
    packs = _packs(case, groups, network, together=case.mode == "packed" or _backend(case, device) in SKIPPING)
    run = _runner(case, unit)
    for number in range(case.warmup):
        _step(run, packs[number % len(packs)], optimizer, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [_step(run, pack, optimizer, device) for _ in range(case.steps) for pack in packs]
    real = sum(length_of(document) for document in documents)
    room = max(case.budget, max(map(length_of, documents))) * len(groups)
    computed = room if case.mode == "packed" else sum(length_of(document) for some in groups for document in some)
    passed = sum(times) / case.steps
    result = {
        "dtype": str(dtype).removeprefix("torch."),
        "documents": len(documents),
        "packs": len(packs),
        "fill": real / computed,
        "step_s": sum(times) / len(times),
        "tokens_per_s": real / passed,
        "mask_ms": 1e3 * _mask_time(case, packs[0][0], device),
        "peak_gib": _peak(device),
        "build_s": built,
        "backend": _backend(case, device),
    }
    work = [_work(case, network, some) for some in groups]
    result["tera"] = sum(work) / len(work) / 1e12
    result["tflops"] = sum(work) * case.steps / sum(times) / 1e12
    result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return result


def _packs(case: Case, groups: Sequence[list[Document]], network: nn.Module, *, together: bool) -> list[list[Any]]:
    """The packs of each optimizer step. together: documents of a group in one pack, else each in one of its own."""
    if case.stream == "dit":
        make, about = image_pack, network.connector.S.input_embedder.in_features
    else:
        make, about = text_pack, network.config.get_text_config().vocab_size
    shares = [[some] if together else [[document] for document in some] for some in groups]
    return [[make(share, about, case.seed + n) for share in step] for n, step in enumerate(shares)]


def _runner(case: Case, unit: nn.Module) -> Callable[[Any], None]:
    """pack -> forward and backward, through the steps that training runs."""
    from .losses import backward
    from .steps import editing_step, reasoning_step
    from .types import FM, NTP, MicroStep, Models

    def run(pack: Any) -> None:
        if case.stream == "dit":
            count = float(pack.n_targets)
            backward(editing_step(Models(dit=unit), MicroStep(None, pack, {FM: count})), {FM: 1 / count})
        else:
            count = float(pack.n_answers)
            backward(reasoning_step(Models(mllm=unit), MicroStep(pack, None, {NTP: count})), {NTP: 1 / count})

    return run


def _step(run: Callable[[Any], None], packs: Sequence[Any], optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Seconds of one optimizer step, the device waited for."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for pack in packs:
            run(pack)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait()
    return time.perf_counter() - start


def _mask_time(case: Case, pack: Any, device: torch.device) -> float:
    """Seconds to build the form of the mask that the backend works with, once per step for all layers."""
    import torch

    from ..reasonedit_core.packing import PackMask

    if case.stream == "mllm":
        doc_id = pack.doc_id
    else:
        doc_id = torch.cat([pack.text_doc, pack.image_doc]).sort().values
    doc_id, causal = doc_id.to(device), case.stream == "mllm"
    name = _backend(case, device)
    best = math.inf
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        mask = PackMask(doc_id, causal=causal)
        if name == "flex":
            from ..reasonedit_core.kernels.flex import block_mask

            block_mask(mask)
        else:
            _ = mask.cu_seqlens if name == "varlen" else mask.dense
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _backend(case: Case, device: torch.device) -> str:
    if case.backend != "auto":
        return case.backend
    from ..reasonedit_core.kernels.dispatch import BACKENDS

    return next(one.name for one in BACKENDS if one.available(device) is None)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _work(case: Case, network: nn.Module, documents: Sequence[Document]) -> float:
    """Counted operations of a step on a pack."""
    from .cost import dit_work, mllm_work

    load = _load(case, documents)
    work = dit_work(network, load) if case.stream == "dit" else mllm_work(network, load)
    return work.step(trained="lora", checkpointing=case.checkpointing)


def _load(case: Case, documents: Sequence[Document]) -> Load:
    from .cost import Load

    if case.stream == "dit":
        return Load(image=tuple((text, length_of((0, grids))) for text, grids in documents))
    return Load(text=tuple(text for text, _ in documents), answers=sum(text - text * 3 // 4 for text, _ in documents))


# ---- command -------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m reasonedit.training.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=("auto", "small", "full"), default="auto", help="auto: full on CUDA, else small")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--stream", choices=STREAMS, action="append", help="(both)")
    parser.add_argument("--budget", type=int, default=0, metavar="N", help="tokens of a pack (1024 small, 16384 full)")
    parser.add_argument("--documents", type=int, default=24, metavar="N", help="drawn documents (24)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="documents of a padded batch (4)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="measured passes over the documents (2)")
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="of the LoRA (64)")
    parser.add_argument("--backend", default="auto", help="of attention")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON lines")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return 0
    failed = 0
    if not args.json:
        print(planner_line())
    for case in cases(args):
        figures = _in_a_process(case)
        failed += figures is None
        if figures is not None:
            print(json.dumps({**asdict(case), **figures}) if args.json else line(case, figures), flush=True)
    return 1 if failed else 0


def cases(args: argparse.Namespace) -> list[Case]:
    """What is measured: each stream packed and padded, and at full size one edit (and one text) with and without
    checkpointing against the floor."""
    from ..reasonedit_core.load import choose_device

    device = choose_device(args.device).type
    size = args.size if args.size != "auto" else "full" if device == "cuda" else "small"
    budget = args.budget or (16384 if size == "full" else 1024)
    found = []
    for stream in args.stream or STREAMS:
        base = Case(
            stream, "packed", size, device, budget=budget, documents=args.documents, batch=args.batch, steps=args.steps,
            rank=args.rank if size == "full" else min(args.rank, 16), backend=args.backend,
        )  # fmt: skip
        found += [replace(base, mode=mode) for mode in MODES]
        if size == "full":
            found += [replace(base, lengths="edit", checkpointing=kept, steps=5, warmup=2) for kept in (True, False)]
    return found


def planner_line(documents: int = 2000, budget: int = 8192) -> str:
    """Packing fill over many documents of the stated mix, as a run of some hours has them."""
    drawn = draw_documents(Case("mllm", "packed", "full", "cpu", budget=4096, documents=documents))
    case = Case("mllm", "packed", "full", "cpu", budget=budget)
    start = time.perf_counter()
    packs = group(case, drawn)
    seconds = time.perf_counter() - start
    fill = sum(map(length_of, drawn)) / (len(packs) * budget)
    return f"planner: {documents} documents in {len(packs)} packs of {budget}, fill {fill:.4f}, {seconds:.2f} s"


def line(case: Case, figures: dict[str, Any]) -> str:
    """A case in words."""
    alone = "one edit" if case.stream == "dit" else "one text"
    what = f"{case.stream} {case.mode if case.lengths == 'mix' else alone}"
    kept = "checkpointing" if case.checkpointing else "no checkpointing"
    text = (
        f"{what:<14} {case.size}, {figures['dtype']}, {kept}, {figures['backend']}: step {1e3 * figures['step_s']:.1f} ms, "
        f"{figures['tokens_per_s']:,.0f} tokens/s, fill {figures['fill']:.3f}, mask {figures['mask_ms']:.2f} ms, "
        f"peak {figures['peak_gib']:.2f} GiB"
    )
    if figures["device"] == "cpu":
        return text
    peak = next((value for name, value in PEAK.items() if name in figures["device"]), None)
    text += f", {figures['tflops']:.0f} TFLOP/s counted"
    if peak:
        floor = figures["tera"] * 1e12 / peak
        text += f" ({100 * figures['tflops'] * 1e12 / peak:.0f} % of {peak / 1e12:.0f}; floor {1e3 * floor:.0f} ms)"
    return text


def _in_a_process(case: Case) -> dict[str, Any] | None:
    command = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no words"])[-1]
    print(f"{case.stream} {case.mode} ({case.lengths}): failed: {last}", file=sys.stderr, flush=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
