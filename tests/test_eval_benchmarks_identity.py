"""Identity preservation in several runs, GEdit's resizing, masks, kills while judging, and a miniature by its own name."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.reasonedit_core.mini.models import PLACE
from reasonedit.tests.benchmark_tools import DrawnJudge, prepared, reason50k, save
from reasonedit.tests.label_tools import QUICK, FakeServer, Killed, Killer, chosen_points, join_requests
from reasonedit.tests.minis import write_minis
from reasonedit.training.data.label.annotators import Refused
from reasonedit.training.data.label.journal import read_journal
from reasonedit.training.eval.benchmarks.commands import _maker
from reasonedit.training.eval.benchmarks.differences import measure
from reasonedit.training.eval.benchmarks.items import read_manifest
from reasonedit.training.eval.benchmarks.judge import JUDGEMENTS, judge_run
from reasonedit.training.eval.benchmarks.judges import EndpointJudge, read_rows
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, find_output, keep_output, official_name
from reasonedit.training.eval.benchmarks.pixels import read_mask
from reasonedit.training.eval.benchmarks.prepare import prepare
from reasonedit.training.eval.benchmarks.protocols import load_protocol, with_identity
from reasonedit.training.eval.benchmarks.score import Choice, score_judged
from reasonedit.training.eval.benchmarks.tables import make_table
from reasonedit.training.eval.cli import build_parser, main


def run_of(bench, folder, size=None):
    """(manifest, run with a picture for every item)."""
    manifest = prepared(bench, folder)
    for at, item in enumerate(manifest.items):
        save(folder / "edited.png", 200 + at)
        if size is not None:
            Image.open(folder / "edited.png").resize(size).save(folder / "edited.png")
        keep_output(folder / "run", item, (folder / "edited.png").read_bytes())
    (folder / "run" / "run.json").write_text('{"system": "drawn", "kind": "import", "seed": 0, "several": "skip"}')
    return manifest, folder / "run"


def judged(manifest, run, judge, protocol, **more):
    done = judge_run(manifest, run, protocol, judge, **{"items": manifest.items, "limits": QUICK, **more})
    return done, read_rows(done.folder / JUDGEMENTS)


# ---- identity preservation -------------------------------------------------------------------------------------------------


def test_runs_of_identity_are_questions_of_their_own_and_their_mean_is_the_metric(tmp_path):
    manifest, run = run_of("gedit", tmp_path)
    judge, protocol = DrawnJudge(), with_identity(load_protocol("gedit-re"), 3)
    done, rows = judged(manifest, run, judge, protocol, anchors=1)
    runs = [row for row in rows if row["role"].startswith("identity_") and row["anchor"] is None]
    assert len(runs) == 3 * len(manifest.items) and len({row["key"] for row in runs}) == len(runs)
    assert len({row["seed"] for row in runs if row["item"] == runs[0]["item"]}) == 3
    told = score_judged(manifest, run, done.folder, Choice(lang="en"))
    own = {each["item"]: each["metrics"]["identity"] for each in told["items"]}
    for item, (value,) in own.items():
        marks = [row["marks"]["identity"] for row in runs if row["item"] == item]
        assert value == pytest.approx(np.mean(marks))
    assert told["overall"]["identity"]["n"] == 4 and told["anchors"]["no-edit"]["identity"]["n_scored"] == 1
    again, _ = judged(manifest, run, judge, with_identity(load_protocol("gedit-re"), 4), anchors=1)
    assert again.requests == len(manifest.items) + 1, "a fourth run asks nothing of the first three again"


def test_runs_without_an_answer_are_left_out_of_the_mean_and_counted(tmp_path):
    manifest, run = run_of("imgedit", tmp_path)

    class Refusing(DrawnJudge):
        def answer(self, question, dropped):
            if question.prompt.step.endswith("identity_2"):
                raise Refused("no")
            return super().answer(question, dropped)

    done, rows = judged(manifest, run, Refusing(), with_identity(load_protocol("imgedit-re"), 2))
    told = score_judged(manifest, run, done.folder, Choice())
    first = {row["item"]: row["marks"]["identity"] for row in rows if row["role"] == "identity_1"}
    assert {each["item"]: each["metrics"]["identity"][0] for each in told["items"]} == first
    assert told["answers"]["refused"] == len(manifest.items)
    find_output(run / OUTPUTS, manifest.items[0]).unlink()
    done, _ = judged(manifest, run, Refusing(), with_identity(load_protocol("imgedit-re"), 2))
    told = score_judged(manifest, run, done.folder, Choice(missing="zero"))
    assert told["items"][0]["metrics"]["identity"] == [0.0] and told["overall"]["identity"]["n"] == 5


def test_without_runs_the_protocol_stays_what_it_is():
    own = load_protocol("kris-re")
    assert with_identity(own, 0) is own and with_identity(own, 2).digest != own.digest


# ---- GEdit's resizing ------------------------------------------------------------------------------------------------------


def test_the_official_resizing_is_a_judgement_of_its_own_and_shows_the_sources_size(tmp_path):
    from dataclasses import replace

    manifest, run = run_of("gedit", tmp_path, (48, 48))
    plain, official = load_protocol("gedit-re"), replace(load_protocol("gedit-re"), resized=True)

    class Measuring(DrawnJudge):
        def answer(self, question, dropped):
            seen.update(Image.open(picture.path).size for picture in question.pictures)
            return super().answer(question, dropped)

    seen: Counter = Counter()
    first, _ = judged(manifest, run, Measuring(), plain)
    assert seen[48, 48] == 2 * len(manifest.items)
    seen.clear()
    second, rows = judged(manifest, run, Measuring(), official)
    assert set(seen) == {(64, 48)} and second.folder == first.folder.with_name(first.folder.name.replace("-re", "-re-resized"))
    assert second.told["resized"] and second.told["questions"] != first.told["questions"]
    again, _ = judged(manifest, run, Measuring(), official)
    assert again.requests == 0 and all(row["status"] == "ok" for row in rows)
    told = [score_judged(manifest, run, done.folder, Choice(lang="en", pixels=False)) for done in (first, second)]
    cells = [make_table({"run": each}, False).rows[0].facts["protocol"] for each in told]
    assert cells == ["gedit-re", "gedit-re, pictures resized to their sources"]


# ---- masks -----------------------------------------------------------------------------------------------------------------


def test_what_changed_outside_the_masks_is_measured_apart(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    item, run, masks = manifest.items[0], tmp_path / "run", tmp_path / "masks"
    with Image.open(manifest.sources(item)[0]) as image:
        edited = image.convert("RGB")
    edited.paste((255, 0, 0), (0, 0, 32, 48))  # the left half, and one pixel right of it
    edited.save(tmp_path / "clean.png")
    before = edited.getpixel((50, 24))
    edited.putpixel((50, 24), tuple(255 - value for value in before))
    edited.save(tmp_path / "edited.png")
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (0, 0, 32, 48))
    masks.mkdir()
    mask.resize((32, 24)).save(masks / f"{official_name(item)}.png")
    keep_output(run, item, (tmp_path / "clean.png").read_bytes())
    found = measure(manifest, run, manifest.items, masks).rows[item.id]
    assert found["outside"] == {"l1": 0.0, "psnr": None, "ssim": 1.0, "shift": 0.0, "mse_256": found["outside"]["mse_256"]}
    assert found["to_source"]["l1"] > 0.1 and found["inside"]["l1"] == pytest.approx(2 * found["to_source"]["l1"], abs=1e-5)
    keep_output(run, item, (tmp_path / "edited.png").read_bytes())
    outside = measure(manifest, run, manifest.items, masks).rows[item.id]["outside"]
    expected = sum(abs(255 - 2 * value) for value in before) / 3 / 255 / (32 * 48)
    assert outside["l1"] == pytest.approx(expected, abs=1e-6) and outside["ssim"] < 1
    mask.paste(255, (40, 0, 64, 48))  # another mask, in which the pixel may change
    mask.save(masks / f"{official_name(item)}.png")
    assert measure(manifest, run, manifest.items, masks).rows[item.id]["outside"]["l1"] == 0
    assert "outside" not in measure(manifest, run, manifest.items).rows[item.id]


def test_a_benchmarks_own_masks_are_used_where_no_others_are_named(tmp_path):
    root = reason50k(tmp_path / "official")
    Image.new("L", (64, 48), 0).save(root / "mask.png")
    lines = [json.loads(line) for line in (root / "reason50k.jsonl").read_text().splitlines()]
    lines[1]["mask"] = "mask.png"
    (root / "reason50k.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    prepare("reason50k", root, tmp_path / "prepared")
    manifest = read_manifest(tmp_path / "prepared")
    for item in manifest.items:
        keep_output(tmp_path / "run", item, manifest.sources(item)[0].read_bytes())
    found = measure(manifest, tmp_path / "run", manifest.items).rows
    assert [name for name, row in found.items() if "outside" in row] == ["r1"] and found["r1"]["outside"]["l1"] == 0


def test_masks_that_are_none_are_told(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    with pytest.raises(ConfigError, match="found none of 5"):
        measure(manifest, tmp_path / "run", manifest.items, tmp_path)
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    with pytest.raises(DataError, match="found white alone"):
        read_mask(tmp_path / "white.png", (8, 8))


# ---- kills -----------------------------------------------------------------------------------------------------------------


def test_judging_killed_anywhere_loses_nothing_and_asks_nothing_twice(tmp_path, monkeypatch):
    manifest, run = run_of("rise", tmp_path)
    protocol = load_protocol("rise-re")
    prompts = {question.step: question for question in protocol.calls.values()}

    def plain(folder):
        rows = [json.loads(line) for line in (folder / JUDGEMENTS).read_text(encoding="utf-8").splitlines()]
        return [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in rows]

    def through(place):
        judge = EndpointJudge(server.url, "drawn", max_side=protocol.max_side)
        return judge_run(manifest, place, protocol, judge, items=manifest.items, anchors=1, limits=QUICK)

    def copy(name):
        place = tmp_path / name
        for item in manifest.items:
            keep_output(place, item, find_output(run / OUTPUTS, item).read_bytes())
        return place

    with FakeServer(DrawnJudge(), tmp_path / "seen", prompts=prompts) as server:
        place = copy("whole")
        with monkeypatch.context() as patch:
            uncut = Killer(patch)
            wanted = plain(through(place).folder)
        questions = len(server.asked)
        for point in chosen_points(uncut.kinds, 20, seed=11):
            place = copy(f"killed-{point}")
            server.asked.clear()
            with monkeypatch.context() as patch:
                Killer(patch, point)
                with pytest.raises(Killed):
                    through(place)
                join_requests()
            (journal,) = place.glob("judged/*/journal.jsonl")
            before, finished = len(server.asked), len(read_journal(journal).entries)
            done = through(place)
            assert 0 <= before - finished <= QUICK.concurrency, f"point {point}: more was lost than was under way"
            assert done.requests == questions - finished and len(server.asked) == questions + before - finished, point
            assert plain(done.folder) == wanted, point


# ---- the command line ------------------------------------------------------------------------------------------------------


def test_a_miniature_is_named_by_itself(tmp_path, monkeypatch, capsys):
    """Tiny random weights stand for the trained ones; nothing else differs."""
    monkeypatch.setenv(PLACE, str(write_minis(tmp_path / "minis")))
    manifest = prepared("imgedit", tmp_path)
    common = ["generate", "--manifest", str(manifest.folder), "--out", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    kinds = {}
    for how in ("mini-s", "mini-s:think", "mini-s:base"):
        args = build_parser().parse_args([*common, "--system", how])
        kinds[how] = _maker(args).name
    assert kinds == {"mini-s": "loop:mini-s@3 rounds", "mini-s:think": "think:mini-s", "mini-s:base": "base:mini-s"}
    assert main([*common, "--system", "mini-s:base", "--sample", "2", "--steps", "1"]) == 0
    assert "2 made" in capsys.readouterr().out
    assert main([*common, "--system", "mini-s:often"]) == 2 and main([*common, "--system", "mini-s", "--load", "mini-q"]) == 2
    assert "SYSTEM:HOW" in capsys.readouterr().err


def test_new_measures_on_the_command_line(tmp_path, capsys):
    manifest, run = run_of("reason50k", tmp_path)
    script = tmp_path / "judge.toml"
    script.write_text('[[answer]]\ntext = \'{"reason": "r", "mllm": 1, "align": 5, "identity": 7}\'\n')
    base = ["--manifest", str(manifest.folder), "--run", str(run), "--quiet"]
    (tmp_path / "taste.py").write_text("def taste(path):\n    return 3.5\n")
    (tmp_path / "ratings.csv").write_text("rater,id,score\n" + "".join(f"ann,{item.id},4\n" for item in manifest.items))
    masks = tmp_path / "masks"
    for item in manifest.items:
        path = masks / f"{official_name(item)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 48), 0).save(path)
    assert main(["judge", *base, "--judge", f"scripted:{script}", "--identity", "2"]) == 0
    more = ["--aesthetics", f"{tmp_path / 'taste.py'}:taste", "--ratings", str(tmp_path / "ratings.csv")]
    assert main(["score", *base, *more, "--ratings-scale", "1,5", "--masks", str(masks)]) == 0
    assert "Ins-Align: 0.750, n 5/5, 1 raters" in capsys.readouterr().out
    (path,) = run.glob("judged/*/scores.json")
    told = json.loads(path.read_text())
    assert told["overall"]["identity"]["mean"] == 7 and told["features"]["aesthetics"] == {"n": 5, "n_scored": 5, "mean": 3.5}
    assert told["pixels"]["outside"]["l1"]["n_scored"] == 5 and told["ins_align"]["mean"] == 0.75
    assert main(["report", "--runs", f"ours={run}", "--out", str(tmp_path / "report"), "--refs", "none", "--quiet"]) == 0
    with open(tmp_path / "report/table.csv", newline="") as stream:
        cells = next(csv.DictReader(stream))
    assert cells["Ins-Align"] == "0.750" and cells["identity"] == "7.00" and cells["aesthetics"] == "3.500"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["judge", "--judge", "scripted:S", "--quirks", "official"], "expected a manifest of gedit"),
        (["score", "--ratings", "R", "--ratings-scale", "x"], "--ratings-scale: expected"),
        (["score", "--ratings", "R"], "expected a CSV file of ratings"),
        (["score", "--aesthetics", "none"], "expected MODULE:FUNCTION"),
    ],
)
def test_errors_of_the_new_options_are_told(arguments, words, tmp_path, capsys):
    manifest, run = run_of("imgedit", tmp_path)
    (tmp_path / "S").write_text("")
    (run / "judged" / "a").mkdir(parents=True)
    options = ["--manifest", str(manifest.folder), "--run", str(run), "--quiet"]
    assert main([arguments[0], *options, *arguments[1:]]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
