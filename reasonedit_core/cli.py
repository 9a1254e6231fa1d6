"""The command `reasonedit`: edit, demo, doctor, bench, download, dialogue import.

Exit codes: 0 done; 1 `doctor` found a problem; 2 an error, told in a sentence or two; 3 `download` has the weights but no
dialogue pack; 130 stopped by Ctrl-C. Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .brain_options import add_brain_options, check_brain_options, use_cues
from .errors import ConfigError, Interrupted, ReasonEditError
from .mini.models import BRAINS, MINIS, has_mini
from .region_options import add_region_options, interval_of, region_of, step_cache_of
from .weight_options import add_weight_options, spec_of

if TYPE_CHECKING:
    from .load import System
    from .types import EditRequest

PUBLISHED = ("reasonedit-s", "reasonedit-q")
SYSTEMS = (*PUBLISHED, "reasonbrain")
POLICIES = ("reasonedit", "released")
SCORES = ("lazy", "always")
MAX_SEED = 2**63 - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows its code instead of a traceback
            stream.reconfigure(errors="backslashreplace")
    debug, args = os.environ.get("REASONEDIT_DEBUG", "0") not in ("", "0"), argparse.Namespace()
    ours, spoken = logging.getLogger(__package__), _Spoken()
    level = ours.level
    ours.addHandler(spoken)
    try:
        args = build_parser().parse_args(argv, argparse.Namespace(spoken=spoken))
        debug = debug or args.debug
        ours.setLevel(logging.DEBUG if debug else logging.WARNING)
        return args.run(args)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except Interrupted as error:
        say(f"stopped: {error}{_kept(error, args)}")
        return 130
    except ReasonEditError as error:
        if debug:
            raise
        say(f"error: {error}{_kept(error, args)}")
        return 2
    except Exception as error:
        words = None if debug else explain(error)
        if words is None:
            raise
        say(f"error: {words}")
        return 2
    finally:
        ours.removeHandler(spoken)
        ours.setLevel(level)


def explain(error: BaseException) -> str | None:
    """Words for an error of a library whose cause and cure are known; None for all others."""
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        said = (str(error).splitlines() or ["MemoryError"])[0]
        return (
            f"expected enough memory for the run, found none left ({said}); "
            "try --offload component, then --offload block, or a smaller --size"
        )
    chain: BaseException | None = error
    while chain is not None:
        if "torchaudio" in str(chain).lower():
            return (
                "expected libraries that import, found a torchaudio that does not fit this torch and takes transformers down "
                "with it; remove it (pip uninstall torchaudio, nothing here needs it) or install the one that matches"
            )
        chain = chain.__cause__ or chain.__context__
    return None


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr. What a model wrote must not move the cursor."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    print(f"reasonedit: {shown}", file=sys.stderr, flush=True)


class _Spoken(logging.Handler):
    """Log records as lines of `say`; remembers them, so that a note which was logged as well is not told twice."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.texts.add(text)
        say(f"{record.levelname.lower()}: {text}")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="reasonedit", description="Edit pictures by thinking, editing, reflecting and trying again.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for add in (_add_edit, _add_demo, _add_doctor, _add_bench, _add_download, _add_dialogue):
        add(commands)
    return parser


# --- commands ---


def run_edit(args: argparse.Namespace) -> int:
    """`reasonedit edit`."""
    from .images import load_image
    from .kernels import chosen_backends
    from .load import choose_device, choose_dtype, load_system
    from .mini.scenes import picture_remark
    from .report import RunFolder
    from .run import Bars, outcome_line, round_line, run_to_folder

    if not args.instruction.strip():
        raise ConfigError("INSTRUCTION: expected words that say what to change, found none")
    _check_draft(args)
    check_brain_options(args)
    if args.weights is None and args.system not in {**MINIS, **BRAINS}:
        raise ConfigError(f"--weights: expected a folder or file of a checkpoint of {args.system}, found none; name it")
    lazy = (args.scores or ("always" if args.policy == "released" else "lazy")) == "lazy"
    if lazy and args.policy == "released":
        raise ConfigError("--scores: expected always with --policy released, which chooses by scores, found lazy; leave it out")
    picture = load_image(args.image)
    given = {"image": picture.rgb, "references": tuple(load_image(path).rgb for path in args.reference)}
    given |= {"region": region_of(args, picture.rgb), "guidance_interval": interval_of(args)}
    given |= {"step_cache": step_cache_of(args)}
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    bars = Bars(args.quiet)
    tell: Callable[[str], None] = (lambda text: None) if args.quiet else say
    run = {"image": str(args.image), "references": [str(path) for path in args.reference], "system": args.system}
    run |= {"policy": args.policy, "scores": "lazy" if lazy else "always", "reasoner": args.reasoner}
    run |= {"device": device.type, "dtype": dtype, "attention": args.attention}
    run |= {"compiled": args.compile, "batched_cfg": args.batched_cfg}
    folder = RunFolder(args.out, alpha=picture.alpha, run=run, counts=lambda: system.counts)
    with bars.loading() as on_progress:
        system = load_system(spec_of(args, str(device), dtype), on_progress=on_progress)
    use_cues(system, args, picture.rgb, tell)
    policy = replace(system.policy, lazy_scores=lazy)
    folder.describe(dialogue=pack_record(system.pack_origin), loras=_told(args.lora))
    folder.note = system.settings.notice
    if args.draft_lora:
        folder.describe(draft_lora=_told([args.draft_lora])[0])
    if args.reasoner_lora:
        folder.describe(reasoner_loras=_told(args.reasoner_lora))
    for note in [picture.note and f"{args.image}: {picture.note}", *system.notes]:
        if note and note not in args.spoken.texts:
            tell(note)
    if remark := picture_remark(system.settings.pictures, picture.rgb):
        say(f"warning: {args.image}: {remark}")
    if system.reasoner is None:
        folder.describe(reasoner="none")
    request = _request(args, system, given)
    chosen_backends()  # what ran before is not of this run
    folder.ran = partial(chosen_backends, forget=False)
    trace = run_to_folder(system, request, policy, folder, bars=bars, say=say)
    for done in trace.rounds:
        print(round_line(done))
    print(outcome_line(trace))
    print(f"written: {folder.folder / 'result.png'}, rounds/, sheet.png, trace.json")
    return 0


def _request(args: argparse.Namespace, system: System, given: Mapping[str, Any]) -> EditRequest:
    """What is asked of a loaded system: the options, and the checkpoint's defaults where they say nothing. given: fields that
    were read before anything was loaded."""
    from .types import Draft, EditRequest

    has_reasoner = system.reasoner is not None
    return EditRequest(
        **given,
        instruction=args.instruction,
        seed=args.seed,
        steps=_or(args.steps, system.defaults["steps"]),
        guidance=_or(args.guidance, system.defaults["guidance"]),
        size_level=_or(args.size, system.defaults["size_level"]),
        negative=_or(args.negative, system.defaults["negative"]),
        max_rounds=args.rounds,
        max_seconds=args.max_seconds,
        think=args.think and has_reasoner,
        reflect=args.reflect and has_reasoner,
        draft=None if args.draft_steps is None else Draft(args.draft_steps, args.draft_guidance),
        image_guidance=args.image_guidance,
    )


def _check_draft(args: argparse.Namespace) -> None:
    """ConfigError where options of drafts stand without what they need."""
    given = [name for name in ("guidance", "lora") if getattr(args, f"draft_{name}") is not None]
    if args.draft_steps is None:
        if given:
            raise ConfigError(f"--draft-{given[0]}: expected --draft-steps beside it, found none; add it")
        return
    if args.policy == "released":
        raise ConfigError("--draft-steps: expected --policy reasonedit, found released, which has no drafts; leave one out")
    if not args.reflect or args.reasoner == "none":
        raise ConfigError("--draft-steps: expected a run that reflects, found one that does not; leave it out")


def run_demo(args: argparse.Namespace) -> int:
    """`reasonedit demo`."""
    args.spoken.setLevel(logging.ERROR)  # warnings about weights are for real ones
    if not has_mini(args.system):
        from .demo_random import demo as wiring

        wiring(None, args.out, quiet=args.quiet, tell=print, say=say)
        return 0
    from .demo import demo

    demo(args.out, system=args.system, seed=args.seed, quiet=args.quiet, tell=print, say=say)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """`reasonedit doctor`."""
    from .doctor import examine, render

    findings = examine(args.weights)
    print(render(findings))
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def run_bench(args: argparse.Namespace) -> int:
    """`reasonedit bench`."""
    from .bench.command import run

    run(args, tell=lambda line: print(line, flush=True), say=(lambda text: None) if args.quiet else say)
    return 0


def run_download(args: argparse.Namespace) -> int:
    """`reasonedit download`."""
    from .download import download

    done = download(
        args.system,
        args.to,
        repo=args.repo,
        revision=args.revision,
        dialogue_from=args.dialogue_from,
        quiet=args.quiet or not sys.stderr.isatty(),
    )
    print(f"{done.repo}@{done.revision[:12]}: {done.files} files, {done.nbytes / 1e9:.2f} GB in {done.folder}")
    if done.pack_problem:
        target = done.folder / "dialogue.toml"
        say(
            f"the weights are complete, the dialogue pack is missing: {done.pack_problem} "
            f"Fetch it later with: reasonedit dialogue import SOURCE --out {target}"
        )
        return 3
    if done.pack:
        print(f"dialogue pack: {done.pack}")
    return 0


def run_dialogue_import(args: argparse.Namespace) -> int:
    """`reasonedit dialogue import`."""
    from .dialogue.importer import import_released
    from .files import write_whole

    result = import_released(args.source)
    print(f"dialogue pack: {write_whole(args.out, result.text.encode())} ({', '.join(result.found)})")
    for missing in result.missing:
        say(f"not found in the source: {missing}")
    return 0


def pack_record(origin: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Which dialogue pack a run speaks from, for the trace; a pack that is a file is known by its contents."""
    if origin is None:
        return None
    path = Path(str(origin.get("path", "")))
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {**origin, "sha256": digest}


# --- options ---


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of printing the whole usage; no abbreviated options, which break when options are added."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (`{self.prog} --help` lists the options)")


def _add_common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and log in detail (or REASONEDIT_DEBUG=1)")
    parser.set_defaults(run=run)


def _add_edit(commands) -> None:
    parser = commands.add_parser("edit", help="edit a picture", description="Edit a picture with a released checkpoint.")
    _add_common(parser, run_edit)
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the picture to edit")
    add("instruction", metavar="INSTRUCTION", help="what to change, in your own words")
    add("--system", choices=(*SYSTEMS, *MINIS, *BRAINS), required=True, help="mini-s, mini-q, mini-brain: miniatures")
    add("--weights", type=Path, metavar="DIR", help="folder or file of a released checkpoint (not needed for a miniature)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for result.png, rounds/, sheet.png, trace.json")
    group = parser.add_argument_group("reasoning")
    add = group.add_argument
    add(
        "--reasoner",
        type=reasoner,
        default="qwen",
        metavar="WHO",
        help="qwen | qwen:DIR | none | remote:URL | scripted:FILE (qwen: the checkpoint's own MLLM)",
    )
    add("--dialogue", type=existing_path, metavar="FILE", help="dialogue pack to speak with")
    add("--policy", choices=POLICIES, default="reasonedit", help="how the loop decides (reasonedit)")
    add("--scores", choices=SCORES, help="lazy: edit and quality scores only where they compare rounds (released: always)")
    add("--no-think", dest="think", action="store_false", help="edit with your words as they are")
    add("--no-reflect", dest="reflect", action="store_false", help="one edit, no verdict")
    add("--rounds", type=whole(1, 100), default=3, metavar="N", help="largest number of edits (3)")
    add("--max-seconds", type=real(0, 1e7), metavar="S", help="start no round after this time")
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--steps", type=whole(1, 1000), metavar="N", help="denoising steps (the checkpoint's)")
    add("--guidance", type=real(0, 100), metavar="G", help="true CFG scale (the checkpoint's); 1 or less: no negative pass")
    add("--size", type=whole(16, 8192), metavar="LEVEL", help="square root of the generated area (the checkpoint's: 1024)")
    add("--draft-steps", type=whole(1, 1000), metavar="N", help="reflect on drafts of N steps; only the chosen one in full")
    add("--draft-guidance", type=real(0, 100), metavar="G", help="true CFG scale of drafts (that of --guidance)")
    add("--draft-lora", type=lora, metavar="FILE[:SCALE]", help="few-step LoRA for drafts alone (with --draft-steps)")
    add("--negative", metavar="TEXT", help="what the picture should not be")
    add("--seed", type=whole(0, MAX_SEED), default=0, metavar="N", help="of all random draws (0)")
    add("--reference", type=Path, nargs="+", default=[], metavar="IMAGE", help="further pictures, for systems that take them")
    add_region_options(parser, whole, real)
    add_brain_options(parser, real)
    add_weight_options(parser, lora)


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="think, edit and reflect on three drawn scenes, with weights that come along",
        description="Run the whole loop on three scenes that no training has seen, with the miniature weights of the package. "
        "The exact judge marks every round.",
    )
    _add_common(parser, run_demo)
    parser.add_argument("--system", choices=MINIS, default="mini-s", help="which miniature (mini-s)")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=1, metavar="N", help="of the scenes (1)")
    parser.add_argument("--out", type=Path, default=Path("reasonedit-demo"), metavar="DIR", help="(./reasonedit-demo)")


def _add_doctor(commands) -> None:
    parser = commands.add_parser("doctor", help="say what is installed, what would run, and what is broken")
    _add_common(parser, run_doctor)
    parser.add_argument("--weights", type=Path, metavar="DIR", help="also look into this checkpoint folder")


def _add_bench(commands) -> None:
    from .bench.options import add_options

    parser = commands.add_parser("bench", help="count and time the work, beside the released code where it is at hand")
    _add_common(parser, run_bench)
    add_options(parser, whole)


def _add_download(commands) -> None:
    parser = commands.add_parser("download", help="fetch weights and their dialogue pack; goes on where it stopped")
    _add_common(parser, run_download)
    parser.add_argument("system", choices=PUBLISHED)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="another repository of the same layout")
    parser.add_argument("--revision", default="main", metavar="REV", help="branch, tag or commit (main)")
    parser.add_argument("--dialogue-from", metavar="SOURCE", help="folder, file or URL of the released source")


def _add_dialogue(commands) -> None:
    parser = commands.add_parser("dialogue", help="dialogue packs: what is said to the MLLM")
    inner = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    parser = inner.add_parser("import", help="write a pack from your own copy of the released source")
    _add_common(parser, run_dialogue_import)
    parser.add_argument("source", metavar="SOURCE", help="root of a checkout, a folder or file in it, or a URL of raw files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")


def whole(low: int, high: int) -> Callable[[str], int]:
    """An option type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text!r}")
        return value

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """An option type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN fails the comparison as well
            raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, found {text!r}")
        return value

    return parse


def existing_path(text: str) -> Path:
    """An option type: a file or folder that is there."""
    path = Path(text).expanduser()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"expected a path that exists, found nothing at {text!r}")
    return path


def reasoner(text: str) -> str:
    """An option type: qwen, qwen:DIR, none, remote:URL or scripted:FILE."""
    kind, _, rest = text.partition(":")
    good = {
        "qwen": text == "qwen" or Path(rest).exists(),
        "none": text == "none",
        "remote": rest.startswith(("http://", "https://")),
        "scripted": Path(rest).is_file(),
    }
    if good.get(kind) and (rest or text == kind):
        return text
    found = f"nothing at {rest!r}" if rest and kind in ("qwen", "scripted") else repr(text)
    forms = "qwen, qwen:DIR, none, remote:http(s)://HOST... or scripted:FILE"
    raise argparse.ArgumentTypeError(f"expected {forms}, found {found}")


def lora(text: str) -> tuple[Path, float]:
    """An option type: FILE or FILE:SCALE; FILE may be a peft folder."""
    path, scale = text, "1"
    if not Path(text).expanduser().exists() and ":" in text:
        path, scale = text.rsplit(":", 1)
    if not path or not Path(path).expanduser().exists():
        raise argparse.ArgumentTypeError(f"expected FILE[:SCALE] with a file that exists, found nothing at {path!r}")
    return Path(path).expanduser(), real(-100, 100)(scale)


def _told(loras: Sequence[tuple[Path, float]]) -> list[list[Any]]:
    return [[str(path), scale] for path, scale in loras]


def _or(value, default):
    return default if value is None else value


def _kept(error: ReasonEditError, args: argparse.Namespace) -> str:
    trace = getattr(error, "trace", None)
    count = len(trace.rounds) if trace is not None else 0
    if not count:
        return ""
    return f" The {count} round{'s' if count > 1 else ''} made before {'are' if count > 1 else 'is'} kept in {args.out}."
