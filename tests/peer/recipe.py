"""What the golden tensors are made from: deterministic weights and inputs, the same here and under the released code.

Imports torch only, so that `golden_models.py` can use it in the released code's environment.
"""

from __future__ import annotations

import hashlib

import torch

TINY = {
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 64,
    "connector_in_channels": 64,
    "connector_hidden_size": 64,
    "connector_heads_num": 4,
    "connector_depth": 2,
    "vector_in_dim": 768,
    "timestep_in_dim": 256,
}
GRID = (4, 6)
LAYOUTS = ("v1.0", "v1.1", "v1.2")
LENGTHS = (1, 11, 640)
TIMESTEP = 0.9884
STRONG = 0.2
"""Std of the weights of the case whose activations leave the range in which every smooth non-linearity looks alike."""


def draw(key: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Standard normal fp32 numbers that depend on key, shape and seed alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(shape, generator=generator)


def weight(key: str, shape: tuple[int, ...], seed: int = 0, std: float = 0.05) -> torch.Tensor:
    """A weight: std 0.05, one-dimensional norm weights about 1. Nothing stays zero, so that no branch is hidden."""
    value = draw(key, shape, seed) * std
    is_norm = len(shape) == 1 and "norm" in key and key.endswith(".weight")
    return 1 + value if is_norm else value


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> torch.nn.Module:
    """Fill every tensor of the state dict by `weight`."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            value.copy_(weight(key, tuple(value.shape), seed, std))
    return module


def grid_ids(first: float, offset: float = 0.0) -> torch.Tensor:
    """(h * w, 3) ids [first, y + offset, x + offset]."""
    height, width = GRID
    y, x = torch.meshgrid(torch.arange(height) + offset, torch.arange(width) + offset, indexing="ij")
    return torch.stack([torch.full_like(y, first), y, x], dim=-1).reshape(-1, 3).float()


def ids(layout: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """txt_ids (T, 3), img_ids (2 * h * w, 3) in the layout of a version."""
    reference = {"v1.0": grid_ids(0), "v1.1": grid_ids(1, 1.0), "v1.2": grid_ids(1)}[layout]
    text = torch.zeros(length, 3)
    if layout == "v1.2":
        text[:, 0] = torch.arange(length) - length
        # The second half stands for vision tokens: fractional places on the latent grid, some of them negative.
        half = length // 2
        text[half:, 1:] = torch.arange(length - half).unsqueeze(-1) * torch.tensor([0.37, 0.71]) - 0.22
    return text, torch.cat([grid_ids(0), reference])


def inputs(layout: str, length: int) -> dict[str, torch.Tensor]:
    """The inputs of one golden case, batch 1, fp32. v1.0 and v1.1 carry padding, which takes part in the DiT."""
    mask = torch.ones(1, length, dtype=torch.bool)
    if layout != "v1.2" and length > 1:
        mask[:, -(length // 3) :] = False
    text_ids, image_ids = ids(layout, length)
    return {
        "hidden_states": draw("hidden_states", (1, len(image_ids), TINY["in_channels"])),
        "timestep": torch.tensor([TIMESTEP]),
        "encoder_hidden_states": draw("encoder_hidden_states", (1, length, TINY["connector_in_channels"])),
        "encoder_mask": mask,
        "txt_ids": text_ids,
        "img_ids": image_ids,
        "text_embeds": draw("text_embeds", (1, length, TINY["connector_in_channels"])),
        "text_mask": (torch.arange(length) % 3 == 0).unsqueeze(0),
    }


def resizes_like_the_goldens() -> bool:
    """Whether this Pillow resizes as the one that made the golden pictures (13.0).

    Earlier ones filter in another order where one side grows by more than the other, which moves such pictures by up to 12
    levels, in the released code as in ours. Golden pictures then say nothing; golden latents still do.
    """
    import hashlib

    import numpy as np
    from PIL import Image

    noise = (np.arange(80 * 208 * 3, dtype=np.int64) * 2654435761 % 2**32 >> 24).astype(np.uint8).reshape(208, 80, 3)
    resized = np.asarray(Image.fromarray(noise).resize((50, 131)))
    return hashlib.sha256(resized.tobytes()).hexdigest().startswith("b237a416")
