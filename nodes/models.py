"""The loaders: an editor (DiT, VAE and the MLLM that conditions it) and a reasoner, from ComfyUI's model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..reasonedit_core.errors import ConfigError
from . import folders, host
from .folders import AUTO, FROM_CHECKPOINT, NOTHING, REMOTE, SCRIPTED, locate, locate_dialogue, tokenizer_for
from .host import EditorSocket, ReasonerSocket, io
from .sockets import EditorHandle, ReasonerHandle, Script

DTYPES = (AUTO, "bfloat16", "float16", "float32")
WEIGHTS = (AUTO, "full", "fp8")
VARIANTS = (AUTO, "v1.2", "v1.1", "v1.0")

WHERE = (
    "Put a Step1X-Edit or Qwen-Image-Edit folder into models/reasonedit, or a single file into models/diffusion_models, and "
    "press R to refresh"
)


# ---- loading -------------------------------------------------------------------------------------------------------------


def load_editor(
    checkpoint: str, text_encoder: str, vae: str, *, dialogue: str, dtype: str, weights_dtype: str, variant: str
) -> tuple[EditorHandle, ReasonerHandle | None]:
    """The editor, and the reasoner that its own MLLM is; None where that has no lm_head."""
    from dataclasses import replace

    from ..reasonedit_core.load import SystemSpec, load_system
    from ..reasonedit_core.parts import assemble_parts

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
            **_common(dialogue, dtype),
        )
    )
    name = checkpoint.partition("/")[2]
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
    )
    if system.reasoner is None:
        return editor, None
    return editor, ReasonerHandle(
        name, system.reasoner.pack, system.reasoner.speaker, system.mllm, system.mover, system.pack_origin, system.notes
    )


def load_reasoner(source: str, *, url: str, model: str, replies: str, dialogue: str, dtype: str) -> ReasonerHandle:
    """A reasoner of its own: a Qwen2.5-VL, an endpoint, or recorded replies."""
    from ..reasonedit_core.dialogue.prompts import find_pack

    if source in (REMOTE, SCRIPTED):
        choice = find_pack(explicit=locate_dialogue(dialogue), models_dir=host.models_dir())
        origin = {"origin": choice.origin, "name": choice.pack.name, "version": choice.pack.version}
        if source == SCRIPTED:
            return ReasonerHandle("scripted replies", choice.pack, read_script(replies), origin=origin)
        from ..reasonedit_core.reasoners.remote import RemoteSpeaker

        return ReasonerHandle(url, choice.pack, RemoteSpeaker(url, model=model.strip() or None), origin=origin)
    from ..reasonedit_core.load import SystemSpec
    from ..reasonedit_core.load import load_reasoner as load

    path = locate(source)
    spec = SystemSpec("", path, reasoner=f"qwen:{path}", tokenizer=tokenizer_for(path), **_common(dialogue, dtype))
    loaded = load(spec)
    loaded.mover.on_unload("mllm", loaded.mllm.release)
    name = source.partition("/")[2]
    return ReasonerHandle(name, loaded.reasoner.pack, loaded.reasoner.speaker, loaded.mllm, loaded.mover, loaded.pack_origin)


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


def _common(dialogue: str, dtype: str) -> dict[str, Any]:
    from .memory import ComfyMover

    return {
        "dialogue": locate_dialogue(dialogue),
        "dtype": host.choose_dtype(dtype),
        "device": host.compute_device(),
        "models_dir": host.models_dir(),
        "make_mover": ComfyMover,
    }


# ---- nodes ---------------------------------------------------------------------------------------------------------------


def _dialogue_input() -> io.Combo.Input:
    return io.Combo.Input(
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
                io.Combo.Input(
                    "checkpoint",
                    folders.editor_names() or [NOTHING],
                    tooltip="A folder below models/reasonedit or models/diffusers, or a single file of "
                    "models/diffusion_models.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    [FROM_CHECKPOINT, *folders.text_encoder_names()],
                    default=FROM_CHECKPOINT,
                    tooltip="The Qwen2.5-VL that reads picture and instruction. A single transformer file needs one; for a "
                    "folder it replaces the folder's own. Only one with lm_head can also reason.",
                ),
                io.Combo.Input(
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
    def validate_inputs(cls, checkpoint, text_encoder, vae) -> bool | str:
        """Names that are gone, and single files without their companions, before the run."""
        named = {"text_encoder": text_encoder, "vae": vae}
        if checkpoint == NOTHING:
            return f"checkpoint: no checkpoint was found. {WHERE}."
        faults = [
            folders.not_listed("checkpoint", checkpoint, folders.editor_names(), WHERE),
            folders.not_listed(
                "text_encoder",
                text_encoder,
                [FROM_CHECKPOINT, *folders.text_encoder_names()],
                "Put it into models/text_encoders",
            ),
            folders.not_listed("vae", vae, [FROM_CHECKPOINT, *folders.vae_names()], "Put it into models/vae"),
        ]
        if str(checkpoint).startswith("diffusion_models/"):
            lacking = [name for name, value in named.items() if value == FROM_CHECKPOINT]
            if lacking:
                faults.append(f"{checkpoint} is a single transformer file: choose its {' and its '.join(lacking)} as well.")
        return next((fault for fault in faults if fault), True)

    @classmethod
    def fingerprint_inputs(cls, checkpoint, text_encoder, vae, dialogue, **_kwargs) -> str:
        """Path, size and time of the files: the models are loaded again only when those change."""
        named = [name for name in (checkpoint, text_encoder, vae) if name not in (FROM_CHECKPOINT, NOTHING)]
        pack = locate_dialogue(dialogue)
        return folders.fingerprint([*map(locate, named), *([pack] if isinstance(pack, Path) else [])])

    @classmethod
    def execute(cls, checkpoint, text_encoder, vae, dialogue, dtype, weights_dtype, variant) -> io.NodeOutput:
        """Load."""
        editor, reasoner = load_editor(
            checkpoint, text_encoder, vae, dialogue=dialogue, dtype=dtype, weights_dtype=weights_dtype, variant=variant
        )
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
                io.Combo.Input(
                    "source",
                    folders.reasoner_names(),
                    tooltip="A Qwen2.5-VL folder (models/reasonedit, models/LLM) or file (models/text_encoders) with lm_head, "
                    f"or '{REMOTE}', or '{SCRIPTED}'.",
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
            ],
            outputs=[ReasonerSocket.Output("reasoner", display_name="reasoner", tooltip="For Think, Reflect and Auto Loop.")],
        )

    @classmethod
    def validate_inputs(cls, source, url, replies) -> bool | str:
        """What the chosen source needs, before the run."""
        if source == REMOTE and isinstance(url, str) and not url.strip().startswith(("http://", "https://")):
            return f"url: expected an address such as http://localhost:8000/v1, found {url!r}. Correct it."
        if source == SCRIPTED and isinstance(replies, str):
            try:
                read_script(replies)
            except ConfigError as error:
                return str(error)
        return (
            folders.not_listed(
                "source", source, folders.reasoner_names(), "Put a Qwen2.5-VL folder into models/reasonedit or models/LLM"
            )
            or True
        )

    @classmethod
    def fingerprint_inputs(cls, source, dialogue, **_kwargs) -> str:
        """Path, size and time of the files."""
        pack = locate_dialogue(dialogue)
        paths = [] if source in (REMOTE, SCRIPTED) else [locate(source)]
        return folders.fingerprint([*paths, *([pack] if isinstance(pack, Path) else [])])

    @classmethod
    def execute(cls, source, url, model, replies, dialogue, dtype) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(load_reasoner(source, url=url, model=model, replies=replies, dialogue=dialogue, dtype=dtype))
