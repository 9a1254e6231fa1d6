"""SAM and SAM 2 on tiny random weights, boxes, kept regions, masks of a user, and what is said where one is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from reasonedit.reasonedit_core.brain.cues import make_finder, network_of
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.segmenters.cache import CachedRegions, read_regions, write_regions
from reasonedit.reasonedit_core.segmenters.regions import GivenRegions, GridSegmenter, SegmentedRegions, select_regions
from reasonedit.reasonedit_core.segmenters.sam import SamSegmenter, load_sam
from reasonedit.reasonedit_core.types import FoundMasks
from reasonedit.tests.brains import write_sam

ALL = {"iou": -9.0, "stability": -1.0}
"""Random weights are sure of nothing."""


@pytest.fixture(scope="module", params=["sam", "sam2"])
def folder(request, tmp_path_factory):
    return write_sam(tmp_path_factory.mktemp("sam") / request.param, request.param)


def picture(height: int = 40, width: int = 64) -> torch.Tensor:
    return (torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


@torch.no_grad()
def test_masks_are_those_of_the_network(folder):
    segmenter = load_sam(folder, side=3, batch=4, **ALL)
    found = segmenter.segment(picture())
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    pixels, (height, width) = segmenter._pixels(picture())
    assert pixels.shape == (1, 3, 64, 64) and (height, width) == ((40, 64) if kind == "sam" else (64, 64))
    points = [((x + 0.5) * width / 3, (y + 0.5) * height / 3) for y in range(3) for x in range(3)]
    said = segmenter.model(pixel_values=pixels, input_points=torch.tensor(points)[None, :, None], multimask_output=True)
    logits = said.pred_masks[0].flatten(0, 1)
    side = logits.shape[-1]
    logits = logits[:, : round(40 * side / 64)] if kind == "sam" else logits
    assert torch.equal(found.masks, logits > 0) and found.masks.shape[0] == 27
    assert torch.allclose(found.iou, said.iou_scores[0].flatten().clamp(0, 1), atol=1e-5)
    assert torch.allclose(found.stability, (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2)).clamp(min=1))


def test_the_input_is_that_of_the_library(folder):
    """Against the image processors of transformers, whose resize rounds to 8 bits."""
    transformers = pytest.importorskip("transformers")
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind == "sam":
        size = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
        processor = transformers.SamImageProcessor(**size)
    else:
        processor = transformers.Sam2ImageProcessor(size={"height": 64, "width": 64})
    image = (picture() * 255).round().to(torch.uint8)
    theirs = torch.as_tensor(processor(image[0], return_tensors="pt")["pixel_values"])
    ours = load_sam(folder)._pixels(image / 255)[0]
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.02


def test_what_is_not_sure_is_dropped(folder):
    segmenter = load_sam(folder, side=2, iou=9.0)
    found = segmenter.segment(picture())
    assert len(found.masks) == 0
    regions = SegmentedRegions(segmenter).regions(picture(), 4)
    assert regions.masks.eq(255).all() and regions.geometry[:, 7].tolist() == [1], "the background alone, and no NaN"


def test_names_tell_weights_apart(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "copy")
    assert load_sam(tmp_path / "copy").name == load_sam(folder).name
    file = tmp_path / "copy/model.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert load_sam(tmp_path / "copy").name != load_sam(folder).name


def test_another_folder_is_a_sentence(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(CheckpointError, match="expected SAM or SAM 2 .*found no config.json. Name such"):
        load_sam(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    state = load_file(tmp_path / "copy/model.safetensors")
    key = next(key for key in state if key.startswith("mask_decoder"))
    save_file({k: v for k, v in state.items() if k != key}, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"found 1 missing: {key}"):
        load_sam(tmp_path / "copy")
    (tmp_path / "copy/config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="found model_type 'clip'"):
        load_sam(tmp_path / "copy")
    with pytest.raises(ConfigError, match="at least one point a side"):
        SamSegmenter(None, "none", side=0)


@pytest.mark.parametrize("size", [(40, 64), (3, 9), (1, 1)])
def test_boxes_cover_a_picture_once(size):
    found = GridSegmenter().segment(picture(*size))
    assert found.masks.sum(0).eq(1).all() and len(found.masks) == min(4, size[0]) * min(4, size[1])
    with pytest.raises(ConfigError, match="at least one box"):
        GridSegmenter(0)


class Counted(GridSegmenter):
    calls = 0

    def segment(self, image):
        self.calls += 1
        return super().segment(image)


def test_a_picture_is_segmented_once(tmp_path):
    inner, wanted = Counted(), select_regions(GridSegmenter().segment(picture()), 4)
    first, second = (CachedRegions(tmp_path, inner).regions(picture(), 4) for _ in range(2))
    assert inner.calls == 1 and torch.equal(first.masks, wanted.masks) and torch.equal(second.geometry, wanted.geometry)
    alone = CachedRegions(tmp_path)
    assert torch.equal(alone.regions(picture() + 1e-4, 4).masks, wanted.masks), "8 bits decide"
    CachedRegions(tmp_path, inner).regions(picture(), 8)
    CachedRegions(tmp_path, inner).regions(picture(8, 8), 4)
    assert inner.calls == 3 and len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ConfigError, match="expected the regions of this picture .*found 0 files"):
        alone.regions(picture(9, 9), 4)
    CachedRegions(tmp_path, GridSegmenter(2)).regions(picture(), 4)
    with pytest.raises(ConfigError, match="found 2 files"):
        alone.regions(picture(), 4)


def test_another_file_is_no_cache(tmp_path):
    from safetensors.torch import save_file

    save_file({"masks": torch.zeros(2, 4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"expected masks \(R, g, g\) uint8 .*found masks \(2, 4, 4\)"):
        read_regions(tmp_path / "x.safetensors")
    regions = select_regions(GridSegmenter().segment(picture()), 4)
    assert torch.equal(read_regions(write_regions(tmp_path / "y/z.safetensors", regions)).masks, regions.masks)


def test_masks_of_a_user_stay_through_a_chain():
    mask = torch.zeros(40, 64)
    mask[:20, :32] = 1
    given = GivenRegions(mask)
    made = given.regions(picture(), 4)
    assert made.geometry[:, 7].tolist() == [1, 0] and made.masks[1, 0, 0] == 255 and made.masks[1, 3, 3] == 0
    assert torch.equal(given.regions(picture(9, 9), 4).masks, made.masks)
    whole = GivenRegions(torch.stack([torch.ones(40, 64), mask, mask])).regions(picture(), 4)
    assert len(whole.masks) == 3 and not whole.geometry[:, 7].any(), "what is drawn stays, also the whole picture and twice"
    with pytest.raises(ConfigError, match="covers something"):
        GivenRegions(torch.zeros(2, 4, 4))


def test_no_region_at_all_is_the_background():
    none = FoundMasks(torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(0), torch.zeros(0))
    assert select_regions(none, 4).geometry.isfinite().all()
    with pytest.raises(ConfigError, match=r"expected masks of shape \(N, H, W\)"):
        select_regions(FoundMasks(torch.zeros(8, 8), torch.zeros(0), torch.zeros(0)), 4)


def test_words_for_finders(tmp_path):
    sam = write_sam(tmp_path / "segmenter", "sam")
    auto = make_finder("auto", root=tmp_path, segmenter=sam)
    assert network_of(auto) is auto.segmenter.model and network_of(make_finder("grid", root=tmp_path)) is None
    assert make_finder("sam:segmenter", root=tmp_path).segmenter.name == auto.segmenter.name
    cached = make_finder("cached:kept", root=tmp_path, segmenter=sam)
    assert cached.folder == tmp_path / "kept" and network_of(cached) is not None
    assert network_of(make_finder("cached:kept", root=tmp_path)) is None and make_finder("none", root=tmp_path) is None
    assert make_finder("grid:3", root=tmp_path).segmenter.side == 3
    for name in ("sam", "eyes", "grid:0", "grid:x", ""):
        with pytest.raises(ConfigError, match="segmenter: expected one of auto, sam:DIR"):
            make_finder(name, root=tmp_path)
    with pytest.raises(CheckpointError, match="expected a segmenter .*found no folder `segmenter`"):
        make_finder("auto", root=tmp_path)
    with pytest.raises(CheckpointError, match="expected sam2 as the segmenter says, found sam"):
        make_finder("sam2:segmenter", root=tmp_path)
