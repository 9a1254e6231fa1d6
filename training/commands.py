"""The smaller commands of `reasonedit-train`: convert, index, cache, plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..reasonedit_core.errors import ConfigError
from .config import Config
from .stages import Plan, plan_stages


def convert(args: argparse.Namespace) -> int:
    """Records out of a data set in another layout; prints what it could not use."""
    from .data.convert import AUTO, LAYOUTS
    from .data.convert import convert as run

    if args.layout == "list":
        for name, layout in LAYOUTS.items():
            print(f"{name:<12} {layout.what}")
        print(f"{AUTO:<12} the first of these that recognises the folder")
        return 0
    if args.folder is None or args.to is None:
        raise ConfigError("convert: expected FROM DIR --to OUT, found less. `reasonedit-train convert list` names layouts.")
    report = run(
        args.layout,
        args.folder,
        args.to,
        images=args.images,
        controls=tuple(args.control),
        copy=args.copy,
        overwrite=args.overwrite,
        split=args.split,
        license=args.license,
        origin=args.origin,
    )
    print("\n".join(report.lines()))
    return 0


def index(config: Config) -> int:
    """Read all records and write the manifest."""
    from .data.manifest import index as run
    from .data.records import read_records
    from .material import MANIFEST, draw_missing

    draw_missing(config)
    paths = [config.place(path) for path in config.data.records]
    place = config.out / MANIFEST
    manifest = run(paths, place, records=read_records(paths))
    print("\n".join([*manifest.lines(), f"written: {place}"]))
    return 0


def cache(config: Config) -> int:
    """Latents, and states where the MLLM is frozen, of every stage whose start is there already."""
    from .material import draw_missing, fill_cache, open_cache, open_material
    from .models import open_base
    from .presets import MLLM
    from .run import filled_cache, is_done, starting_point

    draw_missing(config)
    base = open_base(config)
    material = open_material(config, base)
    plans = plan_stages(config)
    failed = 0
    for plan in plans:
        if not _starts(config, plan, plans, is_done):
            print(f"stage {plan.stage.name}: starts from a stage that is not trained yet; cached when it begins")
            continue
        if plan.kind.room:
            plan.kind.own(filled_cache)(material, plan, plan.kind.own(starting_point)(config, plan))
            print(f"stage {plan.stage.name}: everything is there")
            continue
        carried = starting_point(config, plan).get(MLLM)
        reports = fill_cache(material, plan, open_cache(material, plan, carried), carried)
        lines = [line for report in reports for line in report.lines()] or ["nothing to do"]
        print(f"stage {plan.stage.name}: " + "\n  ".join(lines))
        failed += sum(len(report.failed) for report in reports)
    return 2 if failed else 0


def plan(config: Config, world: int) -> int:
    """How the documents of each stage are packed."""
    from .data.cache import Cache
    from .material import draw_missing, open_material
    from .models import open_base
    from .run import documents_of

    draw_missing(config)
    base = open_base(config)
    material = open_material(config, base)
    plans = plan_stages(config)
    documents = plans[0].kind.own(documents_of)(material)
    for one in plans:
        source = one.kind.make_source(material, one, documents, Cache(config.place(config.data.cache)), world=world)
        print(f"stage {one.stage.name}\n{source.table() if one.kind.room else source.plan(0).table()}")
        for refused in getattr(source, "unmade", ())[:10]:
            print(f"left out: {refused}")
    return 0


def _starts(config: Config, plan: Plan, plans: tuple[Plan, ...], is_done) -> bool:
    """Whether what a stage starts from is there."""
    if plan.index == 0 or plan.stage.start != ("previous",):
        return True
    return is_done(config, plans[plan.index - 1])


def write_recipe(source: Path, out: Path) -> None:
    """A bundled recipe as a file of one's own, which must not be there yet."""
    from ..reasonedit_core.files import write_whole

    if out.exists():
        raise ConfigError(f"expected no file at {out}, found one. Name another with --to, or remove it.")
    write_whole(out, source.read_bytes())
