"""From nothing to a finished miniature: what `reasonedit-train mini` does, link after link.

    DIR/tokenizer             the vocabulary
    DIR/blank/NAME            random weights in the released layout, for the vocabulary and the shapes
    DIR/records/BOOK          the drawn records, a book for each purpose (`books.py`)
    DIR/vae/NAME              the trained autoencoder
    DIR/runs/words, scenes    the base MLLM, from random weights, in two runs; both miniatures start from it
    DIR/runs/reasoning        the paper's first stage, on it; the MLLM is the same in both miniatures, so it is trained once
    DIR/bare/NAME             the released layout with trained autoencoder and base MLLM, and a random DiT
    DIR/runs/NAME-base        the base editor
    DIR/start/NAME            the same with the base editor: what the paper's stages start from
    DIR/runs/NAME             the paper's second and third stage, going on from the first
    DIR/NAME                  the finished miniature; its card holds the tables of DIR/tables/NAME
    DIR/compare/NAME/...      what only tables compare with: the checkpoints between the stages, and reflectors of other forms

Every link is left out where what it makes is there already, and the runs go on from their last checkpoint: starting the same
command again is how to resume. Two miniatures made in one folder share what does not depend on the system. Links that were
made elsewhere, copied into DIR, are taken as if they had been made there.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_whole
from ...reasonedit_core.mini.models import MINIS
from ...reasonedit_core.reasoners.verdict import FORMS

log = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"

BOOKS: Mapping[str, int] = {"words": 60_000, "edits": 30_000, "pairs": 12_000, "triples": 12_000, "drawings": 2_000}
"""Records of each book, beside those of its validation part."""

HELD_OUT = 300
SEED = 0

WORDS = "words"
"""The recipe, and the run, of the base MLLM."""

SCENES = "scenes"
"""The recipe, and the run, in which it goes on."""

MLLM_SYSTEM = "mini-s"
"""Whose blank checkpoint the MLLM is trained in; it is the same in both."""

REASONING = "reasoning"
"""The recipe, and the run, of the first stage."""

REFLECTION = "reflection"
"""The recipe of the reflectors that table `reflection` compares."""

BASE = "base"
"""The recipe of the base editor, and what tables call the checkpoint before the three stages."""

BETWEEN = {"editing": "edit"}
"""Stage of a miniature's recipe -> what tables call the checkpoint after it."""

_SETTINGS = "reasonedit.json"


@dataclass(frozen=True, slots=True)
class Chain:
    """One miniature made in `out`. share: of the records and of the steps of every run that are made, for a trial of the
    command; 1 is what the shipped weights were made with. links: a folder with links that were made elsewhere, laid out as
    `out` is; what `out` lacks is taken from it. sets: `A.B=VALUE` put over the recipes of this miniature's runs."""

    system: str
    out: Path
    share: float = 1.0
    links: Path | None = None
    threads: int = 0
    sets: Sequence[str] = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.system not in MINIS:
            raise ConfigError(f"--system: expected one of {', '.join(MINIS)}, found {self.system!r}. Choose one of them.")
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share: expected a number above 0 and up to 1, found {self.share}. Correct it.")

    @property
    def recipe(self) -> str:
        """Of the three stages."""
        return self.system.replace("-", "_")

    @property
    def run(self) -> Path:
        """Their run folder."""
        return self.out / "runs" / self.system

    @property
    def finished(self) -> Path:
        """The finished miniature."""
        return self.out / self.system

    @property
    def _edits_plainly(self) -> Path:
        """What the run of the base editor leaves."""
        name = f"{self.system}-{BASE}"
        return self.out / "runs" / name / f"{name}_merged"

    # links

    def make(self, until: str | None = None) -> int:
        """Every link that is missing, up to the one named `until`. Returns the exit code: 0, or of a run that was stopped."""
        links: dict[str, Callable[[], int]] = {
            "tokens": self._tokens,
            "records": self._records,
            "vae": self._vae,
            "words": self._words,
            "scenes": self._scenes,
            "reasoning": self._reasoning,
            "base": self._base,
            "start": self._start,
            "stages": self._stages,
            "finish": self._finish,
            "compare": self._compare,
            "card": self._card,
        }
        if until is not None and until not in links:
            raise ConfigError(f"--until: expected one of {', '.join(links)}, found {until!r}. Choose one of them.")
        self._take_links()
        for name, link in links.items():
            log.info("%s: %s", self.system, name)
            code = link()
            if code or name == until:
                return code
        return 0

    def _take_links(self) -> None:
        if self.links is None:
            return
        if not (self.links / "tokenizer" / "vocab.json").is_file():
            raise ConfigError(f"--links: expected links of a miniature (tokenizer, vae, runs) in {self.links}, found none.")
        for file in sorted(path for path in self.links.glob("*/**/*") if path.is_file()):  # not what stands beside them
            place = self.out / file.relative_to(self.links)
            if not place.exists():
                log.info("taken from %s: %s", self.links, file.relative_to(self.links))
                write_whole(place, file.read_bytes())

    def _tokens(self) -> int:
        from .blank import write_blank
        from .tokens import learn_tokens, read_tokens, write_tokens

        place = self.out / "tokenizer"
        if not (place / "vocab.json").is_file():
            _whole(place, lambda part: write_tokens(part, learn_tokens()))
        vocab, merges = read_tokens(place)
        for name in dict.fromkeys((MLLM_SYSTEM, self.system)):
            blank = self.out / "blank" / name
            if not (blank / _SETTINGS).is_file():
                _whole(blank, lambda part, name=name: write_blank(name, part, vocab=vocab, merges=merges, seed=SEED))
        return 0

    def _records(self) -> int:
        from .books import write_book

        for name, count in BOOKS.items():
            place = self.out / "records" / name
            write_book(name, place, self._some(count), SEED, held_out=self._some(HELD_OUT))
        return 0

    def _vae(self) -> int:
        from ..signals import EXIT_STOPPED
        from .vae import default_settings, train_vae

        place = self.out / "vae" / self.system
        if (place / "config.json").is_file():
            return 0
        settings = default_settings(self.system)
        if self.share < 1:
            settings = default_settings(self.system, steps=self._some(settings.steps), warmup=self._some(settings.warmup))
        made = train_vae(settings, place, self.out / "runs" / f"vae-{self.system}")
        return 0 if made is not None else EXIT_STOPPED

    def _words(self) -> int:
        return self._recipe_run(WORDS, self.out / "runs" / WORDS, weights=self.out / "blank" / MLLM_SYSTEM)

    def _scenes(self) -> int:
        place = self.out / "begun"
        if not (place / _SETTINGS).is_file():
            _whole(place, lambda part: self._put_together(part, MLLM_SYSTEM, WORDS))
        return self._recipe_run(SCENES, self.out / "runs" / SCENES, weights=place)

    def _reasoning(self) -> int:
        return self._recipe_run(REASONING, self.out / "runs" / REASONING, weights=self._mllm())

    def _mllm(self) -> Path:
        """A checkpoint whose MLLM is the base MLLM; all else in it is random."""
        place = self.out / "mllm"
        if not (place / _SETTINGS).is_file():
            _whole(place, lambda part: self._put_together(part, MLLM_SYSTEM, SCENES))
        return place

    def _base(self) -> int:
        place = self.out / "bare" / self.system
        if not (place / _SETTINGS).is_file():
            _whole(place, lambda part: self._put_together(part, self.system, SCENES, self.out / "vae" / self.system))
        return self._recipe_run(BASE, self._edits_plainly.parent, place, (f'model.system="{MINIS[self.system]}"',))

    def _put_together(self, part: Path, system: str, run: str, vae: Path | None = None) -> None:
        """The blank checkpoint of a system, with the MLLM that a run left, and a trained autoencoder, in their places."""
        self._with_mllm(self.out / "blank" / system, part, run)
        if vae is not None:
            shutil.rmtree(part / "vae")
            shutil.copytree(vae, part / "vae", ignore=shutil.ignore_patterns("report.json"))

    def _start(self) -> int:
        from .finish import write_finished

        place = self.out / "start" / self.system
        if not (place / _SETTINGS).is_file():
            _whole(place, lambda part: write_finished(self._edits_plainly, part))
        return 0

    def _stages(self) -> int:
        return self._recipe_run(self.recipe, self.run)

    def _finish(self) -> int:
        """What was merged at the end of the run, as weights in one file a part, with the settings of the miniature."""
        from .finish import write_finished

        if not (self.finished / _SETTINGS).is_file():
            _whole(self.finished, lambda part: write_finished(self.run / f"{self.system}_merged", part))
        log.info("finished: %s", self.finished)
        return 0

    def _compare(self) -> int:
        from ..config_file import read_snapshot
        from ..run import export_stage
        from ..stages import plan_stages

        self._compared(f"stages/{BASE}", lambda rough: shutil.copytree(self._edits_plainly, rough / self._edits_plainly.name))
        self._compared_reasoner("stages/reason", REASONING)
        config = read_snapshot(self.run)
        for plan in plan_stages(config):
            if plan.stage.name in BETWEEN:
                self._compared(
                    f"stages/{BETWEEN[plan.stage.name]}", lambda rough, plan=plan: export_stage(config, plan, "merged", rough)
                )
        for form in FORMS:
            run = f"{REFLECTION}-{form}"
            code = self._recipe_run(REFLECTION, self.out / "runs" / run, self._mllm(), (f'data.reflection="{form}"',))
            if code:
                return code
            self._compared_reasoner(f"reflection/{form}", run)
        return 0

    def _card(self) -> int:
        """The model card; written anew each time, as tables may have been measured meanwhile."""
        from .card import write_card

        log.info("written: %s", write_card(self.out, self.system))
        return 0

    # shared parts

    def _with_mllm(self, folder: Path, part: Path, run: str) -> None:
        """Copy a checkpoint, and put the MLLM that a run left into the copy."""
        shutil.copytree(folder, part)
        for old in (part / "text_encoder").glob("*.safetensors*"):
            old.unlink()
        for new in (self.out / "runs" / run / f"{run}_merged" / "text_encoder").glob("*.safetensors*"):
            shutil.copy2(new, part / "text_encoder" / new.name)

    def _compared(self, name: str, export: Callable[[Path], object]) -> None:
        """A folder of `compare`. export: writes *_merged into a folder."""
        from .finish import write_finished

        def build(part: Path) -> None:
            with tempfile.TemporaryDirectory(dir=self.out) as rough:
                export(Path(rough))
                write_finished(next(Path(rough).glob("*_merged")), part)

        self._compare_with(name, build)

    def _compared_reasoner(self, name: str, run: str) -> None:
        """A folder of `compare` that is the start of the stages with the MLLM that a run left."""
        self._compare_with(name, lambda part: self._with_mllm(self.out / "start" / self.system, part, run))

    def _compare_with(self, name: str, build: Callable[[Path], object]) -> None:
        place = self.out / "compare" / self.system / name
        if not (place / _SETTINGS).is_file():
            _whole(place, build)

    def _recipe_run(self, recipe: str, out: Path, weights: Path | None = None, sets: Sequence[str] = ()) -> int:
        """A run of the engine, begun, gone on with, or left as it is when it has ended."""
        from ..config_file import SNAPSHOT, make_config, read_recipe, read_snapshot
        from ..run import run

        if (out / f"{out.name}_merged").is_dir():
            return 0
        if (out / SNAPSHOT).is_file():
            return run(read_snapshot(out), source=recipe, quiet=self.quiet, resume=True)
        path = RECIPES / f"{recipe}.toml"
        raw = read_recipe(path)
        raw["run"] |= {"out": str(out), "name": out.name, "threads": self.threads}
        if raw["run"]["precision"] == "auto":
            raw["run"]["precision"] = _precision()
        if weights is not None:
            raw["model"]["weights"] = str(weights)
        if self.share < 1:
            for stage in raw["stage"]:
                stage["steps"] = self._some(stage["steps"])
                stage["optim"]["warmup"] = min(stage["optim"].get("warmup", 0), stage["steps"] // 4)
        return run(make_config(raw, str(path), (*sets, *self.sets)), source=str(path), quiet=self.quiet)

    def _some(self, count: int) -> int:
        return max(1, round(count * self.share))


def _precision() -> str:
    """bfloat16 on CPUs with instructions for its products (AMX, AVX512-BF16), where it is the quicker one and these networks
    learn as well; without them it is many times slower than float32, so there the choice is left to the engine."""
    import torch

    known = getattr(torch.cpu, "get_capabilities", dict)()
    quick = not torch.cuda.is_available() and (known.get("amx_bf16") or known.get("avx512_bf16"))
    return "bfloat16" if quick else "auto"


def _whole(place: Path, build: Callable[[Path], object]) -> None:
    """Build a folder under another name, then give it its own: it is there whole or not at all."""
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        build(part)
        if place.exists():
            shutil.rmtree(place)
        os.replace(part, place)
    except OSError as error:
        raise ConfigError(f"cannot write {place}: {error}; choose a folder that can be written and has room.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
