"""What a stage has learnt, as a value: taken from live modules, kept in a folder, put back without loss.

This is what `export` works on. The trainer puts LoRAs beside the Linears with peft (on the transformer, and on the MLLM or its
language model) and frees further parameters by name; `collect` reads both. A folder of `save` holds, per part, a peft folder
(adapter_config.json, adapter_model.safetensors) with `whole.safetensors` for parameters that were trained whole; a further
stage starts from it by `restore`, peft reads it, and so do our nodes and `--lora`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..reasonedit_core.detect import QWEN, STEP1X
from ..reasonedit_core.errors import CheckpointError, ConfigError
from ..reasonedit_core.files import write_json
from ..reasonedit_core.lora import WHOLE_FILE
from ..reasonedit_core.lora_keys import SET, Stated
from ..reasonedit_core.weightfiles import read_json, read_state
from .presets import DIT, MLLM

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger(__name__)

FILE_NAME = "trained.json"
SCHEMA = "reasonedit.trained/1"
ADAPTER = "default"
PARTS = (DIT, MLLM)

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before every name in its files."""

_KEPT = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out")
"""Fields of a LoraConfig that decide what an adapter computes and how it is trained further."""

_WRAPPERS = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LORA = re.compile(r"^(?P<module>.+)\.(?P<half>lora_A|lora_B|lora_magnitude_vector)\.(?P<adapter>\w+)(?:\.weight)?$")


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What was trained of one part, on the CPU, in the dtype it was trained in. Names are those of the part in memory
    (diffusers' of the DiT, transformers' of the MLLM from its root: `model.language_model.layers...`).

    lora: `<module>.lora_A`, `<module>.lora_B` (and `<module>.lora_magnitude_vector` of a DoRA) -> tensor. config: the fields
    of peft's LoraConfig, empty without a LoRA. whole: parameters trained whole, by name.
    """

    part: str
    lora: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ConfigError(f"expected a part out of {', '.join(PARTS)}, found {self.part!r}.")
        if not (self.lora or self.whole):
            raise ConfigError(f"expected something that was trained of the {self.part}, found nothing. Leave the part out.")

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules with a LoRA, sorted."""
        return tuple(sorted(name.removesuffix(".lora_A") for name in self.lora if name.endswith(".lora_A")))

    @property
    def is_dora(self) -> bool:
        """Whether the LoRA has magnitudes."""
        return any(name.endswith(".lora_magnitude_vector") for name in self.lora)

    def gain(self, module: str) -> float:
        """alpha / r of one module, or alpha / sqrt(r) for rsLoRA: the weight grows by gain * B @ A."""
        config = self.config
        stated = Stated(float(config["lora_alpha"]), bool(config.get("use_rslora")), config.get("alpha_pattern") or {})
        return stated.gain(module, self.lora[f"{module}.lora_A"].shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """Everything a run has learnt, of one or both parts.

    system: reasonedit-s | reasonedit-q. base: folder or file of the weights it started from; pieces: the parts that lie
    elsewhere (`text_encoder`, `vae`, `tokenizer`). variant: of Step1X. about: what files say of it, e.g. stage and steps.
    """

    system: str
    base: Path
    trained: tuple[Trained, ...]
    variant: str = "auto"
    about: Mapping[str, str] = field(default_factory=dict)
    pieces: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.system not in (STEP1X, QWEN):
            raise ConfigError(f"expected a system out of {STEP1X}, {QWEN}, found {self.system!r}.")
        parts = [one.part for one in self.trained]
        if not parts or len(set(parts)) < len(parts):
            raise ConfigError(f"expected one or two different parts that were trained, found {', '.join(parts) or 'none'}.")


def combine(earlier: Adapters, later: Adapters) -> Adapters:
    """What two stages have learnt together, the later having gone on from the earlier: of each part the later LoRA where it
    has one, and the whole parameters of both, the later ones first."""
    if (earlier.system, earlier.variant) != (later.system, later.variant):
        raise ConfigError(f"expected stages of one system, found {earlier.system} and {later.system}.")
    before = {one.part: one for one in earlier.trained}
    parts = {**before, **{one.part: one for one in later.trained}}
    for part in before.keys() & {one.part for one in later.trained}:
        old, new = before[part], parts[part]
        lora = new if new.lora else old
        parts[part] = Trained(part, lora.lora, lora.config, {**old.whole, **new.whole})
    return replace(later, trained=tuple(parts[part] for part in PARTS if part in parts))


# ---- from live modules ---------------------------------------------------------------------------------------------------


def collect(part: str, module: nn.Module, *, adapter: str = ADAPTER, whole: Iterable[str] | None = None) -> Trained | None:
    """What was trained of `module`: the DiT, or the MLLM (its whole model, or the language model in it). None: nothing.

    adapter: peft's name of the LoRA. whole: names of the parameters trained whole; None: all that need a gradient. Under
    FSDP2 every rank must call this, as sharded tensors are gathered.
    """
    wanted = None if whole is None else set(whole)
    lora: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        match = _LORA.match(name)
        if match is None:
            if name in wanted if wanted is not None else parameter.requires_grad:
                full[canonical(part, name)] = _taken(parameter)
        elif match["adapter"] == adapter:
            lora[f"{canonical(part, match['module'])}.{match['half']}"] = _taken(parameter)
    if wanted is not None and (missing := wanted - {name for name, _ in module.named_parameters()}):
        raise ConfigError(f"expected parameters of the {part} by their names, found none called {min(missing)}.")
    if not (lora or full):
        return None
    return Trained(part, lora, _config(module, adapter) if lora else {}, full)


def canonical(part: str, name: str) -> str:
    """The name in the part's root, without what peft, compilers, checkpointing and FSDP put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    name = name.removeprefix("module.").replace(".base_layer", "")
    if part != MLLM or name.startswith(("model.language_model.", "model.visual.", "lm_head.")) or name == "lm_head":
        return name
    if name.startswith(("language_model.", "visual.")):
        return f"model.{name}"
    return f"model.language_model.{name}"


def _taken(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.to("cpu", copy=True).contiguous()


def _config(module: nn.Module, adapter: str) -> dict[str, Any]:
    """The fields of the LoraConfig that the module was given."""
    for child in module.modules():  # get_peft_model keeps it on its tuner, injection on the module
        configs = getattr(child, "peft_config", None)
        if isinstance(configs, Mapping) and adapter in configs:
            config = configs[adapter]
            return {name: getattr(config, name) for name in _KEPT}
    raise ConfigError(f"expected the configuration of the adapter {adapter!r} in peft_config of the module, found none.")


# ---- back into modules ---------------------------------------------------------------------------------------------------


def restore(module: nn.Module, trained: Trained, *, adapter: str = ADAPTER, trainable: bool = True) -> None:
    """Put what was trained back into `module` (the part's root), bit for bit, to go on with it or to run it.

    The LoRA is injected where the module has none of that name. Raises CheckpointError where names or shapes differ.
    """
    if trained.lora and not _has(module, adapter):
        from peft import inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):  # what peft draws is replaced below
            inject_adapter_in_model(lora_config(trained), module, adapter_name=adapter)
    own: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        match = _LORA.match(name)
        if match is None:
            own[canonical(trained.part, name)] = parameter
        elif match["adapter"] == adapter:
            own[f"{canonical(trained.part, match['module'])}.{match['half']}"] = parameter
    tensors = {**trained.lora, **trained.whole}
    extra = [name for name in own if ".lora_" in name and name not in tensors]
    wrong = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    if wrong or extra:
        name = (wrong or extra)[0]
        wanted = tuple(tensors[name].shape) if name in tensors else "nothing"
        found = tuple(own[name].shape) if name in own else "nothing"
        raise CheckpointError(
            f"{name}: expected a {trained.part} that fits what was trained ({wanted}), found {found}. Start from the weights "
            "and with the target modules that it was trained with."
        )
    for name, tensor in tensors.items():
        own[name].data = tensor.to(own[name].device, copy=True)
        own[name].requires_grad_(trainable)


def lora_config(trained: Trained) -> LoraConfig:
    """peft's configuration of the LoRA, with its modules named one by one."""
    from peft import LoraConfig

    known = {name: value for name, value in trained.config.items() if name in _KEPT}
    return LoraConfig(**known, target_modules=_targets(trained))


def _targets(trained: Trained) -> str:
    # Names one by one: a list would be matched by its ends, and `proj_out` is in every single block as well.
    return "|".join(re.escape(name) for name in trained.modules)


def _has(module: nn.Module, adapter: str) -> bool:
    return any((match := _LORA.match(name)) and match["adapter"] == adapter for name, _ in module.named_parameters())


# ---- on the disk ---------------------------------------------------------------------------------------------------------


def save(adapters: Adapters, folder: str | Path) -> list[Path]:
    """Write `folder`: trained.json, and a peft folder per part (`dit/`, `mllm/`). Returns the files, trained.json last."""
    folder = Path(folder)
    (folder / FILE_NAME).unlink(missing_ok=True)  # from here on the folder is not whole
    files = [file for one in adapters.trained for file in save_peft(one, folder / one.part)]
    about = {
        "schema": SCHEMA,
        "system": adapters.system,
        "variant": adapters.variant,
        "base": str(adapters.base),
        "pieces": {name: str(path) for name, path in adapters.pieces.items()},
        "parts": [one.part for one in adapters.trained],
        "about": dict(adapters.about),
    }
    return [*files, write_json(folder / FILE_NAME, about)]


def load(folder: str | Path, *, base: str | Path | None = None, pieces: Mapping[str, Path] | None = None) -> Adapters:
    """Read a folder of `save`. base, pieces: where the weights lie now, if they were moved."""
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: expected a folder with {FILE_NAME}, as a stage leaves it, found none. Name the run folder, or the "
            "folder of one of its stages."
        )
    about = read_json(path)
    if about.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: expected schema {SCHEMA}, found {about.get('schema')!r}. It is of another version.")
    try:
        trained = tuple(load_peft(folder / part, part) for part in about["parts"])
        found = about["pieces"] if pieces is None else pieces
        found = {name: Path(path) for name, path in found.items()}
        return Adapters(about["system"], Path(base or about["base"]), trained, about["variant"], about["about"], found)
    except KeyError as error:
        raise CheckpointError(f"{path}: expected the key {error}, found none. Train the stage again.") from error


def save_peft(trained: Trained, folder: str | Path, *, base_name: str | None = None) -> list[Path]:
    """Write a folder that peft, our nodes and `--lora` read, and that `load_peft` gives back to the bit."""
    folder = Path(folder)
    files = []
    if trained.lora:
        files.append(write_tensors(folder / TENSORS_FILE, {f"{PREFIX}{_peft_key(k)}": v for k, v in trained.lora.items()}))
        known = {name: trained.config[name] for name in _KEPT if name in trained.config}
        extra = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_name, "inference_mode": True}
        files.append(write_json(folder / CONFIG_FILE, {**extra, **known, "target_modules": _targets(trained)}))
    if trained.whole:
        files.append(write_tensors(folder / WHOLE_FILE, {set_key(name): v for name, v in trained.whole.items()}))
    return files


def load_peft(folder: str | Path, part: str) -> Trained:
    """Read a folder of `save_peft`, or one that peft saved."""
    folder = Path(folder)
    lora: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    if (folder / TENSORS_FILE).is_file() or not (folder / WHOLE_FILE).is_file():
        stated = read_json(folder / CONFIG_FILE)
        config = {name: stated[name] for name in _KEPT if name in stated}
        for key, tensor in read_state(folder / TENSORS_FILE).items():
            name = canonical(part, key.removeprefix(PREFIX)).removesuffix(".weight")
            lora[name] = tensor.clone()
    whole = {}
    if (folder / WHOLE_FILE).is_file():
        whole = {_parameter(key): tensor.clone() for key, tensor in read_state(folder / WHOLE_FILE).items()}
    return Trained(part, lora, config, whole)


def _peft_key(name: str) -> str:
    return name if name.endswith("lora_magnitude_vector") else f"{name}.weight"


def set_key(name: str) -> str:
    """The key of a whole parameter, as ComfyUI has it: a weight under its module's name, all others under their own."""
    return name.removesuffix(".weight") + SET


def _parameter(key: str) -> str:
    """The inverse of `set_key`: all parameters of the three networks are called weight or bias."""
    name = key.removesuffix(SET)
    return name if name.endswith(".bias") else f"{name}.weight"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, written whole: under a temporary name, synced, renamed. Raises ConfigError where it cannot be."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    about = {"format": "pt", **(metadata or {})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, metadata=about)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {path}: {error}; choose a folder that can be written and has room") from error
    finally:
        with suppress(OSError):  # its folder could not be made: then there is no part either
            part.unlink(missing_ok=True)
    return path
