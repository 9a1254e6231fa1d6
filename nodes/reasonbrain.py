"""ReasonBrain: load it, see and correct its cues, reason, and edit with it or with ComfyUI's own SD 1.5."""

from __future__ import annotations

from typing import Any

import torch

from ..reasonedit_core.errors import ConfigError
from . import brain_patch, folders, host
from .brain_values import (
    BrainHandle,
    as_comfy,
    check_model,
    edit_pictures,
    find_objects,
    find_regions,
    read_objects,
    reason,
    say_objects,
    show_regions,
)
from .folders import AUTO, FROM_CHECKPOINT
from .host import BrainSocket, EditedSocket, FileList, GuidanceSocket, ReasonerSocket, RegionsSocket, io
from .models import DTYPES
from .sockets import Script, to_picture
from .widgets import generation_inputs, no_text, previous_input, seed_input

METHODS = ("auto", "reasoner", "rules", "whole instruction")
PLAIN = ("grid", "none")
CHANGE = "what to change"


def load_brain(checkpoint: str, segmenter: str, dtype: str) -> BrainHandle:
    """A ReasonBrain folder. segmenter: from checkpoint, grid, none, or an entry of `folders.sam_names`."""
    from ..reasonedit_core.load import SystemSpec, load_system
    from .memory import ComfyMover

    chosen = {} if segmenter == FROM_CHECKPOINT else {"segmenter": segmenter}
    if segmenter not in (FROM_CHECKPOINT, *PLAIN):
        chosen = {"segmenter": f"{folders.sam_kind(segmenter)}:{folders.locate(segmenter)}"}
    device = host.compute_device()
    system = load_system(
        SystemSpec(
            "reasonbrain",
            folders.locate(checkpoint),
            reasoner="none",
            dtype=host.choose_dtype(dtype),
            device=device,
            brain=chosen,
            make_mover=ComfyMover,
        )
    )
    made = (system.generator, system.defaults, system.mover, device, system.notes, system.settings.latents)
    return BrainHandle(folders.short_name(checkpoint), system.generator.sampler.kind, *made)


class StepWatch:
    """Progress of several edits as one bar, with pictures of the latents as they are."""

    def __init__(self, brain: BrainHandle, total: int) -> None:
        self._brain, self._bar, self._done = brain, host.StepBar(total), 0
        self._show = host.previewer(f"reasonbrain-{brain.kind}") if brain.latents == "released" else None
        self._grid = (0, 0)

    def begin(self, grid: tuple[int, int]) -> None:
        """Say which edit comes next, by (height, width) of its latent tokens."""
        self._grid = grid

    def __call__(self, step: int, _steps: int, latents: torch.Tensor) -> None:
        """After one step. latents (1, N, C)."""
        self._done += 1
        unpack = self._brain.generator.codec.unpack
        self._bar.update(self._done, self._show(unpack(latents, *self._grid)) if self._show is not None else None)


class Load(io.ComfyNode):
    """Load a ReasonBrain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonBrain_Load",
            display_name="Load ReasonBrain",
            category=host.BRAIN_ROOT,
            description="Loads a ReasonBrain: what training wrote (brain.safetensors, lora), with the LLaVA, the "
            "diffusion model and the segmenter that lie beside it or where its reasonbrain.json says.",
            inputs=[
                FileList(
                    "checkpoint",
                    folders.brain_names(),
                    tooltip="A folder below models/reasonedit that holds brain.safetensors.",
                ),
                FileList(
                    "segmenter",
                    [FROM_CHECKPOINT, *PLAIN, *folders.sam_names()],
                    default=FROM_CHECKPOINT,
                    tooltip="Who finds regions: the checkpoint's own, grid (fixed boxes, no network), none (only "
                    "masks that you draw), or a SAM folder below models/reasonedit, models/sams or models/sam2.",
                ),
                io.Combo.Input(
                    "dtype",
                    list(DTYPES),
                    default=AUTO,
                    tooltip="What to compute in. auto: what ComfyUI would take on this device.",
                ),
            ],
            outputs=[BrainSocket.Output("brain", display_name="brain", tooltip="For the other ReasonBrain nodes.")],
            hidden=host.WHO,
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint, segmenter, **_kwargs) -> str:
        """Path, size and time of the files: the models are loaded again only when those change."""
        named = [checkpoint] if segmenter in (FROM_CHECKPOINT, *PLAIN) else [checkpoint, segmenter]
        return folders.fingerprint([folders.locate(name) for name in named])

    @classmethod
    def execute(cls, checkpoint, segmenter, dtype) -> io.NodeOutput:
        """Load."""
        brain = load_brain(checkpoint, segmenter, dtype)
        if brain.notes:
            host.Watch(cls.hidden).show("\n".join(brain.notes))
        return io.NodeOutput(brain)


class Objects(io.ComfyNode):
    """Name the objects of an instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonBrain_Objects",
            display_name="Objects (ReasonBrain)",
            category=host.BRAIN_ROOT,
            description="Names what an instruction is about: the objects whose names ReasonBrain looks up in the "
            "picture. The list is shown on the node; write your own into names to correct it.",
            inputs=[
                io.String.Input("instruction", multiline=True, default="", tooltip="What to change, in your own words."),
                io.Combo.Input(
                    "method",
                    list(METHODS),
                    default="auto",
                    tooltip="auto: the reasoner where one is wired, then rules. reasoner: asks it. rules: words of the "
                    "instruction, no model. whole instruction: it is the one object.",
                ),
                io.String.Input(
                    "names",
                    multiline=True,
                    default="",
                    tooltip="Your own list, with commas or line breaks between the names. Not empty: it replaces "
                    "what is found.",
                ),
                ReasonerSocket.Input("reasoner", optional=True, tooltip="An MLLM to ask, from Load Editor or Load Reasoner."),
                io.Image.Input("image", optional=True, tooltip="The picture, for the reasoner to look at. One picture."),
            ],
            outputs=[
                io.String.Output(
                    "objects", display_name="objects", tooltip="The names with commas between them, for Reason or Edit."
                )
            ],
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, instruction) -> bool | str:
        """An empty text, before the run."""
        return no_text("instruction", instruction, CHANGE, "Write it, or wire a text to it.")

    @classmethod
    def execute(cls, instruction, method, names, reasoner=None, image=None) -> io.NodeOutput:
        """Find them."""
        found = read_objects(names)
        if not found:
            speaker = None if reasoner is None else reasoner.speaker
            if isinstance(speaker, Script):  # recorded replies: from the first on
                speaker = speaker.speaker(0, 0)
            if method == "reasoner" and speaker is None:
                raise ConfigError("reasoner: expected one to ask, found none. Wire a Load Reasoner node, or choose rules.")
            picture = None if image is None else to_picture(image)
            chosen = {"reasoner": "mllm", "whole instruction": "whole"}.get(method, method)
            if reasoner is not None and chosen in ("auto", "mllm"):
                reasoner.expect()
            with host.cancellable(cls.hidden, "Objects"):
                found = find_objects(instruction, chosen, picture, speaker)
        text = say_objects(found)
        host.Watch(cls.hidden).show(text)
        return io.NodeOutput(text)


class Regions(io.ComfyNode):
    """Find regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonBrain_Regions",
            display_name="Regions (ReasonBrain)",
            category=host.BRAIN_ROOT,
            description="Finds the regions of a picture as ReasonBrain sees them, or makes them of masks that you "
            "draw. The masks come out as well, to be looked at with Convert Mask to Image and Preview Image.",
            inputs=[
                BrainSocket.Input("brain", tooltip="From Load ReasonBrain."),
                io.Image.Input("image", tooltip="The picture to edit."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Your own regions, one mask each; they replace the segmenter's. What none covers is the "
                    "background.",
                ),
            ],
            outputs=[
                RegionsSocket.Output("regions", display_name="regions", tooltip="For Reason or Edit."),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="Each region as a mask, on the vision tower's grid; background first.",
                ),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def execute(cls, brain, image, mask=None) -> io.NodeOutput:
        """Find them."""
        with host.cancellable(cls.hidden, "Regions"):
            found = find_regions(brain, image, mask)
        host.Watch(cls.hidden).show(f"{sum(len(made.masks) for made in found)} regions")
        return io.NodeOutput(found, show_regions(found, image))


def _cue_inputs() -> list[Any]:
    """What both Reason and Edit take in place of what they would find themselves."""
    return [
        io.String.Input(
            "objects",
            multiline=True,
            default="",
            tooltip="What the instruction is about, with commas between the names, such as from Objects. Empty: "
            "found by rules.",
        ),
        RegionsSocket.Input("regions", optional=True, tooltip="From Regions. Not wired: the model's own segmenter finds them."),
    ]


class Reason(io.ComfyNode):
    """Reason about an instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonBrain_Reason",
            display_name="Reason (ReasonBrain)",
            category=host.BRAIN_ROOT,
            description="Looks at the picture, its regions and the named objects, and reasons about the instruction "
            "in its LLaVA: what steers the diffusion model. LLaVA may leave the device afterwards; the result is "
            "about a megabyte.",
            inputs=[
                BrainSocket.Input("brain", tooltip="From Load ReasonBrain."),
                io.Image.Input("image", tooltip="The picture to edit. One picture."),
                io.String.Input(
                    "instruction", multiline=True, default="", tooltip="What to change, a supposition or a plain wish."
                ),
                *_cue_inputs(),
            ],
            outputs=[
                GuidanceSocket.Output("guidance", display_name="guidance", tooltip="For Apply."),
                io.String.Output("names", display_name="objects", tooltip="The names of objects that it went by."),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, instruction) -> bool | str:
        """An empty text, before the run."""
        return no_text("instruction", instruction, CHANGE, "Write it, or wire a text to it.")

    @classmethod
    def execute(cls, brain, image, instruction, objects, regions=None) -> io.NodeOutput:
        """Reason."""
        with host.cancellable(cls.hidden, "Reason"):
            guidance = reason(brain, image, instruction, objects, regions)
        text = say_objects(guidance.objects)
        host.Watch(cls.hidden).show(text)
        return io.NodeOutput(guidance, text)


class Apply(io.ComfyNode):
    """Steer ComfyUI's own SD 1.5."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonBrain_Apply",
            display_name="Apply (ReasonBrain)",
            category=host.BRAIN_ROOT,
            description="Steers an SD 1.5 of 8 input channels, loaded by ComfyUI itself, with what Reason made. Wire the three "
            "conditionings to DualCFGGuider in their order (cond1, cond2, negative; regular; 7.5 and 1.5).",
            inputs=[
                io.Model.Input("model", tooltip="The UNet that training exported for ComfyUI: SD 1.5 with 8 input channels."),
                GuidanceSocket.Input("guidance", tooltip="From Reason."),
                io.Vae.Input("vae", tooltip="The VAE of SD 1.5."),
                io.Image.Input("image", tooltip="The picture to edit: that of Reason. One picture."),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=8192,
                    step=16,
                    tooltip="Side of the square whose area is generated. 0: the checkpoint's own.",
                ),
            ],
            outputs=[
                io.Model.Output("out_model", display_name="model", tooltip="For DualCFGGuider and the scheduler."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="Both conditions: cond1 of DualCFGGuider."),
                io.Conditioning.Output(
                    "image_only", display_name="image only", tooltip="The picture alone: cond2 of DualCFGGuider."
                ),
                io.Conditioning.Output("negative", display_name="negative", tooltip="Neither: negative of DualCFGGuider."),
                io.Latent.Output("latent", display_name="latent", tooltip="Empty latents of the size to generate."),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def execute(cls, model, guidance, vae, image, size) -> io.NodeOutput:
        """Patch a copy of the model, and make the conditionings."""
        check_model(guidance, **host.unet_facts(model))
        picture = to_picture(image)
        plan = guidance.geometry.plan([(picture.shape[-1], picture.shape[-2])], size or guidance.level)
        shown = guidance.geometry.to_vae(picture, plan.vae[0])
        source = vae.encode(shown[0].permute(1, 2, 0)[None])
        patched = host.patch_unet(model, brain_patch.KEY, brain_patch.note_residuals, brain_patch.add_residuals)
        return io.NodeOutput(patched, *as_comfy(guidance, source), {"samples": torch.zeros_like(source)})


class Edit(io.ComfyNode):
    """Edit with ReasonBrain alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonBrain_Edit",
            display_name="Edit (ReasonBrain)",
            category=host.BRAIN_ROOT,
            description="Edits the picture with ReasonBrain, from cues to pixels: SD 1.5, SD 2.1 or FLUX, as the "
            "checkpoint is. The result has the size of the picture; a batch is edited one by one. Stands in a loop "
            "like any editor.",
            inputs=[
                BrainSocket.Input("brain", tooltip="From Load ReasonBrain."),
                io.Image.Input("image", tooltip="The picture to edit. A fourth channel (alpha) is kept."),
                io.String.Input(
                    "instruction", multiline=True, default="", tooltip="What to change, a supposition or a plain wish."
                ),
                seed_input(
                    "The noise of the first picture; the next of a batch takes seed + 1. Inside a loop: Loop Open's seed."
                ),
                *generation_inputs(),
                io.Float.Input(
                    "image_guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly to keep to the picture. 0: the checkpoint's own. FLUX has none.",
                ),
                *_cue_inputs(),
                previous_input(),
            ],
            outputs=[
                io.Image.Output("out_image", display_name="image", tooltip="The edited picture, of the size of the input."),
                EditedSocket.Output(
                    "edited", display_name="edited", tooltip="The same with its latents, for a further Edit or for Loop Close."
                ),
                io.String.Output("names", display_name="objects", tooltip="The names of objects that it went by."),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, instruction) -> bool | str:
        """An empty text, before the run."""
        return no_text("instruction", instruction, CHANGE, "Write it, or wire Think's goal to it.")

    @classmethod
    def execute(
        cls,
        brain,
        image,
        instruction,
        seed,
        steps,
        guidance,
        size,
        negative,
        image_guidance,
        objects,
        regions=None,
        previous=None,
    ) -> io.NodeOutput:
        """Edit."""
        values = {"steps": steps, "guidance": guidance, "image_guidance": image_guidance, "size": size, "negative": negative}
        cues = {"objects": objects, "regions": regions, "previous": previous}
        watch = {"preview": StepWatch, "should_stop": host.should_stop}
        with host.cancellable(cls.hidden, "Edit"):
            made, names = edit_pictures(brain, image, instruction, seed=seed, **watch, **cues, **values)
        text = say_objects(names)
        host.Watch(cls.hidden).show(text)
        return io.NodeOutput(made.image, made, text)
