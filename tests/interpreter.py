"""Starts `interpreted.py` in a process of its own: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent / "interpreted.py"


def run(part: str, *, slow: bool = False) -> None:
    """Run the tests whose names hold `part`, those marked slow or the others; a failure there fails here, with its output."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    chosen = ["-k", part, "-m", "slow" if slow else "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *chosen, str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FILE.parent.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
