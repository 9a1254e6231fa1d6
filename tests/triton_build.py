"""Compiles our Triton kernels for a card that is not there: `python -m reasonedit.tests.triton_build CAPABILITY PART...`.

The launchers of the package run on tensors without values at full size, so that what is compiled is what a user's card gets:
the same strides, divisibility, tiles and warps. Prints one JSON object per kernel. In a process of its own, because it takes
the place of Triton's driver.
"""

from __future__ import annotations

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from reasonedit.reasonedit_core.kernels import Heads, triton_attention, triton_ops


class Pretend:
    """A driver that knows the target and has no card."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_instead(self: JITFunction, grid: tuple[int, ...]):
    """In place of `kernel[grid]`."""

    def launch(*args, **kwargs) -> None:
        made = self.warmup(*args, grid=grid, **kwargs)
        code = made.asm["ptx"]
        matrix = [name for name in ("mma.sync", "wgmma", "tcgen05.mma") if name in code]
        wide = "ld.global.v4" in code and "st.global.v4" in code
        told = {"kernel": self.fn.__name__, "shared": made.metadata.shared, "cubin": len(made.asm["cubin"])}
        print(json.dumps({**told, "matrix": matrix, "wide": wide}), flush=True)

    return launch


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def elementwise() -> None:
    """K1, K2 and K4 as the DiTs call them."""
    text, image = (Heads(*(empty(1, n, 24, 128) for _ in range(3)), empty(128), empty(128)) for n in (640, 8192))
    table = empty(8832, 128, dtype=torch.float32)[None, :, ::2]
    out = tuple(empty(1, 8832, 24, 128) for _ in range(3))
    triton_ops.qk_norm_rope([text, image], table, table, None, out, 1e-6)
    rows = empty(8832, dtype=torch.int32)
    triton_ops.qk_norm_rope([text, image], table, table, rows, out, 1e-6, compact=True)
    x, modulation = empty(1, 8832, 3072), empty(1, 6 * 3072).chunk(6, dim=1)
    triton_ops.gate_norm_modulate(x, x, *modulation[:3], None, x, x, 1e-6, False)
    triton_ops.gate_norm_modulate(x, None, None, *modulation[:2], rows, None, x, 1e-6, False)
    latents, sigmas = empty(1, 4096, 64), empty(2, dtype=torch.float32)
    for rule in ("step1x", "qwen"):
        triton_ops.guided_step(latents, latents, latents, sigmas[0], sigmas[1], latents, None, 4.0, rule, 0.4, 0.0)


def attention(dim: int, key_heads: int, packed: bool) -> None:
    """K5, forward and backward."""
    q, k = empty(1, 8832, 24, dim), empty(1, 8832, key_heads, dim)
    lse, ends = empty(1, 24, 8832, dtype=torch.float32), empty(8832, dtype=torch.int32)
    intervals, seen = ((ends, ends), empty(2, 138, dtype=torch.int32)) if packed else (None, None)
    triton_attention.forward(q, k, k, intervals, q, lse, dim**-0.5)
    triton_attention.backward(q, k, k, q, lse, q, intervals, seen, (q, k, k), lse, dim**-0.5)


PARTS = {
    "elementwise": elementwise,
    "packed": lambda: attention(128, 24, True),
    "full": lambda: attention(128, 24, False),
    "grouped": lambda: attention(128, 4, True),
    "small": lambda: attention(64, 24, True),
    "odd": lambda: attention(80, 24, True),
}

if __name__ == "__main__":
    JITFunction.__getitem__ = compile_instead
    driver.set_active(Pretend(int(sys.argv[1])))
    for part in sys.argv[2:]:
        PARTS[part]()
