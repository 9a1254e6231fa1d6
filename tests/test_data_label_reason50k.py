"""`reasonedit-data reason50k` on the miniature: true records, every gate, EditWorld's pairs, splits, kills, commands."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError, DataError
from reasonedit.reasonedit_core.mini.judge import judge
from reasonedit.reasonedit_core.mini.texts import caption
from reasonedit.tests.label_tools import (
    QUICK,
    FakeServer,
    Killed,
    Killer,
    chosen_points,
    join_requests,
    without_times,
)
from reasonedit.tests.paint_tools import write_painter
from reasonedit.training.data.check import check_records
from reasonedit.training.data.label import session
from reasonedit.training.data.label.annotators import EndpointAnnotator, NotTaken, Refused, Shown, shown
from reasonedit.training.data.label.candidates import Gates, Measures
from reasonedit.training.data.label.cli import main
from reasonedit.training.data.label.editworld import EditWorldPair, read_editworld
from reasonedit.training.data.label.hypothetical import leak
from reasonedit.training.data.label.journal import read_journal
from reasonedit.training.data.label.objects import joined
from reasonedit.training.data.label.painters import DiffusersPainter
from reasonedit.training.data.label.reason50k import Idea, Options, Plan, Reason50KPairs, held_out_of, plans, read_ideas
from reasonedit.training.data.records import read_records
from reasonedit.training.eval.benchmarks.items import read_manifest
from reasonedit.training.eval.benchmarks.prepare import prepare
from reasonedit.training.mini.labelling import PlantedPainter, World, WorldAnnotator, pixels_of, rewritten, write_ideas

SEEDS = 8
NARROW = Options(candidates=5, gates=Gates(ssim=0.9995, mark=8.0), share=0.5)
"""Drawn pairs often differ in one cell of nine, so they are more alike than photographs."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(seeds, what is known of them)."""
    folder = tmp_path_factory.mktemp("seeds")
    return write_ideas(folder, SEEDS, 5), World(folder)


def label(out: Path, drawn, *, annotator=None, judge=None, painter=None, before=None, options=NARROW, items=None, **more):
    path, world = drawn
    annotator = annotator or WorldAnnotator(world)
    painter = painter or PlantedPainter(world)
    measures = more.pop("measures", Measures())
    parts = (annotator, judge or annotator, painter, before or painter, out, measures, more.pop("extractor", None), options)
    items = plans(read_ideas(path, more.pop("count", None)), [], options) if items is None else items
    return session.run(session.Session(out, QUICK, **more), lambda runner: Reason50KPairs(runner, *parts), items, name="r50k")


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn):
    out = tmp_path_factory.mktemp("whole")
    return out, label(out, drawn)


def test_records_are_true_and_pass_the_check(whole, drawn):
    out, result = whole
    assert result.records >= SEEDS // 2 and result.check.ok and check_records(out).ok
    scenarios = Counter()
    for record in read_records(out):
        known = drawn[1].with_target(shown(record.picture("target")), record.reason50k.source_caption)
        one, said = known.item, record.reason50k
        found = judge(one.target, one.source, pixels_of(record.picture("input")))
        assert found.done and found.exact, "the picture before is the one that was drawn"
        assert record.kind == "hypothetical" and said.hypothetical == record.instruction.raw == one.instruction
        assert (said.source_caption, said.target_caption) == tuple(
            caption(each, one.language) for each in (one.source, one.target)
        )
        assert said.origin == "inverse" and said.initial_instruction and record.lang == one.language
        assert said.scores["identity"] == said.scores["plausible_before"] == 10 and "z" in said.scores
        assert said.scorers == ("identity", "plausible_before", "quality", "ssim")
        steps = [step.step for step in record.provenance]
        assert steps[:3] == ["target", "grade", "rewrite"] and steps[3:] == ["source", "measure", "compare"]
        assert record.provenance[1].score >= 4 and all(step.key for step in record.provenance)
        scenarios[said.scenario] += 1
    assert len(scenarios) > 1


def test_what_is_lost_is_told_by_step_and_reason(whole):
    out, result = whole
    told = {(each["step"], each["reason"]) for each in rejects(out)}
    assert told <= {("gate", "too-alike"), ("gate", "low-mark"), ("gate", "near-duplicate"), ("rewrite", "leaks"),
                    ("grade", "target-too-bad")}  # fmt: skip
    assert result.records + result.rejected == SEEDS


def test_a_bad_picture_after_is_painted_again_and_given_up_in_the_end(tmp_path, drawn):
    class Unpainted(PlantedPainter):
        """The picture before in the place of the one after: the law has had no effect."""

        def paint(self, prompt, seed, size=None, like=None):
            from reasonedit.reasonedit_core.mini.world import render
            from reasonedit.training.mini.writers import encode_png

            one = self.world.described(prompt).item
            pixels = render(one.source, self.world.size)
            return encode_png(pixels), (pixels.shape[1], pixels.shape[0])

    result = label(tmp_path, drawn, painter=Unpainted(drawn[1]), before=PlantedPainter(drawn[1]))
    assert result.records == 0 and result.report["rejects"] == {"grade: target-too-bad": SEEDS}
    again = label(tmp_path, drawn, painter=Unpainted(drawn[1]), before=PlantedPainter(drawn[1]))
    assert again.records == 0 == again.asked, "a run that came to nothing does not stand in the way of the next"
    steps = Counter(entry.step for entry in read_journal(tmp_path / "journal.jsonl").entries.values())
    assert steps["target"] == 2 * SEEDS and "rewrite" not in steps and "source" not in steps


def captions(entry):
    return entry.value["source_caption"], entry.value["target_caption"]


def test_words_that_give_the_outcome_away_are_asked_for_again_and_then_rejected(tmp_path, drawn):
    class Tattling(WorldAnnotator):
        def _rewrite(self, question, told):
            found = super()._rewrite(question, told)
            return found if question.fault else {**found, "instruction": f"What if it came out so: {found['target_caption']}?"}

    again = label(tmp_path / "again", drawn, annotator=Tattling(drawn[1]), judge=WorldAnnotator(drawn[1]), count=3)
    plain = label(tmp_path / "plain", drawn, count=3)
    assert again.records == plain.records > 0
    entries = read_journal(tmp_path / "again/journal.jsonl").entries.values()
    outcomes = [
        entry
        for entry in entries
        if entry.step == "rewrite" and entry.done and leak(entry.value["target_caption"], *captions(entry))
    ]
    assert outcomes and all(entry.attempts > 1 for entry in outcomes)

    class Stubborn(WorldAnnotator):
        def _rewrite(self, question, told):
            found = super()._rewrite(question, told)
            return {**found, "instruction": "Paint it."}

    stubborn = label(tmp_path / "stubborn", drawn, annotator=Stubborn(drawn[1]), judge=WorldAnnotator(drawn[1]), count=3)
    assert stubborn.records == 0 and stubborn.report["rejects"] == {"rewrite: not-hypothetical": 3}


def test_several_sources_of_one_target_may_be_and_several_targets_of_one_source_may_not(tmp_path, drawn):
    options = replace(NARROW, top=3, candidates=12, gates=Gates(ssim=0.9995, near=0))
    result = label(tmp_path, drawn, options=options, count=2)
    records = read_records(tmp_path)
    sources = Counter(record.images.target.sha256 for record in records)
    assert result.records == len({record.images.input.sha256 for record in records}) and max(sources.values()) == 3
    by_target = {target: [r.reason50k.scores["z"] for r in records if r.images.target.sha256 == target] for target in sources}
    assert all(scores == sorted(scores, reverse=True) for scores in by_target.values())


def draft(number: int, target: int, scenario: str = "causal") -> dict:
    return {"images": {"target": {"sha256": f"{target:064x}"}}, "reason50k": {"scenario": scenario}, "id": f"{number}"}


def test_so_many_of_each_category_are_held_out_and_never_more():
    drafts = [draft(at, at, scenario) for at, scenario in enumerate(["causal"] * 40 + ["story"] * 20)]
    few = held_out_of(drafts, Options(held_out=3))
    assert sum(int(sha, 16) < 40 for sha in few) == 3 and len(few) == 5  # of 20 a tenth is two
    assert held_out_of(drafts, Options(held_out=0)) == frozenset()
    assert few <= held_out_of(drafts, Options(held_out=4, share=0.2))


def test_all_sources_of_a_target_go_the_same_way():
    drafts = [draft(at, at // 3) for at in range(60)]
    for room, targets in ((2, 0), (3, 1), (5, 1), (7, 2)):
        held = held_out_of(drafts, Options(held_out=room, share=1.0))
        assert len(held) == targets, "three records each: no target is cut in two"


def test_what_was_held_out_once_stays_so():
    drafts = [draft(at, at) for at in range(100)]
    before = held_out_of(drafts[:40], Options(held_out=6, share=0.5))
    after = held_out_of(drafts, Options(held_out=6, share=0.5), before)
    assert len(before) == 6 and after == before != held_out_of(drafts, Options(held_out=6, share=0.5))


def test_a_picture_before_with_two_pictures_after_is_taken_once(tmp_path, drawn, whole):
    records = read_records(whole[0])[:2]
    base = [json.loads(record.to_json()) for record in records]
    base[1]["images"]["input"] = base[0]["images"]["input"]
    pipeline = Reason50KPairs(None, None, None, None, None, tmp_path)
    items = [Plan(Idea(name, "causal", "s", "l", "c")) for name in "abc"]
    harvest = pipeline.gather(items, [[base[0]], [base[1]], [dict(base[0])]])
    assert len(harvest.drafts) == 1 and [(item, why.reason) for item, why in harvest.rejects] == [
        ("b", "source-twice"), ("c", "duplicate"),
    ]  # fmt: skip


def test_the_annotator_thinks_of_further_scenes(tmp_path, drawn):
    other = read_ideas(drawn[0])

    class Thinking(WorldAnnotator):
        def _expand(self, question, told):
            assert told["law"] == other[0].law
            return {"scene": other[int(told["number"])].scene}

    options = replace(NARROW, scenes=2)
    items = plans(other[:1], [], options)
    assert [item.id for item in items] == [other[0].id, f"{other[0].id}~1", f"{other[0].id}~2"]
    label(tmp_path, drawn, annotator=Thinking(drawn[1]), options=options, items=items)
    scenes = {entry.item: entry.value["scene"] for entry in read_journal(tmp_path / "journal.jsonl").entries.values()
              if entry.step == "expand"}  # fmt: skip
    assert scenes == {f"{other[0].id}~{number}": other[number].scene for number in (1, 2)}


def test_a_refused_comparison_costs_its_candidate_and_silence_costs_the_item(tmp_path, drawn):
    class Choosy(WorldAnnotator):
        fault = Refused

        def _compare(self, question, told):
            seen.append(question.pictures[0].sha256)
            if len(seen) == 1:
                raise self.fault("no")
            return super()._compare(question, told)

    class Silent(Choosy):
        fault = NotTaken

    options, seen = replace(NARROW, gates=Gates(ssim=0.9995), candidates=6), []
    found = label(tmp_path / "a", drawn, judge=Choosy(drawn[1], "judge"), options=options, count=1)
    (record,) = read_records(tmp_path / "a")
    assert found.records == 1 and record.images.input.sha256 != seen[0] and len(seen) > 1
    seen.clear()
    found = label(tmp_path / "b", drawn, judge=Silent(drawn[1], "judge"), options=options, count=1)
    assert found.report["rejects"] == {"compare: not-taken": 1} and len(seen) == 1


# ---- EditWorld


def editworld(root: Path, drawn, count: int = 3) -> Path:
    """Pairs of the world in EditWorld's layout: paths as their tools write them, from the folder above `datasets`."""
    from reasonedit.reasonedit_core.mini.world import render

    group = root / "datasets/editworld/generated_img/group_0"
    group.mkdir(parents=True)
    told = {}
    for number, known in enumerate(drawn[1].known[:count]):
        words = rewritten(known.item)
        for end, scene in (("ori", known.item.source), ("tar", known.item.target)):
            Image.fromarray(render(scene, drawn[1].size)).save(group / f"sample{number}_{end}.png", compress_level=1)
        name = f"datasets/editworld/generated_img/group_0/sample{number}"
        told[f"sample{number}"] = {
            "original_caption": words["source_caption"], "instuction": "Do it.", "target_cation": words["target_caption"],
            "key_words": "x", "original_img_path": f"{name}_ori.png", "target_img_path": f"{name}_tar.png",
        }  # fmt: skip
    told["lost"] = {**told["sample0"], "original_img_path": "datasets/editworld/none.png"}
    (group / "img_txt.json").write_text(json.dumps(told))
    return root / "datasets/editworld"


def test_pairs_of_editworld_are_read_from_folders_from_train_json_and_where_they_were_moved_to(tmp_path, drawn):
    root = editworld(tmp_path, drawn)
    found = read_editworld(root)
    assert [pair.name for pair in found] == [f"generated_img/group_0:sample{number}" for number in range(3)]
    assert found[0].before.name == "sample0_ori.png" and found[0].instruction == "Do it." and found[1].after.is_file()
    told = json.loads((root / "generated_img/group_0/img_txt.json").read_text())
    (root / "train.json").write_text(json.dumps(list(told.values())[:2]))
    assert [pair.name for pair in read_editworld(root)] == [".:0", ".:1"] and len(read_editworld(root / "train.json", 1)) == 1
    moved = root.rename(tmp_path / "elsewhere")
    assert len(read_editworld(moved)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON"),
        ('{"a": 1}', "expected an entry with"),
        ('{"a": {"original_caption": "x"}}', "expected text under instuction"),
        ("{}", "found no pair whose two pictures are there"),
    ],
)
def test_what_is_not_editworld_is_told(tmp_path, text, words):
    (tmp_path / "img_txt.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_editworld(tmp_path)


def test_pictures_are_not_looked_for_outside(tmp_path, drawn):
    root = editworld(tmp_path / "a", drawn, 1)
    path = root / "generated_img/group_0/img_txt.json"
    told = json.loads(path.read_text())["sample0"]
    (tmp_path / "secret.png").write_bytes(b"x")
    path.write_text(json.dumps({"s": {**told, "original_img_path": "../../../../../secret.png"}}))
    with pytest.raises(DataError, match="found no pair"):
        read_editworld(root)


def test_pairs_of_editworld_become_stories_with_their_own_picture_before(tmp_path, drawn):
    world = drawn[1]

    class ByCaption(WorldAnnotator):
        """EditWorld's pictures are files of another encoder, so the world knows them by their words."""

        def _rewrite_pair(self, question, told):
            return rewritten(self._of(told).item)

        def _compare(self, question, told):
            one = self._of(told).item
            found = judge(one.target, one.source, pixels_of(question.pictures[0].path))
            return {"identity": found.preservation, "plausible_before": found.success, "quality": found.quality, "why": "x"}

        def _of(self, told):
            return next(k for k in world.known if rewritten(k.item)["source_caption"] == told["source_caption"])

    items = plans([], read_editworld(editworld(tmp_path / "data", drawn)), NARROW)
    result = label(tmp_path / "out", drawn, annotator=ByCaption(world), items=items)
    records = read_records(tmp_path / "out")
    assert 0 < result.records == len(records) and result.check.ok
    for record in records:
        assert record.reason50k.scenario == "story" and record.reason50k.origin == "editworld"
        assert record.reason50k.initial_instruction == "Do it." and record.picture("input").name.endswith("_ori.png")
        assert [step.step for step in record.provenance] == ["rewrite_pair", "measure", "compare"]
        assert record.reason50k.scores["z"] == 0


def test_a_pair_that_cannot_be_used_costs_itself_only(tmp_path, drawn):
    pairs = read_editworld(editworld(tmp_path / "data", drawn, 2))
    Image.new("RGB", (10, 20)).save(tmp_path / "tall.png")
    items = [replace(pairs[0], before=tmp_path / "none.png"), replace(pairs[1], before=tmp_path / "tall.png")]
    result = label(tmp_path / "out", drawn, items=items)
    assert result.report["rejects"] == {"seed: missing-picture": 1, "seed: aspect": 1}


# ---- painters


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_painter(tmp_path_factory.mktemp("painter"))


def test_a_tiny_sd_paints_by_words_by_seed_and_after_a_picture(models, tmp_path):
    folder, adapter = models
    alone, led = DiffusersPainter(folder, steps=2), DiffusersPainter(folder, adapter, steps=2)
    pictures = []
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (24, 16), colour).save(tmp_path / f"{name}.png")
        pictures.append(shown(tmp_path / f"{name}.png"))
    base = alone.paint("a cup", 3, (24, 16))
    assert base[1] == (24, 16) and base == alone.paint("a cup", 3, (24, 16))
    assert base != alone.paint("a cup", 4, (24, 16)) and base != alone.paint("a tree", 3, (24, 16))
    assert led.paint("a cup", 3, (24, 16)) == base  # without a picture the words alone count
    red, blue = (led.paint("a cup", 3, (24, 16), like=picture) for picture in pictures)
    assert len({base[0], red[0], blue[0]}) == 3 and led.paint("a cup", 3, (24, 16)) == base
    assert led.name == "tiny-sd+tiny_ip*0.6@num_inference_steps=2" != alone.name


def test_sizes_off_the_grid_of_the_vae_come_out_as_asked(models):
    png, size = DiffusersPainter(models[0], steps=1).paint("a cup", 0, (21, 17))
    assert size == (21, 17) and DiffusersPainter(models[0], steps=1).paint("a cup", 0)[1] == (16, 16)


def test_models_that_are_none_are_told(models, tmp_path):
    with pytest.raises(ConfigError, match="expected a diffusers folder"):
        DiffusersPainter(tmp_path)
    with pytest.raises(ConfigError, match="expected a file of IP-Adapter weights"):
        DiffusersPainter(models[0], tmp_path / "none")
    with pytest.raises(ConfigError, match="--ip-adapter"):
        DiffusersPainter(models[0], steps=1).paint("a", 0, (16, 16), Shown(tmp_path, "0", (16, 16)))
    (tmp_path / "bare.safetensors").write_bytes(models[1].read_bytes())
    with pytest.raises(CheckpointError, match="an IP-Adapter made for it"):
        DiffusersPainter(models[0], tmp_path / "bare.safetensors").paint("a", 0)


def test_end_to_end_with_a_tiny_sd_and_ip_adapter_as_the_candidate_step(models, tmp_path, drawn, capsys):
    folder, adapter = models
    command = ["reason50k", str(drawn[0]), "--out", str(tmp_path / "out"), "--world", str(drawn[0].parent), "--limit", "3"]
    command += ["--source-model", str(folder), "--ip-adapter", str(adapter), "--steps", "1", "--candidates", "2", "--quiet"]
    assert main(command) == 0
    said = capsys.readouterr().out
    records = read_records(tmp_path / "out")
    assert f"{len(records)} records" in said and records
    for record in records:
        painted = next(step for step in record.provenance if step.step == "source")
        assert painted.model == "tiny-sd+tiny_ip*0.6@num_inference_steps=1" and record.provenance[0].model == "drawn"
        size = Image.open(record.picture("input")).size
        assert size == Image.open(record.picture("target")).size and "identity" in record.reason50k.scorers
        assert np.asarray(Image.open(record.picture("input"))).std() > 0
    assert main(command) == 0 and "(0 now)" in capsys.readouterr().out


# ---- objects


def test_objects_of_the_annotator_and_of_an_extractor_are_joined():
    class Extractor:
        def extract(self, instruction, image=None):
            return ["ice cube", "Paris"] if "ice" in instruction else []

    assert joined(["cube", "table"], Extractor(), "An ice cube in Paris.") == ["cube", "table", "Paris"]
    assert joined(["cube"], Extractor(), "A cube.") == ["cube"]
    assert joined(["a", "a "], None, "x") == ["a"]
    assert len(joined([f"thing {number}" for number in range(20)], None, "x")) == 16


# ---- kills


def test_killed_anywhere_nothing_is_lost_and_nothing_done_twice(tmp_path, drawn, monkeypatch):
    items = plans(read_ideas(drawn[0])[:4], [], NARROW)
    options = replace(NARROW, candidates=3)

    def through(server, out):
        asked = EndpointAnnotator(server.url, "world")
        return label(out, drawn, annotator=asked, judge=EndpointAnnotator(server.url, "judge"), options=options, items=items)

    with FakeServer(WorldAnnotator(drawn[1]), tmp_path / "seen") as server:
        with monkeypatch.context() as patch:
            uncut = Killer(patch)
            through(server, tmp_path / "whole")
        questions = len(server.asked)
        work = sum(entry.endpoint is None for entry in read_journal(tmp_path / "whole/journal.jsonl").entries.values())
        wanted = without_times((tmp_path / "whole/records.jsonl").read_text(encoding="utf-8"))
        assert wanted and work and set(uncut.kinds) == {
            "request-out", "request-back", "write-torn", "write-unflushed", "rename-before", "rename-after",
        }  # fmt: skip
        for point in chosen_points(uncut.kinds, 20, seed=7):
            out = tmp_path / f"killed-{point}"
            server.asked.clear()
            with monkeypatch.context() as patch:
                Killer(patch, point)
                with pytest.raises(Killed):
                    through(server, out)
                join_requests()
            before = len(server.asked)
            finished = read_journal(out / "journal.jsonl").entries
            answered = sum(entry.endpoint is not None for entry in finished.values())
            result = through(server, out)
            kept = read_journal(out / "journal.jsonl").entries
            assert set(finished) <= set(kept) and len(kept) == questions + work, point
            assert 0 <= before - answered <= QUICK.concurrency, f"point {point}: more was lost than was under way"
            assert result.asked == questions - answered, point
            assert len(server.asked) == questions + before - answered, point
            assert without_times((out / "records.jsonl").read_text(encoding="utf-8")) == wanted, point
            assert not list(out.rglob(".*.part")), point


# ---- the command


def test_the_command_end_to_end_dry_run_and_page(tmp_path, capsys):
    assert main(["mini-seeds", "--for", "reason50k", "--out", str(tmp_path / "seeds"), "--count", "4", "--seed", "5"]) == 0
    command = ["reason50k", str(tmp_path / "seeds/seeds.jsonl"), "--out", str(tmp_path / "out"), "--most-ssim", "0.9995"]
    command += ["--world", str(tmp_path / "seeds"), "--candidates", "4", "--quiet", "--sample", "2"]
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert json.loads(capsys.readouterr().out)["work"] == "target"
    assert main(command) == 0 and "records" in capsys.readouterr().out
    page = (tmp_path / "out/sample.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 2 and "what was measured" in page
    assert main([*command, "--dry-run"]) == 0 and "nothing would be asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "found neither"),
        (["S"], "expected a JSONL file of seeds"),
        (["--editworld", "E"], "found no pair"),
        (["SEEDS"], "expected a text-to-image model and an IP-Adapter"),
        (["SEEDS", "--source-model", "M"], "found no --ip-adapter FILE"),
        (["SEEDS", "--lpips-band", "x"], "--lpips-band: expected"),
        (["SEEDS", "--lpips-band", "0.5,0.2"], "expected two rising numbers"),
        (["SEEDS", "--least-grade", "6"], "expected a whole number"),
    ],
)
def test_errors_are_told_in_a_sentence_with_code_2(more, words, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reason50k", *[str(drawn[0]) if each == "SEEDS" else each for each in more], "--out", "o"]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"id": "a"}', '{"id": "a", "category": "odd", "scenario": "s", "law": "l", "scene": "c"}',
     '{"id": "a", "category": "story", "scenario": "s", "law": "", "scene": "c"}',
     '{"id": "a", "category": "story", "scenario": "s", "law": 3, "scene": "c"}'],
)  # fmt: skip
def test_seeds_that_are_none_are_told_with_their_line(tmp_path, line):
    good = '{"id": "g", "category": "story", "scenario": "s", "law": "l", "scene": "c"}'
    (tmp_path / "seeds.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(DataError, match=r"seeds\.jsonl:3: expected a seed"):
        read_ideas(tmp_path / "seeds.jsonl")
    (tmp_path / "seeds.jsonl").write_text(f"{good}\n{good}\n")
    with pytest.raises(DataError, match="twice"):
        read_ideas(tmp_path / "seeds.jsonl")
    (tmp_path / "seeds.jsonl").write_text("\n")
    with pytest.raises(DataError, match="found none"):
        read_ideas(tmp_path / "seeds.jsonl")


@pytest.mark.parametrize("wrong", [{"tries": 0}, {"grade": 6}, {"top": 0}, {"held_out": -1}, {"share": 1.5}, {"scenes": -1}])
def test_options_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        Options(**wrong)


def test_the_names_of_pairs_are_part_of_their_items(tmp_path):
    pair = EditWorldPair("g:s", "i", "a", "b", tmp_path, tmp_path)
    assert plans([], [pair], NARROW) == [pair]


def test_the_held_out_records_are_a_benchmark(whole, tmp_path):
    told = [json.loads(record.to_json()) for record in read_records(whole[0])]
    told[0]["split"] = "held_out"
    lines = "".join(json.dumps(each) + "\n" for each in told)
    held = [each for each in told if each.get("split") == "held_out"]
    folder = tmp_path / "records"
    folder.mkdir()
    for each in told:
        for picture in each["images"].values():
            (folder / picture["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / picture["path"]).write_bytes((whole[0] / picture["path"]).read_bytes())
    (folder / "records.jsonl").write_text(lines)
    prepare("reason50k", folder, tmp_path / "prepared")
    manifest = read_manifest(tmp_path / "prepared")
    assert [item.id for item in manifest.items] == [each["id"] for each in held]
    first, said = manifest.items[0], held[0]["reason50k"]
    assert (first.group, first.instruction) == (said["scenario"], said["hypothetical"])
    assert (first.refs["input_text"], first.refs["output_text"]) == (said["source_caption"], said["target_caption"])
    pictures = (manifest.sources(first)[0], manifest.picture(first, "gt_img"))
    assert [shown(path).sha256 for path in pictures] == [held[0]["images"][name]["sha256"] for name in ("input", "target")]
