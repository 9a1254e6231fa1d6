"""Everything the pack takes from ComfyUI goes through this module: a change of its API is an edit of this file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy
import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_api.latest import ComfyExtension, io, ui
from PIL import Image

from ..reasonedit_core.errors import Interrupted
from . import brain_values, expand, sockets, streaming

if TYPE_CHECKING:
    from ..reasonedit_core.kernels.dispatch import Run

__all__ = ["ROOT", "ComfyExtension", "io", "ui"]

log = logging.getLogger(__name__)

ROOT = "ReasonEdit"
"""The category of every node."""

BRAIN_ROOT = f"{ROOT}/ReasonBrain"
"""That of the nodes of ReasonBrain."""

ReasonerSocket = io.Custom(sockets.REASONER)
EditorSocket = io.Custom(sockets.EDITOR)
EditedSocket = io.Custom(sockets.EDITED)
VerdictSocket = io.Custom(sockets.VERDICT)
HistorySocket = io.Custom(sockets.HISTORY)
FlowSocket = io.Custom(sockets.FLOW)
LorasSocket = io.Custom(sockets.LORAS)
BrainSocket = io.Custom(brain_values.BRAIN)
RegionsSocket = io.Custom(brain_values.REGIONS)
GuidanceSocket = io.Custom(brain_values.GUIDANCE)

WHO = [io.Hidden.unique_id, io.Hidden.dynprompt]
"""Hidden inputs of a node that shows what it does while it runs."""

MODELS = "reasonedit"
"""The pack's folder below ComfyUI's models."""

TEXT_EVERY = 0.25
"""Seconds between two updates of streamed text."""


class FileList(io.Combo.Input):
    """A list of files. ComfyUI itself checks what is chosen, and tells of a file that is missing in its own words.

    Engine 0.3.64 checks only lists that stand in the place of the type; engines with dynamic inputs want the type's name
    there, and check by that. What a node's `validate_inputs` names is not checked at all.
    """

    def get_io_type(self) -> Any:
        """The type, or the list in its place."""
        return super().get_io_type() if hasattr(io, "DynamicCombo") else self.options


# ---- devices and memory --------------------------------------------------------------------------------------------------


class ComponentPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher whose layers with cast hooks may stay behind, to be brought over call by call; all others never do.

    ComfyUI's own patcher takes a budget and leaves whatever does not fit where it is, which is right only for layers that
    can cast. Here the rest (norms, embeddings, convolutions, buffers) is put on the device whatever the budget says, and
    the budget is what remains. on_unload: called when the model leaves the device, for what others keep there on its behalf.
    """

    on_unload: Callable[[], None] | None = None

    def _load_list(self, *args, **kwargs):
        """The layers that the manager may load or leave. A row ends with the layer and the names of its parameters."""
        return [row for row in super()._load_list(*args, **kwargs) if streaming.streams(row[-2])]

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        """Load what the budget allows, and what must not stay behind."""
        resident = streaming.resident_bytes(self.model)
        if not full_load:
            lowvram_model_memory = max(lowvram_model_memory - resident, 1)
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load=full_load)
        if not full_load:
            streaming.settle(self.model, device_to)
            self.model.model_loaded_weight_memory += resident

    def detach(self, unpatch_all=True):
        """Leave the device."""
        model = super().detach(unpatch_all)
        if self.on_unload is not None:
            self.on_unload()
        return model


def make_patcher(component: str, holder: torch.nn.Module, device: torch.device) -> ComponentPatcher:
    """The patcher of one component. Its weights are on the CPU and go to `device`; its Linears may be streamed, unless they are
    where they compute."""
    import comfy.ops

    if component != "vae" and not mm.is_device_cpu(device):
        streaming.make_streamable(holder, comfy.ops.disable_weight_init.Linear)
    offload = {"mllm": mm.text_encoder_offload_device, "dit": mm.unet_offload_device, "vae": mm.vae_offload_device}
    return ComponentPatcher(holder, load_device=device, offload_device=offload[component]())


def load(patcher: ComponentPatcher, memory_required: int) -> None:
    """Bring a component to its device, with room for `memory_required` bytes beside it.

    Where it does not fit (or under --lowvram, --novram) a part of its Linears stays behind and is streamed.
    """
    mm.load_models_gpu([patcher], memory_required=memory_required)


def compute_device() -> torch.device:
    """Where ComfyUI wants networks to run."""
    return mm.get_torch_device()


def choose_dtype(name: str) -> str:
    """`auto` -> the type that ComfyUI would compute in on its device."""
    if name != "auto":
        return name
    device = compute_device()
    if mm.is_device_cpu(device):
        return "float32"
    if mm.should_use_bf16(device):
        return "bfloat16"
    return "float16" if mm.should_use_fp16(device) else "float32"


# ---- attention -----------------------------------------------------------------------------------------------------------


def attention() -> Run | None:
    """ComfyUI's attention, for a network on its device; None on the CPU."""
    # There ComfyUI takes its sub-quadratic form, which is slower than torch's own and rounds otherwise: a graph and a script
    # would no longer make the same bits.
    return None if mm.is_device_cpu(compute_device()) else attend


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The attention that ComfyUI runs on now: by its flags (--use-sage-attention and the like), or what another pack put in
    its place. q (B, T, H, D), k, v (B, S, Hk, D), mask bool, broadcastable to (B, H, T, S) -> (B, T, H, D).

    Raises `Refused` where that function might not compute this very call. An `optimized_attention_override` hangs on a MODEL,
    which our networks are not, so there is none to be asked.
    """
    import comfy.ldm.modules.attention as theirs

    from ..reasonedit_core.kernels import Refused

    function = theirs.optimized_attention if mask is None else theirs.optimized_attention_masked
    name, by_torch = getattr(function, "__name__", repr(function)), function is theirs.attention_pytorch
    heads, key_heads = q.shape[2], k.shape[2]
    if key_heads != heads:
        raise Refused(f"ComfyUI's {name} takes as many key heads as query heads, found {key_heads} and {heads}")
    if mask is not None and not by_torch:
        # SageAttention leaves a mask out without a word; the split and sub-quadratic forms and xformers add a bool one to the
        # scores as 0 and 1; the flash form goes over to torch, with a warning for every call.
        raise Refused(f"of ComfyUI's attention only attention_pytorch is known to take a bool mask, found {name}")
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]  # ComfyUI reads the first axis of three as the batch, the core as the heads
    if not by_torch:
        # SageAttention 1 takes the mean off its keys in place, and an edit with a region keeps them for later steps.
        k = k.clone()
    _note(name)
    # Heads side by side, (B, T, H * D): all of ComfyUI's functions take that, some lose their way with the other layouts.
    return function(q.flatten(2), k.flatten(2), v.flatten(2), heads, mask=mask).unflatten(2, (heads, -1))


@lru_cache(maxsize=16)
def _note(name: str) -> None:
    log.info("attention of the transformer: ComfyUI's %s", name)


# ---- folders -------------------------------------------------------------------------------------------------------------


def register_folder() -> None:
    """Make `models/reasonedit` known, so that extra_model_paths.yaml can add places to it."""
    folder_paths.add_model_folder_path(MODELS, str(models_dir() / MODELS))


def models_dir() -> Path:
    """ComfyUI's models folder."""
    return Path(folder_paths.models_dir)


def places(key: str) -> list[Path]:
    """The folders behind a key of ComfyUI's models; `LLM`, which is no key of its own, is the folder of that name."""
    if key in folder_paths.folder_names_and_paths:
        return [Path(place) for place in folder_paths.get_folder_paths(key)]
    return [models_dir() / key]


def files(key: str) -> list[str]:
    """The model files that ComfyUI lists under a key."""
    return folder_paths.get_filename_list(key)


def tokenizer_folder() -> Path:
    """The Qwen2.5 tokenizer that ComfyUI carries."""
    return Path(comfy.__path__[0]) / "text_encoders" / "qwen25_tokenizer"


def input_file(name: str) -> Path:
    """A file of ComfyUI's input folder (or, with ` [output]` behind its name, of the output folder)."""
    return Path(folder_paths.get_annotated_filepath(name))


def input_names(suffix: str) -> list[str]:
    """Names of the files with this suffix in the input folder."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == suffix) if folder.is_dir() else []


def output_file(prefix: str, suffix: str) -> tuple[Path, dict[str, str]]:
    """A new file in ComfyUI's output folder, and how the frontend is told of it."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    file = f"{name}_{counter:05}_{suffix}"
    return Path(folder) / file, {"filename": file, "subfolder": subfolder, "type": "output"}


def keeps_metadata() -> bool:
    """Whether prompt and workflow are written into files (--disable-metadata)."""
    return not args.disable_metadata


# ---- what a running node shows and listens to ----------------------------------------------------------------------------


def should_stop() -> bool:
    """Whether the user cancelled. Polled between steps and between tokens."""
    return mm.processing_interrupted()


@contextmanager
def cancellable(hidden: Any, title: str) -> Iterator[None]:
    """The core's Interrupted leaves as the exception by which ComfyUI knows a cancelled run.

    Other errors keep their type; inside a loop they name the round and the node `title`, as ComfyUI reports them against
    Loop Close. hidden: the node's hidden inputs.
    """
    try:
        yield
    except Interrupted:
        mm.throw_exception_if_processing_interrupted()  # takes the flag back as well
        raise mm.InterruptProcessingException() from None
    except Exception as error:
        expand.name_round(error, str(getattr(hidden, "unique_id", "")), title)
        raise


class Watch:
    """Shows streamed text on a node. hidden: the node's hidden inputs; inside a loop the artist's own node is meant."""

    def __init__(self, hidden: Any) -> None:
        node, graph = getattr(hidden, "unique_id", None), getattr(hidden, "dynprompt", None)
        self.node = graph.get_display_node_id(node) if node is not None and graph is not None else node
        self._last = 0.0

    def on_text(self, task: str, so_far: str) -> None:
        """The core's `on_text`, throttled."""
        if time.monotonic() - self._last >= TEXT_EVERY:
            self.show(f"{task}: {so_far}")

    def show(self, text: str) -> None:
        """Show a text on the node now."""
        from server import PromptServer

        self._last = time.monotonic()
        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node is not None:
            server.send_progress_text(text, self.node)


class StepBar:
    """Progress of several edits as one bar, with previews. The node is known to ComfyUI from the execution context."""

    def __init__(self, total: int) -> None:
        self._bar = comfy.utils.ProgressBar(total)
        self._total = total

    def update(self, done: int, preview: Image.Image | None) -> None:
        """done: steps so far."""
        shown = ("JPEG", preview, args.preview_size) if preview is not None else None
        self._bar.update_absolute(done, self._total, shown)


def previewer(system: str) -> Callable[[torch.Tensor], Image.Image] | None:
    """Latents (1, C, h, w) -> a small picture in true colours, by the factors of the system's latent format.

    None when the user switched previews off.
    """
    if args.preview_method == LatentPreviewMethod.NoPreviews:
        return None
    from latent_preview import Latent2RGBPreviewer

    formats = {"reasonedit-s": comfy.latent_formats.Flux, "reasonedit-q": comfy.latent_formats.Wan21}
    formats |= {"reasonbrain-sd": comfy.latent_formats.SD15, "reasonbrain-flux": comfy.latent_formats.Flux}
    known = formats[system]()
    inner = Latent2RGBPreviewer(known.latent_rgb_factors, known.latent_rgb_factors_bias)

    def show(latents: torch.Tensor) -> Image.Image | None:
        if latents.shape[1] != known.latent_channels:
            return None
        return inner.decode_latent_to_preview(latents.float())

    return show


# ---- ComfyUI's own models ------------------------------------------------------------------------------------------------


def unet_facts(model: Any) -> dict[str, int | None]:
    """Of a MODEL: channels of its input, width of its context, width of its first layer; None where it is no UNet."""
    config = model.model.model_config.unet_config
    return {"channels": config.get("in_channels"), "context": config.get("context_dim"), "width": config.get("model_channels")}


def patch_unet(model: Any, key: str, wrapper: Callable, patch: Callable) -> Any:
    """A copy of a MODEL with a wrapper around each evaluation of conditionings and a patch behind its input blocks."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, key)
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, wrapper)
    if patch not in patched.model_options["transformer_options"].get("patches", {}).get("input_block_patch", ()):
        patched.set_model_input_block_patch(patch)
    return patched


# ---- what the loop asks the host -----------------------------------------------------------------------------------------


def is_output_node(class_type: str) -> bool:
    """Whether nodes of this class are run for their own sake."""
    import nodes

    return bool(getattr(nodes.NODE_CLASS_MAPPINGS[class_type], "OUTPUT_NODE", False))


def caches_nothing() -> bool:
    """Whether the user switched the cache off (--cache-none)."""
    return bool(getattr(args, "cache_none", False))


def expansion_needs_cache() -> bool:
    """Whether --cache-none cannot expand nodes: engines before the repair of Comfy-Org/ComfyUI#10329."""
    from comfy_execution import caching

    return hasattr(caching, "DependencyAwareCache")


# ---- the pack ------------------------------------------------------------------------------------------------------------


class ReasonEditExtension(ComfyExtension):
    """Registers the pack's nodes with ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes of the pack, in the order of their definition."""
        from . import auto_loop, edit, loop, mini_scene, models, reasonbrain, reflect, think, trace

        register_folder()
        modules = (models, think, edit, reflect, loop, auto_loop, trace, mini_scene, reasonbrain)
        return [
            item
            for module in modules
            for item in vars(module).values()
            if isinstance(item, type) and issubclass(item, io.ComfyNode) and item.__module__ == module.__name__
        ]
