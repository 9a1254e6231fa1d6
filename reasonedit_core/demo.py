"""`reasonedit demo`: three scenes that no training has seen, the whole loop with real weights, and the exact judge beside it.

The weights are a miniature that the package carries. The code is the one that runs the released checkpoints; the judge sees
the pictures only and has no part in the loop, so its marks say what the loop's own verdicts are worth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .errors import ConfigError
from .files import write_json, write_whole
from .images import to_pil
from .load import System, SystemSpec, load_system
from .mini.items import Item
from .mini.judge import Judgement
from .mini.models import MINIS
from .mini.scenes import draw, judge_picture, shown_items
from .report import RunFolder, encode_png
from .run import Bars, outcome_line, round_line, run_to_folder, short
from .sheet import draw_rows
from .types import Counts, EditRequest, EditTrace

DEFAULT = "mini-s"
SEED = 1
"""Of the scenes. Set before there were weights to look good on them."""

ROUNDS = 3
SIDE = 224
"""Width of a picture with its frame on the sheet: 96 pixels are drawn twice as large."""

TRACE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Shown:
    """One scene of the demonstration. marks: the judge's, one per round."""

    item: Item
    folder: str
    trace: EditTrace
    marks: tuple[Judgement, ...]


def demo(
    out: Path,
    *,
    system: str = DEFAULT,
    seed: int = SEED,
    quiet: bool = False,
    tell: Callable[[str], None],
    say: Callable[[str], None],
) -> list[Shown]:
    """Run the demonstration and write it to `out`. tell: the lines of the report; say: remarks on the way.

    Each scene has a folder of its own, as `reasonedit edit` writes it, with its source and the picture that is wanted beside
    it; sheet.png shows all three, trace.json tells of them.
    """
    if system not in MINIS:
        raise ConfigError(f"--system: expected one of {', '.join(MINIS)}, found {system!r}; choose one of them")
    started, bars, shown = time.monotonic(), Bars(quiet), []
    out = Path(out)
    RunFolder(out)  # a place that cannot be written is told of before the weights are loaded
    with _one_thread():
        with bars.loading() as on_progress:
            loaded = load_system(SystemSpec(system), on_progress=on_progress)
        tell(f"{system}: {loaded.settings.notice}".rstrip(": "))
        for number, item in enumerate(shown_items(seed), start=1):
            tell(f"\nscene {number} ({item.knowledge}): {item.instruction}")
            shown.append(_run(loaded, system, item, out, str(number), bars, say))
            for line in report_lines(shown[-1]):
                tell(line)
    write_whole(out / "sheet.png", encode_png(contact_sheet(shown, system, loaded.settings.notice), {}))
    write_json(out / "trace.json", record(shown, system, seed))
    folders = ", ".join(f"{each.folder}/" for each in shown)
    tell(f"\nwritten in {time.monotonic() - started:.1f} s: {out / 'sheet.png'}, trace.json, {folders}")
    return shown


def _run(loaded: System, system: str, item: Item, out: Path, name: str, bars: Bars, say: Callable[[str], None]) -> Shown:
    run = {"image": f"held-out scene {item.seed} ({item.rule})", "system": system, "policy": "reasonedit"}
    run |= {"concrete": item.concrete, "dialogue": dict(loaded.pack_origin or {})}
    before = replace(loaded.counts)
    folder = RunFolder(out / name, run=run, counts=lambda: _since(before, loaded.counts), note=loaded.settings.notice)
    source = draw(item.source)
    request = EditRequest(
        image=source,
        instruction=item.instruction,
        seed=item.seed,
        steps=loaded.defaults["steps"],
        guidance=loaded.defaults["guidance"],
        size_level=loaded.defaults["size_level"],
        negative=loaded.defaults["negative"],
        max_rounds=ROUNDS,
    )
    trace = run_to_folder(loaded, request, loaded.policy, folder, bars=bars, say=say)
    for file, picture in (("source", source), ("wanted", draw(item.target))):
        write_whole(out / name / f"{file}.png", encode_png(to_pil(picture), {}))
    return Shown(item, name, trace, tuple(judge_picture(item, done.image) for done in trace.rounds))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several cores, by far where the machine has many, or other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _since(before: Counts, now: Counts) -> Counts:
    return Counts(**{name: value - getattr(before, name) for name, value in asdict(now).items()})


# ---- what is told --------------------------------------------------------------------------------------------------------


def judge_line(mark: Judgement) -> str:
    """The judge's marks in one line."""
    asked, kept = ([holds for _, holds in claims] for claims in (mark.asked, mark.kept))
    return (
        f"judge {mark.overall:.1f} of 10: {sum(asked)} of {len(asked)} changes made, {sum(kept)} of {len(kept)} others kept, "
        f"quality {mark.quality:.1f}"
    )


def report_lines(shown: Shown) -> list[str]:
    """What a scene's run came to: the thought, a line per round with a line of the judge, the outcome, what was wanted."""
    trace = shown.trace
    lines = [f"  thought: {short(trace.goal, 150)}"]
    for done, mark in zip(trace.rounds, shown.marks, strict=True):
        lines += [f"  {round_line(done)}", f"    {judge_line(mark)}"]
    return [*lines, f"  {outcome_line(trace)}", f"  wanted: {shown.item.concrete}"]


def contact_sheet(shown: list[Shown], system: str, note: str = "") -> Image.Image:
    """All scenes on one page: the source, every round with its verdict and the judge's mark, and what was wanted."""
    rows = []
    for each in shown:
        trace = each.trace
        pictures = [("source (best)" if trace.best is None else "source", to_pil(trace.request.image))]
        for done, mark in zip(trace.rounds, each.marks, strict=True):
            verdict = done.reflection.decision.value if done.reflection else "not judged"
            best = " (best)" if done.index == trace.best else ""
            pictures.append((f"round {done.index + 1}: {verdict}{best}\njudge {mark.overall:.1f}", to_pil(done.image)))
        pictures.append(("wanted", to_pil(draw(each.item.target))))
        rows.append((f"{each.item.instruction}\n{trace.goal}", pictures))
    title = f"{system}: think, edit, reflect"
    words = "Verdicts are the system's own. The judge reads the pixels exactly and has no part in the loop. "
    return draw_rows(title, rows, words + note, card=SIDE)


def record(shown: list[Shown], system: str, seed: int) -> dict[str, Any]:
    """What trace.json holds: per scene what was asked, where its own trace lies, and the judge's marks."""
    scenes = []
    for each in shown:
        item = each.item
        marks = [
            {name: round(getattr(mark, name), 3) for name in ("overall", "success", "preservation", "quality")}
            for mark in each.marks
        ]
        scenes.append(
            {
                "rule": item.rule,
                "knowledge": item.knowledge,
                "instruction": item.instruction,
                "thought": each.trace.goal,
                "wanted": item.concrete,
                "best": each.trace.best,
                "stop_reason": each.trace.stop_reason,
                "trace": f"{each.folder}/trace.json",
                "judge": marks,
            }
        )
    return {"version": TRACE_VERSION, "system": system, "seed": seed, "scenes": scenes}
