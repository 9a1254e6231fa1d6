"""Strands: runs side by side, answered in batches, in an order that never changes."""

from __future__ import annotations

import threading

import pytest

from reasonedit.training.eval.strands import Answer, ask, ask_one, run_strands, spent


def echo(log=None, seconds=1.0):
    def serve(requests):
        if log is not None:
            log.append(list(requests))
        return [Answer(request, seconds) for request in requests]

    return serve


def test_each_gets_its_own_answers():
    def work(number):
        got = [ask("a" if step % 2 else "b", [(number, step)] * (1 + step % 3), ["x"] * (1 + step % 3)) for step in range(9)]
        assert got == [[(number, step)] * (1 + step % 3) for step in range(9)]
        return number

    made = dict(run_strands([lambda n=n: work(n) for n in range(20)], {"a": echo(), "b": echo()}, width=6))
    assert made == {n: n for n in range(20)}


def test_all_that_wait_for_one_kind_are_served_together():
    """Three ask for a, one for b: a goes first, and b is served with those that come to it later."""
    log_a, log_b = [], []

    def work(number):
        if number < 3:
            ask_one("a", number, "x")
        return ask_one("b", number, "x")

    list(run_strands([lambda n=n: work(n) for n in range(4)], {"b": echo(log_b), "a": echo(log_a)}, width=4))
    assert (log_a, log_b) == ([[0, 1, 2]], [[0, 1, 2, 3]])


def test_the_order_is_the_same_every_time():
    def run():
        log = []

        def work(number):
            for step in range(number % 5):
                ask_one("ab"[(number + step) % 2], (number, step), "x")

        serve = {kind: echo(log) for kind in "ab"}
        ended = [number for number, _ in run_strands([lambda n=n: work(n) for n in range(30)], serve, width=7)]
        return ended, log

    assert run() == run()
    assert sorted(run()[0]) == list(range(30))


def test_no_more_than_width_at_a_time():
    active, most = set(), []

    def work(number):
        active.add(number)
        most.append(len(active))
        ask_one("a", number, "x")
        active.discard(number)

    list(run_strands([lambda n=n: work(n) for n in range(10)], {"a": echo()}, width=3))
    assert max(most) == 3


def test_time_is_counted_by_label_for_each_run():
    def work(number):
        ask("a", [1] * number, [f"l{n % 2}" for n in range(number)])
        return spent()

    made = dict(run_strands([lambda n=n: work(n) for n in range(4)], {"a": echo(seconds=2.0)}, width=4))
    assert made == {0: {}, 1: {"l0": 2.0}, 2: {"l0": 2.0, "l1": 2.0}, 3: {"l0": 4.0, "l1": 2.0}}


def test_an_answered_error_is_raised_where_it_was_asked():
    def serve(requests):
        return [Answer(error=ValueError("odd")) if request % 2 else Answer(request) for request in requests]

    def work(number):
        try:
            return ask_one("a", number, "x")
        except ValueError as error:
            return str(error)

    made = dict(run_strands([lambda n=n: work(n) for n in range(4)], {"a": serve}, width=4))
    assert made == {0: 0, 1: "odd", 2: 2, 3: "odd"}


def test_an_error_of_a_run_ends_everything_and_leaves_no_thread():
    before = threading.active_count()

    def work(number):
        ask_one("a", number, "x")
        if number == 2:
            raise RuntimeError("broken")
        ask_one("a", number, "x")

    with pytest.raises(RuntimeError, match="broken"):
        list(run_strands([lambda n=n: work(n) for n in range(5)], {"a": echo()}, width=5))
    assert threading.active_count() == before


def test_an_error_of_what_serves_leaves_no_thread():
    before = threading.active_count()

    def serve(requests):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_strands([lambda: ask_one("a", 0, "x")] * 3, {"a": serve}, width=3))
    assert threading.active_count() == before


def test_stopping_half_way_leaves_no_thread():
    before = threading.active_count()
    works = [lambda n=n: [ask_one("a", n, "x") for _ in range(1 + n)] for n in range(4)]
    running = run_strands(works, {"a": echo()}, width=4)
    assert next(running)[0] == 0
    running.close()
    assert threading.active_count() == before
