"""A tiny random system that speaks a short dialogue: what the tests of `reasonedit-eval` measure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from reasonedit.tests.tiny import tiny_checkpoint

SETTINGS = {
    "steps": 1,
    "guidance": 1.0,
    "size_level": 96,
    "conditioner_pixels": [7056, 7056],
    "reasoner_pixels": [7056, 7056],
    "reply_tokens": 32,
    "scores": [],
}

_TASK = """
[task.{name}]
form = "{form}"
max_new_tokens = 32
temperature = 0.0
top_p = 1.0
[[task.{name}.user]]
image = "{image}"
[[task.{name}.user]]
text = "{text}"
"""

FORMS = {
    "think": ("free", "source", "{instruction}"),
    "describe": ("free", "source", "{instruction}"),
    "score": ("consistency", "result", "{target}"),
    "reflect": ("verdict", "result", "{instruction} {target}"),
    "edit_score": ("pair", "result", "{instruction}"),
    "quality_score": ("pair", "result", "Good?"),
}


def dialogue() -> str:
    """A dialogue pack of a few words."""
    head = 'format = "reasonedit.dialogue/1"\nname = "short"\nlanguage = "any"\nversion = 1\nsystem = "Look."\n'
    tasks = (_TASK.format(name=n, form=f, image=i, text=t) for n, (f, i, t) in FORMS.items())
    return head + '[languages]\nen = "English"\nzh = "Chinese"\n' + "".join(tasks)


def write_system(folder: Path) -> Path:
    """Copy a tiny Step1X-Edit into `folder`, at the sizes of a miniature."""
    shutil.copytree(tiny_checkpoint("step1x-v1p2", std=0.2), folder)
    (folder / "reasonedit.json").write_text(json.dumps(SETTINGS))
    (folder / "dialogue.toml").write_text(dialogue())
    return folder
