"""Timed arms in groups. A group's arms share weights and pictures, run in turn, and are compared with one of them.

The small groups need no card: whole edits of both systems and a reflection, on small random weights in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .clock import TOTAL, Budget, interleave, summary
from .peers import EDITPLUS, REASONER, REGIONE, STEP1X, Peers, Place
from .worker import END_SECONDS, LOAD_SECONDS, RUN_SECONDS, ArmFailed, TooSlow, Worker

OURS = "ours, full path"
STOCK = "stock generate, five questions in a row"
NO_CUDA = "no CUDA device"
OUT_OF_TIME = "out of time"
REGION_ARMS = ("ours, region 25 %, no velocity cache", "ours, region 25 %, velocity cache")

ACCEPTED = "ours, accepted at once (three questions, scores lazy)"
GUESSED = "ours, guessed ahead (random weights repeat themselves)"

LEVEL = 256
REGION_SHARE, REGION_STEPS = 0.25, 28
"""The share of the picture that a mask says is edited; steps, of which 9 are made in full."""

REGION_LEVEL, REGION_WORDS = 384, 64
"""Of the small edits with a region: pixels of a side, and text tokens. Every step computes the text, and the hundreds of tokens
that the MLLM makes of a small picture would be most of a partial step; so would the fixed cost of each operator."""

SDPA = {"cpu": "flash", "cuda": "efficient"}
"""The SDPA backend forced in all arms of a small group, in float32. On a CPU torch has this one and the plain form, and takes
this one for whatever it can compute; ours has SDPA alone there. So an arm with its own choice would be the same arm again, and
only the groups of a card (`full`) have one."""

SEEN = 1024
"""Side of the pictures of a reflection: as large as the released reasoner lets them be, 1,024 tokens each."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How arms are timed. tokens: of each answer of a reflection."""

    rounds: int = 5
    warmup: int = 1
    steps: int = 8
    tokens: int = 32
    threads: int = 1
    device: str = "cpu"

    @property
    def runs(self) -> int:
        """Runs of each arm."""
        return self.rounds + self.warmup


@dataclass(frozen=True, slots=True)
class Arm:
    """One contender. module: below the package's root, see `worker`. missing: why it cannot run, in words."""

    name: str
    module: str = ""
    job: Mapping[str, Any] = field(default_factory=dict)
    place: Place = field(default_factory=Place)

    @property
    def missing(self) -> str | None:
        """What it lacks."""
        return self.place.missing


@dataclass(frozen=True, slots=True)
class Group:
    """Arms that are compared. baselines: names, the first that runs is what ratios refer to."""

    name: str
    arms: tuple[Arm, ...]
    baselines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Results: `timed` and `not_run` of the JSON."""

    timed: tuple[dict[str, Any], ...] = ()
    not_run: tuple[dict[str, str], ...] = ()


def lacking(name: str, what: str) -> Arm:
    """An arm that cannot run."""
    return Arm(name, place=Place(missing=what))


# ---- running -------------------------------------------------------------------------------------------------------------


def run_group(
    group: Group, options: Options, tell: Tell = lambda text: None, *, budget: Budget | None = None, share: Budget | None = None
) -> Found:
    """Start the group's arms, run them in turn, compare. An arm that fails is left out and told, the others go on.

    budget: of the whole command; an arm that is not done when it is used up is left out as well. share: what of it is this
    group's; arms that take longer to load are left out, and past it no further round begins.
    """
    budget = budget or Budget()
    share = share or budget
    missing = {arm.name: arm.missing for arm in group.arms if arm.missing}
    workers: dict[str, Worker] = {}
    try:
        # All at once: what most of them do at first is to import.
        for arm in group.arms:
            if not arm.missing:
                workers[arm.name] = Worker(arm.module, arm.job, python=arm.place.python, paths=arm.place.paths)
        for name in list(workers):
            tell(f"{group.name}: loading {name}")
            limit = min(LOAD_SECONDS, budget.left, share.left)
            try:
                about = workers[name].ready(limit)
            except ArmFailed as error:
                missing[name] = _why(error, limit < LOAD_SECONDS)
                workers.pop(name).close(min(END_SECONDS, budget.left))
            else:
                missing |= {f"{name}, {part}": why for part, why in about.get("left_out", {}).items()}
        runs = _interleaved(workers, missing, options, tell, group.name, budget, share)
    finally:
        for worker in workers.values():
            worker.dismiss()
        for worker in workers.values():
            worker.close(min(END_SECONDS, budget.left))
    baseline = next((name for name in group.baselines if name in runs), None)
    timed = _entries(group, runs, baseline)
    return Found(tuple(timed), tuple({"group": group.name, "arm": name, "missing": why} for name, why in missing.items()))


def _interleaved(
    workers: dict[str, Worker],
    missing: dict[str, str],
    options: Options,
    tell: Tell,
    name: str,
    budget: Budget,
    share: Budget,
) -> dict[str, list[Mapping[str, float]]]:
    while workers:
        tell(f"{name}: running {len(workers)} arms in turn")
        failed: list[str] = []
        done: dict[str, list[Mapping[str, float]]] = {arm: [] for arm in workers}

        def runner(arm: str, failed: list[str] = failed, done: dict[str, Any] = done) -> Callable[[int], Mapping[str, float]]:
            def run(number: int) -> Mapping[str, float]:
                limit = min(RUN_SECONDS, budget.left)
                try:
                    seconds = workers[arm].run(number, limit)
                except ArmFailed as error:
                    missing[arm] = _why(error, limit < RUN_SECONDS)
                    failed.append(arm)
                    raise
                if number >= options.warmup:
                    done[arm].append(seconds)
                return seconds

            return run

        try:
            return interleave({arm: runner(arm) for arm in workers}, options.rounds, options.warmup, share)
        except ArmFailed:
            for arm in failed:
                workers.pop(arm).close(min(END_SECONDS, budget.left))
            if not budget.left:
                # There is no time to begin anew without it. Rounds that all arms had ended still count.
                whole = min(map(len, done.values()))
                for arm in done:
                    if not whole:
                        missing.setdefault(arm, OUT_OF_TIME)
                    elif missing.get(arm, "").startswith(OUT_OF_TIME):
                        del missing[arm]
                return {arm: runs[:whole] for arm, runs in done.items() if whole}
    return {}


def _why(error: ArmFailed, cut: bool) -> str:
    """An arm's failure in words. cut: it had less time than arms have otherwise."""
    return f"{OUT_OF_TIME}: {error}" if cut and isinstance(error, TooSlow) else str(error)


def _entries(group: Group, runs: Mapping[str, Sequence[Mapping[str, float]]], baseline: str | None) -> list[dict[str, Any]]:
    jobs = {arm.name: arm.job for arm in group.arms}
    entries = []
    for (arm, part), timing in summary(runs, baseline).items():
        entry: dict[str, Any] = {
            "group": group.name,
            "arm": arm,
            "part": part,
            "median": timing.median,
            "spread": timing.spread,
            "ratio": timing.ratio,
            "baseline": baseline,
            "times": list(timing.times),
        }
        if part == TOTAL and jobs[arm].get("apart"):
            continue
        if part == TOTAL and baseline and arm != baseline and "out" in jobs[arm] and "out" in jobs[baseline]:
            entry["difference"] = picture_difference(jobs[arm]["out"], jobs[baseline]["out"])
        entries.append(entry)
    return entries


def picture_difference(folder: str, other: str) -> float | None:
    """Mean difference, of 255, between the last pictures of two arms; None where they have not the same names and sizes."""
    import numpy as np
    from PIL import Image

    names = [{path.name for path in Path(place).glob("*.png")} for place in (folder, other)]
    shared = sorted(names[0] & names[1])
    if not shared:
        return None
    one, two = (np.asarray(Image.open(Path(place) / shared[-1]).convert("RGB"), dtype=float) for place in (folder, other))
    return None if one.shape != two.shape else float(np.abs(one - two).mean())


# ---- the small groups ----------------------------------------------------------------------------------------------------


def small_groups(folder: Path, peers: Peers, options: Options) -> list[Group]:
    """Edits of ReasonEdit-S and -Q, also with a region, and a reflection. folder: for checkpoints and pictures."""
    from .small import INSTRUCTION, write_checkpoint, write_pictures

    common = {"size": "small", "device": options.device, "threads": options.threads, "instruction": INSTRUCTION}
    common |= {"sdpa": SDPA[options.device.partition(":")[0]]}
    pictures = write_pictures(folder / "pictures", 2 * options.runs, (LEVEL, LEVEL))
    seen = write_pictures(folder / "seen", 2 * options.runs, (SEEN, SEEN))

    def job(name: str, system: str, weights: Path, **more: Any) -> dict[str, Any]:
        out = folder / "out" / system / name
        out.mkdir(parents=True)
        given = {"system": system, "folder": str(weights), "pictures": pictures, "out": str(out)}
        return {**common, **given, "steps": options.steps, "level": LEVEL, **more}

    s = write_checkpoint("step1x-v1p2", folder / "s")
    q = write_checkpoint("qwen-edit-plus", folder / "q")
    mllm = write_checkpoint("qwen2.5-vl", folder / "mllm")
    larger = write_pictures(folder / "larger", options.runs, (REGION_LEVEL, REGION_LEVEL))
    region = {"words": REGION_WORDS, "level": REGION_LEVEL, "pictures": larger}
    return [
        edit_group_s(lambda name, **more: job(name, "reasonedit-s", s, **more), peers, "small"),
        edit_group_q(lambda name, **more: job(name, "reasonedit-q", q, **more), peers, "small"),
        region_group(partial(job, system="reasonedit-s", weights=s, guidance=6.0, **region), "ReasonEdit-S, small", peers),
        region_group(partial(job, system="reasonedit-q", weights=q, guidance=4.0, **region), "ReasonEdit-Q, small"),
        reflection_group({**common, "folder": str(mllm), "pictures": seen, "tokens": options.tokens}, peers, "small"),
    ]


def edit_group_s(job: Callable[..., dict[str, Any]], peers: Peers, size: str) -> Group:
    """Whole edits of ReasonEdit-S against the released pipeline. job: (name of the arm's folder, more) -> a job."""
    how = {"arm": "edit", "guidance": 6.0}
    released = {**how, **released_words()}
    arms = (
        Arm(STEP1X, "reasonedit_core.bench.peer_step1x", job("released", **released), peers.step1x()),
        Arm(OURS, "reasonedit_core.bench.arms", job("ours", **how)),
    )
    return Group(f"edit, ReasonEdit-S, {size}", arms, (STEP1X, OURS))


def edit_group_q(job: Callable[..., dict[str, Any]], peers: Peers, size: str) -> Group:
    """Whole edits of ReasonEdit-Q against diffusers' EditPlus."""
    how = {"arm": "edit", "guidance": 4.0}
    arms = (
        Arm(EDITPLUS, "reasonedit_core.bench.peer_editplus", job("editplus", **how), peers.editplus()),
        Arm(OURS, "reasonedit_core.bench.arms", job("ours", **how)),
    )
    return Group(f"edit, ReasonEdit-Q, {size}", arms, (EDITPLUS, OURS))


def region_group(job: Callable[..., dict[str, Any]], what: str, peers: Peers | None = None) -> Group:
    """Whole edits in 28 steps: the full path, and 9 steps of it with a quarter of the picture in the others.

    The velocity cache takes every second velocity of the others again; what a model would let it reuse follows from weights,
    and these are random. job: as for `edit_group_s`, but it knows of the guidance. what: system and size. peers: whose RegionE
    runs beside; None for a system that it is no arm for.
    """
    module, how = "reasonedit_core.bench.arms", {"arm": "edit", "steps": REGION_STEPS}
    arms = [Arm(OURS, module, job("full-path", **how))]
    for arm, reuse in zip(REGION_ARMS, (False, True), strict=True):
        arms.append(Arm(arm, module, job(f"region-{reuse:d}", **how, region=REGION_SHARE, reuse=reuse)))
    if peers is not None:
        # It knows no other number of steps, the warm-up's included, and finds for itself which velocities to take again.
        theirs = job("regione", **how, **released_words(), regione=True, edited=REGION_SHARE, warm_steps=REGION_STEPS)
        place = peers.regione()
        if theirs["device"] == "cpu" and not place.missing:
            place = Place(missing=f"{NO_CUDA} (RegionE's linear layers are Triton kernels)")
        arms.append(Arm(REGIONE, "reasonedit_core.bench.peer_step1x", theirs, place))
    return Group(f"edit with a region, {what}", tuple(arms), (OURS,))


def reflection_group(job: dict[str, Any], peers: Peers, size: str) -> Group:
    """One reflection (five questions of equally many tokens) against the released reasoner and against plain generate.

    All arms but one ask all five. ACCEPTED is what is left of them for a round that is accepted, where the released reasoner
    asks five all the same. Guessing ahead has an arm of its own: how often a guess holds is a matter of what is said, and
    random weights say nothing.
    """
    from .script import one_round

    replies = {task: texts[0] for task, texts in one_round(1).items()}
    module = "reasonedit_core.bench.peer_reflect"
    arms = (
        Arm(REASONER, module, {**job, "arm": "released", "replies": replies}, peers.step1x()),
        Arm(STOCK, module, {**job, "arm": "stock", "questions": questions()}),
        Arm("ours", "reasonedit_core.bench.arms", {**job, "arm": "reflect"}),
        Arm(ACCEPTED, "reasonedit_core.bench.arms", {**job, "arm": "reflect", "scores": False}),
        Arm(GUESSED, "reasonedit_core.bench.arms", {**job, "arm": "reflect", "guesses": True}),
    )
    return Group(f"reflection, {size}", arms, (REASONER, STOCK, "ours"))


def released_words() -> dict[str, Any]:
    """Our own prefix, for the released pipeline, so that all arms read equally many words."""
    from ..dialogue.prompts import load_pack
    from .small import DROPPED

    return {"prefix": load_pack("en").conditioning_for("v1.2").prefix, "dropped": DROPPED}


def questions() -> dict[str, dict[str, Any]]:
    """The five questions of a reflection in our wording: system text, parts of the user's turn, names of the pictures."""
    from ..dialogue.prompts import load_pack, render
    from .small import INSTRUCTION

    tasks = ("describe", "score", "reflect_paired", "edit_score_paired", "quality_score")
    values = {"instruction": INSTRUCTION, "target": "A red cube.", "score": 8.0, "reason": "so it looks"}
    names: Any = {"source": "source", "result": "result"}  # stand in for the pictures
    made = [render(load_pack("en"), task, "en", names, values) for task in tasks]
    return {query.task: {"system": query.system, "parts": query.parts, "images": query.images} for query in made}
