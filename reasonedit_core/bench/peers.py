"""Where the peers of a comparison are, and what is missing of them.

`--peers DIR` names a folder that holds what is at hand of:

    DIR/step1x      a checkout of the released diffusers fork (github.com/Peyton-Chen/diffusers, branch step1xedit_v1p2)
    DIR/RegionE     RegionE: a checkout, or what `pip install --target DIR/RegionE --no-deps RegionE` put there
    DIR/editplus    a checkout or unpacked wheel of another diffusers than the installed one, for its EditPlus pipeline

The released code wants transformers 4.55, qwen_vl_utils, torchvision and the fork's own requirements; megfile is not needed.
Make an environment of Python 3.11 or later for it and name its interpreter:

    python -m venv ENV
    ENV/bin/pip install torch torchvision transformers==4.55 qwen_vl_utils accelerate safetensors einops httpx regex
    reasonedit bench --peers DIR --peer-python ENV/bin/python

On a machine without network carry DIR (of the fork `src` alone, 4 MB packed, and RegionE, 0.1 MB) and the wheels. EditPlus runs
in a process of this interpreter with the installed diffusers where DIR has no other. A peer of which something is missing is
named in the report with what it lacks; the other arms run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

STEP1X = "released Step1X-Edit v1p2"
REGIONE = "released Step1X-Edit v1p2 under RegionE"
EDITPLUS = "diffusers EditPlus"
REASONER = "released reasoner"

_PIPELINE = Path("diffusers/pipelines/step1x_edit/pipeline_step1x_edit_v1p2.py")
_INPLACE = Path("RegionE/Step1XEditV1P2/inplace.py")


@dataclass(frozen=True, slots=True)
class Place:
    """A peer's interpreter and import paths, or in words what is missing."""

    python: str = sys.executable
    paths: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class Peers:
    """What `--peers` and `--peer-python` name."""

    folder: Path | None = None
    python: Path | None = None

    def step1x(self) -> Place:
        """The released pipeline and reasoner."""
        source = self._below("step1x", _PIPELINE)
        if isinstance(source, str):
            return Place(missing=source)
        return Place(self._interpreter(), (str(source),), self._no_interpreter())

    def regione(self) -> Place:
        """RegionE on top of the released pipeline."""
        pipeline = self.step1x()
        if pipeline.missing:
            return pipeline
        source = self._below("RegionE", _INPLACE)
        if isinstance(source, str):
            return Place(missing=source)
        return Place(pipeline.python, (*pipeline.paths, str(source)))

    def editplus(self) -> Place:
        """Diffusers' own pipeline."""
        source = self._below("editplus", Path("diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py"))
        return Place() if isinstance(source, str) else Place(self._interpreter(), (str(source),), self._no_interpreter())

    def _below(self, name: str, file: Path) -> Path | str:
        """The folder of `name` to import from; words if it is not there."""
        if self.folder is None:
            return f"--peers DIR with DIR/{name} (see `reasonedit bench --help`)"
        for place in (self.folder / name / "src", self.folder / name):
            if (place / file).is_file():
                return place.resolve()
        return f"{file} in DIR/{name}/src or DIR/{name} of --peers"

    def _interpreter(self) -> str:
        return str(self.python or sys.executable)

    def _no_interpreter(self) -> str | None:
        return None if self.python is None or self.python.is_file() else f"an interpreter at {self.python} (--peer-python)"
