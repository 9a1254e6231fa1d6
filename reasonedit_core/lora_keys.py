"""The key styles in which LoRAs are published -> {canonical module name: (down, up, alpha)}.

Known styles, of which a file may mix prefixes: `transformer.`, `diffusion_model.`, `base_model.model.` or nothing before a
dotted module name; `lora_unet_`, `lora_transformer_` or `lycoris_` before a name with underscores; lora_A / lora_B (with or
without an adapter name), lora_down / lora_up, lora.down / lora.up; `.alpha` per module; Step1X names in the original form,
whose fused qkv and linear1 are split over the modules they stand for. Of the MLLM: `text_encoders.qwen25_7b.transformer.`
(ComfyUI), `text_encoder.`, `base_model.model.`, `lora_te_`, before its names on the hub or those it has in memory.

DoRA: `dora_scale` (rows (out, 1), or columns (1, in)) or peft's `lora_magnitude_vector`. Whole tensors: `.set_weight`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import CheckpointError
from .keymaps import SWAPPED, split_rows, step1x_original, swap_halves

if TYPE_CHECKING:
    import torch

Linears = Mapping[str, tuple[int, int]]
"""Module name -> (in_features, out_features)."""

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter name -> shape."""

DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
MLLM_DOTTED = ("base_model.model.", "text_encoders.", "text_encoder.", "qwen25_7b.", "transformer.", "language_model.")
MLLM_DOTTED += ("model.",)
MLLM_FLAT = ("lora_te1_", "lora_te_", "lycoris_")
MLLM_FLAT_ROOTS = ("text_encoder_", "language_model_", "model_")
MLLM_ROOTS = ("model.language_model.", "model.")
"""What stands before the short names (`layers.0...`, `visual.blocks.0...`) of the MLLM in memory."""

_FORMS = (
    (re.compile(r"^(.+)\.lora_(down|up)(?:\.(\d+))?\.weight$"), "lora_down/lora_up"),
    (re.compile(r"^(.+?)\.lora_(A|B)((?:\.(?!bias$|weight$)\w+)*)(?:\.weight)?$"), "lora_A/lora_B"),
    (re.compile(r"^(.+?)[._]lora\.(down|up)()\.weight$"), "lora.down/lora.up"),
    (re.compile(r"^(.+)\.lora_linear_layer\.(down|up)()\.weight$"), "lora_linear_layer"),
    (re.compile(r"^(.+)\.(alpha)()$"), "alpha"),
    (re.compile(r"^(.+)\.(dora_scale)()$"), "dora_scale"),
    (re.compile(r"^(.+?)\.(lora_magnitude_vector)((?:\.(?!weight$)\w+)*)(?:\.weight)?$"), "lora_magnitude_vector"),
)
_FOREIGN = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "lora_mid": "LoCon with a Tucker core",
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_lambda": "VeRA",
    "ia3_": "IA3",
}
SET = ".set_weight"


@dataclass(frozen=True, slots=True)
class Pair:
    """down (r, in), up (out, r), gain = alpha / r: the module's weight W grows by D = gain * up @ down.

    magnitude: of a DoRA, (out, 1) or (1, in): the weight becomes magnitude * (W + D) / |W + D|, the norms being those of
    rows or columns. bare: |W| stands in the denominator, as ComfyUI has it for rows.
    """

    down: torch.Tensor
    up: torch.Tensor
    gain: float
    magnitude: torch.Tensor | None = None
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Stated:
    """The alpha that a peft configuration states for a file without `.alpha` keys. root: divided by sqrt(r), not by r
    (rsLoRA). pattern: other alphas, by module name or its end."""

    alpha: float
    root: bool = False
    pattern: Mapping[str, float] = field(default_factory=dict)

    def gain(self, module: str, rank: int) -> float:
        """alpha / r of one module."""
        own = (value for key, value in self.pattern.items() if f".{module}".endswith("." + key.removeprefix("^")))
        return next(own, self.alpha) / (math.sqrt(rank) if self.root else rank)


@dataclass(slots=True)
class _Entry:
    """The tensors of one stem of the file. down, up: by part; part 0 alone where the weight is not split."""

    down: dict[int, torch.Tensor] = field(default_factory=dict)
    up: dict[int, torch.Tensor] = field(default_factory=dict)
    alpha: float | None = None
    magnitude: torch.Tensor | None = None
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Normalised:
    """pairs by canonical module name; whole: tensors that replace a parameter, by its name; unmatched keys of the file;
    style in words."""

    pairs: dict[str, Pair]
    unmatched: tuple[str, ...]
    style: str
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def normalise(
    state: Mapping[str, torch.Tensor],
    linears: Linears,
    stated: Stated | None = None,
    *,
    shapes: Shapes | None = None,
    bare: bool = False,
) -> Normalised:
    """Sort the keys of a LoRA file onto the Linears of a module, and its whole tensors onto the parameters (`shapes`).

    stated: what a configuration says of alpha; without it and without `.alpha` keys alpha is r. bare: see `Pair`. Raises
    CheckpointError on adapters of another kind, halves without their other half, and shapes that do not fit.
    """
    refuse_foreign(state)
    entries, labels, unmatched = _entries(state)
    table = _Names(linears)
    pairs: dict[str, Pair] = {}
    styles: set[str] = set()
    for stem, entry in entries.items():
        targets, prefix, original = table.find(stem)
        if not targets or not (entry.down or entry.up):
            unmatched.extend(entry.keys)
            continue
        for module, pair in _pairs(stem, entry, targets, linears, stated, bare):
            if module in pairs:
                raise CheckpointError(f"{stem}: expected one LoRA for {module}, found a second one in the same file.")
            pairs[module] = pair
        styles.add(f"{prefix}*.{labels[stem]}" + (" (original names)" if original else ""))
    whole = _whole(state, unmatched, shapes or {})
    unmatched = [key for key in unmatched if key not in whole.values()]
    if whole:
        styles.add(f"{len(whole)} whole tensors")
    order = {key: i for i, key in enumerate(state)}
    tensors = {name: state[key] for name, key in whole.items()}
    return Normalised(pairs, tuple(sorted(unmatched, key=order.__getitem__)), " + ".join(sorted(styles)), tensors)


def refuse_foreign(state: Mapping[str, torch.Tensor]) -> None:
    """CheckpointError where the file holds adapters that are no LoRA, naming their kind."""
    for key in state:
        parts = key.split(".")
        for mark, kind in _FOREIGN.items():
            if any(part.startswith(mark) for part in parts[1:]):
                raise CheckpointError(
                    f"expected a LoRA, found {kind} (`{key}`). Only LoRA and DoRA are applied here: merge this adapter into "
                    "the weights with the tool that made it, or load it with ComfyUI's LoRA node."
                )


def is_mllm(names: Mapping[str, object]) -> bool:
    """Whether these are module or parameter names of a Qwen2.5-VL as transformers has it in memory."""
    return any(name.startswith("model.language_model.layers.") for name in names)


def short_name(name: str) -> str:
    """A name of the MLLM in memory without its root: `layers.0...`, `visual.blocks.0...`, `lm_head`."""
    root = next((root for root in MLLM_ROOTS if name.startswith(root)), "")
    return name.removeprefix(root)


def _entries(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, _Entry], dict[str, str], list[str]]:
    """(entries by stem, form by stem, keys of no known form)."""
    entries: dict[str, _Entry] = {}
    labels: dict[str, str] = {}
    unmatched = []
    for key, value in state.items():
        match, form = next(((m, name) for pattern, name in _FORMS if (m := pattern.match(key))), (None, ""))
        if match is None:
            unmatched.append(key)
            continue
        stem, role, extra = match.groups()
        entry = entries.setdefault(stem, _Entry())
        entry.keys.append(key)
        if role in ("alpha", "dora_scale", "lora_magnitude_vector"):
            _note(entry, role, key, value)
            continue
        half = entry.down if role in ("down", "A") else entry.up
        part = int(extra) if extra and extra.isdigit() else 0
        if part in half:
            raise CheckpointError(f"{key}: expected one adapter, found several for {stem}. Keep one of them in the file.")
        half[part] = value
        split = extra is not None and extra.isdigit()
        labels[stem] = form + (".k" if split else extra or "")
    return entries, labels, unmatched


def _note(entry: _Entry, role: str, key: str, value: torch.Tensor) -> None:
    """Take down what stands beside the two halves."""
    if role == "alpha":
        if value.numel() != 1:
            raise CheckpointError(f"{key}: expected one number, found a tensor of shape {tuple(value.shape)}.")
        entry.alpha = float(value)
        return
    if entry.magnitude is not None:
        raise CheckpointError(f"{key}: expected one magnitude for the module, found a second one. Keep one in the file.")
    entry.magnitude = value[:, None] if value.ndim == 1 else value


def _whole(state: Mapping[str, torch.Tensor], keys: list[str], shapes: Shapes) -> dict[str, str]:
    """{parameter name: key} of the keys that replace a whole parameter.

    As in ComfyUI `<module>.set_weight` is the weight, `<parameter>.set_weight` any other parameter.
    """
    names: dict[str, str] = {}
    for name in shapes:
        names[name.removesuffix(".weight")] = name
    find = _finder(names, is_mllm(shapes))
    found: dict[str, str] = {}
    for key in keys:
        if not key.endswith(SET):
            continue
        name = names.get(find(key.removesuffix(SET))[0], "")
        if not name:
            continue
        if name in found:
            raise CheckpointError(f"{key}: expected one tensor for {name}, found a second one in the same file.")
        if tuple(state[key].shape) != tuple(shapes[name]):
            raise CheckpointError(
                f"{key}: expected {tuple(shapes[name])} for {name}, found {tuple(state[key].shape)}: the file was made for "
                "another model."
            )
        found[name] = key
    return found


def _finder(names: Mapping[str, object], mllm: bool) -> Callable[[str], tuple[str, str]]:
    """Looks a dotted stem up in `names`: stem -> (name or "", prefix that stood before it)."""
    short = {short_name(name): name for name in names} if mllm else {}
    prefixes = MLLM_DOTTED if mllm else DOTTED_PREFIXES

    def find(stem: str) -> tuple[str, str]:
        name, prefix = stem, ""
        while name not in names and name not in short:
            step = next((one for one in prefixes if name.startswith(one)), None)
            if step is None:
                return "", prefix
            name, prefix = name.removeprefix(step), prefix + step
        return short.get(name, name), prefix

    return find


class _Names:
    """Looks the stems of a file up among the module's Linears, under their own and their original names."""

    def __init__(self, linears: Linears) -> None:
        self.mllm = is_mllm(linears)
        self.dotted: dict[str, tuple[str, ...]] = {name: (name,) for name in linears}
        fused: dict[str, dict[int, str]] = {}
        # Only Step1X has original names: on Qwen-Image they would let a FLUX LoRA in, whose sizes happen to fit.
        is_step1x = any(name.startswith("connector.") for name in linears)
        for name in linears:
            place = step1x_original(name) if is_step1x else None
            if place and place[0] not in self.dotted:
                fused.setdefault(place[0], {})[place[1]] = name
        self.original = {name: tuple(parts[i] for i in sorted(parts)) for name, parts in fused.items()}
        named = {(short_name(name) if self.mllm else name): name for name in (*self.original, *self.dotted)}
        self.flat = {name.replace(".", "_"): full for name, full in named.items()}
        self.look_up = _finder({**self.dotted, **self.original}, self.mllm)

    def find(self, stem: str) -> tuple[tuple[str, ...], str, bool]:
        """(target modules, prefix found, whether the name was an original one); no targets where it is unknown."""
        for prefix in MLLM_FLAT if self.mllm else FLAT_PREFIXES:
            if stem.startswith(prefix):
                return self._flat(stem.removeprefix(prefix), prefix)
        name, prefix = self.look_up(stem)
        return self._targets(name, prefix)

    def _flat(self, name: str, prefix: str) -> tuple[tuple[str, ...], str, bool]:
        while self.mllm and name not in self.flat:
            step = next((one for one in MLLM_FLAT_ROOTS if name.startswith(one)), None)
            if step is None:
                break
            name, prefix = name.removeprefix(step), prefix + step
        return self._targets(self.flat.get(name, ""), prefix)

    def _targets(self, name: str, prefix: str) -> tuple[tuple[str, ...], str, bool]:
        return self.dotted.get(name) or self.original.get(name, ()), prefix, name in self.original


def _pairs(
    stem: str, entry: _Entry, targets: tuple[str, ...], linears: Linears, stated: Stated | None, bare: bool
) -> list[tuple[str, Pair]]:
    """The pairs of one stem: one for each module it stands for."""
    if set(entry.down) != set(entry.up):
        raise CheckpointError(f"{stem}: expected a down and an up matrix, found only {', '.join(entry.keys)}.")
    outs = [linears[target][1] for target in targets]
    if set(entry.up) == {0}:
        down, up = entry.down[0], entry.up[0]
        ups = split_rows(up, outs, f"{stem} (up)") if len(targets) > 1 else (up,)
        halves = [(down, part) for part in ups]
    else:
        if sorted(entry.up) != list(range(len(targets))):
            raise CheckpointError(
                f"{stem}: expected {len(targets)} split parts ({', '.join(targets)}), found parts {sorted(entry.up)}."
            )
        halves = [(entry.down[i], entry.up[i]) for i in range(len(targets))]
    magnitudes = _magnitudes(stem, entry.magnitude, targets, linears)
    result = []
    for target, (down, up), magnitude in zip(targets, halves, magnitudes, strict=True):
        down, up = _matrix(down), _matrix(up)
        _check_shapes(stem, target, down, up, linears[target])
        if target == SWAPPED and "adaLN" in stem:
            up = swap_halves(up)
            magnitude = swap_halves(magnitude) if magnitude is not None and magnitude.shape[1] == 1 else magnitude
        rank = down.shape[0]
        if entry.alpha is not None:
            gain = entry.alpha / rank
        else:
            gain = stated.gain(target, rank) if stated else 1.0
        result.append((target, Pair(down, up, gain, magnitude, bare)))
    return result


def _magnitudes(
    stem: str, magnitude: torch.Tensor | None, targets: tuple[str, ...], linears: Linears
) -> list[torch.Tensor | None]:
    """The magnitude of each target: rows of a fused weight are split; its columns have a norm over all parts, which no part
    knows."""
    if magnitude is None:
        return [None] * len(targets)
    ins, outs = linears[targets[0]][0], [linears[target][1] for target in targets]
    if tuple(magnitude.shape) == (sum(outs), 1):
        return list(split_rows(magnitude, outs, f"{stem} (dora_scale)"))
    if tuple(magnitude.shape) == (1, ins) and len(targets) == 1:
        return [magnitude]
    raise CheckpointError(
        f"{stem}: expected a DoRA magnitude of shape ({sum(outs)}, 1)"
        + (f" or (1, {ins})" if len(targets) == 1 else ", as the weight is fused")
        + f", found {tuple(magnitude.shape)}: the DoRA was made for another model."
    )


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """1 x 1 convolutions written for Linears are taken as the matrices they are."""
    return tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _check_shapes(stem: str, target: str, down: torch.Tensor, up: torch.Tensor, size: tuple[int, int]) -> None:
    fits = down.ndim == up.ndim == 2 and down.shape[1] == size[0] and up.shape[0] == size[1] and down.shape[0] == up.shape[1]
    if not fits:
        raise CheckpointError(
            f"{stem}: expected down (r, {size[0]}) and up ({size[1]}, r) for {target}, found {tuple(down.shape)} and "
            f"{tuple(up.shape)}: the LoRA was made for another model."
        )
