"""The files of workflows/: what nodes know of themselves, what is wrong with a prompt, and a prompt from the frontend's form.

Facts about the nodes come from our own schemas (always) or from a running ComfyUI's /object_info: the same checks run on both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonedit.reasonedit_core.mini.models import MINIS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "workflows"
MINI = ("mini_loop", "mini_think", "mini_auto")
"""Those that run in a ComfyUI whose folders are empty."""

BRAIN = ("reasonbrain_edit", "reasonbrain_loop", "reasonbrain_native")
FULL_SIZE = ("reasonbrain_native",)
"""Those that no tiny weights can run: ComfyUI knows an SD 1.5 by its full widths. `comfy_unet.py` runs their node."""

NAMES = (*MINI, "loop_reasonedit_s", "loop_reasonedit_q", "think_only", "reflect_only", "auto_loop", *BRAIN)
NOTES = ("MarkdownNote", "Note")
"""Nodes that only the frontend knows."""

WIDGETS = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,), "COMBO": (str,)}
FILES = {
    "ReasonEdit_LoadEditor": ("checkpoint", "text_encoder", "vae"),
    "ReasonEdit_LoadReasoner": ("source",),
    "ReasonBrain_Load": ("checkpoint", "segmenter"),
    "UNETLoader": ("unet_name",),
    "VAELoader": ("vae_name",),
    "LoadImage": ("image",),
}
PLACES = {"UNETLoader": "diffusion_models/", "VAELoader": "vae/"}
"""Where the files of ComfyUI's own loaders lie, whose names come without it."""

"""Lists of what lies in the user's folders: what a workflow names in them may be absent."""

BEHIND = ("fixed", "increment", "decrement", "randomize", "image")
"""What the frontend keeps behind a value: how a seed goes on, the button for uploads."""

NO_FILE = ("from checkpoint", "remote endpoint", "scripted replies", "grid", "none", *MINIS)


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a node. options: of a list. extra: values that the frontend keeps behind the widget's own."""

    name: str
    type: str
    optional: bool = False
    widget: bool = False
    options: tuple[str, ...] = ()
    default: Any = None
    least: float | None = None
    most: float | None = None
    extra: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """A class of nodes. inputs: in the order of the frontend, required ones first."""

    title: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]

    def __getitem__(self, name: str) -> Input | None:
        return next((slot for slot in self.inputs if slot.name == name), None)


CORE = {
    "LoadImage": Facts("Load Image", (Input("image", "COMBO", widget=True, extra=1),), ("IMAGE", "MASK")),
    "PreviewImage": Facts("Preview Image", (Input("images", "IMAGE"),), ()),
    "PreviewAny": Facts("Preview Any", (Input("source", "*"),), ()),
    "PrimitiveStringMultiline": Facts("String (Multiline)", (Input("value", "STRING", widget=True),), ("STRING",)),
    "MaskToImage": Facts("Convert Mask to Image", (Input("mask", "MASK"),), ("IMAGE",)),
    "UNETLoader": Facts(
        "Load Diffusion Model",
        (Input("unet_name", "COMBO", widget=True), Input("weight_dtype", "COMBO", widget=True, options=("default",))),
        ("MODEL",),
    ),
    "VAELoader": Facts("Load VAE", (Input("vae_name", "COMBO", widget=True),), ("VAE",)),
    "VAEDecode": Facts("VAE Decode", (Input("samples", "LATENT"), Input("vae", "VAE")), ("IMAGE",)),
    "RandomNoise": Facts("RandomNoise", (Input("noise_seed", "INT", widget=True, least=0, extra=1),), ("NOISE",)),
    "KSamplerSelect": Facts("KSamplerSelect", (Input("sampler_name", "COMBO", widget=True, options=("ddim",)),), ("SAMPLER",)),
    "BasicScheduler": Facts(
        "BasicScheduler",
        (
            Input("model", "MODEL"),
            Input("scheduler", "COMBO", widget=True, options=("normal",)),
            Input("steps", "INT", widget=True, least=1),
            Input("denoise", "FLOAT", widget=True, least=0, most=1),
        ),
        ("SIGMAS",),
    ),
    "DualCFGGuider": Facts(
        "DualCFGGuider",
        (
            Input("model", "MODEL"),
            *(Input(name, "CONDITIONING") for name in ("cond1", "cond2", "negative")),
            *(Input(name, "FLOAT", widget=True, least=0) for name in ("cfg_conds", "cfg_cond2_negative")),
            Input("style", "COMBO", widget=True, options=("regular", "nested")),
        ),
        ("GUIDER",),
    ),
    "SamplerCustomAdvanced": Facts(
        "SamplerCustomAdvanced",
        tuple(
            Input(name, kind)
            for name, kind in (
                ("noise", "NOISE"),
                ("guider", "GUIDER"),
                ("sampler", "SAMPLER"),
                ("sigmas", "SIGMAS"),
                ("latent_image", "LATENT"),
            )
        ),
        ("LATENT", "LATENT"),
    ),
}
"""ComfyUI's own nodes in our workflows; a running one is asked whether this is so."""


def load(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


# ---- what nodes know of themselves ---------------------------------------------------------------------------------------


def facts_of_schema(schema: Any) -> Facts:
    """Facts out of one of our schemas, made under the stand-ins of graph_runner.py."""
    slots = sorted(schema.inputs, key=lambda slot: slot.optional)
    return Facts(schema.display_name, tuple(map(_input_of_slot, slots)), tuple(slot.io_type for slot in schema.outputs))


def _input_of_slot(slot: Any) -> Input:
    given = slot.declared
    options = given.get("options") or (slot.display_name if isinstance(slot.display_name, list) else ())
    return Input(
        slot.id,
        slot.io_type,
        slot.optional,
        slot.io_type in WIDGETS and not given.get("force_input"),
        tuple(options),
        given.get("default", options[0] if options else None),
        given.get("min"),
        given.get("max"),
        int(bool(given.get("control_after_generate"))),
    )


def facts_of_info(info: Mapping[str, Any]) -> Facts:
    """Facts out of one entry of /object_info."""
    slots = []
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            declared, *rest = info["input"][kind][name]
            given = rest[0] if rest else {}
            options = declared if isinstance(declared, list) else given.get("options", ())
            type_ = "COMBO" if isinstance(declared, list) else declared
            extra = bool(given.get("control_after_generate")) + bool(given.get("image_upload"))
            slots.append(
                Input(
                    name,
                    type_,
                    kind == "optional",
                    type_ in WIDGETS and not given.get("forceInput"),
                    tuple(options),
                    given.get("default", options[0] if options else None),
                    given.get("min"),
                    given.get("max"),
                    extra,
                )
            )
    return Facts(info["display_name"], tuple(slots), tuple(info["output"]))


# ---- what is wrong with a prompt -----------------------------------------------------------------------------------------


def faults(prompt: Mapping[str, Any], known: Mapping[str, Facts]) -> list[str]:
    """What ComfyUI would refuse in a prompt in API format, or ignore in silence; empty when it is sound."""
    found = []
    for node, entry in prompt.items():
        facts = known.get(entry.get("class_type"))
        if facts is None:
            found.append(f"{node}: no class {entry.get('class_type')!r}")
            continue
        missing = [slot.name for slot in facts.inputs if not slot.optional and slot.name not in entry["inputs"]]
        found += [f"{node}.{name}: required and not given" for name in missing]
        for name, value in entry["inputs"].items():
            fault = _fault_of(facts[name], value, prompt, known, name in FILES.get(entry["class_type"], ()))
            found += [f"{node}.{name}: {fault}"] if fault else []
    return found


def _fault_of(slot: Input | None, value: Any, prompt: Mapping, known: Mapping[str, Facts], is_file: bool) -> str | None:
    if slot is None:
        return "no such input"
    if isinstance(value, list):
        return _fault_of_link(slot, value, prompt, known)
    if not slot.widget:
        return "a socket with a value"
    if not isinstance(value, WIDGETS[slot.type]) or (isinstance(value, bool) and slot.type != "BOOLEAN"):
        return f"{value!r} is no {slot.type}"
    if slot.options and not is_file and value not in slot.options:
        return f"{value!r} is not in {slot.options}"
    if (slot.least is not None and value < slot.least) or (slot.most is not None and value > slot.most):
        return f"{value!r} is not within {slot.least} and {slot.most}"
    return None


def _fault_of_link(slot: Input, link: list, prompt: Mapping, known: Mapping[str, Facts]) -> str | None:
    node, index = link
    if node not in prompt or prompt[node]["class_type"] not in known:
        return f"no node {node!r}"
    outputs = known[prompt[node]["class_type"]].outputs
    if not 0 <= index < len(outputs):
        return f"node {node} has no output {index}"
    if slot.type not in ("*", outputs[index]):
        return f"takes {slot.type}, is given {outputs[index]}"
    return None


# ---- the frontend's form -------------------------------------------------------------------------------------------------


def to_prompt(workflow: Mapping[str, Any], known: Mapping[str, Facts]) -> dict[str, Any]:
    """What the frontend sends for a workflow: values by their position, links by their ends, notes left out.

    Widgets that a class has got since the workflow was saved stand at their defaults.
    """
    links = {number: (str(start), output) for number, start, output, *_ in workflow["links"]}
    prompt = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["id"]):
        if node["type"] in NOTES:
            continue
        facts = known[node["type"]]
        inputs = _widget_values(node, facts)
        for slot in node["inputs"]:
            if slot.get("link") is not None:
                inputs[slot["name"]] = list(links[slot["link"]])
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": node.get("title", facts.title)},
        }
    return prompt


def _widget_values(node: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    stored, place, found = node["widgets_values"], 0, {}
    for slot in facts.inputs:
        if slot.widget:
            found[slot.name] = stored[place] if place < len(stored) else slot.default
            behind = stored[place + 1 : place + 1 + slot.extra]
            if not set(behind) <= set(BEHIND):
                raise ValueError(f"node {node['id']} ({node['type']}): {behind} behind the value of {slot.name}")
            place += 1 + slot.extra
    if place < len(stored):
        raise ValueError(f"node {node['id']} ({node['type']}): {len(stored)} values for {place} widgets")
    return found


def files_of(prompt: Mapping[str, Any]) -> list[str]:
    """Names of the model files and folders that a prompt needs."""
    chosen = [
        PLACES.get(entry["class_type"], "") + entry["inputs"][name]
        for entry in prompt.values()
        for name in FILES.get(entry["class_type"], ())
        if entry["class_type"] != "LoadImage"
    ]
    return [name for name in chosen if name not in NO_FILE]
