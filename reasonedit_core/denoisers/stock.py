"""Networks of diffusers from local folders, before they are widened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..weightfiles import read_json, weight_files


def load_stock(path: str | Path, name: str, hint: str, dtype: torch.dtype) -> Any:
    """The network of diffusers' class `name` in a folder. hint: what to name instead. CheckpointError for another class, for
    no configuration, and for weights that cannot be read."""
    import diffusers

    path = Path(path)
    found = read_json(path / "config.json").get("_class_name") if (path / "config.json").is_file() else None
    if found != name:
        what = f"a {found}" if found else "no config.json that names its class"
        raise CheckpointError(f"{path}: expected a {name}, found {what}. Name {hint}.")
    weight_files(path)
    return getattr(diffusers, name).from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
