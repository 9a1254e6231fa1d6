"""From masks to regions: what is kept, the background, geometry, and masks of a user."""

from __future__ import annotations

import pytest
import torch

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.segmenters.regions import batch_regions, select_regions, user_masks
from reasonedit.reasonedit_core.types import FoundMasks


def boxes(*corners) -> FoundMasks:
    masks = torch.zeros(len(corners), 40, 40, dtype=torch.bool)
    for mask, (y, x, bottom, right) in zip(masks, corners, strict=True):
        mask[y:bottom, x:right] = True
    return FoundMasks(masks, torch.full((len(corners),), 0.9), torch.full((len(corners),), 0.8))


def test_alike_tiny_and_whole_masks_are_dropped_and_the_background_comes_first():
    made = select_regions(boxes((0, 0, 20, 20), (0, 0, 20, 19), (30, 30, 31, 31), (0, 0, 40, 40), (20, 0, 40, 10)), 4)
    assert made.geometry[:, 7].tolist() == [1, 0, 0] and made.masks.shape == (3, 4, 4)
    assert made.geometry[1].tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.25, 0.9, 0.8, 0])
    assert made.masks[1].tolist() == [[255, 255, 0, 0]] * 2 + [[0] * 4] * 2
    nothing = select_regions(boxes(), 4)
    assert len(nothing.masks) == 1 and nothing.masks.eq(255).all()
    masks, geometry, keep = batch_regions([made, nothing])
    assert masks.shape == (2, 3, 4, 4) and keep.tolist() == [[True] * 3, [True, False, False]]


def test_a_user_mask_must_cover_something():
    assert user_masks(torch.ones(8, 8)).masks.shape == (1, 8, 8)
    with pytest.raises(ConfigError, match="covers something"):
        user_masks(torch.zeros(2, 8, 8))
