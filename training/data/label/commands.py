"""What the commands of `reasonedit-data` do. Everything heavy is imported inside the functions that need it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....reasonedit_core.errors import ConfigError, DataError
from ...program import EXIT_ERROR, printable
from .cli import KEY_VARIABLE, say

if TYPE_CHECKING:
    from .session import Session


def tell(text: str) -> None:
    """A line of the result, on stdout."""
    print(printable(text), flush=True)


Job = tuple[Callable[[Any], Any], Sequence[Any]]
"""(the pipeline of a runner, all items)."""


def thinking_pairs(args: argparse.Namespace) -> Job:
    """`reasonedit-data thinking-pairs`."""
    from .seeds import read_seeds
    from .thinking_pairs import Options, ThinkingPairs

    options = Options(args.keep_clear, args.held_out)
    annotator, second = _annotators(args, "verifier")
    seeds = read_seeds(args.seeds, args.limit)
    return lambda runner: ThinkingPairs(runner, annotator, second, args.out, options), seeds


def reflection_triples(args: argparse.Namespace) -> Job:
    """`reasonedit-data reflection-triples`."""
    from .reflection_triples import Options, ReflectionTriples, attempts
    from .seeds import read_seeds

    ratio = None if args.ratio == "all" else tuple(_ratio(args.ratio))
    limits = (args.success_at, args.failed_at, args.gain)
    options = Options(args.edits, args.negatives, *limits, ratio, args.held_out)
    annotator, judge = _annotators(args, "judge")
    if args.no_audit:
        judge = None
    elif judge.name == annotator.name:
        raise ConfigError(
            f"expected a second judge that is another model than {annotator.name!r}, found none. Name it (--second-model, "
            "--second-mllm), or do without the audit (--no-audit)."
        )
    items = attempts(read_seeds(args.seeds, args.limit), _editors(args), options)
    return lambda runner: ReflectionTriples(runner, annotator, judge, args.out, options), items


def reason50k(args: argparse.Namespace) -> Job:
    """`reasonedit-data reason50k`."""
    from ....reasonedit_core.extractors.parsed import load_spacy
    from .candidates import Gates
    from .editworld import read_editworld
    from .reason50k import Options, Reason50KPairs, plans, read_ideas

    gates = Gates(_band(args.lpips_band), args.least_clip, args.most_ssim, args.near, args.least_mark)
    counts = {"tries": args.tries, "grade": args.least_grade, "candidates": args.candidates, "top": args.top}
    options = Options(**counts, gates=gates, held_out=args.held_out, share=args.held_out_share, scenes=args.scenes)
    ideas = read_ideas(args.seeds, args.limit) if args.seeds else []
    pairs = read_editworld(args.editworld, args.limit) if args.editworld else []
    items = plans(ideas, pairs, options)
    painter, before = _painters(args) if ideas else (None, None)
    annotator, judge = _annotators(args, "judge")
    extractor = load_spacy(args.spacy) if args.spacy else None
    measures = _measures(args)

    def make(runner: Any) -> Reason50KPairs:
        return Reason50KPairs(runner, annotator, judge, painter, before, args.out, measures, extractor, options)

    return make, items


def from_traces(args: argparse.Namespace) -> Job:
    """`reasonedit-data from-traces`."""
    from .from_traces import FromTraces, Options
    from .traces import find_traces

    options = Options(args.held_out, args.license)
    return lambda runner: FromTraces(runner, args.out, options), find_traces(args.traces)


JOBS: Mapping[str, Callable[[argparse.Namespace], Job]] = {
    "thinking-pairs": thinking_pairs,
    "reflection-triples": reflection_triples,
    "reason50k": reason50k,
    "from-traces": from_traces,
}
"""Pipeline -> what its command line means, here and in every worker of Ray."""


def run_feedback(args: argparse.Namespace) -> int:
    """`reasonedit-data feedback`."""
    from pydantic import ValidationError

    from .pace import Rejected
    from .traces import RoundFeedback, find_traces, read_trace, write_feedback

    (trace,) = find_traces([args.trace])[:1]
    verdicts = {"accept": args.accept, "reject": args.reject, "correct": args.correct is not None}
    given = [name for name, is_given in verdicts.items() if is_given]
    if len(given) > 1 or (args.round is None) != (not given) or not (given or args.thought):
        raise ConfigError(
            "expected --round N with one of --accept, --reject, --correct TEXT, or --thought TEXT, found "
            f"{', '.join(given) or 'none'} and round {args.round}. Say what you think of one round at a time."
        )
    said = None
    if given:
        told = {
            "round": args.round,
            "verdict": given[0],
            "instruction": args.correct,
            "reason": args.reason,
            "score": args.score,
        }
        try:
            count = len(read_trace(trace).rounds)
        except Rejected as rejected:
            raise DataError(rejected.note) from None
        if args.round > count:
            raise ConfigError(f"--round: expected 1 to {count}, as the run has, found {args.round}. Correct it.")
        try:
            said = RoundFeedback(**told)
        except ValidationError as error:
            raise ConfigError(
                f"expected words to say, found {error.errors(include_url=False)[0]['msg']}. Correct it."
            ) from error
    tell(f"written: {write_feedback(trace, said, args.thought)}")
    return 0


def run_mini_seeds(args: argparse.Namespace) -> int:
    """`reasonedit-data mini-seeds`."""
    from ...mini.labelling import write_ideas, write_seeds

    write = write_ideas if args.pipeline == "reason50k" else write_seeds
    tell(f"{write(args.out, args.count, args.seed, language=args.language)}: {args.count} seeds")
    return 0


def run_pipeline(args: argparse.Namespace) -> int:
    """Any of JOBS."""
    from .session import as_json, first_request, run

    make, items = JOBS[args.command](args)
    session = session_of(args)
    if args.dry_run:
        first = first_request(session, make, items)
        tell(as_json(first) if first else "nothing would be asked: the journal holds every answer")
        return 0
    every = max(1, len(items) // 20)

    def progress(done: int) -> None:
        if not args.quiet and (done % every == 0 or done == len(items)):
            say(f"{done} of {len(items)} items")

    # Ray takes its time to start, which is lost where the journal holds every answer
    if getattr(args, "ray", None) and first_request(session, make, items) is not None:
        from .ray_workers import spread

        told = spread(args, len(items), None if args.quiet else say)
        tell(f"{told.answered} answers of {args.ray} workers")
    result = run(session, make, items, name=args.command, on_done=progress)
    for line in result.lines():
        tell(line)
    if result.check is None:
        return 0
    for line in result.check.lines():
        tell(line)
    return 0 if result.check.ok else EXIT_ERROR


def session_of(args: argparse.Namespace) -> Session:
    """How the run is made."""
    from .output import Prices
    from .runner import Limits
    from .session import Session

    names = ("concurrency", "per_minute", "timeout", "attempts", "pause")
    limits = Limits(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    prices = Prices.parse(args.price) if getattr(args, "price", None) else Prices()
    return Session(args.out, limits, prices, args.sample, getattr(args, "retry", False))


def _annotators(args: argparse.Namespace, second: str) -> tuple[Any, Any]:
    """The annotator and the second one, which is the first where the pipeline allows it and none is named."""
    first = _annotator(args, args.url, args.model, args.api_key_env, args.mllm, "")
    named = args.second_url or args.second_model or args.second_mllm
    if args.world is not None:
        from ...mini.labelling import WorldAnnotator

        return first, WorldAnnotator(first.world, f"world-{second}")
    if not named:
        return first, first
    url, env = args.second_url or args.url, args.second_api_key_env or args.api_key_env
    return first, _annotator(args, url, args.second_model, env, args.second_mllm, "second-")


def _annotator(args: argparse.Namespace, url: str | None, model: str | None, env: str, mllm: Path | None, what: str) -> Any:
    if args.world is not None:
        if url or model or mllm:
            raise ConfigError("--world: expected no other annotator beside it, found one. Leave one of them out.")
        from ...mini.labelling import World, WorldAnnotator

        return WorldAnnotator(World(args.world))
    if mllm is not None:
        if model:
            raise ConfigError(f"--{what}mllm: expected no --{what}model beside it, found {model!r}. Leave one of them out.")
        return _own(mllm)
    if not url or not model:
        raise ConfigError(
            f"expected an annotator: --{what}url ADDRESS with --{what}model NAME, --{what}mllm DIR, or --world DIR for drawn "
            f"seeds; found {'no address' if not url else 'no model'}. Name one."
        )
    from .annotators import EndpointAnnotator

    key = os.environ.get(env) if env else None
    if env and env != KEY_VARIABLE and not key:
        raise ConfigError(f"--{what}api-key-env: expected a key in the environment variable {env}, found none. Set it.")
    options = {"timeout": args.timeout, "max_side": args.max_side, "extra_tokens": args.extra_tokens}
    return EndpointAnnotator(url, model, api_key=key, **options)


def _ratio(text: str) -> list[int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--ratio: expected SUCCESS:REFLECTION:FAILED such as 3:1:1, or all, found {text!r}. Correct it.")
    return [int(part) for part in parts]


def _editors(args: argparse.Namespace) -> list[Any]:
    """Every named system at every number of steps; the planted editor of a world where none is named."""
    from .editors import LoadedSystem, SystemEditor

    if args.world is not None and not args.editor:
        from ...mini.labelling import PlantedEditor, World

        return [PlantedEditor(World(args.world))]
    loaded = [LoadedSystem.parse(text, device=args.device, dtype=args.dtype) for text in args.editor]
    return [SystemEditor(each, steps) for each in loaded for steps in args.edit_steps or [None]]


def _painters(args: argparse.Namespace) -> tuple[Any, Any]:
    """(painter of the pictures after, of the pictures before); the planted one of a world where no model is named."""
    from .painters import DiffusersPainter

    drawn = None
    if args.world is not None:
        from ...mini.labelling import PlantedPainter, World

        drawn = PlantedPainter(World(args.world))
    if drawn is not None and args.source_model is None:
        return drawn, drawn
    if args.source_model is None or args.ip_adapter is None:
        missing = "--source-model DIR" if args.source_model is None else "--ip-adapter FILE"
        raise ConfigError(f"expected a text-to-image model and an IP-Adapter for the pictures before, found no {missing}.")
    told = {name: getattr(args, name) for name in ("steps", "guidance", "device", "dtype")}
    before = DiffusersPainter(args.source_model, args.ip_adapter, scale=args.ip_scale, **told)
    if args.target_model is not None:
        return DiffusersPainter(args.target_model, side=args.size, **told), before
    if drawn is not None:
        return drawn, before
    return DiffusersPainter(args.source_model, side=args.size, **told), before


def _measures(args: argparse.Namespace) -> Any:
    from ...eval.encoders import Clip, UserScorer, lpips_of
    from .candidates import Measures

    device = _device(args.device) if args.clip or args.lpips else "cpu"
    clip = Clip(args.clip, device) if args.clip else None
    aesthetics = UserScorer(args.aesthetics) if args.aesthetics else None
    return Measures(clip, lpips_of(args.lpips, device) if args.lpips else None, aesthetics)


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _band(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--lpips-band: expected LEAST,MOST such as 0.2,0.55, found {text!r}. Correct it.") from None
    return low, high


def _own(folder: Path) -> Any:
    """The MLLM of a folder in this process, reached as the loop reaches it."""
    from ....reasonedit_core.load import SystemSpec, load_reasoner
    from .annotators import SpeakerAnnotator

    loaded = load_reasoner(SystemSpec("reasonedit-s", reasoner=f"qwen:{folder}"))
    return SpeakerAnnotator(loaded.reasoner.speaker, folder.resolve().name)
