"""E_T of ReasonBrain: the states of the diffusion model's own text encoder (CLIP of SD, or T5).

B batch, L the encoder's length (77 of CLIP), O objects, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError


class TextStates:
    """A frozen text encoder with its tokenizer. length: tokens that a text is padded and cut to."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, length: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.config
        self.width: int = getattr(config, "hidden_size", None) or config.d_model
        # A tokenizer saved without a limit states a length of 1e30.
        self.length = length or min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
        self._null: Tensor | None = None

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> states (B, L, D) after the final norm and mask (B, L) of the tokens that are text."""
        ids, keep = self._ids(texts)
        with torch.no_grad():
            # SD is trained on states in whose making CLIP saw the padding; the causal mask keeps text tokens free of it.
            mask = None if self._causal else keep.long()
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state, keep

    def names(self, rows: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Names of objects of several pictures -> one vector each (B, O, D), from its last token, and mask (B, O).

        Raises ConfigError for a picture without names.
        """
        for n, row in enumerate(rows):
            if not row or not all(name.strip() for name in row):
                raise ConfigError(
                    f"expected the names of objects of picture {n}, found {list(row)}. Name what the instruction is about; the "
                    "whole instruction can be the one object."
                )
        most = max(map(len, rows))
        states, keep = self.states([name for row in rows for name in row])
        last = keep.sum(dim=1) - 1
        vectors = states[torch.arange(len(last), device=last.device), last].split([len(row) for row in rows])
        padded = [torch.nn.functional.pad(v, (0, 0, 0, most - len(v))) for v in vectors]
        valid = torch.tensor([[n < len(row) for n in range(most)] for row in rows], device=states.device)
        return torch.stack(padded), valid

    def null(self) -> Tensor:
        """States of the empty text (1, L, D): the context of the passes without an instruction."""
        if self._null is None:
            self._null = self.states([""])[0]
        return self._null

    @property
    def _causal(self) -> bool:
        return "clip" in self.model.config.model_type

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        device = next(self.model.parameters()).device
        return tokens.input_ids.to(device), tokens.attention_mask.to(device, torch.bool)


def load_text_states(
    encoder: str | Path, tokenizer: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TextStates:
    """Load a text encoder (CLIPTextModel or T5EncoderModel) and its tokenizer from local folders. Raises CheckpointError."""
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    from ..weightfiles import read_json, weight_files

    encoder, tokenizer = Path(encoder), Path(tokenizer)
    for folder, file in ((encoder, "config.json"), (tokenizer, "tokenizer_config.json")):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: expected a folder with {file}, found none. Name a part of a pipeline.")
    kinds = {"clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
    kind = read_json(encoder / "config.json").get("model_type")
    if kind not in kinds:
        raise CheckpointError(f"{encoder}: expected a text encoder out of {', '.join(kinds)}, found model_type {kind!r}.")
    weight_files(encoder)
    model = kinds[kind].from_pretrained(str(encoder), dtype=dtype, local_files_only=True)
    return TextStates(model.to(device), AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True))
