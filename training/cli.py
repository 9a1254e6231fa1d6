"""The command `reasonedit-train`: from records to a LoRA or a model, stage after stage.

Exit codes: 0 done; 2 an error, told in a sentence or two, or problems that `check` found; 75 a run that was asked to stop and
has saved; 130 stopped by Ctrl-C. Torch is imported inside the commands, so that `--help` and a faulty recipe answer at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..reasonedit_core.cli import explain, whole
from .program import EXIT_ERROR, Parser, printable, run_program

FORMATS = ("comfyui", "peft", "merged")
MINI_BRAIN = "mini-brain"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return run_program(
        build_parser,
        argv,
        lambda args: args.run(args),
        say,
        level=lambda args: logging.WARNING if args.quiet else logging.INFO,
        stopped="stopped",
        explain=_explain,
        handler=_Spoken(),
    )


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(f"reasonedit-train: {printable(text)}", file=sys.stderr, flush=True)


def _explain(error: BaseException) -> str | None:
    words = explain(error)
    if words and type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return (
            f"{words.partition(';')[0]}; try checkpointing = true, smaller budgets (every_stage.packs.image), "
            'model.dit_weights = "fp8", or more model.swap_blocks; `reasonedit-train check` estimates what is needed'
        )
    return words


class _Spoken(logging.Handler):
    """Log records as lines of `say`; what is only for information without a word before it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        say(text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="reasonedit-train", description="Train ReasonEdit: reasoning, editing, both; LoRA or all weights.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    adders = (_add_init, _add_check, _add_convert, _add_index, _add_cache, _add_plan, _add_run, _add_resume)
    for add in (*adders, _add_validate, _add_sample, _add_export, _add_mini):
        add(commands)
    return parser


# ---- commands ------------------------------------------------------------------------------------------------------------


def run_init(args: argparse.Namespace) -> int:
    """`reasonedit-train init`: a bundled recipe as a file of one's own."""
    from .commands import write_recipe
    from .config_file import find_recipe, recipe_names

    if args.recipe is None:
        print("\n".join(recipe_names()))
        return 0
    source = find_recipe(args.recipe)
    out = args.to or Path(source.name)
    write_recipe(source, out)
    print(f"written: {out}; next: edit it, then `reasonedit-train check {out}`")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """`reasonedit-train check`."""
    config = _config(args)
    from .check import check

    report = check(config, pictures=not args.no_pictures)
    print(report.text)
    return 0 if report.good else EXIT_ERROR


def run_convert(args: argparse.Namespace) -> int:
    """`reasonedit-train convert`."""
    from .commands import convert

    return convert(args)


def run_index(args: argparse.Namespace) -> int:
    """`reasonedit-train index`."""
    from .commands import index

    return index(_config(args))


def run_cache(args: argparse.Namespace) -> int:
    """`reasonedit-train cache`."""
    from .commands import cache

    return cache(_config(args))


def run_plan(args: argparse.Namespace) -> int:
    """`reasonedit-train plan`."""
    from .commands import plan

    return plan(_config(args), args.world)


def run_run(args: argparse.Namespace) -> int:
    """`reasonedit-train run`."""
    config = _config(args)
    from .run import run

    return run(config, source=args.recipe, quiet=args.quiet)


def run_resume(args: argparse.Namespace) -> int:
    """`reasonedit-train resume`."""
    config = _snapshot(args)
    from .run import run

    return run(config, source=str(args.run_dir), quiet=args.quiet, resume=True, allow_changed=tuple(args.allow_changed))


def run_validate(args: argparse.Namespace) -> int:
    """`reasonedit-train validate`."""
    config = _snapshot(args)
    from .run import validate_run

    return validate_run(config, stage=args.stage)


def run_sample(args: argparse.Namespace) -> int:
    """`reasonedit-train sample`."""
    config = _snapshot(args)
    from .run import sample_run

    return sample_run(config, stage=args.stage)


def run_export(args: argparse.Namespace) -> int:
    """`reasonedit-train export`."""
    config = _snapshot(args)
    from .run import export_run

    return export_run(config, formats=(args.format,), stage=args.stage, out=args.to)


def run_mini(args: argparse.Namespace) -> int:
    """`reasonedit-train mini`: a miniature from nothing."""
    if args.system == MINI_BRAIN:
        from .mini.brain_chain import BrainChain

        brain = BrainChain(args.out.absolute(), args.share, args.links, args.threads, tuple(args.set), args.quiet)
        return brain.make(args.until)
    from .mini.chain import Chain

    chain = Chain(args.system, args.out.absolute(), args.share, args.links, args.threads, tuple(args.set), args.quiet)
    return chain.make(args.until)


def _config(args: argparse.Namespace):
    from .config_file import load_config
    from .stages import plan_stages

    config = load_config(args.recipe, args.set)
    plan_stages(config)  # a recipe whose tables do not go together is told before torch is imported
    return config


def _snapshot(args: argparse.Namespace):
    from .config_file import read_snapshot
    from .stages import plan_stages

    config = read_snapshot(args.run_dir, args.set)
    plan_stages(config)
    return config


# ---- options -------------------------------------------------------------------------------------------------------------


def _common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings and results")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and log in detail (or REASONEDIT_DEBUG=1)")
    parser.set_defaults(run=run)


def _sets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="put a value over the recipe's: run.out=DIR, stage.0.steps=5, stage.editing.optim.warmup=10",
    )


def _recipe(commands, name: str, run, words: str, description: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words, description=description or words[0].upper() + words[1:] + ".")
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of a bundled recipe (see init)")
    _sets(parser)
    _common(parser, run)
    return parser


def _of_run(commands, name: str, run, words: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="the run folder (run.out)")
    _sets(parser)
    _common(parser, run)
    return parser


def _add_init(commands) -> None:
    parser = commands.add_parser("init", help="write a bundled recipe to a file of your own; without a name, list them")
    parser.add_argument("recipe", nargs="?", metavar="NAME")
    parser.add_argument("--to", type=Path, metavar="FILE", help="(NAME.toml in this folder)")
    _common(parser, run_init)


def _add_check(commands) -> None:
    words = "say everything that is wrong with recipe and data, what would be trained, and how much memory it takes"
    parser = _recipe(commands, "check", run_check, words)
    parser.add_argument("--no-pictures", action="store_true", help="do not open the pictures (quick, and blind to broken ones)")


def _add_convert(commands) -> None:
    parser = commands.add_parser("convert", help="make records of a data set in another layout")
    parser.add_argument("layout", metavar="FROM", help="the layout; `list` names those that are known")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="its folder or file")
    add = parser.add_argument
    add("--to", type=Path, metavar="OUT", help="folder for records.jsonl")
    add("--images", metavar="NAME", help="folder of the target pictures in DIR, where it has an unusual name")
    add("--control", action="append", default=[], metavar="NAME", help="folder of pictures that go in; may be repeated")
    add("--copy", action="store_true", help="copy the pictures beside the records instead of pointing to them")
    add("--overwrite", action="store_true", help="replace records that are there")
    add("--split", choices=("train", "held_out"), help="for all records, over what the data say")
    add("--license", metavar="TEXT", help="noted in every record")
    add("--origin", metavar="TEXT", help="noted in every record")
    _common(parser, run_convert)


def _add_index(commands) -> None:
    _recipe(commands, "index", run_index, "read all records and write the manifest with hashes and sizes")


def _add_cache(commands) -> None:
    _recipe(commands, "cache", run_cache, "compute latents and, where the MLLM is frozen, its states once")


def _add_plan(commands) -> None:
    parser = _recipe(commands, "plan", run_plan, "print how records are packed and how evenly the work is shared")
    parser.add_argument("--world", type=whole(1, 65536), default=1, metavar="N", help="processes to plan for (1)")


def _add_run(commands) -> None:
    _recipe(commands, "run", run_run, "train all stages of a recipe, one after the other")


def _add_resume(commands) -> None:
    parser = _of_run(commands, "resume", run_resume, "go on with an interrupted run, at its stage and step")
    parser.add_argument(
        "--allow-changed", action="append", default=[], metavar="KEY", help="go on although this key of the config differs"
    )


def _stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", metavar="NAME", help="after which stage (the last finished one)")


def _add_validate(commands) -> None:
    _stage(_of_run(commands, "validate", run_validate, "measure the losses on held-out records"))


def _add_sample(commands) -> None:
    _stage(_of_run(commands, "sample", run_sample, "edit held-out pictures with what was trained; a contact sheet"))


def _add_export(commands) -> None:
    parser = _of_run(commands, "export", run_export, "write what was trained for other programs")
    parser.add_argument("--format", choices=FORMATS, required=True, help="comfyui: LoRA files; peft: folders; merged: weights")
    parser.add_argument("--to", type=Path, metavar="DIR", help="(the run folder)")
    _stage(parser)


def _add_mini(commands) -> None:
    words = "make a miniature from nothing: vocabulary, records, autoencoder, base models, the three stages"
    description = f"{words[0].upper()}{words[1:]}. Start the same command again to go on where it was."
    parser = commands.add_parser("mini", help=words, description=description)
    add = parser.add_argument
    add("--system", required=True, metavar="NAME", help="mini-s (Step1X-Edit in small), mini-q (Qwen-Image-Edit) or mini-brain")
    add("--out", type=Path, required=True, metavar="DIR", help="all that is made; both miniatures may share it")
    links = (
        "tokens, records, vae, words, scenes, reasoning, base, edits, start, stages, finish or compare; of mini-brain tokens, "
        "records, vae, llava, editor, start, the name of a row of its tables, or finish"
    )
    add("--until", metavar="LINK", help=f"stop after {links}")
    add("--share", type=float, default=1.0, metavar="S", help="of all records and steps, for a trial of the command (1)")
    add("--links", type=Path, metavar="DIR", help="take links that were made elsewhere, where OUT has none of its own")
    add("--threads", type=whole(0, 1024), default=0, metavar="N", help="CPU threads of torch (0: its own choice)")
    _sets(parser)
    _common(parser, run_mini)


if __name__ == "__main__":
    sys.exit(main())
