"""Objects by rules alone: no model, no download, the same answer every time.

Words that ask, suppose, connect or command end a phrase; what stands between them is taken for a thing, with the adjectives
before it. Chinese, which writes no spaces, is cut at its function words. It is a heuristic: users see the list and may correct
it.
"""

from __future__ import annotations

import re

import torch

from ..dialogue.objects import tidy

_FUNCTION = """
a an the this that these those some any each every all both no none another other such same own
i you he she it we they me him her us them my your his its our their mine yours who whom whose which what when where why how
and or but nor so if unless while whereas because although though as than then once until till whether
in on at by for with without about against between among into onto through during before after above below under over from to of
off up down out across along around behind beside besides beyond inside outside near toward towards upon within like per via
is are was were be been being am do does did done have has had having will would shall should can could may might must let lets
not never only just even still also too very really quite much many more most less least few several again already yet here
there now later soon today tomorrow yesterday always often ever maybe perhaps please else instead rather
"""
_VERBS = """
make makes made turn turns turned look looks looked happen happens happened become becomes became show shows shown get gets got
give gives gave given put puts keep keeps kept leave leaves left take takes took taken go goes went gone come comes came
change changes changed add adds added remove removes removed replace replaces replaced edit edits apply applies create creates
draw draws drawn paint paints set sets use uses used see sees saw seen imagine suppose consider appear appears seem seems start
starts begin begins began stop stops end ends hold holds held bring brings brought cause causes expect expected want wants
need needs fall falls fell fallen rise rises rose grow grows grew grown melt melts freeze freezes froze frozen break breaks
broke rain rains snow snows burn burns fly flies flew run runs ran stand stands stood sit sits sat lie lies lay hit hits
drop drops throw throws threw thrown eat eats ate eaten open opens opened close closes closed
"""
_NOUNS_TOO = {"snow", "rain", "end", "drop", "set", "leaves", "stand", "runs"}
"""Verbs of the list that are things as well, behind an article or an adjective."""

_DETERMINERS = set("a an the this that these those some any each every another my your his her its our their".split())
_FUNCTION_WORDS, _VERB_WORDS = set(_FUNCTION.split()), set(_VERBS.split())
_VAGUE = set("image picture photo photograph scene way thing things something anything result effect moment time".split())

_CHINESE_CUTS = (
    "如果|假如|要是|即使|因为|所以|但是|然后|之后|以后|以前|之前|时候|什么|怎么样|怎么|怎样|多久|样子|一下|可以|应该|可能|会|将|把|被|让|使|给|请|"
    "变成|变得|变|看起来|看|显示|展示|画|放在|放|加上|加|去掉|删除|替换|换成|改成|改|成|在|到|从|向|对|和|与|及|或|的|地|得|了|着|过|"
    "是|有|没有|不|很|更|最|都|也|就|还|又|再|这|那|哪|它|他|她|我|你|们|一个|一只|一些|一片|个|只|里|上|下|中|吗|呢|吧|啊"
)
_CHINESE = re.compile(r"[\u3400-\u9fff]+")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*|[^\sA-Za-z]")
_LONGEST = 4


class RuleExtractor:
    """An `ObjectExtractor` for English and Chinese."""

    def extract(self, instruction: str, image: torch.Tensor | None = None) -> list[str]:
        """Names in order of appearance; the picture is not looked at. Empty where the rules find no thing."""
        chinese = [part for run in _CHINESE.findall(instruction) for part in re.split(_CHINESE_CUTS, run) if part]
        return tidy([*_phrases(_CHINESE.sub(" . ", instruction)), *chinese])


def _phrases(text: str) -> list[str]:
    """English noun phrases: runs of words that are neither of a list nor a participle at the run's edge."""
    found: list[str] = []
    run: list[str] = []
    article, first = False, True  # first: the run began the sentence
    for word in [*_WORD.findall(text), "."]:
        low = word.lower().replace("’", "'")
        plain = low.removesuffix("'s")
        thing = low in _NOUNS_TOO and (article or bool(run))
        if low[0].isalpha() and plain not in _FUNCTION_WORDS and (thing or plain not in _VERB_WORDS):
            run.append(word.lower() if word.istitle() else word)
            if not low.endswith("'s"):
                continue
        # "Cover the ...": a single word that opens a sentence before an article is what is asked, whatever the lists know.
        command = first and len(run) == 1 and plain in _DETERMINERS
        found += [] if command else _trimmed(run)
        run, article, first = [], plain in _DETERMINERS, low in ".!?"
    return found


def _trimmed(run: list[str]) -> list[str]:
    """The run without adverbs, and without participles behind its last noun; nothing where no thing is left."""
    words = [word.removesuffix("'s").removesuffix("’s") for word in run if not word.endswith("ly")]
    while len(words) > 1 and re.search(r"(ed|ing)$", words[-1]):
        words.pop()
    if not words or words[-1].lower() in _VAGUE or (len(words) == 1 and re.search(r"\w{2}(ed|ing)$", words[0])):
        return []
    return [" ".join(words[-_LONGEST:])]
