"""Saved runs and what the artist said of them -> records, so that the loop teaches the next LoRA. No model is asked.

accept: the thought was good (think), the edit is a pair (edit), the verdict is success (reflect). reject: failed. correct: a
reflection with the artist's instruction; the round that was accepted after it is its target. What a record would need and
neither the trace nor the artist says is not made up: that record is left out, and the reason noted.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ....reasonedit_core.dialogue.replies import parse_thought
from ....reasonedit_core.errors import ConfigError, DataError, MalformedReply
from ..records import guess_language
from .annotators import Shown
from .journal import Entry
from .output import Draft, Harvest, head, keep_picture, picture_entry, share_of
from .pace import Rejected
from .runner import Runner
from .traces import RoundFeedback, SavedRound, read_feedback, read_trace, trace_files

VERSION = "trace@1"
"""What is made of a trace, in the place of a prompt's version."""

WORKER = "from-traces"
VERDICTS = {"accept": "success", "reject": "failed", "correct": "reflection"}
_DECISIONS = {"success": "success", "refine": "reflection", "failed": "failed"}

LEAST_SUCCESS, MOST_FAILED = 5.0, 7.0
"""Scores that `check` takes for going with a verdict."""


@dataclass(frozen=True, slots=True)
class Options:
    """held_out: share of the sources whose records are for validation; license: noted in every record."""

    held_out: float = 0.02
    license: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out <= 1:
            raise ConfigError(f"held_out: expected a share from 0 to 1, found {self.held_out}. Correct it.")


@dataclass(slots=True)
class Made:
    """What became of one trace: drafts, and (part, reason, note) of what could not be made."""

    drafts: list[Draft] = field(default_factory=list)
    missing: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FromTraces:
    """The pipeline. out: folder of the records."""

    runner: Runner
    out: Path
    options: Options = Options()

    async def label(self, trace: Path) -> Made:
        """What becomes of one run. Rejected where it cannot be read or nothing was said of it."""
        files = trace_files(trace)
        told = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        entry = await self.runner.do(
            str(trace), "read", VERSION, WORKER, told, [], lambda: self._read(trace), holds=self._holds
        )
        return _drafts(entry, self.out, self.options)

    def gather(self, items: Sequence[Path], found: Sequence[Made | Rejected]) -> Harvest:
        """The drafts, each once."""
        harvest, seen = Harvest(), set()
        for trace, made in zip(items, found, strict=True):
            if isinstance(made, Rejected):
                harvest.rejects.append((str(trace), made))
                continue
            for part, reason, note in made.missing:
                harvest.reject(f"{trace}~{part}", "make", reason, note)
            for draft in made.drafts:
                if draft["id"] in seen:
                    harvest.reject(f"{trace}~{draft['id']}", "deduplicate", "duplicate", "the same words and pictures before")
                else:
                    seen.add(draft["id"])
                    harvest.drafts.append(draft)
        return harvest

    def _holds(self, entry: Entry) -> bool:
        pictures = [entry.value["source"], *(made["picture"] for made in entry.value["rounds"])]
        return all((self.out / each["path"]).is_file() for each in pictures)

    def _read(self, trace: Path) -> dict[str, Any]:
        """The facts of a run as JSON has them, its pictures stored."""
        try:
            said = read_feedback(trace)
        except DataError as error:
            raise Rejected("read", "bad-feedback", str(error)) from None
        if said is None or not (said.rounds or said.thought):
            raise Rejected("read", "no-feedback", "nothing was said of this run; `reasonedit-data feedback` notes it")
        saved = read_trace(trace)
        beyond = [each.round for each in said.rounds if each.round > len(saved.rounds)]
        if beyond:
            raise Rejected("read", "bad-feedback", f"expected rounds 1 to {len(saved.rounds)}, found {beyond[0]}")
        rounds = [_facts(made, said.of(number), self._keep(made.picture)) for number, made in enumerate(saved.rounds, 1)]
        told = {"original": saved.original, "model": saved.model, "seed": saved.seed, "thought": said.thought}
        return {**told, "source": self._keep(saved.source), "rounds": rounds}

    def _keep(self, data: bytes) -> dict[str, Any]:
        """Store a picture, upright and opaque, as PNG. One that is so already and holds no words keeps its very bytes; words
        in a file would make two of one picture."""
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                plain = image.format == "PNG" and image.mode == "RGB" and not image.text and not image.getexif()
                size = image.size
                if not plain:
                    upright = ImageOps.exif_transpose(image).convert("RGBA")
                    white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
                    buffer = io.BytesIO()
                    Image.alpha_composite(white, upright).convert("RGB").save(buffer, format="PNG")
                    data, size = buffer.getvalue(), upright.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Rejected("read", "unreadable-picture", str(error)) from None
        kept = keep_picture(data, size, self.out)
        return {"path": kept.path.relative_to(self.out).as_posix(), "sha256": kept.sha256, "size": list(size)}


def _facts(made: SavedRound, said: RoundFeedback | None, picture: dict[str, Any]) -> dict[str, Any]:
    names = ("instruction", "input_index", "goal", "target", "decision", "reason", "second", "scores")
    facts = {name: getattr(made, name) for name in names}
    return {**facts, "picture": picture, "said": said.model_dump(exclude_none=True) if said else None}


# ---- facts -> drafts: no file is read, so a restart comes to the same ----------------------------------------------------


def _drafts(entry: Entry, out: Path, options: Options) -> Made:
    facts, made = entry.value, Made()
    split = "held_out" if share_of("split", facts["source"]["sha256"]) < options.held_out else "train"
    trail = {key: facts[key] for key in ("model", "seed") if facts[key] is not None}
    trail |= {"step": "read", "prompt": VERSION, "key": entry.key, "time": entry.time}

    def draft(kind: str, pictures: dict[str, Any], words: str, **more: Any) -> None:
        named = [kind, *(picture["sha256"] for picture in pictures.values()), facts["original"], words]
        name = hashlib.sha256("\x1f".join(named).encode("utf-8", "surrogatepass")).hexdigest()[:20]
        told = head(kind, f"trace-{kind}-{name}", "saved traces", [], split=split)
        if options.license:
            told["license"] = options.license
        images = {key: picture_entry(_shown(picture, out), out) for key, picture in pictures.items()}
        made.drafts.append({**told, "images": images, **more})

    _thoughts(facts, made, trail, draft)
    for number, each in enumerate(facts["rounds"], 1):
        if each["said"] is not None:
            _judged(facts, number, each, made, trail, draft)
    return made


def _shown(picture: dict[str, Any], out: Path) -> Shown:
    return Shown(out / picture["path"], picture["sha256"], tuple(picture["size"]))


def _thoughts(facts: dict[str, Any], made: Made, trail: Draft, draft: Any) -> None:
    """What thinking should say: the artist's words, else the goal that an accepted round followed."""
    raw = facts["original"]
    accepted = [each["goal"] for each in facts["rounds"] if each["said"] and each["said"]["verdict"] == "accept"]
    # A goal in the user's own words may mean that nobody thought; that they needed no thought only the artist can say.
    goal = facts["thought"] or next((goal for goal in accepted if goal and goal.strip() != raw.strip()), None)
    if goal is None:
        return
    steps = _steps(goal)
    if steps is None:
        made.missing.append(("think", "unreadable-thought", goal[:200]))
        return
    clear = goal.strip() == raw.strip()
    asked = {"raw": raw, "class": "clear" if clear else "abstract", "lang": guess_language(raw)}
    think = {"steps": [raw]} if clear else {"steps": steps, "text": goal}
    by = "the artist's own words" if facts["thought"] else "a round that followed it was accepted"
    steps_told = [trail, {"step": "feedback", "note": by, "accepted": True}]
    draft("think", {"input": facts["source"]}, goal, instruction=asked, think=think, provenance=steps_told)


def _judged(facts: dict[str, Any], number: int, each: dict[str, Any], made: Made, trail: Draft, draft: Any) -> None:
    """The records of one round that something was said of."""
    said, goal, raw = each["said"], each["goal"], facts["original"]
    part = f"round {number}"
    if goal is None or not (each["target"] or "").strip():
        why = "the run thought again after it" if goal is None else "there is no description of the target"
        made.missing.append((part, "no-goal" if goal is None else "no-target", why))
        if goal is None:
            return
    verdict = VERDICTS[said["verdict"]]
    marked = {"score": said["score"]} if "score" in said else {}
    steps_told = [trail, {"step": "feedback", "note": f"round {number}: {said['verdict']}", "accepted": True, **marked}]
    asked = {"raw": raw, "lang": guess_language(raw)}
    if verdict == "success" and each["picture"]["sha256"] != facts["source"]["sha256"]:
        pair = {"input": facts["source"], "target": each["picture"]}
        used = {"edit": {"instruction_used": goal}} if goal != raw else {}
        draft("edit", pair, goal, instruction=asked, provenance=steps_told, **used)
    if not (each["target"] or "").strip():
        return
    agrees = _DECISIONS.get(each["decision"]) == verdict
    reason = said.get("reason") or (each["reason"] if agrees else None)
    score = said.get("score", each["scores"].get("consistency"))
    if not reason or not reason.strip():
        made.missing.append((part, "no-reason", "the reflector said something else, and the artist gave no reason"))
    elif score is None:
        made.missing.append((part, "no-score", "the trace has no consistency score, and the artist gave none"))
    elif (verdict == "success" and score < LEAST_SUCCESS) or (verdict == "failed" and score > MOST_FAILED):
        made.missing.append((part, "score-disagrees", f"{score:g} does not go with {verdict}; the artist gave no score"))
    else:
        reflect = {
            "round": number,
            "target_description": each["target"],
            "scores": {"consistency": float(score), **({} if marked else _marks(each["scores"]))},
            "reason": reason,
            "verdict": verdict,
            **({"second_instruction": said["instruction"]} if verdict == "reflection" else {}),
        }
        pictures = {"input": facts["source"], "generated": each["picture"]}
        target = _accepted_after(facts["rounds"], number - 1) if verdict == "reflection" else None
        if target is not None and target["sha256"] != each["picture"]["sha256"]:
            pictures["target"] = target
        steps = _steps(goal) if goal != raw else None
        think = {"think": {"steps": steps, "text": goal}} if steps else {}
        words = f"{goal}\x1f{verdict}\x1f{said.get('instruction', '')}"
        draft("reflect", pictures, words, instruction=asked, reflect=reflect, provenance=steps_told, **think)


def _marks(scores: dict[str, Any]) -> dict[str, Any]:
    """The reflector's two pairs of marks, where it gave both of a pair."""
    pairs = {name: scores.get(name) for name in ("edit", "quality")}
    return {name: list(pair) for name, pair in pairs.items() if pair and len(pair) == 2}


def _accepted_after(rounds: Sequence[dict[str, Any]], index: int) -> dict[str, Any] | None:
    """The picture of an accepted round that was made, directly or over others, of the round `index`."""
    for later, each in enumerate(rounds):
        before = each["input_index"]
        while before is not None and before != index and before < later:
            before = rounds[before]["input_index"]
        if before == index and each["said"] and each["said"]["verdict"] == "accept":
            return each["picture"]
    return None


def _steps(goal: str) -> list[str] | None:
    """The single actions of a thought, None where it is none that a reasoner could say."""
    try:
        return list(parse_thought(goal).steps) or [goal]
    except MalformedReply:
        return None
