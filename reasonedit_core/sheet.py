"""`sheet.png`: the source and every round of a run on one page, with instruction, verdict and scores, the best one marked."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .types import Decision, EditTrace, Round, Scores

log = logging.getLogger(__name__)

CARD, GAP, MARGIN, PAD = 348, 22, 40, 16
TITLE, VERDICT, SCORES = 30, 36, 52  # heights of the rows of a card
PAPER, WHITE, INK, SOFT, LINE, ACCENT = "#f4f2ee", "#ffffff", "#1d2129", "#69707d", "#dcd8d0", "#2f5fd0"
VERDICTS = {
    Decision.SUCCESS: ("success", "#1c7a47", "#dcf1e4"),
    Decision.REFINE: ("refine", "#94600a", "#fbeccd"),
    Decision.FAILED: ("failed", "#b0332c", "#fadfdc"),
    None: ("not judged", "#69707d", "#e9e7e2"),
}

# Looked for by file name wherever the operating system keeps its fonts. The first group writes Chinese.
CJK_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "NotoSansSC-Regular.ttf", "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf", "SourceHanSans-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "msyh.ttc", "simhei.ttf", "simsun.ttc", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "STHeiti Light.ttc", "Arial Unicode.ttf", "ARIALUNI.TTF",
)  # fmt: skip
WIDE_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial.ttf")
PLAIN = {
    "—": "-",
    "–": "-",
    "→": "->",
    "•": "*",
    "×": "x",
    "，": ", ",
    "。": ". ",
    "：": ": ",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}


def draw_sheet(trace: EditTrace, pictures: list[Image.Image], note: str = "") -> Image.Image:
    """The page of one run. pictures: the source, then one per round, in any mode and of any size. note: a line at the foot."""
    cards = [_source_card(trace)] + [_round_card(done, trace) for done in trace.rounds]
    columns = len(cards) if len(cards) <= 4 else (4 if len(cards) in (7, 8) else 3)
    width = 2 * MARGIN + columns * CARD + (columns - 1) * GAP
    box = _picture_height(pictures[0])
    rows = [range(i, min(i + columns, len(cards))) for i in range(0, len(cards), columns)]
    heights = [max(_text_height(cards[i]) for i in row) + PAD + TITLE + box for row in rows]
    head, foot = _header(trace, width - 2 * MARGIN), _footer(trace, note, width - 2 * MARGIN)
    top = MARGIN + _height(head) + 20
    page = Image.new("RGB", (width, top + sum(heights) + GAP * len(rows) + _height(foot) + MARGIN - 4), PAPER)
    _write(page, head, MARGIN, MARGIN)
    for row, height in zip(rows, heights, strict=True):
        for i in row:
            left = MARGIN + (i - row[0]) * (CARD + GAP)
            is_best = i == (0 if trace.best is None else trace.best + 1)
            _paste_card(page, cards[i], pictures[i], (left, top, CARD, height), box, is_best)
        top += height + GAP
    _write(page, foot, MARGIN, top)
    return page


def draw_rows(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], note: str = "", *, card: int = CARD
) -> Image.Image:
    """A page of rows, each some words above pictures with their captions. Pictures of any mode and size; rows may be ragged.

    Words and captions may have several lines; the first is the strongest. card: width of a picture with its frame.
    """
    columns = max((len(pictures) for _, pictures in rows), default=1)
    inner, step = card - 2 * PAD, card + GAP
    width = 2 * MARGIN + columns * step - GAP
    head = _paragraph(title, 27, INK, width - 2 * MARGIN, 3)
    foot = _paragraph(note, 15, SOFT, width - 2 * MARGIN, 3)
    words = [_several(text, 16, INK, width - 2 * MARGIN, 4) for text, _ in rows]
    said = [[_several(caption, 14, SOFT, inner, 3) for caption, _ in pictures] for _, pictures in rows]
    boxes = [_picture_height(pictures[0][1], inner) if pictures else 0 for _, pictures in rows]
    frames = [box + 2 * PAD + 2 + max(map(_height, lines), default=20) for box, lines in zip(boxes, said, strict=True)]
    heights = [_height(lines) + 8 + frame for lines, frame in zip(words, frames, strict=True)]
    top = MARGIN + _height(head) + 20
    page = Image.new("RGB", (width, top + sum(heights) + GAP * len(rows) + _height(foot) + MARGIN), PAPER)
    _write(page, head, MARGIN, MARGIN)
    for n, (_, pictures) in enumerate(rows):
        _write(page, words[n], MARGIN, top)
        y = top + _height(words[n]) + 8
        for column, (_, picture) in enumerate(pictures):
            left = MARGIN + column * step
            _rounded(page, (left, y, card, frames[n]), WHITE, 14)
            _picture(page, picture, (left + PAD, y + PAD, inner, boxes[n]))
            _write(page, said[n][column], left + PAD, y + PAD + boxes[n] + 4)
        top += heights[n] + GAP
    _write(page, foot, MARGIN, top)
    return page


# --- text: fonts, glyphs that are missing, wrapping ---


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text: (words, font size, colour), with the room it takes."""

    text: str
    size: int
    colour: str
    height: int


@lru_cache(maxsize=64)
def fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """The fonts that text is set in, first choice first: Pillow's own, a wide Latin one, one with Chinese."""
    found = [ImageFont.load_default(size=size)]
    for group in (WIDE_FONTS, CJK_FONTS):
        for name in group:
            try:
                found.append(ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC))
                break
            except OSError:
                continue
    return tuple(found)


def has_chinese_font() -> bool:
    """Whether sheet.png can show Chinese instructions on this machine."""
    return _font_index("中") is not None and _font_index("图") is not None


@lru_cache(maxsize=4096)
def _font_index(character: str) -> int | None:
    if character.isspace():
        return 0
    for index, font in enumerate(fonts(16)):
        mask = font.getmask(character)
        # a font draws the same box for all that it lacks; two code points that no font may have show which box
        if mask.getbbox() and all(bytes(mask) != bytes(font.getmask(none)) for none in ("\uffff", "\U0010ffff")):
            return index
    return None


def legible(text: str) -> str:
    """The text with everything that no font here can draw replaced by words: never a row of empty boxes."""
    drawn = [(c, _drawable(c)) for c in " ".join(text.split())]
    out, i = [], 0
    while i < len(drawn):
        if drawn[i][1] is not None:
            out.append(drawn[i][1])
            i += 1
            continue
        # punctuation between two unwritable stretches goes with them: one note in place of several
        end = i + 1
        for j in range(i + 1, len(drawn)):
            if drawn[j][1] is None:
                end = j + 1
            elif drawn[j][0].isalnum():
                break
        count = sum(1 for _, shown in drawn[i:end] if shown is None)
        out.append(f"[{count} character{'s' if count > 1 else ''} without a font]")
        i = end
    return "".join(out)


def _drawable(character: str) -> str | None:
    if _font_index(character) is not None:
        return character
    if character in PLAIN:
        return PLAIN[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Mn"):
        return ""
    base = "".join(
        c for c in unicodedata.normalize("NFKD", character) if _font_index(c) is not None and not unicodedata.combining(c)
    )
    return base or None


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    runs: list[tuple[int, str]] = []
    for character in text:
        index = _font_index(character) or 0
        if runs and (runs[-1][0] == index or character == " "):
            runs[-1] = (runs[-1][0], runs[-1][1] + character)
        else:
            runs.append((index, character))
    return [(fonts(size)[index], part) for index, part in runs]


def _measure(text: str, size: int) -> float:
    return sum(font.getlength(part) for font, part in _runs(text, size))


WORDS = re.compile(
    r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]|\s+|[^\s\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+"
)


def wrap(text: str, size: int, width: int, most: int) -> list[str]:
    """Lines no wider than `width` pixels, at most `most` of them; a text that is cut ends in `...`."""
    lines, line = [], ""
    text = text[: (most + 1) * width]  # no letter is narrower than a pixel; a reply may have megabytes
    for word in WORDS.findall(legible(text)):
        if _measure(line + word, size) <= width:
            line += word
            continue
        if _measure(word, size) <= width:
            lines.append(line.strip())
            line = word.strip()
            continue
        for character in word:  # one word wider than the page: broken between letters, from where the line stands
            if line and _measure(line + character, size) > width:
                lines.append(line.strip())
                line = ""
            line += character
    if line.strip():
        lines.append(line.strip())
    lines = [line for line in lines if line]
    if len(lines) > most:
        last = lines[most - 1]
        while last and _measure(last + " ...", size) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + " ..."]
    return lines


def _paragraph(text: str, size: int, colour: str, width: int, most: int) -> list[Line]:
    return [Line(line, size, colour, round(size * 1.42)) for line in wrap(text, size, width, most)]


def _several(text: str, size: int, colour: str, width: int, most: int) -> list[Line]:
    """The lines of a text, each wrapped; behind the first of several they are smaller and softer."""
    first, *rest = text.split("\n")
    lines = _paragraph(first, size, INK if rest else colour, width, most)
    for more in rest:
        lines += _paragraph(more, size - 1, SOFT, width, most)
    return lines


def _space(height: int) -> list[Line]:
    return [Line("", 1, INK, height)]


def _height(lines: list[Line]) -> int:
    return sum(line.height for line in lines)


def _write(page: Image.Image, lines: list[Line], left: int, top: int) -> None:
    draw = ImageDraw.Draw(page)
    for line in lines:
        x, baseline = float(left), top + round(line.size * 1.02)
        for font, part in _runs(line.text, line.size):
            draw.text((x, baseline), part, fill=line.colour, font=font, anchor="ls")
            x += font.getlength(part)
        top += line.height


# --- the parts of the page ---


@dataclass(frozen=True, slots=True)
class Card:
    """One picture with its words. decision: a key of VERDICTS, or "" for the source, which nobody judges."""

    title: str
    note: str
    decision: Decision | None | str
    scores: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]


def _header(trace: EditTrace, width: int) -> list[Line]:
    lines = _paragraph(trace.request.instruction, 27, INK, width, 3)
    if trace.thought and trace.thought.instruction != trace.request.instruction:
        lines += _space(4) + _paragraph("Goal: " + trace.thought.instruction, 17, SOFT, width, 4)
    return lines


def _footer(trace: EditTrace, note: str, width: int) -> list[Line]:
    count = len(trace.rounds)
    chosen = "the source is returned unchanged" if trace.best is None else f"best: round {trace.best + 1}"
    seconds = sum(done.seconds for done in trace.rounds)
    words = f"{count} round{'' if count == 1 else 's'} in {seconds:.1f} s; {chosen}; stopped: {trace.stop_reason}"
    lines = _paragraph(words, 15, SOFT, width, 3) + _paragraph(note, 15, SOFT, width, 3)
    said = [trace.request.instruction, trace.goal, trace.target or "", *(done.instruction for done in trace.rounds)]
    said += [done.reflection.reason for done in trace.rounds if done.reflection]
    if any(_drawable(character) is None for text in said for character in text[:5000] if not character.isspace()):
        text = "No font here has some of the characters; trace.json holds them. A CJK font (Noto Sans CJK) would show them."
        lines += _paragraph(text, 15, SOFT, width, 3)
    return lines


def _source_card(trace: EditTrace) -> Card:
    lines = _paragraph("Expected: " + trace.target, 14, SOFT, CARD - 2 * PAD, 9) if trace.target else []
    return Card("Source", "", "", (), tuple(lines))


def _round_card(done: Round, trace: EditTrace) -> Card:
    width = CARD - 2 * PAD
    lines = _paragraph(done.instruction, 16, INK, width, 6)
    decision = done.reflection.decision if done.reflection else None
    if done.reflection and done.reflection.reason:
        lines += _space(6) + _paragraph(done.reflection.reason, 14, SOFT, width, 7)
    note = "from the source" if done.input_index is None else f"from round {done.input_index + 1}"
    note += "" if done.full_of is None else f", round {done.full_of + 1} in full"
    scores = _score_cells(done.reflection.scores) if done.reflection else ()
    return Card(f"Round {done.index + 1}", note, decision, scores, tuple(lines))


def _score_cells(scores: Scores) -> tuple[tuple[str, str], ...]:
    cells = []
    for name, value in (("edit", scores.edit), ("quality", scores.quality), ("consistency", scores.consistency)):
        if value is not None:
            numbers = value if isinstance(value, tuple) else (value,)
            cells.append((name, " / ".join(f"{number:.3g}" for number in numbers)))
        elif not scores.asked and name != "consistency":
            cells.append((name, "not asked"))
    return tuple(cells)


def _text_height(card: Card) -> int:
    verdict = 0 if card.decision == "" else VERDICT
    return 12 + verdict + (SCORES if card.scores else 0) + _height(list(card.lines)) + PAD


def _picture_height(source: Image.Image, width: int = CARD - 2 * PAD) -> int:
    return min(max(round(width * source.height / source.width), 170), 440)


def _paste_card(
    page: Image.Image, card: Card, picture: Image.Image, at: tuple[int, int, int, int], box: int, best: bool
) -> None:
    left, top, width, height = at
    if best:
        _rounded(page, (left - 4, top - 4, width + 8, height + 8), ACCENT, 18)
    else:
        _rounded(page, (left - 1, top - 1, width + 2, height + 2), LINE, 15)
    _rounded(page, at, WHITE, 14)
    x, y, inner = left + PAD, top + PAD, width - 2 * PAD
    _write(page, [Line(card.title, 18, INK, 24)], x, y - 2)
    if card.note:
        _write(page, [Line(card.note, 14, SOFT, 20)], round(x + _measure(card.title, 18) + 10), y + 2)
    if best:
        _pill(page, "best", x + inner, y - 4, ACCENT, WHITE, right=True)
    y += TITLE
    _picture(page, picture, (x, y, inner, box))
    y += box + 12
    if card.decision != "":
        word, ink, ground = VERDICTS[card.decision]
        _pill(page, word, x, y, ground, ink)
        y += VERDICT
    if card.scores:
        cell = inner // 3
        for i, (name, value) in enumerate(card.scores):
            _write(page, [Line(name, 13, SOFT, 19), Line(value, 18, INK, 26)], x + i * cell, y - 2)
        y += SCORES
    _write(page, list(card.lines), x, y)


def _pill(page: Image.Image, word: str, x: int, y: int, ground: str, ink: str, right: bool = False) -> None:
    width = round(_measure(word, 15)) + 22
    x = x - width if right else x
    _rounded(page, (x, y, width, 26), ground, 13)
    _write(page, [Line(word, 15, ink, 20)], x + 11, y + 3)


def _picture(page: Image.Image, picture: Image.Image, at: tuple[int, int, int, int]) -> None:
    left, top, width, height = at
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    shown = picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    ground = Image.new("RGBA", (width, height), "#eceae5")
    ground.alpha_composite(shown, ((width - size[0]) // 2, (height - size[1]) // 2))
    page.paste(ground.convert("RGB"), (left, top), _corners(width, height, 8))


def _rounded(page: Image.Image, at: tuple[int, int, int, int], colour: str, radius: int) -> None:
    left, top, width, height = at
    page.paste(colour, (left, top, left + width, top + height), _corners(width, height, radius))


@lru_cache(maxsize=64)
def _corners(width: int, height: int, radius: int) -> Image.Image:
    """A mask with smooth round corners: drawn four times too large, as Pillow's shapes are not anti-aliased."""
    big = Image.new("L", (width * 4, height * 4), 0)
    ImageDraw.Draw(big).rounded_rectangle((0, 0, width * 4 - 1, height * 4 - 1), radius * 4, fill=255)
    return big.resize((width, height), Image.Resampling.BOX)
