"""The options of `reasonedit edit` that save work and cost exactness: regions, intervals of guidance, extrapolated steps."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError
from .regions import GuidanceInterval, Region, StepCache, read_decay

if TYPE_CHECKING:
    import torch

Number = Callable[[int, int], Callable[[str], int]]
Real = Callable[[float, float], Callable[[str], float]]

SHAPE_TOLERANCE = 0.02
"""By how much the proportions of a mask may differ from those of the picture."""


def add_region_options(parser: argparse.ArgumentParser, whole: Number, real: Real) -> None:
    """whole, real: make the types of numbers between two bounds."""
    group = parser.add_argument_group("faster, not exact", "Off by default.")
    add = group.add_argument
    add(
        "--region",
        nargs="+",
        metavar=("MODE", "FILE"),
        help="auto: after some steps, only denoise what turns out to be edited; mask FILE: what is white in this picture; off",
    )
    add("--region-threshold", type=real(-1, 1), metavar="X", help="auto: how like the picture a token stays that is left alone")
    add("--region-first", type=whole(1, 1000), metavar="N", help="steps in full at the start (6 of 28)")
    add("--region-last", type=whole(0, 1000), metavar="N", help="steps in full at the end (2 of 28)")
    more = {"action": "append", "type": whole(1, 1000), "metavar": "N"}
    add("--region-refresh", **more, help="another full step, may be repeated (16 of 28)")
    add("--region-every", type=whole(1, 1000), metavar="N", help="a full step after every N others")
    add("--region-decay", type=Path, metavar="FILE", help="reuse velocities by what bench.decay fitted to this model")
    add("--region-tolerance", type=real(0, 10), metavar="X", help="with it: the drift up to which one is reused (0.1)")
    add("--guidance-interval", type=real(0, 1), nargs=2, metavar=("LOW", "HIGH"), help="guidance only there (1 is noise)")
    add("--step-cache", type=whole(1, 1000), metavar="N", help="after 4 steps compute one of N, extrapolate the others")


def region_of(args: argparse.Namespace, picture: torch.Tensor) -> Region | None:
    """What the options ask for. picture: (1, 3, H, W), which a mask has to fit. Raises ConfigError."""
    mode, *rest = args.region or ("off",)
    given = {name: getattr(args, f"region_{name}") for name in ("threshold", "first", "last", "refresh", "every", "tolerance")}
    given = {name: value for name, value in given.items() if value is not None}
    if mode not in ("auto", "mask", "off") or len(rest) != (mode == "mask"):
        found = " ".join(args.region)
        raise ConfigError(f"--region: expected auto, off or mask FILE, found {found!r}; a mask is named behind the word mask")
    if mode == "off":
        if given or args.region_decay:
            names = ", ".join(f"--region-{name}" for name in [*given, *(["decay"] if args.region_decay else [])])
            raise ConfigError(f"{names}: expected with --region auto or --region mask FILE, found without; add one of them")
        return None
    if mode == "mask":
        given["mask"] = read_mask(Path(rest[0]), picture)
    if "refresh" in given:
        given["refresh"] = tuple(given["refresh"])
    if args.region_decay:
        given["decay"] = read_decay(args.region_decay)
    return Region(**given)


def step_cache_of(args: argparse.Namespace) -> StepCache | None:
    """The step cache, if one is asked for."""
    return None if args.step_cache is None else StepCache(every=args.step_cache)


def interval_of(args: argparse.Namespace) -> GuidanceInterval | None:
    """The interval of guidance, if one is asked for. Raises ConfigError where its bounds are the wrong way round."""
    return None if args.guidance_interval is None else GuidanceInterval(*args.guidance_interval)


def read_mask(path: Path, picture: torch.Tensor) -> torch.Tensor:
    """The grey values (1, 1, H, W) in 0..1 of a picture, white where `picture` (1, 3, h, w) shall change.

    Raises ConfigError where it has other proportions.
    """
    from .images import load_image

    mask = load_image(path).rgb.mean(1, keepdim=True)
    (height, width), (high, wide) = mask.shape[-2:], picture.shape[-2:]
    if abs(width / height * high / wide - 1) > SHAPE_TOLERANCE:
        raise ConfigError(
            f"{path}: expected a mask with the proportions of the picture, {wide} x {high}, found {width} x {height}; draw it "
            "over the picture"
        )
    return mask
