"""What the miniature world is made of: kinds of objects with their states, colours, sizes, backgrounds and styles.

Tables only. What they are called stands in `words.py`, how they look in `sprites.py` and `backgrounds.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 24, 40),
    "orange": (255, 122, 0),
    "yellow": (255, 232, 64),
    "green": (30, 158, 66),
    "blue": (28, 92, 226),
    "purple": (156, 54, 196),
}
"""In the order of the rainbow, which the rules use."""

SIZES = ("small", "large")
BACKGROUNDS = ("white", "grey", "pink", "day", "dusk", "night", "grass", "table")
SKIES = ("day", "dusk", "night")
"""In the order in which they follow one another."""

STYLES = range(4)
"""How a scene is drawn: line width, shade and texture together. Each has a texture of its own."""

CELLS = range(9)
"""By rows: 0 is the top left, 4 the centre, 8 the bottom right."""

MOST_OBJECTS = 4
"""Objects of a scene that is drawn for an item. A faulty picture may show more."""

TEXTS = ("1", "2", "3", "4", "5", "6", "7", "8", "9", "GO", "NO", "ON", "UP", "OK")
"""What can stand on a sign."""


@dataclass(frozen=True, slots=True)
class Kind:
    """states: in the order of a life; (\"\",) for a kind without. coloured, sized: whether its objects differ in that."""

    states: tuple[str, ...] = ("",)
    coloured: bool = False
    sized: bool = True

    @property
    def colours(self) -> tuple[str, ...]:
        """The colours of its objects; (\"\",) when the kind fixes them."""
        return tuple(COLOURS) if self.coloured else ("",)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes of its objects."""
        return SIZES if self.sized else ("large",)


SHAPES = ("circle", "square", "triangle", "star", "heart")

KINDS: dict[str, Kind] = {
    **{shape: Kind(coloured=True) for shape in SHAPES},
    "car": Kind(coloured=True),
    "candle": Kind(("new", "burning", "burnt down"), coloured=True),
    "flower": Kind(("bud", "open", "wilted"), coloured=True),
    "balloon": Kind(("full", "burst"), coloured=True),
    "cup": Kind(("full", "empty"), coloured=True),
    "umbrella": Kind(("closed", "open"), coloured=True),
    "traffic light": Kind(("red", "green", "amber")),
    "ice cube": Kind(("solid", "melting", "puddle")),
    "tree": Kind(("spring", "summer", "autumn", "winter")),
    "leaf": Kind(("healthy", "deficient", "dry")),
    "egg": Kind(("whole", "broken")),
    "lamp": Kind(("off", "on")),
    "clock": Kind(("12", "3", "6", "9")),
    "sun": Kind(),
    "moon": Kind(("full", "crescent")),
    "seesaw": Kind(("left", "level", "right"), sized=False),
    "sign": Kind(TEXTS, sized=False),
}
"""The states of a sign are its texts: its label. A seesaw's state is the side that is down."""
