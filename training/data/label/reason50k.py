"""Reason50K: a hypothetical question about a picture, and the picture that answers it. Made backwards, from the answer.

seeds -> a picture after, painted and graded -> the question, both captions and the objects, with a check that the question
does not give the outcome away -> candidates for the picture before, led by the one after -> measured, gated, judged, ranked
-> the best become records -> split. EditWorld's pairs come in at the question, with their own picture before as the only
candidate.

Source: the ReasonBrain paper, appendix D; what it leaves open (gates, how scores are joined, N) is decided here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....reasonedit_core.errors import ConfigError, DataError
from ..pictures import PictureFault
from ..records import FILE_NAME, SCENARIOS, guess_language, read_records
from .annotators import Annotator, Shown, shown
from .candidates import MEASURE, Gates, Measures, Numbers, best, is_near, standardised
from .editworld import EditWorldPair
from .journal import Entry
from .objects import joined
from .output import Draft, Harvest, head, keep_picture, picture_entry, provenance, share_of
from .pace import Rejected
from .painters import Painter
from .prompts import load_prompts
from .replies import Rewritten
from .runner import Runner

if TYPE_CHECKING:
    from ....reasonedit_core.interfaces import ObjectExtractor

PROMPTS = "reason50k"
PAINT = "paint@1"
"""Version of how painters are called, in the place of a prompt's."""

GATE = "gate"
"""Step of the rejections by a gate."""

STORY = "story"
"""Category of all that comes from EditWorld, as in the paper."""


@dataclass(frozen=True, slots=True)
class Idea:
    """A seed, by PhyBench's procedure. category: one of SCENARIOS; scenario: what it is about; law: what the world does;
    scene: a place in which it has done so."""

    id: str
    category: str
    scenario: str
    law: str
    scene: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One picture after that is to be. number: 0 for the idea's own scene, from 1 on for one that the annotator thinks of."""

    idea: Idea
    number: int = 0

    @property
    def id(self) -> str:
        """Names the plan among all."""
        return f"{self.idea.id}~{self.number}" if self.number else self.idea.id


@dataclass(frozen=True, slots=True)
class Options:
    """How the pipeline decides.

    tries: pictures after that are painted of a scene until one is good enough; grade: marks of 5 that this takes (bad ones cost
    the paper's model the most); candidates: pictures before of each; top: of them that become records; held_out: records per
    category for validation, or a tenth (share) of a category's where that is less; scenes: thought of beside each seed's own.
    """

    tries: int = 2
    grade: int = 4
    candidates: int = 8
    top: int = 1
    gates: Gates = field(default_factory=Gates)
    held_out: int = 400
    share: float = 0.1
    scenes: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("tries", 1, 100), ("grade", 0, 5), ("candidates", 1, 1000), ("top", 1, 1000)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected {least} to {most}, found {getattr(self, name)}. Correct it.")
        if self.held_out < 0 or not 0 <= self.share <= 1 or self.scenes < 0:
            raise ConfigError(
                f"expected a count of records held out, a share from 0 to 1 and a count of scenes, found {self.held_out}, "
                f"{self.share}, {self.scenes}. Correct them."
            )


def read_ideas(path: Path, limit: int | None = None) -> list[Idea]:
    """Seeds, one JSON object a line with id, category, scenario, law and scene; `limit` at most.

    DataError for a line without one of these, a category that is none, an id twice, and for a file without any.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: expected a JSONL file of seeds, found none ({error.strerror}). Check the path.") from error
    ideas: dict[str, Idea] = {}
    names = ("id", "category", "scenario", "law", "scene")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            idea = Idea(**{name: told[name] for name in names})
            if not all(isinstance(told[name], str) and told[name].strip() for name in names) or idea.id in ideas:
                raise ValueError(f"the id {idea.id} twice" if idea.id in ideas else "a value that is no text")
            if idea.category not in SCENARIOS:
                raise ValueError(f"category {idea.category!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: expected a seed with {', '.join(names)}, category one of {', '.join(SCENARIOS)}, found "
                f"{line[:80]!r} ({error}). Correct the line."
            ) from error
        ideas[idea.id] = idea
    if not ideas:
        raise DataError(f"{path}: expected seeds, one JSON object a line, found none. Check the path.")
    return list(ideas.values())[:limit]


def plans(ideas: Sequence[Idea], pairs: Sequence[EditWorldPair], options: Options) -> list[Plan | EditWorldPair]:
    """All items, in order. ConfigError where there are none."""
    made: list[Plan | EditWorldPair] = [Plan(idea, number) for idea in ideas for number in range(1 + options.scenes)]
    if not made and not pairs:
        raise ConfigError("expected seeds or EditWorld's pairs, found neither. Name one of them.")
    return [*made, *pairs]


def item_id(item: Plan | EditWorldPair) -> str:
    """Names an item among all."""
    return item.id if isinstance(item, Plan) else f"editworld~{item.name}"


@dataclass(frozen=True, slots=True)
class _Case:
    """What candidates are ranked for. item, seed: names for the journal and the record; steps: how target and words came about;
    told, origin: of the record (initial_instruction, origin)."""

    item: str
    seed: str
    category: str
    target: Shown
    written: Rewritten
    objects: Sequence[str]
    steps: Sequence[Draft]
    told: str
    origin: str


LOST = ("refused", "malformed", "cannot-be-measured")
"""Rejections that cost a candidate and not its item; others, such as no answer, are no fault of the candidate's."""


@dataclass(frozen=True, slots=True)
class Reason50KPairs:
    """The pipeline. annotator: thinks of scenes and writes; judge: grades and compares; painter: of the pictures after, and
    before: of the candidates, None where only EditWorld's pairs are taken in; out: folder of the records."""

    runner: Runner
    annotator: Annotator
    judge: Annotator
    painter: Painter | None
    before: Painter | None
    out: Path
    measures: Measures = Measures()
    extractor: ObjectExtractor | None = None
    options: Options = field(default_factory=Options)

    async def label(self, item: Plan | EditWorldPair) -> list[Draft]:
        """The drafts of one item, the best candidate first. Raises Rejected."""
        return await (self._inverse(item) if isinstance(item, Plan) else self._taken(item))

    async def _inverse(self, plan: Plan) -> list[Draft]:
        idea, steps = plan.idea, []
        scene = idea.scene
        if plan.number:
            told = {name: getattr(idea, name) for name in ("category", "scenario", "law", "scene")}
            found, entry = await self._ask(plan.id, "expand", (), self.annotator, **told, number=str(plan.number))
            scene = found.scene
            steps.append(provenance(entry))
        target, made = await self._target(plan, scene)
        told = {"category": idea.category, "law": idea.law, "scene": scene}
        written, entry = await self._ask(plan.id, "rewrite", [target], self.annotator, **told)
        objects = joined(written.objects, self.extractor, written.source_caption)
        prompt = f"{written.source_caption} {', '.join(objects)}"
        seeds = range(self.options.candidates)
        candidates = [await self._paint(plan.id, "source", self.before, prompt, seed, target) for seed in seeds]
        steps += [*made, provenance(entry)]
        case = _Case(plan.id, idea.id, idea.category, target, written, objects, steps, scene, "inverse")
        return await self._ranked(case, candidates)

    async def _taken(self, pair: EditWorldPair) -> list[Draft]:
        name = item_id(pair)
        try:
            before, after = shown(pair.before), shown(pair.after)
        except PictureFault as fault:
            raise Rejected("seed", fault.code, fault.found) from None
        if before.size != after.size:
            raise Rejected("seed", "aspect", f"pictures of {before.size} and {after.size} pixels")
        told = {key: getattr(pair, key) for key in ("instruction", "source_caption", "target_caption")}
        written, entry = await self._ask(name, "rewrite_pair", [before, after], self.annotator, **told)
        objects = joined(written.objects, self.extractor, written.source_caption)
        steps = [provenance(entry)]
        case = _Case(name, name, STORY, after, written, objects, steps, pair.instruction, "editworld")
        return await self._ranked(case, [(before, None)])

    # ---- the parts ---------------------------------------------------------------------------------------------------

    async def _ask(self, item: str, step: str, pictures: Sequence[Shown], who: Annotator, **inputs: str) -> tuple[Any, Entry]:
        return await self.runner.ask(item, load_prompts(PROMPTS)[step], inputs, pictures, who)

    async def _target(self, plan: Plan, scene: str) -> tuple[Shown, list[Draft]]:
        """The first painted picture after that is good enough, and how it came about."""
        best_of, least = (-1, ""), self.options.grade
        for number in range(self.options.tries):
            target, made = await self._paint(plan.id, "target", self.painter, scene, number, None)
            graded, entry = await self._ask(plan.id, "grade", [target], self.judge, scene=scene, law=plan.idea.law)
            total = graded.scene + graded.law
            if total >= least:
                return target, [provenance(made), {**provenance(entry), "score": float(total)}]
            best_of = max(best_of, (total, graded.why))
        raise Rejected("grade", "target-too-bad", f"{best_of[0]} of 5 at best, under {least}: {best_of[1]}")

    async def _paint(
        self, item: str, step: str, painter: Painter | None, prompt: str, seed: int, like: Shown | None
    ) -> tuple[Shown, Entry]:
        assert painter is not None, "plans are made of seeds only where there is a painter"

        def work() -> dict[str, Any]:
            kept = keep_picture(*painter.paint(prompt, seed, None if like is None else like.size, like), self.out)
            return {"path": kept.path.relative_to(self.out).as_posix(), "sha256": kept.sha256, "size": list(kept.size)}

        def holds(entry: Entry) -> bool:
            return (self.out / entry.value["path"]).is_file()

        pictures = [] if like is None else [like]
        entry = await self.runner.do(
            item, step, PAINT, painter.name, {"prompt": prompt}, pictures, work, seed=seed, holds=holds
        )
        value = entry.value
        return Shown(self.out / value["path"], value["sha256"], tuple(value["size"])), entry

    async def _ranked(self, case: _Case, candidates: Sequence[tuple[Shown, Entry | None]]) -> list[Draft]:
        """Drafts of the best candidates that pass every gate. Rejected where none does, with what they failed."""
        lost: Counter[str] = Counter()
        passed: list[tuple[Shown, Numbers, list[Draft]]] = []
        hashes: dict[str, str] = {}
        for picture, painted in candidates:
            made = [] if painted is None else [provenance(painted)]
            try:
                numbers, steps = await self._numbers(case, picture, hashes)
            except Rejected as rejected:
                if rejected.step != GATE and rejected.reason not in LOST:
                    raise
                lost[rejected.reason] += 1
            else:
                passed.append((picture, numbers, [*case.steps, *made, *steps]))
        if not passed:
            told = ", ".join(f"{name} {count}" for name, count in lost.most_common())
            raise Rejected(GATE, lost.most_common(1)[0][0], f"of {len(candidates)} candidates: {told}")
        scores, counted = standardised([numbers for _, numbers, _ in passed])
        drafts = []
        for at in best([picture for picture, *_ in passed], scores, self.options.top):
            picture, numbers, steps = passed[at]
            drafts.append(self._draft(case, picture, {**numbers, "z": round(scores[at], 6)}, counted, steps))
        return drafts

    async def _numbers(self, case: _Case, picture: Shown, hashes: dict[str, str]) -> tuple[Numbers, list[Draft]]:
        """All that is known of a candidate, and how. Rejected at the first gate that it fails, the judge's marks last, because
        they cost the most. hashes: difference hashes by content of those that came before; its own is added."""
        gates, written = self.options.gates, case.written
        captions = {"source_caption": written.source_caption, "target_caption": written.target_caption}

        def work() -> dict[str, Any]:
            try:
                return self.measures.of(picture.path, case.target.path, *captions.values())
            except DataError as error:  # too small to be measured, or no picture: this pair's fault, not the run's
                raise Rejected("measure", "cannot-be-measured", str(error)[:500]) from None

        pictures = [picture, case.target]
        entry = await self.runner.do(case.item, "measure", MEASURE, self.measures.name, captions, pictures, work)
        numbers = dict(entry.value)
        hash_ = numbers.pop("dhash")
        twice = picture.sha256 in hashes or is_near(hash_, list(hashes.values()), gates.near)
        fault = gates.fault(numbers) or ("near-duplicate" if twice else None)
        if fault is None:
            hashes[picture.sha256] = hash_
            asked = {**captions, "instruction": written.instruction}
            marks, judged = await self._ask(case.item, "compare", pictures, self.judge, **asked)
            numbers |= {name: getattr(marks, name) for name in ("identity", "plausible_before", "quality")}
            fault = gates.marked_down(numbers)
        if fault is not None:
            raise Rejected(GATE, fault)
        return numbers, [provenance(entry), provenance(judged)]

    def _draft(self, case: _Case, picture: Shown, numbers: Numbers, counted: Sequence[str], steps: Sequence[Draft]) -> Draft:
        written, category = case.written, case.category
        name = hashlib.sha256(f"{picture.sha256} {case.target.sha256} {written.instruction}".encode()).hexdigest()[:20]
        draft = head("hypothetical", f"r50k-{category[:4]}-{name}", case.seed, [])
        draft["provenance"] = list(steps)
        draft["images"] = {"input": picture_entry(picture, self.out), "target": picture_entry(case.target, self.out)}
        words = {"raw": written.instruction, "class": "abstract", "lang": guess_language(written.instruction)}
        draft["instruction"] = {**words, "category": category}
        draft["reason50k"] = {
            "scenario": category,
            "hypothetical": written.instruction,
            "objects": list(case.objects),
            "source_caption": written.source_caption,
            "target_caption": written.target_caption,
            "initial_instruction": case.told,
            "origin": case.origin,
            "scores": dict(numbers),
            "scorers": list(counted),
        }
        return draft

    # ---- all together ------------------------------------------------------------------------------------------------

    def gather(self, items: Sequence[Plan | EditWorldPair], found: Sequence[list[Draft] | Rejected]) -> Harvest:
        """The drafts, each pair once and no picture before with two pictures after, split by the picture after.

        Several targets for one source cost the paper's model most of what it had learnt (its Table A10); several sources for
        one target may be.
        """
        harvest, pairs, sources = Harvest(), {}, {}
        for item, drafts in zip(items, found, strict=True):
            if isinstance(drafts, Rejected):
                harvest.rejects.append((item_id(item), drafts))
                continue
            for draft in drafts:
                source, target = (draft["images"][name]["sha256"] for name in ("input", "target"))
                if (source, target) in pairs:
                    told = f"the same pictures as {pairs[source, target]}"
                    harvest.reject(item_id(item), "deduplicate", "duplicate", told)
                elif sources.setdefault(source, target) != target:
                    harvest.reject(item_id(item), "deduplicate", "source-twice", "its picture before has another one after it")
                else:
                    pairs[source, target] = draft["id"]
                    harvest.drafts.append(draft)
        held = held_out_of(harvest.drafts, self.options, self._held_before())
        for draft in harvest.drafts:
            draft["split"] = "held_out" if draft["images"]["target"]["sha256"] in held else "train"
        return harvest

    def _held_before(self) -> frozenset[str]:
        """Targets that the last run held out: what was for validation once is never trained on."""
        path = self.out / FILE_NAME
        if not path.is_file() or not path.stat().st_size:  # a run may have come to no record at all
            return frozenset()
        records = read_records(path, splits=("held_out",))
        return frozenset(record.images.target.sha256 for record in records)


def held_out_of(drafts: Sequence[Draft], options: Options, before: frozenset[str] = frozenset()) -> frozenset[str]:
    """sha256 of the targets whose records are for validation: per category `held_out` records, or `share` of them where that
    is less; those of `before` first, then by hash. All records of a target go the same way."""
    held: set[str] = set()
    for category in SCENARIOS:
        sizes = Counter(draft["images"]["target"]["sha256"] for draft in drafts if draft["reason50k"]["scenario"] == category)
        room = min(options.held_out, int(options.share * sizes.total()))
        count = 0
        for target in sorted(sizes, key=lambda sha: (sha not in before, share_of("reason50k", sha))):
            if target in before or count + sizes[target] <= room:
                held.add(target)
                count += sizes[target]
    return frozenset(held)
