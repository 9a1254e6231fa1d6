"""The model card of a miniature, written from what its making has left: logs, books, reports, tables. Nothing is typed in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_whole
from ...reasonedit_core.mini.models import MINIS
from ...reasonedit_core.weightfiles import read_shapes
from ..log import LOG, read_log
from .books import BOOK_FILE
from .chain import EDITOR_LEGS, FIRST_STAGE, MLLM_LEGS

CARD = "README.md"
TABLES = "tables"

_PARTS = {"text_encoder": "MLLM", "transformer": "DiT and connector", "vae": "VAE"}
_OF = {"mini-s": "Step1X-Edit v1.2", "mini-q": "Qwen-Image-Edit-2509"}
_RUNS = {
    "words": "base MLLM",
    "scenes": "base MLLM, second run",
    "base": "base editor",
    "edits": "base editor, second run",
    "together": "base MLLM and base editor together",
    "details": "base editor, third run",
    "looking": "base MLLM, questions about places",
    "finding": "base MLLM and base editor together, last run",
}
_TABLES = ("loop", "stages", "reflection", "rounds", "reflector")

_HEAD = """---
license: apache-2.0
---

# {name}

{architecture} in small, as ReasonEdit uses it: an MLLM that thinks and reflects, a DiT that edits. It edits drawn miniature
scenes of 96x96 pixels, not photographs, and its scores say nothing about how well a full-size model edits. It goes through
the same loader, prompts, loop and nodes as the full systems; only the config files differ.

    reasonedit demo
    reasonedit edit SCENE.png "..." --system {name} --out out
"""

_MADE = """## How it was made

From random weights, on scenes, instructions and verdicts that are drawn and computed; no picture and no text from elsewhere.

    reasonedit-train mini --system {name} --out DIR

Starting the command again goes on where it was. The recipes, in `training/mini/recipes`, are `words.toml`, `scenes.toml` and
`looking.toml` (base MLLM), `base.toml`, `edits.toml`, `together.toml`, `details.toml` and `finding.toml` (base editor, and
the base MLLM with it), `reasoning.toml`, `thinking.toml`, `copying.toml` and `judging.toml` (the paper's first stage) and
`{recipe}.toml` (the second and the third stage)."""

_MEASURED = """## Measured

By the exact judge, on items of the world's held-out split (wordings, object combinations and pairs of rule and object that
training never sees), with the commands stated. 95 % intervals are bootstrapped over items."""


def write_card(out: Path, system: str) -> Path:
    """Write the card into OUT/SYSTEM from the folder that `reasonedit-train mini` leaves, and return it.

    Tables are taken from OUT/tables/SYSTEM, where `reasonedit-eval miniature --out` has put them, and lie as JSON beside the
    card, for `reasonedit-eval check`; without any the card says that none was measured. ConfigError where the miniature is
    not finished.
    """
    folder = out / system
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"expected a finished miniature at {folder}, found none. Let `reasonedit-train mini` run to its end.")
    blocks = [
        _HEAD.format(name=system, architecture=_OF[system]),
        _sizes(folder),
        _MADE.format(name=system, recipe=system.replace("-", "_")),
        _records(out),
        _runs(out, system),
        *_tables(out / "tables" / system),
    ]
    for name in _TABLES:
        table = out / "tables" / system / f"{name}.json"
        if table.is_file():
            write_whole(folder / TABLES / table.name, table.read_bytes())
    return write_whole(folder / CARD, ("\n\n".join(block.strip("\n") for block in blocks) + "\n").encode())


def _sizes(folder: Path) -> str:
    rows = []
    for part, words in _PARTS.items():
        files = sorted((folder / part).glob("*.safetensors"))
        count = sum(_numbers(shape) for file in files for shape in read_shapes(file).values())
        rows.append([words, f"{count:,}", f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"])
    return "## Size\n\n" + grid(["part", "parameters", "bfloat16"], rows)


def _numbers(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _records(out: Path) -> str:
    rows = []
    for file in sorted((out / "records").glob(f"*/{BOOK_FILE}")):
        book = json.loads(file.read_text(encoding="utf-8"))
        rows.append([book["book"], f"{book['count']:,}", f"{book['held_out']:,}", str(book["seed"])])
    return grid(["records", "trained on", "for validation", "seed"], rows)


def _runs(out: Path, system: str) -> str:
    """Steps, time and machine of every stage, with the held-out loss before and after."""
    rows = [_row("VAE", out / "runs" / f"vae-{system}", _read_back(out / "vae" / system))]
    legs = {leg.run: leg for leg in (*MLLM_LEGS, *EDITOR_LEGS[system])}
    for run in (*legs, *FIRST_STAGE, system):
        others = legs[run].system if run in legs and legs[run].dit and legs[run].system != system else None
        for log in sorted((out / "runs" / run).glob(f"[1-9]-*/{LOG}")):
            name = log.parent.name.partition("-")[2]
            shown = _RUNS.get(name, name) + (f" of {others}" if others else "")
            rows.append(_row(shown, log.parent, _losses(log.parent)))
    return grid(["stage", "steps", "minutes", "on", "held-out"], rows)


def _row(name: str, stage: Path, result: str) -> list[str]:
    lines = read_log(stage) if (stage / LOG).is_file() else []
    steps = [line for line in lines if line["event"] == "step"]
    machines = dict.fromkeys(line["device"] for line in _raw(stage) if line.get("device"))
    minutes = sum(line["step_s"] for line in steps) / 60
    return [name, f"{len(steps):,}", f"{minutes:.0f}", "; ".join(machines), result]


def _raw(stage: Path) -> list[Mapping[str, Any]]:
    """The lines about starts, those of resumes as well, which `read_log` leaves out where they void others."""
    found = []
    for text in (stage / LOG).read_text(encoding="utf-8").splitlines() if (stage / LOG).is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("event") in ("start", "resume"):
            found.append(line)
    return found


def _losses(stage: Path) -> str:
    looks = [line["figures"] for line in read_log(stage) if line["event"] == "hook" and line.get("name") == "validation"]
    looks = [look for look in looks if look and "loss" in look]
    return f"loss {looks[0]['loss']:.3f} -> {looks[-1]['loss']:.3f}" if len(looks) > 1 else ""


def _read_back(folder: Path) -> str:
    file = folder / "report.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    return f"{100 * found['exact']:.1f} % of scenes read back exactly, quality {found['quality']:.2f}"


def _tables(folder: Path) -> list[str]:
    found = [folder / f"{name}.md" for name in _TABLES if (folder / f"{name}.md").is_file()]
    if not found:
        return ["## Measured\n\nNo table has been measured with these weights yet."]
    return [_MEASURED, *(file.read_text(encoding="utf-8").strip() for file in found)]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


assert set(_OF) == set(MINIS)
