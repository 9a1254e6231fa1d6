"""Reflection Triples: a picture, what an editor made of it, what is to be said of that, and the picture that should be.

describe the target -> generate, by several editors and seeds, with planted negatives among them -> score the result alone ->
decide -> a second instruction is kept only if following it raises the score -> a second judge must come to the same verdict
-> balance. The audit stands before the balance, because it takes more of one verdict than of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....reasonedit_core.dialogue.replies import cap_score
from ....reasonedit_core.errors import ConfigError
from ..records import VERDICTS
from .annotators import Annotator, Shown
from .editors import Editor
from .journal import Entry
from .output import Draft, Harvest, head, keep_picture, picture_entry, provenance, share_of
from .pace import Rejected
from .prompts import load_prompts
from .replies import Scored
from .runner import Runner
from .seeds import Seed
from .thinking_pairs import split_of

PROMPTS = "reflection_triples"
EDIT = "edit@1"
"""Version of how editors are called, in the place of a prompt's."""

NEGATIVES = ("identity", "wrong")
"""What every reflector must fail: the source itself, and another seed's picture."""


@dataclass(frozen=True, slots=True)
class Options:
    """edits: per seed and editor; negatives: share of the seeds that get a planted one; success_at: least score of a success;
    failed_at: most of a failure; gain: by which a second instruction must raise the score; ratio: success, reflection, failed
    in what is written, None for all; held_out: as for Thinking Pairs."""

    edits: int = 2
    negatives: float = 0.5
    success_at: float = 8.0
    failed_at: float = 7.0
    gain: float = 1.0
    ratio: tuple[int, int, int] | None = (3, 1, 1)
    held_out: float = 0.02

    def __post_init__(self) -> None:
        if self.edits < 1:
            raise ConfigError(f"edits: expected at least 1 per seed and editor, found {self.edits}. Correct it.")
        for name, most in {"negatives": 1, "held_out": 1, "success_at": 10, "failed_at": 10, "gain": 10}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected a number from 0 to {most}, found {getattr(self, name)}. Correct it.")
        if self.ratio is not None and (min(self.ratio) < 0 or max(self.ratio) < 1):
            raise ConfigError(f"ratio: expected three whole numbers such as 3, 1, 1, found {self.ratio}. Correct it.")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One picture that is made of a seed. editor: None for a planted negative, whose kind is `negative`; number: the editor's
    seed; other: whose picture a `wrong` one is."""

    seed: Seed
    number: int = 0
    editor: Editor | None = None
    negative: str | None = None
    other: Seed | None = None

    @property
    def id(self) -> str:
        """Names the attempt among all."""
        return f"{self.seed.id}~{self.negative or f'{self.editor.name}~{self.number}'}"


def attempts(seeds: Sequence[Seed], editors: Sequence[Editor], options: Options) -> list[Attempt]:
    """All that is made of the seeds, in order. ConfigError without an editor, and for two of one name."""
    names = [editor.name for editor in editors]
    if not names or len(set(names)) < len(names):
        found = ", ".join(names) or "none"
        raise ConfigError(f"expected editors with names of their own, found {found}. Name at least one, and each once.")
    made: list[Attempt] = []
    for place, seed in enumerate(seeds):
        made += [Attempt(seed, number, editor) for editor in editors for number in range(options.edits)]
        if share_of("negative", seed.id) < options.negatives:
            kind = NEGATIVES[int(share_of("kind", seed.id) * len(NEGATIVES))]
            other = _other(seeds, place) if kind == "wrong" else None
            made.append(Attempt(seed, negative=kind if kind == "identity" or other else "identity", other=other))
    return made


def _other(seeds: Sequence[Seed], place: int) -> Seed | None:
    """A later seed that shows another picture, the first ones after the last."""
    own = seeds[place].record
    order = (each for each in (*seeds[place + 1 :], *seeds[:place]) if each.record.split == own.split)
    return next((each for each in order if each.record.images.input != own.images.input), None)


@dataclass(frozen=True, slots=True)
class ReflectionTriples:
    """The pipeline. judge: the second one, None for no audit; out: folder of the records."""

    runner: Runner
    annotator: Annotator
    judge: Annotator | None
    out: Path
    options: Options = Options()

    async def label(self, attempt: Attempt) -> Draft:
        """The draft of one attempt. Raises Rejected."""
        seed, source = attempt.seed, attempt.seed.picture("input")
        split = split_of(seed, source.sha256, self.options.held_out)
        description, described = await self._ask(attempt, "describe", [source], instruction=seed.goal)
        target = description.description
        generated, made = await self._generate(attempt, source, split)
        scored, score, entry = await self._score(attempt, generated, target)
        told = {"instruction": seed.goal, "description": target, "score": f"{score:g}", "remark": scored.reason}
        decided, decision = await self._ask(attempt, "decide", [generated], **told)
        steps = [provenance(described), made, provenance(entry), provenance(decision)]
        self._compare(attempt, decided.verdict, score)
        wanted = seed.picture("target") if seed.record.images.target is not None else None
        if decided.verdict == "reflection":
            better, more = await self._better(attempt, generated, decided.second_instruction, target, score)
            wanted = wanted or better
            steps += more
        if self.judge is not None:
            told = {"instruction": seed.goal, "description": target}
            audited, entry = await self._ask(attempt, "audit", [source, generated], self.judge, **told)
            if audited.verdict != decided.verdict:
                raise Rejected("audit", "disagrees", f"{decided.verdict}, but {audited.verdict}: {audited.why}")
            steps.append(provenance(entry))
        reflect = {
            "target_description": target,
            "scores": {"consistency": score},
            "findings": {**scored.model_dump(exclude={"raw_score", "reason"}), "reason": scored.reason},
            "reason": decided.reason,
            "verdict": decided.verdict,
            **({"second_instruction": decided.second_instruction} if decided.second_instruction else {}),
        }
        images = {"input": source, "generated": generated, **({"target": wanted} if wanted else {})}
        name = hashlib.sha256(f"{source.sha256} {generated.sha256} {seed.goal}".encode()).hexdigest()[:20]
        clarity = seed.record.instruction.clarity if seed.record.instruction else None
        category = seed.record.instruction.category if seed.record.instruction else None
        asked = {"raw": seed.raw, "lang": seed.lang, "class": clarity, "category": category}
        draft = head("reflect", f"triple-{name}", seed.record.origin or seed.id, [], split=split)
        draft |= {"provenance": steps, "reflect": reflect}
        draft["images"] = {key: picture_entry(picture, self.out) for key, picture in images.items()}
        draft["instruction"] = {key: value for key, value in asked.items() if value is not None}
        if seed.goal != seed.raw:  # the thought that the result is judged against
            steps_of = seed.record.think.steps if seed.record.think else (seed.goal,)
            draft["think"] = {"steps": list(steps_of), "text": seed.goal}
        if seed.record.license:
            draft["license"] = seed.record.license
        return draft

    def gather(self, items: Sequence[Attempt], found: Sequence[Draft | Rejected]) -> Harvest:
        """The drafts, each result once, in the wanted ratio."""
        harvest, first, sound = Harvest(), {}, []
        for attempt, draft in zip(items, found, strict=True):
            if isinstance(draft, Rejected):
                harvest.rejects.append((attempt.id, draft))
            elif draft["id"] in first:
                harvest.reject(attempt.id, "deduplicate", "duplicate", f"the same picture as {first[draft['id']]}")
            else:
                first[draft["id"]] = attempt.id
                sound.append(draft)
        kept = balanced(sound, self.options.ratio)
        for draft in sound:
            if draft["id"] in kept:
                harvest.drafts.append(draft)
            else:
                verdict = draft["reflect"]["verdict"]
                harvest.reject(first[draft["id"]], "balance", "surplus", f"more of {verdict} than the ratio has room for")
        return harvest

    # ---- the parts ---------------------------------------------------------------------------------------------------

    async def _ask(
        self, attempt: Attempt, step: str, pictures: Sequence[Shown], who: Annotator | None = None, **inputs: str
    ) -> tuple[Any, Entry]:
        prompt = load_prompts(PROMPTS)[step]
        return await self.runner.ask(attempt.id, prompt, inputs, pictures, who or self.annotator)

    async def _score(self, attempt: Attempt, picture: Shown, description: str) -> tuple[Scored, float, Entry]:
        """The findings, and the score after the caps that findings put on it."""
        scored, entry = await self._ask(attempt, "score", [picture], description=description)
        score, _ = cap_score(scored.raw_score, scored.meets_instruction, scored.major_conflicts, scored.omissions)
        return scored, score, entry

    async def _generate(self, attempt: Attempt, source: Shown, split: str) -> tuple[Shown, Draft]:
        """The picture that is to be judged, and how it came about."""
        if attempt.editor is not None:
            made, entry = await self._edit(attempt, "generate", source, attempt.seed.goal)
            return made, provenance(entry)
        picture = source if attempt.other is None else attempt.other.picture("input")
        if attempt.other is not None:
            if picture.sha256 == source.sha256:
                raise Rejected("generate", "same-picture", f"{attempt.other.id} shows the same picture")
            if split_of(attempt.other, picture.sha256, self.options.held_out) != split:
                raise Rejected("generate", "other-split", f"the picture of {attempt.other.id} is of the other split")
        return picture, {"step": "generate", "note": f"planted: {attempt.negative}", "accepted": True}

    async def _edit(self, attempt: Attempt, step: str, picture: Shown, instruction: str) -> tuple[Shown, Entry]:
        editor, number = attempt.editor, attempt.number

        def work() -> dict[str, Any]:
            made = keep_picture(*editor.edit(picture, instruction, number), self.out)
            path = made.path.relative_to(self.out).as_posix()
            return {"path": path, "sha256": made.sha256, "size": list(made.size)}

        def holds(entry: Entry) -> bool:
            return (self.out / entry.value["path"]).is_file()

        told = {"instruction": instruction}
        entry = await self.runner.do(attempt.id, step, EDIT, editor.name, told, [picture], work, seed=number, holds=holds)
        value = entry.value
        return Shown(self.out / value["path"], value["sha256"], tuple(value["size"])), entry

    def _compare(self, attempt: Attempt, verdict: str, score: float) -> None:
        """A verdict that goes neither with the score nor with what is known is no label."""
        if attempt.negative is not None and verdict != "failed":
            raise Rejected("decide", "negative-not-caught", f"the {attempt.negative} picture was called a {verdict}")
        if verdict == "success" and score < self.options.success_at:
            raise Rejected("decide", "score-disagrees", f"a success with {score:g}, under {self.options.success_at:g}")
        if verdict == "failed" and score > self.options.failed_at:
            raise Rejected("decide", "score-disagrees", f"a failure with {score:g}, over {self.options.failed_at:g}")

    async def _better(
        self, attempt: Attempt, generated: Shown, second: str, description: str, score: float
    ) -> tuple[Shown, list[Draft]]:
        """The picture that the second instruction leads to. Rejected where it is not better by the gain."""
        redone, edited = await self._edit(attempt, "re-edit", generated, second)
        if redone.sha256 == generated.sha256:
            raise Rejected("re-edit", "unchanged", second)
        _, after, entry = await self._score(attempt, redone, description)
        if after < score + self.options.gain:
            raise Rejected("re-edit", "no-better", f"{score:g} before, {after:g} after: {second}")
        return redone, [provenance(edited), {**provenance(entry), "note": "of the picture edited again", "score": after}]


def balanced(drafts: Sequence[Draft], ratio: tuple[int, int, int] | None) -> frozenset[str]:
    """Ids of as many drafts as stand in the ratio (success, reflection, failed), chosen by hash; all of them without one."""
    if ratio is None:
        return frozenset(draft["id"] for draft in drafts)
    by = {verdict: [draft["id"] for draft in drafts if draft["reflect"]["verdict"] == verdict] for verdict in VERDICTS}
    times = min(len(by[verdict]) // part for verdict, part in zip(VERDICTS, ratio, strict=True) if part)
    kept: list[str] = []
    for verdict, part in zip(VERDICTS, ratio, strict=True):
        kept += sorted(by[verdict], key=lambda name: share_of("balance", name))[: times * part]
    return frozenset(kept)
