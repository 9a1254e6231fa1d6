"""Whether words suppose something without giving away what comes of it: the check of Reason50K's rewritten instructions.

Text alone, in English and Chinese. Words count by their stems (a rough one: melt, melts and melting are one word), Chinese
text by pairs of characters, because it has no blanks. Answers that passed stay in journals: with a change of the rules here,
raise the versions of the questions `rewrite` and `rewrite_pair`.
"""

from __future__ import annotations

import re
import unicodedata

MOST_WORDS = 40
"""Words of an instruction; two Chinese characters count as one word."""

LEAK = 0.3
"""From this share on, of the words that only the outcome has, an instruction gives it away."""

_STOP = frozenset(
    "a an and are as at be been being but by can could did do does for from had has have how i if in into is it its like me "
    "my no not now of off on one onto or our out over shall should show so some such suppose than that the their them then "
    "there these they this those to up us was we were what when where which while who why will with would you your picture "
    "image look looks happen happens imagine".split()
)
_STOP_PAIRS = frozenset(
    "这张 张图 图片 画面 面里 如果 果把 会怎 怎么 么样 一个 一张 一下 之后 后的 的样 样子 想象 假设 时候 是一 有一".split()
)

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_CJK = re.compile(r"[\u3400-\u9fff]+")
_SUPPOSES = re.compile(
    r"\b(if|suppos(e|es|ing)|imagin(e|es|ing)|assum(e|es|ing)|were to|had been|would|could|when|after|once|until|as soon as|"
    r"in case|provided)\b|如果|假如|假设|要是|倘若|万一|若是|想象|的话|之后|以后|当.{1,30}时"
)


def content_words(text: str) -> frozenset[str]:
    """The words of a text that say something: stems without stop words, and pairs of Chinese characters."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = {_stem(word) for word in _WORD.findall(text) if word not in _STOP}
    pairs = {run[at : at + 2] for run in _CJK.findall(text) for at in range(max(1, len(run) - 1))}
    return frozenset(words | (pairs - _STOP_PAIRS))


def leak(instruction: str, before: str, after: str) -> float | None:
    """The share 0..1 of the outcome's own words that `instruction` names; None where the captions are the same.

    The outcome's own words are those of `after` (the target's caption) that `before` (the source's) does not have. There are
    none where something only goes away or changes places: then nothing is given away.
    """
    if " ".join(before.split()) == " ".join(after.split()):
        return None
    outcome = content_words(after) - content_words(before)
    return len(outcome & content_words(instruction)) / len(outcome) if outcome else 0.0


def supposes(text: str) -> bool:
    """It is a question, or says under which condition something is to be seen."""
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    return text.endswith("?") or _SUPPOSES.search(text) is not None


def length_of(text: str) -> int:
    """In words; two Chinese characters count as one."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return len(_WORD.findall(text)) + sum(len(run) + 1 for run in _CJK.findall(text)) // 2


def unfit(instruction: str, before: str, after: str, *, most_leak: float = LEAK) -> tuple[str, str] | None:
    """Why words are no hypothetical instruction, as a code and a sentence; None where they are one."""
    words = length_of(instruction)
    if words > MOST_WORDS:
        return "too-long", f"expected at most {MOST_WORDS} words in instruction, found {words}; say it more shortly"
    if not supposes(instruction):
        return "not-hypothetical", "expected instruction to be a question or to suppose something, found a plain order"
    share = leak(instruction, before, after)
    if share is None:
        return "no-change", "expected target_caption to say what source_caption does not, found the same words"
    if share >= most_leak:
        outcome = content_words(after) - content_words(before)
        named = ", ".join(sorted(outcome & content_words(instruction)))
        return "leaks", f"expected instruction to leave the outcome to be thought out, found that it names it: {named}"
    return None


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    for ending, instead in (("ies", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("ly", ""), ("s", "")):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)] + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]  # stopping -> stopp -> stop
    return word.removesuffix("e") if len(word) > 3 else word
