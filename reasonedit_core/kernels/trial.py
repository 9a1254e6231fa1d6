"""Tests every kernel once on a card before it is used there: small random tensors against the plain form in float32.

Outputs are filled with NaN first, so that what a kernel leaves out is seen. Whatever goes wrong becomes a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from . import reference_ops as plain
from .mask import Intervals
from .reference_ops import RULES, Heads

TOLERANCE = 1e-2
"""Relative error in bfloat16, whose rounding alone makes 2e-3."""

QUANTISED = {"sage": 0.1, "kitchen": 0.1}
"""The same for packages that compute in 8 bits: what is broken is off by far more, all zeros by 1."""

DIM, WIDTH = 128, 3072
"""Those of the DiTs, so that what is compiled here serves them."""

Pairs = Iterator[tuple[str, Tensor, Tensor]]
"""(what, found, wanted)."""


def run(op: str, backend: str, device: torch.device) -> str | None:
    """None, or why `op` by `backend` is not to be used on `device`."""
    most = QUANTISED.get(backend, TOLERANCE)
    try:
        # Under inference_mode, where the first call may come from, no gradient could be taken.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            for what, found, wanted in CASES[op](_kernels(op, backend), device):
                error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
                if not error < most:  # also where it is NaN
                    return f"its test failed: {what} is off by {error:.1e} of its length, at most {most:.0e} is right"
    except Exception as error:
        return f"its test broke ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
    return None


def _kernels(op: str, backend: str) -> Any:
    """What a case runs: a module of ours, or a package's attention (q, k, v) -> out."""
    if op == "attention":
        from . import packages

        return partial(packages.run, backend)
    if op == "product in fp8":
        from . import scaled

        return partial(scaled.product, way=backend)
    if op.startswith("interval"):
        from . import triton_attention as found
    elif backend == "triton":
        from . import triton_ops as found
    else:
        from . import nvrtc_ops as found
    return found


class _Draw:
    """Random tensors in bfloat16, the same on every machine."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, torch.bfloat16)

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.device, torch.int32)


def _holes(like: Iterable[Tensor]) -> list[Tensor]:
    return [torch.full_like(x, float("nan")) for x in like]


def _wide(heads: Heads) -> Heads:
    return Heads(*(x.float() for x in heads))


def qk_norm_rope(kernels: ModuleType, device: torch.device) -> Pairs:
    """Text and pictures into a joint sequence, in order and in another; then into rows of a cache; one stream alone."""
    draw = _Draw(device)
    text, image = (Heads(*(draw(2, n, h, DIM) for h in (4, 2, 2)), draw(DIM), draw(DIM)) for n in (5, 59))
    angles = draw(1, 80, DIM // 2).float()
    cos, sin, table = angles.cos(), angles.sin(), torch.polar(torch.ones_like(angles), angles)
    for what, rows in (("the joint sequence", None), ("the joint sequence in another order", draw.order(64))):
        wanted = plain.qk_norm_rope(_wide(image), table[:, :64], _wide(text), rows)
        found = _holes(x.to(torch.bfloat16) for x in wanted)
        kernels.qk_norm_rope([text, image], cos[:, :64], sin[:, :64], rows, tuple(found), 1e-6)
        for name, *pair in zip("qkv", found, wanted, strict=True):
            yield f"{name} of {what}", *pair
    rows = draw.order(80)[:64]
    cache = [draw(2, 80, 2, DIM) for _ in range(2)]
    wanted_cache = [x.float() for x in cache]
    wanted = plain.qk_norm_rope_cached(_wide(image), table, tuple(wanted_cache), _wide(text), rows)
    (found,) = _holes([wanted.to(torch.bfloat16)])
    kernels.qk_norm_rope([text, image], cos, sin, rows, (found, *cache), 1e-6, compact=True)
    yield "q beside a cache", found, wanted
    yield "k of a cache", cache[0], wanted_cache[0]
    yield "v of a cache", cache[1], wanted_cache[1]
    wanted = plain.qk_norm_rope(_wide(image), table)
    found = _holes(image[:2])
    kernels.qk_norm_rope([image], cos, sin, None, (*found, None), 1e-6)
    for name, *pair in zip("qk", found, wanted, strict=False):
        yield f"{name} of one stream", *pair


def gate_norm_modulate(kernels: ModuleType, device: torch.device) -> Pairs:
    """Rows of modulation by token, some without, then one row per sample."""
    draw = _Draw(device)
    x, y, modulation = draw(2, 64, WIDTH), draw(2, 64, WIDTH), draw(2, 3 * WIDTH).chunk(3, dim=1)
    some = torch.arange(64, device=device, dtype=torch.int32) % 3 - 1
    for what, rows in (("rows by token", some), ("a row per sample", None)):
        wanted = plain.gate_norm_modulate(x.float(), y.float(), *(m.float() for m in modulation), rows)
        residual, normed = _holes([x, x])
        kernels.gate_norm_modulate(x, y, *modulation, rows, residual, normed, 1e-6, False)
        yield f"the residual with {what}", residual, wanted[0]
        yield f"the norm with {what}", normed, wanted[1]


def guided_step(kernels: ModuleType, device: torch.device) -> Pairs:
    """Every rule."""
    draw = _Draw(device)
    latents, cond, uncond = (draw(2, 64, 64) for _ in range(3))
    sigmas = torch.tensor([0.8, 0.6], device=device)
    for rule in RULES:
        wanted = plain.guided_step(latents.float(), cond.float(), uncond.float(), *sigmas, 4.0, rule)
        out, velocity = _holes([cond, cond])
        kernels.guided_step(latents, cond, uncond, *sigmas, out, velocity, 4.0, rule, 0.4, 0.0)
        yield f"the step of rule {rule}", out, wanted[0]
        yield f"the velocity of rule {rule}", velocity, wanted[1]


def interval(kernels: ModuleType, device: torch.device) -> Pairs:
    """A causal document, a bidirectional one and padding, with grouped heads; then no intervals at all."""
    q, k, v, _ = _attended(device)
    for what, mask in (("with intervals", _documents(device)), ("without intervals", None)):
        (out,) = _holes([q])
        kernels.forward(q, k, v, mask and (mask.lo, mask.hi), out, _lines(q), DIM**-0.5)
        yield f"attention {what}", out, reference.run(q.float(), k.float(), v.float(), mask)


def interval_backward(kernels: ModuleType, device: torch.device) -> Pairs:
    """The gradients of the same."""
    q, k, v, grad = _attended(device)
    for what, mask in (("with intervals", _documents(device)), ("without intervals", None)):
        leaves = [x.float().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            wanted = torch.autograd.grad(reference.run(*leaves, mask), leaves, grad.float())
        intervals, lse, (out, *grads) = mask and (mask.lo, mask.hi), _lines(q), _holes([q, q, k, v])
        kernels.forward(q, k, v, intervals, out, lse, DIM**-0.5)
        seen = mask and mask.seen_by(kernels.tiles("keys", DIM).keys)
        kernels.backward(q, k, v, out, lse, grad, intervals, seen, tuple(grads), _lines(q), DIM**-0.5)
        for name, *pair in zip("qkv", grads, wanted, strict=True):
            yield f"the gradient of {name} {what}", *pair


def attention(run: Callable[..., Tensor], device: torch.device) -> Pairs:
    """As the DiTs call it: as many queries as keys, then a part of them, then grouped heads."""
    q, k, v, _ = _attended(device)
    wide_k, wide_v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    for what, call in (
        ("attention", (q, wide_k, wide_v)),
        ("attention of a part of the queries", (q[:, :77], wide_k, wide_v)),
        ("attention with grouped heads", (q, k, v)),
    ):
        yield what, run(*call), reference.run(*(x.float() for x in call))


def product_in_fp8(product: Callable[..., Tensor], device: torch.device) -> Pairs:
    """Against the dequantised form, on activations that 8 bits hold exactly: what is wrong then is the product, not the
    rounding. As many rows as no tile has, one scale and a scale by row, with bias and without."""
    draw = _Draw(device)
    # 256 to 448 in steps of 32, of either sign: alike in size, so that every one shows, and 448 in each row, so that its scale
    # is the power of two that it is given.
    x = draw(77, 256).float()
    x = x.sign() * (8 + (97 * x).abs().floor() % 7) * 32
    x[:, 0] = 448.0
    x = (x * torch.exp2(torch.arange(77, device=device)[:, None] % 3 - 9.0)).to(torch.bfloat16)
    weight, bias = draw(384, 256).to(torch.float8_e4m3fn), 8 * draw(384)
    for what, scale in (("one scale", torch.tensor(0.25, device=device)), ("a scale by row", draw(384).float().abs() + 0.1)):
        wide = weight.float() * scale.reshape(-1, 1)
        yield f"the product with {what}", product(x, weight, scale, None), x.float() @ wide.t()
        yield f"the product with {what} and bias", product(x, weight, scale, bias), x.float() @ wide.t() + bias.float()


def _attended(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the answer."""
    draw = _Draw(device)
    return draw(1, 200, 4, DIM), draw(1, 200, 2, DIM), draw(1, 200, 2, DIM), draw(1, 200, 4, DIM)


def _documents(device: torch.device) -> Intervals:
    at = torch.arange(200, device=device, dtype=torch.int32)
    lo = torch.where(at < 70, 0, torch.where(at < 190, 70, 0)).int()
    return Intervals(lo, torch.where(at < 70, at + 1, torch.where(at < 190, 190, 0)).int(), 200)


def _lines(q: Tensor) -> Tensor:
    return torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device=q.device)


CASES: dict[str, Callable[[Any, torch.device], Pairs]] = {
    "qk_norm_rope": qk_norm_rope,
    "gate_norm_modulate": gate_norm_modulate,
    "guided_step": guided_step,
    "interval": interval,
    "interval backward": interval_backward,
    "attention": attention,
    "product in fp8": product_in_fp8,
}
