"""The model card of mini-brain, written from what its making has left."""

from __future__ import annotations

import json
from pathlib import Path

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_whole
from ...reasonedit_core.weightfiles import read_shapes
from ..log import LOG, read_log
from .books import BOOK_FILE
from .brain_chain import BOOK
from .brain_rows import PLACE, ROWS
from .card import CARD, TABLES, grid

NOTES = "notes.md"
TABLE_NAMES = ("components", "components_switched", "enhancers")
_SYSTEM = "mini-brain"
_PARTS = {
    "llava": "LLaVA",
    "unet": "UNet",
    "text_encoder": "text encoder",
    "vae": "VAE",
    "brain.safetensors": "trained, full model",
    "lora": "LoRA and [IMG] rows, full model",
}

_HEAD = """---
license: apache-2.0
---

# mini-brain

ReasonBrain in small: FRCE, LLaVA with its [IMG] tokens, QFormer and cross-modal enhancer over an editor of Stable Diffusion's
kind. It edits drawn miniature scenes of 96x96 pixels by hypothetical instructions in English, not photographs, and its scores
say nothing about how well a full-size model edits. It goes through the same loader and nodes as a full-size ReasonBrain; only
the config files differ. `rows` holds the ablations: models that were trained with a part left out.

    reasonedit edit SCENE.png "..." --system mini-brain --out out
    reasonedit-eval miniature --system mini-brain --table components --n 200 --out tables

## How it was made

From random weights, on scenes and instructions that are drawn and computed; no picture and no text from elsewhere.

    reasonedit-train mini --system mini-brain --out DIR

LLaVA learns to describe scenes and to read plain instructions, the editor clear edits; neither meets a hypothetical
instruction. The full model and every ablation are then trained by `training/mini/recipes/brain.toml`, from the same
start, with the same steps, data order and seed."""


def write_brain_card(out: Path) -> Path:
    """Write the card into OUT/mini-brain and return it. ConfigError where the miniature is not finished.

    Tables are those of OUT/tables/mini-brain. NOTES beside them is written by hand: why a part does not help, where one does
    not. It stands behind the tables, word for word.
    """
    folder = out / _SYSTEM
    if not (folder / "brain.safetensors").is_file():
        raise ConfigError(f"expected a finished miniature at {folder}, found none. Let `reasonedit-train mini` run to its end.")
    blocks = [_HEAD, _sizes(folder), _records(out), _runs(out)]
    found = []
    for name in TABLE_NAMES:
        table = out / "tables" / _SYSTEM / name
        if table.with_suffix(".md").is_file():
            found.append(table.with_suffix(".md").read_text(encoding="utf-8").strip())
            write_whole(folder / TABLES / f"{name}.json", table.with_suffix(".json").read_bytes())
    blocks += ["## Measured", *found] if found else ["## Measured\n\nNo table has been measured with these weights yet."]
    notes = out / "tables" / _SYSTEM / NOTES
    if found and notes.is_file():
        blocks.append(notes.read_text(encoding="utf-8"))
    return write_whole(folder / CARD, ("\n\n".join(block.strip("\n") for block in blocks) + "\n").encode())


def _sizes(folder: Path) -> str:
    def row(words: str, place: Path) -> list[str]:
        files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
        count = sum(_numbers(shape) for file in files for shape in read_shapes(file).values())
        return [words, f"{count:,}", f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"]

    rows = [row(words, folder / name) for name, words in _PARTS.items()]
    rows += [row(f"row {place.name}", place) for place in sorted((folder / PLACE).glob("*"))]
    whole = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return "## Size\n\n" + grid(["part", "parameters", "bfloat16"], [*rows, ["all files", "", f"{whole / 1e6:.2f} MB"]])


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _records(out: Path) -> str:
    """Counts and seeds of what was trained on. The parts' examples are counted by their steps."""
    from .brain_parts import EDITOR, WORDS

    rows = []
    parts = {"llava": ("conversations about scenes", WORDS), "editor": ("clear edits", EDITOR)}
    for part, (what, settings) in parts.items():
        steps = _steps(out / "runs" / f"{part}-{_SYSTEM}")
        if steps:
            rows.append([f"{what}, drawn as {part} learns", f"{steps * settings.batch:,}", "", str(settings.seed)])
    file = out / "records" / BOOK / BOOK_FILE
    if file.is_file():
        book = json.loads(file.read_text(encoding="utf-8"))
        rows.append([f"{book['book']}, of every row", f"{book['count']:,}", f"{book['held_out']:,}", str(book["seed"])])
    return grid(["records", "trained on", "for validation", "seed"], rows)


def _steps(run: Path) -> int:
    return sum(line["event"] == "step" for line in read_log(run)) if (run / LOG).is_file() else 0


def _runs(out: Path) -> str:
    """Steps, minutes, machine and losses of every run."""
    rows = []
    runs = [out / "runs" / f"{part}-{_SYSTEM}" for part in ("vae", "llava", "editor")]
    runs += [out / "runs" / f"{_SYSTEM}-{row}" / "1-reason" for row in ROWS]
    for run in runs:
        if not (run / LOG).is_file():
            continue
        lines = read_log(run)
        steps = [line for line in lines if line["event"] == "step"]
        looks = [line["figures"] for line in lines if line["event"] == "hook" and line.get("name") == "validation"]
        names = [name for name in ("dm", "mllm") if looks and name in looks[0]]
        said = [f"{name} {looks[0][name]:.3f} -> {looks[-1][name]:.3f}" for name in names]
        texts = [json.loads(text) for text in (run / LOG).read_text(encoding="utf-8").splitlines() if '"device"' in text]
        machines = dict.fromkeys(line["device"] for line in texts if line.get("device"))
        name = run.parent.name.removeprefix(f"{_SYSTEM}-") if run.name == "1-reason" else run.name.removesuffix(f"-{_SYSTEM}")
        minutes = sum(line["step_s"] for line in steps) / 60
        rows.append([name, f"{len(steps):,}", f"{minutes:.0f}", "; ".join(machines), ", ".join(said)])
    return grid(["run", "steps", "minutes", "on", "held-out"], rows)
