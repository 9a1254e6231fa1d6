"""Networks of the released sizes with random weights, made on the device, and the words that go into them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..types import Conditioning

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..mllm.qwen25vl import QwenVL

TEXT, WIDTH = 640, 3584
FLUX_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
QWEN_DIT: dict[str, Any] = {}
QWEN_VAE: dict[str, Any] = {}
"""Of Qwen-Image-Edit: diffusers' own defaults are the released sizes."""

MLLM_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
    "vocab_size": 152064,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
}
VISION_7B: dict[str, Any] = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}


def random_network(make: Callable[[], torch.nn.Module], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A network made on `device` in `dtype`; every matrix N(0, 0.02), one-dimensional weights 1, biases 0, and one seed.

    Never zeros: a matrix product over zeros draws less power and runs faster. Buffers are made as the class makes them.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = make()
    finally:
        torch.set_default_dtype(before)
    rng = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=rng)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return torch.nn.Module.to(network, dtype).eval()


def random_words(
    device: str, dtype: torch.dtype, seed: int = 0, *, count: int = TEXT, width: int = WIDTH, quoted: int = 32
) -> Conditioning:
    """A conditioning of `count` text tokens of `width` channels, of which the last ones are `quoted` characters."""
    rng = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    tokens = torch.randn(1, count, width, generator=rng, device=device, dtype=dtype)
    positions = torch.zeros(count, 3, device=device)
    positions[:, 0] = torch.arange(count) - count
    marked = torch.zeros(1, count, dtype=torch.bool, device=device)
    marked[:, count - quoted :] = True
    return Conditioning(tokens, positions=positions, text_embeds=tokens, text_mask=marked)


class GivenWords:
    """A conditioner that answers with words made before: two texts, in turn (conditional, unconditional)."""

    def __init__(self, device: str, dtype: torch.dtype, **sizes: int) -> None:
        self._words = [random_words(device, dtype, seed, **sizes) for seed in range(2)]
        self._asked = 0

    def condition(self, image: torch.Tensor, instruction: str, **options: Any) -> Conditioning:
        """See `interfaces.Conditioner`."""
        self._asked += 1
        return self._words[(self._asked - 1) % 2]


def random_mllm(folder: Any, device: str, dtype: torch.dtype) -> QwenVL:
    """A Qwen2.5-VL of the 7B's size with the tokenizer of the tiny checkpoint in `folder`."""
    from pathlib import Path

    from ..mllm.load import load_tokenizer, make_config
    from ..mllm.qwen25vl import QwenVL
    from ..weightfiles import read_json

    raw = read_json(Path(folder) / "config.json") | MLLM_7B
    raw["vision_config"] = raw["vision_config"] | VISION_7B
    tokenizer = load_tokenizer(Path(folder))
    config = make_config(raw, tokenizer)

    def make() -> torch.nn.Module:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return Qwen2_5_VLForConditionalGeneration(config)

    return QwenVL(random_network(make, device, dtype), tokenizer)
