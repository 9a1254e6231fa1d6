"""Measures of candidates: hashes, gates, z-scores against hand-made numbers, and what is not at hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.tests.pictures import draw_picture
from reasonedit.training.data.label.annotators import Shown
from reasonedit.training.data.label.candidates import Gates, Measures, best, dhash, distance, is_near, standardised

MARKS = {"identity": 5.0, "plausible_before": 5.0, "quality": 5.0, "ssim": 0.5}


def test_the_hash_is_that_of_its_definition(tmp_path):
    rising = np.tile(np.linspace(0, 255, 90, dtype=np.uint8), (80, 1))
    Image.fromarray(rising).save(tmp_path / "rising.png")
    Image.fromarray(rising[:, ::-1]).save(tmp_path / "falling.png")
    assert dhash(tmp_path / "rising.png") == "f" * 16 and dhash(tmp_path / "falling.png") == "0" * 16
    assert distance("f" * 16, "0" * 16) == 64 and distance("1" + "0" * 15, "0" * 16) == 1


def test_a_scaled_copy_is_near_and_another_picture_is_not(tmp_path):
    draw_picture(96, 96).save(tmp_path / "a.png")
    draw_picture(96, 96).resize((64, 64)).save(tmp_path / "b.png")
    draw_picture(96, 96).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c.png")
    a, b, c = (dhash(tmp_path / f"{name}.png") for name in "abc")
    assert is_near(b, [c, a], 6) and not is_near(c, [a], 6) and not is_near(a, [], 6) and not is_near(a, [a], 0)


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ({"ssim": 0.5}, None),
        ({"ssim": 0.96}, "too-alike"),
        ({"ssim": 0.5, "lpips": 0.19}, "outside-lpips"),
        ({"ssim": 0.5, "lpips": 0.56}, "outside-lpips"),
        ({"ssim": 0.5, "lpips": 0.2, "clip_source": 0.21}, "not-the-caption"),
        ({"ssim": 0.95, "lpips": 0.55, "clip_source": 0.22}, None),
    ],
)
def test_gates_stand_where_the_design_puts_them_and_what_was_not_measured_fails_none(numbers, fault):
    assert Gates().fault(numbers) == fault


def test_marks_have_a_gate_only_where_one_is_asked_for():
    low = MARKS | {"identity": 3.0}
    assert Gates().marked_down(low) is None
    assert Gates(mark=4).marked_down(low) == "low-mark" and Gates(mark=4).marked_down(MARKS) is None


def test_scores_are_means_of_z_scores_of_what_all_have():
    rows = [MARKS | {"identity": 2.0, "lpips": 0.2}, MARKS | {"identity": 4.0, "lpips": 0.4}, MARKS | {"identity": 9.0}]
    scores, counted = standardised(rows)
    assert counted == ("identity", "plausible_before", "quality", "ssim")  # one has no LPIPS, so none counts by it
    values = np.array([2.0, 4.0, 9.0])
    assert scores == pytest.approx(((values - 5) / values.std() / 4).tolist())


def test_less_distance_and_a_wider_gap_are_better():
    near = MARKS | {"lpips": 0.3, "clip_source": 0.3, "clip_target": 0.2}
    scores, counted = standardised([near, near | {"lpips": 0.4}, near | {"clip_target": 0.3}])
    assert {"likeness", "clip_gap"} <= set(counted) and scores[0] > max(scores[1:])


def test_one_candidate_alone_has_nothing_to_be_held_against():
    assert standardised([MARKS])[0] == [0.0]


def test_of_equals_the_order_of_the_list_decides_nothing(tmp_path):
    some = [Shown(tmp_path, f"{number:064x}", (1, 1)) for number in range(5)]
    first = [some[at].sha256 for at in best(some, [0.0] * 5, 2)]
    assert first == [some[::-1][at].sha256 for at in best(some[::-1], [0.0] * 5, 2)]
    assert best(some, [0.0, 3.0, 1.0, 2.0, 0.0], 3) == [1, 3, 2]


def test_everything_that_is_at_hand_is_measured_and_named(tmp_path):
    class Clip:
        name, sha256 = "clip", "a" * 64

        def pictures(self, paths):
            return np.array([[0.6, 0.8]])

        def words(self, texts):
            assert texts == ["before", "after"]
            return np.array([[1.0, 0.0], [0.0, 1.0]])

    class Other:
        name, sha256 = "other", "b" * 64

        def distance(self, a, b):
            return 0.25

        def score(self, path):
            return 7.0

    draw_picture(48, 32).save(tmp_path / "a.png")
    draw_picture(48, 32).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    found = Measures(Clip(), Other(), Other()).of(a, b, "before", "after")
    assert {**found, "ssim": 0, "dhash": 0} == {
        "ssim": 0, "dhash": 0, "lpips": 0.25, "clip_source": 0.6, "clip_target": 0.8, "aesthetics": 7.0,
    }  # fmt: skip
    bare = Measures().of(a, a, "before", "after")
    assert set(bare) == {"ssim", "dhash"} and bare["ssim"] == 1.0
    assert Measures().name == "ssim" and Measures(Clip(), None, Other()).name == "ssim clip+aaaaaaaa other+bbbbbbbb"


@pytest.mark.parametrize("wrong", [{"lpips": (0.5, 0.2)}, {"ssim": 1.5}, {"near": -1}, {"mark": 11.0}, {"clip": float("nan")}])
def test_gates_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        Gates(**wrong)
