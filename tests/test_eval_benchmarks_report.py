"""From an official layout to a report, by the commands; what two runs and two judges differ by."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.tests.benchmark_tools import LAYOUTS, DrawnJudge, damaged_png, prepared, save
from reasonedit.tests.label_tools import QUICK
from reasonedit.training.data.label.annotators import Answer
from reasonedit.training.eval.benchmarks import compare
from reasonedit.training.eval.benchmarks.aggregate import headline
from reasonedit.training.eval.benchmarks.differences import measure
from reasonedit.training.eval.benchmarks.generate import take_in
from reasonedit.training.eval.benchmarks.judge import judge_run
from reasonedit.training.eval.benchmarks.measures import means_table, measures_table
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, find_output, official_name
from reasonedit.training.eval.benchmarks.protocols import load_protocol
from reasonedit.training.eval.benchmarks.score import Choice, read_scores, score_judged
from reasonedit.training.eval.benchmarks.tables import Row, Table, as_csv, latex, make_table, markdown, values_of
from reasonedit.training.eval.cli import main

EDIT = "import sys; from PIL import Image, ImageOps; ImageOps.invert(Image.open(sys.argv[1]).convert('RGB')).save(sys.argv[2])"
SCRIPT = "\n".join(
    f"[[answer]]\ncall = {call!r}\ntext = '{json.dumps(marks)}'"
    for call, marks in {
        "SC": {"success": 9, "restraint": 8},
        "PQ": {"naturalness": 8, "cleanness": 9},
        **dict.fromkeys(("add", "action"), {"reason": "x"}),  # marks are missing: unparsed
        "extract": {"compliance": 3, "faithfulness": 5, "cleanness": 1},
        "style": {"fidelity": 4, "preservation": 4, "rendering": 4},
        **dict.fromkeys(("consistency", "consistency_frames"), {"consistency": 5}),
        "quality": {"quality": 3},
        **dict.fromkeys(("instruction", "instruction_view", "instruction_anomaly"), {"instruction": 5}),
        "dual": {"instruction": 5, "knowledge": 1},
        "reasoning": {"reasoning": 5},
        "plausibility": {"plausibility": 5},
        "reasoning_logical": {"reasoning": 1},
        "consistency_logical": {"consistency": 0},
        "mllm": {"mllm": 1},
        "align": {"align": 7},
    }.items()
)
EXPECTED = {
    # SC = PQ = 8, three groups
    "gedit": ("G_O", "8.00", "4/4"),
    # two adds and an action cannot be read; extract clamped to 3, 3, 1
    "imgedit": ("overall", f"{(7 / 3 + 4) / 2:.2f}", "2/5"),
    # four items of 100, 50, 100 and one of 100, 50, 100, 0; the temporal one has two sources, which cmd does not take
    "kris": ("overall", f"{(3 * 250 / 3 + 62.5) / 4:.2f}", "4/5"),
    "rise": ("accuracy", "80.0", "5/5"),
    "reason50k": ("MLLM", "1.000", "5/5"),
}


def cli(*args) -> int:
    return main([str(each) for each in args])


@pytest.mark.parametrize("bench", LAYOUTS)
def test_five_items_go_from_the_official_layout_to_a_report(bench, tmp_path, capsys):
    (tmp_path / "script.toml").write_text(SCRIPT)
    manifest, run, judge = tmp_path / "bench", tmp_path / "ours", f"scripted:{tmp_path / 'script.toml'}"
    lang = ("--lang", "en") if bench == "gedit" else ()
    assert cli("prepare", bench, "--src", LAYOUTS[bench](tmp_path / "official"), "--out", manifest) == 0
    command = f'cmd:"{sys.executable}" -c "{EDIT}" {{source}} {{out}}'
    made = cli("generate", "--manifest", manifest, "--system", command, "--out", run, "--quiet", *lang)
    assert made == (1 if bench == "kris" else 0)
    about = ("--manifest", manifest, "--judge", judge, "--anchors", 2, *lang)
    assert cli("doctor", *about, "--run", run, "--price", "1,2") == 0
    assert not (run / "judged").exists() and "cost at most" in capsys.readouterr().out
    assert cli("judge", *about, "--run", run, "--quiet") == 0
    assert cli("score", "--manifest", manifest, "--run", run) == 0
    assert cli("report", "--runs", f"ours & theirs={run}", "--manifest", manifest, "--out", tmp_path / "report") == 0
    capsys.readouterr()
    column, value, n = EXPECTED[bench]
    (row, *published) = csv.DictReader(io.StringIO((tmp_path / "report" / "table.csv").read_text()))
    assert (row["system"], row[column], row["n"]) == ("ours & theirs", value, n)
    assert row["judge"] == "scripted-script" and row["protocol"] == f"{bench}-re" and row["no-op"] == "0.0 %"
    assert published and all(each["source"] for each in published) and not row["source"]
    tex = (tmp_path / "report" / "table.tex").read_text()
    assert r"ours \& theirs & " in tex and tex.count(r"\\") == len(published) + 2
    text = (tmp_path / "report" / "table.md").read_text()
    assert "not the benchmark's official scores" in text and f"*{published[0]['system']} [" in text
    assert {"measures.md", "measures.csv", "measures.tex", "means.md", "means.csv", "means.tex"} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }
    page = (tmp_path / "report" / "page.html").read_text()
    assert "ours &amp; theirs: no edit" in page and "L1 to source" in page
    assert page.count("<article>") == (4 if bench == "gedit" else 5)
    assert not re.search(r'(src|href)="(?!data:)', page) and "Make change 0." in page
    for name in ("groups.png", "time.png"):
        assert Image.open(tmp_path / "report" / name).size == (960, 480)
    assert cli("export", "--manifest", manifest, "--run", run, "--out", tmp_path / "theirs") == 0
    scores = read_scores(run)
    assert scores["answers"].get("ok") and (bench != "imgedit" or scores["n_clamped"] == 1)
    assert scores["anchors"]["no-edit"] and bool(scores["anchors"]["ground-truth"]) == (bench in ("kris", "reason50k"))
    taken = take_in_again(tmp_path, manifest)
    assert taken == sum(1 for each in (run / OUTPUTS).rglob("*.png"))


def take_in_again(folder: Path, manifest: Path) -> int:
    from reasonedit.training.eval.benchmarks.items import read_manifest

    return take_in(read_manifest(manifest), folder / "theirs", folder / "again", "theirs").made


# ---- scores of runs ------------------------------------------------------------------------------------------------------


def scored(bench, folder, name, number, choice=None, judge=None, without=(), items=None, anchors=0):
    """(manifest, scores) of a run whose pictures follow from `number`."""
    manifest = prepared(bench, folder)
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    for at, item in enumerate(manifest.items):
        if at not in without:
            save(folder / "edited.png", number + at)
            path = folder / "in" / name / f"{official_name(item)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((folder / "edited.png").read_bytes())
    take_in(manifest, folder / "in" / name, run, name)
    about = {"items": items or manifest.items, "limits": QUICK, "anchors": anchors}
    done = judge_run(manifest, run, load_protocol(f"{bench}-re"), judge or DrawnJudge(), **about)
    return manifest, score_judged(manifest, run, done.folder, choice or Choice())


def test_a_missing_picture_is_skipped_counted_worst_or_an_error(tmp_path):
    rows = {}
    for missing in ("skip", "zero"):
        _, scores = scored("imgedit", tmp_path / missing, "a", 100, Choice(missing=missing), without=(0, 3))
        rows[missing] = headline("imgedit", scores)
    assert (rows["skip"]["n_scored"], rows["zero"]["n_scored"], rows["skip"]["n"]) == (3, 5, 5)
    assert rows["skip"]["at_least"] == pytest.approx(rows["zero"]["mean"])
    assert rows["zero"]["mean"] < rows["skip"]["mean"] < rows["skip"]["at_most"]
    with pytest.raises(DataError, match="found none for 2"):
        scored("imgedit", tmp_path / "error", "a", 100, Choice(missing="error"), without=(0, 3))


def test_languages_are_not_mixed(tmp_path):
    with pytest.raises(ConfigError, match="cn, en"):
        scored("gedit", tmp_path, "a", 100)
    _, scores = scored("gedit", tmp_path, "b", 100, Choice(lang="en"))
    assert headline("gedit", scores)["n"] == 4 and scores["intersection"]["O"]["n"] == 3


def test_official_faults_are_repeated_where_there_are_any_and_named(tmp_path):
    class Mute(DrawnJudge):
        def answer(self, question, dropped):
            return Answer("Good.") if question.prompt.step == "gedit-SC" else super().answer(question, dropped)

    _, plain = scored("gedit", tmp_path / "a", "a", 100, Choice(lang="en"), judge=Mute())
    _, guessed = scored("gedit", tmp_path / "b", "a", 100, Choice(lang="en", quirks=True), judge=Mute())
    assert headline("gedit", plain)["n_scored"] == 0 and headline("gedit", guessed)["n_scored"] == 4
    assert plain["answers"] == {"unparsed": 5, "ok": 5}
    assert "with official faults" in markdown(make_table({"b": guessed}, references=False))
    with pytest.raises(ConfigError, match="no fault of kris"):
        scored("kris", tmp_path / "c", "a", 100, Choice(quirks=True))


def test_pixels_are_measured_once_and_anew_for_another_picture(tmp_path, monkeypatch):
    from reasonedit.training.eval.benchmarks import pixels

    manifest, scores = scored("imgedit", tmp_path, "a", 0)
    assert scores["pixels"]["no_op_rate"] == 1.0 and scores["pixels"]["n"] == 5  # the very sources
    read = []
    monkeypatch.setattr(pixels, "read_picture", lambda *args: read.append(args) or np.zeros((48, 64, 3)))
    measure(manifest, tmp_path / "a", manifest.items)
    assert read == []
    find_output(tmp_path / "a" / OUTPUTS, manifest.items[0]).write_bytes(manifest.sources(manifest.items[1])[0].read_bytes())
    measure(manifest, tmp_path / "a", manifest.items)
    assert len(read) == 2


def test_judgements_of_another_manifest_are_refused(tmp_path):
    manifest, _ = scored("imgedit", tmp_path, "a", 100)
    with pytest.raises(DataError, match="another manifest"):
        score_judged(replace(manifest, sha256="0"), tmp_path / "a", next((tmp_path / "a" / "judged").iterdir()), Choice())


def test_two_runs_are_compared_on_the_items_that_both_are_scored_on(tmp_path):
    class Fond(DrawnJudge):
        """Likes pictures of the second run better, by one mark."""

        def marks(self, question):
            edited = Image.open(question.pictures[-1].path)
            bits = sum((edited.getpixel((at, 0))[0] > 127) << at for at in range(8))
            return {mark.name: 3 + (bits >= 200) for mark in question.prompt.marks}

    manifest, a = scored("imgedit", tmp_path, "a", 100, judge=Fond(), without=(4,))
    _, b = scored("imgedit", tmp_path, "b", 200, judge=Fond(), without=(0,))
    told = compare.compare_runs(manifest, a, b)
    first = told["rows"][0]
    assert (told["n"], told["left_out"], first["wins"], first["losses"]) == (3, 2, 3, 0)
    assert (first["difference"], first["low"], first["high"]) == pytest.approx((1, 1, 1))
    assert {row["group"]: row["n"] for row in told["rows"]} == {"overall": 3, "add": 1, "extract": 1, "style": 1}
    assert "+1.000 [+1.000, +1.000] | 3 / 0 / 0" in compare.compared_markdown(told, "a", "b")
    same = compare.compare_runs(manifest, a, a)["rows"][0]
    assert (same["difference"], same["ties"], same["wins"]) == (0, 4, 0)
    with pytest.raises(DataError, match="one judge"):
        compare.compare_runs(manifest, a, {**b, "judge": "other"})


def test_agreement_of_judges():
    def rows(*marks):
        return [
            {
                "item": str(at),
                "role": "SC",
                "anchor": None,
                "status": "ok",
                "marks": None if mark is None else {"success": mark},
            }
            for at, mark in enumerate(marks)
        ]

    (same,) = compare.agree(rows(1, 2, 3, None), rows(1, 2, 3, 4))
    assert (same["n"], same["spearman"], same["kappa"], same["bias"], same["equal"]) == (3, pytest.approx(1), 1, 0, 1)
    (off,) = compare.agree(rows(1, 2, 3, 4), rows(2, 3, 4, 5))
    assert off["spearman"] == pytest.approx(1) and off["kappa"] < 1 and off["bias"] == 1 and off["equal"] == 0
    (flat,) = compare.agree(rows(3, 3, 3), rows(3, 3, 3))
    assert flat["spearman"] is None and flat["kappa"] is None and flat["equal"] == 1
    with pytest.raises(DataError, match="both judges"):
        compare.agree(rows(None), rows(1))
    with pytest.raises(DataError, match="the same run"):  # another picture of the same item
        compare.agree(rows(1), [{**row, "edited": "y"} for row in rows(1)])


def test_kappa_and_rank_correlation_are_those_of_scipy_and_of_the_textbook():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    x, y = rng.integers(1, 6, 200), rng.integers(1, 6, 200)
    y = np.where(rng.random(200) < 0.6, x, y)
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    found = compare._agreement("SC", "success", pairs)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    observed = np.zeros((5, 5))
    for one, two in pairs:
        observed[one - 1, two - 1] += 1 / 200
    expected = np.outer(observed.sum(1), observed.sum(0))
    weights = (np.arange(5)[:, None] - np.arange(5)[None, :]) ** 2
    assert found["kappa"] == pytest.approx(1 - (weights * observed).sum() / (weights * expected).sum())


# ---- tables ----------------------------------------------------------------------------------------------------------------


def test_runs_that_do_not_compare_are_told_apart(tmp_path):
    _, a = scored("kris", tmp_path / "a", "a", 100)
    _, b = scored("kris", tmp_path / "b", "b", 100, Choice(aggregate="kris-flat"))
    table = make_table({"a": a, "b": {**b, "judge": "other"}}, references=False)
    assert any("differ in their judge" in remark for remark in table.remarks)
    assert any("differ in their aggregate (kris-flat, kris-sample)" in remark for remark in table.remarks)
    assert set(values_of(a)) >= {"factual", "conceptual", "overall", "consistency"} and "[A" not in markdown(table)
    _, other = scored("rise", tmp_path / "c", "c", 100)
    with pytest.raises(ConfigError, match="kris and rise"):
        make_table({"a": a, "c": other}, references=False)


def test_what_was_chosen_is_named_beside_every_n(tmp_path):
    def table_of(**choice):
        _, told = scored("imgedit", tmp_path / "-".join(choice or ["plain"]), "a", 100, Choice(**choice), without=(4,))
        return told, make_table({"a": told}, references=False)

    plain, table = table_of()
    (row,) = table.rows
    assert (row.facts["n"], row.facts["missing"]) == ("4/5", "1 left out") and row.facts["clamp"].endswith("lowered")
    zero, table = table_of(missing="zero")
    assert (table.rows[0].facts["n"], table.rows[0].facts["missing"]) == ("5/5", "1 counted as the worst")
    free, table = table_of(clamp=False)
    assert table.rows[0].facts["clamp"] == "off" and any("clamp off" in remark for remark in table.remarks)
    told = " ".join(make_table({"a": plain, "b": zero, "c": free}, references=False).remarks)
    assert "differ in their handling of missing pictures" in told and "differ in their clamping" in told
    quirk = make_table({"a": plain, "b": {**plain, "quirks": "official"}}, references=False).remarks
    assert any("differ in their repeated faults" in remark for remark in quirk)


def test_gedits_language_stands_on_every_row_and_published_rows_are_english(tmp_path):
    _, en = scored("gedit", tmp_path / "a", "a", 100, Choice(lang="en"))
    _, cn = scored("gedit", tmp_path / "b", "b", 100, Choice(lang="cn"))
    table = make_table({"a": en}, references=True)
    assert {row.facts["lang"] for row in table.rows} == {"en"} and not any("English set" in each for each in table.remarks)
    table = make_table({"a": en, "b": cn}, references=True)
    assert [row.facts["lang"] for row in table.rows[:2]] == ["en", "cn"]
    assert any("differ in their language" in each for each in table.remarks)
    assert any("of its English set" in each for each in table.remarks)


def test_runs_that_treat_missing_pictures_otherwise_are_not_compared(tmp_path):
    manifest, skipped = scored("imgedit", tmp_path / "a", "a", 100, without=(4,))
    _, zero = scored("imgedit", tmp_path / "b", "b", 100, Choice(missing="zero"), without=(4,))
    with pytest.raises(DataError, match="one missing"):
        compare.compare_runs(manifest, skipped, zero)


def test_every_measure_and_its_anchors_stand_in_a_table_with_its_n(tmp_path):
    manifest, told = scored("reason50k", tmp_path, "a", 100, without=(4,), anchors=2)
    told = {**told, "run": {**told["run"], "stops": {"success": 3, "budget": 1}}}
    table = measures_table({"ours": told})
    assert [row.name for row in table.rows] == ["ours", "ours: no edit", "ours: ground truth"]
    own, still, end = table.rows
    assert own.counts["L1 to source"] == own.counts["SSIM to target"] == "4/5" and still.counts["mllm"] == "2/2"
    assert still.facts["L1 to source"] == "0.0000" == end.facts["L1 to target"] and own.facts["L1 to source"] > "0.0000"
    assert still.facts["equal pictures"] == "4" and still.counts["PSNR to source"] == "0/4"
    assert own.facts["stop reasons"] == "success 3, budget 1" and "ok 8" in own.facts["answers"]
    text = markdown(table)
    assert f"{own.facts['L1 to target']} (4/5)" in text and "ground truth" in latex(table)
    (row, *_) = csv.DictReader(io.StringIO(as_csv(table)))
    assert row["L1 to target"] == own.facts["L1 to target"] and row["L1 to target n_scored/n"] == "4/5"


def test_gedits_intersection_is_a_row(tmp_path):
    _, told = scored("gedit", tmp_path, "a", 100, Choice(lang="en"))
    rows = {row.name: row for row in measures_table({"a": told}).rows}
    assert rows["a"].counts["O"] == "4/4" and rows["a: intersection"].counts["O"] == "3/3"


def test_every_mean_says_its_n_and_the_bounds_of_what_is_missing(tmp_path, capsys):
    manifest, told = scored("kris", tmp_path, "a", 100, without=(1,))  # biology
    rows = {(row.facts["block"], row.facts["metric"]): row.facts for row in means_table({"a": told}).rows}
    assert rows["conceptual", "score"]["n_scored/n"] == "0/1" and rows["conceptual", "score"]["bounds"] == "0.0000 .. 100.0000"
    assert rows["biology", "score"]["mean"] == "none" and "bounds" not in rows["factual", "score"]
    assert rows["natural science", "quality"]["n_scored/n"] == "0/1" and rows["overall", "knowledge"]["n_scored/n"] == "0/1"
    assert cli("score", "--manifest", manifest.folder, "--run", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert re.search(r"kris-sample: [\d.]+ \[[\d., ]+\], n 4/5, bounds [\d.]+ \.\. [\d.]+", said)
    assert "conceptual: score: none, n 0/1, bounds 0.0000 .. 100.0000" in said and "1 without a picture, left out" in said


def test_a_damaged_picture_is_named_and_stops_neither_import_nor_score_nor_doctor_nor_report(tmp_path, capsys):
    (tmp_path / "script.toml").write_text(SCRIPT)
    manifest = prepared("imgedit", tmp_path)
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    for item in manifest.items:
        save(theirs / f"{official_name(item)}.png", 200)
    first, second = manifest.items[2:4]
    damaged_png(theirs / f"{first.id}.png")
    base = ("--manifest", manifest.folder)
    assert cli("import", *base, "--dir", theirs, "--name", "theirs", "--out", run) == 0
    said = capsys.readouterr().out
    assert "4 of 5 items have a picture" in said and f"{first.id}: damaged: " in said
    damaged_png(find_output(run / OUTPUTS, second))  # after it was taken in
    judge = ("--judge", f"scripted:{tmp_path / 'script.toml'}")
    assert cli("doctor", *base, "--run", run, *judge) == 0 and f"damaged: {second.id}: " in capsys.readouterr().out
    assert cli("judge", *base, "--run", run, "--quiet", *judge) == 0 and f"damaged: {second.id}: " in capsys.readouterr().out
    (tmp_path / "taste.py").write_text("def taste(path):\n    return 3.5\n")
    more = ("--aesthetics", f"{tmp_path / 'taste.py'}:taste", "--missing", "zero")
    assert cli("score", *base, "--run", run, *more) == 0
    said = capsys.readouterr().out
    assert f"damaged: {second.id}: " in said and "2 without a picture, counted as the worst" in said
    assert cli("report", "--runs", f"theirs={run}", *base, "--out", tmp_path / "report", "--refs", "none") == 0
    (row,) = csv.DictReader(io.StringIO((tmp_path / "report" / "table.csv").read_text()))
    assert row["damaged"] == "1" and "damaged picture" in (tmp_path / "report" / "page.html").read_text()
    assert cli("score", *base, "--run", run, "--missing", "error") == 2


def test_scores_of_before_are_to_be_made_anew(tmp_path):
    _, told = scored("imgedit", tmp_path, "a", 100)
    (tmp_path / "old.json").write_text(json.dumps({**told, "format": None}))
    with pytest.raises(ConfigError, match="score` again"):
        read_scores(tmp_path / "old.json")


def test_names_cannot_break_out_of_a_table():
    table = Table("imgedit", (Row("a|b\n\\input{x}_%", {"overall": 3.0}, {}),), ())
    assert markdown(table).splitlines()[4].startswith("| a\\|b ")
    assert r"a|b" in as_csv(table) and r"\textbackslash{}input\{x\}\_\%" in latex(table)


def test_help_is_torch_light_and_a_wrong_call_says_what_to_do(tmp_path, capsys):
    code = "import sys; from reasonedit.training.eval.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'PIL', 'scipy', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, "generate", "--help"], check=True, capture_output=True)
    assert cli("list") == 0 and "kris-sample, kris-flat" in capsys.readouterr().out
    assert cli("score", "--manifest", tmp_path, "--run", tmp_path) == 2
    assert "reasonedit-eval prepare" in capsys.readouterr().err
    prepared("imgedit", tmp_path)
    assert cli("generate", "--manifest", tmp_path / "prepared", "--system", "loop", "--out", tmp_path / "r") == 2
    assert "--load" in capsys.readouterr().err
    assert cli("generate", "--manifest", tmp_path / "prepared", "--system", "x", "--shard", "3/2", "--out", tmp_path) == 2
    assert "I/N" in capsys.readouterr().err
