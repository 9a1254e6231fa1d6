"""Pictures for tests."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def draw_picture(width: int = 480, height: int = 320) -> Image.Image:
    """A landscape in the evening: sky, sun, hills, a house with a lit window."""
    t = np.linspace(0, 1, height)[:, None, None]
    sky = (1 - t) * np.array([70, 104, 170]) + t * np.array([250, 196, 138])
    page = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(page)
    w, h = width / 480, height / 320
    draw.ellipse((330 * w, 96 * h, 400 * w, 166 * h), fill="#ffe9b0")
    for level, swing, phase, colour in ((188, 26, 0.6, "#6d7f9c"), (222, 20, 2.1, "#4f6f62"), (256, 12, 4.0, "#3d5a3c")):
        x = np.linspace(0, 480, 97)
        y = level - swing * np.sin(x / 62 + phase) - swing / 3 * np.sin(x / 23 + 2 * phase)
        draw.polygon([(0, height), *zip(x * w, y * h, strict=True), (width, height)], fill=colour)
    draw.rectangle((118 * w, 196 * h, 194 * w, 254 * h), fill="#c9b18c")
    draw.polygon([(106 * w, 198 * h), (156 * w, 158 * h), (206 * w, 198 * h)], fill="#8a3f36")
    draw.rectangle((132 * w, 212 * h, 152 * w, 232 * h), fill="#ffd873")
    draw.rectangle((166 * w, 214 * h, 184 * w, 254 * h), fill="#5b4030")
    return page.filter(ImageFilter.GaussianBlur(0.6))
