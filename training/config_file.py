"""Recipes: found by path or bare name, read, overridden with `--set a.b=value`, checked, and written into the run folder.

Relative paths count from the folder the command is started in; the snapshot holds them absolute, except those in `{out}`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.files import write_json
from .config import BASE, OUT, PREVIOUS, Config, Stage

RECIPES = Path(__file__).parent / "recipes"
SNAPSHOT = "config.json"
EVERY_STAGE = "every_stage"
SHOWN = 20

FREE_RUN = ("out", "workers", "device", "threads", "name")
FREE_STAGE = ("save_every", "keep", "log_every", "validation", "samples", "checkpointing")
"""What may change between a run and its resumption without changing what is computed."""

Raw = dict[str, Any]


def load_config(recipe: str | Path, sets: Sequence[str] = ()) -> Config:
    """The recipe at a path, or the bundled one of a bare name, with `sets` (`a.b=value`) put over it.

    Raises ConfigError naming file, key, what was expected and found, and the nearest key where one is unknown.
    """
    path = find_recipe(recipe)
    return make_config(read_recipe(path), str(path), sets)


def make_config(raw: Mapping[str, Any], source: str, sets: Sequence[str] = ()) -> Config:
    """A checked Config of a recipe's tables. source: named in errors."""
    raw = _copy(raw)
    for text in sets:
        _apply_set(raw, text)
    shared = raw.pop(EVERY_STAGE, {})
    stages = raw.get("stage")
    if isinstance(stages, list) and isinstance(shared, Mapping):
        raw["stage"] = [_merged(shared, one) if isinstance(one, Mapping) else one for one in stages]
    try:
        return absolute(Config.model_validate(raw))
    except ValidationError as error:
        raise ConfigError(_explain(error, source, shared)) from None


def find_recipe(recipe: str | Path) -> Path:
    """A file that exists, or the bundled recipe of this name: `tiny_cpu`, also as `training/recipes/tiny_cpu.toml`."""
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    bundled = RECIPES / f"{path.name.removesuffix('.toml')}.toml"
    if bundled.is_file() and path.parent.name in ("", RECIPES.name):
        return bundled
    names = recipe_names()
    near = difflib.get_close_matches(path.name.removesuffix(".toml"), names, 1)
    raise ConfigError(
        f"expected a recipe file or the name of a bundled recipe ({', '.join(names)}), found nothing at {str(recipe)!r}"
        + (f"; did you mean {near[0]}?" if near else ".")
    )


def recipe_names() -> list[str]:
    """The bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(path: Path) -> Raw:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a recipe that can be read, found: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: expected TOML, found: {error}.") from error


def absolute(config: Config) -> Config:
    """The same with every path absolute, except those that lie in `{out}`."""

    def walk(value: Any) -> Any:
        if isinstance(value, Path):
            return value if value.parts[:1] == (OUT,) else Path(value).expanduser().absolute()
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    raw = walk(config.model_dump())
    for stage in raw["stage"]:
        stage["start"] = [
            one if one in (PREVIOUS, BASE) or one.startswith(OUT) else str(Path(one).expanduser().absolute())
            for one in stage["start"]
        ]
    return Config.model_validate(raw)


def write_snapshot(config: Config, source: str) -> Path:
    """Write `config` into its run folder, where `read_snapshot` and every later command find it. source: for people."""
    return write_json(config.out / SNAPSHOT, {"version": 1, "recipe": source, "config": config.model_dump(mode="json")})


def read_snapshot(folder: Path, sets: Sequence[str] = ()) -> Config:
    """The config of the run in `folder`, which may have been moved; `sets` put over it."""
    path = Path(folder) / SNAPSHOT
    if not path.is_file():
        raise ConfigError(f"expected the folder of a run (with {SNAPSHOT}), found none at {folder}. Name its run.out.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["config"]
        raw["run"]["out"] = str(Path(folder).absolute())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected the snapshot of a run, found something else ({error!r}).") from error
    return make_config(raw, str(path), sets)


def decisive(config: Config, stage: Stage) -> dict[str, Any]:
    """What decides the numbers of `stage`, by dotted key: a resumed run is refused where one differs, unless allowed by name.

    Where files lie is not in it; what they hold is in the fingerprints of the manifest and of the starting weights.
    """
    tables = {
        "run": config.run.model_dump(mode="json", exclude=set(FREE_RUN)),
        "model": config.model.model_dump(
            mode="json", exclude={"weights", "text_encoder", "vae", "tokenizer", "dialogue", "drawn"}
        ),
        "data": config.data.model_dump(mode="json", exclude={"records", "cache", "drawn"}),
        "stage": stage.model_dump(mode="json", exclude=set(FREE_STAGE)),
    }
    for table in (tables["model"], tables["stage"]):  # of one system alone; runs of the others know nothing of it
        if table["brain"] is None:
            del table["brain"]
    return dict(_flat(tables, ""))


def config_hash(values: Mapping[str, Any]) -> str:
    """sha256 of plain values, in hex."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _flat(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Raw:
    """Tables merged key by key; `over` wins."""
    result = _copy(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else _copy(value)
    return result


# ---- --set ---------------------------------------------------------------------------------------------------------------


def _apply_set(raw: Raw, text: str) -> None:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text}: expected a.b=value, such as run.out=DIR or stage.0.steps=5, found {text!r}.")
    place: Any = raw
    kind: Any = Config
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if depth == 0 and key == EVERY_STAGE:
            inner: Any = Stage
        elif isinstance(place, list):
            key, inner = _choose(place, key, text), _unwrap(kind)
        else:
            inner = _field(kind, key, text)
        if last:
            _assign(place, key, _value(value.strip(), inner), text)
            return
        if isinstance(place, list):
            place = place[key]
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"--set {text}: expected a table at {'.'.join(keys[: depth + 1])}, found the value {place!r}.")
        kind = inner


def _assign(place: Raw | list, key: Any, value: Any, text: str) -> None:
    if isinstance(place, list):
        raise ConfigError(f"--set {text}: expected a key of the stage, such as {text.partition('=')[0]}.steps=5, found none.")
    if value is None:
        place.pop(key, None)
    else:
        place[key] = value


def _choose(stages: list, key: str, text: str) -> int:
    """The number of the stage that `key` names, by number from 0 or by name."""
    names = [str(one.get("name", "")) if isinstance(one, Mapping) else "" for one in stages]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(stages):
        return int(key)
    listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
    raise ConfigError(f"--set {text}: expected a stage by number or name ({listed}), found {key!r}.")


def _field(kind: Any, key: str, text: str) -> Any:
    """The type of field `key` in a table of type `kind`."""
    kind = _unwrap(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if key not in kind.model_fields:
            raise ConfigError(f"--set {text}: {_unknown(key, kind.model_fields)}")
        return kind.model_fields[key].annotation
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return Any


def _unwrap(kind: Any) -> Any:
    """A type without Annotated, None and the tuple around its elements."""
    while True:
        origin = get_origin(kind)
        if origin is Annotated:
            kind = get_args(kind)[0]
        elif origin in (Union, types.UnionType):
            inner = [one for one in get_args(kind) if one is not type(None)]
            if len(inner) != 1:
                return kind
            kind = inner[0]
        elif origin is tuple:
            kind = get_args(kind)[0]
        else:
            return kind


def _value(text: str, kind: Any) -> Any:
    """The value of `--set a.b=TEXT`: TOML, or the text itself where words are wanted. `none` takes an optional value away."""
    optional = type(None) in get_args(kind)
    if optional and text.lower() == "none":
        return None
    inner = _unwrap(kind)
    several = get_origin(kind) is tuple
    words = inner in (str, Path) or (get_origin(inner) is Literal and all(isinstance(one, str) for one in get_args(inner)))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if words and not several and not isinstance(value, str):
        return text
    return [value] if several and not isinstance(value, list) else value


# ---- errors --------------------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, source: str, shared: Any) -> str:
    """All faults in words, a line each."""
    lines = []
    for fault in error.errors():
        loc = _shown(fault["loc"])
        where = ".".join(loc) or "(the whole recipe)"
        if loc[:1] == ["stage"] and len(loc) > 2 and isinstance(shared, Mapping) and _holds(shared, loc[2:]):
            where = f"{where} (from {EVERY_STAGE})"
        if fault["type"] == "extra_forbidden":
            text = _unknown(loc[-1], _siblings(loc[:-1]))
        elif fault["type"] == "missing":
            text = "expected a value, found none"
        else:
            said = fault["msg"].removeprefix("Value error, ")
            text = said[0].lower() + said[1:] + ("" if fault["type"] == "value_error" else f"; found {fault['input']!r}")
        lines.append(f"{where}: {text}")
    lines = list(dict.fromkeys(lines))
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return f"{source}: " + "\n".join([*lines[:SHOWN], *more])


def _shown(loc: tuple[int | str, ...]) -> list[str]:
    """The path of a fault without pydantic's own steps."""
    return [str(one) for one in loc if not (isinstance(one, str) and ("[" in one or one in ("str", "float", "int")))]


def _siblings(loc: list[str]) -> Iterable[str]:
    """Names of the keys that a table at `loc` may have."""
    kind: Any = Config
    for key in loc:
        kind = _unwrap(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[key].annotation if key in kind.model_fields else kind
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
    kind = _unwrap(kind)
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else ()


def _unknown(key: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}")


def _holds(table: Mapping[str, Any], keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(table, Mapping) or key not in table:
            return False
        table = table[key]
    return True
