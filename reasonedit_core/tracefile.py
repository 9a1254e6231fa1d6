"""A PNG that holds a whole run: what its words and tensors are packed into, and how they are taken out again.

    iTXt `reasonedit`   JSON, readable by anyone: goal, instructions, verdicts, scores
    reTr                zlib of a safetensors file: source, pictures, latents, so that a run can be continued bit for bit

`reTr` is an ancillary private chunk: other readers skip it. It is no text entry, as Pillow refuses large ones. What the JSON
says is the business of `nodes/tracefile.py`, which writes it.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load, save

from .errors import DataError

KEY = "reasonedit"
CHUNK = b"reTr"
LARGEST = 2 << 30
"""Bytes of pictures and latents that a file may unpack to."""


def pack(picture: Image.Image, record: Any, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> bytes:
    """The bytes of a PNG of `picture` with `record` and `tensors` in it. texts: further text entries (prompt, workflow)."""
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    info.add_itxt(KEY, json.dumps(record, ensure_ascii=False, allow_nan=False))
    info.add(CHUNK, zlib.compress(save(dict(tensors)), 3))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def unpack(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """(record, tensors) of a PNG file. DataError where there are none, or where they are damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(KEY)
            packed = next((chunk[1] for chunk in getattr(image, "private_chunks", ()) if chunk[0] == CHUNK), None)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: expected a PNG file, found: {error}. Choose another file.") from error
    if text is None or packed is None:
        raise DataError(
            f"{path}: expected a picture saved by Save Trace, found one without a trace. Choose the file that Save Trace "
            "wrote; programs that save a picture anew drop what is in it."
        )
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(packed, LARGEST)
        if unpacker.unconsumed_tail:
            raise ValueError(f"more than {LARGEST} bytes")
        return json.loads(text), load(raw)
    except (ValueError, KeyError, TypeError, zlib.error, RuntimeError) as error:
        raise damaged(path, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """What to say of a file whose trace cannot be read."""
    return DataError(f"{path}: expected a whole trace, found a damaged one ({error!r}). Save it again.")


def unpacked(stored: torch.Tensor) -> torch.Tensor:
    """A stored picture (1, 3, H, W), in 8 bits where that lost nothing, as floats in 0..1."""
    return stored.to(torch.float32) / 255 if stored.dtype == torch.uint8 else stored
