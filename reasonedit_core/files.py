"""Files are written whole or not at all: a reader, or a run that is killed, never meets half of one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import ConfigError


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write `data` under a temporary name in the same folder, then rename it to `path`. Makes missing folders."""
    return write_many([(path, data)])[0]


def write_many(files: Iterable[tuple[str | Path, bytes]]) -> list[Path]:
    """`write_whole` for many files at once: all are on the disk before the first gets its name. Waiting for the disk once and
    not once a file makes small files many times quicker. Each is there whole or not at all; a failure may leave some."""
    parts: list[tuple[Path, Path]] = []
    path = Path()
    try:
        for name, data in files:
            path = Path(name)
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            parts.append((part, path))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "xb") as file:  # opened by us and not by mkstemp, so that the umask applies
                file.write(data)
        if len(parts) > 1 and hasattr(os, "sync"):
            os.sync()
        else:
            for part, _ in parts:
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
        for part, path in parts:
            os.replace(part, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written and has room"
        ) from error
    finally:
        for part, _ in parts:
            try:
                part.unlink(missing_ok=True)
            except OSError:  # its folder could not be made (a file stands in its place): then there is no part either
                pass
    return [path for _, path in parts]


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as readable JSON in UTF-8. NaN and infinity are refused, as JSON has neither."""
    return write_whole(path, (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode())
