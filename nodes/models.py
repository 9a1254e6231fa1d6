"""The loaders: an editor (DiT, VAE and the MLLM that conditions it), a reasoner and their LoRAs, from ComfyUI's folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reasonedit_core.errors import ConfigError
from . import folders, host
from .folders import AUTO, FROM_CHECKPOINT, NO_LORA, REMOTE, SCRIPTED, locate, locate_dialogue, short_name, tokenizer_for
from .host import EditorSocket, FileList, LorasSocket, ReasonerSocket, io
from .sockets import EditorHandle, Lora, ReasonerHandle, Script

DTYPES = (AUTO, "bfloat16", "float16", "float32")
WEIGHTS = (AUTO, "full", "fp8")
ATTENTION = (AUTO, "interval", "sdpa", "flash", "sage", "kitchen", "reference")
VARIANTS = (AUTO, "v1.2", "v1.1", "v1.0")


# ---- loading -------------------------------------------------------------------------------------------------------------


def load_editor(
    checkpoint: str,
    text_encoder: str,
    vae: str,
    *,
    dialogue: str,
    dtype: str,
    weights_dtype: str,
    variant: str,
    loras: Sequence[Lora] = (),
    attention: str = AUTO,
    batched_cfg: bool = False,
) -> tuple[EditorHandle, ReasonerHandle | None]:
    """The editor, and the reasoner that its own MLLM is; None where that has no lm_head.

    loras: each goes to the transformer, the MLLM or both, as its keys say. attention: what computes that of the transformer;
    auto takes ComfyUI's own on full steps. batched_cfg: both passes of guidance as one.
    """
    from dataclasses import replace

    from ..reasonedit_core.load import SystemSpec, load_system
    from ..reasonedit_core.parts import assemble_parts

    lacking = [name for name, value in (("text_encoder", text_encoder), ("vae", vae)) if value == FROM_CHECKPOINT]
    if checkpoint.startswith("diffusion_models/") and lacking:
        raise ConfigError(f"{checkpoint} is a single transformer file: choose its {' and its '.join(lacking)} as well.")
    chosen = [None if name == FROM_CHECKPOINT else locate(name) for name in (text_encoder, vae)]
    parts = assemble_parts(locate(checkpoint), text_encoder=chosen[0], vae=chosen[1])
    if parts.tokenizer is None:
        parts = replace(parts, tokenizer=tokenizer_for(parts.mllm))
    system = load_system(
        SystemSpec(
            parts.layout.system,
            parts.root,
            reasoner="own",
            variant=variant,
            weights_dtype=weights_dtype,
            parts=parts,
            attention=attention,
            host=host.attention() if attention == AUTO else None,
            batched_cfg=batched_cfg,
            **_common(dialogue, dtype, loras),
        )
    )
    name = short_name(checkpoint)
    system.mover.on_unload("mllm", system.mllm.release)
    editor = EditorHandle(
        name,
        system.name,
        system.generator,
        system.defaults,
        system.mllm,
        system.mover,
        host.compute_device(),
        system.notes,
        system.settings.pictures,
        system.settings.latents,
    )
    if system.reasoner is None:
        return editor, None
    return editor, ReasonerHandle(
        name, system.reasoner.pack, system.reasoner.speaker, system.mllm, system.mover, system.pack_origin, system.notes
    )


def load_reasoner(
    source: str, *, url: str, model: str, replies: str, dialogue: str, dtype: str, loras: Sequence[Lora] = ()
) -> ReasonerHandle:
    """A reasoner of its own: a Qwen2.5-VL, with its LoRAs, an endpoint, or recorded replies."""
    from ..reasonedit_core.dialogue.prompts import find_pack

    if source in (REMOTE, SCRIPTED):
        if loras:
            raise ConfigError(
                f"loras: expected none with '{source}', whose weights are not here; found {len(loras)}. Unwire it."
            )
        choice = find_pack(explicit=locate_dialogue(dialogue), models_dir=host.models_dir())
        origin = {"origin": choice.origin, "name": choice.pack.name, "version": choice.pack.version}
        if source == SCRIPTED:
            return ReasonerHandle("scripted replies", choice.pack, read_script(replies), origin=origin)
        from ..reasonedit_core.reasoners.remote import RemoteSpeaker

        if not url.strip():
            raise ConfigError("url: expected an address such as http://localhost:8000/v1, found none. Write it.")
        return ReasonerHandle(url, choice.pack, RemoteSpeaker(url, model=model.strip() or None), origin=origin)
    from ..reasonedit_core.load import SystemSpec
    from ..reasonedit_core.load import load_reasoner as load

    path = locate(source)
    spec = SystemSpec("", path, reasoner=f"qwen:{path}", tokenizer=tokenizer_for(path), **_common(dialogue, dtype, loras))
    loaded = load(spec)
    loaded.mover.on_unload("mllm", loaded.mllm.release)
    name = short_name(source)
    reasoner = loaded.reasoner
    return ReasonerHandle(name, reasoner.pack, reasoner.speaker, loaded.mllm, loaded.mover, loaded.pack_origin, loaded.notes)


def read_script(text: str) -> Script:
    """Recorded replies from JSON text, checked by the core's own speaker."""
    from ..reasonedit_core.reasoners.scripted import ScriptedSpeaker

    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"replies: expected JSON, found a fault: {error}. Correct it.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"replies: expected an object with lists of replies, found {type(value).__name__}. Correct it.")
    ScriptedSpeaker(value, name="replies")
    return Script({task: tuple(texts) for task, texts in value.items()})


def _common(dialogue: str, dtype: str, loras: Sequence[Lora]) -> dict[str, Any]:
    from .memory import ComfyMover

    return {
        "dialogue": locate_dialogue(dialogue),
        "dtype": host.choose_dtype(dtype),
        "device": host.compute_device(),
        "models_dir": host.models_dir(),
        "make_mover": ComfyMover,
        "loras": tuple((lora.path, lora.strength) for lora in loras),
    }


# ---- nodes ---------------------------------------------------------------------------------------------------------------


def _dialogue_input() -> FileList:
    return FileList(
        "dialogue",
        folders.dialogue_names(),
        default=AUTO,
        tooltip="The wording of the questions to the MLLM. auto takes dialogue.toml in the checkpoint's folder, else the first "
        "file of models/reasonedit/dialogue, else our own. Released v1p2 weights do best with their imported pack.",
    )


def _dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        list(DTYPES),
        default=AUTO,
        tooltip="The type to compute in. auto takes what ComfyUI would take on this device.",
    )


def _loras_input(tooltip: str) -> Any:
    return LorasSocket.Input("loras", optional=True, tooltip=tooltip)


class LoRA(io.ComfyNode):
    """A LoRA for the loaders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_LoRA",
            display_name="LoRA (ReasonEdit)",
            category=host.ROOT,
            description="A LoRA for Load Editor or Load Reasoner. Several are chained; they are applied in that order. A file "
            "may hold a LoRA of the transformer, of the MLLM, or of both: its keys say where it goes.",
            inputs=[
                FileList(
                    "lora",
                    folders.lora_names() or [NO_LORA],
                    tooltip="A file of models/loras: LoRA or DoRA, in any of the usual key styles. Of a PEFT folder choose "
                    "adapter_model.safetensors.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="1 is as trained, 0 is without. A change loads the model again.",
                ),
                _loras_input("The LoRAs before this one."),
            ],
            outputs=[
                LorasSocket.Output("stack", display_name="loras", tooltip="For Load Editor, Load Reasoner or another LoRA.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora, **_kwargs) -> str:
        """Path, size and time of the file, and of what lies beside it in a PEFT folder."""
        if lora == NO_LORA:
            return ""
        path = locate(lora)
        return folders.fingerprint([path.parent if path.name == "adapter_model.safetensors" else path])

    @classmethod
    def execute(cls, lora, strength, loras=None) -> io.NodeOutput:
        """One more LoRA on the stack."""
        if lora == NO_LORA:
            raise ConfigError("lora: expected a file, found none. Put one into models/loras and press R to refresh.")
        return io.NodeOutput((*(loras or ()), Lora(locate(lora), strength)))


class LoadEditor(io.ComfyNode):
    """Load a ReasonEdit editor, and its own reasoner."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_LoadEditor",
            display_name="Load Editor (ReasonEdit)",
            category=host.ROOT,
            description="Loads Step1X-Edit (ReasonEdit-S) or Qwen-Image-Edit (ReasonEdit-Q): a checkpoint folder, or a single "
            "transformer file together with a text encoder and a VAE. Its MLLM is loaded once and serves both outputs.",
            inputs=[
                FileList(
                    "checkpoint",
                    folders.editor_names(),
                    tooltip="A folder below models/reasonedit or models/diffusers, or a single file of "
                    "models/diffusion_models. mini-s and mini-q come with the pack and edit drawn miniature scenes only.",
                ),
                FileList(
                    "text_encoder",
                    [FROM_CHECKPOINT, *folders.text_encoder_names()],
                    default=FROM_CHECKPOINT,
                    tooltip="The Qwen2.5-VL that reads picture and instruction. A single transformer file needs one; for a "
                    "folder it replaces the folder's own. Only one with lm_head can also reason.",
                ),
                FileList(
                    "vae",
                    [FROM_CHECKPOINT, *folders.vae_names()],
                    default=FROM_CHECKPOINT,
                    tooltip="The FLUX VAE for Step1X-Edit, the Qwen-Image VAE for Qwen-Image-Edit. A single transformer file "
                    "needs one.",
                ),
                _dialogue_input(),
                _dtype_input(),
                io.Combo.Input(
                    "weights_dtype",
                    list(WEIGHTS),
                    default=AUTO,
                    tooltip="How the transformer's weights are kept. auto keeps a file's fp8, fp8 makes it so, full brings all "
                    "to dtype.",
                ),
                io.Combo.Input(
                    "variant",
                    list(VARIANTS),
                    default=AUTO,
                    tooltip="Which Step1X-Edit a single file is, where its keys do not tell (v1.1 or v1.2). Folders say it.",
                ),
                _loras_input(
                    "LoRAs from the LoRA node: of the transformer, the MLLM, or both. One of the MLLM acts on editing and on "
                    "the output reasoner alike; for the reasoner alone wire it to Load Reasoner."
                ),
                io.Combo.Input(
                    "attention",
                    list(ATTENTION),
                    default=AUTO,
                    optional=True,
                    tooltip="What computes the attention of the transformer. auto takes ComfyUI's own, as its flags choose it, "
                    "and the best that can run where that cannot, as on a CPU; interval (our own kernels, CUDA), sdpa "
                    "(PyTorch), flash (flash-attn), sage (SageAttention) and kitchen (comfy-kitchen) where installed, and "
                    "reference (slow) are taken as named. A change loads the model again.",
                ),
                io.Boolean.Input(
                    "batched_cfg",
                    default=False,
                    optional=True,
                    tooltip="Both passes of guidance as one forward of two samples: the same picture to rounding, for more "
                    "memory. A change loads the model again.",
                ),
            ],
            outputs=[
                EditorSocket.Output("editor", display_name="editor", tooltip="For Edit and Auto Loop."),
                ReasonerSocket.Output(
                    "reasoner",
                    display_name="reasoner",
                    tooltip="The checkpoint's own MLLM as reasoner, for Think, Reflect and Auto Loop. Of no use where its text "
                    "encoder has no lm_head: take Load Reasoner then.",
                ),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint, text_encoder, vae, dialogue, **_kwargs) -> str:
        """Path, size and time of the files: the models are loaded again only when those change."""
        named = [name for name in (checkpoint, text_encoder, vae) if name != FROM_CHECKPOINT]
        pack = locate_dialogue(dialogue)
        return folders.fingerprint([*map(locate, named), *([pack] if isinstance(pack, Path) else [])])

    @classmethod
    def execute(
        cls,
        checkpoint,
        text_encoder,
        vae,
        dialogue,
        dtype,
        weights_dtype,
        variant,
        loras=None,
        attention=AUTO,
        batched_cfg=False,
    ) -> io.NodeOutput:
        """Load."""
        how = {"dialogue": dialogue, "dtype": dtype, "weights_dtype": weights_dtype, "variant": variant, "attention": attention}
        editor, reasoner = load_editor(checkpoint, text_encoder, vae, **how, loras=loras or (), batched_cfg=batched_cfg)
        if editor.notes:
            host.Watch(cls.hidden).show("\n".join(editor.notes))
        return io.NodeOutput(editor, reasoner)


class LoadReasoner(io.ComfyNode):
    """Load a reasoner of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_LoadReasoner",
            display_name="Load Reasoner (ReasonEdit)",
            category=host.ROOT,
            description="A reasoner other than the editor's own MLLM: another Qwen2.5-VL, any OpenAI-compatible endpoint "
            "(vLLM, SGLang, Ollama, LM Studio), or recorded replies.",
            inputs=[
                FileList(
                    "source",
                    folders.reasoner_names(),
                    tooltip="A Qwen2.5-VL folder (models/reasonedit, models/LLM) or file (models/text_encoders) with lm_head, "
                    f"or '{REMOTE}', or '{SCRIPTED}'. mini-s and mini-q come with the pack and know drawn miniature scenes "
                    "only.",
                ),
                io.String.Input(
                    "url",
                    default="http://localhost:8000/v1",
                    tooltip=f"With '{REMOTE}': its address. The key is read from the environment variable REASONEDIT_API_KEY "
                    "and never stored in a workflow.",
                ),
                io.String.Input(
                    "model", default="", tooltip=f"With '{REMOTE}': the model's name there. Empty takes the first it lists."
                ),
                io.String.Input(
                    "replies",
                    default="",
                    multiline=True,
                    tooltip=f"With '{SCRIPTED}': JSON with lists of raw replies under think, describe, score, edit_score, "
                    "quality_score, reflect; one per round.",
                ),
                _dialogue_input(),
                _dtype_input(),
                _loras_input("LoRAs of the MLLM, from the LoRA node. None with an endpoint or recorded replies."),
            ],
            outputs=[ReasonerSocket.Output("reasoner", display_name="reasoner", tooltip="For Think, Reflect and Auto Loop.")],
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, url, replies) -> bool | str:
        """Texts that no source could use, before the run."""
        if isinstance(url, str) and url.strip() and not url.strip().startswith(("http://", "https://")):
            return f"url: expected an address such as http://localhost:8000/v1, found {url!r}. Correct it."
        if isinstance(replies, str) and replies.strip():
            try:
                read_script(replies)
            except ConfigError as error:
                return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, source, dialogue, **_kwargs) -> str:
        """Path, size and time of the files."""
        pack = locate_dialogue(dialogue)
        paths = [] if source in (REMOTE, SCRIPTED) else [locate(source)]
        return folders.fingerprint([*paths, *([pack] if isinstance(pack, Path) else [])])

    @classmethod
    def execute(cls, source, url, model, replies, dialogue, dtype, loras=None) -> io.NodeOutput:
        """Load."""
        how = {"url": url, "model": model, "replies": replies, "dialogue": dialogue, "dtype": dtype}
        reasoner = load_reasoner(source, **how, loras=loras or ())
        if reasoner.notes:
            host.Watch(cls.hidden).show("\n".join(reasoner.notes))
        return io.NodeOutput(reasoner)
