"""Files are written whole or not at all: a reader, or a run that is killed, never meets half of one."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from .errors import ConfigError


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write `data` under a temporary name in the same folder, then rename it to `path`. Makes missing folders."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:  # opened by us and not by mkstemp, so that the umask applies
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written and has room"
        ) from error
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:  # its folder could not be made (a file stands in its place): then there is no part either
            pass
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as readable JSON in UTF-8. NaN and infinity are refused, as JSON has neither."""
    return write_whole(path, (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode())
