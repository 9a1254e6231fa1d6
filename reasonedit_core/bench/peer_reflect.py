"""Five questions of a reflection asked the released way, as an arm in its own interpreter. See `worker`.

`released`: the released reasoner itself, in the user's own copy. `stock`: what can be had without it, the same five questions
one after another through transformers' `generate`, each picture as PNG in base64 and prepared anew for every question.
Every answer has the same number of tokens (its end is hidden); the words are then replaced by a script's, so that the
released readers accept the first reply.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .split import Split
from .worker import serve, start

Job = Mapping[str, Any]

ORDER = ("describe", "score", "reflect", "edit_score", "quality_score")
"""The released order of the questions, each waiting for the one before."""


def main(text: str) -> None:
    """The process of an arm. text: the job as JSON."""
    job = start(text)
    model, processor = load(job)
    split, length = Split(model, job["device"]), [0]
    fixed_length(model, split, length)
    run = released(model, processor, job) if job["arm"] == "released" else stock(model, processor, job)

    def timed(number: int) -> dict[str, float]:
        # `generate` has nothing that depends on how long an answer is: a short warm-up will do. Ours may record graphs.
        length[0] = job.get("warm_tokens", job["tokens"]) if number == 0 else job["tokens"]
        split.reset()
        run(number)
        return split.parts()

    import transformers

    serve(job, timed, {"transformers": str(transformers.__version__)})


def load(job: Job) -> tuple[Any, Any]:
    """The MLLM of the shared checkpoint and its processor; at full size with random weights."""
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = Path(job["folder"])
    processor = AutoProcessor.from_pretrained(folder, min_pixels=262144, max_pixels=802816)
    if job["size"] == "full":
        from .weights import random_mllm

        return random_mllm(folder, job["device"], torch.bfloat16).model, processor
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)
    return model.to(job["device"]).eval(), processor


def fixed_length(model: Any, split: Split, length: list[int]) -> None:
    """Make every answer as many tokens long as `length` says by then, and time it."""
    generate = model.generate

    def fixed(*args: Any, **options: Any) -> Any:
        options |= {"max_new_tokens": length[0], "min_new_tokens": length[0]}
        with split.speaking():
            return generate(*args, **options)

    model.generate = fixed


def released(model: Any, processor: Any, job: Job) -> Callable[[int], None]:
    """The released reasoner's `reflect`."""
    from PIL import Image

    from .peer_step1x import without_megfile

    without_megfile()
    from diffusers.pipelines.step1x_edit import pipeline_step1x_edit_thinker as code

    real, asked = code.QwenGenerativeAIClient.call_model, []

    def call_model(self: Any, messages: Any, max_tokens: int, *args: Any, **options: Any) -> str:
        real(self, messages, max_tokens)
        asked.append(None)
        return job["replies"][ORDER[(len(asked) - 1) % len(ORDER)]]

    code.QwenGenerativeAIClient.call_model = call_model
    thinker = code.Step1XEditThinker(model, processor)
    pictures = [Image.open(path).convert("RGB") for path in job["pictures"]]

    def run(number: int) -> None:
        before = len(asked)
        thinker.reflect(pictures[2 * number], pictures[2 * number + 1], job["instruction"])
        if len(asked) - before != len(ORDER):
            raise RuntimeError(f"expected {len(ORDER)} questions per reflection, found {len(asked) - before}")

    return run


def stock(model: Any, processor: Any, job: Job) -> Callable[[int], None]:
    """Our questions, one after another."""
    import torch
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in job["pictures"]]

    def ask(question: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in question["parts"]]
        images = [through_png(shown[name]) for name in question["images"]]
        messages = [{"role": "user", "content": content}]
        if question["system"] is not None:
            messages.insert(0, {"role": "system", "content": question["system"]})
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=images, padding=True, return_tensors="pt").to(job["device"])
        torch.manual_seed(0)
        out = model.generate(**inputs, do_sample=True, top_p=0.9, temperature=0.7)
        processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def run(number: int) -> None:
        shown = {"source": pictures[2 * number], "result": pictures[2 * number + 1]}
        for task in ORDER:
            ask(job["questions"][task], shown)

    return run


def through_png(picture: Any, most: int = 1024) -> Any:
    """A picture as it arrives after the released round trip: long side capped, PNG, base64, and back."""
    from PIL import Image

    picture = picture.copy()
    picture.thumbnail((most, most))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return Image.open(io.BytesIO(base64.b64decode(base64.b64encode(buffer.getvalue())))).convert("RGB")
