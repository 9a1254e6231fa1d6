"""The released Step1X-Edit v1p2 pipeline as an arm, in its own interpreter; with `regione` under RegionE. See `worker`.

The released code is the user's own copy and no part of this repository. In memory only, these things are changed: sizes that
it fixes to the large model's, so that a small checkpoint loads; its prefix, so that all arms read equally many words; for
RegionE the attention that it takes from flash-attn, and which tokens it finds edited, so that their share is the same in all
arms. At full size the MLLM is left out and the words are random, as in our own arm.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .split import TRANSFORMER, Inside
from .worker import serve, start, steps_of

Job = Mapping[str, Any]


def main(text: str) -> None:
    """The process of an arm. text: the job as JSON."""
    job = start(text)
    without_megfile()
    if job["arm"] == "count":
        serve(job, lambda number: None, counts())
        return
    pipe = small_pipeline(job) if job["size"] == "small" else full_pipeline(job)
    pipe.set_progress_bar_config(disable=True)
    if job.get("regione"):
        under_regione(pipe, job["edited"])
    serve(job, forward(pipe, job) if job["arm"] == "forward" else edit(pipe, job), {"diffusers": _version()})


def without_megfile() -> None:
    """The released reasoner imports megfile, for paths to remote storage that no arm has: an empty module will do."""
    if importlib.util.find_spec("megfile") is None:
        sys.modules["megfile"] = types.ModuleType("megfile")


def edit(pipe: Any, job: Job) -> Callable[[int], dict[str, float]]:
    """Whole edits by the pipeline's own call, without its reasoner."""
    import torch
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in job["pictures"]]
    inside = Inside(pipe.transformer, job["device"])

    def run(number: int) -> dict[str, float]:
        inside.reset()
        made = pipe(
            image=pictures[number],
            prompt=job["instruction"],
            true_cfg_scale=job["guidance"],
            num_inference_steps=steps_of(job, number),
            size_level=job["level"],
            generator=torch.Generator().manual_seed(number),
            enable_reflection_mode=False,
        ).images[0]
        made.save(Path(job["out"]) / f"{number:03d}.png")
        return {TRANSFORMER: inside.seconds}

    return run


def forward(pipe: Any, job: Job) -> Callable[[int], None]:
    """One forward of the transformer: two pictures of 64 x 64 tokens and 640 of text."""
    inputs = full_inputs(job["device"])

    def run(number: int) -> None:
        pipe.transformer(**inputs)

    return run


def counts() -> dict[str, Any]:
    """The same forward counted on the meta device."""
    import torch

    from ..counting import count

    network, _ = _classes()
    with torch.device("meta"):
        transformer = torch.nn.Module.to(network(enable_text_token_mapping=True), torch.bfloat16).eval()
    inputs = full_inputs("meta")
    return count(lambda: transformer(**inputs)).record()


def full_inputs(device: str) -> dict[str, Any]:
    """What the pipeline hands to its transformer at full size."""
    import torch

    dtype = torch.bfloat16
    words = _words(device, dtype, 0)
    ids = torch.zeros(2, 64, 64, 3, device=device)
    ids[1, ..., 0] = 1
    ids[..., 1] += torch.arange(64, device=device)[:, None]
    ids[..., 2] += torch.arange(64, device=device)
    return {
        "hidden_states": torch.randn(1, 8192, 64, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.7, device=device, dtype=dtype),
        "guidance": None,
        "encoder_hidden_states": words.embedding,
        "prompt_embeds_mask": words.mask,
        "txt_ids": words.txt_ids,
        "img_ids": ids.flatten(0, 2),
        "text_embeddings": words.text_embeds,
        "text_mask": words.text_masks,
        "return_dict": False,
    }


def small_pipeline(job: Job) -> Any:
    """The pipeline with the weights of the checkpoint that all arms share, in float32."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from safetensors.torch import load_file
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    network, pipeline = _classes()
    folder, dtype = Path(job["folder"]), torch.float32
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    mapping = config.pop("enable_text_token_mapping")
    transformer = network(**{key: value for key, value in config.items() if not key.startswith("_")})
    if mapping:
        transformer.text_token_mapping = torch.nn.Linear(config["connector_in_channels"], config["joint_attention_dim"])
    state: dict[str, Any] = {}
    for shard in sorted((folder / "transformer").glob("*.safetensors")):
        state |= load_file(shard)
    transformer.load_state_dict(state)
    encode = pipeline._get_qwenvl_embeds
    encode.__defaults__ = tuple(dtype if isinstance(value, torch.dtype) else value for value in encode.__defaults__)
    pipe = pipeline(
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", torch_dtype=dtype),
        processor=AutoProcessor.from_pretrained(folder / "processor"),
        transformer=transformer.to(dtype).eval(),
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    pipe.QWEN25VL_PREFIX, pipe.QWEN25VL_PREFIX_LEN = job["prefix"], job["dropped"]
    if job.get("words"):
        width = config["connector_in_channels"]
        given_words(pipe, job["device"], dtype, count=job["words"], width=width, quoted=0)
    return pipe.to(job["device"])


def full_pipeline(job: Job) -> Any:
    """The pipeline at the released sizes with random weights in bfloat16. Its MLLM is left out: words are given."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import AutoProcessor

    from .weights import FLUX_VAE, random_network

    network, pipeline = _classes()
    device, dtype = job["device"], torch.bfloat16
    pipe = pipeline(
        text_encoder=None,
        processor=AutoProcessor.from_pretrained(job["folder"]),  # it looks into its folder at once
        transformer=random_network(lambda: network(enable_text_token_mapping=True), device, dtype),
        vae=random_network(lambda: AutoencoderKL(**FLUX_VAE), device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, shift=3.0
        ),
    )
    given_words(pipe, device, dtype)
    return pipe


def given_words(pipe: Any, device: str, dtype: Any, **sizes: int) -> None:
    """Have the pipeline read, in place of what it encodes, the words that our own arm is given."""
    words = [_words(device, dtype, seed, **sizes) for seed in range(2)]
    asked: list[str] = []

    def encode_prompt(*args: Any, prompt: str = "", **options: Any) -> Any:
        asked.append(prompt)
        return words[(len(asked) - 1) % 2]

    pipe.encode_prompt = encode_prompt


def under_regione(pipe: Any, share: float) -> None:
    """Turn RegionE on for the pipeline, with `share` of the picture's tokens, at its head, taken for edited."""
    import torch

    helper_class = importlib.import_module("RegionE").RegionEHelper
    helper = helper_class(pipe)
    helper.set_params()
    inside = importlib.import_module("RegionE.Step1XEditV1P2.inplace")
    if not getattr(inside, "flash_attn_func", None):

        def flash_attn_func(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        inside.flash_attn_func = flash_attn_func
    real = inside.token_selector

    def token_selector(latents: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        # Its own answer says in which form it keeps ids.
        edited, kept = real(latents, *args, **options)
        count, most = latents.shape[1], round(share * latents.shape[1])
        every = torch.arange(count, device=edited.device, dtype=edited.dtype)
        return tuple(part.view(*like.shape[:-1], -1) for part, like in ((every[:most], edited), (every[most:], kept)))

    inside.token_selector = token_selector
    helper.enable()


def _classes() -> tuple[Any, Any]:
    from diffusers.models.transformers.transformer_step1x_edit import Step1XEditTransformer2DModel
    from diffusers.pipelines.step1x_edit.pipeline_step1x_edit_v1p2 import Step1XEditPipelineV1P2

    return Step1XEditTransformer2DModel, Step1XEditPipelineV1P2


def _words(device: str, dtype: Any, seed: int, **sizes: int) -> Any:
    """What the pipeline's encode_prompt gives, of random words."""
    import torch

    from .weights import random_words

    words = random_words(device, dtype, seed, **sizes)
    return types.SimpleNamespace(
        embedding=words.tokens,
        mask=torch.ones(words.tokens.shape[:2], dtype=torch.bool, device=device),
        txt_ids=words.positions,
        text_embeds=words.text_embeds,
        text_masks=words.text_mask,
    )


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)
