"""The conditioner of ReasonEdit-S: picture and instruction through Qwen2.5-VL, its last states handed to the connector.

Quoted characters are tokenised one by one, so that the DiT can spell them. How quotes are found, how long the text may be
and where a token stands in the DiT's positions differs between v1.0 / v1.1 and v1.2; this page holds all of it.

B is 1 throughout; T counts tokens after the picture's placeholder is repeated once per vision token.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from ..mllm.vision import preprocess
from ..types import Conditioning
from .document import CondDocument, unseen

if TYPE_CHECKING:
    from ..mllm.qwen25vl import QwenVL, VisionFeatures

log = logging.getLogger(__name__)

CELL = 28
"""Pixels of the MLLM's picture that become one vision token, per side."""

RESERVED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")

QUOTE_IDS = (2073, 854)
"""Ids of the opening and closing curly quote in Qwen's vocabulary, as the released v1.x code has them fixed."""

FIRST_QUOTE = 155
"""The released v1.x code looks for quotes behind this character of the rendered prompt, to spare its prefix."""

Span = tuple[int, int]
"""Indices of an opening and a closing quote; the closing one is len(text) when there is none."""

Piece = tuple[str, bool]
"""Text that is tokenised on its own, and whether it is a quoted character."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What belongs to a version. budget: tokens kept (v1.0 and v1.1 are filled up to it with zeros, which the DiT sees).

    dropped, head: leading tokens that the release cuts, and how many its chat template and prefix have together (counted
    with the tokenizer of Qwen2.5); it keeps the prefix's last one.
    """

    budget: int
    max_pixels: int
    dropped: int
    head: int


BLANK = 1024
"""Side in pixels of the black picture that stands where a text to image prompt has none."""

RULES = {
    "v1.0": _Rules(budget=640, max_pixels=324 * CELL**2, dropped=217, head=218),
    "v1.1": _Rules(budget=640, max_pixels=324 * CELL**2, dropped=217, head=218),
    "v1.2": _Rules(budget=2048, max_pixels=400 * CELL**2, dropped=90, head=91),
}


class Step1XConditioner:
    """Picture + instruction -> Conditioning of the Step1X-Edit DiT. Implements `interfaces.Conditioner`.

    prefix: the text that introduces the instruction, from the dialogue pack. dropped_tokens: leading tokens whose states are
    cut, a constant that belongs to prefix and weights; None cuts the chat template's head and the prefix. min_pixels,
    max_pixels: bounds on the picture that the MLLM sees. budget: most tokens kept; None: the released number. blank: side of
    the black picture that is shown where there is none (text to image); the release has 1024 whatever is generated.
    """

    def __init__(
        self,
        mllm: QwenVL,
        *,
        prefix: str,
        dropped_tokens: int | None = None,
        variant: str = "v1.2",
        min_pixels: int = 256 * CELL**2,
        max_pixels: int | None = None,
        budget: int | None = None,
        blank: int = BLANK,
    ) -> None:
        if variant not in RULES:
            raise ConfigError(f"expected a Step1X-Edit variant out of {', '.join(RULES)}, found {variant!r}")
        rules = RULES[variant]
        self.mllm, self.prefix, self.variant = mllm, prefix, variant
        self.min_pixels, self.max_pixels = min_pixels, max_pixels or rules.max_pixels
        self.budget, self.blank = budget or rules.budget, blank
        self._vision_end = mllm.tokenize("<|vision_end|>")[0]
        specials = {str(token) for token in mllm.tokenizer.added_tokens_decoder.values()}
        self._specials = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))
        head = self._render("")
        n_head = len(mllm.tokenize(head[: head.index(prefix) + len(prefix)]))
        self.drop = n_head if dropped_tokens is None else dropped_tokens
        if dropped_tokens == rules.dropped and n_head != rules.head:
            log.warning(
                "%d leading tokens are dropped, as in the release, whose chat template and prefix have %d tokens; here they "
                "have %d, so other states than in training are dropped. Check tokenizer, chat template and dialogue pack.",
                dropped_tokens,
                rules.head,
                n_head,
            )

    def condition(
        self,
        image: torch.Tensor | None,
        instruction: str,
        *,
        grid: tuple[int, int] | None = None,
        references: Sequence[torch.Tensor] = (),
        released: bool = False,
    ) -> Conditioning:
        """image (1, 3, h, w) in 0..1, already at the generated size; the positions of v1.2 are counted in its pixels.

        None: text to image, for which these systems are shown a black picture. grid is not needed (it follows from image).
        released: the quirks of the released code, else they are mended: tokens with id 0 (a lone `!`) lose their place in
        the sequence; in v1.0 and v1.1 every apostrophe is a quote.
        """
        image = self._seen(image, instruction, references)
        features = self.mllm.vision(image, **self._bounds())
        document = self._document(instruction, features, image, released)
        embeds = self.mllm.embed(document.ids.tolist(), [features])
        states = self.mllm.states(embeds, document.positions[:, None], shown=document.shown)
        return self._conditioning(document, embeds[:, document.kept], states[:, document.kept])

    def document(
        self,
        image: torch.Tensor | None,
        instruction: str,
        *,
        references: Sequence[torch.Tensor] = (),
        released: bool = False,
    ) -> CondDocument:
        """What `condition` hands to the MLLM, for the same arguments. Runs no network and needs no weights."""
        image = self._seen(image, instruction, references)
        patches = preprocess(image, **self._bounds())
        return replace(self._document(instruction, unseen(patches), image, released), patches=(patches,))

    def token_ids(self, instruction: str, *, released: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of the whole prompt, one placeholder for the picture, and which ids are quoted characters."""
        text = self._render(instruction)
        if self.variant != "v1.2":
            ids = self._token_ids_v1x(text, released)
            return ids, [False] * len(ids)
        skip = len(self.prefix) if released else text.index(self.prefix) + len(self.prefix)
        ids, quoted = [], []
        for piece, is_quoted in self._pieces_v12(text, skip, released):
            tokens = self.mllm.tokenize(piece)
            ids += tokens
            quoted += [is_quoted] * len(tokens)
        return ids, quoted

    def _render(self, instruction: str) -> str:
        parts = [f"{self.prefix} {instruction}", 0] if self.variant == "v1.2" else [self.prefix, 0, instruction]
        return self.mllm.render(None, parts, n_images=1, add_vision_id=True)

    # v1.2

    def _pieces_v12(self, text: str, skip: int, released: bool) -> list[Piece]:
        """Special tokens, quoted characters and the stretches between them; no quote is looked for before `skip`."""
        pieces: list[Piece] = []
        start = 0
        for end in [*(place for match in self._specials.finditer(text) for place in match.span()), len(text)]:
            part, begin = text[start:end], max(0, skip - start)
            start = end
            if released and begin == 0 and part.startswith("“"):
                part = part[1:]  # the release loses an opening curly quote that nothing precedes, and still quotes
                pieces += split_at(f"“{part}", quotes_v12(f"“{part}"))[1:] if "”" in part else [(part, False)]
            elif part:
                pieces += split_at(part, quotes_v12(part, begin))
        return [piece for piece in pieces if piece[0]]

    # v1.0 and v1.1

    def _token_ids_v1x(self, text: str, released: bool) -> list[int]:
        """Up to the end of the picture the prompt as a whole, from there on piece by piece."""
        whole = self.mllm.tokenize(text)
        if released:
            text = re.sub("['“”]", '"', text)
            spans = quotes_v1x_released(text)
            opening, closing = ([token] for token in QUOTE_IDS)
        else:
            spans = quotes_v1x(text, text.index("<|vision_end|>"))
            marks = {place for span in spans for place in span}
            text = "".join('"' if place in marks else char for place, char in enumerate(text))
            opening, closing = self.mllm.tokenize("“"), self.mllm.tokenize("”")
        pieces: list[int] = []
        for piece, is_quoted in split_at(text, spans):
            tokens = self.mllm.tokenize(f"“{piece}”" if is_quoted else piece)
            wrapped = tokens[: len(opening)] == opening and tokens[-len(closing) :] == closing
            pieces += tokens[len(opening) : -len(closing)] if is_quoted and wrapped else tokens
        if self._vision_end not in pieces:
            raise ConfigError(
                f"the prefix holds an unclosed quote mark behind character {FIRST_QUOTE} of the prompt, so that the picture's "
                "end token is read as quoted text. Take the quote marks out of the dialogue pack's prefix."
            )
        return whole[: whole.index(self._vision_end)] + pieces[pieces.index(self._vision_end) :]

    # both

    def _seen(self, image: torch.Tensor | None, instruction: str, references: Sequence[torch.Tensor]) -> torch.Tensor:
        """The picture that the MLLM is shown; refuses what this system cannot take."""
        if references:
            raise ConfigError(f"ReasonEdit-S (Step1X-Edit) takes no reference pictures, found {len(references)}.")
        for token in RESERVED:
            if token in instruction:
                raise ConfigError(f"the instruction contains the control token {token}; remove it")
        return torch.zeros(1, 3, self.blank, self.blank) if image is None else image

    def _bounds(self) -> dict[str, int | bool]:
        return {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels, "snap": self.variant != "v1.2"}

    def _document(self, instruction: str, features: VisionFeatures, image: torch.Tensor, released: bool) -> CondDocument:
        """The document without its patches. Of features only the sizes are used."""
        ids, quoted = self.token_ids(instruction, released=released)
        hidden = [token == 0 for token in ids] if released else None
        positions = self.mllm.positions(ids, [features], masked=hidden)[:, 0]
        whole = torch.tensor(self.mllm.expand(ids, [features]))
        kept = self._kept(len(whole))
        if self.variant != "v1.2":
            shown = whole != 0 if released and any(hidden) else None
            return CondDocument(whole, positions, (), kept, fillers=self.budget - (kept.stop - kept.start), shown=shown)
        at, n_tokens = ids.index(self.mllm.image_token_id), len(features.tokens)
        marks = torch.tensor(quoted[:at] + [False] * n_tokens + quoted[at + 1 :])
        is_picture = torch.zeros(len(whole), dtype=torch.bool)
        is_picture[at : at + n_tokens] = True
        place = text_positions(positions[0, kept], is_picture[kept], features, (image.shape[-2], image.shape[-1]))
        return CondDocument(whole, positions, (), kept, place=place, quoted=marks[kept])

    def _conditioning(self, document: CondDocument, embeds: torch.Tensor, states: torch.Tensor) -> Conditioning:
        """embeds, states (1, T, D): of the kept tokens."""
        if self.variant == "v1.2":
            return Conditioning(
                tokens=states,
                positions=document.place.to(states.device),
                text_embeds=embeds,
                text_mask=document.quoted[None].to(states.device),
            )
        tokens = states.new_zeros(1, self.budget, states.shape[2])
        tokens[:, : states.shape[1]] = states
        mask = torch.arange(self.budget, device=states.device)[None] < states.shape[1]
        return Conditioning(tokens=tokens, mask=mask, positions=torch.zeros(self.budget, 3, device=states.device))

    def _kept(self, length: int) -> slice:
        """The tokens that condition: behind the dropped head, no more than the budget."""
        if length <= self.drop:
            raise ConfigError(
                f"{self.drop} leading tokens are dropped, but the whole prompt has {length}. Set dropped_tokens in the "
                "dialogue pack to the length of its own prefix."
            )
        if length - self.drop > self.budget:
            log.warning(
                "the prompt has %d tokens more than the %d that condition the edit; its end is cut. Shorten the instruction.",
                length - self.drop - self.budget,
                self.budget,
            )
        return slice(self.drop, min(length, self.drop + self.budget))


_PAIRED = re.compile('["“]')
_OPENING = re.compile(r"""["“]|(?<!\w)['‘](?=\S)""")
_CLOSING = {
    '"': re.compile('"'),
    "“": re.compile("”"),
    "'": re.compile(r"(?<=\S)'(?!\w)"),
    "‘": re.compile(r"(?<=\S)’(?!\w)"),
}


def split_at(text: str, spans: Sequence[Span]) -> list[Piece]:
    """Text in pieces: quoted characters one by one; each quote mark stays with the text outside."""
    pieces, start = [], 0
    for opening, closing in spans:
        pieces.append((text[start : opening + 1], False))
        pieces += [(char, True) for char in text[opening + 1 : closing]]
        start = closing
    if start < len(text):
        pieces.append((text[start:], False))
    return pieces


def quotes_v12(text: str, skip: int = 0) -> list[Span]:
    """Straight and curly pairs behind `skip`. An opening mark that is never closed ends the search: the rest is plain."""
    spans, place = [], skip
    while match := _PAIRED.search(text, place):
        closing = text.find('"' if match[0] == '"' else "”", match.end())
        if closing < 0:
            break
        spans.append((match.start(), closing))
        place = closing + 1
    return spans


def quotes_v1x_released(text: str) -> list[Span]:
    """Every straight quote behind character 155 opens or closes; text after an unclosed one is quoted to the end."""
    places = [match.start() for match in re.finditer('"', text) if match.start() > FIRST_QUOTE]
    if len(places) % 2:
        places.append(len(text))
    return list(zip(places[::2], places[1::2], strict=True))


def quotes_v1x(text: str, skip: int = 0) -> list[Span]:
    """Pairs of straight, curly or single quotes behind `skip`.

    A single quote opens only at the start of a word and closes only at the end of one, so that apostrophes stay letters. An
    opening mark without its closing one is an ordinary character.
    """
    spans, place = [], skip
    while match := _OPENING.search(text, place):
        closing = _CLOSING[match[0]].search(text, match.end())
        place = match.end()
        if closing is not None:
            spans.append((match.start(), closing.start()))
            place = closing.end()
    return spans


@torch.autocast("cpu", enabled=False)  # positions are exact in float32, also where training runs in bfloat16
def text_positions(
    temporal: torch.Tensor, is_picture: torch.Tensor, features: VisionFeatures, size: tuple[int, int]
) -> torch.Tensor:
    """Ids of the conditioning's tokens in the DiT (v1.2), (T, 3) float32.

    temporal (T,): M-RoPE position in time; counted back from the end, so that text lies before the pictures at -T..-1.
    is_picture (T,): vision tokens, which also get the place (y, x) in the latent grid of a picture of `size` (H, W).
    """
    ids = torch.zeros(len(temporal), 3)
    ids[:, 0] = temporal.float() - (temporal.max().float() + 1)
    height, width = features.grid
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    # Pixels that the MLLM sees -> vision tokens, and pixels of the generated picture -> latent tokens. Centre to centre the
    # second shift would be 7.5: the weights were trained with 11, keep it.
    to_tokens = _affine(1 / CELL, 1 / CELL, -13.5 / CELL) @ _resize_map(features.resized, size)
    to_latents = _affine(1 / 16, 1 / 16, -11 / 16) @ torch.linalg.inv(to_tokens)
    # Matrices in float32 and points as rows: the last bit is then that of the release.
    places = torch.stack([x.flatten(), y.flatten()], dim=-1) @ to_latents[:2, :2].T + to_latents[:2, 2]
    ids[is_picture, 1:] = places.flip(-1)[: int(is_picture.sum())]
    return ids


def _affine(scale_x: float, scale_y: float, shift: float) -> torch.Tensor:
    """(3, 3) map of (x, y, 1)."""
    return torch.tensor([[scale_x, 0.0, shift], [0.0, scale_y, shift], [0.0, 0.0, 1.0]])


def _resize_map(resized: tuple[int, int], source: tuple[int, int]) -> torch.Tensor:
    """Pixels of a picture of `source` (H, W) -> pixels of the same at `resized` (H, W), corner to corner. (3, 3)."""
    scale_y, scale_x = (torch.tensor(resized) - 1) / (torch.tensor(source) - 1)
    return _affine(float(scale_x), float(scale_y), 0.0)
