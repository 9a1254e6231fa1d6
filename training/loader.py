"""Optimizer steps out of a PackSource, in the order of their cursors, prepared by 0 or more worker processes.

The order is a list of cursors and the loader's generator is private, so nothing here draws from the global generators and
any number of workers hands out the same.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..reasonedit_core.errors import DataError, ReasonEditError
from ..reasonedit_core.packing import PADDING
from .signals import ignore_in_worker
from .types import MicroStep, PackSource

Cursor = tuple[int, int]
"""(epoch, cursor) of an optimizer step."""


def cursors(source: PackSource, epoch: int, cursor: int, steps: int) -> Iterator[Cursor]:
    """`steps` cursors from (epoch, cursor) on. Raises DataError for a source without steps."""
    length = len(source)
    if length < 1:
        raise DataError("expected a plan of at least one optimizer step, found none; add records, or make budgets smaller.")
    for number in range(epoch * length + cursor, epoch * length + cursor + steps):
        yield divmod(number, length)


def load_ahead(source: PackSource, order: Sequence[Cursor], workers: int) -> Iterator[tuple[Cursor, Any]]:
    """Each cursor of `order` with its micro-steps, or with the ReasonEditError that loading it raised.

    Errors are handed out as values: all ranks must hear of one before any of them stops.
    """
    loader = DataLoader(
        _Steps(source, as_bytes=workers > 0),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(0),
        collate_fn=_same,
    )
    for cursor, loaded in zip(order, loader, strict=True):
        yield cursor, pickle.loads(loaded) if isinstance(loaded, bytes) else loaded  # noqa: S301 (from our own worker)


def places(micros: Sequence[MicroStep]) -> dict[str, tuple[int, int, int]]:
    """Per stream, (tokens that are documents', tokens that are computed, packs), for the log."""
    counted = {}
    for stream in ("text", "image"):
        packs = [pack for pack in (getattr(micro, stream) for micro in micros) if pack is not None]
        ids = [part for one in packs for part in ((one.doc_id,) if stream == "text" else (one.image_doc, one.text_doc))]
        if packs:
            counted[stream] = (sum(int((one != PADDING).sum()) for one in ids), sum(len(one) for one in ids), len(packs))
    return counted


class _Steps(Dataset):
    """A PackSource as a dataset over cursors.

    as_bytes: pickled whole. Torch would send every tensor through a file handle of its own, and a window of packs held
    ahead by several workers has more tensors than a process may have handles.
    """

    def __init__(self, source: PackSource, as_bytes: bool) -> None:
        self.source, self.as_bytes = source, as_bytes

    def __getitem__(self, cursor: Cursor) -> Any:
        try:
            loaded: Any = list(self.source.load(*cursor))
        except ReasonEditError as error:
            loaded = error
        return pickle.dumps(loaded, protocol=pickle.HIGHEST_PROTOCOL) if self.as_bytes else loaded


def _same(value: Any) -> Any:
    return value
