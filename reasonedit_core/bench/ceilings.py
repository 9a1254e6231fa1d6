"""What the card itself can do, as arms: copies and matrix products; attention by each backend. See `worker`.

Each backend of attention is an arm, each shape a part of it, so that a part's ratio is to compiled FlexAttention on that shape:
0.91x or more is "within 10 %". A part that cannot run on the machine is named with its reason.

Legend: B batch, L tokens, H heads, D head dim; the DiTs have H = 24, D = 128 and about L = 8832.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .worker import forced, serve, start

SIDE, COPIED = 8192, 2**30
TOKENS, PARTIAL, HEADS, DIM = 8832, 1664, 24, 128
PACKS = {
    "packed 16384": (2048,) * 8,
    "packed 32768, unequal": (5120, 1111, 3001, 7168, 640, 4480, 2047, 9201),
}
"""Documents of the packs, in tokens. The first fits whole tiles of every kernel; the second no tile, as packs of real pictures
and texts do not."""

REPEATS = 10

CARD = "the card"
FLEX = "FlexAttention, compiled"
KINDS = {
    "flex": FLEX,
    "interval": "K5, our interval attention",
    "varlen": "torch varlen (flash)",
    "cudnn": "SDPA, cuDNN",
    "flash": "SDPA, flash",
    "auto": "our own choice",
}
"""Arms of attention by the kind of their job."""

PARTIAL_PART, DENSE_PART = "dense, partial queries", "dense"
FORWARD, BOTH, FIRST = "forward", "forward + backward", "first calls, with all compiling"

Call = Callable[[], Any]


def work() -> dict[str, float]:
    """Floating-point operations (bytes of the copy) of the parts, for what is printed. A backward takes 2.5 forwards."""
    dense = 4.0 * HEADS * DIM * TOKENS
    found = {"matmul 8192": 2.0 * SIDE**3, "copy 1 GiB": 2.0 * COPIED}
    found |= {f"{DENSE_PART}, {FORWARD}": dense * TOKENS, f"{PARTIAL_PART}, {FORWARD}": dense * PARTIAL}
    for name, lengths in PACKS.items():
        forward = 4.0 * HEADS * DIM * sum(length**2 for length in lengths)
        found |= {f"{name}, {FORWARD}": forward, f"{name}, {BOTH}": 3.5 * forward}
    return found


def main(text: str) -> None:
    """The process of an arm. text: the job as JSON."""
    job = start(text)
    parts, left_out, first = usable(calls(job["kind"], job["device"]), job["device"])

    def run(number: int) -> dict[str, float]:
        return {name: seconds(call, job["device"]) for name, call in parts.items()} | ({FIRST: first} if parts else {})

    serve(job, run, {"left_out": left_out})


def usable(parts: dict[str, Call], device: str) -> tuple[dict[str, Call], dict[str, str], float]:
    """The calls that run here, why the others do not, and the seconds that the first call of all took."""
    able, left_out, began = {}, {}, time.perf_counter()
    for name, call in parts.items():
        try:
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        except Exception as error:  # whatever a backend says, the others go on
            left_out[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        else:
            able[name] = call
    return able, left_out, time.perf_counter() - began


def seconds(call: Call, device: str) -> float:
    """Seconds of one call on the device, mean of several in a row."""
    if not device.startswith("cuda"):
        began = time.perf_counter()
        for _ in range(REPEATS):
            call()
        return (time.perf_counter() - began) / REPEATS
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPEATS


def calls(kind: str, device: str) -> dict[str, Call]:
    """The calls of an arm by part. kind: "card" or one of KINDS."""
    if kind == "card":
        square = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
        buffer = torch.empty(COPIED, dtype=torch.uint8, device=device)
        return {"matmul 8192": lambda: square @ square, "copy 1 GiB": partial(torch.empty_like(buffer).copy_, buffer)}
    parts: dict[str, Call] = {}
    if kind != "varlen":  # without documents it is the flash arm
        for name, queries in ((DENSE_PART, TOKENS), (PARTIAL_PART, PARTIAL)):
            q, k, v = (_random(length, device) for length in (queries, TOKENS, TOKENS))
            parts[f"{name}, {FORWARD}"] = partial(_without_gradient, _attend(kind, None, device), q, k, v)
    for name, lengths in PACKS.items():
        q, k, v = (_random(sum(lengths), device) for _ in range(3))
        attend = _attend(kind, lengths, device)
        parts[f"{name}, {FORWARD}"] = partial(_without_gradient, attend, q, k, v)
        parts[f"{name}, {BOTH}"] = partial(_with_gradients, attend, q, k, v, _random(sum(lengths), device))
    return parts


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attend(kind: str, lengths: tuple[int, ...] | None, device: str) -> Attend:
    """(q (1, L, H, D), k, v) -> (1, L, H, D) by a backend. lengths: of the documents; None: all see all."""
    if kind in ("cudnn", "flash"):
        return partial(_by_document, kind, lengths)
    if kind == "flex":
        return _flex(lengths, device)
    from ..kernels import attention
    from ..packing import PackMask

    mask = None if lengths is None else PackMask(_documents(lengths, device), causal=False)
    return lambda q, k, v: attention(q, k, v, mask, backend=kind)


def _by_document(kind: str, lengths: tuple[int, ...] | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA by one backend alone. It knows no documents: equal ones are its batch, unequal ones a call each."""
    attend = torch.nn.functional.scaled_dot_product_attention
    with forced(kind, alone=True):
        if lengths is None:
            batches = [(q, k, v)]
        elif len(set(lengths)) == 1:
            batches = [tuple(x.view(len(lengths), lengths[0], *x.shape[2:]) for x in (q, k, v))]
        else:
            batches = list(zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True))
        outs = [attend(*(x.transpose(1, 2) for x in batch)).transpose(1, 2) for batch in batches]
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0].reshape(q.shape)


def _flex(lengths: tuple[int, ...] | None, device: str) -> Attend:
    """torch's FlexAttention as its users have it, apart from our own code, compiled for each shape alone: its best form."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if lengths is not None:
        documents = _documents(lengths, device)

        def together(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return documents[query] == documents[key]

        mask = create_block_mask(together, None, None, sum(lengths), sum(lengths), device=device)
    attend = compiled(flex_attention)
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` compiled, anew for each shape."""
    return torch.compile(call, dynamic=False)


def _without_gradient(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return attend(q, k, v)


def _with_gradients(attend: Attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    # Together, as a compiled backward cannot be called a second time on what one forward kept.
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*given), given, grad)


def _documents(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def _random(length: int, device: str) -> Tensor:
    return torch.randn(1, length, HEADS, DIM, device=device, dtype=torch.bfloat16)
