"""Qwen2.5-VL as one object with two roles: it conditions the denoiser and it reasons.

Thin over the transformers model: pictures are prepared by `vision.py`, positions are explicit (`positions.py`), the state of
the model is never changed (released code leaves `rope_deltas` behind in it), and what differs between transformers 4.55 and 5
is kept in `_vision_tower` and `language_model`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, ConfigError
from ..types import Counts
from .positions import rope_positions
from .vision import Shown, patchify, prepare

if TYPE_CHECKING:
    from .cache import PrefixStore
    from .constrain import Vocabulary
    from .steps import Stepping

log = logging.getLogger(__name__)

VISION_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
"""The system message that the template of Qwen2.5-VL puts in when there is none."""

FEATURES_KEPT = 16

MASKS = ("full_attention", "sliding_attention")
"""Keys of a prepared mask mapping; a mask of None there means causal. Left to itself, transformers 4.55 reads jumps in 3-D
positions as the borders of packed documents when no cache is used, and cuts attention there without a word."""


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the vision tower made of one picture: tokens (n, D), grid (height, width) in tokens, resized (H, W) in pixels.

    key names picture and size: equal keys, equal tokens.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    resized: tuple[int, int]
    key: str = ""


class QwenVL:
    """A loaded Qwen2.5-VL. Made by `load.load_mllm`.

    model: transformers' Qwen2_5_VLForConditionalGeneration; its lm_head may be None (conditioning only). counts: shared with
    the run; replace it for a new run. bounds: (min, max) pixels stated by the checkpoint's processor config, or None.
    repetition_penalty: stated by the checkpoint's generation config (1.05 in the stock model), used in free text. guesses:
    whether greedy replies are guessed ahead (`lookup`), which may be set.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        counts: Counts | None = None,
        bounds: tuple[int, int] | None = None,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config
        self.counts = counts if counts is not None else Counts()
        self.bounds = bounds
        self.repetition_penalty = repetition_penalty
        self.image_token_id = int(self.config.image_token_id)
        self._features: OrderedDict[tuple[str, torch.device], VisionFeatures] = OrderedDict()
        self._shown = Shown(FEATURES_KEPT)
        self._vocabulary: Vocabulary | None = None
        self._prefixes: PrefixStore | None = None
        self._stepping: Stepping | None = None
        self.guesses = True

    @property
    def device(self) -> torch.device:
        """Where the weights are now."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the language model's weights."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def hidden_size(self) -> int:
        """D, the width of the states."""
        return self.config.get_text_config().hidden_size

    @property
    def can_generate(self) -> bool:
        """Whether the weights hold an lm_head (its own, or tied to the embeddings)."""
        return self.model.lm_head is not None

    # pictures

    def vision(
        self,
        image: torch.Tensor,
        *,
        min_pixels: int,
        max_pixels: int,
        max_side: int | None = None,
        snap: bool = False,
    ) -> VisionFeatures:
        """Features of a picture (1, 3, H, W) in 0..1. A picture already seen at this size costs no pass.

        max_side, snap: see `vision.prepare`. The very tensor that was shown before is known without a look at its pixels.
        """
        how = (min_pixels, max_pixels, max_side, snap)
        slot = (self._shown.key_of(image, how) or "", self.device)
        if slot in self._features:
            self._features.move_to_end(slot)
            return self._features[slot]
        pixels, size, key = prepare(image, min_pixels=min_pixels, max_pixels=max_pixels, max_side=max_side, snap=snap)
        self._shown.note(image, how, key)
        slot = (key, self.device)
        if slot in self._features:
            self._features.move_to_end(slot)
            return self._features[slot]
        patches = patchify(pixels, size, key)
        with torch.no_grad():
            tokens = _vision_tower(self.model, patches.values.to(self.device), patches.grid)
        self.counts.vision_passes += 1
        height, width = patches.grid
        features = VisionFeatures(tokens, (height // 2, width // 2), size, key)
        self._features[slot] = features
        while len(self._features) > FEATURES_KEPT:
            self._features.popitem(last=False)
        return features

    def release(self) -> None:
        """Forget all kept features, KV prefixes and graphs. Needed after a change of the weights, as of a LoRA."""
        self._features.clear()
        self._prefixes = None
        if self._stepping is not None:
            self._stepping.release()

    # text

    def render(
        self,
        system: str | None,
        parts: Sequence[str | int],
        *,
        n_images: int,
        add_vision_id: bool = False,
        generation_prompt: bool = True,
    ) -> str:
        """One system and one user turn in the chat template, with one placeholder token per picture.

        parts: text, and indices (0 <= i < n_images) where a picture stands. add_vision_id: number the pictures
        ("Picture 1: "). The content is handed to the template as one string: a text-only template (the tokenizer that
        ComfyUI carries) then does as well as that of the vision model, and both agree.
        """
        content, shown = "", 0
        for part in parts:
            if isinstance(part, str):
                content += part
                continue
            if not 0 <= part < n_images:
                raise ConfigError(f"expected a picture index in 0..{n_images - 1}, found {part}.")
            shown += 1
            content += (f"Picture {shown}: " if add_vision_id else "") + VISION_BLOCK
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        if system is None:
            messages.insert(0, {"role": "system", "content": DEFAULT_SYSTEM})
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return turns + ("<|im_start|>assistant\n" if generation_prompt else "")

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered text; nothing is added or cut."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is not None:  # what the call below ends in, without its preparations, which take most of its time
            return fast.encode(text, add_special_tokens=False).ids
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def vocabulary(self) -> Vocabulary:
        """The vocabulary as bytes, for constrained replies. Made at the first use."""
        if self._vocabulary is None:
            from .constrain import Vocabulary

            self._vocabulary = Vocabulary.of(self.tokenizer, self.config.get_text_config().vocab_size)
        return self._vocabulary

    def prefixes(self) -> PrefixStore:
        """Kept KV of prompt heads. A store on another device than the weights is dropped: the weights have moved."""
        from .cache import PrefixStore

        if self._prefixes is None or self._prefixes.device != self.device:
            self._prefixes = PrefixStore(self.device)
        return self._prefixes

    def stepping(self) -> Stepping:
        """How decoding steps are made; its `mode` may be set."""
        from .steps import Stepping

        if self._stepping is None:
            self._stepping = Stepping()
        return self._stepping

    # sequences

    def expand(self, ids: Sequence[int], features: Sequence[VisionFeatures]) -> list[int]:
        """Repeat each picture's placeholder once per token. Ids that are expanded already come back as they are."""
        return [ids[i] for i in self._expansion(ids, features)]

    def _expansion(self, ids: Sequence[int], features: Sequence[VisionFeatures]) -> list[int]:
        """Indices into `ids`, a placeholder's repeated."""
        found = sum(token == self.image_token_id for token in ids)
        lengths = [len(feature.tokens) for feature in features]
        if found == sum(lengths):
            return list(range(len(ids)))
        if found != len(lengths):
            raise ConfigError(
                f"expected one <|image_pad|> per picture ({len(lengths)}) or one per vision token ({sum(lengths)}) in the "
                f"prompt, found {found}. Remove the control token from the text, or pass as many pictures as it shows."
            )
        remaining = iter(lengths)
        indices: list[int] = []
        for i, token in enumerate(ids):
            indices += [i] * (next(remaining) if token == self.image_token_id else 1)
        return indices

    def embed(self, ids: Sequence[int], features: Sequence[VisionFeatures] = ()) -> torch.Tensor:
        """Input embeddings (1, T, D): those of the table, and the pictures' features at their placeholders.

        ids: token ids, placeholders expanded or not (T counts them expanded). features: in the order of the placeholders.
        """
        tokens = torch.tensor([self.expand(ids, features)], dtype=torch.long, device=self.device)
        embeds = self.model.get_input_embeddings()(tokens)
        if features:
            pictures = torch.cat([feature.tokens.to(embeds) for feature in features])
            embeds = embeds.masked_scatter((tokens == self.image_token_id).unsqueeze(-1), pictures)
        return embeds

    def positions(
        self,
        ids: Sequence[int],
        features: Sequence[VisionFeatures] = (),
        masked: Sequence[bool] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """M-RoPE positions (3, 1, T) on the CPU. masked: one bool per entry of `ids`, see `rope_positions(hidden=)`."""
        indices = self._expansion(ids, features)
        hidden = None if masked is None else torch.as_tensor(masked, dtype=torch.bool).flatten().cpu()[indices]
        return rope_positions(
            [ids[i] for i in indices],
            [feature.grid for feature in features],
            image_token_id=self.image_token_id,
            merge=1,
            hidden=hidden,
        )

    def states(self, embeds: torch.Tensor, positions: torch.Tensor, *, shown: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states (1, T, D), after the final norm. No lm_head is run.

        embeds (1, T, D); positions (3, 1, T); shown (T,) bool: false for tokens that no token may attend to.
        """
        mask = None
        if shown is not None and not bool(shown.all()):
            causal = torch.ones(len(shown), len(shown), dtype=torch.bool, device=shown.device).tril()
            mask = (causal & shown)[None, None].to(embeds.device)
        output = language_model(self.model)(
            inputs_embeds=embeds,
            position_ids=positions.to(embeds.device),
            attention_mask=dict.fromkeys(MASKS, mask),
            use_cache=False,
        )
        return output.last_hidden_state

    def require_lm_head(self) -> None:
        """Raise CheckpointError when these weights cannot speak."""
        if not self.can_generate:
            raise CheckpointError(
                "the MLLM was loaded without lm_head.weight, which reasoning needs. Use a file or folder that holds it (a "
                "Qwen2.5-VL folder, the text_encoder/ of Step1X-Edit v1p2, a ComfyUI text encoder with lm_head), or let "
                "another reasoner think and reflect (--reasoner none or remote:URL; in ComfyUI, Load Reasoner)."
            )


def _vision_tower(model: Any, values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Patches (n, 1176) of one picture -> merged tokens (n / 4, D)."""
    visual = model.model.visual
    grid_thw = torch.tensor([[1, *grid]], dtype=torch.long, device=values.device)
    output = visual(values.to(visual.dtype), grid_thw=grid_thw)
    return output if isinstance(output, torch.Tensor) else output.pooler_output  # transformers 4.55 | 5


def language_model(model: Any) -> Any:
    """The decoder without lm_head: embeddings in, states after the final norm out."""
    return model.model.language_model
