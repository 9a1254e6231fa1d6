"""From a folder of weights to a `System`: the one place where the parts are put together.

Systems are rows of a table, not subclasses: a row names its conditioner, denoiser, codec, geometry and guidance rule, and
everything below it is shared. One MLLM object conditions the denoiser and reasons, as in the released pipelines.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .detect import QWEN, STEP1X
from .errors import BackendUnavailable, CheckpointError, ConfigError
from .loop import POLICIES
from .parts import Parts, find_parts
from .settings import Settings, read_settings
from .types import Counts, Policy

if TYPE_CHECKING:
    from .dialogue.prompts import PackChoice
    from .generator import FlowGenerator
    from .interfaces import Reasoner, Speaker
    from .mllm.qwen25vl import QwenVL

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OnProgress = Callable[[str, int, int], None]
"""(what is being loaded, parts done, parts in all)."""


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """What to load and how.

    weights: a folder in a released layout (diffusers folders or single files). reasoner: `qwen` (the checkpoint's own MLLM),
    `qwen:DIR` (another Qwen2.5-VL folder), `none`, `remote:URL` or `scripted:FILE`. dialogue: a dialogue pack; None lets
    the loader choose. loras: (file, scale). variant: of Step1X single files, which their keys do not tell.
    models_dir: ComfyUI's models folder, where it runs inside ComfyUI.
    """

    system: str
    weights: Path
    reasoner: str = "qwen"
    dialogue: Path | None = None
    policy: str = "reasonedit"
    dtype: str = "auto"
    device: str = "auto"
    loras: tuple[tuple[Path, float], ...] = ()
    offload: str = "none"
    weights_dtype: str = "auto"
    variant: str = "auto"
    models_dir: Path | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class System:
    """A loaded system. `reasoner` is None with `--reasoner none`. notes: sentences for the user; defaults: the checkpoint's
    steps, guidance, size_level and negative prompt; pack_origin: which dialogue pack speaks, for the trace."""

    name: str
    reasoner: Reasoner | None
    generator: FlowGenerator
    mllm: QwenVL
    policy: Policy
    counts: Counts
    settings: Settings
    defaults: Mapping[str, Any]
    pack_origin: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())


def load_system(spec: SystemSpec, *, on_progress: OnProgress | None = None) -> System:
    """Load `spec` and put its parts together.

    Raises ConfigError for a value of the spec, CheckpointError for the weights.
    """
    if spec.system not in SYSTEMS:
        raise ConfigError(f"expected a system out of {', '.join(SYSTEMS)}, found {spec.system!r}.")
    if spec.policy not in POLICIES:
        raise ConfigError(f"expected a policy out of {', '.join(POLICIES)}, found {spec.policy!r}.")
    if spec.dtype not in ("auto", *DTYPES):
        raise ConfigError(f"expected a dtype out of auto, {', '.join(DTYPES)}, found {spec.dtype!r}.")
    return SYSTEMS[spec.system](spec, _Progress(on_progress))


def choose_device(name: str) -> torch.device:
    """`auto` -> CUDA where torch can use it, else the CPU; a named device that is not there is an error."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise BackendUnavailable(
            f"--device cuda: expected a CUDA device that torch can use, found none (torch {torch.__version__}, {build}); "
            "`reasonedit doctor` says more, `--device cpu` runs without"
        )
    return torch.device("cuda")


def choose_dtype(name: str, device: torch.device) -> str:
    """`auto` -> bfloat16 on CUDA devices that compute in it (8.0 and later), float16 on older ones, float32 on the CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


class _Progress:
    """Counts the parts of a load: MLLM, DiT, VAE."""

    def __init__(self, tell: OnProgress | None, total: int = 3) -> None:
        self._tell, self._total, self._done = tell or (lambda *_: None), total, 0

    def __call__(self, what: str) -> None:
        self._tell(what, self._done, self._total)
        self._done += 1

    def end(self) -> None:
        self._tell("ready", self._total, self._total)


# ---- the rows ------------------------------------------------------------------------------------------------------------


def _load_step1x(spec: SystemSpec, progress: _Progress) -> System:
    from . import flow
    from .conditioners.step1x import Step1XConditioner
    from .denoisers.dit import Step1XDenoiser
    from .generator import FlowGenerator, Step1XGeometry
    from .latents import KLCodec
    from .weights import load_flux_vae, load_step1x_transformer

    parts = find_parts(spec.weights, STEP1X)
    dtype, device, home = _placement(spec)
    counts = Counts()
    progress("MLLM")
    mllm = _load_mllm(spec, parts, dtype, home, counts)
    progress("DiT")
    wanted = spec.variant if spec.variant != "auto" else parts.layout.variant or "auto"
    transformer, variant, report = load_step1x_transformer(
        parts.transformer, dtype=dtype, device=home, variant=wanted, weights_dtype=spec.weights_dtype
    )
    lora_notes = _apply_loras(transformer, spec)
    progress("VAE")
    vae, _ = load_flux_vae(parts.vae, dtype=_vae_dtype(dtype), device=home)
    settings = read_settings(parts.root, f"step1x-{variant}")
    choice = _choose_pack(spec, parts, variant)
    prompt = choice.pack.conditioning_for(variant)
    mover = _mover(spec, device, mllm, transformer, vae)
    conditioner = Step1XConditioner(
        mllm,
        prefix=prompt.prefix,
        dropped_tokens=prompt.dropped_tokens if settings.dropped_tokens is None else settings.dropped_tokens,
        variant=variant,
        min_pixels=settings.conditioner_pixels[0],
        max_pixels=settings.conditioner_pixels[1],
    )
    generator = FlowGenerator(
        conditioner,
        Step1XDenoiser(transformer, variant, counts=counts),
        KLCodec(vae),
        _schedule(parts, flow.STEP1X),
        geometry=Step1XGeometry(variant, settings.multiple),
        combine=flow.step1x_guidance(variant),
        default_negative="",
        counts=counts,
        mover=mover,
    )
    notes = (*report.notes, *lora_notes, *([choice.warning] if choice.warning else []))
    progress.end()
    return _system(spec, generator, mllm, counts, settings, choice, mover, notes)


def _load_qwen_image(spec: SystemSpec, progress: _Progress) -> System:
    from . import flow
    from .conditioners.qwen_image import QwenImageConditioner
    from .denoisers.qwen_image import QwenImageDenoiser
    from .generator import FlowGenerator
    from .geometry import QwenGeometry
    from .latents import QwenCodec
    from .weights import load_qwen_transformer, load_qwen_vae

    parts = find_parts(spec.weights, QWEN)
    dtype, device, home = _placement(spec)
    counts = Counts()
    plus = parts.layout.variant != "edit"  # 2509 is the base of ReasonEdit-Q, so EditPlus is what a bare file is taken for
    progress("MLLM")
    mllm = _load_mllm(spec, parts, dtype, home, counts)
    progress("DiT")
    transformer, report = load_qwen_transformer(
        parts.transformer, dtype=dtype, device=home, weights_dtype=spec.weights_dtype
    )
    lora_notes = _apply_loras(transformer, spec)
    progress("VAE")
    vae, _ = load_qwen_vae(parts.vae, dtype=_vae_dtype(dtype), device=home)
    settings = read_settings(parts.root, "qwen-edit-plus" if plus else "qwen-edit", mllm.bounds)
    choice = _choose_pack(spec, parts, None)
    mover = _mover(spec, device, mllm, transformer, vae)
    conditioner = QwenImageConditioner(
        mllm,
        plus=plus,
        min_pixels=settings.conditioner_pixels[0],
        max_pixels=settings.conditioner_pixels[1],
        drop=settings.dropped_tokens,
    )
    generator = FlowGenerator(
        conditioner,
        QwenImageDenoiser(transformer, counts=counts),
        QwenCodec(vae),
        _schedule(parts, flow.QWEN),
        geometry=QwenGeometry(plus, settings.condition_area, settings.multiple),
        combine=flow.combine_qwen,
        default_negative=" ",
        counts=counts,
        mover=mover,
    )
    progress.end()
    return _system(spec, generator, mllm, counts, settings, choice, mover, (*report.notes, *lora_notes))


SYSTEMS: dict[str, Callable[[SystemSpec, _Progress], System]] = {STEP1X: _load_step1x, QWEN: _load_qwen_image}


# ---- shared parts --------------------------------------------------------------------------------------------------------


def _system(spec, generator, mllm, counts, settings, choice: PackChoice, mover, notes) -> System:
    pack = choice.pack
    origin = {
        "origin": choice.origin,
        "name": pack.name,
        "version": pack.version,
        "path": pack.path,
        "sources": [list(source) for source in pack.sources],
        "filled": list(choice.filled),
    }
    defaults = {
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size_level": settings.size_level,
        "negative": None,
    }
    reasoner = _make_reasoner(spec, choice, mllm, settings, mover, counts)
    return System(
        spec.system, reasoner, generator, mllm, POLICIES[spec.policy], counts, settings, defaults, origin, tuple(notes)
    )


def _make_reasoner(
    spec: SystemSpec, choice: PackChoice, mllm: QwenVL, settings: Settings, mover, counts: Counts
) -> Reasoner | None:
    from .reasoners.reasoner import PackReasoner

    kind, _, value = spec.reasoner.partition(":")
    speaker: Speaker
    if kind == "none":
        return None
    if kind == "qwen":
        speaker = _qwen_speaker(spec, value, mllm, settings, mover, counts)
    elif kind == "remote" and value:
        from .reasoners.remote import RemoteSpeaker

        speaker = RemoteSpeaker(value)
    elif kind == "scripted" and value:
        from .reasoners.scripted import ScriptedSpeaker

        speaker = ScriptedSpeaker.from_file(value)
    else:
        raise ConfigError(
            f"expected a reasoner out of qwen, qwen:DIR, none, remote:URL, scripted:FILE, found {spec.reasoner!r}."
        )
    released = POLICIES[spec.policy].released
    return PackReasoner(choice.pack, speaker, paired=released, released=released, seed=spec.seed)


def _qwen_speaker(spec: SystemSpec, folder: str, mllm: QwenVL, settings: Settings, mover, counts: Counts) -> Speaker:
    from .mllm.load import load_mllm
    from .offload import MovedSpeaker, make_mover
    from .reasoners.qwen import QwenSpeaker

    if folder:
        dtype, device, home = _placement(spec)
        mllm = load_mllm(Path(folder), dtype=dtype, device=home, need_lm_head=True, counts=counts)
        mover = make_mover(spec.offload, {"mllm": mllm.model}, device)
    low, high = settings.reasoner_pixels
    speaker = QwenSpeaker(mllm, min_pixels=low, max_pixels=high, max_side=settings.reasoner_max_side)
    return MovedSpeaker(speaker, mover)


def _load_mllm(spec: SystemSpec, parts: Parts, dtype: torch.dtype, device: torch.device, counts: Counts) -> QwenVL:
    from .mllm.load import load_mllm

    return load_mllm(
        parts.mllm,
        dtype=dtype,
        device=device,
        need_lm_head=spec.reasoner == "qwen",
        tokenizer_path=parts.tokenizer,
        counts=counts,
    )


def _apply_loras(transformer, spec: SystemSpec) -> list[str]:
    from .lora import apply_lora

    notes = []
    for number, (path, scale) in enumerate(spec.loras):
        report = apply_lora(transformer, path, scale, name=f"lora{number}")
        if report.unmatched:
            few = ", ".join(report.unmatched[:5])
            notes.append(f"{path}: {len(report.unmatched)} keys of the LoRA match nothing in this model: {few}.")
    return notes


def _choose_pack(spec: SystemSpec, parts: Parts, variant: str | None) -> PackChoice:
    from .dialogue.prompts import find_pack

    return find_pack(explicit=spec.dialogue, weights=parts.root, models_dir=spec.models_dir, variant=variant)


def _placement(spec: SystemSpec) -> tuple[torch.dtype, torch.device, torch.device]:
    """(dtype, device of the computation, device the weights are loaded to)."""
    device = choose_device(spec.device)
    return DTYPES[choose_dtype(spec.dtype, device)], device, device if spec.offload == "none" else torch.device("cpu")


def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 beside a float16 DiT, as `force_upcast` in the released VAE config asks: its activations overflow there."""
    return torch.float32 if dtype == torch.float16 else dtype


def _mover(spec: SystemSpec, device: torch.device, mllm: QwenVL, transformer, vae):
    from .offload import make_mover

    return make_mover(spec.offload, {"mllm": mllm.model, "dit": transformer, "vae": vae}, device)


def _schedule(parts: Parts, default):
    from .flow import FlowSchedule

    if parts.scheduler is None:
        return default
    path = parts.scheduler / "scheduler_config.json"
    try:
        return FlowSchedule.from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected the scheduler's JSON, found: {error}. Download the file again.") from error
