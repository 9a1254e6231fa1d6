"""Which documents share a pack, and which rank works on it when. Made once per epoch, offline and without communication.

A plan is a pure function of its arguments: the shuffle is by hash of seed, epoch and document id, so every rank and every
loader worker makes the same plan, and resuming needs no more than (epoch, cursor).

    draw      every document as often as the mixture says, in shuffled order
    fill      packs of two budgets, best fit: of the next `lookahead` documents the largest that still fits
    deal      packs of like cost share an optimizer step; inside a step the costliest packs go to the least loaded ranks

P packs, U units (the packs of one rank in one optimizer step: `accumulation` of them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256

import numpy as np

from ...reasonedit_core.errors import ConfigError
from ..noise import digest
from ..types import FM, NTP
from .filling import Draw, Filler, NoRoom
from .plan import IMAGE_COST, TEXT_COST, Budgets, Cost, Item, Plan, Refused, item_cost

__all__ = ["IMAGE_COST", "LOOKAHEAD", "TEXT_COST", "Budgets", "Cost", "Item", "Plan", "Refused", "item_cost", "plan"]

LOOKAHEAD = 256
"""Documents that a pack is filled from. 64 are enough for 0.99 at 8k tokens; more cost little."""

SHUFFLES = 4
"""Shuffles that are tried before an epoch that needs more packs than it may have takes the documents of epoch 0 together."""


def plan(
    items: Sequence[Item],
    *,
    seed: int,
    epoch: int,
    world: int = 1,
    budgets: Budgets,
    accumulation: int = 1,
    window: int = 64,
    mandatory: Sequence[str] = (),
    mixture: Mapping[str, float] | None = None,
    shortest: bool = False,
    steps: int | None = None,
    lookahead: int = LOOKAHEAD,
) -> Plan:
    """Plan one epoch.

    window: packs of one rank among which packs of like cost are brought together. mandatory: losses or kinds of which every
    rank gets at least one document in every optimizer step. mixture: share of each kind, by count of records; None: every
    record once. With a mixture the epoch lasts until every record has come once, and some come again (with `shortest`: until
    all records of one kind have come; of the other kinds another part comes in each epoch). steps: optimizer steps that the
    epoch must have.

    Raises ConfigError where this cannot be done, saying what to change. Over-long documents are in `refused`.
    """
    if min(world, accumulation, window, lookahead) < 1:
        raise ConfigError(
            f"expected world, accumulation, window and lookahead of at least 1, found {world}, {accumulation}, {window}, "
            f"{lookahead}. Correct the recipe."
        )
    names = Counter(item.id for item in items)
    if len(names) < len(items):
        raise ConfigError(f"expected every document under an id of its own, found {names.most_common(1)[0][0]!r} twice.")
    usable, refused, unused = _usable(items, budgets, mixture)
    filler = Filler(items, budgets, world, accumulation, tuple(mandatory), lookahead)
    packs, left_out = _packs_of_epoch(filler, usable, seed, epoch, mixture, shortest, steps)
    costs = np.array([sum(item_cost(items[draw[1]]) for draw in pack) for pack in packs])
    dealt = _deal(packs, costs, filler, max(1, window // accumulation), seed, epoch)
    return _result(items, [packs[p] for p in dealt], costs[dealt], filler, refused, unused, left_out)


def _usable(
    items: Sequence[Item], budgets: Budgets, mixture: Mapping[str, float] | None
) -> tuple[list[int], tuple[Refused, ...], dict[str, int]]:
    """(indices of the items that can be planned, the others with the reason, documents of kinds not in the mixture)."""
    usable, refused = [], []
    unused: Counter[str] = Counter()
    for index, item in enumerate(items):
        if mixture is not None and not mixture.get(item.kind):
            unused[item.kind] += 1
            continue
        over = [name for name in ("text", "image") if getattr(item, name) > getattr(budgets, name)]
        if over:
            (stream, *_) = over
            why = f"{getattr(item, stream):,} {stream} tokens, more than the {getattr(budgets, stream):,} of a pack"
            refused.append(Refused(item.id, f"{why}: raise packs.{stream}, shorten the text, or train at a smaller size"))
        elif item.text + item.image <= 0 or item.loss not in (NTP, FM):
            raise ConfigError(f"{item.id!r}: expected tokens and one of the losses {NTP}, {FM}; found {item}.")
        else:
            usable.append(index)
    if not usable:
        few = "; ".join(map(str, refused[:3])) or f"{len(items)} were given, of kinds {', '.join(sorted(unused)) or 'none'}"
        raise ConfigError(f"expected documents to plan, found none that can be used ({few}). Correct data or mixture.")
    return usable, tuple(refused), dict(unused)


# ---- how often each document comes ---------------------------------------------------------------------------------------


def _draw(
    items: Sequence[Item],
    usable: Sequence[int],
    seed: int,
    epoch: int,
    salt: int,
    mixture: Mapping[str, float] | None,
    shortest: bool,
) -> list[Draw]:
    """The documents of an epoch in shuffled order, each under its place in that order. Mixtures count records."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for index in usable:
        kinds.setdefault(items[index].kind, {}).setdefault(items[index].record, []).append(index)
    times = _times(kinds, mixture, shortest)
    drawn: list[tuple[int, int, bool]] = []
    for kind, records in kinds.items():
        whole, rest = divmod(times[kind], len(records))
        drawn += [(i, number, number > 0) for own in records.values() for i in own for number in range(whole)]
        further = _rest(sorted(records), seed, epoch, rest)
        drawn += [(i, whole + number, True) for record, number in further for i in records[record]]
    keys = {(index, number): digest(seed, epoch, salt, "order", items[index].id, number) for index, number, _ in drawn}
    drawn.sort(key=lambda each: keys[each[:2]])
    return [(place, *each) for place, each in enumerate(drawn)]


def _times(
    kinds: Mapping[str, Mapping[str, Sequence[int]]], mixture: Mapping[str, float] | None, shortest: bool
) -> dict[str, int]:
    """How many records of each kind an epoch has, repeats counted."""
    if mixture is None:
        return {kind: len(records) for kind, records in kinds.items()}
    absent = sorted(kind for kind, share in mixture.items() if share > 0 and kind not in kinds)
    if absent:
        raise ConfigError(
            f"mixture: expected records of kind {', '.join(absent)}, found none that can be used. Add some, or take the kind "
            "out of the mixture."
        )
    scale = (min if shortest else max)(len(records) / mixture[kind] for kind, records in kinds.items())
    return {kind: max(1, round(mixture[kind] * scale)) for kind in kinds}


def _rest(records: Sequence[str], seed: int, epoch: int, rest: int) -> list[tuple[str, int]]:
    """`rest` further records of a kind, going on through all of them from epoch to epoch, so that all come equally often.

    The number is how often a record was among them before, in this epoch.
    """
    taken: list[tuple[str, int]] = []
    times: Counter[str] = Counter()
    orders: dict[int, list[str]] = {}
    for place in range(epoch * rest, (epoch + 1) * rest):
        turn, at = divmod(place, len(records))
        if turn not in orders:
            orders[turn] = sorted(records, key=lambda record: digest(seed, "turn", turn, record))
        record = orders[turn][at]
        taken.append((record, times[record]))
        times[record] += 1
    return taken


def _packs_of_epoch(
    filler: Filler,
    usable: Sequence[int],
    seed: int,
    epoch: int,
    mixture: Mapping[str, float] | None,
    shortest: bool,
    steps: int | None,
) -> tuple[list[list[Draw]], int]:
    """The packs of an epoch, and how many repeats had to be left out."""

    def shuffles(of_epoch: int) -> Iterator[list[Draw]]:
        return (_draw(filler.items, usable, seed, of_epoch, salt, mixture, shortest) for salt in range(SHUFFLES))

    if steps is None:
        return _first_that_works(shuffles(epoch), lambda draws: _as_many_as_needed(filler, draws)), 0
    n_packs = steps * filler.world * filler.accumulation
    for draws in shuffles(epoch):
        try:
            packs, left = filler.fill(draws, n_packs)
        except NoRoom:
            continue
        if all(packs) and all(draw[3] for draw in left):
            return packs, len(left)

    def exactly(draws: list[Draw]) -> list[list[Draw]]:
        packs, left = filler.fill(draws, n_packs)
        if left:
            raise NoRoom(
                f"expected {steps} optimizer steps to hold the documents of an epoch, found {len(left)} left over. Plan with "
                "more steps, or leave their number to the planner."
            )
        return packs

    # Some orders of the documents need a pack more than others. Those of epoch 0 are known to do with this many.
    return _first_that_works(shuffles(0), exactly), 0


def _as_many_as_needed(filler: Filler, draws: list[Draw]) -> list[list[Draw]]:
    """The fewest packs into which best fit brings the draws."""
    n_packs = filler.least(draws)
    while True:
        packs, left = filler.fill(draws, n_packs)
        if not left:
            return packs
        n_packs = max(filler.whole(n_packs + 1), n_packs + filler.least(left) - filler.whole(1))


def _first_that_works(shuffles: Iterable[list[Draw]], fill: Callable[[list[Draw]], list[list[Draw]]]) -> list[list[Draw]]:
    error: NoRoom | None = None
    for draws in shuffles:
        try:
            return fill(draws)
        except NoRoom as found:
            error = error or found
    assert error is not None
    raise error


# ---- dealing -------------------------------------------------------------------------------------------------------------


def _deal(packs: list[list[Draw]], costs: np.ndarray, filler: Filler, window: int, seed: int, epoch: int) -> list[int]:
    """Numbers of the packs in the order of the plan. window: optimizer steps among which units are exchanged."""
    world, accumulation = filler.world, filler.accumulation
    unit_costs = costs.reshape(-1, accumulation).sum(1)
    order: list[int] = []
    for first in range(0, len(unit_costs), window * world):
        units = list(range(first, min(first + window * world, len(unit_costs))))
        units.sort(key=lambda u: (-unit_costs[u], u))
        steps = [units[at : at + world] for at in range(0, len(units), world)]
        steps.sort(key=lambda step: digest(seed, epoch, "step", step[0]))
        for step in steps:
            ranks = _ranks(step, packs, costs, filler)
            ranks.sort(key=lambda own: digest(seed, epoch, "rank", own[0]))
            order += [p for own in ranks for p in own]
    return order


def _ranks(step: Sequence[int], packs: list[list[Draw]], costs: np.ndarray, filler: Filler) -> list[list[int]]:
    """The packs of one optimizer step by rank: longest processing time first, unless a rank would lack what is mandatory."""
    accumulation = filler.accumulation
    units = [list(range(u * accumulation, (u + 1) * accumulation)) for u in step]
    if accumulation == 1:
        return units
    ranks: list[list[int]] = [[] for _ in step]
    loads = [0.0] * len(step)
    for p in sorted((p for unit in units for p in unit), key=lambda p: (-costs[p], p)):
        rank = min((r for r in range(len(step)) if len(ranks[r]) < accumulation), key=lambda r: (loads[r], r))
        ranks[rank].append(p)
        loads[rank] += costs[p]
    complete = all(any(filler.has(d, name) for p in own for d in packs[p]) for own in ranks for name in filler.mandatory)
    better = max(loads) <= max(sum(costs[p] for p in unit) for unit in units)
    return ranks if complete and better else units


def _result(
    items: Sequence[Item],
    packs: list[list[Draw]],
    costs: np.ndarray,
    filler: Filler,
    refused: tuple[Refused, ...],
    unused: Mapping[str, int],
    left_out: int,
) -> Plan:
    draws = [draw for pack in packs for draw in pack]
    order = np.array([draw[1] for draw in draws], dtype=np.int64)
    numbers = np.array([draw[2] for draw in draws], dtype=np.int32)
    starts = np.cumsum([0, *(len(pack) for pack in packs)], dtype=np.int64)
    tokens = np.array([filler.totals(pack) for pack in packs], dtype=np.int64)
    hasher = sha256(repr((filler.world, filler.accumulation, filler.budgets)).encode())
    for draw in draws:
        hasher.update(digest(items[draw[1]].id, draw[2]))
    hasher.update(starts.tobytes())
    return Plan(
        world=filler.world,
        accumulation=filler.accumulation,
        budgets=filler.budgets,
        order=order,
        numbers=numbers,
        starts=starts,
        cost=costs,
        tokens=tokens,
        counts=dict(Counter(items[draw[1]].kind for draw in draws)),
        refused=refused,
        unused=unused,
        left_out=left_out,
        hash=hasher.hexdigest(),
    )
