"""What was trained, written for those who use it: ComfyUI, diffusers, peft, our nodes and command line, or merged weights.

    export(adapters, "comfyui", out, name="mine")   mine_dit.safetensors, mine_mllm.safetensors
    export(adapters, "peft", out, name="mine")      mine_dit/, mine_mllm/: folders of peft
    export(adapters, "merged", out, name="mine")    mine_merged/: a folder in the released layout of the base

`adapters` is an `adapters.Adapters` (from `adapters.collect` of live modules) or a folder that `adapters.save` wrote.

The ComfyUI form is that of its generic names, `diffusion_model.<module>` and `text_encoders.qwen25_7b.transformer.<module>`,
with lora_down, lora_up and `.alpha` (beside lora_A and lora_B, diffusers 0.37 does not see an alpha); loaders scale by
alpha / r, so that an rsLoRA is written with alpha * sqrt(r). Parameters that were trained whole (a connector) follow as
`.set_weight`. A part that was trained for the greater part is no LoRA: it is written as one file of weights. Every LoRA file
is read back through the core's key table before it is told of.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..reasonedit_core.detect import QWEN
from ..reasonedit_core.errors import CheckpointError, ConfigError
from ..reasonedit_core.lora import DORA_NORM, dora_norms, read_lora
from ..reasonedit_core.lora_keys import normalise
from ..reasonedit_core.parts import Parts
from .adapters import FILE_NAME, Adapters, Trained, load, save_peft, set_key, write_tensors
from .base import base_shapes, find_base, hub_name, read_base
from .merged import pair_of, write_merged, write_single
from .presets import DIT, MLLM

log = logging.getLogger(__name__)

FORMATS = ("comfyui", "peft", "merged")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MLLM_PREFIX = "text_encoders.qwen25_7b.transformer."
DIT_PREFIX = "diffusion_model."
_NAMES = {DIT: "the DiT", MLLM: "the MLLM"}


@dataclass(frozen=True, slots=True)
class Exported:
    """files: what was written, folders of peft and merged folders by their own path first. notes: sentences for the user."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def export(
    source: Adapters | str | Path,
    format: str = "comfyui",
    out: str | Path = ".",
    *,
    name: str = "reasonedit",
    base: str | Path | None = None,
    pieces: Mapping[str, Path] | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write what was trained into the folder `out`, in one of FORMATS.

    source: `Adapters`, or a folder of `adapters.save` (a stage's, or one with a single such folder below it). base, pieces:
    where the weights lie that it was trained from, if they were moved. dtype: of a LoRA file's tensors; None: as trained.
    Raises ConfigError for values and places that cannot be used, CheckpointError for weights that do not fit.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}.")
    if dtype is not None and (dtype not in DTYPES or format != "comfyui"):
        raise ConfigError(f"dtype: expected none, or with format comfyui one of {', '.join(DTYPES)}, found {dtype!r}.")
    adapters = source if isinstance(source, Adapters) else load(find_trained(source), base=base, pieces=pieces)
    out = Path(out)
    if format == "peft":
        exported = _export_peft(adapters, out, name)
    elif format == "merged":
        files = write_merged(adapters, find_base(adapters), out / f"{name}_merged")
        exported = Exported(tuple(files), (f"{files[0]}: whole weights; load them like the ones they were trained from.",))
    else:
        exported = _export_comfyui(adapters, out, name, None if dtype is None else DTYPES[dtype])
    for note in exported.notes:
        log.info("%s", note)
    return exported


def find_trained(folder: str | Path) -> Path:
    """The folder with trained.json that `folder` means: itself, or the only one below it (two levels deep)."""
    folder = Path(folder)
    if (folder / FILE_NAME).is_file():
        return folder
    found = sorted({path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{FILE_NAME}")})
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise CheckpointError(
            f"{folder}: expected {FILE_NAME} in it or in one folder below, found {names}. Name the folder of one stage."
        )
    return found[0]


# ---- ComfyUI -------------------------------------------------------------------------------------------------------------


def _export_comfyui(adapters: Adapters, out: Path, name: str, dtype: torch.dtype | None) -> Exported:
    parts = _base_or_none(adapters)
    files, notes = [], []
    for one in adapters.trained:
        path = out / f"{name}_{one.part}.safetensors"
        metadata = describe(adapters, one)
        if parts is not None and _is_most(one, parts):
            files.append(write_single(one, parts, path, {**metadata, "reasonedit.kind": "weights"}))
            notes.append(_full_note(adapters, one, path))
            continue
        tensors = lora_tensors(adapters, one, parts, dtype)
        files.append(write_tensors(path, tensors, {**metadata, "reasonedit.kind": "lora"}))
        if parts is not None:
            check_file(path, one, parts)
        notes += _lora_notes(adapters, one, path)
    return Exported(tuple(files), tuple(notes))


def lora_tensors(
    adapters: Adapters, trained: Trained, parts: Parts | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a LoRA file under ComfyUI's names. parts: the base, which a DoRA needs."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None else tensor.to(dtype)

    tensors: dict[str, Tensor] = {}
    weights = None
    for module in trained.modules:
        stem, down = comfy_name(trained.part, module), trained.lora[f"{module}.lora_A"]
        tensors[f"{stem}.lora_down.weight"] = cast(down)
        tensors[f"{stem}.lora_up.weight"] = cast(trained.lora[f"{module}.lora_B"])
        tensors[f"{stem}.alpha"] = torch.tensor(trained.gain(module) * down.shape[0])
        if f"{module}.lora_magnitude_vector" in trained.lora:
            if parts is None:
                raise CheckpointError(
                    f"{adapters.base}: expected the weights that the DoRA was trained from, as their norms are part of the "
                    "file, found none. Name their folder (base)."
                )
            weights = weights or read_base(parts, trained.part)
            tensors[f"{stem}.dora_scale"] = comfy_magnitude(trained, module, weights[f"{module}.weight"])
    for name, tensor in trained.whole.items():
        tensors[comfy_name(trained.part, set_key(name))] = cast(tensor)
    return tensors


def comfy_magnitude(trained: Trained, module: str, weight: Tensor) -> Tensor:
    """`dora_scale` (out, 1) float32 by which ComfyUI arrives at peft's merge: m * |W| / |W + D|.

    peft divides the moved weight W + D by its own row norms; ComfyUI (0.3.64 and, unchanged, 0.8.0) divides it by those of W.
    A LoRA strength other than 1 interpolates between W and the merge, there as here.
    """
    pair = pair_of(trained, module)
    bare, moved = dora_norms(weight.float(), pair)
    return pair.magnitude * bare / moved


def comfy_name(part: str, name: str) -> str:
    """ComfyUI's generic name of a module or parameter."""
    return f"{DIT_PREFIX}{name}" if part == DIT else f"{MLLM_PREFIX}{hub_name(name)}"


def check_file(path: Path, trained: Trained, parts: Parts) -> None:
    """Read a LoRA file back as our loaders do. CheckpointError unless every key met its module."""
    shapes = base_shapes(parts, trained.part)
    linears = {name.removesuffix(".weight"): shape[::-1] for name, shape in shapes.items() if len(shape) == 2}
    state, stated, bare = read_lora(path)
    found = normalise(state, linears, stated, shapes=shapes, bare=bare)
    complete = set(found.pairs) == set(trained.modules) and set(found.whole) == set(trained.whole)
    gains = all(math.isclose(pair.gain, trained.gain(name), rel_tol=1e-5) for name, pair in found.pairs.items())
    if found.unmatched or not complete or not gains:
        lost = found.unmatched or sorted({*trained.modules, *trained.whole} - {*found.pairs, *found.whole})
        raise CheckpointError(
            f"{path}: expected every key to meet a module of {parts.root}, found {len(lost)} that do not "
            f"({', '.join(lost[:2])}). The base is not the one that was trained from: name that (base)."
        )


def _is_most(trained: Trained, parts: Parts) -> bool:
    total = sum(math.prod(shape) for shape in base_shapes(parts, trained.part).values())
    return 2 * sum(tensor.numel() for tensor in trained.whole.values()) > total


def _base_or_none(adapters: Adapters) -> Parts | None:
    try:
        return find_base(adapters)
    except CheckpointError as error:
        log.warning("the export is not checked against the weights it belongs to: %s", error)
        return None


# ---- peft ----------------------------------------------------------------------------------------------------------------


def _export_peft(adapters: Adapters, out: Path, name: str) -> Exported:
    files: list[Path] = []
    notes = []
    for one in adapters.trained:
        folder = out / f"{name}_{one.part}"
        files += [folder, *save_peft(one, folder, base_name=adapters.base.name)]
        words = f"{folder}: {_NAMES[one.part]} of {adapters.system} as peft keeps it, for training on and for `--lora`."
        notes.append(words + (_whole_words(adapters, one) if one.whole else ""))
    return Exported(tuple(files), tuple(notes))


# ---- words ---------------------------------------------------------------------------------------------------------------


def hosts(system: str, part: str) -> str:
    """Which programs load a LoRA of this part, in words."""
    ours = "the ReasonEdit nodes, `reasonedit edit --lora` and peft"
    if system != QWEN:
        return f"{ours}; no other program has this model"
    if part == DIT:
        return f"ComfyUI's LoRA loaders, diffusers, {ours}"
    return f"ComfyUI's LoRA loaders (the CLIP side), {ours}; diffusers has no place for it"


def describe(adapters: Adapters, trained: Trained) -> dict[str, str]:
    """What stands in the header of a file."""
    about = {
        "reasonedit.system": adapters.system,
        "reasonedit.variant": adapters.variant,
        "reasonedit.part": trained.part,
        "reasonedit.base": adapters.base.name,
        "reasonedit.loads_in": hosts(adapters.system, trained.part),
    }
    if trained.lora:
        about["reasonedit.rank"] = str(trained.config.get("r"))
        about["reasonedit.alpha"] = str(trained.config.get("lora_alpha"))
    if trained.is_dora:
        about[DORA_NORM] = "weight"
    return about | {f"reasonedit.{key}": str(value) for key, value in adapters.about.items()}


def _lora_notes(adapters: Adapters, trained: Trained, path: Path) -> list[str]:
    notes = [f"{path}: LoRA of {_NAMES[trained.part]}. Loads in {hosts(adapters.system, trained.part)}."]
    if trained.whole:
        notes[0] += _whole_words(adapters, trained)
    if trained.is_dora:
        notes.append(
            f"{path}: a DoRA. diffusers ignores its dora_scale and would apply a plain LoRA, which is something else: use the "
            "format merged there. dora_scale is written for ComfyUI, which divides by the norms of the weights before the LoRA."
        )
    return notes


def _whole_words(adapters: Adapters, trained: Trained) -> str:
    ours, others = "the ReasonEdit nodes and `--lora`", "peft does"
    if adapters.system == QWEN:
        ours, others = f"ComfyUI, {ours}", "diffusers and peft do"
    return (
        f" {len(trained.whole)} parameters that were trained whole stand beside it: {ours} read them, {others} not; use the "
        "format merged there."
    )


def _full_note(adapters: Adapters, trained: Trained, path: Path) -> str:
    where = "models/diffusion_models" if trained.part == DIT else "models/text_encoders"
    return (
        f"{path}: the weights of {_NAMES[trained.part]}, not a LoRA, as most of them were trained. It belongs into ComfyUI's "
        f"{where}; for the command line use the format merged."
    )
