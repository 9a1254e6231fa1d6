"""Checkpoints that a run goes on from to the bit, and that survive being killed at any moment.

    RUN/checkpoints/step-00000500/   weights-*.safetensors  ema-*.safetensors  optimizer-*.safetensors  optimizer.json
                                     state.json (position, identity, versions)  ranks.json (generators of every rank)
                                     manifest.json (sha256 and size of every file)
    RUN/checkpoints/latest           the name of the folder to go on from

A folder is written as tmp-..., every file whole and synced, the manifest last, and renamed when all is there; then `latest`
is replaced. Whatever begins with tmp- is half written and never read. Tensors are whole whatever number of ranks held them,
so a checkpoint is read by any number; trained weights only, by unit and name (mllm.model.layers.0...). No pickle anywhere.
Saved on optimizer boundaries only, so there is no micro-step to keep; schedules are functions of the step (optim.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..reasonedit_core.errors import CheckpointError, ReasonEditError
from ..reasonedit_core.files import write_json, write_whole
from . import rng
from .distributed import Ranks
from .optimizer_state import placed_like, read_optimizer, tensors_of, values_of, whole
from .types import Models

log = logging.getLogger(__name__)

FORMAT = "reasonedit.checkpoint/1"
FILE_BYTES = 2 << 30
"""Tensors are gathered and written in files of about this size: what a save needs in main memory, twice."""

FOLDER = re.compile(r"step-(\d{8,})")
HALF = "tmp-"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: optimizer steps done, and the epoch and cursor of the next one."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0


@dataclass(frozen=True, eq=False)
class Contents:
    """What a checkpoint holds beside its position. parameters, average: by name, DTensors under FSDP2. identity: what must
    be the same when a run goes on, by key. extra: further values as JSON (loss scaling). given: names of optimizer options
    that come from the settings."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Mapping[str, Tensor] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()


def save(run_dir: str | Path, position: Position, contents: Contents, ranks: Ranks, *, keep: int = 2, every: int = 0) -> Path:
    """Write the checkpoint of `position`, then delete old ones: the last `keep` stay, and every one of a step that is a
    multiple of `every`. Every rank must call it; rank 0 writes.

    Raises CheckpointError on every rank when anything could not be written; what was there before is then still there.
    """
    root = Path(run_dir) / "checkpoints"
    final = root / f"step-{position.step:08d}"
    half = root / f"{HALF}{final.name}-{secrets.token_hex(4)}"
    writer = _Writer(half if ranks.main else None)
    generators = ranks.agree(rng.capture())
    writer.tensors("weights", contents.parameters.items())
    writer.tensors("ema", contents.average.items())
    writer.tensors("optimizer", tensors_of(contents.optimizer, contents.parameters))
    writer.json("optimizer.json", values_of(contents.optimizer, contents.parameters))
    writer.json("ranks.json", generators)
    writer.json("state.json", _state(position, contents, ranks))
    writer.attempt(lambda: _finish(writer, final))
    failures = ranks.agree(writer.failure)
    if failures[0]:
        raise CheckpointError(_advice(failures[0], root))
    if ranks.main:
        rotate(root, position.step, keep, every)
    return final


def find(run_dir: str | Path, which: str | int | Path = "latest") -> Path:
    """The folder of a checkpoint of run_dir: `latest`, a folder's name, a step, or a path. Half-written ones are no candidates.

    Raises CheckpointError with the ones that are there.
    """
    root = Path(run_dir) / "checkpoints"
    there = complete(root)
    if str(which) == "latest":
        pointer = root / "latest"
        name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
        chosen = [folder for folder in there if folder.name == name] or there[-1:]
    else:
        names = {str(which), f"step-{int(which):08d}" if str(which).isdigit() else ""}
        chosen = [folder for folder in there if folder.name in names]
        if not chosen and (Path(str(which)) / "manifest.json").is_file():
            chosen = [Path(str(which))]
    if not chosen:
        raise CheckpointError(
            f"expected a complete checkpoint {which} in {root}, found {_listing(there)}; name one of them, or start anew in "
            "another folder."
        )
    return chosen[0]


def complete(root: Path) -> list[Path]:
    """Checkpoints under `root` that were written to the end, oldest step first."""
    if not root.is_dir():
        return []
    folders = [one for one in root.iterdir() if FOLDER.fullmatch(one.name) and (one / "manifest.json").is_file()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def verify(folder: str | Path) -> None:
    """Compare every file of a checkpoint with its sha256. Raises CheckpointError naming the first that differs."""
    folder = Path(folder)
    for name, entry in _read_json(folder / "manifest.json")["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} is not what was written: expected {entry['bytes']} bytes with sha256 {entry['sha256'][:12]}, found "
                f"{'no file' if size is None else f'{size} bytes'}; resume from another checkpoint: "
                f"{_listing([one for one in complete(folder.parent) if one != folder])}."
            )


def load(
    folder: str | Path, contents: Contents, ranks: Ranks, accept: Callable[[dict[str, Any]], Position]
) -> tuple[Position, Any]:
    """Fill `contents` from a checkpoint and put back the generators; returns the position to go on from, and `extra`.

    accept: given state.json, returns the position or raises (what may differ is the caller's rule). Nothing is changed before
    everything has been verified. Every rank must call it. Raises CheckpointError, on every rank.
    """
    folder = Path(folder)
    problem = None
    if ranks.main:
        try:
            verify(folder)
        except ReasonEditError as error:
            problem = str(error)
    problem = ranks.agree(problem)[0]
    if problem:
        raise CheckpointError(problem)
    state = _read_json(folder / "state.json")
    if state.get("format") != FORMAT:
        found = state.get("format")
        raise CheckpointError(f"{folder}: expected format {FORMAT}, found {found}; use the version that wrote it.")
    position = accept(state)
    copy_tensors(folder, "weights", contents.parameters)
    copy_tensors(folder, "ema", contents.average)
    values = _read_json(folder / "optimizer.json")
    read_optimizer(contents.optimizer, contents.parameters, values, stored(folder, "optimizer"), contents.given)
    generators = _read_json(folder / "ranks.json")
    if ranks.rank < len(generators):
        rng.restore(generators[ranks.rank])
    return position, state["extra"]


def stored(folder: str | Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `weights`, `ema` or `optimizer`, on the CPU, one at a time."""
    from safetensors import safe_open

    for path in sorted(Path(folder).glob(f"{stem}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


@torch.no_grad()
def copy_tensors(folder: str | Path, stem: str, into: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into those of the same names (a DTensor takes its part). The names and shapes must be the same.

    Raises CheckpointError with the names that differ, before anything is copied.
    """
    found = stored_shapes(folder, stem)
    expected = {name: tuple(tensor.shape) for name, tensor in into.items()}
    wrong = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if wrong:
        pairs = [f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}" for name in wrong[:5]]
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors of {stem} do not fit what is trained ({'; '.join(pairs)}); resume with the "
            "trainable set that the checkpoint was written with, or start a new run from it."
        )
    for name, tensor in stored(folder, stem):
        into[name].copy_(placed_like(tensor, into[name]))


def stored_shapes(folder: str | Path, stem: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stored tensors; reads headers only."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(Path(folder).glob(f"{stem}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def apply_weights(folder: str | Path, models: Models, *, average: bool = False) -> list[str]:
    """Copy a checkpoint's trained weights (or their moving averages, where there are) into models; returns their names.

    For stages that start from another one, for validation and export. Raises CheckpointError for names that models lack.
    """
    folder = Path(folder)
    there = {f"{unit}.{name}": one for unit, module in models.units().items() for name, one in module.named_parameters()}
    names = list(stored_shapes(folder, "weights"))
    copy_tensors(folder, "weights", {name: there[name] for name in names if name in there})
    if average:
        copy_tensors(folder, "ema", {name: there[name] for name in stored_shapes(folder, "ema")})
    return names


def rotate(root: Path, step: int, keep: int, every: int = 0) -> None:
    """Delete old checkpoints of steps up to `step`, see `save`, and what is half written. Later steps (of a run that was
    taken up again from an earlier one) are left alone."""
    old = [one for one in complete(root) if int(one.name.removeprefix("step-")) <= step]
    doomed = [one for one in old[: -max(1, keep)] if not every or int(one.name.removeprefix("step-")) % every]
    for folder in doomed:  # renamed first: a run killed while deleting must not leave a folder that looks complete
        try:
            folder.rename(folder.with_name(f"{HALF}old-{folder.name}-{secrets.token_hex(4)}"))
        except OSError as error:
            log.warning("the old checkpoint %s could not be deleted: %s", folder, error)
    for half in root.glob(f"{HALF}*"):
        shutil.rmtree(half, ignore_errors=True)


class _Writer:
    """Writes the files of one checkpoint on rank 0, and takes part in the gathering on the others.

    After a failure nothing more is written, but gathering goes on to the end, as the other ranks wait for it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.failure: str | None = None
        self.files: dict[str, dict[str, Any]] = {}

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something that may fail, unless something has or this is not rank 0."""
        if self.folder is None or self.failure:
            return
        try:
            action()
        except (OSError, ReasonEditError, ValueError) as error:
            self.failure = str(error) or type(error).__name__
            shutil.rmtree(self.folder, ignore_errors=True)

    def file(self, name: str, data: bytes) -> None:
        """One file, with its hash for the manifest."""

        def write() -> None:
            write_whole(self.folder / name, data)
            self.files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

        self.attempt(write)

    def json(self, name: str, value: Any) -> None:
        """A value as JSON. NaN is allowed: an optimizer may keep one."""
        self.attempt(lambda: self.file(name, json.dumps(value, indent=1).encode()))

    def tensors(self, stem: str, tensors: Any) -> None:
        """Named tensors in files of about FILE_BYTES, gathered whole one by one."""
        from safetensors.torch import save as to_bytes

        batch: dict[str, Tensor] = {}
        count = 0

        def flush() -> None:
            nonlocal count
            if batch:
                self.attempt(lambda: self.file(f"{stem}-{count:05d}.safetensors", to_bytes(dict(batch))))
                batch.clear()
                count += 1

        for name, tensor in tensors:
            tensor = whole(tensor.detach())
            if self.folder is None:
                continue
            size = sum(one.nbytes for one in batch.values())
            if size and size + tensor.nbytes > FILE_BYTES:
                flush()
            batch[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        flush()


def _finish(writer: _Writer, final: Path) -> None:
    """Manifest, sync, rename, pointer: in this order."""
    half = writer.folder
    write_json(half / "manifest.json", {"format": FORMAT, "files": writer.files})
    _sync(half)
    if final.exists():  # written by a run that was taken up again from an earlier step
        final.rename(final.with_name(f"{HALF}old-{final.name}-{secrets.token_hex(4)}"))
    half.rename(final)
    _sync(final.parent)
    write_whole(final.parent / "latest", f"{final.name}\n".encode())


def versions() -> dict[str, str]:
    """What bits depend on beside the run itself: versions of packages, and torch's CPU threads (they split sums)."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"threads": str(torch.get_num_threads())}
    for name in ("torch", "transformers", "diffusers", "peft", "accelerate", "bitsandbytes", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _state(position: Position, contents: Contents, ranks: Ranks) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "position": {**asdict(position), "micro_step": 0},
        "world": ranks.world,
        "identity": dict(contents.identity),
        "extra": dict(contents.extra),
        "versions": versions(),
    }


def _advice(failure: str, root: Path) -> str:
    try:
        free = f"{shutil.disk_usage(root if root.exists() else root.parent).free / 2**30:.1f} GiB are free there"
    except OSError:
        free = "how much is free there cannot be told"
    return (
        f"the checkpoint was not saved: {failure} ({free}). Nothing that was saved before is lost: {_listing(complete(root))}. "
        "Make room (a smaller `keep` leaves fewer checkpoints; one more than `keep` must fit), then resume."
    )


def _listing(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders) or "no complete checkpoint"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); resume from another checkpoint.") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk; Windows has no such call and keeps its own order."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
