"""What a run leaves behind: `rounds/NN.png`, `trace.json`, `result.png` and `sheet.png` in one folder.

Every round is on the disk before the next one starts, and every file is whole at any moment, so an interrupted run leaves
valid files of all that was paid for.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .drafts import draft_request
from .errors import ConfigError
from .files import write_json, write_whole
from .images import to_pil
from .types import Counts, EditTrace, Round, Scores

log = logging.getLogger(__name__)

TRACE_VERSION = 1
ROUNDS, TRACE, RESULT, SHEET = "rounds", "trace.json", "result.png", "sheet.png"


def trace_record(trace: EditTrace, counts: Counts, run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of trace.json. run: what the request itself does not know (image path, system, dialogue pack, ...)."""
    asked = trace.request
    request = {
        "instruction": asked.instruction,
        "seed": asked.seed,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "size_level": asked.size_level,
        "negative": asked.negative,
        "max_rounds": asked.max_rounds,
        "max_seconds": asked.max_seconds,
        "think": asked.think,
        "reflect": asked.reflect,
    }
    if asked.image_guidance is not None:
        request["image_guidance"] = asked.image_guidance
    if asked.region is not None:
        request["region"] = asked.region.record()
    if asked.guidance_interval is not None:
        request["guidance_interval"] = [asked.guidance_interval.low, asked.guidance_interval.high]
    if asked.step_cache is not None:
        request["step_cache"] = asdict(asked.step_cache)
    if asked.draft is not None:
        request["draft"] = asdict(asked.draft)
    return {
        "version": TRACE_VERSION,
        "request": {**request, **(run or {})},
        "thought": trace.thought and {"original": trace.thought.original, "instruction": trace.thought.instruction},
        "target": trace.target,
        "rounds": [_round_record(done) | _draft_record(done, trace) for done in trace.rounds],
        "best": trace.best,
        "stop_reason": trace.stop_reason or "running",
        "counts": asdict(counts),
    }


def picture_name(index: int) -> str:
    """Path of a round's picture, relative to the run's folder, with slashes on every system."""
    return f"{ROUNDS}/{index:02d}.png"


def with_alpha(picture: torch.Tensor, alpha: torch.Tensor | None) -> Image.Image:
    """(1, 3, H, W) and the source's alpha (1, 1, h, w) or None -> the image as it is saved; alpha is fitted to its size."""
    image = to_pil(picture)
    if alpha is None:
        return image
    mask = to_pil(alpha.expand(-1, 3, -1, -1)).getchannel(0)
    image.putalpha(mask if mask.size == image.size else mask.resize(image.size, Image.Resampling.BICUBIC))
    return image


def encode_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """The bytes of a PNG file with text entries."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


class RunFolder:
    """The folder of one run. Made at the first write, so that a run that fails before leaves nothing.

    Files of other origin are never touched; of an earlier run in the same folder those files are replaced or removed that
    its trace.json names, so that pictures and trace always belong together.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        alpha: torch.Tensor | None = None,
        run: Mapping[str, Any] | None = None,
        counts: Callable[[], Counts] = Counts,
        note: str = "",
    ) -> None:
        """alpha: (1, 1, H, W) of the source, put back on every picture. counts: asked at every write. note: for the sheet."""
        self.folder, self.note = Path(folder), note
        self._alpha, self._run, self._counts = alpha, dict(run or {}), counts
        self.ran: Callable[[], Sequence[str]] | None = None
        """Which attention backends have run, for trace.json."""
        self._pictures: dict[int, bytes] = {}
        self._started = False
        # asked now, not after the first edit is paid for
        standing = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        if not standing.is_dir():
            raise ConfigError(f"--out: expected a folder, found the file {standing}; choose another name")
        if not os.access(standing, os.W_OK | os.X_OK):
            raise ConfigError(f"--out: expected a folder that can be written, found {standing}, which cannot; choose another")

    def describe(self, **run: Any) -> None:
        """Add to what trace.json says under `request`."""
        self._run.update(run)

    def write_round(self, trace: EditTrace) -> None:
        """Store the pictures that are new in `trace`, then the trace. Serves as `on_round` of the loop."""
        if not self._started:
            self._clear_earlier_run()
            self._started = True
        for done in trace.rounds:
            if done.index not in self._pictures:
                texts = {"instruction": done.instruction, "round": str(done.index)}
                self._pictures[done.index] = encode_png(with_alpha(done.image, self._alpha), texts)
                write_whole(self.folder / picture_name(done.index), self._pictures[done.index])
        ran = {} if self.ran is None else {"attention_ran": list(self.ran())}
        write_json(self.folder / TRACE, trace_record(trace, self._counts(), self._run | ran))

    def finish(self, trace: EditTrace) -> Path:
        """Store what is left of the run: the last trace, the result (the best round's very file) and the sheet."""
        from .sheet import draw_sheet

        self.write_round(trace)
        source = with_alpha(trace.request.image, self._alpha)
        result = encode_png(source, {}) if trace.best is None else self._pictures[trace.best]
        write_whole(self.folder / RESULT, result)
        pictures = [source, *(with_alpha(done.image, self._alpha) for done in trace.rounds)]
        write_whole(self.folder / SHEET, encode_png(draw_sheet(trace, pictures, self.note), {}))
        return self.folder / RESULT

    def _clear_earlier_run(self) -> None:
        try:
            earlier = json.loads((self.folder / TRACE).read_text(encoding="utf-8"))
            ours = earlier["version"] <= TRACE_VERSION and "stop_reason" in earlier
            count = len(earlier["rounds"]) if ours else 0
        except (OSError, ValueError, KeyError, TypeError):
            return  # nothing here, or nothing of ours
        # names are made again from the count, not read: a trace.json from elsewhere cannot make us delete its paths
        stale = [self.folder / picture_name(index) for index in range(count)] + [self.folder / SHEET, self.folder / RESULT]
        for path in (*stale, self.folder / TRACE) if ours else ():
            path.unlink(missing_ok=True)


def _round_record(done: Round) -> dict[str, Any]:
    seen, used = done.reflection, done.edited.region
    return {
        "index": done.index,
        "instruction": done.instruction,
        "input_index": done.input_index,
        "image": picture_name(done.index),
        "decision": seen.decision.value if seen else None,
        "reason": seen.reason if seen else None,
        "next_instruction": seen.instruction if seen else None,
        "scores": _scores_record(seen.scores) if seen else None,
        "seconds": round(done.seconds, 3),
        **({} if used is None else {"region": used.record()}),
    }


def _draft_record(done: Round, trace: EditTrace) -> dict[str, Any]:
    """Of runs with drafts: the steps of a round, and the draft that it repeats."""
    request = trace.request
    if request.draft is None:
        return {}
    drafted = request.reflect and done.full_of is None
    return {"steps": (draft_request(request) if drafted else request).steps, "full_of": done.full_of}


def _scores_record(scores: Scores) -> dict[str, Any]:
    return {
        "edit": None if scores.edit is None else list(scores.edit),
        "quality": None if scores.quality is None else list(scores.quality),
        "consistency": scores.consistency,
        "consistency_reason": scores.consistency_reason,
    }
