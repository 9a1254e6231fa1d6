"""The trained miniatures that the package carries: what they are made of, and whether they still do what their cards say."""

import glob
import json
import re
from pathlib import Path

import pytest

from reasonedit.reasonedit_core.brain.layout import find_brain_parts
from reasonedit.reasonedit_core.brain.model import load_brain_model
from reasonedit.reasonedit_core.cli import main as reasonedit
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.images import save_png
from reasonedit.reasonedit_core.mini import models
from reasonedit.reasonedit_core.mini.models import BRAINS, MINIS, PLACE
from reasonedit.reasonedit_core.mini.scenes import draw
from reasonedit.reasonedit_core.models.reasonbrain.spec import Switches
from reasonedit.tests.brains import write_mini_brain
from reasonedit.training.eval.brain import TABLES, draw_brain_tasks
from reasonedit.training.eval.check import faults_of, faults_of_components, read_table
from reasonedit.training.eval.cli import main as evaluate
from reasonedit.training.eval.drawing import ALL
from reasonedit.training.eval.miniature import Request, make_table
from reasonedit.training.mini.brain_rows import COMPONENTS, ENHANCERS, FULL, LIMIT, ROWS
from reasonedit.training.mini.brain_rows import PLACE as ROW_FOLDER

SEED, ITEMS = 20, 20
"""Fixed before there were weights. The seed of the tables of the cards is another."""

PACKAGE = Path(models.__file__).parent


@pytest.fixture(params=sorted(MINIS))
def shipped(request, monkeypatch):
    """The folder of a miniature in the package."""
    return held(request.param, "model_index.json", monkeypatch)


def held(name, mark, monkeypatch):
    """A folder of the package, by a file that it has once it is trained."""
    monkeypatch.delenv(PLACE, raising=False)
    folder = PACKAGE / name
    if not (folder / mark).is_file():
        pytest.skip(f"NOT TESTED: the package holds no trained {name} yet")
    return folder


def test_the_files_are_small_and_name_nothing_of_the_machine_that_made_them(shipped):
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 30_000_000
    whole = [path for name in MINIS for path in (PACKAGE / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in whole) < 64_000_000
    name_no_machine(files)


def name_no_machine(files):
    """Texts hold no path from the root of a disk."""
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


# ---- mini-brain


@pytest.fixture(params=sorted(BRAINS))
def shipped_brain(request, monkeypatch):
    """The folder of mini-brain in the package."""
    return held(request.param, "brain.safetensors", monkeypatch)


def test_a_brain_and_all_its_rows_are_small_and_load(shipped_brain):
    files = [path for path in shipped_brain.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    name_no_machine(files)
    assert {path.name for path in (shipped_brain / ROW_FOLDER).iterdir()} == set(ROWS) - {FULL}
    for row, off in ROWS.items():
        place = shipped_brain if row == FULL else shipped_brain / ROW_FOLDER / row
        assert load_brain_model(find_brain_parts(place)).brain.switches == Switches(**off), row


def test_the_card_of_a_brain_shows_its_tables_and_they_show_what_they_must(shipped_brain):
    card = (shipped_brain / "README.md").read_text(encoding="utf-8")
    for name, rows in {"components": COMPONENTS, "components_switched": COMPONENTS, "enhancers": ENHANCERS}.items():
        table = read_table(shipped_brain / "tables" / f"{name}.json")
        assert table["system"] == shipped_brain.name and table["table"] == name and table["seed"] != SEED
        assert {row["system"] for row in table["rows"]} == set(rows)
        for row in table["rows"]:
            assert f"{row['overall']:.2f}" in card, (name, row["system"], row["group"])
    assert faults_of_components(read_table(shipped_brain / "tables" / "components.json")) == []
    assert "--system mini-brain" in card
    assert "drawn" in json.loads((shipped_brain / "reasonedit.json").read_text(encoding="utf-8"))["notice"]


def components(n: int = 200, **intervals) -> dict:
    """A components table; intervals: (low, high) of full minus a row, where it is not (0.5, 1.5)."""
    pairs = [
        {"a": FULL, "b": row, "group": ALL, "difference": 1.0, "low": low, "high": high}
        for row in COMPONENTS
        if row != FULL
        for low, high in [intervals.get(row, (0.5, 1.5))]
    ]
    return {"table": "components", "n": n, "rows": [{"system": row, "group": ALL} for row in COMPONENTS], "paired": pairs}


def test_a_components_table_that_may_not_be_shipped_says_why():
    assert faults_of_components(components()) == []
    assert faults_of_components(components(no_id=(-0.5, 0.1), no_text=(-1.0, 0.0))) == []
    assert "found 199" in faults_of_components(components(199))[0]
    assert faults_of_components(components(no_patch=(-2.0, -0.1)))[0].startswith("full - no_patch: expected an interval that")
    for interval in ((-0.1, 1.0), (0.0, 1.0), (-2.0, -1.0)):
        assert faults_of_components(components(plain=interval))[0].startswith("full - plain: expected an interval above zero")
    short = components()
    short["rows"], short["paired"] = short["rows"][:-1], short["paired"][1:]
    assert len(faults_of_components(short)) == 2
    with pytest.raises(ConfigError, match="expected a table components, found 'loop'"):
        faults_of_components({**components(), "table": "loop"})


@pytest.mark.slow
def test_mini_brain_edits_and_is_measured_by_its_name(tmp_path, monkeypatch, capsys):
    """With a stand-in: the name alone finds folder, rows and parts."""
    monkeypatch.setenv(PLACE, str(write_mini_brain(tmp_path / "minis")))
    task = draw_brain_tasks(1, 0)[0]
    save_png(draw(task.item.source), tmp_path / "scene.png")
    command = ["edit", str(tmp_path / "scene.png"), task.item.instruction, "--system", "mini-brain", "--device", "cpu"]
    assert reasonedit([*command, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert list((tmp_path / "out").rglob("*.png"))
    options = ["--table", "components", "--n", "4", "--device", "cpu", "--out", str(tmp_path / "tables"), "--quiet"]
    assert evaluate(["miniature", "--system", "mini-brain", *options]) == 0
    table = read_table(tmp_path / "tables" / "components.json")
    assert table["system"] == "mini-brain" and {row["system"] for row in table["rows"]} == set(TABLES["components"].rows)
    assert faults_of_components(table)[0] == "expected at least 200 items, found 4"
    assert not any("expected a pair" in fault or "the systems" in fault for fault in faults_of_components(table))


# ---- what a wheel carries


def test_a_wheel_carries_every_file_of_a_miniature_however_deep(tmp_path):
    """The patterns of pyproject.toml, read as setuptools reads them, over the layout of a finished mini-brain."""
    import tomllib

    root = PACKAGE.parent.parent
    data = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    names = ["README.md", "brain.safetensors", "lora/adapter_config.json", "unet/config.json", "tables/components.json"]
    names += ["rows/plain/reasonbrain.json", "rows/plain/brain.safetensors", "rows/plain/lora/adapter_model.safetensors"]
    made = {f"mini-brain/{name}" for name in names} | {"mini-s/vae/config.json"}
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "books.py").touch()
    found = {
        Path(name).as_posix()
        for pattern in data["reasonedit.reasonedit_core.mini"]
        for name in glob.glob(pattern, root_dir=tmp_path, recursive=True)
        if (tmp_path / name).is_file()
    }
    assert found == made
