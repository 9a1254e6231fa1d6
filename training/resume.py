"""When a run may go on from a checkpoint: what must be the same, what may differ with permission, and where it goes on."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from ..reasonedit_core.errors import CheckpointError, ConfigError
from .checkpoint import Position, versions
from .types import PackSource

log = logging.getLogger(__name__)

WORLD, DATA = "world", "data"
"""Keys that every identity has: the number of ranks, and the fingerprint of the source."""


def same_as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as it will be read back from a checkpoint (tuples become lists). Raises ConfigError if JSON cannot."""
    try:
        return json.loads(json.dumps(dict(identity)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"expected an identity of JSON values, found {identity}: {error}; give plain values.") from error


def accept(
    state: Mapping[str, Any], identity: Mapping[str, Any], allowed: Collection[str], source: PackSource, world: int
) -> Position:
    """The position to go on from. state: a checkpoint's state.json; identity: of the run that wants to go on.

    Every key that differs must be named in `allowed` (`a` stands for `a.b` too). Another number of ranks must be named, and
    the checkpoint must stand at the end of an epoch, or of a window of the plan if the source has a method
    `moved(epoch, cursor, world) -> int | None` that gives the cursor in the plan for the new number of ranks (None: not at
    the end of a window). Raises CheckpointError listing what differs, ConfigError for a name that is no key.
    """
    saved = state["identity"]
    known = {*saved, *identity}
    for name in allowed:
        if not any(_covers(name, key) for key in known):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(sorted(known))}."
            raise ConfigError(f"--allow-changed {name}: expected a key of the run's identity; {hint}")
    missing = object()
    differing = [key for key in sorted(known) if saved.get(key, missing) != identity.get(key, missing)]
    refused = [key for key in differing if not any(_covers(name, key) for name in allowed)]
    if refused:
        pairs = [(key, _short(saved.get(key)), _short(identity.get(key))) for key in refused]
        lines = "".join(f"\n  {key}: {before} in the checkpoint, {now} now" for key, before, now in pairs)
        names = " ".join(f"--allow-changed {key}" for key in refused)
        raise CheckpointError(
            f"the run would not go on as it began, {len(refused)} values differ:{lines}\nPut them back, or allow them by name "
            f"({names}); the run is then no longer the one that was interrupted."
        )
    for key in differing:
        log.warning("%s changed from %s to %s, as allowed", key, _short(saved.get(key)), _short(identity.get(key)))
    _warn_of_versions(state.get("versions", {}))
    at = state["position"]
    position = Position(at["step"], at["epoch"], at["cursor"])
    if WORLD not in differing:
        return position
    return _moved(position, saved[WORLD], world, source)


def _moved(position: Position, before: int, world: int, source: PackSource) -> Position:
    cursor: int | None = 0
    if position.cursor:
        moved = getattr(source, "moved", None)
        cursor = moved(position.epoch, position.cursor, before) if moved else None
    if cursor is None:
        raise CheckpointError(
            f"expected {before} ranks, which wrote this checkpoint in the middle of epoch {position.epoch} (cursor "
            f"{position.cursor}), found {world}: the records of an epoch are dealt out to a fixed number of ranks. Resume with "
            f"{before} ranks, or from a checkpoint at the end of an epoch or of a plan window."
        )
    log.warning("going on with %d ranks instead of %d: from here on the run is not the one it was to the bit", world, before)
    return Position(position.step, position.epoch, cursor)


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _warn_of_versions(saved: Mapping[str, str]) -> None:
    now = versions()
    changed = [f"{name} {old} -> {now.get(name, 'none')}" for name, old in saved.items() if now.get(name) != old]
    if changed:
        log.warning("other than when the checkpoint was written: %s; the same bits are not promised", ", ".join(changed))
