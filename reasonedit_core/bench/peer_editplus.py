"""Diffusers' QwenImageEditPlusPipeline as an arm, in its own interpreter. See `worker`.

In memory only, these things are changed: the areas, which the pipeline fixes; how many tokens of its prompt it drops, counted
with the small checkpoint's tokenizer; and under transformers 5 the token types that the pipeline forgets to hand on. At full
size the MLLM is left out and the words are random, as in our own arm: the pipeline takes embeddings in place of a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .split import TRANSFORMER, Inside
from .worker import serve, start, steps_of

AREA = 1024 * 1024
"""The area that the pipeline names in its code."""


def main(text: str) -> None:
    """The process of an arm. text: the job as JSON."""
    job = start(text)
    pipe = small_pipeline(job) if job["size"] == "small" else full_pipeline(job)
    pipe.set_progress_bar_config(disable=True)
    import diffusers

    serve(job, edit(pipe, job), {"diffusers": str(diffusers.__version__)})


def edit(pipe: Any, job: Mapping[str, Any]) -> Callable[[int], dict[str, float]]:
    """Whole edits by the pipeline's own call."""
    import torch
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in job["pictures"]]
    inside = Inside(pipe.transformer, job["device"])
    words = {"prompt": job["instruction"], "negative_prompt": " "} if job["size"] == "small" else given_words(job["device"])

    def run(number: int) -> dict[str, float]:
        inside.reset()
        made = pipe(
            image=[pictures[number]],
            **words,
            true_cfg_scale=job["guidance"],
            num_inference_steps=steps_of(job, number),
            generator=torch.Generator().manual_seed(number),
        ).images[0]
        made.save(Path(job["out"]) / f"{number:03d}.png")
        return {TRANSFORMER: inside.seconds}

    return run


def small_pipeline(job: Mapping[str, Any]) -> Any:
    """The pipeline with the weights of the checkpoint that all arms share, in float32."""
    import torch
    from diffusers import QwenImageEditPlusPipeline

    pipe = QwenImageEditPlusPipeline.from_pretrained(job["folder"], torch_dtype=torch.float32).to(job["device"])
    head = pipe.prompt_template_encode.partition("{}")[0].partition("<|vision_start|>")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(head)["input_ids"])
    sized(job["level"] ** 2)
    truthful(pipe.text_encoder)
    return pipe


def full_pipeline(job: Mapping[str, Any]) -> Any:
    """The pipeline at the released sizes with random weights in bfloat16, without the MLLM."""
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPlusPipeline,
        QwenImageTransformer2DModel,
    )

    from .weights import QWEN_DIT, QWEN_VAE, random_network

    device, dtype = job["device"], torch.bfloat16
    sized(job["level"] ** 2)
    return QwenImageEditPlusPipeline(
        transformer=random_network(lambda: QwenImageTransformer2DModel(**QWEN_DIT), device, dtype),
        vae=random_network(lambda: AutoencoderKLQwenImage(**QWEN_VAE), device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift=1.0,
            shift_terminal=0.02,
        ),
        text_encoder=None,
        tokenizer=None,
        processor=None,
    )


def given_words(device: str) -> dict[str, Any]:
    """The pipeline's arguments in place of a prompt and a negative one: the words of our own arm."""
    import torch

    from .weights import random_words

    given = {}
    for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        given[name] = random_words(device, torch.bfloat16, seed).tokens
        given[f"{name}_mask"] = torch.ones(given[name].shape[:2], dtype=torch.long, device=device)
    return given


def sized(area: int) -> None:
    """Make the pipeline generate, and show its VAE, pictures of `area` pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    stock = module.calculate_dimensions
    module.calculate_dimensions = lambda wanted, ratio: stock(area if wanted == AREA else wanted, ratio)
    if hasattr(module, "VAE_IMAGE_SIZE"):
        module.VAE_IMAGE_SIZE = area


def truthful(text_encoder: Any) -> None:
    """Hand on which tokens are pictures, which transformers 5 places them by."""
    if "mm_token_type_ids" not in inspect.signature(type(text_encoder.model).get_rope_index).parameters:
        return
    stock = text_encoder.forward

    def forward(input_ids: Any = None, **options: Any) -> Any:
        kinds = (input_ids == text_encoder.config.image_token_id).int()
        return stock(input_ids=input_ids, mm_token_type_ids=kinds, **options)

    text_encoder.forward = forward
