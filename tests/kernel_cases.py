"""What the fused kernels are tested with, whoever runs them: Triton's interpreter, or the CUDA source on the CPU.

Inputs lie in larger tensors of NaN and outputs begin as NaN with NaN around them, so that a read beside an input, a hole in an
output and a write beside it are all seen. Answers are compared with the plain form in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonedit.reasonedit_core.kernels import Heads
from reasonedit.reasonedit_core.kernels import reference_ops as plain

NAN = float("nan")

MARGIN = 4
"""Width of the frames. A multiple of four elements keeps rows where several elements can be read at once."""


class Draw:
    """Random tensors of one dtype, as inner parts of larger ones that are NaN elsewhere."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)
        return framed(values)

    def order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator)


def framed(values: torch.Tensor) -> torch.Tensor:
    """The same values inside of a tensor that is NaN around them; channels stay side by side."""
    outer = torch.full([n + 2 * MARGIN for n in values.shape], NAN, dtype=values.dtype)
    inner = outer[tuple(slice(MARGIN, MARGIN + n) for n in values.shape)]
    inner.copy_(values)
    return inner


def hole(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return framed(torch.full(shape, NAN, dtype=dtype))


def untouched_around(x: torch.Tensor) -> bool:
    """Whether the frame of a tensor of `framed` is still NaN everywhere."""
    outer = x._base.clone()
    outer[tuple(slice(MARGIN, -MARGIN) for _ in x.shape)] = NAN
    return bool(outer.isnan().all())


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: object = "") -> None:
    assert found.shape == wanted.shape, what
    error = relative(found, wanted)
    assert error < tolerance, f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}"


def wide(x):
    """float64, through tuples; None and integers stay."""
    if isinstance(x, Heads):
        return Heads(*map(wide, x))
    if isinstance(x, tuple):
        return tuple(map(wide, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


# --- K1 ---


@dataclass(frozen=True)
class Layout:
    """One call of K1. rows: None, "int32" or "int64"; cache: rows of the cache, 0 for none."""

    batch: int = 1
    text: int = 3
    image: int = 6
    heads: int = 2
    key_heads: int = 2
    dim: int = 8
    rows: str | None = None
    cache: int = 0
    batched_table: bool = False
    weights: torch.dtype | None = None


LAYOUTS = {
    "joint": Layout(),
    "one-stream": Layout(text=0, batch=2),
    "groups": Layout(batch=2, heads=6, key_heads=3, dim=12),
    "many-heads": Layout(heads=9, key_heads=3, dim=20, text=1, image=2),
    "odd-pairs": Layout(dim=6, heads=3, key_heads=1),
    "packed-order": Layout(batch=2, rows="int64"),
    "packed-order-int32": Layout(rows="int32", batched_table=True, batch=2),
    "cache": Layout(rows="int32", cache=14, heads=4),
    "cache-of-one-stream": Layout(text=0, image=5, rows="int64", cache=9, batch=2, heads=3, key_heads=1, batched_table=True),
    "cache-in-order": Layout(cache=11),
    "float32-weights": Layout(weights=torch.float32),
    "wide-heads": Layout(text=1, image=1, dim=140, heads=1, key_heads=1),
}


def heads_of(draw: Draw, layout: Layout, tokens: int) -> Heads:
    """q, k and v cut out of one projection's output, as a fused projection gives them."""
    n, h, hk, d = layout.batch, layout.heads, layout.key_heads, layout.dim
    joined = draw(n, tokens, h + 2 * hk, d)
    q, k, v = joined[:, :, :h], joined[:, :, h : h + hk], joined[:, :, h + hk :]
    return Heads(q, k, v, *(draw(d, dtype=layout.weights or draw.dtype) for _ in range(2)))


def check_k1(kernels, layout: Layout, dtype: torch.dtype, tolerance: float) -> None:
    draw = Draw(dtype)
    image = heads_of(draw, layout, layout.image)
    text = heads_of(draw, layout, layout.text) if layout.text else None
    length, whole = layout.text + layout.image, layout.cache or layout.text + layout.image
    angles = torch.randn(layout.batch if layout.batched_table else 1, whole, layout.dim // 2, generator=draw.generator)
    # Every angle twice, as Step1X-Edit's tables have it: the kernel gets every second column.
    cos, sin = (framed(t.repeat_interleave(2, dim=-1))[..., ::2] for t in (angles.cos(), angles.sin()))
    table = torch.complex(wide(cos), wide(sin))
    rows = None if layout.rows is None else draw.order(whole)[:length].to(getattr(torch, layout.rows))

    shape = (layout.batch, length, layout.heads, layout.dim)
    key_shape = (layout.batch, whole, layout.key_heads, layout.dim)
    out_q = hole(*shape, dtype=dtype)
    if layout.cache:
        out_k, out_v = draw(*key_shape), draw(*key_shape)
        cache = out_k.double(), out_v.double()
        wanted_q = plain.qk_norm_rope_cached(wide(image), table, cache, wide(text), rows)
        wanted = (wanted_q, *cache)
    else:
        out_k, out_v = hole(*key_shape, dtype=dtype), hole(*key_shape, dtype=dtype)
        wanted = plain.qk_norm_rope(wide(image), table, wide(text), rows)
    streams = [image] if text is None else [text, image]
    kernels.qk_norm_rope(streams, cos, sin, rows, (out_q, out_k, out_v), 1e-6, compact=bool(layout.cache))
    for name, found, right in zip("qkv", (out_q, out_k, out_v), wanted, strict=True):
        close(found, right, tolerance, name)
        assert untouched_around(found), name


def check_k1_without_values(kernels, dtype: torch.dtype, tolerance: float) -> None:
    draw, layout = Draw(dtype), Layout(text=0, batch=2, heads=3, key_heads=1)
    image = heads_of(draw, layout, layout.image)
    angles = torch.randn(1, layout.image, layout.dim // 2, generator=draw.generator)
    out = hole(2, 6, 3, 8, dtype=dtype), hole(2, 6, 1, 8, dtype=dtype)
    wanted = plain.qk_norm_rope(wide(image), torch.complex(angles.cos().double(), angles.sin().double()))
    kernels.qk_norm_rope([image], angles.cos(), angles.sin(), None, (*out, None), 1e-6)
    for found, right in zip(out, wanted, strict=False):
        close(found, right, tolerance)
        assert untouched_around(found)


def check_k1_rows_outside(kernels, dtype: torch.dtype) -> None:
    """Rows that the sequence does not have write nothing, rather than into other memory."""
    draw, layout = Draw(dtype), Layout(text=0, image=4)
    image = heads_of(draw, layout, 4)
    angles = torch.randn(1, 5, layout.dim // 2, generator=draw.generator)
    out_q, out_k, out_v = hole(1, 4, 2, 8, dtype=dtype), *(hole(1, 5, 2, 8, dtype=dtype) for _ in range(2))
    rows = torch.tensor([-1, 3, 5, 0])
    kernels.qk_norm_rope([image], angles.cos(), angles.sin(), rows, (out_q, out_k, out_v), 1e-6, compact=True)
    for found in (out_k, out_v):
        written = ~found[0].isnan().any(dim=(-1, -2))
        assert written.tolist() == [True, False, False, True, False]
        assert untouched_around(found)
    assert torch.equal(out_v[0, 3], image.v[0, 1]) and untouched_around(out_q)


# --- K2 ---


@dataclass(frozen=True)
class Modulated:
    """One call of K2. rows: None for a row per sample, "one" for a single row, "token" or "sample and token"."""

    batch: int = 2
    tokens: int = 5
    width: int = 24
    rows: str | None = None
    gated: bool = True
    normed: bool = True
    clamp: bool = False
    modulation: torch.dtype | None = None


MODULATIONS = {
    "row-per-sample": Modulated(),
    "one-row": Modulated(rows="one"),
    "rows-by-token": Modulated(rows="token", tokens=9),
    "rows-by-sample-and-token": Modulated(rows="sample and token", batch=3),
    "norm-only": Modulated(gated=False),
    "gate-only": Modulated(normed=False, rows="token"),
    "odd-width": Modulated(width=37),
    "one-channel": Modulated(width=1, tokens=2),
    "wide": Modulated(width=1100, batch=1, tokens=2),
    "float32-modulation": Modulated(modulation=torch.float32),
}


def check_k2(kernels, case: Modulated, dtype: torch.dtype, tolerance: float) -> None:
    draw = Draw(dtype)
    x = draw(case.batch, case.tokens, case.width)
    y = draw(case.batch, case.tokens, case.width) if case.gated else None
    count = {None: case.batch, "one": 1}.get(case.rows, 4)
    # Cut out of one projection's output, so rows lie apart.
    gate, scale, shift = draw(count, 3 * case.width, dtype=case.modulation or dtype).chunk(3, dim=1)
    rows = None
    if case.rows == "token":
        rows = torch.arange(case.tokens) % (count + 1) - 1
    elif case.rows == "sample and token":
        rows = (torch.arange(case.batch)[:, None] + torch.arange(case.tokens) % (count + 1) - 1).clamp(max=count - 1).int()
    gate = gate if case.gated else None
    scale, shift = (scale, shift) if case.normed else (None, None)
    residual = hole(*x.shape, dtype=dtype) if case.gated else None
    normed = hole(*x.shape, dtype=dtype) if case.normed else None

    base, right = x.double(), None
    if case.gated:
        right = plain.gate_residual(*wide((x, y, gate)), rows)
        base = right.to(dtype).double()  # the norm is that of the rounded residual
    kernels.gate_norm_modulate(x, y, gate, scale, shift, rows, residual, normed, 1e-6, case.clamp)
    if case.gated:
        close(residual, right, tolerance, "residual")
        assert untouched_around(residual)
        base = residual.double()
    if case.normed and case.width > 1:
        close(normed, plain.norm_modulate(base, *wide((scale, shift)), rows), tolerance, "norm")
    if case.normed:
        assert untouched_around(normed) and not normed.isnan().any()
    if case.gated and case.normed:
        # In two calls the same bits: fusing them is no other numerics.
        again = hole(*x.shape, dtype=dtype)
        kernels.gate_norm_modulate(residual, None, None, scale, shift, rows, None, again, 1e-6, case.clamp)
        assert torch.equal(again, normed)


def check_k2_clamp(kernels) -> None:
    """float16 residuals beyond the finite numbers: infinite, or held back; a NaN stays one in either case."""
    x = torch.tensor([60000.0, -60000.0, 1.0, NAN]).half()[None, None]
    y, gate = torch.tensor([60000.0, -60000.0, 1.0, 1.0]).half()[None, None], torch.ones(1, 4).half()
    for clamp, wanted in ((True, [65504.0, -65504.0, 2.0]), (False, [float("inf"), float("-inf"), 2.0])):
        residual = hole(1, 1, 4, dtype=torch.float16)
        kernels.gate_norm_modulate(x, y, gate, None, None, None, residual, None, 1e-6, clamp)
        assert residual[0, 0, :3].tolist() == wanted
        assert residual[0, 0, 3].isnan()


# --- K4 ---


@dataclass(frozen=True)
class Step:
    """One call of K4. sigma: where the schedule stands; lengths: factors of the tokens of the prediction."""

    batch: int = 2
    tokens: int = 7
    channels: int = 6
    rule: str = "plain"
    guided: bool = True
    velocity: bool = True
    truncate: float = 0.0
    sigma: float = 0.8
    latents: torch.dtype | None = None


STEPS = {
    "unguided": Step(guided=False),
    "plain": Step(channels=64, tokens=3),
    "step1x": Step(rule="step1x"),
    "step1x-above": Step(rule="step1x", truncate=0.5),
    "step1x-below": Step(rule="step1x", truncate=0.9),
    "step1x-at-zero": Step(rule="step1x", sigma=0.0),
    "step1x-never": Step(rule="step1x", truncate=1.0, sigma=1.0),
    "qwen": Step(rule="qwen", channels=33),
    "without-velocity": Step(rule="qwen", velocity=False),
    "float32-latents": Step(rule="step1x", latents=torch.float32),
    "one-channel": Step(channels=1, batch=1, rule="step1x"),
}


def check_k4(kernels, case: Step, dtype: torch.dtype, tolerance: float) -> None:
    draw = Draw(dtype)
    shape = (case.batch, case.tokens, case.channels)
    latents = draw(*shape, dtype=case.latents)
    cond, uncond = draw(*shape), draw(*shape)
    # Differences on both sides of length 1, where Step1X-Edit's rule begins.
    uncond.copy_(cond + uncond * torch.linspace(0.05, 3, case.tokens)[:, None].to(dtype))
    uncond = uncond if case.guided else None
    sigmas = torch.tensor([NAN, case.sigma, case.sigma - 0.3, NAN])
    out, velocity = hole(*shape, dtype=dtype), hole(*shape, dtype=dtype) if case.velocity else None
    call = (4.0, case.rule, 0.4, case.truncate)
    wanted = plain.guided_step(*wide((latents, cond, uncond)), sigmas[1], sigmas[2], *call)
    kernels.guided_step(latents, cond, uncond, sigmas[1], sigmas[2], out, velocity, *call)
    for found, right in zip((out, velocity), wanted, strict=True):
        if found is not None:
            close(found, right, tolerance)
            assert untouched_around(found)
