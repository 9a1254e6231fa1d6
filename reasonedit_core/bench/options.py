"""The options of `reasonedit bench`. Imports nothing heavy: the command line is built for every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

SECONDS, RESERVE = 600.0, 20.0
"""The most that `--size full` takes in all; of these kept for what nothing watches: the start of Python, the plot."""

EPILOG = """\
peers: DIR of --peers holds what is at hand of step1x/ (a checkout of the released diffusers fork, branch step1xedit_v1p2),
RegionE/ and editplus/ (another diffusers than the installed one); --peer-python is an interpreter with their requirements
(transformers 4.55, qwen_vl_utils, torchvision). What is missing is named and the other arms run. More: bench/peers.py.
"""


def add_options(parser: argparse.ArgumentParser, whole: Callable[[int, int], Callable[[str], int]]) -> None:
    """whole: makes the type of a whole number between two bounds."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--counted", action="store_true", help="only what is counted; the same on every machine")
    add(
        "--size",
        choices=("small", "full"),
        default="small",
        help="full: released sizes, on a large CUDA card, ten minutes in all (small)",
    )
    add("--random-weights", action="store_true", help="needed for --size full: no other weights are known to it")
    add("--peers", type=Path, metavar="DIR", help="folder with the released code and others, see below")
    add("--peer-python", type=Path, metavar="PATH", help="interpreter that runs them (this one)")
    add("--rounds", type=whole(1, 1000), default=5, metavar="N", help="runs of every arm after the warm-up (5)")
    add("--steps", type=whole(1, 1000), default=8, metavar="N", help="denoising steps of the small edits (8)")
    add("--threads", type=whole(1, 1024), default=1, metavar="N", help="of the processor, for every arm (1)")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add("--plot", type=Path, metavar="FILE", help="write a picture of the timed arms here (beside --json: its name with .png)")
