"""Who finds the regions and who names the objects, after the words of `reasonbrain.json` or of a command line."""

from __future__ import annotations

from ..errors import CheckpointError, ConfigError
from ..interfaces import ObjectExtractor, RegionFinder
from ..segmenters.regions import GridSegmenter, SegmentedRegions
from .layout import SETTINGS, BrainParts

SEGMENTERS = "auto, grid, none"


def make_finder(parts: BrainParts, name: str, *, needed: bool) -> RegionFinder | None:
    """The finder that `name` stands for; None where the model has no region branch (not needed), or for `none`.

    Raises CheckpointError where auto finds no SAM, before anything is computed, and ConfigError for another name.
    """
    if name not in ("auto", "grid", "none"):
        raise ConfigError(f"segmenter: expected one of {SEGMENTERS}, found {name!r}.")
    if not needed or name == "none":
        return None
    if name == "grid":
        return SegmentedRegions(GridSegmenter())
    raise CheckpointError(
        f"{parts.root}: expected a segmenter (SAM or SAM 2 in transformers' layout) for the region branch, found no folder "
        f"`segmenter`. Put one there, name its place in {SETTINGS} (parts), or take the segmenter `grid`, which needs none."
    )


def make_extractor(name: str) -> ObjectExtractor | None:
    """The extractor that `name` stands for; None: the whole instruction is the one object. Raises ConfigError."""
    if name not in ("auto", "whole"):
        raise ConfigError(f"extractor: expected auto or whole, found {name!r}.")
    return None
