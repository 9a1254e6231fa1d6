"""Makes tests/golden/step1x_pipeline.safetensors with the released Step1X-Edit pipelines (v1.2 and v1.1).

    PYTHONPATH=<released diffusers fork>/src python tests/peer/golden_pipeline.py [FILE]

Needs transformers 4.55, megfile and qwen_vl_utils, as the released code does; it is imported from the user's own copy and is
no part of this repository. The weights are the tiny checkpoints, the prefix is the wording of `cases.py`, so that no released
sentence gets into the file. The released code runs in float32 where `cases.py` says so: the one change made to it is the
default dtype of its text encoding. What v1.1 fixes in code (ids of the real vocabulary, the area, the
device) is exchanged among its compiled constants.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import conftest  # noqa: E402, F401 - registers the checkout as `reasonedit`

from reasonedit.reasonedit_core import images  # noqa: E402
from reasonedit.tests.peer import cases  # noqa: E402
from reasonedit.tests.tiny import tiny_checkpoint  # noqa: E402

TARGET = TESTS / "golden" / "step1x_pipeline.safetensors"


@cache
def modules(version: str, dtype: torch.dtype):
    """text encoder, processor, transformer, VAE and scheduler of the tiny checkpoint, as the released classes."""
    import json

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from diffusers.models.transformers.transformer_step1x_edit import Step1XEditTransformer2DModel
    from safetensors.torch import load_file
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = tiny_checkpoint(cases.SYSTEMS[version], std=cases.STD)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    mapping = config.pop("enable_text_token_mapping")
    transformer = Step1XEditTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    if mapping:  # the released class fixes the layer's size, so it is exchanged in memory
        transformer.text_token_mapping = torch.nn.Linear(config["connector_in_channels"], config["joint_attention_dim"])
    state = {}
    for shard in sorted((folder / "transformer").glob("*.safetensors")):
        state |= load_file(shard)
    transformer.load_state_dict(state)
    return dict(
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", torch_dtype=dtype),
        processor=AutoProcessor.from_pretrained(folder / "processor"),
        transformer=transformer.to(dtype).eval(),
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )


@cache
def pipeline(version: str, dtype: torch.dtype):
    """The released pipeline with our prefix and with embeddings in `dtype`."""
    from diffusers.pipelines.step1x_edit import pipeline_step1x_edit as v11
    from diffusers.pipelines.step1x_edit import pipeline_step1x_edit_v1p2 as v12

    kind = v12.Step1XEditPipelineV1P2 if version == "v1.2" else v11.Step1XEditPipeline
    encode = kind._get_qwenvl_embeds
    assert encode.__defaults__[-1] in (torch.bfloat16, torch.float32)
    encode.__defaults__ = (None, dtype)
    pipe = kind(**modules(version, dtype))
    pipe.QWEN25VL_PREFIX = cases.PREFIX[version]
    if version == "v1.1":
        # Its bounds come from the checkpoint's processor folder; the tiny one states those of v1.2.
        low, high = cases.BOUNDS[version]
        pipe.processor.image_processor.size = {"shortest_edge": low, "longest_edge": high}
        pipe.processor.image_processor.min_pixels, pipe.processor.image_processor.max_pixels = low, high
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exchange(function: types.FunctionType, new: dict) -> types.FunctionType:
    """A copy of a function with other constants."""
    constants = tuple(new.get(c, c) if isinstance(c, int | str) else c for c in function.__code__.co_consts)
    changed = types.FunctionType(function.__code__.replace(co_consts=constants), function.__globals__)
    changed.__defaults__ = function.__defaults__
    return changed


@contextmanager
def small_v11(pipe, version: str, *, strip: bool = False, level: int = 1024):
    """v1.1 names CUDA, ids of the real vocabulary and the area in its code: exchange them for the time of a call."""
    if version == "v1.2":
        yield
        return
    kind, device_call = type(pipe), torch.cuda.current_device
    released = kind._get_qwenvl_embeds, kind.encode_image
    new = {151653: pipe.processor.tokenizer.convert_tokens_to_ids("<|vision_end|>"), "cuda": "cpu"}
    if strip:  # the first and the last byte of the two curly quotes, so that the stripping is exercised as well
        new |= dict(zip((2073, 854), cases.STRIP_IDS, strict=True))
    kind._get_qwenvl_embeds = exchange(kind._get_qwenvl_embeds, new)
    kind.encode_image = exchange(kind.encode_image, {1024 * 1024: level * level})
    torch.cuda.current_device = lambda: "cpu"
    try:
        yield
    finally:
        kind._get_qwenvl_embeds, kind.encode_image = released
        torch.cuda.current_device = device_call


@contextmanager
def watching_ids(pipe, seen: list[torch.Tensor]):
    """Collect the token ids of every text encoding."""
    hook = pipe.text_encoder.model.language_model.embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(args[0][0])
    )
    try:
        yield
    finally:
        hook.remove()


def encode(version: str, case: cases.Text) -> dict[str, torch.Tensor]:
    """One text encoding: ids, states (every `cases.STRIDE`th), masks and positions."""
    pipe = pipeline(version, torch.float32)
    picture, seen = images.to_pil(cases.generated_picture(case.size)), []
    with small_v11(pipe, version, strip=case.strip), watching_ids(pipe, seen):
        out = pipe.encode_prompt(ref_image=picture, prompt=case.instruction, device=torch.device("cpu"))
    if version == "v1.2":
        return {
            "ids": seen[0].int(),
            "tokens": out.embedding[:, :: cases.STRIDE],
            "positions": out.txt_ids,
            "text_embeds": out.text_embeds[:, :: cases.STRIDE],
            "text_mask": out.text_masks.bool(),
        }
    tokens, mask, positions = out
    assert not positions.any()
    return {"ids": seen[0].int(), "tokens": tokens[:, :: cases.STRIDE], "mask": mask.bool()}


def edit(version: str, case: cases.Edit) -> dict[str, torch.Tensor]:
    """One edit from end to end: packed latents and the picture."""
    pipe = pipeline(version, case.dtype)
    run = dict(
        image=images.to_pil(cases.picture(case.size)),
        prompt=case.instruction,
        true_cfg_scale=case.guidance,
        num_inference_steps=cases.STEPS,
    )
    if version == "v1.2":
        run |= dict(size_level=case.level, enable_reflection_mode=False)
    latents = []
    with small_v11(pipe, version, level=case.level):
        made = pipe(
            **run,
            generator=torch.Generator().manual_seed(cases.SEED),
            callback_on_step_end=lambda pipe, i, t, values: latents.append(values["latents"]) or values,
        ).images[0]
    out = {"latents": latents[-1].float(), "picture": (images.from_pil(made) * 255).round().to(torch.uint8)}
    if case.dtype != torch.float32:
        # torch's random numbers of low precision differ between its versions: keep what was drawn, in order.
        rng, count = torch.Generator().manual_seed(cases.SEED), latents[-1].numel()
        out["draws"] = torch.stack([torch.randn(count, generator=rng, dtype=case.dtype) for _ in range(2)])
    return out


@torch.no_grad()
def main(target: Path = TARGET) -> None:
    """Run every case and write the file."""
    torch.set_num_threads(1)
    out: dict[str, torch.Tensor] = {}
    for version, texts in cases.TEXTS.items():
        for name, case in texts.items():
            out |= {f"text/{version}/{name}/{key}": value for key, value in encode(version, case).items()}
    for version, edits in cases.EDITS.items():
        for name, case in edits.items():
            out |= {f"edit/{version}/{name}/{key}": value for key, value in edit(version, case).items()}
    save_file({key: value.contiguous() for key, value in sorted(out.items())}, target)
    sys.stdout.write(f"{target.name}: {len(out)} tensors, {target.stat().st_size} bytes\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
