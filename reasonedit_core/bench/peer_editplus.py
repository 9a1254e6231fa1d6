"""Diffusers' QwenImageEditPlusPipeline as an arm, in its own interpreter. See `worker`.

In memory only, these things are changed: the areas, which the pipeline fixes; how many tokens of its prompt it drops, counted
with the small checkpoint's tokenizer; and under transformers 5 the token types that the pipeline forgets to hand on.
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
    pipe = pipeline(job)
    import diffusers

    serve(job, edit(pipe, job), {"diffusers": str(diffusers.__version__)})


def edit(pipe: Any, job: Mapping[str, Any]) -> Callable[[int], dict[str, float]]:
    """Whole edits by the pipeline's own call."""
    import torch
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in job["pictures"]]
    inside = Inside(pipe.transformer, job["device"])

    def run(number: int) -> dict[str, float]:
        inside.reset()
        made = pipe(
            image=[pictures[number]],
            prompt=job["instruction"],
            negative_prompt=" ",
            true_cfg_scale=job["guidance"],
            num_inference_steps=steps_of(job, number),
            generator=torch.Generator().manual_seed(number),
        ).images[0]
        made.save(Path(job["out"]) / f"{number:03d}.png")
        return {TRANSFORMER: inside.seconds}

    return run


def pipeline(job: Mapping[str, Any]) -> Any:
    """The pipeline with the weights of the checkpoint that all arms share, in float32."""
    import torch
    from diffusers import QwenImageEditPlusPipeline
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    pipe = QwenImageEditPlusPipeline.from_pretrained(job["folder"], torch_dtype=torch.float32).to(job["device"])
    pipe.set_progress_bar_config(disable=True)
    head = pipe.prompt_template_encode.partition("{}")[0].partition("<|vision_start|>")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(head)["input_ids"])
    stock, small = module.calculate_dimensions, job["level"] ** 2
    module.calculate_dimensions = lambda area, ratio: stock(small if area == AREA else area, ratio)
    if hasattr(module, "VAE_IMAGE_SIZE"):
        module.VAE_IMAGE_SIZE = small
    truthful(pipe.text_encoder)
    return pipe


def truthful(text_encoder: Any) -> None:
    """Hand on which tokens are pictures, which transformers 5 places them by."""
    if "mm_token_type_ids" not in inspect.signature(type(text_encoder.model).get_rope_index).parameters:
        return
    stock = text_encoder.forward

    def forward(input_ids: Any = None, **options: Any) -> Any:
        kinds = (input_ids == text_encoder.config.image_token_id).int()
        return stock(input_ids=input_ids, mm_token_type_ids=kinds, **options)

    text_encoder.forward = forward
