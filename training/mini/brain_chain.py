"""From nothing to mini-brain and its ablations: what `reasonedit-train mini --system mini-brain` does, link after link.

    DIR/brain-tokens          the two vocabularies
    DIR/blank/mini-brain      random parts in the layout of a ReasonBrain
    DIR/records/suppositions  the records: hypothetical instructions of Reason50K's four categories
    DIR/vae/mini-brain        the trained autoencoder (4 channels, as Stable Diffusion has them)
    DIR/llava/mini-brain      the trained LLaVA
    DIR/editor/mini-brain     the trained UNet and text encoder
    DIR/start/mini-brain      all of them together: what every row starts from
    DIR/runs/mini-brain-ROW   a row: the full model, or one with a part left out (`brain_rows.ROWS`)
    DIR/mini-brain            the finished miniature, with the rows in it; its card holds the tables of DIR/tables/mini-brain

As in `chain.py`, what is there is left out: starting the same command again is how to resume.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_json
from ..run import TRAINED
from .brain_rows import FULL, LIMIT, PLACE, ROWS
from .chain import RECIPES, Chain, run_links, take_links
from .chain import _whole as whole_folder

if TYPE_CHECKING:
    from .vae import VaeSettings

log = logging.getLogger(__name__)

SYSTEM = "mini-brain"
BOOK, COUNT, HELD_OUT = "suppositions", 12_000, 200
SEED = 0
STAGE = "1-reason"
_MARK = "reasonbrain.json"


@dataclass(frozen=True, slots=True)
class BrainChain:
    """mini-brain made in `out`; the fields are those of `chain.Chain`. rows: only these (and what they need); none: all."""

    out: Path
    share: float = 1.0
    links: Path | None = None
    threads: int = 0
    sets: Sequence[str] = ()
    quiet: bool = False
    rows: Sequence[str] = ()

    def __post_init__(self) -> None:
        Chain("mini-s", self.out, self.share, self.links)  # its values are checked there
        unknown = [row for row in self.rows if row not in ROWS]
        if unknown:
            raise ConfigError(f"rows: expected some of {', '.join(ROWS)}, found {unknown[0]!r}. Choose among them.")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The rows that are made."""
        return tuple(self.rows) or tuple(ROWS)

    @property
    def finished(self) -> Path:
        """The finished miniature."""
        return self.out / SYSTEM

    def run_of(self, row: str) -> Path:
        """The run folder of a row."""
        return self.out / "runs" / f"{SYSTEM}-{row}"

    def make(self, until: str | None = None) -> int:
        """Every link that is missing, up to the one named `until`. Returns the exit code: 0, or of a run that was stopped."""
        links: dict[str, Callable[[], int]] = {
            "tokens": self._tokens,
            "records": self._records,
            "vae": self._vae,
            "llava": self._llava,
            "editor": self._editor,
            "start": self._start,
            **{row: lambda row=row: self._row(row) for row in self.wanted},
            "finish": self._finish,
            "card": self._card,
        }
        return run_links(SYSTEM, links, until, self._begin)

    def _begin(self) -> None:
        take_links(self.links, self.out, "brain-tokens/text.json")
        if self.threads:
            import torch

            torch.set_num_threads(self.threads)

    def _tokens(self) -> int:
        import torch

        from .brain_blank import MINI, write_bases
        from .brain_tokens import read_merges, write_merges

        place, blank = self.out / "brain-tokens", self.out / "blank" / SYSTEM
        if not (place / "text.json").is_file():
            texts = {} if self.share == 1 else {"texts": max(200, self._some(4000))}
            whole_folder(place, lambda part: write_merges(part, **texts))
        if not (blank / _MARK).is_file():
            how = {"sizes": MINI, "seed": SEED, "dtype": torch.bfloat16, "merges": read_merges(place)}
            whole_folder(blank, lambda part: write_bases(part, **how))
        return 0

    def _records(self) -> int:
        from .books import write_book

        write_book(BOOK, self.out / "records" / BOOK, self._some(COUNT), SEED, held_out=self._some(HELD_OUT))
        return 0

    def _vae(self) -> int:
        from ..signals import EXIT_STOPPED
        from .vae import train_vae

        place = self._made("vae")
        if (place / "config.json").is_file():
            return 0
        settings = vae_settings()
        if self.share < 1:
            settings = vae_settings(steps=self._some(settings.steps), warmup=self._some(settings.warmup))
        made = train_vae(settings, place, self.out / "runs" / f"vae-{SYSTEM}")
        return 0 if made is not None else EXIT_STOPPED

    def _llava(self) -> int:
        from .brain_parts import WORDS, train_llava

        return self._part("llava", WORDS, train_llava, lambda: self.out / "blank" / SYSTEM / "llava", "config.json")

    def _editor(self) -> int:
        from .brain_parts import EDITOR, train_editor

        return self._part("editor", EDITOR, train_editor, lambda: self._parts("bare", ("vae",)), "unet/config.json")

    def _part(self, name: str, settings: Any, make: Any, begin: Callable[[], Path], mark: str) -> int:
        from ..signals import EXIT_STOPPED

        place = self._made(name)
        if (place / mark).is_file():
            return 0
        if self.share < 1:
            short = {"steps": self._some(settings.steps), "warmup": self._some(settings.warmup)}
            settings = settings.model_copy(update=short)
        rough = place.with_name(f".{place.name}.part")
        shutil.rmtree(rough, ignore_errors=True)
        if make(settings, begin(), rough, self.out / "runs" / f"{name}-{SYSTEM}") is None:
            return EXIT_STOPPED
        os.replace(rough, place)
        return 0

    def _start(self) -> int:
        self._parts("start", ("vae", "llava", "editor"))
        return 0

    def _parts(self, name: str, trained: Sequence[str]) -> Path:
        """OUT/name/mini-brain: the blank parts, with those that are `trained` in their place. Weights in bfloat16 are kept so:
        what is shipped is what was trained on."""

        def build(part: Path) -> None:
            shutil.copytree(self.out / "blank" / SYSTEM, part)
            for each in trained:
                folders = ("unet", "text_encoder") if each == "editor" else (each,)
                for folder in folders:
                    made = self._made(each) / (folder if each == "editor" else "")
                    shutil.rmtree(part / folder)
                    shutil.copytree(made, part / folder, ignore=shutil.ignore_patterns("report.json"))

        place = self.out / name / SYSTEM
        if not (place / _MARK).is_file():
            whole_folder(place, build)
        return place

    def _made(self, part: str) -> Path:
        return self.out / part / SYSTEM

    def _row(self, row: str) -> int:
        from ..config_file import SNAPSHOT, make_config, read_recipe, read_snapshot
        from ..run import is_done, run
        from ..stages import plan_stages

        out = self.run_of(row)
        if (out / SNAPSHOT).is_file():
            config = read_snapshot(out)
            if all(is_done(config, plan) for plan in plan_stages(config)):
                return 0
            return run(config, source=SYSTEM, quiet=self.quiet, resume=True)
        path = RECIPES / "brain.toml"
        raw = read_recipe(path)
        raw["run"] |= {"out": str(out), "name": f"{SYSTEM}-{row}", "threads": self.threads}
        raw["model"]["brain"]["switches"] = dict(ROWS[row])
        if self.share < 1:
            for stage in raw["stage"]:
                stage["steps"] = self._some(stage["steps"])
                stage["optim"]["warmup"] = min(stage["optim"].get("warmup", 0), stage["steps"] // 4)
        return run(make_config(raw, str(path), tuple(self.sets)), source=str(path), quiet=self.quiet)

    def _finish(self) -> int:
        if FULL not in self.wanted:
            return 0
        rows = {row: self.run_of(row) / STAGE / TRAINED for row in self.wanted}
        whole_folder(self.finished, lambda part: write_finished_brain(self._made("start"), rows, part))
        log.info("finished: %s", self.finished)
        return 0

    def _card(self) -> int:
        from .brain_card import write_brain_card

        if FULL in self.wanted:
            log.info("written: %s", write_brain_card(self.out))
        return 0

    def _some(self, count: int) -> int:
        return max(1, round(count * self.share))


def vae_settings(**changes: Any) -> VaeSettings:
    """How the autoencoder of mini-brain is trained: as Step1X's, whose kind is Stable Diffusion's with more channels, and
    with other widths."""
    from .brain_blank import MINI
    from .vae import default_settings

    blocks = len(MINI["vae"]["block_out_channels"])
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    widths = {name: list(value) if isinstance(value, tuple) else value for name, value in MINI["vae"].items()}
    return default_settings("mini-s", widths={**widths, **kinds}, **changes)


def write_finished_brain(start: Path, rows: Mapping[str, Path], folder: Path) -> Path:
    """The folder that is shipped: the parts once, the full model's trained tensors beside them, and in `rows` those of every
    other row. Tensors in bfloat16. ConfigError where all together are larger than `LIMIT`."""
    shutil.copytree(start, folder)
    settings = json.loads((start / _MARK).read_text(encoding="utf-8"))
    for row, trained in rows.items():
        place = folder if row == FULL else folder / PLACE / row
        _write_row(trained, place)
        if row != FULL:
            shutil.copy2(folder / "reasonedit.json", place)
            names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in (PLACE, "lora"))
            write_json(place / _MARK, {**settings, "parts": {name: f"../../{name}" for name in names}})
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise ConfigError(f"{SYSTEM}: expected at most {LIMIT:,} bytes, found {size:,}. Make the networks smaller.")
    return folder


def _write_row(trained: Path, place: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    if not (trained / "brain.safetensors").is_file():
        raise ConfigError(f"expected a trained row in {trained}, found none. Let its run end first.")
    for name in ("brain.safetensors", "lora/adapter_model.safetensors"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        with safe_open(trained / name, "pt") as file:
            metadata = file.metadata()
        state = {key: value.to(torch.bfloat16) for key, value in load_file(trained / name).items()}
        save_file(state, place / name, metadata=metadata)
    shutil.copy2(trained / "lora" / "adapter_config.json", place / "lora")
