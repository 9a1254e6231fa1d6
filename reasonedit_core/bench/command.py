"""`reasonedit bench`: counts, then times, then writes. Benchmarks print; tests assert counts and numerics, never times."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_json
from . import report
from .clock import Budget
from .options import RESERVE, SECONDS
from .peers import Peers
from .timed import Found, Options, run_group, small_groups

Tell = Callable[[str], None]


def run(args: argparse.Namespace, tell: Tell, say: Tell) -> dict[str, Any]:
    """The whole command. tell: lines of the report; say: what is being done. Returns what `--json` holds."""
    budget = Budget(SECONDS - RESERVE) if args.size == "full" else Budget()
    if args.size == "full" and not args.random_weights:
        raise ConfigError("--size full: expected --random-weights, found no weights; add it, full size knows no others")
    machine = report.machine(args.threads)
    tell(report.machine_line(machine))
    results: dict[str, Any] = {"machine": machine, "counted": counted(args, tell, say, budget), "timed": [], "not_run": []}
    if not args.counted:
        found = timed(args, tell, say, budget)
        results |= {"timed": list(found.timed), "not_run": list(found.not_run)}
        picture = args.plot or (args.json.with_suffix(".png") if args.json else None)
        if picture:
            missing = report.plot(found.timed, picture)
            tell(f"plot: {picture}" if missing is None else f"plot: not run: {missing}")
    if args.json:
        write_json(args.json, results)
        tell(f"written: {args.json}")
    return results


def counted(args: argparse.Namespace, tell: Tell, say: Tell, budget: Budget) -> dict[str, Any]:
    """The counted part, printed."""
    from . import counted as work

    say("counting full-size forwards and one loop")
    # The loop's weights are random: that they were not trained with our words is no news.
    log = logging.getLogger(__package__.rpartition(".")[0] + ".dialogue")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        found = work.measure(Peers(args.peers, args.peer_python), budget)
    finally:
        log.setLevel(level)
    for line in report.counted_lines(found):
        tell(line)
    return found


def timed(args: argparse.Namespace, tell: Tell, say: Tell, budget: Budget) -> Found:
    """The timed groups of a size, each printed when it is done."""
    peers = Peers(args.peers, args.peer_python)
    with tempfile.TemporaryDirectory(prefix="reasonedit-bench-") as folder:
        if args.size == "full":
            from .full import run_full

            return run_full(Path(folder), peers, tell, say, budget)
        options = Options(rounds=args.rounds, steps=args.steps, threads=args.threads)
        founds = []
        for group in small_groups(Path(folder), peers, options):
            founds.append(run_group(group, options, say))
            for line in report.timed_lines(founds[-1].timed, founds[-1].not_run):
                tell(line)
        return joined(founds)


def joined(founds: list[Found]) -> Found:
    """The results of several groups as one."""
    return Found(
        tuple(entry for found in founds for entry in found.timed), tuple(one for found in founds for one in found.not_run)
    )
