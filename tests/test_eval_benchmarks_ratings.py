"""Ins-Align out of a CSV file of people's scores, and its stand-in beside it."""

from __future__ import annotations

import pytest

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.tests.benchmark_tools import prepared
from reasonedit.training.eval.benchmarks.marks import ItemScore
from reasonedit.training.eval.benchmarks.ratings import ins_align, read_ratings


def write(path, *lines: str):
    path.write_text("rater,id,score\n" + "".join(f"{line}\n" for line in lines), encoding="utf-8-sig")
    return path


def test_the_mean_is_over_items_of_the_means_over_raters(tmp_path):
    manifest = prepared("reason50k", tmp_path)
    path = write(tmp_path / "r.csv", "ann,r0,1", "bob,r0,3", "ann,r1,5", "ann,r2,2", "bob, r2 ,2")
    ratings = read_ratings(path, (1, 5))
    scored = [
        (item, ItemScore({"ins_align_proxy": (value,)})) for item, value in zip(manifest.items, (0.2, 0.9, 0.1), strict=False)
    ]
    scored += [(item, ItemScore({"ins_align_proxy": (None,)})) for item in manifest.items[3:]]
    told = ins_align(ratings, manifest.items, scored)
    assert (told["n"], told["n_scored"]) == (5, 3)
    assert told["mean"] == pytest.approx((0.25 + 1.0 + 0.25) / 3) and told["low"] <= told["mean"] <= told["high"]
    assert told["raters"] == {"ann": {"n": 3, "mean": pytest.approx(1.25 / 3)}, "bob": {"n": 2, "mean": pytest.approx(0.375)}}
    assert told["groups"]["Physical"] == {"n": 1, "mean": 0.25} and "Story" not in told["groups"]
    assert told["proxy"] == {"n": 3, "spearman": pytest.approx(0.866, abs=1e-3)}  # ranks 1.5 3 1.5 against 2 3 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["ann,r0,7"], r"r\.csv:2: expected a score from 0 to 1, found '7'"),
        (["ann,r0,good"], "expected a score from 0 to 1, found 'good'"),
        (["ann,r0,nan"], "expected a score"),
        (["ann,r0"], "expected a score"),
        (["ann,r0,1", "ann,r0,0"], r"r\.csv:3: .* the same rater and id twice"),
        ([",r0,1"], "expected a rater and an id"),
        ([], "found none"),
    ],
)
def test_what_is_no_rating_is_told_with_its_line(lines, words, tmp_path):
    with pytest.raises(DataError, match=words):
        read_ratings(write(tmp_path / "r.csv", *lines))


def test_other_columns_files_scales_and_items_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("who,what\n1,2\n")
    with pytest.raises(DataError, match="expected the columns rater, id, score"):
        read_ratings(tmp_path / "a.csv")
    with pytest.raises(DataError, match="expected a CSV file"):
        read_ratings(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="--ratings-scale"):
        read_ratings(tmp_path / "a.csv", (5, 1))
    with pytest.raises(DataError, match="expected ids of items that were judged, found strange"):
        ins_align(read_ratings(write(tmp_path / "r.csv", "ann,strange,1")), prepared("reason50k", tmp_path).items, [])
