"""The manifest: one line per item, the same form for every benchmark. It lies in a folder with the pictures it names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError, DataError
from ....reasonedit_core.files import write_whole
from ...data.label.output import share_of

FILE_NAME = "manifest.jsonl"

BENCHES = ("gedit", "imgedit", "kris", "rise", "reason50k")

COUNTS: Mapping[str, Mapping[str, int]] = {
    "gedit": {
        **dict.fromkeys(("background_change", "color_alter", "material_alter", "motion_change", "tone_transfer"), 40),
        **dict.fromkeys(("style_change", "subject-add", "subject-replace"), 60),
        **{"ps_human": 70, "subject-remove": 57, "text_change": 99},
    },
    "imgedit": {
        **{"extract": 117, "style": 100, "add": 95, "adjust": 94, "background": 94},
        **{"replace": 92, "remove": 86, "action": 36, "compose": 23},
    },
    "kris": {
        **dict.fromkeys(("abstract_reasoning", "anomaly_correction", "chemistry", "geography", "humanities"), 75),
        **dict.fromkeys(("multi-element_composition", "multi-instruction_execution", "physics", "rule-based_reasoning"), 75),
        **{"temporal_prediction": 74, "biology": 68},
        **dict.fromkeys(("color_change", "count_change", "mathematics", "medicine", "part_completion"), 50),
        **dict.fromkeys(("position_movement", "practical_knowledge", "size_adjustment", "viewpoint_change"), 50),
    },
    "rise": {},
    "reason50k": {},
}
"""Items per group in the official sets (GEdit: per language). RISE has 64 in its repository and 360 in full; Reason50K was not
found public, so nothing is held against it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to edit. group: the benchmark's category. sources, and of refs those in PICTURES: paths relative to the
    manifest.

    refs: what else the benchmark knows (gt_img, explain, reference_img, input_text, output_text; mask: white where the edit may
    change the picture); flags: intersection, consistency_free.
    """

    bench: str
    id: str
    group: str
    instruction: str
    sources: tuple[str, ...]
    lang: str = "en"
    refs: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)


PICTURES = ("gt_img", "reference_img", "mask")
"""Names of refs that are pictures."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Items of one benchmark, and the folder that their paths are relative to. sha256: of the file."""

    folder: Path
    bench: str
    items: tuple[Item, ...]
    sha256: str

    def sources(self, item: Item) -> list[Path]:
        """The pictures to edit."""
        return [self.folder / each for each in item.sources]

    def picture(self, item: Item, name: str) -> Path | None:
        """A picture of refs, None where the benchmark has none for this item."""
        return self.folder / item.refs[name] if name in item.refs else None


def write_manifest(folder: Path, items: Sequence[Item]) -> Path:
    """Write the items, in their order. DataError for none, for two of one id, or for items of two benchmarks."""
    _check(items, str(folder))
    lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items]
    return write_whole(folder / FILE_NAME, ("\n".join(lines) + "\n").encode())


def read_manifest(path: Path) -> Manifest:
    """A manifest, or that of a folder. ConfigError where there is none, DataError for a line that is no item."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a manifest, found none ({error.strerror}). Make one with `reasonedit-eval prepare`."
        ) from error
    items = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            items.append(_item(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}:{number}: expected an item of a manifest, found {line[:80]!r} ({error}). Prepare the benchmark again."
            ) from error
    _check(items, str(path))
    return Manifest(path.parent, items[0].bench, tuple(items), sha256(data).hexdigest())


def chosen(items: Iterable[Item], number: int | None, *key: str) -> list[Item]:
    """`number` items that follow from the hashes of their ids, in the order of the manifest; all for None.

    A smaller number gives a part of what a larger one gives, and no order of a file decides.
    """
    items = list(items)
    if number is None or number >= len(items):
        return items
    first = {item.id for item in sorted(items, key=lambda item: share_of("benchmark", *key, item.id))[:number]}
    return [item for item in items if item.id in first]


def count_remarks(items: Sequence[Item]) -> list[str]:
    """One sentence for each group whose number is not that of the official set."""
    remarks = []
    expected = COUNTS[items[0].bench]
    for lang in dict.fromkeys(item.lang for item in items) if expected else ():
        found = Counter(item.group for item in items if item.lang == lang)
        for group in dict.fromkeys((*expected, *found)):
            if found[group] != expected.get(group, 0):
                remarks.append(f"{group} ({lang}): expected {expected.get(group, 0)} items as published, found {found[group]}")
    if items[0].bench == "rise" and len(items) not in (64, 360):
        remarks.append(f"expected 64 items (repository) or 360 (full set), found {len(items)}")
    return remarks


def _item(told: Any) -> Item:
    item = Item(**{**told, "sources": tuple(told["sources"])})
    texts = (item.bench, item.id, item.group, item.instruction, item.lang, *item.sources, *item.refs.values())
    if item.bench not in BENCHES or not item.sources or not all(isinstance(each, str) for each in texts):
        raise ValueError("not the values of an item")
    return item


def _check(items: Sequence[Item], where: str) -> None:
    if not items:
        raise DataError(f"{where}: expected one or more items, found none. Check what the manifest is made of.")
    benches = sorted({item.bench for item in items})
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if len(benches) > 1 or twice:
        found = f"the id {twice[0]!r} {'twice'}" if twice else f"items of {' and '.join(benches)}"
        raise DataError(f"{where}: expected items of one benchmark, each id once, found {found}. Prepare it again.")
