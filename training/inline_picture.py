"""Pictures inside a page: small copies as data URLs, so that one HTML file is the whole page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

KINDS = {"PNG": {}, "JPEG": {"quality": 88}}
"""Format -> how it is saved: PNG keeps drawn pictures exact and small, JPEG makes photographs small."""


def inline(path: Path, side: int, kind: str = "PNG") -> str:
    """A picture file as a data URL for `src`: upright, RGB, its long side (in pixels) at most `side`.

    kind: one of KINDS. Raises OSError for a file that is no picture.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format=kind, **KINDS[kind])
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def escaped(words: str) -> str:
    """Text as HTML shows it, safe inside an attribute too."""
    return html.escape(words, quote=True)
