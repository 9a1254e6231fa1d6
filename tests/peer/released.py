"""Runs the released Step1X-Edit v1.2 pipeline: single edits, and its loop with scripted replies.

Imported by peer scripts only, or run as a program that does the jobs of a JSON file (`do_jobs`), so that a test can have it
work in the released code's environment:

    PYTHONPATH=<released diffusers fork>/src python tests/peer/released.py JOBS.json OUT.safetensors

Needs transformers 4.55, megfile and qwen_vl_utils, as the released code does; that code is the user's own copy and no part of
this repository. Two things are changed in it, and only in memory: the default dtype of its text encoding, and the size of the
text mapping, which it fixes to that of the large model. In the loop, what the MLLM says is replaced by a script; the questions,
the readers of the replies, the retries, the decisions and the choice of the best picture are the released ones.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

BUILDERS = {
    "build_reformt_prompt": "think",
    "build_descriptions_messages": "describe",
    "_build_scoring_messages": "score",
    "_build_reflection_messages": "reflect",
    "_build_score1_messages": "edit_score",
    "_build_score2_messages": "quality_score",
}
"""Method that makes the messages of a question -> the task in our words."""


@dataclass
class LoopRecord:
    """What one run of the released loop did, round by round where it is a list.

    instructions: what the editor got; inputs: index of the round whose picture was edited, None for the source; decisions:
    success, refine or failed; consistency: after the caps (both empty without reflection); verdicts, marks: as they were read.
    questions: (task, system text, parts of the user turn, a picture being the size of what is shown). vision_passes: pictures
    that went through the vision encoder, in both roles.
    """

    pictures: list[Image.Image]
    best: int
    instructions: list[str]
    inputs: list[int | None]
    thought: str | None
    decisions: list[str]
    consistency: list[float]
    verdicts: list[str]
    marks: list[dict[str, Any]]
    questions: list[tuple[str, str, list[Any]]] = field(default_factory=list)
    vision_passes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures and the questions."""
        names = "best instructions inputs thought decisions consistency verdicts marks vision_passes"
        return {name: getattr(self, name) for name in names.split()}


def load(folder: Path, *, dtype: torch.dtype = torch.float32, prefix: str | None = None, dropped: int | None = None):
    """The released v1.2 pipeline with the weights of `folder`. prefix, dropped: None keeps what the released code says."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from diffusers.models.transformers.transformer_step1x_edit import Step1XEditTransformer2DModel
    from diffusers.pipelines.step1x_edit.pipeline_step1x_edit_v1p2 import Step1XEditPipelineV1P2 as Pipeline
    from safetensors.torch import load_file
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    mapping = config.pop("enable_text_token_mapping")
    transformer = Step1XEditTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    if mapping:
        transformer.text_token_mapping = torch.nn.Linear(config["connector_in_channels"], config["joint_attention_dim"])
    state: dict[str, torch.Tensor] = {}
    for shard in sorted((folder / "transformer").glob("*.safetensors")):
        state |= load_file(shard)
    transformer.load_state_dict(state)
    encode = Pipeline._get_qwenvl_embeds
    assert encode.__defaults__[0] is None and isinstance(encode.__defaults__[1], torch.dtype)
    encode.__defaults__ = (None, dtype)
    pipe = Pipeline(
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", torch_dtype=dtype),
        processor=AutoProcessor.from_pretrained(folder / "processor"),
        transformer=transformer.to(dtype).eval(),
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.QWEN25VL_PREFIX = pipe.QWEN25VL_PREFIX if prefix is None else prefix
    pipe.QWEN25VL_PREFIX_LEN = pipe.QWEN25VL_PREFIX_LEN if dropped is None else dropped
    return pipe


def run_edit(pipe, image: Image.Image, instruction: str, *, guidance: float, steps: int, level: int, seed: int) -> Image.Image:
    """One edit without a reasoner."""
    return pipe(
        image=image,
        prompt=instruction,
        true_cfg_scale=guidance,
        num_inference_steps=steps,
        size_level=level,
        generator=torch.Generator().manual_seed(seed),
        enable_reflection_mode=False,
    ).images[0]


def run_loop(
    pipe,
    image: Image.Image,
    instruction: str,
    replies: dict[str, list[str]],
    *,
    guidance: float,
    steps: int,
    level: int,
    seed: int,
    think: bool = False,
    reflect: bool = True,
    rounds: int = 3,
    speak: bool = False,
) -> LoopRecord:
    """The released loop. replies: raw texts by task, used in order; the last description is repeated.

    speak: let the MLLM really answer before its words are replaced, so that its passes can be counted.
    """
    questions: list[tuple[str, str, list[Any]]] = []
    prompts: list[str] = []
    given: list[Image.Image] = []
    judged: list[tuple[bool, str | None]] = []
    scored: list[float] = []
    passes: list[int] = []
    hook = pipe.text_encoder.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    try:
        with ExitStack() as stack:
            stack.enter_context(_scripted(replies, questions, judged, scored, speak))
            stack.enter_context(_watched(pipe, prompts, given))
            made = pipe(
                image=image,
                prompt=instruction,
                true_cfg_scale=guidance,
                num_inference_steps=steps,
                size_level=level,
                generator=torch.Generator().manual_seed(seed),
                enable_thinking_mode=think,
                enable_reflection_mode=reflect,
                max_try_cnt=rounds,
            )
    finally:
        hook.remove()
    pictures = list(made.images)
    return LoopRecord(
        pictures=pictures,
        best=_index(made.final_images[0], pictures),
        instructions=prompts,
        inputs=[None if picture is image else _index(picture, pictures) for picture in given],
        thought=made.reformat_prompt if think else None,
        decisions=["success" if done else "failed" if again is None else "refine" for done, again in judged],
        consistency=scored,
        verdicts=list(made.think_info),
        marks=list(made.best_info),
        questions=questions,
        vision_passes=sum(passes),
    )


def _index(picture: Image.Image, pictures: list[Image.Image]) -> int:
    return next(index for index, other in enumerate(pictures) if other is picture)


class _Messages(list):
    """The messages of a question, which remember their task."""

    task = ""


@contextmanager
def _scripted(replies, questions, judged, scored, speak: bool):
    """Scripted words for the released reasoner; what it asks, decides and scores is written down."""
    from diffusers.pipelines.step1x_edit import pipeline_step1x_edit_thinker as thinker

    left = {task: list(texts) for task, texts in replies.items()}
    asked, thinks, client = thinker.ImageEditEvaluator_EN, thinker.Step1XEditThinker, thinker.QwenGenerativeAIClient

    def tagging(task, build):
        def tagged(self, *args, **kwargs):
            messages = _Messages(build(self, *args, **kwargs))
            messages.task = task
            return messages

        return tagged

    def answer(self, messages, max_tokens, _real=client.call_model):
        questions.append((messages.task, *_shown(messages)))
        if speak:
            _real(self, messages, max_tokens)
        texts = left[messages.task]
        if messages.task == "describe" and len(texts) == 1:
            return texts[0].strip()
        return texts.pop(0).strip()  # the real client strips as well

    def noting(method, note):
        def noted(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            note(result)
            return result

        return noted

    with ExitStack() as stack:
        for name, task in BUILDERS.items():
            stack.enter_context(mock.patch.object(asked, name, tagging(task, getattr(asked, name))))
        stack.enter_context(mock.patch.object(client, "call_model", answer))
        stack.enter_context(mock.patch.object(thinks, "format_text", noting(thinks.format_text, judged.append)))
        finalise = noting(asked._apply_score_caps_and_finalize, lambda found: found and scored.append(found["score"]))
        stack.enter_context(mock.patch.object(asked, "_apply_score_caps_and_finalize", finalise))
        yield


def _shown(messages) -> tuple[str, list[Any]]:
    """(system text, parts of the user turn); a picture is shown as [width, height] of what was sent."""
    import base64
    import io

    texts = {message["role"]: message["content"] for message in messages}
    parts: list[Any] = []
    for part in texts["user"]:
        if part["type"] == "text":
            parts.append(part["text"])
        else:
            sent = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
            parts.append(list(Image.open(io.BytesIO(sent)).size))
    return texts["system"], parts


@contextmanager
def _watched(pipe, prompts: list[str], given: list[Image.Image]):
    """Write down what the editor gets in every round."""
    check, encode = pipe.check_inputs, pipe.encode_image

    def check_inputs(prompt, *args, **kwargs):
        prompts.append(prompt)
        return check(prompt, *args, **kwargs)

    def encode_image(image, *args, **kwargs):
        given.append(image)
        return encode(image, *args, **kwargs)

    with mock.patch.object(pipe, "check_inputs", check_inputs), mock.patch.object(pipe, "encode_image", encode_image):
        yield


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image -> uint8 (H, W, 3)."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB")))


@torch.no_grad()
def do_jobs(jobs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run the jobs: (pictures by `NAME` or `NAME/round`, records of the loops by name).

    jobs: {"folder", "prefix", "dropped", "edits": {name: {"image": path, **arguments of run_edit}}, "loops": {name: ...}}.
    """
    pipe = load(Path(jobs["folder"]), prefix=jobs.get("prefix"), dropped=jobs.get("dropped"))
    pictures: dict[str, torch.Tensor] = {}
    records: dict[str, Any] = {}
    for name, job in jobs.get("edits", {}).items():
        pictures[name] = to_tensor(run_edit(pipe, Image.open(job.pop("image")), **job))
    for name, job in jobs.get("loops", {}).items():
        record = run_loop(pipe, Image.open(job.pop("image")), **job)
        pictures |= {f"{name}/{index}": to_tensor(picture) for index, picture in enumerate(record.pictures)}
        records[name] = {**record.as_json(), "questions": record.questions}
    return pictures, records


def main() -> None:
    """JOBS.json OUT.safetensors"""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    jobs, out = map(Path, sys.argv[1:])
    pictures, records = do_jobs(json.loads(jobs.read_text(encoding="utf-8")))
    save_file(pictures, out, metadata={"records": json.dumps(records)})


if __name__ == "__main__":
    main()
