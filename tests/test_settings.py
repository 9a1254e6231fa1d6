"""Numbers that come from the checkpoint folder."""

from __future__ import annotations

import json

import pytest

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.settings import RELEASED, read_settings


def test_released_values_fill_an_absent_file(tmp_path):
    settings = read_settings(tmp_path, "step1x-v1.2", (1, 2))
    assert settings == RELEASED["step1x-v1.2"]
    assert settings.conditioner_pixels == (200704, 313600), "the pipeline's constants win over the processor config"


def test_qwen_image_takes_the_processors_bounds_unless_the_file_states_others(tmp_path):
    assert read_settings(tmp_path, "qwen-edit", (4000, 8000)).conditioner_pixels == (4000, 8000)
    (tmp_path / "reasonedit.json").write_text(json.dumps({"conditioner_pixels": [784, 1568], "size_level": 96}))
    settings = read_settings(tmp_path, "qwen-edit", (4000, 8000))
    assert (settings.conditioner_pixels, settings.size_level, settings.steps) == ((784, 1568), 96, 50)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", ["reasonedit.json", "unreadable"]),
        ("[]", ["JSON object", "list"]),
        ('{"step": 3}', ["step", "known keys", "steps"]),
        ('{"steps": 0}', ["steps", "found 0"]),
        ('{"multiple": 24}', ["multiple", "24"]),
        ('{"reasoner_pixels": [900, 800]}', ["reasoner_pixels", "min <= max"]),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "reasonedit.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(tmp_path, "step1x-v1.2")
    assert all(word in str(caught.value) for word in words), caught.value
