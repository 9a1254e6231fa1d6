"""What can be trained, by name: which part, as LoRA or in full, and which of its names.

A preset is a row; another objective (ReasonBrain's) adds its own with `register_preset`. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..reasonedit_core.errors import ConfigError
from .config import TrainSet

MLLM, DIT = "mllm", "dit"
BRAIN, LLAVA, DENOISER = "brain", "llava", "denoiser"
"""Parts of a ReasonBrain: its own modules; LLaVA with its [IMG] rows; the UNet or FLUX transformer."""

LORA, FULL = "lora", "full"
ANY = ""
"""The row of names that serves every system without one of its own."""

Names = Mapping[str, tuple[str, ...]]
"""Regular expressions by system; a name is in the set when one matches the whole of it."""


@dataclass(frozen=True, slots=True)
class Preset:
    """part: mllm or dit. mode: lora (names are those of modules) or full (names of parameters). include, exclude: by system.
    random: the weights are drawn anew unless the stage starts from trained ones."""

    part: str
    mode: str
    include: Names
    exclude: Names
    random: bool = False
    what: str = ""

    def names(self, system: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(include, exclude) for a system."""
        return tuple(table.get(system, table.get(ANY, ())) for table in (self.include, self.exclude))  # type: ignore[return-value]


_S, _Q, _BRAIN = "reasonedit-s", "reasonedit-q", "reasonbrain"

# What joins the MLLM's states to the DiT. Step1X-Edit has a connector with a refiner of its own; in Qwen-Image a norm and
# one Linear stand in its place.
_CONNECTOR = {_S: (r"connector\..+", r"text_token_mapping\..+"), _Q: (r"txt_norm\..+", r"txt_in\..+")}

_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"

# All Linears of the blocks but those of the modulation, as the public trainers choose them.
_DIT_LINEARS = {
    _S: (
        rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2))",
        r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)",
    ),
    _Q: (rf"transformer_blocks\.\d+\.({_ATTENTION}|(img|txt)_mlp\.net\.(0\.proj|2))",),
}

_FIRST = {_BRAIN: (r"(conv_in|x_embedder)\..+",)}

PRESETS: dict[str, Preset] = {
    "mllm_lora": Preset(
        MLLM,
        LORA,
        {ANY: (r"model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",)},
        {},
        what="LoRA on the attention Linears of the language model",
    ),
    "mllm_base": Preset(MLLM, FULL, {ANY: (r".+",)}, {}, what="all weights of the MLLM, the vision tower as well"),
    "connector": Preset(DIT, FULL, _CONNECTOR, {}, what="what joins the MLLM's states to the DiT"),
    "dit": Preset(DIT, FULL, {ANY: (r".+",)}, _CONNECTOR, what="all weights of the DiT but the connector's"),
    "dit_lora": Preset(DIT, LORA, _DIT_LINEARS, {}, what="LoRA on the Linears of the DiT's blocks"),
    "dit_base": Preset(DIT, FULL, {ANY: (r".+",)}, {}, random=True, what="DiT and connector, from random weights"),
    "brain": Preset(BRAIN, FULL, {_BRAIN: (r".+",)}, {}, what="FRCE, token assembler, QFormer and CME"),
    "qformer": Preset(BRAIN, FULL, {_BRAIN: (r"qformer\..+",)}, {}, what="the QFormer alone"),
    # Names of the [IMG] rows and of the LoRA; which Linears get one is `mllm.llava.LORA_TARGETS`.
    "llava_lora": Preset(
        LLAVA,
        LORA,
        {_BRAIN: (r".*\.(lora_[AB]|trainable_tokens_delta)\..+",)},
        {},
        what="LoRA on the attention of LLaVA's language model, and the rows of the [IMG] tokens",
    ),
    "projector": Preset(LLAVA, FULL, {_BRAIN: (r"model\.multi_modal_projector\..+",)}, {}, what="IA, LLaVA's projector"),
    "denoiser": Preset(DENOISER, FULL, {_BRAIN: (r".+",)}, _FIRST, what="all weights of the denoiser but its first layer"),
    "denoiser_attention": Preset(DENOISER, FULL, {_BRAIN: (r".*attn\d?\..+",)}, {}, what="the attention of the denoiser"),
    "denoiser_context": Preset(
        DENOISER, FULL, {_BRAIN: (r".*attn2\.to_[kv]\..+",)}, {}, what="what reads the context in the UNet's cross-attention"
    ),
    "denoiser_lora": Preset(DENOISER, LORA, {_BRAIN: (r".*\.lora_[AB]\..+",)}, {}, what="LoRA on the denoiser's attention"),
    "denoiser_first": Preset(DENOISER, FULL, _FIRST, {}, what="the first layer, which is widened to see the source"),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """A trainable set of a stage with everything filled in: the preset's row and what the recipe says otherwise."""

    name: str
    part: str
    mode: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    random: bool
    table: TrainSet


def register_preset(name: str, preset: Preset) -> None:
    """Add a preset; the engine and the recipes know it from then on."""
    if name in PRESETS:
        raise ConfigError(f"expected a new name for a preset, found {name!r}, which is taken: choose another")
    PRESETS[name] = preset


def choose(name: str, table: TrainSet, system: str) -> Chosen:
    """The set `name` of a stage. Raises ConfigError for a name that is no preset and says not enough about itself."""
    preset = PRESETS.get(name)
    if preset is None:
        if not (table.part and table.mode and table.include):
            raise ConfigError(
                f"train.{name}: expected a preset ({', '.join(PRESETS)}), or a set of one's own with part, mode and include; "
                f"found {name!r}."
            )
        return Chosen(name, table.part, table.mode, table.include, table.exclude, table.init == "random", table)
    for field, own in (("part", preset.part), ("mode", preset.mode)):
        said = getattr(table, field)
        if said not in (None, own):
            raise ConfigError(f"train.{name}.{field}: expected {own}, as the preset has it, found {said}: leave it out.")
    include, exclude = preset.names(system)
    random = preset.random if table.init is None else table.init == "random"
    if random and preset.mode == LORA:
        raise ConfigError(f"train.{name}.init: expected nothing, as a LoRA always starts at zero, found 'random'.")
    return Chosen(name, preset.part, preset.mode, table.include or include, (*exclude, *table.exclude), random, table)
