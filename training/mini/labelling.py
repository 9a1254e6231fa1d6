"""The drawn world as annotator and editor of the labelling pipelines, so that they run end to end without any model.

The annotator knows the scene and the rule of every seed that `write_seeds` drew, and says what is true of them; results it
reads from their pixels. The editor makes the faults that are planted in the miniature's own records. Both follow from their
questions alone: a run that was killed gets the same answers.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...reasonedit_core.errors import ConfigError, DataError
from ...reasonedit_core.files import write_json, write_whole
from ...reasonedit_core.mini.dice import Dice
from ...reasonedit_core.mini.edits import apply, edits_between
from ...reasonedit_core.mini.faults import plant
from ...reasonedit_core.mini.items import Item, item
from ...reasonedit_core.mini.judge import Judgement, judge, read
from ...reasonedit_core.mini.kinds import CELLS
from ...reasonedit_core.mini.rules import CATEGORIES, KNOWLEDGE, SUPPOSE
from ...reasonedit_core.mini.texts import caption, target_description
from ...reasonedit_core.mini.verdicts import Assessment, assess_picture
from ...reasonedit_core.mini.wordings import canonical, together
from ...reasonedit_core.mini.words import background_name, tables
from ...reasonedit_core.mini.world import SIZE, Scene, render
from ..data.label.annotators import Answer, Question, Refused, Shown
from ..data.records import FILE_NAME
from .writers import PictureStore, edit_record, encode_png, spoiled

WORLD_FILE = "world.json"

KINDS = (*KNOWLEDGE, "concrete", "plain")
"""What is drawn in turn: an abstract instruction of each kind of knowledge, a clear one, and the plain form of an abstract one,
which an abstract layer can be put on."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one seed. asked: the instruction that its record holds; source: sha256 of its picture."""

    item: Item
    asked: str
    source: str

    @property
    def clear(self) -> bool:
        """What was asked can be painted as it stands."""
        return self.item.clear or self.asked == self.item.canonical

    @property
    def truths(self) -> frozenset[str]:
        """Steps, one a line, that say what is meant and no more."""
        plain = {self.item.canonical, "\n".join(self.item.steps)}
        return frozenset(plain | ({self.asked} if self.clear else set()))


def write_seeds(folder: Path, count: int, seed: int = 0, *, language: str | None = None, size: int = SIZE) -> Path:
    """Draw `count` seeds into `folder`: records of kind `edit`, and world.json, which says what was drawn; the record file.

    Records say nothing of what the annotator is to find out: the class of the instruction is left out. ConfigError for numbers
    out of range.
    """
    if count < 1 or seed < 0:
        raise ConfigError(f"seeds: expected a count of at least 1 and a seed of 0 or more, found {count}, {seed}.")
    store, lines, drawn = PictureStore(folder, size), [], []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        draw = {"kind": "abstract" if kind == "plain" else kind, "seed": (seed << 32) + number, "language": language}
        one = item(draw["seed"], draw["kind"], "train", language)
        asked = one.canonical if kind == "plain" else one.instruction
        name = f"seed-{seed}-{number:05d}"
        record = edit_record(one, store, name)
        # `item.concrete` is what the editor is told; what a user says instead is what thinking has to find out.
        record["instruction"] = {"raw": asked, "lang": one.language}
        record["edit"] = {"instruction_used": one.concrete}
        lines.append(json.dumps(record, ensure_ascii=False))
        drawn.append({**draw, "asked": asked, "source": record["images"]["input"]["sha256"]})
    write_json(folder / WORLD_FILE, {"size": size, "drawn": drawn})
    return write_whole(folder / FILE_NAME, ("\n".join(lines) + "\n").encode())


IDEAS = "seeds.jsonl"


def write_ideas(folder: Path, count: int, seed: int = 0, *, language: str | None = None, size: int = SIZE) -> Path:
    """Draw `count` seeds of `reasonedit-data reason50k` into `folder`: seeds.jsonl, whose scenes say what is to be seen once a
    rule has had its effect, and world.json; the file of seeds. Categories come in turn.

    Only items whose words suppose something are drawn. ConfigError for numbers out of range.
    """
    if count < 1 or seed < 0:
        raise ConfigError(f"seeds: expected a count of at least 1 and a seed of 0 or more, found {count}, {seed}.")
    lines, drawn, number = [], [], 0
    while len(lines) < count:
        kind = CATEGORIES[len(lines) % len(CATEGORIES)]
        draw = {"kind": kind, "seed": (seed << 32) + number, "language": language}
        number += 1
        one = item(draw["seed"], kind, "train", language)
        if not any(_framed(one.instruction, frame) for frame in SUPPOSE[one.language]):
            continue
        scene = target_description(one.source, one.target, one.language)
        told = {"id": f"idea-{seed}-{len(lines):05d}", "category": kind, "scenario": one.rule, "law": one.rule, "scene": scene}
        lines.append(json.dumps(told, ensure_ascii=False))
        source = hashlib.sha256(encode_png(render(one.source, size))).hexdigest()
        drawn.append({**draw, "asked": one.instruction, "source": source})
    write_json(folder / WORLD_FILE, {"size": size, "drawn": drawn})
    return write_whole(folder / IDEAS, ("\n".join(lines) + "\n").encode())


def _framed(text: str, frame: str) -> bool:
    before, _, after = frame.partition("{v}")
    return text.startswith(before) and text.endswith(after)


class World:
    """All that was drawn into a folder of seeds. DataError where there is no world.json, or one of another kind."""

    def __init__(self, folder: Path) -> None:
        path = folder / WORLD_FILE
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            self.size: int = told["size"]
            self.known = [
                Known(item(each["seed"], each["kind"], "train", each["language"]), each["asked"], each["source"])
                for each in told["drawn"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected what `reasonedit-data mini-seeds` writes beside its records, found none ({error}). The "
                "world annotator knows drawn seeds only."
            ) from error
        self._targets: dict[str, list[Known]] | None = None
        self._by_description: dict[str, Known] = {}
        for each in self.known:
            text = target_description(each.item.source, each.item.target, each.item.language)
            self._by_description.setdefault(text, each)

    def of(self, picture: Shown, instruction: str) -> Known:
        """What is known of an instruction about a source picture, however it is worded. Refused where nothing is."""
        for each in self.known:
            words = (each.asked, each.item.instruction, each.item.concrete, each.item.canonical)
            if each.source == picture.sha256 and instruction in words:
                return each
        raise Refused(f"nothing was drawn of which {instruction[:80]!r} is asked")

    def described(self, description: str) -> Known:
        """The seed whose target has this description. Refused where there is none."""
        if description not in self._by_description:
            raise Refused(f"no target was drawn with the description {description[:80]!r}")
        return self._by_description[description]

    def with_target(self, picture: Shown, before: str | None = None) -> Known:
        """The seed whose target is this picture, and whose source has the caption `before`. Refused where there is none."""
        if self._targets is None:
            self._targets = {}
            for each in self.known:
                sha = hashlib.sha256(encode_png(render(each.item.target, self.size))).hexdigest()
                self._targets.setdefault(sha, []).append(each)
        for each in self._targets.get(picture.sha256, ()):
            if before is None or before.startswith(caption(each.item.source, each.item.language)):
                return each
        raise Refused("no seed was drawn with this target and source")


class WorldAnnotator:
    """Answers every question of the pipelines truly. name: with another name it can stand for a second judge."""

    endpoint = "scripted"

    def __init__(self, world: World, name: str = "world") -> None:
        self.world, self.name = world, name

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        """The reply as text, as a model would write it."""
        told = getattr(self, f"_{question.prompt.step}")(question, question.inputs)
        text = json.dumps(told, ensure_ascii=False)
        return Answer(text, len(question.words) // 4, len(text) // 4)

    def _classify(self, question: Question, told: Any) -> dict[str, Any]:
        known = self.world.of(question.pictures[0], told["instruction"])
        category = known.item.category or known.item.edit_kinds[0]
        return {"class": "clear" if known.clear else "abstract", "category": category, "why": "It was drawn so."}

    def _simplify(self, question: Question, told: Any) -> dict[str, Any]:
        return {"steps": list(self.world.of(question.pictures[0], told["instruction"]).item.steps)}

    def _abstract(self, question: Question, told: Any) -> dict[str, Any]:
        known = self.world.of(question.pictures[0], told["instruction"])
        return {"instruction": None if known.item.clear else known.item.instruction}

    def _verify(self, question: Question, told: Any) -> dict[str, Any]:
        holds = told["steps"] in self.world.of(question.pictures[0], told["instruction"]).truths
        why = "The steps are what is meant." if holds else "The steps are not what is meant."
        return {"faithful": holds, "executable": True, "nothing_added": holds, "visible": True, "why": why}

    def _describe(self, question: Question, told: Any) -> dict[str, Any]:
        one = self.world.of(question.pictures[0], told["instruction"]).item
        return {"description": target_description(one.source, one.target, one.language)}

    def _score(self, question: Question, told: Any) -> dict[str, Any]:
        found = self._seen(question.pictures[-1], told["description"])
        return {**found.findings, "raw_score": found.score, "reason": found.scorer}

    def _decide(self, question: Question, told: Any) -> dict[str, Any]:
        found = self._seen(question.pictures[-1], told["description"])
        return {"reason": found.reason, "verdict": found.verdict, "second_instruction": found.instruction}

    def _audit(self, question: Question, told: Any) -> dict[str, Any]:
        found = self._seen(question.pictures[-1], told["description"])
        return {"verdict": found.verdict, "why": found.reason}

    def _grade(self, question: Question, told: Any) -> dict[str, Any]:
        one = self.world.described(told["scene"]).item
        found = _judged(one.source, one.target, question.pictures[0].sha256, str(question.pictures[0].path))
        scene = 2 if found.exact else 1 if found.preservation >= 6 else 0
        return {"scene": scene, "law": int(3 * found.success / 10), "why": f"{found.success:g} of 10 of the effect is there."}

    def _rewrite(self, question: Question, told: Any) -> dict[str, Any]:
        return rewritten(self.world.described(told["scene"]).item)

    def _rewrite_pair(self, question: Question, told: Any) -> dict[str, Any]:
        return rewritten(self.world.with_target(question.pictures[1], told["source_caption"]).item)

    def _compare(self, question: Question, told: Any) -> dict[str, Any]:
        one = self.world.with_target(question.pictures[1], told["source_caption"]).item
        found = _judged(one.target, one.source, question.pictures[0].sha256, str(question.pictures[0].path))
        marks = {"identity": found.preservation, "plausible_before": found.success, "quality": round(found.quality, 2)}
        return {**marks, "why": "It was read from the pixels."}

    def _seen(self, picture: Shown, description: str) -> Assessment:
        one = self.world.described(description).item
        return _assessed(one, picture.sha256, str(picture.path))


@lru_cache(maxsize=4096)
def _assessed(one: Item, sha256: str, path: str) -> Assessment:
    return assess_picture(one.source, one.target, pixels_of(Path(path)), one.language)


@lru_cache(maxsize=4096)
def _judged(before: Scene, after: Scene, sha256: str, path: str) -> Judgement:
    return judge(before, after, pixels_of(Path(path)))


def rewritten(one: Item) -> dict[str, Any]:
    """The answer to Reason50K's rewriting question: the words of the item, both captions, and what changes."""
    nouns = tables(one.language).NOUNS
    looks = [one.source.look(cell) or one.target.look(cell) for cell in CELLS if one.source.look(cell) != one.target.look(cell)]
    objects = [nouns[look.kind][0] for look in looks] or [background_name(one.source.background, one.language)]
    before, after = (caption(scene, one.language) for scene in (one.source, one.target))
    told = {"instruction": one.instruction, "source_caption": before, "target_caption": after}
    return {**told, "objects": list(dict.fromkeys(objects))}


def pixels_of(path: Path) -> np.ndarray:
    """A picture file as (H, W, 3), uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class PlantedEditor:
    """Edits drawn scenes, often wrongly: a source by one of the planted faults, a result by what its repair asks for.

    Of repairs one in six is not carried out, so that the loop has something to refuse. What it is not able to follow it leaves
    as it is.
    """

    def __init__(self, world: World, name: str = "planted") -> None:
        self.world, self.name = world, name

    def edit(self, picture: Shown, instruction: str, seed: int) -> tuple[bytes, tuple[int, int]]:
        """(PNG, (width, height))."""
        dice = Dice("planted", self.name, picture.sha256, instruction, seed)
        try:
            made = self._first(self.world.of(picture, instruction).item, dice)
        except Refused:
            made = self._second(pixels_of(picture.path), instruction, dice)
        pixels = render(made, self.world.size) if isinstance(made, Scene) else made
        return encode_png(pixels), (pixels.shape[1], pixels.shape[0])

    def _first(self, one: Item, dice: Dice) -> Scene | np.ndarray:
        kind = dice.below(10)
        if kind == 0:
            return spoiled(one.target, dice.below(1 << 30), self.world.size)
        if kind == 1:
            return plant(one, dice.below(1 << 30), "unrelated").shown
        fault = None if kind < 6 else plant(one, dice.below(1 << 30))
        return fault.shown if fault else one.target

    def _second(self, pixels: np.ndarray, instruction: str, dice: Dice) -> Scene | np.ndarray:
        shown = read(pixels).scene
        for known in self.world.known:
            edits = edits_between(shown, known.item.target)
            if edits and together(canonical(edits, shown, known.item.language), known.item.language) == instruction:
                return pixels if dice.below(6) == 0 else apply(shown, edits)
        return pixels


class PlantedPainter:
    """Paints drawn scenes: a target out of its description, at the first try now and then without the effect; candidates for
    the source, of which one in three is right, and the others are the target itself, spoiled, or another scene."""

    def __init__(self, world: World, name: str = "drawn") -> None:
        self.world, self.name = world, name

    def paint(
        self, prompt: str, seed: int, size: tuple[int, int] | None = None, like: Shown | None = None
    ) -> tuple[bytes, tuple[int, int]]:
        """(PNG, (width, height))."""
        dice = Dice("painted", self.name, prompt, like.sha256 if like else "", seed)
        if like is None:
            one = self.world.described(prompt).item
            made: Scene | np.ndarray = one.source if seed == 0 and dice.below(4) == 0 else one.target
        else:
            one = self.world.with_target(like, prompt).item
            kind = dice.below(6)
            if kind < 2:
                made = one.source
            elif kind == 2:
                made = one.target
            elif kind == 3:
                made = spoiled(one.source, dice.below(1 << 30), self.world.size)
            else:
                made = item(dice.below(1 << 30), "concrete", "train").source
        pixels = render(made, self.world.size) if isinstance(made, Scene) else made
        return encode_png(pixels), (pixels.shape[1], pixels.shape[0])
