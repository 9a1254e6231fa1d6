"""The commands of `reasonedit-eval` for published benchmarks. Everything heavy is imported in `commands`, when one is run."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from ....reasonedit_core.cli import MAX_SEED, POLICIES, lora, real, whole
from ....reasonedit_core.errors import ConfigError
from ....reasonedit_core.weight_options import DTYPES

BENCHES = ("gedit", "imgedit", "kris", "rise", "reason50k")
SYSTEM = ("reasonedit-s", "reasonedit-q", "mini-s", "mini-q")
HOW = ("base", "think", "loop", "reroll")


def add_commands(commands: Any) -> None:
    """Add list, prepare, generate, import, judge, score, report, compare, agree, export and doctor."""
    for add in (_list, _prepare, _generate, _import, _judge, _score, _report, _compare, _agree, _export, _doctor):
        add(commands)


def _command(commands: Any, name: str, words: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and log in detail (or REASONEDIT_DEBUG=1)")

    def run(args: argparse.Namespace) -> int:
        return getattr(import_module(".commands", __package__), f"run_{name}")(args)

    parser.set_defaults(run=run)
    return parser


def _list(commands: Any) -> None:
    _command(commands, "list", "benchmarks, protocols, aggregations, judges and published rows that are known")


def _prepare(commands: Any) -> None:
    parser = _command(commands, "prepare", "a benchmark as its authors hand it out -> manifest.jsonl and its pictures")
    add = parser.add_argument
    add("bench", choices=BENCHES)
    add("--src", required=True, type=Path, metavar="PATH", help="folder or file of the benchmark; nothing is downloaded")
    add("--images", type=Path, metavar="DIR", help="where its pictures lie, if not where they are handed out")
    add("--out", required=True, type=Path, metavar="DIR")


def _items(parser: argparse.ArgumentParser, run: bool = True) -> None:
    add = parser.add_argument
    add("--manifest", required=True, type=Path, metavar="PATH", help="what `prepare` wrote")
    if run:
        add("--run", dest="folder", required=True, type=Path, metavar="DIR", help="what `generate` or `import` wrote")


def _some(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lang", choices=("en", "cn"), help="GEdit: only items in this language (all)")
    parser.add_argument("--sample", type=whole(1, 10**6), metavar="N", help="N items, chosen by the hashes of their ids (all)")


def _generate(commands: Any) -> None:
    parser = _command(commands, "generate", "edit the items: resumable, in shards, in the official layout")
    _items(parser, run=False)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="the run's folder; to go on, the same again")
    add(
        "--system",
        required=True,
        metavar="HOW",
        help='base | think | loop | reroll of --load; mini-s[:HOW] (loop); cmd:"PROGRAM {source} {instruction} {out}"',
    )
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="only every N-th item, from the I-th (1/1)")
    add("--seed", type=whole(0, MAX_SEED), default=0, metavar="S", help="each item's seed follows from it (0)")
    add("--several", choices=("skip", "first", "concat"), default="skip", help="items with several sources (skip)")
    add("--retry", action="store_true", help="try again what failed before")
    add("--timeout", type=real(0.001, 1e6), default=3600.0, metavar="S", help="seconds of cmd for one picture (3600)")
    _some(parser)
    group = parser.add_argument_group("systems of this project")
    add = group.add_argument
    add("--load", choices=SYSTEM, help="which; needed unless it is a command")
    add("--weights", type=Path, metavar="DIR", help="its folder (not needed for a miniature that comes along)")
    add("--reasoner", default="qwen", metavar="WHO", help="qwen | qwen:DIR | none | remote:URL | scripted:FILE (qwen)")
    add("--dialogue", type=Path, metavar="FILE", help="dialogue pack to speak with")
    add("--policy", choices=POLICIES, default="reasonedit", help="how the loop decides (reasonedit)")
    add("--rounds", type=whole(1, 100), default=3, metavar="N", help="largest number of edits of loop and reroll (3)")
    add("--steps", type=whole(1, 1000), metavar="N", help="denoising steps (the checkpoint's)")
    add("--guidance", type=real(0, 100), metavar="G", help="true CFG scale (the checkpoint's)")
    add("--size", type=whole(16, 8192), metavar="LEVEL", help="square root of the generated area (the checkpoint's)")
    add("--dtype", choices=DTYPES, default="auto")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--offload", choices=("none", "component", "block"), default="none")
    add("--lora", type=lora, action="append", default=[], metavar="FILE[:SCALE]", help="may be repeated")


def _import(commands: Any) -> None:
    parser = _command(commands, "import", "somebody else's edited pictures in the official layout -> a run")
    _items(parser, run=False)
    add = parser.add_argument
    add("--layout", choices=BENCHES, metavar="BENCH", help="the manifest's own, as a check")
    add("--dir", required=True, type=Path, metavar="DIR", help="the folder that holds them")
    add("--name", required=True, metavar="NAME", help="of the system that made them, for tables")
    add("--out", required=True, type=Path, metavar="DIR", help="the run's folder")


def _asking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--protocol", metavar="NAME", help="<bench>-re: our own wording; <bench>-official: that of --prompts (<bench>-re)")
    add("--prompts", type=Path, metavar="FILE", help="the benchmark's wording out of your copy of it: JSON, call -> text")
    add("--judge", required=True, metavar="WHO", help="openai:MODEL[@URL] | local:DIR | replay:FILE | scripted:FILE")
    add("--identity", type=whole(0, 100), default=0, metavar="N", help="runs of a mark for identity preservation (0)")
    add("--anchors", type=whole(0, 10**6), default=0, metavar="N", help="items judged unedited, and by their target (0)")
    add("--quirks", choices=("official",), help="GEdit: the edited picture is brought to its source's size, as in its script")
    add("--api-key-env", metavar="VAR", help="environment variable with the key (REASONEDIT_API_KEY)")
    add("--extra-tokens", type=whole(0, 1_000_000), default=0, metavar="N", help="room for models that think first (0)")
    add("--timeout", type=real(0.001, 86400), default=120.0, metavar="S", help="seconds of one request (120)")
    add("--price", metavar="IN,OUT", help="of a million tokens, to state the cost")
    _some(parser)


def _judge(commands: Any) -> None:
    parser = _command(commands, "judge", "ask a judge about every picture of a run: resumable to the question")
    _items(parser)
    _asking(parser)
    add = parser.add_argument
    add("--concurrency", type=whole(1, 1024), default=4, metavar="N", help="requests at a time (4)")
    add("--per-minute", type=real(0.001, 1e6), metavar="N", help="requests begun in a minute at most (any number)")
    add("--attempts", type=whole(1, 100), default=4, metavar="N", help="per question at most (4)")
    add("--pause", type=real(0, 3600), default=2.0, metavar="S", help="seconds before a second attempt, then doubled (2)")
    add("--retry", action="store_true", help="ask again what had no answer before")


def _score(commands: Any) -> None:
    parser = _command(
        commands, "score", "judgements -> scores.json: per item, per group, overall, with intervals and what is missing"
    )
    _items(parser)
    add = parser.add_argument
    add("--judged", metavar="NAME", help="folder below judged/ (all that are there)")
    add("--aggregate", metavar="RULE", help="kris-sample, kris-flat, gedit-micro, ... (the protocol's)")
    add("--lang", choices=("en", "cn"), help="GEdit: which language, where both were judged")
    add("--missing", choices=("skip", "zero", "error"), default="skip", help="what an item without a picture counts as (skip)")
    add("--no-clamp", dest="clamp", action="store_false", help="ImgEdit: marks may exceed the first one, as in its script")
    add("--quirks", choices=("official",), help="repeat the faults of the official script, to compare with it only")
    add("--clip", type=Path, metavar="DIR", help="a CLIP on this disk, for CLIP-T, CLIP-I and CLIP-dir")
    add("--dino", type=Path, metavar="DIR", help="a DINO or DINOv2 on this disk")
    add("--lpips", metavar="[NET=]FILE", help="network of torchvision's under LPIPS: alex, squeeze or vgg (alex)")
    add("--aesthetics", metavar="FUNCTION", help="FILE.py:FUNCTION or MODULE:FUNCTION, path -> number, more for better ones")
    add("--masks", type=Path, metavar="DIR", help="masks named as the pictures are, white where the edit may change something")
    add("--ratings", type=Path, metavar="CSV", help="people's scores (rater,id,score) for Ins-Align")
    add("--ratings-scale", default="0,1", metavar="LEAST,BEST", help="of their scores (0,1)")
    add("--no-pixels", dest="pixels", action="store_false", help="do not measure differences of pixels")


def _report(commands: Any) -> None:
    parser = _command(commands, "report", "tables (Markdown, CSV, LaTeX), figures and a page of several scored runs")
    add = parser.add_argument
    add("--runs", required=True, nargs="+", metavar="[NAME=]DIR", help="run folders, or folders below their judged/")
    add("--manifest", type=Path, metavar="PATH", help="for the page with pictures")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--refs", choices=("paper", "none"), default="paper", help="published rows beside ours (paper)")
    add("--show", type=whole(0, 10_000), default=24, metavar="N", help="items on the page, chosen by their hashes (24)")


def _compare(commands: Any) -> None:
    parser = _command(commands, "compare", "two scored runs, item by item: paired bootstrap, wins, ties and losses per group")
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--manifest", required=True, type=Path, metavar="PATH")


def _agree(commands: Any) -> None:
    parser = _command(commands, "agree", "two judges on one run: rank correlation, weighted kappa, bias")
    parser.add_argument("a", type=Path, metavar="A", help="folder below judged/, or its judgements.jsonl")
    parser.add_argument("b", type=Path, metavar="B")


def _export(commands: Any) -> None:
    parser = _command(commands, "export", "a run's pictures, and its marks if it is scored, as the official scripts read them")
    _items(parser)
    parser.add_argument("--judged", metavar="NAME", help="folder below judged/, where there are several")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")


def _doctor(commands: Any) -> None:
    parser = _command(commands, "doctor", "what judging would take, before it is paid for; --try asks one question")
    _items(parser, run=False)
    add = parser.add_argument
    add("--run", dest="folder", type=Path, metavar="DIR", help="(counted as if every item had a picture)")
    _asking(parser)
    add("--per-picture", type=whole(1, 100_000), default=1000, metavar="N", help="tokens that a picture costs (1000)")
    add("--try", dest="trial", action="store_true", help="send one question")


def shard(text: str) -> tuple[int, int]:
    """An option type: I/N with 1 <= I <= N."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        number, shards = map(int, parts)
        if 1 <= number <= shards:
            return number, shards
    raise argparse.ArgumentTypeError(f"expected I/N such as 1/4, I from 1 to N, found {text!r}")


def named_run(text: str) -> tuple[str, Path]:
    """NAME=DIR, or a folder alone, which is then its own name. ConfigError for no folder."""
    name, equals, path = text.partition("=")
    folder = Path(path if equals else text)
    if not folder.exists():
        raise ConfigError(f"--runs: expected [NAME=]DIR, found nothing at {folder}. Correct the path.")
    return (name if equals else folder.resolve().name), folder
