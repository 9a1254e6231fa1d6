"""LLaVA as ReasonBrain uses it: features of the picture, one pass over embeddings, states and logits at the [IMG] tokens.

Any folder in transformers' LLaVA layout (`LlavaForConditionalGeneration`). B batch, N vision tokens, L tokens of a row, M width
of the language model, r number of [IMG] tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files import write_json
from ..weightfiles import read_json, weight_files
from .focus import LOOKED, Focus, focused_pass, use_focus

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)"
"""Attention projections of the language model and not of the vision tower, which has layers of the same names."""

LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
IMAGE_TOKEN = "<image>"
VICUNA = ("USER: ", "\n{} ASSISTANT:")
"""What stands before and behind the picture where the folder has no chat template: the form of LLaVA 1.5."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Look:
    """What the frozen vision tower sees. image: E_I(I) (B, N, d_v); taps: (B, N, taps * d_v)."""

    image: Tensor
    taps: Tensor


class Llava:
    """A LLaVA with r tokens `[IMG_1]` .. `[IMG_r]` in its vocabulary. Built by `load_llava`.

    model: the LlavaForConditionalGeneration. peft: the same behind its LoRA, None before `add_lora` or `load_lora`.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        img_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.mean, self.std = tuple(mean), tuple(std)
        self.peft: Any = None
        self.focus = Focus()
        self._attention: str | None = None
        config = model.config
        self.image_size: int = config.vision_config.image_size
        self.grid: int = self.image_size // config.vision_config.patch_size
        self.layer: int = config.vision_feature_layer
        self.depth: int = config.vision_config.num_hidden_layers
        self.img_names = tuple(f"[IMG_{n}]" for n in range(1, img_tokens + 1))
        self.img_ids = _add_tokens(model, tokenizer, self.img_names, seed)
        model.requires_grad_(False)

    @property
    def projector(self) -> torch.nn.Module:
        """IA of eq. 3, LLaVA's own projector (the paper trains it)."""
        return self.model.model.multi_modal_projector

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def widths(self) -> dict[str, int]:
        """Vision width, grid side and language width, under the names of the fields of `BrainSpec`."""
        config = self.model.config
        return {"vision": config.vision_config.hidden_size, "grid": self.grid, "language": config.text_config.hidden_size}

    def look(self, pictures: Tensor, taps: Sequence[float] = (1.0,)) -> Look:
        """One pass of the vision tower over pictures (B, 3, H, W) in 0..1.

        The whole picture is resized to the tower's square without a crop, so that a vision token and a latent of one relative
        place show the same thing. taps: fractions of the depth of the layer that LLaVA reads.
        """
        size = (self.image_size, self.image_size)
        pixels = torch.nn.functional.interpolate(pictures.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(x, device=pixels.device).view(1, 3, 1, 1) for x in (self.mean, self.std))
        tower = self.model.model.vision_tower
        pixels = ((pixels - mean) / std).to(tower.device, tower.dtype)
        with torch.no_grad():
            states = tower(pixels, output_hidden_states=True).hidden_states
        last = self.layer if self.layer >= 0 else len(states) + self.layer
        skip = 1 if self.model.config.vision_feature_select_strategy == "default" else 0  # the class token
        tapped = [states[max(1, round(tap * last))][:, skip:] for tap in taps]
        return Look(states[last][:, skip:], torch.cat(tapped, dim=-1))

    def prompt(self, instruction: str) -> tuple[list[int], list[int]]:
        """Token ids before and behind the picture, the instruction among the latter, up to where the reply begins."""
        before, after = VICUNA[0], VICUNA[1].format(instruction)
        if self.tokenizer.chat_template:
            before, _, after = self._templated(instruction).partition(IMAGE_TOKEN)
        # A template may write the start token itself; it must stand there once.
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(before, add_special_tokens=not (bos and before.startswith(bos))).input_ids
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids, self.tokenizer(after, add_special_tokens=False).input_ids

    def _templated(self, instruction: str) -> str:
        """The folder's chat template filled in, with the picture's token once before the instruction. ConfigError else.

        Templates of LLaVA-1.5-hf read a list of parts; those that a language model came with (Phi-3) add strings up, and fail
        on a list or print it.
        """
        listed = [{"type": "image"}, {"type": "text", "text": instruction}]
        found = ""
        for content in (listed, f"{IMAGE_TOKEN}\n{instruction}"):
            message = [{"role": "user", "content": content}]
            try:
                text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # whatever a template of its folder raises: TypeError, jinja2's own errors
                found = found or f"{type(error).__name__}: {error}"
                continue
            told = text.partition(IMAGE_TOKEN)[2]
            if text.count(IMAGE_TOKEN) - instruction.count(IMAGE_TOKEN) == 1 and instruction.strip() in told:
                return text
            found = repr(text[:200])
        raise ConfigError(
            f"expected a chat template that writes {IMAGE_TOKEN} once and the instruction behind it, found {found}. Correct "
            "the folder's chat_template, or remove it: then the form of LLaVA 1.5 is used."
        )

    def embed(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids of several rows -> embeddings (B, L, M) and mask (B, L), padded on the right."""
        length = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=self.device, dtype=torch.long)
        keep = torch.tensor([[n < len(row) for n in range(length)] for row in rows], device=self.device, dtype=torch.bool)
        return self.model.get_input_embeddings()(ids.view(len(rows), length)), keep.view(len(rows), length)

    def set_focus(self, focus: Focus) -> None:
        """Turn the options of `focus` on (or off) for all further passes; they are off at first. Interpretation, see there.

        Raises ConfigError where no layer is left behind those that see every token.
        """
        layers = self.model.config.text_config.num_hidden_layers
        if focus.token_select and layers <= LOOKED:
            raise ConfigError(f"token_select: expected a LLaVA of more than {LOOKED} layers, found {layers}. Set it to 0.")
        if bool(focus) != bool(self.focus):
            config = self.model.model.language_model.config
            self._attention = use_focus(config, self._attention if self.focus else None)
        self.focus = focus

    def run(
        self, tokens: Tensor, keep: Tensor, positions: Tensor, *, logits: bool = False, roles: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over a row that ends in the r [IMG] tokens: tokens (B, L, M), keep and positions (B, L).

        -> V (B, r, M), the states at these tokens (after the final norm), and with `logits` (B, r, vocabulary), what is
        predicted at the places before each of them (eq. A1). roles (B, L): of `focus`, read where its token_select is on.
        """
        r, language = len(self.img_names), self.model.model.language_model
        tokens = tokens.to(self.model.dtype)
        if self.focus:
            states = focused_pass(language, tokens, keep, positions, self.focus, roles)
        else:
            states = language(
                inputs_embeds=tokens, attention_mask=keep.long(), position_ids=positions, use_cache=False
            ).last_hidden_state
        said = self.model.lm_head(states[:, -r - 1 : -1]) if logits else None
        return states[:, -r:], said

    def add_lora(self, rank: int = 8, alpha: int = 16, dropout: float = 0.05) -> None:
        """Put a LoRA on the language model's attention and make the rows of the [IMG] tokens trainable (and no other row)."""
        from peft import LoraConfig

        rows = {"embed_tokens": list(self.img_ids), "lm_head": list(self.img_ids)}
        if self.model.config.text_config.tie_word_embeddings:
            del rows["lm_head"]
        self._wrap(
            LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, trainable_token_indices=rows
            )
        )

    def save_lora(self, folder: str | Path) -> None:
        """Write LoRA and [IMG] rows as a PEFT folder."""
        if self.peft is None:
            raise ConfigError("expected a LLaVA with a LoRA, found one without. Call add_lora first.")
        # Rows are saved as trained tokens; without False peft would add both whole tables because the vocabulary has grown.
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        # Where this LLaVA lies on this machine; peft would warn of it on every other.
        config = Path(folder) / LORA_FILES[0]
        write_json(config, {**read_json(config), "base_model_name_or_path": None})

    def load_lora(self, folder: str | Path) -> None:
        """Read what `save_lora` wrote. Raises CheckpointError unless every key and shape is there, and no other."""
        from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        folder = Path(folder)
        missing = [name for name in LORA_FILES if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: expected a PEFT folder, found no {' and no '.join(missing)}. Name another one.")
        weight_files(folder / LORA_FILES[1])
        state = load_file(folder / LORA_FILES[1])
        if self.peft is None:
            self._wrap(LoraConfig.from_pretrained(str(folder)))
        own = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        faults = [f"{key} is missing" for key in own if key not in state]
        faults += [f"{key} is unknown" for key in state if key not in own]
        both = (key for key in own if key in state and own[key].shape != state[key].shape)
        faults += [f"{key} is {(*state[key].shape,)} and not {(*own[key].shape,)}" for key in both]
        if faults:
            raise CheckpointError(
                f"{folder}: expected the LoRA of this LLaVA ({len(own)} tensors), found {len(faults)} that do not fit: "
                f"{'; '.join(faults[:5])}. Load it with the LLaVA it was trained on."
            )
        set_peft_model_state_dict(self.peft, state)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """LoRA and [IMG] rows by name; empty before `add_lora`."""
        if self.peft is None:
            return {}
        return {n: p for n, p in self.peft.named_parameters() if "lora_" in n or "trainable_tokens" in n}

    def _wrap(self, config: Any) -> None:
        from peft import get_peft_model

        if self.peft is not None:
            raise ConfigError("expected a LLaVA without a LoRA, found one that has it. Load the LLaVA anew.")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.peft = get_peft_model(self.model, config)
        for p in trained:  # peft freezes all that it does not add, the projector too
            p.requires_grad_(True)


def load_llava(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    img_tokens: int = 32,
    seed: int = 0,
) -> Llava:
    """Load a local folder in transformers' LLaVA layout and add the [IMG] tokens (their rows from `seed`).

    Raises CheckpointError for another layout, for LLaVA-NeXT (its tiles do not lie on one grid), for weights that do not match
    the config, and for a folder without a tokenizer.
    """
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    path = Path(path)
    _check_layout(path)
    weight_files(path)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        str(path), dtype=dtype, local_files_only=True, output_loading_info=True
    )
    tied = {"lm_head.weight"} if model.config.text_config.tie_word_embeddings else set()
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        raise CheckpointError(
            f"{path}: expected all weights of its config.json, found {len(missing)} missing: {', '.join(missing[:5])}. "
            "Download the folder again, or convert it to the layout of transformers."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a tokenizer beside the weights, found none that loads ({error}).") from error
    mean, std = _normalisation(path)
    return Llava(model.to(device).eval(), tokenizer, mean=mean, std=std, img_tokens=img_tokens, seed=seed)


def _check_layout(path: Path) -> None:
    remedy = "Name a folder in transformers' LLaVA layout (config.json with model_type llava, such as llava-1.5-7b-hf)."
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: expected a LLaVA folder with a config.json, found none. {remedy}")
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind != "llava" or "vision_config" not in config or "text_config" not in config:
        more = " Its tiles do not lie on one grid." if kind == "llava_next" else ""
        found = f"model_type {kind!r}" if kind != "llava" else "no vision_config and text_config"
        raise CheckpointError(f"{path}: expected a LLaVA folder, found {found}.{more} {remedy}")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(f"{path}: expected one vision_feature_layer, found {layer!r}. {remedy}")
    size, patch = (config["vision_config"].get(name, default) for name, default in (("image_size", 336), ("patch_size", 14)))
    if not isinstance(size, int) or not isinstance(patch, int) or size % patch:
        raise CheckpointError(f"{path}: expected an image_size that patch_size divides, found {size} and {patch}. {remedy}")


def _normalisation(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the folder's image processor, CLIP's where it has none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).is_file():
            values = read_json(path / name)
            values = values.get("image_processor", values)
            if "image_mean" in values:
                return values["image_mean"], values["image_std"]
    return CLIP_MEAN, CLIP_STD


@torch.no_grad()
def _add_tokens(model: Any, tokenizer: Any, names: Sequence[str], seed: int) -> tuple[int, ...]:
    """Put `names` into tokenizer and tables. New rows start at the table's mean, with a little noise to tell them apart."""
    known = set(tokenizer.get_vocab())
    tokenizer.add_tokens(list(names), special_tokens=True)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(names)))
    fresh = [n for n, name in zip(ids, names, strict=True) if name not in known]
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    rng = torch.Generator().manual_seed(seed)
    tables = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    for table in tables.values():
        mean = table[: min(rows, min(ids))].float().mean(dim=0)
        for row in fresh:
            table[row] = (mean + 0.02 * torch.randn(mean.shape, generator=rng).to(mean)).to(table)
    return ids
