"""Dialogue packs in use: which one a run speaks from, and how a question is made of it.

Everything that is said to an MLLM is data: a pack is a TOML file (our own: `packs/*.toml`; a user's own; one imported from
the released code, see `importer`). Its values are in `pack`, its file format in `packfile`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..interfaces import Query
from .pack import (
    OWN_LANGUAGES,
    TASKS,
    ConditioningPrompt,
    Pack,
    Part,
    TaskPrompt,
    fill,
    language_of,
    variant_key,
)
from .packfile import parse_pack

if TYPE_CHECKING:
    import torch

__all__ = [
    "ConditioningPrompt",
    "Pack",
    "PackChoice",
    "TaskPrompt",
    "default_pack",
    "find_pack",
    "language_of",
    "load_pack",
    "render",
]

log = logging.getLogger(__name__)


def render(
    pack: Pack,
    task: str,
    language: str,
    images: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    *,
    seed: int = 0,
) -> Query:
    """The question of one task. images: `source` and `result`, (1, 3, H, W) in 0..1; values: by placeholder.

    `original` that is absent counts as the instruction itself, and a part that needs it (`when`) is left out then.
    """
    pack = pack.in_language(language)
    prompt, rule = pack.task(task), TASKS[task]
    given = {key: value for key, value in values.items() if value is not None}
    known = {"original": given.get("instruction", ""), "language": pack.languages.get(language, language), **given}
    used: list[torch.Tensor] = []
    parts: list[str | int] = []
    for part in prompt.user:
        if part.when is not None and not given.get(part.when):
            continue
        if part.image is not None:
            parts.append(len(used))
            used.append(images[part.image])
        elif parts and isinstance(parts[-1], str):
            parts[-1] += fill(part.text, known)
        else:
            parts.append(fill(part.text, known))
    return Query(
        rule.name,
        fill(prompt.system, known),
        tuple(parts),
        tuple(used),
        prompt.form,
        prompt.max_new_tokens,
        prompt.temperature,
        prompt.top_p,
        seed,
    )


# ---- which pack ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackChoice:
    """The pack a run speaks from. origin: explicit, weights, models or own. reason: one sentence for the log and the trace.

    filled: what the file lacked and our own wording supplies. warning: one sentence for the user, already logged, or None.
    """

    pack: Pack
    origin: str
    reason: str
    warning: str | None = None
    filled: tuple[str, ...] = ()


def find_pack(
    *,
    explicit: str | Path | None = None,
    weights: str | Path | None = None,
    models_dir: str | Path | None = None,
    language: str = "en",
    variant: str | None = None,
) -> PackChoice:
    """Choose the pack of a run, and log the choice.

    In this order: `explicit`; `dialogue.toml` in the weights folder (or beside the weights file); the first file of
    `models_dir`/reasonedit/dialogue/*.toml, one that knows `variant` preferred; our own. What the chosen file lacks is
    filled from our own wording. variant: `v1p2`, `v1p1`, `v1p0`, or None for systems without a conditioning prompt here.
    """
    key = variant_key(variant) if variant else None
    path, origin, why = _locate(explicit, weights, models_dir, key)
    if path is None:
        pack, filled = default_pack(language), ()
    else:
        pack, filled = _completed(load_pack(path), language, key)
    reason = f"dialogue pack {pack.name!r} version {pack.version} ({pack.path}): {why}"
    if filled:
        reason += f"; from our own wording: {', '.join(filled)}"
    warning = None
    if key == "step1x-v1p2" and (not pack.imported or f"conditioning.{key}" in filled):
        folder = Path(weights) if weights is not None else Path("WEIGHTS")
        target = (folder.parent if folder.is_file() else folder) / "dialogue.toml"
        warning = (
            "These weights were trained with the released prompts, and the dialogue pack in use is worded differently: import "
            f'the released one from your copy of the released code with: reasonedit dialogue import SOURCE --out "{target}"'
        )
        log.warning("%s", warning)
    log.info("%s", reason)
    return PackChoice(pack, origin, reason, warning, filled)


def _locate(explicit, weights, models_dir, key: str | None) -> tuple[Path | str | None, str, str]:
    """(file, origin, why); file None means our own wording."""
    if explicit is not None:
        return explicit, "explicit", "named by the user"
    if weights is not None:
        folder = Path(weights).parent if Path(weights).is_file() else Path(weights)
        if (folder / "dialogue.toml").is_file():
            return folder / "dialogue.toml", "weights", "found in the weights folder"
    folder = Path(models_dir) / "reasonedit" / "dialogue" if models_dir is not None else None
    candidates = sorted(folder.glob("*.toml")) if folder is not None and folder.is_dir() else []
    if candidates:
        knowing = [path for path in candidates if key in load_pack(path).conditioning]
        why = f"first of {len(candidates)} in {folder}"
        return (knowing or candidates)[0], "models", why + (f" that has [conditioning.{key}]" if knowing else "")
    return None, "own", "no pack was named or found, so our own wording is used"


def _completed(pack: Pack, language: str, key: str | None) -> tuple[Pack, tuple[str, ...]]:
    """The pack with its gaps filled from our own wording, in each language where it serves all; and what was filled."""
    own = default_pack(language)
    if pack.language != "any":
        return _filled(pack, own.in_language(pack.language), key)
    whole, filled = _filled(pack, own, key)
    return replace(whole, translations={code: _filled(pack, own.in_language(code), key)[0] for code in OWN_LANGUAGES}), filled


def _filled(pack: Pack, own: Pack, key: str | None) -> tuple[Pack, tuple[str, ...]]:
    names = {rule.name for name, rule in TASKS.items() if name in pack.tasks}
    # A task in one of its two forms (result alone, source and result) is there: it is not mixed with our other form.
    missing = {name: prompt for name, prompt in own.tasks.items() if TASKS[name].name not in names}
    tasks = {**pack.tasks, **missing}
    conditioning = {**own.conditioning, **pack.conditioning}
    lacking = [key] if key in conditioning and key not in pack.conditioning else []
    whole = replace(
        pack,
        tasks={**tasks, "think": _with_feedback(tasks["think"], own.tasks["think"])},
        conditioning=conditioning,
        correction=pack.correction or own.correction,
    )
    return whole, (*(f"task.{name}" for name in missing), *(f"conditioning.{name}" for name in lacking))


def _with_feedback(prompt: TaskPrompt, own: TaskPrompt) -> TaskPrompt:
    """The released prompt has no words for an earlier failure: ours stand before its last text, which cues the answer.

    Without feedback the prompt renders as it stands in the file.
    """
    if any(part.when == "feedback" for part in prompt.user):
        return prompt
    parts = tuple(part for part in own.user if part.when == "feedback")
    at = max(index for index, part in enumerate(prompt.user) if part.image is None)
    blank = Part(text=("\n\n",), when="feedback")
    return replace(prompt, user=(*prompt.user[:at], *parts, blank, *prompt.user[at:]))


def default_pack(language: str = "en") -> Pack:
    """Our own wording, English and Chinese in one pack; `language` is the one that answers where nothing else decides."""
    packs = {code: load_pack(code) for code in OWN_LANGUAGES}
    if language not in packs:
        raise ConfigError(f"expected one of the languages {', '.join(packs)}, found {language!r}.")
    return replace(packs[language], translations=packs)


def load_pack(source: str | Path) -> Pack:
    """Read a pack: a file, or the name of one of our own (`en`, `zh`). Raises ConfigError naming file, key and remedy."""
    if isinstance(source, str) and source in OWN_LANGUAGES:
        entry = files(__package__).joinpath("packs", f"{source}.toml")
        return parse_pack(entry.read_text(encoding="utf-8"), f"packs/{source}.toml")
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{path}: expected a dialogue pack (a .toml file), found no such file. "
            "Make one with `reasonedit dialogue import SOURCE --out FILE`, or leave the option out to use our own."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a dialogue pack in UTF-8, found an unreadable file ({error}).") from error
    return parse_pack(text, str(path))
