"""What is exported is what the benchmarks' own scripts read: their statistics, written anew here, give our numbers."""

from __future__ import annotations

import csv
import json
import math
import pickle
import re
from collections import defaultdict

import pytest

from reasonedit.tests.benchmark_tools import DrawnJudge, damaged_png, prepared, save
from reasonedit.tests.label_tools import QUICK
from reasonedit.training.data.label.annotators import Answer, Refused
from reasonedit.training.eval.benchmarks.aggregate import RULES, headline, summarise
from reasonedit.training.eval.benchmarks.judge import JUDGEMENTS, judge_run
from reasonedit.training.eval.benchmarks.judges import read_rows
from reasonedit.training.eval.benchmarks.marks import Options, score_item
from reasonedit.training.eval.benchmarks.official import GEDIT_COLUMNS, write_judged
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, export_official, find_output, keep_output
from reasonedit.training.eval.benchmarks.protocols import load_protocol
from reasonedit.training.eval.benchmarks.score import Choice, score_judged
from reasonedit.training.eval.cli import main


class Talkative(DrawnJudge):
    """Reasons that would be taken for marks; no answer at all to one item."""

    def answer(self, question, dropped):
        if question.inputs.get("instruction") == "Make change 1.":
            raise Refused("no")
        self.asked.append(question)
        reason = "Before: 3\nAfter: 5\nFinal Score: 2"
        return Answer(json.dumps({"reason": reason, **self.marks(question)}), 1, 1)


def exported(bench, folder, lang=None):
    """(manifest, scores, folder of the export)."""
    manifest, run, out = prepared(bench, folder), folder / "run", folder / "ours"
    for at, item in enumerate(manifest.items):
        save(folder / "edited.png", 200 + at)
        keep_output(run, item, (folder / "edited.png").read_bytes())
    (run / "run.json").write_text('{"system": "ours", "kind": "import", "seed": 0, "several": "skip"}')
    done = judge_run(manifest, run, load_protocol(f"{bench}-re"), Talkative(), items=manifest.items, limits=QUICK)
    scores = score_judged(manifest, run, done.folder, Choice(lang=lang, clamp=False))
    assert main(["export", "--manifest", str(manifest.folder), "--run", str(run), "--out", str(out)]) == 0
    return manifest, scores, out


def test_gedits_csv_gives_the_macro_mean_of_its_statistics(tmp_path):
    _, scores, out = exported("gedit", tmp_path, "en")
    groups, folder = {}, out / "gpt4o" / "eval_results_new"
    for group in scores["groups"]:
        path = folder / f"ours_{group}_gpt_score.csv"
        rows = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
        assert all(tuple(row) == GEDIT_COLUMNS and row["instruction_language"] == "en" for row in rows)
        for row in rows:  # the official script passes an item over where one of the two files is not there
            assert row["source_image"] == row["edited_image"].replace(".png", "_SRCIMG.png")
            assert all((tmp_path / row[name]).is_file() for name in ("source_image", "edited_image"))
        if rows:
            values = [math.sqrt(float(row["sementics_score"]) * float(row["quality_score"])) for row in rows]
            groups[group] = sum(values) / len(values)
    assert sum(groups.values()) / len(groups) == pytest.approx(headline("gedit", scores)["mean"])
    combined = list(csv.DictReader((folder / "ours_combined_gpt_score.csv").open(newline="")))
    assert len(combined) == headline("gedit", scores)["n_scored"] == 3
    assert {row["intersection_exist"] for row in combined} == {"True"}  # the one that is not in it was refused


def test_imgedits_result_json_gives_the_mean_of_its_two_steps(tmp_path):
    manifest, scores, out = exported("imgedit", tmp_path)
    told = json.loads((out / "result.json").read_text())
    kinds, group = defaultdict(list), {item.id: item.group for item in manifest.items}
    for key, text in told.items():
        parts = [line.strip().split(": ") for line in text.splitlines()]
        marks = [int(each[1]) for each in parts if len(each) == 2 and each[1].isdigit()]
        assert len(marks) == 3 and (out / f"{key}.png").is_file()
        kinds[group[key]].append(round(sum(marks) / 3, 2))
    assert len(told) == 4
    means = [sum(values) / len(values) for values in kinds.values()]
    assert sum(means) / len(means) == pytest.approx(headline("imgedit", scores)["mean"])


def test_kris_metrics_json_gives_the_marks_back(tmp_path):
    manifest, scores, out = exported("kris", tmp_path)
    found = []
    for item in manifest.items:
        name = item.id.rpartition("/")[2]
        entry = json.loads((out / item.group / "metrics.json").read_text())[name]
        assert entry["instruction"] == item.instruction and (out / item.group / f"{name}.png").is_file()
        marks = {role: entry.get(f"{role}_score") for role in ("consistency", "quality", "instruction", "knowledge")}
        told = {role: None if mark is None else {role: mark} for role, mark in marks.items()}
        if told["instruction"] and told["knowledge"]:
            told["instruction"] |= told["knowledge"]
        found.append((item, score_item(item, told, Options())))
        assert ("knowledge_score" in entry) == (item.group == "biology")
    again = summarise(RULES["kris-sample"], found)["overall"]["score"]
    assert again == scores["overall"]["score"] and again["n_scored"] == 4 < again["n"]


def test_rises_pickle_and_csv_give_its_scores(tmp_path):
    manifest, scores, out = exported("rise", tmp_path)
    told = pickle.loads((out / "ours.pkl").read_bytes())  # noqa: S301 - written two lines above
    kinds = {item.id: item.group for item in manifest.items}
    assert len(told) == 4  # one was refused: it is asked again there
    for name, judges in told.items():
        assert set(judges) == {"judge1", "judge2"} | ({"judge3"} if kinds[name] != "logical_reasoning" else set())
        for text in judges.values():  # as gpt_eval.py finds marks
            assert text is None or len(re.findall(r"Final Score\*?\*?:?\s*([\d*\s,\n]*)", text, re.IGNORECASE)) == 1
    assert told["causal_4"]["judge1"] is None
    rows = {row["-"]: row for row in csv.DictReader((out / "ours_judge.csv").open(newline=""))}
    assert float(rows["Overall"]["Score-Percentage"]) == pytest.approx(scores["overall"]["score"]["mean"])
    assert float(rows["Overall"]["Accuracy"]) * 100 == pytest.approx(scores["overall"]["accuracy"]["mean"])
    logical = scores["groups"]["logical_reasoning"]["score"]["mean"]
    assert float(rows["Logical"]["Score-Origin"]) == pytest.approx(logical / 25 + 1)
    assert list(rows)[:5] == ["Overall", "Temporal", "Causal", "Spatial", "Logical"] and "Logical_Quality" not in rows


def test_a_benchmark_without_a_script_has_pictures_alone_and_a_damaged_one_is_missing(tmp_path):
    manifest = prepared("reason50k", tmp_path)
    for item in manifest.items:
        keep_output(tmp_path / "run", item, manifest.sources(item)[0].read_bytes())
    damaged_png(find_output(tmp_path / "run" / OUTPUTS, manifest.items[0]))
    taken = export_official(manifest, tmp_path / "run", tmp_path / "out")
    assert taken.missing == (manifest.items[0].id,) and len(list((tmp_path / "out").rglob("*.png"))) == 4
    assert write_judged(manifest.items, [], tmp_path / "out") == []


def test_a_run_of_several_judges_is_exported_by_name(tmp_path, capsys):
    manifest, _, out = exported("imgedit", tmp_path)
    run = tmp_path / "run"
    (folder,) = (run / "judged").iterdir()
    other = run / "judged" / "other"
    other.mkdir()
    for name in ("scores.json", JUDGEMENTS):
        (other / name).write_bytes((folder / name).read_bytes())
    base = ["export", "--manifest", str(manifest.folder), "--run", str(run), "--out", str(out)]
    assert main(base) == 2 and "several" in capsys.readouterr().err
    assert main([*base, "--judged", "other"]) == 0 and "result.json" in capsys.readouterr().out
    assert len(read_rows(other / JUDGEMENTS)) == 5
