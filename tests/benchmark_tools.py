"""The official layouts of the benchmarks in small, with pictures drawn here, and a judge for them.

Use: `from reasonedit.tests.benchmark_tools import LAYOUTS, ...`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reasonedit.reasonedit_core.mini.dice import digest
from reasonedit.tests.pictures import draw_picture
from reasonedit.training.data.label.annotators import Answer, Question
from reasonedit.training.eval.benchmarks.items import Manifest, read_manifest
from reasonedit.training.eval.benchmarks.prepare import prepare

SIZE = (64, 48)


def save(path: Path, number: int) -> None:
    """A picture that no other number gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = draw_picture(*SIZE)
    for at in range(8):
        image.putpixel((at, 0), (255, 255, 255) if number >> at & 1 else (0, 0, 0))
    image.save(path)


def damaged_png(path: Path) -> None:
    """Cut a picture file off in its pixels; its head stays, so that it is told as damaged by none who reads only that."""
    data = path.read_bytes()
    at = data.index(b"IDAT")
    path.write_bytes(data[: at + (len(data) - at) // 3])


def gedit(root: Path) -> Path:
    """metadata.jsonl beside pictures; the parquet of the hub has the same fields."""
    rows = []
    groups = ("color_alter", "color_alter", "subject-add", "text_change", "color_alter")
    for number, group in enumerate(groups):
        save(root / "images" / f"{number}.png", number)
        lang = "cn" if number == 4 else "en"
        row = {
            "task_type": group,
            "key": f"{number:032x}",
            "instruction": f"Make change {number}.",
            "instruction_language": lang,
        }
        rows.append({**row, "input_image": f"images/{number}.png", "Intersection_exist": number != 1})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def imgedit(root: Path) -> Path:
    """Basic/basic_edit.json, pictures in folders of their own beside it."""
    told = {}
    for number, kind in enumerate(("add", "add", "extract", "style", "action")):
        save(root / "Basic" / "animal" / f"{number:09d}.png", number)
        told[str(100 + number)] = {"id": f"animal/{number:09d}.png", "prompt": f"Make change {number}.", "edit_type": kind}
    (root / "Basic" / "basic_edit.json").write_text(json.dumps(told))
    return root


def kris(root: Path) -> Path:
    """<category>/annotation.json: one item of two frames, one with a true view, one for knowledge, an anomaly, a colour."""
    groups = ("temporal_prediction", "viewpoint_change", "biology", "anomaly_correction", "color_change")
    for number, group in enumerate(groups):
        names = [f"{number}_{at}.png" for at in range(3)]
        for at, name in enumerate(names):
            save(root / group / name, 10 * number + at)
        row = {"ori_img": names[:2] if number == 0 else names[0], "ins_en": f"Make change {number}.", "explain_en": "Because."}
        (root / group / "annotation.json").write_text(json.dumps({"7": row | ({"gt_img": names[2]} if number == 1 else {})}))
    return root


def rise(root: Path) -> Path:
    """data/data_total.json, NaN in the field that most items do not have, as pandas writes it."""
    rows = []
    kinds = ("temporal", "causal", "spatial", "logical", "causal")
    for number, kind in enumerate(kinds):
        save(root / "data" / f"{kind}_images" / f"{number}.png", number)
        row = {"index": f"{kind}_{number}", "category": f"{kind}_reasoning", "instruction": f"Make change {number}."}
        row |= {"image": f"{kind}_images/{number}.png", "reference": "It is done.", "consistency_free": float("nan")}
        rows.append(row | ({"consistency_free": True} if number == 4 else {}))
    save(root / "data" / "logical_images" / "answer.png", 99)
    rows[3]["reference_img"] = "logical_images/answer.png"
    (root / "data" / "data_total.json").write_text(json.dumps(rows))
    return root


def reason50k(root: Path) -> Path:
    """Our own layout: reason50k.jsonl."""
    rows = []
    for number, kind in enumerate(("Physical", "Temporal", "Causal", "Story", "Physical")):
        save(root / f"{number}.png", number)
        save(root / f"{number}_target.png", 50 + number)
        row = {"id": f"r{number}", "category": kind, "instruction": f"Make change {number}.", "image": f"{number}.png"}
        rows.append({**row, "input_text": "A house.", "output_text": "A ruin.", "target": f"{number}_target.png"})
    (root / "reason50k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "gedit": gedit,
    "imgedit": imgedit,
    "kris": kris,
    "rise": rise,
    "reason50k": reason50k,
}


def prepared(bench: str, folder: Path) -> Manifest:
    """The manifest of a drawn benchmark."""
    prepare(bench, LAYOUTS[bench](folder / "official"), folder / "prepared")
    return read_manifest(folder / "prepared")


class DrawnJudge:
    """Marks that follow from the question and its pictures, whole and inside their scales."""

    name, endpoint = "drawn", "scripted"

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def marks(self, question: Question) -> dict[str, int]:
        seen = (question.prompt.step, *sorted(question.inputs.items()), *(each.sha256 for each in question.pictures))
        return {
            mark.name: mark.low + digest("mark", mark.name, *seen) % (mark.high - mark.low + 1)
            for mark in question.prompt.marks
        }

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        self.asked.append(question)
        return Answer(json.dumps({"reason": "As drawn.", **self.marks(question)}), 11, 5)


def by_item(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
    """Rows of judgements by item, role and anchor; each once."""
    found = {(row["item"], row["role"], row["anchor"]): row for row in rows}
    assert len(found) == len(rows)
    return found
