"""From marks to tables: the rules of each benchmark, the published rows, and what is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.training.eval.benchmarks import aggregate
from reasonedit.training.eval.benchmarks.aggregate import (
    KRIS_DIMENSIONS,
    KRIS_TYPES,
    RULES,
    combine,
    headline,
    item_value,
    kris_type,
    rule_of,
    spread,
    summarise,
)
from reasonedit.training.eval.benchmarks.items import COUNTS, Item
from reasonedit.training.eval.benchmarks.marks import ItemScore, Options, score_item, worst
from reasonedit.training.eval.benchmarks.protocols import KNOWLEDGE
from reasonedit.training.eval.benchmarks.tables import published_rows

PLAIN = Options()


def item(bench: str, group: str, name: str = "0", **more) -> Item:
    return Item(bench, f"{group}/{name}", group, "Change it.", ("a.png",), **more)


def kris_items(group: str) -> list[Item]:
    return [item("kris", group, str(at), refs={"explain": "So it is."}) for at in range(COUNTS["kris"][group])]


def with_means(means: dict[str, float]) -> list[tuple[Item, ItemScore]]:
    """The full KRIS set whose items all have the mean of their type, with as many values as the benchmark asks for."""
    return [
        (each, ItemScore({"score": (means[kris_type(each)],) * (4 if group in KNOWLEDGE else 3)}))
        for group in COUNTS["kris"]
        for each in kris_items(group)
    ]


@pytest.fixture
def no_resampling(monkeypatch):
    """For tests of means of whole sets, which are none of intervals."""
    monkeypatch.setattr(aggregate, "interval", lambda values, *key: (min(values), max(values)))


# ---- published rows --------------------------------------------------------------------------------------------------------


def test_types_and_dimensions_of_kris_divide_its_categories():
    counts = {name: sum(COUNTS["kris"][group] for group in groups) for name, groups in KRIS_TYPES.items()}
    assert counts == {"factual": 449, "conceptual": 518, "procedural": 300}
    assert sorted(sum(KRIS_TYPES.values(), ())) == sorted(COUNTS["kris"]) == sorted(sum(KRIS_DIMENSIONS.values(), ()))
    values = {name: sum(COUNTS["kris"][g] * (4 if g in KNOWLEDGE else 3) for g in own) for name, own in KRIS_TYPES.items()}
    assert values == {"factual": 1347, "conceptual": 2072, "procedural": 1050}


@pytest.mark.parametrize(
    ("rule", "types", "overall"),
    [
        ("kris-sample", (58.23, 60.55, 46.21), 56.33),
        ("kris-sample", (53.28, 50.36, 42.53), 49.54),
        ("kris-flat", (60.26, 55.86, 51.69), 56.21),
        ("kris-flat", (84.24, 74.83, 85.53), 80.18),
    ],
)
def test_kris_overall_of_a_whole_set(rule, types, overall, no_resampling):
    means = dict(zip(KRIS_TYPES, types, strict=True))
    told = summarise(RULES[rule], with_means(means))
    assert headline("kris", told)["mean"] == pytest.approx(overall, abs=0.005)
    assert {name: row["score"]["mean"] for name, row in told["types"].items()} == pytest.approx(means)
    other = summarise(RULES["kris-flat" if rule == "kris-sample" else "kris-sample"], with_means(means))
    assert abs(headline("kris", other)["mean"] - overall) > 0.05  # the two are told apart


SETS = {"kris-sample": (449, 518, 300), "kris-flat": (1347, 2072, 1050)}
KRIS_ROWS = [row for row in published_rows("kris") if row["rule"] in SETS]


def test_enough_published_rows_are_held_against_the_rules():
    assert len(KRIS_ROWS) >= 35 and len(published_rows("kris")) - len(KRIS_ROWS) == 4  # three previews, UniWorld-V1


@pytest.mark.parametrize("row", KRIS_ROWS, ids=lambda row: row["model"])
def test_published_rows_of_kris_follow_the_rule_they_name(row):
    means = {name: row["values"][name] for name in KRIS_TYPES}
    weights = dict(zip(KRIS_TYPES, SETS[row["rule"]], strict=True))
    assert combine(means, weights) == pytest.approx(row["values"]["overall"], abs=0.015)


@pytest.mark.parametrize(
    "row", [row for row in published_rows("imgedit") if "add" in row["values"]], ids=lambda row: row["model"]
)
def test_published_rows_of_imgedit_are_means_of_nine_types(row, no_resampling):
    scores = [
        (item("imgedit", kind, str(at)), ItemScore({"score": (row["values"][kind],)}))
        for kind, count in COUNTS["imgedit"].items()
        for at in range(count)
    ]
    told = summarise(RULES["imgedit-macro"], scores)
    assert headline("imgedit", told)["mean"] == pytest.approx(row["values"]["overall"], abs=0.0051)
    if row["model"].startswith("FireRed"):
        assert headline("imgedit", summarise(RULES["imgedit-items"], scores))["mean"] == pytest.approx(4.596, abs=0.001)


def test_published_rows_of_reason50k_are_means_of_four_categories():
    for row in published_rows("reason50k"):
        values = [row["values"].get(name) for name in ("physical", "temporal", "causal", "story")]
        if None not in values:
            assert np.mean(values) == pytest.approx(row["values"]["overall"], abs=0.0051)


# ---- marks -----------------------------------------------------------------------------------------------------------------


def test_gedit_takes_minima_and_the_root_per_item_and_groups_alike():
    def score(group, name, sc, pq):
        marks = {"SC": {"success": sc, "restraint": 10}, "PQ": {"naturalness": 10, "cleanness": pq}}
        return item("gedit", group, name), score_item(item("gedit", group, name), marks, PLAIN)

    scores = [score("a", "0", 4, 9), score("a", "1", 0, 10), score("b", "0", 9, 9)]
    assert [each.metrics["O"] for _, each in scores] == [(6.0,), (0.0,), (9.0,)]
    macro, micro = (headline("gedit", summarise(RULES[name], scores)) for name in ("gedit-macro", "gedit-micro"))
    assert macro["mean"] == pytest.approx((3 + 9) / 2) and micro["mean"] == pytest.approx(5)
    assert macro["zeros"] == pytest.approx(1 / 3)


def test_imgedit_clamps_to_the_first_mark_and_counts_it():
    marks = {"edit": {"compliance": 2, "naturalness": 5, "preservation": 4}}
    clamped, free, quirk = (
        score_item(item("imgedit", "add"), marks, Options(*each)) for each in ((True,), (False,), (True, True))
    )
    assert clamped.metrics["score"] == (2.0,) and clamped.clamped
    assert free.metrics["score"] == quirk.metrics["score"] == (3.67,) and not free.clamped  # two decimals, as its script


@pytest.mark.parametrize(
    ("group", "free", "marks", "score", "accuracy"),
    [
        ("temporal_reasoning", False, (5, 5, 5), 100.0, 100.0),
        ("causal_reasoning", False, (4, 3, 5), 25 * (0.3 * 4 + 0.5 * 3 + 0.2 * 5 - 1), 0.0),
        ("spatial_reasoning", False, (5, 1, 5), 25 * ((0.3 * 5 + 0.5 + 1.0) / 2 - 1), 0.0),
        ("spatial_reasoning", False, (1, 1, 1), 0.0, 0.0),  # halved, but not below 1
        ("causal_reasoning", True, (None, 5, 5), 100.0, 100.0),
        ("causal_reasoning", True, (None, 4, 2), 25 * (0.8 * 4 + 0.2 * 2 - 1), 0.0),
        ("logical_reasoning", False, (1, 1, None), 100.0, 100.0),
        ("logical_reasoning", False, (0, 1, None), 25 * (0.3 + 0.7 * 5 - 1), 0.0),
        ("logical_reasoning", False, (1, 0, None), 25 * ((0.3 * 5 + 0.7) / 2 - 1 if (0.3 * 5 + 0.7) / 2 > 1 else 0), 0.0),
    ],
)
def test_rise_rules(group, free, marks, score, accuracy):
    roles = ("consistency", "reasoning", "plausibility")
    told = {role: {role: mark} for role, mark in zip(roles, marks, strict=True) if mark is not None}
    found = score_item(item("rise", group, flags={"consistency_free": free}), told, PLAIN).metrics
    assert found["score"] == (pytest.approx(score),) and found["accuracy"] == (accuracy,)


def test_rise_fault_of_the_official_script_is_repeated_on_demand_only():
    marks = {"consistency": {"consistency": 1}, "reasoning": {"reasoning": 5}, "plausibility": {"plausibility": 5}}
    one = item("rise", "causal_reasoning")
    right = score_item(one, marks, Options(quirk_free=True)).metrics
    wrong = score_item(one, marks, Options(quirks=True, quirk_free=True)).metrics
    assert right["score"] == (pytest.approx(25 * (0.3 + 2.5 + 1 - 1)),) and wrong["score"] == (100.0,)
    assert right["accuracy"] == wrong["accuracy"] == (0.0,)


def test_kris_has_knowledge_where_it_was_asked_for():
    marks = {"consistency": {"consistency": 5}, "quality": {"quality": 3}, "instruction": {"instruction": 2, "knowledge": 1}}
    found = score_item(item("kris", "biology", refs={"explain": "x"}), marks, PLAIN).metrics
    assert found["score"] == (100.0, 50.0, 25.0, 0.0) and found["knowledge"] == (0.0,)
    assert "knowledge" not in score_item(item("kris", "color_change"), marks, PLAIN).metrics


# ---- what is missing -------------------------------------------------------------------------------------------------------

BENCH_GROUPS = {"gedit": "a", "imgedit": "add", "kris": "biology", "rise": "causal_reasoning", "reason50k": "Story"}


@pytest.mark.parametrize("bench", BENCH_GROUPS)
def test_nothing_answered_is_no_score_and_its_bounds_are_the_scale(bench):
    one = item(bench, BENCH_GROUPS[bench], refs={"explain": "x", "output_text": "y"})
    rule = next(rule for rule in RULES.values() if rule.bench == bench)
    row = headline(bench, summarise(rule, [(one, score_item(one, {}, PLAIN))]))
    assert (row["n"], row["n_scored"], row["mean"], row["low"], row["zeros"]) == (1, 0, None, None, None)
    low = headline(bench, summarise(rule, [(one, worst(one, PLAIN))]))
    assert row["at_least"] == low["mean"] < row["at_most"] and low["n_scored"] == 1


def test_half_an_answer_is_none_for_the_item_but_values_that_are_there_count_flat():
    marks = {"consistency": {"consistency": 5}, "quality": None, "instruction": {"instruction": 1}}
    score = score_item(item("kris", "color_change"), marks, PLAIN).metrics["score"]
    assert score == (100.0, None, 0.0)
    assert item_value(RULES["kris-sample"], score) == (None, 0) and item_value(RULES["kris-flat"], score) == (50.0, 2)


def test_a_mark_below_the_best_settles_accuracy_whatever_is_missing():
    def accuracy(reasoning):
        marks = {"reasoning": {"reasoning": reasoning}, "plausibility": None, "consistency": {"consistency": 5}}
        return score_item(item("rise", "causal_reasoning"), marks, PLAIN).metrics

    assert accuracy(4)["accuracy"] == (0.0,) and accuracy(5)["accuracy"] == (None,) and accuracy(4)["score"] == (None,)


def test_the_guess_of_gedits_script_is_fixed_and_only_made_on_demand():
    marks = {"SC": None, "PQ": {"naturalness": 9, "cleanness": 9}}
    one = item("gedit", "a")
    assert score_item(one, marks, PLAIN).metrics["SC"] == (None,)
    first, second = (score_item(one, marks, Options(quirks=True)).metrics for _ in range(2))
    assert first == second and 0 <= first["SC"][0] <= 10
    guesses = {score_item(item("gedit", "a", str(n)), marks, Options(quirks=True)).metrics["SC"] for n in range(200)}
    assert len(guesses) == 11


# ---- overall and spread ----------------------------------------------------------------------------------------------------

VALUES = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1, max_size=4)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.sampled_from(["gedit-macro", "gedit-micro", "kris-flat", "kris-sample"]))
def test_an_overall_is_the_mean_its_rule_names_and_the_mean_of_its_spread(values, name):
    rule = RULES[name]
    found = [(item(rule.bench, group, str(at)), tuple(own)) for at, (group, own) in enumerate(values)]
    made = spread(rule, found)
    whole = {at: own for at, (_, own) in enumerate(found) if None not in own}
    if rule.weigh == "values":
        flat = [value for _, own in found for value in own if value is not None]
        expected = np.mean(flat) if flat else None
    elif rule.weigh == "items":
        expected = np.mean([np.mean(own) for own in whole.values()]) if whole else None
    else:
        groups = {}
        for at, own in whole.items():
            groups.setdefault(found[at][0].group, []).append(np.mean(own))
        expected = np.mean([np.mean(own) for own in groups.values()]) if groups else None
    if expected is None:
        assert made is None
    else:
        assert made.overall == pytest.approx(expected, abs=1e-9) and np.mean(made.values) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_a_macro_mean_is_that_of_its_groups():
    rng = np.random.default_rng(5)
    sizes = {"a": 90, "b": 10}
    found = [
        (item("gedit", group, str(at)), (float(value),))
        for group, size in sizes.items()
        for at, value in enumerate(rng.normal(8 if group == "a" else 2, 1, size).clip(0, 10))
    ]
    row = summarise(RULES["gedit-macro"], [(one, ItemScore({"O": value})) for one, value in found])["overall"]["O"]
    by = {group: np.array([value[0] for one, value in found if one.group == group]) for group in sizes}
    error = 0.5 * math.sqrt(sum(own.var() / len(own) for own in by.values()))
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)  # and not that of the gap between groups


def test_a_rule_of_another_benchmark_is_refused():
    with pytest.raises(ConfigError, match="kris-sample, kris-flat"):
        rule_of("gedit-macro", "kris")
