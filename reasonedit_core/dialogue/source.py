"""Where the released prompts stand: finds the few source files in a checkout, an installed copy, or behind a URL."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

# Paths inside the released repositories, most telling first (reasonedit_s.md b4): the fork of diffusers with the v1.2
# pipeline, a copy of diffusers as it is installed, and the original repository of v1.0.
_FOLDERS = ("src/diffusers/pipelines/step1x_edit", "diffusers/pipelines/step1x_edit", "pipelines/step1x_edit", "")
_PIPELINES = ("pipeline_step1x_edit_thinker.py", "pipeline_step1x_edit_v1p2.py", "pipeline_step1x_edit.py")
_ORIGINAL = "modules/conditioner.py"

_MAX_BYTES = 4 << 20
_MAX_FOLDERS = 20_000
_SKIPPED = {".git", "node_modules", "__pycache__"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the released code. name: as shown to the user and kept in the pack (no folder of the user's machine)."""

    name: str
    text: str


def read_source(source: str | Path, *, timeout: float = 30.0) -> list[SourceFile]:
    """The files with prompts in SOURCE: a checkout's root, any folder or file in it, or the URL of raw files.

    Raises ConfigError when there is none.
    """
    text = str(source)
    found = list(_from_url(text, timeout) if re.match(r"https?://", text) else _from_disk(Path(text)))
    if not found:
        looked = ", ".join((*_PIPELINES, _ORIGINAL))
        raise ConfigError(
            f"{text}: expected the released Step1X-Edit code (one of {looked}), found none of these files there. Give the "
            "root of a checkout, a folder or file in it, or the URL of its raw files."
        )
    return found


# ---- on disk -------------------------------------------------------------------------------------------------------------


def _from_disk(path: Path) -> Iterator[SourceFile]:
    if not path.exists():
        raise ConfigError(f"{path}: expected a folder, a file or an http(s) URL, found nothing there. Check the path.")
    path = path.resolve()
    paths = [path] if path.is_file() and path.suffix == ".py" else []
    start = path.parent if path.is_file() else path
    paths += _known_files(start) or _below(start) or _above(start)
    for each in dict.fromkeys(paths):
        yield SourceFile(_shown_name(each), _decoded(_bytes_of(each), str(each)))


def _known_files(folder: Path) -> list[Path]:
    found = []
    for name in _PIPELINES:
        found += [folder / parent / name for parent in _FOLDERS if (folder / parent / name).is_file()][:1]
    # The original's file has a common name, so its folder must fit as well.
    original = folder.parent / _ORIGINAL if folder.name == "modules" else folder / _ORIGINAL
    return [*found, original] if original.is_file() else found


def _below(folder: Path) -> list[Path]:
    """The first folder underneath that holds one of the files (an environment's site-packages, a folder of checkouts)."""
    for count, (here, folders, names) in enumerate(os.walk(folder)):
        if count >= _MAX_FOLDERS:
            break
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        if set(_PIPELINES) & set(names) or here.endswith("modules") and "conditioner.py" in names:
            if found := _known_files(Path(here)):
                return found
    return []


def _above(folder: Path) -> list[Path]:
    for parent in folder.parents:
        if found := _known_files(parent):
            return found
    return []


def _shown_name(path: Path) -> str:
    for parent in _FOLDERS[:-1]:
        if path.as_posix().endswith(f"{parent}/{path.name}"):
            return f"{parent}/{path.name}"
    return f"modules/{path.name}" if path.parent.name == "modules" else path.name


def _bytes_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: expected a source file of at most {_MAX_BYTES} bytes, found a larger one.")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, found: {error}.") from error


# ---- behind a URL --------------------------------------------------------------------------------------------------------


def _from_url(url: str, timeout: float) -> Iterator[SourceFile]:
    base = raw_url(url).rstrip("/")
    files: dict[str, str] = {}
    if base.endswith(".py"):
        if (text := _fetched(base, timeout)) is None:
            raise ConfigError(f"{url}: expected a source file, found none (404). Check the address.")
        files[base] = text
        base = base.rpartition("/")[0]
    for root in _roots(base):
        for name in (*(f"{_FOLDERS[0]}/{name}" for name in _PIPELINES), _ORIGINAL, *_PIPELINES):
            address = f"{root}/{name}"
            if address not in files and (text := _fetched(address, timeout)) is not None:
                files[address] = text
        if any(address.startswith(root) for address in files):
            break
    for address, text in files.items():
        yield SourceFile(address, text)


def raw_url(url: str) -> str:
    """The address of the raw files for the address of a page on GitHub; other addresses as they are."""
    match = re.fullmatch(r"https://github\.com/([^/]+)/([^/?#]+?)(?:\.git)?/?(?:(?:tree|blob)/([^?#]+))?", url)
    return f"https://raw.githubusercontent.com/{match[1]}/{match[2]}/{match[3] or 'HEAD'}" if match else url


def _roots(base: str) -> list[str]:
    """Addresses that may be the root of the checkout: the given one, then those above it that a known folder implies."""
    roots = [base]
    for folder in (*_FOLDERS[:-1], "modules"):
        if base.endswith("/" + folder):
            roots.insert(0, base[: -len(folder) - 1])
            break
    return roots


def _fetched(address: str, timeout: float) -> str | None:
    """The text behind an address; None when the server says there is none."""
    try:
        with urllib.request.urlopen(address, timeout=timeout) as response:
            data = response.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (404, 410):
                return None
        raise ConfigError(f"{address}: expected a source file, found HTTP {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConfigError(
            f"{address}: expected an answer within {timeout:g} s, found: {error}. Check the address and the network, "
            "or give a folder with a copy of the code."
        ) from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{address}: expected a source file of at most {_MAX_BYTES} bytes, found a larger one.")
    return _decoded(data, address)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: expected Python source in UTF-8, found other bytes ({error}).") from error
