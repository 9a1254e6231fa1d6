"""What the VAEs are trained on: crops and whole pictures of scenes, drawn anew for every step from counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...reasonedit_core.mini.dice import Dice
from ...reasonedit_core.mini.items import draw_look, scene
from ...reasonedit_core.mini.kinds import BACKGROUNDS, CELLS, STYLES
from ...reasonedit_core.mini.splits import split_of_scene
from ...reasonedit_core.mini.world import LOOKS, SIZE, Object, Scene, render, scene_of
from ..types import MicroStep

CHANNELS = 16
"""Latent channels."""


@dataclass(frozen=True, eq=False)
class Pictures(MicroStep):
    """pixels: (B, 3, H, W) in -1..1. noise: (B, 16, H/f, W/f), what is added to the latents.
    covered: (B, 1, H, W), 1 where an object is drawn. names: of the pictures."""

    pixels: Tensor | None = None
    noise: Tensor | None = None
    covered: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def records(self) -> tuple[str, ...]:
        """What the log counts."""
        return self.names


@dataclass(frozen=True, slots=True)
class Crops:
    """A `PackSource` of one epoch: crops up to step `whole_from`, then whole pictures, as many pixels a step.

    factor: pixels per latent on each side. channels: of the latents.
    """

    seed: int
    steps: int
    batch: int
    crop: int
    whole_from: int
    noise: float
    factor: int
    fingerprint: str
    channels: int = CHANNELS

    def __len__(self) -> int:
        return self.steps

    def load(self, epoch: int, cursor: int) -> list[Pictures]:
        """The pictures of one step. Half the crops are of scenes with nearly every cell filled, of whole pictures a quarter:
        most cells of the world's own scenes are bare ground."""
        whole = cursor >= self.whole_from
        side = SIZE if whole else self.crop
        count = max(4, self.batch * self.crop**2 // SIZE**2) if whole else self.batch
        crops, covers, names = [], [], []
        for number in range(count):
            dice = Dice("vae", self.seed, epoch, cursor, number)
            crowded = dice.chance(0.25 if whole else 0.75)
            drawn = crowded_scene(dice) if crowded else scene(dice.below(1 << 62))
            top, left = (self.factor * dice.below((SIZE - side) // self.factor + 1) for _ in range(2))
            part = (slice(None), slice(top, top + side), slice(left, left + side))
            pixels, bare = as_tensor(drawn)[part], as_tensor(replace(drawn, objects=()))[part]
            crops.append(pixels)
            covers.append((pixels != bare).any(dim=0, keepdim=True).float())
            names.append(f"{cursor}-{number}")
        rng = torch.Generator().manual_seed(Dice("vae noise", self.seed, epoch, cursor).below(1 << 62))
        strength = self.noise * torch.rand((count, 1, 1, 1), generator=rng)
        noise = strength * torch.randn((count, self.channels, side // self.factor, side // self.factor), generator=rng)
        return [Pictures(None, None, {"picture": float(count)}, torch.stack(crops), noise, torch.stack(covers), tuple(names))]


def crowded_scene(dice: Dice) -> Scene:
    """A scene of the train split with three in four cells filled, half with any look, half with one as the world draws it."""
    while True:
        looks = [(cell, draw_look(dice) if dice.chance(0.5) else dice.pick(LOOKS)) for cell in CELLS if dice.chance(0.75)]
        found = scene_of(dice.pick(BACKGROUNDS), [Object(cell, look) for cell, look in looks], dice.pick(STYLES))
        if split_of_scene(found) == "train":
            return found


def plain_scenes(count: int, split: str, seed: int) -> list[Scene]:
    """Scenes as the world draws them, of seeds apart from those of training; at least one object where held out."""
    return [scene(Dice("vae check", seed, number).below(1 << 62), split) for number in range(count)]


def as_tensor(drawn: Scene) -> Tensor:
    """The picture of a scene: (3, 96, 96), -1..1."""
    return torch.from_numpy(render(drawn)).permute(2, 0, 1).float() / 127.5 - 1


def as_pixels(pictures: Tensor) -> Sequence[np.ndarray]:
    """(B, 3, H, W) in -1..1 as uint8 pictures (H, W, 3)."""
    levels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round()
    return list(levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
