"""What is said about drawn scenes, in English and Chinese. Several wordings where it matters that a model learns the sense."""

from __future__ import annotations

from random import Random

from .drawn_scene import Add, Background, Change, Difference, Move, Recolour, Remove, Scene, Thing, unique

LANGUAGES = ("en", "zh")

_SHAPES_ZH = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "diamond": "菱形", "cross": "十字"}
_COLOURS_ZH = {"red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色"}
_GROUNDS_ZH = {"white": "白色", "grey": "灰色", "pink": "粉色", "dark blue": "深蓝色"}
_PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
_PLACES_ZH = ("左上角", "上方", "右上角", "左侧", "中央", "右侧", "左下角", "下方", "右下角")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBERS_ZH = "零一两三四五六七八九"

# What a riddle calls a shape or a colour by.
RIDDLE_SHAPES = {
    "en": {
        "circle": "the shape without corners",
        "square": "the shape with four equal sides that stands flat",
        "triangle": "the shape with three corners",
        "diamond": "the shape that balances on its tip",
        "cross": "the plus sign",
    },
    "zh": {
        "circle": "没有角的图形",
        "square": "四条边一样长、平放着的图形",
        "triangle": "有三个角的图形",
        "diamond": "用尖角立着的图形",
        "cross": "加号",
    },
}
RIDDLE_COLOURS = {
    "en": {
        "red": "a ripe tomato",
        "orange": "a carrot",
        "yellow": "a lemon",
        "green": "fresh grass",
        "blue": "the sky at noon",
        "purple": "lavender in bloom",
    },
    "zh": {
        "red": "熟透的番茄",
        "orange": "胡萝卜",
        "yellow": "柠檬",
        "green": "嫩草",
        "blue": "正午的天空",
        "purple": "盛开的薰衣草",
    },
}


def place(cell: int, lang: str) -> str:
    """Where: `at the top left`, 左上角."""
    if lang == "zh":
        return _PLACES_ZH[cell]
    return {3: "on the left", 4: "in the centre", 5: "on the right"}.get(cell, f"at the {_PLACES[cell]}")


def colour(name: str, lang: str) -> str:
    """A colour's or a background's word."""
    return {**_COLOURS_ZH, **_GROUNDS_ZH}[name] if lang == "zh" else name


def plain(thing: Thing, lang: str) -> str:
    """`red circle`, 红色圆形."""
    return f"{_COLOURS_ZH[thing.colour]}{_SHAPES_ZH[thing.shape]}" if lang == "zh" else f"{thing.colour} {thing.shape}"


def some(thing: Thing, lang: str) -> str:
    """`a red circle`, 一个红色圆形."""
    if lang == "zh":
        return f"一个{plain(thing, lang)}"
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {plain(thing, lang)}"


def the(scene: Scene, thing: Thing, lang: str, with_place: bool = False) -> str:
    """The thing so that it cannot be confused with another one of its scene; with its place if asked for, or if it must be."""
    named = with_place or not unique(scene, thing)
    if lang == "zh":
        return f"{place(thing.cell, lang)}的{plain(thing, lang)}" if named else plain(thing, lang)
    return f"the {plain(thing, lang)} {place(thing.cell, lang)}" if named else f"the {plain(thing, lang)}"


def describe(scene: Scene, lang: str, first: tuple[int, ...] = ()) -> str:
    """The whole scene in a sentence or two; the things in the cells `first` are named first."""
    order = {cell: rank for rank, cell in enumerate(first)}
    things = sorted(scene.things, key=lambda thing: (order.get(thing.cell, len(order)), thing.cell))
    ground = colour(scene.background, lang)
    if lang == "zh":
        if not things:
            return f"{ground}背景上什么也没有。"
        listed = "，".join(f"{place(thing.cell, lang)}是{some(thing, lang)}" for thing in things)
        return f"{ground}背景上有{_NUMBERS_ZH[len(things)]}个图形：{listed}。"
    if not things:
        return f"There is nothing on the {ground} background."
    listed = ", ".join(f"{some(thing, lang)} {place(thing.cell, lang)}" for thing in things)
    there = "is one shape" if len(things) == 1 else f"are {_NUMBERS[len(things)]} shapes"
    return f"There {there} on a {ground} background: {listed}."


def tell(scene: Scene, change: Change, lang: str, rng: Random | None = None) -> str:
    """The instruction for a change of `scene`: one of several wordings, the first without rng."""
    pick = rng.choice if rng else lambda choices: choices[0]
    zh = lang == "zh"

    def named(cell: int) -> str:
        return the(scene, scene.at(cell), lang, with_place=bool(rng) and rng.random() < 0.5)

    match change:
        case Recolour(cell, to):
            thing, word = named(cell), colour(to, lang)
            if zh:
                return pick((f"把{thing}改成{word}。", f"将{thing}涂成{word}。", f"让{thing}变为{word}。"))
            return pick((f"Make {thing} {word}.", f"Paint {thing} {word}.", f"Change the colour of {thing} to {word}."))
        case Add(thing):
            what, where = some(thing, lang), place(thing.cell, lang)
            if zh:
                return pick((f"在{where}添加{what}。", f"在{where}画{what}。", f"{where}加上{what}。"))
            return pick((f"Add {what} {where}.", f"Draw {what} {where}.", f"Put {what} {where}."))
        case Remove(cell):
            thing = named(cell)
            if zh:
                return pick((f"去掉{thing}。", f"删除{thing}。", f"把{thing}移除。"))
            return pick((f"Remove {thing}.", f"Delete {thing}.", f"Take {thing} out of the picture."))
        case Move(cell, to):
            thing, where = named(cell), _PLACES_ZH[to] if zh else f"the {_PLACES[to]}"
            if zh:
                return pick((f"把{thing}移到{where}。", f"将{thing}挪到{where}。"))
            return pick((f"Move {thing} to {where}.", f"Shift {thing} to {where}."))
        case Background(name):
            word = colour(name, lang)
            if zh:
                return pick((f"把背景换成{word}。", f"将背景改为{word}。"))
            return pick((f"Make the background {word}.", f"Change the background to {word}."))
    raise TypeError(f"not a change: {change!r}")


_SUPPOSED = {
    "en": {
        "physical": "What if all of them were heavy and nothing held them up?",
        "temporal": "What would this look like hours later, after sunset?",
        "causal": "What if paint the colour of {like} ran over {named}?",
        "story": "What if they had all joined the fire brigade and wore its coats?",
    },
    "zh": {
        "physical": "如果它们都很重，又没有东西托住，会怎样？",
        "temporal": "几个小时后，太阳下山了，会是什么样子？",
        "causal": "如果{named}被泼上了{like}那种颜色的油漆呢？",
        "story": "如果它们都加入了消防队、穿上红外套呢？",
    },
}


def suppose(scenario: str, lang: str, shape: str = "circle", paint: str = "red") -> str:
    """The hypothetical instruction of a scenario. shape, paint: what the causal one is about."""
    return _SUPPOSED[lang][scenario].format(named=RIDDLE_SHAPES[lang][shape], like=RIDDLE_COLOURS[lang][paint])


# ---- judging -------------------------------------------------------------------------------------------------------------


def observe(wanted: Scene, shown: Scene, difference: Difference, lang: str) -> str:
    """What a careful eye sees: every departure of `shown` from `wanted`, or that there is none."""
    zh = lang == "zh"
    said = []
    for cell in difference.wrong:
        thing, instead, where = shown.at(cell), wanted.at(cell), place(cell, lang)
        if instead is None:
            empty = "，那里本应是空的" if zh else ", where nothing should be"
            said.append(f"{where}有{some(thing, lang)}{empty}" if zh else f"there is {some(thing, lang)} {where}{empty}")
        elif zh:
            said.append(f"{where}是{some(thing, lang)}，本应是{some(instead, lang)}")
        else:
            said.append(f"there is {some(thing, lang)} {where} instead of {some(instead, lang)}")
    for thing in difference.missing:
        where = place(thing.cell, lang)
        said.append(f"{where}缺少{some(thing, lang)}" if zh else f"{some(thing, lang)} is missing {where}")
    if difference.background:
        one, two = colour(shown.background, lang), colour(wanted.background, lang)
        said.append(f"背景是{one}，本应是{two}" if zh else f"the background is {one} instead of {two}")
    if not said:
        return "画面与描述完全一致。" if zh else "Everything in the picture agrees with the description."
    if zh:
        return "；".join(said) + "。"
    text = "; ".join(said)
    return text[0].upper() + text[1:] + "."


def judge(wanted: Scene, shown: Scene, difference: Difference, verdict: str, unrelated: bool, lang: str) -> str:
    """The sentences before the verdict."""
    seen = observe(wanted, shown, difference, lang)
    ends = {
        "en": {
            "success": "What was asked for is there, and nothing is spoiled.",
            "reflection": "One more edit can put this right.",
            "failed": "The picture is of something else; editing it further would not help."
            if unrelated
            else "What was asked for has not been done at all.",
        },
        "zh": {
            "success": "要求的内容都已出现，也没有任何损坏。",
            "reflection": "再编辑一次就能改正。",
            "failed": "画面是另一个场景，继续编辑也无济于事。" if unrelated else "要求的改动完全没有发生。",
        },
    }
    return seen + ("" if lang == "zh" else " ") + ends[lang][verdict]


# ---- questions -----------------------------------------------------------------------------------------------------------


def questions(scene: Scene, lang: str, rng: Random) -> list[tuple[str, str]]:
    """Questions about a scene with their answers: a count, a place, whether something is there, the whole."""
    zh = lang == "zh"
    count, cell = len(scene.things), rng.choice(range(9))
    thing = scene.at(cell)
    asked = [
        ("图中有几个图形？", f"{_NUMBERS_ZH[count]}个。")
        if zh
        else ("How many shapes are there?", f"{_NUMBERS[count].capitalize() if count else 'None'}."),
        (
            f"{place(cell, lang)}是什么？" if zh else f"What is {place(cell, lang)}?",
            (f"{some(thing, lang)}。" if thing else "什么也没有。")
            if zh
            else (f"{some(thing, lang).capitalize()}." if thing else "Nothing."),
        ),
    ]
    wanted = rng.choice(scene.things) if scene.things and rng.random() < 0.5 else None
    if wanted is None:
        wanted = Thing(0, rng.choice(list(_SHAPES_ZH)), rng.choice(list(_COLOURS_ZH)))
    there = any((each.shape, each.colour) == (wanted.shape, wanted.colour) for each in scene.things)
    asked.append(
        (f"图中有{plain(wanted, lang)}吗？", "有。" if there else "没有。")
        if zh
        else (f"Is there {some(wanted, lang)}?", "Yes." if there else "No.")
    )
    asked.append(("请描述这张图片。" if zh else "Describe the picture.", describe(scene, lang)))
    rng.shuffle(asked)
    return asked[: rng.randint(1, len(asked))]
