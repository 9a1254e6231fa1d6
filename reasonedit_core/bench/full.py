"""The groups of a large CUDA card: released sizes, random weights in bfloat16, one run of ten minutes.

In the order of what matters most, each told when it is done; what the time is not enough for is named and left out. The same
attention backend is forced in all arms of a comparison; a further arm of ours chooses for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import report
from .ceilings import WORK
from .peers import EDITPLUS, REGIONE, STEP1X, Peers, Place
from .timed import (
    NO_CUDA,
    OURS,
    REGION_SHARE,
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

SECONDS = 600.0
STEPS, WARM_STEPS, LEVEL, TOKENS = 28, 4, 1024, 128
SDPA = "cudnn"
OWN_CHOICE = "ours, its own choice of attention"
STOCK_Q = "diffusers' transformer"
NAMES = (
    "one forward, Step1X",
    "one forward, Qwen-Image",
    "edit, ReasonEdit-S, full",
    "edit with a region, ReasonEdit-S, full",
    "reflection, full",
    "edit, ReasonEdit-Q, full",
    "ceilings of the card",
)

Planned = tuple[Group, Options, float]
"""A group, how it is timed, and about how many seconds it takes with its loading."""


def run_full(folder: Path, peers: Peers, tell: Tell, say: Tell, *, seconds: float = SECONDS) -> Found:
    """Run the groups while the time lasts."""
    import torch

    if not torch.cuda.is_available():
        founds = [Found(not_run=tuple({"group": name, "arm": "all arms", "missing": NO_CUDA} for name in NAMES))]
        for line in report.timed_lines(founds[0].timed, founds[0].not_run):
            tell(line)
        return founds[0]
    started, timed, not_run = time.monotonic(), [], []
    for group, options, about in plan(folder, peers):
        spent = time.monotonic() - started
        if spent + about > seconds:
            why = f"time for it ({spent:.0f} s of {seconds:.0f} s are spent, it takes about {about:.0f} s)"
            found = Found(not_run=({"group": group.name, "arm": "all arms", "missing": why},))
        else:
            found = run_group(group, options, say)
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
        how |= {"warm_steps": STEPS if more.get("regione") else WARM_STEPS}  # RegionE knows no other number of steps
        return {**common, **how, "arm": arm, "system": system, **more}

    often, edits = Options(rounds=10, warmup=3, device=device), Options(rounds=2, warmup=1, device=device)
    speak = {**common, "tokens": TOKENS}
    reflection = reflection_group(speak, peers, "full")
    ceilings = Arm("ceilings", "reasonedit_core.bench.ceilings", {"device": device})
    groups = (
        (_forwards("reasonedit-s", job, peers, NAMES[0]), often, 90.0),
        (_forwards("reasonedit-q", job, peers, NAMES[1]), often, 90.0),
        (_edits_s(job, peers, NAMES[2]), edits, 180.0),
        (_regions(job), Options(rounds=1, warmup=1, device=device), 60.0),
        (replace(reflection, name=NAMES[4]), Options(rounds=2, warmup=1, device=device), 110.0),
        (_edits_q(job, NAMES[5]), edits, 110.0),
        (Group(NAMES[6], (ceilings,), ()), Options(rounds=2, warmup=1, device=device), 60.0),
    )
    return list(groups)


def rates(found: Found) -> list[str]:
    """The parts whose work is known as rates."""
    lines = []
    for entry in found.timed:
        if entry["part"] in WORK:
            rate, copies = WORK[entry["part"]] / entry["median"] / 1e12, entry["part"].startswith("copy")
            lines.append(f"  {rate:8.2f} {'TB/s' if copies else 'TFLOP/s'}  {entry['part']}")
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
    # Four processes of 25 GB each: what the card holds beside the activations.
    released, system = released_words(), "reasonedit-s"
    regione = job("edit", system, "regione", **released, regione=True, edited=REGION_SHARE)
    arms = (
        Arm(STEP1X, "reasonedit_core.bench.peer_step1x", job("edit", system, "released", **released), peers.step1x()),
        *_ours("edit", system, job),
        Arm(REGIONE, "reasonedit_core.bench.peer_step1x", regione, peers.regione()),
    )
    return Group(name, arms, (STEP1X, OURS))


def _regions(job: Callable[..., dict[str, Any]]) -> Group:
    # A group of its own: these processes hold keys and values beside their weights, 12 GB each.
    return region_group(lambda name, arm, **more: job(arm, "reasonedit-s", name, **more), "ReasonEdit-S, full")


def _edits_q(job: Callable[..., dict[str, Any]], name: str) -> Group:
    missing = Place(missing="an MLLM at this size beside the transformer (EditPlus reads its words itself)")
    arms = (Arm(EDITPLUS, place=missing), Arm(OURS, "reasonedit_core.bench.arms", job("edit", "reasonedit-q", "ours")))
    return Group(name, arms, (EDITPLUS, OURS))


def _ours(arm: str, system: str, job: Callable[..., dict[str, Any]]) -> tuple[Arm, Arm]:
    module = "reasonedit_core.bench.arms"
    return (
        Arm(OURS, module, job(arm, system, "ours")),
        Arm(OWN_CHOICE, module, job(arm, system, "own", sdpa=None)),
    )
