"""What the card itself can do, as an arm: copies, matrix products, attention by backend, packed attention. See `worker`.

Legend: B batch, L tokens, H heads, D head dim; the DiTs have H = 24, D = 128 and about L = 8832.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from .worker import forced, serve, start

log = logging.getLogger(__name__)

SIDE, COPIED = 8192, 2**30
TOKENS, PARTIAL, HEADS, DIM = 8832, 1664, 24, 128
PACKS = (16384, 32768)
REPEATS = 10

WORK = {
    "matmul 8192": 2.0 * SIDE**3,
    "copy 1 GiB": 2.0 * COPIED,
    **{f"attention {name}": 4.0 * HEADS * DIM * TOKENS**2 for name in ("cudnn", "flash", "interval", "auto")},
    **{f"attention 1664 queries, {name}": 4.0 * HEADS * DIM * TOKENS * PARTIAL for name in ("cudnn", "flash", "interval")},
}
"""Floating-point operations (bytes of the copy) of a part, for what is printed."""


def main(text: str) -> None:
    """The process of the arm. text: the job as JSON."""
    job = start(text)
    parts = build(job["device"])
    serve(job, lambda number: {name: seconds(call) for name, call in parts.items()}, {"parts": list(parts)})


def build(device: str) -> dict[str, Callable[[], object]]:
    """The calls by name, those left out that cannot run here."""
    square = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    buffer = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(buffer)
    parts: dict[str, Callable[[], object]] = {
        "matmul 8192": lambda: square @ square,
        "copy 1 GiB": lambda: target.copy_(buffer),
    }
    parts |= _attentions(device) | _packs(device)
    usable = {}
    for name, call in parts.items():
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # a backend that cannot is left out, its reason in the log
            log.warning("%s: left out: %s", name, str(error).splitlines()[0] if str(error) else type(error).__name__)
        else:
            usable[name] = call
    return usable


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call on the device, mean of several in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPEATS


def _attentions(device: str) -> dict[str, Callable[[], object]]:
    from ..kernels import attention

    k, v = (torch.randn(1, TOKENS, HEADS, DIM, device=device, dtype=torch.bfloat16) for _ in range(2))
    parts: dict[str, Callable[[], object]] = {}
    for label, length in (("attention ", TOKENS), (f"attention {PARTIAL} queries, ", PARTIAL)):
        q = torch.randn(1, length, HEADS, DIM, device=device, dtype=torch.bfloat16)
        for kind in ("cudnn", "flash"):

            def inside(q: torch.Tensor = q, kind: str = kind) -> torch.Tensor:
                with forced(kind):
                    return attention(q, k, v, backend="sdpa")

            parts[label + kind] = inside
        parts[label + "interval"] = partial(attention, q, k, v, backend="interval")
    full = torch.randn(1, TOKENS, HEADS, DIM, device=device, dtype=torch.bfloat16)
    return parts | {"attention auto": partial(attention, full, k, v)}


def _packs(device: str) -> dict[str, Callable[[], object]]:
    """Packs of documents of 2,048 tokens, forward: our interval kernel, torch's varlen and compiled FlexAttention."""
    from ..kernels import attention
    from ..packing import PackMask

    parts: dict[str, Callable[[], object]] = {}
    for tokens in PACKS:
        doc_id = torch.arange(tokens, device=device) // 2048
        mask = PackMask(doc_id, causal=False)
        q, k, v = (torch.randn(1, tokens, HEADS, DIM, device=device, dtype=torch.bfloat16) for _ in range(3))
        for name in ("interval", "varlen", "flex"):
            parts[f"packed {tokens}, {name}"] = partial(attention, q, k, v, mask, backend=name)
    return parts
