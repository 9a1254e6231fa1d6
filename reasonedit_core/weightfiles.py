"""Reading weights from disk: safetensors files, sharded folders, and clear words about everything else.

Tensors read to the CPU are memory-mapped: a 25 GB file costs address space, not memory, until its tensors are used.
Pickles are refused: unpickling runs code that the file brings along.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
STEMS = ("diffusion_pytorch_model", "model", "adapter_model", "pytorch_lora_weights")
VARIANTS = ("", "bf16", "fp16", "fp32")
PREFIXES = (
    "text_encoders.qwen25_7b.transformer.",
    "qwen25_7b.transformer.",
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "first_stage_model.",
    "transformer.",
    "model.",
    "vae.",
)
"""What hosts put before the keys of a component, longest first."""

_SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors$")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a CheckpointError that names the file and the place of the fault."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected a JSON file, found {error}. Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}.")
    return value


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A CheckpointError raised inside names `path`, if it does not yet: what works on a state does not know its file."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def weight_files(path: str | Path) -> tuple[Path, ...]:
    """The safetensors files `path` stands for: itself, the shards of an index, or the weights of a component folder."""
    path = Path(path)
    if path.is_dir():
        return _files_of_folder(path)
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        hint = f" The folder holds {_listed(beside)}." if beside else ""
        raise CheckpointError(f"{path}: no such file or folder.{hint} Check the path.")
    if path.suffix == ".json":
        return _files_of_index(path)
    _refuse_by_name(path)
    return (path,)


def read_state(path: str | Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, an index of shards, or a component folder, as {key: tensor}.

    On the CPU the tensors are memory-mapped (copy on write). ComfyUI's `_quantization_metadata` of a file header becomes
    one `<layer>.comfy_quant` tensor per layer, the other form of the same fact, so that the dictionary says everything.
    """
    from safetensors import SafetensorError, safe_open

    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        metadata = _header(file)[1]  # checks the file first, with better words than the library has
        try:
            with safe_open(str(file), framework="pt", device=str(device)) as handle:
                state.update((key, handle.get_tensor(key)) for key in handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: expected a readable safetensors file, found: {error}. Download the file again."
            ) from error
        _add_quantisation_notes(state, metadata, file)
    return state


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        shapes.update((key, tuple(entry["shape"])) for key, entry in _header(file)[0].items())
    return shapes


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free-text metadata in the headers of the safetensors file or files."""
    merged: dict[str, str] = {}
    for file in weight_files(path):
        merged.update(_header(file)[1])
    return merged


def find_prefix(keys: Sequence[str] | Mapping[str, Any], marker: str, prefixes: Sequence[str] = PREFIXES) -> str | None:
    """The prefix under which `marker` (a key every state of this kind has) is found: "", one of `prefixes`, or None."""
    names = keys if isinstance(keys, (Mapping, set, frozenset)) else set(keys)
    return next((prefix for prefix in ("", *prefixes) if prefix + marker in names), None)


def strip_prefix(state: Mapping[str, torch.Tensor], marker: str, prefixes: Sequence[str] = PREFIXES) -> dict[str, torch.Tensor]:
    """The component that holds the key `marker`, without the prefix some host put before its keys.

    Keys that lie outside the prefix (the VAE or the text encoder of an all-in-one file) are left out. Without a prefix, or
    when `marker` is not found at all, the state is returned as it is.
    """
    prefix = find_prefix(state, marker, prefixes)
    if not prefix:
        return dict(state)
    kept = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    logger.debug("stripped prefix %r from %d of %d keys", prefix, len(kept), len(state))
    return kept


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    for stem in STEMS:
        for variant in VARIANTS:
            infix = f".{variant}" if variant else ""
            single = folder / f"{stem}{infix}.safetensors"
            if single.is_file():
                return (single,)
            # Both spellings of the index of a variant are in use.
            for index in (f"{stem}{infix}.safetensors.index.json", f"{stem}.safetensors.index{infix}.json"):
                if (folder / index).is_file():
                    return _files_of_index(folder / index)
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    shards = [match for name in weights if (match := _SHARD.match(name))]
    if shards and len(shards) == len(weights):
        return _files_of_shards(folder, shards)
    if len(weights) == 1:
        return (folder / weights[0],)
    if weights:
        raise CheckpointError(
            f"{folder}: expected one checkpoint, found {len(weights)} files: {_listed(weights)}. Name the file to load."
        )
    for name in names:
        _refuse_by_name(folder / name)
    inside = names + sorted(f"{p.name}/" for p in folder.iterdir() if p.is_dir())
    raise CheckpointError(
        f"{folder}: expected {STEMS[0]}*.safetensors or {STEMS[1]}*.safetensors (single, or shards with their index), "
        f"found {_listed(inside) or 'an empty folder'}. Download the weights into this folder or name another one."
    )


def _files_of_shards(folder: Path, shards: Sequence[re.Match[str]]) -> tuple[Path, ...]:
    stem, count = shards[0]["stem"], int(shards[0]["count"])
    expected = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    _require_shards(folder, expected, f"{count} shards (by their own names; there is no index)")
    return tuple(folder / name for name in expected)


def _files_of_index(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an index with a `weight_map`, found none. Name the weights themselves.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:  # an index must not lead out of its folder
            raise CheckpointError(f"{index}: expected shard names without a folder, found {name!r}.")
        _refuse_by_name(index.parent / name)
    _require_shards(index.parent, names, f"{len(names)} shards listed in {index.name}")
    by_file: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        by_file.setdefault(name, []).append(key)
    for name in names:
        held = _header(index.parent / name)[0]
        absent = [key for key in by_file[name] if key not in held]
        if absent:
            raise CheckpointError(
                f"{index.parent / name}: expected the key {absent[0]} that {index.name} places here "
                f"({len(absent)} such keys), found it not. The shard and the index are of different downloads."
            )
    return tuple(index.parent / name for name in names)


def _require_shards(folder: Path, names: Sequence[str], source: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: expected {source}, found {len(names) - len(missing)}; missing: {_listed(missing)}. Resume the download."
        )


def _refuse_by_name(path: Path) -> None:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        _refuse_pickle(path)
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{path}: expected a safetensors file, found GGUF. Inside ComfyUI load it with the ComfyUI-GGUF nodes and "
            "connect the MODEL; elsewhere use the bf16 or fp8 safetensors file of the same model."
        )


def _refuse_pickle(path: Path) -> None:
    raise CheckpointError(
        f"{path}: expected a safetensors file, found a pickle. Unpickling runs code from the file, so it is refused. "
        "Download the .safetensors version, or convert it yourself where you trust its source: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
    )


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(entries, metadata) of one safetensors file, after checking that the file is whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(512)
            _refuse_by_content(path, start, size)
            length = struct.unpack("<Q", start[:8])[0]
            if length > size - 8 or start[8:9] != b"{":
                raise CheckpointError(
                    f"{path}: expected a safetensors header, found {size:,} bytes that do not hold one: the file is "
                    "truncated or of another format. Download it again."
                )
            handle.seek(8)
            entries = json.loads(handle.read(length))
        metadata = entries.pop("__metadata__", {})
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors header, found one that cannot be parsed ({error}): the file is corrupt. "
            "Download it again."
        ) from error
    if end != size:
        raise CheckpointError(
            f"{path}: the header promises {end:,} bytes, found {size:,}: the file is "
            f"{'truncated' if size < end else 'corrupt'}. Download it again."
        )
    return entries, metadata


def _refuse_by_content(path: Path, start: bytes, size: int) -> None:
    if size < 10:
        raise CheckpointError(f"{path}: expected a safetensors file, found {size} bytes. Download it again.")
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: expected weights, found a git-lfs pointer of {size} bytes. Run `git lfs pull` in that clone, or "
            "download the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path}: expected weights, found a web page (HTML): the download link led to a page, perhaps one that asks "
            "to log in or to accept a licence. Download the file itself."
        )
    if text.startswith(b'{"') or text.startswith(b"{ "):
        raise CheckpointError(f"{path}: expected weights, found JSON text. Download the weights themselves.")
    if start[:2] == b"PK" or (start[0] == 0x80 and start[1] <= 5):  # torch.save: a zip archive, or a bare pickle
        _refuse_pickle(path)
    if start[:4] == b"GGUF":
        _refuse_by_name(path.with_suffix(".gguf"))


def _add_quantisation_notes(state: dict[str, torch.Tensor], metadata: Mapping[str, str], file: Path) -> None:
    raw = metadata.get("_quantization_metadata")
    if not raw:
        return
    import torch

    try:
        layers = json.loads(raw)["layers"]
        notes = {layer: json.dumps(entry) for layer, entry in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: expected `_quantization_metadata` to be JSON with `layers`, found {raw[:80]!r} ({error})."
        ) from error
    for layer, note in notes.items():
        if f"{layer}.weight" in state:
            state.setdefault(f"{layer}.comfy_quant", torch.tensor(list(note.encode()), dtype=torch.uint8))


def _listed(names: Sequence[str], limit: int = 10) -> str:
    """Up to `limit` names, then how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
