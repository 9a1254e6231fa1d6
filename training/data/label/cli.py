"""The command `reasonedit-data`: records made by asking an annotator, or out of what an artist has said of saved runs.

Exit codes: 0 done; 2 an error, told in a sentence or two, or records that `check` finds faults in; 130 stopped by Ctrl-C.
Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ....reasonedit_core.cli import real, whole
from ....reasonedit_core.weight_options import DTYPES
from ...program import Parser, printable, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return run_program(build_parser, argv, _run, say, level=lambda args: logging.WARNING)


def _run(args: argparse.Namespace) -> int:
    from . import commands

    return getattr(commands, args.run)(args)


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(f"reasonedit-data: {printable(text)}", file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. A further pipeline is one more function in the list."""
    parser = Parser(prog="reasonedit-data", description="Make training records by asking a model, resumable to the question.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for add in (_add_thinking_pairs, _add_reflection_triples, _add_reason50k, _add_from_traces, _add_feedback, _add_mini_seeds):
        add(commands)
    return parser


# ---- options -------------------------------------------------------------------------------------------------------------

KEY_VARIABLE = "REASONEDIT_APIKEY_VARIABLE"


def _command(commands, name: str, words: str, run: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and log in detail (or REASONEDIT_DEBUG=1)")
    parser.set_defaults(run=run, command=name)
    return parser


def _folder(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="for all that is written; to go on, the same again")
    add("--dry-run", action="store_true", help="print the first request; send and write nothing")
    add("--sample", type=whole(0, 10_000), default=0, metavar="N", help="write sample.html with N records (0: none)")


def _asking(parser: argparse.ArgumentParser, second: str) -> None:
    add = parser.add_argument
    add("--url", metavar="ADDRESS", help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    add("--model", metavar="NAME", help="the model's name there; it stands in every record")
    add("--api-key-env", default=KEY_VARIABLE, metavar="VAR", help=f"environment variable that holds the key ({KEY_VARIABLE})")
    add("--mllm", type=Path, metavar="DIR", help="in place of an endpoint: a Qwen2.5-VL folder, in this process")
    add("--world", type=Path, metavar="DIR", help="in place of an endpoint: the truth about the seeds of `mini-seeds`")
    add("--second-url", metavar="ADDRESS", help=f"the {second}'s endpoint (that of --url)")
    add("--second-model", metavar="NAME", help=f"the {second}'s model")
    add("--second-api-key-env", metavar="VAR", help="(that of --api-key-env)")
    add("--second-mllm", type=Path, metavar="DIR", help=f"in place of an endpoint: the {second} in this process")
    add("--concurrency", type=whole(1, 1024), default=4, metavar="N", help="requests at a time (4)")
    add("--per-minute", type=real(0.001, 1e6), metavar="N", help="requests begun in a minute at most (any number)")
    add("--timeout", type=real(0.001, 86400), default=120.0, metavar="S", help="seconds of one request (120)")
    add("--attempts", type=whole(1, 100), default=4, metavar="N", help="per question at most (4)")
    add("--pause", type=real(0, 3600), default=2.0, metavar="S", help="seconds before a second attempt, then doubled (2)")
    add("--max-side", type=whole(28, 8192), default=1024, metavar="PX", help="long side of a picture that is sent (1024)")
    add("--extra-tokens", type=whole(0, 1_000_000), default=0, metavar="N", help="room for models that think first (0)")
    add("--price", metavar="IN,OUT", help="of a million tokens, to state the cost")
    add("--retry", action="store_true", help="ask again what was rejected before")
    add("--limit", type=whole(1, 10**9), metavar="N", help="only the first N seeds")
    add("--ray", type=whole(1, 10_000), metavar="N", help="spread over N workers of Ray, each with --concurrency requests")
    add("--ray-gpus", type=real(0, 64), default=0.0, metavar="X", help="GPUs, or shares of one, that each of them needs (0)")
    add("--ray-address", metavar="ADDRESS", help="of a cluster that is there and shares this disk (one of this machine's own)")


def _add_thinking_pairs(commands) -> None:
    words = "instructions -> what is to be painted: sorted, taken apart or made abstract, verified, deduplicated, split"
    parser = _command(commands, "thinking-pairs", words, "run_pipeline")
    parser.add_argument("seeds", type=Path, metavar="SEEDS", help="records with an input picture and an instruction")
    _folder(parser)
    _asking(parser, "verifier")
    parser.add_argument("--keep-clear", type=real(0, 1), default=0.36, metavar="X", help="clear ones left as they are (0.36)")
    parser.add_argument("--held-out", type=real(0, 1), default=0.02, metavar="X", help="pictures kept for validation (0.02)")


def _add_reflection_triples(commands) -> None:
    words = "source, result and verdict: edited by own systems, scored alone, decided, edited again, audited, balanced"
    parser = _command(commands, "reflection-triples", words, "run_pipeline")
    add = parser.add_argument
    add("seeds", type=Path, metavar="SEEDS", help="records with an input picture and an instruction, best with a target too")
    _folder(parser)
    add("--editor", action="append", default=[], metavar="SYSTEM=DIR", help="reasonedit-s=DIR, mini-s, ...; several times")
    add("--edits", type=whole(1, 1000), default=2, metavar="N", help="seeds per picture and editor (2)")
    add("--edit-steps", type=whole(1, 1000), action="append", metavar="N", help="sampling steps; several times")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the editors")
    add("--dtype", choices=DTYPES, default="auto", help="of the editors")
    _asking(parser, "judge")
    add("--no-audit", action="store_true", help="no second judge")
    add("--negatives", type=real(0, 1), default=0.5, metavar="X", help="seeds that get a planted negative (0.5)")
    add("--success-at", type=real(0, 10), default=8.0, metavar="X", help="least score of a success (8)")
    add("--failed-at", type=real(0, 10), default=7.0, metavar="X", help="most of a failure (7)")
    add("--gain", type=real(0, 10), default=1.0, metavar="X", help="by which a second instruction must raise the score (1)")
    add("--ratio", default="3:1:1", metavar="S:R:F", help="success, reflection, failed in what is written, or all (3:1:1)")
    add("--held-out", type=real(0, 1), default=0.02, metavar="X", help="pictures kept for validation (0.02)")


def _add_reason50k(commands) -> None:
    words = "laws of the world -> hypothetical questions with a picture before and one after: painted, checked, ranked, split"
    parser = _command(commands, "reason50k", words, "run_pipeline")
    add = parser.add_argument
    add("seeds", type=Path, nargs="?", metavar="SEEDS", help="JSONL: id, category, scenario, law, scene")
    add("--editworld", type=Path, metavar="PATH", help="pairs of EditWorld as well: its folder, or train.json")
    _folder(parser)
    add("--source-model", type=Path, metavar="DIR", help="text-to-image folder of diffusers, for the pictures before")
    add("--ip-adapter", type=Path, metavar="FILE", help="IP-Adapter weights for it, image_encoder/ beside them")
    add("--ip-scale", type=real(0, 2), default=0.6, metavar="X", help="how much they take after the picture after (0.6)")
    add("--target-model", type=Path, metavar="DIR", help="for the pictures after (--source-model without its adapter)")
    add("--size", type=whole(16, 8192), metavar="PX", help="sides of the pictures after (the model's)")
    add("--steps", type=whole(1, 1000), metavar="N", help="sampling steps (the pipeline's)")
    add("--guidance", type=real(0, 100), metavar="G", help="(the pipeline's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the models named here")
    add("--dtype", choices=DTYPES, default="auto", help="of the text-to-image models")
    _asking(parser, "judge")
    add("--scenes", type=whole(0, 10_000), default=0, metavar="N", help="scenes to think of beside each seed's own (0)")
    add("--tries", type=whole(1, 100), default=2, metavar="N", help="pictures after per scene until one is good (2)")
    add("--least-grade", type=whole(0, 5), default=4, metavar="N", help="marks of 5 that a picture after needs (4)")
    add("--candidates", type=whole(1, 1000), default=8, metavar="N", help="pictures before per picture after (8)")
    add("--top", type=whole(1, 1000), default=1, metavar="N", help="of them that become records (1)")
    add("--clip", type=Path, metavar="DIR", help="a CLIP on this disk; without it its gate and measure drop out")
    add("--lpips", metavar="[NET=]FILE", help="network of torchvision's under LPIPS: alex, squeeze or vgg (alex); likewise")
    add("--aesthetics", metavar="FUNCTION", help="FILE.py:FUNCTION or MODULE:FUNCTION, path -> number; likewise")
    add("--spacy", type=Path, metavar="DIR", help="folder of a spaCy pipeline that finds further objects")
    add("--lpips-band", default="0.2,0.55", metavar="LEAST,MOST", help="distance of the two pictures (0.2,0.55)")
    add("--least-clip", type=real(-1, 1), default=0.22, metavar="X", help="of a picture before and its caption (0.22)")
    add("--most-ssim", type=real(-1, 1), default=0.95, metavar="X", help="likeness of the two pictures (0.95)")
    add("--near", type=whole(0, 64), default=3, metavar="BITS", help="of 64 by which two pictures before must differ (3)")
    add("--least-mark", type=real(0, 10), default=0.0, metavar="X", help="each of the judge's marks (0: any)")
    add("--held-out", type=whole(0, 10**6), default=400, metavar="N", help="records per category for validation (400)")
    add("--held-out-share", type=real(0, 1), default=0.1, metavar="X", help="of a category at most, where it is small (0.1)")


def _add_from_traces(commands) -> None:
    words = "saved runs and what you said of them (`feedback`) -> records; no model is asked"
    parser = _command(commands, "from-traces", words, "run_pipeline")
    parser.add_argument("traces", type=Path, nargs="+", metavar="PATH", help="run folders, PNGs of Save Trace, folders of such")
    _folder(parser)
    parser.add_argument("--held-out", type=real(0, 1), default=0.02, metavar="X", help="sources kept for validation (0.02)")
    parser.add_argument("--license", metavar="TEXT", help="noted in every record")
    parser.add_argument("--retry", action="store_true", help="read again what was rejected before")


def _add_feedback(commands) -> None:
    words = "say what you think of a saved run, round by round; it is kept beside the run"
    parser = _command(commands, "feedback", words, "run_feedback")
    add = parser.add_argument
    add("trace", type=Path, metavar="TRACE", help="a run's folder, or a PNG of Save Trace")
    add("--round", type=whole(1, 1000), metavar="N", help="which round, counted from 1")
    add("--accept", action="store_true", help="the result is as it should be")
    add("--reject", action="store_true", help="the result is good for nothing")
    add("--correct", metavar="TEXT", help="one more edit of the result would put it right: this one")
    add("--reason", metavar="TEXT", help="what you see; needed where the reflector said something else")
    add("--score", type=real(0, 10), metavar="X", help="agreement with the description; needed where its score is wrong")
    add("--thought", metavar="TEXT", help="what thinking should have made of your words")


def _add_mini_seeds(commands) -> None:
    parser = _command(commands, "mini-seeds", "draw seeds of the miniature world, to try a pipeline on", "run_mini_seeds")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--count", type=whole(1, 10**6), default=20, metavar="N", help="(20)")
    parser.add_argument("--seed", type=whole(0, 2**20), default=0, metavar="S", help="(0)")
    parser.add_argument("--language", choices=("en", "zh"), help="(both)")
    parser.add_argument("--for", dest="pipeline", choices=("reason50k", "others"), default="others", help="(others)")


if __name__ == "__main__":
    sys.exit(main())
