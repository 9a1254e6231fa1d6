"""The trained part of a ReasonBrain on disk: `brain.safetensors` with every trained tensor, and `lora/`, a PEFT folder.

Keys: `brain.` FRCE, assembler, QFormer, CME; `ia.` LLaVA's projector; `denoiser.` what was trained of the denoiser.
The metadata holds widths and switches, so that the modules can be built from the file alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.reasonbrain.spec import BrainSpec, Switches
from ..weightfiles import read_metadata, read_state, weight_files

if TYPE_CHECKING:
    from ..mllm.llava import Llava
    from ..models.reasonbrain.brain import ReasonBrain

FILE, LORA, NOTE = "brain.safetensors", "lora", "reasonbrain"

DENOISER_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Where a LoRA of the denoiser goes: the projections of its attention."""

SAMPLES, PIECE = 512, 4096
"""How many pieces of how many bytes `weights_digest` reads of a file."""

log = logging.getLogger(__name__)


def trained_tensors(brain: ReasonBrain, llava: Llava, denoiser: nn.Module | None) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by its key. Of the denoiser those that require a gradient."""
    # Asked of the parameters: the tensors of a state_dict never require a gradient.
    found = {f"brain.{name}": p for name, p in brain.named_parameters()}
    found |= {f"ia.{name}": p for name, p in llava.projector.named_parameters()}
    if denoiser is not None:
        found |= {f"denoiser.{name}": p for name, p in denoiser.named_parameters() if p.requires_grad}
    return found


def add_denoiser_lora(denoiser: Any, rank: int, alpha: int, targets: Sequence[str] | str = DENOISER_TARGETS) -> None:
    """Put a LoRA on the attention of a diffusers network, in place; a checkpoint then holds it. What was trained stays so.

    targets: ends of module names, or one regular expression.
    """
    from peft import LoraConfig

    trained = [p for p in denoiser.parameters() if p.requires_grad]
    names = targets if isinstance(targets, str) else list(targets)
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0))
    for p in trained:  # peft freezes all that it does not add, the widened first layer too
        p.requires_grad_(True)


def save_brain(
    folder: str | Path,
    brain: ReasonBrain,
    llava: Llava,
    denoiser: nn.Module | None = None,
    around: Mapping[str, Path] | None = None,
) -> None:
    """Write all that was trained into `folder`. The LoRA is written where LLaVA has one. around: where the parts lie that it
    was trained around, by name; their digests are noted."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = trained_tensors(brain, llava, denoiser)
    note = {"spec": asdict(brain.spec), "switches": asdict(brain.switches), "img_tokens": list(llava.img_names)}
    note["lora"] = llava.peft is not None
    note["around"] = {name: weights_digest(place) for name, place in (around or {}).items()}
    lora = getattr(denoiser, "peft_config", {}).get("default")
    if lora is not None:
        targets = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
        note["denoiser_lora"] = {"rank": lora.r, "alpha": lora.lora_alpha, "targets": targets}
    state = {key: p.detach().cpu().contiguous().clone() for key, p in tensors.items()}
    save_file(state, folder / FILE, metadata={"format": "pt", NOTE: json.dumps(note)})
    if llava.peft is not None:
        llava.save_lora(folder / LORA)


@dataclass(frozen=True, slots=True)
class BrainNote:
    """The metadata of a checkpoint. lora: whether LLaVA has one. denoiser_lora: rank, alpha and targets of the denoiser's.
    img_tokens: names of the [IMG] tokens. around: digests of the parts that it was trained around, {} where none were noted."""

    spec: BrainSpec
    switches: Switches
    lora: bool
    denoiser_lora: Mapping[str, Any] | None = None
    img_tokens: tuple[str, ...] = ()
    around: Mapping[str, str] = field(default_factory=dict)


def read_note(folder: str | Path) -> BrainNote:
    """Widths and switches of the checkpoint in `folder`. Raises CheckpointError."""
    file = Path(folder) / FILE
    try:
        note = json.loads(read_metadata(file)[NOTE])
        spec = {**note["spec"], "taps": tuple(note["spec"]["taps"])}
        lora = note.get("denoiser_lora")
        lora = None if lora is None else {name: lora[name] for name in ("rank", "alpha", "targets")}
        told = {"img_tokens": tuple(note.get("img_tokens", ())), "around": dict(note.get("around", {}))}
        return BrainNote(BrainSpec(**spec), Switches(**note["switches"]), bool(note["lora"]), lora, **told)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{file}: expected the metadata `{NOTE}` with widths and switches, found {error}. Name a folder of save_brain."
        ) from error


def build_brain(folder: str | Path) -> ReasonBrain:
    """The modules a checkpoint was made of, with widths and switches from its metadata; no weights yet. CheckpointError."""
    from ..models.reasonbrain.brain import ReasonBrain

    note = read_note(folder)
    return ReasonBrain(note.spec, note.switches)


@torch.no_grad()
def load_brain(folder: str | Path, brain: ReasonBrain, llava: Llava, denoiser: nn.Module | None = None) -> dict[str, int]:
    """Fill the modules from `folder`, and LLaVA's LoRA where it was saved with one. -> number of tensors by part.

    Of the denoiser the checkpoint's tensors are filled in, and those that require a gradient must be among them. Strict:
    CheckpointError names what is missing, unknown or of another shape; then no tensor has been copied, though a LoRA that
    could not be read may be attached, still empty.
    """
    folder = Path(folder)
    state = read_state(folder / FILE)
    own: dict[str, Tensor] = trained_tensors(brain, llava, None)
    if denoiser is not None:
        names = dict(denoiser.named_parameters())
        own |= {f"denoiser.{n}": p for n, p in names.items() if p.requires_grad or f"denoiser.{n}" in state}
    faults = key_report(state, own)
    if faults:
        raise CheckpointError(
            f"{folder / FILE}: expected {len(own)} tensors, found {len(state)}, of which {len(faults)} do not fit: "
            f"{'; '.join(faults[:8])}. Build the modules with build_brain and hand in the denoiser that was trained."
        )
    note = read_note(folder)
    if note.img_tokens and note.img_tokens != llava.img_names:
        raise CheckpointError(
            f"{folder / FILE}: expected the [IMG] tokens of this LLaVA ({_ends(llava.img_names)}), found rows trained for "
            f"{_ends(note.img_tokens)}. Load it with the LLaVA it was trained on."
        )
    if note.lora:
        llava.load_lora(folder / LORA)
    for key, p in own.items():
        p.copy_(state[key])
    counts = Counter(key.partition(".")[0] for key in own)
    return {**counts, "lora": len(llava.trainable())}


def _ends(names: Sequence[str]) -> str:
    return f"{len(names)}, {names[0]} to {names[-1]}" if names else "none"


def warn_of_other_parts(folder: str | Path, around: Mapping[str, Path]) -> list[str]:
    """Names of the parts that are not those which the checkpoint in `folder` was trained around; one warning says so.

    No error: the same weights in another dtype or in other shards are named too, and do as well.
    """
    noted = read_note(folder).around
    other = [name for name, place in around.items() if name in noted and weights_digest(place) != noted[name]]
    if other:
        places = ", ".join(f"{name} ({around[name]})" for name in other)
        log.warning(
            "%s: expected the parts it was trained around, found other weights: %s. Where these are not the same in another "
            "form, pictures will be wrong; name the right ones in reasonbrain.json.",
            Path(folder) / FILE,
            places,
        )
    return other


def weights_digest(path: str | Path) -> str:
    """A name for the weights at `path`: a hash of the sizes of their files and of SAMPLES pieces of each.

    Not of every byte, as 14 GB would be read for a minute at every load; training changes every large tensor somewhere.
    """
    whole = hashlib.sha256()
    for file in weight_files(path):
        size = file.stat().st_size
        whole.update(f"{size}:".encode())
        step = max(PIECE, (size - PIECE) // SAMPLES)
        with open(file, "rb") as stream:
            for at in (*range(0, size, step), max(0, size - PIECE)):
                stream.seek(at)
                whole.update(stream.read(PIECE))
    return whole.hexdigest()[:32]


def key_report(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What of `state` does not fit `own`, a phrase per key; empty where all does."""
    faults = [f"{key} is missing" for key in own if key not in state]
    faults += [f"{key} is unknown" for key in state if key not in own]
    both = (key for key in own if key in state and own[key].shape != state[key].shape)
    return faults + [f"{key} is {(*state[key].shape,)} and not {(*own[key].shape,)}" for key in both]
