"""What ranks tell each other about the micro-steps of one optimizer step, and the line of the log that it becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reasonedit_core.errors import ConfigError, PackingError, ReasonEditError
from .distributed import Ranks
from .loader import places
from .log import record_hash
from .signals import Request
from .types import MicroStep

STREAMS = ("text", "image")


@dataclass(slots=True)
class Window:
    """One rank's share of an optimizer step.

    sums: of the losses, by name. parts: (sum, count) by name. bad: a line for every loss that is not finite. records: ids in
    the order of packs. places: per stream, (tokens of documents, tokens computed, packs). data_s: seconds waited for data.
    request: what this rank was asked for since the last boundary.
    """

    sums: dict[str, float] = field(default_factory=dict)
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    data_s: float = 0.0
    request: Request | None = None


def count_over_ranks(loaded: Any, losses: Sequence[str], ranks: Ranks, where: str) -> dict[str, float]:
    """What each loss is divided by: counts over the window and all ranks. loaded: the micro-steps of this rank, or the error
    that loading them raised, which every rank hears of here and raises.

    Raises also ConfigError for counts of a loss that has no weight, and PackingError for windows that fsdp2 cannot run.
    """
    failure = loaded if isinstance(loaded, ReasonEditError) else None
    micros: Sequence[MicroStep] = () if failure else loaded
    own = {name: float(sum(micro.counts.get(name, 0.0) for micro in micros)) for name in losses}
    unknown = sorted({name for micro in micros for name in micro.counts} - set(own))
    shape = [_calls(micro) for micro in micros]
    told = ranks.agree((failure, unknown, shape, own))
    for rank, (failed, foreign, _, _) in enumerate(told):
        if failed:
            raise type(failed)(f"{where}, rank {rank}: {failed}") from (failed if rank == ranks.rank else None)
        if foreign:
            raise ConfigError(
                f"{where}, rank {rank}: expected losses of {', '.join(losses)}, found counts of {', '.join(foreign)}; give "
                "them a weight, or leave records of this kind out of the mixture."
            )
    if ranks.sharded and any(other != told[0][2] for _, _, other, _ in told):
        found = "; ".join(f"rank {rank}: {', '.join(other)}" for rank, (_, _, other, _) in enumerate(told))
        raise PackingError(
            f"{where}: under fsdp2 every rank must run the same units in the same order, found {found}; plan windows in which "
            "every micro-step has all mandatory streams, or use parallel = ddp."
        )
    return {name: sum(counted[name] for *_, counted in told) for name in losses}


def gather(
    micros: Sequence[MicroStep],
    losses: Sequence[Mapping[str, float]],
    parts: Sequence[Mapping[str, tuple[float, float]]],
    where: str,
) -> Window:
    """The window of one rank from the loss sums and parts of its micro-steps. where: the step and the rank, for errors."""
    window = Window(records=[record for micro in micros for record in micro.records], places=places(micros))
    for number, sums in enumerate(losses):
        for name, value in sums.items():
            window.sums[name] = window.sums.get(name, 0.0) + value
            if not math.isfinite(value):
                ids = shown(micros[number].records)
                window.bad.append(f"{value} for {name} at {where}, micro-step {number} of records {ids}")
    for one in parts:
        add_parts(window.parts, one)
    return window


def figures(
    windows: Sequence[Window],
    counts: Mapping[str, float],
    weights: Mapping[str, float],
    budgets: Mapping[str, int],
    seconds: float,
) -> dict[str, Any]:
    """Losses, parts, speed, fill and the hash of records over the windows of all ranks.

    counts: what each loss is divided by. weights: what its mean is multiplied by in the whole. budgets: tokens of a full pack
    by stream; where there is none, padding counts as what is not filled.
    """
    losses = {name: sum(one.sums.get(name, 0.0) for one in windows) / count for name, count in counts.items() if count}
    parts: dict[str, tuple[float, float]] = {}
    for one in windows:
        add_parts(parts, one.parts)
    ids = [record for one in windows for record in one.records]
    fill, tokens = {}, 0
    for stream in STREAMS:
        columns = zip(*(one.places.get(stream, (0, 0, 0)) for one in windows), strict=True)
        real, computed, packs = (sum(column) for column in columns)
        tokens += real
        room = budgets.get(stream, 0) * packs or computed
        if room:
            fill[stream] = real / room
    return {
        "loss": sum(weights[name] * value for name, value in losses.items()),
        "losses": losses,
        "parts": {name: total / count for name, (total, count) in sorted(parts.items()) if count},
        "counts": dict(counts),
        "samples_per_s": len(set(ids)) / seconds,
        "tokens_per_s": tokens / seconds,
        "step_s": seconds,
        "data_s": max(one.data_s for one in windows),
        "fill": fill,
        "records": record_hash(ids),
    }


def _calls(micro: MicroStep) -> str:
    """Which forwards a micro-step causes: quoted characters that have no embeddings yet are one more of the MLLM."""
    image = micro.image
    quotes = image is not None and image.states is None and image.quoted is not None and image.quoted_embeds is None
    called = {"text": micro.text is not None, "image": image is not None, "quotes": quotes}
    return "+".join(name for name, there in called.items() if there)


def add_parts(into: dict[str, tuple[float, float]], more: Mapping[str, tuple[float, float]]) -> None:
    """Add sums and counts by name."""
    for name, (total, count) in more.items():
        before = into.get(name, (0.0, 0.0))
        into[name] = (before[0] + total, before[1] + count)


def shown(records: Sequence[str]) -> str:
    """The first ids of a list, for errors."""
    more = f" and {len(records) - 8} more" if len(records) > 8 else ""
    return f"{', '.join(records[:8])}{more}"
