"""The trained miniatures that the package carries: what they are made of, and whether they still do what their cards say."""

import json
import re
from pathlib import Path

import pytest

from reasonedit.reasonedit_core.mini import models
from reasonedit.reasonedit_core.mini.models import MINIS, PLACE
from reasonedit.training.eval.check import faults_of, read_table
from reasonedit.training.eval.miniature import Request, make_table

SEED, ITEMS = 20, 20
"""Fixed before there were weights. The seed of the tables of the cards is another."""

PACKAGE = Path(models.__file__).parent


@pytest.fixture(params=sorted(MINIS))
def shipped(request, monkeypatch):
    """The folder of a miniature in the package."""
    monkeypatch.delenv(PLACE, raising=False)
    folder = PACKAGE / request.param
    if not (folder / "model_index.json").is_file():
        pytest.skip(f"NOT TESTED: the package holds no trained {request.param} yet")
    return folder


def test_the_files_are_small_and_name_nothing_of_the_machine_that_made_them(shipped):
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 30_000_000
    whole = [path for name in MINIS for path in (PACKAGE / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in whole) < 64_000_000
    for path in files:
        if path.suffix in (".json", ".md", ".txt"):
            assert not re.search(r"""["'`\s(]/[a-z]+/\w""", path.read_text(encoding="utf-8")), path.name


def test_the_card_shows_the_tables_that_lie_beside_it(shipped):
    card = (shipped / "README.md").read_text(encoding="utf-8")
    table = read_table(shipped / "tables" / "loop.json")
    assert table["system"] == shipped.name and table["n"] >= 400 and table["seed"] != SEED
    for row in table["rows"]:
        assert f"{row['overall']:.2f}" in card
    settings = json.loads((shipped / "reasonedit.json").read_text(encoding="utf-8"))
    assert "drawn" in settings["notice"]


def test_thinking_and_reflecting_help_as_the_card_says(shipped, tmp_path):
    """Twenty abstract items; the bounds are those of `reasonedit-eval check`."""
    asked = Request(shipped.name, "loop", tmp_path, n=ITEMS, seed=SEED, group="abstract")
    make_table(asked, print)
    assert faults_of(read_table(tmp_path / "loop.json"), read_table(shipped / "tables" / "loop.json")) == []
