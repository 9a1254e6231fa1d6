"""What the tests of region-aware denoising share: both systems on tiny checkpoints, and velocities that are known."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from reasonedit.reasonedit_core import flow
from reasonedit.reasonedit_core.denoisers import join_conditionings
from reasonedit.reasonedit_core.denoisers.dit import Step1XDenoiser
from reasonedit.reasonedit_core.denoisers.qwen_image import QwenImageDenoiser
from reasonedit.reasonedit_core.kernels import guided_step
from reasonedit.reasonedit_core.types import Conditioning, Counts, LatentImage
from reasonedit.reasonedit_core.weights import load_qwen_transformer, load_step1x_transformer
from reasonedit.tests.peer.recipe import draw
from reasonedit.tests.tiny import tiny_checkpoint

SYSTEMS = ("s", "q")
GRID, STEPS, STD = (5, 7), 8, 0.2
SCHEDULES = {"s": flow.STEP1X, "q": flow.QWEN}
LENGTHS = (6, 9)
"""Text tokens with the condition and without."""


def network(system: str) -> nn.Module:
    """A transformer of its own, so that a test may change it."""
    if system == "s":
        return load_step1x_transformer(tiny_checkpoint("step1x-v1p2", std=STD), dtype=torch.float32)[0]
    return load_qwen_transformer(tiny_checkpoint("qwen-edit-plus", std=STD), dtype=torch.float32)[0]


shared = cache(network)


def make(system: str, net: nn.Module | None = None):
    """A denoiser with its own counts."""
    net, counts = shared(system) if net is None else net, Counts()
    return Step1XDenoiser(net, "v1.2", counts=counts) if system == "s" else QwenImageDenoiser(net, counts=counts)


def conditioning(denoiser, length: int, seed: int = 0) -> Conditioning:
    config = denoiser.transformer.config
    if isinstance(denoiser, QwenImageDenoiser):
        return Conditioning(draw(f"words {length}", (1, length, config.joint_attention_dim), seed))
    positions = torch.zeros(length, 3)
    positions[:, 0] = torch.arange(length) - length
    return Conditioning(draw(f"words {length}", (1, length, config.connector_in_channels), seed), positions=positions)


def noise(denoiser, seed: int = 0, grid=GRID) -> torch.Tensor:
    return draw("noise", (1, grid[0] * grid[1], denoiser.transformer.config.in_channels), seed)


def source(denoiser, seed: int = 1, grid=GRID) -> LatentImage:
    shape = (1, grid[0] * grid[1], denoiser.transformer.config.in_channels)
    return LatentImage(draw("source", shape, seed), *grid)


def guided(
    system: str, denoiser, picture: LatentImage, *, batched: bool = False, fused: bool = True, scale: float = 3.0, grid=GRID
) -> flow.Guided:
    """The guided velocity of an edit; without guidance at scale 1."""
    pair = [conditioning(denoiser, length, seed) for seed, length in enumerate(LENGTHS)]

    def predict(x, sigma, words, **part):
        return denoiser(x, sigma, words, grid=grid, references=(picture,), **part)

    return flow.guided_velocity(
        predict,
        pair[0],
        pair[1] if scale > 1 else None,
        scale=scale,
        combine=flow.step1x_guidance("v1.2") if system == "s" else flow.combine_qwen,
        joined=join_conditionings(*pair) if batched and scale > 1 else None,
        step=guided_step if fused else None,
    )


def schedule(system: str, steps: int = STEPS, grid=GRID) -> torch.Tensor:
    return flow.sigmas(steps, grid[0] * grid[1], SCHEDULES[system])


def mask_of(edited: torch.Tensor, cell: int = 3) -> torch.Tensor:
    """edited (height, width) -> a mask (1, 1, H, W) of `cell` pixels a token, of which one in the middle is marked."""
    pixels = torch.zeros(edited.shape[0] * cell, edited.shape[1] * cell)
    pixels[cell // 2 :: cell, cell // 2 :: cell] = edited.float()
    return pixels[None, None]


def corner(grid=GRID, rows: int = 3, columns: int = 3) -> torch.Tensor:
    """(height, width) bool: the first rows and columns."""
    edited = torch.zeros(grid, dtype=torch.bool)
    edited[:rows, :columns] = True
    return edited


def known(field, *, scale: float = 1.0, counts: list | None = None) -> flow.Guided:
    """Guided by a known velocity: `field(sigma)` (1, N, C). counts: of the tokens that each call computes."""
    words = Conditioning(torch.zeros(1, 1, 1))

    def predict(x, sigma, conditioning, keep=None, rows=None):
        velocity = field(float(sigma[0]))
        if keep is not None and rows is None:
            keep.layers[:] = [(velocity, velocity)]
        assert rows is None or keep.layers, "rows of a forward that kept nothing"
        velocity = velocity if rows is None else velocity.index_select(1, rows)
        if counts is not None:
            counts.append(velocity.shape[1])
        assert x.shape == velocity.shape
        return velocity

    return flow.guided_velocity(predict, words, None, scale=scale, combine=flow.combine_qwen, step=guided_step)
