"""What the commands `reasonedit-train`, `reasonedit-data` and `reasonedit-eval` have in common: parser, exit codes, and how
errors are told. No torch here."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..reasonedit_core.cli import explain
from ..reasonedit_core.errors import ConfigError, Interrupted, ReasonEditError

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130

_OURS = __package__.partition(".")[0]


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of printing the whole usage; no abbreviated options, which break when options are added."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (`{self.prog} --help` lists the options)")


def printable(text: str) -> str:
    """`text` with codes in the place of characters that a terminal would obey: what a model or a record says must not move the
    cursor."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def run_program(
    build_parser: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace], int],
    say: Callable[[str], None],
    *,
    level: Callable[[argparse.Namespace], int],
    stopped: str = "stopped; the same command goes on from here",
    explain: Callable[[BaseException], str | None] = explain,
    handler: logging.Handler | None = None,
) -> int:
    """Parse and run one command; returns its exit code. Errors are told in a sentence through `say`; with --debug, or where
    there is no sentence, they are raised.

    level: of our loggers while it runs, without --debug. explain: words for an error that is not ours. handler: of our loggers
    while it runs.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows its code instead of a traceback
            stream.reconfigure(errors="backslashreplace")
    debug = os.environ.get("REASONEDIT_DEBUG", "0") not in ("", "0")
    ours = logging.getLogger(_OURS)
    before = ours.level
    if handler is not None:
        ours.addHandler(handler)
    try:
        args = build_parser().parse_args(argv)
        debug = debug or args.debug
        ours.setLevel(logging.DEBUG if debug else level(args))
        return run(args)
    except KeyboardInterrupt:
        say(stopped)
        return EXIT_INTERRUPTED
    except Interrupted as error:
        say(f"stopped: {error}")
        return EXIT_INTERRUPTED
    except ReasonEditError as error:
        if debug:
            raise
        say(f"error: {error}")
        return EXIT_ERROR
    except Exception as error:
        words = None if debug else explain(error)
        if words is None:
            raise
        say(f"error: {words}")
        return EXIT_ERROR
    finally:
        if handler is not None:
            ours.removeHandler(handler)
        ours.setLevel(before)
