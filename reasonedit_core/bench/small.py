"""Small checkpoints with random weights in the released layouts, and the pictures that all arms of a run share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from ..images import quantize, resize_bicubic_pil, to_pil
from ..mini.builder import build_checkpoint
from ..settings import FILE_NAME

if TYPE_CHECKING:
    import torch

INSTRUCTION = "make the cube red"
SEED = 26
DROPPED = 90
"""Leading tokens cut from the conditioning of ReasonEdit-S, as the release cuts them from its own prompt."""

STD = 0.1
"""Of the weights: enough that words and pictures show in what comes out, so that arms can be compared."""

_DIT = {"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12]}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "step1x-v1p2": {"transformer": {**_DIT, "num_layers": 2, "num_single_layers": 4}},
    "qwen-edit-plus": {"transformer": {**_DIT, "num_layers": 4}},
    "qwen2.5-vl": {
        "text_encoder": {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "rope_scaling": {"mrope_section": [8, 12, 12]},
            "vision_config": {"out_hidden_size": 256, "hidden_size": 64, "intermediate_size": 160},
        }
    },
}
"""What a benchmark's checkpoint has in place of the builder's own sizes, which are too small to time."""


def write_checkpoint(system: str, folder: Path) -> Path:
    """The checkpoint that the timed arms of `system` share."""
    build_checkpoint(system, folder, seed=SEED, std=STD, config=SIZES[system])
    if system == "step1x-v1p2":
        write_json(folder / FILE_NAME, {"dropped_tokens": DROPPED, "dialogue": "own"})
    return folder


def picture(number: int, size: tuple[int, int] = (256, 256)) -> torch.Tensor:
    """A smooth picture (1, 3, H, W) of values k / 255; another one for each number. size: (width, height)."""
    import torch

    coarse = torch.rand((1, 3, 6, 6), generator=torch.Generator().manual_seed(number))
    return quantize(resize_bicubic_pil(coarse, *size).clamp(0, 1))


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (256, 256)) -> list[str]:
    """`count` different pictures as PNG files; their paths. Every repeat gets its own, so that nothing kept helps."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        to_pil(picture(number, size)).save(path)
    return [str(path) for path in paths]
