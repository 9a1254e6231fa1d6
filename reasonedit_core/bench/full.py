"""The groups of a large CUDA card: released sizes, random weights in bfloat16, ten minutes for the whole command.

In the order of what matters most, each told when it is done; what the time is not enough for is named and left out. The same
attention backend is forced in all arms of a comparison; a further arm of ours chooses for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import report
from .ceilings import CARD, FLEX, KINDS, work
from .clock import TOTAL, Budget
from .peers import EDITPLUS, STEP1X, Peers
from .timed import (
    NO_CUDA,
    OURS,
    OUT_OF_TIME,
    Arm,
    Found,
    Group,
    Options,
    Tell,
    reflection_group,
    region_group,
    released_words,
    run_group,
)

COUNTING = 70.0
"""About how many seconds the counting takes, which comes first: an estimate."""

STEPS, WARM_STEPS, LEVEL, TOKENS, WARM_TOKENS = 28, 4, 1024, 128, 8
SDPA = "cudnn"
OWN_CHOICE = "ours, its own choice of attention"
STOCK_Q = "diffusers' transformer"
NAMES = (
    "one forward, Step1X",
    "one forward, Qwen-Image",
    "edit, ReasonEdit-S, full",
    "edit with a region, ReasonEdit-S, full",
    "reflection, full",
    "ceilings of the card",
    "edit, ReasonEdit-Q, full",
)

Planned = tuple[Group, Options, float]
"""A group, how it is timed, and about how many seconds it takes with its loading, one warm-up and one round: estimates."""


def run_full(folder: Path, peers: Peers, tell: Tell, say: Tell, within: Budget) -> Found:
    """Run the groups while the time lasts. within: the budget of the whole command, of which the counting took its part."""
    import torch

    if not torch.cuda.is_available():
        founds = [Found(not_run=tuple({"group": name, "arm": "all arms", "missing": NO_CUDA} for name in NAMES))]
        for line in report.timed_lines(founds[0].timed, founds[0].not_run):
            tell(line)
        return founds[0]
    timed, not_run = [], []
    groups = plan(folder, peers)
    for place, (group, options, about) in enumerate(groups):
        if about > within.left:
            why = f"{OUT_OF_TIME} ({within.spent:.0f} s of {within.seconds:.0f} s are spent, it takes about {about:.0f} s)"
            found = Found(not_run=({"group": group.name, "arm": "all arms", "missing": why},))
        else:
            # What the estimates leave over goes to the group that is next, for further rounds.
            later = sum(about for _, _, about in groups[place + 1 :])
            found = run_group(group, options, say, budget=within, share=Budget(max(about, within.left - later)))
        for line in (*report.timed_lines(found.timed, found.not_run), *rates(found)):
            tell(line)
        timed += found.timed
        not_run += found.not_run
    return Found(tuple(timed), tuple(not_run))


def plan(folder: Path, peers: Peers, device: str = "cuda") -> list[Planned]:
    """The groups of NAMES. folder: where pictures and a tokenizer are written."""
    from .small import INSTRUCTION, write_checkpoint, write_pictures

    pictures = write_pictures(folder / "pictures", 8, (LEVEL, LEVEL))
    tokenizer = write_checkpoint("qwen2.5-vl", folder / "mllm")
    common = {"size": "full", "device": device, "threads": None, "sdpa": SDPA, "instruction": INSTRUCTION, "pictures": pictures}
    common |= {"folder": str(tokenizer)}

    def job(arm: str, system: str, name: str, **more: Any) -> dict[str, Any]:
        out = folder / "out" / system / arm / name
        out.mkdir(parents=True)
        how = {"steps": STEPS, "level": LEVEL, "guidance": 6.0 if system == "reasonedit-s" else 4.0, "out": str(out)}
        how |= {"warm_steps": WARM_STEPS}
        return {**common, **how, "arm": arm, "system": system, **more}

    often, few = Options(rounds=10, warmup=3, device=device), Options(rounds=3, warmup=1, device=device)
    speak = {**common, "tokens": TOKENS, "warm_tokens": WARM_TOKENS}
    reflection = reflection_group(speak, peers, "full")
    groups = (
        (_forwards("reasonedit-s", job, peers, NAMES[0]), often, 60.0),
        (_forwards("reasonedit-q", job, peers, NAMES[1]), often, 50.0),
        (_edits_s(job, peers, NAMES[2]), few, 90.0),
        (_regions(job, peers), few, 80.0),
        (replace(reflection, name=NAMES[4]), few, 75.0),
        (_ceilings(device), few, 60.0),
        (_edits_q(job, peers, NAMES[6]), few, 95.0),
    )
    return list(groups)


def rates(found: Found) -> list[str]:
    """The parts whose work is known as rates."""
    lines, known = [], work()
    for entry in found.timed:
        if entry["part"] != TOTAL and entry["part"] in known:
            rate, copies = known[entry["part"]] / entry["median"] / 1e12, entry["part"].startswith("copy")
            lines.append(f"  {rate:8.2f} {'TB/s' if copies else 'TFLOP/s'}  {entry['arm']}, {entry['part']}")
    return lines


def _forwards(system: str, job: Callable[..., dict[str, Any]], peers: Peers, name: str) -> Group:
    if system == "reasonedit-s":
        place = peers.step1x()
        peer = Arm(STEP1X, "reasonedit_core.bench.peer_step1x", job("forward", system, "released"), place)
    else:
        peer = Arm(STOCK_Q, "reasonedit_core.bench.arms", job("forward", system, "stock", stock=True))
    arms = (peer, *_ours("forward", system, job))
    return Group(name, arms, (peer.name, OURS))


def _edits_s(job: Callable[..., dict[str, Any]], peers: Peers, name: str) -> Group:
    # Three processes of 25 GB each: what the card holds beside the activations.
    released, system = released_words(), "reasonedit-s"
    arms = (
        Arm(STEP1X, "reasonedit_core.bench.peer_step1x", job("edit", system, "released", **released), peers.step1x()),
        *_ours("edit", system, job),
    )
    return Group(name, arms, (STEP1X, OURS))


def _regions(job: Callable[..., dict[str, Any]], peers: Peers) -> Group:
    # A group of its own, and tidy: four processes of 25 GB that hold keys and values beside their weights, 12 GB each. Ours
    # drop them when an edit is done; RegionE keeps them.
    def made(name: str, arm: str, **more: Any) -> dict[str, Any]:
        return job(arm, "reasonedit-s", name, tidy=True, **more)

    return region_group(made, "ReasonEdit-S, full", peers)


def _edits_q(job: Callable[..., dict[str, Any]], peers: Peers, name: str) -> Group:
    # Tidy: three processes of 41 GB leave room for the activations of one at a time.
    system = "reasonedit-q"
    peer = job("edit", system, "released", tidy=True)
    arms = (
        Arm(EDITPLUS, "reasonedit_core.bench.peer_editplus", peer, peers.editplus()),
        *_ours("edit", system, job, tidy=True),
    )
    return Group(name, arms, (EDITPLUS, OURS))


def _ceilings(device: str) -> Group:
    module, how = "reasonedit_core.bench.ceilings", {"device": device, "apart": True}
    arms = [Arm(CARD, module, {**how, "kind": "card"})]
    arms += [Arm(name, module, {**how, "kind": kind}) for kind, name in KINDS.items()]
    return Group(NAMES[5], tuple(arms), (FLEX,))


def _ours(arm: str, system: str, job: Callable[..., dict[str, Any]], **more: Any) -> tuple[Arm, Arm]:
    module = "reasonedit_core.bench.arms"
    return (
        Arm(OURS, module, job(arm, system, "ours", **more)),
        Arm(OWN_CHOICE, module, job(arm, system, "own", sdpa=None, **more)),
    )
