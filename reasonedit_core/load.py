"""From a folder of weights to a `System`: the one place where the parts are put together.

Systems are rows of a table, not subclasses: a row names its conditioner, denoiser, codec, geometry and guidance rule, and
everything below it is shared. One MLLM object conditions the denoiser and reasons, as in the released pipelines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .brain_options import SYSTEM as BRAIN
from .brain_options import check_brain_spec
from .compiling import compile_blocks, refuse_moved
from .detect import QWEN, STEP1X
from .drafter import Drafter
from .errors import BackendUnavailable, ConfigError
from .load_lora import Loras, apply_loras, draft_adapter, refuse_reasoner_loras
from .loop import POLICIES
from .mini.models import BRAINS, MINIS, mini_folder
from .parts import Parts, can_speak, find_parts, read_schedule
from .settings import Settings, read_settings
from .types import Counts, Policy

if TYPE_CHECKING:
    from .brain.generator import BrainGenerator
    from .dialogue.prompts import PackChoice
    from .generator import FlowGenerator
    from .interfaces import Reasoner, Speaker
    from .kernels.dispatch import Run
    from .mllm.qwen25vl import QwenVL
    from .offload import Mover

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

QWEN_LIKENESS = 0.80
"""`FlowGenerator.likeness` for Qwen-Image-Edit: what RegionE found; 0.88 is its number for Step1X-Edit."""

OnProgress = Callable[[str, int, int], None]
"""(what is being loaded, parts done, parts in all)."""

MakeMover = Callable[[Mapping[str, torch.nn.Module], torch.device], "Mover"]
"""(components by name, device of the computation) -> what moves them: for a host with a memory management of its own."""


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """What to load and how.

    system: one of SYSTEMS, or a mini of the package. weights: a folder in a released layout (diffusers folders or single
    files); None for a mini's own. parts: in place of `weights`, where each part lies. reasoner: `qwen` (the checkpoint's own
    MLLM), `own` (the same, or none where it has no lm_head), `qwen:DIR` (another Qwen2.5-VL), `none`, `remote:URL` or
    `scripted:FILE`. dialogue: a dialogue pack; None lets the loader choose. loras: (file or peft folder, scale), each onto the
    DiT or the checkpoint's MLLM as its keys say; `load_reasoner` has only an MLLM for them. reasoner_loras: the same for the
    MLLM of a `qwen:DIR`. draft_loras: at most one, onto the DiT, which only drafts see; ReasonEdit-Q then drafts with the
    schedule of Lightning LoRAs. variant: of Step1X single files, which their keys do not tell. models_dir: ComfyUI's models
    folder, where it runs inside ComfyUI. batched_cfg: both guidance passes as one forward. make_mover: in place of `offload`;
    weights are then loaded to the CPU. tokenizer: for a `qwen:FILE`. attention: "auto", or the backend of every attention of
    the DiT, one of `kernels.chosen.names()`. compiled: the DiT's blocks by torch.compile. brain: of ReasonBrain, in place of
    what its `reasonbrain.json` states (fields of `brain.layout.BrainSettings`: segmenter, extractor, switches,
    image_guidance). host: with attention "auto", the attention of an application that this runs in (`kernels.dispatch.Run`),
    for the full steps of S and Q; it may raise `kernels.Refused`.
    """

    system: str
    weights: Path | None = None
    reasoner: str = "qwen"
    dialogue: Path | None = None
    policy: str = "reasonedit"
    dtype: str = "auto"
    device: str | torch.device = "auto"
    loras: Loras = ()
    offload: str = "none"
    weights_dtype: str = "auto"
    variant: str = "auto"
    models_dir: Path | None = None
    seed: int = 0
    batched_cfg: bool = False
    parts: Parts | None = None
    make_mover: MakeMover | None = None
    tokenizer: Path | None = None
    reasoner_loras: Loras = ()
    draft_loras: Loras = ()
    attention: str = "auto"
    compiled: bool = False
    brain: Mapping[str, Any] = field(default_factory=dict)
    host: Run | None = None


@dataclass(frozen=True, slots=True)
class System:
    """A loaded system. `reasoner` is None with `--reasoner none`, `mllm` where no Qwen2.5-VL conditions. mover: brings
    components to the device. notes: sentences for the user; defaults: the checkpoint's steps, guidance, size_level and negative
    prompt; pack_origin: which dialogue pack speaks, for the trace. drafter: makes drafts with a LoRA of their own; None where
    the generator makes them."""

    name: str
    reasoner: Reasoner | None
    generator: FlowGenerator | BrainGenerator
    mllm: QwenVL | None
    policy: Policy
    counts: Counts
    settings: Settings
    defaults: Mapping[str, Any]
    pack_origin: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())
    mover: Mover | None = None
    drafter: Drafter | None = None


@dataclass(frozen=True, slots=True)
class LoadedReasoner:
    """A reasoner without an editor. mllm, mover: None where it does not run in this process. notes: sentences for the user."""

    reasoner: Reasoner
    pack_origin: Mapping[str, Any]
    mllm: QwenVL | None = None
    mover: Mover | None = None
    notes: tuple[str, ...] = ()


def load_system(spec: SystemSpec, *, on_progress: OnProgress | None = None) -> System:
    """Load `spec` and put its parts together.

    Raises ConfigError for a value of the spec, CheckpointError for the weights.
    """
    if spec.system in (known := {**MINIS, **BRAINS}):
        spec = replace(spec, system=known[spec.system], weights=spec.weights or mini_folder(spec.system))
    if spec.system not in SYSTEMS:
        raise ConfigError(f"expected a system out of {', '.join((*SYSTEMS, *MINIS, *BRAINS))}, found {spec.system!r}.")
    if spec.weights is None and spec.parts is None:
        raise ConfigError(f"{spec.system}: expected a folder of weights, found none. Name it.")
    if spec.policy not in POLICIES:
        raise ConfigError(f"expected a policy out of {', '.join(POLICIES)}, found {spec.policy!r}.")
    if spec.dtype not in ("auto", *DTYPES):
        raise ConfigError(f"expected a dtype out of auto, {', '.join(DTYPES)}, found {spec.dtype!r}.")
    dtype, device, _ = _placement(spec)
    refuse_moved(spec.compiled, spec.offload, spec.make_mover is not None)
    _check_attention(spec, device, dtype)  # before minutes of loading, not in the middle of an edit
    return SYSTEMS[spec.system](spec, _Progress(on_progress))


def load_reasoner(spec: SystemSpec) -> LoadedReasoner:
    """Load only the reasoner that `spec.reasoner` names: `qwen:PATH`, `remote:URL` or `scripted:FILE`.

    The weights' folder, where `reasonedit.json` and `dialogue.toml` are looked for, is that of a `qwen:PATH`.
    """
    kind, _, value = spec.reasoner.partition(":")
    if kind not in ("qwen", "remote", "scripted") or not value:
        raise ConfigError(f"expected a reasoner out of qwen:PATH, remote:URL, scripted:FILE, found {spec.reasoner!r}.")
    if kind != "qwen":
        choice = _find_pack(spec, None, None)
        refuse_reasoner_loras(spec.loras, spec.reasoner)
        return LoadedReasoner(_reasoner(spec, choice, _distant_speaker(kind, value)), _origin(choice))
    settings = read_settings(Path(value), "step1x-v1.2")
    choice = _find_pack(spec, Path(value), None, settings)
    mllm, mover, notes = _load_speaking(spec, value, Counts(), spec.loras)
    reasoner = _reasoner(spec, choice, _qwen_speaker(mllm, settings, mover), settings)
    return LoadedReasoner(reasoner, _origin(choice), mllm, mover, (*_notice(settings), *notes))


def choose_device(name: str | torch.device) -> torch.device:
    """`auto` -> CUDA where torch can use it, else the CPU; a named device that is not there is an error.

    A torch.device is taken as it is.
    """
    if isinstance(name, torch.device):
        return name
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

    def expect(self, total: int) -> None:
        self._total = total

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

    parts = spec.parts or find_parts(spec.weights, STEP1X)
    dtype, device, home = _placement(spec)
    counts = Counts()
    progress("MLLM")
    mllm = _load_mllm(spec, parts, dtype, home, counts)
    progress("DiT")
    wanted = spec.variant if spec.variant != "auto" else parts.layout.variant or "auto"
    transformer, variant, report = load_step1x_transformer(
        parts.transformer, dtype=dtype, device=home, variant=wanted, weights_dtype=spec.weights_dtype
    )
    _check_attention(spec, device, dtype, _head_dims(transformer.config))
    lora_notes = apply_loras(spec.loras, mllm, transformer)
    sketching = draft_adapter(spec.draft_loras, transformer)
    progress("VAE")
    vae, _ = load_flux_vae(parts.vae, dtype=_vae_dtype(dtype), device=home)
    settings = read_settings(parts.root, f"step1x-{variant}")
    if settings.schedule != "checkpoint":
        raise ConfigError(f"{parts.root}: schedule {settings.schedule!r} belongs to Qwen-Image. Remove it in reasonedit.json.")
    choice = _find_pack(spec, parts.root, variant, settings)
    prompt = choice.pack.conditioning_for(variant)
    mover = _mover(spec, device, mllm=mllm.model, dit=transformer, vae=vae)
    if spec.compiled:
        compile_blocks(transformer)
    conditioner = Step1XConditioner(
        mllm,
        prefix=prompt.prefix,
        dropped_tokens=prompt.dropped_tokens if settings.dropped_tokens is None else settings.dropped_tokens,
        variant=variant,
        min_pixels=settings.conditioner_pixels[0],
        max_pixels=settings.conditioner_pixels[1],
    )
    codec = KLCodec(vae)
    generator = FlowGenerator(
        conditioner,
        Step1XDenoiser(transformer, variant, counts=counts, host=spec.host, backend=spec.attention),
        codec,
        read_schedule(parts, flow.STEP1X),
        geometry=Step1XGeometry(variant, settings.multiple, codec.patch),
        combine=flow.step1x_guidance(variant),
        default_negative="",
        counts=counts,
        batched_cfg=spec.batched_cfg,
        mover=mover,
    )
    notes = (*report.notes, *lora_notes, *([choice.warning] if choice.warning else []))
    drafter = Drafter(generator, transformer, sketching) if sketching else None
    progress.end()
    return _system(spec, generator, mllm, counts, settings, choice, mover, notes, drafter)


def _load_qwen_image(spec: SystemSpec, progress: _Progress) -> System:
    from . import flow
    from .conditioners.qwen_image import QwenImageConditioner
    from .denoisers.qwen_image import QwenImageDenoiser
    from .generator import FlowGenerator
    from .geometry import QwenGeometry
    from .latents import QwenCodec
    from .weights import load_qwen_transformer, load_qwen_vae

    parts = spec.parts or find_parts(spec.weights, QWEN)
    dtype, device, home = _placement(spec)
    counts = Counts()
    plus = parts.layout.variant != "edit"  # 2509 is the base of ReasonEdit-Q, so EditPlus is what a bare file is taken for
    progress("MLLM")
    mllm = _load_mllm(spec, parts, dtype, home, counts)
    progress("DiT")
    transformer, report = load_qwen_transformer(parts.transformer, dtype=dtype, device=home, weights_dtype=spec.weights_dtype)
    _check_attention(spec, device, dtype, _head_dims(transformer.config))
    lora_notes = apply_loras(spec.loras, mllm, transformer)
    sketching = draft_adapter(spec.draft_loras, transformer)
    progress("VAE")
    vae, _ = load_qwen_vae(parts.vae, dtype=_vae_dtype(dtype), device=home)
    settings = read_settings(parts.root, "qwen-edit-plus" if plus else "qwen-edit", mllm.bounds)
    choice = _find_pack(spec, parts.root, None, settings)
    mover = _mover(spec, device, mllm=mllm.model, dit=transformer, vae=vae)
    if spec.compiled:
        compile_blocks(transformer)
    conditioner = QwenImageConditioner(
        mllm,
        plus=plus,
        min_pixels=settings.conditioner_pixels[0],
        max_pixels=settings.conditioner_pixels[1],
        drop=settings.dropped_tokens,
    )
    codec = QwenCodec(vae)
    generator = FlowGenerator(
        conditioner,
        QwenImageDenoiser(transformer, counts=counts, host=spec.host, backend=spec.attention),
        codec,
        flow.LIGHTNING if settings.schedule == "lightning" else read_schedule(parts, flow.QWEN),
        geometry=QwenGeometry(plus, settings.condition_area, settings.multiple, codec.patch),
        combine=flow.combine_qwen,
        default_negative=" ",
        counts=counts,
        batched_cfg=spec.batched_cfg,
        mover=mover,
        likeness=QWEN_LIKENESS,
    )
    drafter = Drafter(generator, transformer, sketching, flow.LIGHTNING) if sketching else None
    progress.end()
    return _system(spec, generator, mllm, counts, settings, choice, mover, (*report.notes, *lora_notes), drafter)


def _load_reasonbrain(spec: SystemSpec, progress: _Progress) -> System:
    from .brain.cues import make_extractor, make_finder, network_of
    from .brain.generator import make_generator
    from .brain.layout import change_settings, find_brain_parts
    from .brain.model import load_brain_model

    check_brain_spec(spec, SystemSpec(spec.system))
    parts = find_brain_parts(spec.weights)
    own = change_settings(parts.settings, spec.brain)
    settings = read_settings(parts.root, f"reasonbrain-{parts.kind}")
    dtype, device, home = _placement(spec)
    counts = Counts()
    progress.expect(5)
    model = load_brain_model(
        parts, dtype=dtype, vae_dtype=_vae_dtype(dtype), device=home, switches=own.switches, on_part=progress
    )
    finder = None
    if model.brain.switches.region_branch:
        finder = make_finder(own.segmenter, root=parts.root, segmenter=parts.segmenter, device=home)
    seeing = network_of(finder)
    mover = _mover(spec, device, mllm=model.stack(*[seeing] * (seeing is not None)), dit=model.network, vae=model.codec.vae)
    alone = spec.reasoner in ("qwen", "own", "none")
    choice = _find_pack(spec, parts.root, None, settings)
    reasoner, notes = _make_reasoner(replace(spec, reasoner="none") if alone else spec, choice, None, settings, mover, counts)
    asked = reasoner.speaker if spec.reasoner.startswith(("qwen:", "remote:")) or own.extractor == "mllm" and reasoner else None
    conditioner = model.conditioner.with_cues(finder, make_extractor(own.extractor, root=parts.root, speaker=asked))
    how = {"multiple": settings.multiple, "image_scale": own.image_guidance, "counts": counts, "mover": mover}
    generator = make_generator(model, conditioner, **how)
    defaults = {name: getattr(settings, name) for name in ("steps", "guidance", "size_level")} | {"negative": None}
    if spec.reasoner == "qwen":
        notes = [*notes, "ReasonBrain reasons inside its conditioner, without words: name a reasoner to think and reflect."]
    progress.end()
    made = (reasoner, generator, None, POLICIES[spec.policy], counts, settings, defaults, _origin(choice) if reasoner else None)
    return System(spec.system, *made, (*_notice(settings), *notes), mover)


SYSTEMS: dict[str, Callable[[SystemSpec, _Progress], System]] = {
    STEP1X: _load_step1x,
    QWEN: _load_qwen_image,
    BRAIN: _load_reasonbrain,
}


# ---- shared parts --------------------------------------------------------------------------------------------------------


def _system(spec, generator, mllm, counts, settings, choice: PackChoice, mover, notes, drafter: Drafter | None) -> System:
    defaults = {name: getattr(settings, name) for name in ("steps", "guidance", "size_level")} | {"negative": None}
    reasoner, more = _make_reasoner(spec, choice, mllm, settings, mover, counts)
    notes = (*_notice(settings), *notes, *more)
    parts = (reasoner, generator, mllm, POLICIES[spec.policy], counts, settings, defaults, _origin(choice), notes)
    return System(spec.system, *parts, mover, drafter)


def _notice(settings: Settings) -> tuple[str, ...]:
    return (settings.notice,) if settings.notice else ()


def _origin(choice: PackChoice) -> dict[str, Any]:
    pack = choice.pack
    return {
        "origin": choice.origin,
        "name": pack.name,
        "version": pack.version,
        "path": pack.path,
        "sources": [list(source) for source in pack.sources],
        "filled": list(choice.filled),
    }


def _make_reasoner(
    spec: SystemSpec, choice: PackChoice, mllm: QwenVL | None, settings: Settings, mover, counts: Counts
) -> tuple[Reasoner | None, list[str]]:
    """The reasoner, and notes on its LoRAs."""
    kind, _, value = spec.reasoner.partition(":")
    if kind == "qwen" and value:
        mllm, mover, notes = _load_speaking(spec, value, counts, spec.reasoner_loras)
        return _reasoner(spec, choice, _qwen_speaker(mllm, settings, mover)), notes
    refuse_reasoner_loras(spec.reasoner_loras, spec.reasoner)
    if kind == "none" or (kind == "own" and not mllm.can_generate):
        return None, []
    if kind in ("qwen", "own"):
        return _reasoner(spec, choice, _qwen_speaker(mllm, settings, mover), settings), []
    if kind in ("remote", "scripted") and value:
        return _reasoner(spec, choice, _distant_speaker(kind, value)), []
    raise ConfigError(
        f"expected a reasoner out of qwen, qwen:DIR, own, none, remote:URL, scripted:FILE, found {spec.reasoner!r}."
    )


def _reasoner(spec: SystemSpec, choice: PackChoice, speaker: Speaker, settings: Settings | None = None) -> Reasoner:
    """settings: of the weights that speak, where they are here."""
    from .dialogue.pack import fitted
    from .reasoners.reasoner import PackReasoner

    released, pack = POLICIES[spec.policy].released, choice.pack
    if settings is not None:
        pack = fitted(pack, reply_tokens=settings.reply_tokens, scores=settings.scores)
    return PackReasoner(pack, speaker, paired=released, released=released, seed=spec.seed)


def _distant_speaker(kind: str, value: str) -> Speaker:
    if kind == "remote":
        from .reasoners.remote import RemoteSpeaker

        return RemoteSpeaker(value)
    from .reasoners.scripted import ScriptedSpeaker

    return ScriptedSpeaker.from_file(value)


def _load_speaking(spec: SystemSpec, path: str, counts: Counts, loras: Loras) -> tuple[QwenVL, Mover, list[str]]:
    """Another MLLM than the checkpoint's own, its mover, and notes on its LoRAs."""
    from .mllm.load import load_mllm

    dtype, device, home = _placement(spec)
    mllm = load_mllm(Path(path), dtype=dtype, device=home, tokenizer_path=spec.tokenizer, counts=counts)
    _note_moves(spec, mllm)
    notes = apply_loras(loras, mllm)
    return mllm, _mover(spec, device, mllm=mllm.model), notes


def _qwen_speaker(mllm: QwenVL, settings: Settings, mover: Mover) -> Speaker:
    from .offload import MovedSpeaker
    from .reasoners.qwen import QwenSpeaker

    low, high = settings.reasoner_pixels
    return MovedSpeaker(QwenSpeaker(mllm, min_pixels=low, max_pixels=high, max_side=settings.reasoner_max_side), mover)


def _load_mllm(spec: SystemSpec, parts: Parts, dtype: torch.dtype, device: torch.device, counts: Counts) -> QwenVL:
    from .mllm.load import load_mllm

    mllm = load_mllm(
        parts.mllm,
        dtype=dtype,
        device=device,
        need_lm_head=spec.reasoner == "qwen" or (spec.reasoner == "own" and can_speak(parts.mllm)),
        tokenizer_path=parts.tokenizer,
        counts=counts,
    )
    _note_moves(spec, mllm)
    return mllm


def _note_moves(spec: SystemSpec, mllm: QwenVL) -> None:
    if spec.offload != "none" or spec.make_mover is not None:
        mllm.stepping().declined = "the weights are moved between calls"


def _find_pack(spec: SystemSpec, root: Path | None, variant: str | None, settings: Settings | None = None) -> PackChoice:
    from .dialogue.prompts import find_pack

    if settings is not None and settings.dialogue == "own":  # they know our wording, and no other that lies about
        return find_pack(explicit=spec.dialogue, weights=root)
    return find_pack(explicit=spec.dialogue, weights=root, models_dir=spec.models_dir, variant=variant)


def _placement(spec: SystemSpec) -> tuple[torch.dtype, torch.device, torch.device]:
    """(dtype, device of the computation, device the weights are loaded to)."""
    device = choose_device(spec.device)
    stays = spec.offload == "none" and spec.make_mover is None
    return DTYPES[choose_dtype(spec.dtype, device)], device, device if stays else torch.device("cpu")


def _check_attention(spec: SystemSpec, device: torch.device, dtype: torch.dtype, head_dims: set[int] | None = None) -> None:
    """Raise where the named backend cannot compute the DiT's attention."""
    # Here and not above: it brings torch's compiler in, which makes its scratch folder as soon as it is imported.
    from .kernels import chosen

    chosen.check(spec.attention, device, dtype, *(() if head_dims is None else (head_dims,)))


def _head_dims(config: Mapping[str, Any]) -> set[int]:
    """Of all attention in a DiT: its blocks, and the connector where it has one."""
    connector = {config["connector_hidden_size"] // config["connector_heads_num"]} if "connector_heads_num" in config else set()
    return {config["attention_head_dim"], *connector}


def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 beside a float16 DiT, as `force_upcast` in the released VAE config asks: its activations overflow there."""
    return torch.float32 if dtype == torch.float16 else dtype


def _mover(spec: SystemSpec, device: torch.device, **modules: torch.nn.Module) -> Mover:
    from .kernels import hasten
    from .offload import make_mover

    mover = spec.make_mover(modules, device) if spec.make_mover else make_mover(spec.offload, modules, device)
    if device.type == "cpu":  # behind the host's patcher, which may have given the Linears a class of its own
        hasten(*modules.values())
    return mover
