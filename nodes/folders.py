"""What lies in ComfyUI's model folders: the entries of the loaders' lists, and the paths behind them.

An entry is `key/relative name`: the key of the folder as ComfyUI knows it, and the place below it. The miniatures that the
package carries are entries of their own, by their names alone, and always there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.mini.models import MINIS, mini_folder
from . import host

FROM_CHECKPOINT = "from checkpoint"
REMOTE, SCRIPTED = "remote endpoint", "scripted replies"
NO_LORA = "(none found: put one into models/loras, then press R)"
AUTO = "auto"
BRAIN_FILE = "brain.safetensors"
"""By which a ReasonBrain is known."""

OWN_PACKS = {"english": "en", "chinese": "zh"}
SUFFIXES = (".safetensors", ".json", ".toml", ".txt")


def editor_names() -> list[str]:
    """Checkpoint folders below models/reasonedit and models/diffusers, single transformer files, then the miniatures."""
    folders = [name for key in ("reasonedit", "diffusers") for name, path in _folders(key) if _is_editor(path, key)]
    return [*folders, *_files("diffusion_models"), *MINIS]


def brain_names() -> list[str]:
    """Folders of a ReasonBrain below models/reasonedit."""
    return [name for name, path in _folders(host.MODELS) if (path / BRAIN_FILE).is_file()]


def sam_names() -> list[str]:
    """SAM and SAM 2 folders in transformers' layout."""
    found = [(name, path) for key in (host.MODELS, "sams", "sam2") for name, path in _folders(key)]
    return [name for name, path in found if _sam_of(path)]


def sam_kind(name: str) -> str:
    """sam or sam2: what an entry of `sam_names` is. ConfigError where it is neither."""
    kind = _sam_of(locate(name))
    if not kind:
        raise ConfigError(f"{name}: expected SAM or SAM 2 in transformers' layout, found neither. Choose another.")
    return kind


def text_encoder_names() -> list[str]:
    """Single text encoder files and Qwen2.5-VL folders."""
    return [*_mllm_folders(), *_files("text_encoders")]


def vae_names() -> list[str]:
    """Single VAE files."""
    return _files("vae")


def lora_names() -> list[str]:
    """LoRA files; of a peft folder its adapter_model.safetensors, beside which its configuration is found."""
    return [name for name in _files("loras") if not name.endswith("/whole.safetensors")]


def reasoner_names() -> list[str]:
    """What can reason: Qwen2.5-VL folders, pipelines with a text encoder, single text encoder files, the miniatures, and the
    two that need no weights."""
    pipelines = [
        name
        for key in ("reasonedit", "diffusers")
        for name, path in _folders(key)
        if (path / "text_encoder").is_dir() and not (path / BRAIN_FILE).is_file()
    ]
    return [*_mllm_folders(), *pipelines, *_files("text_encoders"), *MINIS, REMOTE, SCRIPTED]


def dialogue_names() -> list[str]:
    """auto, our own packs, and the files of models/reasonedit/dialogue."""
    places = [place / "dialogue" for place in host.places(host.MODELS)]
    found = [f"dialogue/{path.name}" for place in places for path in sorted(place.glob("*.toml"))]
    return [AUTO, *OWN_PACKS, *dict.fromkeys(found)]


def locate(name: str) -> Path:
    """The path behind an entry of a list: `key/relative name`, or a miniature. ReasonEditError where it is gone."""
    if name in MINIS:
        return mini_folder(name)
    key, _, rest = name.partition("/")
    for place in host.places(key):
        path = place / rest
        if rest and ".." not in Path(rest).parts and not Path(rest).is_absolute() and path.exists():
            return path
    raise ConfigError(f"expected {rest or name!r} below models/{key}, found nothing. Refresh the list (R) and choose again.")


def short_name(name: str) -> str:
    """An entry without its key."""
    return name.partition("/")[2] or name


def locate_dialogue(name: str) -> str | Path | None:
    """The pack behind an entry of `dialogue_names`; None lets the core choose."""
    if name == AUTO:
        return None
    return OWN_PACKS[name] if name in OWN_PACKS else locate(f"{host.MODELS}/{name}")


def fingerprint(paths: Sequence[Path]) -> str:
    """Path, size and time of every file of weights and settings: equal as long as nothing was replaced."""
    found = []
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        for file in files:
            stat = file.stat()
            found.append(f"{file}|{stat.st_size}|{stat.st_mtime_ns}")
    return "\n".join(found)


def _files(key: str) -> list[str]:
    return [f"{key}/{name}" for name in host.files(key) if name.endswith(".safetensors")]


def _folders(key: str) -> Iterator[tuple[str, Path]]:
    """(entry, path) of the folders one and two levels below a key's places that hold weights."""
    seen = set()
    for place in host.places(key):
        for pattern in ("*", "*/*"):
            for path in sorted(place.glob(pattern)) if place.is_dir() else ():
                name = f"{key}/{path.relative_to(place).as_posix()}"
                if path.is_dir() and not path.name.startswith(".") and name not in seen:
                    seen.add(name)
                    yield name, path


def _is_editor(path: Path, key: str) -> bool:
    """A pipeline that the core runs, or, right in the pack's own folder, a folder of single files."""
    from ..reasonedit_core.detect import PIPELINES

    if (path / BRAIN_FILE).is_file():
        return False
    if (path / "model_index.json").is_file():
        return _json(path / "model_index.json").get("_class_name") in PIPELINES
    if key != host.MODELS or path.parent not in host.places(key) or (path / "config.json").is_file():
        return False
    return any(next(path.glob(f"{depth}*.safetensors"), None) for depth in ("", "*/", "*/*/"))


def _mllm_folders() -> list[str]:
    found = [(name, path) for key in ("LLM", "text_encoders", host.MODELS) for name, path in _folders(key)]
    return [
        name
        for name, path in found
        if not (path.parent / "model_index.json").is_file() and _json(path / "config.json").get("model_type") == "qwen2_5_vl"
    ]


def _sam_of(path: Path) -> str:
    """sam or sam2, or "" for another folder. Published SAM 2 folders state the type of its video model."""
    kind = str(_json(path / "config.json").get("model_type", ""))
    return {"sam": "sam", "sam2": "sam2", "sam2_video": "sam2"}.get(kind, "")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} for what is no such file, which then simply is not listed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def tokenizer_for(path: Path) -> Path | None:
    """The tokenizer of a single text encoder file: in a folder of its name, beside it, or the one that ComfyUI carries."""
    if path.is_dir():
        return None
    for place in (path.with_suffix(""), path.parent):
        if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
            return place
    return host.tokenizer_folder()
