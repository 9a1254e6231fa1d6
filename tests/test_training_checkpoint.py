"""Resume to the bit, and checkpoints that survive kills, full disks, damage and changed settings."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.tests.engine_toys import (
    ToySource,
    digest_of,
    numbers,
    toy_groups,
    toy_models,
    toy_settings,
    toy_step,
)
from reasonedit.training import checkpoint, rng
from reasonedit.training.checkpoint import Contents, Position, apply_weights, complete, find, rotate, stored
from reasonedit.training.distributed import ParallelSettings, open_ranks
from reasonedit.training.log import read_log
from reasonedit.training.loop import train
from reasonedit.training.optim import OptimSettings, build_optimizer

EMA = OptimSettings(schedule="cosine", warmup=2, ema=0.9)


def run(folder, stop=None, resume=None, models=None, source=None, **changes):
    """A run of 8 steps over epochs of 3, with dropout (the consumer of the global generators); killed after `stop` steps."""
    models = models or toy_models(dropout=0.3)
    changed = {"optim": EMA, "save_every": 4, "resume": resume, **changes}
    done = []

    def step(models, micro):
        if stop is not None and len(done) == 2 * stop:
            raise KeyboardInterrupt
        done.append(micro)
        return toy_step(models, micro)

    def go():
        return train(models, toy_groups(models), source or ToySource(), step, toy_settings(8, **changed), folder)

    if stop is None:
        return go()
    with pytest.raises(KeyboardInterrupt):
        go()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.mark.parametrize(("first", "second"), [(0, 0), (2, 2), (0, 2)])
def test_killed_and_resumed_is_the_uninterrupted_run_to_the_bit(tmp_path, whole, monkeypatch, first, second):
    """Killed in step 7; goes on from step 4 (epoch 1, cursor 1) in another working directory, with other generators around."""
    monkeypatch.chdir(tmp_path)
    run(Path("run"), stop=6, workers=first)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    outcome = run("../run", resume="latest", models=toy_models(5, dropout=0.3), workers=second)
    assert outcome.finished and digest_of(outcome.checkpoint) == digest_of(whole / "checkpoints/step-00000008")
    lines = read_log(tmp_path / "run")
    assert numbers(lines) == numbers(read_log(whole)) and len(numbers(lines)) == 8
    assert [line["step"] for line in lines if line["event"] == "resume"] == [4]


def test_a_cold_start_from_the_same_weights_is_another_run(tmp_path, whole):
    """What makes the tests above worth something: without moments, generators and position the bits differ."""
    models = toy_models(dropout=0.3)
    run(tmp_path / "a", stop=6)
    apply_weights(find(tmp_path / "a"), models)
    run(tmp_path / "b", models=models)
    assert digest_of(find(tmp_path / "b")) != digest_of(find(whole))
    assert numbers(read_log(tmp_path / "b"))[0] != numbers(read_log(whole), 5)[0]


@pytest.mark.parametrize("what", ["weights", "ema", "optimizer", "ranks.json", "cursor", "plain"])
def test_every_part_of_a_checkpoint_matters(tmp_path, whole, what, monkeypatch):
    """Leave one part out of loading, and the resumed run is another one."""
    run(tmp_path, stop=6)
    if what == "ranks.json":
        monkeypatch.setattr(rng, "restore", lambda state: None)
    elif what == "cursor":
        original = checkpoint.load
        monkeypatch.setattr(checkpoint, "load", lambda *args: (replace(original(*args)[0], cursor=0), {}))
    elif what == "optimizer":
        monkeypatch.setattr(checkpoint, "read_optimizer", lambda *args: None)
    elif what in ("weights", "ema"):
        original = checkpoint.copy_tensors
        skipping = lambda folder, stem, into: stem != what and original(folder, stem, into)  # noqa: E731
        monkeypatch.setattr(checkpoint, "copy_tensors", skipping)
    outcome = run(tmp_path, resume="latest", models=toy_models(1, dropout=0.3))
    same = digest_of(outcome.checkpoint) == digest_of(whole / "checkpoints/step-00000008")
    assert same == (what == "plain")


def test_resumed_where_it_ended_does_nothing(tmp_path, whole):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    outcome = run(tmp_path, resume="latest")
    assert outcome.finished and outcome.step == 8 and numbers(read_log(tmp_path)) == []


def test_a_fresh_run_does_not_begin_over_an_old_one(tmp_path, whole):
    with pytest.raises(ConfigError, match=r"expected a folder without a run, found step-00000008"):
        run(whole)


def test_a_checkpoint_says_what_it_holds(whole):
    folder = find(whole)
    names = {path.name for path in folder.iterdir()}
    tensors = {f"{stem}-00000.safetensors" for stem in ("weights", "ema", "optimizer")}
    assert names == tensors | {"optimizer.json", "ranks.json", "state.json", "manifest.json"}
    state = json.loads((folder / "state.json").read_text())
    assert state["position"] == {"step": 8, "epoch": 2, "cursor": 2, "micro_step": 0}
    assert state["world"] == 1 and state["identity"]["data"] == "toy-3-2" and "torch" in state["versions"]
    assert (whole / "checkpoints/latest").read_text() == "step-00000008\n"
    kinds = {name.rpartition("::")[2] for name, _ in stored(folder, "optimizer")}
    assert kinds == {"exp_avg", "exp_avg_sq", "step"}


# ------------------------------------------------------------------------------------------------------------------ damage


def copied(whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "state.json", "ranks.json"])
def test_a_flipped_bit_is_found_and_the_other_checkpoint_named(tmp_path, whole, name):
    path = copied(whole, tmp_path) / "step-00000008" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is not what was written.*resume from another.*step-00000004"):
        run(tmp_path, resume="latest")
    (path.parent / "manifest.json").unlink()
    assert find(tmp_path).name == "step-00000004"


def test_a_missing_file_is_found(tmp_path, whole):
    (copied(whole, tmp_path) / "step-00000008/ema-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected .* bytes .*found no file"):
        run(tmp_path, resume="latest")


def test_half_written_folders_are_never_read(tmp_path, whole):
    root = copied(whole, tmp_path)
    (root / "latest").unlink()
    shutil.copytree(root / "step-00000008", root / "tmp-step-00000012-0a0b0c0d")
    (root / "step-00000020").mkdir()
    assert [one.name for one in complete(root)] == ["step-00000004", "step-00000008"]
    assert find(tmp_path).name == "step-00000008"
    (root / "latest").write_text("step-00000020\n")
    assert find(tmp_path).name == "step-00000008"
    (root / "latest").write_text("step-00000004\n")
    assert find(tmp_path).name == "step-00000004", "the pointer decides: a user may go back"
    assert find(tmp_path, 8) == find(tmp_path, "step-00000008") == find("/nowhere", root / "step-00000008")
    with pytest.raises(CheckpointError, match="complete checkpoint 5 in .*found step-00000004, step-00000008"):
        find(tmp_path, 5)


# -------------------------------------------------------------------------------------------------------- kills and full disks

KILLED = """
import os, random, signal, sys
sys.path.insert(0, sys.argv[4])
import conftest
from reasonedit.tests.engine_toys import *
from reasonedit.training.loop import train
import reasonedit.training.checkpoint as checkpoint

seed, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(int(sys.argv[3]))  # they split sums, so the bits depend on them
calls, at = 0, None

def deadly(function, when):
    def call(*args, **kwargs):
        global calls
        if at is not None:
            calls += 1
            if calls == at and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if at is not None and calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for name in ("fsync", "replace", "rename"):
    setattr(os, name, deadly(getattr(os, name), random.Random(seed + len(name)).choice(["before", "after"])))
save = checkpoint.save

def armed(run_dir, position, *args, **kwargs):
    global at
    if position.step == 4:
        at = random.Random(seed).randrange(1, 21)
    return save(run_dir, position, *args, **kwargs)

checkpoint.save = armed
models = toy_models(dropout=0.3)
settings = toy_settings(8, save_every=2, keep=1, optim=OptimSettings(schedule="cosine", warmup=2, ema=0.9))
train(models, toy_groups(models), ToySource(), toy_step, settings, folder)
"""


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_a_checkpoint_to_go_on_from(tmp_path):
    """A process of its own, killed at the n-th call to the disk of its second save, n drawn from the seed; then resumed."""
    reference = tmp_path / "reference"
    run(reference, save_every=2, keep=1)
    ends = set()
    for seed in (2, 9, 17, 6):  # early, before and after the rename, at the pointer
        folder = tmp_path / str(seed)
        told = (seed, folder, torch.get_num_threads(), Path(__file__).parent)
        done = subprocess.run([sys.executable, "-c", KILLED, *map(str, told)], capture_output=True, text=True)
        there = [one.name for one in complete(folder / "checkpoints")]
        ends.add((done.returncode, tuple(there)))
        assert done.returncode in (0, -9), done.stderr[-2000:]
        outcome = run(folder, resume="latest", models=toy_models(7, dropout=0.3), save_every=2, keep=1)
        assert digest_of(outcome.checkpoint) == digest_of(find(reference))
        left = {one.name for one in (folder / "checkpoints").iterdir()}
        assert left == {"step-00000008", "latest"}, "what was half written is cleared away by the next save"
    assert sum(code == -9 for code, _ in ends) and len(ends) > 1, ends


def bare_save():
    """(save(folder, step), the contents saved): a checkpoint of toy weights without a run around it."""
    models = toy_models()
    ranks, optimizer = open_ranks(ParallelSettings()), build_optimizer(toy_groups(models), OptimSettings())
    parameters = {f"{unit}.{name}": one for unit, module in models.units().items() for name, one in module.named_parameters()}
    contents = Contents(parameters, optimizer)
    return lambda folder, step: checkpoint.save(folder, Position(step, 0, step), contents, ranks, keep=1)


def test_a_process_that_dies_at_any_call_of_a_save_leaves_a_checkpoint(tmp_path, monkeypatch):
    """The same in this process, at every single call: nothing after it happens, not even cleaning up."""
    save = bare_save()

    class Dead(BaseException):
        pass

    def attempt(folder, limit):
        calls = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Dead
                return function(*args, **kwargs)

            return call

        save(folder, 1)
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename", "unlink"):
                patch.setattr(os, name, deadly(getattr(os, name)))
            patch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
            try:
                save(folder, 2)
                return True
            except Dead:
                pass
        assert find(folder).name in ("step-00000001", "step-00000002")
        for one in complete(folder / "checkpoints"):  # whatever looks complete is complete
            checkpoint.verify(one)
        return False

    limit = 0
    while not attempt(tmp_path / str(limit), limit):
        limit += 1
    assert limit > 20


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    """At every write of the save in turn."""
    save, limit, saved = bare_save(), 0, False
    root = tmp_path / "checkpoints"
    save(tmp_path, 1)
    original, before = os.fsync, digest_of(root / "step-00000001")
    while not saved:
        calls = 0

        def full(handle, limit=limit):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                save(tmp_path, 2)
                saved = True
            except CheckpointError as error:
                text = str(error)
                assert "No space left on device" in text and "GiB are free" in text and "Make room" in text
                assert "Nothing that was saved before is lost: step-00000001" in text
        if not saved:
            assert digest_of(root / "step-00000001") == before
            assert not list(root.glob("tmp-step-*")), "what could not be finished is removed at once, it takes room"
            checkpoint.verify(find(tmp_path))
        limit += 1
    assert limit > 8 and find(tmp_path).name == "step-00000002"


def test_a_run_that_could_not_save_goes_on_from_the_checkpoint_before(tmp_path, whole, monkeypatch):
    run(tmp_path, stop=6)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CheckpointError, match="Make room .* then resume"):
            run(tmp_path, resume="latest", models=toy_models(3, dropout=0.3))
    assert read_log(tmp_path)[-1]["event"] == "error"
    assert digest_of(run(tmp_path, resume="latest", models=toy_models(4, dropout=0.3)).checkpoint) == digest_of(find(whole))


# ----------------------------------------------------------------------------------------------------------------- rotation


def make(root, *steps):
    for step in steps:
        (root / f"step-{step:08d}").mkdir(parents=True)
        (root / f"step-{step:08d}/manifest.json").write_text("{}")


@given(steps=st.sets(st.integers(1, 60), min_size=1), keep=st.integers(1, 4), every=st.sampled_from([0, 5, 7]))
@settings(max_examples=40, deadline=None)
def test_rotation_keeps_the_last_ones_and_every_nth(tmp_path_factory, steps, keep, every):
    root = tmp_path_factory.mktemp("rotation")
    make(root, *steps, 70)
    rotate(root, max(steps), keep, every)
    left = {int(one.name.removeprefix("step-")) for one in root.iterdir()}
    wanted = set(sorted(steps)[-keep:]) | {step for step in steps if every and step % every == 0} | {70}
    assert left == wanted


def test_a_run_rotates_and_can_go_back(tmp_path, whole):
    """Keep 1 and every 4th of 8; then back to 4 and on again: what lay ahead is replaced, with the same bits."""
    run(tmp_path, save_every=1, keep=1, keep_every=4)
    assert [one.name for one in complete(tmp_path / "checkpoints")] == ["step-00000004", "step-00000008"]
    before = digest_of(find(tmp_path))
    outcome = run(tmp_path, resume=4, models=toy_models(3, dropout=0.3), save_every=1, keep=1, keep_every=4)
    assert outcome.step == 8 and digest_of(find(tmp_path)) == before == digest_of(find(whole))


# ------------------------------------------------------------------------------------------------------- what must be the same


def test_changed_settings_are_refused_unless_allowed_by_name(tmp_path, whole):
    copied(whole, tmp_path)
    changed = replace(EMA, clip=2.0, warmup=3)
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, resume=4, optim=changed)
    text = str(error.value)
    assert "2 values differ" in text and "optim.clip: 1.0 in the checkpoint, 2.0 now" in text
    assert "--allow-changed optim.clip --allow-changed optim.warmup" in text
    with pytest.raises(CheckpointError, match="1 values differ:\n  optim.warmup: 2"):
        run(tmp_path, resume=4, optim=changed, allow_changed=("optim.clip",))
    assert run(tmp_path, resume=4, optim=changed, allow_changed=("optim",)).finished
    with pytest.raises(ConfigError, match="--allow-changed optim.clup: .*did you mean optim.clip"):
        run(tmp_path, resume=4, optim=EMA, allow_changed=("optim.clup",))


def test_an_allowed_change_has_effect(tmp_path, whole):
    copied(whole, tmp_path)
    models = toy_models(dropout=0.3)
    settings = toy_settings(8, optim=EMA, resume=4, allow_changed=("group.dit.lr",))
    groups = [replace(group, lr=0.5 if group.name == "dit" else group.lr) for group in toy_groups(models)]
    train(models, groups, ToySource(), toy_step, settings, tmp_path)
    first = next(line for line in read_log(tmp_path) if line["event"] == "step")
    assert first["lr"]["dit"] == pytest.approx(50 * first["lr"]["mllm"])


def test_changed_data_are_refused(tmp_path, whole):
    copied(whole, tmp_path)
    with pytest.raises(CheckpointError, match='data: "toy-3-2" in the checkpoint, "toy-4-2" now'):
        run(tmp_path, resume=4, source=ToySource(length=4))


def test_the_caller_may_say_what_must_be_the_same(tmp_path):
    run(tmp_path, stop=5, identity={"stage.lr": 0.1, "stage.kinds": ("think",)})
    with pytest.raises(CheckpointError, match="1 values differ:\n  stage.lr: 0.1 in the checkpoint, 0.2 now"):
        run(tmp_path, resume="latest", identity={"stage.lr": 0.2, "stage.kinds": ("think",)})
    assert run(tmp_path, resume="latest", identity={"stage.lr": 0.1, "stage.kinds": ("think",)}).finished


def test_other_trainable_sets_are_refused_before_anything_changes(tmp_path, whole):
    copied(whole, tmp_path)
    models = toy_models(2)
    models.mllm.requires_grad_(False)
    groups = toy_groups(models)[1:]
    identity = ("group", "optim")
    before = models.dit.out.weight.detach().clone()
    settings = toy_settings(8, resume=4, allow_changed=identity)
    with pytest.raises(CheckpointError, match=r"11 tensors of weights do not fit .*mllm.embed.weight: expected none, found"):
        train(models, groups, ToySource(), toy_step, settings, tmp_path)
    assert torch.equal(models.dit.out.weight, before)


def pretend_world(root, step, world):
    """Rewrite a checkpoint as if `world` ranks had written it."""
    folder = root / f"step-{step:08d}"
    state = json.loads((folder / "state.json").read_text())
    state["world"] = state["identity"]["world"] = world
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    import hashlib

    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_number_of_ranks_needs_permission_and_the_end_of_an_epoch(tmp_path, caplog):
    run(tmp_path, stop=7, save_every=1, keep=9)
    root = tmp_path / "checkpoints"
    for step in (4, 6):
        pretend_world(root, step, 2)
    with pytest.raises(CheckpointError, match="world: 2 in the checkpoint, 1 now"):
        run(tmp_path, resume=6)
    with pytest.raises(CheckpointError, match=r"expected 2 ranks, .*middle of epoch 1 \(cursor 1\), found 1.*Resume with 2"):
        run(tmp_path, resume=4, allow_changed=("world",))

    class Windowed(ToySource):
        def moved(self, epoch, cursor, world):
            return 2 if (epoch, cursor, world) == (1, 1, 2) else None

    assert run(tmp_path / "..", resume=root / "step-00000006", allow_changed=("world",)).finished
    assert "from here on the run is not the one it was to the bit" in caplog.text
    outcome = run(tmp_path / "../x", resume=root / "step-00000004", source=Windowed(), allow_changed=("world",))
    first = next(line for line in read_log(tmp_path / "../x") if line["event"] == "step")
    assert outcome.finished and (first["step"], first["epoch"], first["cursor"]) == (5, 1, 2)


# ------------------------------------------------------------------------------------------------------------- other optimizers


class Odd(torch.optim.Optimizer):
    """Keeps plain values per parameter and running values per group; its moments are wider than its weights."""

    def __init__(self, params, lr=0.1, kind="ok"):
        super().__init__(params, {"lr": lr, "kind": kind, "seen": 0, "scale": (1.0, 2.0)})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["seen"] += 1
            group["scale"] = (group["scale"][0] * 0.9, 2.0)
            for one in group["params"]:
                state = self.state[one]
                state.setdefault("mean", torch.zeros_like(one, dtype=torch.float64)).mul_(0.9).add_(one.grad)
                state["count"] = state.get("count", 0) + 1
                if group["kind"] == "bad":
                    state["table"] = {"a": 1}
                one.sub_((group["lr"] * group["scale"][0] / group["seen"] / state["count"] * state["mean"]).to(one.dtype))


def test_any_optimizer_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "odd_optimizer", sys.modules[__name__])
    odd = OptimSettings(name="odd_optimizer.Odd", ema=0.5, schedule="linear")
    run(tmp_path / "a", optim=odd)
    run(tmp_path / "b", stop=6, optim=odd)
    run(tmp_path / "b", resume="latest", optim=odd, models=toy_models(4, dropout=0.3))
    assert digest_of(find(tmp_path / "a")) == digest_of(find(tmp_path / "b"))
    assert dict(stored(find(tmp_path / "a"), "optimizer"))["dit.quoted::mean"].dtype == torch.float64
    with pytest.raises(CheckpointError, match="expected the state of torch.optim.*AdamW.* found odd_optimizer.Odd|found .*Odd"):
        run(tmp_path / "b", resume=4, allow_changed=("optim",))


def test_state_that_cannot_be_saved_is_told_after_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "odd_optimizer", sys.modules[__name__])
    with pytest.raises(ConfigError, match="Odd keeps table of mllm.embed.weight as dict, which a checkpoint cannot hold"):
        run(tmp_path, optim=OptimSettings(name="odd_optimizer.Odd", options={"kind": "bad"}))


def test_large_states_are_written_in_several_files(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1000)
    run(tmp_path, stop=6)
    assert len(list(find(tmp_path).glob("weights-*"))) > 3
    run(tmp_path, resume="latest", models=toy_models(4, dropout=0.3))
    assert digest_of(find(tmp_path)) == digest_of(find(whole))


def test_weights_or_averages_go_into_other_models(whole):
    one, other = toy_models(1), toy_models(1)
    names = apply_weights(find(whole), one)
    apply_weights(find(whole), other, average=True)
    weights, averages = dict(stored(find(whole), "weights")), dict(stored(find(whole), "ema"))
    assert set(names) == set(weights)
    assert torch.equal(one.dit.out.weight, weights["dit.out.weight"])
    assert torch.equal(other.dit.out.weight, averages["dit.out.weight"])
    assert not torch.equal(one.dit.out.weight, other.dit.out.weight)
    with pytest.raises(CheckpointError, match="mllm.embed.weight: expected none, found"):
        apply_weights(find(whole), replace(one, mllm=None))
