"""The options of `reasonedit edit` that ReasonBrain alone takes: its cues and its second scale of guidance."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .mini.models import BRAINS

if TYPE_CHECKING:
    import torch

SYSTEM = "reasonbrain"


def add_brain_options(parser: argparse.ArgumentParser, real: Callable[[float, float], Callable[[str], float]]) -> None:
    """real: makes the type of numbers between two bounds."""
    group = parser.add_argument_group("ReasonBrain", "What its cues are made of; not given, it finds them.")
    add = group.add_argument
    add("--objects", nargs="+", metavar="NAME", help="what the instruction is about, in place of what is found in it")
    add("--masks", nargs="+", type=Path, metavar="FILE", help="regions, white in pictures of the source's proportions")
    add("--segmenter", metavar="WHO", help="auto | sam:DIR | sam2:DIR | cached:DIR | grid (that of reasonbrain.json)")
    add("--extractor", metavar="WHO", help="auto | mllm | spacy:DIR | rules | whole (that of reasonbrain.json)")
    add("--image-guidance", type=real(0, 100), metavar="G", help="how far the source is followed (the checkpoint's: 1.5)")


def check_brain_options(args: argparse.Namespace) -> None:
    """ConfigError where they stand with another system."""
    names = ("objects", "masks", "segmenter", "extractor", "image_guidance")
    given = [name for name in names if getattr(args, name) is not None]
    if given and args.system not in (SYSTEM, *BRAINS):
        option = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{option}: expected with --system {SYSTEM}, found {args.system}; leave it out")
    if args.masks and args.segmenter:
        raise ConfigError("--masks: expected without --segmenter, found both; the masks are the regions")
    if args.objects and not all(name.strip() for name in args.objects):
        raise ConfigError("--objects: expected names, found an empty one; leave it out")


def check_brain_spec(spec: Any, plain: Any) -> None:
    """ConfigError where a `load.SystemSpec` asks for what ReasonBrain has no use for. plain: one that asks for nothing."""
    names = ("loras", "draft_loras", "weights_dtype", "variant", "attention", "compiled", "batched_cfg", "parts")
    found = [name for name in names if getattr(spec, name) != getattr(plain, name)]
    if found:
        raise ConfigError(f"expected ReasonBrain without {', '.join(found)}, which it has no use for, found it. Leave it out.")
    if spec.policy == "released":
        raise ConfigError("expected the policy reasonedit with ReasonBrain, of which nothing is released, found released.")


def brain_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options put in place of reasonbrain.json, for `SystemSpec.brain`."""
    told = {"segmenter": "none" if args.masks else args.segmenter, "extractor": args.extractor}
    return {name: value for name, value in told.items() if value is not None}


def use_cues(system: Any, args: argparse.Namespace, picture: torch.Tensor, tell: Callable[[str], None]) -> None:
    """Let a ReasonBrain see the user's masks and objects in every edit, and tell what it takes for objects else.

    system: any `load.System`. picture: (1, 3, H, W), the source.
    """
    if system.name != SYSTEM:
        return
    import torch

    from .extractors.given import GivenObjects
    from .region_options import read_mask
    from .segmenters.regions import GivenRegions

    finder = None
    if args.masks:
        read = [read_mask(path, picture) for path in args.masks]
        finder = GivenRegions(torch.cat([torch.nn.functional.interpolate(m, picture.shape[-2:]) for m in read])[:, 0])
    system.generator.use_cues(finder, GivenObjects(args.objects) if args.objects else None)
    if not args.objects:
        system.generator.on_objects = lambda names: tell(f"objects: {', '.join(names)} (--objects names others)")
