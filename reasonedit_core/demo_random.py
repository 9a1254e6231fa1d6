"""`reasonedit demo`: the whole loop, from picture to sheet, on tiny random weights made on the spot.

The code is the one that runs the released checkpoints; only the weights are small and random, so the pictures and the words
mean nothing. What it shows is that everything is wired and works on this machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from .dialogue.pack import Pack
from .dialogue.packfile import format_pack
from .dialogue.prompts import load_pack
from .files import write_json, write_whole
from .images import Picture, from_pil, load_image
from .load import SystemSpec, load_system
from .loop import POLICIES
from .mini.builder import build_checkpoint
from .report import RunFolder
from .run import Bars, outcome_line, round_line, run_to_folder
from .settings import FILE_NAME
from .types import EditRequest, EditTrace

INSTRUCTION = "What would this look like after a night of heavy snow?"
ROUNDS, SEED = 3, 26
PIXELS = (64 * 28 * 28, 128 * 28 * 28)
SETTINGS = {"steps": 8, "size_level": 256, "conditioner_pixels": PIXELS, "reasoner_pixels": PIXELS}
"""What the demonstration's checkpoint states in its reasonedit.json: small pictures, few steps."""

REPLY_TOKENS = 40
"""Budget per reply: random weights never come to an end by themselves, and nobody reads what they write."""


def demo(
    image: Path | None,
    out: Path,
    *,
    quiet: bool = False,
    tell: Callable[[str], None],
    say: Callable[[str], None],
) -> EditTrace:
    """Run the demonstration and write it to `out`. tell: the lines of the report; say: remarks on the way."""
    picture, origin = choose_picture(image)
    tell(f"picture: {origin}")
    tell("weights: tiny and random, made on the spot; this shows the wiring only, pictures and words mean nothing")
    with _one_thread():
        trace = _run(picture, origin, out, Bars(quiet), say)
    for done in trace.rounds:
        tell(round_line(done))
    tell(outcome_line(trace))
    tell(f"written: {out / 'sheet.png'}, trace.json, rounds/, result.png")
    return trace


def _run(picture: Picture, origin: str, out: Path, bars: Bars, say: Callable[[str], None]) -> EditTrace:
    run = {"image": origin, "system": "reasonedit-s", "policy": "reasonedit", "weights": "tiny, random", "device": "cpu"}
    note = "Tiny random weights: the wiring is shown, pictures and words mean nothing."
    folder = RunFolder(out, alpha=picture.alpha, run=run, counts=lambda: system.counts, note=note)
    with tempfile.TemporaryDirectory(prefix="reasonedit-demo-") as temporary:
        weights = build_checkpoint("step1x-v1p2", Path(temporary) / "weights", seed=SEED)
        write_whole(weights / "dialogue.toml", format_pack(short_pack()).encode())
        write_json(weights / FILE_NAME, SETTINGS)
        spec = SystemSpec(system="reasonedit-s", weights=weights, dtype="float32", device="cpu", seed=SEED)
        with bars.loading() as on_progress:
            system = load_system(spec, on_progress=on_progress)
        request = EditRequest(
            image=picture.rgb,
            instruction=INSTRUCTION,
            seed=SEED,
            steps=system.defaults["steps"],
            guidance=system.defaults["guidance"],
            size_level=system.defaults["size_level"],
            negative=system.defaults["negative"],
            max_rounds=ROUNDS,
        )
        return run_to_folder(system, request, POLICIES["reasonedit"], folder, bars=bars, say=say)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several cores, by far where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def short_pack() -> Pack:
    """Our own English dialogue pack with short replies."""
    pack = load_pack("en")
    tasks = {name: replace(prompt, max_new_tokens=REPLY_TOKENS) for name, prompt in pack.tasks.items()}
    return replace(pack, name="demo", tasks=tasks)


def choose_picture(image: Path | None) -> tuple[Picture, str]:
    """The picture of the demonstration, and where it comes from in words."""
    if image is not None:
        return load_image(image), str(image)
    if find_spec("skimage") is not None:
        try:
            from skimage import data

            return Picture(from_pil(Image.fromarray(data.chelsea()))), "the photograph `chelsea` of scikit-image"
        except (ImportError, OSError, ValueError) as error:  # a release that no longer ships it, and no network
            return Picture(from_pil(draw_picture())), f"drawn by the demo (scikit-image could not give one: {error})"
    return Picture(from_pil(draw_picture())), "drawn by the demo (scikit-image, which has photographs, is not installed)"


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
