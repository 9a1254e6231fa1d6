"""What our own arms run, each in its process: edits, single forwards, reflections. See `worker` for the protocol.

A job says what to do (`arm`), on what (`system`, `size`, `folder` of a checkpoint, `pictures`) and how (`device`, `threads`,
`steps`, `level`, `sdpa`, `out`). Sizes: `small`, weights from the folder in float32; `full`, random weights in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .small import INSTRUCTION
from .worker import serve, start, steps_of

if TYPE_CHECKING:
    from ..generator import FlowGenerator
    from ..interfaces import Query
    from ..mllm.qwen25vl import QwenVL
    from ..regions import Region
    from ..types import EditRequest

Run = Callable[[int], Mapping[str, float] | None]
Job = Mapping[str, Any]


def main(text: str) -> None:
    """The process of an arm. text: the job as JSON."""
    job = start(text)
    run = {"edit": edit, "forward": forward, "reflect": reflect}[job["arm"]](job)
    serve(job, run, {"torch": torch.__version__})


def edit(job: Job) -> Run:
    """Whole edits: conditioning, VAE, steps with guidance, VAE. Run n edits picture n and writes what it made to `out`."""
    from ..images import load_image, to_pil
    from ..types import EditRequest
    from .split import TRANSFORMER, Inside

    generator = _small_generator(job) if job["size"] == "small" else _full_generator(job)
    device = job["device"]
    pictures = [load_image(path).rgb.to(device) for path in job["pictures"]]
    inside = Inside(device=device)
    # Not the network itself: our denoisers may go through its blocks without calling it.
    generator.denoiser = inside.around(generator.denoiser)  # type: ignore[assignment]

    def run(number: int) -> dict[str, float]:
        inside.reset()
        picture = pictures[number]
        steps = steps_of(job, number)
        request = EditRequest(picture, INSTRUCTION, steps=steps, guidance=job["guidance"], size_level=job["level"])
        if job.get("region"):
            request = replace(request, region=forced_region(job, generator, request))
        rng = torch.Generator().manual_seed(number)
        # released: the same words, draws and resizes as the peers', so that the pictures can be compared.
        made = generator.edit(request, picture, INSTRUCTION, rng, released=True)
        to_pil(made.image).save(Path(job["out"]) / f"{number:03d}.png")
        return {TRANSFORMER: inside.seconds}

    return run


def forced_region(job: Job, generator: FlowGenerator, request: EditRequest) -> Region:
    """A corner of the picture with the share `region` of its pixels; with `reuse` every second velocity is taken again."""
    from .. import flow
    from ..regions import Decay, Region

    height, width = request.image.shape[-2:]
    side = job["region"] ** 0.5
    mask = torch.zeros(1, 1, height, width)
    mask[..., : round(side * height), : round(side * width)] = 1.0
    if not job["reuse"]:
        return Region(mask=mask)
    grid = generator.geometry.plan([(width, height)], request.size_level, released=True).grid
    sigmas = flow.sigmas(request.steps, grid[0] * grid[1], generator.schedule)[:-1].tolist()
    stretches = len(sigmas) - 1
    return Region(mask=mask, decay=Decay(tuple(sigmas), (1.0,) * stretches, (1.0,) * stretches), tolerance=1.5)


def forward(job: Job) -> Run:
    """One forward of the denoiser at full size, or of diffusers' own transformer (`stock`)."""
    from .counted import CHANNELS, GRID
    from .weights import random_words

    device, dtype = job["device"], torch.bfloat16
    tokens = GRID[0] * GRID[1]
    latents = torch.randn(1, tokens, CHANNELS, device=device, dtype=dtype)
    reference = torch.randn(1, tokens, CHANNELS, device=device, dtype=dtype)
    t, words = torch.full((1,), 0.7, device=device), random_words(device, dtype)
    if job.get("stock"):
        network, pair = _full_transformer(job["system"], device), torch.cat([latents, reference], dim=1)
        shapes = [[(1, *GRID)] * 2]
        return lambda number: _nothing(network(pair, words.tokens, None, t.to(dtype), img_shapes=shapes, return_dict=False))
    from ..types import LatentImage

    denoiser = _denoiser(job)
    image = LatentImage(reference, *GRID)
    return lambda number: _nothing(denoiser(latents, t, words, grid=GRID, references=(image,)))


def reflect(job: Job) -> Run:
    """One round's questions, `tokens` of answer each: describe, then three scores in one batch, then the verdict.

    scores: false leaves two of the three scores out, as for a round that is accepted. guesses: see `QwenVL`.
    """
    from ..dialogue.prompts import load_pack
    from ..images import load_image
    from ..reasoners.qwen import QwenSpeaker
    from ..reasoners.reasoner import PackReasoner
    from ..reasoners.scripted import ScriptedSpeaker
    from .script import one_round
    from .split import Split

    mllm = _mllm(job)
    mllm.vocabulary().stops = frozenset()  # an answer ends when its tokens are used up
    mllm.guesses = job.get("guesses", False)
    split = Split(mllm.model, job["device"])
    script = ScriptedSpeaker(one_round(len(job["pictures"])))
    speaker = _Fixed(QwenSpeaker(mllm), script, split, job["tokens"])
    reasoner = PackReasoner(load_pack("en"), speaker, paired=True)
    pictures = [load_image(path).rgb for path in job["pictures"]]

    def run(number: int) -> dict[str, float]:
        split.reset()
        source, result = pictures[2 * number : 2 * number + 2]
        target = reasoner.describe(source, INSTRUCTION)
        reasoner.reflect(source, result, INSTRUCTION, target, scores=job.get("scores", True))
        return split.parts()

    return run


class _Fixed:
    """A speaker whose every answer has `tokens` tokens, which are dropped for those of a script."""

    def __init__(self, speaker: Any, script: Any, split: Any, tokens: int) -> None:
        self.speaker, self.script, self.split, self.tokens = speaker, script, split, tokens

    def answer(self, queries: Sequence[Query], *, on_text: Any = None, should_stop: Any = None) -> list[str]:
        """See `interfaces.Speaker`."""
        # Free text: the literals of a form cost us no step, but then the arms would not write equally many tokens.
        free = [replace(query, form="free", max_new_tokens=self.tokens) for query in queries]
        with self.split.speaking():
            self.speaker.answer(free)
        return self.script.answer(queries)


def _nothing(output: Any) -> None:
    return None


def _small_generator(job: Job) -> FlowGenerator:
    from ..load import SystemSpec, load_system

    spec = SystemSpec(system=job["system"], weights=Path(job["folder"]), reasoner="none", dtype="float32", device=job["device"])
    generator = load_system(spec).generator
    if job.get("words"):
        from .weights import GivenWords

        config = generator.denoiser.transformer.config  # type: ignore[attr-defined]
        width = config.get("connector_in_channels") or config.joint_attention_dim
        words = GivenWords(job["device"], torch.float32, count=job["words"], width=width, quoted=0)
        generator.conditioner = words  # type: ignore[assignment]
    return generator


def _full_generator(job: Job) -> FlowGenerator:
    """The released sizes, random weights; the words are given, so that no MLLM is needed."""
    from .. import flow
    from ..generator import FlowGenerator, Step1XGeometry
    from ..geometry import QwenGeometry
    from ..latents import KLCodec, QwenCodec
    from .weights import FLUX_VAE, QWEN_VAE, GivenWords, random_network

    device, dtype = job["device"], torch.bfloat16
    words, denoiser = GivenWords(device, dtype), _denoiser(job)

    def vae() -> torch.nn.Module:
        from diffusers import AutoencoderKL, AutoencoderKLQwenImage

        return AutoencoderKL(**FLUX_VAE) if job["system"] == "reasonedit-s" else AutoencoderKLQwenImage(**QWEN_VAE)

    network: Any = random_network(vae, device, dtype)
    if job["system"] == "reasonedit-s":
        parts = (KLCodec(network), flow.STEP1X)
        return FlowGenerator(words, denoiser, *parts, geometry=Step1XGeometry(), combine=flow.step1x_guidance("v1.2"))
    parts = (QwenCodec(network), flow.QWEN)
    return FlowGenerator(words, denoiser, *parts, geometry=QwenGeometry(plus=True), combine=flow.combine_qwen)


def _denoiser(job: Job) -> Any:
    from ..denoisers.dit import Step1XDenoiser
    from ..denoisers.qwen_image import QwenImageDenoiser

    network: Any = _full_transformer(job["system"], job["device"])
    # Where SDPA's backend is forced, SDPA itself is: our own choice could be a kernel that knows nothing of that.
    backend = "sdpa" if job.get("sdpa") else "auto"
    if job["system"] == "reasonedit-s":
        return Step1XDenoiser(network, "v1.2", backend=backend)
    return QwenImageDenoiser(network, backend=backend)


def _full_transformer(system: str, device: str) -> torch.nn.Module:
    from .weights import QWEN_DIT, random_network

    def make() -> torch.nn.Module:
        if system == "reasonedit-s":
            from ..models.step1x_transformer import Step1XEditTransformer2DModel

            return Step1XEditTransformer2DModel(enable_text_token_mapping=True)
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel(**QWEN_DIT)

    return random_network(make, device, torch.bfloat16)


def _mllm(job: Job) -> QwenVL:
    from ..mllm.load import load_mllm
    from .weights import random_mllm

    if job["size"] == "full":
        return random_mllm(job["folder"], job["device"], torch.bfloat16)
    return load_mllm(Path(job["folder"]), dtype=torch.float32, device=job["device"])
