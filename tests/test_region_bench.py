"""The benchmark's arms with a region do the work that their names say."""

from __future__ import annotations

import types
from functools import cache

import pytest
import torch

from reasonedit.reasonedit_core.bench.arms import edit, forced_region
from reasonedit.reasonedit_core.bench.peer_step1x import given_words
from reasonedit.reasonedit_core.bench.small import write_pictures
from reasonedit.reasonedit_core.bench.weights import GivenWords
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.tests.tiny import tiny_checkpoint


@cache
def generator():
    spec = SystemSpec("reasonedit-s", tiny_checkpoint("step1x-v1p2"), "none", dtype="float32", device="cpu")
    return load_system(spec).generator


@pytest.mark.parametrize(("reuse", "steps"), [(False, (9, 19, 0)), (True, (9, 9, 10))])
def test_a_quarter_is_edited_in_nine_full_steps_of_28(reuse, steps):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    request = EditRequest(image, "make it red", steps=28, guidance=1.0, size_level=64)
    region = forced_region({"region": 0.25, "reuse": reuse}, generator(), request)
    asked = EditRequest(image, "make it red", steps=28, guidance=1.0, size_level=64, region=region)
    use = generator().edit(asked, image, "make it red", torch.Generator().manual_seed(0), released=True).region
    assert (use.full, use.partial, use.cached) == steps and use.edited * 4 == use.tokens == 16


def test_words_given_to_the_peer_are_those_of_our_arm():
    """Two texts in turn, the conditional one first, whatever it is asked to encode."""
    pipe = types.SimpleNamespace()
    given_words(pipe, "cpu", torch.float32, count=6, width=8, quoted=0)
    ours = GivenWords("cpu", torch.float32, count=6, width=8, quoted=0)
    for _ in range(3):
        theirs, words = pipe.encode_prompt(prompt="any"), ours.condition(None, "any")
        assert torch.equal(theirs.embedding, words.tokens) and torch.equal(theirs.txt_ids, words.positions)
        assert theirs.mask.all() and not theirs.text_masks.any()


def test_the_arm_runs(tmp_path):
    (tmp_path / "out").mkdir()
    job = {"system": "reasonedit-s", "size": "small", "folder": str(tiny_checkpoint("step1x-v1p2")), "device": "cpu"}
    job |= {"pictures": write_pictures(tmp_path, 1, (64, 64)), "out": str(tmp_path / "out"), "steps": 3, "guidance": 2.0}
    assert edit({**job, "level": 64, "region": 0.25, "reuse": True})(0).keys() == {"forwards of the transformer"}
    assert (tmp_path / "out/000.png").is_file()
