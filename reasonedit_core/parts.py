"""Where the parts of a system lie in a folder of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .detect import Layout, detect
from .errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Parts:
    """The files and folders of one system. tokenizer, scheduler: None where the folder holds none of its own."""

    root: Path
    layout: Layout
    transformer: Path
    mllm: Path
    vae: Path
    tokenizer: Path | None
    scheduler: Path | None


def find_parts(weights: Path, system: str) -> Parts:
    """Find the parts of `system` in a folder in a released layout. CheckpointError names what is missing."""
    weights = Path(weights)
    if not weights.exists():
        raise CheckpointError(
            f"expected a folder of weights at {weights}, found nothing. Fetch them with `reasonedit download {system} --to "
            f'"{weights}"`, or name the folder you have.'
        )
    layout = detect(weights)
    if layout.system and layout.system != system:
        raise CheckpointError(f"{weights}: expected weights of {system}, found {layout.system}. Use --system {layout.system}.")
    found = dict(layout.components) if layout.kind == "pipeline" else {layout.kind: layout.path}
    missing = [name for name in ("transformer", "text_encoder", "vae") if name not in found]
    if missing:
        raise CheckpointError(
            f"{weights}: expected a transformer, a text_encoder and a vae, found {', '.join(found)} and no "
            f"{', '.join(missing)}. Put the missing files into this folder, or finish the download."
        )
    root = weights if weights.is_dir() else weights.parent
    scheduler = found.get("scheduler")
    return Parts(
        root,
        layout,
        found["transformer"],
        found["text_encoder"],
        found["vae"],
        found.get("tokenizer") or _loose_tokenizer(root, layout),
        scheduler if scheduler and (scheduler / "scheduler_config.json").is_file() else None,
    )


def _loose_tokenizer(root: Path, layout: Layout) -> Path | None:
    """A folder with tokenizer files beside single files; released folders keep theirs with the MLLM."""
    if layout.components.get("text_encoder", root).is_dir():
        return None
    places = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    return next((p for p in places if (p / "tokenizer.json").is_file() or (p / "vocab.json").is_file()), None)
