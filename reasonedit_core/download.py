"""`reasonedit download SYSTEM --to DIR`: the weights from the Hugging Face hub, and the dialogue pack they were trained with.

A download that was cut goes on at the byte where it stopped, also in a later process. `snapshot_download` does that no more
(from huggingface_hub 2 on it drops the unfinished parts, up to 10 GB each here), so files are fetched one by one with the
library's own `http_get` into parts under DIR/.cache/reasonedit, checked, and then moved to their place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from .errors import BackendUnavailable, CheckpointError, ConfigError, ReasonEditError
from .files import write_whole

log = logging.getLogger(__name__)

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "LICENSE*", "README.md")
"""What is fetched: weights as safetensors, configurations, tokenizer files. Pickles never are."""

SPARE = 1 << 28
"""Bytes that stay free on the disk beyond the download itself."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a system's files are published. dialogue: the variant whose released wording belongs to these weights."""

    repo: str
    dialogue: str | None = None


ORIGINS = {
    "reasonedit-s": Origin("stepfun-ai/Step1X-Edit-v1p2", "step1x-v1p2"),
    "reasonedit-q": Origin("Qwen/Qwen-Image-Edit-2509"),
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of a repository. sha256: of its contents, where the hub states it (large files)."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What now lies in `folder`. pack_problem: why there is no dialogue pack although the system wants one, else empty."""

    folder: Path
    repo: str
    revision: str
    files: int
    nbytes: int
    pack: Path | None = None
    pack_problem: str = ""


def download(
    system: str,
    folder: Path,
    *,
    repo: str | None = None,
    revision: str = "main",
    dialogue_from: str | None = None,
    quiet: bool = False,
) -> Downloaded:
    """Fetch weights and dialogue pack into `folder`. A failure of the pack alone is reported in the result, not raised."""
    if system not in ORIGINS:
        raise ConfigError(f"download: expected one of the systems {', '.join(ORIGINS)}, found {system!r}")
    origin = ORIGINS[system]
    repo = repo or origin.repo
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--to: expected a folder, found the file {folder}")
    commit, files = list_files(repo, revision)
    _check_space(folder, files)
    _fetch(repo, commit, folder, files, quiet)
    done = Downloaded(folder, repo, commit, len(files), sum(file.size for file in files))
    if dialogue_from is None and origin.dialogue is None:
        return done
    pack, problem = _import_pack(dialogue_from, origin.dialogue, folder / "dialogue.toml")
    return replace(done, pack=pack, pack_problem=problem)


def list_files(repo: str, revision: str) -> tuple[str, list[File]]:
    """The commit that `revision` stands for, and the files to fetch."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except GatedRepoError as error:
        raise ConfigError(
            f"{repo}: expected a public repository, found one that asks for consent; accept its terms on its page, "
            "log in with `hf auth login` and try again"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{repo}: expected a branch, tag or commit, found no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"expected a repository on the hub, found none called {repo!r} (or it is private)") from error
    except Exception as error:  # requests, httpx or httpx2, as the version of huggingface_hub has it
        raise _unreachable(repo, error) from error
    files = [
        File(entry.rfilename, int(entry.size or 0), entry.lfs.sha256 if entry.lfs else None)
        for entry in info.siblings or ()
        if wanted(entry.rfilename)
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise CheckpointError(f"{repo}@{revision}: expected weights as *.safetensors, found none of {len(files)} files")
    return str(info.sha), files


def wanted(name: str) -> bool:
    """Whether a file of the repository is fetched. A name that leads out of the folder never is."""
    return any(fnmatch(name, pattern) for pattern in PATTERNS) and not (set(name.split("/")) & {"", "..", "."})


def _fetch(repo: str, commit: str, folder: Path, files: list[File], quiet: bool) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        for file in files:
            if _size(folder / file.name) != file.size:
                _fetch_file(repo, commit, folder, file)
    except OSError as error:
        raise ConfigError(f"--to {folder}: expected a folder that can be written, found: {error}") from error
    finally:
        if quiet and shown:
            enable_progress_bars()


def _fetch_file(repo: str, commit: str, folder: Path, file: File) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part, target = _part(folder, file), folder / file.name
    for path in (part, target):
        path.parent.mkdir(parents=True, exist_ok=True)
    present = _size(part) or 0
    with open(part, "ab" if present <= file.size else "wb") as sink:
        url = hf_hub_url(repo, file.name, revision=commit)
        try:
            if sink.tell() < file.size:
                http_get(
                    url,
                    sink,
                    resume_size=sink.tell(),
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
        except Exception as error:  # requests, httpx or httpx2 again, or a size that does not fit
            if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
                raise
            raise _unreachable(repo, error) from error
    if _size(part) != file.size or (file.sha256 and _sha256(part) != file.sha256):
        part.unlink()
        raise CheckpointError(
            f"{repo}: expected {file.name} with {file.size} bytes as published, found other contents; run the same command "
            "again, this file starts anew"
        )
    os.replace(part, target)


def _part(folder: Path, file: File) -> Path:
    """Where an unfinished file is kept. Its name follows the contents, so that another version never goes on with it."""
    digest = hashlib.sha256(f"{file.name}:{file.size}:{file.sha256}".encode()).hexdigest()
    return folder / ".cache" / "reasonedit" / f"{digest[:24]}.part"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreachable(repo: str, error: Exception) -> ReasonEditError:
    why = str(error).strip().splitlines()
    return BackendUnavailable(
        f"{repo}: expected an answer of the Hugging Face hub, found {type(error).__name__}"
        f"{': ' + why[0] if why else ''}; run the same command again, it goes on where it stopped "
        "(HF_ENDPOINT names another hub, HF_HUB_OFFLINE must not be set)"
    )


def _check_space(folder: Path, files: list[File]) -> None:
    needed = 0
    for file in files:
        if _size(folder / file.name) != file.size:
            needed += max(0, file.size - (_size(_part(folder, file)) or 0))
    standing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(standing).free
    if needed and free < needed + SPARE:
        raise ConfigError(
            f"--to {folder}: expected {_gb(needed + SPARE)} of free space, found {_gb(free)}; "
            "free some or choose a folder on another disk"
        )


def _import_pack(source: str | None, variant: str | None, target: Path) -> tuple[Path | None, str]:
    from .dialogue.importer import RELEASED_URLS, import_released

    try:
        result = import_released(source or RELEASED_URLS[variant])
        for missing in result.missing:
            log.warning("dialogue pack: not found in the released source: %s", missing)
        return write_whole(target, result.text.encode()), ""
    except ReasonEditError as error:
        return None, str(error)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
