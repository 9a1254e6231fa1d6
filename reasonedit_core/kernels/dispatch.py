"""One door to attention: `attention(q, k, v, mask)` picks a backend and never drops what it was given.

B batch, T queries, S keys, H heads, Hk key heads (H is a multiple of Hk), D head dim. A mask is a bool tensor, the
`PackMask` of a pack of documents, or `Intervals`, one per query; every backend takes from it the form it works with.

Order of choice: the host's callable (ComfyUI's attention, when a node hands one in), else the backend the caller
named, else the first row of `BACKENDS` that is available and takes the call. A backend says in words why it cannot
run; a named one that cannot raises with those words, `auto` passes on to the next row and logs its choice once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..errors import BackendUnavailable, ConfigError
from ..packing import PackMask
from . import batched, cross_entropy, flex, interval, linear, ops, packages, reference, scaled, sdpa, timing, varlen
from .mask import Intervals, Mask, as_tensor

log = logging.getLogger(__name__)

HOST = "host"
"""What `chosen_backends` calls a host's attention."""

_RAN: set[str] = set()
_TRACED: set[str] = set()
"""Backends that computed a call since it was last asked, and those that were compiled into a graph."""

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(q (B, T, H, D), k (B, S, Hk, D), v (B, S, Hk, D), mask | None) -> (B, T, H, D). What a host's callable looks like."""


class Refused(BackendUnavailable):
    """A host's attention cannot take this call (its mask, say); the dispatch then goes on to its own backends."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention.

    supports: None, or why this very call cannot run; it may look at the kind of mask, shapes, dtypes and devices, never
    at values, and is asked first. available: None, or why it cannot run on that device; costly probes remember their
    answer. about: one line for `explain`. packs_only: it takes no call but that of a pack of documents, or `auto` gives it
    others only after a timing. passes: None, or why `auto` leaves a call that it may be able to run to the next backend.
    """

    name: str
    available: Callable[[torch.device], str | None]
    supports: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask], str | None]
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask], torch.Tensor]
    about: str = ""
    packs_only: bool = False
    passes: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask], str | None] | None = None

    def refusal(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None) -> str | None:
        """None when this call can run, else the reason."""
        return self.supports(q, k, v, mask) or self.available(q.device)

    def declines(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None) -> str | None:
        """None when `auto` gives it this call, else the reason."""
        # In this order, so that nothing is compiled and tested for calls that it would not get.
        reason = self.supports(q, k, v, mask) or (self.passes(q, k, v, mask) if self.passes is not None else None)
        return reason or self.available(q.device)


BACKENDS: tuple[Backend, ...] = (
    Backend("varlen", varlen.available, varlen.supports, varlen.run, "torch varlen attention, for packs", packs_only=True),
    Backend(
        "interval",
        interval.available,
        interval.supports,
        interval.run,
        "our Triton kernels, for packs, and without a mask where a timing on the card finds them faster",
        packs_only=True,
        passes=interval.passes,
    ),
    Backend("flex", flex.available, flex.supports, flex.run, "torch FlexAttention, for packs", packs_only=True),
    Backend("batched", batched.available, batched.supports, batched.run, "SDPA by document, for packs", packs_only=True),
    Backend("sdpa", sdpa.available, sdpa.supports, sdpa.run, "torch scaled_dot_product_attention"),
    *(
        Backend(name, **packages.bound(name), about=f"{package.title}, when asked for by name")
        for name, package in packages.PACKAGES.items()
    ),
    Backend("reference", reference.available, reference.supports, reference.run, "plain torch in fp32, slow"),
)
"""In order of preference."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask = None,
    *,
    host: Run | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q: (B, T, H, D); k, v: (B, S, Hk, D); mask: bool, True where a query may see a key, broadcastable to (B, H, T, S),
    or a PackMask of T = S tokens, or Intervals, on the device of q -> (B, T, H, D). A query that may see no key gets
    zeros. host: tried first, with the mask as a tensor; it computes the call or raises `Refused`. backend: "auto" or a
    name of `BACKENDS`.
    """
    _check(q, k, v, mask)
    if host is not None:
        try:
            out = host(q, k, v, as_tensor(mask))
            _note(HOST)
            return out
        except Refused as refusal:
            if not torch.compiler.is_compiling():
                _log_once(f"the host's attention refused a call ({refusal}); our own backends take it")
    chosen = select(backend, q, k, v, mask)
    _note(chosen.name)
    return chosen.run(q, k, v, mask)


def chosen_backends(*, forget: bool = True) -> tuple[str, ...]:
    """Which backends were given attention since this was last asked, in order of preference, "host" first; forget: asked next
    time, those since now. A compiled graph does not say when it runs, so what was compiled into one is named every time."""
    found = _RAN | _TRACED
    if forget:
        _RAN.clear()
    return tuple(name for name in (HOST, *(backend.name for backend in BACKENDS)) if name in found)


def select(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None) -> Backend:
    """The backend that computes this call: the named one, or for "auto" the first that can."""
    if name != "auto":
        chosen = _named(name)
        reason = chosen.refusal(q, k, v, mask)
        if reason is not None:
            raise BackendUnavailable(
                f"attention backend {name!r} cannot run this call: {reason}. Choose 'auto' or one of {_names()}."
            )
        return chosen
    reasons = []
    for candidate in BACKENDS:
        reason = candidate.declines(q, k, v, mask)
        if reason is None:
            if not torch.compiler.is_compiling():
                _log_once("; ".join([f"attention on {q.device.type}: backend {candidate.name}", *reasons]))
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise BackendUnavailable(f"no attention backend can run this call: {'; '.join(reasons)}.")


def explain(device: torch.device | str = "cpu") -> str:
    """Which attention and which fused ops `auto` would take on `device`, and what each backend says of itself: text for
    `reasonedit doctor`."""
    device = torch.device(device)
    reasons = {backend.name: backend.available(device) for backend in BACKENDS}
    able = [backend for backend in BACKENDS if reasons[backend.name] is None]
    first = next((backend.name for backend in able if not backend.packs_only), None)
    lines = [f"attention on {device}: " + (f"{first} would run" if first else "no backend can run")]
    if able and able[0].packs_only:
        lines[0] += f", {able[0].name} where documents are packed"
    for backend in BACKENDS:
        reason = reasons[backend.name]
        lines.append(f"  {backend.name}: {'available' if reason is None else reason} ({backend.about})")
    if device.type == "cuda":
        kinds = {
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        }
        lines.append("  sdpa may use: " + ", ".join([*(kind for kind, on in kinds.items() if on), "plain"]))
        lines += timing.explain(device)
    lines += ops.explain(device)
    if device.type == "cpu":
        reason = linear.lacking()
        lines.append("float32 products on cpu: " + ("oneDNN would run" if reason is None else f"torch's own; oneDNN: {reason}"))
    lines.append(cross_entropy.explain())
    reason = scaled.refusal(device)
    lines.append(f"fp8 products on {device}: " + ("in 8 bits when asked for" if reason is None else f"dequantised; {reason}"))
    return "\n".join(lines)


def _note(name: str) -> None:
    if torch.compiler.is_compiling():
        _note_traced(name)
    else:
        _RAN.add(name)


@torch.compiler.assume_constant_result
def _note_traced(name: str) -> None:
    # Called while a graph is made and no part of it: a set that a graph adds to would be looked at before each of its runs.
    _TRACED.add(name)


def _names() -> str:
    return ", ".join(repr(backend.name) for backend in BACKENDS)


def _named(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ConfigError(f"attention backend {name!r} is not known. Choose 'auto' or one of {_names()}.")


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> None:
    """Refuse what a backend could misread in silence: a float mask, heads that do not divide, keys unlike values."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ConfigError(
            f"attention takes q (B, T, H, D) and k, v (B, S, H, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ConfigError(
            "attention needs one batch and head dim for q, k, v and query heads that are a multiple of the key heads, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if mask is None:
        return
    if isinstance(mask, PackMask):
        if q.shape[1] != len(mask.doc_id) or k.shape[1] != len(mask.doc_id) or mask.doc_id.device != q.device:
            raise ConfigError(
                f"a PackMask of {len(mask.doc_id)} tokens on {mask.doc_id.device} takes as many queries and keys on its "
                f"device, got {q.shape[1]} and {k.shape[1]} on {q.device}."
            )
        return
    if isinstance(mask, Intervals):
        if (q.shape[1], k.shape[1], q.device) != (len(mask.lo), mask.keys, mask.lo.device):
            raise ConfigError(
                f"Intervals of {len(mask.lo)} queries and {mask.keys} keys on {mask.lo.device} take as many on their device, "
                f"got {q.shape[1]} and {k.shape[1]} on {q.device}."
            )
        return
    if mask.dtype != torch.bool:
        raise ConfigError(f"an attention mask is bool, True where a query may see a key; got {mask.dtype}.")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.ndim > 4 or any(got not in (1, want) for got, want in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ConfigError(f"an attention mask must broadcast to (B, H, T, S) = {full}, got {tuple(mask.shape)}.")


@lru_cache(maxsize=256)
def _log_once(text: str) -> None:
    """One line per distinct choice, so that a run of thousands of calls logs each decision once."""
    log.info("%s", text)
