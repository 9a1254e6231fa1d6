"""`reasonedit-eval miniature` from weights to files, on tiny random weights with a short dialogue."""

from __future__ import annotations

import json

import pytest

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.tests.eval_tools import SETTINGS, write_system
from reasonedit.training.eval import brain, cli, miniature, tables
from reasonedit.training.eval.check import faults_of
from reasonedit.training.eval.systems import COMPARE, PLACES, Choice, Folders


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return write_system(tmp_path_factory.mktemp("weights") / "tiny")


def without_seconds(measured):
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in measured["rows"]]
    return {**measured, "rows": rows}


def evaluate(system, table, out, *options) -> int:
    return cli.main(["miniature", "--system", str(system), "--table", table, "--out", str(out), "--device", "cpu", *options])


def test_loop_from_the_command_line(system, tmp_path, capsys):
    """The table is printed as it is written; another width and a second start give the same."""
    assert evaluate(system, "loop", tmp_path / "a", "--n", "2", "--seed", "-7") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == (tmp_path / "a/loop.md").read_text().strip()
    assert "6 runs to make" in shown.err and "6/6 runs" in shown.err
    measured = json.loads((tmp_path / "a/loop.json").read_text())
    assert (measured["system"], measured["n"], measured["seed"]) == ("tiny", 2, -7)
    assert all(row["seconds"] > 0 for row in measured["rows"])
    assert evaluate(system, "loop", tmp_path / "b", "--n", "2", "--seed", "-7", "--batch", "1", "--quiet") == 0
    other = json.loads((tmp_path / "b/loop.json").read_text())
    assert without_seconds(other) == without_seconds(measured)
    capsys.readouterr()
    assert evaluate(system, "loop", tmp_path / "a", "--n", "2", "--seed", "-7") == 0
    assert "runs to make" not in capsys.readouterr().err
    assert json.loads((tmp_path / "a/loop.json").read_text()) == measured


def test_reflector_from_the_command_line(system, tmp_path):
    assert evaluate(system, "reflector", tmp_path, "--n", "2", "--quiet") == 0
    measured = json.loads((tmp_path / "reflector.json").read_text())
    assert {"planted", "all"} <= {row["group"] for row in measured["rows"]}  # random weights draw no right picture


def test_stages_and_reflection_run_from_a_run_folder(system, tmp_path):
    for name in PLACES.values():
        place = tmp_path / "run" / COMPARE / "tiny" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(system, target_is_directory=True)
    for table in ("stages", "reflection"):
        options = ("--n", "1", "--group", "abstract", "--runs", str(tmp_path / "run"), "--quiet")
        assert evaluate(system, table, tmp_path / "out", *options) == 0
        measured = json.loads((tmp_path / f"out/{table}.json").read_text())
        assert list(dict.fromkeys(row["system"] for row in measured["rows"])) == list(tables.TABLES[table].rows)


def test_a_missing_run_is_told_with_its_file(system, tmp_path, capsys):
    for table, place in (("stages", "stages/base"), ("reflection", "reflection/dual-image")):
        assert evaluate(system, table, tmp_path) == 2
        said = capsys.readouterr().err
        assert f"{COMPARE}/tiny/{place}/model_index.json" in said and "--runs" in said
        assert evaluate(system, table, tmp_path, "--runs", str(tmp_path)) == 2
        said = capsys.readouterr().err
        assert f"--runs {tmp_path}" in said and f"{COMPARE}/tiny/{place}/model_index.json" in said
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_measured_is_told(tmp_path, capsys):
    assert evaluate(tmp_path, "loop", tmp_path / "out") == 2
    assert "expected mini-s, mini-q or a folder with model_index.json" in capsys.readouterr().err
    for options, said in (
        (["--table", "speed"], "--table"),
        (["--table", "loop", "--n", "0"], "from 1 to"),
        (["--table", "loop", "--seed", "x"], "--seed"),
    ):
        assert cli.main(["miniature", "--system", "mini-s", "--out", "o", *options]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="one of loop"):
        miniature.make_table(miniature.Request("mini-s", "speed", tmp_path), print)
    with pytest.raises(CheckpointError):
        Folders.find(str(tmp_path))


def test_records_of_other_weights_are_not_taken_over(system, tmp_path):
    """The fingerprint sees weights and settings of all that a table needs."""
    other = write_system(tmp_path / "tiny")
    one, two = Folders.find(str(system)), Folders.find(str(other))
    assert one.fingerprint([Choice()]) == two.fingerprint([Choice()])
    (other / "reasonedit.json").write_text(json.dumps({**SETTINGS, "steps": 2}))
    assert one.fingerprint([Choice()]) != two.fingerprint([Choice()])


def test_the_lists_of_the_command_line_are_those_of_the_tables():
    from reasonedit.training.eval.drawing import GROUPS

    assert set(cli.TABLES) == {*tables.TABLES, *brain.TABLES} and set(cli.BRAIN_TABLES) == set(brain.TABLES)
    assert cli.GROUPS == GROUPS


# ---- check ---------------------------------------------------------------------------------------------------------------


def table(think=6.0, gain=(0.5, -0.2, 1.2), system="mini-s"):
    names = {"base": 3.0, "think": think, "think+reflect": think + gain[0]}
    rows = [{"system": name, "group": "abstract", "overall": value} for name, value in names.items()]
    pairs = [{"a": "think", "b": "base", "group": "abstract", "difference": think - 3, "low": think - 4, "high": think - 2}]
    pair = dict(zip(("difference", "low", "high"), gain, strict=True))
    pairs.append({"a": "think+reflect", "b": "think", "group": "abstract", **pair})
    return {"table": "loop", "system": system, "rows": rows, "paired": pairs}


def test_check_fails_only_for_what_is_surely_worse():
    card = table()
    assert faults_of(table(), card) == []
    assert faults_of(table(think=5.01), card) == []
    assert len(faults_of(table(think=4.9), card)) == 2  # think, and think+reflect with it
    assert "think+reflect - think" in faults_of(table(gain=(-0.5, -0.9, -0.1)), card)[0]
    assert faults_of(table(gain=(-0.5, -1.1, 0.1)), card) == []


def test_check_from_the_command_line(tmp_path, capsys):
    for name, value in {"card": table(), "good": table(), "bad": table(think=1.5), "other": table(system="mini-q")}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "odd.json").write_text("[]")
    card = ["--card", str(tmp_path / "card.json")]
    assert cli.main(["check", str(tmp_path / "good.json"), *card]) == 0
    assert cli.main(["check", str(tmp_path / "bad.json"), *card]) == 1
    assert "think - base" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path / "other.json"), *card]) == 2
    assert cli.main(["check", str(tmp_path / "odd.json"), *card]) == 2
    assert cli.main(["check", str(tmp_path / "none.json"), *card]) == 2
