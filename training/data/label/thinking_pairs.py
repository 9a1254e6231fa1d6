"""Thinking Pairs: what somebody says, and what is to be painted.

classify -> an abstract instruction is taken apart into steps; a clear one gets an abstract layer, under which it is itself the
answer, or stays as it is, so that the reasoner learns to leave such ones alone -> verify -> deduplicate -> split by picture.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ....reasonedit_core.errors import ConfigError
from .annotators import Annotator
from .journal import Entry
from .output import Draft, Harvest, head, picture_entry, share_of
from .pace import Rejected
from .prompts import load_prompts
from .runner import Runner
from .seeds import Seed

PROMPTS = "thinking_pairs"

CHECKS = ("faithful", "executable", "nothing_added", "visible")


@dataclass(frozen=True, slots=True)
class Options:
    """keep_clear: share of the clear instructions that stay as they are (the paper keeps 50k beside 88k); held_out: share of
    the pictures whose records are for validation."""

    keep_clear: float = 0.36
    held_out: float = 0.02

    def __post_init__(self) -> None:
        for name in ("keep_clear", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share from 0 to 1, found {getattr(self, name)}. Correct it.")


@dataclass(frozen=True, slots=True)
class ThinkingPairs:
    """The pipeline. annotator labels, verifier checks its labels; out: folder of the records."""

    runner: Runner
    annotator: Annotator
    verifier: Annotator
    out: Path
    options: Options = Options()

    async def label(self, seed: Seed) -> Draft:
        """The draft of one seed. Raises Rejected."""
        prompts, source = load_prompts(PROMPTS), seed.picture("input")

        async def ask(step: str, who: Annotator, **inputs: str):
            return await self.runner.ask(seed.id, prompts[step], inputs, [source], who)

        sorted_, entry = await ask("classify", self.annotator, instruction=seed.raw)
        entries: list[Entry] = [entry]
        raw, clarity, steps = seed.raw, sorted_.clarity, [seed.raw]
        if clarity == "abstract":
            made, entry = await ask("simplify", self.annotator, instruction=seed.raw)
            entries.append(entry)
            steps = list(made.steps)
        elif share_of("keep", source.sha256, seed.raw) >= self.options.keep_clear:
            made, entry = await ask("abstract", self.annotator, instruction=seed.raw)
            entries.append(entry)
            if made.instruction is not None:
                raw, clarity = made.instruction, "abstract"
        if clarity == "abstract" and plain(raw) == plain(" ".join(steps)):
            raise Rejected("label", "unchanged", f"called abstract and left as it is: {raw[:200]}")
        checked, entry = await ask("verify", self.verifier, instruction=raw, steps="\n".join(steps))
        wrong = [name for name in CHECKS if not getattr(checked, name)]
        if wrong:
            raise Rejected("verify", f"not-{wrong[0].replace('_', '-')}", checked.why)
        entries.append(entry)
        images = {"input": picture_entry(source, self.out)}
        if seed.record.images.target is not None:  # the same edit, whatever the words
            images["target"] = picture_entry(seed.picture("target"), self.out)
        given = seed.record.instruction.category if seed.record.instruction else None
        told = {"raw": raw, "class": clarity, "lang": seed.lang, "category": given or sorted_.category}
        license = {"license": seed.record.license} if seed.record.license else {}
        return head(
            "think",
            f"pair-{hashlib.sha256(f'{source.sha256} {raw}'.encode()).hexdigest()[:20]}",
            seed.record.origin or seed.id,
            entries,
            images=images,
            instruction=told,
            think={"steps": steps},
            split=split_of(seed, source.sha256, self.options.held_out),
            **license,
        )

    def gather(self, seeds: Sequence[Seed], found: Sequence[Draft | Rejected]) -> Harvest:
        """The drafts without those whose instruction and picture came before."""
        harvest, first = Harvest(), {}
        for seed, draft in zip(seeds, found, strict=True):
            if isinstance(draft, Rejected):
                harvest.rejects.append((seed.id, draft))
                continue
            same = (plain(draft["instruction"]["raw"]), draft["images"]["input"]["sha256"])
            if same in first:
                harvest.reject(seed.id, "deduplicate", "duplicate", f"the same words and picture as {first[same]}")
                continue
            first[same] = seed.id
            harvest.drafts.append(draft)
        return harvest


def plain(text: str) -> str:
    """Text as far as it counts for being the same: no case, no marks, no extra blanks, one form of each character."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char if char.isalnum() else " " for char in text).split())


def split_of(seed: Seed, sha256: str, held_out: float) -> str:
    """The split of all records of a picture. It follows from the picture alone, so that data that are added later move none;
    what was held out before stays so."""
    return "held_out" if seed.record.split == "held_out" or share_of("split", sha256) < held_out else "train"
