"""From nothing to a finished miniature: what `reasonedit-train mini` does, link after link.

    DIR/tokenizer             the vocabulary
    DIR/blank/NAME            random weights in the released layout, for the vocabulary and the shapes
    DIR/records/BOOK          the drawn records, a book for each purpose (`books.py`)
    DIR/vae/NAME              the trained autoencoder
    DIR/before/RUN            the checkpoint that a run begins with
    DIR/runs/words, scenes    the base MLLM, from random weights, in two runs
    DIR/runs/mini-s-base, mini-s-edits      the base editor of mini-s, on it
    DIR/runs/mini-s-together  both together: what the editor needs to know comes to stand in the MLLM's last states
    DIR/runs/mini-s-details   the editor goes on alone
    DIR/runs/looking, mini-s-finding        the MLLM on questions about places, then both together once more
    DIR/runs/reasoning, thinking, copying, judging  the paper's first stage, on that MLLM, in four runs; it is the same in
                              both miniatures, so it is trained once
    DIR/runs/NAME-...         the base editor to its end, on the finished base MLLM (`EDITOR_LEGS`)
    DIR/start/NAME            the same as a whole checkpoint: what the paper's stages start from
    DIR/runs/NAME             the paper's second and third stage, going on from the first
    DIR/NAME                  the finished miniature; its card holds the tables of DIR/tables/NAME
    DIR/compare/NAME/...      what only tables compare with: the checkpoints between the stages, and reflectors of other forms

Every link is left out where what it makes is there already, or where that was needed only for something which is; the runs go
on from their last checkpoint: starting the same command again is how to resume. Two miniatures made in one folder share what
does not depend on the system. Links that were made elsewhere, copied into DIR, are taken as if they had been made there.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_whole
from ...reasonedit_core.mini.models import MINIS
from ...reasonedit_core.reasoners.verdict import FORMS

log = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"

BOOKS: Mapping[str, int] = {
    "words": 60_000,
    "looks": 120_000,
    "edits": 30_000,
    "pairs": 30_000,
    "meanings": 90_000,
    "copies": 60_000,
    "triples": 12_000,
    "drawings": 2_000,
}
"""Records of each book, beside those of its validation part."""

HELD_OUT = 300
SEED = 0

MLLM_SYSTEM = "mini-s"
"""Whose blank checkpoint the MLLM is trained in, and whose editor it is trained with; it is the same in both."""

TOGETHER, FINDING = "together", "finding"
"""The recipes in which base MLLM and base editor are trained together."""

MLLM_RUN = f"{MLLM_SYSTEM}-{FINDING}"
"""The run that leaves the base MLLM."""

FIRST_STAGE = ("reasoning", "thinking", "copying", "judging")
"""The recipes, and the runs, of the first stage; each goes on with the LoRA of the one before it."""

BEGUN, REASONER = FIRST_STAGE[0], FIRST_STAGE[-1]
"""The first of them, and the one that leaves the reasoner."""

REFLECTION = "reflection"
"""The recipe of the reflectors that table `reflection` compares."""

BASE = "base"
"""What tables call the checkpoint before the three stages."""

BETWEEN = {"editing": "edit"}
"""Stage of a miniature's recipe -> what tables call the checkpoint after it."""

_SETTINGS = "reasonedit.json"


@dataclass(frozen=True, slots=True)
class Leg:
    """A run on the way to the base MLLM or to a base editor. mllm, dit: the runs whose parts it begins with; None: random.
    sets: `A.B=VALUE` put over the recipe."""

    recipe: str
    run: str
    system: str
    mllm: str | None = None
    dit: str | None = None
    sets: tuple[str, ...] = ()


_TEACHERS = ("mini-s-base", "mini-s-edits", "mini-s-details")
_TAUGHT = f"{MLLM_SYSTEM}-{TOGETHER}"
MLLM_LEGS = (
    Leg("words", "words", MLLM_SYSTEM),
    Leg("scenes", "scenes", MLLM_SYSTEM, mllm="words"),
    Leg("base", _TEACHERS[0], MLLM_SYSTEM, mllm="scenes"),
    Leg("edits", _TEACHERS[1], MLLM_SYSTEM, mllm="scenes", dit=_TEACHERS[0]),
    Leg(TOGETHER, _TAUGHT, MLLM_SYSTEM, mllm="scenes", dit=_TEACHERS[1]),
    Leg("details", _TEACHERS[2], MLLM_SYSTEM, mllm=_TAUGHT, dit=_TAUGHT),
    Leg("looking", "looking", MLLM_SYSTEM, mllm=_TAUGHT),
    Leg(FINDING, MLLM_RUN, MLLM_SYSTEM, mllm="looking", dit=_TEACHERS[2]),
)
"""To the base MLLM. Its own book leaves it with states that say what comes next; an editor teaches it to keep what was said,
questions about places to find what is spoken of."""

EDITOR_LEGS: Mapping[str, Sequence[Leg]] = {
    "mini-s": (Leg("details", "mini-s-further", "mini-s", MLLM_RUN, dit=MLLM_RUN),),
    "mini-q": (
        # At the shift of `details` from the start: it was found when mini-s had gone half of its way.
        Leg("base", "mini-q-base", "mini-q", _TAUGHT, sets=("stage.base.timesteps.shift=6.0",)),
        Leg("edits", "mini-q-edits", "mini-q", MLLM_RUN, dit="mini-q-base", sets=("stage.edits.timesteps.shift=6.0",)),
    ),
}
"""From there to each base editor. Where its last run ends the MLLM goes on in the first stage, to other states, and the editor
has to follow it in the second: what is still missing is learnt there."""


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
    def _editor(self) -> str:
        """The run that leaves the base editor."""
        return (EDITOR_LEGS[self.system] or MLLM_LEGS)[-1].run

    # links

    def make(self, until: str | None = None) -> int:
        """Every link that is missing, up to the one named `until`. Returns the exit code: 0, or of a run that was stopped."""
        links: dict[str, Callable[[], int]] = {
            "tokens": self._tokens,
            "records": self._records,
            "vae": self._vae,
            **{leg.run: partial(self._leg, leg) for leg in MLLM_LEGS},
            **{run: partial(self._first_stage, run) for run in FIRST_STAGE},
            **{leg.run: partial(self._leg, leg) for leg in EDITOR_LEGS[self.system]},
            "start": self._start,
            "stages": self._stages,
            "finish": self._finish,
            "compare": self._compare,
            "card": self._card,
        }
        return run_links(self.system, links, until, lambda: take_links(self.links, self.out, "tokenizer/vocab.json"))

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

        for system in dict.fromkeys((self.system, *(() if self._has_run(MLLM_RUN) else (MLLM_SYSTEM,)))):
            place = self.out / "vae" / system
            if (place / "config.json").is_file():
                continue
            settings = default_settings(system)
            if self.share < 1:
                settings = default_settings(system, steps=self._some(settings.steps), warmup=self._some(settings.warmup))
            if train_vae(settings, place, self.out / "runs" / f"vae-{system}") is None:
                return EXIT_STOPPED
        return 0

    def _leg(self, leg: Leg) -> int:
        """One run of the base MLLM or the base editor; left out when one after it has ended."""
        legs = MLLM_LEGS if leg in MLLM_LEGS else EDITOR_LEGS[leg.system]
        if any(self._has_run(later.run) for later in legs[legs.index(leg) + 1 :]):
            return 0
        return self._recipe_run(
            leg.recipe, leg.run, lambda: self._beginning(leg), (f'model.system="{MINIS[leg.system]}"', *leg.sets)
        )

    def _beginning(self, leg: Leg) -> Path:
        if leg.mllm is None:
            return self.out / "blank" / leg.system
        with_vae = leg.dit is not None or leg.recipe == "base"
        return self._checkpoint(f"before/{leg.run}", leg.system, mllm=leg.mllm, dit=leg.dit, vae=with_vae)

    def _first_stage(self, run: str) -> int:
        if any(self._has_run(later) for later in FIRST_STAGE[FIRST_STAGE.index(run) + 1 :]):
            return 0
        return self._recipe_run(run, run, self._mllm)

    def _mllm(self) -> Path:
        return self._checkpoint(f"before/{BEGUN}", MLLM_SYSTEM, mllm=MLLM_RUN)

    def _start(self) -> int:
        self._whole_checkpoint(f"start/{self.system}")
        return 0

    def _stages(self) -> int:
        return self._recipe_run(self.recipe, self.system)

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
        from .finish import write_finished

        compare = f"compare/{self.system}"
        self._whole_checkpoint(f"{compare}/stages/{BASE}")
        self._whole_checkpoint(f"{compare}/stages/reason", mllm=REASONER)
        config = read_snapshot(self.run)
        for plan in plan_stages(config):
            place = self.out / compare / "stages" / BETWEEN.get(plan.stage.name, "")
            if plan.stage.name in BETWEEN and not (place / _SETTINGS).is_file():
                with tempfile.TemporaryDirectory(dir=self.out) as rough:
                    export_stage(config, plan, "merged", Path(rough))
                    _whole(place, lambda part, rough=rough: write_finished(next(Path(rough).glob("*_merged")), part))
        for form in FORMS:
            run = f"{REFLECTION}-{form}"
            code = self._recipe_run(REFLECTION, run, self._mllm, (f'data.reflection="{form}"',))
            if code:
                return code
            self._whole_checkpoint(f"{compare}/reflection/{form}", mllm=run)
        return 0

    def _card(self) -> int:
        """The model card; written anew each time, as tables may have been measured meanwhile."""
        from .card import write_card

        log.info("written: %s", write_card(self.out, self.system))
        return 0

    # shared parts

    def _whole_checkpoint(self, name: str, *, mllm: str = MLLM_RUN) -> Path:
        """A checkpoint of this system with all three parts trained, the DiT that of the finished base editor."""
        return self._checkpoint(name, self.system, mllm=mllm, dit=self._editor, vae=True)

    def _checkpoint(self, name: str, system: str, *, mllm: str, dit: str | None = None, vae: bool = False) -> Path:
        """OUT/name: the blank checkpoint of a system, with what the runs `mllm` and `dit` left in the place of those parts, and
        the trained autoencoder; the other parts stay random."""

        def build(part: Path) -> None:
            shutil.copytree(self.out / "blank" / system, part)
            for folder, run in (("text_encoder", mllm), ("transformer", dit)):
                if run is not None:
                    _swap_weights(part / folder, self.out / "runs" / run / f"{run}_merged" / folder)
            if vae:
                shutil.rmtree(part / "vae")
                shutil.copytree(self.out / "vae" / system, part / "vae", ignore=shutil.ignore_patterns("report.json"))

        place = self.out / name
        if not (place / _SETTINGS).is_file():
            _whole(place, build)
        return place

    def _has_run(self, run: str) -> bool:
        """Whether a run has ended."""
        return (self.out / "runs" / run / f"{run}_merged").is_dir()

    def _recipe_run(self, recipe: str, name: str, weights: Callable[[], Path] | None = None, sets: Sequence[str] = ()) -> int:
        """The run `name` of the engine, begun, gone on with, or left as it is when it has ended. weights: makes the checkpoint
        that it begins with, which is not needed later."""
        from ..config_file import SNAPSHOT, make_config, read_recipe, read_snapshot
        from ..run import run

        out = self.out / "runs" / name
        if self._has_run(name):
            return 0
        if (out / SNAPSHOT).is_file():
            return run(read_snapshot(out), source=recipe, quiet=self.quiet, resume=True)
        path = RECIPES / f"{recipe}.toml"
        raw = read_recipe(path)
        raw["run"] |= {"out": str(out), "name": name, "threads": self.threads}
        if raw["run"]["precision"] == "auto":
            raw["run"]["precision"] = _precision()
        if weights is not None:
            raw["model"]["weights"] = str(weights())
        if self.share < 1:
            for stage in raw["stage"]:
                stage["steps"] = self._some(stage["steps"])
                stage["optim"]["warmup"] = min(stage["optim"].get("warmup", 0), stage["steps"] // 4)
        return run(make_config(raw, str(path), (*sets, *self.sets)), source=str(path), quiet=self.quiet)

    def _some(self, count: int) -> int:
        return max(1, round(count * self.share))


def run_links(name: str, links: Mapping[str, Callable[[], int]], until: str | None, begin: Callable[[], None]) -> int:
    """Make links in turn, up to the one named `until`, after `begin`. Returns the exit code: 0, or of one that was stopped."""
    if until is not None and until not in links:
        raise ConfigError(f"--until: expected one of {', '.join(links)}, found {until!r}. Choose one of them.")
    begin()
    for link, make in links.items():
        log.info("%s: %s", name, link)
        code = make()
        if code or link == until:
            return code
    return 0


def take_links(links: Path | None, out: Path, mark: str) -> None:
    """Copy what `out` lacks from a folder of links, which holds the file `mark`; each file is there whole or not at all."""
    if links is None:
        return
    if not (links / mark).is_file():
        raise ConfigError(f"--links: expected links of a miniature, {mark} among them, in {links}, found none.")
    for file in sorted(path for path in links.glob("*/**/*") if path.is_file()):  # not what stands beside them
        place = out / file.relative_to(links)
        if not place.exists():
            log.info("taken from %s: %s", links, file.relative_to(links))
            write_whole(place, file.read_bytes())


def _swap_weights(folder: Path, trained: Path) -> None:
    """Put the weights of a trained part in the place of those in `folder`, however each is cut into files."""
    found = sorted(trained.glob("*.safetensors*"))
    if not found:
        raise ConfigError(f"expected the weights of a run in {trained}, found none. Remove its *_merged and start again.")
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for new in found:
        shutil.copy2(new, folder / new.name)


def _precision() -> str:
    """bfloat16 on CPUs where it is the quicker one, as these networks learn as well in it; else the engine's own choice."""
    import torch

    from .muon import quick_bfloat16

    return "bfloat16" if not torch.cuda.is_available() and quick_bfloat16(torch.device("cpu")) else "auto"


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
