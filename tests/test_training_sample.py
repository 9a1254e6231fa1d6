"""Sample edits: the pictures are those of inference, whatever the trainer has done to the modules, and the sheet shows them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from PIL import Image

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.images import from_pil, load_image
from reasonedit.reasonedit_core.load import System, SystemSpec, load_system
from reasonedit.reasonedit_core.sheet import draw_rows
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.data.drawn import write_drawn
from reasonedit.training.data.records import Record, read_records
from reasonedit.training.sample import Sample, choose_records, contact_sheet, make_generator, sample_edits, write_sheet

SYSTEMS = {"reasonedit-s": "step1x-v1p2", "reasonedit-q": "qwen-edit-plus"}
HOW = {"steps": 2, "guidance": 3.0, "size_level": 64}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    path = write_drawn(
        tmp_path_factory.mktemp("drawn"), {"t2i": 1, "edit": 3, "think": 1}, seed=2, size=(72, 56), languages=["en"]
    )
    return read_records(path)


def load(system: str) -> System:
    spec = SystemSpec(system, tiny_checkpoint(SYSTEMS[system], std=0.2), reasoner="none", dtype="float32", device="cpu")
    return load_system(spec)


@cache
def shared(system: str) -> System:
    """A system that tests put back as they found it."""
    return load(system)


def generator_of(loaded: System):
    """The trainer's generator around the modules of a loaded system."""
    made = loaded.generator
    return make_generator(
        loaded.name,
        "v1.2",
        conditioner=made.conditioner,
        transformer=made.denoiser.transformer,
        codec=made.codec,
        settings=loaded.settings,
        schedule=made.schedule,
    )


def expected(loaded: System, record: Record, seed: int = 0) -> torch.Tensor:
    """The same edit by `load_system`'s own generator."""
    picture = load_image(record.picture("input")).rgb
    request = EditRequest(picture, record.editor_instruction, seed=seed, **HOW)
    return loaded.generator.edit(request, picture, request.instruction, torch.Generator().manual_seed(seed)).image


def test_records_with_a_picture_and_words_are_chosen_in_order(records):
    chosen = choose_records(records, 3)
    assert [record.kind for record in chosen] == [r.kind for r in records if r.kind != "t2i"][:3]
    assert len(choose_records(records, 99)) == 4 and choose_records(records, 0) == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_pictures_are_those_of_inference(records, system):
    loaded, chosen = shared(system), choose_records(records, 2)
    samples = sample_edits(generator_of(loaded), chosen, seed=5, **HOW)
    for sample, record in zip(samples, chosen, strict=True):
        assert (sample.record, sample.instruction) == (record.id, record.editor_instruction)
        assert torch.equal(sample.edited, expected(loaded, record, seed=5))
        assert torch.equal(sample.source, load_image(record.picture("input")).rgb)
        assert (sample.target is not None) == ("target" in record.files)
    assert not torch.equal(samples[0].edited, samples[1].edited)


@pytest.mark.parametrize("system", SYSTEMS)
def test_weights_that_have_changed_are_used_and_training_goes_on_as_before(records, system):
    loaded, chosen = load(system), choose_records(records, 1)
    generator = generator_of(loaded)
    first = sample_edits(generator, chosen, **HOW)[0].edited
    loaded.mllm.model.model.visual.patch_embed.proj.weight.data *= -3
    transformer = generator.denoiser.transformer.train()
    transformer.proj_out.eval()
    torch.manual_seed(4)
    draw = torch.rand(1)
    torch.manual_seed(4)
    second = sample_edits(generator, chosen, **HOW)[0].edited
    assert torch.equal(torch.rand(1), draw) and torch.is_grad_enabled()
    assert transformer.training and not transformer.proj_out.training
    assert not torch.equal(first, second), "the vision features of the old weights must not be used"
    loaded.mllm.release()
    assert torch.equal(second, expected(loaded, chosen[0]))


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_packed_units_of_training_run_as_before(records, system):
    """Sampling and training share their modules; neither may leave the other's attention behind."""
    from reasonedit.reasonedit_core.denoisers.packed import PackedQwenImage, PackedStep1X
    from reasonedit.reasonedit_core.packing import ImagePack

    loaded = load(system)
    transformer, width = loaded.generator.denoiser.transformer, loaded.mllm.hidden_size
    unit = PackedStep1X(transformer, "v1.2") if system == "reasonedit-s" else PackedQwenImage(transformer)
    draw = torch.Generator().manual_seed(0)
    place = torch.stack([torch.arange(3.0)] * 3, dim=1) if system == "reasonedit-s" else None
    pack = ImagePack(
        text_index=torch.arange(3),
        text_doc=torch.zeros(3, dtype=torch.long),
        clean=torch.randn(8, 64, generator=draw),
        noise=torch.randn(8, 64, generator=draw) * (torch.arange(8) < 4)[:, None],
        sigma=torch.tensor([0.4]),
        image_doc=torch.zeros(8, dtype=torch.long),
        role=torch.tensor([0] * 4 + [1] * 4),
        loss_weight=torch.tensor([1.0] * 4 + [0.0] * 4),
        grids=(((2, 2), (2, 2)),),
        states=torch.randn(3, width, generator=draw),
        text_place=place,
        quoted=torch.zeros(3, dtype=torch.bool) if system == "reasonedit-s" else None,
    )
    with torch.no_grad():
        before = unit(pack)
        sampled = sample_edits(generator_of(loaded), choose_records(records, 1), **HOW)[0].edited
        assert torch.equal(unit(pack), before)
    assert torch.equal(sampled, expected(shared(system), choose_records(records, 1)[0]))


# ---- the sheet -----------------------------------------------------------------------------------------------------------


def flat(colour: str, size=(60, 40)) -> torch.Tensor:
    return from_pil(Image.new("RGB", size, colour))


def colours(page: Image.Image) -> dict[tuple[int, int, int], int]:
    return {colour: count for count, colour in page.convert("RGB").getcolors(1 << 24)}


def test_every_picture_is_on_the_sheet(tmp_path):
    samples = [
        Sample("a", "Paint it red.", flat("#010203"), flat("#c01020"), flat("#00ff00")),
        Sample("b", "把天空变成紫色", flat("#102030", (40, 80)), flat("#7711aa", (40, 80))),
    ]
    path = write_sheet(tmp_path / "deep" / "samples.png", samples, "stage editing, step 40", "2 steps, seed 0")
    page = Image.open(path)
    found = colours(page)
    for colour in ("#010203", "#c01020", "#00ff00", "#102030", "#7711aa"):
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert found.get(rgb, 0) > 10_000, f"{colour} is not shown"
    assert not list(path.parent.glob(".*")), "written whole, under its own name"
    narrow = contact_sheet(samples[1:], "x")
    assert narrow.width < page.width and narrow.height < page.height


def test_a_sheet_of_nothing_is_an_error():
    with pytest.raises(DataError, match="expected held-out records with a picture"):
        contact_sheet([], "x")


def test_rows_may_be_ragged_and_long_texts_are_cut():
    picture = Image.new("RGBA", (10, 300), "#336699ff")
    page = draw_rows("A title", [("word " * 4000, [("one", picture)]), ("", [("one", picture)] * 3), ("none", [])], "A note")
    assert page.mode == "RGB" and page.width < 1300 and page.height < 2200
    assert colours(page)[(0x33, 0x66, 0x99)] > 4 * 3000
