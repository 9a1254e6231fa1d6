"""Our side of the comparisons with the released code: one run of `reasonedit edit`, and what it left on the disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core import cli
from reasonedit.reasonedit_core.dialogue.pack import FORMAT
from reasonedit.tests.peer import cases, golden_loop
from reasonedit.tests.peer.recipe import resizes_like_the_goldens

PACK = f"""\
format = "{FORMAT}"
name = "peer"
language = "en"
version = 1
[languages]
en = "English"
zh = "Chinese"
[conditioning.step1x-v1p2]
prefix = {json.dumps(golden_loop.PREFIX)}
dropped_tokens = {golden_loop.DROPPED}
[conditioning.step1x-v1p1]
prefix = {json.dumps(cases.PREFIX["v1.1"])}
dropped_tokens = {cases.DROPPED["v1.1"]}
"""
"""A dialogue pack with the prefixes of the golden pictures. What it lacks is filled from our own wording."""


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of a finished run. code: the exit code."""

    folder: Path
    code: int

    @property
    def trace(self) -> dict[str, Any]:
        """trace.json"""
        return json.loads((self.folder / "trace.json").read_text(encoding="utf-8"))

    def picture(self, name: str = "result.png") -> torch.Tensor:
        """A file as uint8 (H, W, 3)."""
        return torch.from_numpy(np.array(Image.open(self.folder / name).convert("RGB")))

    @property
    def rounds(self) -> list[torch.Tensor]:
        """The pictures of the rounds, as the trace names them."""
        return [self.picture(made["image"]) for made in self.trace["rounds"]]


def edit(folder: Path, image: Image.Image, instruction: str, weights: Path, *options: object, system: str = "s") -> Run:
    """`reasonedit edit` in fp32 on the CPU; options are further arguments of the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / "source.png")
    out = folder / "out"
    fixed = ["--system", f"reasonedit-{system}", "--weights", weights, "--out", out]
    fixed += ["--dtype", "float32", "--device", "cpu", "--quiet"]
    code = cli.main([str(part) for part in ("edit", folder / "source.png", instruction, *fixed, *options)])
    return Run(out, code)


def options(case: golden_loop.Loop | golden_loop.Edit, folder: Path, *, policy: str = "released") -> list[object]:
    """The options of `reasonedit edit` for a case; the script goes into `folder`."""
    chosen: list[object] = ["--policy", policy, "--steps", case.steps, "--guidance", case.guidance]
    chosen += ["--size", case.level, "--seed", case.seed]
    if isinstance(case, golden_loop.Edit):
        return [*chosen, "--reasoner", "none"]
    chosen += ["--rounds", case.rounds, "--reasoner", f"scripted:{write_script(folder, case.replies)}"]
    chosen += [] if case.think else ["--no-think"]
    return chosen if case.reflect else [*chosen, "--no-reflect"]


def write_script(folder: Path, replies: dict[str, list[str]]) -> Path:
    """A file of scripted replies."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "replies.json"
    path.write_text(json.dumps(replies, ensure_ascii=False), encoding="utf-8")
    return path


def write_pack(folder: Path) -> Path:
    """PACK as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pack.toml").write_text(PACK, encoding="utf-8")
    return folder / "pack.toml"


def assert_same_picture(found: torch.Tensor, expected: torch.Tensor) -> None:
    """uint8 pictures: mean difference under 0.05 and at most 2, of 255."""
    assert found.shape == expected.shape
    difference = (found.int() - expected.int()).abs()
    close = difference.max() <= 2 and difference.float().mean() < 0.05
    if not close and not resizes_like_the_goldens():
        pytest.skip("NOT COMPARED: the golden pictures were made with Pillow 13, which resizes this size differently")
    assert close, (int(difference.max()), float(difference.float().mean()))
