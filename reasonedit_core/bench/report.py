"""The report: the machine, tables with the ratio first, JSON, a plot."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .clock import TOTAL

IDEALS = {"step1x": 59.8e9, "qwen_image": 71.6e9}
"""Bytes that the design estimates for fused ops which read and write each tensor once."""


def machine(threads: int | None = None) -> dict[str, Any]:
    """What the figures were taken on. No name of the host."""
    import torch

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": _cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads() if threads is None else threads,
    }
    for name in ("diffusers", "transformers"):
        found[name] = _version(name)
    return found


def processor() -> str:
    """The processor's model where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in a line."""
    names = ("system", "processor", "cores", "device", "threads", "python", "torch", "diffusers", "transformers")
    words = {"cores": "{} cores", "threads": "{} threads", "python": "Python {}", "torch": "torch {}"}
    words |= {"diffusers": "diffusers {}", "transformers": "transformers {}"}
    return "machine: " + ", ".join(words.get(name, "{}").format(found[name]) for name in names)


# ---- counted -------------------------------------------------------------------------------------------------------------


def counted_lines(counted: Mapping[str, Any]) -> list[str]:
    """Counts in words, each beside what it is compared with."""
    from .counted import RELEASED, RELEASED_LOOP

    released, whose = counted.get("step1x_released", {}), "the released, counted here"
    if "kernels" not in released:
        why = f"; not counted here: {released['missing']}" if released else ""
        released, whose = RELEASED, f"the released (figures of an earlier count{why})"
    peers = {"step1x": (whose, released), "qwen_image": ("diffusers'", counted["qwen_image_diffusers"])}
    lines = ["counted, one forward at full size (1024 x 1024, one reference, 640 text tokens, bf16):"]
    for name, (whose, peer) in peers.items():
        ours = counted[name]
        for label, work in ((name, ours), (f"{name}, later steps", ours["later"])):
            shares = [work[key] / peer[key] for key in ("elementwise_bytes", "kernels")]
            lines.append(
                f"  {shares[0]:.3f}x bytes  {shares[1]:.3f}x ops  {work['elementwise_bytes'] / 1e9:7.1f} GB  "
                f"{work['kernels']:5d} ops  {work['flops'] / 1e12:7.2f} TFLOP  {label}"
            )
        gb, ops, tera = peer["elementwise_bytes"] / 1e9, peer["kernels"], peer["flops"] / 1e12
        lines.append(f"  1.000x bytes  1.000x ops  {gb:7.1f} GB  {ops:5d} ops  {tera:7.2f} TFLOP  {whose}")
        custom = ", ".join(ours["custom_ops"]) or "none"
        lines.append(f"    ideal by estimate {IDEALS[name] / 1e9:.1f} GB; own operators on the path: {custom}")
    loop = counted["loop"]
    lines.append(f"counted, one loop with thinking, {loop['rounds']} rounds (refine, refine, success), tiny weights:")
    for key, words in (
        ("vision_passes", "pictures through the vision tower"),
        ("generate_calls", "questions to the MLLM"),
        ("sequential_calls", "dependent calls in the longest round"),
        ("prefill_tokens", "tokens read for answers"),
        ("condition_tokens", "tokens read to condition the denoiser"),
        ("decode_steps", "decoding steps"),
        ("retries", "answers that could not be read"),
    ):
        released = f" (released {RELEASED_LOOP[key]})" if key in RELEASED_LOOP else ""
        lines.append(f"  {loop[key]:6d}  {words}{released}")
    return lines


# ---- timed ---------------------------------------------------------------------------------------------------------------


def timed_lines(timed: Sequence[Mapping[str, Any]], not_run: Sequence[Mapping[str, str]]) -> list[str]:
    """A table per group, the ratio first; then the arms that did not run."""
    lines: list[str] = []
    for group in dict.fromkeys(entry["group"] for entry in (*timed, *not_run)):
        entries = [entry for entry in timed if entry["group"] == group]
        baseline = next((entry["baseline"] for entry in entries), None)
        runs = max((len(entry["times"]) for entry in entries), default=0)
        lines.append(f"timed, {group}" + (f" (runs in turn: {runs}; ratio to: {baseline})" if baseline else ""))
        for entry in entries:
            ratio = "      -" if entry["ratio"] is None else f"{entry['ratio']:6.2f}x"
            part = "" if entry["part"] == TOTAL else f", {entry['part']}"
            apart = entry.get("difference")
            seen = "" if apart is None else f" (its picture: mean difference {apart:.2f} of 255)"
            lines.append(f"  {ratio}  {_seconds(entry['median'])} +- {_seconds(entry['spread'])}  {entry['arm']}{part}{seen}")
        lines += [f"  not run: {one['missing']}  [{one['arm']}]" for one in not_run if one["group"] == group]
    return lines


def plot(timed: Sequence[Mapping[str, Any]], path: Path) -> str | None:
    """Bars of the medians, a panel per group, as a PNG. None, or why there is no picture."""
    whole = {entry["group"] for entry in timed if entry["part"] == TOTAL}
    # Arms that have no total are compared part by part, and so drawn.
    entries = [entry for entry in timed if entry["part"] == TOTAL or entry["group"] not in whole]
    if not entries:
        return "arms that ran"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib (pip install matplotlib)"
    groups = list(dict.fromkeys(entry["group"] for entry in entries))
    figure = Figure(figsize=(9, 1 + 1.1 * len(groups) + 0.16 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, group in enumerate(groups, 1):
        rows = [entry for entry in entries if entry["group"] == group]
        axes = figure.add_subplot(len(groups), 1, place)
        medians, spreads = ([row[name] for row in rows] for name in ("median", "spread"))
        bars = axes.barh(range(len(rows)), medians, xerr=spreads, color="#4c78a8")
        labels = ["" if row["ratio"] is None else f" {row['ratio']:.2f}x" for row in rows]
        axes.bar_label(bars, labels=labels, label_type="edge", padding=3)
        names = [row["arm"] + ("" if row["part"] == TOTAL else f", {row['part']}") for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(group, loc="left", fontsize=10)
        axes.set_xlabel("seconds, median of runs in turn")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return None


def _seconds(value: float) -> str:
    return f"{value:8.3f} s" if value >= 0.1 else f"{1e3 * value:7.2f} ms"


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
