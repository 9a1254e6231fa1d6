"""SAM and SAM 2 of transformers as segmenters: a grid of points, each answered with masks; the certain ones are kept.

Own pre- and post-processing of a few lines, as the libraries' automatic mask generation needs torchvision and hands out no
stability. N masks, P points, S side of the network's input, s side of the masks it predicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BackendUnavailable, CheckpointError, ConfigError
from ..types import FoundMasks
from ..weightfiles import read_json, weight_files

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}
"""model_type of config.json -> class. The published folders of SAM 2 state the type of its video model."""

OFFSET = 1.0
"""Stability: the share of a mask that stays when its threshold moves by this much to either side."""

SAMPLED = 1 << 20


class SamSegmenter:
    """A `Segmenter`. model: a SamModel (pictures padded to a square) or Sam2Model (pictures stretched to one).

    side: points on each side of the picture. iou, stability: masks that are surer than this are kept. batch: points that are
    decoded together.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        side: int = 16,
        iou: float = 0.88,
        stability: float = 0.95,
        batch: int = 64,
    ) -> None:
        if side < 1 or batch < 1:
            raise ConfigError(f"SAM: expected at least one point a side and one at a time, found {side} and {batch}.")
        self.model, self.name, self.side, self.batch = model, name, side, batch
        self.iou, self.stability = iou, stability
        vision = model.config.vision_config
        size = getattr(vision, "image_size", None) or vision.backbone_config.image_size
        self.size: int = size if isinstance(size, int) else size[0]
        self.padded = model.config.model_type == "sam"

    @torch.no_grad()
    def segment(self, image: Tensor) -> FoundMasks:
        """image (1, 3, H, W) in 0..1 -> masks (N, h, w) of the network's own resolution, on its device; N may be 0."""
        pixels, (height, width) = self._pixels(image)
        embeddings = self.model.get_image_embeddings(pixels)
        steps = (torch.arange(self.side, device=pixels.device) + 0.5) / self.side
        grid = torch.stack([*torch.meshgrid(steps * width, steps * height, indexing="xy")], dim=-1)  # x before y
        kept = [self._decode(embeddings, points, (height, width)) for points in grid.view(-1, 2).split(self.batch)]
        return FoundMasks(*(torch.cat(parts) for parts in zip(*kept, strict=True)))

    def _decode(self, embeddings: Any, points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """points (P, 2) in pixels of the input -> the certain masks of all points, their IoU and stability."""
        dtype = next(self.model.parameters()).dtype
        said = self.model(image_embeddings=embeddings, input_points=points[None, :, None].to(dtype), multimask_output=True)
        logits, iou = said.pred_masks[0].flatten(0, 1).float(), said.iou_scores[0].flatten().float()
        if self.padded:  # what lies in the padding is no part of the picture
            height, width = (max(1, round(n * logits.shape[-1] / self.size)) for n in size)
            logits = logits[:, :height, :width]
        sure, possible = (logits > OFFSET).sum((1, 2)), (logits > -OFFSET).sum((1, 2))
        stability = sure / possible.clamp(min=1)
        keep = (iou > self.iou) & (stability > self.stability)
        return logits[keep] > 0, iou[keep].clamp(0, 1), stability[keep]

    def _pixels(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The normalised input (1, 3, S, S), and the height and width of the picture in it."""
        one = next(self.model.parameters())
        height, width = image.shape[-2:]
        size = (self.size, self.size)
        if self.padded:
            size = tuple(max(1, round(n * self.size / max(height, width))) for n in (height, width))
        pixels = functional.interpolate(image.to(one.device).float(), size, mode="bilinear", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(x, device=one.device).view(1, 3, 1, 1) for x in (MEAN, STD))
        pixels = functional.pad((pixels - mean) / std, (0, self.size - size[1], 0, self.size - size[0]))
        return pixels.to(one.dtype), size


def load_sam(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **options: Any
) -> SamSegmenter:
    """SAM or SAM 2 from a local folder in transformers' layout. options: of SamSegmenter. Raises CheckpointError, and
    BackendUnavailable where the installed transformers has no SAM 2."""
    import transformers

    path = Path(path)
    kind = read_json(path / "config.json").get("model_type") if (path / "config.json").is_file() else None
    if kind not in KINDS:
        found = "no config.json" if kind is None else f"model_type {kind!r}"
        raise CheckpointError(
            f"{path}: expected SAM or SAM 2 in transformers' layout (such as sam-vit-huge or sam2.1-hiera-large), found {found}"
            ". Name such a folder, or take the segmenter `grid`, which needs no network."
        )
    if not hasattr(transformers, KINDS[kind]):
        raise BackendUnavailable(
            f"{path}: expected a transformers with {KINDS[kind]}, found {transformers.__version__}. Upgrade it, or take SAM."
        )
    files = weight_files(path)
    model, info = getattr(transformers, KINDS[kind]).from_pretrained(
        str(path), dtype=dtype, local_files_only=True, output_loading_info=True
    )
    missing = sorted(key for key in info["missing_keys"] if "positional_embedding" not in key)
    if missing:
        raise CheckpointError(
            f"{path}: expected all weights of its config.json, found {len(missing)} missing: {', '.join(missing[:5])}. "
            "Download the folder again."
        )
    return SamSegmenter(model.to(device).eval().requires_grad_(False), f"{kind}-{_digest(path, files)}", **options)


def _digest(path: Path, files: Sequence[Path]) -> str:
    """A short name for these very weights: of the configuration, and of sizes and ends of the files."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as handle:
            handle.seek(max(0, size - SAMPLED))
            digest.update(handle.read())
    return digest.hexdigest()[:12]
