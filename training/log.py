"""What a run leaves for eyes: a JSONL line per optimizer step, TensorBoard where it is installed, progress, loss curves.

log.jsonl in the run folder: one object per line. Lines with "event": "step" have step, epoch, cursor, loss, losses, parts,
grad_norm, lr, samples_per_s, tokens_per_s, step_s, data_s, fill and records (a hash of the ids of the step's records, in
the order of ranks). Other events: start, resume, save, a hook's name, stop, error, end. A run that was killed and taken up
again has some steps twice: `read_log` keeps those of the last time.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..reasonedit_core.errors import ConfigError

log = logging.getLogger(__name__)

LOG, CURVES = "log.jsonl", "curves.png"


class RunLog:
    """Writes the log of one run; on ranks other than 0 (write=False) it does nothing.

    steps: optimizer steps of the whole run, for the progress line. line_every: steps between two progress lines where there
    is no terminal. tensorboard, curves: whether to write them where tensorboard and matplotlib are installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        write: bool,
        steps: int,
        start: int = 0,
        line_every: int = 10,
        tensorboard: bool = True,
        curves: bool = True,
    ) -> None:
        self.run_dir, self._curves = Path(run_dir), curves
        self._file = _open(self.run_dir / LOG) if write else None
        self._board = _tensorboard(self.run_dir, start) if write and tensorboard else None
        self._progress = Progress(steps, start, line_every) if write else None

    def event(self, event: str, **values: Any) -> None:
        """One line, written through to the file at once."""
        if self._file is not None:
            line = json.dumps(_json({"event": event, **values}), ensure_ascii=False, allow_nan=False)
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                log.error("%s cannot be written (%s); training goes on without it", self.run_dir / LOG, error)
                self._file = None

    def step(self, figures: Mapping[str, Any]) -> None:
        """The figures of one optimizer step, everywhere."""
        self.event("step", **figures)
        self.scalars(figures["step"], {key: value for key, value in figures.items() if key not in ("step", "records")})
        if self._progress is not None:
            self._progress.show(figures)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers for TensorBoard; a table of numbers becomes a group of curves."""
        if self._board is not None:
            for key, value in flat(values):
                self._board.add_scalar(key, value, step)

    def close(self) -> Path | None:
        """Close everything and draw the loss curves; returns their picture, or None where there is none."""
        if self._progress is not None:
            self._progress.close()
        if self._board is not None:
            self._board.close()
        if self._file is None:
            return None
        self._file.close()
        self._file = None
        return draw_curves(self.run_dir) if self._curves else None


class Progress:
    """A bar on a terminal, else a plain line through `logging` every so many steps."""

    def __init__(self, steps: int, start: int, line_every: int) -> None:
        self.steps, self.line_every = steps, max(1, line_every)
        self._pace: float | None = None
        self._bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def show(self, figures: Mapping[str, Any]) -> None:
        """Figures of a step that has been done."""
        seconds = figures.get("step_s") or 0.0
        self._pace = seconds if self._pace is None else 0.9 * self._pace + 0.1 * seconds
        if self._bar is not None:
            self._bar.set_postfix_str(summary(figures), refresh=False)
            self._bar.update(1)
        elif figures["step"] % self.line_every == 0 or figures["step"] == self.steps:
            left = _clock((self.steps - figures["step"]) * self._pace)
            log.info("step %d/%d  %s  left %s", figures["step"], self.steps, summary(figures), left)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def summary(figures: Mapping[str, Any]) -> str:
    """The figures of a step in a line: losses, largest gradient norm, rates, and what share of the time waited for data."""
    losses = " ".join(f"{name} {value:.4f}" for name, value in figures.get("losses", {}).items())
    words = [f"loss {figures['loss']:.4f}" + (f" ({losses})" if len(figures.get("losses", {})) > 1 else "")]
    if figures.get("grad_norm"):
        words.append(f"grad {max(figures['grad_norm'].values()):.3g}")
    if figures.get("step_s"):
        words.append(f"{figures['samples_per_s']:.3g} samples/s {figures['tokens_per_s']:.4g} tokens/s")
        words.append(f"data {100 * figures['data_s'] / figures['step_s']:.0f}%")
    return "  ".join(words)


def record_hash(ids: Iterable[str]) -> str:
    """Twelve digits that tell whether two steps had the same records in the same order."""
    return sha256("\n".join(ids).encode()).hexdigest()[:12]


def device_name(device: torch.device) -> str:
    """What computes, for logs: the card's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {threads}"


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log without those that a resume has made void, and without a torn last line.

    Raises ConfigError where there is no log.
    """
    path = Path(run_dir) / LOG
    if not path.is_file():
        raise ConfigError(f"expected a log at {path}, found none; name the folder of a stage of a run.")
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # what a killed process was writing
        if line.get("event") == "resume":
            lines = [one for one in lines if one.get("step", 0) <= line["step"]]
        lines.append(line)
    return lines


def draw_curves(run_dir: str | Path) -> Path | None:
    """curves.png in the run folder: losses, gradient norms and rates over steps, and the figures of hooks as dots.

    Returns None where matplotlib is missing or no step was logged.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("matplotlib is not installed: no loss curves are drawn")
        return None
    lines = read_log(run_dir)
    steps = [line for line in lines if line["event"] == "step"]
    if not steps:
        return None
    hooks = [line for line in lines if line["event"] == "hook"]
    names = sorted({name for line in steps for name in line["losses"]})
    panels = [(f"{name} loss", _series(steps, "losses", name)) for name in names]
    figure = Figure(figsize=(6.4 * (len(panels) + 1), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels) + 1, squeeze=False)
    for axis, (title, (x, y)) in zip(axes[0], panels, strict=False):
        _curve(axis, x, y, title)
    _family(axes[0][-1], steps, "grad_norm", "gradient norm", log_scale=True)
    _family(axes[1][0], steps, "lr", "learning rate")
    _hook_figures(axes[1][1], hooks)
    for axis in axes[1][2:]:
        axis.set_axis_off()
    path = Path(run_dir) / CURVES
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        log.error("%s cannot be written (%s)", path, error)
        return None
    return path


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """The finite numbers of nested tables, with keys joined by a slash."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean with the bias of its start taken out."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _curve(axis: Any, x: Sequence[int], y: Sequence[float], title: str) -> None:
    axis.plot(x, y, color="tab:blue", alpha=0.35, linewidth=0.8)
    axis.plot(x, smoothed(y), color="tab:blue", linewidth=1.6)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def _family(axis: Any, steps: Sequence[Mapping[str, Any]], key: str, title: str, log_scale: bool = False) -> None:
    for number, name in enumerate(sorted({name for line in steps for name in line.get(key) or {}})):
        x, y = _series(steps, key, name)
        axis.plot(x, y, label=name, linewidth=1.2, linestyle=("-", "--", ":", "-.")[number % 4])  # equal ones stay visible
    axis.set_title(title)
    axis.set_xlabel("step")
    if log_scale and any(line.get_ydata().min() > 0 for line in axis.get_lines() if len(line.get_ydata())):
        axis.set_yscale("log")
    if axis.get_lines():
        axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


def _hook_figures(axis: Any, hooks: Sequence[Mapping[str, Any]]) -> None:
    if not hooks:
        axis.set_axis_off()
        return
    table: dict[str, list[tuple[int, float]]] = {}
    for line in hooks:
        for key, value in flat(line.get("figures") or {}):
            table.setdefault(f"{line['name']} {key}", []).append((line["step"], value))
    for name, points in table.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.0, label=name)
    axis.set_title("held out")
    axis.set_xlabel("step")
    if table:
        axis.legend(fontsize="x-small")
    axis.grid(alpha=0.3)


def _series(steps: Sequence[Mapping[str, Any]], key: str, name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key][name]) for line in steps if (line.get(key) or {}).get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _json(value: Any) -> Any:
    """Numbers that JSON lacks (NaN, infinity) become null."""
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open(path: Path) -> Any:
    """The log for appending, on a line of its own even where a killed process left half a line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes()[-1:] == b"\n"
        file = open(path, "a", encoding="utf-8")
        file.write("\n" if torn else "")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another run folder.") from error
    return file


def _tensorboard(run_dir: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed: figures are in %s only", run_dir / LOG)
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1 if start else None)


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
