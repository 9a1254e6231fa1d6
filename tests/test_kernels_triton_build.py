"""Our Triton kernels compiled ahead of time, without a card: they must compile for every architecture and fit into its shared
memory, which the interpreter does not check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KB of shared memory that one block may take, by compute capability."""

ALL = ("elementwise", "packed", "full", "grouped", "small", "odd")


def build(capability: int, parts: tuple[str, ...], folder: Path) -> list[dict]:
    """What was compiled; the code of this test's own run, not of a cache."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    start = "import conftest, runpy, sys; sys.argv[0] = 'triton_build'; runpy.run_path(%r, run_name='__main__')"
    here = Path(__file__).resolve().parent
    run = subprocess.run(
        [sys.executable, "-c", start % str(here / "triton_build.py"), str(capability), *parts],
        capture_output=True,
        text=True,
        cwd=here,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(found: list[dict], capability: int) -> None:
    for kernel in found:
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= SHARED[capability] * 1024, kernel
        if kernel["kernel"].startswith(("forward", "backward")):
            assert kernel["matrix"], f"{kernel['kernel']} computes its products without matrix units"
        else:
            assert kernel["wide"], f"{kernel['kernel']} reads or writes less than 16 bytes at a time"


def test_elementwise_kernels_compile(tmp_path):
    found = build(86, ("elementwise",), tmp_path)
    assert {kernel["kernel"] for kernel in found} == {
        "qk_norm_rope_kernel",
        "gate_norm_modulate_kernel",
        "guided_step_kernel",
    }
    check(found, 86)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_for_every_architecture(tmp_path, capability):
    found = build(capability, ALL, tmp_path)
    assert len([kernel for kernel in found if kernel["kernel"] == "forward_kernel"]) == len(ALL) - 1
    check(found, capability)
