"""The ablations of mini-brain: which parts each leaves out. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

Off = Mapping[str, bool | str]
"""Fields of `models.reasonbrain.spec.Switches` that differ from the full model."""

FULL, PLAIN_ROW = "full", "plain"

COMPONENTS: Mapping[str, Off] = {
    FULL: {},
    "no_patch": {"patch_branch": False},
    "no_region": {"region_branch": False},
    "no_id": {"id_controller": False},
    "no_vision": {"vision_enhancer": False},
    "no_text": {"text_enhancer": False},
    PLAIN_ROW: {"patch_branch": False, "region_branch": False, "id_controller": False, "cme": "none"},
}
"""The paper's Tab. 4."""

ENHANCERS: Mapping[str, Off] = {
    FULL: {},
    "simple_ca": {"cme": "simple_ca"},
    "one_way": {"cme_bidirectional": False},
    "no_enhancer": {"cme": "none"},
}
"""The paper's Tabs. A9 (simple_ca, no_enhancer) and A12 (one_way)."""

ROWS: Mapping[str, Off] = {**COMPONENTS, **ENHANCERS}
"""All that are trained, each from the same start, with the same steps, data order and seed."""

PLACE = "rows"
"""Folder of the finished miniature with one for each row but the full one."""

LIMIT = 15_000_000
"""Bytes that the miniature and all its rows may have together."""
