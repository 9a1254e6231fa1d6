"""Where the parts of a system lie: in one folder of weights, or in files and folders that are named one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .detect import Layout, detect
from .errors import CheckpointError
from .flow import FlowSchedule
from .weightfiles import read_json, read_shapes

TIED = 2048
"""Hidden size of the published Qwen2.5-VL whose lm_head is the embedding table (3B)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The files and folders of one system. tokenizer, scheduler: None where the folder holds none of its own.

    root: where `reasonedit.json` and `dialogue.toml` are looked for.
    """

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


def assemble_parts(
    transformer: Path, *, text_encoder: Path | None = None, vae: Path | None = None, tokenizer: Path | None = None
) -> Parts:
    """The parts of a system from paths: `transformer` may be a whole folder, whose parts the others replace.

    A single file names all three, and its settings stand in a folder of its own name beside it.
    """
    transformer = Path(transformer)
    layout = detect(transformer)
    if layout.kind == "pipeline" and layout.system and not (text_encoder and vae):
        whole = find_parts(transformer, layout.system)
        found, root, scheduler, own = (whole.transformer, whole.mllm, whole.vae), whole.root, whole.scheduler, whole.tokenizer
    else:
        found, scheduler, own = (find_transformer(layout), None, None), None, None
        root = transformer if transformer.is_dir() else transformer.with_suffix("")
    mllm, decoder = text_encoder or found[1], vae or found[2]
    for path, kind, what in ((mllm, "text_encoder", "a Qwen2.5-VL text encoder"), (decoder, "vae", "a VAE")):
        if path is None:
            raise CheckpointError(f"{transformer}: expected {what} to go with this file, found none. Choose one.")
        part = detect(path)
        fits = not part.system or not layout.system or part.system == layout.system
        if kind not in (part.kind, *part.components) or not fits:
            of = f" of {part.system}" if part.system else ""
            raise CheckpointError(f"{path}: expected {what} for {layout.system}, found a {part.kind}{of}. Choose another.")
    return Parts(root, layout, found[0], mllm, decoder, tokenizer or (None if text_encoder else own), scheduler)


def find_transformer(layout: Layout) -> Path:
    """The transformer of a layout; CheckpointError where it is another part."""
    if layout.kind == "transformer":
        return layout.path
    if "transformer" in layout.components:
        return layout.components["transformer"]
    raise CheckpointError(
        f"{layout.path}: expected the diffusion transformer of Step1X-Edit or Qwen-Image-Edit, found a {layout.kind}. "
        "Choose another file."
    )


def can_speak(mllm: Path) -> bool:
    """Whether a text encoder holds what reasoning needs: an lm_head of its own, or one tied to the embeddings."""
    mllm = Path(mllm)
    folder = mllm / "text_encoder" if (mllm / "text_encoder" / "config.json").is_file() else mllm
    shapes = read_shapes(folder)
    if any(key.endswith("lm_head.weight") for key in shapes):
        return True
    if (folder / "config.json").is_file():
        raw = read_json(folder / "config.json")
        return bool(raw.get("tie_word_embeddings", (raw.get("text_config") or {}).get("tie_word_embeddings")))
    return any(key.endswith("embed_tokens.weight") and shape[-1] == TIED for key, shape in shapes.items())


def read_schedule(parts: Parts, default: FlowSchedule) -> FlowSchedule:
    """The checkpoint's own schedule, or the default where it states none."""
    if parts.scheduler is None:
        return default
    path = parts.scheduler / "scheduler_config.json"
    try:
        return FlowSchedule.from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected the scheduler's JSON, found: {error}. Download the file again.") from error
