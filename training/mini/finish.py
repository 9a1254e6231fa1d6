"""The last link: the merged weights of a run as the folder that is shipped."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...reasonedit_core.errors import ConfigError
from ..merged import MARK

FILE_LIMIT = 30_000_000
"""Bytes that no file of a shipped miniature may exceed."""


def write_finished(merged: Path, folder: Path) -> Path:
    """Copy a merged export, without the note of what it was made of, which names folders of this machine."""
    if not (merged / MARK).is_file():
        raise ConfigError(f"expected a merged export at {merged}, found none. Let the run end first.")
    shutil.copytree(merged, folder, ignore=shutil.ignore_patterns(MARK))
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > FILE_LIMIT:
            raise ConfigError(
                f"{file.name}: expected at most {FILE_LIMIT:,} bytes, found {file.stat().st_size:,}. Make the networks smaller."
            )
    return folder
