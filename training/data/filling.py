"""Packs with two budgets, filled best fit first: a pack begins with the next document in shuffled order and goes on with the
largest of those behind it that still fit.

Everything here follows from the documents in their shuffled order and the settings; nothing is drawn.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence

from ...reasonedit_core.errors import ConfigError
from .plan import Budgets, Item

SLACKS = (1.02, 1.1, 1.3, 2.0)
"""How far above the mean a pack may be filled, the first that works, before it may be full: what there is too little of to fill
all packs is then spread over the whole epoch and not used up by its first packs."""

Draw = tuple[int, int, int, bool]
"""(place in the shuffle, index of the item, how manieth time, whether it is a repeat that may be left out)."""


class NoRoom(ConfigError):
    """What is mandatory does not go together in this order of the documents; in another it may."""


class Shelf:
    """Documents of one sort waiting to be packed: a queue in shuffled order, of which the next `lookahead` lie open, sorted
    by size in `stream` (0 text, 1 image). names: what is mandatory and these documents are."""

    def __init__(
        self, draws: Sequence[Draw], items: Sequence[Item], stream: int, names: tuple[str, ...], lookahead: int
    ) -> None:
        self._queue = deque(draws)
        self._items, self._lookahead = items, lookahead
        self.stream, self.names = stream, names
        self._open: list[tuple[int, int, Draw]] = []  # (size, place in the shuffle, draw), by size
        self._waiting: dict[int, Draw] = {}  # the same by place in the shuffle, the first one first
        self._refill()

    def __len__(self) -> int:
        return len(self._open) + len(self._queue)

    def waiting(self) -> list[Draw]:
        """What has not been taken."""
        return [entry[2] for entry in self._open] + list(self._queue)

    def largest(self, room: Sequence[float]) -> int | None:
        """Where the largest open document that fits into room (text, image) lies; None when none does."""
        at = bisect_right(self._open, (room[self.stream], math.inf)) - 1
        while at >= 0 and self._size(self._open[at][2], 1 - self.stream) > room[1 - self.stream]:
            at -= 1
        return at if at >= 0 else None

    def oldest(self, room: Sequence[float]) -> int | None:
        """Where that open document lies which waits longest of those that fit; None when none does."""
        for place, draw in self._waiting.items():
            size = self._size(draw, self.stream)
            if size <= room[self.stream] and self._size(draw, 1 - self.stream) <= room[1 - self.stream]:
                return bisect_left(self._open, (size, place))
        return None

    def size(self, at: int) -> int:
        """Size of an open document in the shelf's stream."""
        return self._open[at][0]

    def place(self, at: int) -> int:
        """Place of an open document in the shuffle."""
        return self._open[at][1]

    def take(self, at: int) -> Draw:
        """Take an open document."""
        _, place, draw = self._open.pop(at)
        del self._waiting[place]
        self._refill()
        return draw

    def open_all(self) -> None:
        """Look at every document, not only at the next ones."""
        self._lookahead = len(self)
        self._refill()

    def _size(self, draw: Draw, stream: int) -> int:
        item = self._items[draw[1]]
        return item.image if stream else item.text

    def _refill(self) -> None:
        while self._queue and len(self._open) < self._lookahead:
            draw = self._queue.popleft()
            insort(self._open, (self._size(draw, self.stream), draw[0], draw))
            self._waiting[draw[0]] = draw


class Filler:
    """Puts draws into packs. Everything it does follows from the draws and the settings."""

    def __init__(
        self, items: Sequence[Item], budgets: Budgets, world: int, accumulation: int, mandatory: tuple[str, ...], lookahead: int
    ) -> None:
        self.items, self.budgets = items, budgets
        self.world, self.accumulation = world, accumulation
        self.mandatory, self.lookahead = mandatory, lookahead
        self.most = (budgets.text, budgets.image)

    def has(self, draw: Draw, name: str) -> bool:
        """Whether a document is of the loss or kind `name`."""
        item = self.items[draw[1]]
        return name in (item.loss, item.kind)

    def least(self, draws: Sequence[Draw]) -> int:
        """Fewest packs that can hold the draws, a multiple of world * accumulation."""
        totals = self.totals(draws)
        return self.whole(max(1, *(-(-total // most) for total, most in zip(totals, self.most, strict=True))))

    def whole(self, n_packs: int) -> int:
        """The next multiple of what all ranks work on in one optimizer step."""
        step = self.world * self.accumulation
        return -(-n_packs // step) * step

    def totals(self, draws: Sequence[Draw]) -> tuple[int, int]:
        """Text and image tokens."""
        chosen = [self.items[draw[1]] for draw in draws]
        return sum(item.text for item in chosen), sum(item.image for item in chosen)

    def fill(self, draws: Sequence[Draw], n_packs: int) -> tuple[list[list[Draw]], list[Draw]]:
        """Exactly `n_packs` packs, none of them empty, and the draws for which there was no room."""
        self._enough(draws, n_packs)
        totals = self.totals(draws)
        evenly = [
            tuple(min(most, slack * total / n_packs) for total, most in zip(totals, self.most, strict=True)) for slack in SLACKS
        ]
        for caps in dict.fromkeys((*evenly, self.most)):
            packs, fixed, left = self._fill(draws, n_packs, caps)
            if not left:
                self._share_out(packs, fixed)
                break
        return packs, left

    def _enough(self, draws: Sequence[Draw], n_packs: int) -> None:
        """Refuse to make more packs than there are documents, or than there are mandatory ones."""
        if len(draws) < n_packs:
            raise ConfigError(
                f"expected at least one document for each of the {n_packs} packs of an epoch ({self.world} ranks x "
                f"{self.accumulation} packs per optimizer step), found {len(draws)} documents. Add records, or lower "
                "packs.accumulation or the number of ranks."
            )
        n_units = n_packs // self.accumulation
        for name in self.mandatory:
            n_found = sum(self.has(draw, name) for draw in draws)
            if n_found < n_units:
                raise ConfigError(
                    f"mixture.mandatory: expected a document of {name} for each rank in each optimizer step ({n_units} in an "
                    f"epoch), found {n_found}. Raise the share of {name} in the mixture, or packs.accumulation."
                )

    def _shelves(self, draws: Sequence[Draw]) -> list[Shelf]:
        """A shelf for each sort of documents; those with pictures first, as they fit worst."""
        sorts: dict[tuple[int, tuple[str, ...]], list[Draw]] = {}
        for draw in draws:
            names = tuple(name for name in self.mandatory if self.has(draw, name))
            sorts.setdefault((int(self.items[draw[1]].image > 0), names), []).append(draw)
        return [
            Shelf(some, self.items, stream, names, self.lookahead)
            for (stream, names), some in sorted(sorts.items(), key=lambda sort: (-sort[0][0], sort[0][1]))
        ]

    def _fill(
        self, draws: Sequence[Draw], n_packs: int, caps: Sequence[float]
    ) -> tuple[list[list[Draw]], set[int], list[Draw]]:
        """(packs filled up to `caps`, places of the documents that are mandatory where they are, what is left)."""
        shelves = self._shelves(draws)
        packs: list[list[Draw]] = [[] for _ in range(n_packs)]
        fixed: set[int] = set()
        for first in range(0, n_packs, self.accumulation):
            unit = packs[first : first + self.accumulation]
            used = [[0, 0] for _ in unit]
            fixed |= self._mandatory(unit, used, shelves)
            units_after = (n_packs - first) // self.accumulation - 1
            for pack, so_far in zip(unit, used, strict=True):
                self._top_up(pack, so_far, shelves, caps, units_after)
        return packs, fixed, sorted(draw for shelf in shelves for draw in shelf.waiting())

    def _mandatory(self, unit: list[list[Draw]], used: list[list[int]], shelves: Sequence[Shelf]) -> set[int]:
        """Put one document of everything mandatory into a unit; returns their places in the shuffle."""
        places = set()
        for name in self._by_stream(shelves):
            if any(self.has(draw, name) for pack in unit for draw in pack):
                continue
            draw, pack = self._one_of(name, unit, used, shelves)
            self._add(unit[pack], used[pack], draw)
            places.add(draw[0])
        return places

    def _by_stream(self, shelves: Sequence[Shelf]) -> list[str]:
        """The mandatory names, those of documents with pictures first."""
        return sorted(self.mandatory, key=lambda name: -max(shelf.stream for shelf in shelves if name in shelf.names))

    def _one_of(self, name: str, unit: list[list[Draw]], used: list[list[int]], shelves: Sequence[Shelf]) -> tuple[Draw, int]:
        """The document of `name` that waits longest of those that fit into the unit's emptiest packs, and the pack."""
        chosen = [shelf for shelf in shelves if name in shelf.names and len(shelf)]
        for thorough in (False, True):
            for pack in sorted(range(len(unit)), key=lambda p: (sum(used[p]), p)):
                room = [most - u for most, u in zip(self.most, used[pack], strict=True)]
                if thorough:
                    for shelf in chosen:
                        shelf.open_all()
                found = [(shelf, at) for shelf in chosen if (at := shelf.oldest(room)) is not None]
                if found:
                    shelf, at = min(found, key=lambda each: each[0].place(each[1]))
                    return shelf.take(at), pack
        beside = ", ".join(repr(self.items[draw[1]].id) for pack in unit for draw in pack) or "nothing"
        raise NoRoom(
            f"mixture.mandatory: expected room for a document of each of {', '.join(self.mandatory)} in the packs of a rank, "
            f"found none of {name} that fits beside {beside}. Raise packs.text or packs.image, or packs.accumulation."
        )

    def _top_up(
        self, pack: list[Draw], used: list[int], shelves: Sequence[Shelf], caps: Sequence[float], units_after: int
    ) -> None:
        """Fill a pack up to `caps`, leaving the later units what is mandatory there.

        An empty pack takes the document that waits longest, so that none waits for ever and the same ones do not meet in
        every epoch; then the largest that fit follow.
        """
        for stream in (1, 0):
            while True:
                # What is larger than an even share still has to go somewhere: an empty pack takes it.
                room = [limit - u for limit, u in zip(caps if pack else self.most, used, strict=True)]
                best: tuple[int, Shelf, int] | None = None
                for shelf in shelves:
                    if shelf.stream == stream and len(shelf) and self._spare(shelf, shelves, units_after):
                        at = shelf.largest(room) if pack else shelf.oldest(room)
                        if at is not None:
                            merit = shelf.size(at) if pack else -shelf.place(at)
                            best = max(best or (merit, shelf, at), (merit, shelf, at), key=lambda each: each[0])
                if best is None:
                    break
                self._add(pack, used, best[1].take(best[2]))

    def _spare(self, shelf: Shelf, shelves: Sequence[Shelf], units_after: int) -> bool:
        """Whether a shelf has more than the later units must get of it."""
        return all(sum(len(s) for s in shelves if name in s.names) > units_after for name in shelf.names)

    def _add(self, pack: list[Draw], used: list[int], draw: Draw) -> None:
        item = self.items[draw[1]]
        pack.append(draw)
        used[0] += item.text
        used[1] += item.image

    def _share_out(self, packs: list[list[Draw]], fixed: set[int]) -> None:
        """Give packs that stayed empty half of the fullest one's documents; those in `fixed` stay where they are."""
        for pack in packs:
            if pack:
                continue
            loose = [[draw for draw in other if draw[0] not in fixed] for other in packs]
            spare = [min(len(some), len(other) - 1) for some, other in zip(loose, packs, strict=True)]
            giver = max(range(len(packs)), key=lambda p: (spare[p], -p))
            if spare[giver] < 1:
                raise ConfigError(
                    f"expected documents for all of the {len(packs)} packs, found too few beside the mandatory ones. Add "
                    "records, or lower packs.accumulation or the number of ranks."
                )
            given = loose[giver][: (spare[giver] + 1) // 2]
            pack += given
            packs[giver] = [draw for draw in packs[giver] if draw not in given]
