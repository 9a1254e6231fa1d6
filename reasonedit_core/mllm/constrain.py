"""Replies that always parse: while the MLLM writes, only tokens that keep the reply inside its form are offered.

A form is a short list of parts: literals, which are fed as tokens without asking the model; choices among a few strings; and
free text that ends at a closing mark. In free text only the few tokens that would break the form are hidden, so the model
speaks as it would by itself. Everything works on the bytes of tokens, whatever the vocabulary.

`max_new_tokens` bounds the tokens that the model chooses. Literals come on top: they cost a prefill, not a decoding step.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch

from ..errors import ConfigError, ReasonerError
from ..interfaces import Form

Kind = str
"""How a free text ends: `free` (end of turn only), `json` (an unescaped quote), `tagged` (`<#`)."""


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that is always there."""

    text: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Exactly one of `options`. branches: further parts that follow one of them."""

    options: tuple[str, ...]
    branches: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """Free text with at least one visible character. ends: the end of the turn may end it (it is the last part)."""

    kind: Kind
    ends: bool = False


Part = Literal | Choice | Text

_COUNT = tuple(str(n) for n in range(100))
_SCORE = tuple(f"{n}{tail}" for n in range(10) for tail in ("", *(f".{d}" for d in range(10)))) + ("10", "10.0")

FORMS: dict[Form, tuple[Part, ...]] = {
    "free": (Text("free", ends=True),),
    "consistency": (
        Literal('{"meets_instruction": "'),
        Choice(("yes", "partial", "no")),
        Literal('", "major_conflicts": '),
        Choice(_COUNT),
        Literal(', "minor_conflicts": '),
        Choice(_COUNT),
        Literal(', "omissions": '),
        Choice(_COUNT),
        Literal(', "raw_score": '),
        Choice(_SCORE),
        Literal(', "reason": "'),
        Text("json"),
        Literal('"}'),
    ),
    "verdict": (
        Literal("<#Think>"),
        Text("tagged"),
        Literal("<#"),
        Choice(
            ("Success>", "Failed>", "Reflection>"),
            branches={"Reflection>": (Text("tagged", ends=True),)},
        ),
    ),
    "pair": (
        Literal('{"score": ['),
        Choice(_SCORE),
        Literal(", "),
        Choice(_SCORE),
        Literal('], "reasoning": "'),
        Text("json"),
        Literal('"}'),
    ),
}

INSTRUCTION_SHARE = (64, 4)
"""Tokens kept back from the thinking of a verdict for the instruction after it: at most 64, at most a quarter."""


class Code(IntEnum):
    """What a token does to a free text."""

    BREAKS = 0
    STAYS = 1
    HANGS = 2  # ends inside an escape, or in a `<` that a `#` would complete
    CLOSES = 3


_JSON_ESCAPES = frozenset(b'"\\/bfnrt')  # \u is left out: its four digits would have to be checked as well


def scan(kind: Kind, piece: bytes, hanging: bool) -> tuple[Code, int]:
    """(what `piece` does to a text of `kind`, number of its bytes that belong to the text when it closes it)."""
    if kind == "tagged":
        if hanging and piece.startswith(b"#"):
            return Code.CLOSES, 0
        at = piece.find(b"<#")
        if at >= 0:
            return Code.CLOSES, at
        return (Code.HANGS if piece.endswith(b"<") else Code.STAYS), len(piece)
    if kind == "json":
        for at, byte in enumerate(piece):
            if byte < 0x20:
                return Code.BREAKS, at
            if hanging:
                if byte not in _JSON_ESCAPES:
                    return Code.BREAKS, at
                hanging = False
            elif byte == 0x22:
                return Code.CLOSES, at
            else:
                hanging = byte == 0x5C
        return (Code.HANGS if hanging else Code.STAYS), len(piece)
    return Code.STAYS, len(piece)


class Vocabulary:
    """Tokens as bytes. pieces[i]: the bytes of token i, None for control tokens and for ids that no token has.

    stops: the ids that end a turn. controls: the ids that are no text. encode: text -> ids, without anything added.
    """

    def __init__(self, pieces: Sequence[bytes | None], stops: Sequence[int], encode: Callable[[str], list[int]]) -> None:
        self.pieces = list(pieces)
        self.stops = frozenset(stops)
        self.controls = frozenset(i for i, piece in enumerate(self.pieces) if piece is None)
        self.encode = encode
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces))) if piece}
        self._codes: dict[tuple[Kind, bool], torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> Vocabulary:
        """The vocabulary of a byte-level tokenizer; `size` is the number of logits, which may be larger."""
        controls = set(tokenizer.all_special_ids)
        added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        names = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), size))))
        to_byte = _byte_table()
        pieces: list[bytes | None] = []
        for i, name in enumerate(names):
            if i in controls or name is None:
                pieces.append(None)
            elif i in added:
                pieces.append(added[i].encode())
            else:
                pieces.append(bytes(to_byte[char] for char in name))
        pieces += [None] * (size - len(pieces))
        stops = [tokenizer.eos_token_id]
        if "<|endoftext|>" in tokenizer.get_vocab():
            stops.append(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        return cls(pieces, stops, lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def codes(self, kind: Kind, hanging: bool) -> torch.Tensor:
        """(V,) uint8: the Code of every token; control tokens break every form."""
        if (kind, hanging) not in self._codes:
            codes = [Code.BREAKS if piece is None else scan(kind, piece, hanging)[0] for piece in self.pieces]
            self._codes[kind, hanging] = torch.tensor(codes, dtype=torch.uint8)
        return self._codes[kind, hanging]

    def mask(self, name: tuple, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """(V,) bool on `device`, made once per name."""
        if (*name, device) not in self._masks:
            self._masks[*name, device] = make().to(device)
        return self._masks[*name, device]

    def plain(self) -> torch.Tensor:
        """(V,) bool: tokens of ASCII letters and digits, which are visible and safe in every text."""
        return torch.tensor([piece is not None and piece.strip(b" ").isalnum() for piece in self.pieces])

    def starting_with(self, first: int) -> torch.Tensor:
        """(V,) bool: tokens whose first byte is `first`."""
        return torch.tensor([piece is not None and piece[:1] == bytes([first]) for piece in self.pieces])

    def stopping(self) -> torch.Tensor:
        """(V,) bool: the tokens that end a turn."""
        return torch.tensor([i in self.stops for i in range(len(self.pieces))])


class Reply:
    """One reply in the making.

    Feed `opening` after the prompt; then, until `done`: choose a token from `narrow(logits)`, `take` it, feed what that
    returns. `text` is the reply so far. Raises ReasonerError when `budget` cannot hold even the shortest reply.
    """

    def __init__(self, form: Form, vocabulary: Vocabulary, budget: int) -> None:
        if form not in FORMS:
            raise ConfigError(f"form of a reply: expected one of {', '.join(FORMS)}, found {form!r}.")
        self._vocabulary = vocabulary
        self._parts = list(FORMS[form])
        least = least_tokens(self._parts)
        if budget < least:
            raise ReasonerError(
                f"expected max_new_tokens of at least {least} for a reply of the form {form!r}, found {budget}. Raise it."
            )
        self.budget = budget
        self.chosen = 0
        self.done = False
        self._written = ""
        self._buffer = b""
        self._hanging = False
        self._left = 0
        self.opening = self._advance()

    @property
    def text(self) -> str:
        """The reply so far. A character whose bytes are still incomplete is left out."""
        return self._written + readable(self._buffer)

    @property
    def in_text(self) -> bool:
        """Whether the next token belongs to free text, not to a choice among given strings."""
        return isinstance(self._parts[0], Text)

    def narrow(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (V,) float -> the same with tokens that would break the form at -inf."""
        part = self._parts[0]
        allowed = self._choice_mask(part, logits) if isinstance(part, Choice) else self._text_mask(part, logits)
        return logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))

    def take(self, token: int) -> list[int]:
        """Accept `token`. Returns the tokens to feed before the next choice; none when the reply is done."""
        self.chosen += 1
        if isinstance(self._parts[0], Choice):
            return self._take_choice(self._parts[0], token)
        return self._take_text(self._parts[0], token)

    # free text

    def _text_mask(self, part: Text, logits: torch.Tensor) -> torch.Tensor | None:
        visible = bool(readable(self._buffer).strip())
        last = self._left == 1
        vocabulary, device = self._vocabulary, logits.device
        if last and not visible:
            # After a hanging escape a letter might break the form, but a text that hangs is visible already.
            return vocabulary.mask(("plain",), device, vocabulary.plain)
        if part.kind == "free":
            return None if visible else vocabulary.mask(("speak",), device, lambda: ~vocabulary.stopping())

        def make() -> torch.Tensor:
            codes = vocabulary.codes(part.kind, self._hanging)
            allowed = codes == Code.STAYS
            if not last or part.kind == "tagged":
                allowed |= codes == Code.HANGS
            if visible:
                allowed |= codes == Code.CLOSES
                if part.ends:
                    allowed |= vocabulary.stopping()
            return allowed

        return vocabulary.mask((part.kind, part.ends, self._hanging, last, visible), device, make)

    def _take_text(self, part: Text, token: int) -> list[int]:
        vocabulary = self._vocabulary
        if part.ends and token in vocabulary.stops:
            return self._close()
        piece = vocabulary.pieces[token]
        if piece is None:  # a control token in free text: fed, not written
            piece = b""
        code, kept = scan(part.kind, piece, self._hanging)
        if code is Code.CLOSES:
            fed = b"<" if self._hanging and kept == 0 and piece.startswith(b"#") else b""
            if fed:
                self._buffer = self._buffer[:-1]
            self._buffer += piece[:kept]
            return self._close(before=readable(piece[:kept]), fed=fed.decode())
        self._buffer += piece
        self._hanging = code is Code.HANGS
        self._left -= 1
        if self._left == 0:
            rest = self._close()
            return [] if self.done else [token, *rest]
        return [token]

    def _close(self, *, before: str = "", fed: str = "") -> list[int]:
        self._written += readable(self._buffer)
        self._parts.pop(0)
        return self._advance(before, fed)

    # choices

    def _matching(self, part: Choice) -> list[str]:
        so_far = self._buffer.decode()
        return [option for option in part.options if option.startswith(so_far)]

    def _choice_mask(self, part: Choice, logits: torch.Tensor) -> torch.Tensor:
        vocabulary = self._vocabulary
        so_far = len(self._buffer)
        matching = self._matching(part)
        continuations = {option[so_far:end].encode() for option in matching for end in range(so_far + 1, len(option) + 1)}
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[[vocabulary.ids[piece] for piece in continuations if piece in vocabulary.ids]] = True
        if any(len(option) == so_far for option in matching):
            first = self._parts[1].text.encode()[0]  # an option that others continue is always followed by a literal
            allowed |= vocabulary.mask(("first", first), logits.device, lambda: vocabulary.starting_with(first))
        return allowed

    def _take_choice(self, part: Choice, token: int) -> list[int]:
        longer = self._buffer + (self._vocabulary.pieces[token] or b"")
        if any(option.encode().startswith(longer) for option in part.options):
            self._buffer = longer
            fed, options = [token], self._matching(part)
            if len(options) > 1:
                return fed
        else:  # a token of what comes next: the option ends here, and the literal is fed in its own tokens
            fed, options = [], [self._buffer.decode()]
        option = options[0]
        rest = option[len(self._buffer) :]
        self._written += option
        self._parts[:1] = part.branches.get(option, ())
        after = self._advance(rest)
        return [] if self.done else fed + after

    def _advance(self, before: str = "", fed: str = "") -> list[int]:
        """Write literals up to the next choice or text. before: text to feed ahead of them; fed: their part already fed."""
        self._buffer, self._hanging = b"", False
        literal = ""
        while self._parts and isinstance(self._parts[0], Literal):
            literal += self._parts.pop(0).text
        self._written += literal
        if not self._parts:
            self.done = True
            return []
        part = self._parts[0]
        if isinstance(part, Text):
            rest = self._parts[1:]
            share = 0 if not rest or part.kind != "tagged" else min(INSTRUCTION_SHARE[0], self.budget // INSTRUCTION_SHARE[1])
            self._left = max(1, self.budget - self.chosen - max(least_tokens(rest), share))
        forced = before + literal.removeprefix(fed)
        return self._vocabulary.encode(forced) if forced else []


def least_tokens(parts: Sequence[Part]) -> int:
    """How many choices of the model the parts may need at the least, with the longest way through every choice."""
    total = 0
    for part in parts:
        if isinstance(part, Text):
            total += 1
        elif isinstance(part, Choice):
            branches = [part.branches.get(option, ()) for option in part.options]
            total += _depth(part.options) + max(least_tokens(branch) for branch in branches)
    return total


def _depth(options: Sequence[str], at: int = 0) -> int:
    """The largest number of decisions, one byte at a time, until one option is left."""
    if len(options) < 2:
        return 0
    groups: dict[str, list[str]] = {}
    for option in options:
        groups.setdefault(option[at : at + 1], []).append(option)
    deeper = max(_depth(group, at + 1) for first, group in groups.items() if first)
    return deeper + (len(groups) > 1)


def readable(data: bytes) -> str:
    """UTF-8 with replacement characters, without a last character that is incomplete."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=False)


def _byte_table() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary (GPT-2's order)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
