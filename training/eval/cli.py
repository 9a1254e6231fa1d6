"""The command `reasonedit-eval`: tables of what systems are worth, in the miniature world and on published benchmarks.

Exit codes: 0 done; 1 `check` found a table below what it is held against, `generate` has items without a picture, or the
question that `doctor` tried had no answer; 2 an error, told in a sentence or two; 130 stopped
by Ctrl-C. Torch is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ...reasonedit_core.cli import whole
from ...reasonedit_core.weight_options import DTYPES
from ..program import Parser, printable, run_program
from .benchmarks.cli import add_commands

EXIT_BELOW = 1

BRAIN_TABLES = ("components", "components_switched", "enhancers")
TABLES = ("loop", "stages", "reflection", "rounds", "reflector", *BRAIN_TABLES)
GROUPS = ("all", "concrete", "abstract", "factual", "conceptual", "procedural")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # a reply that cannot be read is a warning elsewhere; here it is counted
    return run_program(build_parser, argv, lambda args: args.run(args), say, level=lambda args: logging.ERROR)


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(f"reasonedit-eval: {printable(text)}", file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. A further command is one more function in the list."""
    parser = Parser(prog="reasonedit-eval", description="Measure what ReasonEdit's systems are worth.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for add in (_add_miniature, _add_check):
        add(commands)
    add_commands(commands)
    return parser


# ---- commands ------------------------------------------------------------------------------------------------------------


def run_miniature(args: argparse.Namespace) -> int:
    """`reasonedit-eval miniature`: prints the table as Markdown; the files say the same."""
    from .miniature import Request, make_table

    names = ("system", "table", "out", "n", "seed", "runs", "batch", "group", "device", "dtype")
    make_table(Request(**{name: getattr(args, name) for name in names}), (lambda text: None) if args.quiet else say)
    print((args.out / f"{args.table}.md").read_text(encoding="utf-8"))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """`reasonedit-eval check`: a measured table of `loop` against the figures of a card."""
    from .check import faults_of, read_table

    faults = faults_of(read_table(args.table), read_table(args.card), group=args.group, most=args.most)
    print("\n".join(faults) if faults else f"{args.table}: nothing lies below {args.card}")
    return EXIT_BELOW if faults else 0


# ---- options -------------------------------------------------------------------------------------------------------------


def _common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and log in detail (or REASONEDIT_DEBUG=1)")
    parser.set_defaults(run=run)


def _add_miniature(commands) -> None:
    words = "a table of the miniature world: drawn scenes that no training has seen, judged exactly"
    parser = commands.add_parser("miniature", help=words, description=words[0].upper() + words[1:] + ".")
    add = parser.add_argument
    add("--system", required=True, metavar="NAME", help="mini-s, mini-q, mini-brain, or a folder of weights of a miniature")
    add("--table", required=True, choices=TABLES, help=f"of mini-brain: {', '.join(BRAIN_TABLES)}")
    add("--out", required=True, type=Path, metavar="DIR", help="for TABLE.json, .md, .png, and the records to go on from")
    add("--n", type=whole(1, 1_000_000), default=120, metavar="N", help="items: half concrete, half abstract (120)")
    add("--seed", type=int, default=0, metavar="S", help="any whole number; the items follow from it (0)")
    add("--runs", type=Path, metavar="DIR", help="the run folder of `reasonedit-train mini`, for stages and reflection")
    add("--batch", type=whole(1, 4096), default=64, metavar="B", help="items at a time; changes the time, no score (64)")
    add("--group", choices=GROUPS, default="all", help="only items of this group, N of them (all)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=DTYPES, default="auto", help="auto: float32 on the CPU")
    _common(parser, run_miniature)


def _add_check(commands) -> None:
    words = "hold a measured table `loop` against the figures of a model card; exit code 1 where it lies below"
    parser = commands.add_parser("check", help=words, description=words[0].upper() + words[1:] + ".")
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="a loop.json that was just measured")
    add("--card", type=Path, required=True, metavar="JSON", help="the loop.json that the card shows")
    add("--group", choices=GROUPS, default="abstract", help="which group to look at (abstract)")
    add("--most", type=float, default=1.0, metavar="POINTS", help="how far a mean may lie below the card's (1.0)")
    _common(parser, run_check)


if __name__ == "__main__":
    sys.exit(main())
