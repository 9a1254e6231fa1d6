"""Making edited pictures: four ways of a system, a command, shards, and going on after a stop."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, MalformedReply
from reasonedit.reasonedit_core.loop import POLICIES
from reasonedit.reasonedit_core.types import Counts, Decision, Edited, Reflection, Scores, Thought
from reasonedit.tests.benchmark_tools import damaged_png, prepared
from reasonedit.training.eval.benchmarks.generate import Job, Made, MakerFault, generate, journals, run_facts
from reasonedit.training.eval.benchmarks.makers import CommandMaker, Settings, SystemMaker
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, find_output

DEFAULTS = {"steps": 2, "guidance": 1.0, "size_level": 64, "negative": None}


class Painter:
    """An editor that paints the whole picture in a grey that follows from the instruction and the noise."""

    def __init__(self):
        self.said = []

    def edit(self, request, picture, instruction, rng, **options) -> Edited:
        self.said.append(instruction)
        grey = (len(instruction) % 50) / 100 + torch.rand((), generator=rng).item() / 2
        made = torch.full_like(request.image, grey)
        return Edited(made, made, None)


class Thinker:
    """Marks a picture by its grey, and is content with the third."""

    def __init__(self, fails=False):
        self.seen, self.fails = [], fails

    def bound(self, **options):
        return self

    def think(self, image, instruction, feedback=None):
        if self.fails:
            raise MalformedReply("expected a thought, found none", "?")
        return Thought(instruction, f"{instruction} Plainly.")

    def describe(self, image, goal, original=""):
        return "grey"

    def reflect(self, source, edited, goal, target, original=""):
        self.seen.append(round(edited.mean().item(), 6))
        done = len(self.seen) % 3 == 0
        scores = Scores(edit=(10 * self.seen[-1], 10.0), quality=(10.0, 10.0), consistency=8.0)
        second = None if done else f"Again, number {len(self.seen)}."
        return Reflection(Decision.SUCCESS if done else Decision.REFINE, "so", second, scores)


def system(reasoner=None):
    parts = {"reasoner": reasoner, "generator": Painter(), "policy": POLICIES["reasonedit"], "defaults": DEFAULTS}
    return SimpleNamespace(name="fake", counts=Counts(), **parts)


def maker(kind, loaded, **settings):
    return SystemMaker(kind, lambda: loaded, "fake", Settings(**settings))


@pytest.mark.parametrize(
    ("kind", "rounds", "calls", "said"),
    [
        ("base", 1, 0, "Make change 0."),
        ("think", 1, 0, "Make change 0. Plainly."),
        ("loop", 3, 3, "Make change 0. Plainly."),
        ("reroll", 2, 2, "Make change 0. Plainly."),
    ],
)
def test_four_ways_of_a_system(kind, rounds, calls, said, tmp_path):
    manifest, loaded = prepared("imgedit", tmp_path), system(Thinker())
    done = generate(
        manifest, manifest.items[:1], maker(kind, loaded, rounds=2 if kind == "reroll" else 3), Job(tmp_path / "run")
    )
    assert (done.made, done.failed) == (1, {})
    assert loaded.generator.said[0] == said and len(loaded.generator.said) == rounds and len(loaded.reasoner.seen) == calls
    item = manifest.items[0]
    assert Image.open(find_output(tmp_path / "run" / OUTPUTS, item)).size == (64, 48)
    trace = json.loads((tmp_path / "run" / "items" / item.id / "trace.json").read_text())
    assert len(trace["rounds"]) == rounds and trace["request"]["seed"] != 0
    facts = run_facts(tmp_path / "run", [item.id])
    assert facts["kind"] == kind and facts["rounds"] == {"n": 1, "mean": rounds} and sum(facts["stops"].values()) == 1
    if kind == "reroll":  # one goal, several noises, the highest mark
        assert len(set(loaded.generator.said)) == 1 and len(set(loaded.reasoner.seen)) == 2
        shown = Image.open(find_output(tmp_path / "run" / OUTPUTS, item)).convert("L").getpixel((5, 5)) / 255
        assert shown == pytest.approx(max(loaded.reasoner.seen), abs=0.005)


def test_the_time_of_scoring_rerolls_is_not_charged(tmp_path, monkeypatch):
    from reasonedit.training.eval.benchmarks import makers

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(makers, "time", SimpleNamespace(monotonic=lambda: clock.now))
    loaded = system(Thinker())

    def costing(function, seconds):
        def call(*args, **more):
            clock.now += seconds
            return function(*args, **more)

        return call

    for owner, name, seconds in [
        (loaded.reasoner, "think", 1),
        (loaded.reasoner, "describe", 20),
        (loaded.reasoner, "reflect", 300),
        (loaded.generator, "edit", 4000),
    ]:
        setattr(owner, name, costing(getattr(owner, name), seconds))
    manifest = prepared("imgedit", tmp_path)
    generate(manifest, manifest.items[:1], maker("reroll", loaded, rounds=2), Job(tmp_path / "run"))
    assert run_facts(tmp_path / "run", [manifest.items[0].id])["seconds"]["mean"] == 1 + 2 * 4000


def test_a_run_goes_on_after_a_stop_and_makes_nothing_twice(tmp_path):
    manifest = prepared("gedit", tmp_path)

    class Stopping:
        name = kind = "x"
        calls = 0

        def make(self, source, instruction, seed, folder):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return Made(source.read_bytes(), {"seconds": 1.0, "rounds": 1})

    one = Stopping()
    with pytest.raises(KeyboardInterrupt):
        generate(manifest, manifest.items, one, Job(tmp_path / "run"))
    done = generate(manifest, manifest.items, one, Job(tmp_path / "run"))
    assert (done.made, done.known, one.calls) == (3, 2, 6)
    find_output(tmp_path / "run" / OUTPUTS, manifest.items[0]).unlink()  # a lost picture is made again
    assert generate(manifest, manifest.items, one, Job(tmp_path / "run")).made == 1 and one.calls == 7


def test_shards_divide_the_items_and_another_division_makes_nothing_twice(tmp_path):
    manifest = prepared("reason50k", tmp_path)
    made = Counter()

    class Counting:
        name = kind = "x"

        def make(self, source, instruction, seed, folder):
            made[instruction, seed] += 1
            return Made(source.read_bytes(), {})

    for number in (1, 2):
        generate(manifest, manifest.items, Counting(), Job(tmp_path / "run", (number, 3)))
    assert len(made) == 4
    done = generate(manifest, manifest.items, Counting(), Job(tmp_path / "run", (1, 1)))
    assert (done.made, done.known) == (1, 4) and len(made) == 5 and set(made.values()) == {1}
    assert len(journals(tmp_path / "run")) == 5
    assert len({seed for _, seed in made}) == 5  # every item its own, whatever the shard


def test_a_folder_belongs_to_one_system(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    generate(manifest, manifest.items[:1], maker("base", system()), Job(tmp_path / "run"))
    with pytest.raises(ConfigError, match="seed 0 in place of 1"):
        generate(manifest, manifest.items[:1], maker("base", system()), Job(tmp_path / "run", seed=1))
    with pytest.raises(ConfigError, match="another --out"):
        generate(manifest, manifest.items[:1], maker("think", system(Thinker())), Job(tmp_path / "run"))


def test_items_of_several_sources_are_skipped_said_or_joined(tmp_path):
    manifest = prepared("kris", tmp_path)
    sizes = {}

    class Looking:
        kind = "x"

        def __init__(self, name):
            self.name = name

        def make(self, source, instruction, seed, folder):
            sizes[self.name, instruction] = Image.open(source).size
            return Made(source.read_bytes(), {})

    several = next(item for item in manifest.items if len(item.sources) == 2)
    for policy in ("skip", "first", "concat"):
        done = generate(manifest, manifest.items, Looking(policy), Job(tmp_path / policy, several=policy))
        assert list(done.failed) == ([several.id] if policy == "skip" else [])
    assert sizes["first", several.instruction] == (64, 48) and sizes["concat", several.instruction] == (128, 48)
    assert ("skip", several.instruction) not in sizes and run_facts(tmp_path / "skip", [several.id])["failed"]


def test_a_thought_that_cannot_be_read_costs_its_item_and_a_system_without_a_reasoner_the_run(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    done = generate(manifest, manifest.items[:2], maker("think", system(Thinker(fails=True))), Job(tmp_path / "a"))
    assert done.made == 0 and all(why.startswith("malformed") for why in done.failed.values())
    retried = generate(manifest, manifest.items[:2], maker("think", system(Thinker())), Job(tmp_path / "a", retry=True))
    assert (retried.made, retried.failed) == (2, {})
    with pytest.raises(ConfigError, match="without a reasoner"):
        generate(manifest, manifest.items[:1], maker("loop", system()), Job(tmp_path / "b"))


COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2]); assert sys.argv[3] == 'Make change 0.'"


def test_any_command_can_edit_and_an_instruction_is_one_argument(tmp_path):
    manifest = prepared("imgedit", tmp_path)
    command = f'"{sys.executable}" -c "{COPY}" {{source}} {{out}} {{instruction}}'
    done = generate(manifest, manifest.items[:2], CommandMaker(command), Job(tmp_path / "run"))
    assert done.made == 1 and "ended with 1" in done.failed[manifest.items[1].id]
    facts = run_facts(tmp_path / "run", [item.id for item in manifest.items])
    assert facts["seconds"]["n"] == 1 and facts["rounds"] is None and facts["failed"] == {"maker": 1}


def test_a_command_that_leaves_no_picture_takes_too_long_or_is_none(tmp_path):
    save = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(save)
    python = f'"{sys.executable}" -c'
    with pytest.raises(MakerFault, match="no picture"):
        CommandMaker(f'{python} "0" {{source}} {{out}}').make(save, "x", 0, tmp_path)
    with pytest.raises(MakerFault, match="more than 0.2 s"):
        CommandMaker(f'{python} "import time; time.sleep(60)" {{source}} {{out}}', 0.2).make(save, "x", 0, tmp_path)
    with pytest.raises(ConfigError, match="no-such-program"):
        CommandMaker("no-such-program {source} {out}").make(save, "x", 0, tmp_path)
    for command in ("edit {source}", "", 'edit "{source} {out}'):
        with pytest.raises(ConfigError, match="cmd"):
            CommandMaker(command)


def test_what_is_put_into_a_command_is_not_looked_through_again(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    check = "import sys, shutil; assert sys.argv[1] == 'x={' + 'out}', sys.argv; shutil.copy(sys.argv[3], sys.argv[2])"
    maker = CommandMaker(f'"{sys.executable}" -c "{check}" x={{instruction}} {{out}} {{source}}')
    assert maker.make(tmp_path / "a.png", "{out}", 0, tmp_path).facts["rounds"] is None


@pytest.mark.slow
def test_a_tiny_random_checkpoint_edits_through_the_librarys_own_loader(tmp_path):
    from reasonedit.reasonedit_core.load import SystemSpec
    from reasonedit.tests.tiny import tiny_checkpoint
    from reasonedit.training.eval.benchmarks.makers import load_with

    manifest = prepared("rise", tmp_path)
    spec = SystemSpec("reasonedit-s", tiny_checkpoint("step1x-v1p2", std=0.2), reasoner="none", dtype="float32", device="cpu")
    own = SystemMaker("base", load_with(spec), "tiny", Settings(steps=1, guidance=1.0, size_level=64))
    assert generate(manifest, manifest.items[:2], own, Job(tmp_path / "run")).made == 2
    assert Image.open(find_output(tmp_path / "run" / OUTPUTS, manifest.items[0])).size == (64, 48)


@pytest.mark.parametrize("several", ["first", "concat"])
def test_a_source_that_cannot_be_decoded_costs_its_own_item_only(several, tmp_path):
    manifest = prepared("kris", tmp_path)
    item = next(item for item in manifest.items if len(item.sources) > 1)
    damaged_png(manifest.sources(item)[0])
    done = generate(manifest, manifest.items, maker("base", system()), Job(tmp_path / "run", several=several))
    assert done.made == 4 and done.failed.keys() == {item.id} and "unreadable-picture" in done.failed[item.id]
