"""What the commands of `cli` do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError
from ....reasonedit_core.files import write_json, write_whole
from ...data.label.output import Prices
from ...data.label.runner import Limits
from ...program import printable
from .cli import SYSTEM, named_run
from .items import COUNTS, Item, Manifest, chosen, read_manifest

EXIT_PROBLEM = 1


def tell(text: str) -> None:
    """A line of the result, on stdout."""
    print(printable(text), flush=True)


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(f"reasonedit-eval: {printable(text)}", file=sys.stderr, flush=True)


def run_list(args: argparse.Namespace) -> int:
    """`reasonedit-eval list`."""
    from .aggregate import RULES
    from .judges import KINDS
    from .protocols import load_protocol, names
    from .tables import published_rows

    for bench, counts in COUNTS.items():
        total = f"{sum(counts.values())} items in {len(counts)} groups" if counts else "counts not fixed"
        calls = ", ".join(load_protocol(f"{bench}-re").calls)
        tell(f"{bench}: {total}; {len(published_rows(bench))} published rows")
        tell(f"  protocols: {', '.join(each for each in names() if each.startswith(f'{bench}-'))}; calls: {calls}")
        tell(f"  aggregations: {', '.join(name for name, rule in RULES.items() if rule.bench == bench)}")
    tell(f"judges: {', '.join(KINDS)}")
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    """`reasonedit-eval prepare`."""
    from .prepare import prepare

    done = prepare(args.bench, args.src, args.out, args.images)
    tell(f"{done.manifest}: {done.items} items")
    for remark in done.remarks:
        tell(f"  {remark}")
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """`reasonedit-eval generate`. Exit code 1 where items have no picture."""
    from .generate import Job, generate

    manifest = read_manifest(args.manifest)
    items = _chosen(manifest, args)
    job = Job(args.out, args.shard, args.seed, args.several, args.retry)
    done = generate(manifest, items, _maker(args), job, _progress(args, "items"))
    tell(f"{args.out}: {done.made} made, {done.known} known, {len(done.failed)} without a picture")
    for item, why in done.failed.items():
        tell(f"  {item}: {why}")
    return EXIT_PROBLEM if done.failed else 0


def _maker(args: argparse.Namespace) -> Any:
    from .makers import KINDS, CommandMaker, Settings, SystemMaker, load_with

    kind, _, command = args.system.partition(":")
    if kind == "cmd" and command:
        return CommandMaker(command, args.timeout)
    if kind in SYSTEM and args.load in (None, kind):  # a system's own name: the whole of it, or as said behind the colon
        args.load, kind, command = kind, command or "loop", ""
    if kind not in KINDS or command:
        names = ", ".join((*KINDS, *SYSTEM))
        raise ConfigError(f"--system: expected one of {names}, SYSTEM:HOW or cmd:COMMAND, found {args.system!r}. Correct it.")
    if args.load is None:
        raise ConfigError(
            "--load: expected the name of a system such as reasonedit-s, found none. Name it, or use cmd:COMMAND."
        )
    from ....reasonedit_core.load import SystemSpec

    reasoner = "none" if kind == "base" else args.reasoner
    spec = SystemSpec(args.load, args.weights, reasoner, args.dialogue, args.policy, args.dtype, args.device, tuple(args.lora))
    name = f"{args.load}:{args.weights.resolve().name}" if args.weights else args.load
    told = [name, *(f"+{path.name}:{scale:g}" for path, scale in args.lora)]
    told += [f"by {reasoner}"] if kind != "base" and reasoner != "qwen" else []
    told += [args.policy] if kind == "loop" and args.policy != "reasonedit" else []
    settings = Settings(args.rounds, args.steps, args.guidance, args.size)
    return SystemMaker(kind, load_with(replace(spec, offload=args.offload)), " ".join(told), settings)


def run_import(args: argparse.Namespace) -> int:
    """`reasonedit-eval import`."""
    from .generate import take_in

    manifest = read_manifest(args.manifest)
    if args.layout not in (None, manifest.bench):
        raise ConfigError(
            f"--layout: expected {manifest.bench}, as the manifest is, found {args.layout}. Name another manifest."
        )
    done = take_in(manifest, args.dir, args.out, args.name)
    tell(f"{args.out}: {done.made} of {len(manifest.items)} items have a picture")
    damaged = {item: why for item, why in done.failed.items() if why.startswith("damaged")}
    for item, why in damaged.items():
        tell(f"  {item}: {why}")
    for item in [item for item in done.failed if item not in damaged][:10]:
        tell(f"  missing: {item}")
    return 0


def run_judge(args: argparse.Namespace) -> int:
    """`reasonedit-eval judge`."""
    from .judge import JUDGEMENTS, judge_run
    from .judges import read_rows

    manifest = read_manifest(args.manifest)
    protocol, judge = _protocol(manifest, args)
    done = judge_run(
        manifest,
        args.folder,
        protocol,
        judge,
        items=_chosen(manifest, args),
        anchors=args.anchors,
        limits=Limits(args.concurrency, args.per_minute, args.timeout, args.attempts, args.pause),
        prices=_prices(args),
        retry=args.retry,
        on_done=_progress(args, "calls"),
    )
    cost = "" if done.told["cost"] is None else f", cost {done.told['cost']:g}"
    for row in read_rows(done.folder / JUDGEMENTS):
        if row["status"] == "damaged":
            tell(f"  damaged: {row['item']}: {row['note']}")
    tell(f"{done.folder}: {', '.join(f'{number} {status}' for status, number in sorted(done.counts.items()))}")
    tell(
        f"{done.told['requests']} requests ({done.requests} now), {done.told['tokens_in']} + {done.told['tokens_out']} "
        f"tokens{cost}"
    )
    return 0


def run_score(args: argparse.Namespace) -> int:
    """`reasonedit-eval score`."""
    from .aggregate import headline
    from .measures import told_means
    from .score import SCORES, Choice, score_judged

    manifest = read_manifest(args.manifest)
    folders = [args.folder / "judged" / args.judged] if args.judged else sorted((args.folder / "judged").glob("*"))
    if not folders:
        raise ConfigError(f"{args.folder}: expected judgements below judged/, found none. Run `reasonedit-eval judge` first.")
    rules = (args.aggregate, args.lang, args.missing, args.clamp, bool(args.quirks), args.pixels)
    choice = Choice(*rules, _scorers(args), args.masks, _ratings(args))
    for folder in folders:
        told = score_judged(manifest, args.folder, folder, choice)
        row = headline(manifest.bench, told)
        mean = "no score" if row["mean"] is None else f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        bounds = f", bounds {row['at_least']:.3f} .. {row['at_most']:.3f}" if row["n_scored"] < row["n"] else ""
        tell(f"{folder / SCORES}: {told['aggregate']}: {mean}, n {row['n_scored']}/{row['n']}{bounds}")
        if told["absent"]:
            counted = {"zero": "counted as the worst", "skip": "left out"}[choice.missing]
            tell(f"  {told['absent']} without a picture, {counted} (--missing {choice.missing})")
        for item, why in told["damaged"].items():
            tell(f"  damaged: {item}: {why}")
        for line in told_means(told):
            tell(f"  {line}")
        if (people := told["ins_align"]) is not None:
            tell(f"  Ins-Align: {people['mean']:.3f}, n {people['n_scored']}/{people['n']}, {len(people['raters'])} raters")
        for anchor, found in told["anchors"].items():
            if found:
                own = headline(manifest.bench, {"overall": found})
                tell(
                    f"  {anchor}: {'no score' if own['mean'] is None else format(own['mean'], '.3f')}, n "
                    f"{own['n_scored']}/{own['n']}"
                )
    return 0


def run_report(args: argparse.Namespace) -> int:
    """`reasonedit-eval report`."""
    from .figures import draw_all
    from .judge import JUDGEMENTS
    from .judges import read_rows
    from .measures import means_table, measures_table
    from .page import Shown, write_page
    from .score import read_scores
    from .tables import as_csv, latex, make_table, markdown

    named = dict(named_run(text) for text in args.runs)
    if len(named) != len(args.runs):
        raise ConfigError("--runs: expected a name of its own for each run, found one twice. Use NAME=DIR.")
    runs = {name: read_scores(path) for name, path in named.items()}
    table = make_table(runs, args.refs == "paper")
    tables = {"table": table, "measures": measures_table(runs), "means": means_table(runs)}
    for name, each in tables.items():
        for suffix, told in (("md", markdown(each)), ("csv", as_csv(each)), ("tex", latex(each))):
            write_whole(args.out / f"{name}.{suffix}", told.encode())
    draw_all(runs, args.out, args.refs == "paper")
    if args.manifest:
        manifest = read_manifest(args.manifest)
        shown = {}
        for name, scores in runs.items():
            judged = Path(scores["path"]).parent
            shown[name] = Shown(judged.parent.parent, scores, read_rows(judged / JUDGEMENTS))
        scored = {each["item"] for scores in runs.values() for each in scores["items"]}
        items = chosen([item for item in manifest.items if item.id in scored], args.show, "page")
        write_page(args.out / "page.html", list(tables.values()), manifest, shown, items)
    tell(markdown(table))
    tell(markdown(tables["measures"]))
    tell(f"written: {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """`reasonedit-eval compare`."""
    from .compare import compare_runs, compared_markdown
    from .score import read_scores

    told = compare_runs(read_manifest(args.manifest), read_scores(args.a), read_scores(args.b))
    tell(compared_markdown(told, args.a.name, args.b.name))
    return 0


def run_agree(args: argparse.Namespace) -> int:
    """`reasonedit-eval agree`."""
    from .compare import agree, agreed_markdown
    from .judge import JUDGEMENTS
    from .judges import read_rows

    a, b = (read_rows(path / JUDGEMENTS if path.is_dir() else path) for path in (args.a, args.b))
    names = [rows[0]["judge"] if rows else "none" for rows in (a, b)]
    tell(agreed_markdown(agree(a, b), *names))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """`reasonedit-eval export`."""
    from .judge import JUDGEMENTS
    from .judges import read_rows
    from .official import write_judged
    from .outputs import export_official
    from .score import SCORES, read_scores

    manifest = read_manifest(args.manifest)
    taken = export_official(manifest, args.folder, args.out)
    if args.judged or list(args.folder.glob(f"judged/*/{SCORES}")):
        scores = read_scores(args.folder / "judged" / args.judged if args.judged else args.folder)
        wanted = {each["item"] for each in scores["items"]}
        rows = read_rows(Path(scores["path"]).parent / JUDGEMENTS)
        written = write_judged([item for item in manifest.items if item.id in wanted], rows, args.out)
        for path in written:
            tell(f"  {path.relative_to(args.out)}")
        names = ("bench", "protocol", "judge", "aggregate", "overall", "groups", "items")
        write_json(args.out / SCORES, {name: scores[name] for name in names})
    tell(f"{args.out}: {len(taken.found)} pictures, {len(taken.missing)} missing")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """`reasonedit-eval doctor`. Exit code 1 where the tried question had no answer."""
    from .judge import estimate, trial

    manifest = read_manifest(args.manifest)
    protocol, judge = _protocol(manifest, args)
    items = _chosen(manifest, args)
    told = estimate(
        manifest,
        args.folder,
        protocol,
        judge.name,
        items=items,
        anchors=args.anchors,
        prices=_prices(args),
        per_picture=args.per_picture,
        extra_tokens=args.extra_tokens,
    )
    tell(f"{protocol.name} by {judge.name} ({judge.endpoint}): {told.items} items, {told.missing} without a picture")
    for item, why in told.damaged.items():
        tell(f"  damaged: {item}: {why}")
    tell(f"{told.calls} calls ({', '.join(f'{name} {count}' for name, count in told.by_call.items())}), {told.known} known")
    cost = "name --price IN,OUT for the cost" if told.cost is None else f"cost at most {told.cost:.2f}"
    tell(f"to ask: {told.calls - told.known} calls, about {told.tokens_in} + {told.tokens_out} tokens at most; {cost}")
    if not args.trial:
        return 0
    good, words = trial(judge, protocol, manifest.sources(items[0])[0], Limits(timeout=args.timeout))
    tell(f"tried: {words}")
    return 0 if good else EXIT_PROBLEM


def _scorers(args: argparse.Namespace) -> Any:
    """What is named of CLIP, DINO, LPIPS and a user's function; None where nothing is."""
    if not (args.clip or args.dino or args.lpips or args.aesthetics):
        return None
    from ..encoders import Clip, Dino, UserScorer, lpips_of
    from .embeddings import Scorers

    return Scorers(
        Clip(args.clip) if args.clip else None,
        Dino(args.dino) if args.dino else None,
        lpips_of(args.lpips) if args.lpips else None,
        UserScorer(args.aesthetics) if args.aesthetics else None,
    )


def _ratings(args: argparse.Namespace) -> Any:
    if args.ratings is None:
        return None
    from .ratings import read_ratings

    try:
        low, best = (float(part) for part in args.ratings_scale.split(","))
    except ValueError:
        raise ConfigError(
            f"--ratings-scale: expected LEAST,BEST such as 0,1, found {args.ratings_scale!r}. Correct it."
        ) from None
    return read_ratings(args.ratings, (low, best))


# ---- parts -----------------------------------------------------------------------------------------------------------------


def _chosen(manifest: Manifest, args: argparse.Namespace) -> list[Item]:
    items = [item for item in manifest.items if args.lang in (None, item.lang)]
    if not items:
        raise ConfigError(f"--lang: expected a language of the manifest, found {args.lang!r}, which has no items. Correct it.")
    return chosen(items, args.sample, "sample")


def _protocol(manifest: Manifest, args: argparse.Namespace) -> tuple[Any, Any]:
    from .judges import make_judge
    from .protocols import load_protocol, with_identity

    wording = "official" if args.prompts else "re"
    protocol = load_protocol(args.protocol or f"{manifest.bench}-{wording}", args.prompts)
    key = os.environ.get(args.api_key_env) if args.api_key_env else None
    if args.api_key_env and not key:
        raise ConfigError(f"--api-key-env: expected a key in the environment variable {args.api_key_env}, found none. Set it.")
    protocol = with_identity(protocol, args.identity)
    if args.quirks:
        if manifest.bench != "gedit":
            raise ConfigError(
                f"--quirks: expected a manifest of gedit, whose script resizes, found {manifest.bench}. Leave it out."
            )
        protocol = replace(protocol, resized=True)
    judge = make_judge(args.judge, protocol, api_key=key, timeout=args.timeout, extra_tokens=args.extra_tokens)
    return protocol, judge


def _prices(args: argparse.Namespace) -> Prices:
    return Prices.parse(args.price) if args.price else Prices()


def _progress(args: argparse.Namespace, what: str) -> Callable[[int, int], None] | None:
    if args.quiet:
        return None

    def show(done: int, total: int) -> None:
        if done == total or done % max(1, total // 20) == 0:
            say(f"{done} of {total} {what}")

    return show
