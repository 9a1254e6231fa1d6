"""Who finds the regions and who names the objects, after the words of `reasonbrain.json` or of a command line."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import CheckpointError, ConfigError
from ..interfaces import ObjectExtractor, RegionFinder, Segmenter, Speaker
from ..segmenters.regions import GridSegmenter, SegmentedRegions
from .layout import SETTINGS

SEGMENTERS = "auto, sam:DIR, sam2:DIR, cached:DIR, grid, grid:SIDE, none"
EXTRACTORS = "auto, mllm, spacy:DIR, rules, whole"


def make_finder(
    name: str,
    *,
    root: Path,
    segmenter: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> RegionFinder | None:
    """The finder that `name` stands for; None for `none`, where only handed in regions count.

    root: of the system, to which DIR is relative. segmenter: its SAM, for `auto` and to fill `cached:DIR`. Raises
    CheckpointError where there is no SAM, before anything is computed, and ConfigError for another name.
    """
    kind, _, value = name.partition(":")
    if kind == "grid" and value.isdecimal() and 0 < int(value) <= 32:
        return SegmentedRegions(GridSegmenter(int(value)))
    if (kind in ("sam", "sam2", "cached")) != bool(value) or kind not in ("auto", "grid", "none", "sam", "sam2", "cached"):
        raise ConfigError(f"segmenter: expected one of {SEGMENTERS}, found {name!r}. Correct it.")
    if kind == "none":
        return None
    if kind == "grid":
        return SegmentedRegions(GridSegmenter())
    if kind == "auto" and segmenter is None:
        raise CheckpointError(
            f"{root}: expected a segmenter (SAM or SAM 2 in transformers' layout) for the region branch, found no folder "
            f"`segmenter`. Put one there, name its place in {SETTINGS} (parts), or take the segmenter `grid`, which needs none."
        )
    from ..segmenters.cache import CachedRegions
    from ..segmenters.sam import load_sam

    def load(path: Path) -> Segmenter:
        return load_sam(path, dtype=dtype, device=device)

    if kind == "cached":
        return CachedRegions(root / value, load(segmenter) if segmenter is not None else None)
    path = segmenter if kind == "auto" else root / value
    found = load(path)
    if kind != "auto" and found.name.startswith("sam2") != (kind == "sam2"):
        raise CheckpointError(f"{path}: expected {kind} as the segmenter says, found {found.name.partition('-')[0]}.")
    return SegmentedRegions(found)


def network_of(finder: RegionFinder | None) -> torch.nn.Module | None:
    """The network that a finder runs, for a mover; None without one."""
    return getattr(getattr(finder, "segmenter", None), "model", None)


def make_extractor(name: str, *, root: Path, speaker: Speaker | None = None) -> ObjectExtractor | None:
    """The extractor that `name` stands for; None for `whole`, where the whole instruction is the one object.

    auto: the speaker where there is one, then rules. root: of the system, to which DIR is relative. Raises ConfigError for
    another name and for `mllm` without a speaker; see also `load_spacy`.
    """
    from ..extractors.ask import AskingExtractor
    from ..extractors.parsed import FirstOf, load_spacy
    from ..extractors.rules import RuleExtractor

    kind, _, value = name.partition(":")
    if (kind == "spacy") != bool(value) or kind not in ("auto", "mllm", "spacy", "rules", "whole"):
        raise ConfigError(f"extractor: expected one of {EXTRACTORS}, found {name!r}. Correct it.")
    if kind == "mllm" and speaker is None:
        raise ConfigError(
            "extractor mllm: expected a reasoner that can be asked, found none. Name one (--reasoner qwen:DIR), or take the "
            "extractor rules."
        )
    if kind == "spacy":
        return load_spacy(root / value)
    asking = [AskingExtractor(speaker)] if kind in ("auto", "mllm") and speaker is not None else []
    if kind == "mllm":
        return asking[0]
    return FirstOf([*asking, RuleExtractor()]) if kind != "whole" else None
