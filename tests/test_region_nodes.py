"""The Edit node's region: the core's own edit, a mask for each picture, memory that is asked for, old graphs unchanged."""

from __future__ import annotations

import inspect

import pytest
import torch

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.regions import Region
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.tiny import tiny_checkpoint

install_host()

from reasonedit.nodes import edit, sockets  # noqa: E402
from reasonedit.tests.test_nodes_edit import Still, picture  # noqa: E402

STEPS = {"steps": 4, "guidance": 3.0, "size": 64}
LEFT = torch.zeros(1, 48, 64)
LEFT[..., :32] = 1.0


@pytest.fixture(scope="module")
def editor():
    system = load_system(SystemSpec("reasonedit-s", tiny_checkpoint("step1x-v1p2", std=0.2), "none"))
    cpu = torch.device("cpu")
    return sockets.EditorHandle("s", "reasonedit-s", system.generator, system.defaults, system.mllm, Still(), cpu)


def test_a_masked_edit_is_the_cores(editor):
    image = picture(3)
    made = edit.edit_all(editor, image, "make it red", seed=5, region="mask", region_mask=LEFT, **STEPS)
    (source,), region = sockets.to_pictures(image), Region(mask=LEFT[None])
    asked = EditRequest(source, "make it red", seed=5, steps=4, guidance=3.0, size_level=64, region=region)
    found = editor.generator.edit(asked, source, "make it red", torch.Generator().manual_seed(5))
    assert torch.equal(made.image, sockets.to_image([found.image])) and made.items[0].region == found.region
    assert 0 < found.region.partial and 0 < found.region.edited < found.region.tokens
    plain = edit.edit_all(editor, image, "make it red", seed=5, **STEPS)
    assert plain.items[0].region is None and not torch.equal(plain.image, made.image)


def test_each_picture_has_its_mask():
    masks = torch.stack([LEFT[0], 1 - LEFT[0]])
    found = sockets.to_regions("mask", masks, 2)
    assert [torch.equal(region.mask, masks[n][None, None]) for n, region in enumerate(found)] == [True, True]
    assert all(torch.equal(region.mask, LEFT[None]) for region in sockets.to_regions("mask", LEFT, 3))
    assert [region.mode for region in sockets.to_regions("auto", LEFT, 2)] == ["auto", "auto"]
    assert sockets.to_regions("off", LEFT, 2) == [None, None]


@pytest.mark.parametrize(
    ("mask", "words"),
    [(None, "expected a MASK where region is mask, found none"), (torch.zeros(2, 8, 8), "expected 1 mask or 3")],
)
def test_masks_that_do_not_fit_are_refused(mask, words):
    with pytest.raises(ConfigError, match=words):
        sockets.to_regions("mask", mask, 3)


def test_a_region_asks_for_the_memory_of_its_keys(editor):
    plain = editor.request(torch.zeros(1, 3, 64, 64), "x", seed=0, size=512)
    kept = editor.request(torch.zeros(1, 3, 64, 64), "x", seed=0, size=512, region=Region())
    needs = []
    for request in (plain, kept):
        editor.expect(request, request.image)
        needs.append(editor.mover.needs["dit"])
    config = editor.generator.denoiser.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    layers = config.num_layers + config.num_single_layers
    # k and v of two passes in float32, of 1024 tokens of target and reference each and some text
    least = 2 * 2 * layers * 2048 * width * 4
    assert least < needs[1] - needs[0] < 1.5 * least


def test_old_graphs_have_no_region():
    """The inputs may be left out."""
    inputs = [one for one in edit.Edit.define_schema().inputs if one.id.startswith("region")]
    assert [one.id for one in inputs] == ["region", "region_mask"] and all(one.optional for one in inputs)
    given = inspect.signature(edit.Edit.execute).parameters
    assert given["region"].default == "off" and given["region_mask"].default is None
